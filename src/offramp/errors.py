"""Errors that offramp raises about its input.

Each is a ValueError whose message is one sentence that names what was expected and what was
found. The command line prints the message and exits with code 2.
"""


class OfframpError(ValueError):
    """Base of every error that offramp raises about its input."""


class ConfigError(OfframpError):
    """A field of a configuration, a flag, a weight or a threshold is out of range."""


class CorpusError(OfframpError):
    """A corpus is missing, empty, unreadable or too short."""


class CheckpointError(OfframpError):
    """A model folder is missing, damaged or of another kind, or an output folder is in use."""


class UnsupportedArchitectureError(OfframpError):
    """A model has an architecture that offramp cannot run, or cannot run in the requested way."""


class TrainingError(OfframpError):
    """A training run cannot continue: its loss is not finite, or its process was killed."""


class GenerationError(OfframpError):
    """A text cannot be generated: the model's logits are not finite."""


class QueueFullError(OfframpError):
    """A request is refused, because as many as may wait already do; it can be tried again."""


class CertificateError(OfframpError):
    """A file is not a certificate, was edited, or belongs to another model."""


class OfframpWarning(UserWarning):
    """Something is left out, or is not as the user may expect; the work goes on."""
