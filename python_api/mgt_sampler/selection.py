"""Which drawn tokens stay: the last part of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mgt_kernels import mask_by_confidence
from mgt_kernels.ops import Sampled

from .counts import Ratio
from .schedules import ValueSchedule, frozen_values, value_at
from .state import State


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

    count: Callable[[State], Tensor] = field(default_factory=Ratio)
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
