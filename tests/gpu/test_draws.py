"""Random draws on the GPU: the bits of the CPU."""

import pytest
import sass
import torch
import triton
import triton.language as tl
from driver import standin_gpu

from mgt_kernels import cpu
from mgt_kernels.triton.draws import (
    LAUNCH_OPTIONS,
    STREAM_NOISE,
    _sqrt_f32,
    exponential_below,
    gaussian_pair,
    philox,
)


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


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3])
def test_gaussian_bits_equal_cpu(seed, capability):
    noise = torch.full((2048,), torch.nan)
    with standin_gpu(capability):
        _noise_kernel[(1,)](noise, torch.tensor([seed]), 9, 5, **LAUNCH_OPTIONS)
    assert torch.equal(noise, cpu.gaussian(seed, 9, 5, 2048, "scalar"))


@triton.jit
def _extreme_kernel(pair_ptr, bound_ptr, word_ptr):
    offs = tl.arange(0, 128)
    word = tl.load(word_ptr + offs).to(tl.uint32)
    first, second = gaussian_pair(word, word)
    tl.store(pair_ptr + offs, first)
    tl.store(pair_ptr + 128 + offs, second)
    tl.store(bound_ptr + offs, exponential_below(word))


def test_extreme_words():
    word = torch.cat([torch.arange(64), 2**32 - 1 - torch.arange(64)])
    pair, bound = torch.full((2, 128), torch.nan), torch.full((128,), torch.nan)
    with standin_gpu(80):
        _extreme_kernel[(1,)](pair, bound, word, **LAUNCH_OPTIONS)
    w = (word.double() + 0.5) * 2.0**-32
    radius, angle = (-2 * w.log()).sqrt(), 2 * torch.pi * word.double() * 2.0**-32
    # fp32 words near 1 are 128 words wide
    torch.testing.assert_close(pair[0].double(), radius * angle.cos(), rtol=2e-6, atol=3e-4)
    torch.testing.assert_close(pair[1].double(), radius * angle.sin(), rtol=2e-6, atol=3e-4)
    exponential = -torch.log1p(-w)
    assert (bound.double() <= exponential * (1 + 1e-6)).all()
    torch.testing.assert_close(bound[:64].double(), exponential[:64], rtol=1e-6, atol=0)


@triton.jit
def _sqrt_rn_kernel(y_ptr, x_ptr):
    offs = tl.arange(0, 32)
    tl.store(y_ptr + offs, tl.sqrt_rn(tl.load(x_ptr + offs)))


@triton.jit
def _sqrt_f32_kernel(y_ptr, x_ptr):
    offs = tl.arange(0, 32)
    tl.store(y_ptr + offs, _sqrt_f32(tl.load(x_ptr + offs)))


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_square_root_is_the_fast_path_of_sqrt_rn(capability):
    """ptxas's sqrt.rn checks that x is no smaller than 2^-101 and then does what _sqrt_f32 does."""
    code = []
    for kernel in (_sqrt_rn_kernel, _sqrt_f32_kernel):
        with standin_gpu(capability, execute=False) as launches:
            kernel[(1,)](torch.empty(32), torch.empty(32), num_warps=1, **LAUNCH_OPTIONS)
        analysis = sass.analyse(launches[0].cubin, 1, 0)
        bases = [x.base for x in analysis.code]
        start = bases.index("MUFU")
        floating = [x for x in analysis.code[start:] if x.base in ("MUFU", "FMUL", "FFMA")]
        code.append([x.opcode.removesuffix(".FTZ") for x in floating[:5]])
    assert code[0] == code[1] == ["MUFU.RSQ", "FMUL", "FMUL", "FFMA", "FFMA"]
