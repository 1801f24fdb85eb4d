"""Confidence intervals over groups of seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and half the width of its 95 % interval, float64 of one shape; NaN where there is none."""

    value: Tensor
    half_width: Tensor


def jackknife(statistic: Callable[[list[int]], dict[str, Tensor]], num_groups: int) -> dict[str, Estimate]:
    """95 % intervals of statistics of all images, by leaving out one group of seeds at a time.

        theta_g = the statistic without group g          half_width = t_{0.975, S - 1} SE
        SE^2    = (S - 1) / S sum_g (theta_g - mean theta)^2

    For a mean over groups of one size, SE is the usual standard error of the mean over groups. Unlike means over groups
    of a statistic such as the Fréchet distance, it speaks of the statistic of all images, whose bias is smaller.

    Args:
        statistic: of the groups of these numbers, tensors by name; Student's t asks for nearly normal ones.
        num_groups: S, two at least.

    Returns:
        The statistics of all groups with their intervals. Source: Efron and Stein, "The Jackknife Estimate of Variance"
        (1981), with groups for single observations.

    Raises:
        ValueError: fewer than two groups.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups: an interval needs two at least, got {num_groups}")
    everything = list(range(num_groups))
    values = statistic(everything)
    without = [statistic([i for i in everything if i != left_out]) for left_out in everything]
    quantile = float(stats.t.ppf(0.975, num_groups - 1))
    estimates = {}
    for name, value in values.items():
        variance = torch.stack([each[name].double() for each in without]).var(0, correction=0)
        estimates[name] = Estimate(value.double(), quantile * ((num_groups - 1) * variance).sqrt())
    return estimates
