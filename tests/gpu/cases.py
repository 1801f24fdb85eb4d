"""What every Triton kernel is run on, in the emulator and on a device: arguments, expected outputs, comparison.

A kernel gets in by adding its cases to CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compare import assert_no_worse_than_naive
from torch import Tensor

from mgt_kernels import reference, triton

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op: `arguments` in the order of its launcher; `check` compares the outputs with those expected."""

    op: str
    name: str
    make_arguments: Callable[[], tuple]
    expected: Callable[..., Outputs]
    check: Callable[[tuple, Outputs, Outputs], None]

    def run(self, arguments: tuple) -> Outputs:
        """Run the Triton kernel on CPU tensors (in the emulator) or CUDA tensors."""
        outputs = getattr(triton, self.op)(*arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def __str__(self) -> str:
        """Name the case in a report."""
        return f"{self.op}: {self.name}"


def on_cpu(op: str) -> Callable[..., Outputs]:
    """Return the op on the best instruction set of the CPU."""

    def expected(*arguments: object) -> Outputs:
        outputs = getattr(torch.ops.mgt_kernels, op)(*arguments, "auto")
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return expected


def sample_tokens_case(
    name: str,
    num_tokens: int,
    *,
    batch: int = 2,
    num_positions: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    position_major: bool = False,
    guidance_scale: float | None = 3.1,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    std: float = 3.0,
    digits: int | None = None,
    forbidden: bool = False,
    mask_token_id: int | None = None,
    step: int = 4,
    known_share: float = 0.2,
    expected: Callable[..., Outputs] | None = None,
    check: Callable[[tuple, Outputs, Outputs], None] | None = None,
) -> Case:
    """Make a case of random logits; few digits make ties, `forbidden` puts -inf into both halves."""

    def make_arguments() -> tuple:
        generator = torch.Generator().manual_seed(num_tokens + num_positions)

        def half(every: int) -> Tensor:
            logits = torch.randn(batch, num_positions, num_tokens, generator=generator) * std
            if digits is not None:
                logits = logits.round(decimals=digits)
            if forbidden:
                logits[..., 1::every] = -torch.inf
            logits = logits.to(dtype)
            return logits.mT.contiguous().mT if position_major else logits

        mask = num_tokens if mask_token_id is None else mask_token_id
        tokens = torch.full((batch, num_positions), mask)
        known = torch.rand(batch, num_positions, generator=generator) < known_share
        tokens[known] = (mask + 1) % num_tokens if num_tokens > 1 else mask
        seed = torch.tensor([5, -(2**63) + 7, 2**63 - 1][:batch])
        uncond = None if guidance_scale is None else half(7)
        scale = 1.0 if guidance_scale is None else guidance_scale
        return half(5), tokens, seed, torch.tensor(step), mask, uncond, scale, noise_scale, temperature

    return Case(
        "sample_tokens", name, make_arguments, expected or on_cpu("sample_tokens"), check or check_sample_tokens
    )


def check_sample_tokens(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Ids equal the CPU's to the bit, log-probabilities are no worse than PyTorch's own fp32 chain."""
    assert torch.equal(outputs[0], expected[0]), f"{int((outputs[0] != expected[0]).sum())} token ids differ"
    logits, tokens, seed, step, mask_token_id, uncond, guidance_scale, noise_scale, temperature = arguments
    masked = tokens == mask_token_id
    assert torch.equal(outputs[1] == torch.inf, ~masked)
    tempered, _ = reference.perturbed_logits(
        logits, seed=seed, step=int(step), mask_token_id=mask_token_id, uncond_logits=uncond,
        guidance_scale=guidance_scale, noise_scale=noise_scale, temperature=temperature,
    )  # fmt: skip
    index = expected[0][..., None].clamp(0, logits.shape[-1] - 1)
    truth = (tempered.gather(-1, index)[..., 0] - tempered.logsumexp(-1))[masked]
    naive = pytorch_chain(arguments).log_softmax(-1).gather(-1, index)[..., 0][masked]
    if noise_scale:
        # the kernels' noise itself is fp32, some units in the last place of 6.8
        naive = naive + 4e-6
    assert_no_worse_than_naive(outputs[1][masked], truth, naive)


def pytorch_chain(arguments: tuple) -> Tensor:
    """Return the logits that tokens are drawn from as PyTorch computes them in fp32."""
    logits, _, seed, step, mask_token_id, uncond, guidance_scale, noise_scale, temperature = arguments
    tempered = logits.float()
    if uncond is not None:
        forbidden = (logits == -torch.inf) | (uncond == -torch.inf)
        tempered = (uncond.float() + guidance_scale * (tempered - uncond.float())).masked_fill(forbidden, -torch.inf)
    if noise_scale:
        _, num_positions, num_tokens = logits.shape
        tempered = tempered + noise_scale * reference.gaussian(seed, num_positions, num_tokens, int(step)).float()
    if temperature:
        tempered = tempered / temperature
    if mask_token_id < logits.shape[-1]:
        tempered[..., mask_token_id] = -torch.inf
    return tempered


def check_ids(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Ids equal the CPU's to the bit; log-probabilities, for which many rows make the oracle slow, nearly."""
    assert torch.equal(outputs[0], expected[0]), f"{int((outputs[0] != expected[0]).sum())} token ids differ"
    torch.testing.assert_close(outputs[1], expected[1], rtol=1e-6, atol=2e-6)


def bad_rows_case(position_major: bool) -> Case:
    """Rows from which nothing can be drawn: a device cannot raise, so they stay masked and say NaN."""

    def make_arguments() -> tuple:
        logits = torch.randn(1, 7, 2100, generator=torch.Generator().manual_seed(0))
        logits[0, 0, 7] = torch.nan
        logits[0, 1, 2099] = torch.inf
        logits[0, 2] = -torch.inf
        logits[0, 3, 9] = torch.nan  # of a known position
        logits[0, 4, :2099] = -torch.inf
        logits[0, 5, 5] = torch.nan  # of the mask itself
        if position_major:
            logits = logits.mT.contiguous().mT
        tokens = torch.full((1, 7), 5)
        tokens[0, 3] = 6
        return logits, tokens, torch.tensor([3]), torch.tensor(0), 5, None, 1.0, 0.0, 1.0

    def expected(logits: Tensor, tokens: Tensor, *options: object) -> Outputs:
        drawable = tokens.clone()
        drawable[0, :3] = 6
        token_ids, logprob = on_cpu("sample_tokens")(logits, drawable, *options)
        token_ids[0, :3] = 5
        logprob[0, :3] = torch.nan
        return token_ids, logprob

    def check(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
        assert torch.equal(outputs[0], expected[0])
        torch.testing.assert_close(outputs[1], expected[1], equal_nan=True, rtol=1e-6, atol=1e-6)

    layout = "position-major" if position_major else "token-major"
    return Case("sample_tokens", f"bad rows, {layout}", make_arguments, expected, check)


def mask_by_confidence_case(num_positions: int, temperature: float, digits: int) -> Case:
    """Make a case with a third of the positions known, ties (few digits), -0 against 0, -inf."""

    def make_arguments() -> tuple:
        generator = torch.Generator().manual_seed(num_positions)
        logprob = (torch.randn(3, num_positions, generator=generator) * 2).round(decimals=digits)
        logprob[:, ::3] = torch.inf
        logprob[1, 1::3] = 0.0
        logprob[1, 2::3] = -0.0
        logprob[2, 1:2] = -torch.inf
        num_masked = (logprob != torch.inf).sum(1)
        mask_len = (num_masked * torch.tensor([0.5, 0.3, 1.0])).long()
        token_ids = torch.randint(100, (3, num_positions), generator=generator)
        seed = torch.tensor([1, -2, 2**63 - 10])
        return token_ids, logprob, mask_len, seed, torch.tensor(7), 100, temperature

    name = f"N={num_positions} temperature={temperature} digits={digits}"
    return Case("mask_by_confidence", name, make_arguments, on_cpu("mask_by_confidence"), check_masks)


def check_masks(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Exactly mask_len positions are masked, the CPU's."""
    assert torch.equal((outputs[0] == 100).sum(1), arguments[2])
    assert torch.equal(outputs[0], expected[0])


def too_many_to_mask_case() -> Case:
    """A mask_len above what is masked, and NaN: a device cannot raise."""

    def make_arguments() -> tuple:
        logprob = torch.tensor([[torch.inf, -1.0, torch.nan, -3.0, -2.0]] * 3)
        token_ids = torch.arange(10, 25).view(3, 5)
        return token_ids, logprob, torch.tensor([9, 1, 2]), torch.tensor([1, 2, 3]), torch.tensor(0), -1, 0.0

    def expected(token_ids: Tensor, *_: object) -> Outputs:
        # NaN says that nothing could be drawn: such a position stays masked before any other
        masked = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
        return (token_ids.masked_fill(masked.to(token_ids.device), -1),)

    def check(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
        assert torch.equal(outputs[0], expected[0])

    return Case("mask_by_confidence", "more than is masked, and NaN", make_arguments, expected, check)


FP32, FP16 = torch.float32, torch.float16
MANY_ROWS: dict[str, Any] = dict(batch=1, num_positions=5000, known_share=0.0, check=check_ids)

CASES = [
    sample_tokens_case("bf16 aligned", 2048),
    sample_tokens_case("bf16 nearly uniform", 2048, std=0.01, step=2**32 - 1),
    sample_tokens_case("bf16 peaked", 2048, std=30.0),
    sample_tokens_case("bf16 scale 0, -inf in both halves", 2048, guidance_scale=0.0, forbidden=True),
    sample_tokens_case("bf16 split over four programs", 8192, num_positions=8),
    sample_tokens_case("bf16 noise, -inf, the mask in the vocabulary", 4096, noise_scale=2.0, temperature=0.8,
                       forbidden=True, mask_token_id=3),
    sample_tokens_case("fp32 one token", 1, dtype=FP32),
    sample_tokens_case("fp32 ties", 16, batch=1, num_positions=300, dtype=FP32, std=0.0),
    sample_tokens_case("fp32 odd", 31, dtype=FP32),
    sample_tokens_case("fp32 odd, two words", 513, dtype=FP32),
    sample_tokens_case("fp32 odd and split", 5001, dtype=FP32, mask_token_id=4000),
    sample_tokens_case("fp32 unguided, warm", 2048, dtype=FP32, guidance_scale=None, temperature=2.5),
    sample_tokens_case("fp32 greedy with ties", 4096, dtype=FP32, temperature=0.0, digits=0),
    sample_tokens_case("fp16 position-major, odd, noise", 600, num_positions=33, dtype=FP16, position_major=True,
                       guidance_scale=-1.7, noise_scale=0.3, temperature=0.37, forbidden=True, mask_token_id=3),
    sample_tokens_case("bf16 position-major", 2100, num_positions=32, position_major=True, guidance_scale=None),
    sample_tokens_case("fp16 position-major, greedy with ties", 700, num_positions=17, dtype=FP16,
                       position_major=True, temperature=0.0, digits=0),
    bad_rows_case(position_major=False),
    bad_rows_case(position_major=True),
    sample_tokens_case("many flat rows", 2048, std=0.5, **MANY_ROWS),
    sample_tokens_case("many peaked rows", 2048, std=4.0, **MANY_ROWS),
    sample_tokens_case("many flat rows with noise", 2048, std=0.5, noise_scale=1.0, **MANY_ROWS),
    sample_tokens_case("many peaked rows with noise", 2048, std=4.0, noise_scale=1.0, **MANY_ROWS),
    *[
        mask_by_confidence_case(num_positions, temperature, digits)
        for num_positions in (1, 5, 256, 4097, 16384, 20000)
        for temperature, digits in ((0.0, 0), (1.3, 3))
    ],
    too_many_to_mask_case(),
]  # fmt: skip
