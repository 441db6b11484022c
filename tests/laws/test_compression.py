"""What is written, loaded by plain transformers, is what was in memory: every family, method and format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.compression import compress
from tersely.encoding import Format
from tersely.errors import UsageError
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.plan.assignment import assign
from tersely.plan.recipe import Calibration, Recipe, Step
from tersely.results import Report
from tersely.stored import open_stored
from tersely.stream import Stop, stream
from tersely.verify import verify
from tests.plain import logits_of, write_changed
from tests.tiny import FAMILIES, forward, tiny
from tests.tokens import write_text, write_tokenizer

TEXT = Calibration(samples=16, context=40)
FREE = {
    "4 bits": Recipe((Step("linear", RTN(bits=4, group=16)),)),
    "asymmetric": Recipe((Step("linear", RTN(bits=3, group=16, symmetric=False)),)),
    "mixed": Recipe((Step("linear", RTN(bits=4, group=16)), Step("attention", RTN(bits=8, group=0)))),
}
MEASURED = {
    "4 bits": Recipe((Step("linear", GPTQ(bits=4, group=16)),), TEXT),
    "asymmetric": Recipe((Step("linear", GPTQ(bits=3, group=16, symmetric=False)),), TEXT),
    "mixed": Recipe((Step("linear", GPTQ(bits=4, group=16)), Step("attention", RTN(bits=8, group=0))), TEXT),
}
TRANSPOSED = ("gpt2",)
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
DENSE_KINDS = (
    "llama",
    "gpt2",
    "mixtral",
    "t5",
)  # a layout of each kind, where all families would add nothing


def format_of(model_type: str) -> Format:
    return "dense" if model_type in TRANSPOSED else "compressed-tensors"


def decoded(checkpoint: Checkpoint, graph: Graph, out: Path, recipe: Recipe) -> dict[str, Tensor]:
    """All tensors of the source, those that were encoded as the written integers decode to."""
    stored = open_stored(out)
    assert set(stored) == set(checkpoint)
    assert set(stored.entries) == set(assign(recipe, graph))
    return dict(stored)


def rounded(checkpoint: Checkpoint, graph: Graph, recipe: Recipe) -> dict[str, Tensor]:
    """All tensors of the source, those that a data-free recipe selects encoded and decoded by the method alone."""
    tensors = dict(checkpoint)
    for name, step in assign(recipe, graph).items():
        weight = graph.weight(name)
        value_OI = tensors[name].t() if weight.transposed else tensors[name]
        decoded_OI = step.method(value_OI.contiguous(), Statistics(weight.columns)).decode()
        tensors[name] = decoded_OI.t() if weight.transposed else decoded_OI
    return tensors


def loads(model_type: str, name: str) -> bool:
    """Whether transformers can load this at all (5.23): tested below where it cannot."""
    return (model_type, name) != ("t5", "mixed") and not (model_type in EXPERTS and name == "asymmetric")


CASES = [pytest.param(t, name, id=f"{t}-{name}".replace(" ", "-")) for t in FAMILIES for name in FREE if loads(t, name)]


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_a_data_free_job_loads_as_the_source_with_the_weights_of_the_method(
    model_type: str, name: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source(model_type))
    graph = read_graph(checkpoint)
    report = compress(checkpoint.path, FREE[name], tmp_path / "out", format=format_of(model_type))
    expected = write_changed(checkpoint.path, tmp_path / "expected", rounded(checkpoint, graph, FREE[name]))
    assert torch.equal(forward(tmp_path / "out"), forward(expected))
    assert {row.name for row in report.rows} == set(assign(FREE[name], graph))
    assert verify(tmp_path / "out", run=False).encoded == len(report.rows)
    if name == "4 bits":
        assert verify(tmp_path / "out").ran
        assert not torch.equal(forward(expected), forward(checkpoint.path))


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_a_measured_job_loads_as_the_model_that_it_had_in_memory(
    model_type: str,
    name: str,
    source: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logits of the last step of the paged forward, all blocks compressed, against plain transformers."""
    logits: list[Tensor] = []
    data: list[MicroBatch] = []

    def watched(
        checkpoint: Checkpoint, graph: Graph, batches: tuple[MicroBatch, ...], **settings: Any
    ) -> Iterator[Stop]:
        data.extend(batches)
        return stream(checkpoint, graph, batches, logits=logits.append, **settings)

    monkeypatch.setattr("tersely.calibrated.stream", watched)
    path = source(model_type)
    report = compress(path, MEASURED[name], tmp_path / "out", calibration=text, format=format_of(model_type))
    loaded = logits_of(tmp_path / "out", data, one_by_one=model_type in EXPERTS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, loaded, strict=True))
    tokens = sum(int(b.ids_BL.numel() if b.keep_BL is None else b.keep_BL.sum()) for b in data)
    assert report.calibration is not None
    assert report.calibration["tokens"] == tokens
    for row in report.rows:
        whole = tokens if row.method == "gptq" and row.role != "expert" else row.tokens
        assert row.tokens == whole
        assert 0 < row.error < 1


@pytest.mark.parametrize("model_type", DENSE_KINDS)
def test_the_dense_format_holds_the_same_weights(
    model_type: str, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source(model_type))
    graph = read_graph(checkpoint)
    recipe = MEASURED["4 bits"]
    report = compress(checkpoint.path, recipe, tmp_path / "dense", calibration=text, format="dense")
    dense = open_checkpoint(tmp_path / "dense")
    assert {n: dense.spec(n).shape for n in dense} == {n: checkpoint.spec(n).shape for n in checkpoint}
    assert {n: dense.spec(n).dtype for n in dense} == {n: checkpoint.spec(n).dtype for n in checkpoint}
    assert dense.config == checkpoint.config
    assert report.bytes_after == report.bytes_before
    chosen = assign(recipe, graph)
    assert all(torch.equal(dense[n], checkpoint[n]) for n in checkpoint if n not in chosen)
    if model_type not in TRANSPOSED:
        compress(checkpoint.path, recipe, tmp_path / "packed", calibration=text)
        expected = decoded(checkpoint, graph, tmp_path / "packed", recipe)
        assert all(torch.equal(dense[name], expected[name]) for name in chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model_type", "symmetric"), [("llama", True), ("llama", False), ("mixtral", True)])
def test_half_precision_decodes_to_the_same_bits_in_the_reader_s_library(
    model_type: str, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny(model_type, tmp_path / "source", dtype=dtype)
    checkpoint = open_checkpoint(path)
    graph = read_graph(checkpoint)
    recipe = Recipe((Step("linear", RTN(bits=4, group=16, symmetric=symmetric)),))
    compress(path, recipe, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    assert {written.spec(n).dtype for n in written if n.endswith("weight_scale")} == {dtype}
    expected = write_changed(path, tmp_path / "expected", decoded(checkpoint, graph, tmp_path / "out", recipe))
    assert torch.equal(forward(tmp_path / "out"), forward(expected))


@pytest.mark.parametrize("model_type", TRANSPOSED)
def test_a_format_that_cannot_hold_a_family_is_refused_before_anything_is_written(
    model_type: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"stored as \(inputs, outputs\).*--format dense"):
        compress(source(model_type), FREE["4 bits"], tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_type", "steps", "named"),
    [
        ("llama", [("linear", {}), ("mlp", {"symmetric": False})], "several schemes"),
        ("t5", [("linear", {}), ("mlp", {"bits": 8})], "one scheme"),
        ("mixtral", [("linear", {"symmetric": False})], "experts"),
        ("mixtral", [("attention", {})], "experts"),
        ("mixtral", [("blocks 1", {})], "experts"),
        ("mixtral", [("linear", {}), ("*.w2", {"bits": 8})], "experts"),
        ("deepseek_v3", [("mlp", {})], "experts"),
    ],
)
def test_what_transformers_cannot_load_is_refused_with_the_way_out(
    model_type: str,
    steps: list[tuple[str, dict[str, Any]]],
    named: str,
    source: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    recipe = Recipe(tuple(Step(where, RTN(**{"group": 16, **settings})) for where, settings in steps))
    with pytest.raises(UsageError, match=rf"{named}.*--format dense"):
        compress(source(model_type), recipe, tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())
    compress(source(model_type), recipe, tmp_path / "out", format="dense")
    assert forward(tmp_path / "out").isfinite().all()


# Parts of a model


PARTS = {
    "attention": ("llama", "gpt_neox", "bert"),
    "experts": EXPERTS,
    "mlp": ("llama", "phi3"),
    "blocks 1": ("llama", "t5"),
    "*.down_proj": ("llama",),
    "head": ("gpt_neox", "llama"),
    "linear | head": ("gpt_neox", "llama", "mixtral"),
}


@pytest.mark.parametrize(("where", "model_type"), [(where, t) for where, types in PARTS.items() for t in types])
def test_a_part_of_a_model_is_compressed_and_the_rest_loads_as_it_was(
    where: str, model_type: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source(model_type))
    graph = read_graph(checkpoint)
    recipe = Recipe((Step(where, RTN(bits=3, group=16)),))
    compress(checkpoint.path, recipe, tmp_path / "out")
    tensors = rounded(checkpoint, graph, recipe)
    expected = write_changed(checkpoint.path, tmp_path / "expected", tensors)
    assert torch.equal(forward(tmp_path / "out"), forward(expected))
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written[n], checkpoint[n]) for n in checkpoint if n in written)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_measured_head_is_encoded_with_what_it_reads(
    model_type: str, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    recipe = Recipe((Step("linear | head", GPTQ(bits=4, group=16)),), TEXT)
    report = compress(source(model_type), recipe, tmp_path / "out", calibration=text)
    checkpoint = open_checkpoint(source(model_type))
    (row,) = (r for r in report.rows if r.role == "head")
    assert report.calibration is not None
    assert row.tokens == report.calibration["tokens"]
    tensors = decoded(checkpoint, read_graph(checkpoint), tmp_path / "out", recipe)
    expected = write_changed(checkpoint.path, tmp_path / "expected", tensors)
    assert torch.equal(forward(tmp_path / "out"), forward(expected))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2", "t5", "bert"])
def test_a_tied_head_stays_tied_and_exact(model_type: str, tmp_path: Path) -> None:
    path = tiny(model_type, tmp_path / "source", tied=True)
    checkpoint = open_checkpoint(path)
    graph = read_graph(checkpoint)
    assert graph.tied
    compress(path, FREE["4 bits"], tmp_path / "out", format=format_of(model_type))
    tensors = rounded(checkpoint, graph, FREE["4 bits"])
    assert torch.equal(forward(tmp_path / "out"), forward(write_changed(path, tmp_path / "expected", tensors)))
    written = open_checkpoint(tmp_path / "out")
    assert written.config.get("tie_word_embeddings", True)
    with pytest.raises(UsageError, match="tied to the embedding"):
        compress(path, Recipe((Step("head", RTN(group=16)),)), tmp_path / "head")


# Experts


@pytest.mark.parametrize("model_type", EXPERTS)
def test_every_expert_has_statistics_of_its_own_and_rare_ones_are_named(
    model_type: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    few = write_text(tmp_path / "few.txt", documents=5, words=10, seed=3)
    recipe = Recipe((Step("linear", GPTQ(bits=4, group=16)),), Calibration(samples=5, context=40))
    report = compress(source(model_type), recipe, tmp_path / "out", calibration=few)
    checkpoint = open_checkpoint(source(model_type))
    graph, per_token = read_graph(checkpoint), checkpoint.config["num_experts_per_tok"]
    assert report.calibration is not None
    tokens: int = report.calibration["tokens"]
    experts = [row for row in report.rows if row.role == "expert"]
    assert len(experts) == sum(w.role == "expert" and w.kind == "linear" for w in graph.weights)
    by_place: dict[tuple[int | None, str], list[int]] = {}
    for row in experts:
        weight = graph.weight(row.name)
        generic = weight.path.replace(f".{weight.expert}.", ".{e}.")
        by_place.setdefault((row.block, generic), []).append(row.tokens)
    assert all(sum(counts) == per_token * tokens for counts in by_place.values())
    assert any(len(set(counts)) > 1 for counts in by_place.values())
    rare = [row for row in report.rows if row.tokens < graph.weight(row.name).columns]
    assert {row.role for row in rare} >= {"expert"}, "the text should be too short for some expert"
    for row in rare:
        rule = f"{row.tokens} calibration tokens for {graph.weight(row.name).columns} inputs"
        assert rule in row.note
        assert "rounded to nearest" in row.note
        assert any(row.name.removesuffix(".weight") in note and rule in note for note in report.notes)
    assert all(not row.note for row in report.rows if row not in rare)
    # Rounding is what is written, and nothing but the count decided it.
    chosen = {row.name for row in rare}
    nearest = Recipe((Step("experts", RTN(bits=4, group=16, clip="mse")),))
    expected = rounded(checkpoint, graph, nearest)
    written = decoded(checkpoint, graph, tmp_path / "out", recipe)
    for row in experts:
        assert torch.equal(written[row.name], expected[row.name]) == (row.name in chosen)


def test_experts_that_no_token_reached_are_named_too(tmp_path: Path) -> None:
    path = write_tokenizer(tiny("mixtral", tmp_path / "source", num_local_experts=16, num_experts_per_tok=1))
    few = write_text(tmp_path / "few.txt", documents=2, words=3)
    recipe = Recipe((Step("experts", GPTQ(bits=4, group=16)),), Calibration(samples=2, context=8))
    report = compress(path, recipe, tmp_path / "out", calibration=few)
    unreached = [row for row in report.rows if row.tokens == 0]
    assert unreached
    assert all("0 calibration tokens" in row.note for row in unreached)
    assert forward(tmp_path / "out").isfinite().all()


def test_a_report_is_about_all_that_was_written(source: Callable[[str], Path], tmp_path: Path) -> None:
    report: Report = compress(source("llama"), FREE["mixed"], tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    assert report.bytes_after == written.nbytes
    assert report.bytes_before == open_checkpoint(source("llama")).nbytes
    assert report.parameters == open_checkpoint(source("llama")).parameters
    assert report.ratio == report.bytes_before / report.bytes_after
