"""`quant_method: "tersely"` for transformers: such a folder loads as any other, and its weights stay packed.

transformers loads what is dense. What is encoded has no parameter while it does so: in the place of each lies a meta
tensor that counts as initialised, and beside it an empty buffer of as many bytes as are stored, which is placed and
moved as the model is. Afterwards the packed weight takes the place of both, on the buffer's device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersely.errors import CheckpointError, UsageError
from tersely.graph import Piece, read_graph
from tersely.runtime.held import Cell, Held
from tersely.runtime.packed import Packed, Slots
from tersely.stored import QUANT_METHOD, Stored, open_stored

_BUFFER = "packed_bytes_of_"


class TerselyConfig(QuantizationConfigMixin):
    """What config.json says of the weights of a folder; see tersely.stored."""

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], version: str = "", quant_method: str = QUANT_METHOD
    ) -> None:
        self.quant_method: Any = quant_method
        self.version = version
        self.groups = groups


@dataclass(frozen=True, eq=False)
class _Place:
    """A parameter of the model that will be packed."""

    owner: nn.Module
    leaf: str
    pieces: tuple[Piece, ...]
    shape: torch.Size
    dtype: torch.dtype


class TerselyQuantizer(HfQuantizer):
    """Loads folders of quant_method "tersely"."""

    requires_calibration = True

    def __init__(self, quantization_config: TerselyConfig, **how: Any) -> None:
        super().__init__(quantization_config, **how)
        self._places: list[_Place] = []
        self._stored: Stored | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Experts run one by one, since each of them decodes for itself."""
        if config._experts_implementation not in (None, "eager"):
            raise UsageError(
                f'experts_implementation="{config._experts_implementation}": packed experts run one by one; use "eager"'
            )
        config._experts_implementation = "eager"
        return config

    def update_device_map(self, device_map: Any) -> Any:
        _require_resident(device_map)
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_how: Any
    ) -> None:
        if not checkpoint_files:
            raise UsageError("packed weights are read from the files of a folder, not from a state_dict")
        self._stored = open_stored(Path(checkpoint_files[0]).parent)
        self._places = _places(model, self._stored)
        for place in self._places:
            meta = place.owner._parameters[place.leaf]
            assert meta is not None
            # transformers initialises what no file gives, and asks this of each tensor first.
            meta._is_hf_initialized = True  # type: ignore[attr-defined]
            place.owner._parameters[place.leaf] = None
            place.owner.__dict__[place.leaf] = meta
            nbytes = sum(
                self._stored.written.spec(name).nbytes
                for piece in place.pieces
                for name in self._stored.stored_names(piece.weight.name)
            )
            empty = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            place.owner.register_buffer(_BUFFER + place.leaf, empty, persistent=False)
        # Every stored tensor has been claimed by a row of the family's table and found its place in the model.
        model._keys_to_ignore_on_load_unexpected = {""}

    def _process_model_after_weight_loading(self, model: Any, **_how: Any) -> Any:
        _require_resident(getattr(model, "hf_device_map", None))
        assert self._stored is not None
        for place in self._places:
            device = place.owner.get_buffer(_BUFFER + place.leaf).device
            delattr(place.owner, _BUFFER + place.leaf)
            packed = Packed(_slots(place, self._stored, device), place.dtype, stacked=place.pieces[0].index is not None)
            meta = place.owner.__dict__.pop(place.leaf)
            if packed.shape != place.shape:
                raise CheckpointError(
                    f"{self._stored.path}: {place.pieces[0].weight.name} and what is stacked with it has shape "
                    f"{list(packed.shape)}, but the model built from config.json expects {list(place.shape)}"
                )
            parameter = nn.Parameter(packed, requires_grad=False)
            place.owner.register_parameter(place.leaf, parameter)
            for module in model.modules():
                for leaf, tied in module._parameters.items():
                    if tied is meta:
                        module._parameters[leaf] = parameter
        self._places, self._stored = [], None
        return model

    def is_serializable(self) -> bool:
        """No: the folder is what is saved."""
        logging.get_logger(__name__).warning(
            "packed weights are not written again: copy the folder that the model was loaded from, or compress with "
            "--format dense"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make the quantizer known to transformers."""
    register_quantization_config(QUANT_METHOD)(TerselyConfig)
    register_quantizer(QUANT_METHOD)(TerselyQuantizer)


def _require_resident(device_map: Any) -> None:
    """UsageError where some of the model would wait outside the device that computes."""
    places = set(device_map.values()) if isinstance(device_map, Mapping) else set()
    kinds = {place if place == "disk" else torch.device(place).type for place in places}
    if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
        raise UsageError('packed weights cannot be offloaded to memory or disk; use device_map={"": "cpu"}, or a GPU')


def _places(model: Any, stored: Stored) -> list[_Place]:
    """Where encoded weights go in a model on the meta device, once it is clear that every stored one has a place."""
    graph = read_graph(stored)
    places = []
    for unit in ("", *graph.units):
        for parameter, pieces in graph.parameters(unit).items():
            name = f"{unit}.{parameter}" if unit else parameter
            found = _find(model, name)
            if found is None:
                # A model without its head, AutoModel above all.
                if unit or model.base_model is not model:
                    raise CheckpointError(
                        f"{stored.path}: {pieces[0].weight.name} has no place in the model that transformers builds: "
                        f"it has no {name}"
                    )
                continue
            if any(piece.weight.name in stored.entries for piece in pieces):
                owner, leaf = found
                meta = owner.get_parameter(leaf)
                places.append(_Place(owner, leaf, pieces, meta.shape, _dtype(model, name, meta.dtype)))
    return places


def _find(model: Any, name: str) -> tuple[nn.Module, str] | None:
    """The module that holds a parameter or buffer, and its name there."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix)):
        path, _, leaf = candidate.rpartition(".")
        try:
            owner: nn.Module = model.get_submodule(path)
        except AttributeError:
            continue
        if leaf in owner._parameters or leaf in owner._buffers:
            return owner, leaf
    return None


def _dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """transformers keeps some weights of some models in float32."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    return next((kept for part, kept in plan.items() if f".{part}." in f".{name}."), dtype)


def _slots(place: _Place, stored: Stored, device: torch.device) -> Slots:
    slots: dict[int, list[Cell]] = {}
    for piece in sorted(place.pieces, key=lambda piece: piece.start):
        name = piece.weight.name
        held: Held | Tensor
        if name in stored.entries:
            entry = stored.entries[name]
            held = Held(name, entry, stored.leaves(name)).to(device)
            rows, columns = entry.shape
        else:
            held = stored[name].to(device=device, dtype=place.dtype)
            rows, columns = held.shape
        slots.setdefault(piece.index or 0, []).append(Cell(held, (rows, columns)))
    return tuple(tuple(slots[index]) for index in sorted(slots))
