"""What Python costs at each call of an op: `python -m mgt_benchmarks.overhead`.

The inputs are so small that the kernels take next to nothing. Each op is called by three doors: the binding of the C
library with its arguments ready, the op as PyTorch's dispatcher knows it, and the public function.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import mgt_kernels
from mgt_kernels import _C, cpu

ROUNDS, CALLS = 301, 10
DOORS = ("binding", "torch.ops", "public")


def recorded(name: str, public: Callable[[], object]) -> Callable[[], object]:
    """Return the binding's call that a public call makes."""
    binding = getattr(_C, name)
    arguments: list[tuple[Any, ...]] = []
    outputs: list[torch.Tensor] = []

    def keeping(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        # the addresses that were recorded stay valid
        def kept(*options: Any) -> torch.Tensor:
            outputs.append(make(*options))
            return outputs[-1]

        return kept

    def recording(*called: Any) -> object:
        arguments.append(called)
        return binding(*called)

    with (
        mock.patch.object(_C, name, recording),
        mock.patch.object(cpu, "_empty", keeping(cpu._empty)),
        mock.patch.object(cpu, "_empty_like", keeping(cpu._empty_like)),
    ):
        public()
    return lambda: binding(*arguments[0]) if outputs else None


def doors() -> dict[str, tuple[Callable[[], object], ...]]:
    """Return, for each op, its binding, its torch op and its public function, called with the same small inputs."""
    ops = torch.ops.mgt_kernels
    logits, tokens, logprob = torch.randn(1, 4, 32), torch.full((1, 4), 32), torch.zeros(1, 4)
    seed, first = torch.zeros(2, 1, dtype=torch.int64)
    step, count = torch.tensor(1), torch.tensor([2])
    one, zero, infinity = (torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.0, math.inf))
    weight, x = mgt_kernels.quantize_int4(torch.randn(4, 64)), torch.randn(1, 64)
    packed = (x, weight.w_q, weight.scale, weight.zero_point, weight.group_size)
    draw: dict[str, Any] = dict(mask_token_id=32, seed=seed, step=1)
    _, _, state = mgt_kernels.differential_sample(logits, tokens, None, mask_token_id=32, seed=seed, step=0)
    held = (state.history, state.written, state.step, state.seed)

    # the fields of a draw behind its logits and tokens
    drawn = (seed, step, 32, None, one, zero, one, first, None, None, one, "nested", infinity)

    def differential_sample() -> object:
        state.step.zero_()
        return mgt_kernels.differential_sample(logits, tokens, state, **draw)

    def differential_op() -> object:
        state.step.zero_()
        return ops.differential_sample(logits, tokens, *drawn, *held, True, 0.75, "paper", False, "auto")

    public: dict[str, Callable[[], object]] = {
        "sample_tokens": lambda: mgt_kernels.sample_tokens(logits, tokens, **draw),
        "differential_sample": differential_sample,
        "mask_by_confidence": lambda: mgt_kernels.mask_by_confidence(tokens, logprob, count, temperature=1.0, **draw),
        "commit_tokens": lambda: mgt_kernels.commit_tokens(tokens, logprob, tokens, count=count, **draw),
        "w4a8_linear": lambda: mgt_kernels.w4a8_linear(x, weight),
        "w4a16_linear": lambda: mgt_kernels.w4a16_linear(x, weight),
    }
    dispatched: dict[str, Callable[[], object]] = {
        "sample_tokens": lambda: ops.sample_tokens(logits, tokens, *drawn, "masked", "", 0, one, zero, "kept", "auto"),
        "differential_sample": differential_op,
        "mask_by_confidence": lambda: ops.mask_by_confidence(tokens, logprob, count, seed, step, 32, one, "auto"),
        "commit_tokens": lambda: ops.commit_tokens(
            tokens,
            logprob,
            tokens,
            count,
            seed,
            step,
            32,
            "count",
            zero,
            zero,
            None,
            None,
            None,
            None,
            infinity,
            None,
            -infinity,
            "auto",
        ),
        "w4a8_linear": lambda: ops.w4a8_linear(*packed, None, None, "auto"),
        "w4a16_linear": lambda: ops.w4a16_linear(*packed, None, False, "auto"),
    }
    return {
        op: (recorded("int4_linear" if "linear" in op else op, call), dispatched[op], call)
        for op, call in public.items()
    }


def microseconds(call: Callable[[], object]) -> float:
    """Return the time of one call, over a few of them."""
    before = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - before) / CALLS * 1e6


def main() -> None:
    """Print microseconds per call: medians of rounds in which every op takes every door once."""
    torch.set_num_threads(1)
    cases = doors()
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for op, calls in cases.items():
            for door, call in enumerate(calls):
                times.setdefault((op, door), []).append(microseconds(call))
    print(f"{'us per call':22}" + "".join(f"{door:>12}" for door in DOORS))
    for op in cases:
        medians = (statistics.median(times[op, door]) for door in range(len(DOORS)))
        print(f"{op:22}" + "".join(f"{median:12.1f}" for median in medians))


if __name__ == "__main__":
    with torch.no_grad():
        main()
