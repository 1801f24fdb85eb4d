"""cvt in the forms that Triton uses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ptx_emulator.decoder import Decoder, Execute, opcode
from ptx_emulator.floating import (
    flush,
    from_float32,
    saturate,
    to_float32,
    to_odd_float32,
)
from ptx_emulator.ptx_types import TYPES, Array, PtxError, PtxType

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOAT8 = {"e4m3x2": (torch.float8_e4m3fn, 448.0), "e5m2x2": (torch.float8_e5m2, 57344.0)}
_HALVES = ("f16", "bf16")
_PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}


@opcode("cvt")
def _cvt(ins: Decoder) -> Execute:
    result, source = ins.modifiers[-2:]
    if result in _FLOAT8 or source in _FLOAT8:
        return _float8(ins)
    if result in _PAIRS:
        return _to_pair(ins)
    if result == "tf32":
        return _to_tf32(ins)
    kind_source = ins.take_type()
    kind = ins.take_type()
    if kind_source.kind == "b" or kind.kind == "b":
        raise PtxError(f"cvt.{kind.name}.{kind_source.name}")
    write = ins.destination(0, kind, wider=True)
    read = ins.source(1, kind_source, wider=True)
    ins.expect_operands(2)
    convert = _make_conversion(ins, kind, kind_source)
    return lambda frame: write(frame, convert(read(frame)))


def _make_conversion(ins: Decoder, kind: PtxType, source: PtxType) -> Callable[[Array], Array]:
    if source.kind == "f" and kind.kind == "f":
        return _float_to_float(ins, kind, source)
    if source.kind == "f":
        return _float_to_integer(ins, kind, source)
    if kind.kind == "f":
        return _integer_to_float(ins, kind, source)
    return _integer_to_integer(ins, kind)


def _integer_to_integer(ins: Decoder, kind: PtxType) -> Callable[[Array], Array]:
    if not ins.take("sat"):
        return lambda x: x.astype(kind.dtype)
    limits = np.iinfo(kind.dtype)

    def clamp(x: Array) -> Array:
        low, high = max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max)
        return np.clip(x, low, high).astype(kind.dtype)

    return clamp


def _integer_to_float(ins: Decoder, kind: PtxType, source: PtxType) -> Callable[[Array], Array]:
    ins.require("rn")
    if kind.name in _HALVES:
        if source.width > 4:
            raise PtxError(f"cvt.{kind.name}.{source.name}")
        return lambda x: from_float32(to_odd_float32(x.astype(np.float64)), kind)
    return lambda x: x.astype(kind.dtype)


def _float_to_integer(ins: Decoder, kind: PtxType, source: PtxType) -> Callable[[Array], Array]:
    rounding = _TO_INTEGRAL[ins.require(*_TO_INTEGRAL)]
    # always so between these types
    ins.take("sat")
    flushes = _take_flush(ins, source)
    limits = np.iinfo(kind.dtype)
    # of 64 bits NaN becomes the lone highest bit, else 0
    nan = 1 << (8 * kind.width - 1) if "f64" == source.name or kind.width == 8 else 0
    nan_value = np.array(nan, np.uint64).astype(kind.dtype)

    def convert(x: Array) -> Array:
        x = _widen(x, source, flushes)
        whole = rounding(x.astype(np.float64))
        high, low = whole >= float(limits.max), whole <= float(limits.min)
        isnan = np.isnan(whole)
        inside = np.where(high | low | isnan, 0, whole).astype(kind.dtype)
        clamped = np.where(high, kind.dtype.type(limits.max), np.where(low, kind.dtype.type(limits.min), inside))
        return np.where(isnan, nan_value, clamped)

    return convert


def _take_flush(ins: Decoder, source: PtxType) -> bool:
    flushes = ins.take("ftz") is not None
    if flushes and source.name != "f32":
        raise PtxError(f"cvt.ftz of .{source.name}")
    return flushes


def _widen(x: Array, source: PtxType, flushes: bool) -> Array:
    if source.name in _HALVES:
        return to_float32(x, source)
    return flush(x) if flushes else x


def _float_to_float(ins: Decoder, kind: PtxType, source: PtxType) -> Callable[[Array], Array]:
    to_integral = ins.take(*_TO_INTEGRAL)
    rounding = ins.take("rn", "rz", "rm", "rp")
    flushes = ins.take("ftz") is not None
    if flushes and "f32" not in (kind.name, source.name):
        raise PtxError(f"cvt.ftz.{kind.name}.{source.name}")
    saturates = ins.take("sat") is not None
    relu = ins.take("relu") is not None
    narrow = _make_narrowing(kind, source, rounding)

    def convert(x: Array) -> Array:
        x = _widen(x, source, flushes and source.name == "f32")
        if to_integral:
            x = _TO_INTEGRAL[to_integral](x)
        if saturates:
            x = saturate(x)
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, x.dtype.type(0)))
        x = narrow(x)
        return flush(x) if flushes and kind.name == "f32" else x

    return convert


def _make_narrowing(kind: PtxType, source: PtxType, rounding: str | None) -> Callable[[Array], Array]:
    """From float32 or float64, as which 16-bit floats come, to the result."""
    if kind.name in _HALVES:
        if rounding == "rz":
            return lambda x: _round_to_zero(_to_float32_odd(x), kind)
        if rounding != "rn" and kind.name != source.name:
            raise PtxError(f"cvt.{rounding}.{kind.name}.{source.name}")
        return lambda x: from_float32(_to_float32_odd(x), kind)
    if kind.width < source.width:
        return _make_float64_narrowing(rounding)
    if rounding:
        raise PtxError(f"cvt.{rounding}.{kind.name}.{source.name}")
    return lambda x: x.astype(kind.dtype)


def _to_float32_odd(x: Array) -> Array:
    return x if x.dtype == np.float32 else to_odd_float32(x)


def _round_to_zero(x: Array, kind: PtxType) -> Array:
    """Round float32 to the bits of the next 16-bit float that is not larger in magnitude."""
    nearest = from_float32(x, kind)
    too_large = np.abs(to_float32(nearest, kind)) > np.abs(x)
    return np.where(too_large, nearest - np.uint16(1), nearest)


def _make_float64_narrowing(rounding: str | None) -> Callable[[Array], Array]:
    if rounding not in ("rn", "rz", "rm", "rp"):
        raise PtxError("cvt.f32.f64 without rounding")
    if rounding == "rn":
        return lambda x: x.astype(np.float32)

    def narrow(x: Array) -> Array:
        nearest = x.astype(np.float32)
        down = np.nextafter(nearest, np.float32(-np.inf))
        up = np.nextafter(nearest, np.float32(np.inf))
        floor, ceiling = np.where(nearest > x, down, nearest), np.where(nearest < x, up, nearest)
        if rounding == "rz":
            return np.where(x > 0, floor, ceiling)
        return floor if rounding == "rm" else ceiling

    return narrow


def _to_pair(ins: Decoder) -> Execute:
    """cvt.bf16x2.f32 d, high, low."""
    source = ins.take_type("f32")
    kind = ins.take_type(*_PAIRS)
    half = TYPES[_PAIRS[kind.name]]
    rounding = ins.require("rn", "rz")
    relu = ins.take("relu") is not None
    narrow = _make_narrowing(half, source, rounding)

    def convert(high: Array, low: Array) -> Array:
        if relu:
            high, low = (np.where(x < 0, np.float32(0), x) for x in (high, low))
        return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low).astype(np.uint32)

    return ins.pointwise(convert, kind, source, source)


def _to_tf32(ins: Decoder) -> Execute:
    source = ins.take_type("f32")
    ins.require("tf32")
    rounding = ins.require("rna", "rn")

    def convert(x: Array) -> Array:
        bits = np.ascontiguousarray(x).view(np.uint32)
        tie = np.uint32(0x1000) if rounding == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        rounded = (bits + tie) & np.uint32(0xFFFFE000)
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), np.where(np.isinf(x), bits, rounded))

    return ins.pointwise(convert, TYPES["b32"], source)


# pairs of 8-bit floats


def _float8(ins: Decoder) -> Execute:
    source, result = ins.modifiers.pop(), ins.modifiers.pop()
    ins.require("rn")
    if source in _FLOAT8:
        if result != "f16x2":
            raise PtxError(f"cvt.{result}.{source}")
        return ins.pointwise(lambda x: _from_float8(x, source), TYPES["b32"], TYPES["b16"])
    ins.require("satfinite")
    if source == "f32":
        return ins.pointwise(
            lambda high, low: _pair_of_float8(high, low, result), TYPES["b16"], TYPES["f32"], TYPES["f32"]
        )
    if source != "f16x2":
        raise PtxError(f"cvt.{result}.{source}")

    def halves(x: Array) -> Array:
        high, low = (x >> np.uint32(16)).astype(np.uint16), x.astype(np.uint16)
        return _pair_of_float8(to_float32(high, TYPES["f16"]), to_float32(low, TYPES["f16"]), result)

    return ins.pointwise(halves, TYPES["b16"], TYPES["b32"])


def _pair_of_float8(high: Array, low: Array, name: str) -> Array:
    return (_to_float8(high, name) << np.uint16(8)) | _to_float8(low, name)


def _to_float8(x: Array, name: str) -> Array:
    dtype, largest = _FLOAT8[name]
    clipped = torch.from_numpy(np.clip(x, -largest, largest))
    bits = clipped.to(dtype).view(torch.uint8).numpy().astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7F), bits)


def _from_float8(pair: Array, name: str) -> Array:
    dtype, _ = _FLOAT8[name]
    bytes_low_first = torch.from_numpy(np.ascontiguousarray(pair).view(np.uint8).copy())
    return bytes_low_first.view(dtype).to(torch.float16).numpy().view(np.uint32)
