"""Trains tokenizers. A new method is one file and one line in TRAININGS."""

from tersely.vocabulary.training.bpe import BPE
from tersely.vocabulary.training.compound import CompoundPiece, encode_parts
from tersely.vocabulary.training.decompounding import KnownWords, read_parts
from tersely.vocabulary.training.lib import LiB
from tersely.vocabulary.training.pipeline import METASPACE, PATTERNS, Pipeline, pipeline
from tersely.vocabulary.training.protocol import Order, Training
from tersely.vocabulary.training.superbpe import SuperBPE
from tersely.vocabulary.training.unigram import Unigram

__all__ = [
    "METASPACE",
    "PATTERNS",
    "TRAININGS",
    "CompoundPiece",
    "KnownWords",
    "Order",
    "Pipeline",
    "SuperBPE",
    "Training",
    "encode_parts",
    "pipeline",
    "read_parts",
]

TRAININGS: tuple[type[Training], ...] = (BPE, SuperBPE, Unigram, CompoundPiece, LiB)
