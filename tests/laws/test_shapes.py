"""Smaller shapes: what is dead goes without a trace, in every family; what a family cannot say is an error."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tersely.bases import selected
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.export.gguf import write_gguf
from tersely.graph import Graph, read_graph
from tersely.methods import METHODS
from tersely.methods.cut import Kind
from tersely.plan.reading import recipe_from_toml
from tersely.report.terminal import report_table
from tersely.results import Report
from tersely.shape.structures import Place, places_of
from tests.plain import write_changed
from tests.tiny import FAMILIES, forward, inputs, load, tiny
from tests.tokens import write_tokenizer

CALIBRATION = "[calibration]\nsamples = 8\ncontext = 40\n"
LAYER_NORMS = ("gpt2", "opt", "gpt_neox", "bert", "starcoder2", "stablelm")
ONE_NUMBER = ("gpt2", "gpt_neox")
"""Their configs have one number for the residual stream and for all heads."""
NO_HEADS = (*ONE_NUMBER, "opt", "bert", "stablelm")
NO_HIDDEN = ("gpt2", "opt", "gpt_neox", "bert", "stablelm")
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")


def recipe(*lines: str, measured: bool = True) -> Any:
    return recipe_from_toml((CALIBRATION if measured else "") + "[[steps]]\n" + "\n".join(lines))


def dead(place: Place) -> Tensor:
    """A quarter of the structures of a place, or half where there are few; never the same in all blocks."""
    every = 4 if place.count >= 4 and place.kind != "heads" else 2
    first = int(place.unit.rpartition(".")[2]) % every if place.unit and not place.together else 0
    return torch.arange(first, place.count, every)


def plant(source: Path, folder: Path, kind: Kind, *, seed: int = 3) -> Path:
    """A copy in which some structures are zero in all that writes and reads them."""
    checkpoint = open_checkpoint(source)
    graph = read_graph(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    # Larger than as they are made, so that a norm's epsilon counts for nothing.
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in checkpoint.items()}
    for place in places_of(graph, kind):
        for weight in graph.weights:
            if place.holds(weight):
                tensors[weight.name].view(-1)[_elements(graph, place, weight).reshape(-1)] = 0
    folder.mkdir()
    made = write_changed(source, folder / "planted", tensors)
    return write_tokenizer(made)


def _elements(graph: Graph, place: Place, weight: Any) -> Tensor:
    """Numbers of the elements of a stored tensor that belong to dead structures."""
    numbers = torch.arange(weight.spec.nbytes // weight.spec.dtype.itemsize).view(weight.spec.shape)
    share = len(dead(place)) / place.count
    heads = round(graph.sizes.get("heads", 1) * share) if place.kind == "heads" else graph.sizes.get("heads", 1)
    return selected(graph, weight, numbers, place.index(dead(place)), heads)


def share(source: Path, kind: Kind) -> float:
    place = places_of(read_graph(open_checkpoint(source)), kind)[0]
    return len(dead(place)) / place.count


def same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    expected, got = forward(one), forward(other)
    scale = float(expected.abs().max())
    assert (expected - got).abs().max() <= tolerance * max(1.0, scale)


@pytest.mark.parametrize("refit", [False, True], ids=["cut", "refitted"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dead_neurons_go_without_a_trace(model_type: str, refit: bool, tmp_path: Path, text: Path) -> None:
    source = plant(tiny(model_type, tmp_path / "source"), tmp_path / "p", "neurons")
    lines = ('where = "neurons"', 'method = "weight_norm"', f"ratio = {share(source, 'neurons')}", "multiple = 8")
    steps = recipe(*lines, *(() if refit else ("refit = false",)), measured=refit)
    report = compress(source, steps, tmp_path / "out", calibration=text if refit else None)
    assert report.parameters_after < report.parameters == open_checkpoint(source).parameters
    assert report.parameters_after == open_checkpoint(tmp_path / "out").parameters
    same(source, tmp_path / "out")


@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in (*NO_HEADS, "olmo2")])
def test_dead_heads_go_without_a_trace(model_type: str, tmp_path: Path, text: Path) -> None:
    source = plant(tiny(model_type, tmp_path / "source"), tmp_path / "p", "heads")
    before = read_graph(open_checkpoint(source))
    steps = recipe('where = "heads"', 'method = "weight_norm"', "ratio = 0.5")
    compress(source, steps, tmp_path / "out", calibration=text)
    after = read_graph(open_checkpoint(tmp_path / "out"))
    assert after.sizes["heads"] == before.sizes["heads"] // 2
    assert after.sizes["heads"] // after.sizes["kv_heads"] == before.sizes["heads"] // before.sizes["kv_heads"]
    same(source, tmp_path / "out")


@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in (*NO_HIDDEN, *LAYER_NORMS)])
def test_dead_hidden_coordinates_go_without_a_trace(model_type: str, tmp_path: Path, text: Path) -> None:
    source = plant(tiny(model_type, tmp_path / "source"), tmp_path / "p", "hidden")
    steps = recipe('where = "hidden"', 'method = "weight_norm"', "ratio = 0.25", "multiple = 16")
    compress(source, steps, tmp_path / "out", calibration=text)
    assert read_graph(open_checkpoint(tmp_path / "out")).sizes["residual"] == 48
    same(source, tmp_path / "out", 1e-4)


@pytest.mark.parametrize("model_type", EXPERTS[:2])
def test_experts_that_stay_are_counted_anew_and_so_are_the_rows_of_their_router(
    model_type: str, tmp_path: Path, source: Callable[[str], Path], text: Path
) -> None:
    parent = open_checkpoint(source(model_type))
    steps = recipe('where = "experts"', 'method = "routed"', "ratio = 0.5")
    report = compress(source(model_type), steps, tmp_path / "out", calibration=text)
    made = open_checkpoint(tmp_path / "out")
    before, after = read_graph(parent), read_graph(made)
    for unit in before.units:
        scores = torch.tensor(next(s for key, s in report.shapes[0].scores.items() if unit in key))
        kept = sorted(scores.argsort(descending=True, stable=True)[:2].tolist())
        for weight in after.unit(unit):
            if weight.expert is not None:
                path = weight.parameter.replace(f".{weight.expert}.", f".{kept[weight.expert]}.", 1)
                twin = weight.name.removesuffix(weight.parameter) + path
                assert torch.equal(made[weight.name], parent[twin])
            elif weight.role == "router":
                assert torch.equal(made[weight.name], parent[weight.name][kept])
    assert forward(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("model_type", ONE_NUMBER)
def test_heads_and_hidden_coordinates_go_together_where_the_config_has_one_number(
    model_type: str, tmp_path: Path, source: Callable[[str], Path], text: Path
) -> None:
    for where in ("heads", "hidden"):
        steps = recipe(f'where = "{where}"', 'method = "minitron"', "ratio = 0.5")
        with pytest.raises(UsageError, match=r"one number \(.*\).*write `hidden\|heads`"):
            compress(source(model_type), steps, tmp_path / where, calibration=text)
        assert not (tmp_path / where).exists()
    steps = recipe('where = "hidden|heads"', 'method = "minitron"', "ratio = 0.5")
    compress(source(model_type), steps, tmp_path / "out", calibration=text)
    assert read_graph(open_checkpoint(tmp_path / "out")).sizes["residual"] == 32
    assert forward(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t != "bert"])
def test_a_block_that_does_nothing_goes_without_a_trace(model_type: str, tmp_path: Path, text: Path) -> None:
    folder = tiny(model_type, tmp_path / "source", blocks=4)
    checkpoint = open_checkpoint(folder)
    graph = read_graph(checkpoint)
    tensors = {n: t.clone() for n, t in checkpoint.items()}
    idle = [unit for unit in graph.units if unit.endswith(".2")]
    for weight in graph.weights:
        if weight.unit in idle and "residual" in weight.writes.spaces:
            tensors[weight.name].fill_(-graph.family.norm_offset if weight.kind == "norm" else 0.0)
    (tmp_path / "p").mkdir()
    source = write_tokenizer(write_changed(folder, tmp_path / "p" / "planted", tensors))
    losses = model_type not in ("t5",)
    for method in ("block_similarity", *(("block_loss", "block_search") if losses and model_type == "llama" else ())):
        out = tmp_path / method
        steps = recipe('where = "blocks"', f'method = "{method}"', "ratio = 0.25")
        report = compress(source, steps, out, calibration=text)
        assert read_graph(open_checkpoint(out)).sizes[graph.units[0].rpartition(".")[0]] == 3
        if method == "block_similarity":
            assert all(note.endswith(": 2") or "; " in note for note in report.shapes[0].notes)
            same(source, out)


def test_cached_generation_is_uncached_generation_when_blocks_are_counted_anew(
    tmp_path: Path, source: Callable[[str], Path], text: Path
) -> None:
    steps = recipe('where = "blocks"', 'method = "block_similarity"', "ratio = 0.5")
    compress(source("gemma2"), steps, tmp_path / "out", calibration=text)
    model: Any = load(tmp_path / "out")
    ids = torch.arange(3, 12)[None]
    whole = model(ids, use_cache=False).logits[0, -1]
    first = model(ids[:, :-1], use_cache=True)
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[0, -1]
    assert torch.allclose(whole, last, atol=1e-5)


def test_a_killed_cut_ends_with_the_same_bytes(
    tmp_path: Path, source: Callable[[str], Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersely.writer import Writer

    steps = recipe('where = "neurons|heads|hidden"', 'method = "minitron"', "ratio = 0.5")
    compress(source("llama"), steps, tmp_path / "whole", calibration=text)
    put, count = Writer.put, 0

    def failing(self: Writer, unit: str, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        put(self, unit, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            compress(source("llama"), steps, tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()
    compress(source("llama"), steps, tmp_path / "out", calibration=text, resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert not (tmp_path / "out.between").exists()


SHAPES = {
    "narrower": 'where = "neurons|heads|hidden"\nmethod = "minitron"\nratio = 0.5',
    "sliced": 'where = "hidden"\nmethod = "slicegpt"\nratio = 0.5',
    "shorter": 'where = "blocks"\nmethod = "block_similarity"\nratio = 0.5',
}


@pytest.fixture(scope="module")
def smaller(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], text: Path
) -> Callable[[str], Path]:
    """The tiny Llama in each of these shapes, cut once."""
    made: dict[str, Path] = {}

    def get(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("cut") / "model"
            compress(source("llama"), recipe(SHAPES[shape]), made[shape], calibration=text)
        return made[shape]

    return get


def encoding(method: Any) -> str:
    """A step of a method on all linear weights, in groups that divide them."""
    groups = "\ngroup = 16" if "group" in method.__dataclass_fields__ else ""
    settings = "\nbits = 4\ngroup = 4" if method.name == "aqlm" else groups
    return f'[[steps]]\nwhere = "linear"\nmethod = "{method.name}"{settings}'


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_cut_can_be_encoded_by_every_method(
    shape: str, method: Any, tmp_path: Path, smaller: Callable[[str], Path], text: Path
) -> None:
    measured = bool(recipe_from_toml(encoding(method)).needs)
    steps = recipe_from_toml((CALIBRATION if measured else "") + encoding(method))
    report = compress(smaller(shape), steps, tmp_path / "out", calibration=text if measured else None, format="tersely")
    assert {row.method for row in report.rows} == {method.name}
    assert forward(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_and_encoded_in_one_job_is_cut_and_then_encoded(
    shape: str, tmp_path: Path, source: Callable[[str], Path], smaller: Callable[[str], Path], text: Path
) -> None:
    encode = '[[steps]]\nwhere = "linear"\nmethod = "gptq"\ngroup = 16'
    both = recipe_from_toml(f"{CALIBRATION}[[steps]]\n{SHAPES[shape]}\n{encode}")
    report = compress(source("llama"), both, tmp_path / "one", calibration=text)
    assert len(report.shapes) == 1
    assert report.bits < 32
    compress(smaller(shape), recipe_from_toml(CALIBRATION + encode), tmp_path / "two", calibration=text)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


CUTS_FOR_LLAMA_CPP = {
    "llama": ("narrower", "sliced", "shorter"),
    "qwen3": ("narrower", "shorter"),
    "gemma2": ("narrower",),
    "phi3": ("narrower",),
    "mixtral": ("narrower", "fewer experts"),
}


@pytest.mark.parametrize(("model_type", "shape"), [(t, s) for t, own in CUTS_FOR_LLAMA_CPP.items() for s in own])
def test_llama_cpp_computes_what_transformers_does_of_a_smaller_shape(
    model_type: str, shape: str, tmp_path: Path, source: Callable[[str], Path], text: Path, llama: Any
) -> None:
    lines = SHAPES.get(shape, 'where = "experts"\nmethod = "routed"\nratio = 0.25')
    compress(source(model_type), recipe(lines), tmp_path / "out", calibration=text)
    write_gguf(tmp_path / "out", tmp_path / "model.gguf")
    with llama(tmp_path / "model.gguf") as model:
        rows = inputs(model_type)["input_ids"].tolist()
        theirs = torch.stack([model.logits(row) for row in rows])
    ours = forward(tmp_path / "out")
    assert (theirs - ours).abs().max() <= 2e-3 * max(1.0, float(ours.abs().max()))


ERRORS = {
    "no head is left": ('where = "heads"\nratio = 0.9', r"ratio=0.9 leaves none of 2 key/value heads"),
    "no head goes": ('where = "heads"\nratio = 0.1', r"ratio=0.1 removes none of 2 key/value heads.*0.25"),
    "no neuron is left": ('where = "neurons"\nratio = 0.95', r"leaves none of 96 neurons, in multiples of 32"),
    "an odd width": ('where = "neurons"\nmultiple = 5', r"multiple=5: expected a multiple of 8, .*GPUs"),
    "not a share": ('where = "neurons"\nratio = 20', r"ratio=20: expected the share .* \(0.2 is a fifth\)"),
    "no such structure": (
        'where = "layers"',
        r"no structures named 'layers'; expected neurons, heads, hidden, experts",
    ),
    "none in this model": ('where = "experts"', r"experts: this llama model has none"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_cut_is_said_and_nothing_is_written(
    name: str, tmp_path: Path, source: Callable[[str], Path], text: Path
) -> None:
    lines, message = ERRORS[name]
    with pytest.raises(UsageError, match=message):
        compress(source("llama"), recipe('method = "minitron"', lines), tmp_path / "out", calibration=text)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_transformers_does_not_take_is_refused(tmp_path: Path, text: Path) -> None:
    folder = write_tokenizer(
        tiny("llama", tmp_path / "source", hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    )
    with pytest.raises(UsageError, match=r"not a multiple of the number of attention heads.*multiples of 24"):
        compress(
            folder,
            recipe('where = "hidden"', 'method = "minitron"', "ratio = 0.34"),
            tmp_path / "out",
            calibration=text,
        )
    assert not (tmp_path / "out").exists()


def test_a_method_says_which_structures_it_scores(tmp_path: Path, source: Callable[[str], Path], text: Path) -> None:
    with pytest.raises(UsageError, match=r"slicegpt chooses hidden, not neurons"):
        compress(
            source("llama"), recipe('where = "neurons"', 'method = "slicegpt"'), tmp_path / "out", calibration=text
        )
    with pytest.raises(UsageError, match="block_loss measures next-token losses, which a bert model has not"):
        compress(
            source("bert"), recipe('where = "blocks"', 'method = "block_loss"'), tmp_path / "out", calibration=text
        )


def test_fewer_experts_than_a_token_uses_are_refused(tmp_path: Path, source: Callable[[str], Path], text: Path) -> None:
    with pytest.raises(UsageError, match=r"leaves 1 of 4 experts, and 2 are used for each token"):
        compress(
            source("mixtral"),
            recipe('where = "experts"', 'method = "routed"', "ratio = 0.75"),
            tmp_path / "out",
            calibration=text,
        )
    with pytest.raises(UsageError, match=r"in 2 groups"):
        compress(
            source("deepseek_v3"),
            recipe('where = "experts"', 'method = "routed"', "ratio = 0.25"),
            tmp_path / "out",
            calibration=text,
        )


def test_the_headers_that_are_planned_are_those_that_are_written(
    tmp_path: Path, source: Callable[[str], Path], text: Path
) -> None:
    from tersely.shape.run import planned

    for number, shape in enumerate(SHAPES.values()):
        steps = recipe(shape)
        expected: Checkpoint = planned(open_checkpoint(source("llama")), steps.shapes[0], "")
        compress(source("llama"), steps, tmp_path / str(number), calibration=text)
        made = open_checkpoint(tmp_path / str(number))
        assert {n: expected.spec(n).shape for n in expected} == {n: made.spec(n).shape for n in made}
        assert expected.config.keys() == made.config.keys()


def test_terminal_and_page_say_what_was_cut(tmp_path: Path, source: Callable[[str], Path], text: Path) -> None:
    lines = (SHAPES["narrower"], '[[steps]]\nwhere = "blocks"\nmethod = "block_similarity"\nratio = 0.5')
    report = compress(source("llama"), recipe(*lines), tmp_path / "out", calibration=text)
    console = Console(width=120, record=True, file=StringIO())
    console.print(report_table(report))
    said = console.export_text()
    assert "neurons|heads|hidden" in said
    assert f"{100 * (1 - report.shapes[0].parameters_after / report.parameters):.1f} %" in said
    assert "minitron: neurons (mlp): 32 of 96 kept" in said or "minitron: neurons (mlp): 64 of 96 kept" in said
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Scores of neurons (minitron)" in page
    assert "How much each block changes what passes through it" in page
    assert "takes what its smaller shape takes" in page
    again = Report.from_dict(report.to_dict(), out="")
    assert again.shapes == report.shapes
