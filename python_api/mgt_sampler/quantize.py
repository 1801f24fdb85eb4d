"""SCQ, secondary calibration quantization (arXiv 2411.10781): linear layers in 4 bits, some with 8-bit activations.

`quantize` makes a quantized copy of a model, `save_quantized` and `load_quantized` keep it in one file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from tqdm.auto import tqdm

from mgt_kernels import PackedInt4, cpu, quantize_int4, w4a8_linear, w4a16_linear
from mgt_kernels.checks import BACKENDS

from .sampling import generate
from .tables import aligned

if TYPE_CHECKING:
    from .models import MaskedModel

FORMAT_VERSION = 1
RANKINGS = ("scale", "error")
_TINY = torch.finfo(torch.float32).tiny
_CHECKSUM = b'"checksum":"'
_NO_CHECKSUM = "0" * 64

# the share of the tokens that is masked, and the guidance half of all rows, or None: the rows are both halves
_NOW: ContextVar[tuple[float, int | None]] = ContextVar("mgt_sampler.quantize", default=(1.0, None))


@contextmanager
def activation_scales(*, masked: float = 1.0, guidance_half: int | None = None) -> Iterator[None]:
    """Say which activation scales quantized layers use, where they have several.

    Which half is the conditional one is up to the caller, the same in calibration as later: `ScaledModel` and
    `sampler_trajectories` have it first, diffusers' pipelines, whose batch holds both, second.

    Args:
        masked: share of the tokens that is masked, in [0, 1]; of L timestep buckets it chooses floor(masked L).
        guidance_half: 0 or 1, of all rows; None: the first half of the rows is half 0, the second half 1.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= masked <= 1:
        raise ValueError(f"masked: expected a number in [0, 1], got {masked}")
    if guidance_half not in (None, 0, 1):
        raise ValueError(f"guidance_half: expected 0, 1 or None, got {guidance_half!r}")
    token = _NOW.set((masked, guidance_half))
    try:
        yield
    finally:
        _NOW.reset(token)


def _chosen(x_scale: Tensor) -> Tensor:
    """The scales in use now, (1,) or (2,), a view of (buckets, halves)."""
    masked, half = _NOW.get()
    of_halves = x_scale[min(int(masked * len(x_scale)), len(x_scale) - 1)]
    return of_halves if half is None or len(of_halves) == 1 else of_halves[half : half + 1]


class Int4Linear(nn.Module):
    """A frozen linear layer with 4-bit weights: `mgt_kernels.w4a8_linear` with x_scale, `w4a16_linear` without.

    It maps x (..., K) float32 or bfloat16 to (..., N) of the same dtype. Its tensors keep their dtypes whatever dtype a
    model is moved to, and have no gradients.

    Attributes:
        w_q, scale, zero_point: of the weights, as in `mgt_kernels.PackedInt4`.
        bias: (N,), or None.
        x_scale: float32 (buckets, halves), positive: of the quantized activations, for each timestep bucket and
            guidance half, one or two halves; `activation_scales` says which. None: activations stay as they are.
        backend: of the kernels.
    """

    w_q: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    x_scale: Tensor | None

    def __init__(
        self, weight: PackedInt4, bias: Tensor | None = None, x_scale: Tensor | None = None, *, backend: str = "auto"
    ) -> None:
        """Hold the tensors."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        self.backend = backend
        if x_scale is not None and (x_scale.ndim != 2 or x_scale.shape[1] not in (1, 2) or not len(x_scale)):
            raise ValueError(f"x_scale: expected shape (buckets, 1 or 2), got {tuple(x_scale.shape)}")
        for name in ("w_q", "scale", "zero_point"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)
        self.register_buffer("x_scale", x_scale)

    @property
    def activation(self) -> str:
        """The path: "a8" or "a16"."""
        return "a16" if self.x_scale is None else "a8"

    @property
    def kernel(self) -> str:
        """What runs the path here: an instruction set, "triton" or "reference"."""
        return _kernel_name(self.activation, self.backend, self.w_q.device)

    @property
    def packed(self) -> PackedInt4:
        """The weights."""
        shape = (self.out_features, self.in_features)
        return PackedInt4(self.w_q, self.scale, self.zero_point, shape, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) to (..., N)."""
        if self.x_scale is None:
            return w4a16_linear(x, self.packed, self.bias, backend=self.backend)
        return w4a8_linear(x, self.packed, _chosen(self.x_scale), self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        """Sizes, path and kernel."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, w4{self.activation}, group_size={self.group_size}, kernel={self.kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        # a model's dtype is that of its activations: rounded scales would be other weights
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _kernel_name(activation: str, backend: str, device: torch.device) -> str:
    if backend == "reference" or device.type == "meta":
        return "reference" if backend == "reference" else "none"
    if device.type != "cpu":
        return "triton"
    return cpu.kernel_isa(f"w4{activation}_linear", backend)


class _FakeInt4Linear(nn.Module):
    """A linear layer that computes as W4A8 and passes gradients straight through the rounding."""

    def __init__(self, linear: nn.Linear, layer: Int4Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("x_scale", layer.x_scale)
        self.group_size, self.scale_dtype = layer.group_size, layer.scale.dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            packed = quantize_int4(self.weight, self.group_size, scale_dtype=self.scale_dtype)
            weight_error = packed.dequantize(self.weight.dtype) - self.weight
            scale = _chosen(self.x_scale)[:, None]  # type: ignore[arg-type]
            runs = x.float().reshape(len(scale), -1)
            x_error = ((runs * (1 / scale)).round().clamp(-128, 127) * scale).view_as(x).to(x.dtype) - x
        return F.linear(x + x_error, self.weight + weight_error, self.bias)


@dataclass(frozen=True)
class CalibrationInput:
    """One call of a model, where layers have scales for guidance halves or timestep buckets.

    Attributes:
        args, kwargs: of the model.
        masked, guidance_half: as in `activation_scales`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    masked: float = 1.0
    guidance_half: int | None = None

    @classmethod
    def of(cls, value: Any) -> CalibrationInput:
        """What a calibration set holds, as a call: a tuple or list is args, a mapping kwargs, all else one argument."""
        if isinstance(value, CalibrationInput):
            return value
        if isinstance(value, Mapping):
            return cls((), value)
        return cls(tuple(value) if isinstance(value, (tuple, list)) else (value,))


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: in the model.
        shape: (N, K).
        activation: its path, "a8" or "a16".
        kernel: what runs it on the machine that quantized it.
        x_scale: float32 (buckets, halves); None for "a16".
        output_scale: running max |y| / 127 in the first calibration, which `rank_by="scale"` ranks.
        error_a8, error_a16: |y - y_float| / |y_float| of each path, Frobenius norms, over the last calibration.
        weight_bytes: of the packed weights.
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
                "-" if layer.x_scale is None else _span(layer.x_scale),
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
        """Draw every layer's output scale, error and what A8 adds to the error; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 1.6 + 0.24 * len(self.layers)), layout="constrained")
        columns = {
            "output scale, max |y| / 127": [layer.output_scale for layer in self.layers],
            "error against float, %": [100 * getattr(layer, f"error_{layer.activation}") for layer in self.layers],
            "what A8 adds to the error, %": [100 * (layer.error_a8 - layer.error_a16) for layer in self.layers],
        }
        axes = figure.subplots(1, len(columns), sharey=True)
        for ax, (label, values) in zip(axes, columns.items(), strict=True):
            for activation, colour in (("a8", "tab:blue"), ("a16", "tab:orange")):
                rows = [row for row, layer in enumerate(self.layers) if layer.activation == activation]
                ax.plot([values[row] for row in rows], rows, "o", ms=5, color=colour, label=f"w4{activation}")
            ax.set_xlabel(label)
            ax.grid(color="0.93")
        if min(columns["output scale, max |y| / 127"]) > 0:
            axes[0].set_xscale("log")
        axes[0].set_yticks(range(len(self.layers)), [layer.name for layer in self.layers], fontsize=8)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, dpi=110, bbox_inches="tight")


def _span(x_scale: Tensor) -> str:
    low, high = float(x_scale.min()), float(x_scale.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    share: float = 1 / 3,
    rank_by: str = "scale",
    group_size: int = 128,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    second_calibration: bool = True,
    momentum: float = 0.9,
    guidance_halves: bool = False,
    num_timestep_buckets: int = 1,
    fine_tune: Callable[[nn.Module], object] | None = None,
    scale_dtype: torch.dtype = torch.float16,
    backend: str = "auto",
    progress: bool = False,
) -> tuple[nn.Module, QuantizationReport]:
    r"""Quantize a model's linear layers by secondary calibration; the model itself stays as it is.

    1. Every layer becomes W4A8 and the calibration inputs run, each with the scales it has left so far::

           peak    = max |x| / 127        over a calibration input's rows, or those of a guidance half
           x_scale = peak at first, then momentum * x_scale + (1 - momentum) * peak

       and the same for the output scale, of y. Where `fine_tune` is given it then trains the weights through the
       rounding, straight through, and the calibration is repeated.
    2. Of L layers the round(share * L) that rank lowest stay W4A8, in case of a tie the earlier ones; the others become
       W4A16. "scale" ranks by output scale (the paper); "error", ours, by what A8 costs for the time it saves::

           max(0, error_a8 - error_a16) / (rows * N * K)        errors relative to y in float

    3. With `second_calibration` the inputs run again and the x_scale of the W4A8 layers is measured anew, now that the
       others are W4A16.

    Args:
        model: whose `torch.nn.Linear` layers, not of derived classes, are quantized.
        calibration: inputs: a tuple or list of arguments, a mapping of keywords, one argument, or `CalibrationInput`.
        share: of the layers that are W4A8, in [0, 1].
        rank_by: "scale" or "error".
        group_size: of the weights, as in `mgt_kernels.quantize_int4`.
        include: patterns, as in `fnmatch`, of the layers' names.
        exclude: patterns of layers that stay as they are.
        second_calibration: False leaves step 3 out.
        momentum: in [0, 1).
        guidance_halves: a scale for each half of the rows, or each `guidance_half` of `activation_scales`.
        num_timestep_buckets: with a scale for each, by the share of masked tokens; at least 1.
        fine_tune: called with the copy, whose layers to be quantized compute as W4A8 and have gradients; what it leaves
            in the weights is what is packed. It may train other parameters too.
        scale_dtype: of the weights, as in `mgt_kernels.quantize_int4`.
        backend: of the kernels, now and in the quantized model.
        progress: show a progress bar.

    Returns:
        A copy of the model in evaluation mode, in which `Int4Linear` layers have taken the places, and the report.

    Raises:
        TypeError: an argument, or a layer's weights or activations, of the wrong type.
        ValueError: an argument out of range; no layer matches; a layer is quantized already, has weights or activations
            that are not finite, or is not reached by the calibration. The message names the layer.

    Source: arXiv 2411.10781, secondary calibration quantization.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share!r}")
    if rank_by not in RANKINGS:
        raise ValueError(f"rank_by: expected one of {', '.join(RANKINGS)}, got {rank_by!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    if isinstance(num_timestep_buckets, bool) or not isinstance(num_timestep_buckets, int) or num_timestep_buckets < 1:
        raise ValueError(f"num_timestep_buckets: expected an int of at least 1, got {num_timestep_buckets!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected an iterable of a model's inputs, got {type(calibration).__name__}")
    linears: dict[str, Any] = _matching(model, include, exclude)
    inputs = [CalibrationInput.of(value) for value in calibration]
    if not inputs:
        raise ValueError("calibration: expected one input at least, got none")

    def packed(linear: Any, name: str) -> Int4Linear:
        try:
            weight = quantize_int4(linear.weight, group_size, scale_dtype=scale_dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if bias is not None and not bias.isfinite().all():
            raise ValueError(f"{name}: bias: expected finite values")
        # overwritten before it is read
        x_scale = torch.zeros(num_timestep_buckets, 1 + guidance_halves, device=weight.device)
        return Int4Linear(weight, bias, x_scale, backend=backend)

    def calibrated(label: str) -> dict[str, _Observer]:
        observers = {
            name: _Observer(name, layer, linears[name].weight, linears[name].bias, momentum)
            for name, layer in layers.items()
        }
        try:
            with torch.no_grad():
                for call in tqdm(inputs, desc=label, disable=not progress):
                    with activation_scales(masked=call.masked, guidance_half=call.guidance_half):
                        quantized(*call.args, **call.kwargs)
        finally:
            for observer in observers.values():
                observer.remove()
        for observer in observers.values():
            observer.check()
        return observers

    layers = {name: packed(linear, name) for name, linear in linears.items()}
    quantized = _with_layers(model, {linear: layers[name] for name, linear in linears.items()}).eval()
    first = last = calibrated("calibration")
    if fine_tune is not None:
        fakes = {name: _FakeInt4Linear(linears[name], layer) for name, layer in layers.items()}
        _replace(quantized, {layer: fakes[name] for name, layer in layers.items()})
        with torch.enable_grad():
            fine_tune(quantized)
        linears = dict(fakes)
        layers = {name: packed(fake, name) for name, fake in fakes.items()}
        _replace(quantized, {fake: layers[name] for name, fake in fakes.items()})
        quantized.eval()
        first = last = calibrated("calibration of the fine-tuned weights")

    key = {name: observer.output_scale if rank_by == "scale" else observer.cost for name, observer in first.items()}
    # a stable sort: ties go by the model's order
    for name in sorted(layers, key=key.__getitem__)[round(share * len(layers)) :]:
        layers[name].x_scale = None
    if second_calibration:
        last = calibrated("second calibration")
    return quantized, QuantizationReport(
        tuple(
            LayerReport(
                name,
                layer.packed.shape,
                layer.activation,
                layer.kernel,
                None if layer.x_scale is None else layer.x_scale.clone(),
                first[name].output_scale,
                last[name].error_a8,
                last[name].error_a16,
                layer.packed.nbytes,
            )
            for name, layer in layers.items()
        )
    )


class _Observer:
    """Watches a layer during calibration: its scales, and the errors of both paths."""

    def __init__(self, name: str, layer: Int4Linear, weight: Tensor, bias: Tensor | None, momentum: float) -> None:
        self._name, self._layer, self._weight, self._bias = name, layer, weight, bias
        self._momentum = momentum
        # 0: not seen yet
        self._x_scale: Tensor | None = None if layer.x_scale is None else torch.zeros_like(layer.x_scale)
        self.output_scale = 0.0
        self._num_rows = self._num_calls = 0
        self._squares = torch.zeros(3, dtype=torch.float64)
        self._handles = (layer.register_forward_pre_hook(self._before), layer.register_forward_hook(self._after))

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{self._name}: expected activations in float32 or bfloat16, got {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"{self._name}: expected finite activations in calibration, got NaN or inf")
        if self._x_scale is None or not x.numel():
            return
        scale = _chosen(self._x_scale)
        num_rows = x.numel() // x.shape[-1]
        if num_rows % len(scale):
            raise ValueError(f"{self._name}: expected rows of two guidance halves, got {num_rows}")
        peak = x.float().reshape(len(scale), -1).abs().amax(1) / 127
        running = self._momentum * scale + (1 - self._momentum) * peak
        scale.copy_(peak.where(scale == 0, running).clamp(min=_TINY))
        assert self._layer.x_scale is not None
        self._layer.x_scale.copy_(self._x_scale)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        x, packed, bias, backend = args[0], self._layer.packed, self._layer.bias, self._layer.backend
        if not x.numel():
            return
        peak = float(y.float().abs().max()) / 127
        mean = self._momentum * self.output_scale + (1 - self._momentum) * peak
        self.output_scale = mean if self._num_calls else peak
        if self._layer.x_scale is None:
            # what A8 would cost here: with the scale of these very rows
            other = w4a8_linear(x, packed, max(float(x.float().abs().max()) / 127, _TINY), bias, backend=backend)
            a8, a16 = other, y
        else:
            a8, a16 = y, w4a16_linear(x, packed, bias, backend=backend)
        bias = None if self._bias is None else self._bias.float()
        truth = F.linear(x.float(), self._weight.float(), bias).double()
        norms = [truth.square().sum(), (a8 - truth).square().sum(), (a16 - truth).square().sum()]
        self._squares += torch.stack(norms).cpu()
        self._num_rows += x.numel() // x.shape[-1]
        self._num_calls += 1

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Check that there is a scale for everything that may come."""
        if not self._num_calls:
            raise ValueError(f"{self._name}: not reached by the calibration; expected it in exclude, or other inputs")
        if self._x_scale is not None and (self._x_scale == 0).any():
            bucket, half = (self._x_scale == 0).nonzero()[0].tolist()
            raise ValueError(
                f"{self._name}: calibration: expected inputs of every timestep bucket and guidance half, "
                f"got none of bucket {bucket}, half {half}"
            )

    @property
    def error_a8(self) -> float:
        return self._error(1)

    @property
    def error_a16(self) -> float:
        return self._error(2)

    @property
    def cost(self) -> float:
        """What A8 adds to the error, for each multiply-accumulate it makes cheaper."""
        return max(0.0, self.error_a8 - self.error_a16) / (self._num_rows * self._weight.numel())

    def _error(self, path: int) -> float:
        truth, wrong = float(self._squares[0]), float(self._squares[path])
        return math.sqrt(wrong / truth) if truth else math.inf if wrong else 0.0


def _matching(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers by name; each once, under its first name."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{argument}: expected a sequence of patterns, got {patterns!r}")
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            raise ValueError(f"{name or 'model'}: is quantized already")
        chosen = any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
        # derived classes may compute something else; the model itself has no place to put another in
        if type(module) is nn.Linear and name and chosen:
            linears[name] = module
    if not linears:
        raise ValueError(f"include: expected patterns that match a linear layer, got {include!r} without {exclude!r}")
    return linears


def _with_layers(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a model with other modules in place of some, whose weights are not copied on the way."""
    shared: dict[int, Any] = {id(module): module for module in replacements}
    duplicate = copy.deepcopy(model, shared)
    _replace(duplicate, replacements)
    return duplicate


def _replace(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put modules in the places of others, wherever they are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a quantized model to one safetensors file: packed weights, scales, paths and all other parameters.

    The header holds format version, class and configuration of the model, its layers, and the SHA-256 of the file with
    64 zeros in its place.

    Args:
        model: that `quantize` or `load_quantized` returned.
        path: the file, replaced at once when it is whole.

    Raises:
        ValueError: the model has no quantized layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    if not layers:
        raise ValueError("model: expected one with quantized layers, got none")
    facts = {
        "version": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": _config_of(model),
        "layers": {
            name: {"shape": layer.packed.shape, "group_size": layer.group_size, "activation": layer.activation}
            for name, layer in layers.items()
        },
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    data = save_tensors(tensors, {"format": "pt", "mgt_quantized": json.dumps(facts), "checksum": _NO_CHECKSUM})
    start = data.index(_CHECKSUM) + len(_CHECKSUM)
    digest = hashlib.sha256(data).hexdigest().encode()
    partial = Path(f"{path}.partial")
    partial.write_bytes(data[:start] + digest + data[start + len(digest) :])
    os.replace(partial, path)


def load_quantized(
    model_or_factory: nn.Module | Callable[[], nn.Module], path: str | Path, *, backend: str = "auto"
) -> nn.Module:
    """Rebuild the model that `save_quantized` wrote, bit for bit.

    Args:
        model_or_factory: a model of the same class and sizes that is not quantized, which stays as it is, or what makes
            one; its weights do not matter.
        path: the file.
        backend: of the kernels.

    Returns:
        The quantized model in evaluation mode, on the device of the model given where it is on one, else on the CPU.

    Raises:
        TypeError: no model and nothing that makes one.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, of another model or version, or no quantized model; the message
            names the file and the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    facts, tensors = _read(Path(path))
    model = model_or_factory if isinstance(model_or_factory, nn.Module) else model_or_factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_or_factory: expected a torch.nn.Module, got {type(model).__name__}")
    for what, ours in (("model", type(model).__name__), ("config", _config_of(model))):
        if facts[what] != ours:
            raise ValueError(f"{path}: made of another model: {what} {facts[what]!r}, expected {ours!r}")
    modules = dict(model.named_modules())
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in facts["layers"].items():
        linear, shape = modules.get(name), tuple(layer["shape"])
        if type(linear) is not nn.Linear or (linear.out_features, linear.in_features) != shape:
            raise ValueError(f"{path}: made of another model: {name} is no linear layer of shape {shape} here")
        own = {key: tensors.get(f"{name}.{key}") for key in ("w_q", "scale", "zero_point", "bias", "x_scale")}
        layout = torch.tensor([*shape, layer["group_size"]])
        try:
            packed = PackedInt4.from_tensors({"layout": layout, **{k: t for k, t in own.items() if t is not None}})
            quantized = Int4Linear(packed, own["bias"], own["x_scale"], backend=backend)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        if quantized.activation != layer["activation"] or (linear.bias is None) != (quantized.bias is None):
            raise ValueError(f"{path}: made of another model: {name} has other tensors")
        replacements[linear] = quantized
    quantized_model = _with_layers(model, replacements)
    try:
        # assigned, not copied: what a file holds in bfloat16 is not to be widened
        quantized_model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: made of another model: {' '.join(str(error).split())}") from error
    return quantized_model.to(device).eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts in the header and the tensors of a file that is whole."""
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < header_end:
        raise ValueError(f"{path}: truncated, or no safetensors file: its header is not whole")
    start = data.find(_CHECKSUM, 8, header_end) + len(_CHECKSUM)
    if start < len(_CHECKSUM):
        raise ValueError(f"{path}: damaged, or not of save_quantized: no checksum in its header")
    found = data[start : start + len(_NO_CHECKSUM)]
    blank = data[:start] + _NO_CHECKSUM.encode() + data[start + len(_NO_CHECKSUM) :]
    try:
        header = json.loads(data[8:header_end])
        expected_size = header_end + max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path}: damaged: its header cannot be read") from None
    if len(data) < expected_size:
        raise ValueError(f"{path}: truncated: {len(data):,} bytes of {expected_size:,}")
    if hashlib.sha256(blank).hexdigest().encode() != found:
        raise ValueError(f"{path}: damaged: its checksum is another")
    try:
        facts = json.loads(header["__metadata__"]["mgt_quantized"])
        version = facts["version"]
    except (KeyError, ValueError):
        raise ValueError(f"{path}: not of save_quantized") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: written in version {version} of the format, expected {FORMAT_VERSION}")
    try:
        return facts, load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _config_of(model: nn.Module) -> Any:
    """What tells apart two models of the same class, as JSON has it; None where there is no `config`."""
    config = getattr(model, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    elif hasattr(config, "to_dict"):
        config = config.to_dict()  # type: ignore[union-attr]
    if not isinstance(config, Mapping):
        return None
    # names with an underscore tell where a model came from, not what it is
    kept = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


class ScaledModel:
    """A `MaskedModel` that tells quantized layers which of their activation scales to use.

    By the share of masked tokens in the batch, and half 0 with a condition, half 1 without; all else is the model's.
    """

    def __init__(self, model: MaskedModel) -> None:
        """Wrap the model."""
        self._model = model

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        if name == "_model":
            raise AttributeError(name)
        return getattr(self._model, name)

    def predict_logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """The model's logits, (B, N, V)."""
        masked = float((tokens == self._model.mask_token_id).float().mean()) if tokens.numel() else 1.0
        with activation_scales(masked=masked, guidance_half=1 if condition is None else 0):
            return self._model.predict_logits(tokens, condition)


def sampler_trajectories(model: Any, **arguments: Any) -> list[CalibrationInput]:
    """Record what `generate` gives a model's transformer, to calibrate on.

    Args:
        model: a `MaskedModel` with a `transformer`, such as the bundled one.
        arguments: of `generate`: labels, number of steps, guidance scale, seed, ...

    Returns:
        The transformer's inputs in order, with the share of masked tokens, half 0 for the conditional and 1 for the
        unconditional ones.

    Raises:
        TypeError: the model has no transformer.
    """
    transformer = getattr(model, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"model: expected one with a transformer, got {type(model).__name__}")
    inputs: list[CalibrationInput] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # the sampler writes to no tensor that it gave away
        inputs.append(CalibrationInput(args, kwargs, *_NOW.get()))

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        generate(ScaledModel(model), **arguments)
    finally:
        handle.remove()
    return inputs
