"""How many positions stay masked after a step: functions of the state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .schedules import MaskSchedule, checked_mask_schedule, mask_len, ratio_at
from .state import State


@dataclass(frozen=True)
class Ratio:
    """MaskGIT's count: max(1, min(M_k - 1, floor(M_0 gamma((k + 1) / T)))), and 0 where nothing is masked.

    M_0 are the masked positions of the sample at the start, M_k those before step k (arXiv 2202.04200).

    Attributes:
        schedule: gamma, a name that `schedules.mask_ratio` knows or T ratios in [0, 1].
    """

    schedule: MaskSchedule = "cosine"

    def __post_init__(self) -> None:
        """Check the schedule."""
        schedule = checked_mask_schedule(self.schedule)
        object.__setattr__(self, "schedule", schedule if isinstance(schedule, str) else tuple(schedule))

    def __call__(self, state: State) -> Tensor:
        """Masked positions after the step, int64 (B,)."""
        return mask_len(state.num_masked(), ratio_at(self.schedule, state), state.num_masked_at_start)
