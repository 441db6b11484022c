"""What became of a model in a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

from tersely.results.plain import Measurement


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file."""

    name: str
    sources: int
    """Stored weights that it holds: more than one where experts are stacked."""
    kind: str
    """Its type: "Q4_0", "F32" ..."""
    nbytes: int
    kept: bool
    """Its codes, or its values, are those that were stored; only scales may have been rounded, to float16."""
    change: float
    """Largest difference from a stored value, relative to the largest magnitude among the same 32 inputs."""
    reason: str
    """Why this type, where it is not the obvious one."""


@dataclass(frozen=True)
class GGUFReport(Measurement):
    """What `write_gguf` did."""

    file: str
    architecture: str
    """llama.cpp's name of it."""
    nbytes: int
    tensors: tuple[GGUFTensor, ...]
    left_out: tuple[str, ...]
    """Stored tensors that the model does not read, and what a GGUF file cannot say."""
    notes: tuple[str, ...]
    """Where llama.cpp will do something else than transformers."""

    @property
    def exact(self) -> bool:
        """Whether every stored value is in the file, bit for bit."""
        return all(tensor.kept and tensor.change == 0 for tensor in self.tensors)

    def lines(self) -> tuple[str, ...]:
        """What to tell the user: tensors by type, what was rounded and why, what was left out."""
        said = []
        groups: dict[tuple[str, bool, bool, str], list[GGUFTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.kind, tensor.kept, tensor.change > 0, tensor.reason), []).append(tensor)
        for (kind, kept, changed, reason), tensors in groups.items():
            what = "codes kept" if kept and changed else "exact" if kept else "rounded"
            by = f", values moved by up to {max(t.change for t in tensors):.2g} of their block" if changed else ""
            why = f" ({reason})" if reason else ""
            said.append(f"{kind}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors)} bytes, {what}{by}{why}")
        return (*said, *(f"left out: {name}" for name in self.left_out), *self.notes)
