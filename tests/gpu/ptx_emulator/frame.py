"""The lanes that execute an instruction: their registers and which of them are active."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.ptx_types import Array, PtxError, poison

if TYPE_CHECKING:
    from ptx_emulator.machine import Batch


class _Unwritten:
    """What a register holds before any lane wrote to it."""

    @property
    def dtype(self) -> np.dtype:
        raise PtxError("a register is read that no lane has written")

    def __invert__(self) -> Array:
        return self.dtype  # type: ignore[return-value]


UNWRITTEN: Any = _Unwritten()


class Frame:
    """The registers of some CTAs of a batch: arrays of [num_ctas or 1, num_threads or 1]."""

    def __init__(self, batch: Batch, ctas: Array) -> None:
        """Take the CTAs by their rows in the batch."""
        self.batch = batch
        self.ctas = ctas
        self.num_ctas = len(ctas)
        self.num_threads = batch.num_threads
        self.registers: list[Any] = [UNWRITTEN] * len(batch.program.kernel.register_widths)
        # None where all lanes are active
        self.mask: Array | None = None
        # of add.cc and its like
        self.carry: Array | None = None
        # the block after this one: a number, or an array where lanes part
        self.next_block: Any = 0
        # the instruction in execution
        self.index = 0
        # registers of wgmmas that no wait has covered, as bits of their slots
        self.fragments_in_flight = 0
        self.sums_in_flight = 0
        self.special = batch.special_registers(ctas)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a value that differs between lanes."""
        return self.num_ctas, self.num_threads

    def write(self, slot: int, value: Array) -> None:
        """Write a register of the active lanes."""
        if self.mask is not None:
            old = self.registers[slot]
            # lanes that never write, for example those that a masked load leaves out, may still be read harmlessly:
            # Triton selects another value afterwards
            old = poison(value.dtype) if old is UNWRITTEN else old.view(value.dtype)
            value = np.where(self.mask, value, old)
        self.registers[slot] = value

    def full(self, value: Array) -> Array:
        """Broadcast to all lanes, contiguous."""
        if value.shape == self.shape:
            return np.ascontiguousarray(value)
        return np.ascontiguousarray(np.broadcast_to(value, self.shape))

    def active(self) -> Array:
        """The active lanes, at full shape."""
        if self.mask is None:
            return np.ones(self.shape, bool)
        return np.broadcast_to(self.mask, self.shape)

    def name_lane(self, row: int, thread: int) -> str:
        """Name a lane in an error."""
        return f"thread {thread} of CTA {self.batch.ctas[self.ctas[row]]}"
