"""What every peer's driver shares: arguments, calibration tokens, a dense copy, stored bytes, loss and divergence.

A driver writes OUT/dense (a plain checkpoint, the quantized values as float32) and, where the peer can, OUT/native
(what the peer would ship), and prints one line of JSON. It runs in the peer's own environment and needs no tersely.
Legend: B sequences, L positions, V tokens of the vocabulary.
"""

import argparse
import json
import re
import resource
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer

# Tensors that all peers leave as they are; everything else of a checkpoint is a quantized weight or belongs to one.
KEPT = re.compile(r"embed|lm_head|norm|router|(mlp|block_sparse_moe)\.gate\.|\.bias$")


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that all drivers take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="gets native/ and dense/")
    parser.add_argument("--text", type=Path, help="calibration: documents separated by <|endoftext|>, or one long text")
    parser.add_argument("--characters", type=int, help="only the first N characters of the text")
    parser.add_argument("--samples", type=int, default=256, help="the first N documents or windows")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, and at most of a document")
    parser.add_argument("--windows", action="store_true", help="join the documents' tokens and cut them into windows")
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale; 0: the whole row")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument(
        "--evaluate",
        type=Path,
        help="measure loss and divergence in place, inputs rounded too: JSON, lists of token ids",
    )
    return parser


@dataclass(frozen=True)
class Scheme:
    """Bits of weights and inputs, read from a name such as w4a16; 16 means untouched."""

    weight_bits: int
    input_bits: int

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        match = re.fullmatch(r"w(\d+)a(\d+)", name)
        if not match:
            raise SystemExit(f"scheme {name!r}: expected one such as w4a16")
        return cls(int(match[1]), int(match[2]))


def documents(file: Path, characters: int | None = None) -> list[str]:
    parts = file.read_text("utf-8")[:characters].split("<|endoftext|>")
    return [d.strip() for d in parts if d.strip()]


def calibration(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Token ids of the calibration sequences, each with the tokenizer's own special tokens."""
    if options.text is None:
        raise SystemExit("this method calibrates: give --text FILE")
    texts = documents(options.text, options.characters)
    if not options.windows:
        return [tokenizer(d).input_ids[: options.context] for d in texts[: options.samples]]
    joined = [i for d in texts for i in tokenizer(d, verbose=False).input_ids]
    starts = range(0, len(joined) - options.context + 1, options.context)
    return [joined[s : s + options.context] for s in starts][: options.samples]


def load(folder: Path, dtype: str = "float32") -> tuple[Module, Any]:
    """The model (float32 holds the stored values exactly; auto: as stored), and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@dataclass
class Clock:
    """Seconds and processor seconds of the block that it is used around, and the most memory held up to its end."""

    seconds: float = field(default=0.0, init=False)
    cpu_seconds: float = field(default=0.0, init=False)
    peak_rss_bytes: int = field(default=0, init=False)
    _start: tuple[float, float] = field(default=(0.0, 0.0), init=False)

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.cpu_seconds = time.process_time() - self._start[1]
        self.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_dense(folder: Path, state: dict[str, Tensor], out: Path) -> None:
    """Writes the checkpoint of `folder` with the values of `state`; experts that a peer unrolled are stacked again.

    Raises KeyError for a tensor that `state` does not have.
    """
    model, tokenizer = load(folder)
    own = {}
    for name, tensor in model.state_dict().items():
        if name in state:
            own[name] = state[name].detach().float()
        elif name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            parts = [[state[f"{stem}{e}.{half}_proj.weight"] for half in ("gate", "up")] for e in range(len(tensor))]
            own[name] = torch.stack([torch.cat(p) for p in parts]).float()
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            own[name] = torch.stack([state[f"{stem}{e}.down_proj.weight"] for e in range(len(tensor))]).float()
        else:
            raise KeyError(f"{name}: neither it nor its parts are in the quantized model")
    model.load_state_dict(own)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tensors(folder: Path) -> dict[str, tuple[str, list[int], int]]:
    """Name -> dtype, shape, bytes of every stored tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                tensor = f.get_tensor(name)
                found[name] = (str(tensor.dtype), list(tensor.shape), tensor.nbytes)
    return found


def stored(model: Path, native: Path) -> dict[str, float]:
    """Bytes of everything stored for the quantized weights (codes, scales, zeros, indices), and bits a weight."""
    found = _tensors(native)
    size = sum(b for name, (_, _, b) in found.items() if not KEPT.search(name))
    # A model kept in 16 bits gets scales of 16 bits; stories-3m, kept in 32, is counted both ways.
    half = sum(b // 2 if d == "torch.float32" else b for name, (d, _, b) in found.items() if not KEPT.search(name))
    weights = sum(torch.Size(s).numel() for name, (_, s, _) in _tensors(model).items() if not KEPT.search(name))
    bits = {"bits_per_weight": 8 * size / weights, "bits_per_weight_half_scales": 8 * half / weights}
    return {"stored_bytes": size, "quantized_weights": weights} | bits


def layout(native: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and the quantization config of what was written."""
    tensors = {name: [dtype, shape] for name, (dtype, shape, _) in sorted(_tensors(native).items())}
    config = json.loads((native / "config.json").read_text())["quantization_config"]
    return {"tensors": tensors, "quantization_config": config}


@torch.no_grad()
def divergence(options: argparse.Namespace, model: Module) -> dict[str, float]:
    """Mean loss of `model`, and KL(original || model), in nats a predicted token of the sequences of --evaluate."""
    base, _ = load(options.model)
    sequences = json.loads(options.evaluate.read_text("utf-8"))
    loss = base_loss = kl = 0.0
    count = 0
    for sequence in sequences:
        ids_BL = torch.tensor([sequence])
        new_LV, old_LV = (
            m(input_ids=ids_BL, use_cache=False).logits[0, :-1].float().log_softmax(-1) for m in (model, base)
        )
        next_L = ids_BL[0, 1:, None]
        loss -= new_LV.gather(1, next_L).sum().item()
        base_loss -= old_LV.gather(1, next_L).sum().item()
        kl += (old_LV.exp() * (old_LV - new_LV)).sum().item()
        count += len(next_L)
    return {"loss": loss / count, "base_loss": base_loss / count, "kl": kl / count, "predicted_tokens": count}


def report(peer: str, method: str, clock: Clock, options: argparse.Namespace, **facts: Any) -> None:
    """Prints the one line of JSON."""
    line = {"peer": peer, "version": version(peer), "method": method}
    line |= {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "threads": torch.get_num_threads()}
    line |= {"peak_rss_bytes": clock.peak_rss_bytes}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    print(json.dumps(line | facts | {"settings": settings}), flush=True)
