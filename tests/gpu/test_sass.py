# ruff: noqa: N803 (Triton's names for compile-time constants)
"""The counts of machine code: on text with known answers, and on tiny kernels whose loads are known."""

from collections.abc import Callable

import pytest

pytest.importorskip("triton")

import driver
import sass
import torch
import triton
import triton.language as tl
from gpus import LIMITS, occupancy
from sass import Loop, Pipe

OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def copy_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def sum_kernel(y_ptr, x_ptr, num_elements, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_elements, BLOCK):
        total += tl.exp2(tl.load(x_ptr + first + offs))
    tl.store(y_ptr + offs, total)


@triton.jit
def scan_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.cumsum(x) * tl.sum(x) + x)


@triton.jit
def int8_dot_kernel(c_ptr, a_ptr, b_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m = tl.arange(0, M)[:, None]
    offs_n = tl.arange(0, N)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([M, N], tl.int32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m * K + k + offs_k[None, :])
        b = tl.load(b_ptr + offs_n * K + k + offs_k[:, None])
        acc += tl.dot(a, b, out_dtype=tl.int32)
    tl.store(c_ptr + offs_m * N + offs_n, acc)


def compiled(launch: Callable[[], object], capability: int) -> sass.Kernel:
    with driver.standin_gpu(capability, execute=False) as launches:
        launch()
    return sass.analyse(launches[0].cubin, launches[0].num_warps, launches[0].shared)


def kernel_of(text: str) -> sass.Kernel:
    """Make a kernel of nvdisasm's text, with the addresses left out."""
    lines = (line.strip() for line in text.strip().splitlines())
    with_addresses = [line if line.endswith(":") else f"/*{i:04x}*/ {line} ;" for i, line in enumerate(lines)]
    code, labels = sass.parse("\n".join(with_addresses))
    return sass.Kernel(80, 4, 0, 32, 0, tuple(code), *sass.control_flow(code, labels))


NESTED = """
    S2R R0, SR_TID.X
    @P0 BRA `(.L_x_3)
    .L_x_1:
    LDG.E.128.CONSTANT R4, [R2.64]
    .L_x_2:
    MUFU.EX2 R4, R4
    @P2 BRA `(.L_x_9)
    IMAD.MOV.U32 R5, RZ, RZ, R4
    .L_x_9:
    @P1 BRA `(.L_x_2)
    FADD R5, R5, R4
    @P1 CALL.REL.NOINC `(.L_x_3)
    BRA `(.L_x_1)
    .L_x_3:
    @P3 EXIT
    @!P0 BRA `(.L_x_4)
    LDG.E.U16 R7, [R2.64]
    .L_x_4:
    STG.E.64 [R2.64], R4
    EXIT
    .L_x_5:
    STL [R1], R4
    BRA `(.L_x_4)
    .L_x_6:
    BRA `(.L_x_6)
"""


def test_loops_and_cold_code() -> None:
    kernel = kernel_of(NESTED)
    assert kernel.loops == (Loop(2, 9), Loop(3, 6))
    assert [counts.instructions for counts in kernel.loop_counts] == [4, 4]
    assert kernel.loop_counts[1].pipes == {Pipe.XU: 1, Pipe.IMAD: 1, Pipe.CONTROL: 2}
    assert kernel.loop_counts[1].mufu == {"EX2": 1}
    # the outer loop is the one that loads
    assert kernel.main_loop == 0 and kernel.main.memory == {"LDG.128": 1}
    assert kernel.main.global_load_bytes == 512 and kernel.main.narrowest_global_load == 128
    assert kernel.straight.memory == {"LDG.16": 1, "STG.64": 1} and kernel.straight.instructions == 7
    # the spill is in the cold code
    assert kernel.instructions == 15 and kernel.spill_operations == 1


def test_shortest_way_leaves_out_what_can_be_jumped_over() -> None:
    kernel = kernel_of(NESTED)
    straight, bodies = sass.ways(kernel, {0, 1})
    # the first exit is the nearest; without IMAD.MOV, which can be jumped over
    # S2R is the only one without a predicate
    assert straight.instructions == 3 and straight.pipes == {Pipe.CONTROL: 1}
    assert bodies[0].instructions == 4 and bodies[0].global_load_bytes == 512
    assert bodies[1].instructions == 3 and Pipe.IMAD not in bodies[1].pipes
    straight, bodies = sass.ways(kernel, set())
    assert straight.instructions == 3 and not bodies


def test_waiting_for_tensor_memory_is_no_loop() -> None:
    wait = """
        .L_x_0:
        UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR4
        BRA.U !UP0, `(.L_x_0)
        EXIT
    """
    assert not kernel_of(wait).loops and kernel_of(wait.replace("UTCATOMSWS", "UIADD3")).loops == (Loop(0, 1),)


def test_unknown_opcode_is_an_error() -> None:
    with pytest.raises(sass.UnknownOpcodeError, match=r"FROB\.X"):
        _ = kernel_of("FROB.X R0, R1\nEXIT").straight
    with pytest.raises(sass.UnknownOpcodeError, match="BRX"):
        sass.ways(kernel_of("BRX R2 -0x10\nEXIT"), set())


PRODUCTS = """
    .L_x_0:
    LDSM.16.M88.4 R88, [R2]
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24
    HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR12], R24, gsb0
    IMAD.MOV.U32 R3, RZ, RZ, R88
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @P0 BRA `(.L_x_0)
    EXIT
"""


@pytest.mark.parametrize(
    ("written", "instead", "registers"),
    [
        ("", "", []),
        # reads, other registers, and what only looks like a destination
        ("R3, RZ", "R96, RZ", []),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "STG.E [R88.64], R89", []),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "FSETP.GEU.AND P0, PT, R88, R89, PT", []),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "FCHK P0, R88, R89", []),
        # of the first and of the second wgmma, a part, on a condition, after a predicate, and past the last of four
        ("R3, RZ", "R88, RZ", [88]),
        ("R3, RZ", "R95, RZ", [95]),
        ("IMAD.MOV.U32 R3", "IMAD.WIDE R90", [90]),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "CS2R R94, SRZ", [94]),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "@!P1 LDS.128 R84, [R3]", []),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "@!P1 LDS.128 R85, [R3]", [88]),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "SHFL.BFLY PT, R91, R3, 0x1, 0x1f", [91]),
        ("IMAD.MOV.U32 R3, RZ, RZ, R88", "IADD3 R92, P0, R88, R89, RZ", [92]),
        # in the next iteration
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP", [88]),
        # a wait that leaves this group
        ("0x0", "0x1", [88]),
        # a wait on one of two ways
        ("WARPGROUP.DEPBAR", "@P1 BRA `(.L_x_0)\n    WARPGROUP.DEPBAR", [88]),
    ],
)
def test_overwritten_fragments(written: str, instead: str, registers: list[int]) -> None:
    found = kernel_of(PRODUCTS.replace(written, instead, 1)).overwritten_fragments
    assert [int(line.split()[0][1:]) for line in found] == registers


def test_overwritten_fragment_is_named() -> None:
    assert kernel_of(PRODUCTS.replace("R3, RZ", "R88, RZ")).overwritten_fragments == [
        "R88 of HGMMA at 0x3 is written by IMAD.MOV.U32 at 0x5 with no wait in between"
    ]


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E.LTC128B.64", 64), ("STG.E.U8", 8), ("LDSM.16.M88.4", 128), ("LDGSTS.E.BYPASS.128", 128), ("LDS", 32)],
)
def test_width(opcode: str, bits: int) -> None:
    assert sass.Instruction(0, "", opcode, "").bits == bits


def test_tensor_macs() -> None:
    assert sass.tensor_macs("IMMA.16832.S8.S8.SAT") == 16 * 8 * 32
    # a quarter for each warp of the group
    assert sass.tensor_macs("IGMMA.64x128x32.S8.S8") == 16 * 128 * 32
    with pytest.raises(sass.UnknownOpcodeError):
        sass.tensor_macs("UTCIMMA")


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_copy_loads_and_stores_16_bytes(capability: int) -> None:
    x, y = torch.empty(4096), torch.empty(4096)
    kernel = compiled(lambda: copy_kernel[(1,)](y, x, BLOCK=4096, num_warps=4, **OPTIONS), capability)
    # 128 threads x 4 floats x 8
    assert kernel.capability == capability and not kernel.loops and kernel.main_loop is None
    assert kernel.straight.memory == {"LDG.128": 8, "STG.128": 8}
    assert kernel.straight.global_load_bytes == 4096
    assert kernel.spill_operations == 0 and 8 * 4 < kernel.registers < 80


@pytest.mark.parametrize("capability", [80, 90])
def test_unaligned_pointer_loads_narrowly(capability: int) -> None:
    x, y = torch.empty(4097)[1:], torch.empty(4096)
    kernel = compiled(lambda: copy_kernel[(1,)](y, x, BLOCK=4096, num_warps=4, **OPTIONS), capability)
    assert kernel.straight.memory == {"LDG.32": 32, "STG.128": 8}
    assert kernel.straight.narrowest_global_load == 32


@pytest.mark.parametrize("capability", [80, 90])
def test_loop_is_found(capability: int) -> None:
    x, y = torch.empty(1 << 16), torch.empty(2048)
    kernel = compiled(lambda: sum_kernel[(1,)](y, x, 1 << 16, BLOCK=2048, num_warps=4, **OPTIONS), capability)
    assert len(kernel.loops) == 1 and kernel.main_loop == 0
    # ptxas may unroll: as many exponentials as floats are loaded
    assert kernel.main.mufu == {"EX2": kernel.main.global_load_bytes // 4 // 32}
    assert kernel.main.memory.keys() == {"LDG.128"} and kernel.straight.memory["STG.128"] == 4


@pytest.mark.parametrize("capability", [80, 90])
def test_register_limit_spills(capability: int) -> None:
    x, y = torch.empty(4096), torch.empty(4096)
    kernel = compiled(lambda: scan_kernel[(1,)](y, x, BLOCK=4096, num_warps=1, maxnreg=32, **OPTIONS), capability)
    assert kernel.registers <= 32 and kernel.spill_operations > 100 and kernel.stack_bytes > 0


@pytest.mark.parametrize(("capability", "opcode"), [(80, "IMMA.16832.S8.S8.SAT"), (90, "IGMMA.64x128x32.S8.S8")])
def test_int8_dot_runs_on_tensor_cores(capability: int, opcode: str) -> None:
    a, b = torch.empty(64, 4096, dtype=torch.int8), torch.empty(128, 4096, dtype=torch.int8)
    c = torch.empty(64, 128, dtype=torch.int32)
    kernel = compiled(lambda: int8_dot_kernel[(1,)](c, a, b, 4096, 64, 128, 64, num_warps=4, **OPTIONS), capability)
    assert set(kernel.main.tensor) == {opcode}
    # the four warps share the multiply-adds of an iteration
    assert 4 * kernel.main.int8_macs == 64 * 128 * 64


def resident(registers: int, num_warps: int, shared_bytes: int, capability: int) -> tuple[int, int, str]:
    kernel = sass.Kernel(capability, num_warps, shared_bytes, registers, 0, (), 0, {}, ())
    found = occupancy(kernel, LIMITS[capability])
    return found.ctas, found.warps, found.limited_by


def test_occupancy() -> None:
    # figures of the CUDA occupancy calculator
    assert resident(32, 8, 0, 80) == (8, 64, "warps")
    assert resident(128, 4, 0, 80) == (4, 16, "registers")
    assert resident(255, 8, 0, 90) == (1, 8, "registers")
    # three warps of 168 registers on each scheduler
    assert resident(168, 2, 2048, 80) == (6, 12, "registers")
    assert resident(32, 1, 0, 80) == (32, 32, "ctas") and resident(32, 1, 0, 86) == (16, 16, "ctas")
    assert resident(64, 4, 48 * 1024, 80) == (3, 12, "shared")
    assert resident(64, 4, 100 * 1024, 89) == (0, 0, "shared")
    assert resident(64, 4, 227 * 1024, 90) == (1, 4, "shared")
