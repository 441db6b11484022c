"""The facts of an evaluation: what was measured, of which models, on what, where, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tersely.results.estimate import Estimate
from tersely.results.plain import Measurement


@dataclass(frozen=True)
class Subject:
    """A model that was measured."""

    name: str
    """As the user gave it."""
    fingerprint: str
    """SHA-256 over its files' names, sizes and a sample of their bytes; "" where it is no folder or file."""
    dtype: str
    """Of the weights as they ran: "float32", "bfloat16"; a quantized format's name for engines of their own."""
    parameters: int
    bytes: int
    """Of its weight files on disk."""


@dataclass(frozen=True)
class Setting:
    """Where and with what something was measured."""

    created: str
    """Start, ISO 8601 with time zone, to the second."""
    device: str
    """"cpu" or "cuda:0"."""
    hardware: str
    """Name of the processor or accelerator."""
    threads: int
    memory: int
    """Bytes of the device (of the machine, on a CPU)."""
    versions: Mapping[str, str]
    """Of tersely, python, torch, transformers and what else had a part."""


@dataclass(frozen=True)
class Bin:
    """Predicted tokens of one kind: by place in the sequence, or by how often the token stands in the text."""

    first: int
    last: int
    """Both included."""
    tokens: int
    loss: Estimate
    base_loss: Estimate | None
    kl: Estimate | None


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from a base's on the same tokens. Shares are 0 to 1, losses nats a token.

    vocabulary: "full", or "shared" where the two have different tokens: then both distributions are renormalized
    over the `shared` tokens that both know, so is the base's in `base_loss` and `loss_difference` (a model without
    some tokens is not the better for it), and `outside` is the probability that the base gives to the others.
    tokens, documents: what could be compared (documents that the tokenizers cut differently are left out).
    kl: mean of KL(base || model) = sum over v of p_base(v) * (log p_base(v) - log p_model(v)).
    kl_quantiles: "0.5", "0.9", "0.99", "0.999" and "1" -> KL of a token.
    top1_agreement: tokens where both find the same token most likely. top5_agreement: mean overlap of their five
    most likely tokens. lost: tokens where only the base's most likely token is the true one; gained: only the model's.
    rank: "1", "2-5", "6-10", "11-100", "101-" -> share of tokens where the base's most likely token has that rank
    with the model; mean_reciprocal_rank: of that rank.
    """

    vocabulary: Literal["full", "shared"]
    shared: int
    tokens: int
    documents: int
    base_loss: Estimate
    loss_difference: Estimate
    """Model minus base, paired."""
    kl: Estimate
    kl_quantiles: Mapping[str, float]
    top1_agreement: Estimate
    top5_agreement: Estimate
    lost: Estimate
    gained: Estimate
    rank: Mapping[str, float]
    mean_reciprocal_rank: float
    outside: Estimate | None = None


@dataclass(frozen=True)
class TextResult:
    """A model on a text. sha256 names the data (`calibrate.Sequences`); tokens are the predicted ones."""

    text: str
    kind: Literal["documents", "windows"]
    sha256: str
    documents: int
    available: int
    """Documents or windows that the text has."""
    tokens: int
    context: int
    loss: Estimate
    """Nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: Estimate
    by_position: tuple[Bin, ...]
    by_frequency: tuple[Bin, ...]
    divergence: Divergence | None = None

    @property
    def whole(self) -> Divergence | None:
        """The divergence where it is of all documents. Those that two tokenizers cut alike speak for no others: in a
        trimmed vocabulary they are the ones that lost nothing."""
        return self.divergence if self.divergence and self.divergence.documents == self.documents else None


@dataclass(frozen=True)
class Part:
    """One of several sub-tasks: a subject of MMLU, a phenomenon of BLiMP, a length of a needle's haystack."""

    name: str
    items: int
    value: Estimate
    base: Estimate | None = None


@dataclass(frozen=True)
class Reliability:
    """Answers whose confidence lies in one tenth of 0 to 1: how sure the model was, and how often it was right."""

    items: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether a model's certainty in multiple-choice answers is earned (its risk scores).

    A choice's risk score is its share of the probability of all choices. brier: mean over items of the sum over
    choices of (risk score - [it is the answer])^2, 0 to 2. error: expected calibration error of the chosen answer in
    ten equal bins, sum over bins of n_b / n * |accuracy_b - confidence_b|.
    """

    brier: Estimate
    error: Estimate
    bins: tuple[Reliability, ...]


@dataclass(frozen=True)
class TaskResult:
    """A model, and where one is given its base, on a task. Scores are in the metric's own unit (shares 0 to 1)."""

    name: str
    title: str
    group: str
    """What is asked: "grammar", "knowledge", "arithmetic", "reading", "commonsense", "long context", ..."""
    metric: str
    higher_is_better: bool
    chance: float | None
    """What guessing gives."""
    items: int
    available: int
    sha256: str
    """Names the items."""
    value: Estimate
    base: Estimate | None
    lost: int | None
    """Items that only the base answers rightly; None for a metric that is not right or wrong."""
    gained: int | None
    parts: tuple[Part, ...]
    calibration: Calibration | None
    """Of the model; for multiple choice."""
    base_calibration: Calibration | None
    harness: Mapping[str, float]
    """What the harness itself aggregated for the model, by its own names."""
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Comparison:
    """One question, asked of model and base on the same items, and its answer.

    difference: model minus base. p: two-sided, of no difference; p_adjusted: corrected for the number of
    comparisons of the evaluation (Holm). detectable: the smallest true difference that a sample of this size finds
    with a power of 80 % at the 5 % level. unit: "points" (differences times 100 are percentage points), "nats" of a
    token, or "bits" of a byte, where the two have other tokens.
    """

    name: str
    unit: Literal["points", "nats", "bits", "score"]
    higher_is_better: bool
    items: int
    test: str
    """How p was found: "McNemar, exact", "paired bootstrap over documents", ..."""
    model: Estimate
    base: Estimate
    difference: Estimate
    p: float
    p_adjusted: float
    detectable: float
    outcome: Literal["better", "worse", "no difference shown"]
    sentence: str
    task: str | None = None
    """Which of the evaluation's tasks asked; None: its text."""


@dataclass(frozen=True)
class Sample:
    """What a model, and where one is given its base, write after a prompt, the most likely token each time.

    repetition: share of 4-grams of tokens that stood before in the same continuation.
    """

    prompt: str
    model: str
    base: str | None
    repetition: float
    base_repetition: float | None


@dataclass(frozen=True)
class Evaluation(Measurement):
    """What was measured of a model, and against a base, and what that shows. Times are not compared."""

    model: Subject
    base: Subject | None
    setting: Setting = field(compare=False)
    seed: int
    text: TextResult | None
    tasks: tuple[TaskResult, ...]
    verdict: str
    """What it comes to, in a sentence or two; "" without a base."""
    comparisons: tuple[Comparison, ...]
    """Largest loss first."""
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    """What could not be told, and why."""
    budget: float | None = None
    """Seconds that the sample sizes were chosen for; None: everything was asked."""
    seconds: float = field(default=0.0, compare=False)
