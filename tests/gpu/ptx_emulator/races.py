"""Races through global memory: a byte that two warps touch, one of them writing, and nothing in between orders them.

Within a CTA a barrier orders; between the CTAs of a launch nothing does. Atomics are not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx_emulator.frame import Frame
from ptx_emulator.ptx_types import Array

# a key is who touched a byte last: 1 + the CTA in the high half, then the barrier interval, then 1 + the warp
_CTA_SHIFT, _INTERVAL_SHIFT = 32, 8
_WARP_MASK = np.uint64(0xFF)
_MANY_CTAS = np.uint64(0xFFFFFFFF << _CTA_SHIFT)

# larger buffers, such as logits, are looked at from their first write on
MOST_BYTES = 1 << 20


class _Shadow(NamedTuple):
    writer: Array
    reader: Array


class GlobalRaces:
    """What is known of the bytes of the buffers of one launch."""

    def __init__(self, sizes: list[int], races: Counter[str]) -> None:
        """Take the bytes of each buffer, and where to report."""
        self.sizes = sizes
        self.races = races
        self.shadows: dict[int, _Shadow] = {}

    def _shadow(self, buffer: int, is_write: bool) -> _Shadow | None:
        if buffer not in self.shadows and (is_write or self.sizes[buffer] <= MOST_BYTES):
            self.shadows[buffer] = _Shadow(*np.zeros((2, self.sizes[buffer]), np.uint64))
        return self.shadows.get(buffer)

    def looks_at(self, buffer: int, note: Callable[..., None]) -> bool:
        """Whether an access of a buffer is to be noted."""
        return note == self.note_write or self._shadow(buffer, is_write=False) is not None

    def note_read(self, frame: Frame, buffer: int, offset: Array, lanes: Array, width: int) -> None:
        """Remember who reads and report writes by others; lanes are flat indices of the frame."""
        shadow = self._shadow(buffer, is_write=False)
        if shadow is None:
            return
        index, key = _bytes_and_keys(frame, offset, lanes, width)
        self.report(frame, _unordered(shadow.writer[index], key), "global read after write")
        before = shadow.reader[index]
        shadow.reader[index] = key
        # readers that meet, before or in this instruction, are kept as many
        shadow.reader[index] = _together(_together(key, before), shadow.reader[index])

    def note_write(self, frame: Frame, buffer: int, offset: Array, lanes: Array, width: int) -> None:
        """Remember who writes and report accesses by others."""
        shadow = self._shadow(buffer, is_write=True)
        assert shadow is not None
        index, key = _bytes_and_keys(frame, offset, lanes, width)
        self.report(frame, _unordered(shadow.writer[index], key), "global write after write")
        self.report(frame, _unordered(shadow.reader[index], key), "global write after read")
        shadow.writer[index] = key

    def report(self, frame: Frame, raced: Array, what: str) -> None:
        """Count the lanes, rows of `raced`, in which the instruction in execution races."""
        if raced.any():
            instruction = frame.batch.program.kernel.instructions[frame.index]
            self.races[f"{what} @{frame.index}: {instruction.text}"] += np.count_nonzero(raced.any(1))


def _bytes_and_keys(frame: Frame, offset: Array, lanes: Array, width: int) -> tuple[Array, Array]:
    """The bytes that each lane touches, [lanes, width], and its key."""
    batch = frame.batch
    row, thread = np.divmod(lanes, frame.num_threads)
    cta = frame.ctas[row]
    key = (batch.first_cta + cta + 1) << _CTA_SHIFT | batch.intervals[cta] << _INTERVAL_SHIFT | thread // 32 + 1
    return offset[:, None] + np.arange(width), key.astype(np.uint64)[:, None]


def _unordered(before: Array, key: Array) -> Array:
    """Where the last access was by another CTA, or by another warp in the same interval."""
    same_cta = before >> np.uint64(_CTA_SHIFT) == key >> np.uint64(_CTA_SHIFT)
    same_interval = (before ^ key) <= _WARP_MASK
    return (before != 0) & (before != key) & (~same_cta | same_interval)


def _together(key: Array, other: Array) -> Array:
    """Who touched a byte where two did; of intervals of one CTA the later one counts."""
    key = np.broadcast_to(key, other.shape)
    same_cta = other >> np.uint64(_CTA_SHIFT) == key >> np.uint64(_CTA_SHIFT)
    both = np.where(key == other, key, key | _WARP_MASK)
    both = np.where((key ^ other) <= _WARP_MASK, both, np.maximum(key, other))
    return np.where(other == 0, key, np.where(same_cta, both, _MANY_CTAS))
