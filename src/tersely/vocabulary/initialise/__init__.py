"""How tokens get rows that a model has none for. A new method is one file and one line in INITIALISERS."""

from tersely.vocabulary.initialise.align import Align
from tersely.vocabulary.initialise.cw2v import CW2V
from tersely.vocabulary.initialise.focus import Focus
from tersely.vocabulary.initialise.mean import Mean
from tersely.vocabulary.initialise.merge import Merge
from tersely.vocabulary.initialise.multivariate import Multivariate
from tersely.vocabulary.initialise.ofa import OFA
from tersely.vocabulary.initialise.omp import OMP
from tersely.vocabulary.initialise.protocol import Gap, Initialiser, Need, Rule, Rules, Tables, Vectors, Weights
from tersely.vocabulary.initialise.random_normal import RandomNormal
from tersely.vocabulary.initialise.token_adapt import TokenAdapt

__all__ = ["INITIALISERS", "Gap", "Initialiser", "Need", "Rule", "Rules", "Tables", "Vectors", "Weights"]

INITIALISERS: tuple[type[Initialiser], ...] = (
    Mean,
    Merge,
    Align,
    Focus,
    OFA,
    TokenAdapt,
    CW2V,
    OMP,
    Multivariate,
    RandomNormal,
)
