"""Quality against cost: which configurations no other one beats in both, as a picture and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import whole_file, write_csv
from .plots import _colours, _log_axis, _numbers
from .run import METRICS, Result

COSTS = {
    "model_flops": "model GFLOP per image",
    "transformer_seconds": "seconds of the processor in the transformer, per image",
}
# with what is drawn in its place: the images behind the likelihoods are the same ones, so that the interval of a
# difference says more than those of both likelihoods
QUALITIES = {"frechet_distance": "frechet_distance", "nll": "nll_lost"}
_LABELS = {"frechet_distance": "Fréchet distance, classifier features", "nll_lost": "NLL lost against {}, nats"}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (cost, loss) no other point beats: none is at most as large in both and smaller in one.

    Returns:
        Their indices, by growing cost; of equal points the first. Points with a NaN are left out.
    """
    found: list[int] = []
    known = [i for i, (cost, loss) in enumerate(points) if cost == cost and loss == loss]
    for i in sorted(known, key=lambda i: points[i]):
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def fronts(results: Sequence[Result]) -> list[dict[str, str]]:
    """The front of every quality against every cost.

    Returns:
        A row for each point of each front, by growing cost: `quality` and `cost`, names of METRICS, `name`, `value`
        with half its 95 % `interval`, and `spent`, the cost. A quality that was not found has none.
    """
    rows = []
    for quality in QUALITIES:
        for cost in COSTS:
            for i in front(_points(results, cost, quality)):
                estimates = results[i].estimates
                row = {"quality": quality, "cost": cost, "name": results[i].configuration.name}
                row["value"] = repr(float(estimates[quality].value))
                row["interval"] = repr(float(estimates[quality].half_width))
                row["spent"] = repr(float(estimates[cost].value))
                rows.append(row)
    return rows


def save_pareto(results: Sequence[Result], out: str | Path) -> list[Path]:
    """Write fronts.csv, see `fronts`, and pareto.png, the same with all configurations; return their paths.

    Raises:
        ValueError: there are no results, or no cost of one is known.
        OSError: a file cannot be written; it is then as before.
    """
    rows = fronts(results)
    if not rows:
        raise ValueError("results: expected some of known costs, got none")
    Path(out).mkdir(parents=True, exist_ok=True)
    table, picture = Path(out) / "fronts.csv", Path(out) / "pareto.png"
    write_csv(table, list(rows[0]), rows)
    with whole_file(picture) as file:
        pareto(results).savefig(file, format="png", dpi=110, bbox_inches="tight")
    return [table, picture]


def pareto(results: Sequence[Result]) -> Figure:
    """A row for each quality that was found, a column for each cost; squares are quantized.

    The line is the front: what a budget of so much cost can have.
    """
    found = [name for name in QUALITIES if any(front(_points(results, cost, name)) for cost in COSTS)]
    figure = Figure(figsize=(14, 1 + 4.5 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(COSTS), sharex="col", sharey="row", squeeze=False)
    for row, name in zip(axes, found, strict=True):
        for ax, cost in zip(row, COSTS, strict=True):
            _panel(ax, results, cost, name)
        row[0].set_ylabel(_LABELS[QUALITIES[name]].format(results[0].configuration.name))
    for ax, label in zip(axes[-1], COSTS.values(), strict=True):
        ax.set_xlabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    figure.suptitle(
        f"{results[0].num_images} images each; bars are 95 % intervals over groups of seeds, lines the fronts"
    )
    return figure


def _panel(ax: Axes, results: Sequence[Result], cost: str, quality: str) -> None:
    values = [_numbers(result.estimates[QUALITIES[quality]]) for result in results]
    costs = [_numbers(result.estimates[cost], METRICS[cost])[0] for result in results]
    colours = _colours(results)
    for i, (result, x, (value, half_width)) in enumerate(zip(results, costs, values, strict=True)):
        marker = "o" if result.configuration.quantization is None else "s"
        label = f"{i + 1}  {result.configuration.name}"
        ax.errorbar(x, value, yerr=half_width, fmt=marker, ms=5, capsize=2, color=colours[i], label=label)
        # beside the bar, on one side and the other in turn
        side = 1 if i % 2 else -1
        ax.annotate(
            str(i + 1),
            (x, value),
            (5 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
        )
    best = front(_points(results, cost, quality))
    line = [(costs[i], values[i][0]) for i in best]
    ax.step(*zip(*line, strict=True), where="post", color="0.35", lw=1, ls="--", zorder=0)
    _log_axis(ax, "y", [value for value, _ in values])
    ax.grid(color="0.93")


def _points(results: Sequence[Result], cost: str, quality: str) -> list[tuple[float, float]]:
    return [(float(r.estimates[cost].value), float(r.estimates[quality].value)) for r in results]
