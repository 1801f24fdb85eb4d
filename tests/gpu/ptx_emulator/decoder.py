"""From an instruction to a closure: every operand is looked up and every modifier accounted for once, here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_emulator.frame import Frame
from ptx_emulator.parser import Address, Immediate, Instruction, Kernel, Operand, Pair, Register, Symbol, Vector
from ptx_emulator.ptx_types import FLOAT32, TYPES, UNSIGNED, Array, PtxError, PtxType, bits_of, constant

Execute = Callable[[Frame], None]
Read = Callable[[Frame], Array]
Write = Callable[[Frame, Array], None]
Handler = Callable[["Decoder"], Execute]

# addresses of shared and local variables: not 0, and on a boundary of every swizzle pattern
SHARED_BASE = 1024
LOCAL_BASE = 1024
_CACHE_HINTS = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
    "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
}  # fmt: skip

HANDLERS: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    """Register the handler of some opcodes."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Decoder:
    """An instruction while it is decoded: modifiers are taken off, operands become readers and writers."""

    def __init__(self, instruction: Instruction, kernel: Kernel, index: int, approx_ulp: int) -> None:
        """Take the kernel's index-th instruction."""
        self.instruction = instruction
        self.kernel = kernel
        self.index = index
        self.approx_ulp = approx_ulp
        self.opcode = instruction.opcode
        self.operands = instruction.operands
        self.modifiers = list(instruction.modifiers)
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        # the accumulators of a wgmma
        self.sums: set[int] = set()

    def decode(self) -> Execute:
        """Find the handler and let it decode; whatever modifier it leaves is unknown."""
        handler = HANDLERS.get(self.opcode)
        if handler is None:
            raise PtxError(f"unknown opcode {self.opcode}   [at: {self.instruction.text}]")
        try:
            execute = handler(self)
            if self.modifiers:
                raise PtxError(f"unknown modifier .{self.modifiers[0]} of {self.opcode}")
        except PtxError as error:
            raise PtxError(f"{error}   [at: {self.instruction.text}]") from None
        return execute

    # modifiers

    def take(self, *names: str) -> str | None:
        """Take off the first modifier that is one of names."""
        for modifier in self.modifiers:
            if modifier in names:
                self.modifiers.remove(modifier)
                return modifier
        return None

    def require(self, *names: str) -> str:
        """Take off a modifier that must be there."""
        taken = self.take(*names)
        if taken is None:
            raise PtxError(f"{self.opcode} without one of ." + " .".join(names))
        return taken

    def take_type(self, *allowed: str) -> PtxType:
        """Take the type off the end."""
        name = self.modifiers.pop() if self.modifiers else ""
        if name not in TYPES or (allowed and name not in allowed):
            raise PtxError(f"unknown type .{name} of {self.opcode}")
        return TYPES[name]

    def take_cache_hints(self) -> None:
        """Take off what says how to cache, which changes no result."""
        while self.take(*_CACHE_HINTS):
            pass

    def take_vector_length(self) -> int:
        """Take off .v2, .v4 or .v8."""
        taken = self.take("v2", "v4", "v8")
        return int(taken[1:]) if taken else 1

    def expect_operands(self, *counts: int) -> None:
        """Refuse any other number of operands."""
        if len(self.operands) not in counts:
            raise PtxError(f"{self.opcode} with {len(self.operands)} operands")

    # operands

    def elements(self, index: int) -> tuple[Operand, ...]:
        """The elements of a vector operand, or the operand itself."""
        operand = self.operands[index]
        return operand.elements if isinstance(operand, Vector) else (operand,)

    def integer(self, index: int) -> int:
        """An operand that must be an integer constant."""
        operand = self.operands[index]
        if not isinstance(operand, Immediate) or operand.hexfloat_width:
            raise PtxError(f"operand {index} of {self.opcode} is not an integer constant")
        return operand.bits

    def source(self, operand: int | Operand, kind: PtxType, *, wider: bool = False) -> Read:
        """Make the reader of an operand; `wider` lets a register be wider than the type, as for ld, st and cvt."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if isinstance(operand, Register):
            return self._register(operand, kind, wider)
        if isinstance(operand, Immediate):
            return _always(constant(self._constant_bits(operand, kind), kind.dtype))
        if isinstance(operand, Symbol):
            return self._symbol(operand.name, kind)
        raise PtxError(f"unknown operand {operand} of {self.opcode}")

    def _constant_bits(self, operand: Immediate, kind: PtxType) -> int:
        if operand.hexfloat_width not in (0, kind.width):
            raise PtxError(f"a constant of {operand.hexfloat_width} bytes as .{kind.name}")
        if kind.kind == "f" and not operand.hexfloat_width and operand.bits:
            raise PtxError(f"an integer constant as .{kind.name}")
        return operand.bits

    def _register(self, register: Register, kind: PtxType, wider: bool) -> Read:
        slot = register.slot
        self.reads.add(slot)
        if kind.kind == "pred":
            if register.width:
                raise PtxError("a register that is no predicate as .pred")
            if register.inverted:
                return lambda frame: ~frame.registers[slot]
            return lambda frame: frame.registers[slot]
        if register.inverted or (register.width != kind.width and not (wider and register.width > kind.width)):
            raise PtxError(f"a register of {8 * register.width} bits as .{kind.name}")
        if register.width != kind.width:
            return _read_low(slot, kind)
        return _read_as(slot, kind.dtype)

    def _symbol(self, name: str, kind: PtxType) -> Read:
        if name in self.kernel.shared:
            return _always(constant(SHARED_BASE + self.kernel.shared[name], kind.dtype))
        if name in self.kernel.local:
            return _always(constant(LOCAL_BASE + self.kernel.local[name], kind.dtype))
        if name in self.kernel.global_data:
            return lambda frame: constant(frame.batch.memory.address_of(name), kind.dtype)
        if name in SPECIAL_REGISTERS and kind.width == 4:
            return lambda frame: frame.special[name].view(kind.dtype)
        raise PtxError(f"unknown symbol {name}")

    def address(self, operand: int | Operand) -> Read:
        """Make the reader of an address, as int64."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is not an address")
        offset = operand.offset
        width = operand.base.width if isinstance(operand.base, Register) else 8
        base = self.source(operand.base, TYPES[f"u{8 * width}"])
        if width == 8 and not offset:
            return lambda frame: base(frame).view(np.int64)
        if width == 8:
            return lambda frame: base(frame).view(np.int64) + offset
        # with its sign: an offset may bring back a base below 0
        return lambda frame: base(frame).view(np.int32).astype(np.int64) + offset

    def destination(self, operand: int | Operand, kind: PtxType, *, wider: bool = False) -> Write:
        """Make the writer of an operand; `wider` extends into a wider register, as for ld and cvt."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if operand == Symbol("_"):
            return lambda frame, value: None
        if not isinstance(operand, Register) or operand.inverted:
            raise PtxError(f"{operand} is not a destination")
        slot, width = operand.slot, operand.width
        self.writes.add(slot)
        if width == kind.width:
            return lambda frame, value: frame.write(slot, value)
        if not wider or width < kind.width:
            raise PtxError(f"a register of {8 * width} bits as the .{kind.name} destination")
        extended = np.dtype(f"i{width}" if kind.kind == "s" else f"u{width}")
        return lambda frame, value: frame.write(slot, value.astype(extended))

    def pair(self, kind: PtxType) -> tuple[Write, Write | None]:
        """The writers of d|p, or of d alone, where p is a predicate."""
        operand = self.operands[0]
        if not isinstance(operand, Pair):
            return self.destination(0, kind), None
        return self.destination(operand.first, kind), self.destination(operand.second, TYPES["pred"])

    def pointwise(self, function: Callable[..., Array], result: PtxType, *kinds: PtxType) -> Execute:
        """Make the closure of destination = function(source, ...)."""
        self.expect_operands(1 + len(kinds))
        write = self.destination(0, result)
        reads = [self.source(1 + i, kind) for i, kind in enumerate(kinds)]
        if len(reads) == 1:
            (read,) = reads
            return lambda frame: write(frame, function(read(frame)))
        if len(reads) == 2:
            left, right = reads
            return lambda frame: write(frame, function(left(frame), right(frame)))
        if len(reads) == 3:
            first, second, third = reads
            return lambda frame: write(frame, function(first(frame), second(frame), third(frame)))
        return lambda frame: write(frame, function(*(read(frame) for read in reads)))


SPECIAL_REGISTERS = frozenset(
    [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]
)


def _always(value: Array) -> Read:
    return lambda frame: value


def _read_as(slot: int, dtype: np.dtype) -> Read:
    if dtype.kind == "f":

        def read(frame: Frame) -> Array:
            value = frame.registers[slot]
            return value if value.dtype == dtype else value.view(dtype)

        return read

    def read_bits(frame: Frame) -> Array:
        value = frame.registers[slot]
        if value.dtype == dtype:
            return value
        return bits_of(value).view(dtype) if value.dtype == FLOAT32 else value.view(dtype)

    return read_bits


def _read_low(slot: int, kind: PtxType) -> Read:
    unsigned = UNSIGNED[kind.width]
    return lambda frame: bits_of(frame.registers[slot]).astype(unsigned).view(kind.dtype)
