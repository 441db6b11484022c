"""The facts that jobs and measurements give: plain data, written and read as JSON, free of any library."""

from tersely.results.blame import Blame, Depth, Site
from tersely.results.estimate import Estimate
from tersely.results.evaluation import (
    Bin,
    Calibration,
    Comparison,
    Divergence,
    Evaluation,
    Part,
    Reliability,
    Sample,
    Setting,
    Subject,
    TaskResult,
    TextResult,
)
from tersely.results.job import Report, Reshaping, Row
from tersely.results.speed import Point, Speed
from tersely.results.trimming import Trimming

__all__ = [
    "Bin",
    "Blame",
    "Calibration",
    "Comparison",
    "Depth",
    "Divergence",
    "Estimate",
    "Evaluation",
    "Part",
    "Point",
    "Reliability",
    "Report",
    "Reshaping",
    "Row",
    "Sample",
    "Setting",
    "Site",
    "Speed",
    "Subject",
    "TaskResult",
    "TextResult",
    "Trimming",
]
