"""Which blocks go. A new method is one file and one line in DROPS."""

from tersely.methods.drop.block_loss import BlockLoss
from tersely.methods.drop.block_search import BlockSearch
from tersely.methods.drop.block_similarity import BlockSimilarity
from tersely.methods.drop.protocol import BlockChoice, Blocks

__all__ = ["DROPS", "BlockChoice", "Blocks"]

DROPS: tuple[type[BlockChoice], ...] = (BlockSimilarity, BlockLoss, BlockSearch)
