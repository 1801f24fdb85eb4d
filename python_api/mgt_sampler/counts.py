"""How many positions stay masked after a step: functions of the state that give int64 (B,)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import MaskSchedule, checked_mask_schedule, ratio_at
from .state import State


@dataclass(frozen=True)
class Ratio:
    """MaskGIT's count (arXiv 2202.04200), with M_0 the masked positions of a sample at the start, M_k before step k::

        max(at_least, min(M_k - at_a_time, floor(M_0 gamma((k + 1) / T))))       0 where nothing is masked

    Attributes:
        schedule: gamma, a name that `schedules.mask_ratio` knows, T ratios in [0, 1], or a function of (k, T).
        at_least: how many stay masked before the last step.
        at_a_time: how many become known at least.
    """

    schedule: MaskSchedule | Callable[[int, int], float] = "cosine"
    at_least: int = 1
    at_a_time: int = 1

    def __post_init__(self) -> None:
        """Check the schedule."""
        if callable(self.schedule):
            return
        schedule = checked_mask_schedule(self.schedule)
        object.__setattr__(self, "schedule", schedule if isinstance(schedule, str) else tuple(schedule))

    def __call__(self, state: State) -> Tensor:
        """Masked positions after the step."""
        return self.left(state.num_masked(), ratio_at(self.schedule, state), state.num_masked_at_start)

    def left(self, num_masked: Tensor, ratio: float, num_masked_at_start: Tensor) -> Tensor:
        """What is left of M_k masked positions at a ratio."""
        # rounded to float32, as the published samplers compute it; a fill does not wait for the device
        wanted = torch.floor(num_masked.new_full((), ratio, dtype=torch.float32) * num_masked_at_start).long()
        left = torch.minimum(wanted, num_masked - self.at_a_time)
        return left.clamp(min=self.at_least).minimum(num_masked)


@dataclass(frozen=True)
class Known:
    """A schedule of known positions, M_0 - max(k + 1, floor(M_0 known(k, T))), as Halton-MaskGIT has it.

    Attributes:
        share: (k, T) -> the share of M_0 that is known after step k.
    """

    share: Callable[[int, int], float]

    def __call__(self, state: State) -> Tensor:
        """Masked positions after the step."""
        share = self.share(state.step, state.num_inference_steps)
        known = (share * state.num_masked_at_start).floor().clamp(min=state.step + 1)
        return (state.num_masked_at_start - known).long().clamp(min=0).minimum(state.num_masked())


def even_split(state: State) -> Tensor:
    """Equally many become known in each of the T steps, one more in the first of them where T does not divide M_0.

    LLaDA (arXiv 2502.09992).
    """
    start, steps, taken = state.num_masked_at_start.long(), state.num_inference_steps, state.step + 1
    return (start - start // steps * taken - (start % steps).clamp(max=taken)).minimum(state.num_masked())


@dataclass(frozen=True)
class LinearTime:
    """M_k - floor(M_k (1 - t_{k+1} / t_k)), with t falling in T equal parts from 1 to `end` (Dream, arXiv 2508.15487).

    For each sample by itself, where the original takes the mean of the batch. The last step leaves none.
    """

    end: float = 1e-3

    def __call__(self, state: State) -> Tensor:
        """Masked positions after the step."""
        num_masked, k, steps = state.num_masked(), state.step, state.num_inference_steps
        if k == steps - 1:
            return torch.zeros_like(num_masked)
        times = torch.linspace(1, self.end, steps + 1, dtype=torch.float32, device="cpu").tolist()
        return num_masked - (num_masked * (1 - times[k + 1] / times[k])).floor().long()


@dataclass(frozen=True)
class ShiftedTime:
    """The time-shifted schedule of OmniVoice: ceil(M_0 (t'_{k+1} - t'_k)) become known, t' = s t / (1 + (s - 1) t).

    Attributes:
        shift: s; below 1 the first steps make few positions known.
    """

    shift: float = 0.1

    def __call__(self, state: State) -> Tensor:
        """Masked positions after the step."""
        num_masked, k, steps = state.num_masked(), state.step, state.num_inference_steps
        if k == steps - 1:
            return torch.zeros_like(num_masked)
        # in float32, as the original
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float32, device="cpu")
        t = self.shift * t / (1 + (self.shift - 1) * t)
        drawn = (state.num_masked_at_start * float(t[k + 1] - t[k])).ceil().long()
        return (num_masked - drawn).clamp(min=0)


@dataclass(frozen=True)
class OfFirstSample:
    """The first sample's count for all of a batch, as TiTok and MaskBit have it: a quirk of theirs.

    Attributes:
        count: how many stay masked.
    """

    count: Callable[[State], Tensor]

    def __call__(self, state: State) -> Tensor:
        """Masked positions after the step."""
        counts = self.count(state)
        return counts[:1].expand_as(counts).minimum(state.num_masked()).contiguous()


def cosine_before(k: int, num_inference_steps: int) -> float:
    """cos(pi / 2 (k + 1) / (T - 1)), where tokens are masked before the model's call: the next call's ratio."""
    progress = torch.linspace(0, 1, num_inference_steps, dtype=torch.float32, device="cpu")[k + 1]
    return float(torch.cos(progress * math.pi / 2))


def arccos_known(k: int, num_inference_steps: int) -> float:
    """1 - 2 / pi acos((k + 1) / T), the known share of Halton-MaskGIT, in float32 as there."""
    return _arccos_share(torch.tensor((k + 1) / num_inference_steps, dtype=torch.float32, device="cpu"))


def arccos_known_from_0(k: int, num_inference_steps: int) -> float:
    """1 - 2 / pi acos(k / (T - 1)), that of its sampler by confidence."""
    return _arccos_share(torch.linspace(0, 1, num_inference_steps, dtype=torch.float32, device="cpu")[k])


def _arccos_share(progress: Tensor) -> float:
    return float(1 - torch.arccos(progress) / (math.pi * 0.5))
