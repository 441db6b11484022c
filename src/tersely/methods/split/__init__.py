"""Methods that make a mixture of experts of a model without."""

from tersely.methods.split.protocol import Block, Experts, Split
from tersely.methods.split.read_me import ReadMe

__all__ = ["SPLITS", "Block", "Experts", "ReadMe", "Split"]

SPLITS: tuple[type[Split], ...] = (ReadMe,)
"""How the neurons of dense blocks are shared among experts."""
