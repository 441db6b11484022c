"""Make open-weights language models smaller and faster, and prove what was kept.

    import tersely
    tersely.compress("path/to/model", "w4a16-gptq", "out", calibration="text.txt")
    print(tersely.evaluation("out", "held-out.txt", against="path/to/model"))

Names are imported when they are first used, so that `tersely --help` does not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tersely.checkpoint import Checkpoint as Checkpoint
    from tersely.checkpoint import open_checkpoint as open
    from tersely.compression import compress as compress
    from tersely.evaluation import Evaluation as Evaluation
    from tersely.evaluation import evaluate as evaluate
    from tersely.graph import Graph as Graph
    from tersely.plan.recipe import Recipe as Recipe
    from tersely.results import Report as Report

_HOMES = {
    "Checkpoint": "tersely.checkpoint",
    "Evaluation": "tersely.evaluation",
    "Graph": "tersely.graph",
    "Recipe": "tersely.plan.recipe",
    "Report": "tersely.results",
    "compress": "tersely.compression",
    "evaluate": "tersely.evaluation",
    "open": "tersely.checkpoint",
}

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Graph",
    "Recipe",
    "Report",
    "compress",
    "evaluate",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tersely' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), "open_checkpoint" if name == "open" else name)


def __dir__() -> list[str]:
    return __all__
