# ruff: noqa: N803 (Triton's names for compile-time constants)
"""The budget: kept by the kernels on every architecture, and red for each thing that it is there to catch."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import budget
import torch
import triton
import triton.language as tl
from budget import Budget, Record
from configurations import CAPABILITIES, CONFIGURATIONS, Case, Configuration, Counted, compile_for, loads, never
from versions import architecture_to_compile

of_a_triton_with_a_budget = pytest.mark.skipif(
    triton.__version__ not in budget.read(), reason=f"budget.json has no entries of Triton {triton.__version__}"
)

RECORD = Record(
    registers=100, spill_operations=0, shared_bytes=2048, ctas_per_multiprocessor=4, warps_per_multiprocessor=16,
    load_bits=128, tensor_opcode="IMMA.16832.S8.S8.SAT", instructions_per_element=40.0, mufu_per_element=2.0,
    instructions=1000,
)  # fmt: skip


@of_a_triton_with_a_budget
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_keep_their_budget(capability: int, request: pytest.FixtureRequest) -> None:
    if capability != architecture_to_compile() and not request.config.getoption("every_architecture"):
        pytest.skip("takes half a minute to compile; --every-architecture counts it")
    found = budget.check((capability,))
    assert not found, "\n".join(found)


def test_every_version_has_a_budget_for_each_capability_that_is_counted() -> None:
    names = [budget.records.keys() for budget in budget.read().values()]
    assert all(of_a_version == names[0] for of_a_version in names)
    assert {name.rsplit(", sm_", 1)[1] for name in names[0]} == set(map(str, CAPABILITIES))


def test_writing_leaves_other_versions_and_what_may_be_serialised(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_text("{}")
    budget.write({"kernel": RECORD}, path)
    ours = budget.read(path)[triton.__version__]
    assert ours == Budget([], {"kernel": RECORD})
    content = {"3.5.0": asdict(ours), triton.__version__: asdict(ours) | {"serialised": ["kernel"]}}
    path.write_text(json.dumps(content))
    budget.write({"other": RECORD}, path)
    assert budget.read(path) == {"3.5.0": ours, triton.__version__: Budget(["kernel"], {"other": RECORD})}


def test_a_version_without_a_budget_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    with pytest.raises(ValueError, match=r"budget.json has no entries of Triton 3.5.0"):
        budget.check((90,))


# with noise on sm_80 Triton 3.6.0 takes 70.4, 3.9.0 takes 69.8
@of_a_triton_with_a_budget
@pytest.mark.parametrize(("name", "most"), [("bf16 guided", 40), ("bf16 guided, noise", 71)])
def test_instructions_per_element_of_a_draw(name: str, most: int, capability: int) -> None:
    configuration = next(x for x in CONFIGURATIONS if x.name == name)
    record = budget.record_of(compile_for(configuration, capability)[0])
    assert 0 < record.instructions_per_element <= most


@pytest.mark.parametrize(
    ("quantity", "grown", "still_within"),
    [
        ("registers", 106, 105),
        ("shared_bytes", 2304, 2048),
        ("instructions_per_element", 42.1, 41.9),
        ("mufu_per_element", 2.2, 2.1),
        ("instructions", 1051, 1050),
        ("spill_operations", 1, 0),
        ("load_bits", 64, 256),
        ("ctas_per_multiprocessor", 3, 5),
        ("tensor_opcode", "", RECORD.tensor_opcode),
    ],
)
def test_growth_is_named(quantity: str, grown: float | str, still_within: float | str) -> None:
    name = "kernel, case, sm_80"
    actual = replace(RECORD, **{quantity: grown})  # type: ignore[arg-type]
    expected = f"{name}: {quantity}: budget {getattr(RECORD, quantity)}, actual {grown}"
    assert budget.compare({name: RECORD}, {name: actual}) == [expected]
    assert budget.compare({name: RECORD}, {name: replace(RECORD, **{quantity: still_within})}) == []  # type: ignore[arg-type]


def test_missing_and_left_over_entries_are_named() -> None:
    assert budget.compare({"old": RECORD}, {"new": RECORD}) == [
        "new: has no budget",
        "old: has a budget, but is no longer counted",
    ]


def test_a_budget_does_not_allow_spills() -> None:
    spilling = replace(RECORD, spill_operations=8)
    assert budget.compare({"kernel": spilling}, {"kernel": spilling}) == [
        "kernel: spill_operations: budget 0, actual 8"
    ]


@triton.jit
def _scan_kernel(y_ptr, x_ptr, num_elements, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for first in range(0, num_elements, BLOCK):
        x = tl.load(x_ptr + first + offs)
        tl.store(y_ptr + first + offs, tl.cumsum(x) * tl.sum(x) + x)


def scan_record(first_element: int = 0, **options: int) -> Record:
    num_elements = 1 << 16
    case = Case("_scan_kernel", (loads(4),), lambda launches: 8 * num_elements)

    def launch() -> None:
        x, y = torch.empty(num_elements + first_element)[first_element:], torch.empty(num_elements)
        _scan_kernel[(1,)](y, x, num_elements, BLOCK=2048, num_warps=2, enable_fp_fusion=False, **options)

    configuration = Configuration("scan", str(options), launch, num_elements, 4, (case,))
    return budget.record_of(compile_for(configuration, 80)[0])


def test_a_real_kernel_made_worse_is_red() -> None:
    good = scan_record()
    assert good.load_bits == 128 and good.spill_operations == 0
    # not divisible by 16, and so loaded float by float
    unaligned = budget.compare({"scan": good}, {"scan": scan_record(first_element=1)})
    assert "scan: load_bits: budget 128, actual 32" in unaligned
    assert any(message.startswith("scan: instructions_per_element:") for message in unaligned)
    spilling = budget.compare({"scan": good}, {"scan": scan_record(maxnreg=32)})
    assert any(message.startswith("scan: spill_operations: budget 0, actual ") for message in spilling)


@triton.jit
def _matmul_kernel(c_ptr, a_ptr, b_ptr, K, BLOCK: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, 32)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, 32):
        # from registers
        a = (tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :]) * 2).to(tl.bfloat16)
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@pytest.fixture(scope="module")
def matmul() -> Counted:
    num_elements = 64 * 128

    def launch() -> None:
        a, b = torch.empty(64, 128), torch.empty(128, 64, dtype=torch.bfloat16)
        _matmul_kernel[(1,)](torch.empty(64, 64), a, b, 128, BLOCK=64, num_stages=1, enable_fp_fusion=False)

    case = Case("_matmul_kernel", (loads(6),), lambda launches: 6 * num_elements)
    return compile_for(Configuration("matmul", "A in registers", launch, num_elements, 6, (case,)), 90)[0]


def faults(counted: Counted, *serialised: str) -> list[str]:
    return list(budget.faults({"matmul": counted}, serialised))


def test_serialised_wgmmas_are_named(matmul: Counted) -> None:
    assert faults(matmul) == []
    assert faults(matmul, "matmul") == ["matmul: ptxas no longer warns: take it off the list of what may be serialised"]
    # sums that something else changes while a wgmma adds to them
    product = re.search(r"wgmma\.mma_async[^;]*?\{(%[rf]\d+)[^;]*;", matmul.launch.ptx)
    assert product is not None
    changed = f"{product[0]}\nxor.b32 {product[1]}, {product[1]}, 1;"
    spoilt = replace(matmul, launch=replace(matmul.launch, ptx=matmul.launch.ptx.replace(product[0], changed)))
    found = faults(spoilt)
    assert found and all(re.match(r"matmul: ptxas: \(C75\d\d\) ", fault) for fault in found)
    assert faults(spoilt, "matmul") == []


def test_fragments_that_are_overwritten_are_named(matmul: Counted) -> None:
    kernel = matmul.kernel
    assert any(x.fragments for x in kernel.code)
    waits = [replace(x, opcode="NOP") if x.opcode.startswith("WARPGROUP.DEPBAR") else x for x in kernel.code]
    found = faults(replace(matmul, kernel=replace(kernel, code=tuple(waits))))
    assert found and all(re.match(r"matmul: R\d+ of HGMMA at 0x\w+ is written by ", fault) for fault in found)


def test_loops_that_nobody_described_are_an_error() -> None:
    case = Case("_scan_kernel", (loads(4), never), lambda launches: 0)
    x = torch.empty(4096)
    configuration = Configuration(
        "scan",
        "two loops",
        lambda: _scan_kernel[(1,)](x, x, 4096, BLOCK=2048, enable_fp_fusion=False),
        4096,
        4,
        (case,),
    )
    with pytest.raises(ValueError, match="expected to have 2 loops, got 1"):
        compile_for(configuration, 80)
