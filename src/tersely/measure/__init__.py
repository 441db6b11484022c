"""What is measured on calibration text, for the methods."""

from tersely.measure.statistics import Statistics, output_energies

__all__ = ["Statistics", "output_energies"]
