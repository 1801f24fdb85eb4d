"""The types of PTX, the arrays that hold them, and the error of everything the emulator does not know."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# what a register holds: [num_ctas or 1, num_threads or 1], so that uniform values cost next to nothing
Array = NDArray


class PtxError(Exception):
    """PTX that the emulator does not know, or that a GPU would not run as its author meant."""


class PtxType(NamedTuple):
    """A fundamental type: kind is one of s, u, b, f, pred; 16-bit floats are handled as their bits."""

    name: str
    kind: str
    width: int
    dtype: np.dtype


UNSIGNED = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
SIGNED = {width: np.dtype(f"i{width}") for width in (1, 2, 4, 8)}
BOOL = np.dtype(bool)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
# 16 bytes that numpy copies in one piece
WIDE = {**UNSIGNED, 16: np.dtype(np.complex128)}


def _make_types() -> dict[str, PtxType]:
    types = {"pred": PtxType("pred", "pred", 0, BOOL)}
    for width in (1, 2, 4, 8):
        for kind, dtypes in (("s", SIGNED), ("u", UNSIGNED), ("b", UNSIGNED)):
            name = f"{kind}{8 * width}"
            types[name] = PtxType(name, kind, width, dtypes[width])
    types["f32"] = PtxType("f32", "f", 4, FLOAT32)
    types["f64"] = PtxType("f64", "f", 8, FLOAT64)
    for name in ("f16", "bf16"):
        types[name] = PtxType(name, "f", 2, UNSIGNED[2])
    for name in ("f16x2", "bf16x2"):
        types[name] = PtxType(name, "f", 4, UNSIGNED[4])
    return types


TYPES = _make_types()


def constant(value: int, dtype: np.dtype) -> Array:
    """Make a uniform value out of a bit pattern, or out of an integer that wraps to the width of dtype."""
    if dtype == BOOL:
        return np.full((1, 1), bool(value))
    bits = np.array([[value & ((1 << 8 * dtype.itemsize) - 1)]], UNSIGNED[dtype.itemsize])
    return bits.view(dtype)


def poison(dtype: np.dtype) -> Array:
    """What a lane reads that never wrote: large, odd and easily seen."""
    return constant(0xCDCDCDCDCDCDCDCD, dtype)


def bits_of(value: Array) -> Array:
    """View a value as unsigned; a NaN that arithmetic made is the hardware's canonical one."""
    if value.dtype == FLOAT32:
        return canonical(value).view(np.uint32)
    if value.dtype.kind == "u":
        return value
    return value.view(UNSIGNED[value.dtype.itemsize])


def canonical(value: Array) -> Array:
    """Replace every NaN by 0x7fffffff, the only one that float32 arithmetic makes on the device."""
    nan = np.isnan(value)
    if not nan.any():
        return value
    value = value.copy()
    value.view(np.uint32)[nan] = 0x7FFFFFFF
    return value
