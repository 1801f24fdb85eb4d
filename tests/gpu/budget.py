"""What the compiled kernels may cost, held against the committed budget.json.

python tests/gpu/budget.py            compare
python tests/gpu/budget.py --write    make what is there the budget

Each version of Triton, and with it of ptxas, has entries of its own; those of the version that is imported are compared
or written. For another one: PYTHONPATH=build/triton/3.6.0 python tests/gpu/budget.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import triton
from configurations import CAPABILITIES, CONFIGURATIONS, Counted, compile_for
from driver import ptxas_warnings
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


@dataclass
class Budget:
    """What holds for one version of Triton."""

    # the kernels whose wgmma ptxas may serialise, each by the name of its record; --write leaves them as they are
    serialised: list[str] = field(default_factory=list)
    records: Records = field(default_factory=dict)


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


def counted(capabilities: tuple[int, ...]) -> dict[str, Counted]:
    return {
        f"{counted.name}, sm_{capability}": counted
        for configuration in CONFIGURATIONS
        for capability in capabilities
        for counted in compile_for(configuration, capability)
    }


def faults(kernels: dict[str, Counted], serialised: Collection[str]) -> Iterator[str]:
    """Say what is wrong with the wgmmas of some kernels, and which of those that may be serialised need not be."""
    for name, kernel in kernels.items():
        warnings = ptxas_warnings(kernel.launch) if "wgmma" in kernel.launch.ptx else []
        if name not in serialised:
            yield from (f"{name}: ptxas: {warning}" for warning in warnings)
        elif not warnings:
            yield f"{name}: ptxas no longer warns: take it off the list of what may be serialised"
        yield from (f"{name}: {overwritten}" for overwritten in kernel.kernel.overwritten_fragments)


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


def check(capabilities: tuple[int, ...]) -> list[str]:
    """Say where the kernels, compiled for some architectures, do not keep the budget of the Triton that is imported.

    Raises:
        ValueError: budget.json has no entries of this version.
    """
    budget = read().get(triton.__version__)
    if budget is None:
        raise ValueError(f"{BUDGET.name} has no entries of Triton {triton.__version__}")
    kernels = counted(capabilities)
    suffixes = tuple(f", sm_{capability}" for capability in capabilities)
    expected = {name: record for name, record in budget.records.items() if name.endswith(suffixes)}
    found = compare(expected, {name: record_of(kernel) for name, kernel in kernels.items()})
    left_over = [name for name in budget.serialised if name.endswith(suffixes) and name not in kernels]
    found += [f"{name}: may be serialised, but is no longer counted" for name in left_over]
    return sorted([*found, *faults(kernels, budget.serialised)])


def read(path: Path = BUDGET) -> dict[str, Budget]:
    """Read what holds for each version of Triton."""
    names = {field.name for field in fields(Record)}
    budgets = {}
    for version, content in json.loads(path.read_text()).items():
        for name, values in content["records"].items():
            if values.keys() != names:
                raise ValueError(f"{path.name}: {version}: {name}: expected {sorted(names)}, got {sorted(values)}")
        budgets[version] = Budget(
            content["serialised"], {name: Record(**values) for name, values in content["records"].items()}
        )
    return budgets


def write(records: Records, path: Path = BUDGET) -> None:
    """Make these the records of the Triton that is imported; leave everything else as it is."""
    budgets = read(path)
    budgets.setdefault(triton.__version__, Budget()).records = {name: records[name] for name in sorted(records)}
    content = {version: asdict(budgets[version]) for version in sorted(budgets)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the compiled kernels may cost.")
    parser.add_argument("--write", action="store_true", help=f"write {BUDGET.name} instead of comparing with it")
    if parser.parse_args().write:
        write({name: record_of(kernel) for name, kernel in counted(CAPABILITIES).items()})
    elif found := check(CAPABILITIES):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
