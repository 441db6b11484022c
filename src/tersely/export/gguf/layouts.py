"""How GGML lays codes and scales out in the bytes of a block: ggml-common.h and ggml-quants.c of llama.cpp.

Shapes: B blocks, I inputs of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import gguf
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int16]
Type = gguf.GGMLQuantizationType


def _low(codes_BI: Codes, bits: int, *shape: int) -> Bytes:
    """The low bits, a byte each, as (B, *shape)."""
    return (codes_BI & (1 << bits) - 1).astype(np.uint8).reshape(len(codes_BI), *shape)


def _side_by_side(runs_BRI: Bytes, bits: int) -> Bytes:
    """Runs of codes of so many bits in shared bytes, the first run lowest: (B, runs, I) to (B, I)."""
    shift = (bits * np.arange(runs_BRI.shape[1], dtype=np.uint8))[:, None]
    packed: Bytes = np.bitwise_or.reduce(runs_BRI << shift, axis=1)
    return packed


def _nibbles(codes_BI: Codes, width: int) -> Bytes:
    """The low four bits: of each `2 * width` inputs, the first half in the low, the second in the high nibbles."""
    pairs = _low(codes_BI, 4, -1, 2, width)
    return _side_by_side(pairs.reshape(-1, 2, width), 4).reshape(len(codes_BI), -1)


def _crumbs(codes_BI: Codes) -> Bytes:
    """The low two bits: of each 128 inputs, the four runs of 32 one above the other."""
    return _side_by_side(_low(codes_BI, 2, -1, 4, 32).reshape(-1, 4, 32), 2).reshape(len(codes_BI), -1)


def _planes(codes_BI: Codes, bit: int) -> Bytes:
    """One bit of each of 256 inputs: byte j has input 32 i + j at bit i."""
    return _side_by_side(_low(codes_BI >> bit, 1, 8, 32), 1)


def _fifth(codes_BI: Codes) -> Bytes:
    """The fifth bit of each of 32 inputs."""
    return np.packbits(_low(codes_BI >> 4, 1, -1), axis=1, bitorder="little")


def _fill(like: Bytes, *values: int) -> Bytes:
    return np.tile(np.array(values, dtype=np.uint8), (len(like), 1))


def _join(*columns: Bytes) -> Bytes:
    return np.concatenate(columns, axis=1)


def _q4_0(codes: Codes, scale: Bytes) -> Bytes:
    return _join(scale, _nibbles(codes + 8, 16))


def _q5_0(codes: Codes, scale: Bytes) -> Bytes:
    return _join(scale, _fifth(codes + 16), _nibbles(codes + 16, 16))


def _q8_0(codes: Codes, scale: Bytes) -> Bytes:
    return _join(scale, codes.astype(np.int8).view(np.uint8))


def _q3_k(codes: Codes, scale: Bytes) -> Bytes:
    # s = 33 - 32 in six bits, the low four and the high two apart.
    ones = _fill(scale, *[0x11] * 8, *[0xAA] * 4)
    return _join(_planes(codes + 4, 2), _crumbs(codes + 4), ones, scale)


def _q6_k(codes: Codes, scale: Bytes) -> Bytes:
    raised = codes + 32
    return _join(_nibbles(raised, 64), _crumbs(raised >> 4), _fill(scale, *[1] * 16), scale)


def _q4_1(codes: Codes, scale: Bytes, offset: Bytes) -> Bytes:
    return _join(scale, offset, _nibbles(codes, 16))


def _q5_1(codes: Codes, scale: Bytes, offset: Bytes) -> Bytes:
    return _join(scale, offset, _fifth(codes), _nibbles(codes, 16))


def _mxfp4(codes: Codes, scale: Bytes) -> Bytes:
    return _join(scale, _nibbles(codes, 16))


def _q2_k(codes: Codes, scale: Bytes, zero: Bytes) -> Bytes:
    return _join(_above_one(zero).repeat(16, axis=1), _crumbs(codes), scale, scale)


def _q4_k(codes: Codes, scale: Bytes, zero: Bytes) -> Bytes:
    return _join(scale, scale, _ones_and(zero), _nibbles(codes, 32))


def _q5_k(codes: Codes, scale: Bytes, zero: Bytes) -> Bytes:
    return _join(scale, scale, _ones_and(zero), _planes(codes, 4), _nibbles(codes, 32))


def _ones_and(zero: Bytes) -> Bytes:
    """s = 1 and m = zero, in six bits each, for eight runs: of the last four, the low nibbles come first."""
    high: Bytes = np.bitwise_or(zero, zero >> 4 << 6)
    return np.concatenate([np.ones_like(zero), high, _above_one(zero)], axis=1).repeat(4, axis=1)


def _above_one(zero: Bytes) -> Bytes:
    joined: Bytes = np.bitwise_or(zero << 4, 1)
    return joined


CENTRED: Mapping[Type, Callable[[Codes, Bytes], Bytes]] = {
    Type.Q4_0: _q4_0,
    Type.Q5_0: _q5_0,
    Type.Q8_0: _q8_0,
    Type.Q3_K: _q3_k,
    Type.Q6_K: _q6_k,
}
"""From code - zero, and the scale."""
OFFSET: Mapping[Type, Callable[[Codes, Bytes, Bytes], Bytes]] = {Type.Q4_1: _q4_1, Type.Q5_1: _q5_1}
"""From the codes, the scale, and -scale * zero."""
WHOLE_OFFSET: Mapping[Type, Callable[[Codes, Bytes, Bytes], Bytes]] = {
    Type.Q2_K: _q2_k,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
}
"""From the codes, the scale, and the zero."""
MICROSCALED: Mapping[Type, Callable[[Codes, Bytes], Bytes]] = {Type.MXFP4: _mxfp4}
"""From the codes of small floats, and the bytes of their scales."""
