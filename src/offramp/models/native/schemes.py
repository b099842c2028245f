"""Names of the quantisation schemes. Imports no PyTorch, so that the command line starts fast."""

from typing import Literal, get_args

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""Schemes of quantised weights: see ``quantised_weight.py``."""


def in_words(scheme: Scheme) -> str:
    """Return which weights of a quantised model have which scheme, for messages."""
    if scheme == "int4":
        return "int4 weights in attention and MLP, int8 in LM heads"
    return "int8 weights in attention, MLP and LM heads"
