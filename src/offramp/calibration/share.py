"""The share of an audit, checked where neither PyTorch nor NumPy is imported."""

from offramp.errors import ConfigError
from offramp.schema import shown


def check_share(share: float) -> None:
    """Raise a ConfigError for an audit share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ConfigError(f"audit: expected a share above 0 and at most 1, got {shown(share)}")
