"""What the compiled kernels may cost, held against the committed budget.json.

python tests/gpu/budget.py            compare
python tests/gpu/budget.py --write    make what is there the budget
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from configurations import CAPABILITIES, CONFIGURATIONS, Counted, compile_for
from gpus import LANES, occupancy

BUDGET = Path(__file__).with_name("budget.json")
GROWTH = 1.05


@dataclass(frozen=True)
class Record:
    """The counts of one kernel in one configuration on one architecture."""

    registers: int
    spill_operations: int
    shared_bytes: int
    ctas_per_multiprocessor: int
    warps_per_multiprocessor: int
    # the narrowest global load of the main loop, or of a kernel without one; bits per lane
    load_bits: int
    # the main loop's; "" for none
    tensor_opcode: str
    # per lane, as if each element had a lane of its own; 0 for a kernel without a main loop
    instructions_per_element: float
    mufu_per_element: float
    # without what is out of line behind the last EXIT
    instructions: int


Records = dict[str, Record]

_GROWTH_LIMITED = ("registers", "shared_bytes", "instructions_per_element", "mufu_per_element", "instructions")


def record_of(counted: Counted) -> Record:
    kernel, main = counted.kernel, counted.kernel.main
    resident = occupancy(kernel)
    elements = counted.elements_per_iteration
    per_element = LANES / elements if elements else 0.0
    return Record(
        registers=kernel.registers,
        spill_operations=kernel.spill_operations,
        shared_bytes=kernel.shared_bytes,
        ctas_per_multiprocessor=resident.ctas,
        warps_per_multiprocessor=resident.warps,
        load_bits=main.narrowest_global_load,
        tensor_opcode=next(iter(main.tensor), ""),
        instructions_per_element=round(main.instructions * per_element, 3),
        mufu_per_element=round(sum(main.mufu.values()) * per_element, 3),
        instructions=kernel.instructions,
    )


def records(capabilities: tuple[int, ...] = CAPABILITIES) -> Records:
    return {
        f"{counted.name}, sm_{capability}": record_of(counted)
        for configuration in CONFIGURATIONS
        for capability in capabilities
        for counted in compile_for(configuration, capability)
    }


def differences(name: str, budget: Record, actual: Record) -> Iterator[str]:
    """Say what one record costs beyond its budget."""

    def message(quantity: str) -> str:
        return f"{name}: {quantity}: budget {getattr(budget, quantity)}, actual {getattr(actual, quantity)}"

    for quantity in _GROWTH_LIMITED:
        if getattr(actual, quantity) > GROWTH * getattr(budget, quantity):
            yield message(quantity)
    # a budget cannot allow one
    if actual.spill_operations:
        yield f"{name}: spill_operations: budget 0, actual {actual.spill_operations}"
    if actual.load_bits < budget.load_bits:
        yield message("load_bits")
    if actual.ctas_per_multiprocessor < budget.ctas_per_multiprocessor:
        yield message("ctas_per_multiprocessor")
    if budget.tensor_opcode and actual.tensor_opcode != budget.tensor_opcode:
        yield message("tensor_opcode")


def compare(budget: Records, actual: Records) -> list[str]:
    """Say what costs more than the budget allows, what has no budget and what a budget is left over of."""
    found = [f"{name}: has no budget" for name in actual.keys() - budget.keys()]
    found += [f"{name}: has a budget, but is no longer counted" for name in budget.keys() - actual.keys()]
    for name in budget.keys() & actual.keys():
        found += differences(name, budget[name], actual[name])
    return sorted(found)


def read(path: Path = BUDGET) -> Records:
    content = json.loads(path.read_text())
    names = {field.name for field in fields(Record)}
    for name, values in content["records"].items():
        if values.keys() != names:
            raise ValueError(f"{path.name}: {name}: expected {sorted(names)}, got {sorted(values)}")
    return {name: Record(**values) for name, values in content["records"].items()}


def triton_version(path: Path = BUDGET) -> str:
    """Return the version of Triton, and with it of ptxas, that the budget holds for."""
    return json.loads(path.read_text())["triton"]


def write(actual: Records, path: Path = BUDGET) -> None:
    content = {"triton": triton.__version__, "records": {name: asdict(actual[name]) for name in sorted(actual)}}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the compiled kernels may cost.")
    parser.add_argument("--write", action="store_true", help=f"write {BUDGET.name} instead of comparing with it")
    if parser.parse_args().write:
        write(records())
        return
    if found := compare(read(), records()):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
