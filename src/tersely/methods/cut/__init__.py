"""Which neurons, heads, experts or hidden coordinates go. A new method is one file and one line in CUTS."""

from tersely.methods.cut.compresso import Compresso
from tersely.methods.cut.llm_pruner import LLMPruner
from tersely.methods.cut.minitron import Minitron
from tersely.methods.cut.protocol import Gating, Importance, Kind, Member, Structures, Turning
from tersely.methods.cut.random import RandomChoice
from tersely.methods.cut.routed import Routed
from tersely.methods.cut.slicegpt import SliceGPT
from tersely.methods.cut.weight_norm import WeightNorm

__all__ = ["CUTS", "Gating", "Importance", "Kind", "Member", "Structures", "Turning"]

CUTS: tuple[type[Importance], ...] = (Minitron, LLMPruner, SliceGPT, Compresso, Routed, WeightNorm, RandomChoice)
