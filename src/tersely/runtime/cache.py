"""Caches of rounded keys and values, for transformers: `model.generate(..., past_key_values=KIVICache(model.config))`.

Layers that see a window only keep transformers' own cache, which is as long as the window.

Shapes: B sequences, H key/value heads, T tokens, D channels of a head, L tokens of a text, V vocabulary; N the axis
along which values share a grid, G groups of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from tersely.errors import UsageError
from tersely.hadamard import hadamard
from tersely.runtime.policy import FP8, KIVI, CachePolicy

_LARGEST = torch.finfo(torch.float16).max
_E4M3 = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, eq=False)
class Grid:
    """Numbers (..., N) on a grid for each run of `group` of them."""

    codes: Tensor
    """uint8, (..., N bits / 8): the first in the lowest bits."""
    scale_G: Tensor
    """float16, (..., G)."""
    low_G: Tensor
    """float16, (..., G)."""
    bits: int

    def decode(self, dtype: torch.dtype) -> Tensor:
        """code * scale + low in float32, rounded to dtype."""
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=self.codes.device)
        codes = (self.codes[..., None] >> shifts & ((1 << self.bits) - 1)).flatten(-2)
        groups = codes.view(*self.scale_G.shape, -1).float()
        return groups.mul_(self.scale_G[..., None].float()).add_(self.low_G[..., None].float()).flatten(-2).to(dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> Grid:
        """With every stored tensor changed."""
        return Grid(change(self.codes), change(self.scale_G), change(self.low_G), self.bits)

    def joined(self, other: Grid, axis: int) -> Grid:
        return Grid(
            torch.cat([self.codes, other.codes], dim=axis),
            torch.cat([self.scale_G, other.scale_G], dim=axis),
            torch.cat([self.low_G, other.low_G], dim=axis),
            self.bits,
        )

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale_G.nbytes + self.low_G.nbytes


def round_groups(x: Tensor, bits: int, group: int, counted: Tensor | None = None) -> Grid:
    """x (..., N) on grids of `group` numbers each; counted: of x's shape or one that expands to it, what the ends of a
    grid are taken from (a run of which nothing counts becomes zero)."""
    groups = x.float().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    if counted is None:
        low, high = torch.aminmax(groups, dim=-1)
    else:
        within = counted.expand(x.shape).reshape(groups.shape)
        low = torch.where(within, groups, torch.inf).amin(-1)
        high = torch.where(within, groups, -torch.inf).amax(-1)
        some = within.any(-1)
        low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    levels = (1 << bits) - 1
    low = low.clamp(-_LARGEST, _LARGEST).half()
    scale = ((high - low.float()) / levels).clamp(0, _LARGEST).half()
    scale = torch.where(scale == 0, 1.0, scale)
    codes = ((groups - low[..., None].float()) / scale[..., None].float()).round_().clamp_(0, levels).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    packed = (codes.view(*x.shape[:-1], -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
    return Grid(packed, scale, low, bits)


class _RoundedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of past tokens, some of them rounded."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what attention sees."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.tokens = 0

    @abstractmethod
    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every stored tensor, whose first axis are the sequences."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the sequences, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.each(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        if self.is_initialized:
            self.each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """RuntimeError: what has been rounded does not come back."""
        if tokens_to_remove:
            raise RuntimeError("a cache of rounded keys and values cannot be cropped; use transformers' DynamicCache")


class KIVILayer(_RoundedLayer):  # type: ignore[no-untyped-call]
    """See `KIVI`."""

    def __init__(self, policy: KIVI, padding_B: Tensor | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.padding_B = padding_B
        self.rounded_keys: Grid | None = None
        """Along the tokens: (B, H, D, T); along the channels where keys are rotated: (B, H, T, D)."""
        self.rounded_values: Grid | None = None
        """Along the channels: (B, H, T, D)."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.policy.check(value_states.shape[-1])
        if self.policy.rotate:
            self.policy.check(key_states.shape[-1])
        if self.padding_B is not None:
            # Beams of one prompt follow each other.
            repeats = key_states.shape[0] // len(self.padding_B)
            self.padding_B = self.padding_B.to(self.device).repeat_interleave(repeats)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H, T, D) of new tokens; those that attention is to see, all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        before = self.tokens - self.keys.shape[-2]
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        seen = self._past_keys(keys), _behind(self.rounded_values, values)
        self.tokens += key_states.shape[-2]
        residual, settled = self.policy.residual, max(values.shape[-2] - self.policy.residual, 0)
        due = settled if self.policy.rotate else keys.shape[-2] // residual * residual
        if due:
            self.rounded_keys = self._round_keys(keys[..., :due, :], before)
            keys = keys[..., due:, :].clone()
        if settled:
            new = round_groups(values[..., :settled, :], self.policy.bits, self.policy.group)
            self.rounded_values = new if self.rounded_values is None else self.rounded_values.joined(new, -2)
            values = values[..., settled:, :].clone()
        self.keys, self.values = keys, values
        return seen

    def _past_keys(self, keys: Tensor) -> Tensor:
        if self.rounded_keys is None or not self.policy.rotate:
            return _behind(self.rounded_keys, keys, turned=True)
        past = self.rounded_keys.decode(torch.float32)
        return torch.cat([hadamard(past, _order(past.shape[-1])).to(keys.dtype), keys], -2)

    def _round_keys(self, keys: Tensor, before: int) -> Grid:
        bits, group = self.policy.bits, self.policy.group
        if self.policy.rotate:
            new, axis = round_groups(hadamard(keys.float(), _order(keys.shape[-1])), bits, group), -2
        else:
            counted = None
            if self.padding_B is not None:
                place_T = torch.arange(before, before + keys.shape[-2], device=keys.device)
                counted = (place_T >= self.padding_B[:, None])[:, None, None]
            new, axis = round_groups(keys.transpose(-1, -2), bits, group, counted), -1
        return new if self.rounded_keys is None else self.rounded_keys.joined(new, axis)

    def reset(self) -> None:
        super().reset()
        self.rounded_keys = self.rounded_values = None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = change(self.keys), change(self.values)
        self.rounded_keys = None if self.rounded_keys is None else self.rounded_keys.each(change)
        self.rounded_values = None if self.rounded_values is None else self.rounded_values.each(change)
        self.padding_B = None if self.padding_B is None else change(self.padding_B)

    @property
    def nbytes(self) -> int:
        """Of all that is kept of past tokens."""
        kept = (self.keys, self.values, self.rounded_keys, self.rounded_values)
        return sum(each.nbytes for each in kept if each is not None)


class FP8Layer(_RoundedLayer):  # type: ignore[no-untyped-call]
    """See `FP8`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(_e4m3(key_states), _e4m3(value_states))
        self.dtype = key_states.dtype

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H, T, D) of new tokens; those that attention is to see, all of them, as engines read
        them: from the cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.tokens += key_states.shape[-2]
        self.keys = _joined_bytes(self.keys, _e4m3(key_states))
        self.values = _joined_bytes(self.values, _e4m3(value_states))
        return self.keys.to(self.dtype), self.values.to(self.dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        assert self.keys is not None
        assert self.values is not None
        e4m3 = torch.float8_e4m3fn
        self.keys = change(self.keys.view(torch.uint8)).view(e4m3)
        self.values = change(self.values.view(torch.uint8)).view(e4m3)

    @property
    def nbytes(self) -> int:
        """Of all that is kept of past tokens."""
        return sum(each.nbytes for each in (self.keys, self.values) if each is not None)


class KIVICache(Cache):
    """A cache for one batch of texts, of which padding_B (B,) tokens on the left are padding: `(mask == 0).sum(1)`.

    UsageError: settings that do not exist, or a model without attention to all past tokens.
    """

    def __init__(
        self,
        config: Any,
        *,
        bits: int = 4,
        group: int = 32,
        residual: int = 128,
        rotate: bool = False,
        padding_B: Tensor | None = None,
    ) -> None:
        policy = KIVI(bits, group, residual, rotate)
        super().__init__(layers=_layers(config, lambda: KIVILayer(policy, padding_B)))


class FP8Cache(Cache):
    """A cache for one batch of texts. UsageError: a model without attention to all past tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(layers=_layers(config, FP8Layer))


def make_cache(config: Any, policy: CachePolicy, padding_B: Tensor | None = None) -> Cache:
    """A new cache for a model of this transformers config."""
    if isinstance(policy, FP8):
        return FP8Cache(config)
    return KIVICache(
        config,
        bits=policy.bits,
        group=policy.group,
        residual=policy.residual,
        rotate=policy.rotate,
        padding_B=padding_B,
    )


@torch.inference_mode()
def forward_with_cache(network: Any, ids_BL: Tensor, policy: CachePolicy, piece: int | None = None) -> Tensor:
    """Logits (B, L, V) of texts whose tokens see those of earlier pieces as the cache keeps them.

    piece: tokens that pass together, by default as many as the policy says. Then keys are seen as when the text is
    written token by token; values of up to one piece more than then are seen unrounded. With 1, it is what writing
    does, and slow.
    """
    cache = make_cache(network.config, policy)
    pieces = torch.split(ids_BL, piece or policy.piece, dim=1)
    return torch.cat([network(input_ids=ids, past_key_values=cache, use_cache=True).logits for ids in pieces], dim=1)


def _layers(config: Any, make: Callable[[], CacheLayerMixin]) -> list[Any]:
    """transformers' own layers for the model, those without a window made anew."""
    if config.is_encoder_decoder:
        raise UsageError("caches of rounded keys and values are for models without an encoder")
    own = DynamicCache(config=config).layers
    if not any(type(layer) is DynamicLayer for layer in own):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in own}))
        raise UsageError(f"no layer of this model keeps all past tokens ({kinds}): there is nothing to round")
    return [make() if type(layer) is DynamicLayer else layer for layer in own]


def _behind(past: Grid | None, new: Tensor, *, turned: bool = False) -> Tensor:
    if past is None:
        return new
    decoded = past.decode(new.dtype)
    return torch.cat([decoded.transpose(-1, -2) if turned else decoded, new], -2)


def _order(channels: int) -> int:
    """The largest power of two that divides them."""
    return channels & -channels


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-_E4M3, _E4M3).to(torch.float8_e4m3fn)


def _joined_bytes(past: Tensor, new: Tensor) -> Tensor:
    # Not every device can join numbers of 8 bits as such.
    return torch.cat([past.view(torch.uint8), new.view(torch.uint8)], -2).view(torch.float8_e4m3fn)
