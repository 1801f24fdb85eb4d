"""Plots of an evaluation: PNG files, without a window."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import whole_file
from ..images import image_grid
from .intervals import Estimate
from .run import METRICS, STEP_METRICS, Metric, Result, hidden_metrics

_BASELINE = "0.35"
_DOTS = (
    *("accuracy", "frechet_distance", "kernel_distance", "density", "coverage", "spread", "entropy", "unique"),
    *("divergence", "model_calls"),
)
_LOG = ("frechet_distance", "kernel_distance")
_SHARES = {"win": "tab:green", "tie": "0.8", "loss": "tab:red"}


def save_plots(results: Sequence[Result], out: str | Path) -> list[Path]:
    """Draw what `run.evaluate` found.

    Args:
        results: the first is the baseline.
        out: the folder.

    Returns:
        The paths of metrics.png (a dot and its interval for each metric and configuration), metrics_<family>.png (the
        same of one family beside the baseline), steps.png (curves over the steps), winning_rates.png, calls.png
        (Fréchet distance against model calls) and grid.png (images of the same seeds).
    """
    if not results:
        raise ValueError("results: expected one at least, got none")
    Path(out).mkdir(parents=True, exist_ok=True)
    figures = {
        "metrics": _metrics(results),
        "steps": _steps(results),
        "winning_rates": _winning_rates(results),
        "calls": _calls(results),
        "grid": _grid(results),
    }
    families = list(dict.fromkeys(map(_family, results)))
    for family in families if len(families) > 1 else ():
        members = [result for result in results if _family(result) == family or result is results[0]]
        name = re.sub(r"[^\w.]+", "-", family).lower()
        figures[f"metrics_{name}"] = _metrics(members)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(out) / f"{name}.png")
        with whole_file(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return paths


def _metrics(results: Sequence[Result]) -> Figure:
    dots = [*_DOTS, *(name for name in ("token_nll", "nll", "weight_bytes") if name not in hidden_metrics(results))]
    if "weight_bytes" in dots:
        # what quantization changes is the time of a call, not their number
        dots[dots.index("model_calls")] = "seconds"
    columns = math.ceil(len(dots) / 2)
    figure = Figure(figsize=(3 + 2.2 * columns, 2 * (1.2 + 0.23 * len(results))), layout="constrained")
    axes = figure.subplots(2, columns, sharey=True).flatten()
    for ax in axes[len(dots) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, dots, strict=False):
        metric = METRICS[name]
        for row, result in enumerate(results):
            value, half_width = _numbers(result.estimates[name], metric)
            ax.errorbar(value, row, xerr=half_width, fmt="o", ms=4, capsize=2, color=_colours(results)[row])
        ax.axvline(_numbers(results[0].estimates[name], metric)[0], color=_BASELINE, lw=0.8, ls=":")
        if name in _LOG:
            _log_axis(ax, "x", [_numbers(result.estimates[name], metric)[0] for result in results])
        arrow = {"higher": " →", "lower": " ←", "": ""}[metric.better]
        ax.set_title(f"{metric.label}{arrow}", fontsize=10)
        ax.grid(axis="y", color="0.93")
        ax.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(results)), [result.configuration.name for result in results])
    axes[0].invert_yaxis()
    figure.suptitle(f"95 % intervals over seeds, {results[0].num_images} images each; arrows point to the better side")
    return figure


def _steps(results: Sequence[Result]) -> Figure:
    """A column for each family, with the baseline in all of them."""
    families = list(dict.fromkeys(map(_family, results)))
    figure = Figure(figsize=(1 + 3.0 * max(len(families), 2), 9), layout="constrained")
    axes = figure.subplots(len(STEP_METRICS), len(families), sharex=True, sharey="row", squeeze=False)
    for column, family in enumerate(families):
        members = [result for result in results if _family(result) == family and result is not results[0]]
        for ax, (name, metric) in zip(axes[:, column], STEP_METRICS.items(), strict=True):
            _curve(ax, results[0], name, metric, color=_BASELINE, ls="--")
            for i, result in enumerate(members):
                _curve(ax, result, name, metric, color=f"C{i}")
            ax.grid(color="0.93")
            if column == 0:
                ax.set_ylabel(metric.label)
        axes[0, column].set_title(family)
        axes[-1, column].set_xlabel("share of the steps done")
        axes[-1, column].legend(
            *axes[0, column].get_legend_handles_labels(), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2)
        )
    # on rows that share it one axis stands for all
    for ax, name in zip(axes[:, 0], STEP_METRICS, strict=True):
        values = torch.cat([result.estimates[name].value for result in results])
        # the first step has none; a skipped one may repeat the step before to the last bit
        _log_axis(ax, "y", values[values > 0].tolist())
    return figure


def _winning_rates(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(results)), layout="constrained")
    ax = figure.subplots()
    others = results[1:] or results
    for row, result in enumerate(others):
        left = 0.0
        for name, colour in _SHARES.items():
            share, half_width = _numbers(result.estimates[name], METRICS[name])
            ax.barh(row, share, left=left, color=colour, height=0.75, label=name if row == 0 else None)
            left += share
            if name != "loss":
                # the borders of the middle bar: where winning ends, and below it where losing begins
                edge, offset = (
                    (half_width, -0.15)
                    if name == "win"
                    else (_numbers(result.estimates["loss"], METRICS["loss"])[1], 0.15)
                )
                ax.errorbar(left, row + offset, xerr=edge, color="black", capsize=1.5, lw=1)
    ax.axvline(50, color=_BASELINE, lw=0.8, ls=":")
    ax.set_yticks(range(len(others)), [result.configuration.name for result in others])
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"% of the prompts, against {results[0].configuration.name}, by the classifier's log-probability")
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def _calls(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    ax = figure.subplots()
    calls = [_numbers(result.estimates["model_calls"])[0] for result in results]
    distances = [_numbers(result.estimates["frechet_distance"]) for result in results]
    reference = sorted(
        (x, distance)
        for x, (distance, _), result in zip(calls, distances, results, strict=True)
        if _family(result) == _family(results[0])
    )
    ax.plot(*zip(*reference, strict=True), color=_BASELINE, ls="--", lw=1)
    spacing = max(1.0, max(calls) - min(calls)) / 100
    for i, (result, (distance, half_width)) in enumerate(zip(results, distances, strict=True)):
        # those of equal cost stand side by side
        column = [j for j, other in enumerate(calls) if other == calls[i]]
        x = calls[i] + spacing * (column.index(i) - (len(column) - 1) / 2)
        label = f"{i + 1}  {result.configuration.name}"
        ax.errorbar(x, distance, yerr=half_width, fmt="o", ms=5, capsize=2, color=_colours(results)[i], label=label)
        # every other number below its interval, for close ones would run into each other
        above = column.index(i) % 2 == 0
        ax.annotate(
            str(i + 1),
            (x, distance + half_width if above else max(distance - half_width, 0.5 * distance)),
            (0, 3 if above else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
        )
    _log_axis(ax, "y", [distance for distance, _ in distances])
    ax.set_xlabel("model calls per image (configurations of equal cost side by side)")
    ax.set_ylabel("Fréchet distance, classifier features")
    ax.grid(color="0.93")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _grid(results: Sequence[Result]) -> Figure:
    images = torch.cat([result.examples for result in results])
    num_columns = len(results[0].examples)
    picture = image_grid(images, num_columns=num_columns, scale=2)
    cell = picture.height / len(results)
    figure = Figure(figsize=(1.5 + picture.width / 80, picture.height / 80), layout="constrained")
    ax = figure.subplots()
    ax.imshow(picture)
    ax.set_yticks([(row + 0.5) * cell for row in range(len(results))], [r.configuration.name for r in results])
    ax.set_xticks([(c + 0.5) * picture.width / num_columns for c in range(num_columns)], results[0].class_names)
    ax.tick_params(length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    return figure


def _curve(ax: Axes, result: Result, name: str, metric: Metric, **style: Any) -> None:
    estimate = result.estimates[name]
    value, half_width = ((x * metric.factor).numpy() for x in (estimate.value, estimate.half_width))
    done = np.arange(1, len(value) + 1) / len(value)
    ax.plot(done, value, marker=".", ms=4, lw=1.2, label=result.configuration.name, **style)
    ax.fill_between(done, value - half_width, value + half_width, alpha=0.2, lw=0, color=style["color"])


def _numbers(estimate: Estimate, metric: Metric | None = None) -> tuple[float, float]:
    """A scalar and half its interval as they are shown, 0 where it has none."""
    factor = 1.0 if metric is None else metric.factor
    return float(estimate.value) * factor, float(estimate.half_width.nan_to_num()) * factor


def _family(result: Result) -> str:
    return result.configuration.family


def _colours(results: Sequence[Result]) -> list[tuple[float, ...]]:
    """A colour for each family."""
    families = list(dict.fromkeys(map(_family, results)))
    return [colormaps["tab10"](families.index(_family(result)) % 10) for result in results]


def _log_axis(ax: Axes, axis: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic where one collapsed configuration would hide what the others do."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        getattr(ax, f"set_{axis}scale")("log")
