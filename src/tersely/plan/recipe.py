"""A recipe says what is done to which weights; TOML and the dataclass map to each other exactly.

    seed = 0

    [calibration]
    samples = 128
    context = 2048

    [cache]                 # keys and values of past tokens; left out: as they come
    method = "kivi"

    [[steps]]
    where  = "linear"
    method = "gptq"
    bits   = 4
    group  = 128

Steps that cut a smaller shape come first of all; their `where` names what they cut: `tokens` (the vocabulary, before
all others), `neurons`, `heads`, `hidden`, `experts`, or `blocks`. A weight that several steps select takes the last of
them; one that sets weights to zero before it is followed by it (`assignment`). Steps that choose another basis (smooth,
awq, rotate) come before those that encode; their `where` names spaces: `residual`, `mlp`, or `normed` for all that lie
behind a norm in a block. Nothing in a recipe is without effect: what has none is an error (`reading`; where only the
model can tell, `assignment`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

from tersely.codecs import Scheme
from tersely.codecs.activations import ACTIVATIONS
from tersely.errors import UsageError
from tersely.methods import (
    METHODS,
    BlockChoice,
    Encode,
    Importance,
    Rebase,
    Split,
    TokenChoice,
    TuneBlock,
    TuneModel,
    Work,
)
from tersely.methods.protocol import sum_work
from tersely.runtime.policy import CachePolicy, policy_to_plain

INPUTS = {"activations": str, "hadamard": int, "average_bits": float, "keep_zeros": bool}
"""Settings of every step that encodes, whatever its method."""
CUTS = {"ratio": float, "multiple": int, "refit": bool}
"""Settings of every step that cuts width, whatever its method."""
TRIMS = {"rows": int, "coverage": float, "minimum_count": int, "multiple": int, "keep": str, "drop": str}
"""Settings of every step that trims the vocabulary, whatever its method."""
DROPS = {"ratio": float}
"""Settings of every step that removes blocks, whatever its method."""
_KERNELS = 8
_LOSSES = frozenset({"text"})


@dataclass(frozen=True)
class Calibration:
    """How much text is measured: `samples` sequences of at most `context` tokens."""

    samples: int = 128
    context: int = 2048

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"calibration.samples={self.samples}: at least 1 is expected")
        if self.context < 2:
            raise UsageError(f"calibration.context={self.context}: at least 2 tokens are expected")


@dataclass(frozen=True)
class Step:
    """One method on the weights that a `where` pattern selects (patterns: Graph.select)."""

    where: str
    method: Encode
    activations: str = ""
    """What their inputs are rounded to when the model runs (ACTIVATIONS); "": they are not."""
    hadamard: int = 0
    """Their inputs are multiplied by a Hadamard matrix of this order when the model runs, run by run, and the weight by
    its inverse before it is encoded; 0: they are not."""
    average_bits: float = 0.0
    """Mean bits of the weights that the step selects: the method's `bits` are then chosen for each by its importance;
    0: all have the same."""
    keep_zeros: bool = False
    """What is zero in the source stays so."""
    sparsity: Encode | None = None
    """What sets weights to zero first, of an earlier step on the same weights (`assign`); the method keeps them."""

    def __post_init__(self) -> None:
        if self.average_bits and not hasattr(self.method, "bits"):
            raise UsageError(f"average_bits={self.average_bits}: {self.method.name} has no bits to choose")
        if self.average_bits and not 1 <= self.average_bits <= 8:
            raise UsageError(f"average_bits={self.average_bits}: expected 1 to 8, or 0 for the same bits everywhere")
        if self.keep_zeros and not self.method.keeps_zeros:
            raise UsageError(f"keep_zeros=true: {self.method.name} cannot keep weights at zero; {zero_keepers()} can")
        if self.keep_zeros and self.hadamard:
            raise UsageError(f"keep_zeros=true: hadamard={self.hadamard} mixes the inputs, which leaves no zeros")

    def with_bits(self, bits: int) -> Step:
        """The same step with other bits, for weights that were given these."""
        method: Any = self.method
        return dataclasses.replace(self, method=dataclasses.replace(method, bits=bits), average_bits=0.0)

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        rounding = ACTIVATIONS[self.activations].needs if self.activations else frozenset()
        first = self.sparsity.needs if self.sparsity is not None else frozenset()
        return first | self.method.needs | rounding | (_LOSSES if self.average_bits else frozenset())

    @property
    def name(self) -> str:
        """Of its method, after the one that sets weights to zero first: "wanda + gptq"."""
        return " + ".join(method.name for method in self._methods)

    @property
    def row_wise(self) -> bool:
        """Whether the outputs of a weight are independent of one another."""
        return all(method.row_wise for method in self._methods)

    @property
    def sparse(self) -> bool:
        """Whether zeros of a weight are kept when it is encoded."""
        return self.keep_zeros or self.sparsity is not None

    def work(self, rows: int, columns: int) -> Work:
        """What encoding a weight of this shape costs."""
        return sum_work(*(method.work(rows, columns) for method in self._methods))

    @property
    def _methods(self) -> tuple[Encode, ...]:
        return (self.method,) if self.sparsity is None else (self.sparsity, self.method)

    def scheme(self, rows: int, columns: int) -> Scheme:
        """How a weight of this shape will be stored, the largest where the method decides by the values."""
        step = self.with_bits(math.ceil(self.average_bits)) if self.average_bits else self
        return Scheme(tuple(step.method.forms(rows, columns)), self.activations, self.hadamard)


@dataclass(frozen=True)
class Cut:
    """Width: structures that go, as many in every block. `where`: neurons, heads, hidden, experts, joined by |."""

    where: str
    method: Importance
    ratio: float = 0.2
    """Share of the structures that is removed."""
    multiple: int = 32
    """The neurons or hidden coordinates that are kept are a multiple of this."""
    refit: bool = True
    """Whether what reads a cut space makes up for it, by least squares on the calibration text."""

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if self.multiple < 1 or self.multiple % _KERNELS:
            raise UsageError(
                f"multiple={self.multiple}: expected a multiple of {_KERNELS}, which 16-bit kernels of GPUs take "
                "(vLLM's for quantized weights take 64 or 128; llama.cpp's blocks are 32, of k-quants 256)"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        read = frozenset({"gram"}) if self.refit and self.where.strip() != "experts" else frozenset[str]()
        return self.method.needs | read


@dataclass(frozen=True)
class Drop:
    """Depth: blocks that are removed. `where`: blocks, or blocks 4-12."""

    where: str
    method: BlockChoice
    ratio: float = 0.2
    """Share of the blocks that is removed, of each list of blocks."""

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        return frozenset({"text"})


@dataclass(frozen=True)
class ToExperts:
    """A dense model's feed-forward split into experts. `where`: neurons."""

    where: str
    method: Split

    def __post_init__(self) -> None:
        if self.where.strip() != "neurons":
            raise UsageError(
                f"where = {self.where!r}: {self.method.name} splits the neurons of all blocks; write `neurons`"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        return frozenset({"text"})


@dataclass(frozen=True)
class Trim:
    """Vocabulary: the tokens that stay, as many as one of `rows`, `coverage` and `minimum_count` says; without any of
    these, all that are wanted. `where`: tokens.

    With a token stay those that it is merged from, so that it is still found. Added tokens, tokens that a file of the
    model names, and those for single bytes or characters stay whatever is asked.
    """

    where: str
    method: TokenChoice
    rows: int = 0
    """Of the embedding, all included; 0: as many as it takes."""
    coverage: float = 0.0
    """Share of the counted tokens that stay; 0: not asked for."""
    minimum_count: int = 0
    """Tokens stay that are counted so often; 0: not asked for."""
    multiple: int = 8
    """The number of rows is a multiple of this, which kernels like; the next tokens fill it."""
    keep: str = ""
    """Tokens that stay, written as the tokenizer does, with blanks between them."""
    drop: str = ""
    """Added tokens that go, with * for any characters and blanks between them."""

    def __post_init__(self) -> None:
        if self.where.strip() != "tokens":
            raise UsageError(f"where = {self.where!r}: {self.method.name} trims the vocabulary; write `tokens`")
        given = {k: v for k in ("rows", "coverage", "minimum_count") if (v := getattr(self, k))}
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are given: one of them says how many tokens stay; leave one out")
        for name, value in given.items():
            if value < 0:
                raise UsageError(f"{name}={value:g}: expected a number above 0, or 0 to leave it open")

    @property
    def counts(self) -> bool:
        """Whether tokens of a corpus are counted for it."""
        return "counts" in self.method.needs

    @property
    def needs(self) -> frozenset[str]:
        """Nothing that the model measures: counting needs its tokenizer only."""
        return frozenset()


Shape = Cut | Drop | ToExperts
"""A step that leaves another, smaller shape."""


@dataclass(frozen=True)
class Change:
    """One change of basis, of the spaces that a `where` pattern selects (patterns: `spaces`)."""

    where: str
    method: Rebase

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        return self.method.needs


@dataclass(frozen=True)
class Tuning:
    """One method that tunes what was encoded, on the weights that a `where` pattern selects."""

    where: str
    method: TuneModel | TuneBlock

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        return frozenset({"text"})

    @property
    def whole(self) -> bool:
        """Whether the model is tuned as a whole, not block by block."""
        return isinstance(self.method, TuneModel)


@dataclass(frozen=True)
class Recipe:
    """Steps in order; what they are calibrated on; the seed of every choice made by chance."""

    steps: tuple[Trim | Shape | Change | Step | Tuning, ...]
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0
    cache: CachePolicy | None = None
    """How keys and values of past tokens are kept when the model runs; None: as they come."""

    def __post_init__(self) -> None:
        if not self.encodes and not self.shapes and self.trim is None:
            raise UsageError("a recipe needs at least one step that encodes weights or cuts a smaller shape")
        if sum(isinstance(step, Trim) for step in self.steps) > 1:
            raise UsageError("the vocabulary is trimmed twice; write one step with where = 'tokens'")
        if not self.encodes and (self.changes or self.tunings):
            raise UsageError("steps that change the basis, or tune, need one that encodes weights")
        kinds = [next(n for n, kind in enumerate(_ORDER) if isinstance(step, kind)) for step in self.steps]
        if kinds != sorted(kinds):
            raise UsageError(
                "steps that cut a smaller shape (first of all the vocabulary) come before those that change the basis "
                "(smooth, awq, rotate), these before those that encode, and those that tune (distill, pv, signround, "
                "maskllm) come last"
            )
        if not self.needs and self.calibration != Calibration():
            raise UsageError("calibration has no effect: no step of this recipe measures anything; leave it out")

    @property
    def trim(self) -> Trim | None:
        return next((step for step in self.steps if isinstance(step, Trim)), None)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(step for step in self.steps if isinstance(step, (Cut, Drop, ToExperts)))

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(step for step in self.steps if isinstance(step, Change))

    @property
    def encodes(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if isinstance(step, Step))

    @property
    def tunings(self) -> tuple[Tuning, ...]:
        return tuple(step for step in self.steps if isinstance(step, Tuning))

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text; empty for data-free recipes."""
        return frozenset(need for step in self.steps for need in step.needs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out."""
        steps = [
            {
                "where": s.where,
                "method": s.method.name,
                **_settings(s),
                **dataclasses.asdict(s.method),  # type: ignore[arg-type]
            }
            for s in self.steps
        ]
        calibration = {"calibration": dataclasses.asdict(self.calibration)} if self.needs else {}
        cache = {} if self.cache is None else {"cache": policy_to_plain(self.cache)}
        return {"seed": self.seed, **calibration, **cache, "steps": steps}

    def to_toml(self) -> str:
        """The TOML text that `recipe_from_toml` reads back as an equal recipe."""
        plain = self.to_dict()
        lines = [f"seed = {self.seed}"]
        for table in ("calibration", "cache"):
            if table in plain:
                lines += ["", f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in plain[table].items())]
        for step in plain["steps"]:
            lines += ["", "[[steps]]", *(f"{k} = {_toml(v)}" for k, v in step.items())]
        return "\n".join(lines) + "\n"

    @property
    def hash(self) -> str:
        """Names the recipe: the first 16 hex digits of the SHA-256 of its plain values."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def zero_keepers() -> str:
    """The methods that can keep weights at zero."""
    return ", ".join(method.name for method in METHODS if method().keeps_zeros)


_ORDER = ((Trim,), (Cut, Drop, ToExperts), (Change,), (Step,), (Tuning,))


def _settings(step: Trim | Shape | Change | Step | Tuning) -> dict[str, Any]:
    """Of a step itself, its method's left out."""
    if isinstance(step, Step):
        return {k: v for k in INPUTS if (v := getattr(step, k))}
    if isinstance(step, Trim):
        return {k: getattr(step, k) for k in TRIMS}
    own = CUTS if isinstance(step, Cut) else DROPS if isinstance(step, Drop) else {}
    return {k: getattr(step, k) for k in own}


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise UsageError(f"ratio={ratio:g}: expected the share that is removed, above 0 and below 1 (0.2 is a fifth)")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # JSON's strings are TOML's, but for one control character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
