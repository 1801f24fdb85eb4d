"""The Triton kernels against the CPU: on the device, in Triton's interpreter, compiled without a device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mgt_kernels
from mgt_kernels import cpu
from mgt_kernels import triton as kernels
from mgt_kernels.triton.draws import STREAM_NOISE, gaussian_pair, philox

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
# the interpreter truncates where bfloat16 rounds
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32]
runs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
# the interpreter runs numpy on logits of -inf, one program after another
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


@triton.jit
def _noise_kernel(noise_ptr, seed_ptr, position, step):
    offs = tl.arange(0, 512)
    positions = tl.full([512], 0, tl.uint32) + position
    words = philox(tl.load(seed_ptr), offs.to(tl.uint32), positions, step, STREAM_NOISE)
    first, second = gaussian_pair(words[0], words[1])
    tl.store(noise_ptr + offs, first)
    tl.store(noise_ptr + 512 + offs, second)
    first, second = gaussian_pair(words[2], words[3])
    tl.store(noise_ptr + 1024 + offs, first)
    tl.store(noise_ptr + 1536 + offs, second)


@runs_kernels
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3])
def test_gaussian_bits_equal_cpu(seed: int) -> None:
    noise = torch.full((2048,), torch.nan, device=DEVICE)
    _noise_kernel[(1,)](noise, torch.tensor([seed], device=DEVICE), 9, 5, enable_fp_fusion=False)
    assert torch.equal(noise.cpu(), cpu.gaussian(seed, 9, 5, 2048, "scalar"))


def make_logits(dtype: torch.dtype, num_tokens: int, num_positions: int, position_major: bool, spread: float) -> Tensor:
    if position_major:
        return (torch.randn(2, num_tokens, num_positions) * spread).to(dtype).transpose(1, 2)
    return (torch.randn(2, num_positions, num_tokens) * spread).to(dtype)


def draw_both(
    dtype: torch.dtype,
    num_tokens: int,
    *,
    num_positions: int = 3,
    position_major: bool = False,
    guided: bool = True,
    guidance_scale: float = 3.1,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    mask_token_id: int | None = None,
    forbid: bool = False,
    spread: float = 3.0,
    step: int = 4,
    seed_offset: int = 0,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (token_ids, logprob) of the CPU and of Triton; seed_offset makes the latter's seeds others."""
    torch.manual_seed(0)
    mask_token_id = num_tokens if mask_token_id is None else mask_token_id
    cond = make_logits(dtype, num_tokens, num_positions, position_major, spread)
    uncond = make_logits(dtype, num_tokens, num_positions, position_major, spread) if guided else None
    if forbid:
        cond[..., 1::5] = -torch.inf
        if uncond is not None:
            uncond[..., 2::7] = -torch.inf
    tokens = torch.full((2, num_positions), mask_token_id)
    if num_tokens > 1:
        tokens[0, 0] = 1 if mask_token_id == 0 else 0
    seed = torch.tensor([5, -(2**63) + 7])
    expected = mgt_kernels.sample_tokens(
        cond, tokens, mask_token_id=mask_token_id, seed=seed, step=step, uncond_logits=uncond,
        guidance_scale=guidance_scale, noise_scale=noise_scale, temperature=temperature, backend="scalar",
    )  # fmt: skip
    got = kernels.sample_tokens(
        cond.to(DEVICE), tokens.to(DEVICE), seed.to(DEVICE) + seed_offset, step, mask_token_id,
        None if uncond is None else uncond.to(DEVICE), guidance_scale, noise_scale, temperature,
    )  # fmt: skip
    return expected, (got[0].cpu(), got[1].cpu())


SAMPLE_CASES = [
    dict(num_tokens=1),
    dict(num_tokens=17, position_major=True, num_positions=17),
    dict(num_tokens=513, mask_token_id=-1, step=2**32 - 1),
    dict(num_tokens=2049, mask_token_id=2**40),
    dict(num_tokens=2049, position_major=True, guided=False),
    dict(num_tokens=5000, guided=False, temperature=2.5),
    dict(num_tokens=2304, noise_scale=2.0, temperature=0.8, forbid=True, mask_token_id=3),
    dict(num_tokens=700, noise_scale=0.3, temperature=0.37, forbid=True, mask_token_id=0, position_major=True),
    dict(num_tokens=2048, guidance_scale=-1.7, forbid=True),
    dict(num_tokens=2048, guidance_scale=0.0, forbid=True),
    # all logits equal: a draw from the noise alone, and the lowest id where there is none
    dict(num_tokens=1000, spread=0.0),
    dict(num_tokens=1000, spread=0.0, temperature=0.0),
    dict(num_tokens=4099, temperature=0.0),
    dict(num_tokens=4096, spread=30.0, step=0),
]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAMPLE_CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_sample_tokens_equals_cpu(case: dict, dtype: torch.dtype) -> None:
    expected, got = draw_both(dtype, **case)
    assert torch.equal(got[0], expected[0])
    known = expected[1] == torch.inf
    assert torch.equal(got[1] == torch.inf, known)
    # two units in the last place of a log-probability below -8
    torch.testing.assert_close(got[1][~known], expected[1][~known], rtol=0, atol=2e-6)


@runs_kernels
def test_sample_tokens_comparison_can_fail() -> None:
    expected, got = draw_both(torch.float32, 2048, num_positions=16, spread=1.0, seed_offset=1)
    assert not torch.equal(got[0], expected[0])


@runs_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("position_major", [False, True])
def test_sample_tokens_says_nan_for_bad_rows(position_major: bool, temperature: float) -> None:
    logits = torch.randn(1, 7, 2100)
    logits[0, 0, 7] = torch.nan
    logits[0, 1, 2099] = torch.inf
    logits[0, 2] = -torch.inf
    logits[0, 3, 9] = torch.nan  # of a known position
    logits[0, 4, :2099] = -torch.inf
    logits[0, 5, 5] = torch.nan  # of the mask itself
    if position_major:
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    tokens = torch.full((1, 7), 5)
    tokens[0, 3] = 6
    token_ids, logprob = kernels.sample_tokens(
        logits.to(DEVICE), tokens.to(DEVICE), torch.tensor([3]).to(DEVICE), 0, 5, None, 1.0, 0.0, temperature
    )
    assert token_ids[0, :5].tolist() == [5, 5, 5, 6, 2099]
    assert logprob[0].isnan().tolist() == [True, True, True, False, False, False, False]
    assert logprob[0, 3:5].tolist() == [torch.inf, 0.0]
    assert (token_ids[0, 5:] != 5).all()


def mask_both(
    num_positions: int, temperature: float, digits: int, seed_offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CPU's tokens, Triton's and mask_len; few digits make ties."""
    torch.manual_seed(0)
    logprob = (torch.randn(3, num_positions) * 2).round(decimals=digits)
    logprob[:, ::3] = torch.inf
    logprob[1, 1::3] = 0.0
    logprob[1, 2::3] = -0.0
    logprob[2, 1:2] = -torch.inf
    num_masked = (logprob != torch.inf).sum(1)
    mask_len = (num_masked * torch.tensor([0.5, 0.3, 1.0])).long()
    token_ids, seed = torch.randint(100, (3, num_positions)), torch.tensor([1, -2, 2**63 - 10])
    expected = mgt_kernels.mask_by_confidence(
        token_ids,
        logprob,
        mask_len,
        mask_token_id=100,
        temperature=temperature,
        seed=seed,
        step=7,
        backend="scalar",
    )
    tensors = [x.to(DEVICE) for x in (token_ids, logprob, mask_len, seed + seed_offset)]
    return expected, kernels.mask_by_confidence(*tensors, 7, 100, temperature).cpu(), mask_len


@runs_kernels
@pytest.mark.parametrize("digits", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("num_positions", [1, 5, 256, 4097, pytest.param(65536, marks=needs_cuda)])
def test_mask_by_confidence_equals_cpu(num_positions: int, temperature: float, digits: int) -> None:
    expected, got, mask_len = mask_both(num_positions, temperature, digits)
    assert torch.equal((got == 100).sum(1), mask_len)
    assert torch.equal(got, expected)


@runs_kernels
def test_mask_by_confidence_comparison_can_fail() -> None:
    expected, got, _ = mask_both(256, 4.5, 3, seed_offset=1)
    assert not torch.equal(got, expected)


@runs_kernels
def test_mask_by_confidence_masks_at_most_what_is_masked() -> None:
    logprob = torch.tensor([[torch.inf, -1.0, torch.nan, -3.0, -2.0]] * 3)
    token_ids = torch.arange(10, 25).view(3, 5)
    mask_len, seed = torch.tensor([9, 1, 2]), torch.tensor([1, 2, 3])
    tensors = [x.to(DEVICE) for x in (token_ids, logprob, mask_len, seed)]
    got = kernels.mask_by_confidence(*tensors, 0, -1, 0.0).cpu()
    # NaN says that nothing could be drawn: such a position stays masked before any other
    assert (got == -1).int().tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert torch.equal(got[got != -1], token_ids[got != -1])


@needs_cuda
def test_public_ops_on_the_device_equal_cpu() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 64, 1000), torch.full((2, 64), 1000)
    options = dict(mask_token_id=1000, seed=11, step=2)
    token_ids, logprob = mgt_kernels.sample_tokens(logits, tokens, **options)
    on_device = mgt_kernels.sample_tokens(logits.cuda(), tokens.cuda(), **options)
    assert torch.equal(on_device[0].cpu(), token_ids)
    masked = mgt_kernels.mask_by_confidence(token_ids, logprob, 20, temperature=1.0, **options)
    on_device_masked = mgt_kernels.mask_by_confidence(token_ids.cuda(), logprob.cuda(), 20, temperature=1.0, **options)
    assert torch.equal(on_device_masked.cpu(), masked)


@needs_cuda
def test_sample_tokens_past_two_pow_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    small = torch.randn(2, 4, 2048, dtype=torch.bfloat16)
    storage = torch.empty(2**31 + 4 * 2048, dtype=torch.bfloat16, device="cuda")
    logits = storage.as_strided((2, 4, 2048), (2**31, 2048, 1))
    logits.copy_(small)
    tokens = torch.full((2, 4), 2048)
    expected = mgt_kernels.sample_tokens(small, tokens, mask_token_id=2048, seed=1, step=0)
    got = mgt_kernels.sample_tokens(logits, tokens.cuda(), mask_token_id=2048, seed=1, step=0)
    assert torch.equal(got[0].cpu(), expected[0])


@pytest.mark.skipif(INTERPRETED or CUDA, reason="the device itself is the better witness")
def test_kernels_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).resolve()),
    ]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


ARGUMENT_TYPES = {
    "token_ids_ptr": "*i64", "masked_tokens_ptr": "*i64", "tokens_ptr": "*i64", "seed_ptr": "*i64",
    "mask_len_ptr": "*i64", "logprob_ptr": "*fp32", "guidance_scale": "fp32", "noise_scale": "fp32",
    "inverse_temperature": "fp32", "temperature": "fp32",
}  # fmt: skip

SPECIALIZED = re.compile(".*stride_.*|num_tokens|num_positions")


def compile_kernel(kernel, capability: int, dtype: str, num_warps: int, constants: dict, fusion: bool = False):  # type: ignore[no-untyped-def]
    types = {**ARGUMENT_TYPES, "logits_ptr": dtype, "uncond_ptr": dtype}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # as for tensors and rows that start at 16 bytes; without it Triton loads element by element
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (SPECIALIZED.fullmatch(name) and name not in constants)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layout", ["token_major", "position_major"])
def test_sample_tokens_compiles(layout: str, capability: int) -> None:
    from mgt_kernels.triton.sample_tokens import _sample_tokens_kernel

    if layout == "token_major":
        strides = {"stride_token": 1, "uncond_stride_token": 1, "BLOCK_POSITIONS": 1, "BLOCK_COLUMNS": 512}
    else:
        strides = {
            "stride_position": 1,
            "uncond_stride_position": 1,
            "BLOCK_POSITIONS": 16,
            "BLOCK_COLUMNS": 32,
        }
    constants = {**strides, "HAS_NOISE": True, "GREEDY": False}
    compiled = compile_kernel(_sample_tokens_kernel, capability, "*bf16", 4, constants)
    assert compiled.asm["cubin"]
    assert_exact_arithmetic(compiled.asm["ptx"])
    assert re.search(r"ld\.global\.v[24]\.b32", compiled.asm["ptx"]), "logits are not loaded as vectors"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
def test_mask_by_confidence_compiles(capability: int) -> None:
    from mgt_kernels.triton.mask_by_confidence import _mask_by_confidence_kernel

    constants = {"HAS_NOISE": True, "BLOCK_POSITIONS": 1024}
    compiled = compile_kernel(_mask_by_confidence_kernel, capability, "*bf16", 8, constants)
    assert compiled.asm["cubin"]
    assert_exact_arithmetic(compiled.asm["ptx"])


def assert_exact_arithmetic(ptx: str) -> None:
    # the softmax's exp2 is the one approximation; mul.f32 may be contracted with a sum, mul.rn.f32 may not
    assert set(re.findall(r"\b(\w+)\.approx", ptx)) <= {"ex2"}
    assert not re.search(r"\b(mul|add|sub)\.f32\b", ptx)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_exact_arithmetic_can_fail() -> None:
    from mgt_kernels.triton.mask_by_confidence import _mask_by_confidence_kernel

    constants = {"HAS_NOISE": True, "BLOCK_POSITIONS": 128}
    compiled = compile_kernel(_mask_by_confidence_kernel, 80, "*bf16", 4, constants, fusion=True)
    with pytest.raises(AssertionError):
        assert_exact_arithmetic(compiled.asm["ptx"])
