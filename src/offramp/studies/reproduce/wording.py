"""Means over seeds as text."""

import numpy as np

from offramp.studies.statistics import Seeds


def ppl(log_ppl: Seeds) -> str:
    """Mean PPL over the seeds where there was something to measure."""
    measured = np.exp(log_ppl[np.isfinite(log_ppl)])
    return f"{measured.mean():.2f}" if len(measured) else "none"


def share(shares: Seeds) -> str:
    """Mean share, in percent, over the seeds where there was something to measure."""
    measured = shares[np.isfinite(shares)]
    return f"{measured.mean():.1%}" if len(measured) else "none"


def percent(log_ratio: Seeds) -> str:
    """Mean difference over the seeds, in percent."""
    return f"{100.0 * np.expm1(log_ratio).mean():+.1f}%"
