"""Floating-point instructions: exact where IEEE says how to round, approximate within a given error elsewhere.

Values of float16 and bfloat16 are held as bits and computed in float32, which is wide enough that rounding twice
rounds as once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from ptx_emulator.decoder import Decoder, Execute, Read, Write, opcode
from ptx_emulator.ptx_types import TYPES, Array, PtxError, PtxType, bits_of

_SMALLEST_NORMAL = np.float32(2.0**-126)
_HALVES = ("f16", "bf16")
PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
_FLOATS = ("f32", "f64", *_HALVES, *PAIRS)


# representations


def flush(x: Array) -> Array:
    """Replace subnormal float32 by zero of the same sign."""
    tiny = np.abs(x) < _SMALLEST_NORMAL
    if not tiny.any():
        return x
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def round_to_bfloat16(x: Array) -> Array:
    """Round float32 to the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_float32(bits: Array, kind: PtxType) -> Array:
    """Widen the bits of float16 or bfloat16."""
    if kind.name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def from_float32(x: Array, kind: PtxType) -> Array:
    """Round float32 to the bits of float16 or bfloat16."""
    if kind.name == "bf16":
        return round_to_bfloat16(x)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_odd_float32(x: Array) -> Array:
    """Narrow float64 so that a later rounding to fewer bits rounds as if from x: inexact values end in an odd bit."""
    nearest = x.astype(np.float32)
    error = x - nearest
    even = (nearest.view(np.uint32) & np.uint32(1)) == 0
    toward = np.where(error > 0, np.float32(np.inf), np.float32(-np.inf))
    return np.where((error != 0) & even & np.isfinite(x), np.nextafter(nearest, toward), nearest)


def float_reader(ins: Decoder, operand: int, kind: PtxType, flushes: bool = False) -> Read:
    """Make the reader of a scalar as float32, or as float64."""
    read = ins.source(operand, kind)
    if kind.name in _HALVES:
        if flushes:
            raise PtxError(f"{ins.opcode}.ftz of .{kind.name}")
        return lambda frame: to_float32(read(frame), kind)
    if flushes:
        if kind.name != "f32":
            raise PtxError(f"{ins.opcode}.ftz of .{kind.name}")
        return lambda frame: flush(read(frame))
    return read


def float_writer(ins: Decoder, kind: PtxType, flushes: bool = False) -> Write:
    """Make the writer of a scalar."""
    write = ins.destination(0, kind)
    if kind.name in _HALVES:
        return lambda frame, value: write(frame, from_float32(value, kind))
    if flushes:
        return lambda frame, value: write(frame, flush(value))
    return write


def _on_floats(ins: Decoder, kind: PtxType, flushes: bool, function: Callable[..., Array], count: int) -> Execute:
    """Make the closure of a function of `count` floats, of a pair of 16-bit floats on both halves."""
    ins.expect_operands(1 + count)
    if kind.name in PAIRS:
        if flushes:
            raise PtxError(f"{ins.opcode}.ftz of .{kind.name}")
        return ins.pointwise(_on_halves(TYPES[PAIRS[kind.name]], function), kind, *[kind] * count)
    write = float_writer(ins, kind, flushes)
    reads = [float_reader(ins, 1 + i, kind, flushes) for i in range(count)]
    if count == 2:
        left, right = reads
        return lambda frame: write(frame, function(left(frame), right(frame)))
    return lambda frame: write(frame, function(*[read(frame) for read in reads]))


def _on_halves(kind: PtxType, function: Callable[..., Array]) -> Callable[..., Array]:
    def on_pairs(*pairs: Array) -> Array:
        low = [to_float32(pair.astype(np.uint16), kind) for pair in pairs]
        high = [to_float32((pair >> np.uint32(16)).astype(np.uint16), kind) for pair in pairs]
        low_bits = from_float32(function(*low), kind).astype(np.uint32)
        return low_bits | (from_float32(function(*high), kind).astype(np.uint32) << np.uint32(16))

    return on_pairs


def add_packed(kind: PtxType) -> Callable[..., Array]:
    """The addition of pairs of 16-bit floats, for atomics."""
    return _on_halves(TYPES[PAIRS[kind.name]], np.add)


# add, sub, mul, div, fma


def arithmetic(ins: Decoder, function: Callable[[Array, Array], Array]) -> Execute:
    """Decode add, sub, mul or div, rounded to nearest."""
    if ins.opcode == "div" and ins.take("full", "approx"):
        return _approximate(ins, function, 2)
    # without .rn the assembler may contract a product with a sum; that is not modelled
    if not ins.take("rn") and ins.opcode == "div":
        raise PtxError("div without .rn, .full or .approx")
    flushes = ins.take("ftz") is not None
    saturates = ins.take("sat") is not None
    kind = ins.take_type(*_FLOATS)
    if saturates:
        return _on_floats(ins, kind, flushes, lambda x, y: saturate(function(x, y)), 2)
    return _on_floats(ins, kind, flushes, function, 2)


def saturate(x: Array) -> Array:
    """Clamp to [0, 1]; NaN becomes +0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)) + x.dtype.type(0)


@opcode("fma")
def _fma(ins: Decoder) -> Execute:
    ins.require("rn")
    flushes = ins.take("ftz") is not None
    saturates = ins.take("sat") is not None
    relu = ins.take("relu") is not None
    kind = ins.take_type(*_FLOATS)
    if saturates or relu:
        raise PtxError("fma with .sat or .relu")
    if kind.name == "f64":
        return _on_floats(ins, kind, flushes, fma_float64, 3)
    if kind.name != "f32":
        return _on_floats(ins, kind, flushes, lambda x, y, z: to_odd_float32(_sum_to_odd(*_exact(x, y, z))), 3)
    return _on_floats(ins, kind, flushes, fma_float32, 3)


def fma_float32(x: Array, y: Array, z: Array) -> Array:
    """Compute x y + z, rounded once.

    The product is exact in float64. Rounding the sum to float64 and then to float32 differs from rounding once only
    where the float64 sum lies half way between two float32, so that only such sums, and the subnormal ones, whose
    half ways lie elsewhere, are rounded to odd first.
    """
    product, addend = np.multiply(x, y, dtype=np.float64), z.astype(np.float64)
    total = product + addend
    result = total.astype(np.float32)
    half_way = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if half_way.any() or _any_subnormal(result):
        return _sum_to_odd(product, addend).astype(np.float32)
    return result


def _any_subnormal(x: Array) -> bool:
    # zero without its sign wraps to the largest number and is none
    magnitude = (x.view(np.uint32) << np.uint32(1)) - np.uint32(1)
    return bool((magnitude < np.uint32(0x00FFFFFF)).any())


def _exact(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    return np.multiply(x, y, dtype=np.float64), z.astype(np.float64)


def _sum_to_odd(x: Array, y: Array) -> Array:
    """Add float64; inexact sums end in an odd bit, so that rounding them to float32 is rounding once."""
    total = x + y
    # the exact error of the sum
    part = total - x
    error = (x - (total - part)) + (y - part)
    inexact = np.isfinite(total) & (error != 0)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    return np.where(inexact & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def fma_float64(x: Array, y: Array, z: Array) -> Array:
    """Compute x y + z, rounded once."""
    from triton._C.libtriton import interpreter

    x, y, z = (np.ascontiguousarray(value) for value in np.broadcast_arrays(x, y, z))
    return np.asarray(interpreter.fma_fp64(x, y, z)).reshape(x.shape)


# min, max, abs, neg, copysign


def floating_min_max(ins: Decoder) -> Execute:
    """Decode min or max: of a NaN and a number the number, with .NaN the NaN; -0 is below +0."""
    propagates = ins.take("NaN") is not None
    flushes = ins.take("ftz") is not None
    kind = ins.take_type(*_FLOATS)
    is_min = ins.opcode == "min"
    choose: np.ufunc = np.fmin if is_min else np.fmax
    if propagates:
        choose = np.minimum if is_min else np.maximum

    def function(x: Array, y: Array) -> Array:
        result = choose(x, y)
        if (result == 0).any():
            negative = np.logical_or if is_min else np.logical_and
            both_zero = (x == 0) & (y == 0)
            sign = np.where(negative(np.signbit(x), np.signbit(y)), x.dtype.type(-0.0), x.dtype.type(0.0))
            result = np.where(both_zero, sign, result)
        return result

    return _on_floats(ins, kind, flushes, function, 2)


def floating_unary(ins: Decoder) -> Execute:
    """Decode abs or neg."""
    flushes = ins.take("ftz") is not None
    kind = ins.take_type(*_FLOATS)
    return _on_floats(ins, kind, flushes, np.abs if ins.opcode == "abs" else np.negative, 1)


@opcode("copysign")
def _copysign(ins: Decoder) -> Execute:
    kind = ins.take_type("f32", "f64")
    return ins.pointwise(lambda sign, x: np.copysign(x, sign), kind, kind, kind)


# what the special function unit computes

_APPROXIMATIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
}
# what else of these PTX defines to be correctly rounded
_ROUNDED = ("rcp", "sqrt")


@opcode(*_APPROXIMATIONS)
def _special(ins: Decoder) -> Execute:
    function = _APPROXIMATIONS[ins.opcode]
    if ins.opcode in _ROUNDED and ins.take("rn"):
        flushes = ins.take("ftz") is not None
        return _on_floats(ins, ins.take_type("f32", "f64"), flushes, function, 1)
    ins.require("approx")
    return _approximate(ins, function, 1)


def _approximate(ins: Decoder, function: Callable[..., Array], count: int) -> Execute:
    flushes = ins.take("ftz") is not None
    kind = ins.take_type("f32")
    if not ins.approx_ulp:
        return _on_floats(ins, kind, flushes, function, count)
    perturb = _make_perturbation(ins.opcode, ins.approx_ulp)
    return _on_floats(ins, kind, flushes, lambda *x: perturb(function(*x), x[0]), count)


def _make_perturbation(name: str, ulp: int) -> Callable[[Array, Array], Array]:
    """An error of up to `ulp` units in the last place, a function of the opcode and the argument as on the device.

    Zeros, infinities and NaN stay, and so does 2^0.
    """
    key = np.uint32(zlib.crc32(name.encode()))

    def perturb(result: Array, argument: Array) -> Array:
        mixed = (bits_of(argument) ^ key) * np.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
        shift = ((mixed >> np.uint32(8)) % np.uint32(2 * ulp + 1)).astype(np.int32) - np.int32(ulp)
        exact = ~np.isfinite(result) | (result == 0)
        if name == "ex2":
            exact |= argument == 0
        result = np.ascontiguousarray(result)
        shifted = (result.view(np.int32) + np.where(exact, np.int32(0), shift)).view(np.float32)
        return np.where(np.isfinite(shifted) & (np.signbit(shifted) == np.signbit(result)), shifted, result)

    return perturb


@opcode("testp")
def _testp(ins: Decoder) -> Execute:
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
    }
    function = tests[ins.require(*tests)]
    return ins.pointwise(function, TYPES["pred"], ins.take_type("f32", "f64"))
