"""Which vocabulary size suits a model: three estimators (Tao et al., NeurIPS 2024, arXiv 2407.13623).

N = parameters outside the vocabulary (neither embedding nor head), V = tokens, d = hidden size, V d = parameters of
the vocabulary, counted once; F = floating-point operations of training, H = characters of its text, D = its tokens.

They hold for what they were fitted on: Llama-like models of 33 million to 3 billion parameters, trained from random
weights with their vocabulary on English-heavy text by BPE. For a model that is trained already they are a prior for
the size, not a rule: its weights know the tokens that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tersely.errors import UsageError

_TOKENS = (0.00639222, -0.15811069, 1.20470122)
"""Tokens of a character = a ln(V)^2 + b ln(V) + c."""
_FITTED_TO = 200_000
"""The largest V that the formula for tokens of a character holds for."""
_WIDTHS = (
    (50e6, 512),
    (200e6, 768),
    (500e6, 1024),
    (1e9, 1536),
    (2e9, 2048),
    (5e9, 3200),
    (10e9, 4096),
    (20e9, 5120),
    (50e9, 6048),
    (100e9, 8192),
    (200e9, 12288),
    (500e9, 16384),
    (1e12, 20480),
    (math.inf, 24576),
)
"""Up to N parameters, hidden size: the authors' table."""
_LOG_BODY, _BODY_EXPONENT = -2.4846510161625193, 0.5
"""N = exp(first) F^second."""
_LOG_VOCABULARY, _VOCABULARY_EXPONENT = -1.589031299255507, 0.4163622634135234
"""V d = exp(first) F^second."""
_ANCHOR_BODY, _ANCHOR_VOCABULARY, _DERIVATIVE_EXPONENT = 33e6, 3_145_728, 0.8353974
"""V d that was measured best at N, and the exponent that roots of the derivative follow."""
_A1, _A2, _B, _E = 1.83138516, 0.19584238, 2.12411231, 5.53278468
_ALPHA1, _ALPHA2, _BETA = 0.44660634, 0.67073747, 0.44660634
"""Loss of a model trained on D tokens: see `loss`."""


@dataclass(frozen=True)
class Suggestion:
    """Vocabulary sizes that three estimators find best.

    Each assumes a compute-optimal amount of training; `loss` alone follows a given one.
    """

    parameters: float
    """N."""
    width: float
    """d."""
    flops: float
    """F: given, or that which the power law finds optimal for N."""
    isoflops: float
    """V by power laws of F, fitted to the best models of each F."""
    derivative: float
    """V by the growth of the size that takes the fewest operations for a given text, from the best size at 33 M."""
    loss: float
    """V that minimises the fitted loss at N and F."""


def suggest_size(parameters: float, *, width: float | None = None, flops: float | None = None) -> Suggestion:
    """The three estimates for a model of so many parameters outside its vocabulary.

    width: its hidden size; None for the authors' table by parameters. flops: of training; None for the optimal ones;
    the first two estimates take no others. Raises UsageError: not positive.
    """
    for name, value in (("parameters", parameters), ("width", width), ("flops", flops)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name}={value}: give a positive number")
    d = width or width_for(parameters)
    optimal = optimal_flops(parameters)
    spent = flops or optimal
    return Suggestion(
        parameters,
        d,
        spent,
        math.exp(_LOG_VOCABULARY) * optimal**_VOCABULARY_EXPONENT / d,
        _ANCHOR_VOCABULARY * (parameters / _ANCHOR_BODY) ** _DERIVATIVE_EXPONENT / d,
        _root(lambda v: loss_slope(parameters, v, d, spent)),
    )


def width_for(parameters: float) -> int:
    """The hidden size that the authors give a model of so many parameters."""
    return next(width for most, width in _WIDTHS if parameters <= most)


def optimal_flops(parameters: float) -> float:
    """Of training, for which so many parameters are best: the inverse of N = exp(k) F^0.5."""
    return math.exp((math.log(parameters) - _LOG_BODY) / _BODY_EXPONENT)


def optimal_parameters(flops: float) -> float:
    """Outside the vocabulary, best for so many operations of training."""
    return math.exp(_LOG_BODY + _BODY_EXPONENT * math.log(flops))


def tokens_per_character(size: float) -> float:
    """a ln(V)^2 + b ln(V) + c; from 200,000 tokens on, the value there."""
    a, b, c = _TOKENS
    log = math.log(min(size, _FITTED_TO))
    return a * log**2 + b * log + c


def cheapest_size(parameters: float, width: float) -> float:
    """V at which a given text takes the fewest operations to train on: the root of dF/dV, F = 6 (N + V d) H f(V).

    The exponent of the second estimate was fitted to these roots; they are not estimates themselves.
    """
    a, b, _ = _TOKENS

    def slope(size: float) -> float:
        tokens = a * math.log(size) ** 2 + b * math.log(size) + _TOKENS[2]
        return width * tokens + (parameters + width * size) * (2 * a * math.log(size) + b) / size

    return _root(slope)


def loss(parameters: float, size: float, width: float, flops: float) -> float:
    """Unigram-normalised loss: -E + A1 / N^a1 + A2 / (V d)^a2 + B / D^b, with N and V d in millions and
    D = F / (6 (N + V d)) in billions of tokens."""
    body, vocabulary, tokens = _scaled(parameters, size, width, flops)
    reducible = _A1 * body**-_ALPHA1 + _A2 * vocabulary**-_ALPHA2 + _B * tokens**-_BETA
    return float(reducible) - _E


def loss_slope(parameters: float, size: float, width: float, flops: float) -> float:
    """d loss / d V, times 1000."""
    body, vocabulary, tokens = _scaled(parameters, size, width, flops)
    narrow = width / 1e3
    fewer_tokens = tokens * narrow / (body + vocabulary)
    vocabulary_term = _ALPHA2 * _A2 * narrow * vocabulary ** (-_ALPHA2 - 1)
    return float(_BETA * _B * tokens ** (-_BETA - 1) * fewer_tokens - vocabulary_term)


def _scaled(parameters: float, size: float, width: float, flops: float) -> tuple[float, float, float]:
    body, vocabulary = parameters / 1e6, size * width / 1e6
    return body, vocabulary, flops / 1e15 / (6 * (body + vocabulary))


def _root(slope: Callable[[float], float]) -> float:
    """Where a slope turns from negative to positive, by bisection of ln V."""
    low, high = math.log(2), math.log(1e12)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp((low + high) / 2)
