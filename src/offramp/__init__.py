"""offramp: early-exit ("depth-adaptive") Transformer language models.

Exit layers are counted from 1 everywhere: ``exit_layer = n`` means *after n blocks*,
and ``exit_layer = num_layers`` is the full model.
"""

from offramp.data import Corpus, load_corpus
from offramp.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    CorpusError,
    GenerationError,
    OfframpError,
    TrainingError,
    UnsupportedArchitectureError,
)
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
from offramp.version import __version__

__all__ = [
    "RECOMMENDED",
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
