"""offramp: early-exit ("depth-adaptive") Transformer language models.

Exit layers are counted from 1 everywhere: ``exit_layer = n`` means *after n blocks*,
and ``exit_layer = num_layers`` is the full model.
"""

from typing import TYPE_CHECKING, Any

from offramp.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    CorpusError,
    GenerationError,
    OfframpError,
    OfframpWarning,
    QueueFullError,
    TrainingError,
    UnsupportedArchitectureError,
)
from offramp.version import __version__

if TYPE_CHECKING:
    from offramp.commands.audit import AuditLog
    from offramp.data.corpus import Corpus, load_corpus
    from offramp.evaluation.sweep import SweepRow, sweep
    from offramp.evaluation.trace import ExitTrace, collect_trace
    from offramp.exits.policy import ThresholdPolicy
    from offramp.exits.weights import (
        RECOMMENDED,
        asymmetric,
        asymmetric_deep_supervision,
        asymmetric_exits,
        deep_supervision,
        standard,
    )
    from offramp.lm import EarlyExitLM, load
    from offramp.making import study, train, tune
    from offramp.models.base import EarlyExitModel, Step
    from offramp.models.exit_heads import UntrainedExitsWarning
    from offramp.models.huggingface.exits_file import from_pretrained, save_exits
    from offramp.models.huggingface.model import HuggingFaceModel
    from offramp.models.kv_cache import KVCache
    from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
    from offramp.models.native.config import DecoderConfig
    from offramp.models.native.decoder import Transformer
    from offramp.models.native.llama import load_native
    from offramp.training.config import TrainConfig

_HOMES = {
    "offramp.commands.audit": ("AuditLog",),
    "offramp.data.corpus": ("Corpus", "load_corpus"),
    "offramp.evaluation.sweep": ("SweepRow", "sweep"),
    "offramp.evaluation.trace": ("ExitTrace", "collect_trace"),
    "offramp.exits.policy": ("ThresholdPolicy",),
    "offramp.exits.weights": (
        "RECOMMENDED",
        "asymmetric",
        "asymmetric_deep_supervision",
        "asymmetric_exits",
        "deep_supervision",
        "standard",
    ),
    "offramp.lm": ("EarlyExitLM", "load"),
    "offramp.making": ("study", "train", "tune"),
    "offramp.models.base": ("EarlyExitModel", "Step"),
    "offramp.models.exit_heads": ("UntrainedExitsWarning",),
    "offramp.models.huggingface.exits_file": ("from_pretrained", "save_exits"),
    "offramp.models.huggingface.model": ("HuggingFaceModel",),
    "offramp.models.kv_cache": ("KVCache",),
    "offramp.models.native.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "offramp.models.native.config": ("DecoderConfig",),
    "offramp.models.native.decoder": ("Transformer",),
    "offramp.models.native.llama": ("load_native",),
    "offramp.training.config": ("TrainConfig",),
}
"""Names by the module that each is imported from when it is first used (PEP 562), so that
``import offramp`` imports no PyTorch."""

_PACKAGES = ("calibration", "data", "evaluation", "exits", "generation", "models", "training")
"""Packages that ``import offramp`` alone makes available as its attributes."""

__all__ = [
    "RECOMMENDED",
    "AuditLog",
    "CertificateError",
    "CheckpointError",
    "ConfigError",
    "Corpus",
    "CorpusError",
    "DecoderConfig",
    "EarlyExitLM",
    "EarlyExitModel",
    "ExitTrace",
    "GenerationError",
    "HuggingFaceModel",
    "KVCache",
    "OfframpError",
    "OfframpWarning",
    "QueueFullError",
    "Step",
    "SweepRow",
    "ThresholdPolicy",
    "TrainConfig",
    "TrainingError",
    "Transformer",
    "UnsupportedArchitectureError",
    "UntrainedExitsWarning",
    "__version__",
    "asymmetric",
    "asymmetric_deep_supervision",
    "asymmetric_exits",
    "collect_trace",
    "deep_supervision",
    "from_pretrained",
    "load",
    "load_checkpoint",
    "load_corpus",
    "load_native",
    "save_checkpoint",
    "save_exits",
    "standard",
    "study",
    "sweep",
    "train",
    "tune",
]


if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

    def __getattr__(name: str) -> Any:
        """Import a public name, or a package of offramp, when it is first used."""
        from importlib import import_module

        if name in _PACKAGES:
            return import_module(f"{__name__}.{name}")
        for home, names in _HOMES.items():
            if name in names:
                value = getattr(import_module(home), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
