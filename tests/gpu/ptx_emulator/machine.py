"""Lock-step execution: all threads of a batch of CTAs as the lanes of numpy arrays.

Of the lanes that have not returned, those in the lowest basic block go first. Whole CTAs that wait are left out of
the arrays; single threads that wait are masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# the handlers register themselves
from ptx_emulator import control, conversion, data_movement, floating, integer, tensor_core, warp  # noqa: F401
from ptx_emulator.decoder import Decoder, Execute, Read
from ptx_emulator.frame import UNWRITTEN, Frame
from ptx_emulator.memory import GlobalMemory, LocalMemory, SharedMemory
from ptx_emulator.parser import Kernel, parse
from ptx_emulator.ptx_types import TYPES, Array, PtxError, constant, poison

# arrays of 4 bytes per lane should stay in the cache, and yet be long next to what a call of numpy costs
LANES_PER_BATCH = 32768


@dataclass
class Report:
    """What a launch did."""

    kernel: str
    num_ctas: int = 0
    # active lanes x instructions
    lane_instructions: int = 0
    # warps x instructions, per opcode with its modifiers
    instructions: Counter[str] = field(default_factory=Counter)
    # warps that entered each basic block
    warps_in: Counter[int] = field(default_factory=Counter)
    # text of the race -> number of lanes
    races: Counter[str] = field(default_factory=Counter)
    # text of the wgmma that reads what no proxy fence orders before it -> number of bytes
    missing_fences: Counter[str] = field(default_factory=Counter)


class Step(NamedTuple):
    """A decoded instruction; `dead` are the slots that nobody reads after it."""

    execute: Execute
    guard: Read | None
    writes: tuple[int, ...]
    dead: tuple[int, ...]
    position: int
    # as bits of the slots; wgmmas may go on adding to the same sums
    written: int
    touched: int


class Program:
    """A kernel, decoded."""

    def __init__(self, ptx: str, approx_ulp: int = 0) -> None:
        """Parse and decode; raises PtxError for whatever is unknown."""
        self.kernel: Kernel = parse(ptx)
        self.has_wgmma = any(instruction.opcode == "wgmma" for instruction in self.kernel.instructions)
        decoders, guards, executes = [], [], []
        for index, instruction in enumerate(self.kernel.instructions):
            decoder = Decoder(instruction, self.kernel, index, approx_ulp)
            executes.append(decoder.decode())
            guards.append(decoder.source(instruction.guard, TYPES["pred"]) if instruction.guard else None)
            if instruction.guard:
                # lanes that the guard leaves out keep the old value
                decoder.reads |= decoder.writes
            decoders.append(decoder)
        self.live_in = self._find_live_registers(decoders)
        self.blocks = [
            list(self._make_steps(block_index, decoders, guards, executes))
            for block_index in range(len(self.kernel.blocks))
        ]

    def successors(self, block_index: int) -> list[int]:
        """The blocks that may follow; len(blocks) is the end of the kernel."""
        last = self.kernel.instructions[self.kernel.blocks[block_index].end - 1]
        found = []
        if last.opcode == "bra":
            found.append(self.kernel.labels[last.operands[0].name])  # type: ignore[union-attr]
        if last.opcode not in ("bra", "ret", "exit") or last.guard:
            found.append(block_index + 1)
        return found

    def _find_live_registers(self, decoders: list[Decoder]) -> list[int]:
        """For each block the registers that it or a later one reads before writing, as bits; 0 at the end."""
        end = len(self.kernel.blocks)
        uses, kills = [0] * end, [0] * end
        for index, block in enumerate(self.kernel.blocks):
            for decoder in decoders[block.first : block.end]:
                uses[index] |= _as_bits(decoder.reads) & ~kills[index]
                kills[index] |= _as_bits(decoder.writes)
        live_in = [0] * (end + 1)
        changed = True
        while changed:
            changed = False
            for index in reversed(range(end)):
                live_out = 0
                for successor in self.successors(index):
                    live_out |= live_in[successor]
                live = uses[index] | live_out & ~kills[index]
                changed |= live != live_in[index]
                live_in[index] = live
        return live_in

    def _make_steps(
        self, block_index: int, decoders: list[Decoder], guards: list[Read | None], executes: list[Execute]
    ) -> Iterator[Step]:
        block = self.kernel.blocks[block_index]
        live = 0
        for successor in self.successors(block_index):
            live |= self.live_in[successor]
        steps = []
        for index in reversed(range(block.first, block.end)):
            touched = decoders[index].reads | decoders[index].writes
            dead = tuple(slot for slot in touched if not live >> slot & 1)
            writes, written = tuple(decoders[index].writes), _as_bits(decoders[index].writes)
            touched_alone = _as_bits(touched - decoders[index].sums)
            steps.append(Step(executes[index], guards[index], writes, dead, index, written, touched_alone))
            live = live & ~written | _as_bits(decoders[index].reads)
        return reversed(steps)


def _as_bits(slots: set[int]) -> int:
    return sum(1 << slot for slot in slots)


def _slots_of(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


class Emulator:
    """Runs a program on a grid."""

    def __init__(self, program: Program, shared_bytes: int, lanes_per_batch: int = LANES_PER_BATCH) -> None:
        """Take a program and the bytes of shared memory that its launch would reserve."""
        self.program = program
        self.shared_bytes = shared_bytes
        self.ctas_per_batch = max(1, lanes_per_batch // program.kernel.num_threads)

    def run(self, grid: Sequence[int], arguments: Sequence[int], buffers: Sequence[Array]) -> Report:
        """Run all CTAs; arguments are bits, buffers the uint8 arrays of all memory that may be touched."""
        kernel = self.program.kernel
        sizes = (*grid, 1, 1)[:3]
        # Triton's scratch buffers come last and are null where the kernel needs none
        values = [*arguments, *[0] * (len(kernel.params) - len(arguments))]
        if len(values) != len(kernel.params):
            raise PtxError(f"{kernel.name} takes {len(kernel.params)} parameters, not {len(arguments)}")
        params = {name: value for (name, _), value in zip(kernel.params, values, strict=True)}
        report = Report(kernel.name)
        memory = GlobalMemory(buffers, kernel.global_data, report.races)
        ctas = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), self.ctas_per_batch):
                some = ctas[first : first + self.ctas_per_batch]
                Batch(self.program, some, first, sizes, params, memory, self.shared_bytes, report).run()
        report.num_ctas = len(ctas)
        self._count_instructions(report)
        return report

    def _count_instructions(self, report: Report) -> None:
        for block, num_warps in report.warps_in.items():
            for step in self.program.blocks[block]:
                instruction = self.program.kernel.instructions[step.position]
                report.instructions[".".join((instruction.opcode, *instruction.modifiers))] += num_warps


class Batch:
    """The CTAs that run together."""

    def __init__(
        self,
        program: Program,
        ctas: list[tuple[int, int, int]],
        first_cta: int,
        grid: Sequence[int],
        params: dict[str, int],
        memory: GlobalMemory,
        shared_bytes: int,
        report: Report,
    ) -> None:
        """Start with every lane in block 0 and no register written."""
        self.program = program
        self.ctas = ctas
        self.first_cta = first_cta
        # barriers that each CTA has passed
        self.intervals = np.zeros(len(ctas), np.int64)
        self.grid = grid
        self.num_threads = program.kernel.num_threads
        self.params = params
        self.memory = memory
        self.report = report
        self.shared = SharedMemory(len(ctas), shared_bytes, program.has_wgmma, report)
        self.local = LocalMemory(len(ctas), self.num_threads, program.kernel.local_bytes)
        self.end = len(program.blocks)
        # the block that each lane is about to enter
        self.block_of = np.zeros((len(ctas), self.num_threads), np.int32)
        # the registers of the CTAs outside of the frame
        self.home: list[Any] = [UNWRITTEN] * len(program.kernel.register_widths)
        self.fetched: list[Any] = []
        self.frame = Frame(self, np.arange(len(ctas)))

    def special_registers(self, rows: Array) -> dict[str, Array]:
        """The special registers of some CTAs."""
        threads = np.arange(self.num_threads, dtype=np.uint32)[None]
        zero = constant(0, np.dtype(np.uint32))
        one = constant(1, np.dtype(np.uint32))
        special = {"%laneid": threads % 32, "%warpid": threads // 32}
        special |= {"%tid.x": threads, "%tid.y": zero, "%tid.z": zero}
        special |= {"%ntid.x": one * np.uint32(self.num_threads), "%ntid.y": one, "%ntid.z": one}
        indices = np.array(self.ctas, np.uint32)[rows]
        for column, axis in enumerate("xyz"):
            special[f"%ctaid.{axis}"] = indices[:, column : column + 1]
            special[f"%nctaid.{axis}"] = one * np.uint32(self.grid[column])
        return special

    def synchronise(self, ctas: Array) -> None:
        """Let a barrier order what came before it."""
        self.intervals[ctas] += 1
        self.shared.synchronise(ctas)

    def run(self) -> None:
        """Run until every lane has returned."""
        while (block := int(self.block_of.min())) < self.end:
            active = self.block_of == block
            rows = np.flatnonzero(active.any(1))
            self._enter(rows)
            mask = None
            if not (active := active[rows]).all():
                mask = active
            self._run_block(block, mask)
            if mask is None:
                self.block_of[rows] = self.frame.next_block
            else:
                self.block_of[rows] = np.where(mask, self.frame.next_block, self.block_of[rows])

    def _run_block(self, block: int, mask: Array | None) -> None:
        frame = self.frame
        registers = frame.registers
        frame.mask = mask
        frame.next_block = block + 1
        try:
            for execute, guard, writes, dead, index, written, touched in self.program.blocks[block]:
                frame.index = index
                if frame.fragments_in_flight & written:
                    raise PtxError("a register that a wgmma in flight reads is written")
                if frame.sums_in_flight & touched:
                    raise PtxError("sums of a wgmma in flight are read or written: no wait covers it")
                if guard is None:
                    execute(frame)
                else:
                    self._run_guarded(execute, guard(frame), writes)
                if mask is None:
                    for slot in dead:
                        registers[slot] = UNWRITTEN
        except PtxError as error:
            text = self.program.kernel.instructions[frame.index].text
            raise PtxError(f"{error}   [at instruction {frame.index}: {text}]") from None
        num_lanes = frame.num_ctas * frame.num_threads if mask is None else int(mask.sum())
        self.report.lane_instructions += num_lanes * len(self.program.blocks[block])
        num_warps = num_lanes // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        self.report.warps_in[block] += num_warps

    def _run_guarded(self, execute: Execute, guard: Array, writes: tuple[int, ...]) -> None:
        frame = self.frame
        mask = frame.mask
        if mask is not None:
            guard = guard & mask
        if guard.all():
            execute(frame)
        elif guard.any():
            frame.mask = guard
            execute(frame)
            frame.mask = mask
        else:
            for slot in writes:
                if frame.registers[slot] is UNWRITTEN:
                    frame.registers[slot] = self._poison(slot)

    def _poison(self, slot: int) -> Array:
        width = self.program.kernel.register_widths[slot]
        return poison(np.dtype(bool) if width == 0 else np.dtype(f"u{width}"))

    def _live(self, rows: Array) -> Iterator[int]:
        live = 0
        for block in np.unique(self.block_of[rows]):
            live |= self.program.live_in[block]
        return _slots_of(live)

    def _enter(self, rows: Array) -> None:
        """Make a frame of these CTAs, unless it is there already."""
        if np.array_equal(rows, self.frame.ctas):
            return
        self._leave()
        self.frame = Frame(self, rows)
        if self.shared.async_proxy:
            self.shared.async_proxy.tell_registers(self.frame)
        registers = self.frame.registers
        for slot in self._live(rows):
            value = self.home[slot]
            if value is not UNWRITTEN and value.shape[0] > 1:
                value = value[rows]
            registers[slot] = value
        self.fetched = registers.copy()

    def _leave(self) -> None:
        """Bring what the frame has written home, as far as it will be read."""
        frame = self.frame
        whole = frame.num_ctas == len(self.ctas)
        for slot in self._live(frame.ctas):
            value = frame.registers[slot]
            if value is UNWRITTEN or (self.fetched and value is self.fetched[slot]):
                continue
            self.home[slot] = value if whole else self._merge(self.home[slot], value, frame.ctas)

    def _merge(self, old: Any, value: Array, rows: Array) -> Array:
        old = poison(value.dtype) if old is UNWRITTEN else old.view(value.dtype)
        merged = np.empty((len(self.ctas), max(old.shape[1], value.shape[1])), value.dtype)
        merged[:] = old
        merged[rows] = value
        return merged
