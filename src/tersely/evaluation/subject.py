"""Which model was measured, and where: what a number needs beside it to be compared with another."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch

from tersely.checkpoint import TensorSpec, open_checkpoint, read_header, stream
from tersely.errors import CheckpointError
from tersely.results import Setting, Subject
from tersely.runtime import find_device

_PAGE = 4096
_PAGES = 64
_TENSORS = 256
"""At most so many tensors of a file have their first page read, evenly chosen."""
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_CONFIGS = frozenset(
    {"config.json", "generation_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"}
)
_TOKENIZERS = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece|bpe).*|.*\.(model|tiktoken)"
)
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_GGUF_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)
"""Bytes of a value by its type; 8 is a string, 9 an array."""
_GGUF_STRING, _GGUF_ARRAY, _GGUF_DIMENSIONS = 8, 9, 4
# What stands beside the codes of a weight and is no weight itself.
_BESIDE = re.compile(
    r".*[._]((weight_)?(scales?|zero_points?|g_idx|shape|global_scale|scale_inv)|qzeros|(in|out)put_(global_)?scale"
    r"|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)"
)


@dataclass(frozen=True)
class _Layout:
    """Of a weight file: bytes of its header, where its tensors begin, and how many elements they have."""

    header: int
    starts: tuple[int, ...]
    elements: int


def subject(path: str | Path, *, dtype: str, parameters: int | None = None) -> Subject:
    """A model on disk as a fact: a checkpoint folder, or a single file such as a GGUF.

    The fingerprint is a SHA-256 over config.json, the generation and quantization configs and the tokenizer's files
    whole, and of each weight file its name, its size, its header, 64 evenly spaced pages of 4 KiB and the first page
    of its tensors (of 256 at most): a moment for a model of any size. It is the same for a copy elsewhere, and
    another one where weights were changed, unless only bytes between these pages were. Of a single file the name
    does not count; the parts of a split GGUF count together. "" where the path is neither folder nor file.

    parameters: weights, not stored elements; None counts them from the headers, codes of 4 bits as the weights that
    they stand for. Raises CheckpointError: a weight file that cannot be read or is not what its suffix says.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        weights = _weight_files(place)
        small = [p for p in sorted(place.iterdir()) if p.is_file() and _is_small(p.name)]
    elif place.is_file():
        weights, small = _parts(place), []
    else:
        return Subject(str(path), "", dtype, parameters or 0, 0)
    digest = hashlib.sha256(b"tersely subject 1\n")
    for file in small:
        _name(digest, file.name, file.stat().st_size)
        for chunk in stream(file):
            digest.update(chunk)
    layouts = [_layout(file) for file in weights]
    for file, layout in zip(weights, layouts, strict=True):
        _name(digest, file.name if place.is_dir() else "", file.stat().st_size)
        for page in _pages(file, layout):
            digest.update(page)
    if parameters is None:
        parameters = _parameters(place) if place.is_dir() else sum(layout.elements for layout in layouts)
    size = sum(file.stat().st_size for file in weights)
    return Subject(str(path), digest.hexdigest(), dtype, parameters, size)


def setting(device: str, *, packages: Sequence[str] = ()) -> Setting:
    """Where and with what something is measured from now on.

    versions: of tersely, python, torch, transformers and those of `packages` (names as in pip) that are installed.
    Raises UsageError: no such device.
    """
    found = find_device(device)
    if found.type == "cuda":
        found = torch.device("cuda", found.index or 0)
        hardware = torch.cuda.get_device_name(found)
        memory = torch.cuda.get_device_properties(found).total_memory
    else:
        hardware, memory = _processor(), psutil.virtual_memory().total
    versions = {"python": platform.python_version()}
    for name in ("tersely", "torch", "transformers", *packages):
        try:
            versions[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return Setting(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=str(found),
        hardware=hardware,
        threads=torch.get_num_threads(),
        memory=memory,
        versions=dict(sorted(versions.items())),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _weight_files(folder: Path) -> list[Path]:
    """What the checkpoint reads; of a folder that is none, every file that may hold weights."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return [folder / name for name in open_checkpoint(folder).weight_files]
    return sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file())


def _is_small(name: str) -> bool:
    return name in _CONFIGS or (not name.endswith(_WEIGHTS) and _TOKENIZERS.fullmatch(name) is not None)


def _parts(file: Path) -> list[Path]:
    split = _SPLIT.fullmatch(file.name)
    if split is None:
        return [file]
    count = split["count"]
    parts = [file.with_name(f"{split['stem']}-{i + 1:05}-of-{count}.gguf") for i in range(int(count))]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{file} is one of {len(parts)} parts, and {missing[0]} is not beside it; download it")
    return parts


def _name(digest: Any, name: str, size: int) -> None:
    digest.update(json.dumps([name, size]).encode() + b"\n")


def _pages(file: Path, layout: _Layout) -> Iterator[bytes]:
    """The header and the sampled pages, each once."""
    size = file.stat().st_size
    room = max(size - _PAGE, 0)
    every = max(1, -(-len(layout.starts) // _TENSORS))
    starts = {round(i * room / (_PAGES - 1)) for i in range(_PAGES)} | set(layout.starts[::every])
    for begin, length in [(0, layout.header), *((start, _PAGE) for start in sorted(starts))]:
        for chunk in stream(file, begin, min(length, size - begin)):
            yield bytes(chunk)


def _layout(file: Path) -> _Layout:
    if file.suffix == ".safetensors":
        specs = list(read_header(file)[0].values())
        first = min((spec.offset for spec in specs), default=_PAGE)
        return _Layout(first, tuple(spec.offset for spec in specs), sum(prod(spec.shape) for spec in specs))
    if file.suffix == ".gguf":
        return _gguf(file)
    return _Layout(_PAGE, (), 0)


def _parameters(folder: Path) -> int:
    """Weights of a checkpoint folder, from its headers: what is stored as codes counts as what it stands for.

    Known forms: compressed-tensors (`weight_packed` with `weight_shape`; without it two codes of 4 bits a byte),
    GPTQ and AWQ (`qweight`, int32), bitsandbytes with 4 bits, MXFP4 blocks. Scales and zero points count nothing.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return sum(_layout(file).elements for file in _weight_files(folder))
    checkpoint = open_checkpoint(folder)
    specs = [checkpoint.spec(name) for name in checkpoint]
    quantization = checkpoint.config.get("quantization_config")
    quantization = quantization if isinstance(quantization, Mapping) else {}
    if not quantization:
        return checkpoint.parameters
    total = 0
    for spec in specs:
        if _BESIDE.fullmatch(spec.name):
            continue
        shape = spec.name.removesuffix("_packed") + "_shape"
        if spec.name.endswith("_packed") and shape in checkpoint:
            total += _logical(checkpoint[shape].flatten().tolist(), spec)
        else:
            total += prod(spec.shape) * _codes(spec, quantization, f"{spec.name}.absmax" in checkpoint)
    return total


def _logical(shape: list[Any], packed: TensorSpec) -> int:
    """Elements of the weight of that shape, which must fit into its codes of at least one bit."""
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape) or prod(shape) > 8 * packed.nbytes:
        raise CheckpointError(
            f"{packed.file}: {packed.name} has {packed.nbytes} bytes, and its shape is given as {str(shape)[:80]}; "
            "download it again"
        )
    return prod(shape)


def _codes(spec: TensorSpec, quantization: Mapping[str, Any], bitsandbytes: bool) -> int:
    """Weights that stand in one stored element."""
    if spec.name.endswith("qweight") and spec.dtype == torch.int32:
        bits = quantization.get("bits", quantization.get("w_bit", 4))
        return 32 // bits if isinstance(bits, int) and 1 <= bits <= 32 else 8
    halved = spec.name.endswith(("_packed", "_blocks")) or bitsandbytes
    return 2 if halved and spec.dtype == torch.uint8 else 1


def _gguf(file: Path) -> _Layout:
    """The layout of a GGUF file, whose numbers are little-endian: all fields are passed over, the tensors read."""
    size = file.stat().st_size

    def number(form: str) -> int:
        data = source.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError("it ends in its header")
        value: int = struct.unpack(form, data)[0]
        return value

    def skip(count: int) -> None:
        if count > size - source.tell():
            raise ValueError("it ends in its header")
        source.seek(count, 1)

    def skip_value(kind: int, depth: int = 0) -> None:
        if kind == _GGUF_STRING:
            skip(number("<Q"))
        elif kind == _GGUF_ARRAY and depth < 4:
            inner, count = number("<I"), number("<Q")
            if inner in (_GGUF_STRING, _GGUF_ARRAY):
                for _ in range(count):
                    skip_value(inner, depth + 1)
            else:
                skip(count * _size_of(inner))
        else:
            skip(_size_of(kind))

    source: BinaryIO
    try:
        with file.open("rb") as source:
            if source.read(4) != b"GGUF":
                raise ValueError("it does not start with GGUF")
            if number("<I") not in (2, 3):
                raise ValueError("its version is neither 2 nor 3")
            tensors, fields = number("<Q"), number("<Q")
            for _ in range(fields):
                skip(number("<Q"))
                skip_value(number("<I"))
            offsets, elements = [], 0
            for _ in range(tensors):
                skip(number("<Q"))
                dimensions = number("<I")
                if dimensions > _GGUF_DIMENSIONS:
                    raise ValueError(f"it has a tensor of {dimensions} dimensions")
                elements += prod(number("<Q") for _ in range(dimensions))
                number("<I")
                offsets.append(number("<Q"))
            header = source.tell()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF file: {error}; download it again") from error
    # Offsets count from the end of the header, rounded up to the file's alignment: of pages to sample, close enough.
    return _Layout(header, tuple(header + o for o in offsets if header + o < size), elements)


def _size_of(kind: int) -> int:
    if kind >= len(_GGUF_SIZES) or not _GGUF_SIZES[kind]:
        raise ValueError(f"it has a field of the unknown type {kind}")
    return _GGUF_SIZES[kind]
