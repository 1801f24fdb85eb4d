"""Secondary calibration: scales of the activations are measured, paths assigned, and scales measured again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm.auto import tqdm

from mgt_kernels import quantize_int4, w4a8_linear, w4a16_linear
from mgt_kernels.checks import BACKENDS

from ..sampling import generate
from .hosts import attach_quantizers
from .layer import Int4Linear
from .replace import effective, inherit, matching, replace, with_layers
from .report import LayerReport, QuantizationReport
from .scales import ScaledModel, ScalesByTokens, activation_scales, masked_share

RANKINGS = ("scale", "error")
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CalibrationInput:
    """One call of a model, where layers have scales for guidance halves or timestep buckets.

    Attributes:
        args, kwargs: of the model.
        masked, guidance_half: as in `activation_scales`; not read where `quantize` is given mask_token_id.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    masked: float | Tensor = 1.0
    guidance_half: int | None = None

    @classmethod
    def of(cls, value: Any) -> CalibrationInput:
        """What a calibration set holds, as a call: a tuple or list is args, a mapping kwargs, all else one argument."""
        if isinstance(value, CalibrationInput):
            return value
        if isinstance(value, Mapping):
            return cls((), value)
        return cls(tuple(value) if isinstance(value, (tuple, list)) else (value,))


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
    mask_token_id: int | None = None,
    fine_tune: Callable[[nn.Module], object] | None = None,
    scale_dtype: torch.dtype = torch.float16,
    backend: str = "auto",
    batch_invariant: bool = True,
    progress: bool = False,
) -> tuple[nn.Module, QuantizationReport]:
    r"""Quantize a model's linear layers by secondary calibration; the model itself stays as it is.

    1. Every layer becomes W4A8 and the calibration inputs run, each with the scales it has left so far::

           peak    = max |x| / 127        over the rows of a calibration input that share a timestep bucket and a half
           x_scale = peak at first, then momentum * x_scale + (1 - momentum) * peak; unchanged where peak is 0

       and the same for the output scale, of y. Where `fine_tune` is given it then trains the weights through the
       rounding, straight through, and the calibration is repeated.
    2. Of L layers the round(share * L) that rank lowest stay W4A8, in case of a tie the earlier ones; the others become
       W4A16. "scale" ranks by output scale (the paper); "error", ours, by what A8 costs for the time it saves::

           max(0, error_a8 - error_a16) / (rows * N * K)        errors relative to y in float

       A layer that calibration did not reach, or reached with zeros alone, has no scale to be W4A8 with: it becomes
       W4A16, is not among the L, and the report says so.
    3. With `second_calibration` the inputs run again and the x_scale of the W4A8 layers is measured anew, now that the
       others are W4A16.

    What hosts have hung on the layers comes along: hooks, attributes, buffers. Weights that a parametrization, weight
    norm, spectral norm or pruning computes are computed first. PEFT's adapters stay in float, in effect. What would be
    lost is refused: a replaced forward (accelerate's hooks), state-dict hooks.

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
        mask_token_id: where given, and layers have several scales, the model chooses them itself at every call: each
            sample's bucket by the tokens in the model's first argument of integers with two or more dimensions, the
            halves as the first and the second half of the batch, as diffusers' pipelines call it. None: callers choose,
            by `activation_scales` or `ScaledModel`.
        fine_tune: called with the copy, whose layers to be quantized compute as W4A8 and have gradients; what it leaves
            in the weights is what is packed. It may train other parameters too.
        scale_dtype: of the weights, as in `mgt_kernels.quantize_int4`.
        backend: of the kernels, now and in the quantized model.
        batch_invariant: False lets the W4A16 layers choose by the number of rows how a CUDA device multiplies, as
            `mgt_kernels.w4a16_linear` says; the report names the product and the number. W4A8 layers always have the
            same bits.
        progress: show a progress bar.

    Returns:
        A copy of the model in evaluation mode, in which `Int4Linear` layers have taken the places, and the report.

    Raises:
        TypeError: an argument, or a layer's weights or activations, of the wrong type.
        ValueError: an argument out of range; no layer matches or none is reached by the calibration; a layer is
            quantized already, has weights or activations that are not finite, or something that another layer in its
            place would lose. The message names the layer.

    Source: arXiv 2411.10781, secondary calibration quantization.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # looked up, for PyTorch's compiler takes seconds to import
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        raise TypeError("model: is compiled by torch.compile; quantize the module first, then compile what comes back")
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share!r}")
    if rank_by not in RANKINGS:
        raise ValueError(f"rank_by: expected one of {', '.join(RANKINGS)}, got {rank_by!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    if not _is_int(num_timestep_buckets) or num_timestep_buckets < 1:
        raise ValueError(f"num_timestep_buckets: expected an int of at least 1, got {num_timestep_buckets!r}")
    if mask_token_id is not None and not _is_int(mask_token_id):
        raise TypeError(f"mask_token_id: expected an int or None, got {mask_token_id!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected an iterable of a model's inputs, got {type(calibration).__name__}")
    linears: dict[str, nn.Linear] = matching(model, include, exclude)
    inputs = [CalibrationInput.of(value) for value in calibration]
    if not inputs:
        raise ValueError("calibration: expected one input at least, got none")
    has_several = guidance_halves or num_timestep_buckets > 1
    chooser = ScalesByTokens(int(mask_token_id)) if has_several and mask_token_id is not None else None
    floats: dict[str, tuple[Tensor, Tensor | None]] = {}

    def packed(linear: nn.Linear, name: str) -> Int4Linear:
        weight, bias = floats[name] = effective(name, linear)
        try:
            weight_q = quantize_int4(weight, group_size, scale_dtype=scale_dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        if bias is not None and not bias.isfinite().all():
            raise ValueError(f"{name}: bias: expected finite values")
        # overwritten before it is read
        x_scale = torch.ones(num_timestep_buckets, 1 + guidance_halves, dtype=torch.float32, device=weight.device)
        bias = None if bias is None else bias.clone()
        return Int4Linear(
            weight_q, bias, x_scale, backend=backend, batch_invariant=batch_invariant, dtype=weight.dtype,
            layer_name=name,
        )  # fmt: skip

    def calibrated(label: str) -> dict[str, _Observer]:
        observers = {name: _Observer(name, layer, *floats[name], momentum) for name, layer in layers.items()}
        try:
            with torch.no_grad():
                for call in tqdm(inputs, desc=label, disable=not progress):
                    choice = activation_scales(quantized, masked=call.masked, guidance_half=call.guidance_half)
                    with nullcontext() if chooser is not None else choice:
                        quantized(*call.args, **call.kwargs)
        finally:
            for observer in observers.values():
                observer.remove()
        _check_reached(observers)
        for name, observer in observers.items():
            if observer.fallback:
                layers[name].x_scale, fallbacks[name] = None, observer.fallback
        return observers

    fallbacks: dict[str, str] = {}
    # what is made here may be changed and trained later, whatever mode the caller is in
    with torch.inference_mode(False):
        layers = {name: packed(linear, name) for name, linear in linears.items()}
        quantized = with_layers(model, {linear: layers[name] for name, linear in linears.items()}).eval()
    if chooser is not None:
        chooser.attach(quantized)
    first = last = calibrated("calibration")
    if fine_tune is not None:
        fallbacks = {}
        with torch.inference_mode(False), torch.enable_grad():
            fakes = {name: _FakeInt4Linear(*floats[name], layer) for name, layer in layers.items()}
            replace(quantized, {layer: fakes[name] for name, layer in layers.items()})
            fine_tune(quantized)
            layers = {name: packed(fake, name) for name, fake in fakes.items()}
        for name, fake in fakes.items():
            inherit(fake, layers[name])
        replace(quantized, {fake: layers[name] for name, fake in fakes.items()})
        quantized.eval()
        first = last = calibrated("calibration of the fine-tuned weights")

    key = {name: observer.output_scale if rank_by == "scale" else observer.cost for name, observer in first.items()}
    ranked = [name for name in layers if name not in fallbacks]
    # a stable sort: ties go by the model's order
    for name in sorted(ranked, key=key.__getitem__)[round(share * len(ranked)) :]:
        layers[name].x_scale = None
    if second_calibration:
        last = calibrated("second calibration")
    attach_quantizers(quantized)
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
                fallbacks.get(name, ""),
            )
            for name, layer in layers.items()
        )
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class _Observer:
    """Watches a layer during calibration: its scales, and the errors of both paths."""

    def __init__(self, name: str, layer: Int4Linear, weight: Tensor, bias: Tensor | None, momentum: float) -> None:
        self.name, self._layer, self._weight, self._bias = name, layer, weight, bias
        self._momentum = momentum
        shape = None if layer.x_scale is None else layer.x_scale.shape
        # 0: nothing but zeros yet
        self._x_scale = None if shape is None else torch.zeros(shape, dtype=torch.float32, device=weight.device)
        self.seen = None if shape is None else torch.zeros(shape, dtype=torch.bool, device=weight.device)
        self.output_scale = 0.0
        self._num_rows = self._num_calls = 0
        self._squares = torch.zeros(3, dtype=torch.float64, device="cpu")
        # between the host's hooks and the layer, so that what the layer computes with is what is seen
        self._handles = (
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, with_kwargs=True, prepend=True),
        )

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = self._input(args, kwargs)
        if not x.isfinite().all():
            raise ValueError(f"{self.name}: expected finite activations in calibration, got NaN or inf")
        if self._x_scale is None or self.seen is None or not x.numel():
            return
        # raises where the rows do not fit, or nobody chose
        num_runs = len(self._layer.chosen_scales(x.numel() // x.shape[-1]))
        index = self._layer._scale_index
        if index is None or self._x_scale.numel() == 1:
            index = torch.zeros(num_runs, dtype=torch.int64, device=x.device)
        index = index.to(x.device)
        peaks = x.float().reshape(num_runs, -1).abs().amax(1) / 127
        scales, seen = self._x_scale.view(-1), self.seen.view(-1)
        peak = torch.zeros_like(scales).scatter_reduce_(0, index, peaks, "amax")
        seen[index] = True
        running = self._momentum * scales + (1 - self._momentum) * peak
        running = peak.where(scales == 0, running).clamp(min=_TINY)
        scales.copy_(scales.where(peak < _TINY, running))
        assert self._layer.x_scale is not None
        self._layer.x_scale.copy_(self._x_scale.clamp(min=_TINY))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> None:
        x, packed, bias, backend = self._input(args, kwargs), self._layer.packed, self._layer.bias, self._layer.backend
        if not x.numel():
            return
        peak = float(y.float().abs().max()) / 127
        mean = self._momentum * self.output_scale + (1 - self._momentum) * peak
        self.output_scale = mean if self._num_calls else peak
        x = x.float() if x.dtype == torch.float16 else x
        if self._layer.x_scale is None:
            # what A8 would cost here: with the scale of these very rows
            other = w4a8_linear(x, packed, max(float(x.float().abs().max()) / 127, _TINY), bias, backend=backend)
            a8, a16 = other, y
        else:
            a8, a16 = y, w4a16_linear(x, packed, bias, backend=backend)
        float_bias = None if self._bias is None else self._bias.float()
        truth = F.linear(x.float(), self._weight.float(), float_bias).double()
        norms = [truth.square().sum(), (a8 - truth).square().sum(), (a16 - truth).square().sum()]
        self._squares += torch.stack(norms).cpu()
        self._num_rows += x.numel() // x.shape[-1]
        self._num_calls += 1

    def _input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return self._layer.activations(args[0] if args else kwargs["input"])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def is_reached(self) -> bool:
        return self._num_calls > 0

    @property
    def fallback(self) -> str:
        """Why the layer cannot be W4A8; "" where it can."""
        if not self.is_reached or (self.seen is not None and not self.seen.all()):
            return "not reached"
        return "only zeros" if self._x_scale is not None and (self._x_scale == 0).any() else ""

    @property
    def error_a8(self) -> float:
        return self._error(1)

    @property
    def error_a16(self) -> float:
        return self._error(2)

    @property
    def cost(self) -> float:
        """What A8 adds to the error, for each multiply-accumulate it makes cheaper."""
        return max(0.0, self.error_a8 - self.error_a16) / max(1, self._num_rows * self._weight.numel())

    def _error(self, path: int) -> float:
        truth, wrong = float(self._squares[0]), float(self._squares[path])
        return math.sqrt(wrong / truth) if truth else math.inf if wrong else 0.0


def _check_reached(observers: Mapping[str, _Observer]) -> None:
    """Check that the calibration reached a layer, and every bucket and half in one layer at least."""
    reached = [observer for observer in observers.values() if observer.is_reached]
    if not reached:
        raise ValueError(f"{next(iter(observers))}: not reached by the calibration, and no other layer is")
    seen = [observer.seen.cpu() for observer in reached if observer.seen is not None]
    missing: Any = (~torch.stack(seen).any(0)).nonzero() if seen else []
    if len(missing):
        bucket, half = missing[0].tolist()
        raise ValueError(
            f"{reached[0].name}: calibration: expected inputs of every timestep bucket and guidance half, "
            f"got none of bucket {bucket}, half {half}"
        )


class _FakeInt4Linear(nn.Linear):
    """A linear layer that computes as W4A8 and passes gradients straight through the rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None, layer: Int4Linear) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight.clone())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.group_size, self.scale_dtype = layer.group_size, layer.scale.dtype
        inherit(layer, self)
        # has the scales and the choice among them; in a tuple, for the layer is no module of this one
        self._stands_for = (layer,)

    def forward(self, input: Tensor) -> Tensor:
        (layer,) = self._stands_for
        x = layer.activations(input)
        with torch.no_grad():
            packed = quantize_int4(self.weight, self.group_size, scale_dtype=self.scale_dtype)
            weight_error = packed.dequantize(self.weight.dtype) - self.weight
            if layer.x_scale is None:
                x_error = x.bfloat16().to(x.dtype) - x
            else:
                scale = layer.chosen_scales(x.numel() // x.shape[-1])[:, None].to(x.device)
                runs = x.float().reshape(len(scale), -1)
                x_error = ((runs * (1 / scale)).round().clamp(-128, 127) * scale).view_as(x).to(x.dtype) - x
        return F.linear(x + x_error, self.weight + weight_error, self.bias)


def sampler_trajectories(model: Any, **arguments: Any) -> list[CalibrationInput]:
    """Record what `generate` gives a model's transformer, to calibrate on.

    Args:
        model: a `MaskedModel` with a `transformer`, such as the bundled one.
        arguments: of `generate`: labels, number of steps, guidance scale, seed, ...

    Returns:
        The transformer's inputs in order, with each sample's share of masked tokens, half 0 for the conditional and 1
        for the unconditional ones.

    Raises:
        TypeError: the model has no transformer.
    """
    transformer = getattr(model, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"model: expected one with a transformer, got {type(model).__name__}")
    inputs: list[CalibrationInput] = []
    choices: list[tuple[Tensor, int]] = []

    class Recorded(ScaledModel):
        def predict_logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
            choices.append((masked_share(tokens, model.mask_token_id), int(condition is None)))
            return super().predict_logits(tokens, condition)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # the sampler writes to no tensor that it gave away
        inputs.append(CalibrationInput(args, kwargs, *choices[-1]))

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        generate(Recorded(model), **arguments)
    finally:
        handle.remove()
    return inputs
