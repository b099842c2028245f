"""Names of the quantisation schemes. Imports no PyTorch, so that the command line starts fast."""

SCHEMES = ("int8", "int4")
"""Schemes of quantised weights: see ``quantised_weight.py``."""
