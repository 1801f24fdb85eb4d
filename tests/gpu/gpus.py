"""Published figures of the GPUs that the bounds are computed for; nothing here was measured.

Limits and rates of an architecture: CUDA C++ programming guide, "Technical specifications per compute capability"
and "Throughput of native arithmetic instructions" (results per clock and multiprocessor). Boards: NVIDIA's data
sheets and architecture whitepapers.
"""

from __future__ import annotations

from dataclasses import dataclass

from sass import Kernel, Pipe

LANES = 32
# schedulers of a multiprocessor, each of which issues one warp instruction per clock
PARTITIONS = 4
# CUDA keeps 1 KiB of shared memory per CTA for itself from 8.0 on, and allots in steps of 128 bytes
RESERVED_SHARED = 1024
SHARED_STEP = 128
# registers are allotted to a warp in steps of 256, which is 8 per lane
REGISTERS_STEP = 256


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of a compute capability holds."""

    warps: int
    ctas: int
    # KiB per multiprocessor and the most that one CTA may have
    shared_kib: int
    shared_kib_per_cta: int
    registers: int = 65536


# programming guide, technical specifications per compute capability
LIMITS = {
    80: Limits(warps=64, ctas=32, shared_kib=164, shared_kib_per_cta=163),
    86: Limits(warps=48, ctas=16, shared_kib=100, shared_kib_per_cta=99),
    89: Limits(warps=48, ctas=24, shared_kib=100, shared_kib_per_cta=99),
    90: Limits(warps=64, ctas=32, shared_kib=228, shared_kib_per_cta=227),
    100: Limits(warps=64, ctas=32, shared_kib=228, shared_kib_per_cta=227),
}

# lanes per clock and multiprocessor, the same on 8.0, 8.9 and 9.0; programming guide, throughput table
_COMMON_RATES = {
    # 32-bit integer multiply and multiply-add; the table has no row for the wide ones, which are not faster
    Pipe.IMAD: 64,
    # 32-bit integer add, compare, minimum, shift, logical operations
    Pipe.ALU: 64,
    # reciprocal, square root, base 2 logarithm and exponential; population count and leading zeros
    Pipe.XU: 16,
    # warp shuffle; loads and stores of 32 bits at 128 bytes per clock (tuning guides, shared memory bandwidth)
    Pipe.LSU: 32,
    # warp reduce; vote is faster and counts as one slot of it
    Pipe.REDUCE: 16,
    # not published: one instruction per clock and scheduler is the most there can be
    Pipe.UNIFORM: 128,
}
# 32-bit floating-point add, multiply, multiply-add: 64 on 8.0, 128 on 8.9 and 9.0.
# 64-bit: 32 on 8.0, 64 on 9.0, 2 on 8.9.
# 16-bit in pairs: 256 results on 8.0 and 9.0, 128 on 8.9, and so half as many lanes.
# int to float: 16 on 8.0 where it is I2F on the XU, 64 on 8.9 and 9.0 where it is I2FP on the ALU: by the opcode.
RATES = {
    80: {**_COMMON_RATES, Pipe.FMA: 64, Pipe.HALF: 128, Pipe.DOUBLE: 32},
    89: {**_COMMON_RATES, Pipe.FMA: 128, Pipe.HALF: 64, Pipe.DOUBLE: 2},
    90: {**_COMMON_RATES, Pipe.FMA: 128, Pipe.HALF: 128, Pipe.DOUBLE: 64},
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    dram_gb_per_s: float
    # dense multiply-adds per clock and multiprocessor of 8-bit integers and of 16-bit floats with 32-bit sums
    int8_macs: int
    half_macs: int

    @property
    def limits(self) -> Limits:
        return LIMITS[self.capability]

    @property
    def rates(self) -> dict[Pipe, int]:
        return RATES[self.capability]


GPUS = (
    # A100 80GB data sheet: 2,039 GB/s, 19.5 TFLOPS of float32 (= 108 x 64 x 2 x 1.41 GHz), 624 TOPS of int8
    # (= 108 x 2048 x 2 x 1.41 GHz), 312 TFLOPS of bfloat16; whitepaper: 108 multiprocessors, boost clock 1410 MHz
    Gpu("A100 SXM 80 GB", 80, 108, 1.41, 2039, int8_macs=2048, half_macs=1024),
    # H100 SXM data sheet: 3.35 TB/s, 67 TFLOPS of float32 (= 132 x 128 x 2 x 1.98 GHz, the highest clock of the
    # board, so that the bound stays one); whitepaper: 132 multiprocessors, twice the A100's tensor rate per clock
    Gpu("H100 SXM", 90, 132, 1.98, 3350, int8_macs=4096, half_macs=2048),
    # Ada whitepaper: 128 multiprocessors, boost clock 2520 MHz, 1008 GB/s, 82.6 TFLOPS of float32
    # (= 128 x 128 x 2 x 2.52 GHz), 660.6 TOPS of int8, 165.2 TFLOPS of bfloat16
    Gpu("RTX 4090", 89, 128, 2.52, 1008, int8_macs=1024, half_macs=256),
)


@dataclass(frozen=True)
class Occupancy:
    ctas: int
    warps: int
    limited_by: str


def occupancy(kernel: Kernel, limits: Limits | None = None) -> Occupancy:
    """Compute how many CTAs fit on a multiprocessor, as the CUDA occupancy calculator does."""
    limits = limits or LIMITS[kernel.capability]
    per_warp = _round_up(kernel.registers * LANES, REGISTERS_STEP)
    # a scheduler has its quarter of the register file
    warps_by_registers = limits.registers // PARTITIONS // per_warp * PARTITIONS
    shared = _round_up(kernel.shared_bytes, SHARED_STEP) + RESERVED_SHARED
    fits = kernel.shared_bytes <= limits.shared_kib_per_cta * 1024
    # the first of equals is named
    ctas = {
        "warps": limits.warps // kernel.num_warps,
        "ctas": limits.ctas,
        "registers": warps_by_registers // kernel.num_warps,
        "shared": limits.shared_kib * 1024 // shared if fits else 0,
    }
    limited_by = min(ctas, key=lambda name: ctas[name])
    return Occupancy(ctas[limited_by], ctas[limited_by] * kernel.num_warps, limited_by)


def _round_up(x: int, step: int) -> int:
    return -(-x // step) * step
