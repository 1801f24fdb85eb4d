"""Run the cases on a real GPU and time a step against PyTorch's chain; prints a report to send in.

    python tests/gpu/on_device.py

The cases are those that the emulator runs. Times are medians over interleaved rounds, and so figures of the GPU it
runs on, of nothing else.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

from cases import CASES, Case, sample_tokens_case

import mgt_kernels
from mgt_benchmarks.models import MEISSONIC_1024
from mgt_benchmarks.run import OURS, time_case
from mgt_benchmarks.steps import sampling_case

ROUNDS = 20


def main() -> None:
    """Print the report; exit with 1 where a case failed."""
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, and a build of PyTorch that sees it")
    print("\n".join(f"{key}: {value}" for key, value in mgt_kernels.info().items()), flush=True)
    failures = {str(case): message for case in tqdm(CASES, "cases") if (message := run(case))}
    failures |= {name: message for name, check in EXTRA.items() if (message := failure_of(check))}
    print(f"\n{len(CASES) + len(EXTRA) - len(failures)} of {len(CASES) + len(EXTRA)} cases passed")
    for name, message in failures.items():
        print(f"FAILED {name}: {message}")
    print("\n| step, N=4096 V=8192 guided | ours, ms | PyTorch, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for dtype in (torch.bfloat16, torch.float32):
        for noise_scale in (0.0, 1.0):
            ours, pytorch = time_step(dtype, noise_scale)
            name = f"{dtype}, noise {noise_scale:g}"
            print(f"| {name} | {ours:.3f} | {pytorch:.3f} | {pytorch / ours:.1f} |", flush=True)
    sys.exit(bool(failures))


def to(device: str, arguments: tuple) -> tuple:
    """Move the tensors among the arguments, strides kept."""
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)


def run(case: Case) -> str:
    """Compare a case with the CPU; return what is wrong, or nothing."""
    arguments = case.make_arguments()
    expected = case.expected(*arguments)

    def check() -> None:
        case.check(arguments, expected, to("cpu", case.run(to("cuda", arguments))))

    return failure_of(check)


def failure_of(check: Callable[[], None]) -> str:
    """Return the message of what a check raises."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def graph_replays_with_fresh_draws() -> None:
    """A CUDA graph of one step, replayed with another step index and seed in place."""
    case = sample_tokens_case("graph", 8192, num_positions=64)
    arguments = case.make_arguments()
    logits, tokens, seed, step, mask_token_id, uncond, guidance_scale, *_ = to("cuda", arguments)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return mgt_kernels.sample_tokens(
            logits, tokens, mask_token_id=mask_token_id, seed=seed, step=step, uncond_logits=uncond,
            guidance_scale=guidance_scale,
        )  # fmt: skip

    # compiles before the capture
    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids, _ = draw()
    for value in (1, 2):
        step.fill_(value)
        seed += value
        graph.replay()
        torch.cuda.synchronize()
        inputs = (*arguments[:2], seed.cpu(), step.cpu(), *arguments[4:])
        assert torch.equal(token_ids.cpu(), case.expected(*inputs)[0])


def graph_replays_along_a_schedule() -> None:
    """A CUDA graph of one step, replayed with guidance, noise and temperature of each step of a schedule."""
    case = sample_tokens_case("schedule", 8192, num_positions=64)
    arguments = case.make_arguments()
    logits, tokens, seed, step, mask_token_id, uncond, *_ = to("cuda", arguments)
    guidance_scale, noise_scale, temperature = scalars = torch.ones(3, device="cuda").unbind()
    options: dict[str, Any] = dict(mask_token_id=mask_token_id, seed=seed, step=step, temperature=temperature)
    guidance: dict[str, Any] = dict(uncond_logits=uncond, guidance_scale=guidance_scale, noise_scale=noise_scale)

    def draw() -> tuple[torch.Tensor, ...]:
        token_ids, logprob = mgt_kernels.sample_tokens(logits, tokens, **guidance, **options)
        masked = mgt_kernels.mask_by_confidence(token_ids, logprob, 20, **options)
        return token_ids, logprob, masked

    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = draw()
    for values in ((3.0, 0.5, 0.7), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)):
        for scalar, value in zip(scalars, values, strict=True):
            scalar.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        token_ids, logprob, masked = to("cpu", outputs)
        numbers = [float(scalar) for scalar in scalars]
        assert torch.equal(token_ids, case.expected(*arguments[:6], *numbers)[0])
        expected = mgt_kernels.mask_by_confidence(
            token_ids, logprob, 20, temperature=numbers[2], mask_token_id=mask_token_id, seed=arguments[2],
            step=arguments[3],
        )  # fmt: skip
        assert torch.equal(masked, expected)


def elements_past_two_pow_31() -> None:
    """Rows that lie further apart than 32-bit offsets reach."""
    small = torch.randn(2, 4, 2048, dtype=torch.bfloat16)
    storage = torch.empty(2**31 + 4 * 2048, dtype=torch.bfloat16, device="cuda")
    logits = storage.as_strided((2, 4, 2048), (2**31, 2048, 1))
    logits.copy_(small)
    tokens = torch.full((2, 4), 2048)
    options: dict[str, Any] = dict(mask_token_id=2048, seed=1, step=0)
    expected = mgt_kernels.sample_tokens(small, tokens, **options)
    assert torch.equal(mgt_kernels.sample_tokens(logits, tokens.cuda(), **options)[0].cpu(), expected[0])


def compiled_step() -> None:
    """torch.compile takes the public ops on the device without a graph break."""

    def step(logits: torch.Tensor, tokens: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        token_ids, logprob = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=1000, seed=seed, step=2)
        options: dict[str, Any] = dict(mask_token_id=1000, temperature=1.0, seed=seed, step=2)
        return mgt_kernels.mask_by_confidence(token_ids, logprob, 20, **options)

    inputs = (torch.randn(2, 64, 1000), torch.full((2, 64), 1000), torch.tensor([11, 12]))
    on_device = torch.compile(step, fullgraph=True)(*to("cuda", inputs))
    assert torch.equal(on_device.cpu(), step(*inputs))


EXTRA = {
    "a CUDA graph replays with fresh draws": graph_replays_with_fresh_draws,
    "a CUDA graph replays along a schedule": graph_replays_along_a_schedule,
    "more than 2^31 elements": elements_past_two_pow_31,
    "torch.compile": compiled_step,
}


def time_step(dtype: torch.dtype, noise_scale: float) -> tuple[float, float]:
    """Median milliseconds of our step and of PyTorch's, on the same logits, in turns."""
    case = sampling_case(MEISSONIC_1024, dtype=dtype, noise_scale=noise_scale, backend="triton")
    seconds = time_case(case, ROUNDS).seconds
    return statistics.median(seconds[OURS]) * 1e3, statistics.median(seconds["pytorch"]) * 1e3


if __name__ == "__main__":
    main()
