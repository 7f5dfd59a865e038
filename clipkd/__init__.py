"""Distill a large CLIP into a small one. `clipkd --help` lists the commands; importing this package loads nothing heavy."""

__version__ = "0.1.0"
