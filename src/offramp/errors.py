"""What a user can get wrong. Each error is a ValueError whose message is one clear sentence:
what was expected, and what came. The command line prints it and exits with code 2.
"""


class OfframpError(ValueError):
    """Base of every error that offramp raises about its input."""


class ConfigError(OfframpError):
    """A field of a configuration, a flag, a weight or a threshold is out of range."""


class CorpusError(OfframpError):
    """A corpus is missing, empty, unreadable or too short."""


class CheckpointError(OfframpError):
    """A model folder is missing, damaged or of another kind; or an output folder is taken."""


class UnsupportedArchitectureError(OfframpError):
    """A model is of a kind that offramp cannot run, or not in the way that is asked for."""


class TrainingError(OfframpError):
    """A training run cannot continue: its loss is not finite, or its process was killed."""


class GenerationError(OfframpError):
    """A text cannot be generated: the model's logits are not finite."""


class CertificateError(OfframpError):
    """A certificate is none, was edited, or belongs to another model."""
