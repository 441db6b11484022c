"""Checkpoints of every form, loaded by plain transformers: the logits are those of the decoded weights and the
quantizers of their inputs; and what is refused is what it cannot load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import format as formats
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from safetensors.torch import save_file
from torch import Tensor, nn

from tersely.checkpoint import open_checkpoint
from tersely.codecs import Encoded, Scheme
from tersely.codecs.activations import ACTIVATIONS, PerToken, layout
from tersely.errors import UsageError
from tersely.export.compressed_tensors import cache_scales, check, quantization_config
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.methods import Encode
from tersely.methods.encode.fp8 import FP8
from tersely.methods.encode.mxfp4 import MXFP4
from tersely.methods.encode.nvfp4 import NVFP4
from tersely.methods.encode.rtn import RTN
from tersely.stored import leaf_name
from tests.plain import write_changed
from tests.tiny import FAMILIES, forward, inputs, load, tiny

INFER: Any = formats  # untyped
MX, NV = MXFP4(rounding="nearest"), NVFP4(rounding="nearest")
FORMS: dict[str, tuple[Encode, str]] = {
    "W4A16": (RTN(group=16), ""),
    "W3A16": (RTN(bits=3, group=0), ""),
    "W8A8": (RTN(bits=8, group=0), "int8"),
    "W8A8 static": (RTN(bits=8, group=0), "int8-static"),
    "W4A8": (RTN(bits=4, group=0), "int8"),
    "W4A8 grouped": (RTN(bits=4, group=16), "int8"),
    "W6A6": (RTN(bits=6, group=16), "int6"),
    "W4A4": (RTN(bits=4, group=16), "int4"),
    "W4AFP8": (RTN(bits=4, group=16), "fp8"),
    "FP8 weights": (FP8("tensor"), ""),
    "FP8": (FP8(), "fp8"),
    "FP8 static": (FP8("tensor"), "fp8-static"),
    "FP8 blocks": (FP8("block"), "fp8-block"),
    "MXFP4 weights": (MX, ""),
    "MXFP4": (MX, "mxfp4"),
    "NVFP4 weights": (NV, ""),
    "NVFP4": (NV, "nvfp4"),
}
PRESETS = {
    "W4A16": "W4A16",
    "W8A8": "W8A8",
    "W4A8 grouped": "W4A8",
    "W4AFP8": "W4AFP8",
    "FP8": "FP8_DYNAMIC",
    "FP8 static": "FP8",
    "FP8 blocks": "FP8_BLOCK",
    "MXFP4 weights": "MXFP4A16",
    "MXFP4": "MXFP4",
    "NVFP4 weights": "NVFP4A16",
    "NVFP4": "NVFP4",
}
FOUR_BITS = ("MXFP4", "NVFP4")
Plan = tuple[tuple[str, str], ...]
"""(where, name in FORMS); later ones win."""


@dataclass(frozen=True)
class Written:
    """A checkpoint of several forms, and what it should compute."""

    folder: Path
    source: Path
    graph: Graph
    schemes: Mapping[str, Scheme]
    values: Mapping[str, Tensor]
    scales: Mapping[str, Tensor | None]

    @torch.no_grad()
    def expected(self) -> Tensor:
        """Logits of the source with decoded weights, the inputs of its linear layers rounded."""
        tensors = open_checkpoint(self.source)
        changed = write_changed(self.source, self.folder / "decoded", {**tensors, **self.values})
        model: Any = load(changed)
        for name, path in in_memory(self.graph).items():
            scheme = self.schemes.get(name)
            if scheme is None or not scheme.activations:
                continue
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            layer.register_forward_pre_hook(rounding(scheme.activations, self.scales[name]))
        logits: Tensor = model(**inputs(model.config.model_type)).logits
        return logits.float()


def rounding(activations: str, scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    quantizer = ACTIVATIONS[activations]

    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        if not isinstance(quantizer, PerToken) or x.ndim == 3:
            return (quantizer(x, scale),)
        # What transformers takes for one token where there are not three dimensions.
        tokens = x.reshape(1, -1) if x.ndim == 2 else x.flatten(2)
        return (quantizer(tokens).view(x.shape),)

    return hook


def in_memory(graph: Graph) -> dict[str, str]:
    """Stored name -> path of the layer, for those that are one (experts are none)."""
    return {
        pieces[0].weight.name: f"{unit}.{name}".lstrip(".").removesuffix(".weight")
        for unit in ("", *graph.units)
        for name, pieces in graph.parameters(unit).items()
        if len(pieces) == 1 and pieces[0].index is None
    }


def write(source: Path, folder: Path, plan: Plan, *, fp8_cache: bool = False) -> Written:
    checkpoint = open_checkpoint(source)
    graph = read_graph(checkpoint)
    tensors = dict(checkpoint)
    schemes: dict[str, Scheme] = {}
    values: dict[str, Tensor] = {}
    scales: dict[str, Tensor | None] = {}
    chosen = {w.name: FORMS[form] for where, form in plan for w in graph.select(where)}
    for name, (method, activations) in chosen.items():
        weight = graph.weight(name)
        encoded = method(tensors.pop(name), Statistics(weight.columns))
        scheme = layout(Scheme(encoded.forms, activations))
        encoded = Encoded(tuple(replace(p, form=f) for p, f in zip(encoded.parts, scheme.parts, strict=True)))  # type: ignore[type-var]
        tensors |= {leaf_name(name, leaf): t for leaf, t in encoded.tensors().items()}
        schemes[name], values[name], scales[name] = scheme, encoded.decode(), None
        if activations:
            scale = ACTIVATIONS[activations].scale(torch.full((weight.columns,), 3.0), weight.spec.dtype)
            scales[name] = scale
            if scale is not None:
                tensors[leaf_name(name, ACTIVATIONS[activations].leaf)] = scale
    if fp8_cache:
        tensors |= cache_scales(graph)
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = quantization_config(graph, schemes, fp8_cache=fp8_cache)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Written(folder, source, graph, schemes, values, scales)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint, written once; widths that blocks of 128 divide are asked for by `wide`."""
    made: dict[Any, Path] = {}

    def get(model_type: str, dtype: torch.dtype, wide: bool = False) -> Path:
        key = (model_type, dtype, wide)
        if key not in made:
            sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256} if wide else {}
            made[key] = tiny(model_type, tmp_path_factory.mktemp(model_type), dtype=dtype, **sizes)
        return made[key]

    return get


def refuses(written: Written, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        check(written.graph, written.schemes)
    assert "--format tersely" in str(caught.value)
    assert "--format dense" in str(caught.value)


# What loads


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(f, d) for f in FORMS for d in (torch.float32, torch.bfloat16) if f not in FOUR_BITS or d == torch.bfloat16],
)
def test_a_checkpoint_of_every_form_gives_the_logits_of_its_values(
    form: str, dtype: torch.dtype, source: Callable[..., Path], tmp_path: Path
) -> None:
    written = write(source("llama", dtype, form == "FP8 blocks"), tmp_path / "out", (("linear", form),))
    check(written.graph, written.schemes)
    assert torch.equal(forward(written.folder), written.expected())


@pytest.mark.parametrize(
    "plan",
    [
        (("linear", "W4A16"), ("attention", "FP8")),
        (("linear", "NVFP4"), ("attention", "FP8 static")),
        (("mlp", "MXFP4 weights"), ("attention", "W8A8")),
        (("mlp", "MXFP4"), ("attention", "W4A16")),
        (("linear", "W4A8"), ("blocks 0", "NVFP4 weights")),
    ],
)
def test_several_forms_load_side_by_side(plan: Plan, source: Callable[..., Path], tmp_path: Path) -> None:
    written = write(source("llama", torch.bfloat16), tmp_path / "out", plan)
    check(written.graph, written.schemes)
    assert len(set(written.schemes.values())) == 2
    assert torch.equal(forward(written.folder), written.expected())


@pytest.mark.parametrize("model_type", [f for f in FAMILIES if f not in ("gpt2", "t5")])
def test_rounded_inputs_load_in_every_family(model_type: str, source: Callable[..., Path], tmp_path: Path) -> None:
    """Those of experts stay as they are; flat ones are one token (OPT), and those of four dimensions are taken for
    tokens by the first two (DeepSeek-V3)."""
    written = write(source(model_type, torch.float32), tmp_path / "out", (("linear", "FP8"),))
    check(written.graph, written.schemes)
    assert torch.equal(forward(written.folder), written.expected())


@pytest.mark.parametrize("form", ["NVFP4 weights", "MXFP4 weights", "FP8 weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_decoded_while_it_loads_has_one_scheme(
    dtype: torch.dtype, form: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    written = write(source("t5", dtype), tmp_path / "out", (("linear", form),))
    check(written.graph, written.schemes)
    assert torch.equal(forward(written.folder), written.expected())


@pytest.mark.parametrize(
    ("dtype", "plan"),
    [
        (torch.bfloat16, (("experts", "MXFP4 weights"), ("attention", "FP8"))),
        (torch.bfloat16, (("experts", "W4A16"), ("attention", "NVFP4"))),
        (torch.float32, (("experts", "FP8"), ("attention", "W8A8"))),
    ],
)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_load_beside_other_forms(
    model_type: str, dtype: torch.dtype, plan: Plan, source: Callable[..., Path], tmp_path: Path
) -> None:
    written = write(source(model_type, dtype), tmp_path / "out", plan)
    check(written.graph, written.schemes)
    assert torch.equal(forward(written.folder), written.expected())


def test_fp8_in_and_out_hardly_moves_the_logits(source: Callable[..., Path], tmp_path: Path) -> None:
    """0.997 where the weights are random; the card's 0.999 is that of trained models."""
    path = source("llama", torch.float32)
    written = write(path, tmp_path / "out", (("linear", "FP8"),))
    similar = nn.functional.cosine_similarity(forward(written.folder).flatten(), forward(path).flatten(), dim=0)
    assert float(similar) > 0.996


# The cache


class RoundedCache(transformers.DynamicCache):
    """Keys and values in FP8, with a scale of 1."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        fp8, one = ACTIVATIONS["fp8-static"], torch.ones(1)
        return super().update(fp8(key_states, one), fp8(value_states, one), layer_idx, *args, **kwargs)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@torch.no_grad()
def test_keys_and_values_are_kept_in_fp8(model_type: str, source: Callable[..., Path], tmp_path: Path) -> None:
    path = source(model_type, torch.bfloat16)
    written = write(path, tmp_path / "out", (("mlp", "W4A16"),), fp8_cache=True)
    changed = write_changed(path, tmp_path / "decoded", {**open_checkpoint(path), **written.values})
    model: Any = load(changed)
    expected = model(**inputs(model_type), past_key_values=RoundedCache(config=model.config)).logits.float()
    assert torch.equal(forward(written.folder), expected)
    assert not torch.equal(forward(changed), expected)


@pytest.mark.parametrize("model_type", ["t5", "gpt_neox"])
def test_a_cache_that_would_not_be_rounded_is_refused(model_type: str, source: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=model_type):
        cache_scales(read_graph(open_checkpoint(source(model_type, torch.float32))))


# What is refused: it does not load, or computes something else


FORMS_REFUSED: dict[str, tuple[Encode, str]] = {
    "zero points": (RTN(bits=4, group=16, symmetric=False), ""),
    "W8A8 with zero points": (RTN(bits=8, group=0, symmetric=False), "int8"),
    "outliers": (RTN(bits=8, group=0), "int8-outliers"),
}


@pytest.mark.parametrize(
    ("model_type", "dtype", "plan", "what"),
    [
        ("llama", torch.float32, (("linear", "MXFP4"),), "four-bit floats of a float32 model .* rounds no inputs"),
        ("llama", torch.float16, (("linear", "NVFP4"),), "four-bit floats of a float16 model .* rounds no inputs"),
        ("llama", torch.float32, (("linear", "NVFP4 weights"), ("attention", "FP8 weights")), "several schemes"),
        ("llama", torch.float32, (("linear", "W8A8 with zero points"),), "zero points .* rounds no inputs"),
        ("llama", torch.float32, (("linear", "FP8 weights"), ("attention", "zero points")), "several schemes"),
        ("t5", torch.float32, (("linear", "FP8"),), "weights of a t5 model .* rounds no inputs"),
        ("mixtral", torch.bfloat16, (("experts", "NVFP4 weights"),), "experts in NVFP4"),
        ("mixtral", torch.bfloat16, (("experts", "W8A8"),), "experts in integers for integer inputs"),
        ("mixtral", torch.float32, (("experts", "MXFP4 weights"),), "experts in four-bit floats of a float32 model"),
    ],
)
def test_what_is_refused_fails_to_load_or_gives_other_logits(
    model_type: str,
    dtype: torch.dtype,
    plan: Plan,
    what: str,
    source: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, form in FORMS_REFUSED.items():
        monkeypatch.setitem(FORMS, name, form)
    written = write(source(model_type, dtype), tmp_path / "out", plan)
    refuses(written, what)
    expected = written.expected()
    try:
        logits = forward(written.folder)
    except (RuntimeError, ValueError, KeyError, AttributeError):
        return
    assert not torch.equal(logits, expected)


def test_blocks_of_fp8_in_experts_are_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    refuses(write(source("mixtral", torch.bfloat16, True), tmp_path / "out", (("experts", "FP8 blocks"),)), "blocks")


def test_inputs_that_the_format_has_no_entry_for_are_refused(source: Callable[..., Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama", torch.float32)))
    name = graph.select("mlp")[0].name
    with pytest.raises(UsageError, match="no form for integers with int8-outliers inputs"):
        check(graph, {name: Scheme(RTN().forms(64, 64), "int8-outliers")})


# The config


@pytest.mark.parametrize("form", PRESETS)
def test_the_config_says_what_the_library_would(form: str, source: Callable[..., Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama", torch.bfloat16, form == "FP8 blocks")))
    method, activations = FORMS[form]
    schemes = {
        w.name: layout(Scheme(tuple(method.forms(w.rows, w.columns)), activations)) for w in graph.select("linear")
    }
    config = quantization_config(graph, schemes)
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"]
    assert group["targets"] == ["Linear"]
    assert json.loads(json.dumps(config)) == config
    read = QuantizationScheme.model_validate(group)
    preset = preset_name_to_scheme(PRESETS[form], ["Linear"])
    for own, theirs in ((read.weights, preset.weights), (read.input_activations, preset.input_activations)):
        assert (own is None) == (theirs is None)
        if own is not None and theirs is not None:
            facts = ("num_bits", "type", "symmetric", "strategy", "dynamic", "block_structure", "scale_dtype")
            assert [getattr(own, f) for f in facts] == [getattr(theirs, f) for f in facts]
            if theirs.type == "float":
                assert own.group_size == theirs.group_size
    # Where it would write bytes as well, but vLLM's kernel reads packed words.
    packed = "pack-quantized" if form == "W4AFP8" else INFER.infer_module_format(nn.Linear, read).value
    assert group["format"] == packed


def test_engines_that_multiply_integers_get_a_byte_for_each_code() -> None:
    for form, (method, activations) in FORMS.items():
        scheme = Scheme(tuple(method.forms(64, 256)), activations)
        plain = layout(scheme)
        assert (plain != scheme) == form.startswith(("W8A8", "W4A8"))
        assert layout(plain) == plain
