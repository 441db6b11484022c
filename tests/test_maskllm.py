"""Laws of learned N:M masks, on tiny weights and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.checkpoint import open_checkpoint
from tersely.codecs import Encoded
from tersely.codecs.dense import Dense, DenseForm
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.methods.encode.magnitude import Magnitude
from tersely.methods.encode.masks import numbers
from tersely.methods.encode.rtn import RTN
from tersely.methods.tune import Descent, Distill, MaskLLM, Tuned, tune_model, tuning_work
from tersely.methods.tune.descent import descend
from tersely.methods.tune.maskllm import Masks, candidates
from tersely.plan.recipe import Calibration, Recipe, Step, Tuning
from tersely.stored import open_stored
from tests.tiny import load, tiny

PATTERNS = ("2:4", "1:4", "3:4", "1:2", "4:8")
FEW: dict[str, Any] = {"tokens": 600, "batch": 150, "own_texts": 4, "held_out": 4, "checks": 4}


def weights(rows: int = 12, columns: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def pruned(weight_OI: Tensor, pattern: str = "2:4") -> Encoded:
    return Magnitude(pattern=pattern)(weight_OI, Statistics(weight_OI.shape[1]))


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view(weight_OI: Tensor, encoded: Encoded | None = None, seed: int = 0, **settings: Any) -> Masks:
    method = MaskLLM(**settings)
    return method.view(encoded or pruned(weight_OI, method.pattern), weight_OI, chance(seed))


def kept_by_block(weight_OI: Tensor, pattern: str) -> Tensor:
    """(B,) how many of each block are not zero."""
    return (weight_OI != 0).reshape(-1, numbers(pattern)[1]).sum(1)


# A weight


@pytest.mark.parametrize("pattern", PATTERNS)
def test_candidates_are_all_masks_that_keep_so_many(pattern: str) -> None:
    keep, m = numbers(pattern)
    found = {tuple(mask) for mask in candidates(keep, m).tolist()}
    assert found == {mask for mask in product((0.0, 1.0), repeat=m) if sum(mask) == keep}
    assert len(found) == len(candidates(keep, m))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_begin_at_those_that_were_there_before(pattern: str) -> None:
    before = pruned(weights(), pattern)
    after = view(weights(), before, pattern=pattern).stored()
    assert torch.equal(after.decode(), before.decode())


def test_what_the_step_before_made_of_the_values_is_forgotten_but_not_its_mask() -> None:
    """SparseGPT changes what it keeps; here the values are the source's."""
    changed = Encoded((Dense(2 * pruned(weights()).decode()),), "a note")
    after = view(weights(), changed).stored()
    assert torch.equal(after.decode(), pruned(weights()).decode())
    assert after.note == "a note"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_soft_masks_of_a_block_add_up_to_what_is_kept_of_it(pattern: str, share: float) -> None:
    own = view(weights(), pattern=pattern)
    own.begin(share)
    mask = own.mask().detach().reshape(-1, numbers(pattern)[1])
    torch.testing.assert_close(mask.sum(1), torch.full((len(mask),), float(numbers(pattern)[0])))
    assert 0 <= mask.min() <= mask.max() <= 1 + 1e-6


def test_masks_harden_as_the_steps_go_on() -> None:
    own = view(weights())
    doubt = []
    for share in (0.0, 0.5, 1.0):
        own.begin(share)
        mask = own.mask().detach()
        doubt.append(float((mask * (1 - mask)).mean()))
    assert doubt[0] > 2 * doubt[1] > 4 * doubt[2]
    assert doubt[2] < 0.01
    assert torch.equal(own.mask() > 0.5, own.stored().decode() != 0), "a sharp prior outweighs the noise"


def test_noise_is_new_in_every_step_and_the_seed_says_which() -> None:
    one, same, other = view(weights()), view(weights()), view(weights(), seed=1)
    first = one.moving()
    assert torch.equal(first, same.moving())
    assert not torch.equal(first, other.moving())
    assert not torch.equal(first, one.moving())


def test_gradients_reach_every_logit() -> None:
    own = view(weights())
    own.moving().square().sum().backward()  # type: ignore[no-untyped-call]
    assert own.logits_CB.grad is not None
    assert bool((own.logits_CB.grad != 0).all())


@pytest.mark.parametrize(("correlated", "exact", "worse"), [(0.0, 0.9, 0.005), (0.3, 0.85, 0.02)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_a_linear_layer_finds_the_masks_that_a_search_of_all_finds(
    pattern: str, correlated: float, exact: float, worse: float
) -> None:
    """Quadratic loss of 32 outputs with one block each, from masks that keep the smallest."""
    weight_OI = weights(32, 4, seed=3)
    mix = torch.diag(torch.tensor([1.0, 1.2, 0.8, 1.1])) + correlated * torch.randn((4, 4), generator=chance(4))
    gram_II = mix @ mix.t()
    settings = MaskLLM(pattern=pattern, energy=0.0, decay=0.0, rate=0.01)
    own = settings.view(pruned(1 / weight_OI, pattern), weight_OI, chance())

    def error(value_OI: Tensor) -> Tensor:
        lost = weight_OI - value_OI
        return ((lost @ gram_II) * lost).sum(1)

    def backward(_step: int) -> float:
        loss = torch.stack([error(own.moving()).sum() for _ in range(4)]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    with torch.enable_grad():
        found = descend(
            [own],
            settings.motion,
            steps=100,
            checks=5,
            backward=backward,
            score=lambda: error(own.stored().decode()).sum().item(),
            keep=own.stored,
        )
    least = torch.stack([error(weight_OI * mask) for mask in candidates(*numbers(pattern))]).min(0).values
    reached = error(found.best.decode())
    assert found.before > 2 * float(least.sum()), "the start is far from the answer"
    assert float((reached <= least * (1 + 1e-5)).float().mean()) >= exact
    assert float(reached.sum()) <= (1 + worse) * float(least.sum()) + 1e-6


# A model


@dataclasses.dataclass(frozen=True)
class Case:
    folder: Path
    graph: Graph
    weights: dict[str, Tensor]
    encoded: dict[str, Encoded]

    def tune(self, settings: MaskLLM, seed: int = 0) -> Descent[Tuned]:
        draw = chance(4)
        texts = [torch.randint(3, 60, (14 - i % 3,), generator=draw) for i in range(16)]
        return tune_model(load(self.folder).float(), self.graph, self.encoded, texts, settings, seed=seed)


def case(folder: Path, model_type: str = "llama", pattern: str = "2:4", **settings: Any) -> Case:
    checkpoint = open_checkpoint(tiny(model_type, folder, blocks=1, **settings))
    graph = read_graph(checkpoint)
    chosen = graph.select("linear")
    weights = {w.name: checkpoint[w.name].t() if w.transposed else checkpoint[w.name] for w in chosen}
    return Case(checkpoint.path, graph, weights, {name: pruned(w, pattern) for name, w in weights.items()})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def check_masked(own: Case, found: Descent[Tuned], pattern: str = "2:4") -> None:
    """Exactly N of every M, and what is kept has the source's bytes."""
    for name, encoded in found.best.encoded.items():
        value, source = encoded.decode(), own.weights[name]
        assert encoded.forms == (DenseForm(),)
        assert value.dtype == source.dtype
        assert bool((kept_by_block(value, pattern) == numbers(pattern)[0]).all())
        assert torch.equal(value, torch.where(value != 0, source, 0))


@pytest.mark.parametrize("loss", ["parent", "text"])
def test_a_model_learns_masks_that_are_better_than_those_before(llama: Case, loss: Any) -> None:
    found = llama.tune(MaskLLM(loss=loss, rate=0.005, **{**FEW, "tokens": 6000, "own_texts": 64}))
    assert found.after < (0.8 if loss == "parent" else 1) * found.before
    check_masked(llama, found)
    assert any(not torch.equal(e.decode(), llama.encoded[n].decode()) for n, e in found.best.encoded.items())


@pytest.mark.parametrize(("model_type", "pattern"), [("gpt2", "1:4"), ("phi3", "2:4"), ("mixtral", "4:8")])
def test_masks_lie_along_the_inputs_wherever_transformers_holds_the_weights(
    model_type: str, pattern: str, tmp_path: Path
) -> None:
    own = case(tmp_path, model_type, pattern)
    check_masked(own, own.tune(MaskLLM(pattern=pattern, rate=0.005, **FEW)), pattern)


def test_equal_seeds_give_equal_masks_and_other_seeds_others(llama: Case) -> None:
    settings = MaskLLM(rate=0.005, **{**FEW, "own_texts": 64})
    first, again, other = (llama.tune(settings, seed).best.encoded for seed in (1, 1, 2))
    same = [torch.equal(e.decode(), again[n].decode()) for n, e in first.items()]
    assert all(same)
    assert any(not torch.equal(e.decode(), other[n].decode()) for n, e in first.items())


def test_without_a_rate_masks_stay(llama: Case) -> None:
    found = llama.tune(MaskLLM(rate=0.0, **FEW))
    assert found.after == found.before
    assert all(torch.equal(e.decode(), llama.encoded[n].decode()) for n, e in found.best.encoded.items())


def test_more_candidates_need_more_memory_and_the_text_itself_less_time(llama: Case) -> None:
    tuned = [llama.graph.weight(name) for name in llama.encoded]

    def work(**settings: Any) -> Any:
        return tuning_work(llama.graph, tuned, MaskLLM(tokens=10**5, **settings), context=32, texts=16)

    assert work(pattern="4:8").memory > work(pattern="2:4").memory > work(pattern="1:4").memory
    assert work(loss="text").flops < work(loss="parent").flops


# A job


@pytest.mark.parametrize("format", ["auto", "tersely"])
def test_a_job_writes_the_learned_masks_and_says_what_was_gained(
    format: Any, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    tune = Tuning("linear", MaskLLM(rate=0.005, **{**FEW, "tokens": 3000, "own_texts": 0}))
    recipe = Recipe((Step("linear", Magnitude(pattern="2:4")), tune), Calibration(samples=12, context=24))
    report = compress(source("llama"), recipe, tmp_path / "out", calibration=text, format=format)
    assert any(note.startswith("maskllm: KL from the source") for note in report.notes)
    before, after = open_checkpoint(source("llama")), open_stored(tmp_path / "out")
    for row in report.rows:
        value = after[row.name]
        assert bool((kept_by_block(value, "2:4") == 2).all())
        assert torch.equal(value, torch.where(value != 0, before[row.name], 0))
        assert row.zeros == value.numel() // 2


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ((Step("linear", RTN(bits=4, group=16)), Tuning("linear", MaskLLM())), "integers; let a sparsity step"),
        ((Step("linear", Magnitude()), Tuning("linear", MaskLLM(pattern="5:7"))), "multiple of 7"),
        ((Step("linear", Magnitude()), Tuning("linear", Distill())), "distill moves .* finds dense; leave out"),
    ],
)
def test_weights_that_cannot_be_tuned_are_refused_before_the_job(
    steps: Any, match: str, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match):
        compress(source("llama"), Recipe(steps), tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "4:4"},
        {"pattern": "8:16"},
        {"temperature": 0.0},
        {"last_sharpness": -1.0},
        {"rate": float("nan")},
        {"loss": "both"},
        {"energy": -1.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        MaskLLM(**settings)
