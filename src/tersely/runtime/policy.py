"""How keys and values of past tokens are kept: what a recipe and a checkpoint's config say of it, and its bytes.

Shapes: B sequences, H key/value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tersely.errors import CheckpointError, UsageError

CONFIG_KEY = "tersely_cache"
"""Under which config.json of a checkpoint says how its cache is to be kept."""


@dataclass(frozen=True)
class KIVI:
    """KIVI (Liu et al., ICML 2024, arXiv 2402.02750): `bits` for all but the last tokens.

    Keys in groups of `group` tokens of one channel, values in groups of `group` channels of one token, each group on a
    grid x_hat = code * scale + lowest, scale = (highest - lowest) / (2^bits - 1), both in float16. Keys are rounded
    `residual` tokens at a time, once there are as many; of the values the last `residual` tokens stay as they are. What
    a pass brings meets itself unrounded. `rotate`: keys are multiplied by a Hadamard matrix first and rounded as values
    are (QuaRot, arXiv 2404.00456).
    """

    method: ClassVar[str] = "kivi"
    standard: ClassVar[bool] = False

    bits: int = 4
    group: int = 32
    residual: int = 128
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise UsageError(f"cache bits={self.bits}: expected 2, 4 or 8")
        if self.group < 8 // self.bits or self.group % (8 // self.bits):
            raise UsageError(f"cache group={self.group}: a multiple of {8 // self.bits} is expected (32 is usual)")
        if self.residual < 1 or (not self.rotate and self.residual % self.group):
            raise UsageError(
                f"cache residual={self.residual}: a positive multiple of group={self.group} is expected (128 is usual)"
            )

    @property
    def piece(self) -> int:
        """Tokens of a text that pass together when it is measured."""
        return self.residual

    def check(self, channels: int) -> None:
        """UsageError where the groups do not fit the channels of a value head."""
        if channels % self.group:
            raise UsageError(
                f"cache group={self.group} does not divide the {channels} channels of a head; use "
                f"{max(d for d in range(1, self.group) if channels % d == 0)}"
            )

    def nbytes(self, heads: int, keys: int, values: int, tokens: int, itemsize: int) -> int:
        """Of one layer and sequence, with `keys` and `values` channels of a head."""
        rounded_values = max(tokens - self.residual, 0)
        rounded_keys = rounded_values if self.rotate else tokens // self.residual * self.residual
        total = 0
        for rounded, channels in ((rounded_keys, keys), (rounded_values, values)):
            total += rounded * channels * self.bits // 8 + 4 * (rounded * channels // self.group)
            total += (tokens - rounded) * channels * itemsize
        return heads * total


@dataclass(frozen=True)
class FP8:
    """E4M3 for every token: x clipped to -448 .. 448 and cast, with no scale. Attention sees nothing else."""

    method: ClassVar[str] = "fp8"
    standard: ClassVar[bool] = True
    piece: ClassVar[int] = 4096

    def nbytes(self, heads: int, keys: int, values: int, tokens: int, itemsize: int) -> int:  # noqa: ARG002 (as KIVI's)
        """Of one layer and sequence, with `keys` and `values` channels of a head."""
        return heads * tokens * (keys + values)

    def check(self, channels: int) -> None:
        """Any number of channels fits."""


CachePolicy = KIVI | FP8
"""`standard`: compressed-tensors has words for it (`kv_cache_scheme`)."""
POLICIES: tuple[type[KIVI] | type[FP8], ...] = (KIVI, FP8)


def policy_to_plain(policy: CachePolicy) -> dict[str, Any]:
    return {"method": policy.method, **dataclasses.asdict(policy)}


def policy_from_plain(plain: Mapping[str, Any]) -> CachePolicy:
    """The inverse. UsageError: a method or a setting that does not exist."""
    methods = {policy.method: policy for policy in POLICIES}
    settings = {name: value for name, value in plain.items() if name != "method"}
    method = plain.get("method")
    if method not in methods:
        raise UsageError(f"no cache method named {method!r}; expected {' or '.join(methods)}")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(methods[method])}
    for name, value in settings.items():
        if name not in kinds:
            raise UsageError(f"cache method {method!r} has no setting {name!r}; it has {', '.join(kinds) or 'none'}")
        if type(value) is not kinds[name]:
            raise UsageError(f"cache {name}={value!r}: expected a value of type {kinds[name].__name__}")
    return methods[method](**settings)


def stored_policy(config: Any) -> CachePolicy | None:
    """What the config of a loaded checkpoint asks for; None: the model's own cache. CheckpointError: damaged."""
    plain = getattr(config, CONFIG_KEY, None)
    if plain is None:
        return None
    try:
        return policy_from_plain(plain)
    except (UsageError, AttributeError) as error:
        raise CheckpointError(f"config.json is damaged where it says how keys and values are kept: {error}") from error
