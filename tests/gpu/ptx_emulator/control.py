"""Branches, barriers and fences."""

import numpy as np

from ptx_emulator.decoder import Decoder, Execute, opcode
from ptx_emulator.frame import Frame
from ptx_emulator.parser import Symbol
from ptx_emulator.ptx_types import PtxError


@opcode("bra")
def _bra(ins: Decoder) -> Execute:
    ins.take("uni")
    ins.expect_operands(1)
    label = ins.operands[0]
    if not isinstance(label, Symbol) or label.name not in ins.kernel.labels:
        raise PtxError(f"unknown label {label}")
    return _jump(ins.kernel.labels[label.name])


@opcode("ret", "exit")
def _ret(ins: Decoder) -> Execute:
    ins.take("uni")
    return _jump(len(ins.kernel.blocks))


def _jump(target: int) -> Execute:
    def execute(frame: Frame) -> None:
        frame.next_block = target if frame.mask is None else np.where(frame.mask, target, frame.next_block)

    return execute


@opcode("bar", "barrier")
def _bar(ins: Decoder) -> Execute:
    if ins.take("warp"):
        ins.require("sync")
        return _warp_barrier(ins)
    ins.take("cta")
    ins.require("sync")
    ins.take("aligned")
    ins.expect_operands(1)
    if ins.integer(0) != 0:
        raise PtxError("only barrier 0 is modelled")
    return _cta_barrier


def _warp_barrier(ins: Decoder) -> Execute:
    ins.expect_operands(1)
    if ins.integer(0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise PtxError("only a whole warp may meet at bar.warp.sync")
    return lambda frame: require_whole_warps(frame)


def _cta_barrier(frame: Frame) -> None:
    if frame.mask is not None:
        batch = frame.batch
        arrives = frame.active()
        running = batch.block_of[frame.ctas] < batch.end
        missing = arrives.any(1, keepdims=True) & running & ~arrives
        if missing.any():
            row, thread = np.argwhere(missing)[0]
            raise PtxError(f"bar.sync under divergence: {frame.name_lane(row, thread)} is not there")
        frame.batch.synchronise(frame.ctas[arrives.any(1)])
    else:
        frame.batch.synchronise(frame.ctas)


def require_whole_warps(frame: Frame) -> None:
    """Raise unless each warp is active as a whole or not at all."""
    if frame.mask is None:
        return
    warps = frame.active().reshape(-1, 32)
    torn = warps.any(1) & ~warps.all(1)
    if torn.any():
        row, warp = divmod(int(torn.argmax()), frame.num_threads // 32)
        lane = frame.name_lane(row, 32 * warp + int((~warps[torn.argmax()]).argmax()))
        raise PtxError(f"a warp-wide instruction under divergence: {lane} is not there")


@opcode("membar")
def _membar(ins: Decoder) -> Execute:
    ins.require("cta", "gl", "sys")
    return _nothing


@opcode("fence")
def _fence(ins: Decoder) -> Execute:
    if ins.take("proxy"):
        ins.require("async")
        return _nothing if ins.take("global", "shared::cta", "shared::cluster") == "global" else _proxy_fence
    ins.take("sc", "acq_rel", "acquire", "release")
    ins.require("cta", "cluster", "gpu", "sys")
    return _nothing


def _proxy_fence(frame: Frame) -> None:
    if frame.mask is not None:
        raise PtxError("a proxy fence under divergence is not modelled")
    if frame.batch.shared.async_proxy:
        frame.batch.shared.async_proxy.fence(frame.ctas)


@opcode("griddepcontrol")
def _griddepcontrol(ins: Decoder) -> Execute:
    ins.require("wait", "launch_dependents")
    return _nothing


def _nothing(frame: Frame) -> None:
    """Lock step has nothing to order."""
