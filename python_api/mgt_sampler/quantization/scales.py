"""Which activation scales a quantized layer uses, where it has several: chosen for each sample."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layer import Int4Linear

if TYPE_CHECKING:
    from ..models import MaskedModel

_CHOOSING = threading.Lock()


@contextmanager
def activation_scales(
    model: nn.Module, *, masked: float | Tensor | None = None, guidance_half: int | None = None
) -> Iterator[None]:
    """Say which activation scales a model's quantized layers use, where they have several.

    The choice holds for the model, in every thread, until the block ends. A sample's scale depends on nothing but the
    sample. Which half is the conditional one is up to the caller, the same in calibration as later: `ScaledModel` and
    `sampler_trajectories` have it first, diffusers' pipelines, whose batch holds both, second.

    Args:
        model: with `Int4Linear` layers; without, nothing happens.
        masked: share of a sample's tokens that is masked, in [0, 1]; of L timestep buckets it chooses floor(masked L),
            at most L - 1. A number for the whole batch, or (B,) floats, a sample each, in order of the layers' rows.
            Needed where a layer has several buckets.
        guidance_half: 0 or 1, of all rows; None: the first half of the rows is half 0, the second half 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or missing.
        RuntimeError: another thread is choosing for this model; give each thread a copy of it.
    """
    check_choice(masked, guidance_half)
    layers = layers_to_choose_for(model)
    before = [(layer, layer._scale_index, layer._chooser) for layer in layers]
    choose(layers, masked, guidance_half)
    try:
        yield
    finally:
        for layer, index, chooser in before:
            layer._scale_index, layer._chooser = index, chooser


def layers_to_choose_for(model: nn.Module) -> list[Int4Linear]:
    """A model's layers that have several scales; a float layer in fine-tuning stands for the one it will be."""
    layers = []
    for module in model.modules():
        (layer,) = (module,) if isinstance(module, Int4Linear) else vars(module).get("_stands_for", (None,))
        if layer is not None and layer.num_scales > 1:
            layers.append(layer)
    return layers


def check_choice(masked: float | Tensor | None, guidance_half: int | None) -> None:
    """Check the arguments of `activation_scales`."""
    if isinstance(masked, Tensor) and masked.ndim:
        if masked.ndim != 1 or not masked.is_floating_point():
            raise TypeError(f"masked: expected a number or floats (B,), got {masked.dtype} {tuple(masked.shape)}")
        # elsewhere, and in compiled code, looking at values would wait for them
        is_here = masked.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_here and not ((masked >= 0) & (masked <= 1)).all():
            raise ValueError(f"masked: expected numbers in [0, 1], got {masked.tolist()}")
    elif not isinstance(masked, (Real, Tensor, NoneType)):
        raise TypeError(f"masked: expected a number or floats (B,), got {masked!r}")
    elif masked is not None and not 0 <= masked <= 1:
        raise ValueError(f"masked: expected a number in [0, 1], got {masked}")
    if guidance_half not in (None, 0, 1) or isinstance(guidance_half, bool):
        raise ValueError(f"guidance_half: expected 0, 1 or None, got {guidance_half!r}")


def choose(layers: Sequence[Int4Linear], masked: float | Tensor | None, guidance_half: int | None) -> None:
    """Set the choice on layers that have several scales."""
    indices: dict[tuple[int, ...], Tensor] = {}
    for layer in layers:
        assert layer.x_scale is not None
        shape = tuple(layer.x_scale.shape)
        if shape not in indices:
            indices[shape] = scale_index(shape, masked, guidance_half, layer.x_scale.device, layer.layer_name)
    if torch.compiler.is_compiling():
        # compiled code sets what this thread chose when it was traced into
        for layer in layers:
            assert layer.x_scale is not None
            layer._scale_index = indices[tuple(layer.x_scale.shape)]
        return
    me = threading.get_ident()
    with _CHOOSING:
        for layer in layers:
            if layer._chooser not in (None, me):
                raise RuntimeError(
                    "model: another thread is choosing its activation scales "
                    f"({layer.layer_name or 'a layer'}); give each thread a copy of the model"
                )
        for layer in layers:
            assert layer.x_scale is not None
            layer._scale_index, layer._chooser = indices[tuple(layer.x_scale.shape)], me


def scale_index(
    shape: tuple[int, ...], masked: float | Tensor | None, guidance_half: int | None, device: torch.device, name: str
) -> Tensor:
    """Where the scales are in a flat (buckets, halves): int64 (1,), (2,) for two halves, or (B,)."""
    num_buckets, num_halves = shape
    if masked is None:
        if num_buckets > 1:
            raise ValueError(f"masked: expected the share of masked tokens, for {name} has {num_buckets} buckets")
        masked = 1.0
    share = torch.as_tensor(masked, dtype=torch.float64, device=device).reshape(-1)
    bucket = (share * num_buckets).long().clamp(max=num_buckets - 1)
    if num_halves == 1:
        return bucket
    if guidance_half is not None:
        return bucket * 2 + guidance_half
    if len(bucket) == 1:
        bucket = bucket.expand(2)
    elif len(bucket) % 2:
        raise ValueError(f"masked: expected samples of two guidance halves, got {len(bucket)}")
    half = torch.arange(len(bucket), device=bucket.device) * 2 // len(bucket)
    return bucket * 2 + half


class ScalesByTokens:
    """Hooks of a model that choose its layers' scales at each call, from the token ids it is called with.

    Each sample's share of masked tokens is that of the first argument of the model that holds integers of two or more
    dimensions; its batch holds both guidance halves, the first one first. A choice by `activation_scales` goes before.
    Threads that call the model take turns.
    """

    def __init__(self, mask_token_id: int) -> None:
        """Remember the id of the mask token."""
        self.mask_token_id = mask_token_id
        # the thread whose call these hooks chose for
        self._caller: int | None = None
        self._turn = threading.Lock()

    def attach(self, model: nn.Module) -> None:
        """Register the hooks."""
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose."""
        layers = layers_to_choose_for(model)
        if torch.compiler.is_compiling():
            if any(layer._scale_index is None for layer in layers):
                choose(layers, masked_share(self.tokens(model, args, kwargs), self.mask_token_id), None)
                self._caller = 0
            return
        if self._caller is None and all(layer._scale_index is not None for layer in layers):
            return
        self._turn.acquire()
        self._caller = threading.get_ident()
        tokens = self.tokens(model, args, kwargs)
        has_halves = any(layer.x_scale is not None and layer.x_scale.shape[1] == 2 for layer in layers)
        if has_halves and tokens.device.type == "cpu":
            first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
            if not torch.equal(first, second):
                raise ValueError(
                    "model: has activation scales for guidance halves; expected both halves of the batch with the "
                    f"same tokens, got others (shape {tuple(tokens.shape)}); call it inside "
                    "mgt_sampler.activation_scales(model, guidance_half=...) where a batch is one half"
                )
        choose(layers, masked_share(tokens, self.mask_token_id), None)

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the choice; called where `before` or the model raised, too."""
        if torch.compiler.is_compiling():
            is_ours = self._caller is not None
        else:
            is_ours = self._caller == threading.get_ident()
        if not is_ours:
            return
        for layer in layers_to_choose_for(model):
            layer._scale_index = layer._chooser = None
        self._caller = None
        if not torch.compiler.is_compiling():
            self._turn.release()

    def __getstate__(self) -> int:
        """What is copied and pickled."""
        return self.mask_token_id

    def __setstate__(self, mask_token_id: int) -> None:
        """Start afresh."""
        self.__init__(mask_token_id)  # type: ignore[misc]

    def tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The token ids among a model's arguments."""
        for value in inspect.signature(model.forward).bind(*args, **kwargs).arguments.values():
            if isinstance(value, Tensor) and value.ndim >= 2 and not (value.is_floating_point() or value.is_complex()):
                return value
        raise TypeError(
            "mask_token_id: expected a model that is called with token ids, integers of two or more dimensions; choose "
            "its scales by activation_scales"
        )


def choosers_of(model: nn.Module) -> list[ScalesByTokens]:
    """The hooks of a model that choose its scales by its tokens."""
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, ScalesByTokens)]


def masked_share(tokens: Tensor, mask_token_id: int) -> Tensor:
    """The share of each sample's tokens that is masked, float64 (B,)."""
    is_masked = (tokens == mask_token_id).flatten(1)
    return is_masked.sum(1).double() / max(1, is_masked.shape[1])


class ScaledModel:
    """A `MaskedModel` that tells quantized layers which of their activation scales to use.

    By each sample's share of masked tokens, and half 0 with a condition, half 1 without; all else is the model's.
    Threads that share it take turns.
    """

    def __init__(self, model: MaskedModel) -> None:
        """Wrap the model."""
        self._model = model
        self._turn = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)

    def __getstate__(self) -> Any:
        """What is copied and pickled: the model."""
        return self._model

    def __setstate__(self, model: Any) -> None:
        """Wrap the copy."""
        self.__init__(model)  # type: ignore[misc]

    def predict_logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """The model's logits, (B, N, V)."""
        masked = masked_share(tokens, self._model.mask_token_id)
        with self._turn, activation_scales(self._network(), masked=masked, guidance_half=int(condition is None)):
            return self._model.predict_logits(tokens, condition)

    def _network(self) -> nn.Module:
        # what holds the layers: the model, or the modules it has
        if isinstance(self._model, nn.Module):
            return self._model
        return nn.ModuleList(value for value in vars(self._model).values() if isinstance(value, nn.Module))
