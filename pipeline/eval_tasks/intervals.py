"""The mean of a few seeds with its 95 % interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its 95 % interval; None where one value alone says nothing about its spread."""

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    def as_json(self) -> dict:
        return {"mean": self.mean, "half_width_95": self.half_width, "values": list(self.values)}


def student_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student-t interval of the mean over seeds (n - 1 degrees of freedom, two-sided)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean=mean, half_width=None, values=tuple(values))
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half_width = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean=mean, half_width=half_width, values=tuple(values))
