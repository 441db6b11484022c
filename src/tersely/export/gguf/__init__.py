"""GGUF files for llama.cpp, from a folder that `compress` wrote or an ordinary checkpoint.

Quantized weights are not quantized again: integers on a grid keep their codes (blocks.py says in which types), and
other forms are written in the nearest type, which the report names. The file has the tokenizer, the chat template and
all that llama.cpp must know of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from tersely import __version__
from tersely.errors import CheckpointError, OutputError
from tersely.export.gguf.architectures import Described, Value, describe, turn
from tersely.export.gguf.blocks import DENSE, Choice, Packed, bits_of, choose, pack, pack_dense, pack_values
from tersely.export.gguf.layouts import Type
from tersely.export.gguf.tokenizer import Tokens, absent, named_stripping, read_tokens
from tersely.graph import Graph, Weight, read_graph
from tersely.results.gguf import GGUFReport, GGUFTensor
from tersely.stored import Stored, open_stored
from tersely.writer import refuse_existing, replacing

__all__ = ["write_gguf"]


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file before it is written."""

    name: str
    shape: tuple[int, ...]
    choice: Choice
    sources: int
    read: Callable[[], Packed]

    @property
    def nbytes(self) -> int:
        return round(prod(self.shape) * bits_of(self.choice.type)) // 8


def write_gguf(folder: str | Path, file: str | Path) -> GGUFReport:
    """Write the model of `folder` as the GGUF file `file`, which appears when it is whole. Holds one tensor at a time.

    UsageError: llama.cpp runs no such model; CheckpointError: a damaged folder, or a tokenizer that llama.cpp has not;
    OutputError: `file` exists or cannot be written.
    """
    out = Path(file)
    refuse_existing(out)
    stored = open_stored(folder)
    graph = read_graph(stored)
    described = describe(graph, stored.config)
    tokens = read_tokens(stored.path, stored.config, graph.sizes["tokens"])
    plan = _plan(stored, graph, described)
    name = stored.path.resolve().name
    stripping = tokens is not None and tokens.strips
    # llama.cpp goes by the name, and takes a model of that name for granted to have certain tokens.
    writer = _writer(described, tokens, plan, "" if named_stripping(name) and not stripping else name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            rows = _write(writer, temporary, plan)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from error
    notes = [*described.notes, *(tokens.notes if tokens else ())]
    if stripping and not named_stripping(name):
        notes.append("llama.cpp does not cut off white space after special tokens, as the tokenizer does")
    if quantizers := sorted({e.scheme.activations for e in stored.entries.values()} - {""}):
        notes.append(f"inputs of weights were quantized ({', '.join(quantizers)}); llama.cpp quantizes them as it does")
    left_out = (*graph.extra, *(() if tokens else ("the tokenizer, of which the folder has none",)))
    architecture = described.architecture.name
    return GGUFReport(str(out), architecture, out.stat().st_size, tuple(rows), left_out, tuple(notes))


def _plan(stored: Stored, graph: Graph, described: Described) -> list[_Planned]:
    """Every tensor of the file, in the order of the family's table; types depend on headers alone."""
    plan = [
        _Planned(name, tuple(t.shape), Choice(Type.F32, True), 0, partial(pack_dense, t))
        for name, t in described.tensors.items()
    ]
    together: dict[str, list[Weight]] = {}
    for weight in graph.weights:
        together.setdefault(described.name_of(weight), []).append(weight)
    for name, weights in together.items():
        choices = [_choose(stored, weight) for weight in weights]
        choice = max(choices, key=lambda each: (bits_of(each.type), each.type))
        if any(each.type is not choice.type for each in choices):
            choice = Choice(choice.type, False, "its experts are stored in several ways, and a tensor has one type")
        shape = stored.spec(weights[0].name).shape
        stacked = shape if weights[0].expert is None else (len(weights), *shape)
        read = partial(_read, stored, graph, described, tuple(weights), choice.type)
        plan.append(_Planned(name, stacked, choice, len(weights), read))
    return plan


def _encoded(stored: Stored, weight: Weight) -> bool:
    """Whether it is stored in fewer bits than its values have."""
    return weight.name in stored.entries and not stored.entries[weight.name].scheme.ordinary


def _choose(stored: Stored, weight: Weight) -> Choice:
    if _encoded(stored, weight):
        return choose(stored.entries[weight.name].scheme, weight.columns)
    dtype = stored.spec(weight.name).dtype
    if dtype not in DENSE:
        raise CheckpointError(f"{weight.name} is stored in {dtype}; GGUF takes {', '.join(map(str, DENSE))}")
    # llama.cpp wants vectors in float32, and computes routers in it.
    return Choice(Type.F32 if weight.kind in ("norm", "bias") or weight.role == "router" else DENSE[dtype], True)


def _read(stored: Stored, graph: Graph, described: Described, weights: Sequence[Weight], kind: Type) -> Packed:
    """A tensor of the file from the weights that it holds."""
    packed = [_pack(stored, graph, described, weight, kind) for weight in weights]
    if len(packed) == 1:
        return packed[0]
    return Packed(np.stack([each.data_OY for each in packed]), max(each.change for each in packed))


def _pack(stored: Stored, graph: Graph, described: Described, weight: Weight, kind: Type) -> Packed:
    order = _order(graph, described, weight)
    if _encoded(stored, weight):
        own = _choose(stored, weight)
        choice = own if own.type is kind else Choice(kind, False)
        return pack(stored.encoded(weight.name), stored.entries[weight.name].scheme, choice, order)
    value = stored[weight.name] if order is None else stored[weight.name][order]
    if weight.kind == "norm":
        value = value.float() + graph.family.norm_offset
    if kind is Type.F32:
        value = value.float()
    if DENSE[value.dtype] is kind:
        return pack_dense(value)
    return pack_values(value, kind)


def _order(graph: Graph, described: Described, weight: Weight) -> Tensor | None:
    """In which the rows of a weight are written; None: as they are."""
    heads = {"q": "heads", "k": "kv_heads"}.get(weight.writes.spaces[0])
    if not described.architecture.turned or heads is None:
        return None
    return turn(graph.sizes[heads], weight.spec.shape[0])


def _writer(described: Described, tokens: Tokens | None, plan: Sequence[_Planned], name: str) -> gguf.GGUFWriter:
    """A writer that knows all that comes before the tensors' data."""
    writer = gguf.GGUFWriter(None, described.architecture.name)
    writer.add_type("model")
    if name:
        writer.add_name(name)
    writer.add_quantized_by(f"tersely {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(plan))
    for key, value in described.settings.items():
        _add(writer, f"{described.architecture.name}.{key}", value)
    if tokens is None:
        writer.add_tokenizer_model(absent())
    else:
        _add_tokens(writer, tokens)
    for planned in plan:
        kind = planned.choice.type
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, kind)
    return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    match value:
        case list():
            writer.add_array(key, value)
        case str():
            writer.add_string(key, value)
        case float():
            writer.add_float32(key, value)
        case int():
            writer.add_uint32(key, value)


def _add_tokens(writer: gguf.GGUFWriter, tokens: Tokens) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    writer.add_token_types([int(kind) for kind in tokens.types])
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    if tokens.charsmap:
        writer.add_precompiled_charsmap(tokens.charsmap)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(tokens.add_eos)
    writer.add_add_space_prefix(tokens.add_space)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "sep": writer.add_sep_token_id,
        "mask": writer.add_mask_token_id,
    }
    for what, token in tokens.special.items():
        add_id[what](token)
    for name, template in sorted(tokens.templates.items()):
        key = gguf.Keys.Tokenizer.CHAT_TEMPLATE
        writer.add_string(key if name == "default" else f"{key}.{name}", template)
    writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, sorted(tokens.templates.keys() - {"default"}))


def _file_type(plan: Sequence[_Planned]) -> gguf.LlamaFileType:
    """llama.cpp's name for a file in which most elements have one type."""
    elements: dict[str, int] = {}
    for planned in plan:
        elements[planned.choice.type.name] = elements.get(planned.choice.type.name, 0) + prod(planned.shape)
    most = max(elements, key=lambda name: elements[name])
    names = (f"ALL_{most}", *(f"MOSTLY_{most}{suffix}" for suffix in ("", "_S", "_MOE")))
    return next(kind for kind in gguf.LlamaFileType if kind.name in names)


def _write(writer: gguf.GGUFWriter, path: Path, plan: Sequence[_Planned]) -> list[GGUFTensor]:
    rows = []
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for planned in plan:
            packed = planned.read()
            writer.write_tensor_data(packed.data_OY)
            kind, choice = planned.choice.type.name, planned.choice
            row = GGUFTensor(
                planned.name, planned.sources, kind, planned.nbytes, choice.kept, packed.change, choice.reason
            )
            rows.append(row)
    finally:
        writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return rows
