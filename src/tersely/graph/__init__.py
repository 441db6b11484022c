"""A model as spaces joined by weights, read from a family table and the headers of a checkpoint.

What methods need is a query here: weights that share an input, the pairs across which a scale folds, the
coordinates that a pruning may drop, what fills a parameter in memory. The tables are in `families/`.
"""

from tersely.graph.graph import Graph
from tersely.graph.memory import Piece, filled, slot
from tersely.graph.reading import read_graph
from tersely.graph.weight import Weight

__all__ = ["Graph", "Piece", "Weight", "filled", "read_graph", "slot"]
