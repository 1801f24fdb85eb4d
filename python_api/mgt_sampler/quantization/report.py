"""What became of every layer: as a record, a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files import whole_file
from ..tables import aligned


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: in the model.
        shape: (N, K).
        activation: its path, "a8" or "a16".
        kernel: what runs it on the machine that quantized it, and from how many rows on another product does.
        x_scale: float32 (buckets, halves); None for "a16".
        output_scale: running max |y| / 127 in the first calibration, which `rank_by="scale"` ranks.
        error_a8, error_a16: |y - y_float| / |y_float| of each path, Frobenius norms, over the last calibration.
        weight_bytes: of the packed weights.
        fallback: why the layer is "a16" whatever its rank: "not reached" or "only zeros" in calibration; "" where it
            was calibrated. Its output scale and errors then say nothing.
    """

    name: str
    shape: tuple[int, int]
    activation: str
    kernel: str
    x_scale: Tensor | None
    output_scale: float
    error_a8: float
    error_a16: float
    weight_bytes: int
    fallback: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What became of every layer, in the model's order."""

    layers: tuple[LayerReport, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(layer.weight_bytes for layer in self.layers)

    def table(self) -> str:
        """Lay it out as text: a line for each layer, and one of totals."""
        header = ["layer", "shape", "path", "kernel", "x scale", "output scale", "error A8, %", "error A16, %", "bytes"]
        rows = [
            [
                layer.name,
                f"{layer.shape[0]} x {layer.shape[1]}",
                f"w4{layer.activation}",
                layer.kernel,
                layer.fallback or "-" if layer.x_scale is None else _span(layer.x_scale),
                f"{layer.output_scale:.4g}",
                f"{100 * layer.error_a8:.2f}",
                f"{100 * layer.error_a16:.2f}",
                f"{layer.weight_bytes:,}",
            ]
            for layer in self.layers
        ]
        num_a8 = sum(layer.activation == "a8" for layer in self.layers)
        total = ["all", "", f"{num_a8} of {len(self.layers)} w4a8", *[""] * 5, f"{self.weight_bytes:,}"]
        return aligned([header, *rows, total])

    def plot(self, path: str | Path) -> None:
        """Draw every layer's output scale, error and what A8 adds to the error; needs matplotlib.

        Args:
            path: of the picture, whose suffix says the format; replaced when the new one is whole.

        Raises:
            ValueError: a format that matplotlib does not know.
            OSError: the file cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 1.6 + 0.24 * len(self.layers)), layout="constrained")
        columns = {
            "output scale, max |y| / 127": [layer.output_scale for layer in self.layers],
            "error against float, %": [100 * getattr(layer, f"error_{layer.activation}") for layer in self.layers],
            "what A8 adds to the error, %": [100 * (layer.error_a8 - layer.error_a16) for layer in self.layers],
        }
        calibrated = [not layer.fallback for layer in self.layers]
        axes = figure.subplots(1, len(columns), sharey=True)
        for ax, (label, values) in zip(axes, columns.items(), strict=True):
            for activation, colour in (("a8", "tab:blue"), ("a16", "tab:orange")):
                rows = [
                    row for row, layer in enumerate(self.layers) if layer.activation == activation and calibrated[row]
                ]
                ax.plot([values[row] for row in rows], rows, "o", ms=5, color=colour, label=f"w4{activation}")
            ax.set_xlabel(label)
            ax.grid(color="0.93")
        shown = [x for x, ok in zip(columns["output scale, max |y| / 127"], calibrated, strict=True) if ok]
        if shown and min(shown) > 0:
            axes[0].set_xscale("log")
        labels = [f"{layer.name} ({layer.fallback})" if layer.fallback else layer.name for layer in self.layers]
        axes[0].set_yticks(range(len(self.layers)), labels, fontsize=8)
        axes[0].set_ylim(len(self.layers) - 0.5, -0.5)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        with whole_file(path) as file:
            figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=110, bbox_inches="tight")


def _span(x_scale: Tensor) -> str:
    low, high = float(x_scale.min()), float(x_scale.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
