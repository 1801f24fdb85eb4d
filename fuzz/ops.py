"""Random calls of every op, each backend against the reference: `python fuzz/ops.py --seconds 20 [--seed S]`.

Token ids equal the reference's but where float32 cannot tell two scores apart, floats are as near as float32 allows,
and what one backend refuses all refuse, with the same sentence. A mismatch is made as small as hypothesis can make it,
printed with its arguments, and the exit status is 1. `--plant` perturbs one result in a thousand, to show that it is.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import mgt_kernels
from mgt_kernels import cpu, reference

KERNELS = cpu.available_isas()


@dataclasses.dataclass
class Counted:
    """How many calls were made, until when to make more, and whether to plant a fault."""

    end: float
    plant: bool
    calls: int = 0
    refusals: int = 0
    failed: bool = False

    def outcome(self, call: Callable[..., Any], backend: str, arguments: dict[str, Any]) -> Any:
        """Return the results of a call, or its error as text."""
        self.calls += 1
        try:
            results = call(**arguments, backend=backend)
        except (TypeError, ValueError) as error:
            self.refusals += 1
            return f"{type(error).__name__}: {error}"
        results = results if isinstance(results, tuple) else (results,)
        if self.plant and backend != "reference" and results[0].numel() > 20:
            results[0].view(-1)[7] += 1
        return results


def view_of(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Return the same values as a view of some kind."""
    kind = draw(st.sampled_from(("plain", "permuted", "sliced", "stepped", "parameter", "negated", "inference")))
    if kind == "permuted" and tensor.ndim > 1:
        order = draw(st.permutations(range(tensor.ndim)))
        back = [order.index(i) for i in range(tensor.ndim)]
        return tensor.permute(order).contiguous().permute(back)
    if kind == "sliced" and tensor.ndim:
        wide = torch.zeros([size + 2 for size in tensor.shape], dtype=tensor.dtype)
        inside = wide[tuple(slice(1, size + 1) for size in tensor.shape)]
        inside.copy_(tensor)
        return inside
    if kind == "stepped" and tensor.ndim:
        # strides that a dimension of size 1 may have, and that others of it may not
        dimension = draw(st.integers(0, tensor.ndim - 1))
        return torch.stack([tensor, tensor], dimension + 1).select(dimension + 1, 0)
    if kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and draw(st.booleans()))
    if kind == "negated" and tensor.dtype != torch.bool:
        return torch._neg_view(-tensor)
    if kind == "inference":
        with torch.inference_mode():
            return tensor.clone()
    return tensor


def integer_of(draw: st.DrawFn, value: int) -> Any:
    """Return an integer as one of the kinds that hold it."""
    kinds: list[Callable[[int], Any]] = [int, np.int64, np.array, torch.tensor]
    if -128 <= value < 128:
        kinds += [np.int8, lambda value: torch.tensor(value, dtype=torch.int8)]
    if -(2**31) <= value < 2**31:
        kinds += [np.int32, lambda value: torch.tensor(value, dtype=torch.int32)]
    return draw(st.sampled_from(kinds))(value)


def number_of(draw: st.DrawFn, value: float) -> Any:
    """Return a number as one of the kinds that hold it exactly."""
    kinds: list[Callable[[float], Any]] = [float, np.float64, np.array, lambda v: torch.tensor(v, dtype=torch.float64)]
    if abs(value) < 1e38 and float(np.float32(value)) == value:
        kinds += [np.float32, torch.tensor]
    return draw(st.sampled_from(kinds))(value)


def per_sample_of(draw: st.DrawFn, values: list[int]) -> Any:
    """Return integers as one for all samples, or one for each."""
    if draw(st.booleans()) and values:
        return integer_of(draw, values[0])
    return view_of(draw, torch.tensor(values, dtype=torch.int64))


def guidance_of(draw: st.DrawFn, values: list[float]) -> Any:
    """Return guidance scales as one for all samples, or one for each."""
    if draw(st.booleans()) and values:
        return number_of(draw, values[0])
    dtype = draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    return view_of(draw, torch.tensor(values, dtype=torch.float64).to(dtype))


DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
SIZES = st.sampled_from((1, 1, 2, 3, 5, 16, 17, 33))
VOCABULARIES = st.sampled_from((1, 2, 3, 7, 16, 17, 31, 40, 65, 511, 513, 2049))


def mostly(*good: Any, bad: tuple[Any, ...]) -> st.SearchStrategy:
    """Return a strategy for good values and, one time in twenty, bad ones: a call with one of them is refused."""
    return st.integers(0, 19).flatmap(lambda die: st.sampled_from(bad if die == 19 else good))


GUIDANCE = mostly(1.0, -3.0, 0.0, 0.1, 2.5, 9.0, bad=(float("nan"), 1e39))
NOISE = mostly(0.0, 0.0, 0.3, 1.0, bad=(-1.0, float("inf")))
TEMPERATURES = mostly(1.0, 0.0, 0.1, 3.0, bad=(-1.0, 1e-31))
CONFIDENCE_TEMPERATURES = mostly(0.0, 0.5, 4.0, 3e38, bad=(-1.0, float("nan")))
SOFTCAPS = mostly(None, None, 0.5, 30.0, 1e4, 1e30, bad=(0.0, -1.0, float("nan")))
TOP_P = mostly(1.0, 1.0, 0.1, 0.5, 0.9, 0.999, bad=(0.0, 1.5, float("nan")))
MIN_P = mostly(0.0, 0.0, 0.01, 0.5, 1e-9, bad=(1.0, -0.1))
SEEDS = st.sampled_from((0, 1, -1, 100, 2**31, -(2**63), 2**63 - 1))
STEPS = mostly(0, 1, 5, 2**32 - 2, bad=(2**32, -1))
# the last that 33 positions leave room for
FIRST_POSITIONS = mostly(0, 1, 77, 2**32 - 33, bad=(2**32, -1))
STATISTICS = st.lists(st.sampled_from(tuple(cpu.STATISTICS)))


@st.composite
def draws(draw: st.DrawFn) -> dict[str, Any]:
    """Return the arguments that the ops that read logits share."""
    shape = draw(st.sampled_from((0, 1, 1, 2, 3))), draw(SIZES), draw(VOCABULARIES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(DTYPES)
    std = draw(st.sampled_from((0.0, 1.0, 5.0, 100.0)))

    def half() -> Tensor:
        logits = torch.randn(shape, generator=generator) * std
        share = draw(st.sampled_from((0.0, 0.0, 0.3, 0.95)))
        logits[torch.rand(shape, generator=generator) < share] = -torch.inf
        if draw(st.integers(0, 9)) == 0 and logits.numel():
            index = draw(st.integers(0, logits.numel() - 1))
            logits.view(-1)[index] = draw(st.sampled_from((torch.nan, torch.inf)))
        return logits.to(dtype)

    num_tokens = shape[2]
    mask_token_id = draw(st.sampled_from((num_tokens, 0, -1, num_tokens // 2, 2**63 - 1)))
    tokens = torch.randint(0, num_tokens, shape[:2], generator=generator)
    tokens[torch.rand(shape[:2], generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = mask_token_id
    if draw(st.integers(0, 19)) == 0 and tokens.numel():
        tokens.view(-1)[draw(st.integers(0, tokens.numel() - 1))] = draw(st.sampled_from((-2, num_tokens + 1)))
    halves = logits, uncond, second = half(), half(), half()
    # most often in one layout: others are refused
    if draw(st.booleans()):
        halves = logits, uncond, second = tuple(x.mT.contiguous().mT for x in halves)
    if draw(st.integers(0, 3)) == 0:
        logits, uncond, second = (view_of(draw, x) for x in halves)
    guided = draw(st.integers(0, 2))
    return dict(
        logits=logits,
        tokens=view_of(draw, tokens),
        mask_token_id=mask_token_id,
        seed=per_sample_of(draw, [draw(SEEDS) for _ in range(shape[0])]),
        step=integer_of(draw, draw(STEPS)),
        uncond_logits=uncond if guided else None,
        second_uncond_logits=second if guided == 2 or draw(st.integers(0, 39)) == 0 else None,
        guidance_scale=number_of(draw, draw(GUIDANCE)),
    )


def places_and_tokens(draw: st.DrawFn, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a draw with those that only draws take: of each sample, and of each token."""
    num_samples, _, num_tokens = arguments["logits"].shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    forbidden = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    kind = draw(st.sampled_from(("none", "none", "bool", "float32")))
    allowed = None
    if kind == "bool":
        allowed = view_of(draw, ~forbidden)
    elif kind == "float32":
        bias = torch.randn(num_tokens, generator=generator).masked_fill(forbidden, -torch.inf)
        if draw(st.integers(0, 9)) == 0:
            bias[draw(st.integers(0, num_tokens - 1))] = draw(st.sampled_from((torch.nan, torch.inf)))
        allowed = view_of(draw, bias)
    return arguments | dict(
        guidance_scale=guidance_of(draw, [draw(GUIDANCE) for _ in range(num_samples)]),
        first_position=per_sample_of(draw, [draw(FIRST_POSITIONS) for _ in range(num_samples)]),
        allowed=allowed,
        second_guidance_scale=guidance_of(draw, [draw(GUIDANCE) for _ in range(num_samples)]),
        guidance=draw(st.sampled_from((*cpu.GUIDANCE, *cpu.GUIDANCE, "single"))),
        softcap=None if (cap := draw(SOFTCAPS)) is None else number_of(draw, cap),
    )


def refused(ours: Any, right: Any) -> bool:
    """Tell whether the reference refuses the call, once its sentence is seen to be ours too."""
    if isinstance(ours, str) or isinstance(right, str):
        assert ours == right, f"\n  kernel: {ours}\n  reference: {right}"
        return True
    return False


def near(ours: Tensor, right: Tensor, scale: float) -> None:
    """Check floats: equal, or within float32 of numbers of the size that they are made of."""
    assert ours.dtype == right.dtype and ours.shape == right.shape and ours.is_contiguous()
    tolerance = 3e-6 * max(scale, 1.0)
    same = (ours == right) | (ours.isnan() & right.isnan())
    close = (ours - right).abs() <= tolerance + 3e-6 * right.abs()
    assert (same | close).all(), f"\n  kernel: {ours}\n  reference: {right}"


def scores_of(arguments: dict[str, Any], noise_scale: float, temperature: float) -> tuple[Tensor, Tensor, float]:
    """Return the float64 logits and scores that tokens are drawn by, and the size of what they are made of."""
    logits, uncond, allowed = arguments["logits"], arguments["uncond_logits"], arguments.get("allowed")
    second, softcap = arguments.get("second_uncond_logits"), arguments.get("softcap")
    num_samples = len(logits)
    seeds, firsts = (
        torch.as_tensor(arguments.get(name, 0)).long().expand(num_samples) for name in ("seed", "first_position")
    )
    guidance, second_guidance = (
        torch.as_tensor(arguments.get(name, 1.0)).detach().double().expand(num_samples)
        for name in ("guidance_scale", "second_guidance_scale")
    )
    if allowed is not None:
        allowed = allowed.detach() if allowed.is_floating_point() else allowed.double().log()
    tempered, scores = reference.perturbed_logits(
        logits.detach(), seed=seeds, step=int(arguments["step"]), mask_token_id=arguments["mask_token_id"],
        uncond_logits=None if uncond is None else uncond.detach(), guidance_scale=guidance, noise_scale=noise_scale,
        temperature=temperature, first_position=firsts, token_bias=allowed,
        second_uncond_logits=None if second is None else second.detach(), second_guidance_scale=second_guidance,
        guidance=arguments.get("guidance", "nested"), softcap=math.inf if softcap is None else float(softcap),
    )  # fmt: skip
    sizes = [
        x.detach().double().where(x.detach().isfinite(), 0).abs().amax()
        for x in (logits, uncond, second, allowed)
        if x is not None and x.numel()
    ]
    size = float(max(sizes)) if sizes else 0.0
    largest = 2 * size + 2 * float(guidance.abs().amax()) * size if num_samples else 0.0
    if second is not None and num_samples:
        largest *= 1 + 2 * float(second_guidance.abs().amax())
    return tempered, scores, (largest + 25 * noise_scale) / (temperature or 1.0) + 25


def same_draws(ours: Tensor, right: Tensor, scores: Tensor, size: float) -> Tensor:
    """Check token ids and return where both drew the same."""
    same = ours == right
    # a token whose score float32 cannot tell from the best is as good
    for row in (~same).nonzero().tolist():
        drawn, best = (float(scores[(*row, int(ids[tuple(row)]))]) for ids in (ours, right))
        assert best - drawn <= 3e-6 * size, f"\n  position {row}: score {drawn} of {ours[tuple(row)]}, {best} is best"
    return same


def sample_tokens(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """One draw, with its statistics."""
    noise_scale, temperature = draw(NOISE), draw(TEMPERATURES)
    arguments = places_and_tokens(draw, draw(draws()))
    call = dict(
        arguments, noise_scale=number_of(draw, noise_scale), temperature=number_of(draw, temperature),
        rows=draw(st.sampled_from(cpu.ROWS)), statistics=draw(STATISTICS),
    )  # fmt: skip
    truncated = draw(st.booleans())
    if truncated:
        top_k = draw(st.sampled_from((None, 1, 2, arguments["logits"].shape[2], arguments["logits"].shape[2] + 1, 0)))
        call |= dict(
            top_k=None if top_k is None else integer_of(draw, top_k), top_p=number_of(draw, draw(TOP_P)),
            min_p=number_of(draw, draw(MIN_P)), logprob_of=draw(st.sampled_from(cpu.LOGPROB_OF)),
        )  # fmt: skip
    ours, right = (counted.outcome(mgt_kernels.sample_tokens, path, call) for path in (backend, "reference"))
    if refused(ours, right):
        return
    if truncated:
        # float64 may keep others at a border, and then everything differs: tests/test_truncation.py looks at those
        same = counted.outcome(mgt_kernels.sample_tokens, "scalar", call)
        for found, expected in zip(ours, same, strict=True):
            assert found is None if expected is None else torch.equal(found, expected), (ours, same)
    else:
        tempered, scores, size = scores_of(arguments, noise_scale, temperature)
        same = same_draws(ours.token_ids, right.token_ids, scores, size)
        near(ours.logprob[same], right.logprob[same], size)
        for name in cpu.STATISTICS:
            found, truth = getattr(ours, name), getattr(right, name)
            assert (found is None) == (truth is None) == (name not in call["statistics"]), name
            if truth is None:
                continue
            if name == "argmax":
                same_draws(found, truth, tempered, size)
            elif name == "logit":
                near(found[same], truth[same], size * (temperature or 1.0))
            else:
                # an error of a logit counts up to log V times in the entropy
                near(found, truth, size * (10 if name == "entropy" else 1))


def differential_sample(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """A plain step and one with history."""
    noise_scale, temperature = draw(NOISE), draw(TEMPERATURES)
    arguments = places_and_tokens(draw, draw(draws()))
    variant = draw(st.sampled_from(mgt_kernels.DIFFERENTIAL_VARIANTS))
    call = dict(
        arguments, noise_scale=number_of(draw, noise_scale), temperature=number_of(draw, temperature), variant=variant,
        share=number_of(draw, draw(st.sampled_from((0.0, 0.5, 0.75, 1.0, 1.5)))),
        aliased_history=draw(st.booleans()) and variant == "official",
    )  # fmt: skip
    ours, right = (
        counted.outcome(mgt_kernels.differential_sample, path, call | {"state": None})
        for path in (backend, "reference")
    )
    if refused(ours, right):
        return
    near(ours[2].divergence, right[2].divergence, 1.0)
    call |= {"logits": arguments["logits"].detach().flip(-1), "step": int(arguments["step"]) + 1}
    for name in ("uncond_logits", "second_uncond_logits"):
        if call[name] is not None:
            call[name] = call[name].detach().flip(-1)
    # both from the reference's history: codes may differ by one
    begun = [right[2], dataclasses.replace(right[2])]
    for name in ("history", "written", "seed", "step"):
        begun[1] = dataclasses.replace(begun[1], **{name: getattr(right[2], name).clone()})
    ours, right = (
        counted.outcome(mgt_kernels.differential_sample, path, call | {"state": state})
        for path, state in zip((backend, "reference"), begun, strict=True)
    )
    if not refused(ours, right):
        _, _, size = scores_of(arguments, noise_scale, temperature)
        assert torch.equal(ours[2].written, right[2].written) and int(ours[2].step) == int(right[2].step)
        read = ours[2].written & ~right[2].divergence.isinf()
        divergence = right[2].divergence[read]
        # a sum of differences as large as the logits
        near(ours[2].divergence[read], divergence, 30 * size)


def mask_by_confidence(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """One choice."""
    shape = draw(st.sampled_from((0, 1, 3))), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logprob = -torch.rand(shape, generator=generator) * 8
    logprob[torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.4, 1.0)))] = torch.inf
    if draw(st.integers(0, 5)) == 0 and logprob.numel():
        logprob.view(-1)[draw(st.integers(0, logprob.numel() - 1))] = draw(
            st.sampled_from((torch.nan, -torch.inf, 0.0, -0.0, -1e-40))
        )
    temperature = draw(CONFIDENCE_TEMPERATURES)
    counts = (logprob != torch.inf).sum(-1).tolist()
    wanted = [draw(st.integers(-1 if draw(st.integers(0, 9)) == 0 else 0, count)) for count in counts]
    seeds = [draw(SEEDS) for _ in counts]
    call = dict(
        token_ids=view_of(draw, torch.randint(0, 90, shape, generator=generator)), logprob=view_of(draw, logprob),
        mask_len=view_of(draw, torch.tensor(wanted, dtype=torch.int64)), mask_token_id=integer_of(draw, 99),
        temperature=number_of(draw, temperature), seed=view_of(draw, torch.tensor(seeds, dtype=torch.int64)),
        step=integer_of(draw, draw(STEPS)),
    )  # fmt: skip
    ours, right = (counted.outcome(mgt_kernels.mask_by_confidence, path, call) for path in (backend, "reference"))
    if not refused(ours, right):
        assert (ours[0] == 99).sum(-1).tolist() == wanted, f"{ours[0]}: {wanted} were to be masked"
        confidence = logprob.double()
        if temperature:
            noise = reference.confidence_gumbel(torch.tensor(seeds, dtype=torch.int64), shape[1], int(call["step"]))
            confidence = confidence + temperature * noise
        for sample in (ours[0] != right[0]).any(-1).nonzero().flatten().tolist():
            swapped = confidence[sample][(ours[0] != right[0])[sample]]
            assert swapped.max() - swapped.min() <= 3e-6 * (8 + 25 * temperature), f"sample {sample}: {swapped}"


def commit_tokens(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """One choice by a rule, in a window, with edits."""
    shape = draw(st.sampled_from((0, 1, 3))), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rule = draw(st.sampled_from(cpu.COMMIT_RULES))
    score = torch.rand(shape, generator=generator) ** draw(st.sampled_from((0.02, 0.3, 1.0)))
    score = 1 - score if rule == "entropy_bound" else score
    if draw(st.booleans()):
        score = (score * 4).round() / 4
    tokens, token_ids, argmax = torch.randint(0, 90, (3, *shape), generator=generator)
    tokens[torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.6, 1.0)))] = 99
    if draw(st.integers(0, 5)) == 0 and score.numel():
        score.view(-1)[draw(st.integers(0, score.numel() - 1))] = draw(
            st.sampled_from((torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, -0.0, 1e-40))
        )
    temperature = draw(CONFIDENCE_TEMPERATURES)
    most = shape[1] + (draw(st.integers(0, 19)) == 0)
    starts = [draw(st.integers(0, shape[1])) for _ in range(shape[0])]
    ends = [draw(st.integers(start, max(most, start))) for start in starts]
    counts = [int((row[start:end] == 99).sum()) for row, start, end in zip(tokens, starts, ends, strict=True)]
    wanted = [draw(st.integers(-1 if draw(st.integers(0, 9)) == 0 else 0, count)) for count in counts]
    call: dict[str, Any] = dict(
        token_ids=view_of(draw, token_ids), score=view_of(draw, score), tokens=view_of(draw, tokens),
        count=view_of(draw, torch.tensor(wanted, dtype=torch.int64)), mask_token_id=integer_of(draw, 99),
        temperature=number_of(draw, temperature), seed=per_sample_of(draw, [draw(SEEDS) for _ in counts]),
        step=integer_of(draw, draw(STEPS)),
        within=tuple(view_of(draw, torch.tensor(x, dtype=torch.int64)) for x in (starts, ends)),
    )  # fmt: skip
    if rule != "count":
        call[rule] = number_of(draw, draw(mostly(0.0, 0.25, 0.5, 1.0, 2.75, 3e38, bad=(float("nan"), -1.0, 1e39))))
    if draw(st.booleans()):
        best, own = torch.randn(2, *shape, generator=generator)
        above, below = mostly(0.5, -torch.inf, bad=(torch.nan,)), mostly(-0.5, torch.inf, bad=(1e39,))
        call["edit"] = mgt_kernels.TokenEdit(
            view_of(draw, argmax), view_of(draw, best), number_of(draw, draw(above)), view_of(draw, own),
            number_of(draw, draw(below)),
        )  # fmt: skip
    ours, right = (counted.outcome(mgt_kernels.commit_tokens, path, call) for path in (backend, "reference"))
    if not refused(ours, right):
        if temperature == 0:
            assert torch.equal(ours[0], right[0]) and torch.equal(ours[1], right[1]), (ours, right)
        # with noise float32 may tell less apart, but no count differs
        elif rule == "count":
            assert torch.equal((ours[0] == 99).sum(-1), (right[0] == 99).sum(-1)) and torch.equal(ours[1], right[1])


def remask_tokens(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """One inverse pass."""
    arguments = draw(draws())
    # which it does not take
    arguments.pop("second_uncond_logits")
    shape = arguments["tokens"].shape
    variant = draw(st.sampled_from(mgt_kernels.REMASK_VARIANTS))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.2
    keep = view_of(draw, keep) if draw(st.booleans()) else None
    eligible = arguments["tokens"] != arguments["mask_token_id"]
    counts = (eligible if keep is None else eligible & ~keep).sum(-1).tolist()
    wanted = [draw(st.integers(0, count + (draw(st.integers(0, 9)) == 0))) for count in counts]
    call = dict(
        arguments, remask_len=view_of(draw, torch.tensor(wanted, dtype=torch.int64)), variant=variant, keep=keep
    )
    ours, right = (counted.outcome(mgt_kernels.remask_tokens, path, call) for path in (backend, "reference"))
    if not refused(ours, right):
        _, _, size = scores_of(arguments, 0.0, 0.0)
        near(ours[1].detach(), right[1].detach(), size)
        masked = (ours[0] == arguments["mask_token_id"]) & (right[1] != torch.inf)
        assert masked.sum(-1).tolist() == wanted


def linear(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """One layer, of both kinds."""
    shape = draw(st.sampled_from((0, 1, 2, 6, 33))), draw(st.sampled_from((1, 31, 64, 65, 200)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    num_outputs, group_size = draw(st.sampled_from((1, 7, 16, 33))), draw(st.sampled_from((32, 96, 128)))
    weight = torch.randn(num_outputs, shape[1], generator=generator)
    packed = mgt_kernels.quantize_int4(view_of(draw, weight).detach(), group_size)
    x = torch.randn(shape, generator=generator).to(draw(st.sampled_from((torch.float32, torch.bfloat16))))
    if draw(st.integers(0, 9)) == 0 and x.numel():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from((torch.nan, torch.inf, 3.395e38)))
    bias = torch.randn(num_outputs, generator=generator).to(draw(DTYPES)) if draw(st.booleans()) else None
    bias = bias if bias is None else view_of(draw, bias)
    x = x[:1].expand_as(x) if draw(st.integers(0, 9)) == 0 else view_of(draw, x)
    call = dict(x=x, weight=packed, bias=bias)
    a8 = draw(st.booleans())
    if a8:
        scale = draw(st.sampled_from((None, 0.02, 0.0, float("nan"))))
        call["x_scale"] = scale if scale is None else number_of(draw, scale)
        if draw(st.booleans()) and shape[0]:
            call["x_scale"] = view_of(draw, torch.rand(shape[0], generator=generator) + 0.01)
    op = mgt_kernels.w4a8_linear if a8 else mgt_kernels.w4a16_linear
    ours, right = (counted.outcome(op, path, call) for path in (backend, "reference"))
    if not refused(ours, right):
        assert ours[0].dtype == right[0].dtype and ours[0].shape == right[0].shape
        eps = 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-18
        largest = float(right[0].detach().float().abs().amax()) if right[0].numel() else 0.0
        size = max(largest, float(shape[1]))
        y, truth = ours[0].detach().float(), right[0].detach().float()
        assert ((y == truth) | ((y - truth).abs() <= eps * size)).all(), (ours, right)


def merging(counted: Counted, draw: st.DrawFn, backend: str) -> None:
    """One match, the means of its rows, and back."""
    grid = 2 * draw(st.integers(1, 5)), 2 * draw(st.integers(1, 5))
    shape = draw(st.sampled_from((0, 1, 3))), grid[0] * grid[1], draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(shape, generator=generator)
    # few different tokens of equal length, which tie, and whose cosines are exact; or any
    ties = draw(st.booleans())
    if ties:
        x = torch.zeros(shape)
        x.scatter_(2, torch.randint(0, shape[2], (*shape[:2], 1), generator=generator), 2.0)
    x = x.to(draw(DTYPES))
    if draw(st.integers(0, 9)) == 0 and x.numel():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    sides = draw(mostly(grid, bad=((grid[0] + 1, grid[1]), (grid[0], 2 * grid[1]))))
    bad = float("nan"), -1.5, 1e39
    rule = dict(ratio=number_of(draw, draw(mostly(0.0, 0.1, 0.5, 0.75, bad=(0.76, *bad)))))
    if draw(st.booleans()):
        # what no cosine rounds across where tokens tie
        rule = dict(threshold=draw(mostly(-1.0, 0.5, 0.9, bad=bad)))
    call: dict[str, Any] = dict(x=view_of(draw, x), grid=sides, step=integer_of(draw, draw(STEPS)), **rule)
    if draw(st.booleans()):
        call["seed"] = per_sample_of(draw, [draw(SEEDS) for _ in range(shape[0])])
    ours, right = (counted.outcome(mgt_kernels.match_tokens, path, call) for path in (backend, "reference"))
    if refused(ours, right):
        return
    if ties:
        assert ours[3] == right[3] and all(map(torch.equal, ours[:3], right[:3])), (ours, right)
    # where float32 cannot tell cosines apart another match is as good: tests/test_merging.py looks at those
    match = mgt_kernels.Match(*right)
    other = view_of(draw, torch.randn(*shape[:2], draw(SIZES), generator=generator).to(draw(DTYPES)))
    match = match._replace(**{name: view_of(draw, getattr(match, name)) for name in ("row", "members", "starts")})
    call = dict(x=other, match=match)
    ours, right = (counted.outcome(mgt_kernels.merge_tokens, path, call) for path in (backend, "reference"))
    # of numbers of the order of 1
    eps = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[other.dtype]
    assert not refused(ours, right) and ours[0].dtype == right[0].dtype and ours[0].is_contiguous()
    y, truth = ours[0].detach().float(), right[0].detach().float()
    assert ((y - truth).abs() <= eps * truth.abs().clamp(min=1)).all(), (ours, right)
    call = dict(x=view_of(draw, right[0].detach()), match=match)
    ours, right = (counted.outcome(mgt_kernels.unmerge_tokens, path, call) for path in (backend, "reference"))
    assert not refused(ours, right) and torch.equal(ours[0].detach(), right[0].detach())


OPS = (sample_tokens, differential_sample, mask_by_confidence, commit_tokens, remask_tokens, linear, merging)


def main() -> int:
    """Fuzz for a given time; return 1 after a mismatch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", action="store_true", help="perturb results, to see that it is found")
    options = parser.parse_args()
    counted = Counted(time.monotonic() + options.seconds, options.plant)
    rounds = 0
    while time.monotonic() < counted.end:

        @seed(options.seed + rounds)
        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                  phases=(Phase.generate, Phase.shrink), print_blob=False)  # fmt: skip
        @given(st.data())
        def one_round(data: st.DataObject) -> None:
            if time.monotonic() >= counted.end and not counted.failed:
                return
            op, backend = data.draw(st.sampled_from(OPS)), data.draw(st.sampled_from((*KERNELS, "auto")))
            try:
                op(counted, data.draw, backend)
            except BaseException:
                counted.failed = True
                raise

        try:
            one_round()
        except Exception:
            print(f"mismatch with --seed {options.seed + rounds}, after {counted.calls} calls", flush=True)
            raise
        rounds += 1
    print(f"{counted.calls} calls of 9 ops, {counted.refusals} refused by all alike, no mismatch; seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
