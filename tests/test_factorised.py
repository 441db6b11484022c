"""Weights that are two factors and nothing else: what runs, what is stored, and what other forms make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.codecs.low_rank import LowRank, LowRankForm
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.export.folder import export_folder
from tersely.graph import Graph, read_graph
from tersely.job import prepare
from tersely.measure import Statistics
from tersely.methods.encode.asvd import ASVD
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.svd_llm import SVDLLM
from tersely.methods.rebase.rotate import Rotate
from tersely.methods.tune.distill import Distill
from tersely.plan.assignment import assign
from tersely.plan.reading import load_recipe
from tersely.plan.recipe import Calibration, Change, Recipe, Step, Tuning
from tersely.runtime import load_model
from tersely.runtime.packed import Packed
from tersely.stored import open_stored
from tersely.stream import Stop, stream
from tersely.verify import verify
from tests.tiny import forward, inputs, load, tiny
from tests.tokens import write_tokenizer

TEXT = Calibration(samples=12, context=24)
HALVED = Recipe((Step("linear", SVDLLM(ratio=0.5)),), TEXT)


@pytest.fixture(scope="module")
def thin(source: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without half of the parameters of its blocks."""
    out = tmp_path_factory.mktemp("thin") / "out"
    compress(source("llama"), HALVED, out, calibration=text)
    return out


def test_a_linear_layer_never_forms_its_weight(thin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = forward(thin)
    model: Any = load(thin)

    def formed(_: LowRank) -> None:
        raise AssertionError("the product of the factors was formed")

    monkeypatch.setattr(LowRank, "decode", formed)
    with torch.no_grad():
        assert torch.equal(model(**inputs("llama")).logits.float(), expected)


def test_what_it_gives_is_the_product_of_the_factors_up_to_the_order_of_sums(thin: Path, tmp_path: Path) -> None:
    export_folder(thin, tmp_path / "dense", "hf")
    torch.testing.assert_close(forward(thin), forward(tmp_path / "dense"), rtol=0, atol=1e-4)
    stored, dense = open_stored(thin), open_checkpoint(tmp_path / "dense")
    assert all(torch.equal(dense[name], stored[name]) for name in dense)


def test_it_takes_as_many_bytes_as_its_factors_on_disk_and_in_memory(thin: Path, source: Callable[[str], Path]) -> None:
    before, after = (read_graph(open_stored(path)) for path in (source("llama"), thin))
    model: Any = load(thin)
    weights = {name: w for name, w in model.named_parameters() if isinstance(w, Packed)}
    assert set(weights) == {w.name for w in before.select("linear")}
    for name, weight in weights.items():
        (form,) = open_stored(thin).entries[name].scheme.parts
        assert isinstance(form, LowRankForm)
        rows, columns = after.weight(name).rows, after.weight(name).columns
        assert weight.packed_bytes == 4 * form.rank * (rows + columns) <= 0.5 * 4 * rows * columns
    job = prepare(source("llama"), Recipe((Step("linear", ASVD(ratio=0.5, alpha=0.0)),)), thin / "none")
    assert job.format == "tersely"
    assert job.cost.output == open_checkpoint(thin).nbytes
    assert verify(thin).ran


def test_a_job_that_was_interrupted_goes_on_with_the_factors_that_ran(
    thin: Path, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    def stop(what: str, _share: float) -> None:
        if what.startswith("model.layers.1"):
            raise StoppedError

    with pytest.raises(StoppedError):
        compress(source("llama"), HALVED, tmp_path / "out", calibration=text, progress=stop)
    compress(source("llama"), HALVED, tmp_path / "out", calibration=text, resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (thin / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", [SVDLLM(ratio=0.3), ASVD(ratio=0.3)], ids=lambda m: m.name)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_head_is_factored_by_what_it_reads(
    method: Any, model_type: str, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    recipe = Recipe((Step("linear | head", method),), TEXT)
    report = compress(source(model_type), recipe, tmp_path / "out", calibration=text)
    (row,) = (row for row in report.rows if row.role == "head")
    assert report.calibration is not None
    assert row.tokens == report.calibration["tokens"]
    assert not row.note
    model: Any = load(tmp_path / "out")
    assert isinstance(model.get_output_embeddings().weight, Packed)
    export_folder(tmp_path / "out", tmp_path / "dense", "hf")
    torch.testing.assert_close(forward(tmp_path / "out"), forward(tmp_path / "dense"), rtol=0, atol=1e-4)


def test_a_form_that_cannot_keep_the_factors_is_refused_with_the_way_out(
    thin: Path, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"takes as much as the weight.*export --to hf"):
        compress(source("llama"), HALVED, tmp_path / "out", calibration=text, format="dense")
    with pytest.raises(UsageError, match="compressed-tensors has no form for low_rank"):
        compress(source("llama"), HALVED, tmp_path / "out", calibration=text, format="compressed-tensors")
    with pytest.raises(UsageError, match=r"is two factors and nothing else.*--to hf"):
        export_folder(thin, tmp_path / "out", "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["svd-llm", "asvd"])
def test_the_presets_remove_a_fifth(preset: str, source: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    recipe = load_recipe(preset, ["calibration.samples=8", "calibration.context=24"])
    report = compress(source("llama"), recipe, tmp_path / "out", calibration=text)
    before, after = (sum(getattr(row, f"bytes_{when}") for row in report.rows) for when in ("before", "after"))
    assert 0.77 < after / before <= 0.8
    loaded: Any = load_model(tmp_path / "out")
    with torch.inference_mode():
        assert loaded(**inputs("llama")).logits.isfinite().all()


# Embeddings

EMBEDDINGS = Recipe((Step("linear | embedding", SVDLLM(ratio=0.5)),), TEXT)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_looked_up_in_their_factors_and_a_tied_head_reads_the_same(
    tied: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the paged forward, with the factored table, against transformers; and no product is formed."""
    logits: list[torch.Tensor] = []
    data: list[MicroBatch] = []

    def watched(c: Checkpoint, g: Graph, batches: tuple[MicroBatch, ...], **settings: Any) -> Iterator[Stop]:
        data.extend(batches)
        return stream(c, g, batches, logits=logits.append, **settings)

    monkeypatch.setattr("tersely.calibrated.stream", watched)
    path = write_tokenizer(tiny("llama", tmp_path / "source", tied=tied))
    report = compress(path, EMBEDDINGS, tmp_path / "out", calibration=text)
    (row,) = (row for row in report.rows if row.role == "embedding")
    assert report.calibration is not None
    assert row.tokens == report.calibration["tokens"]
    assert row.bytes_after <= 0.5 * row.bytes_before
    export_folder(tmp_path / "out", tmp_path / "dense", "hf")
    torch.testing.assert_close(forward(tmp_path / "out"), forward(tmp_path / "dense"), rtol=0, atol=1e-4)
    model: Any = load(tmp_path / "out")
    assert isinstance(model.get_input_embeddings().weight, Packed)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    monkeypatch.setattr(LowRank, "decode", None)
    with torch.no_grad():
        found = [model(input_ids=batch.ids_BL, use_cache=False).logits for batch in data]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, found, strict=True))


@pytest.mark.parametrize("method", [SVDLLM(ratio=0.5), ASVD(ratio=0.5)], ids=lambda m: m.name)
def test_a_table_is_truncated_by_how_often_its_rows_are_read(method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    table_OI, reads_O = torch.randn((64, 32), generator=generator), torch.randint(0, 50, (64,), generator=generator)
    reads_O[:8] = 0
    encoded = method(table_OI, Statistics(32, tokens=int(reads_O.sum()), reads_O=reads_O.float()))
    scale_O1 = (reads_O + 1).sqrt()[:, None]
    sigma = torch.linalg.svdvals(scale_O1 * table_OI)
    lost = float((scale_O1 * (table_OI - encoded.decode())).square().sum())
    assert lost == pytest.approx(float(sigma[encoded.parts[0].form.rank :].square().sum()), rel=1e-4)
    # Rows that nothing reads are there still.
    assert float(encoded.decode()[:8].norm() / table_OI[:8].norm()) > 0.1


@pytest.mark.parametrize(
    "steps",
    [
        (Step("linear", RTN(group=16)), Step("embedding", RTN(group=16))),
        (Step("embedding", ASVD(alpha=0.0), "int8"),),
        (Change("residual", Rotate()), Step("embedding", ASVD(alpha=0.0))),
        (Step("embedding", ASVD(alpha=0.0)), Step("linear", RTN(group=16)), Tuning("linear", Distill())),
    ],
    ids=["integers", "activations", "basis", "tuning"],
)
def test_embeddings_that_could_not_be_looked_up_are_refused(steps: Any, source: Callable[[str], Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    with pytest.raises(UsageError, match=r"embeddings are looked up: they can be two factors .*embed_tokens"):
        assign(Recipe(steps), graph)


def test_embeddings_are_selected_by_their_own_name_alone(source: Callable[[str], Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    (table,) = graph.select("embedding")
    assert table.kind == "lookup"
    assert graph.select("linear | embedding") == (table, *graph.select("linear"))
    assert table not in graph.select("*")
    with pytest.raises(UsageError, match="embedding"):
        graph.select("embedding blocks 0")
