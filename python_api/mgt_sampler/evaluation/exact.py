"""Samplers against the truth: how far what they draw is from a distribution that is known (arXiv 2602.19619)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import sampling
from ..arguments import integer
from ..files import whole_file
from ..models.markov import MarkovModel, total_variation
from ..tables import aligned
from .configurations import Configuration, load_configurations
from .intervals import Estimate, jackknife
from .run import Metric, shown

STEPS = (1, 2, 3, 6)
_DISTANCE = Metric("total variation", "lower", digits=3)


@dataclass(frozen=True)
class ExactResult:
    """How far the samples of one technique are from the truth at some numbers of steps."""

    name: str
    distances: tuple[Estimate, ...]
    """Total variation, 0 to 1, for each number of steps: the mean over seeds."""


def judge_exactly(
    techniques: Sequence[Configuration] | None = None,
    *,
    steps: Sequence[int] = STEPS,
    num_samples: int = 4000,
    num_seeds: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[ExactResult], float]:
    """Draw from a Markov chain, whose every conditional is known, with each technique.

    Every step reveals equally many tokens. One token a step in random order is exact; all that remains of the distance
    is then the noise of the samples.

    Args:
        techniques: arguments of `generate` or of a sampler, without the number of steps and the mask schedule; the
            shipped list "exact" by default.
        steps: numbers of steps that divide the 6 tokens of the chain.
        num_samples: sequences for each seed, technique and number of steps.
        num_seeds: over which the intervals are, two at least.
        seed: the first of them.
        progress: show a progress bar.

    Returns:
        The results, and the distance that exact samples have by their noise alone.

    Raises:
        TypeError, ValueError: a number of the wrong type or out of range, or a technique that `generate` refuses.
    """
    num_samples, num_seeds, seed = (
        integer(name, value) for name, value in (("num_samples", num_samples), ("num_seeds", num_seeds), ("seed", seed))
    )
    if num_seeds < 2:
        raise ValueError(f"num_seeds: an interval needs two at least, got {num_seeds}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected 1 at least, got {num_samples}")
    techniques = techniques or load_configurations("exact")
    for technique in techniques:
        if technique.merging is not None or technique.quantization is not None:
            raise ValueError(f"{technique.name}: expected no merge and no quantization: a chain has no transformer")
    model = MarkovModel()
    for num_steps in steps:
        if integer("steps", num_steps) < 1 or model.num_tokens % num_steps:
            raise ValueError(f"steps: expected divisors of {model.num_tokens}, got {num_steps}")
    results, noise = [], 0.0
    with tqdm(total=len(techniques) * len(steps) * num_seeds, disable=not progress) as bar:
        for technique in techniques:
            distances = []
            for num_steps in steps:
                bar.set_description(f"{technique.name}, {num_steps} steps")
                found = []
                for s in range(seed, seed + num_seeds):
                    output = sampling.generate(
                        model,
                        num_samples=num_samples,
                        seed=s,
                        progress=False,
                        **technique.generate_arguments(
                            num_inference_steps=num_steps,
                            # "linear" falls short of whole tokens in float32
                            mask_schedule=[1 - (k + 1) / num_steps for k in range(num_steps)],
                        ),
                    )
                    distance, noise = total_variation(model, output.tokens)
                    found.append(distance)
                    bar.update()
                distances.append(_interval(found))
            results.append(ExactResult(technique.name, tuple(distances)))
    return results, noise


def exact_table(results: Sequence[ExactResult], noise: float, steps: Sequence[int] = STEPS) -> str:
    """Lay the results out as text."""
    rows = [["total variation, steps:", *map(str, steps)]]
    rows += [[result.name, *(shown(distance, _DISTANCE) for distance in result.distances)] for result in results]
    rows.append(["exact samples", *[f"{noise:.3f}"] * len(steps)])
    return aligned(rows)


def save_exact_plot(
    results: Sequence[ExactResult], noise: float, path: str | Path, steps: Sequence[int] = STEPS
) -> None:
    """Draw total variation over the number of steps, with its intervals and the noise of exact samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ax = figure.subplots()
    for i, result in enumerate(results):
        value, half_width = (
            torch.stack([getattr(distance, name) for distance in result.distances]) for name in ("value", "half_width")
        )
        # side by side, so that equal distances do not hide each other
        at = torch.tensor(steps, dtype=torch.float32, device="cpu") + 0.04 * (i - (len(results) - 1) / 2)
        ax.errorbar(at, value, yerr=half_width, marker="o", ms=4, capsize=2, lw=1, label=result.name)
    ax.axhline(noise, color="0.35", ls="--", lw=1, label="exact samples")
    ax.set_xticks(steps)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("steps, of 6 tokens")
    ax.set_ylabel("total variation to the truth")
    ax.grid(color="0.93")
    figure.legend(loc="outside right upper", frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _interval(values: Sequence[float]) -> Estimate:
    numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    return jackknife(lambda kept: {"mean": numbers[kept].mean()}, len(values))["mean"]
