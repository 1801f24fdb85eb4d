"""Integer and bit instructions. Arithmetic wraps; the carry of add.cc and its like is kept with the frame."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_emulator.decoder import Decoder, Execute, opcode
from ptx_emulator.floating import PAIRS, arithmetic, float_reader, floating_min_max, floating_unary, to_float32
from ptx_emulator.frame import Frame
from ptx_emulator.parser import Immediate
from ptx_emulator.ptx_types import BOOL, TYPES, Array, PtxError, PtxType

_INTEGERS = tuple(f"{kind}{bits}" for kind in "su" for bits in (16, 32, 64))
_BITS = ("b16", "b32", "b64")
_U32, _B32 = TYPES["u32"], TYPES["b32"]
_FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


def _is_float(ins: Decoder) -> bool:
    return bool(ins.modifiers) and ins.modifiers[-1] in _FLOATS


def _double(kind: PtxType) -> PtxType:
    if kind.width == 8:
        raise PtxError("no type is twice as wide as 64 bits")
    return TYPES[f"{kind.kind}{16 * kind.width}"]


# add, sub and the carry


@opcode("add", "sub")
def _add(ins: Decoder) -> Execute:
    if _is_float(ins):
        return arithmetic(ins, np.add if ins.opcode == "add" else np.subtract)
    carries = ins.take("cc") is not None
    saturates = ins.take("sat") is not None
    kind = ins.take_type(*_INTEGERS)
    if carries:
        return _with_carry(ins, kind, carry_in=False, carry_out=True)
    function = np.add if ins.opcode == "add" else np.subtract
    if saturates:
        if kind.name != "s32":
            raise PtxError(f"{ins.opcode}.sat.{kind.name}")
        return ins.pointwise(lambda x, y: _saturate(function(x.astype(np.int64), y)), kind, kind, kind)
    return ins.pointwise(function, kind, kind, kind)


def _saturate(value: Array) -> Array:
    return value.clip(-(2**31), 2**31 - 1).astype(np.int32)


@opcode("addc", "subc")
def _addc(ins: Decoder) -> Execute:
    carries = ins.take("cc") is not None
    return _with_carry(ins, ins.take_type("u32", "s32"), carry_in=True, carry_out=carries)


def _with_carry(ins: Decoder, kind: PtxType, *, carry_in: bool, carry_out: bool) -> Execute:
    if kind.width != 4:
        raise PtxError(f"a carry of .{kind.name}")
    ins.expect_operands(3)
    sign = 1 if ins.opcode.startswith("add") else -1
    write = ins.destination(0, _U32)
    left, right = ins.source(1, _U32), ins.source(2, _U32)

    def execute(frame: Frame) -> None:
        total = left(frame).astype(np.int64) + sign * right(frame).astype(np.int64)
        if carry_in:
            total = total + sign * _carry(frame)
        _finish_carry(frame, total, carry_out)
        write(frame, total.astype(np.uint32))

    return execute


def _carry(frame: Frame) -> Array:
    if frame.carry is None:
        raise PtxError("the carry is read before it is written")
    return frame.carry


def _finish_carry(frame: Frame, total: Array, carry_out: bool) -> None:
    if carry_out:
        if frame.mask is not None:
            raise PtxError("a carry under divergence is not modelled")
        # of a difference: the borrow
        frame.carry = (total >> 32) & 1


# mul, mad, div, rem


def _product(kind: PtxType, part: str) -> Callable[[Array, Array], Array]:
    if part == "lo":
        return np.multiply
    if kind.width == 8:
        return _high_of_64(kind)
    wide = _double(kind).dtype
    if part == "wide":
        return lambda x, y: x.astype(wide) * y.astype(wide)
    # little endian: the high half is the odd one
    half = kind.dtype
    return lambda x, y: np.ascontiguousarray((x.astype(wide) * y.astype(wide)).view(half)[..., 1::2])


def _high_of_64(kind: PtxType) -> Callable[[Array, Array], Array]:
    def high(x: Array, y: Array) -> Array:
        x, y = np.broadcast_arrays(x, y)
        products = [(int(a) * int(b)) >> 64 for a, b in zip(x.flat, y.flat, strict=True)]
        return np.array(products, kind.dtype).reshape(x.shape)

    return high


@opcode("mul")
def _mul(ins: Decoder) -> Execute:
    if _is_float(ins):
        return arithmetic(ins, np.multiply)
    part = ins.require("lo", "hi", "wide")
    kind = ins.take_type(*_INTEGERS)
    result = _double(kind) if part == "wide" else kind
    return ins.pointwise(_product(kind, part), result, kind, kind)


@opcode("mad")
def _mad(ins: Decoder) -> Execute:
    part = ins.require("lo", "hi", "wide")
    carries = ins.take("cc") is not None
    kind = ins.take_type(*_INTEGERS)
    result = _double(kind) if part == "wide" else kind
    multiply = _product(kind, part)
    if carries:
        return _mad_with_carry(ins, kind, part, carry_in=False, carry_out=True)
    return ins.pointwise(lambda x, y, z: multiply(x, y) + z, result, kind, kind, result)


@opcode("madc")
def _madc(ins: Decoder) -> Execute:
    part = ins.require("lo", "hi")
    carries = ins.take("cc") is not None
    kind = ins.take_type("u32", "s32")
    return _mad_with_carry(ins, kind, part, carry_in=True, carry_out=carries)


def _mad_with_carry(ins: Decoder, kind: PtxType, part: str, *, carry_in: bool, carry_out: bool) -> Execute:
    if kind.width != 4 or part == "wide":
        raise PtxError(f"a carry of mad.{part}.{kind.name}")
    multiply = _product(kind, part)
    write = ins.destination(0, _U32)
    reads = [ins.source(1, kind), ins.source(2, kind), ins.source(3, kind)]

    def execute(frame: Frame) -> None:
        x, y, z = (read(frame) for read in reads)
        total = multiply(x, y).view(np.uint32).astype(np.int64) + z.view(np.uint32)
        if carry_in:
            total = total + _carry(frame)
        _finish_carry(frame, total, carry_out)
        write(frame, total.astype(np.uint32))

    return execute


@opcode("div")
def _div(ins: Decoder) -> Execute:
    if _is_float(ins):
        return arithmetic(ins, np.divide)
    kind = ins.take_type(*_INTEGERS)
    return ins.pointwise(_quotient, kind, kind, kind)


@opcode("rem")
def _rem(ins: Decoder) -> Execute:
    kind = ins.take_type(*_INTEGERS)
    return ins.pointwise(lambda x, y: np.where(y == 0, x, np.fmod(x, np.where(y == 0, 1, y))), kind, kind, kind)


def _quotient(x: Array, y: Array) -> Array:
    """Truncates; all ones of a division by zero, which PTX leaves to the machine."""
    divisor = np.where(y == 0, np.ones_like(y), y)
    quotient = (x - np.fmod(x, divisor)) // divisor
    return np.where(y == 0, np.invert(np.zeros_like(y)), quotient)


@opcode("abs", "neg")
def _abs(ins: Decoder) -> Execute:
    if _is_float(ins):
        return floating_unary(ins)
    kind = ins.take_type("s16", "s32", "s64")
    return ins.pointwise(np.abs if ins.opcode == "abs" else np.negative, kind, kind)


@opcode("dp4a")
def _dp4a(ins: Decoder) -> Execute:
    right = ins.take_type("u32", "s32")
    left = ins.take_type("u32", "s32")
    result = TYPES["s32" if "s32" in (left.name, right.name) else "u32"]

    def dot(x: Array, y: Array, z: Array) -> Array:
        total = z.astype(np.int64)
        for byte in range(4):
            total = total + _byte(x, byte, left) * _byte(y, byte, right)
        return total.astype(result.dtype)

    return ins.pointwise(dot, result, left, right, result)


def _byte(x: Array, byte: int, kind: PtxType) -> Array:
    part = (x.view(np.uint32) >> np.uint32(8 * byte)).astype(np.uint8)
    return part.view(np.int8 if kind.kind == "s" else np.uint8).astype(np.int64)


# logic and shifts

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode("and", "or", "xor")
def _logic(ins: Decoder) -> Execute:
    kind = ins.take_type(*_BITS, "pred")
    return ins.pointwise(_LOGIC[ins.opcode], kind, kind, kind)


@opcode("not")
def _not(ins: Decoder) -> Execute:
    kind = ins.take_type(*_BITS, "pred")
    return ins.pointwise(np.invert, kind, kind)


@opcode("shl")
def _shl(ins: Decoder) -> Execute:
    kind = ins.take_type(*_BITS)
    return ins.pointwise(_shift(np.left_shift, kind), kind, kind, _U32)


@opcode("shr")
def _shr(ins: Decoder) -> Execute:
    kind = ins.take_type(*_BITS, *_INTEGERS)
    return ins.pointwise(_shift(np.right_shift, kind), kind, kind, _U32)


def _shift(function: np.ufunc, kind: PtxType) -> Callable[[Array, Array], Array]:
    bits = 8 * kind.width
    counter = kind.dtype.type

    def shift(x: Array, count: Array) -> Array:
        if count.size == 1 and count[0, 0] < bits:
            return function(x, counter(count[0, 0]))
        shifted = function(x, np.minimum(count, bits - 1).astype(kind.dtype))
        if kind.kind == "s":
            # the sign is all that is left
            return shifted
        return np.where(count >= bits, counter(0), shifted)

    return shift


@opcode("shf")
def _shf(ins: Decoder) -> Execute:
    direction = ins.require("l", "r")
    wraps = ins.require("wrap", "clamp") == "wrap"
    kind = ins.take_type("b32")

    def shift(low: Array, high: Array, count: Array) -> Array:
        count = (count & 31 if wraps else np.minimum(count, 32)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        both = (both << count) >> np.uint64(32) if direction == "l" else both >> count
        return both.astype(np.uint32)

    return ins.pointwise(shift, kind, kind, kind, _U32)


# bit fields


@opcode("bfe")
def _bfe(ins: Decoder) -> Execute:
    kind = ins.take_type("u32", "s32", "u64", "s64")
    last_bit = 8 * kind.width - 1
    unsigned = np.dtype(f"u{kind.width}")

    def extract(x: Array, position: Array, length: Array) -> Array:
        position, length = position & 255, length & 255
        bits = x.view(unsigned)
        field = np.where(position > last_bit, 0, bits >> np.minimum(position, last_bit).astype(unsigned))
        # past the highest bit comes the sign
        sign_at = np.minimum(position + length.astype(np.int64) - 1, last_bit).clip(0).astype(unsigned)
        sign = (bits >> sign_at) & unsigned.type(1) if kind.kind == "s" else np.zeros_like(bits)
        mask = _ones(length, unsigned)
        field = (field.astype(unsigned) & mask) | np.where(
            sign == 1,
            ~_ones(np.minimum(length, np.maximum(last_bit + 1 - position.astype(np.int64), 0)), unsigned),
            unsigned.type(0),
        )
        return np.where(length == 0, unsigned.type(0), field).view(kind.dtype)

    return ins.pointwise(extract, kind, kind, _U32, _U32)


def _ones(count: Array, dtype: np.dtype) -> Array:
    """A mask of the lowest count bits."""
    bits = 8 * dtype.itemsize
    mask = (dtype.type(1) << np.minimum(count, bits - 1).astype(dtype)) - dtype.type(1)
    return np.where(count >= bits, ~dtype.type(0), mask)


@opcode("bfi")
def _bfi(ins: Decoder) -> Execute:
    kind = ins.take_type("b32", "b64")
    bits = 8 * kind.width

    def insert(field: Array, into: Array, position: Array, length: Array) -> Array:
        position, length = position & 255, length & 255
        shift = np.minimum(position, bits - 1).astype(kind.dtype)
        mask = np.where(position >= bits, kind.dtype.type(0), _ones(length, kind.dtype) << shift)
        return (into & ~mask) | ((field << shift) & mask)

    return ins.pointwise(insert, kind, kind, kind, _U32, _U32)


@opcode("prmt")
def _prmt(ins: Decoder) -> Execute:
    kind = ins.take_type("b32")
    ins.expect_operands(4)
    write, selector = ins.destination(0, kind), ins.source(3, kind)
    # a constant selector may leave out an operand, which then need never have been written
    left = ins.source(1, kind) if _may_select(ins, range(0, 4)) else _zero
    right = ins.source(2, kind) if _may_select(ins, range(4, 8)) else _zero
    return lambda frame: write(frame, _permute(left(frame), right(frame), selector(frame)))


def _may_select(ins: Decoder, wanted: range) -> bool:
    operand = ins.operands[3]
    return not isinstance(operand, Immediate) or any(operand.bits >> shift & 7 in wanted for shift in (0, 4, 8, 12))


def _zero(frame: Frame) -> Array:
    return np.zeros((1, 1), np.uint32)


def _permute(x: Array, y: Array, selector: Array) -> Array:
    result = np.zeros((1, 1), np.uint32)
    both = (y.astype(np.uint64) << np.uint64(32)) | x
    for byte in range(4):
        select = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        chosen = ((both >> ((select & np.uint32(7)) * 8).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        # the highest bit of the selector spreads the sign over the byte
        chosen = np.where(select & 8, (chosen >> np.uint32(7)) * np.uint32(255), chosen)
        result = result | (chosen << np.uint32(8 * byte))
    return result


@opcode("lop3")
def _lop3(ins: Decoder) -> Execute:
    kind = ins.take_type("b32")
    ins.expect_operands(5)
    table = ins.integer(4)
    write = ins.destination(0, kind)
    reads = [ins.source(index, kind) for index in (1, 2, 3)]

    def execute(frame: Frame) -> None:
        a, b, c = (read(frame) for read in reads)
        result = np.zeros((1, 1), np.uint32)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        write(frame, result)

    return execute


@opcode("popc")
def _popc(ins: Decoder) -> Execute:
    kind = ins.take_type("b32", "b64")
    return ins.pointwise(lambda x: np.bitwise_count(x).astype(np.uint32), _U32, kind)


@opcode("clz")
def _clz(ins: Decoder) -> Execute:
    kind = ins.take_type("b32", "b64")

    def count(x: Array) -> Array:
        for shift in (1, 2, 4, 8, 16, 32)[: 5 if kind.width == 4 else 6]:
            x = x | (x >> kind.dtype.type(shift))
        return (8 * kind.width - np.bitwise_count(x)).astype(np.uint32)

    return ins.pointwise(count, _U32, kind)


@opcode("brev")
def _brev(ins: Decoder) -> Execute:
    kind = ins.take_type("b32")

    def reverse(x: Array) -> Array:
        for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
            low, by = np.uint32(mask), np.uint32(shift)
            x = ((x >> by) & low) | ((x & low) << by)
        return x

    return ins.pointwise(reverse, kind, kind)


# compare and select

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


@opcode("setp")
def _setp(ins: Decoder) -> Execute:
    name = ins.require(*_COMPARE, *_UNSIGNED_NAMES, *_UNORDERED, "num", "nan")
    combine = ins.take(*_LOGIC)
    if ins.modifiers and ins.modifiers[-1] in PAIRS:
        return _compare_halves(ins, name)
    if _is_float(ins):
        flushes = ins.take("ftz") is not None
        kind = ins.take_type("f16", "bf16", "f32", "f64")
        compare = _float_comparison(name)
        left, right = float_reader(ins, 1, kind, flushes), float_reader(ins, 2, kind, flushes)
    else:
        kind = ins.take_type(*_BITS, *_INTEGERS)
        if name not in _COMPARE and (name not in _UNSIGNED_NAMES or kind.kind != "u"):
            raise PtxError(f"setp.{name} of .{kind.name}")
        compare = _COMPARE[_UNSIGNED_NAMES.get(name, name)]
        left, right = ins.source(1, kind), ins.source(2, kind)
    write, write_inverse = ins.pair(TYPES["pred"])
    ins.expect_operands(4 if combine else 3)
    other = ins.source(3, TYPES["pred"]) if combine else None

    def execute(frame: Frame) -> None:
        result = compare(left(frame), right(frame))
        inverse = ~result if write_inverse else result
        if other is not None and combine is not None:
            result, inverse = (_LOGIC[combine](value, other(frame)) for value in (result, inverse))
        write(frame, result)
        if write_inverse:
            write_inverse(frame, inverse)

    return execute


def _compare_halves(ins: Decoder, name: str) -> Execute:
    """setp of a pair: p|q are the results of the low and the high halves."""
    kind = ins.take_type(*PAIRS)
    half, compare = TYPES[PAIRS[kind.name]], _float_comparison(name)
    left, right = ins.source(1, kind), ins.source(2, kind)
    write_low, write_high = ins.pair(TYPES["pred"])
    ins.expect_operands(3)
    if write_high is None:
        raise PtxError(f"setp of .{kind.name} without a second predicate")

    def execute(frame: Frame) -> None:
        pairs = left(frame), right(frame)
        write_low(frame, compare(*(to_float32(x.astype(np.uint16), half) for x in pairs)))
        write_high(frame, compare(*(to_float32((x >> np.uint32(16)).astype(np.uint16), half) for x in pairs)))

    return execute


def _float_comparison(name: str) -> Callable[[Array, Array], Array]:
    if name == "num":
        return lambda x, y: ~(np.isnan(x) | np.isnan(y))
    if name == "nan":
        return lambda x, y: np.isnan(x) | np.isnan(y)
    if name in _UNORDERED:
        compare = _COMPARE[_UNORDERED[name]]
        return lambda x, y: compare(x, y) | np.isnan(x) | np.isnan(y)
    if name == "ne":
        # unlike numpy's and C's, the ordered comparison of NaN is false
        return lambda x, y: (x < y) | (x > y)
    if name not in _COMPARE:
        raise PtxError(f"setp.{name} of floats")
    return _COMPARE[name]


@opcode("selp")
def _selp(ins: Decoder) -> Execute:
    kind = ins.take_type(*_BITS, *_INTEGERS, "f16", "bf16", "f32", "f64")
    if kind.width == 0:
        raise PtxError("selp of predicates")
    bits = TYPES[f"b{8 * kind.width}"]

    def select(x: Array, y: Array, where: Array) -> Array:
        if where.size == 1:
            return x if where[0, 0] else y
        return np.where(where, x, y)

    return ins.pointwise(select, bits, bits, bits, PtxType("pred", "pred", 0, BOOL))


@opcode("min", "max")
def _min(ins: Decoder) -> Execute:
    if _is_float(ins):
        return floating_min_max(ins)
    kind = ins.take_type(*_INTEGERS)
    return ins.pointwise(np.minimum if ins.opcode == "min" else np.maximum, kind, kind, kind)
