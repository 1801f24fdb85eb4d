"""From the text of PTX to a Kernel: declarations, instructions and basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx_emulator.ptx_types import TYPES, PtxError


class Register(NamedTuple):
    """A register by its slot; `inverted` is the exclamation mark of a predicate."""

    slot: int
    width: int
    inverted: bool = False


class Immediate(NamedTuple):
    """A constant as its bits; `hexfloat_width` is the width of 0f... and 0d... constants, 0 for integers."""

    bits: int
    hexfloat_width: int


class Symbol(NamedTuple):
    """A special register, a label, a parameter or a variable."""

    name: str


class Vector(NamedTuple):
    """Operands in braces."""

    elements: tuple[Operand, ...]


class Pair(NamedTuple):
    """Two destinations, d|p."""

    first: Operand
    second: Operand


class Address(NamedTuple):
    """[base + offset]."""

    base: Operand
    offset: int


Operand = Register | Immediate | Symbol | Vector | Pair | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction, its opcode apart from its modifiers."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str


class Block(NamedTuple):
    """A basic block: instructions first to end (exclusive)."""

    first: int
    end: int


@dataclass
class Kernel:
    """An entry and what its module declares."""

    name: str
    params: list[tuple[str, int]]
    num_threads: int
    register_widths: list[int] = field(default_factory=list)
    # offset of each variable
    shared: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    global_data: dict[str, bytes] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    # block of each label
    labels: dict[str, int] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_ENDS_BLOCK = ("bra", "ret", "exit")


def parse(ptx: str) -> Kernel:
    """Parse a module with a single entry and no functions."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    # the directives that end with the line, not with a semicolon
    ptx = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", ptx, flags=re.M)
    if len(re.findall(r"\.entry\b", ptx)) != 1 or re.search(r"\.func\b", ptx):
        raise PtxError("a module must have one .entry and no .func: calls are not modelled")
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise PtxError("no .entry found")
    kernel = Kernel(entry[1], _parse_params(entry[2]), _parse_num_threads(entry[3]))
    _parse_module_variables(ptx[: entry.start()], kernel)
    _BodyParser(kernel, ptx, entry.end()).run()
    _make_blocks(kernel)
    return kernel


def _parse_params(text: str) -> list[tuple[str, int]]:
    params = []
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        words = declaration.split()
        if words[0] != ".param" or "[" in declaration or words[1][1:] not in TYPES:
            raise PtxError(f"unknown kind of parameter: {declaration}")
        params.append((words[-1], TYPES[words[1][1:]].width))
    return params


def _parse_num_threads(directives: str) -> int:
    found = re.search(r"\.reqntid\s+(\d+)", directives) or re.search(r"\.maxntid\s+(\d+)", directives)
    if found is None or int(found[1]) % 32:
        raise PtxError("the entry declares no whole number of warps with .reqntid or .maxntid")
    return int(found[1])


def _parse_module_variables(text: str, kernel: Kernel) -> None:
    for statement in text.split(";"):
        space = re.search(r"\.(shared|global|const)\b", statement)
        if space is None:
            continue
        name = re.search(r"([\w$]+)\s*\[", statement)
        if name is None or space[1] == "const":
            raise PtxError(f"unknown declaration: {statement.strip()}")
        if space[1] == "shared":
            # Triton declares one array of dynamic size
            if kernel.shared:
                raise PtxError("more than one shared variable")
            kernel.shared[name[1]] = 0
        else:
            kernel.global_data[name[1]] = _parse_initialiser(statement)


def _parse_initialiser(statement: str) -> bytes:
    found = re.search(r"\.[bus](8|16|32|64)\s+[\w$]+\s*\[(\d+)\]\s*=\s*\{([^}]*)\}", statement)
    if found is None:
        raise PtxError(f"unknown declaration: {statement.strip()}")
    width = int(found[1]) // 8
    values = [int(word, 0) & ((1 << 8 * width) - 1) for word in found[3].split(",")]
    return b"".join(value.to_bytes(width, "little") for value in values).ljust(int(found[2]) * width, b"\0")


class _BodyParser:
    """The body of an entry. Registers that a nested pair of braces declares are its own, as in inline assembly."""

    def __init__(self, kernel: Kernel, text: str, position: int) -> None:
        self.kernel = kernel
        self.text = text
        self.position = position
        self.scopes: list[dict[str, Register]] = [{}]
        # %r<100> declares %r0 to %r99, most of them unused: a slot is given at the first use
        self.families: list[dict[str, str]] = [{}]
        self.label_at: dict[str, int] = {}

    def run(self) -> None:
        while self.scopes:
            self._skip_space()
            if self.position >= len(self.text):
                raise PtxError("unbalanced braces")
            character = self.text[self.position]
            if character in "{}":
                self._change_scope(character)
            elif label := _LABEL.match(self.text, self.position):
                self.label_at[label[1]] = len(self.kernel.instructions)
                self.position = label.end()
            else:
                self._parse_statement(self._take_statement())
        self.kernel.labels = self.label_at

    def _skip_space(self) -> None:
        found = re.compile(r"[\s;]*").match(self.text, self.position)
        self.position = found.end() if found else self.position

    def _change_scope(self, brace: str) -> None:
        self.position += 1
        if brace == "{":
            self.scopes.append({})
            self.families.append({})
        else:
            self.scopes.pop()
            self.families.pop()

    def _take_statement(self) -> str:
        end = self.text.index(";", self.position)
        statement = self.text[self.position : end].strip()
        self.position = end + 1
        return statement

    def _parse_statement(self, statement: str) -> None:
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif statement.startswith(".local"):
            self._declare_local(statement)
        elif statement.startswith(".pragma"):
            pass
        elif statement.startswith("."):
            raise PtxError(f"unknown directive: {statement}")
        else:
            self.kernel.instructions.append(self._parse_instruction(statement))

    def _declare_registers(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        if kind[1:] not in TYPES:
            raise PtxError(f"unknown type of register: {statement}")
        for name in names.split(","):
            prefix, is_family, _ = name.strip().partition("<")
            self.families[-1][prefix + "<" if is_family else prefix] = kind[1:]

    def _declare_local(self, statement: str) -> None:
        found = re.fullmatch(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement)
        if found is None:
            raise PtxError(f"unknown declaration: {statement}")
        offset = -(-self.kernel.local_bytes // int(found[1])) * int(found[1])
        self.kernel.local[found[2]] = offset
        self.kernel.local_bytes = offset + int(found[3])

    def _parse_instruction(self, statement: str) -> Instruction:
        found = _INSTRUCTION.fullmatch(statement)
        if found is None:
            raise PtxError(f"cannot read: {statement}")
        guard = self._find_register(found[2]) if found[2] else None
        if found[2] and guard is None:
            raise PtxError(f"unknown register {found[2]} in: {statement}")
        if guard is not None and found[1]:
            guard = guard._replace(inverted=True)
        opcode, *modifiers = found[3].split(".")
        operands = tuple(self._parse_operand(text) for text in _split_operands(found[4]))
        text = re.sub(r"\s+", " ", statement)
        return Instruction(opcode, tuple(modifiers), operands, guard, text)

    def _find_register(self, name: str) -> Register | None:
        prefix = name.rstrip("0123456789") + "<"
        for scope, families in zip(reversed(self.scopes), reversed(self.families), strict=True):
            if name in scope:
                return scope[name]
            kind = families.get(name) or families.get(prefix)
            if kind is not None:
                scope[name] = Register(len(self.kernel.register_widths), TYPES[kind].width)
                self.kernel.register_widths.append(TYPES[kind].width)
                return scope[name]
        return None

    def _parse_operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._parse_operand(part) for part in text.strip("{} ").split(",")))
        if text.startswith("["):
            return self._parse_address(text)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._parse_operand(first), self._parse_operand(second))
        if text.startswith("!"):
            register = self._find_register(text[1:])
            return register._replace(inverted=True) if register else Symbol(text)
        if register := self._find_register(text):
            return register
        return _parse_constant(text) or Symbol(text)

    def _parse_address(self, text: str) -> Address:
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise PtxError(f"unknown form of address: {text}")
        return Address(self._parse_operand(found[1]), int(found[2] or "0", 0))


def _parse_constant(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 4)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 8)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0), 0)
    return None


def _split_operands(text: str) -> list[str]:
    operands, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append("")
        else:
            operands[-1] += character
    return [operand for operand in operands if operand.strip()]


def _make_blocks(kernel: Kernel) -> None:
    end = len(kernel.instructions)
    if not any(instruction.opcode in ("ret", "exit") for instruction in kernel.instructions):
        raise PtxError("the kernel never returns")
    firsts = {0, *kernel.labels.values()}
    firsts |= {i + 1 for i, instruction in enumerate(kernel.instructions) if instruction.opcode in _ENDS_BLOCK}
    starts = sorted(first for first in firsts if first < end)
    kernel.blocks = [Block(first, last) for first, last in zip(starts, [*starts[1:], end], strict=True)]
    block_at = {first: index for index, first in enumerate(starts)}
    # a label at the very end is the end of the kernel
    kernel.labels = {name: block_at.get(first, len(starts)) for name, first in kernel.labels.items()}
