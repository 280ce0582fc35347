"""Weights as stored: formats, files, quantization, devices and offloading, and the embedded model organisms.

May import core and report.
"""
