"""Storage forms: how the parts of an encoded weight are held, decoded and written.

An encoded weight is a sum of parts, each of which decodes to the whole shape (O outputs, I inputs):

    W_hat = decode(part 1) + decode(part 2) + ...

A `Form` is what a config must say to read a part back (bits, group ...); a `Part` is the form with its tensors. A new
storage form is one file with both, and one line in FORMS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from tersely.codecs.affine import AffineForm
from tersely.codecs.binary import BinaryForm
from tersely.codecs.bitmask import BitmaskForm
from tersely.codecs.codebook import LookupForm, NormalFloatForm
from tersely.codecs.columns import ColumnsForm
from tersely.codecs.dense import DenseForm
from tersely.codecs.floats import FP8Form, MXFP4Form, NVFP4Form
from tersely.codecs.integer import IntegerForm, Integers
from tersely.codecs.low_rank import LowRankForm
from tersely.codecs.planes import PlanesForm
from tersely.codecs.sparse import SparseForm
from tersely.codecs.ternary import TernaryForm
from tersely.codecs.vectors import VectorForm
from tersely.errors import CheckpointError

__all__ = [
    "FORMS",
    "Encoded",
    "Form",
    "IntegerForm",
    "Integers",
    "Part",
    "Scheme",
    "form_from_dict",
    "form_to_dict",
    "read_encoded",
]


class Form(Protocol):
    """What a reader must know of a part beside its tensors. A frozen dataclass of plain values."""

    kind: ClassVar[str]
    """Its name in a config."""

    @property
    def full_inputs(self) -> bool:
        """Whether it multiplies the inputs as they come, where those of the weight are rounded."""
        ...

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Bytes of the stored tensors for a weight (rows, columns) of this dtype, all of them counted."""
        ...

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Part:
        """The part again, from what `Part.tensors` gave, bit for bit. KeyError where one is missing."""
        ...


class Part(Protocol):
    """One summand of an encoded weight."""

    @property
    def form(self) -> Form: ...

    def decode(self) -> Tensor:
        """The weight, (O, I), in the dtype that a reader of the stored form computes."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by the name that follows the weight's path: "weight_packed" ... Unlike those of other forms
        that may stand beside it in a sum."""
        ...

    def sample(self, start: int, step: int) -> Self:
        """Every `step`-th output from `start`."""
        ...

    def split(self, rows: list[int]) -> list[Self]:
        """Cut along the outputs."""
        ...


FORMS: tuple[type[Form], ...] = (
    IntegerForm,
    LowRankForm,
    ColumnsForm,
    FP8Form,
    MXFP4Form,
    NVFP4Form,
    LookupForm,
    NormalFloatForm,
    SparseForm,
    AffineForm,
    BinaryForm,
    PlanesForm,
    TernaryForm,
    VectorForm,
    DenseForm,
    BitmaskForm,
)


def form_to_dict(form: Form) -> dict[str, Any]:
    return {"kind": form.kind, **dataclasses.asdict(form)}  # type: ignore[call-overload]


def form_from_dict(plain: Mapping[str, Any]) -> Form:
    """The inverse of `form_to_dict`. CheckpointError for a kind or a setting that does not exist."""
    kinds = {form.kind: form for form in FORMS}
    settings = {name: value for name, value in plain.items() if name != "kind"}
    if plain.get("kind") not in kinds:
        raise CheckpointError(f"no storage form named {plain.get('kind')!r}; this version reads {', '.join(kinds)}")
    try:
        return kinds[plain["kind"]](**settings)
    except TypeError as error:
        raise CheckpointError(f"the storage form {plain['kind']!r} is not as tersely writes it: {error}") from error


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored and what its inputs go through: all that a config says of it."""

    parts: tuple[Form, ...]
    activations: str = ""
    """Name of the quantizer of its inputs (ACTIVATIONS), or "" for none."""
    hadamard: int = 0
    """Its inputs are multiplied by a normalised Hadamard matrix of this order, block by block; 0: they are not."""

    @property
    def unquantized(self) -> bool:
        """Whether its values have the weight's own dtype."""
        return all(isinstance(form, DenseForm | BitmaskForm) for form in self.parts)

    @property
    def ordinary(self) -> bool:
        """Whether an ordinary tensor says all of it."""
        return self.unquantized and not self.activations and not self.hadamard

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return sum(form.nbytes(rows, columns, dtype) for form in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": [form_to_dict(form) for form in self.parts],
            "activations": self.activations,
            "hadamard": self.hadamard,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Scheme:
        """The inverse of `to_dict`. CheckpointError: not what it wrote."""
        parts, activations, hadamard = (plain.get(key) for key in ("parts", "activations", "hadamard"))
        if not isinstance(parts, list) or not isinstance(activations, str) or not isinstance(hadamard, int):
            raise CheckpointError("a scheme has parts, activations and hadamard; write the checkpoint again")
        return cls(tuple(form_from_dict(part) for part in parts), activations, hadamard)


@dataclass(frozen=True)
class Encoded:
    """A weight as a method leaves it: a sum of parts, and what the method has to say about it."""

    parts: tuple[Part, ...]
    note: str = ""
    """What the user should know ("too few tokens: rounded to nearest")."""

    @property
    def forms(self) -> tuple[Form, ...]:
        return tuple(part.form for part in self.parts)

    def decode(self) -> Tensor:
        """The sum, (O, I), in the first part's dtype; parts are added in float32."""
        first, *rest = (part.decode() for part in self.parts)
        if not rest:
            return first
        return sum((each.float() for each in rest), first.float()).to(first.dtype)

    def full(self) -> Tensor | None:
        """The share of the parts that meet the inputs as they come, before they are quantized; None: no part does."""
        parts = [part.decode() for part in self.parts if part.form.full_inputs]
        return sum(parts[1:], parts[0]) if parts else None

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for part in self.parts for name, t in part.tensors().items()}

    def sample(self, start: int, step: int) -> Encoded:
        """Every `step`-th output from `start`."""
        return Encoded(tuple(part.sample(start, step) for part in self.parts), self.note)

    def split(self, rows: list[int]) -> list[Encoded]:
        """Cut along the outputs, into weights of the given numbers of rows."""
        pieces = zip(*(part.split(rows) for part in self.parts), strict=True)
        return [Encoded(tuple(parts), self.note) for parts in pieces]


def read_encoded(
    forms: Sequence[Form], stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype
) -> Encoded:
    """The inverse of `Encoded.tensors`."""
    return Encoded(tuple(form.read(stored, rows, columns, dtype) for form in forms))
