"""The table of docs/formats.md, cell by cell: what it says loads gives our logits there, and what it says does not is
refused. And the recipes of docs/quantization.md: the demo's model takes each as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersely.checkpoint import open_checkpoint
from tersely.codecs.activations import ACTIVATIONS
from tersely.codecs.entrance import Entrance
from tersely.compression import compress
from tersely.demo import CALIBRATION, MODEL
from tersely.errors import UsageError
from tersely.export.folder import export_folder
from tersely.export.gguf import write_gguf
from tersely.graph import read_graph
from tersely.job import prepare
from tersely.methods import METHODS, Encode
from tersely.methods.encode.aser import ASER
from tersely.methods.encode.fp8 import FP8
from tersely.methods.encode.mxfp4 import MXFP4
from tersely.methods.encode.nvfp4 import NVFP4
from tersely.methods.encode.rtn import RTN
from tersely.plan.reading import method_fields
from tersely.plan.recipe import Calibration, Recipe, Step
from tersely.stored import open_stored
from tests.plain import write_changed
from tests.test_adapter import adapted
from tests.test_compressed_tensors import in_memory
from tests.test_gguf import EIGHT_BITS, error, theirs
from tests.test_readme import blocks
from tests.tiny import forward, inputs, load, tiny
from tests.tokens import write_text, write_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:Using GROUP strategy for both:UserWarning"),  # of compressed-tensors
]
PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
RECIPES = blocks(PAGE.with_name("quantization.md"), "toml")
READERS = ("compressed-tensors", "tersely", "dense", "GGUF", "adapter")
SMALL: Mapping[str, Any] = {"group": 32, "rank": 4, "outliers": 2, "codebooks": 1, "rounds": 3}
"""Settings that suit a tiny model, for the methods that have them."""
BRANCH = ASER(group=32, rank=4, outliers=2, inputs="full")
BESIDE: Mapping[str, Encode] = {
    "int8": RTN(bits=8, group=0),
    "int6": RTN(bits=6, group=32),
    "int4": RTN(group=32),
    "int8-static": RTN(bits=8, group=0),
    "int8-outliers": RTN(bits=8, group=0),
    "fp8": FP8(),
    "fp8-block": FP8("block"),
    "fp8-static": FP8("tensor"),
    "mxfp4": MXFP4(rounding="nearest"),
    "nvfp4": NVFP4(rounding="nearest"),
}
"""The weights that stand beside each quantizer of inputs."""


def fitting(method: type[Encode]) -> Encode:
    fields = method_fields(method)
    own = {k: v for k, v in SMALL.items() if k in fields and (k, fields[k]) != ("outliers", float)}
    return method(**own)


ROWS: Mapping[str, Step] = {
    **{method.name: Step("linear", fitting(method)) for method in METHODS},
    **{f"{name} inputs": Step("linear", BESIDE[name], name) for name in ACTIVATIONS},
    "hadamard": Step("linear", RTN(group=32), hadamard=32),
}


def table() -> dict[str, dict[str, str]]:
    """Row -> reader -> what the page says."""
    lines = [
        line.strip().strip("|").split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")
    ]
    rows = [[cell.strip().replace("`", "") for cell in line] for line in lines]
    head = next(number for number, row in enumerate(rows) if row[1:] == list(READERS))
    found = {}
    for row in rows[head + 2 :]:
        if len(row) != 1 + len(READERS):
            break
        found[row[0]] = dict(zip(READERS, row[1:], strict=True))
    return found


TABLE = table()


def test_the_table_has_a_row_for_every_method_and_every_quantizer_of_inputs() -> None:
    assert list(TABLE) == list(ROWS)
    assert {cell for row in TABLE.values() for cell in row.values()} == {"yes", "nearest", "no"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Step], tuple[Path, Path]]:
    """The source and the compressed folder of a step, each written once."""
    place = tmp_path_factory.mktemp("matrix")
    text = write_text(place / "text.txt")
    made: dict[str, Path] = {}

    def get(step: Step) -> tuple[Path, Path]:
        # transformers keeps four-bit floats and the model that they are of in bfloat16.
        dtype = torch.bfloat16 if isinstance(step.method, MXFP4 | NVFP4) else torch.float32
        source = place / str(dtype)
        if not source.exists():
            sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
            write_tokenizer(tiny("llama", source, dtype=dtype, blocks=1, **sizes))
        if repr(step) not in made:
            made[repr(step)] = place / str(len(made))
            calibration = Calibration(samples=16, context=40)
            recipe = Recipe((step,), calibration) if step.needs else Recipe((step,))
            compress(source, recipe, made[repr(step)], calibration=text if step.needs else None, format="tersely")
        return source, made[repr(step)]

    return get


def test_bytes_for_engines_that_multiply_integers_are_exported_as_they_are_compressed(
    folders: Callable[[Step], tuple[Path, Path]], tmp_path: Path
) -> None:
    step = ROWS["int8 inputs"]
    source, own = folders(step)
    compress(source, Recipe((step,)), tmp_path / "direct", format="compressed-tensors")
    export_folder(own, tmp_path / "exported", "compressed-tensors")
    direct, exported = (open_checkpoint(tmp_path / name) for name in ("direct", "exported"))
    assert direct.config == exported.config
    assert {name: direct.spec(name).dtype for name in direct} == {n: exported.spec(n).dtype for n in exported}
    assert all(torch.equal(direct[name], exported[name]) for name in direct)


@torch.no_grad()
def expected(source: Path, folder: Path, place: Path) -> Tensor:
    """Logits of plain transformers with the decoded weights, and with what inputs go through put before its layers."""
    stored = open_stored(folder)
    values = {name: stored.encoded(name).decode() for name in stored.entries}
    model: Any = load(write_changed(source, place, {**open_checkpoint(source), **values}))
    for name, path in in_memory(read_graph(stored)).items():
        if name in stored.entries:
            full = stored.encoded(name).full() if stored.entries[name].scheme.activations else None
            enter(model.get_submodule(path), stored.entries[name].entrance(stored.leaves(name)), full)
    logits_BLV: Tensor = model(**inputs("llama")).logits
    return logits_BLV.float()


def enter(layer: nn.Module, entrance: Entrance, full_OI: Tensor | None) -> None:
    """Let the inputs of a layer go through an entrance, but for those that a share of its weight meets as they come."""

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (entrance.rounded(entrance.transformed(args[0])),)

    layer.register_forward_pre_hook(before)
    if full_OI is not None:
        lost: list[Tensor] = []
        layer.register_forward_pre_hook(lambda _, args: lost.append(args[0] - entrance.rounded(args[0])), prepend=True)
        layer.register_forward_hook(lambda _, __, output: output + nn.functional.linear(lost.pop(), full_OI))


@torch.no_grad()
def decoded(folder: Path) -> nn.Module:
    """transformers decodes the weights that PEFT wants to see when the model is first called."""
    model = load(folder)
    model(**inputs("llama"))
    return model


def step_of(row: str, reader: str) -> Step:
    """The step whose folder a cell is about: for adapters, quantized inputs stand beside integers and a low rank."""
    step = ROWS[row]
    return Step("linear", BRANCH, step.activations) if reader == "adapter" and step.activations else step


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("row", ROWS)
def test_a_cell_of_the_table_is_what_happens(
    row: str, reader: str, folders: Callable[[Step], tuple[Path, Path]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cell = TABLE[row][reader]
    step = step_of(row, reader)
    source, own = folders(step)
    out = tmp_path / "out"
    if cell == "no":
        assert reader not in ("tersely", "GGUF"), "it takes everything"
        with pytest.raises(UsageError):
            export_folder(own, out, {"dense": "hf"}.get(reader, reader))  # type: ignore[arg-type]
        assert not out.exists()
        return
    wanted = expected(source, own, tmp_path / "decoded")
    if reader == "GGUF":
        llama = request.getfixturevalue("llama")
        report = write_gguf(own, out)
        found = theirs(llama, out, "llama")
        rounded = [tensor for tensor in report.tensors if not tensor.kept]
        assert (cell == "yes") == (not rounded and not step.activations)
        assert all(tensor.reason for tensor in rounded)
        assert found.isfinite().all()
        assert cell == "nearest" or error(found, wanted) < EIGHT_BITS
        return
    assert cell == "yes"
    if reader == "adapter":
        export_folder(own, out, "adapter")
        # Of the typical token: a sum in another order may take an input over the edge of its cell.
        assert error(adapted(decoded(out), out / "adapter", "llama"), wanted) < 1e-5
        return
    if reader != "tersely":
        export_folder(own, out, "hf" if reader == "dense" else "compressed-tensors")
    found = forward(own if reader == "tersely" else out)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (found - forward(source)).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES, ids=range(1, 1 + len(RECIPES)))
def test_a_recipe_of_the_page_is_one_that_the_demo_takes(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    job = prepare(MODEL, tmp_path / "recipe.toml", tmp_path / "out", calibration=CALIBRATION)
    own = any(step.hadamard or isinstance(step.method, ASER) for step in job.steps.values())
    assert job.format == ("tersely" if own else "compressed-tensors")
    assert job.steps.keys() == {w.name for w in job.graph.select("linear")}
