"""The emulator: every family of opcodes against numpy, known answers, and faults that it must find."""

from __future__ import annotations

import ctypes.util
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from driver import MISSING_FENCES_WAIVED, Launch, standin_gpu
from ptx_emulator import Emulator, Program, PtxError, Report

from mgt_kernels.triton.draws import philox

HEADER = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid %d
{
    .reg .pred %%p<9>;
    .reg .b16 %%rs<30>;
    .reg .b32 %%r<60>;
    .reg .b64 %%rd<40>;
    .reg .f32 %%f<10>;
    ld.param.b64 %%rd1, [kernel_param_0];
    ld.param.b64 %%rd2, [kernel_param_1];
    mov.u32 %%r1, %%tid.x;
    mov.u32 %%r2, %%ctaid.x;
    mul.wide.u32 %%rd3, %%r1, 8;
    mul.wide.u32 %%rd5, %%r2, %d;
    add.s64 %%rd3, %%rd3, %%rd5;
    add.s64 %%rd4, %%rd2, %%rd3;
"""


def run_ptx(
    body: str,
    inputs: np.ndarray,
    outputs: np.ndarray,
    *,
    num_threads: int = 32,
    num_ctas: int = 1,
    shared_bytes: int = 1024,
    approx_ulp: int = 0,
) -> Report:
    """Run a body: %rd1 is the inputs, %rd4 eight bytes of the outputs per thread, %r1 the thread, %r2 the CTA."""
    ptx = HEADER % (num_threads, 8 * num_threads) + body + "\nret;\n}"
    emulator = Emulator(Program(ptx, approx_ulp), shared_bytes)
    arguments = [inputs.ctypes.data, outputs.ctypes.data]
    return emulator.run((num_ctas,), arguments, [array.view(np.uint8).reshape(-1) for array in (inputs, outputs)])


def evaluate(instruction: str, operands: list[np.ndarray], dtype: np.dtype, *, approx_ulp: int = 0) -> np.ndarray:
    """Evaluate an instruction whose operands are $1, $2, ... and whose result is $0, a lane per element."""
    size = len(operands[0])
    num_threads = -(-size // 32) * 32
    memory = np.zeros((len(operands), num_threads, 8), np.uint8)
    for operand, values in zip(memory, operands, strict=True):
        operand[:size, : values.dtype.itemsize] = values[:, None].view(np.uint8)
    body = ["add.s64 %rd6, %rd1, %rd3;"]
    for index, values in enumerate(operands, 1):
        width, register = values.dtype.itemsize, f"{register_of(values.dtype.itemsize)}{10 + index}"
        body.append(f"ld.global.b{8 * width} {register}, [%rd6+{(index - 1) * num_threads * 8}];")
        instruction = instruction.replace(f"${index}", register)
    width = np.dtype(dtype).itemsize
    target = f"{register_of(width)}20"
    body += [instruction.replace("$0", target), f"st.global.b{8 * width} [%rd4], {target};"]
    results = np.zeros((num_threads, 8), np.uint8)
    run_ptx("\n".join(body), memory, results, num_threads=num_threads, approx_ulp=approx_ulp)
    return np.ascontiguousarray(results[:size, :width]).view(dtype)[:, 0]


def register_of(width: int) -> str:
    return {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}[width]


RNG = np.random.default_rng(0)
INT_EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2]
A32 = np.array([*INT_EDGES, *RNG.integers(0, 2**32, 79)], np.uint32)
B32 = np.roll(A32, 5)
C32 = np.roll(A32, 11)
A64 = np.array([0, 1, 2**63, 2**64 - 1, 2**32, *RNG.integers(0, 2**64, 59, np.uint64)], np.uint64)
B64 = np.roll(A64, 3)
# shifts around every width
N32 = np.array([0, 1, 31, 32, 33, 63, 64, 65, 255, 2**32 - 1, *range(86)], np.uint32)
FLOAT_EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3.4e38, 2.0**-126]
FLOAT_EDGES += [2.0**31, -(2.0**31), 2.0**32, 2.0**63, 300.0, -300.0, 65504.0, 65520.0, 1 + 2.0**-12, 448.0, 1e10]
F32 = np.array([*FLOAT_EDGES, *RNG.standard_normal(70), *RNG.integers(0, 2**32, 32, np.uint32).view(np.float32)])
F32 = F32.astype(np.float32)
G32, H32 = np.roll(F32, 1), np.roll(F32, 7)
POSITIVE = np.abs(F32)
S32, T32 = A32.view(np.int32), B32.view(np.int32)


def ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def bits(x: np.ndarray) -> np.ndarray:
    """Bits of floats with every NaN the hardware's."""
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32))


def bfe(x: int, position: int, length: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    if not length:
        return 0
    sign = x >> min(position + length - 1, 31) & 1 if signed else 0
    return sum((x >> position + i & 1 if position + i < 32 else sign) << i for i in range(min(length, 32))) | (
        (0xFFFFFFFF << length & 0xFFFFFFFF) * sign
    )


def bfi(x: int, y: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            y = y & ~(1 << position + i) | (x >> i & 1) << position + i
    return y


def prmt(x: int, y: int, selector: int) -> int:
    source, result = (y << 32 | x).to_bytes(8, "little"), 0
    for i in range(4):
        select = selector >> 4 * i & 15
        byte = source[select & 7]
        result |= (255 * (byte >> 7) if select & 8 else byte) << 8 * i
    return result


def over_ints(function: Callable[..., int], *arrays: np.ndarray, dtype: type = np.uint32) -> np.ndarray:
    limit = 1 << 8 * np.dtype(dtype).itemsize
    return np.array([function(*map(int, row)) % limit for row in zip(*arrays, strict=True)], dtype)


INTEGER_CASES = [
    ("add.s32 $0, $1, $2;", [A32, B32], A32 + B32),
    ("sub.s64 $0, $1, $2;", [A64, B64], A64 - B64),
    ("add.sat.s32 $0, $1, $2;", [A32, B32], over_ints(lambda x, y: max(-(2**31), min(x + y, 2**31 - 1)), S32, T32)),
    ("mul.lo.s32 $0, $1, $2;", [A32, B32], A32 * B32),
    ("mul.hi.u32 $0, $1, $2;", [A32, B32], over_ints(lambda x, y: x * y >> 32, A32, B32)),
    ("mul.hi.s32 $0, $1, $2;", [A32, B32], over_ints(lambda x, y: x * y >> 32, S32, T32)),
    ("mul.hi.u64 $0, $1, $2;", [A64, B64], over_ints(lambda x, y: x * y >> 64, A64, B64, dtype=np.uint64)),
    ("mul.wide.u32 $0, $1, $2;", [A32, B32], A32.astype(np.uint64) * B32),
    ("mul.wide.s32 $0, $1, $2;", [A32, B32], (S32.astype(np.int64) * T32).view(np.uint64)),
    ("mad.lo.s32 $0, $1, $2, $3;", [A32, B32, C32], A32 * B32 + C32),
    (
        "mad.wide.u32 $0, $1, $2, $3;",
        [A64.astype(np.uint32), B32[:64], A64],
        A64.astype(np.uint32) * B32[:64].astype(np.uint64) + A64,
    ),
    ("div.s32 $0, $1, 7;", [A32], over_ints(lambda x: (abs(x) // 7) * (1 if x > 0 else -1), S32)),
    ("div.u32 $0, $1, 7;", [A32], A32 // np.uint32(7)),
    ("rem.s32 $0, $1, 7;", [A32], np.fmod(S32, np.int32(7)).view(np.uint32)),
    ("min.s32 $0, $1, $2;", [A32, B32], np.minimum(S32, T32).view(np.uint32)),
    ("max.u32 $0, $1, $2;", [A32, B32], np.maximum(A32, B32)),
    ("abs.s32 $0, $1;", [A32], np.abs(S32).view(np.uint32)),
    ("neg.s32 $0, $1;", [A32], np.uint32(0) - A32),
    ("and.b32 $0, $1, 0xF0F0F0F0;", [A32], A32 & np.uint32(0xF0F0F0F0)),
    ("xor.b64 $0, $1, $2;", [A64, B64], A64 ^ B64),
    ("not.b32 $0, $1;", [A32], ~A32),
    ("shl.b32 $0, $1, $2;", [A32, N32], over_ints(lambda x, n: x << n if n < 32 else 0, A32, N32)),
    ("shr.u32 $0, $1, $2;", [A32, N32], over_ints(lambda x, n: x >> n if n < 32 else 0, A32, N32)),
    ("shr.s32 $0, $1, $2;", [A32, N32], over_ints(lambda x, n: x >> min(n, 31), S32, N32)),
    (
        "shr.s64 $0, $1, $2;",
        [A64, N32[:64]],
        over_ints(lambda x, n: x >> min(n, 63), A64.view(np.int64), N32[:64], dtype=np.uint64),
    ),
    (
        "shl.b64 $0, $1, $2;",
        [A64, N32[:64]],
        over_ints(lambda x, n: x << n if n < 64 else 0, A64, N32[:64], dtype=np.uint64),
    ),
    (
        "shf.l.wrap.b32 $0, $1, $2, $3;",
        [A32, B32, N32],
        over_ints(lambda x, y, n: (y << 32 | x) << n % 32 >> 32, A32, B32, N32),
    ),
    (
        "shf.r.clamp.b32 $0, $1, $2, $3;",
        [A32, B32, N32],
        over_ints(lambda x, y, n: (y << 32 | x) >> min(n, 32), A32, B32, N32),
    ),
    ("bfe.u32 $0, $1, $2, $3;", [A32, N32, C32], over_ints(lambda x, n, c: bfe(x, n, c, False), A32, N32, C32)),
    ("bfe.s32 $0, $1, $2, $3;", [A32, N32, C32], over_ints(lambda x, n, c: bfe(x, n, c, True), A32, N32, C32)),
    ("bfe.s32 $0, $1, 4, 9;", [A32], over_ints(lambda x: bfe(x, 4, 9, True), A32)),
    ("bfi.b32 $0, $1, $2, $3, $4;", [A32, B32, N32, C32], over_ints(bfi, A32, B32, N32, C32)),
    ("prmt.b32 $0, $1, $2, $3;", [A32, B32, C32], over_ints(prmt, A32, B32, C32)),
    ("lop3.b32 $0, $1, $2, $3, 0x6A;", [A32, B32, C32], (A32 & B32) ^ C32),
    ("popc.b32 $0, $1;", [A32], over_ints(lambda x: x.bit_count(), A32)),
    ("clz.b32 $0, $1;", [A32], over_ints(lambda x: 32 - x.bit_length(), A32)),
    ("clz.b64 $0, $1;", [A64], over_ints(lambda x: 64 - x.bit_length(), A64)),
    ("brev.b32 $0, $1;", [A32], over_ints(lambda x: int(f"{x:032b}"[::-1], 2), A32)),
    (
        "dp4a.s32.s32 $0, $1, $2, $3;",
        [A32, B32, C32],
        (
            (A32.view(np.int8).reshape(-1, 4).astype(np.int64) * B32.view(np.int8).reshape(-1, 4)).sum(1)
            + C32.view(np.int32)
        ).astype(np.uint32),
    ),
    (
        "{ .reg .b32 t; add.cc.u32 t, $1, $2; addc.u32 $0, $3, 0; }",
        [A32, B32, C32],
        over_ints(lambda x, y, z: z + (x + y >> 32), A32, B32, C32),
    ),
    (
        "{ .reg .b32 t; sub.cc.u32 t, $1, $2; subc.u32 $0, $3, 0; }",
        [A32, B32, C32],
        over_ints(lambda x, y, z: z - (x < y), A32, B32, C32),
    ),
    (
        "{ .reg .b32 t; mad.lo.cc.u32 t, $1, $2, $3; madc.hi.u32 $0, $1, $2, 0; }",
        [A32, B32, C32],
        over_ints(lambda x, y, z: x * y + z >> 32, A32, B32, C32),
    ),
    (
        "{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {b, a}; }",
        [A32],
        (A32 << np.uint32(16)) | (A32 >> np.uint32(16)),
    ),
    (
        "{ .reg .pred p, q; setp.lt.and.s32 p|q, $1, $2, 1; selp.b32 $0, 3, 4, q; }",
        [A32, B32],
        np.where(S32 < T32, 4, 3).astype(np.uint32),
    ),
    ("{ .reg .pred p; setp.hi.u32 p, $1, $2; selp.b32 $0, $1, $2, p; }", [A32, B32], np.maximum(A32, B32)),
    (
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; mov.b32 $0, 5; @!p mov.b32 $0, 6; }",
        [A32],
        np.where(A32 == 0, 6, 5).astype(np.uint32),
    ),
]


@pytest.mark.parametrize("instruction, operands, expected", INTEGER_CASES, ids=[case[0] for case in INTEGER_CASES])
def test_integer_instruction(instruction: str, operands: list[np.ndarray], expected: np.ndarray) -> None:
    np.testing.assert_array_equal(evaluate(instruction, operands, expected.dtype), expected)


LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
LIBM.fmaf.argtypes, LIBM.fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float


def exact_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.array([LIBM.fmaf(*row) for row in zip(x, y, z, strict=True)], np.float32)


def ignoring_nan(choose: np.ufunc, zero_sign: np.ufunc) -> np.ndarray:
    both_zero = (F32 == 0) & (G32 == 0)
    signed = np.where(zero_sign(np.signbit(F32), np.signbit(G32)), np.float32(-0.0), np.float32(0))
    return np.where(both_zero, signed, choose(F32, G32))


with np.errstate(all="ignore"):
    # sums that round twice wrongly through float64: the product's last bit decides a tie
    TIE_X = np.array([1 + 2.0**-12, 1 - 2.0**-12, 1 + 2.0**-23, 2.0**-80], np.float32)
    TIE_Y = np.array([1 + 2.0**-12, 1 + 2.0**-12, 1 - 2.0**-24, 2.0**-69], np.float32)
    TIE_Z = np.array([2.0**-60, -(2.0**-60), 2.0**30, 2.0**-140], np.float32)
    FLOAT_CASES = [
        ("add.rn.f32 $0, $1, $2;", [F32, G32], F32 + G32),
        ("add.f32 $0, $1, $2;", [F32, G32], F32 + G32),
        ("sub.rn.ftz.f32 $0, $1, $2;", [F32, G32], ftz(ftz(F32) - ftz(G32))),
        ("add.sat.f32 $0, $1, $2;", [F32, G32], np.nan_to_num(np.clip(F32 + G32, 0, 1), nan=0.0) + np.float32(0)),
        ("mul.rn.f32 $0, $1, $2;", [F32, G32], F32 * G32),
        ("mul.ftz.f32 $0, $1, $2;", [F32, G32], ftz(ftz(F32) * ftz(G32))),
        ("div.rn.f32 $0, $1, $2;", [F32, G32], F32 / G32),
        ("fma.rn.f32 $0, $1, $2, $3;", [F32, G32, H32], exact_fma(F32, G32, H32)),
        ("fma.rn.f32 $0, $1, $2, $3;", [TIE_X, TIE_Y, TIE_Z], exact_fma(TIE_X, TIE_Y, TIE_Z)),
        ("fma.rn.ftz.f32 $0, $1, $2, $3;", [F32, G32, H32], ftz(exact_fma(ftz(F32), ftz(G32), ftz(H32)))),
        ("sqrt.rn.f32 $0, $1;", [F32], np.sqrt(F32)),
        ("rcp.rn.f32 $0, $1;", [F32], np.float32(1) / F32),
        ("min.f32 $0, $1, $2;", [F32, G32], ignoring_nan(np.fmin, np.logical_or)),
        ("max.f32 $0, $1, $2;", [F32, G32], ignoring_nan(np.fmax, np.logical_and)),
        (
            "max.NaN.f32 $0, $1, $2;",
            [F32, G32],
            np.where(np.isnan(F32) | np.isnan(G32), np.float32(np.nan), ignoring_nan(np.fmax, np.logical_and)),
        ),
        ("abs.ftz.f32 $0, $1;", [F32], ftz(np.abs(F32))),
        ("copysign.f32 $0, $1, $2;", [F32, G32], np.copysign(G32, F32)),
        ("ex2.approx.ftz.f32 $0, $1;", [F32], ftz(np.exp2(ftz(F32)))),
        ("ex2.approx.f32 $0, $1;", [F32], np.exp2(F32)),
        ("lg2.approx.ftz.f32 $0, $1;", [F32], np.log2(ftz(F32))),
        ("sqrt.approx.ftz.f32 $0, $1;", [F32], np.sqrt(ftz(F32))),
        ("rcp.approx.ftz.f32 $0, $1;", [F32], ftz(np.float32(1) / ftz(F32))),
        ("cvt.rn.f32.s32 $0, $1;", [A32], S32.astype(np.float32)),
        ("cvt.rn.f32.u32 $0, $1;", [A32], A32.astype(np.float32)),
        ("cvt.rn.f32.u64 $0, $1;", [A64], A64.astype(np.float32)),
        ("cvt.rni.f32.f32 $0, $1;", [F32], np.rint(F32)),
        ("cvt.rmi.ftz.f32.f32 $0, $1;", [F32], np.floor(ftz(F32))),
        ("cvt.sat.f32.f32 $0, $1;", [F32], np.nan_to_num(np.clip(F32, 0, 1), nan=0.0) + np.float32(0)),
        (
            "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.f32.bf16 $0, h; }",
            [F32],
            torch.from_numpy(F32).bfloat16().float().numpy(),
        ),
        ("{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h; }", [F32], F32.astype(np.float16).astype(np.float32)),
        (
            "{ .reg .b32 h; cvt.rn.bf16x2.f32 h, $1, $2; and.b32 $0, h, 0xFFFF0000; }",
            [F32, G32],
            torch.from_numpy(F32).bfloat16().float().numpy(),
        ),
        (
            "{ .reg .f64 d; cvt.f64.f32 d, $1; mul.f64 d, d, d; cvt.rn.f32.f64 $0, d; }",
            [F32],
            (F32.astype(np.float64) ** 2).astype(np.float32),
        ),
    ]


@pytest.mark.parametrize("instruction, operands, expected", FLOAT_CASES, ids=[case[0] for case in FLOAT_CASES])
def test_float_instruction(instruction: str, operands: list[np.ndarray], expected: np.ndarray) -> None:
    got = evaluate(instruction, operands, np.dtype(np.uint32)).view(np.float32)
    np.testing.assert_array_equal(bits(got), bits(expected.astype(np.float32)))


def test_arithmetic_makes_the_canonical_nan() -> None:
    minus_nan = np.array([0xFFC12345], np.uint32)
    assert evaluate("add.f32 $0, $1, $1;", [minus_nan], np.dtype(np.uint32))[0] == 0x7FFFFFFF
    assert evaluate("mov.b32 $0, $1;", [minus_nan], np.dtype(np.uint32))[0] == 0xFFC12345


CONVERSIONS = [
    ("rzi.s32", np.trunc, np.int32), ("rni.s32", np.rint, np.int32), ("rmi.s32", np.floor, np.int32),
    ("rpi.s32", np.ceil, np.int32), ("rzi.u32", np.trunc, np.uint32), ("rzi.s16", np.trunc, np.int16),
    ("rni.u8", np.rint, np.uint8), ("rni.s8", np.rint, np.int8), ("rzi.s64", np.trunc, np.int64),
]  # fmt: skip


@pytest.mark.parametrize("modifier, rounding, dtype", CONVERSIONS, ids=[case[0] for case in CONVERSIONS])
def test_float_to_integer_saturates(modifier: str, rounding: np.ufunc, dtype: type) -> None:
    limits = np.iinfo(dtype)
    expected = []
    for x in F32:
        if np.isnan(x):
            expected.append(limits.min if limits.bits == 64 else 0)
        elif np.isinf(x):
            expected.append(limits.max if x > 0 else limits.min)
        else:
            expected.append(max(limits.min, min(int(rounding(np.float64(x))), limits.max)))
    got = evaluate(f"cvt.{modifier}.f32 $0, $1;", [F32], np.dtype(f"i{max(limits.bits // 8, 2)}"))
    np.testing.assert_array_equal(got.astype(dtype), np.array(expected, dtype))


@pytest.mark.parametrize(
    "modifiers, source, expected",
    [
        ("u64.u32", A32, A32.astype(np.uint64)),
        ("s64.s32", A32, S32.astype(np.int64).view(np.uint64)),
        ("u32.u64", A64, A64.astype(np.uint32)),
        ("s32.s8", A32.astype(np.uint16), A32.astype(np.int8).astype(np.int32).view(np.uint32)),
        ("sat.s8.s32", A32, np.clip(S32, -128, 127).astype(np.int16).view(np.uint16)),
        ("sat.u8.s32", A32, np.clip(S32, 0, 255).astype(np.uint16)),
    ],
)
def test_integer_conversion(modifiers: str, source: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(evaluate(f"cvt.{modifiers} $0, $1;", [source], expected.dtype), expected)


def test_bfloat16_arithmetic_rounds_once() -> None:
    x, y = (torch.from_numpy(values).bfloat16() for values in (F32, G32))
    halves = [value.view(torch.int16).numpy().view(np.uint16) for value in (x, y)]
    got = evaluate("fma.rn.bf16 $0, $1, $2, $1;", halves, np.dtype(np.uint16))
    expected = (x.double() * y.double() + x.double()).to(torch.bfloat16)
    same = torch.from_numpy(got.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(same, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", "eq ne lt le gt ge equ neu ltu leu gtu geu num nan".split())
def test_float_comparison(name: str) -> None:
    unordered = np.isnan(F32) | np.isnan(G32)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    else:
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
        compare |= {"gt": np.greater, "ge": np.greater_equal}
        expected = (compare[name[:2]](F32, G32) & ~unordered) | (unordered & (len(name) == 3))
    snippet = f"{{ .reg .pred p; setp.{name}.f32 p, $1, $2; selp.b32 $0, 1, 0, p; }}"
    np.testing.assert_array_equal(evaluate(snippet, [F32, G32], np.dtype(np.uint32)), expected.astype(np.uint32))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_comparison_of_pairs(kind: str) -> None:
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    halves = [torch.from_numpy(values[: len(values) // 2 * 2]).to(dtype) for values in (F32, G32)]
    pairs = [half.view(torch.int16).numpy().view(np.uint32) for half in halves]
    # 1: the low halves, 2: the high ones
    snippet = (
        f"{{ .reg .pred p, q; .reg .b32 r, s; setp.lt.{kind} p|q, $1, $2;"
        " selp.b32 r, 1, 0, p; selp.b32 s, 2, 0, q; add.u32 $0, r, s; }"
    )
    less = (halves[0] < halves[1]).numpy()
    np.testing.assert_array_equal(evaluate(snippet, pairs, np.dtype(np.uint32)), less[::2] + 2 * less[1::2])


def test_approximations_are_off_by_as_much_as_asked() -> None:
    exact = np.exp2(POSITIVE[20:90] % 8).astype(np.float32)
    off = evaluate("ex2.approx.ftz.f32 $0, $1;", [POSITIVE[20:90] % 8], np.dtype(np.float32), approx_ulp=3)
    distance = off.view(np.int32) - exact.view(np.int32)
    assert np.abs(distance).max() == 3
    # a function of the argument, as on the device
    again = evaluate("ex2.approx.ftz.f32 $0, $1;", [POSITIVE[20:90] % 8], np.dtype(np.float32), approx_ulp=3)
    np.testing.assert_array_equal(off, again)


LANES = np.arange(64)
WARP = LANES // 32 * 32


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("shfl.sync.bfly.b32 $0, $1, 5, 31, -1;", LANES ^ 5),
        ("shfl.sync.up.b32 $0, $1, 3, 0, -1;", np.where(LANES % 32 < 3, LANES, LANES - 3)),
        ("shfl.sync.down.b32 $0, $1, 3, 31, -1;", np.where(LANES % 32 > 28, LANES, LANES + 3)),
        ("shfl.sync.idx.b32 $0, $1, 7, 31, -1;", WARP + 7),
        ("shfl.sync.idx.b32 $0, $1, $1, 31, -1;", LANES),
        # segments of 8 lanes
        ("shfl.sync.idx.b32 $0, $1, 1, 0x1807, -1;", LANES // 8 * 8 + 1),
        ("redux.sync.add.s32 $0, $1, -1;", np.where(LANES < 32, 496, 1520)),
        ("redux.sync.min.u32 $0, $1, -1;", WARP),
        ("redux.sync.xor.b32 $0, $1, -1;", WARP * 0),
        ("{ .reg .pred p; setp.lt.u32 p, $1, 3; vote.sync.ballot.b32 $0, p, -1; }", np.where(LANES < 32, 7, 0)),
        ("{ .reg .pred p; setp.lt.u32 p, $1, 3; vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }", LANES < 32),
        ("{ .reg .pred p; setp.lt.u32 p, $1, 40; vote.sync.all.pred p, p, -1; selp.b32 $0, 1, 0, p; }", LANES < 32),
        ("activemask.b32 $0;", LANES * 0 + 0xFFFFFFFF),
        ("{ .reg .pred p; elect.sync _|p, -1; selp.b32 $0, 1, 0, p; }", LANES % 32 == 0),
    ],
)
def test_warp_instruction(instruction: str, expected: np.ndarray) -> None:
    got = evaluate(instruction, [LANES.astype(np.uint32)], np.dtype(np.uint32))
    np.testing.assert_array_equal(got, expected.astype(np.uint32))


@pytest.mark.parametrize(
    "instruction, before, after, first_and_last",
    [
        ("atom.global.gpu.acq_rel.add.u32 %r20, [%rd2], 2;", 1, 129, (1, 127)),
        ("atom.global.relaxed.gpu.max.s32 %r20, [%rd2], %r1;", 5, 63, (5, 62)),
        ("atom.global.exch.b32 %r20, [%rd2], %r1;", 9, 63, (9, 62)),
        ("atom.global.cas.b32 %r20, [%rd2], 7, 8;", 7, 8, (7, 8)),
        ("atom.global.inc.u32 %r20, [%rd2], 9;", 0, 4, (0, 3)),
        ("red.global.add.u32 [%rd2], 1; mov.b32 %r20, 0;", 0, 64, (0, 0)),
        (
            "st.shared.b32 [global_smem], 3; bar.sync 0; atom.shared.add.u32 %r20, [global_smem], 1; bar.sync 0;"
            "ld.shared.b32 %r21, [global_smem]; st.global.b32 [%rd2], %r21;", 0, 67, (3, 66),
        ),
    ],
)  # fmt: skip
def test_atomics_go_in_the_order_of_the_lanes(
    instruction: str, before: int, after: int, first_and_last: tuple[int, int]
) -> None:
    outputs = np.zeros((65, 2), np.uint32)
    outputs[0] = before
    run_ptx(instruction + "st.global.b32 [%rd4+8], %r20;", outputs.copy(), outputs, num_threads=64)
    assert outputs[0, 0] == after
    assert (outputs[1, 0], outputs[64, 0]) == first_and_last


# control flow


def test_lanes_that_part_meet_again() -> None:
    outputs = np.zeros((64, 2), np.uint32)
    body = """
    mov.b32 %r3, 0;
    and.b32 %r4, %r1, 3;
LOOP:
    add.s32 %r3, %r3, %r4;
    setp.gt.s32 %p1, %r4, 0;
    add.s32 %r4, %r4, -1;
    @%p1 bra LOOP;
    shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
    st.global.b32 [%rd4], %r5;
    """
    run_ptx(body, outputs.copy(), outputs, num_threads=64)
    np.testing.assert_array_equal(outputs[:, 0], np.array([0, 1, 3, 6])[(np.arange(64) ^ 1) % 4])


def test_early_return_and_loops_per_cta() -> None:
    counts = np.array([3, 0, 7, 1, 0], np.uint32)
    outputs = np.full((5, 32, 2), 99, np.uint32)
    body = """
    mul.wide.u32 %rd6, %r2, 4;
    add.s64 %rd6, %rd1, %rd6;
    ld.global.b32 %r3, [%rd6];
    setp.eq.s32 %p1, %r3, 0;
    @%p1 bra DONE;
    mov.b32 %r4, 0;
LOOP:
    add.s32 %r4, %r4, %r1;
    add.s32 %r3, %r3, -1;
    setp.ne.s32 %p2, %r3, 0;
    @%p2 bra LOOP;
    st.global.b32 [%rd4], %r4;
DONE:
    """
    report = run_ptx(body, counts, outputs, num_ctas=5)
    expected = np.where(counts[:, None] == 0, 99, counts[:, None] * np.arange(32))
    np.testing.assert_array_equal(outputs[..., 0], expected)
    assert report.num_ctas == 5
    assert report.instructions["st.global.b32"] == 3


# faults

EXCHANGE = """
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
    st.shared.b32 [%r5], %r1;
    bar.sync 0;
    xor.b32 %r6, %r3, 128;
    add.s32 %r6, %r4, %r6;
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd4], %r7;
"""


def run_body(body: str, **options: int) -> tuple[np.ndarray, Report]:
    outputs = np.zeros((64, 2), np.uint32)
    report = run_ptx(body, np.arange(64, dtype=np.uint32), outputs, num_threads=64, **options)
    return outputs[:, 0], report


def test_shared_memory_exchanges_without_a_race() -> None:
    outputs, report = run_body(EXCHANGE)
    np.testing.assert_array_equal(outputs, np.arange(64) ^ 32)
    assert not report.races


def test_dropped_barrier_is_a_race() -> None:
    _, report = run_body(EXCHANGE.replace("bar.sync 0;", ""))
    ((race, lanes),) = report.races.items()
    assert "read after write" in race and "ld.shared.b32" in race and lanes == 64


def test_write_after_read_and_write_with_write_are_races() -> None:
    _, report = run_body(EXCHANGE + "st.shared.b32 [%r5], %r1;")
    assert any("write after read" in race for race in report.races)
    _, report = run_body("st.shared.b32 [global_smem], %r1;")
    assert any("write with write" in race for race in report.races)
    # lanes of different warps that write the same value at once, as Triton's replicated layouts do
    _, report = run_body("st.shared.b32 [global_smem], 7;")
    assert not report.races


def test_neighbouring_bytes_do_not_race() -> None:
    body = "mov.b32 %r4, global_smem; add.s32 %r5, %r4, %r1; cvt.u16.u32 %rs1, %r1; st.shared.b8 [%r5], %rs1;"
    _, report = run_body(body + "ld.shared.b8 %rs2, [%r5];")
    assert not report.races
    _, report = run_body(body + "xor.b32 %r5, %r5, 32; ld.shared.b8 %rs2, [%r5];")
    assert report.races


@pytest.mark.parametrize(
    "body, message",
    [
        ("st.global.b32 [%rd4+512], %r1;", r"out-of-bounds global store.*thread 0 of CTA \(0, 0, 0\), address 0x"),
        ("ld.global.b32 %r3, [%rd4+4]; ld.global.b32 %r3, [%rd4+12];", r"out-of-bounds global load.*thread 63"),
        ("setp.gt.u32 %p1, %r1, 40; @%p1 ld.global.b32 %r3, [%rd4+-4096];", r"out-of-bounds global load.*thread 41"),
        ("ld.global.b32 %r3, [%rd1+2];", "misaligned global load of 4 bytes.*thread 0"),
        ("st.shared.b32 [global_smem+1024], %r1;", "shared write of 4 bytes at 1024, outside of the 1024 bytes"),
        ("st.shared.b32 [global_smem+2], %r1;", "misaligned shared write"),
        ("atom.global.add.u32 %r3, [%rd4+512], 1;", "out-of-bounds global atomic: thread 0"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bra L; bar.sync 0; L:", "bar.sync under divergence: thread 0"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.idx.b32 %r3, %r1, 0, 31, -1;", "under divergence: thread 8"),
        ("add.s32 %r3, %r4, %r5;", "a register is read that no lane has written"),
        ("frobnicate.b32 %r3, %r1;", "unknown opcode frobnicate"),
        ("add.rz.f32 %f1, 0f3F800000, 0f3F800000;", "unknown modifier .rz of add"),
        ("add.ftz.s32 %r3, %r1, %r1;", "unknown modifier .ftz of add"),
        ("shl.s32 %r3, %r1, 1;", "unknown type .s32 of shl"),
        ("fma.rz.f32 %f1, 0f3F800000, 0f3F800000, 0f3F800000;", "fma without one of .rn"),
        ("prmt.b32.f4e %r3, %r1, %r1, 0;", "unknown type .f4e of prmt"),
        ("ld.const.b32 %r3, [%rd1];", "ld without one of"),
        ("bar.sync 1, 32;", "bar with 2 operands"),
        ("add.s32 %r3, %rd1, 1;", "a register of 64 bits as .s32"),
        ("mov.u32 %r3, %clock;", "unknown symbol %clock"),
        ("bra NOWHERE;", "unknown label"),
    ],
)
def test_fault_is_found(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run_body(body)


def test_copies_land_at_their_wait() -> None:
    body = """
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
    mul.wide.u32 %rd6, %r1, 4;
    add.s64 %rd6, %rd1, %rd6;
    cp.async.ca.shared.global [%r5], [%rd6], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r7, [%r5];
    st.global.b32 [%rd4], %r7;
    """
    outputs, report = run_body(body)
    np.testing.assert_array_equal(outputs, np.arange(64))
    assert not report.races
    weakened, _ = run_body(body.replace("wait_group 0", "wait_group 1"))
    assert (weakened == 0xCDCDCDCD).all()


def test_a_copy_may_land_as_soon_as_it_is_issued() -> None:
    copy = """
    mul.wide.u32 %rd6, %r1, 4;
    add.s64 %rd6, %rd1, %rd6;
    cp.async.ca.shared.global [%r5], [%rd6], 4;
    cp.async.commit_group;
    bar.sync 0;
    cp.async.wait_group 0;
    """
    _, report = run_body(EXCHANGE + copy)
    assert [race for race in report.races if "cp.async after read" in race]
    _, report = run_body(EXCHANGE + "bar.sync 0;" + copy)
    assert not report.races


# all of A and of B [8, 16] is 1
WGMMA = """
    mov.b32 %r4, global_smem;
    shl.b32 %r3, %r1, 1;
    add.s32 %r5, %r4, %r3;
    mov.b16 %rs1, 0x3C00;
    mov.b32 %r20, 0x3C003C00;
    mov.pred %p1, 0;
    shr.u32 %r6, %r4, 4;
    cvt.u64.u32 %rd6, %r6;
    or.b64 %rd6, %rd6, 0xC000000000000000;
    st.shared.b16 [%r5], %rs1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r10, %r11, %r12, %r13}, {%r20, %r20, %r20, %r20}, %rd6, %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.b32 [%rd4], %r10;
"""
WAIT = "wgmma.wait_group.sync.aligned 0;"
WRITE = "st.shared.b16 [%r5], %rs1;"
COPY = "cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.commit_group;"


def run_wgmma(body: str) -> Report:
    outputs = np.zeros((128, 2), np.float32)
    report = run_ptx(body, np.arange(128, dtype=np.uint32), outputs, num_threads=128)
    np.testing.assert_array_equal(outputs[:, 0], 16)
    return report


@pytest.mark.parametrize(
    "written, instead",
    [
        (WAIT, WAIT),
        # in several groups
        (WAIT, WAIT.replace("0", "1") + WAIT),
        # past the wait and a barrier it is the generic proxy's again
        (WAIT, f"{WAIT} bar.sync 0; {WRITE}"),
        # reading does not disturb
        (WAIT, f"ld.shared.b16 %rs2, [%r5]; mov.b32 %r30, %r20; {WAIT}"),
        ("bar.sync 0;\n    wgmma.fence", "bar.sync 0; fence.proxy.async;\n    wgmma.fence"),
        # on the other side of the barrier
        ("fence.proxy.async.shared::cta;\n    bar.sync 0;", "bar.sync 0; fence.proxy.async.shared::cta;"),
    ],
)
def test_wgmma_that_is_waited_for(written: str, instead: str) -> None:
    assert written in WGMMA
    report = run_wgmma(WGMMA.replace(written, instead))
    assert not report.races and not report.missing_fences


@pytest.mark.parametrize(
    "written, instead, message",
    [
        (WAIT, "", "sums of a wgmma in flight are read"),
        (WAIT, WAIT.replace("0", "1"), "sums of a wgmma in flight are read"),
        ("wgmma.commit_group.sync.aligned;", "", "sums of a wgmma in flight are read"),
        (WAIT, f"mov.b32 %r13, 0; {WAIT}", "sums of a wgmma in flight are read or written.*mov.b32 %r13, 0"),
        (WAIT, f"mov.b32 %r20, 0; {WAIT}", "a register that a wgmma in flight reads is written.*mov.b32 %r20, 0"),
        (WAIT, f"setp.lt.u32 %p2, %r1, 32; @%p2 mov.b32 %r20, 0; {WAIT}", "in flight reads is written"),
        ("wgmma.fence", "setp.lt.u32 %p2, %r1, 32; @%p2 bra L;\n    wgmma.fence", "wgmma under divergence"),
        ("fence.proxy", "setp.lt.u32 %p2, %r1, 32; @%p2 fence.proxy", "a proxy fence under divergence"),
    ],
)
def test_wgmma_that_is_not_waited_for(written: str, instead: str, message: str) -> None:
    assert written in WGMMA
    with pytest.raises(PtxError, match=message):
        run_wgmma(WGMMA.replace(written, instead, 1) + "L:")


@pytest.mark.parametrize(
    "instead, race",
    [
        (f"{WRITE} {WAIT}", "write of what a wgmma in flight reads"),
        # one warp of the four
        (f"setp.lt.u32 %p2, %r1, 32; @%p2 {WRITE} {WAIT}", "write of what a wgmma in flight reads"),
        # a barrier does not wait for a wgmma
        (f"bar.sync 0; {WRITE} {WAIT}", "write of what a wgmma in flight reads"),
        # the wait of a warp does not tell that of another
        (f"{WAIT} {WRITE}", "write after read"),
        (f"bar.sync 0; {WAIT} {WRITE}", "write after read"),
        # however late it lands
        (f"{COPY} {WAIT} bar.sync 0; cp.async.wait_group 0;", "cp.async of what a wgmma in flight reads"),
        (f"atom.shared.add.u32 %r30, [%r4], 0; {WAIT}", "atomic of what a wgmma in flight reads"),
        (f"stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {{%r20}}; {WAIT}", "stmatrix of what a wgmma"),
    ],
)
def test_shared_memory_is_written_while_wgmma_reads_it(instead: str, race: str) -> None:
    report = run_wgmma(WGMMA.replace(WAIT, instead))
    assert any(race in found for found in report.races)


@pytest.mark.parametrize(
    "written, instead",
    [
        ("fence.proxy.async.shared::cta;", ""),
        ("fence.proxy.async.shared::cta;", "fence.proxy.async.global;"),
        # a fence before the last write
        ("fence.proxy.async.shared::cta;", f"fence.proxy.async; {WRITE}"),
        # or before it is known to have happened
        ("bar.sync 0;", f"{COPY} fence.proxy.async; cp.async.wait_group 0; bar.sync 0;"),
    ],
)
def test_missing_proxy_fence(written: str, instead: str) -> None:
    outputs = np.zeros((128, 2), np.float32)
    inputs = np.full(128, 0x3C003C00, np.uint32)
    report = run_ptx(WGMMA.replace(written, instead), inputs, outputs, num_threads=128)
    (fence,) = report.missing_fences
    assert re.match("no fence.proxy.async before @.*wgmma.mma_async", fence)


# kernels of Triton


@triton.jit
def _philox_kernel(words_ptr, seed_ptr, block, position, step, STREAM: tl.constexpr):  # noqa: N803
    zero = tl.zeros([32], tl.uint32)
    words = philox(tl.load(seed_ptr), zero + block.to(tl.uint32), zero + position.to(tl.uint32), step, STREAM)
    for i in tl.static_range(4):
        tl.store(words_ptr + 32 * i + tl.arange(0, 32), words[i].to(tl.int32, bitcast=True))


@triton.jit
def _philox_10_kernel(words_ptr, seed, counter_ptr):
    zero = tl.zeros([32], tl.int32)
    words = tl.philox(
        seed, zero + tl.load(counter_ptr), zero + tl.load(counter_ptr + 1), zero + tl.load(counter_ptr + 2),
        zero + tl.load(counter_ptr + 3),
    )  # fmt: skip
    for i in tl.static_range(4):
        tl.store(words_ptr + 32 * i + tl.arange(0, 32), words[i].to(tl.int32, bitcast=True))


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# Random123 1.14, kat_vectors: counter, key, words
PHILOX_7 = [
    ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (*PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]
PHILOX_10 = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def as_signed(word: int, num_bits: int) -> int:
    return word - (1 << num_bits) if word >> num_bits - 1 else word


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("counter, key, answer", PHILOX_7)
def test_philox_known_answers(capability: int, counter: tuple, key: tuple, answer: tuple) -> None:
    words = torch.zeros(4, 32, dtype=torch.int32)
    block, position, step, _ = (as_signed(word, 32) for word in counter)
    with standin_gpu(capability):
        seed = torch.tensor([as_signed(key[1] << 32 | key[0], 64)])
        _philox_kernel[(1,)](words, seed, block, position, step, counter[3], num_warps=1)
    np.testing.assert_array_equal(words.numpy().view(np.uint32), np.array(answer, np.uint32)[:, None].repeat(32, 1))


@pytest.mark.parametrize("counter, key, answer", PHILOX_10)
def test_tritons_philox_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    words = torch.zeros(4, 32, dtype=torch.int32)
    with standin_gpu(80):
        counters = torch.tensor([as_signed(word, 32) for word in counter], dtype=torch.int32)
        _philox_10_kernel[(1,)](words, as_signed(key[1] << 32 | key[0], 64), counters, num_warps=1)
    np.testing.assert_array_equal(words.numpy().view(np.uint32), np.array(answer, np.uint32)[:, None].repeat(32, 1))


@triton.jit
def _gemm_kernel(a_ptr, b_ptr, c_ptr, num_columns, depth, stride_k, stride_n, BLOCK: tl.constexpr):  # noqa: N803
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], c_ptr.dtype.element_ty)
    for first in range(0, depth, BLOCK):
        a = tl.load(a_ptr + offs_m[:, None] * depth + first + offs_k[None, :])
        b = tl.load(b_ptr + (first + offs_k)[:, None] * stride_k + offs_n[None, :] * stride_n)
        acc = tl.dot(a, b, acc, out_dtype=c_ptr.dtype.element_ty)
    tl.store(c_ptr + offs_m[:, None] * num_columns + offs_n[None, :], acc)


def launch_gemm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute a @ b with b [depth, columns] in either order of memory."""
    c = torch.zeros(len(a), b.shape[1], dtype=dtype)
    grid = (len(a) // 64, b.shape[1] // 64)
    _gemm_kernel[grid](a, b, c, b.shape[1], len(b), *b.stride(), BLOCK=64, num_warps=4, num_stages=3)
    return c


def count_of(launch: Launch, prefix: str) -> int:
    assert launch.report is not None
    return sum(count for name, count in launch.report.instructions.items() if name.startswith(prefix))


@pytest.mark.parametrize("capability, opcode", [(80, "mma.sync"), (89, "mma.sync"), (90, "wgmma.mma_async")])
def test_integer_gemm_is_exact(capability: int, opcode: str) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((128, 256), (64, 256)))
    with standin_gpu(capability) as launches:
        got = launch_gemm(a, b.T, torch.int32)
    assert torch.equal(got, a.int() @ b.int().T)
    assert count_of(launches[0], opcode) > 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float_gemm(capability: int, is_transposed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(shape).to(dtype) for shape in ((64, 128), (128, 128)))
    b = b.T if is_transposed else b
    with standin_gpu(capability):
        got = launch_gemm(a, b, torch.float32)
    # products are exact: what is left is the order of 128 sums
    torch.testing.assert_close(got, (a.double() @ b.double()).float(), rtol=0, atol=2e-5)


def test_weakened_wait_spoils_a_gemm() -> None:
    a, b = (torch.randint(-128, 128, (64, 256), dtype=torch.int8) for _ in range(2))

    def weaken(ptx: str) -> str:
        return re.sub(r"(cp\.async\.wait_group\s+)\d", r"\g<1>9", ptx)

    with standin_gpu(80, edit_ptx=weaken, check_races=False) as launches:
        got = launch_gemm(a, b.T, torch.int32)
    assert re.search(r"cp\.async\.wait_group\s+9", launches[0].ptx)
    assert not torch.equal(got, a.int() @ b.int().T)


def test_a_wait_that_does_not_cover_a_wgmma_is_found() -> None:
    a, b = (torch.randint(-128, 128, (64, 256), dtype=torch.int8) for _ in range(2))

    def weaken(ptx: str) -> str:
        return re.sub(r"(wgmma\.wait_group\.sync\.aligned\s+)\d", r"\g<1>9", ptx)

    with standin_gpu(90, edit_ptx=weaken), pytest.raises(PtxError, match="a wgmma in flight"):
        launch_gemm(a, b.T, torch.int32)


def test_a_missing_proxy_fence_is_found_unless_it_is_waived() -> None:
    a, b = (torch.randint(-128, 128, (64, 256), dtype=torch.int8) for _ in range(2))
    with standin_gpu(90) as launches:
        launch_gemm(a, b.T, torch.int32)
    assert launches[0].report is not None
    if triton.__version__ in MISSING_FENCES_WAIVED:
        assert launches[0].report.missing_fences, "no fence is missing any more: end the waiver"
        return
    with (
        standin_gpu(90, edit_ptx=lambda ptx: re.sub(r"fence\.proxy\.async[\w.:]*;", "", ptx)),
        pytest.raises(PtxError, match=r"races in _gemm_kernel: no fence\.proxy\.async before .*wgmma"),
    ):
        launch_gemm(a, b.T, torch.int32)


@triton.jit
def _mixed_kernel(x_ptr, y_ptr, sum_ptr, sorted_ptr, BLOCK: tl.constexpr):  # noqa: N803
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr + offs, tl.cumsum(x, 0))
    tl.store(sorted_ptr + offs, tl.sort(x))
    # scalars in inline assembly, with registers of their own
    y = tl.inline_asm_elementwise(
        "{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; shl.b32 $0, t, 1; }",
        "=r,r",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    z = tl.inline_asm_elementwise(
        "{ .reg .b32 t; not.b32 t, $1; mov.b32 $0, t; }", "=r,r", [y], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(y_ptr + offs, z)


@pytest.mark.parametrize("capability", [80, 90])
def test_scan_sort_and_inline_assembly(capability: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(-1000, 1000, (512,), dtype=torch.int32)
    y, total, ordered = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    with standin_gpu(capability):
        _mixed_kernel[(1,)](x, y, total, ordered, BLOCK=512)
    assert torch.equal(total, x.cumsum(0, dtype=torch.int32))
    assert torch.equal(ordered, x.sort()[0])
    assert torch.equal(y, ~((x & 0x0F0F0F0F) << 1))
