"""What a model lost: its loss on a text, and its divergence from the model it came from."""

from tersely.evaluation.divergence import Evaluation, evaluate, perplexity
from tersely.evaluation.statistics import Estimate, ratio

__all__ = ["Estimate", "Evaluation", "evaluate", "perplexity", "ratio"]
