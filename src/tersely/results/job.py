"""The facts of a finished job. They hold no times and no dates: equal jobs give equal bytes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from tersely.results.trimming import Trimming


@dataclass(frozen=True)
class Row:
    """One encoded weight."""

    name: str
    block: int | None
    role: str
    method: str
    parameters: int
    bytes_before: int
    bytes_after: int
    error: float
    """Relative error of its output on the calibration tokens, or of the weight itself where none were measured."""
    tokens: int
    """Calibration tokens that reached it; 0 for data-free methods."""
    note: str = ""
    zeros: int | None = None
    """Weights that are zero; None where no step is for this."""

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return 8 * self.bytes_after / self.parameters


@dataclass(frozen=True)
class Reshaping:
    """One step that left a smaller shape."""

    where: str
    method: str
    parameters_before: int
    parameters_after: int
    scores: dict[str, list[float]]
    """What was chosen by: place -> the score of each structure, larger for what matters more; may be empty."""
    notes: list[str]
    """What was cut, and what the user should know."""


@dataclass(frozen=True)
class Report:
    """What was done to a checkpoint and what it gave."""

    source: str
    out: str
    format: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    """Name, SHA-256, kind, sequences and tokens of the text that was measured; None for data-free recipes."""
    rows: tuple[Row, ...]
    bytes_before: int
    """Of all stored tensors of the source."""
    bytes_after: int
    parameters: int
    """Of the source."""
    notes: tuple[str, ...] = ()
    shapes: tuple[Reshaping, ...] = ()
    """Steps that left a smaller shape, in order."""
    vocabulary: Trimming | None = None
    """What stayed of it; None where it was not trimmed."""
    seconds: float = dataclasses.field(default=0.0, compare=False)
    """How long the job took; not written with the checkpoint."""

    @property
    def ratio(self) -> float:
        """How many times smaller the weights are."""
        return self.bytes_before / self.bytes_after

    @property
    def bits(self) -> float:
        """Stored bits per parameter of the whole model as it is now."""
        return 8 * self.bytes_after / self.parameters_after

    @property
    def parameters_after(self) -> int:
        """Of the model as it is now."""
        return self.shapes[-1].parameters_after if self.shapes else self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what varies from run to run."""
        plain = dataclasses.asdict(self)
        del plain["seconds"], plain["out"]
        plain["rows"] = [{**row, "bits": round(r.bits, 4)} for row, r in zip(plain["rows"], self.rows, strict=True)]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any], *, out: str) -> Report:
        """The inverse of `to_dict`. Raises KeyError, TypeError, AttributeError: not what it wrote."""
        rows = tuple(Row(**{k: v for k, v in row.items() if k != "bits"}) for row in plain["rows"])
        shapes = tuple(Reshaping(**shape) for shape in plain["shapes"])
        trimming = Trimming(**plain["vocabulary"]) if plain.get("vocabulary") else None
        notes = tuple(plain["notes"])
        return cls(**{**plain, "out": out, "rows": rows, "notes": notes, "shapes": shapes, "vocabulary": trimming})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"
