"""Which drawn tokens stay: the last part of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import TokenEdit, commit_tokens, mask_by_confidence
from mgt_kernels.ops import Sampled
from mgt_kernels.reference import confidence_gumbel

from .counts import Ratio
from .order import frozen_grid, grid_of
from .schedules import ValueSchedule, frozen_values, value_at
from .state import State

Count = Callable[[State], Tensor]


def keep_all(sampled: Sampled, score: Tensor, state: State) -> Tensor:
    """Every drawn token stays."""
    return sampled.token_ids


@dataclass(frozen=True)
class MaskLowest:
    """The positions of the lowest score + temperature g, g ~ Gumbel(0, 1), are masked again; none at the last step.

    See `mgt_kernels.mask_by_confidence`, which computes it.

    Attributes:
        count: how many stay masked, a function of the state; see `counts`.
        temperature: at least 0; a schedule, as for `generate`.
    """

    count: Count = field(default_factory=Ratio)
    temperature: ValueSchedule = (2.0, 0.0)

    def __post_init__(self) -> None:
        """Check the attributes."""
        object.__setattr__(self, "temperature", frozen_values("temperature", self.temperature, 0.0))

    def __call__(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """Return the tokens after the step."""
        if state.is_last:
            return sampled.token_ids
        return mask_by_confidence(
            sampled.token_ids,
            score,
            self.count(state),
            temperature=value_at("temperature", self.temperature, state),
            **state.draw_arguments,
        )


@dataclass(frozen=True)
class Commit:
    """The positions of the highest scores become known, as many as one bound allows; all at the last step.

    See `mgt_kernels.commit_tokens`, which computes it. One bound at most; a generation then ends when all is known,
    which may be before its last step.

    Attributes:
        count: how many stay masked at most, a function of the state; None: one position becomes known at least.
        threshold: those that have this probability, with a score in nats (Fast-dLLM, arXiv 2505.22618).
        factor: the largest n with (n + 1) (1 - p_n) <= factor, with a score in nats (Fast-dLLM).
        entropy_bound: the largest n with sum H - max H <= entropy_bound nats, with the score "entropy" (EB-Sampler,
            arXiv 2505.24857).
        temperature: of Gumbel noise on the score; a schedule.
        replace_above: a known token is replaced where another is this probable (T2T, LLaDA2.1, arXiv 2512.15745).
        mask_below: a known token is masked where it is less probable than this (T2M, arXiv 2604.18738). Either needs
            a draw with rows "all".
    """

    count: Count | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    temperature: ValueSchedule = 0.0
    replace_above: float | None = None
    mask_below: float | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        bounds = [name for name in ("threshold", "factor", "entropy_bound") if getattr(self, name) is not None]
        if len(bounds) > 1:
            raise ValueError(f"{bounds[1]}: expected one bound at most, got {' and '.join(bounds)}")
        for name in ("threshold", "replace_above", "mask_below"):
            _check_share(name, getattr(self, name))
        object.__setattr__(self, "temperature", frozen_values("temperature", self.temperature, 0.0))

    @property
    def ends_early(self) -> bool:
        """Whether all may be known before the last step."""
        return any(bound is not None for bound in (self.threshold, self.factor, self.entropy_bound))

    @property
    def reads_known(self) -> bool:
        """Whether known tokens are edited."""
        return not (self.replace_above is None and self.mask_below is None)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is asked of the draw."""
        replacing = () if self.replace_above is None else ("argmax", "max_logprob")
        return replacing if self.mask_below is None else (*replacing, "known_logprob")

    def __call__(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """Return the tokens after the step."""
        count = state.num_masked()
        if not state.is_last:
            count = count.clamp(max=1) if self.count is None else count - self.count(state)
        bounds: dict[str, Any] = {}
        if self.threshold is not None:
            bounds = {"threshold": log(self.threshold)}
        elif self.factor is not None:
            bounds, score = {"factor": self.factor}, score.exp()
        elif self.entropy_bound is not None:
            bounds, score = {"entropy_bound": self.entropy_bound}, -score
        tokens, _ = commit_tokens(
            sampled.token_ids,
            score,
            state.tokens,
            count=count,
            temperature=value_at("temperature", self.temperature, state),
            edit=self._edit(sampled, state),
            **bounds,
            **state.draw_arguments,
        )
        return tokens

    def _edit(self, sampled: Sampled, state: State) -> TokenEdit | None:
        edits: dict[str, Any] = {}
        if self.replace_above is not None:
            assert sampled.max_logprob is not None
            sure = sampled.max_logprob.masked_fill(state.keep, math.nan)
            edits = {"argmax": sampled.argmax, "max_logprob": sure, "replace_above": log(self.replace_above)}
        if self.mask_below is not None and not state.is_last:
            assert sampled.known_logprob is not None
            edits["known_logprob"] = sampled.known_logprob.masked_fill(state.keep, math.nan)
            edits["mask_below"] = log(self.mask_below)
        return TokenEdit(**edits) if edits else None


@dataclass(frozen=True)
class Stable:
    """Those become known that are probable and have been so for some steps, or else the most probable one.

    KLASS (arXiv 2511.05664): p of the drawn token above `threshold`, and the KL divergence to the step before below
    `divergence` in each of the last `num_steps` draws. It needs `Draw(temperature=0, differential=Differential(0))`,
    which measures the divergence on a 16-bit history.

    Attributes:
        threshold: a probability.
        divergence: nats.
        num_steps: at least 1.
    """

    threshold: float = 0.9
    divergence: float = 0.01
    num_steps: int = 2
    ends_early = True

    def __call__(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """Return the tokens after the step."""
        if "differential" not in state.memory:
            raise ValueError("draw: expected one with differential, which measures the divergence")
        if state.is_last:
            return sampled.token_ids
        close = state.memory["differential"].divergence < self.divergence
        before = state.memory.get("stable", torch.zeros_like(state.tokens))
        state.memory["stable"] = stable = torch.where(close, before + 1, 0)
        passes = state.masked & (stable >= self.num_steps) & (score > log(self.threshold))
        count = passes.sum(1)
        none = count == 0
        score = torch.where(passes | none[:, None], score, torch.finfo(score.dtype).min)
        count = torch.where(none, state.num_masked().clamp(max=1), count)
        tokens, _ = commit_tokens(sampled.token_ids, score, state.tokens, count=count, **state.draw_arguments)
        return tokens


@dataclass(frozen=True)
class Repulsion:
    """Positions become known one by one, and each lowers the score of its neighbours in the same step.

        pick  = argmax_i score_i + temperature g_i - penalty (neighbours of i picked in this step)

    until `count` stay masked: what is drawn together knows nothing of each other, which hurts neighbours most. This
    project's own.

    Attributes:
        count: how many stay masked, a function of the state.
        temperature: of g ~ Gumbel(0, 1); a schedule.
        penalty: in the unit of the score, at least 0.
        radius: positions up to so many rows and columns away are neighbours.
        grid: (H, W) with H W = N; None: the square; (1, N) for a sequence.
    """

    count: Count = field(default_factory=Ratio)
    temperature: ValueSchedule = (2.0, 0.0)
    penalty: float = 2.0
    radius: int = 1
    grid: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        object.__setattr__(self, "grid", frozen_grid(self.grid))
        if not self.penalty >= 0 or self.radius < 1:
            raise ValueError(f"penalty, radius: expected at least 0 and 1, got {self.penalty} and {self.radius}")
        object.__setattr__(self, "temperature", frozen_values("temperature", self.temperature, 0.0))

    def __call__(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """Return the tokens after the step."""
        if state.is_last:
            return sampled.token_ids
        masked, size = state.masked, state.tokens.shape[1]
        noise = confidence_gumbel(state.seed, size, int(state.num_draws)).to(score)
        temperature = value_at("temperature", self.temperature, state)
        score = (score + temperature * noise).masked_fill(~masked, -math.inf)
        penalty = self.penalty * _neighbours(*grid_of(self.grid, size), self.radius).to(score)
        left = state.num_masked() - self.count(state)
        tokens = state.tokens.clone()
        for _ in range(int(left.max()) if len(left) else 0):
            pick = score.argmax(1, keepdim=True)
            going_on = (left > 0)[:, None]
            drawn = sampled.token_ids.gather(1, pick)
            tokens.scatter_(1, pick, torch.where(going_on, drawn, tokens.gather(1, pick)))
            score -= penalty[pick[:, 0]]
            score.scatter_(1, pick, -math.inf)
            left -= 1
        return tokens


@dataclass(frozen=True)
class ReMDM:
    """Some known tokens are masked again in every step, and as many more become known (arXiv 2503.00307).

    With a and b the known shares before and after the step, sigma_max = min(1, (1 - b) / a), round(sigma K) of the K
    known positions are masked again, but never more than there is room for::

        "cap"      sigma = min(eta, sigma_max)                              at random
        "rescale"  sigma = eta sigma_max                                    at random
        "conf"     sigma = eta sigma_max                                    with weights exp(-p), p when it was drawn
        "loop"     sigma = min(eta, sigma_max) in `interval`, else 0        at random

    Attributes:
        count: how many stay masked, a function of the state.
        temperature: of Gumbel noise on the score; a schedule.
        strategy: one of these.
        eta: in [0, 1].
        interval: (start, end), with "loop" the shares of the steps between which tokens are masked again.
    """

    count: Count = field(default_factory=Ratio)
    temperature: ValueSchedule = (2.0, 0.0)
    strategy: str = "cap"
    eta: float = 0.02
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the attributes."""
        if self.strategy not in ("cap", "rescale", "conf", "loop"):
            raise ValueError(f"strategy: expected cap, rescale, conf or loop, got {self.strategy!r}")
        if len(self.interval) != 2 or (self.strategy != "loop" and tuple(self.interval) != (0.0, 1.0)):
            raise ValueError(f"interval: expected (start, end), with strategy loop alone, got {self.interval!r}")
        _check_share("eta", self.eta)
        object.__setattr__(self, "interval", tuple(map(float, self.interval)))
        object.__setattr__(self, "temperature", frozen_values("temperature", self.temperature, 0.0))

    def __call__(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """Return the tokens after the step."""
        masked = state.masked
        probability = torch.where(masked, sampled.logprob.exp(), state.memory.get("probability", 1.0))
        state.memory["probability"] = probability
        if state.is_last:
            return sampled.token_ids
        left, size = self.count(state), state.tokens.shape[1]
        free = ~masked & ~state.keep
        num_known = free.sum(1)
        room = ((left / size) / (num_known / size).clamp(min=1e-9)).clamp(max=1)
        start, end = self.interval
        active = start <= state.step / state.num_inference_steps < end
        sigma = room.clamp(max=self.eta) if self.strategy in ("cap", "loop") else self.eta * room
        again = (sigma * num_known * active).round().long().minimum(left).minimum(num_known)
        preference = probability if self.strategy == "conf" else torch.zeros_like(probability)
        common = state.draw_arguments
        remasked = mask_by_confidence(
            state.tokens, preference.masked_fill(~free, math.inf), again, temperature=1.0, **common
        )
        temperature = value_at("temperature", self.temperature, state)
        drawn = mask_by_confidence(sampled.token_ids, score, left - again, temperature=temperature, **common)
        return torch.where(masked, drawn, remasked)


@dataclass(frozen=True)
class PathPlanning:
    """Drawn and known tokens compete: known ones with eta times the log-probability that they have now.

    P2 (arXiv 2502.03540): the `count` lowest of all positions are masked. It needs a draw with rows "all".

    Attributes:
        count: how many stay masked, a function of the state.
        temperature: of Gumbel noise on the score; a schedule.
        eta: at least 0; 0 never masks a known token again.
    """

    count: Count = field(default_factory=Ratio)
    temperature: ValueSchedule = (2.0, 0.0)
    eta: float = 1.0
    statistics = ("known_logprob",)
    reads_known = True

    def __post_init__(self) -> None:
        """Check the attributes."""
        object.__setattr__(self, "temperature", frozen_values("temperature", self.temperature, 0.0))

    def __call__(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """Return the tokens after the step."""
        if state.is_last:
            return sampled.token_ids
        assert sampled.known_logprob is not None
        known = ~state.masked
        score = torch.where(known, self.eta * sampled.known_logprob, score)
        score = score.masked_fill(state.keep | (known if self.eta == 0 else False), math.inf)
        temperature = value_at("temperature", self.temperature, state)
        return mask_by_confidence(
            sampled.token_ids, score, self.count(state), temperature=temperature, **state.draw_arguments
        )


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")


def log(probability: float) -> float:
    """The logarithm of a bound, where 0 is below every probability."""
    return math.log(probability) if probability > 0 else -1e30


@lru_cache
def _neighbours(height: int, width: int, radius: int) -> Tensor:
    """Which positions are near each other, bool (N, N)."""
    at = torch.arange(height * width, device="cpu")
    row, column = at // width, at % width
    return ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
