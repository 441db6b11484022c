"""A measured number and how sure it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and its 95 % interval, all in one unit.

    stderr is inf, and the interval without bounds, where one document or item shows no spread.
    """

    value: float
    stderr: float
    low: float
    high: float
