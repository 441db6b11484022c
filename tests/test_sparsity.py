"""Zeros: the masks they come from, how they are stored, and every method that must keep them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.calibrated import calibrated
from tersely.checkpoint import open_checkpoint
from tersely.codecs import read_encoded
from tersely.codecs.bitmask import BitmaskForm, masked, smallest
from tersely.codecs.dense import Dense
from tersely.compression import compress
from tersely.encoding import Format, applied
from tersely.errors import CheckpointError, UsageError
from tersely.export.folder import export_folder
from tersely.graph import read_graph
from tersely.job import prepare
from tersely.measure import MEASURES, Statistics
from tersely.methods import METHODS, Encode
from tersely.methods.encode.fp8 import FP8
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.magnitude import Magnitude
from tersely.methods.encode.masks import kept_by_row, largest
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.sparsegpt import SparseGPT
from tersely.methods.encode.wanda import Wanda
from tersely.methods.tune import TUNES
from tersely.plan.assignment import assign
from tersely.plan.reading import method_fields, recipe_from_toml
from tersely.plan.recipe import Calibration, Recipe, Step, Tuning
from tersely.stored import open_stored
from tersely.verify import verify
from tests.tiny import forward, tiny

TEXT = Calibration(samples=16, context=40)
KEEPERS = tuple(m for m in METHODS if m().keeps_zeros)
OTHERS = tuple(m for m in METHODS if not m().keeps_zeros)
SPARSE = tuple(m for m in METHODS if all(f.kind == "dense" for f in m().forms(8, 64)))


def make(method: type[Encode], **settings: Any) -> Encode:
    """With defaults but for groups that fit narrow weights."""
    fitting = {"group": 16} if "group" in method_fields(method) else {}
    return method(**(fitting | settings))


def weights(rows: int = 32, columns: int = 128, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def everything(weight_OI: Tensor, seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    columns = weight_OI.shape[1]
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator)
    stats = Statistics(columns, needs=frozenset(MEASURES))
    stats.add(torch.randn((512, columns), generator=generator) @ mix + 0.3)
    stats.fisher_OI = torch.rand(weight_OI.shape, generator=generator)
    return stats.finish()


# Masks


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.29, 0.5, 0.7])
@pytest.mark.parametrize("method", SPARSE)
def test_as_many_become_zero_as_were_asked_for_whatever_is_equal(method: type[Encode], sparsity: float) -> None:
    rows, columns = 8, 100
    many_equal = weights(rows, columns).round() + 0.0
    many_equal[many_equal == 0] = 1.0
    for weight_OI in (weights(rows, columns), many_equal):
        zeros_OI = make(method, sparsity=sparsity)(weight_OI, everything(weight_OI)).decode() == 0
        assert int(zeros_OI.sum()) == round(rows * columns * sparsity)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8"])
@pytest.mark.parametrize("method", SPARSE)
def test_a_pattern_keeps_as_many_of_every_run_of_inputs(method: type[Encode], pattern: str) -> None:
    weight_OI = weights()
    kept, m = (int(n) for n in pattern.split(":"))
    decoded_OI = make(method, pattern=pattern)(weight_OI, everything(weight_OI)).decode()
    assert bool(((decoded_OI.view(32, -1, m) != 0).sum(-1) == kept).all())


@pytest.mark.parametrize("method", SPARSE)
def test_nothing_to_remove_changes_nothing(method: type[Encode]) -> None:
    weight_OI = weights()
    assert torch.equal(make(method, sparsity=0.0)(weight_OI, everything(weight_OI)).decode(), weight_OI)


@pytest.mark.parametrize(
    "made",
    [made for m in SPARSE for made in (make(m), make(m, pattern="2:4"), SparseGPT(scope="row")) if made.row_wise],
    ids=repr,
)
def test_outputs_that_are_independent_may_be_stacked(made: Encode) -> None:
    one, other = weights(24, seed=1), weights(8, seed=2)
    stats = everything(one)
    together = made(torch.cat([one, other]), stats).split([24, 8])
    for piece, weight_OI in zip(together, (one, other), strict=True):
        assert torch.equal(piece.decode() == 0, made(weight_OI, stats).decode() == 0)
        torch.testing.assert_close(piece.decode(), made(weight_OI, stats).decode())


def test_masks_are_nested_as_more_is_removed_and_the_first_of_equal_ones_go() -> None:
    score_OI = weights().round()
    masks = [kept_by_row(score_OI, share, "") for share in (0.1, 0.3, 0.5, 0.9)]
    assert all(bool((more | ~fewer).all()) for more, fewer in pairwise(masks))
    assert kept_by_row(torch.ones(1, 4), 0.5, "").tolist() == [[False, False, True, True]]
    assert largest(torch.ones(4), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, "from 0 to below 1"),
        ({"sparsity": -0.1}, "from 0 to below 1"),
        ({"pattern": "half"}, "such as '2:4'"),
        ({"pattern": "4:4"}, "such as '2:4'"),
        ({"pattern": "0:4"}, "such as '2:4'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "one of both"),
    ],
    ids=str,
)
def test_what_is_no_share_and_no_pattern_is_refused(method: type[Encode], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make(method, **settings)


@pytest.mark.parametrize("method", SPARSE)
def test_inputs_that_a_pattern_does_not_divide_are_refused(method: type[Encode]) -> None:
    with pytest.raises(UsageError, match="30 inputs are no multiple of 4; use a pattern of 2, or sparsity"):
        make(method, pattern="2:4").check(30)
    make(method, pattern="2:4").check(64)


# The stored form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 13])
def test_a_bitmask_is_the_weight_bit_for_bit(columns: int, dtype: torch.dtype) -> None:
    weight_OI = weights(6, columns, dtype=dtype)
    weight_OI[weight_OI < 0.2] = 0
    part = masked(weight_OI)
    (form,) = (part.form,)
    read = read_encoded((form,), part.tensors(), 6, columns, dtype)
    assert torch.equal(read.decode(), weight_OI)
    assert torch.equal(part.sample(1, 2).decode(), weight_OI[1::2])
    assert torch.equal(torch.cat([piece.decode() for piece in part.split([4, 2])]), weight_OI)
    assert form.nbytes(6, columns, dtype) == sum(t.nbytes for t in part.tensors().values())
    broken = {**part.tensors(), "weight_bitmask": part.bytes_OB ^ 1}
    with pytest.raises(ValueError, match="another number of values"):
        form.read(broken, 6, columns, dtype)


def test_a_weight_is_held_in_the_smaller_of_the_two_forms() -> None:
    weight_OI = weights(dtype=torch.bfloat16)
    assert isinstance(smallest(weight_OI), Dense)
    assert smallest(kept_by_row(weight_OI.float(), 0.5, "") * weight_OI).form == BitmaskForm(0.5)
    # A bit in sixteen must be saved.
    assert isinstance(smallest(kept_by_row(weight_OI.float(), 0.06, "") * weight_OI), Dense)
    assert smallest(kept_by_row(weight_OI.float(), 0.08, "") * weight_OI).form.kind == "bitmask"


# After them, what stores the rest in fewer bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", KEEPERS)
def test_zeros_survive_every_method_that_says_so(method: type[Encode], dtype: torch.dtype) -> None:
    weight_OI = weights(dtype=dtype)
    stats = everything(weight_OI)
    kept_OI = Wanda()(weight_OI, stats).decode() != 0
    chained = applied(Step("linear", make(method), sparsity=Wanda()), weight_OI, stats)
    assert not bool((chained.decode() != 0)[~kept_OI].any())
    assert bool((chained.decode() != 0)[kept_OI].any())
    already = applied(Step("linear", make(method), keep_zeros=True), weight_OI * kept_OI, stats)
    assert torch.equal(already.decode(), chained.decode())


@pytest.mark.parametrize(
    "made",
    [
        make(RTN, symmetric=False, clip="mse"),
        make(GPTQ, symmetric=False, bits=2),
        make(GPTQ, act_order=False, bits=3),
        FP8(rounding="gptq"),
        FP8(scales="tensor"),
        make(SparseGPT, bits=4, sparsity=0.6),
        make(SparseGPT, bits=3, pattern="1:4"),
        SparseGPT(refine=5),
    ],
    ids=repr,
)
def test_zeros_survive_whatever_the_settings(made: Encode) -> None:
    weight_OI = weights()
    stats = everything(weight_OI)
    step = Step("linear", made, sparsity=Wanda(pattern="2:4"))
    kept_OI = Wanda(pattern="2:4")(weight_OI, stats).decode() != 0
    assert not bool((applied(step, weight_OI, stats).decode() != 0)[~kept_OI].any())


@pytest.mark.parametrize("method", OTHERS)
def test_methods_that_cannot_keep_zeros_are_refused_with_those_that_can(
    method: type[Encode], source: Callable[[str], Path]
) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    with pytest.raises(UsageError, match=rf"{method.name} cannot keep the zeros of magnitude.*gptq"):
        assign(Recipe((Step("linear", Magnitude()), Step("mlp", make(method)))), graph)
    with pytest.raises(UsageError, match=r"keep_zeros=true.*gptq"):
        Step("linear", make(method), keep_zeros=True)


def test_keeping_zeros_is_a_key_of_a_step_and_names_the_recipe() -> None:
    text = '[[steps]]\nwhere = "linear"\nmethod = "rtn"\n'
    keeping = recipe_from_toml(text + "keep_zeros = true")
    (step,) = keeping.encodes
    assert step.sparse
    assert keeping.hash != recipe_from_toml(text).hash
    assert recipe_from_toml(keeping.to_toml()) == keeping
    with pytest.raises(UsageError, match="keep_zeros"):
        recipe_from_toml(text + "keep_zeros = 1")


def test_zeros_of_a_source_that_is_sparse_already_stay(source: Callable[[str], Path], tmp_path: Path) -> None:
    compress(source("llama"), Recipe((Step("linear", Magnitude()),)), tmp_path / "sparse")
    sparse = open_checkpoint(tmp_path / "sparse")
    keeping = Recipe((Step("linear", make(RTN, symmetric=False), keep_zeros=True),))
    report = compress(sparse.path, keeping, tmp_path / "out", format="dense")
    written = open_checkpoint(tmp_path / "out")
    for row in report.rows:
        assert not bool((written[row.name] != 0)[sparse[row.name] == 0].any())
        assert row.zeros is not None
        assert row.zeros >= row.parameters // 2


@pytest.mark.parametrize("tune", TUNES)
def test_tunings_that_would_fill_zeros_are_refused(tune: Any, source: Callable[[str], Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    steps = (Step("linear", Magnitude()), Step("linear", make(RTN)), Tuning("linear", tune()))
    with pytest.raises(UsageError, match="zeros"):
        assign(Recipe(steps, TEXT), graph)


def test_what_has_no_effect_in_a_chain_is_refused(source: Callable[[str], Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    for first, second, said in (
        (Step("linear", Magnitude(), hadamard=16), Step("linear", make(RTN)), "hadamard belongs to the step"),
        (Step("linear", Magnitude()), Step("linear", make(RTN), keep_zeros=True), "no effect after magnitude"),
        (Step("linear", Magnitude()), Step("linear", Magnitude(0.7)), "step 1 .* has no effect"),
    ):
        with pytest.raises(UsageError, match=said):
            assign(Recipe((first, second)), graph)
    with pytest.raises(UsageError, match="leaves no zeros"):
        Step("linear", make(RTN), hadamard=16, keep_zeros=True)


def test_of_two_steps_on_a_weight_the_sparse_one_comes_first_and_elsewhere_each_is_alone(
    source: Callable[[str], Path],
) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    steps = assign(Recipe((Step("attention", Wanda()), Step("linear", make(GPTQ)))), graph)
    assert {steps[w.name].name for w in graph.select("attention")} == {"wanda + gptq"}
    assert {steps[w.name].name for w in graph.select("mlp")} == {"gptq"}
    assert steps[graph.select("attention")[0].name].needs == {"square", "gram"}
    later = assign(Recipe((Step("linear", Wanda()), Step("mlp", Wanda(0.7)))), graph)
    assert {later[w.name].method for w in graph.select("mlp")} == {Wanda(0.7)}


# Through files


def every_keeper(graph: Any, formats: tuple[Format, ...]) -> tuple[Step, ...]:
    """A step for each method that keeps zeros, each on some of the weights."""
    own = [m for m in KEEPERS if "compressed-tensors" not in formats or m.name in STANDARD]
    names = [w.name for w in graph.select("linear")]
    given = {name: own[place % len(own)] for place, name in enumerate(names)}
    assert set(given.values()) == set(own), "more methods than weights: add a block"
    return tuple(Step(name, make(method)) for name, method in given.items())


STANDARD = ("rtn", "gptq", "fp8", "finequant", "magnitude", "wanda", "sparsegpt", "dsnot")
"""Whose weights compressed-tensors holds in one folder for a model in float32."""


@pytest.mark.parametrize("format", ["tersely", "dense", "compressed-tensors"])
def test_zeros_survive_saving_and_loading_in_every_format(format: Format, text: Path, tmp_path: Path) -> None:
    from tests.tokens import write_tokenizer

    path = write_tokenizer(tiny("llama", tmp_path / "source", hidden_size=64, intermediate_size=128))
    checkpoint = open_checkpoint(path)
    graph = read_graph(checkpoint)
    recipe = Recipe((Step("linear", Magnitude(0.4)), *every_keeper(graph, (format,))), TEXT)
    report = compress(path, recipe, tmp_path / "out", calibration=text, format=format)
    stored = open_stored(tmp_path / "out")
    for row in report.rows:
        weight_OI = checkpoint[row.name]
        gone_OI = Magnitude(0.4)(weight_OI, Statistics(weight_OI.shape[1])).decode() == 0
        if "magnitude +" in row.method:
            assert not bool((stored[row.name] != 0)[gone_OI].any()), row.method
        assert row.zeros == int((stored[row.name] == 0).sum())
    assert verify(tmp_path / "out", run=False).encoded == len(report.rows)
    assert forward(tmp_path / "out").isfinite().all()
    share = sum(row.zeros or 0 for row in report.rows) / sum(row.parameters for row in report.rows)
    assert any(f"{100 * share:.2f} % of the" in note for note in report.notes)
    assert report.bytes_after == open_checkpoint(tmp_path / "out").nbytes


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_model_with_zeros_runs_alike_in_both_of_its_forms_and_the_mask_is_smaller(
    model_type: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = Recipe((Step("linear", Magnitude(pattern="2:4")),))
    plain = compress(source(model_type), recipe, tmp_path / "plain")
    assert plain.format == "dense"
    assert plain.bytes_after == plain.bytes_before
    small = compress(source(model_type), recipe, tmp_path / "small", format="tersely")
    assert torch.equal(forward(tmp_path / "small"), forward(tmp_path / "plain"))
    assert not torch.equal(forward(tmp_path / "small"), forward(source(model_type)))
    assert sum(row.bytes_after for row in small.rows) * 32 == 17 * sum(row.bytes_before for row in small.rows)
    assert all(row.zeros == row.parameters // 2 for row in small.rows)
    assert prepare(source(model_type), recipe, tmp_path / "x", format="tersely").cost.output == small.bytes_after
    export_folder(tmp_path / "small", tmp_path / "again", to="hf")
    assert torch.equal(forward(tmp_path / "again"), forward(tmp_path / "plain"))


def test_compressed_tensors_without_a_quantized_weight_is_refused(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no weight is quantized.*--format dense"):
        compress(source("llama"), Recipe((Step("linear", Magnitude()),)), tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["tersely", "dense", "compressed-tensors"])
def test_a_job_that_was_stopped_ends_with_the_same_bytes(
    format: Format, source: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (Step("linear", SparseGPT(pattern="2:4")), Step("mlp", make(GPTQ)))
    recipe = Recipe(steps, TEXT)
    how: dict[str, Any] = {"calibration": text, "format": format}
    compress(source("llama"), recipe, tmp_path / "whole", **how)

    def stopped(*arguments: Any) -> Iterator[Any]:
        for number, each in enumerate(calibrated(*arguments)):
            if number == 1:
                raise KeyboardInterrupt
            yield each

    with monkeypatch.context() as patch:
        patch.setattr("tersely.compression.calibrated", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress(source("llama"), recipe, tmp_path / "out", **how)
    compress(source("llama"), recipe, tmp_path / "out", **how, resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_a_damaged_mask_is_named(source: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    compress(source("llama"), Recipe((Step("linear", Magnitude()),)), tmp_path / "out", format="tersely")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("weight_bitmask"))
    tensors[name] = tensors[name] ^ 1
    file.chmod(0o600)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="another number of values"):
        open_stored(tmp_path / "out").encoded(name.replace("_bitmask", ""))
