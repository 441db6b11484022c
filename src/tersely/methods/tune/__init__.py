"""Tuning: encoded weights, or their masks, that learn by gradients what their parent does."""

from tersely.methods.tune.block import rounding_work, tune_block
from tersely.methods.tune.descent import Descent
from tersely.methods.tune.distill import Distill
from tersely.methods.tune.maskllm import MaskLLM
from tersely.methods.tune.model import Tuned, tune_model, tuning_work
from tersely.methods.tune.protocol import Motion, Progress, TuneBlock, TuneModel
from tersely.methods.tune.pv import PV
from tersely.methods.tune.signround import SignRound

__all__ = [
    "PV",
    "TUNES",
    "Descent",
    "Distill",
    "MaskLLM",
    "Motion",
    "Progress",
    "SignRound",
    "TuneBlock",
    "TuneModel",
    "Tuned",
    "rounding_work",
    "tune_block",
    "tune_model",
    "tuning_work",
]

TUNES: tuple[type[TuneModel] | type[TuneBlock], ...] = (Distill, PV, SignRound, MaskLLM)
"""How encoded weights are tuned afterwards."""
