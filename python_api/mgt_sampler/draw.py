"""The draw of a step: a token for every masked position."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mgt_kernels import differential_sample, sample_tokens
from mgt_kernels.ops import Sampled

from .arguments import kind
from .schedules import ValueSchedule, frozen_values, value_at
from .state import Logits, State
from .techniques import Differential, Extrapolation, guided_logits


@dataclass(frozen=True)
class Draw:
    """A draw from softmax((u + s (c - u) + noise_scale eps) / temperature), in one read of the logits.

    See `mgt_kernels.sample_tokens`, which computes it, and `mgt_kernels.differential_sample`. Logits of rows alone
    (`Logits.rows`) give what those of all positions give, bit for bit. With them momentum carries on the positions that
    the call before had too, and the other ones stay as they are.

    Attributes:
        temperature: of the draw, 0 for the likeliest token or at least 1e-30; a schedule, as for `generate`.
        noise_scale: Gaussian noise on the logits in nats, at least 0; a schedule (arXiv 2411.10781).
        top_k: keep the so many likeliest tokens; a float in (0, 1]: that share of all, rounded up; None: all.
        top_p: keep the fewest tokens that have this much of the probability; 1: all.
        min_p: keep the tokens that have this share of the likeliest one's probability; 0: all.
        differential: draw what changed least since the previous draw from what did change; None: don't. It goes with
            neither top_k, top_p nor min_p.
        momentum: carry the guided logits on along their change since the previous model call, times this; a schedule.
        forbidden: tokens that are never drawn, such as the end of a text.
        rows: which positions' statistics are worked out, "masked" or "all"; the masked ones alone are drawn.

    Raises:
        TypeError: an attribute of the wrong type.
        ValueError: an attribute out of range.
    """

    temperature: ValueSchedule = 1.0
    noise_scale: ValueSchedule = 0.0
    top_k: int | float | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    differential: Differential | None = None
    momentum: ValueSchedule = 0.0
    forbidden: tuple[int, ...] = ()
    rows: str = "masked"
    takes_rows = True

    def __post_init__(self) -> None:
        """Check the attributes."""
        if not (self.differential is None or isinstance(self.differential, Differential)):
            raise TypeError(f"differential: expected a Differential or None, got {kind(self.differential)}")
        if self.differential is not None and not (self.top_k is None and self.top_p == 1 and self.min_p == 0):
            raise ValueError("differential: expected None with top_k, top_p or min_p")
        if isinstance(self.top_k, float) and not 0 < self.top_k <= 1:
            raise ValueError(f"top_k: expected an int, or a share in (0, 1], got {self.top_k}")
        if self.rows not in ("masked", "all"):
            raise ValueError(f"rows: expected 'masked' or 'all', got {self.rows!r}")
        if self.differential is not None and self.rows == "all":
            raise ValueError("rows: expected 'masked' with differential, got 'all'")
        for name, minimum in (("temperature", 0.0), ("noise_scale", 0.0), ("momentum", None)):
            object.__setattr__(self, name, frozen_values(name, getattr(self, name), minimum))
        object.__setattr__(self, "forbidden", tuple(map(int, self.forbidden)))
        if isinstance(self.momentum, tuple) and not any(self.momentum):
            # with any other, the logits are copied
            object.__setattr__(self, "momentum", 0.0)

    def __call__(self, logits: Logits | None, state: State, statistics: tuple[str, ...] = ()) -> Sampled:
        """Draw; with momentum or differential sampling, remember the step in state.memory.

        Args:
            logits: of the model; None: those of its last call, carried on.
            state: of the generation.
            statistics: the names of those to return, see `mgt_kernels.Sampled`.
        """
        if logits is not None and logits.rows is not None:
            if self.rows == "all":
                raise ValueError(
                    "logits: expected those of all positions for a draw with rows 'all', which reads known ones, "
                    "got rows alone"
                )
            if self.differential is not None or self.momentum != 0.0 or "extrapolation" in state.memory:
                # what these remember has a place for every position
                logits = logits.whole((state.tokens.shape[0], state.tokens.shape[1]))
        if self.momentum != 0.0 or "extrapolation" in state.memory:
            # the one of a step that raises must not be kept
            seen = copy.copy(state.memory.get("extrapolation") or Extrapolation())
            if logits is not None:
                seen.observe(guided_logits(logits.logits, logits.uncond_logits, logits.guidance_scale))
            logits = Logits(seen.logits(value_at("momentum", self.momentum, state)))
            state.memory["extrapolation"] = seen
        if logits is None:
            raise ValueError("logits: expected the model's, got None in a generation that remembers none")
        arguments = {
            "uncond_logits": logits.uncond_logits,
            "guidance_scale": logits.guidance_scale,
            "noise_scale": value_at("noise_scale", self.noise_scale, state),
            "temperature": value_at("temperature", self.temperature, state),
            "first_position": state.first_position,
            "allowed": _allowed(self.forbidden, logits.logits.shape[-1], logits.logits.device)
            if self.forbidden
            else None,
            **state.draw_arguments,
        }
        if self.differential is None:
            arguments |= {
                "top_k": self._top_k(logits.logits.shape[-1]),
                "top_p": self.top_p,
                "min_p": self.min_p,
                "rows": self.rows,
                "statistics": statistics,
            }
            if logits.rows is not None:
                return _sample_rows(logits, state, arguments)
            return sample_tokens(logits.logits, state.tokens, **arguments)
        if statistics:
            raise ValueError(f"score: differential sampling knows the logprob alone, not {', '.join(statistics)}")
        token_ids, logprob, state.memory["differential"] = differential_sample(
            logits.logits,
            state.tokens,
            state.memory.get("differential"),
            share=self.differential.share,
            variant=self.differential.variant,
            aliased_history=self.differential.aliased_history,
            **arguments,
        )
        return Sampled(token_ids, logprob)

    def _top_k(self, vocabulary: int) -> int | None:
        return math.ceil(self.top_k * vocabulary) if isinstance(self.top_k, float) else self.top_k


def _sample_rows(logits: Logits, state: State, arguments: dict[str, Any]) -> Sampled:
    """`sample_tokens` of logits (R, V) as R samples of one position, each with its own seed and place."""
    assert logits.rows is not None
    rows, (batch_size, num_positions) = logits.rows, state.tokens.shape
    sample = rows // num_positions
    first = state.first_position
    place = rows - sample * num_positions + (first[sample] if isinstance(first, Tensor) and first.ndim else first)
    masks = torch.full_like(rows, state.mask_token_id)[:, None]
    try:
        drawn = sample_tokens(
            logits.logits[:, None], masks, **{**arguments, "seed": state.seed[sample], "first_position": place}
        )
    except ValueError:
        # the message of this one has the sample and the position, not the row
        sample_tokens(logits.whole((batch_size, num_positions)).logits, state.tokens, **arguments)
        raise

    def placed(name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        whole = state.tokens.flatten() if name in ("token_ids", "argmax") else value.new_full((), torch.inf)
        whole = whole.expand(batch_size * num_positions).contiguous() if whole.ndim == 0 else whole.clone()
        return whole.scatter_(0, rows, value[:, 0]).view(batch_size, num_positions)

    return Sampled(*(placed(*item) for item in drawn._asdict().items()))  # type: ignore[arg-type]


@lru_cache
def _allowed(forbidden: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    allowed = torch.ones(vocabulary, dtype=torch.bool, device=device)
    allowed[list(forbidden)] = False
    return allowed


@dataclass(frozen=True)
class ScoredAt:
    """A draw whose logprob is that of another law than the one drawn from, at one more read of the logits.

    Muse and LLaDA draw at a temperature, of the likeliest tokens alone, and rank by softmax(l / score_temperature).

    Attributes:
        draw: what is drawn from.
        score_temperature: of the law that logprob belongs to, all tokens kept.
    """

    draw: Draw
    score_temperature: float = 1.0
    takes_rows = True

    @property
    def rows(self) -> str:
        """Those of the draw."""
        return self.draw.rows

    def __call__(self, logits: Logits | None, state: State, statistics: tuple[str, ...] = ()) -> Sampled:
        """Draw, as `Draw` does."""
        sampled = self.draw(logits, state, tuple(dict.fromkeys((*statistics, "logit"))))
        whole = replace(self.draw, temperature=self.score_temperature, top_k=None, top_p=1.0, min_p=0.0)
        logsumexp = whole(logits, state, ("logsumexp",)).logsumexp
        assert sampled.logit is not None and logsumexp is not None
        logprob = sampled.logit / self.score_temperature - logsumexp
        return sampled._replace(logprob=torch.where(state.masked, logprob, torch.inf))
