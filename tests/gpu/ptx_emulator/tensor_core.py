"""mma.sync and wgmma.

Products are exact. Integer sums are exact; float sums are taken in float64 and rounded once, where the device sums in
an order and with a width of its own. wgmma is computed at once; async_proxy.py watches its operands and sums until a
wait covers it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx_emulator.async_proxy import AsyncProxy, Wgmma
from ptx_emulator.control import require_whole_warps
from ptx_emulator.decoder import SHARED_BASE, Decoder, Execute, Read, Write, opcode
from ptx_emulator.floating import to_float32
from ptx_emulator.frame import Frame
from ptx_emulator.parser import Operand, Register, Vector
from ptx_emulator.ptx_types import TYPES, Array, PtxError


class _Element(NamedTuple):
    """The type of the elements of a factor."""

    name: str
    dtype: np.dtype
    widen: Callable[[Array], Array]

    @property
    def size(self) -> int:
        return self.dtype.itemsize


def _widen_tf32(bits: Array) -> Array:
    # the lower bits are not looked at
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


_ELEMENTS = {
    "s8": _Element("s8", np.dtype(np.int8), lambda x: x.astype(np.float64)),
    "u8": _Element("u8", np.dtype(np.uint8), lambda x: x.astype(np.float64)),
    "f16": _Element("f16", np.dtype(np.uint16), lambda x: to_float32(x, TYPES["f16"]).astype(np.float64)),
    "bf16": _Element("bf16", np.dtype(np.uint16), lambda x: to_float32(x, TYPES["bf16"]).astype(np.float64)),
    "tf32": _Element("tf32", np.dtype(np.uint32), _widen_tf32),
}
_B32 = TYPES["b32"]


def _take_factors(ins: Decoder) -> tuple[_Element, _Element]:
    names = ins.modifiers[-2:]
    del ins.modifiers[-2:]
    if len(names) != 2 or not all(name in _ELEMENTS for name in names):
        raise PtxError(f"unknown factors {names}")
    left, right = _ELEMENTS[names[0]], _ELEMENTS[names[1]]
    if left != right and not {left.name, right.name} <= {"s8", "u8"}:
        raise PtxError(f"factors {names}")
    return left, right


def _elements_of(words: Array, element: _Element) -> Array:
    """Split 32-bit registers [..., 32] into their elements [..., 32, 4 / size]."""
    return element.widen(np.ascontiguousarray(words).view(element.dtype)).reshape(*words.shape, 4 // element.size)


def _accumulate(product: Array, addend: Array, is_integer: bool, saturates: bool) -> Array:
    """Add the product, float64, to the accumulator, bits."""
    if not is_integer:
        return (product + addend.view(np.float32)).astype(np.float32)
    total = product.astype(np.int64) + addend.view(np.int32)
    if saturates:
        total = total.clip(-(2**31), 2**31 - 1)
    return total.astype(np.int32)


# mma.sync.m16n8: group = lane / 4 is a row of A and a column of B, lane % 4 a run of elements along k


@opcode("mma")
def _mma(ins: Decoder) -> Execute:
    ins.require("sync")
    ins.require("aligned")
    accumulator = ins.take_type("f32", "s32")
    left, right = _take_factors(ins)
    ins.take_type(accumulator.name)
    depth = 32 // left.size
    shape = ins.require(f"m16n8k{depth}", f"m16n8k{depth // 2}")
    depth = int(shape.split("k")[1])
    ins.require("row")
    ins.require("col")
    saturates = ins.take("satfinite") is not None
    is_integer = accumulator.name == "s32"
    if is_integer != (left.name in ("s8", "u8")):
        raise PtxError(f"factors {left.name} with {accumulator.name}")
    writes = [ins.destination(target, _B32) for target in ins.elements(0)]
    fragments = [[ins.source(part, _B32) for part in ins.elements(index)] for index in (1, 2, 3)]
    runs = depth * left.size // 16
    if [len(writes), *map(len, fragments)] != [4, 2 * runs, runs, 4]:
        raise PtxError(f"fragments of the wrong length for {shape}")

    def execute(frame: Frame) -> None:
        require_whole_warps(frame)
        a, b, c = ([_warps(frame, read) for read in fragment] for fragment in fragments)
        product = _gather_rows(a, left, depth) @ _gather_columns(b, right, depth)
        for register, write in enumerate(writes):
            rows, columns = _LANE // 4 + 8 * (register // 2), _LANE % 4 * 2 + register % 2
            result = _accumulate(product[:, rows, columns], c[register], is_integer, saturates)
            write(frame, result.reshape(frame.shape))

    return execute


_LANE = np.arange(32)


def _warps(frame: Frame, read: Read) -> Array:
    return frame.full(read(frame)).reshape(-1, 32)


def _gather_rows(registers: list[Array], element: _Element, depth: int) -> Array:
    """A [warp, 16, depth]: registers alternate between rows below and from 8 on, then move on along k."""
    matrix = np.zeros((len(registers[0]), 16, depth))
    run = 4 // element.size
    for register, words in enumerate(registers):
        parts = _elements_of(words, element)
        for part in range(run):
            column = _LANE % 4 * run + part + 4 * run * (register // 2)
            matrix[:, _LANE // 4 + 8 * (register % 2), column] = parts[..., part]
    return matrix


def _gather_columns(registers: list[Array], element: _Element, depth: int) -> Array:
    """B [warp, depth, 8]."""
    matrix = np.zeros((len(registers[0]), depth, 8))
    run = 4 // element.size
    for register, words in enumerate(registers):
        parts = _elements_of(words, element)
        for part in range(run):
            matrix[:, _LANE % 4 * run + part + 4 * run * register, _LANE // 4] = parts[..., part]
    return matrix


# wgmma: four warps, A from registers or shared memory, B from shared memory

_THREAD = np.arange(128)
# layout field of a descriptor -> bytes of a row of the swizzle pattern, and the address bits that are exchanged
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


class _Factors(NamedTuple):
    """What a wgmma multiplies."""

    left: _Element
    right: _Element
    num_columns: int
    depth: int
    left_transposed: bool
    right_transposed: bool


@opcode("wgmma")
def _wgmma(ins: Decoder) -> Execute:
    action = ins.require("mma_async", "fence", "commit_group", "wait_group")
    ins.require("sync")
    ins.require("aligned")
    if action == "fence":
        return require_whole_warps
    if action == "commit_group":
        return _with_warpgroups(lambda frame: _async_proxy(frame).commit(frame.ctas))
    if action == "wait_group":
        num_pending = ins.integer(0)
        return _with_warpgroups(lambda frame: frame.batch.shared.wait_for_wgmma(frame, num_pending))
    return _with_warpgroups(_wgmma_product(ins))


def _with_warpgroups(action: Execute) -> Execute:
    """All warps of a CTA take part: groups are kept per CTA."""

    def execute(frame: Frame) -> None:
        if frame.num_threads % 128:
            raise PtxError("wgmma outside of a warpgroup")
        if frame.mask is not None:
            raise PtxError("wgmma under divergence")
        action(frame)

    return execute


def _async_proxy(frame: Frame) -> AsyncProxy:
    proxy = frame.batch.shared.async_proxy
    assert proxy is not None
    return proxy


def _wgmma_product(ins: Decoder) -> Execute:
    left, right = _take_factors(ins)
    accumulator = ins.take_type("f32", "s32")
    is_integer = accumulator.name == "s32"
    if is_integer != (left.name in ("s8", "u8")):
        raise PtxError(f"factors {left.name} with {accumulator.name}")
    saturates = ins.take("satfinite") is not None
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", ins.modifiers.pop())
    if shape is None or int(shape[2]) != 32 // left.size:
        raise PtxError("unknown shape")
    scale = ins.source(3, TYPES["pred"])
    factors = _Factors(left, right, int(shape[1]), int(shape[2]), *_take_scales(ins, is_integer))
    writes = [ins.destination(target, _B32) for target in ins.elements(0)]
    sums = [ins.source(target, _B32) for target in ins.elements(0)]
    if len(writes) != factors.num_columns // 2:
        raise PtxError(f"{len(writes)} accumulators of {factors.num_columns} columns")
    ins.sums |= _slots(ins.operands[0])
    of_sums, of_fragments = (sum(1 << slot for slot in _slots(ins.operands[index])) for index in (0, 1))
    read_left, read_right = _make_left_reader(ins, factors), ins.source(2, TYPES["b64"])

    def execute(frame: Frame) -> None:
        right = frame.full(read_right(frame)).reshape(-1, 128)[:, 0]
        product, reads = _multiply(frame, factors, read_left(frame), right)
        keeps = frame.full(scale(frame)).reshape(-1, 128)
        _write_sums(frame, product, keeps, list(zip(writes, sums, strict=True)), is_integer, saturates)
        for cta, of_cta in zip(frame.ctas, reads.reshape(frame.num_ctas, -1), strict=True):
            _async_proxy(frame).start(int(cta), Wgmma(of_cta, of_fragments, of_sums))
        _async_proxy(frame).tell_registers(frame)

    return execute


def _slots(operand: Operand) -> set[int]:
    """The registers of a vector; a descriptor is read at once."""
    elements = operand.elements if isinstance(operand, Vector) else ()
    return {element.slot for element in elements if isinstance(element, Register)}


def _take_scales(ins: Decoder, is_integer: bool) -> tuple[bool, bool]:
    """Check the signs of A and B, which must be plus; return which of them are transposed."""
    immediates = [ins.integer(index) for index in range(4, len(ins.operands))]
    if is_integer:
        if immediates:
            raise PtxError("integer wgmma takes no scales")
        return False, False
    if len(immediates) < 2 or immediates[:2] != [1, 1]:
        raise PtxError("a negated factor")
    transposed = immediates[2:]
    if isinstance(ins.operands[1], Vector):
        return False, transposed == [1]
    return transposed[:1] == [1], transposed[1:] == [1]


def _make_left_reader(ins: Decoder, factors: _Factors) -> Callable[[Frame], list[Array]]:
    """A's registers, or its descriptor alone."""
    if isinstance(ins.operands[1], Vector):
        reads = [ins.source(part, _B32) for part in ins.elements(1)]
        if len(reads) != 4:
            raise PtxError("A in other than four registers")
        return lambda frame: [frame.full(read(frame)).reshape(-1, 128) for read in reads]
    read = ins.source(1, TYPES["b64"])
    return lambda frame: [frame.full(read(frame)).reshape(-1, 128)[:, :1]]


def _multiply(frame: Frame, factors: _Factors, left: list[Array], right: Array) -> tuple[Array, Array]:
    """The products [warpgroup, 64, num_columns], and the bytes that they read, warpgroup after warpgroup."""
    groups_per_cta = frame.num_threads // 128
    products, reads = [], []
    for group in range(len(right)):
        cta = int(frame.ctas[group // groups_per_cta])
        shape = factors.num_columns, factors.depth
        b, read = _read_tile(frame, cta, int(right[group]), shape, factors.right, factors.right_transposed)
        reads.append(read)
        if len(left) == 1:
            shape = 64, factors.depth
            a, read = _read_tile(frame, cta, int(left[0][group, 0]), shape, factors.left, factors.left_transposed)
            reads.append(read)
        else:
            a = _gather_group_rows([words[group] for words in left], factors)
        products.append(a @ b.T)
    return np.stack(products), np.concatenate(reads)


def _gather_group_rows(registers: list[Array], factors: _Factors) -> Array:
    """A [64, depth] of registers: each warp holds 16 rows as mma.sync does."""
    rows = _gather_rows([words.reshape(4, 32) for words in registers], factors.left, factors.depth)
    return rows.reshape(64, factors.depth)


def _read_tile(
    frame: Frame, cta: int, descriptor: int, shape: tuple[int, int], element: _Element, is_transposed: bool
) -> tuple[Array, Array]:
    """Read the [rows, depth] that a descriptor describes; return it, and which bytes of the batch these are."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise PtxError("wgmma with a base offset")
    if descriptor >> 62 not in _SWIZZLES:
        raise PtxError("wgmma without a swizzle")
    span, exchanged = _SWIZZLES[descriptor >> 62]
    row, k = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    if is_transposed:
        per_span = span // element.size
        address = row // per_span * leading + k // 8 * stride + k % 8 * span + row % per_span * element.size
    else:
        address = row // 8 * stride + row % 8 * span + k * element.size
    address = start + address
    address ^= ((address >> 7) & exchanged) << 4
    return _load_tile(frame, cta, address - SHARED_BASE, element)


def _load_tile(frame: Frame, cta: int, offset: Array, element: _Element) -> tuple[Array, Array]:
    shared = frame.batch.shared
    if (offset < 0).any() or (offset + element.size > shared.num_bytes).any():
        raise PtxError(f"a wgmma operand outside of the {shared.num_bytes} bytes of shared memory")
    offset = offset + cta * shared.stride
    # read by all warps of the group: by none of them alone
    shared.note_read(frame, offset.reshape(-1), np.full(offset.size, 254, np.uint32), element.size, "wgmma")
    reads = (offset.reshape(-1, 1) + np.arange(element.size)).reshape(-1)
    _async_proxy(frame).note_read(frame, reads)
    return element.widen(shared.data.view(element.dtype)[offset // element.size]), reads


def _write_sums(
    frame: Frame,
    product: Array,
    keeps: Array,
    registers: list[tuple[Write, Read]],
    is_integer: bool,
    saturates: bool,
) -> None:
    """Add to the accumulators, or replace them where the scale is 0."""
    row = 16 * (_THREAD // 32) + _THREAD % 32 // 4
    for index, (write, read) in enumerate(registers):
        rows, columns = row + 8 * (index // 2 % 2), 8 * (index // 4) + _THREAD % 4 * 2 + index % 2
        addend = np.zeros((len(product), 128), np.uint32)
        # accumulators that are replaced need never have been written
        if keeps.any():
            addend = np.where(keeps, frame.full(read(frame)).reshape(-1, 128), addend)
        result = _accumulate(product[:, rows, columns], addend, is_integer, saturates)
        write(frame, result.reshape(frame.shape))
