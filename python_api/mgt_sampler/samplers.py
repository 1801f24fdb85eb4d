"""Samplers as rules: each function is named after its paper and gives what `generate(model, rule)` takes.

    images = generate(model, samplers.halton(token_temperature=0.75, guidance_scale=(1, 3)), labels=[7]).images

All of them take, as `drawing`, what is drawn from:

    guidance_scale       s of u + s (c - u); a schedule
    token_temperature    of the draw of a token; a schedule
    noise_scale          Gaussian noise on the logits, in nats; a schedule

and further fields of `Draw`. Those that keep the first of an order also take, as `shared`:

    mask_schedule        gamma, the share that is masked after a step: a name, or T ratios
    temperature          of Gumbel noise on the score; a schedule
    repulsion            penalty in nats for a neighbour that became known in the same step (`Repulsion`); 0: none
    grid                 (H, W) of the tokens, for repulsion and the orders of a grid; None: the square

What a function does not use it does not take.

Orders that are chosen before the draw (random, Halton, checkerboard, margin, entropy, max_probability) draw from the
model's distribution; the order by confidence prefers what was drawn likely, and draws from another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mgt_kernels.ops import Sampled

from .counts import Ratio
from .draw import Draw
from .order import CheckerboardOrder, HaltonOrder, random_order
from .schedules import MaskSchedule, ValueSchedule, frozen_values, value_at
from .selection import Commit, MaskLowest, PathPlanning, ReMDM, Repulsion, Stable
from .state import Logits, State
from .step import Rule
from .techniques import Correction, Differential


def _rule(
    score: str | Callable[[Sampled, State], Tensor],
    select: Callable[[Sampled, Tensor, State], Tensor],
    *,
    guidance_scale: ValueSchedule = 1.0,
    token_temperature: ValueSchedule = 1.0,
    noise_scale: ValueSchedule = 0.0,
    **draw: Any,
) -> Rule:
    """The rule of an order and a selection; what neither it nor `Draw` knows is a TypeError."""
    return Rule(Draw(token_temperature, noise_scale, **draw), score, select, guidance_scale=guidance_scale)


def by_order(
    score: str | Callable[[Sampled, State], Tensor] = "logprob",
    *,
    mask_schedule: MaskSchedule = "cosine",
    temperature: ValueSchedule = 0.0,
    repulsion: float = 0.0,
    grid: Sequence[int] | None = None,
    **drawing: Any,
) -> Rule:
    """The rule that draws all masked positions and keeps those that an order puts first.

    Args:
        score: the order; see `Rule`.
        mask_schedule, temperature, repulsion, grid: as above.
        drawing: guidance_scale, token_temperature, noise_scale, and further fields of `Draw`.
    """
    count = Ratio(mask_schedule)
    lowest = MaskLowest(count, temperature)
    select = Repulsion(count, temperature, repulsion, grid=grid) if repulsion else lowest
    return _rule(score, select, **drawing)


def maskgit(*, temperature: ValueSchedule = (2.0, 0.0), **shared: Any) -> Rule:
    """Confidence: the log-probability of what was drawn, with noise (MaskGIT, arXiv 2202.04200)."""
    return by_order("logprob", temperature=temperature, **shared)


def random(**shared: Any) -> Rule:
    """Random order, which alone is exact where one token is drawn a step."""
    return by_order(random_order, temperature=1.0, **shared)


def halton(
    *,
    mask_schedule: MaskSchedule = "arccos",
    roll: bool = True,
    grid: Sequence[int] | None = None,
    **shared: Any,
) -> Rule:
    """The order of the Halton sequence, which spreads over the grid (arXiv 2503.17076)."""
    return by_order(HaltonOrder(grid, roll), mask_schedule=mask_schedule, grid=grid, **shared)


def checkerboard(*, grid: Sequence[int] | None = None, **shared: Any) -> Rule:
    """One colour of the checkerboard, then the other (generation, then reconstruction, arXiv 2510.17171)."""
    return by_order(CheckerboardOrder(grid), temperature=1.0, grid=grid, **shared)


def margin(**shared: Any) -> Rule:
    """The largest difference between the two largest probabilities first (arXiv 2502.06768)."""
    return by_order("margin", **shared)


def entropy(**shared: Any) -> Rule:
    """The smallest entropy first (Dream, arXiv 2508.15487)."""
    return by_order("entropy", **shared)


def max_probability(**shared: Any) -> Rule:
    """The largest probability of any token first, whichever was drawn."""
    return by_order("max_logprob", **shared)


@dataclass(frozen=True)
class _MomentDraw:
    """Draws from softmax(beta l / t) and leaves log sum_j p_j^beta of p = softmax(l / t) in memory."""

    draw: Draw
    alpha: ValueSchedule
    takes_rows = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", frozen_values("temperature", self.alpha, 0.0))

    def __call__(self, logits: Logits | None, state: State, statistics: tuple[str, ...] = ()) -> Sampled:
        if state.is_last:
            return self.draw(logits, state, statistics)
        t = value_at("temperature", self.draw.temperature, state)
        beta = 1 + 1 / max(value_at("temperature", self.alpha, state), 1e-3)
        whole = self.draw(logits, state, ("logsumexp",)).logsumexp
        sharp = replace(self.draw, temperature=t / beta)(logits, state, (*statistics, "logsumexp"))
        assert whole is not None and sharp.logsumexp is not None
        state.memory["moment"] = sharp.logsumexp - beta * whole
        return sharp


def _moment(sampled: Sampled, state: State) -> Tensor:
    return sampled.logprob if state.is_last else state.memory["moment"]


def moment(*, temperature: ValueSchedule = (2.0, 0.0), **shared: Any) -> Rule:
    """Positions first, tokens then, with the law of confidence in the limit of few positions (arXiv 2510.04525)::

        beta  = 1 + 1 / temperature
        score = log sum_j p_j^beta + Gumbel noise
        token ~ p^beta / sum_j p_j^beta

    The last step draws its tokens from p.
    """
    rule = by_order(_moment, temperature=1.0, **shared)
    assert isinstance(rule.draw, Draw)
    return rule.but(draw=_MomentDraw(rule.draw, temperature))


def entropy_bound(gamma: float = 0.1, *, max_steps: int = 64, **drawing: Any) -> Rule:
    """As many of the smallest entropy as sum to no more than gamma nats without the largest: EB (arXiv 2505.24857)."""
    return _rule("entropy", Commit(entropy_bound=gamma), **drawing).but(num_inference_steps=max_steps)


def threshold(probability: float = 0.9, *, max_steps: int = 64, **drawing: Any) -> Rule:
    """All that were drawn with this probability, one at least (Fast-dLLM, arXiv 2505.22618)."""
    return _rule("logprob", Commit(threshold=probability), **drawing).but(num_inference_steps=max_steps)


def factor(f: float = 1.0, *, max_steps: int = 64, **drawing: Any) -> Rule:
    """The largest n with (n + 1) (1 - p_n) <= f, best first (Fast-dLLM, arXiv 2505.22618)."""
    return _rule("logprob", Commit(factor=f), **drawing).but(num_inference_steps=max_steps)


def klass(probability: float = 0.9, divergence: float = 0.01, *, max_steps: int = 256, **drawing: Any) -> Rule:
    """All likeliest tokens that are probable and have been stable for two steps (KLASS, arXiv 2511.05664)."""
    drawing = {"token_temperature": 0.0, "differential": Differential(0.0), **drawing}
    return _rule("logprob", Stable(probability, divergence), **drawing).but(num_inference_steps=max_steps)


def remdm(
    strategy: str = "cap",
    eta: float = 0.02,
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    mask_schedule: MaskSchedule = "cosine",
    temperature: ValueSchedule = (2.0, 0.0),
    **drawing: Any,
) -> Rule:
    """Known tokens are masked again at random, or the improbable ones (ReMDM, arXiv 2503.00307)."""
    return _rule("logprob", ReMDM(Ratio(mask_schedule), temperature, strategy, eta, interval), **drawing)


def path_planning(
    eta: float = 1.0,
    *,
    mask_schedule: MaskSchedule = "cosine",
    temperature: ValueSchedule = (2.0, 0.0),
    **drawing: Any,
) -> Rule:
    """Known tokens compete with drawn ones by the probability they have now (P2, arXiv 2502.03540)."""
    return _rule("logprob", PathPlanning(Ratio(mask_schedule), temperature, eta), rows="all", **drawing)


def informed_correction(
    num_tokens: int = 8, steps: Collection[int] | None = None, variant: str = "paper", **shared: Any
) -> Rule:
    """MaskGIT, with the least likely known tokens drawn anew at some steps (arXiv 2407.21243)."""
    return maskgit(**shared).but(revisit=Correction(num_tokens, steps, variant))


SAMPLERS: dict[str, Callable[..., Rule]] = {
    function.__name__: function
    for function in (
        maskgit, random, halton, checkerboard, margin, entropy, max_probability, moment, entropy_bound, threshold,
        factor, klass, remdm, path_planning, informed_correction,
    )
}  # fmt: skip
