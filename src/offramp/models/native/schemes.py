"""Names of the quantisation schemes. Imports no PyTorch, so that the command line starts fast."""

from typing import Literal, get_args

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""Schemes of quantised weights: see ``quantised_weight.py``."""
