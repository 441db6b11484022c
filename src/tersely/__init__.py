"""Make open-weights language models smaller and faster, and prove what was kept.

    import tersely
    tersely.compress("path/to/model", "w4a16-gptq", "out", calibration="text.txt")
    for found in tersely.evaluate("out", "held-out.txt", against="path/to/model").comparisons:
        print(found.sentence)

Names are imported when they are first used, so that `tersely --help` does not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tersely.registration import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tersely.checkpoint import Checkpoint as Checkpoint
    from tersely.checkpoint import open_checkpoint as open
    from tersely.compression import compress as compress
    from tersely.evaluation.blame import blame as blame
    from tersely.evaluation.evaluator import evaluate as evaluate
    from tersely.evaluation.speed import speed as speed
    from tersely.evaluation.store import Store as Store
    from tersely.graph import Graph as Graph
    from tersely.plan.recipe import Recipe as Recipe
    from tersely.results import Blame as Blame
    from tersely.results import Evaluation as Evaluation
    from tersely.results import Report as Report
    from tersely.results import Speed as Speed

_HOMES = {
    "Blame": "tersely.results",
    "Checkpoint": "tersely.checkpoint",
    "Evaluation": "tersely.results",
    "Graph": "tersely.graph",
    "Recipe": "tersely.plan.recipe",
    "Report": "tersely.results",
    "Speed": "tersely.results",
    "Store": "tersely.evaluation.store",
    "blame": "tersely.evaluation.blame",
    "compress": "tersely.compression",
    "evaluate": "tersely.evaluation.evaluator",
    "open": "tersely.checkpoint",
    "speed": "tersely.evaluation.speed",
}

__all__ = [
    "Blame",
    "Checkpoint",
    "Evaluation",
    "Graph",
    "Recipe",
    "Report",
    "Speed",
    "Store",
    "blame",
    "compress",
    "evaluate",
    "open",
    "speed",
]


def _register() -> None:
    import_module("tersely.runtime.quantizer").register()


when_imported("transformers.quantizers.auto", _register)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tersely' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), "open_checkpoint" if name == "open" else name)


def __dir__() -> list[str]:
    return __all__
