"""The share and the promise of an audit, checked where neither PyTorch nor NumPy is imported."""

from offramp.calibration.promise import RISKS
from offramp.errors import ConfigError
from offramp.schema import shown


def check_share(share: float) -> None:
    """Raise a ConfigError for an audit share outside (0, 1]."""
    if not (_is_number(share) and 0 < share <= 1):
        raise ConfigError(f"audit: expected a share above 0 and at most 1, got {shown(share)}")


def check_keep_promise(epsilon: float | None, risk: str, *, share: float | None) -> None:
    """Raise a ConfigError for a promise outside (0, 1), of no risk, or without an audit."""
    if risk not in RISKS:
        raise ConfigError(f"promise_risk: expected {' or '.join(RISKS)}, got {shown(risk)}")
    if epsilon is None:
        if risk != RISKS[0]:
            raise ConfigError(f"promise_risk: expected keep_promise with it, got {risk} alone")
        return
    if not (_is_number(epsilon) and 0 < epsilon < 1):
        raise ConfigError(f"keep_promise: expected a number between 0 and 1, got {shown(epsilon)}")
    if share is None:
        raise ConfigError("keep_promise: expected --audit SHARE with it, got none")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
