"""Settings of the site that `make docs` builds: the repository is its source, so links are those that one sees there.

Nothing of it is loaded from other machines when a page is read.
"""

from importlib.metadata import version as find_version

project = "OBLITERATUS"
copyright = "its authors, Apache-2.0"
version = release = find_version("obliteratus")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/**/*.md",
    "docs/**/*.rst",
    "organisms/README.md",
    "organisms/*/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
# Folders that hold no page are not walked through.
exclude_patterns = ["build", ".*", "src", "tests", "bench", "tools", "dist", "docs/plugin-template/src"]

# Page → pages below it in the sidebar. They are named here, since a forge would show a toctree as code.
CHILDREN = {
    "docs/experiments/README": "/docs/experiments/*",
    "docs/guide/plugins": "/docs/plugin-template/README",
    "organisms/README": "/organisms/*/README",
}


def add_children(app, docname, source):
    """Append a hidden toctree to the pages of CHILDREN."""
    if docname in CHILDREN:
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:glob:\n\n{CHILDREN[docname]}\n```\n"


def setup(app):
    """Let Sphinx call us."""
    app.connect("source-read", add_children)


myst_heading_anchors = 4  # links to sections, as on a forge
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["misc.highlighting_failure"]  # output of the terminal is no language
highlight_language = "none"

smartquotes = False  # they would make a dash of --option
default_role = "literal"  # `name` in a docstring
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": False}
maximum_signature_line_length = 88

html_theme = "furo"
html_title = "OBLITERATUS"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_extra_path = ["_extra"]  # index.html, which leads to the first page
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
