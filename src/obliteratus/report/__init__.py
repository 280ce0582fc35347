"""Pages and plots: one set of Jinja2 templates, and the plotting primitives.

Takes plain data from whoever has something to show. May import core only.
"""
