"""Static counts of a cubin: what its machine code is made of, loop by loop; nothing is run.

nvdisasm's text is split into instructions. A loop is what lies between a branch backwards and its target; each
instruction counts in the innermost loop around it, or as straight code. Behind the last unconditional EXIT ptxas
puts what is hardly ever run (slow paths, divergent shuffles, padding): it counts for the size and the spills only.
The registers that a wgmma reads are followed along every way to the wait that covers it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Pipe(str, Enum):
    """What executes an instruction; the rates are in gpus.py."""

    FMA = "fma"
    IMAD = "imad"
    HALF = "half"
    DOUBLE = "double"
    ALU = "alu"
    XU = "xu"
    LSU = "lsu"
    REDUCE = "reduce"
    UNIFORM = "uniform"
    TENSOR = "tensor"
    # takes an issue slot and nothing else that is known
    CONTROL = "control"


# by the opcode up to its first dot
_OPCODES = {
    Pipe.FMA: "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FFMA32I FADD32I FMUL32I FHADD",
    Pipe.IMAD: "IMAD IDP IDP4A IMUL",
    Pipe.HALF: "HFMA2 HADD2 HMUL2 HSETP2 HSET2 HMNMX2",
    Pipe.DOUBLE: "DFMA DADD DMUL DSETP",
    Pipe.ALU: """
        IADD IADD3 IADD3X IADD32I LOP LOP3 LOP32I SHF SHL SHR ISETP FSETP SEL FSEL FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3
        VIADD VIADDMNMX PRMT MOV MOV32I LEA PLOP3 BMSK SGXT I2FP F2FP I2IP P2R R2P FCHK VABSDIFF VABSDIFF4 FSET IABS
        ISCADD CSEL VHMNMX
    """,
    Pipe.XU: "MUFU I2F F2I F2F FRND I2I POPC FLO BREV",
    Pipe.LSU: "LDG STG LDS STS LDL STL LDSM STSM LDGSTS ATOM ATOMS ATOMG RED REDG REDS SHFL",
    Pipe.REDUCE: "REDUX CREDUX VOTE MATCH",
    Pipe.UNIFORM: """
        UIADD3 UIADD3X UIMAD ULOP3 UISETP USEL USHF UMOV ULEA UPRMT UPLOP3 USGXT UBMSK UFLO UPOPC UP2UR UR2UP UVIADD
        UIMNMX UVIMNMX UIABS UI2F UI2FP UF2FP UFSETP UFSEL UFADD UFMUL UFFMA UFMNMX UF2I UF2F UFRND UBREV UCLEA ULDC
        VOTEU REDUXU USETMAXREG UCGABAR_ARV UCGABAR_WAIT ULEPC USTGSTS UMEMSETS R2UR
    """,
    Pipe.CONTROL: """
        BRA BSSY BSYNC BREAK EXIT NOP BAR B2R WARPSYNC DEPBAR LDGDEPBAR YIELD CALL RET BMOV ERRBAR NANOSLEEP MEMBAR
        CCTL FENCE WARPGROUP ARRIVES ELECT ENDCOLLECTIVE ACQBULK PREEXIT WARPGROUPSET LEPC RPCMOV SYNCS
        UTCBAR UTCATOMSWS UTCCP UVIRTCOUNT LDTM STTM LDC LDCU S2R S2UR CS2R CS2UR KILL
    """,
}
_PIPES = {opcode: pipe for pipe, opcodes in _OPCODES.items() for opcode in opcodes.split()}
# mma.sync, wgmma (a warp group's) and tcgen05 (issued by one thread)
_TENSOR = re.compile(r"[HIBDQO]MMA|[HIBQ]GMMA|UTC[HIQO]MMA")
_WGMMA = re.compile(r"[HIBQ]GMMA")
# besides comparisons those whose first register is a source, although no bracket says so
_WITHOUT_DESTINATION = ("FCHK", "BAR", "NANOSLEEP", "WARPSYNC")
_GLOBAL_LOADS = ("LDG", "LDGSTS")
_MMA_SHAPES = {
    "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32), "16864": (16, 8, 64),
    "8816": (8, 8, 16), "8832": (8, 8, 32),
}  # fmt: skip


class UnknownOpcodeError(ValueError):
    """An opcode that is in no table: look its pipe up instead of guessing."""


@dataclass(frozen=True)
class Instruction:
    address: int
    # "P0", "!UP1" or "" when it is always executed
    predicate: str
    opcode: str
    operands: str

    @cached_property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def pipe(self) -> Pipe:
        if _TENSOR.fullmatch(self.base):
            return Pipe.TENSOR
        if self.base not in _PIPES:
            raise UnknownOpcodeError(f"{self.opcode}: in none of the pipe tables of {Path(__file__).name}")
        return _PIPES[self.base]

    @cached_property
    def bits(self) -> int:
        """Bits per lane of a memory operation."""
        parts = self.opcode.split(".")
        if self.base in ("LDSM", "STSM"):
            return 32 * int(parts[-1]) if parts[-1] in ("2", "4") else 32
        widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return next((widths[part] for part in parts if part in widths), 32)

    @cached_property
    def label(self) -> str:
        found = re.search(r"`\((.+?)\)", self.operands)
        return found[1] if found else ""

    @cached_property
    def registers_written(self) -> frozenset[int]:
        """The numbers of the registers of a lane that it may write; for a wgmma none, since they go in order."""
        destination = next((x for x in self.operands.split(", ") if not re.fullmatch(r"!?U?P(\d|T)", x)), "")
        found = re.fullmatch(r"R(\d+)", destination)
        if found is None or self.is_wgmma or "SETP" in self.base or self.base in _WITHOUT_DESTINATION:
            return frozenset()
        return frozenset(range(int(found[1]), int(found[1]) + self._num_registers_written))

    @property
    def _num_registers_written(self) -> int:
        if self.pipe is Pipe.TENSOR:
            # of sums in 32 bits
            return 4
        if self.pipe is Pipe.LSU:
            return max(1, self.bits // 32)
        parts = self.opcode.split(".")
        if "128" in parts:
            return 4
        is_wide = {"64", "WIDE", "F64", "S64"} & {*parts} or (self.base in ("F2I", "I2I") and "U64" in parts)
        return 2 if is_wide or self.pipe is Pipe.DOUBLE or parts == ["CS2R"] else 1

    @property
    def is_wgmma(self) -> bool:
        return _WGMMA.fullmatch(self.base) is not None

    @cached_property
    def fragments(self) -> frozenset[int]:
        """The registers of a lane that a wgmma takes of its left factor: four of them, or none for a descriptor."""
        found = re.match(r"R\d+, R(\d+)", self.operands)
        return frozenset(range(int(found[1]), int(found[1]) + 4)) if found and self.is_wgmma else frozenset()

    @property
    def is_conditional(self) -> bool:
        # BRA.U, BRA.DIV: the condition is an operand
        return bool(self.predicate) or not self.operands.startswith("`(")

    @property
    def is_jump(self) -> bool:
        # a call of a label inside of the kernel is ptxas's jump out of a loop; functions begin with $
        return self.base == "BRA" or (self.base == "CALL" and not self.label.startswith("$"))


@dataclass(frozen=True)
class Loop:
    """Instructions first to last; last branches to first."""

    first: int
    last: int

    def __contains__(self, index: int) -> bool:
        return self.first <= index <= self.last


@dataclass(frozen=True)
class Counts:
    """What a stretch of code is made of, per warp that runs it once."""

    instructions: int
    pipes: Counter[Pipe]
    mufu: Counter[str]
    # by operation and bits per lane, such as LDG.128
    memory: Counter[str]
    tensor: Counter[str]

    @property
    def global_load_bytes(self) -> int:
        """Bytes that a warp with 32 active lanes loads."""
        loads = ((name.split("."), n) for name, n in self.memory.items())
        return sum(n * 32 * int(bits) // 8 for (base, bits), n in loads if base in _GLOBAL_LOADS)

    @property
    def narrowest_global_load(self) -> int:
        """Bits per lane, 0 without a global load."""
        names = (name.split(".") for name in self.memory)
        return min((int(bits) for base, bits in names if base in _GLOBAL_LOADS), default=0)

    @property
    def lsu_words(self) -> int:
        """Passes of 32 lanes x 4 bytes: 128 bytes are what L1, shared memory and shuffles move in a clock."""
        return sum(n * max(1, int(name.split(".")[1]) // 32) for name, n in self.memory.items())

    @property
    def int8_macs(self) -> int:
        """Multiply-adds of 8-bit operands, floats among them: one rate holds for both."""
        return sum(n * tensor_macs(opcode) for opcode, n in self.tensor.items() if opcode[0] in "IQ")

    @property
    def half_macs(self) -> int:
        return sum(n * tensor_macs(opcode) for opcode, n in self.tensor.items() if opcode[0] == "H")


def count(code: Iterable[Instruction]) -> Counts:
    """Count instructions, those with a predicate like the others."""
    code = list(code)
    mufu = Counter(x.opcode.removeprefix("MUFU.") for x in code if x.base == "MUFU")
    memory = Counter(f"{x.base}.{x.bits}" for x in code if x.pipe is Pipe.LSU)
    tensor = Counter(x.opcode for x in code if x.pipe is Pipe.TENSOR)
    return Counts(len(code), Counter(x.pipe for x in code), mufu, memory, tensor)


def count_at_least(code: Iterable[Instruction]) -> Counts:
    """Count every instruction, but as work of its pipe only what no predicate can turn off."""
    code = list(code)
    return replace(count(x for x in code if not x.predicate), instructions=len(code))


def tensor_macs(opcode: str) -> int:
    """Multiply-adds per warp of a tensor instruction, whose shape is in its name up to sm_90."""
    for part in opcode.split("."):
        if part in _MMA_SHAPES:
            m, n, k = _MMA_SHAPES[part]
            return m * n * k
        if shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", part):
            # each of the four warps of a group issues it once
            return int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    raise UnknownOpcodeError(f"{opcode}: no shape to count multiply-adds from")


@dataclass(frozen=True)
class Kernel:
    """The analysis of one compiled kernel."""

    capability: int
    num_warps: int
    # dynamic and so not in the cubin
    shared_bytes: int
    registers: int
    stack_bytes: int
    code: tuple[Instruction, ...]
    # index of the first instruction of the code that is hardly ever run
    cold: int
    targets: dict[int, int]
    # in program order, an outer loop before those inside of it
    loops: tuple[Loop, ...]

    @cached_property
    def straight(self) -> Counts:
        return count(x for i, x in enumerate(self.code[: self.cold]) if self._innermost(i) is None)

    @cached_property
    def loop_counts(self) -> tuple[Counts, ...]:
        return tuple(self._own_counts(loop) for loop in self.loops)

    @property
    def instructions(self) -> int:
        return self.cold

    @cached_property
    def spill_operations(self) -> int:
        return sum(x.base in ("LDL", "STL") for x in self.code)

    @cached_property
    def main_loop(self) -> int | None:
        """The first loop in program order that loads from global memory itself."""
        return next((i for i, counts in enumerate(self.loop_counts) if counts.global_load_bytes), None)

    @cached_property
    def overwritten_fragments(self) -> list[str]:
        return overwritten_fragments(self.code, self.targets)

    @property
    def main(self) -> Counts:
        """The main loop, or the straight code of a kernel without one."""
        return self.straight if self.main_loop is None else self.loop_counts[self.main_loop]

    def _innermost(self, index: int) -> Loop | None:
        around = (loop for loop in self.loops if index in loop)
        return min(around, key=lambda loop: loop.last - loop.first, default=None)

    def _own_counts(self, loop: Loop) -> Counts:
        return count(self.code[i] for i in range(loop.first, loop.last + 1) if self._innermost(i) == loop)


_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_\w+|\$[\w$]+):")


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Split nvdisasm's text into instructions and the index that each label stands before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.fullmatch(line.strip()):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    return code, labels


def analyse(cubin: bytes, num_warps: int, shared_bytes: int) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    capability = re.search(r"EF_CUDA_SM(\d+)|\.target\s+sm_(\d+)", text)
    if resources is None or capability is None:
        raise ValueError("expected one kernel in the cubin, nvdisasm and cuobjdump tell of none")
    code, labels = parse(text)
    cold, targets, loops = control_flow(code, labels)
    return Kernel(
        int(capability[1] or capability[2]), num_warps, shared_bytes, int(resources[1]), int(resources[2]),
        tuple(code), cold, targets, loops,
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(BIN / tool), *arguments], capture_output=True, text=True, check=True).stdout


def control_flow(code: list[Instruction], labels: dict[str, int]) -> tuple[int, dict[int, int], tuple[Loop, ...]]:
    """Find the first cold instruction, the target of each jump and the loops."""
    exits = [i for i, x in enumerate(code) if x.base == "EXIT" and not x.predicate]
    cold = exits[-1] + 1 if exits else len(code)
    targets = {i: labels[x.label] for i, x in enumerate(code[:cold]) if x.is_jump and x.label in labels}
    last_of: dict[int, int] = {}
    for i, target in targets.items():
        # from code out of line, which its target does not lead to, a branch backwards returns and does not loop
        loops_back = target <= i and shortest_way(code, targets, [target], {i})
        # tensor memory is asked for until it is there: as a rule once
        if loops_back and not any(x.base == "UTCATOMSWS" for x in code[target:i]):
            last_of[target] = max(i, last_of.get(target, 0))
    loops = sorted((Loop(*span) for span in last_of.items()), key=lambda loop: (loop.first, -loop.last))
    return cold, targets, tuple(loops)


def shortest_way(
    code: list[Instruction] | tuple[Instruction, ...], targets: dict[int, int], starts: list[int], goals: set[int]
) -> list[int]:
    """Find the fewest instructions from a start to a goal, both included, going forwards only; [] for no way."""
    came_from: dict[int, tuple[int, int | None]] = {start: (1, None) for start in starts}
    for i in range(min(starts), max(goals) + 1):
        if i not in came_from or i in goals:
            continue
        for follower in _followers(code[i], i, targets):
            length = came_from[i][0] + 1
            if follower > i and length < came_from.get(follower, (length + 1, None))[0]:
                came_from[follower] = (length, i)
    reached = [goal for goal in goals if goal in came_from]
    at: int | None = min(reached, key=lambda goal: came_from[goal][0], default=None)
    way = []
    while at is not None:
        way.append(at)
        at = came_from[at][1]
    return way[::-1]


def _followers(x: Instruction, index: int, targets: dict[int, int]) -> list[int]:
    if x.base in ("BRX", "JMX", "JMP"):
        raise UnknownOpcodeError(f"{x.opcode}: a jump that cannot be followed")
    jumps = [targets[index]] if index in targets else []
    ends = x.base in ("EXIT", "RET") or x.is_jump
    return jumps + ([index + 1] if not ends or _may_fall_through(x) else [])


def _may_fall_through(x: Instruction) -> bool:
    return x.is_conditional if x.is_jump else bool(x.predicate)


# wgmmas in flight on one way through the code, by their indices: groups, the oldest first; the last one is open
_InFlight = tuple[tuple[int, ...], ...]


def overwritten_fragments(code: tuple[Instruction, ...], targets: dict[int, int]) -> list[str]:
    """Say where a register is written that a wgmma may still read, since no wait has covered it on some way there."""
    found = set()
    pending: list[tuple[int, _InFlight]] = [(0, ((),))] if any(x.is_wgmma for x in code) else []
    seen = set(pending)
    while pending:
        i, in_flight = pending.pop()
        if i >= len(code):
            continue
        for wgmma in (j for group in in_flight for j in group):
            if overwritten := code[wgmma].fragments & code[i].registers_written:
                found.add((wgmma, i, min(overwritten)))
        in_flight = _after(code[i], i, in_flight)
        for follower in _followers(code[i], i, targets):
            if (follower, in_flight) not in seen:
                seen.add((follower, in_flight))
                pending.append((follower, in_flight))
    return [
        f"R{register} of {code[wgmma].base} at {code[wgmma].address:#x} is written by {code[i].opcode} at"
        f" {code[i].address:#x} with no wait in between"
        for wgmma, i, register in sorted(found)
    ]


def _after(x: Instruction, index: int, in_flight: _InFlight) -> _InFlight:
    """Start a wgmma, close its group, or wait for all groups but the newest ones."""
    if x.is_wgmma:
        # again in a loop, it is in flight since its last time
        groups = tuple(tuple(j for j in group if j != index) for group in in_flight)
        in_flight = (*(group for group in groups[:-1] if group), (*groups[-1], index))
        return (*in_flight, ()) if "gsb" in x.operands else in_flight
    if x.opcode.startswith("WARPGROUP.DEPBAR"):
        num_pending = int(x.operands.split(", ")[1], 0)
        return in_flight[max(0, len(in_flight) - 1 - num_pending) :]
    return in_flight


def ways(kernel: Kernel, executed: set[int]) -> tuple[Counts, dict[int, Counts]]:
    """Count the shortest way through the straight code and through each executed loop.

    What can be jumped over is left out, unless an executed loop lies in it: the counts bound from below what a warp
    issues, and rare branches cost nothing. See count_at_least for predicates.
    """
    outermost = [i for i in executed if not _parents(kernel, i, executed)]
    exits = {i for i, x in enumerate(kernel.code[: kernel.cold]) if x.base == "EXIT"}
    straight = _way_through(kernel, [0], exits, outermost)
    bodies = {}
    for i in executed:
        loop = kernel.loops[i]
        children = [j for j in executed if _parents(kernel, j, executed)[-1:] == [i]]
        bodies[i] = _way_through(kernel, [loop.first], {loop.last}, children)
    return straight, bodies


def _parents(kernel: Kernel, index: int, executed: set[int]) -> list[int]:
    """List the executed loops around a loop, the innermost last."""
    return [i for i in sorted(executed) if i != index and kernel.loops[index].first in kernel.loops[i] and i < index]


def _way_through(kernel: Kernel, starts: list[int], goals: set[int], inner: list[int]) -> Counts:
    """Count the shortest way that meets the inner loops in their order, without their instructions."""
    path: list[int] = []
    for loop in (kernel.loops[i] for i in sorted(inner)):
        path += _way_or_raise(kernel, starts, {loop.first})[:-1]
        starts = _exits_of(kernel, loop)
    path += _way_or_raise(kernel, starts, goals)
    return count_at_least(kernel.code[i] for i in path)


def _way_or_raise(kernel: Kernel, starts: list[int], goals: set[int]) -> list[int]:
    if not (way := shortest_way(kernel.code, kernel.targets, starts, goals)):
        raise ValueError(f"no way from instructions {starts} to {sorted(goals)}: is the loop ever executed?")
    return way


def _exits_of(kernel: Kernel, loop: Loop) -> list[int]:
    leaving = (f for i in range(loop.first, loop.last + 1) for f in _followers(kernel.code[i], i, kernel.targets))
    return sorted({follower for follower in leaving if follower > loop.last})
