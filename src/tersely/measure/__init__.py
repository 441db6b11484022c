"""What is measured on calibration text, for the methods."""

from tersely.measure.statistics import MEASURES, Statistics, output_energies

__all__ = ["MEASURES", "Statistics", "output_energies"]
