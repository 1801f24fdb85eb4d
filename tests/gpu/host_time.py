"""What a decoding step on a GPU costs the host: `python tests/gpu/host_time.py`.

Guided logits of 256 positions in bfloat16 are drawn and masked again through the public ops: three launches. A stand-in
takes the place of the GPU, and its launcher does nothing, so what remains is Python and PyTorch's allocations: on a GPU
the driver's microseconds come on top. The ways to launch take turns; printed are the thread's CPU time of a step, the
least and the median of the rounds.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import driver
import torch
from device.standin import cpu_tensors_on
from triton.runtime import JITFunction

import mgt_kernels
from mgt_kernels.triton import launch as launching

ROUNDS, CALLS = 200, 20
POSITIONS, TOKENS = 256, 2048


def through_triton(kernel: JITFunction, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Launch as Triton itself does."""
    kernel[grid](*arguments, **settings)


def nowhere(*_: Any, **settings: Any) -> None:
    """Launch nothing."""


def make_step() -> Callable[[], object]:
    """Return a step of the public ops."""
    logits, uncond = (torch.zeros(1, POSITIONS, TOKENS, dtype=torch.bfloat16) for _ in range(2))
    tokens, seed, count = torch.full((1, POSITIONS), TOKENS), torch.zeros(1, dtype=torch.int64), torch.tensor([100])
    draw: dict[str, Any] = dict(mask_token_id=TOKENS, seed=seed, step=torch.tensor(1))

    def step() -> object:
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(
            logits, tokens, uncond_logits=uncond, guidance_scale=4.0, noise_scale=0.5, **draw
        )
        return mgt_kernels.mask_by_confidence(token_ids, logprob, count, temperature=0.5, **draw)

    return step


def main() -> None:
    """Print a line per way to launch."""
    launchers = [sys.modules[f"mgt_kernels.triton.{op}"] for op in ("sample_tokens", "mask_by_confidence")]
    ways = {"Triton's launches": through_triton, "ours": launching.launch, "none": nowhere}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with (
        torch.no_grad(),
        cpu_tensors_on(90, execute=False),
        mock.patch.object(driver._Launcher, "__call__", lambda *_: None),
    ):
        step = make_step()
        for _ in range(ROUNDS):
            for name, way in ways.items():
                for launcher in launchers:
                    launcher.launch = way  # type: ignore[attr-defined]
                step()
                before = time.thread_time_ns()
                for _ in range(CALLS):
                    step()
                times[name].append((time.thread_time_ns() - before) / CALLS / 1000)
    print("| launches | least, us | median, us |\n|---|---:|---:|")
    for name, us in times.items():
        print(f"| {name} | {min(us):.0f} | {statistics.median(us):.0f} |")


if __name__ == "__main__":
    main()
