"""One step of a masked generative model: draw, score, select. A rule says how, a state what a generation remembers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mgt_kernels.ops import Sampled

from .clock import at_step
from .draw import Draw
from .schedules import ValueSchedule, frozen_values, value_at
from .selection import MaskLowest
from .state import Logits, State

# from tokens (B, N) and a guidance scale the logits (B, N, V) and, where the scale makes a difference, the
# unconditional ones
Predict: TypeAlias = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]

# the statistics of `mgt_kernels.Sampled` that order positions, each with a sign that makes the larger one the sooner
SCORES = {"logprob": 1, "logit": 1, "max_logprob": 1, "margin": 1, "entropy": -1}


@dataclass(frozen=True)
class Rule:
    """What a step does, as a record of functions: a sampler is one of these, and any of them may be one's own.

    Attributes:
        draw: (logits, state, names of statistics) -> `Sampled`: a token for every masked position. It may write to
            state.memory. One that has `takes_rows` is given logits of rows as they are (`Logits.rows`), any other with
            all positions, NaN at known ones. See `Draw`.
        score: what orders the positions, higher is sooner: a name of SCORES, or (sampled, state) -> (B, N) float32;
            what it says of known positions is not looked at. See `order`.
        select: (sampled, score, state) -> tokens (B, N): which drawn tokens stay. Known positions have score +inf. See
            `selection`. Score and select may have an attribute `statistics`, the names that they read of `Sampled`;
            a select that reads those of known positions has `reads_known`.
        revisit: (state before, state after, predict) -> tokens (B, N) with known ones masked again, from which the step
            is then taken once more; or None, which leaves the step at that. See `ZSampling` and `Correction`.
        guidance_scale: s of u + s (c - u), as for `generate`.
        num_inference_steps: T, where nothing else is said.
    """

    draw: Callable[[Logits | None, State, tuple[str, ...]], Sampled] = field(default_factory=Draw)
    score: str | Callable[[Sampled, State], Tensor] = "logprob"
    select: Callable[[Sampled, Tensor, State], Tensor] = field(default_factory=MaskLowest)
    revisit: Callable[[State, State, Predict], Tensor | None] | None = None
    guidance_scale: ValueSchedule = 1.0
    num_inference_steps: int = 12

    def __post_init__(self) -> None:
        """Check what can be checked before a generation."""
        if isinstance(self.score, str):
            if self.score not in SCORES:
                raise ValueError(f"score: expected one of {', '.join(SCORES)} or a function, got {self.score!r}")
        for name in ("draw", "score", "select", "revisit"):
            value = getattr(self, name)
            by_name = name == "score" and isinstance(value, str)
            if not (callable(value) or by_name or (name == "revisit" and value is None)):
                raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
        if getattr(self.select, "reads_known", False) and getattr(self.draw, "rows", "all") != "all":
            raise ValueError(
                "draw: expected one with rows 'all', for the selection reads what the model says of known tokens"
            )
        object.__setattr__(self, "guidance_scale", frozen_values("guidance_scale", self.guidance_scale))

    def but(self, **changes: Any) -> Rule:
        """The same rule with other functions."""
        return replace(self, **changes)

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """What the draw must return beside logprob."""
        by_name = isinstance(self.score, str) and self.score != "logprob"
        of_score = (self.score,) if by_name else getattr(self.score, "statistics", ())
        return tuple(dict.fromkeys((*of_score, *getattr(self.select, "statistics", ()))))

    @property
    def ends_early(self) -> bool:
        """Whether a generation may be done before its last step."""
        return bool(getattr(self.select, "ends_early", False))


class Drawn(NamedTuple):
    """One draw of a step.

    Attributes:
        sampled: what was drawn.
        tokens: int64 (B, N), what became of it, masked positions among them.
        divergence: float32 (B, N), nats, to the previous draw's distribution; None without differential sampling.
    """

    sampled: Sampled
    tokens: Tensor
    divergence: Tensor | None


def take_step(rule: Rule, logits: Logits | None, state: State) -> tuple[State, Drawn]:
    """Draw, score, select and write: the only place where these meet.

    Args:
        rule: how.
        logits: the model's, of state.tokens; None: those of the last step, carried on by the draw's momentum.
        state: stays as it is.

    Returns:
        The state with the step's tokens and one draw more, still of the same step; and what was drawn.
    """
    after = state.but()
    if logits is not None and logits.rows is not None and not getattr(rule.draw, "takes_rows", False):
        logits = logits.whole((state.tokens.shape[0], state.tokens.shape[1]))
    sampled = rule.draw(logits, after, rule.statistics)
    if rule.score == "logprob":
        score = sampled.logprob
    else:
        if isinstance(rule.score, str):
            score = SCORES[rule.score] * getattr(sampled, rule.score)
        else:
            score = rule.score(sampled, after)
        score = score.masked_fill(state.tokens != state.mask_token_id, torch.inf)
    after.tokens = rule.select(sampled, score, after)
    after.num_draws = state.num_draws + 1
    differential = after.memory.get("differential")
    return after, Drawn(sampled, after.tokens, None if differential is None else differential.divergence)


def take_steps(
    rule: Rule, predict: Predict, state: State, *, skip: Collection[int] = ()
) -> Iterator[tuple[State, tuple[Drawn, ...]]]:
    """Take the steps that are left, and yield the state after each, with its draws: one, or two with a revisit.

        state = begin(tokens, seed=seeds, mask_token_id=8255, num_inference_steps=12)
        for state, draws in take_steps(rule, predict, state):
            torch.save(state, "state.pt")          # from which another process goes on with the same tokens

    Args:
        rule: how.
        predict: (tokens, guidance scale) -> the model's logits (B, N, V), and the unconditional ones, or None where the
            scale is 0 or 1 and one half will do. Where it has a method `look`, (tokens, guidance scale) -> `Logits`,
            that is what steps call, and a revisit alone calls the function.
        state: where to go on.
        skip: steps that do without the model, as for `generate`.
    """
    while state.step < state.num_inference_steps and not (rule.ends_early and state.is_done()):
        k, before = state.step, state
        with at_step(k, state.num_inference_steps):
            if k in skip:
                state, drawn = take_step(rule, None, before)
                draws: tuple[Drawn, ...] = (drawn,)
            else:
                scale = value_at("guidance_scale", rule.guidance_scale, state)
                state, drawn = take_step(rule, look(predict, state.tokens, scale), before)
                draws = (drawn,)
                tokens = None if rule.revisit is None else rule.revisit(before, state, predict)
                if tokens is not None:
                    again = state.but(tokens=tokens)
                    state, drawn = take_step(rule, look(predict, tokens, scale), again)
                    draws = (*draws, drawn)
        state.step = k + 1
        yield state, draws


def look(predict: Predict, tokens: Tensor, scale: float) -> Logits:
    """One look at the model."""
    own = getattr(predict, "look", None)
    if own is not None:
        found: Logits = own(tokens, scale)
        return found
    logits, uncond_logits = predict(tokens, scale)
    return Logits(logits, uncond_logits, 1.0 if uncond_logits is None else scale)


def begin(
    tokens: Tensor,
    *,
    seed: Tensor,
    mask_token_id: int,
    num_inference_steps: int,
    first_position: int | Tensor = 0,
    backend: str = "auto",
    memory: Mapping[str, Any] | None = None,
) -> State:
    """The state of a generation of which no step was taken.

    Args:
        tokens: int64 (B, N), mask_token_id where a token is wanted; the others stay.
        seed: int64 (B,).
        mask_token_id: marks masked positions.
        num_inference_steps: T, at least 1.
        first_position: an int or (B,): the place of the first token in its sequence, of which the noise is a function.
        backend: of `mgt_kernels`.
        memory: what the rule's functions find in state.memory at the first step.
    """
    keep = tokens != mask_token_id
    return State(
        tokens=tokens,
        seed=seed,
        mask_token_id=mask_token_id,
        num_inference_steps=num_inference_steps,
        keep=keep,
        num_masked_at_start=(~keep).sum(-1).float(),
        first_position=first_position,
        backend=backend,
        memory=dict(memory or {}),
    )
