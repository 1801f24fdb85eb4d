"""What every Triton kernel is run on, in the emulator and on a device: arguments, expected outputs, comparison.

A kernel gets in by adding its cases to CASES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from compare import assert_no_worse_than_naive, assert_statistics
from driver import draw_of
from merging import MERGING
from ptx_emulator.floating import fma_float32
from torch import Tensor

from mgt_kernels import PackedInt4, quantize_int4, reference, triton
from mgt_kernels.cpu import STATISTICS
from mgt_kernels.draw import Draw
from mgt_kernels.registration import CALLS

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op: `arguments` in its order; `check` compares the outputs with those expected."""

    op: str
    name: str
    make_arguments: Callable[[], tuple]
    expected: Callable[..., Outputs]
    check: Callable[[tuple, Outputs, Outputs], None]

    def run(self, arguments: tuple) -> Outputs:
        """Run the Triton kernel on CPU tensors (in the emulator) or CUDA tensors."""
        return call(launcher_of(self.op), arguments, UPDATED.get(self.op, ()))

    def __str__(self) -> str:
        """Name the case in a report."""
        return f"{self.op}: {self.name}"


# a draw's fields are the first arguments of the ops that read logits
NUM_DRAW = len(Draw._fields)
READ_LOGITS = ("sample_tokens", "differential_sample")
# the arguments that an op updates in place
UPDATED = {"differential_sample": (NUM_DRAW, NUM_DRAW + 1, NUM_DRAW + 2)}


def launcher_of(op: str) -> Callable[..., Any]:
    """Return the launcher of an op's kernels, of the op's arguments without the backend."""
    launcher = getattr(triton, op)
    if op not in READ_LOGITS:
        return launcher

    def launch(*arguments: Any) -> Any:
        return launcher(Draw._make(arguments[:NUM_DRAW]), *arguments[NUM_DRAW:])

    return launch


def call(function: Callable[..., Any], arguments: tuple, updated: tuple[int, ...]) -> Outputs:
    """Return the outputs and, after them, what became of the updated arguments, which themselves stay."""
    copies = [x.clone() if i in updated else x for i, x in enumerate(arguments)]
    outputs = function(*copies)
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    # sample_tokens has its statistics in a list
    flat = [x for output in several for x in (output if isinstance(output, list) else [output])]
    return (*flat, *(copies[i] for i in updated))


def on_cpu(op: str) -> Callable[..., Outputs]:
    """Return the op on the best instruction set of the CPU."""

    def expected(*arguments: object) -> Outputs:
        return call(lambda *copies: CALLS[op](*copies, "auto"), arguments, UPDATED.get(op, ()))

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
    first_position: bool = False,
    scale_per_sample: bool = False,
    bias: bool = False,
    second_scale: float | None = None,
    guidance: str = "nested",
    softcap: float = math.inf,
    rows: str = "masked",
    statistics: str = "",
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logprob_of: str = "kept",
    expected: Callable[..., Outputs] | None = None,
    check: Callable[[tuple, Outputs, Outputs], None] | None = None,
) -> Case:
    """Make a case of random logits; few digits make ties, `forbidden` puts -inf into both halves.

    first_position, scale_per_sample and bias: whether the op gets one; second_scale: None without a second half.
    """

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
        scale: float | Tensor = 1.0 if guidance_scale is None else guidance_scale
        second = None if second_scale is None else half(11)
        of_second: float | Tensor = 1.0 if second_scale is None else second_scale
        if scale_per_sample:
            scale = scale * torch.tensor([1.0, -0.5, 2.0][:batch])
            of_second = of_second * torch.tensor([1.0, 1.5, -2.0][:batch])
        firsts = torch.tensor([7, 2**32 - num_positions, 0][:batch]) if first_position else None
        token_bias = None
        if bias:
            token_bias = torch.randn(num_tokens, generator=generator)
            token_bias[::3] = -torch.inf
        draw = draw_of(
            half(5), tokens, seed, torch.tensor(step), mask, uncond, scale, noise_scale, temperature, firsts,
            token_bias, second, of_second, guidance, softcap,
        )  # fmt: skip
        return (*draw, rows, statistics, top_k, top_p, min_p, logprob_of)

    return Case(
        "sample_tokens", name, make_arguments, expected or on_cpu("sample_tokens"), check or check_sample_tokens
    )


def check_sample_tokens(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Ids equal the CPU's to the bit, log-probabilities are no worse than PyTorch's own fp32 chain."""
    assert torch.equal(outputs[0], expected[0]), f"{int((outputs[0] != expected[0]).sum())} token ids differ"
    draw, (rows, statistics, *truncation) = Draw._make(arguments[:NUM_DRAW]), arguments[NUM_DRAW:]
    logits, tokens = draw.logits, draw.tokens
    drawn = tokens == draw.mask_token_id
    if rows == "known":
        drawn = torch.zeros_like(drawn)
    assert torch.equal(outputs[1] == torch.inf, ~drawn)
    if truncation != NOT_TRUNCATED or draw.second_uncond_logits is not None or draw.softcap != math.inf:
        check_nearly(expected, outputs)
        return
    options, chain = oracle_options(draw), pytorch_chain(draw)
    named = dict(zip(statistics.split(","), outputs[2:], strict=True)) if statistics else {}
    assert_statistics(named, chain, logits, tokens, rows, **options)
    if "logit" in named:
        theirs = expected[2 + statistics.split(",").index("logit")]
        torch.testing.assert_close(named["logit"], theirs, rtol=3e-7, atol=0.0)
    if not drawn.any():
        return
    tempered, _ = reference.perturbed_logits(logits, **options)
    index = expected[0][..., None].clamp(0, logits.shape[-1] - 1)
    truth = (tempered.gather(-1, index)[..., 0] - tempered.logsumexp(-1))[drawn]
    naive = chain.log_softmax(-1).gather(-1, index)[..., 0][drawn]
    if draw.noise_scale:
        # the kernels' noise itself is fp32, some units in the last place of 6.8
        naive = naive + 4e-6
    assert_no_worse_than_naive(outputs[1][drawn], truth, naive)


# top_k, top_p, min_p, logprob_of of a draw from all tokens, and the arguments of such a draw after those of a `Draw`
NOT_TRUNCATED = [0, 1.0, 0.0, "kept"]
PLAIN = ("masked", "", *NOT_TRUNCATED)


def check_nearly(expected: Outputs, outputs: Outputs) -> None:
    """What is kept, and logits to the bit, decide the ids, which are the CPU's, as argmax is; the rest is nearly so."""
    for ours, theirs in zip(outputs, expected, strict=True):
        if ours.dtype == torch.int64:
            assert torch.equal(ours, theirs), f"{int((ours != theirs).sum())} differ"
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=3e-6, equal_nan=True)


def oracle_options(draw: Draw) -> dict[str, Any]:
    """Return what the oracle takes beside logits, tokens and rows."""
    options = draw._asdict()
    del options["logits"], options["tokens"]
    first_position = 0 if draw.first_position is None else draw.first_position
    return options | dict(step=int(draw.step), first_position=first_position)


def pytorch_chain(draw: Draw) -> Tensor:
    """Return the logits that tokens are drawn from as PyTorch computes them in fp32."""
    logits, uncond, scale = draw.logits, draw.uncond_logits, draw.guidance_scale
    if isinstance(scale, Tensor) and scale.ndim:
        scale = scale[:, None, None]
    tempered = logits.float()
    if uncond is not None:
        forbidden = (logits == -torch.inf) | (uncond == -torch.inf)
        tempered = (uncond.float() + scale * (tempered - uncond.float())).masked_fill(forbidden, -torch.inf)
    if draw.token_bias is not None:
        tempered = (tempered + draw.token_bias).masked_fill(draw.token_bias == -torch.inf, -torch.inf)
    if draw.noise_scale:
        _, num_positions, num_tokens = logits.shape
        noise = reference.gaussian(
            draw.seed, num_positions, num_tokens, int(draw.step),
            0 if draw.first_position is None else draw.first_position,
        )  # fmt: skip
        tempered = tempered + draw.noise_scale * noise.float()
    if draw.temperature:
        tempered = tempered / draw.temperature
    if draw.mask_token_id < logits.shape[-1]:
        tempered[..., draw.mask_token_id] = -torch.inf
    return tempered


def check_ids(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Ids equal the CPU's to the bit; log-probabilities, for which many rows make the oracle slow, nearly."""
    assert torch.equal(outputs[0], expected[0]), f"{int((outputs[0] != expected[0]).sum())} token ids differ"
    torch.testing.assert_close(outputs[1], expected[1], rtol=1e-6, atol=2e-6)


def bad_rows_case(position_major: bool, truncation: tuple | None = None) -> Case:
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
        return (
            *draw_of(logits, tokens, torch.tensor([3]), torch.tensor(0), 5), "masked", "argmax,margin,entropy",
            *(truncation or NOT_TRUNCATED),
        )  # fmt: skip

    def expected(logits: Tensor, tokens: Tensor, *options: object) -> Outputs:
        drawable = tokens.clone()
        drawable[0, :3] = 6
        token_ids, logprob, argmax, *others = on_cpu("sample_tokens")(logits, drawable, *options)
        for ids in (token_ids, argmax):
            ids[0, :3] = 5
        for statistic in (logprob, *others):
            statistic[0, :3] = torch.nan
        return token_ids, logprob, argmax, *others

    def check(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
        for i, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
            if i in (0, 2):
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-6, atol=1e-6)

    layout = "position-major" if position_major else "token-major"
    truncated = "" if truncation is None else f", {truncation[-1]} of what is kept"
    return Case("sample_tokens", f"bad rows, {layout}{truncated}", make_arguments, expected, check)


# scalars that a step may change, by their place among the arguments
SCALARS = {
    "sample_tokens": (6, 7, 8),
    "mask_by_confidence": (6,),
    "commit_tokens": (8, 9, 14, 16),
    "differential_sample": (6, 7, 8),
}


# others of draws, and what they are where they change nothing: second_guidance_scale, softcap, top_p, min_p
OTHER_SCALARS = {12: 1.0, 14: math.inf, NUM_DRAW + 3: 1.0, NUM_DRAW + 4: 0.0}


def with_numbers(arguments: tuple) -> tuple:
    """Return the arguments with a number for every floating tensor of no dimension."""
    return tuple(float(x) if isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point() else x for x in arguments)


def scalars_as_tensors(case: Case) -> Case:
    """Make of a case one whose scalars are read by the kernel."""

    def make_arguments() -> tuple:
        arguments = case.make_arguments()
        scalars = list(SCALARS[case.op])
        if case.op in READ_LOGITS:
            scalars += [
                i for i, neutral in OTHER_SCALARS.items() if type(arguments[i]) is float and arguments[i] != neutral
            ]
        # what float32 would round to a number that changes nothing stays it
        dtypes = {i: torch.float64 if i >= NUM_DRAW else torch.float32 for i in scalars}
        return tuple(torch.tensor(x, dtype=dtypes[i]) if i in dtypes else x for i, x in enumerate(arguments))

    def expected(*arguments: object) -> Outputs:
        return case.expected(*with_numbers(arguments))

    def check(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
        case.check(with_numbers(arguments), expected, outputs)

    return Case(case.op, f"{case.name}, scalars as tensors", make_arguments, expected, check)


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


def overflowing_case() -> Case:
    """A temperature at which confidences past the largest float are still not those of known positions."""

    def make_arguments() -> tuple:
        logprob = -torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) * 9
        logprob[:, 60:] = torch.inf
        logprob[1, 7] = -torch.inf
        logprob[1, 8] = -3.4e38
        token_ids = torch.arange(64).repeat(2, 1)
        return token_ids, logprob, torch.tensor([60, 31]), torch.tensor([5, 6]), torch.tensor(3), 100, 3e38

    def expected(
        token_ids: Tensor, logprob: Tensor, mask_len: Tensor, seed: Tensor, step: Tensor, mask: int, temperature: float
    ) -> Outputs:
        # in float64 nothing overflows
        return (
            reference.mask_by_confidence(
                token_ids, logprob, mask_len, mask_token_id=mask, temperature=temperature, seed=seed, step=int(step)
            ),
        )

    return Case("mask_by_confidence", "temperature 3e38", make_arguments, expected, check_masks)


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


COMMIT_VALUES = {"count": 0.0, "threshold": 0.6, "factor": 1.3, "entropy_bound": 2.5}


def commit_tokens_case(
    rule: str,
    num_positions: int,
    temperature: float = 0.0,
    *,
    within: bool = False,
    edit: bool = False,
    digits: int = 4,
) -> Case:
    """Make a case with a third of the positions known, and with ties of few digits."""

    def make_arguments() -> tuple:
        generator = torch.Generator().manual_seed(num_positions)
        shape = (3, num_positions)
        token_ids = torch.randint(100, shape, generator=generator)
        tokens = torch.where(torch.rand(shape, generator=generator) < 1 / 3, token_ids, 100)
        score = torch.rand(shape, generator=generator) ** torch.tensor([[2.0], [0.1], [0.01]])
        score = (1 - score if rule == "entropy_bound" else score).round(decimals=digits)
        start = torch.tensor([num_positions // 3, 0, 1]) if within else None
        end = torch.tensor([num_positions, num_positions // 2, 1]) if within else None
        # what a step would draw and the model thinks of what is there
        argmax = torch.randint(100, shape, generator=generator) if edit else None
        max_logprob, known_logprob = -torch.rand(2, *shape, generator=generator) if edit else (None, None)
        count = torch.tensor([num_positions // 8, 1, 0])
        return (
            token_ids, score, tokens, count, torch.tensor([1, -2, 2**63 - 10]), torch.tensor(7), 100, rule,
            COMMIT_VALUES[rule], temperature, start, end, argmax, max_logprob, -0.5, known_logprob, -0.75,
        )  # fmt: skip

    name = f"{rule} N={num_positions} temperature={temperature}{' within' * within}{' edit' * edit}"
    return Case("commit_tokens", name, make_arguments, on_cpu("commit_tokens"), check_equal)


def check_equal(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Every output equals the CPU's."""
    for theirs, ours in zip(expected, outputs, strict=True):
        assert torch.equal(ours, theirs), f"{int((ours != theirs).sum())} differ"


def bad_commits_case(rule: str) -> Case:
    """NaN, windows and counts that a CPU refuses: NaN ranks lowest and meets no rule, of a window what there is."""

    def make_arguments() -> tuple:
        score = torch.tensor([[0.1, torch.nan, 0.9, torch.inf, -torch.inf, 0.9]] * 4)
        tokens = torch.full((4, 6), 100)
        tokens[:, 0] = 5
        options = (rule, COMMIT_VALUES[rule], 0.0, torch.tensor([0, -9, 3, 5]), torch.tensor([6, 99, 6, 2]))
        return (
            torch.arange(24).view(4, 6), score, tokens, torch.tensor([4, -1, 9, 1]), torch.tensor([1, 2, 3, 4]),
            torch.tensor(0), 100, *options, None, None, torch.inf, None, -torch.inf,
        )  # fmt: skip

    def expected(token_ids: Tensor, score: Tensor, tokens: Tensor, *_: object) -> Outputs:
        num_by_rule = {"count": 0, "threshold": 3, "factor": 3, "entropy_bound": 4}[rule]
        order = [1, 4, 2, 5, 3] if rule != "entropy_bound" else [1, 3, 5, 2, 4]
        after = tokens.clone()
        for sample, (num_competing, count) in enumerate([(5, 4), (5, 0), (3, 3), (0, 0)]):
            competing = [i for i in order if num_competing == 5 or i >= 3]
            num = min(max(count, num_by_rule), num_competing)
            for i in competing[len(competing) - num :]:
                after[sample, i] = token_ids[sample, i]
        done = torch.tensor([False, False, True, True], device=tokens.device)
        return after, done

    return Case("commit_tokens", f"{rule}, what a CPU refuses", make_arguments, expected, check_equal)


def extreme_rows(steps: list[Tensor]) -> None:
    """Make rows one-hot, half forbidden and half underflown in this step or the one before, or equal in both."""
    before, now = steps[-2:]
    for logits, token in ((before, 555), (now, 17)):
        logits[0, 0] = -1e4
        logits[0, 0, token] = 0.0
    now[0, 1], before[0, 1] = now[0, 0], now[0, 0]
    now[0, 2] = now[0, 0]
    before[0, 3] = now[0, 0]
    now[0, 4, ::2] = -torch.inf
    before[0, 5, 1::2] = -torch.inf
    now[0, 6, : now.shape[-1] // 2] -= 200.0
    before[0, 7, now.shape[-1] // 2 :] -= 88.0
    now[0, 8] = before[0, 8]
    now[0, 9], before[0, 9] = 0.0, 0.0
    now[0, 10, :-1] = -torch.inf
    before[0, 11, :-1] = -torch.inf


def differential_sample_case(
    name: str,
    num_tokens: int,
    *,
    num_steps: int = 2,
    batch: int = 2,
    num_positions: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    position_major: bool = False,
    guidance_scale: float | None = 2.5,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    share: float = 0.75,
    variant: str = "paper",
    aliased_history: bool = False,
    std: float = 3.0,
    change: float = 0.3,
    forbidden: bool = False,
    extreme: bool = False,
    known_share: float = 0.25,
    bias: bool = False,
    second_scale: float | None = None,
    guidance: str = "nested",
    softcap: float = math.inf,
    edit: Callable[[tuple], tuple] | None = None,
    patch: Callable[[tuple, Outputs], None] | None = None,
) -> Case:
    """Make a case of the last of num_steps steps, the others taken on the CPU; the masks change with step and sample.

    `edit` changes the arguments and `patch` puts into the expected outputs, of the arguments before, what came of it.
    """

    def make_inputs() -> tuple:
        generator = torch.Generator().manual_seed(num_tokens + num_positions)
        start, uncond = torch.randn(2, batch, num_positions, num_tokens, generator=generator) * std
        steps = [start + torch.randn(start.shape, generator=generator) * change * std for _ in range(num_steps)]
        if forbidden:
            for k, logits in enumerate(steps):
                logits[..., 1 + k :: 5] = -torch.inf
        if extreme:
            extreme_rows(steps)

        def laid_out(logits: Tensor) -> Tensor:
            logits = logits.to(dtype)
            return logits.mT.contiguous().mT if position_major else logits

        halves = None if guidance_scale is None else laid_out(uncond)
        second = None if second_scale is None else laid_out(uncond.flip(-1))
        scale = 1.0 if guidance_scale is None else guidance_scale
        seed = torch.tensor([5, -(2**63) + 7, 2**63 - 1][:batch])
        # 12345: rows that no step reads stay as they are
        state = [
            torch.full(start.shape, 12345, dtype=torch.int16), torch.zeros(batch, num_positions, dtype=torch.bool),
            torch.tensor(-1), seed.clone(),
        ]  # fmt: skip
        firsts = torch.tensor([7, 2**32 - num_positions, 0][:batch]) if bias else None
        token_bias = None
        if bias:
            token_bias = torch.randn(num_tokens, generator=generator)
            token_bias[::3] = -torch.inf
        options = (
            num_tokens, halves, scale, noise_scale, temperature, firsts, token_bias, second,
            1.0 if second_scale is None else second_scale, guidance, softcap,
        )  # fmt: skip
        for step, logits in enumerate(map(laid_out, steps)):
            tokens = torch.full((batch, num_positions), num_tokens)
            if not extreme:
                known = torch.rand(tokens.shape, generator=generator) < known_share
                tokens[known] = 0
            draw = draw_of(logits, tokens, seed, torch.tensor(step), *options)
            arguments = (*draw, *state, step > 0, share, variant, aliased_history)
            if step < num_steps - 1:
                state[:3] = on_cpu("differential_sample")(*arguments)[3:]
        return arguments

    def make_arguments() -> tuple:
        return edit(make_inputs()) if edit else make_inputs()

    def expected(*arguments: object) -> Outputs:
        if patch is None:
            return on_cpu("differential_sample")(*arguments)
        inputs = make_inputs()
        outputs = on_cpu("differential_sample")(*inputs)
        patch(inputs, outputs)
        return outputs

    return Case("differential_sample", name, make_arguments, expected, check_differential_sample)


def check_differential_sample(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
    """Everything equals the CPU's to the bit, but for log-probabilities of tokens that are drawn from p: nearly."""
    names = ("token ids", "log-probabilities", "divergences", "history", "written", "step")
    for name, ours, theirs in zip(names, outputs, expected, strict=True):
        if name == "log-probabilities":
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6, equal_nan=True)
            continue
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        assert same.all(), f"{int((~same).sum())} of the {name} differ"


def lost_rows(inputs: tuple, outputs: Outputs, lost: Tensor) -> None:
    """Put into the outputs what becomes of the rows (B, N) from which nothing can be drawn."""
    tokens, (history, *_, variant, _) = inputs[1], inputs[NUM_DRAW:]
    masked = tokens == inputs[4]
    read = masked if variant == "paper" else torch.ones_like(masked)
    outputs[0][lost] = tokens[lost]
    outputs[1][lost & masked] = torch.nan
    outputs[2][lost] = torch.inf
    outputs[2][lost & read] = torch.nan
    outputs[3][lost] = history[lost]
    outputs[4][lost] = False


def bad_differential_rows_case(variant: str, aliased_history: bool = False) -> Case:
    """Bad rows rank last and leave no history behind."""
    bad_logits = {1: torch.nan, 2: torch.inf, 4: -torch.inf}

    def edit(arguments: tuple) -> tuple:
        logits = arguments[0].clone()
        for position, value in bad_logits.items():
            logits[0, position, slice(None) if value == -torch.inf else -1] = value
        return (logits, *arguments[1:])

    def patch(inputs: tuple, outputs: Outputs) -> None:
        written = inputs[NUM_DRAW + 1]
        lost = torch.zeros_like(written)
        lost[0, list(bad_logits)] = True
        # without a history they would rank last too
        arguments = (*inputs[: NUM_DRAW + 1], written & ~lost, *inputs[NUM_DRAW + 2 :])
        for output, other in zip(outputs, on_cpu("differential_sample")(*arguments), strict=True):
            output.copy_(other)
        lost_rows(inputs, outputs, lost)

    return differential_sample_case(
        f"bad rows, {variant}{', aliased' * aliased_history}", 600, variant=variant, aliased_history=aliased_history,
        edit=edit, patch=patch,
    )  # fmt: skip


def other_seed_case() -> Case:
    """A sample whose seed is not the state's draws nothing and forgets its history."""

    def edit(arguments: tuple) -> tuple:
        return (*arguments[:2], arguments[2] + torch.tensor([0, 1]), *arguments[3:])

    def patch(inputs: tuple, outputs: Outputs) -> None:
        lost = torch.zeros_like(inputs[NUM_DRAW + 1])
        lost[1] = True
        lost_rows(inputs, outputs, lost)

    return differential_sample_case("another seed", 300, edit=edit, patch=patch)


def other_step_case() -> Case:
    """A step that does not follow the state's draws nothing and leaves the state as it is."""

    def edit(arguments: tuple) -> tuple:
        return (*arguments[:3], arguments[3] + 1, *arguments[4:])

    def patch(inputs: tuple, outputs: Outputs) -> None:
        lost_rows(inputs, outputs, torch.ones_like(inputs[NUM_DRAW + 1]))
        outputs[4].copy_(inputs[NUM_DRAW + 1])
        outputs[5].copy_(inputs[NUM_DRAW + 2])

    return differential_sample_case(
        "another step", 300, variant="official", aliased_history=True, edit=edit, patch=patch
    )


@dataclass(frozen=True)
class Linear:
    """The arguments of an int4 linear layer, and what they mean."""

    x: Tensor
    w_q: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    x_scale: Tensor | None
    bias: Tensor | None

    @property
    def weight(self) -> PackedInt4:
        shape = (len(self.w_q), self.x.shape[1])
        return PackedInt4(self.w_q, self.scale, self.zero_point, shape, self.group_size)

    @property
    def row_scale(self) -> Tensor:
        if self.x_scale is None:
            return reference.dynamic_scale(self.x)
        return self.x_scale.repeat_interleave(len(self.x) // len(self.x_scale))[:, None]

    @property
    def x_q(self) -> Tensor:
        return reference.quantize_activations(self.x, self.row_scale)

    @property
    def sums(self) -> Tensor:
        """(M, N, groups), exact."""
        return reference.group_sums(self.x_q, self.weight)


def linear_inputs(
    num_rows: int, num_outputs: int, num_inputs: int, group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, PackedInt4, Tensor]:
    """Return random x with outliers, a weight and a bias."""
    generator = torch.Generator().manual_seed(num_rows + num_outputs + num_inputs)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    x[:, ::37] *= 8
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05 + 0.02
    bias = torch.randn(num_outputs, generator=generator)
    return x.to(dtype), quantize_int4(weight, group_size, scale_dtype=scale_dtype), bias


def w4a8_linear_case(
    name: str,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.float16,
    num_scales: int | None = None,
    has_bias: bool = True,
    edit: Callable[[Linear], Linear] = lambda arguments: arguments,
    lost: tuple[int, ...] = (),
) -> Case:
    """Make a case with static scales, which clip the outliers, or dynamic ones; `lost` rows come out as NaN."""

    def make_arguments() -> tuple:
        x, weight, bias = linear_inputs(num_rows, num_outputs, num_inputs, group_size, dtype, scale_dtype)
        # a power of two among the scales makes ties
        x_scale = None if num_scales is None else 2.0**-6 * (1 + torch.arange(num_scales) * 0.3)
        linear = edit(Linear(
            x, weight.w_q, weight.scale, weight.zero_point, group_size, x_scale, bias if has_bias else None
        ))  # fmt: skip
        return tuple(vars(linear).values())

    def expected(*arguments: Any) -> Outputs:
        with np.errstate(invalid="ignore"):
            y = w4a8_in_float32(Linear(*arguments))
        y[list(lost)] = torch.nan
        return (y.to(arguments[0].dtype),)

    def check(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
        check_w4a8_linear(arguments, expected, outputs, lost)

    return Case("w4a8_linear", name, make_arguments, expected, check)


def w4a8_in_float32(linear: Linear) -> Tensor:
    """Take the exact sums through the float32 operations of the kernel, in its order."""
    sums, scale = linear.sums.float().numpy(), linear.scale.float().numpy()
    acc = np.zeros(sums.shape[:2], np.float32)
    for group in range(sums.shape[2]):
        acc = fma_float32(np.broadcast_to(scale[:, group], acc.shape), sums[..., group], acc)
    if linear.bias is None:
        return torch.from_numpy(acc) * linear.row_scale
    row_scale, bias = np.broadcast_to(linear.row_scale, acc.shape), np.broadcast_to(linear.bias, acc.shape)
    return torch.from_numpy(fma_float32(acc, row_scale, bias))


def check_w4a8_linear(arguments: tuple, expected: Outputs, outputs: Outputs, lost: tuple[int, ...]) -> None:
    """Equal to the bit; and no worse than PyTorch's own product of the same integers."""
    torch.testing.assert_close(outputs[0], expected[0], rtol=0, atol=0, equal_nan=True)
    linear = Linear(*arguments)
    kept = [row for row in range(len(linear.x)) if row not in lost]
    truth = reference.w4a8_linear(linear.x[kept], linear.weight, linear.row_scale[kept], linear.bias)
    naive = torch.nn.functional.linear(linear.x_q[kept] * linear.row_scale[kept], linear.weight.dequantize())
    naive = naive if linear.bias is None else naive + linear.bias
    assert_no_worse_than_naive(outputs[0][kept], truth, naive.to(linear.x.dtype))


def w4a16_linear_case(
    name: str,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.float16,
    bias_dtype: torch.dtype | None = torch.float32,
    batch_invariant: bool = True,
    edit: Callable[[Linear], Linear] = lambda arguments: arguments,
    lost: tuple[int, ...] = (),
) -> Case:
    """Make a case of random numbers, without a bias where its dtype is None; `lost` rows come out as NaN."""

    def make_arguments() -> tuple:
        x, weight, bias = linear_inputs(num_rows, num_outputs, num_inputs, group_size, dtype, scale_dtype)
        linear = edit(Linear(x, weight.w_q, weight.scale, weight.zero_point, group_size, None, bias))
        weight = linear.weight
        return (
            linear.x, weight.w_q, weight.scale, weight.zero_point, group_size,
            None if bias_dtype is None else bias.to(bias_dtype), batch_invariant,
        )  # fmt: skip

    def linear_of(
        x: Tensor, w_q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, bias: Tensor | None, _: bool
    ) -> Linear:
        return Linear(x, w_q, scale, zero_point, group_size, None, bias)

    def expected(*arguments: Any) -> Outputs:
        linear = linear_of(*arguments)
        y = reference.w4a16_linear(linear.x, linear.weight, linear.bias)
        y[list(lost)] = torch.nan
        return (y,)

    def check(arguments: tuple, expected: Outputs, outputs: Outputs) -> None:
        linear = linear_of(*arguments)
        assert outputs[0].dtype == linear.x.dtype
        assert torch.equal(outputs[0].isnan(), expected[0].isnan())
        kept = [row for row in range(num_rows) if row not in lost]
        x, weight = linear.x[kept].bfloat16().float(), linear.weight.dequantize(torch.bfloat16).float()
        exact, truncated = x.double() @ weight.double().T, truncating_product(x, weight)
        # in another order, or by wider steps, the largest of a few errors has been 2.2 times as large
        naive = exact + 3 * (truncated - exact) + (0 if linear.bias is None else linear.bias.float())
        assert_no_worse_than_naive(outputs[0][kept], expected[0][kept], naive.to(linear.x.dtype))

    return Case("w4a16_linear", name, make_arguments, expected, check)


def truncating_product(x: Tensor, weight: Tensor, num_terms: int = 8, extra_bits: int = 1) -> Tensor:
    """Multiply bfloat16 values (M, K) and (N, K), held as float32, as tensor cores do: they do not round, they cut.

    A step takes `num_terms` products and the sum so far, aligns all to the largest of them, cuts each to the 24 bits of
    float32 and `extra_bits` more, and cuts the new sum to float32. The defaults are those of sm_80; later ones keep
    more bits. Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330,
    2021.
    """
    total = np.zeros((len(x), len(weight)))
    for first in range(0, x.shape[1], num_terms):
        columns = slice(first, first + num_terms)
        terms = np.concatenate([
            x[:, None, columns].double().numpy() * weight[None, :, columns].double().numpy(), total[..., None]
        ], axis=-1)  # fmt: skip
        total = cut(cut(terms, np.abs(terms).max(-1, keepdims=True), 24 + extra_bits).sum(-1), None, 24)
    return torch.from_numpy(total)


def cut(value: np.ndarray, like: np.ndarray | None, num_bits: int) -> np.ndarray:
    """Round towards zero to the last of the `num_bits` bits that begin with the first of `like`, or of the value."""
    _, exponent = np.frexp(value if like is None else like)
    unit = np.ldexp(1.0, exponent - num_bits)
    return np.trunc(value / unit) * unit


def rows_apart(linear: Linear) -> Linear:
    """Activations that are a part of the columns of something wider."""
    return replace(linear, x=torch.nn.functional.pad(linear.x, (3, 10), value=torch.nan)[:, 3:-10])


def worst_sums(linear: Linear) -> Linear:
    """All products are 15 * -128 or 15 * 127, the most there is, with scales that leave the sums as they are."""
    x, w_q = torch.full_like(linear.x, -1e3), torch.full_like(linear.w_q, 255)
    x[1::2] = 1e3
    return replace(
        linear, x=x, w_q=w_q, scale=torch.ones_like(linear.scale), zero_point=torch.zeros_like(linear.zero_point),
        x_scale=torch.ones(1), bias=None,
    )  # fmt: skip


def all_weights(linear: Linear) -> Linear:
    """Every nibble with every zero point, with scales that leave the sums as they are."""
    w_q = torch.arange(linear.w_q.numel()).remainder(256).to(torch.uint8).view_as(linear.w_q)
    zero_point = torch.arange(linear.zero_point.numel()).remainder(16).to(torch.uint8).view_as(linear.zero_point)
    return replace(
        linear, w_q=w_q, scale=torch.ones_like(linear.scale), zero_point=zero_point, x_scale=torch.ones(1), bias=None,
        x=linear.x * 40,
    )  # fmt: skip


def extreme_activations(linear: Linear) -> Linear:
    """Rows of zeros, of denormals, of the largest numbers; NaN and infinities in rows 3 to 5."""
    x = linear.x.clone()
    x[0] = 0
    x[1] *= 1e-39
    x[2] = x[2].sign() * 3e38
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf), 3):
        x[row, -1 - row] = value
    return replace(linear, x=x)


def bad_activations(linear: Linear) -> Linear:
    """NaN and infinities in rows 3 to 5, and in row 6 what is infinite as bfloat16."""
    x = linear.x.clone()
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, 3.4e38), 3):
        x[row, -1 - row] = value
    return replace(linear, x=x)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
MANY_ROWS: dict[str, Any] = dict(batch=1, num_positions=5000, known_share=0.0, check=check_ids)

EVERYTHING = ",".join(STATISTICS)

CASES = [
    sample_tokens_case("every statistic, split", 4500, rows="all", statistics=EVERYTHING, forbidden=True),
    sample_tokens_case("every statistic, fp32, not split", 1000, dtype=FP32, rows="all", statistics=EVERYTHING,
                       noise_scale=0.7, temperature=0.8),
    sample_tokens_case("every statistic of known rows, position-major", 2100, num_positions=17, rows="known",
                       statistics=EVERYTHING, position_major=True, known_share=0.5),
    sample_tokens_case("entropy of ties", 700, dtype=FP32, std=0.0, guidance_scale=None, statistics="argmax,entropy"),
    sample_tokens_case("statistics without a tile's", 2048, rows="all", guidance_scale=None, temperature=0.0,
                       statistics="max_logprob,logsumexp,known_logprob,logit"),
    sample_tokens_case("places, scales per sample, a bias", 2100, noise_scale=0.5, first_position=True,
                       scale_per_sample=True, bias=True, statistics="margin"),
    sample_tokens_case("a bias, position-major", 300, num_positions=18, bias=True, position_major=True),
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
    bad_rows_case(position_major=False, truncation=(9, 0.8, 0.01, "full")),
    bad_rows_case(position_major=True, truncation=(0, 0.8, 0.0, "kept")),
    sample_tokens_case("top_k, ties at the border", 2100, dtype=FP32, guidance_scale=None, digits=0, top_k=50),
    sample_tokens_case("top_k 1", 600, top_k=1, temperature=2.0),
    sample_tokens_case("top_k of more than is allowed", 31, dtype=FP32, forbidden=True, top_k=29, rows="all",
                       statistics="entropy"),
    sample_tokens_case("top_p, unguided", 2048, guidance_scale=None, top_p=0.9),
    sample_tokens_case("top_p, ties at the border", 513, dtype=FP32, std=1.0, digits=1, top_p=0.5),
    sample_tokens_case("top_p of flat rows", 2049, dtype=FP32, std=0.0, top_p=0.3, statistics="entropy"),
    sample_tokens_case("top_p of nearly flat rows", 2100, dtype=FP32, std=1e-3, guidance_scale=None, top_p=0.4),
    sample_tokens_case("top_p next to 0", 300, top_p=1e-60),
    sample_tokens_case("top_p next to 1, peaked", 2048, std=30.0, top_p=1 - 2**-24, rows="all", statistics="margin"),
    sample_tokens_case("top_p of logits of all sizes", 1000, dtype=FP32, std=2e4, guidance_scale=None, top_p=0.7),
    sample_tokens_case("top_p, noise, -inf, split", 4500, noise_scale=0.7, temperature=0.8, forbidden=True, top_p=0.8,
                       mask_token_id=3),
    sample_tokens_case("min_p", 2048, min_p=0.05, temperature=1.5),
    sample_tokens_case("min_p next to 1", 700, dtype=FP32, digits=0, min_p=1 - 2**-40),
    sample_tokens_case("top_k, top_p and min_p, position-major", 600, num_positions=33, dtype=FP16, position_major=True,
                       guidance_scale=-1.7, forbidden=True, top_k=40, top_p=0.95, min_p=0.02),
    sample_tokens_case("top_k and top_p, greedy", 2100, temperature=0.0, digits=0, top_k=9, top_p=0.9),
    sample_tokens_case("every statistic of what is kept, split", 4500, rows="all", statistics=EVERYTHING, top_k=300,
                       top_p=0.8, forbidden=True),
    sample_tokens_case("every statistic of all tokens, split", 4500, rows="all", statistics=EVERYTHING, top_k=300,
                       top_p=0.8, forbidden=True, logprob_of="full"),
    sample_tokens_case("every statistic of all tokens, position-major, noise", 300, num_positions=18, rows="all",
                       statistics=EVERYTHING, position_major=True, noise_scale=0.5, min_p=0.03, logprob_of="full"),
    sample_tokens_case("known rows of what is kept", 2048, rows="known", statistics="max_logprob,known_logprob",
                       known_share=0.5, top_k=5),
    sample_tokens_case("second guidance, nested", 2100, second_scale=-0.7, statistics="margin", forbidden=True),
    sample_tokens_case("second guidance, dual", 2048, guidance_scale=-1.3, second_scale=1.8, guidance="dual"),
    sample_tokens_case("second guidance, nested, position-major, scales per sample", 600, num_positions=17,
                       position_major=True, second_scale=1.4, scale_per_sample=True, bias=True),
    sample_tokens_case("second guidance, dual, fp32, noise, top_p", 1000, dtype=FP32, second_scale=-2.0,
                       guidance="dual", noise_scale=0.4, temperature=0.9, top_p=0.7),
    sample_tokens_case("softcap", 2100, guidance_scale=None, std=20.0, softcap=30.0, forbidden=True, temperature=0.6),
    sample_tokens_case("softcap of every half, dual, fp32", 900, dtype=FP32, std=9.0, softcap=5.5, second_scale=0.3,
                       guidance="dual", top_k=30),
    sample_tokens_case("softcap, guided, position-major", 300, num_positions=16, position_major=True, softcap=0.01,
                       dtype=FP16),
    sample_tokens_case("many rows, top_k and top_p", 2048, std=2.0, **MANY_ROWS | dict(num_positions=40), top_k=200,
                       top_p=0.9),
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
    overflowing_case(),
    *[
        commit_tokens_case(rule, num_positions, temperature)
        for rule, num_positions, temperature in (
            ("count", 5, 0.0), ("count", 256, 1.3), ("threshold", 200, 0.0), ("threshold", 256, 0.05),
            ("factor", 300, 0.0), ("factor", 256, 0.05), ("entropy_bound", 300, 0.0), ("entropy_bound", 256, 0.05),
            ("factor", 17000, 0.0), ("entropy_bound", 17000, 0.0), ("threshold", 64, 3e38),
        )
    ],
    *[commit_tokens_case(rule, 150, digits=1, within=True, edit=True) for rule in COMMIT_VALUES],
    *[bad_commits_case(rule) for rule in COMMIT_VALUES],
    differential_sample_case("first step", 2100, num_steps=1),
    differential_sample_case("first step, official and aliased, position-major", 600, num_steps=1, position_major=True,
                             variant="official", aliased_history=True),
    differential_sample_case("paper bf16", 2100, num_steps=3),
    differential_sample_case("paper fp32 unguided", 513, dtype=FP32, guidance_scale=None, change=0.02),
    differential_sample_case("paper fp16, noise, -inf", 1000, dtype=FP16, noise_scale=0.7, temperature=0.8,
                             forbidden=True, num_positions=6),
    differential_sample_case("paper bf16 position-major, odd", 700, num_positions=17, position_major=True),
    differential_sample_case("paper greedy", 600, temperature=0.0),
    differential_sample_case("paper share 0", 300, share=0.0),
    differential_sample_case("paper share 1, peaked", 4097, share=1.0, std=30.0, change=0.02, guidance_scale=None),
    differential_sample_case("places and a bias", 600, noise_scale=0.5, bias=True),
    differential_sample_case("official, aliased, places and a bias", 600, noise_scale=0.5, bias=True,
                             variant="official", aliased_history=True),
    differential_sample_case("second guidance, nested, softcap", 600, second_scale=-0.6, softcap=8.0),
    differential_sample_case("second guidance, dual, position-major, aliased", 300, num_positions=17, second_scale=1.7,
                             guidance="dual", position_major=True, variant="official", aliased_history=True),
    differential_sample_case("one token", 1, dtype=FP32, num_positions=3),
    *[
        differential_sample_case(f"extreme rows, {variant}{', aliased' * aliased}", 600, dtype=FP32, num_positions=12,
                                 batch=1, guidance_scale=None, share=1.0, variant=variant, aliased_history=aliased,
                                 extreme=True)
        for variant, aliased in (("paper", False), ("official", False), ("official", True))
    ],
    differential_sample_case("official fp16", 33, dtype=FP16, num_positions=40, variant="official"),
    differential_sample_case("official, aliased, bf16, noise", 2049, num_steps=3, variant="official",
                             aliased_history=True, noise_scale=0.5),
    differential_sample_case("official, aliased, fp32, position-major, greedy", 900, dtype=FP32, num_positions=18,
                             variant="official", aliased_history=True, position_major=True, temperature=0.0),
    differential_sample_case("more positions than registers hold", 17, batch=1, num_positions=17000, dtype=FP32,
                             guidance_scale=None, known_share=0.97),
    differential_sample_case("many rows of differences", 2048, batch=1, num_positions=1500),
    bad_differential_rows_case("paper"),
    bad_differential_rows_case("official"),
    bad_differential_rows_case("official", aliased_history=True),
    other_seed_case(),
    other_step_case(),
    w4a8_linear_case("w4a8 bf16, groups of 128", 130, 257, 384),
    w4a8_linear_case("w4a8 bf16, two static scales, a short group", 70, 136, 576, num_scales=2),
    w4a8_linear_case("w4a8 fp32, a row, a scale, odd", 1, 33, 1000, dtype=FP32, num_scales=1, scale_dtype=FP32),
    w4a8_linear_case("w4a8 bf16, few rows", 16, 72, 1024, num_scales=16),
    w4a8_linear_case("w4a8 fp32, groups of 32", 33, 40, 224, 32, dtype=FP32, edit=rows_apart),
    w4a8_linear_case("w4a8 fp32, few rows, groups of 64, odd", 7, 19, 333, 64, dtype=FP32, num_scales=7),
    w4a8_linear_case("w4a8 bf16, groups of 96", 20, 30, 450, 96, has_bias=False),
    w4a8_linear_case("w4a8 bf16, split", 5, 33, 2100, num_scales=5),
    w4a8_linear_case("w4a8 fp32, a row, split, groups of 32", 1, 72, 990, 32, dtype=FP32, has_bias=False),
    w4a8_linear_case("w4a8 fp32, groups of 256, an input past one", 18, 24, 257, 256, dtype=FP32, scale_dtype=FP32),
    w4a8_linear_case("w4a8 fp32, an input", 3, 5, 1, 32, dtype=FP32, has_bias=False),
    w4a8_linear_case("w4a8 fp32, the largest sums", 66, 16, 1024, dtype=FP32, edit=worst_sums),
    w4a8_linear_case("w4a8 fp32, the largest sums of a large group", 18, 8, 8192, 16384, dtype=FP32, edit=worst_sums),
    w4a8_linear_case("w4a8 fp32, all weights and zero points", 12, 64, 512, 32, dtype=FP32, edit=all_weights),
    w4a8_linear_case("w4a8 fp32, extreme rows", 20, 16, 128, dtype=FP32, scale_dtype=FP32, edit=extreme_activations,
                     lost=(3, 4, 5)),
    w4a16_linear_case("w4a16 bf16, groups of 128", 130, 140, 384),
    w4a16_linear_case("w4a16 bf16, few rows, a short group", 16, 72, 576),
    w4a16_linear_case("w4a16 fp32, a row, odd", 1, 33, 1000, dtype=FP32, scale_dtype=FP32),
    w4a16_linear_case("w4a16 fp32, groups of 32", 33, 40, 224, 32, dtype=FP32, edit=rows_apart),
    w4a16_linear_case("w4a16 fp32, few rows, groups of 64, odd", 7, 19, 333, 64, dtype=FP32),
    w4a16_linear_case("w4a16 bf16, groups of 96", 20, 30, 450, 96, bias_dtype=None),
    w4a16_linear_case("w4a16 fp32, an input", 3, 5, 1, 32, dtype=FP32, bias_dtype=None),
    w4a16_linear_case("w4a16 bf16, split", 5, 33, 2100, batch_invariant=False, bias_dtype=BF16),
    w4a16_linear_case("w4a16 fp32, a row, split, groups of 32", 1, 72, 1000, 32, dtype=FP32, bias_dtype=None,
                      batch_invariant=False),
    w4a16_linear_case("w4a16 bf16, dequantized", 1030, 72, 576, batch_invariant=False, bias_dtype=BF16),
    w4a16_linear_case("w4a16 bf16, dequantized, groups of 96, a bias of float32", 1024, 40, 450, 96,
                      batch_invariant=False),
    w4a16_linear_case("w4a16 fp32, dequantized, groups of 32, odd", 1024, 19, 333, 32, dtype=FP32,
                      batch_invariant=False),
    w4a16_linear_case("w4a16 fp32, bad rows", 20, 16, 128, dtype=FP32, edit=bad_activations, lost=(3, 4, 5, 6)),
]  # fmt: skip

WITH_TENSORS = [
    "bf16 noise, -inf, the mask in the vocabulary", "fp32 greedy with ties", "fp32 unguided, warm",
    "N=256 temperature=0.0 digits=0", "N=256 temperature=1.3 digits=3", "temperature 3e38", "paper greedy",
    *[f"{rule} N=150 temperature=0.0 within edit" for rule in COMMIT_VALUES], "factor N=256 temperature=0.05",
    "official, aliased, bf16, noise", "top_k, top_p and min_p, position-major", "second guidance, nested, softcap",
    "second guidance, dual, fp32, noise, top_p", "softcap of every half, dual, fp32", "top_p next to 1, peaked",
    "min_p next to 1",
]  # fmt: skip
CASES += [Case(*fields) for fields in MERGING]
CASES += [scalars_as_tensors(case) for case in CASES if case.name in WITH_TENSORS]
