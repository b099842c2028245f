"""Train a model with any objective, in one process or several; killed runs can be resumed.

``ExitLossMixin`` does the same in the trainers of ``transformers`` and ``trl``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.training.distributed import join, whole_model
    from offramp.training.loop import train
    from offramp.training.tracking import RunLog
    from offramp.training.trainer import ExitLossMixin

_HOMES = {
    "ExitLossMixin": "trainer",
    "RunLog": "tracking",
    "join": "distributed",
    "train": "loop",
    "whole_model": "distributed",
}

__all__ = ["ExitLossMixin", "RunLog", "join", "train", "whole_model"]


if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        from importlib import import_module

        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
