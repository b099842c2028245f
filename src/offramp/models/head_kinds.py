"""The kinds of exit heads; ``exit_heads`` describes and builds them. Imports no PyTorch."""

from typing import Literal, get_args

ExitHeadKind = Literal["shared", "norm", "adapter", "full", "specialist"]


EXIT_HEAD_KINDS: tuple[str, ...] = get_args(ExitHeadKind)
