"""A straight line by ordinary least squares, and how certain it is."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats

from offramp.studies.statistics import SIGNIFICANT, Interval, Seeds


@dataclass(frozen=True, kw_only=True)
class Line:
    """A fitted line; its intervals are 95% ones, by Student's t.

    They are None where as few points as the line has parameters leave no spread to judge by.
    """

    centre: float
    "Mean of x."
    squares: float
    "Sum of the squared distances of x from its mean."
    height: float
    "Mean of y, which the line has at ``centre``."
    slope: float
    count: int
    "Number of points."
    deviation: float
    "Standard deviation of the points about the line, of ``count - 2`` degrees of freedom."

    def at(self, x: float) -> float:
        """Return the line's height at x."""
        return self.height + self.slope * (x - self.centre)

    def interval(self, x: float, *, of_a_point: bool = False) -> Interval | None:
        """Return the interval of the line's height at x, or that for one more point there."""
        distance = (x - self.centre) ** 2 / self.squares
        return self._about(self.at(x), sqrt(of_a_point + 1 / self.count + distance))

    @property
    def slope_interval(self) -> Interval | None:
        """The interval of the slope."""
        return self._about(self.slope, 1 / sqrt(self.squares))

    @property
    def p_value(self) -> float | None:
        """Two-sided p value of a slope of zero; None where there is no spread to judge by."""
        if self.count < 3 or self.deviation == 0:
            return None
        t = self.slope * sqrt(self.squares) / self.deviation
        return float(2 * stats.t.sf(abs(t), self.count - 2))

    def _about(self, value: float, errors: float) -> Interval | None:
        """Return the interval of a value whose standard error is that many deviations."""
        if self.count < 3:
            return None
        half = float(stats.t.ppf(1 - SIGNIFICANT / 2, self.count - 2)) * self.deviation * errors
        return value - half, value + half


def fit_line(x: Seeds, y: Seeds) -> Line | None:
    """Fit a line to points, those that are not finite left out; None if all have the same x."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(set(x.tolist())) < 2:
        return None
    centre, height = float(x.mean()), float(y.mean())
    squares = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - height)).sum()) / squares
    residuals = y - height - slope * (x - centre)
    freedom = len(x) - 2
    return Line(
        centre=centre,
        squares=squares,
        height=height,
        slope=slope,
        count=len(x),
        deviation=sqrt(float((residuals**2).sum()) / freedom) if freedom else 0.0,
    )
