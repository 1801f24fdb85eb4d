"""The instructions that the kernels execute: within their budget, exact, and red where a kernel grows."""

import json

import pytest

from mgt_benchmarks import instructions
from mgt_benchmarks.case import AbsentError
from mgt_kernels import cpu

COMPILER, BUDGET = instructions.read_budget()


@pytest.fixture(scope="module")
def counted():
    try:
        return instructions.count()
    except AbsentError as reason:
        pytest.skip(str(reason))


@pytest.mark.skipif(
    instructions.compiler_of() != COMPILER, reason=f"instructions.json holds for libraries compiled by {COMPILER}"
)
def test_kernels_keep_their_budget(counted):
    found = list(instructions.differences(BUDGET, counted[0]))
    assert not found, "\n".join(found)


def test_counts_do_not_depend_on_the_run(counted):
    isa = cpu.kernel_isa("w4a16_linear")
    again = instructions.count([isa])[0]
    assert again == {name: number for name, number in counted[0].items() if name.endswith(f", {isa}")} and again


def test_every_kernel_of_this_processor_is_counted(counted):
    kernels = {(name.split(", ")[0], name.split(", ")[-1]) for name in counted[0]}
    expected = {
        (op, isa)
        for op in ("sample_tokens", "differential_sample", "mask_by_confidence", "w4a8_linear", "w4a16_linear")
        for isa in cpu.available_isas()
        if isa == cpu.kernel_isa(op, isa) != "scalar"
    }
    assert kernels == expected


def test_a_kernel_that_grows_is_named():
    name, number = next(iter(BUDGET.items()))
    assert not list(instructions.differences(BUDGET, {name: int(number * 1.029)}))
    (found,) = instructions.differences(BUDGET, {name: int(number * 1.031)})
    assert found.startswith(f"{name}: ") and "+3.1%" in found
    (found,) = instructions.differences(BUDGET, {"new": 1})
    assert found == "new: not in instructions.json"


def test_the_budget_names_its_compiler():
    assert set(json.loads(instructions.BUDGET.read_text())) == {"compiler", "instructions"}
    assert any(name in COMPILER for name in ("GCC", "clang"))


def test_where_nothing_compiles_it_says_so(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(AbsentError, match="no C compiler"):
        instructions.count()
