"""Pictures as inline SVG, without a library: intervals and bars in rows, lines, heat maps, scatter plots.

Every function returns markup in which all text is escaped. Colours are classes; the page gives them a value for light,
dark and print. A picture that would be too small to read on a phone comes in two layouts, of which the page shows one:
`wide` (800 units) and `narrow` (358 units); small ones have one layout that fits both. A unit is a CSS pixel.
"""

from tersely.report.charts.bars import stacks
from tersely.report.charts.curves import Series, lines
from tersely.report.charts.intervals import Line, Mark, rows
from tersely.report.charts.labels import breadth, shorten
from tersely.report.charts.plane import Dot, front, scatter
from tersely.report.charts.scales import MINUS, log_ticks, number, ticks
from tersely.report.charts.shades import Heat, heatmap

__all__ = [
    "MINUS",
    "Dot",
    "Heat",
    "Line",
    "Mark",
    "Series",
    "breadth",
    "front",
    "heatmap",
    "lines",
    "log_ticks",
    "number",
    "rows",
    "scatter",
    "shorten",
    "stacks",
    "ticks",
]
