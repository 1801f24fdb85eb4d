"""ld, st, mov, cvta, cp.async, atomics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_emulator.control import require_whole_warps
from ptx_emulator.decoder import Decoder, Execute, Read, opcode
from ptx_emulator.floating import add_packed, from_float32, to_float32
from ptx_emulator.frame import Frame
from ptx_emulator.memory import Copy, join, split, spread
from ptx_emulator.parser import Address, Symbol, Vector
from ptx_emulator.ptx_types import TYPES, UNSIGNED, WIDE, Array, PtxError, PtxType, constant

_SHARED = ("shared", "shared::cta")
_SPACES = ("global", *_SHARED, "local", "param")


def _take_order(ins: Decoder) -> None:
    """Take off the memory order and its scope: lanes run in lock step, CTAs of a batch too."""
    ins.take("weak", "relaxed", "acquire", "release", "acq_rel", "volatile")
    ins.take("cta", "cluster", "gpu", "sys")


@opcode("ld")
def _ld(ins: Decoder) -> Execute:
    space = ins.require(*_SPACES)
    _take_order(ins)
    ins.take_cache_hints()
    count = ins.take_vector_length()
    kind = ins.take_type()
    if space == "param":
        return _load_param(ins, kind, count)
    # a cache policy may come as a third operand
    ins.expect_operands(2, 3)
    targets = ins.elements(0)
    if len(targets) != count:
        raise PtxError(f"{len(targets)} destinations of {count} elements")
    writes = [ins.destination(target, kind, wider=True) for target in targets]
    address = ins.address(1)
    width = kind.width * count
    if width not in WIDE:
        raise PtxError(f"a load of {width} bytes")

    def execute(frame: Frame) -> None:
        where = address(frame)
        if space == "global":
            values = spread(frame, frame.batch.memory.load(frame, where, width), where.shape)
        elif space == "local":
            values = spread(frame, frame.batch.local.load(frame, where, width), frame.shape)
        else:
            values = spread(frame, frame.batch.shared.load(frame, where, width).reshape(_flat(frame)), frame.shape)
        for write, part in zip(writes, split(values, kind.width, count), strict=True):
            write(frame, part.view(kind.dtype))

    return execute


def _flat(frame: Frame) -> tuple[int, ...]:
    return frame.shape if frame.mask is None else (-1,)


def _load_param(ins: Decoder, kind: PtxType, count: int) -> Execute:
    ins.expect_operands(2)
    operand = ins.operands[1]
    if count != 1 or not isinstance(operand, Address) or not isinstance(operand.base, Symbol) or operand.offset:
        raise PtxError("only a whole scalar parameter can be loaded")
    name = operand.base.name
    if dict(ins.kernel.params).get(name) != kind.width:
        raise PtxError(f"no parameter {name} of {8 * kind.width} bits")
    write = ins.destination(0, kind, wider=True)
    return lambda frame: write(frame, constant(frame.batch.params[name], kind.dtype))


@opcode("st")
def _st(ins: Decoder) -> Execute:
    space = ins.require("global", *_SHARED, "local")
    _take_order(ins)
    ins.take_cache_hints()
    count = ins.take_vector_length()
    kind = ins.take_type()
    ins.expect_operands(2, 3)
    sources = ins.elements(1)
    if len(sources) != count or kind.width * count not in WIDE:
        raise PtxError(f"{len(sources)} sources of {count} elements")
    bits = TYPES[f"b{8 * kind.width}"]
    reads = [ins.source(source, bits, wider=True) for source in sources]
    address = ins.address(0)

    def execute(frame: Frame) -> None:
        values = join(np.broadcast_arrays(*(read(frame) for read in reads)))
        if space == "global":
            frame.batch.memory.store(frame, address(frame), values)
        elif space == "local":
            frame.batch.local.store(frame, address(frame), values)
        else:
            frame.batch.shared.store(frame, address(frame), values)

    return execute


@opcode("mov")
def _mov(ins: Decoder) -> Execute:
    kind = ins.take_type()
    if kind.kind == "pred":
        return ins.pointwise(lambda x: x, kind, kind)
    bits = TYPES[f"b{8 * kind.width}"]
    if isinstance(ins.operands[0], Vector):
        return _unpack(ins, bits)
    if isinstance(ins.operands[1], Vector):
        return _pack(ins, bits)
    return ins.pointwise(lambda x: x, bits, bits)


def _unpack(ins: Decoder, kind: PtxType) -> Execute:
    targets = ins.elements(0)
    part = TYPES[f"b{8 * kind.width // len(targets)}"]
    writes = [ins.destination(target, part) for target in targets]
    read = ins.source(1, kind)

    def execute(frame: Frame) -> None:
        for write, value in zip(writes, split(read(frame), part.width, len(targets)), strict=True):
            write(frame, value)

    return execute


def _pack(ins: Decoder, kind: PtxType) -> Execute:
    sources = ins.elements(1)
    part = TYPES[f"b{8 * kind.width // len(sources)}"]
    reads = [ins.source(source, part) for source in sources]
    write = ins.destination(0, kind)
    return lambda frame: write(frame, join(np.broadcast_arrays(*(read(frame) for read in reads))))


@opcode("cvta")
def _cvta(ins: Decoder) -> Execute:
    # generic addresses of global memory are the same; ld, st and atom know no generic address of another space
    ins.take("to")
    ins.require("global", "local")
    kind = ins.take_type("u64")
    return ins.pointwise(lambda x: x, kind, kind)


@opcode("prefetch")
def _prefetch(ins: Decoder) -> Execute:
    ins.take("global")
    ins.require("L1", "L2")
    return lambda frame: None


@opcode("createpolicy")
def _createpolicy(ins: Decoder) -> Execute:
    ins.require("fractional")
    ins.require("L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::evict_unchanged")
    ins.take("L2::evict_unchanged")
    kind = ins.take_type("b64")
    write = ins.destination(0, kind)
    return lambda frame: write(frame, constant(0, kind.dtype))


# cp.async


@opcode("cp")
def _cp(ins: Decoder) -> Execute:
    ins.require("async")
    if ins.take("commit_group"):
        return _with_whole_ctas(lambda frame: frame.batch.shared.commit(frame.ctas))
    if ins.take("wait_group"):
        num_pending = ins.integer(0)
        return _with_whole_ctas(lambda frame: frame.batch.shared.wait(frame, num_pending))
    if ins.take("wait_all"):
        return _with_whole_ctas(_wait_all)
    return _copy_async(ins)


def _with_whole_ctas(action: Execute) -> Execute:
    """Groups are kept per CTA, not per thread."""

    def execute(frame: Frame) -> None:
        if frame.mask is not None:
            raise PtxError("a cp.async group under divergence is not modelled")
        action(frame)

    return execute


def _wait_all(frame: Frame) -> None:
    frame.batch.shared.commit(frame.ctas)
    frame.batch.shared.wait(frame, 0)


def _copy_async(ins: Decoder) -> Execute:
    ins.require("ca", "cg")
    ins.require("shared", "shared::cta")
    ins.require("global")
    ins.take_cache_hints()
    ins.expect_operands(3, 4)
    width = ins.integer(2)
    if width not in (4, 8, 16):
        raise PtxError(f"cp.async of {width} bytes")
    target, source = ins.address(0), ins.address(1)
    # the bytes to read; the rest of the width is filled with zeros
    size = ins.source(3, TYPES["u32"]) if len(ins.operands) == 4 else None

    def execute(frame: Frame) -> None:
        sizes = constant(width, UNSIGNED[4]) if size is None else size(frame)
        if not np.isin(sizes, (0, width)).all():
            raise PtxError("cp.async of a part of its width is not modelled")
        _start_copy(frame, target(frame), source(frame), sizes == width, width)

    return execute


def _start_copy(frame: Frame, target: Array, source: Array, reads: Array, width: int) -> None:
    outer_mask, active = frame.mask, frame.active()
    values = np.zeros(frame.shape, WIDE[width])
    frame.mask = np.broadcast_to(reads, frame.shape) & active
    if frame.mask.any():
        values[frame.mask] = frame.batch.memory.load(frame, source, width)
    frame.mask = active
    shared = frame.batch.shared
    offset, warp = shared.locate(frame, target, width, "cp.async")
    # it may write from now on, although it lands at its wait
    shared.note_write(frame, offset, warp, width, "cp.async")
    frame.mask = outer_mask
    ends = np.cumsum(active.sum(1))[:-1]
    pieces = zip(np.split(offset, ends), np.split(warp, ends), np.split(values[active], ends), strict=True)
    for cta, piece in zip(frame.ctas, pieces, strict=True):
        shared.copy_async(int(cta), Copy(*piece))


# atomics

_ATOMIC_OPS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    # wraps to 0 past the limit, as decrement wraps to the limit below 0
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype),
}


@opcode("atom", "red")
def _atom(ins: Decoder) -> Execute:
    is_shared = ins.take("global", *_SHARED) in _SHARED
    _take_order(ins)
    operation = ins.require(*_ATOMIC_OPS, "cas")
    ins.take("noftz")
    kind = ins.take_type()
    if kind.kind == "f" and operation != "add":
        raise PtxError(f"atom.{operation} of .{kind.name}")
    first = 0 if ins.opcode == "red" else 1
    bits = TYPES[f"b{8 * kind.width}"]
    write = ins.destination(0, bits) if first else None
    address = ins.address(first)
    reads = [ins.source(index, bits) for index in range(first + 1, len(ins.operands))]
    if len(reads) != (2 if operation == "cas" else 1):
        raise PtxError(f"atom.{operation} with {len(ins.operands)} operands")
    update = _make_update(operation, kind)

    def execute(frame: Frame) -> None:
        old = _update_in_order(frame, address(frame), [read(frame) for read in reads], update, is_shared)
        if write is not None:
            write(frame, old)

    return execute


def _make_update(operation: str, kind: PtxType) -> Callable[..., Array]:
    """The new bits from the old ones and the operands."""
    if operation == "cas":
        return _compare_and_swap
    if kind.name in ("f16", "bf16"):
        return lambda old, x: from_float32(to_float32(old, kind) + to_float32(x, kind), kind)
    if kind.name in ("f16x2", "bf16x2"):
        return add_packed(kind)
    return _update_as(_ATOMIC_OPS[operation], kind)


def _compare_and_swap(old: Array, compare: Array, new: Array) -> Array:
    return np.where(old == compare, new, old)


def _update_as(function: Callable[[Array, Array], Array], kind: PtxType) -> Callable[..., Array]:
    return lambda old, x: function(old.view(kind.dtype), x.view(kind.dtype)).view(old.dtype)


def _update_in_order(
    frame: Frame, address: Array, operands: list[Array], update: Callable[..., Array], is_shared: bool
) -> Array:
    width = operands[0].dtype.itemsize
    active = frame.active()
    lanes = np.argwhere(active)
    address = np.broadcast_to(address, frame.shape)
    operands = [np.broadcast_to(operand, frame.shape) for operand in operands]
    if is_shared:
        elements = frame.batch.shared.data.view(UNSIGNED[width])
        indices = frame.batch.shared.locate_atomic(frame, address, width) // width
    old = np.zeros(frame.shape, UNSIGNED[width])
    for position, (row, thread) in enumerate(lanes):
        if is_shared:
            index = int(indices[position])
        else:
            elements, index = frame.batch.memory.element(frame, int(address[row, thread]), row, thread, width)
        before = elements[index : index + 1].copy()
        old[row, thread] = before[0]
        elements[index] = update(before, *(operand[row, thread : thread + 1] for operand in operands))[0]
    return old


# matrices of 8 x 8 16-bit elements: lane l of a warp holds elements 2 (l % 4) and the next of row l / 4


def _matrix_modifiers(ins: Decoder) -> tuple[int, bool]:
    ins.require("sync")
    ins.require("aligned")
    ins.require("m8n8")
    count = int(ins.require("x1", "x2", "x4")[1:])
    transposed = ins.take("trans") is not None
    ins.require("shared", "shared::cta")
    ins.take_type("b16")
    return count, transposed


def _row_words(frame: Frame, address: Array, matrix: int) -> Array:
    """The address of each lane's word: lanes 8 matrix to 8 matrix + 7 give those of the rows."""
    rows = frame.full(address).reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
    if (rows[np.repeat(frame.active().reshape(-1, 32)[:, :1], 8, 1)] % 16).any():
        raise PtxError("a row of a matrix is not aligned to 16 bytes")
    return (np.repeat(rows, 4, 1) + np.tile(4 * np.arange(4), 8)).reshape(frame.shape)


def _transpose(words: Array) -> Array:
    """Transpose the matrices of all warps."""
    matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.uint32).reshape(words.shape)


@opcode("ldmatrix")
def _ldmatrix(ins: Decoder) -> Execute:
    count, transposed = _matrix_modifiers(ins)
    writes = [ins.destination(target, TYPES["b32"]) for target in ins.elements(0)]
    if len(writes) != count:
        raise PtxError(f"{len(writes)} destinations of {count} matrices")
    address = ins.address(1)

    def execute(frame: Frame) -> None:
        require_whole_warps(frame)
        where = address(frame)
        for matrix, write in enumerate(writes):
            words = frame.batch.shared.load(frame, _row_words(frame, where, matrix), 4, "ldmatrix")
            words = spread(frame, words.reshape(_flat(frame)), frame.shape)
            write(frame, _transpose(words) if transposed else words)

    return execute


@opcode("stmatrix")
def _stmatrix(ins: Decoder) -> Execute:
    count, transposed = _matrix_modifiers(ins)
    reads: list[Read] = [ins.source(source, TYPES["b32"]) for source in ins.elements(1)]
    if len(reads) != count:
        raise PtxError(f"{len(reads)} sources of {count} matrices")
    address = ins.address(0)

    def execute(frame: Frame) -> None:
        require_whole_warps(frame)
        where = address(frame)
        for matrix, read in enumerate(reads):
            words = frame.full(read(frame))
            words = _transpose(words) if transposed else words
            frame.batch.shared.store(frame, _row_words(frame, where, matrix), words, "stmatrix")

    return execute
