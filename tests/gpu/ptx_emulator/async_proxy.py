"""wgmma goes on after its issue and reads shared memory through the async proxy: what the rest must not do meanwhile.

Until a wait covers its group it may read its operands at any moment, and its sums are not there. What the rest writes,
through the generic proxy, it sees for certain only past a fence.proxy.async; by PTX's memory model the fence may stand
on either side of the barrier that orders the two. Groups are kept per CTA, not per warp.
"""

from __future__ import annotations

from collections import Counter, deque
from functools import reduce
from typing import NamedTuple

import numpy as np

from ptx_emulator.frame import Frame
from ptx_emulator.ptx_types import Array


class Wgmma(NamedTuple):
    """A wgmma of one CTA: the bytes that it reads, by their offsets in the batch, and its registers, bits of slots."""

    reads: Array
    fragments: int
    sums: int


class AsyncProxy:
    """The wgmmas in flight of each CTA of a batch, and what is known of the bytes of shared memory."""

    def __init__(self, num_ctas: int, stride: int, missing_fences: Counter[str]) -> None:
        """Take the bytes that the shared memory of a CTA occupies, and where to report."""
        self.missing_fences = missing_fences
        # 1 for a byte that is written through the generic proxy and not fenced since
        self.unfenced = np.zeros((num_ctas, stride), np.uint8)
        # 1 for a byte that a wgmma in flight reads
        self.in_use = np.zeros((num_ctas, stride), np.uint8)
        # the open group, and the groups that are committed, oldest first
        self.open_group: list[list[Wgmma]] = [[] for _ in range(num_ctas)]
        self.groups: list[deque[list[Wgmma]]] = [deque() for _ in range(num_ctas)]

    def fence(self, ctas: Array) -> None:
        """Order what all threads of the CTAs have written before what wgmma reads."""
        self.unfenced[ctas] = 0

    def note_read(self, frame: Frame, reads: Array) -> None:
        """Report the bytes of them that are not fenced; wgmma reads them."""
        if unfenced := int(np.count_nonzero(self.unfenced.reshape(-1)[reads])):
            text = frame.batch.program.kernel.instructions[frame.index].text
            self.missing_fences[f"no fence.proxy.async before @{frame.index}: {text}"] += unfenced

    def start(self, cta: int, wgmma: Wgmma) -> None:
        """Add a wgmma to the open group of a CTA."""
        self.open_group[cta].append(wgmma)
        self.in_use.reshape(-1)[wgmma.reads] = 1

    def commit(self, ctas: Array) -> None:
        """Close the open groups."""
        for cta in ctas:
            self.groups[cta].append(self.open_group[cta])
            self.open_group[cta] = []

    def wait(self, frame: Frame, num_pending: int) -> list[Array]:
        """Finish all groups but the newest num_pending; return the bytes that were read up to now."""
        finished = []
        for cta in frame.ctas:
            while len(self.groups[cta]) > num_pending:
                finished += [wgmma.reads for wgmma in self.groups[cta].popleft()]
            self.in_use[cta] = 0
            for wgmma in self._in_flight(cta):
                self.in_use.reshape(-1)[wgmma.reads] = 1
        self.tell_registers(frame)
        return finished

    def tell_registers(self, frame: Frame) -> None:
        """Tell a frame which of its registers are those of a wgmma in flight."""
        in_flight = [wgmma for cta in frame.ctas for wgmma in self._in_flight(cta)]
        frame.fragments_in_flight = reduce(int.__or__, (wgmma.fragments for wgmma in in_flight), 0)
        frame.sums_in_flight = reduce(int.__or__, (wgmma.sums for wgmma in in_flight), 0)

    def _in_flight(self, cta: int) -> list[Wgmma]:
        return [wgmma for group in (*self.groups[cta], self.open_group[cta]) for wgmma in group]
