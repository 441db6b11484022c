"""What a job did and what it cost, as data, as text and as JSON."""

from tersely.report.job import Report, Row

__all__ = ["Report", "Row"]
