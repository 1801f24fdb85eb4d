"""Instructions that look across the 32 lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_emulator.control import require_whole_warps
from ptx_emulator.decoder import Decoder, Execute, opcode
from ptx_emulator.frame import Frame
from ptx_emulator.ptx_types import TYPES, Array, PtxError

_LANES = np.arange(32)
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_U32 = TYPES["u32"]
_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _member_check(ins: Decoder, operand: int) -> Callable[[Frame], None]:
    """Make the check that the lanes of the member mask are there, and no others."""
    members = ins.source(operand, _U32)

    def check(frame: Frame) -> None:
        mask = members(frame)
        if mask.size == 1 and mask[0, 0] == 0xFFFFFFFF:
            return require_whole_warps(frame)
        active = frame.active().reshape(-1, 32)
        named = frame.full(mask).reshape(-1, 32)
        present = (active * _BITS).sum(1, dtype=np.uint32)
        if ((named != present[:, None]) & active).any():
            raise PtxError("the member mask does not name the active lanes")
        return None

    return check


@opcode("shfl")
def _shfl(ins: Decoder) -> Execute:
    ins.require("sync")
    mode = ins.require("idx", "bfly", "up", "down")
    kind = ins.take_type("b32")
    ins.expect_operands(5)
    write, write_inside = ins.pair(kind)
    value, lane, clamp = ins.source(1, kind), ins.source(2, _U32), ins.source(3, _U32)
    check = _member_check(ins, 4)

    def execute(frame: Frame) -> None:
        check(frame)
        source, inside = _source_lane(mode, frame, lane(frame), clamp(frame))
        lanes = value(frame)
        if lanes.shape[1] > 1:
            warps = frame.full(lanes).reshape(-1, 32)
            # the same lanes of every warp, as a rule
            warps = warps[:, source[0]] if len(source) == 1 else np.take_along_axis(warps, source, 1)
            lanes = warps.reshape(frame.shape)
        write(frame, lanes)
        if write_inside:
            inside = np.broadcast_to(inside, (frame.num_ctas * frame.num_threads // 32, 32))
            write_inside(frame, np.ascontiguousarray(inside).reshape(frame.shape))

    return execute


def _source_lane(mode: str, frame: Frame, lane: Array, clamp: Array) -> tuple[Array, Array]:
    """The lane that each lane reads, [num_warps or 1, 32], and whether it lies in the segment."""
    offset, bounds = (
        value.astype(np.int64) if value.size == 1 else frame.full(value).reshape(-1, 32).astype(np.int64)
        for value in (lane & 31, clamp)
    )
    segment = (bounds >> 8) & 31
    low = _LANES & segment
    high = low | (bounds & 31 & ~segment)
    if mode == "idx":
        source = low | (offset & ~segment)
    else:
        source = {"bfly": _LANES ^ offset, "up": _LANES - offset, "down": _LANES + offset}[mode]
    inside = source >= high if mode == "up" else source <= high
    return np.where(inside, source, _LANES), inside


@opcode("redux")
def _redux(ins: Decoder) -> Execute:
    ins.require("sync")
    operation = ins.require(*_REDUCTIONS)
    kind = ins.take_type("b32") if operation in ("and", "or", "xor") else ins.take_type("u32", "s32")
    ins.expect_operands(3)
    write, read = ins.destination(0, kind), ins.source(1, kind)
    check = _member_check(ins, 2)

    def execute(frame: Frame) -> None:
        check(frame)
        active = frame.active().reshape(-1, 32)
        if (active.any(1) & ~active.all(1)).any():
            raise PtxError("redux of a part of a warp is not modelled")
        reduced = _REDUCTIONS[operation].reduce(frame.full(read(frame)).reshape(-1, 32), 1).astype(kind.dtype)
        write(frame, np.repeat(reduced, 32).reshape(frame.shape))

    return execute


@opcode("vote")
def _vote(ins: Decoder) -> Execute:
    ins.require("sync")
    mode = ins.require("all", "any", "uni", "ballot")
    kind = ins.take_type("b32" if mode == "ballot" else "pred")
    ins.expect_operands(3)
    write, read = ins.destination(0, kind), ins.source(1, TYPES["pred"])
    check = _member_check(ins, 2)

    def execute(frame: Frame) -> None:
        check(frame)
        active = frame.active().reshape(-1, 32)
        holds = frame.full(read(frame)).reshape(-1, 32)
        write(frame, np.repeat(_count_votes(mode, holds, active), 32).reshape(frame.shape))

    return execute


def _count_votes(mode: str, holds: Array, active: Array) -> Array:
    if mode == "ballot":
        return ((holds & active) * _BITS).sum(1, dtype=np.uint32)
    every, some = (holds | ~active).all(1), (holds & active).any(1)
    return {"all": every, "any": some, "uni": every | ~some}[mode]


@opcode("activemask")
def _activemask(ins: Decoder) -> Execute:
    write = ins.destination(0, ins.take_type("b32"))

    def execute(frame: Frame) -> None:
        present = (frame.active().reshape(-1, 32) * _BITS).sum(1, dtype=np.uint32)
        write(frame, np.repeat(present, 32).reshape(frame.shape))

    return execute


@opcode("elect")
def _elect(ins: Decoder) -> Execute:
    ins.require("sync")
    write, write_elected = ins.pair(_U32)
    check = _member_check(ins, 1)

    def execute(frame: Frame) -> None:
        check(frame)
        leader = frame.active().reshape(-1, 32).argmax(1)
        write(frame, np.repeat(leader.astype(np.uint32), 32).reshape(frame.shape))
        if write_elected:
            write_elected(frame, (leader[:, None] == _LANES).reshape(frame.shape))

    return execute
