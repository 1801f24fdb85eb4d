"""The three memories: global, shared and local, and the checks on every access."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.async_proxy import AsyncProxy
from ptx_emulator.decoder import LOCAL_BASE, SHARED_BASE
from ptx_emulator.frame import Frame
from ptx_emulator.ptx_types import UNSIGNED, WIDE, Array, PtxError
from ptx_emulator.races import GlobalRaces

if TYPE_CHECKING:
    from ptx_emulator.machine import Report


def active_lanes(frame: Frame, *values: Array) -> tuple[Array, ...]:
    """Broadcast values to one shape and keep the active lanes; without a mask the shape stays, however narrow."""
    if frame.mask is None:
        return np.broadcast_arrays(*values)
    *values_full, mask = np.broadcast_arrays(*values, frame.mask)
    return tuple(value[mask] for value in values_full)


def lane_name(frame: Frame, bad: Array, shape: tuple[int, ...]) -> str:
    """Name the first lane that is bad, an array over the active lanes of a value of that shape."""
    position = int(np.flatnonzero(bad)[0])
    if frame.mask is not None:
        shape = np.broadcast_shapes(shape, frame.mask.shape)
        position = int(np.flatnonzero(np.broadcast_to(frame.mask, shape))[position])
    row, thread = divmod(position, shape[1])
    return frame.name_lane(row, thread)


def spread(frame: Frame, values: Array, shape: tuple[int, ...]) -> Array:
    """Put the values of the active lanes back to where the lanes are; the rest is never written to a register."""
    if frame.mask is None:
        return values
    mask = np.broadcast_to(frame.mask, np.broadcast_shapes(shape, frame.mask.shape))
    result = np.zeros(mask.shape, values.dtype)
    result[mask] = values
    return result


def split(values: Array, width: int, count: int) -> list[Array]:
    """Split wide elements into their `count` parts of `width` bytes."""
    if count == 1:
        return [values]
    parts = np.ascontiguousarray(values).view(UNSIGNED[width]).reshape(*values.shape, count)
    return [np.ascontiguousarray(parts[..., part]) for part in range(count)]


def join(parts: Sequence[Array]) -> Array:
    """Join equally shaped parts to wide elements."""
    if len(parts) == 1:
        return parts[0]
    joined = np.stack(parts, -1)
    return joined.view(WIDE[joined.dtype.itemsize * len(parts)])[..., 0]


class GlobalMemory:
    """The buffers of the launch: an access must lie in one of them and be naturally aligned."""

    def __init__(self, buffers: Sequence[Array], variables: dict[str, bytes], races: Counter[str]) -> None:
        """Take the buffers, which are uint8, the variables of the module and where to report races."""
        self.variables = {name: np.frombuffer(data, np.uint8).copy() for name, data in variables.items()}
        # two arguments may share their storage
        unique = {buffer.ctypes.data: buffer for buffer in [*buffers, *self.variables.values()] if buffer.size}
        self.starts = sorted(unique)
        self.buffers = [unique[start] for start in self.starts]
        self.ends = [start + buffer.size for start, buffer in zip(self.starts, self.buffers, strict=True)]
        self.races = GlobalRaces([buffer.size for buffer in self.buffers], races)

    def address_of(self, variable: str) -> int:
        """The address of a variable of the module."""
        return self.variables[variable].ctypes.data

    def load(self, frame: Frame, address: Array, width: int) -> Array:
        """Load one element of up to 16 bytes per active lane."""
        (active,) = active_lanes(frame, address)
        found = self._find(frame, active, address.shape, width, "load")
        self._note(frame, address, found, width, self.races.note_read)
        if isinstance(found, int):
            elements, start = self._elements(found, width)
            return elements[(active - start) // width]
        values = np.zeros(active.shape, WIDE[width])
        for index in np.unique(found):
            here = found == index
            elements, start = self._elements(int(index), width)
            values[here] = elements[(active[here] - start) // width]
        return values

    def store(self, frame: Frame, address: Array, values: Array) -> None:
        """Store one element per active lane; lanes that meet must agree."""
        width = values.dtype.itemsize
        active, active_values = active_lanes(frame, address, values)
        shape = np.broadcast_shapes(address.shape, values.shape)
        found = self._find(frame, active, shape, width, "store")
        self._note(frame, np.broadcast_to(address, shape), found, width, self.races.note_write)
        for index in [found] if isinstance(found, int) else np.unique(found):
            here = ... if isinstance(found, int) else found == index
            elements, start = self._elements(int(index), width)
            places, written = (active[here] - start) // width, active_values[here]
            elements[places] = written
            differs = _bytes_of(elements[places].reshape(-1)) != _bytes_of(written.reshape(-1))
            self.races.report(frame, differs, "global write with write")

    def _note(self, frame: Frame, address: Array, found: int | Array, width: int, note: Callable[..., None]) -> None:
        """Tell the buffers' races of an access, lane by lane: a lane is a warp's even where its value is not."""
        if isinstance(found, int) and not self.races.looks_at(found, note):
            return
        lanes = np.flatnonzero(frame.active())
        addresses = np.broadcast_to(address, frame.shape).reshape(-1)[lanes]
        indices = np.searchsorted(self.starts, addresses, "right") - 1
        for index in np.unique(indices):
            here = indices == index
            note(frame, int(index), addresses[here] - self.starts[index], lanes[here], width)

    def element(self, frame: Frame, address: int, row: int, thread: int, width: int) -> tuple[Array, int]:
        """The array and the index of one lane's element, for atomics."""
        index = bisect_right(self.starts, address) - 1
        if index < 0 or address + width > self.ends[index]:
            raise PtxError(f"out-of-bounds global atomic: {frame.name_lane(row, thread)}, address {address:#x}")
        if address % width:
            raise PtxError(f"misaligned global atomic: {frame.name_lane(row, thread)}, address {address:#x}")
        elements, start = self._elements(index, width)
        return elements, (address - start) // width

    def _elements(self, index: int, width: int) -> tuple[Array, int]:
        """A buffer as elements of a width, and the address of the first aligned one."""
        skip = -self.starts[index] % width
        size = (self.buffers[index].size - skip) // width * width
        return self.buffers[index][skip : skip + size].view(WIDE[width]), self.starts[index] + skip

    def _find(self, frame: Frame, active: Array, shape: tuple[int, ...], width: int, what: str) -> int | Array:
        """The buffer of all addresses, or that of each."""
        if int(np.bitwise_or.reduce(active, None)) % width:
            bad = active % width != 0
            address = int(active[bad][0])
            raise PtxError(
                f"misaligned global {what} of {width} bytes: {lane_name(frame, bad, shape)}, address {address:#x}"
            )
        low, high = int(active.min()), int(active.max())
        index = bisect_right(self.starts, low) - 1
        if index >= 0 and high + width <= self.ends[index]:
            return index
        found = np.searchsorted(self.starts, active, "right") - 1
        ends = np.array([*self.ends, 0])
        bad = (found < 0) | (active + width > ends[found])
        if bad.any():
            address = int(active[bad][0])
            raise PtxError(
                f"out-of-bounds global {what} of {width} bytes by {int(bad.sum())} lanes: "
                f"{lane_name(frame, bad, shape)}, address {address:#x}"
            )
        return found


# two or more warps have read
_MANY = 255


class SharedMemory:
    """The shared memory of each CTA of a batch, poisoned at the start; races are found between two barriers."""

    def __init__(self, num_ctas: int, num_bytes: int, has_wgmma: bool, report: Report) -> None:
        """Reserve num_bytes per CTA."""
        self.num_bytes = num_bytes
        # whole 16 bytes, so that no access reaches into the next CTA's
        self.stride = max(-(-num_bytes // 16) * 16, 16)
        self.races = report.races
        self.data = np.full(num_ctas * self.stride, 0xCD, np.uint8)
        # 1 + the warp that touched a byte since the last barrier, 0 for none
        self.writer = np.zeros((num_ctas, self.stride), np.uint8)
        self.reader = np.zeros((num_ctas, self.stride), np.uint8)
        # what cp.async has read: of the open group, and of the groups that are committed, oldest first
        self.open_copies: list[list[Copy]] = [[] for _ in range(num_ctas)]
        self.groups: list[deque[list[Copy]]] = [deque() for _ in range(num_ctas)]
        # None where every access goes through the generic proxy
        self.async_proxy = AsyncProxy(num_ctas, self.stride, report.missing_fences) if has_wgmma else None

    def synchronise(self, ctas: Array) -> None:
        """Let a barrier order what came before it."""
        self.writer[ctas] = 0
        self.reader[ctas] = 0

    def load(self, frame: Frame, address: Array, width: int, what: str = "read") -> Array:
        """Load one element of up to 16 bytes per active lane."""
        offset, warp = self.locate(frame, address, width, what)
        self.note_read(frame, offset, warp, width, what)
        return self.data.view(WIDE[width])[offset // width]

    def store(self, frame: Frame, address: Array, values: Array, what: str = "write") -> None:
        """Store one element per active lane."""
        width = values.dtype.itemsize
        offset, warp = self.locate(frame, address, width, what)
        values = np.broadcast_to(values, frame.shape)
        values = values.reshape(-1) if frame.mask is None else values[frame.active()]
        self.write(frame, offset, warp, values, what)

    def locate_atomic(self, frame: Frame, address: Array, width: int) -> Array:
        """The offsets of the active lanes; atomics do not race with one another."""
        offset, warp = self.locate(frame, address, width, "atomic")
        self.note_read(frame, offset, warp, width, "atomic")
        self._note_generic_write(frame, _shadow_lanes(offset, warp, width)[0], width, "atomic")
        return offset

    def locate(self, frame: Frame, address: Array, width: int, what: str) -> tuple[Array, Array]:
        """The offset in `data` and 1 + the warp of each active lane."""
        row = np.broadcast_to(frame.ctas[:, None], frame.shape)
        warp = np.broadcast_to(frame.special["%warpid"] + 1, frame.shape)
        local = np.broadcast_to(address - SHARED_BASE, frame.shape)
        if frame.mask is None:
            row, warp, local = row.reshape(-1), warp.reshape(-1), local.reshape(-1)
        else:
            active = frame.active()
            row, warp, local = row[active], warp[active], local[active]
        bad = (local < 0) | (local + width > self.num_bytes)
        if bad.any():
            offset = int(local[bad][0])
            raise PtxError(
                f"shared {what} of {width} bytes at {offset}, outside of the {self.num_bytes} bytes that the "
                f"launch reserves: {lane_name(frame, bad, frame.shape)}"
            )
        bad = local % width != 0
        if bad.any():
            offset = int(local[bad][0])
            raise PtxError(
                f"misaligned shared {what} of {width} bytes at {offset}: {lane_name(frame, bad, frame.shape)}"
            )
        return row * self.stride + local, warp

    def note_read(self, frame: Frame, offset: Array, warp: Array, width: int, what: str) -> None:
        """Remember who reads and report a write by another warp in the same interval."""
        writer, reader = self._shadow(self.writer, width), self._shadow(self.reader, width)
        index, bytes_of_warp = _shadow_lanes(offset, warp, width)
        self._report(frame, _others(writer[index], bytes_of_warp), f"{what} after write")
        before = reader[index]
        others = _others(before, bytes_of_warp)
        reader[index] = bytes_of_warp
        # several warps, now or before
        others |= reader[index] != bytes_of_warp
        reader[index[others]] = np.array(_MANY * _repeated_byte(width), reader.dtype)

    def note_write(self, frame: Frame, offset: Array, warp: Array, width: int, what: str) -> None:
        """Report any access by another warp in the same interval, and by a wgmma in flight."""
        writer, reader = self._shadow(self.writer, width), self._shadow(self.reader, width)
        index, bytes_of_warp = _shadow_lanes(offset, warp, width)
        self._report(frame, _others(writer[index], bytes_of_warp), f"{what} after write")
        self._report(frame, _others(reader[index], bytes_of_warp), f"{what} after read")
        self._note_generic_write(frame, index, width, what)

    def _note_generic_write(self, frame: Frame, index: Array, width: int, what: str) -> None:
        if self.async_proxy is None:
            return
        in_use, unfenced = (
            self._shadow(shadow, width) for shadow in (self.async_proxy.in_use, self.async_proxy.unfenced)
        )
        self._report(frame, in_use[index] != 0, f"{what} of what a wgmma in flight reads")
        unfenced[index] = np.array(_repeated_byte(width), unfenced.dtype)

    def write(self, frame: Frame, offset: Array, warp: Array, values: Array, what: str) -> None:
        """Write and report what else touches the bytes."""
        width = values.dtype.itemsize
        self.note_write(frame, offset, warp, width, what)
        writer = self._shadow(self.writer, width)
        index, bytes_of_warp = _shadow_lanes(offset, warp, width)
        writer[index] = bytes_of_warp
        elements = self.data.view(WIDE[width])
        elements[offset // width] = values
        if (writer[index] != bytes_of_warp).any():
            # warps may meet in this very instruction if they write the same, as Triton's replicated layouts do
            differs = _bytes_of(elements[offset // width]) != _bytes_of(values)
            self._report(frame, differs.any(1), f"{what} with write")

    def _shadow(self, shadow: Array, width: int) -> Array:
        # up to 8 bytes of the shadow are compared at once
        return shadow.reshape(-1).view(UNSIGNED[min(width, 8)])

    def _report(self, frame: Frame, raced: Array, what: str) -> None:
        if raced.any():
            instruction = frame.batch.program.kernel.instructions[frame.index]
            self.races[f"{what} @{frame.index}: {instruction.text}"] += int(raced.sum())

    def wait_for_wgmma(self, frame: Frame, num_pending: int) -> None:
        """Finish all groups of wgmma but the newest num_pending."""
        assert self.async_proxy is not None
        for reads in self.async_proxy.wait(frame, num_pending):
            # up to this moment, and by other warps longer than by the one that waits
            self.reader.reshape(-1)[reads] = _MANY

    def copy_async(self, cta: int, copy: Copy) -> None:
        """Start a copy of a CTA."""
        self.open_copies[cta].append(copy)

    def commit(self, ctas: Array) -> None:
        """Close the open groups."""
        for cta in ctas:
            self.groups[cta].append(self.open_copies[cta])
            self.open_copies[cta] = []

    def wait(self, frame: Frame, num_pending: int) -> None:
        """Land all groups but the newest num_pending; before this moment the copies need not have landed."""
        for cta in frame.ctas:
            while len(self.groups[cta]) > num_pending:
                for copy in self.groups[cta].popleft():
                    copy.land(self, frame)


class Copy:
    """What one cp.async of one CTA has read."""

    def __init__(self, offset: Array, warp: Array, values: Array) -> None:
        """Take the offsets in the shared memory, 1 + the warps and the values of the active lanes."""
        self.offset = offset
        self.warp = warp
        self.values = values

    def land(self, shared: SharedMemory, frame: Frame) -> None:
        """Write."""
        shared.write(frame, self.offset, self.warp, self.values, "cp.async")


def _bytes_of(values: Array) -> Array:
    return np.ascontiguousarray(values)[:, None].view(np.uint8)


def _others(touched: Array, bytes_of_warp: Array) -> Array:
    """Where any of the bytes was touched by another warp."""
    others = (touched != 0) & (touched != bytes_of_warp)
    if others.any():
        # a byte may be untouched while its neighbour is this warp's
        touched = touched[others][:, None].view(np.uint8)
        others[others] = ((touched != 0) & (touched != bytes_of_warp[others][:, None].view(np.uint8))).any(1)
    return others


def _repeated_byte(width: int) -> int:
    return 0x0101010101010101 & ((1 << 8 * min(width, 8)) - 1)


def _shadow_lanes(offset: Array, warp: Array, width: int) -> tuple[Array, Array]:
    """The indices in the shadow and the warp in each of its bytes; two indices per lane for 16 bytes."""
    unit = min(width, 8)
    index, warp = offset // unit, warp.astype(UNSIGNED[unit]) * UNSIGNED[unit].type(_repeated_byte(width))
    if width == 16:
        index = np.concatenate([index, index + 1])
        warp = np.concatenate([warp, warp])
    return index, warp


class LocalMemory:
    """The local memory of every lane of a batch."""

    def __init__(self, num_ctas: int, num_threads: int, num_bytes: int) -> None:
        """Reserve num_bytes per lane, whole 16 bytes."""
        self.num_bytes = num_bytes
        self.stride = -(-num_bytes // 16) * 16
        self.num_threads = num_threads
        self.data = np.full(num_ctas * num_threads * self.stride, 0xCD, np.uint8)

    def load(self, frame: Frame, address: Array, width: int) -> Array:
        """Load one element per active lane, at full shape."""
        index = self._locate(frame, address, width, "load")
        return self.data.view(WIDE[width])[index]

    def store(self, frame: Frame, address: Array, values: Array) -> None:
        """Store one element per active lane."""
        width = values.dtype.itemsize
        index = self._locate(frame, address, width, "store")
        values = np.broadcast_to(values, frame.shape)
        self.data.view(WIDE[width])[index] = values if frame.mask is None else values[frame.active()]

    def _locate(self, frame: Frame, address: Array, width: int, what: str) -> Array:
        lane = frame.ctas[:, None] * self.num_threads + np.arange(self.num_threads)
        offset = np.broadcast_to(address - LOCAL_BASE, frame.shape)
        if frame.mask is not None:
            active = frame.active()
            lane, offset = lane[active], offset[active]
        bad = (offset < 0) | (offset + width > self.num_bytes) | (offset % width != 0)
        if bad.any():
            raise PtxError(
                f"local {what} of {width} bytes at {int(offset[bad][0])} of {self.num_bytes}: "
                f"{lane_name(frame, bad, frame.shape)}"
            )
        return (lane * self.stride + offset) // width
