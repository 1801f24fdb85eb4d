"""Exported kernels in a C program without Python, linked with the driver's library and run on the device."""

import ctypes.util
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import mgt_kernels
from device.precompile import capability
from device.results import REHEARSED, AbsentError, scratch
from mgt_kernels.triton.export import variants_of, write_sources

HERE = Path(__file__).parent
# as exported.c has them
BATCH, NUM_POSITIONS, NUM_TOKENS = 2, 16, 4096
GUIDANCE_SCALE, CONFIDENCE_TEMPERATURE = 3.0, 1.3
# bfloat16, token-major, guided, aligned, a row split in two; and the re-masking of up to 128 positions, with noise
KEYS = (
    "MGT_CUDA_SAMPLE_TOKENS(MGT_CUDA_BFLOAT16, 0, 1, 0, 0, 1, 1)",
    "MGT_CUDA_COMBINE_SPLITS(2)",
    "MGT_CUDA_MASK_BY_CONFIDENCE(128, 1, 1, 1)",
)


def names() -> list[str]:
    """Return the only item."""
    return ["a step in C"]


def work(name: str) -> dict[str, object]:
    """Export, compile, link and run; AssertionError where the tokens are not the CPU's."""
    directory = scratch() / "exported"
    directory.mkdir(parents=True, exist_ok=True)
    program = build(directory)
    generator = torch.Generator().manual_seed(0)
    logits, uncond = torch.randn(2, BATCH, NUM_POSITIONS, NUM_TOKENS, generator=generator).mul_(3).bfloat16()
    tokens = torch.full((BATCH, NUM_POSITIONS), NUM_TOKENS)
    tokens[:, ::5] = 7
    seed, step, mask_len = torch.tensor([5, -6]), torch.tensor(4), torch.tensor([3, 9])
    given = (tokens, seed, step, mask_len, logits, uncond)
    (directory / "input").write_bytes(b"".join(map(_bytes, given)))
    environment = os.environ | {"FAKE_CUDA_CAPABILITY": str(capability())}
    command = [program, directory / "input", directory / "output"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert not done.returncode, f"exit code {done.returncode}: {done.stderr.strip()}"
    if REHEARSED:
        launched = [line.split()[0] for line in done.stdout.splitlines()]
        assert launched == ["sample_tokens_kernel", "combine_splits_kernel", "mask_by_confidence_kernel"], launched
        return {}
    token_ids, logprob, masked = outputs((directory / "output").read_bytes())
    options: dict[str, Any] = dict(mask_token_id=NUM_TOKENS, seed=seed, step=step)
    expected, truth, *_ = mgt_kernels.sample_tokens(
        logits, tokens, uncond_logits=uncond, guidance_scale=GUIDANCE_SCALE, **options
    )
    assert torch.equal(token_ids, expected), f"{int((token_ids != expected).sum())} token ids differ"
    torch.testing.assert_close(logprob, truth, rtol=1e-6, atol=2e-6)
    remasked = mgt_kernels.mask_by_confidence(
        token_ids, logprob, mask_len, temperature=CONFIDENCE_TEMPERATURE, **options
    )
    assert torch.equal(masked, remasked), f"{int((masked != remasked).sum())} masked tokens differ"
    return {}


def build(directory: Path) -> Path:
    """Write the sources and make the program."""
    variants = [variant for variant in variants_of(["bf16"], ["token-major"]) if variant.key in KEYS]
    assert len(variants) == len(KEYS), [variant.key for variant in variants]
    sources = [path for path in write_sources(directory, [capability()], variants) if path.suffix == ".c"]
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    program = directory / "program"
    command = [os.environ.get("CC", "cc"), "-std=c11", "-O1", f"-I{directory}", "-isystem", str(include)]
    command += [str(HERE / "exported.c"), *map(str, sources), "-o", str(program), *_driver_library()]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise AbsentError(f"no C compiler ({command[0]})") from None
    assert not done.returncode, done.stderr[-1500:]
    return program


def outputs(data: bytes) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, log-probabilities and re-masked tokens of what the program wrote."""
    num = BATCH * NUM_POSITIONS
    dtypes = (torch.int64, torch.float32, torch.int64)
    offsets = (0, 8 * num, 12 * num)
    assert len(data) == 20 * num, f"the program wrote {len(data)} bytes"
    token_ids, logprob, masked = (
        torch.frombuffer(bytearray(data), dtype=dtype, count=num, offset=offset).view(BATCH, NUM_POSITIONS)
        for dtype, offset in zip(dtypes, offsets, strict=True)
    )
    return token_ids, logprob, masked


def _driver_library() -> list[str]:
    if REHEARSED:
        return [str(HERE.parent / "fake_cuda" / name) for name in ("fake_cuda.c", "memory.c")]
    library = ctypes.util.find_library("cuda")
    if library is None:
        raise AbsentError("the linker's cache has no libcuda")
    # where there is a driver and no toolkit, libcuda.so, without a version, is missing
    return [f"-l:{library}"]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
