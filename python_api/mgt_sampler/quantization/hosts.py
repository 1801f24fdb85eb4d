"""`save_pretrained` and `from_pretrained` of diffusers and transformers for quantized models.

Both libraries let a quantization method bring a quantizer, which puts layers in place before weights are loaded. The
model's configuration then carries what `describe` says of the layers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mgt_kernels import PackedInt4
from mgt_kernels.packing import packed_bytes

from .layer import Int4Linear
from .replace import check_linear, inherit, is_linear, replace
from .scales import ScalesByTokens, choosers_of

VERSION = 1
# for each library, the module that knows it and the class whose models it saves
_LIBRARIES = {"diffusers": (".in_diffusers", "ModelMixin"), "transformers": (".in_transformers", "PreTrainedModel")}
# what a library must not cast
FROZEN = ("w_q", "scale", "zero_point", "x_scale")


class Method(str, Enum):
    """The name under which the libraries know us."""

    MGT_INT4 = "mgt_int4"


class Int4Facts:
    """What a model's configuration says of its quantized layers, for a class that is a library's configuration too."""

    def __init__(
        self, layers: dict[str, Any], mask_token_id: int | None = None, version: int = VERSION, **_: Any
    ) -> None:
        """Check the version and hold the facts."""
        if version != VERSION:
            raise ValueError(f"quantization_config: version: expected {VERSION}, got {version!r}")
        self.quant_method: Any = Method.MGT_INT4
        self.layers, self.mask_token_id, self.version = layers, mask_token_id, version

    def to_dict(self) -> dict[str, Any]:
        """The facts, for JSON."""
        return {**super().to_dict(), "quant_method": Method.MGT_INT4.value}  # type: ignore[misc]


def register_quantizers() -> tuple[str, ...]:
    """Teach diffusers and transformers, as far as they are installed, to load models that `quantize` made.

        mgt_sampler.register_quantizers()
        transformer = UVit2DModel.from_pretrained("folder")      # that a quantized model's save_pretrained wrote

    Without it `from_pretrained` of such a folder fails. `quantize` and `load_quantized` do it for the library of their
    model.

    Returns:
        The names of the libraries.
    """
    known = []
    for library, (module, _) in _LIBRARIES.items():
        try:
            import_module(library)
        except ImportError:
            continue
        import_module(module, __package__)
        known.append(library)
    return tuple(known)


def attach_quantizers(model: nn.Module) -> None:
    """Let the models of diffusers and transformers in a quantized model be saved by their `save_pretrained`."""
    for library, (module, base) in _LIBRARIES.items():
        kind = getattr(sys.modules.get(library), base, None)
        if kind is None:
            continue
        # from the inside out: where a part shares its configuration with the whole, the whole's names stay in it
        for part in reversed(list(model.modules())):
            if isinstance(part, kind) and any(isinstance(layer, Int4Linear) for layer in part.modules()):
                import_module(module, __package__).attach(part, describe(part))


def describe(model: nn.Module) -> dict[str, Any]:
    """What a model's configuration says of its quantized layers."""
    return {
        "version": VERSION,
        "layers": {
            name: {
                "shape": list(layer.packed.shape),
                "group_size": layer.group_size,
                "scale_dtype": str(layer.scale.dtype).removeprefix("torch."),
                "x_scale": None if layer.x_scale is None else list(layer.x_scale.shape),
            }
            for name, layer in model.named_modules()
            if isinstance(layer, Int4Linear)
        },
        "mask_token_id": next((chooser.mask_token_id for chooser in choosers_of(model)), None),
    }


def prepare(model: nn.Module, layers: Mapping[str, Any], mask_token_id: int | None) -> None:
    """Put empty quantized layers, on the meta device, in the places of a model's linear ones.

    Raises:
        ValueError: the configuration does not fit the model.
    """
    modules = dict(model.named_modules())
    replacements: dict[Any, nn.Module] = {}
    for name, facts in layers.items():
        linear = modules.get(name)
        try:
            (num_outputs, num_inputs), group_size = facts["shape"], facts["group_size"]
            if not is_linear(linear) or [linear.out_features, linear.in_features] != facts["shape"]:  # type: ignore[union-attr]
                raise ValueError(f"is no linear layer of shape {facts['shape']} here")
            assert isinstance(linear, nn.Linear)
            check_linear(name, linear)
            with torch.device("meta"):
                groups = (num_outputs, -(-num_inputs // group_size))
                packed = PackedInt4(
                    torch.empty(num_outputs, packed_bytes(num_inputs), dtype=torch.uint8),
                    torch.empty(
                        groups, dtype={"float16": torch.float16, "float32": torch.float32}[facts["scale_dtype"]]
                    ),
                    torch.empty(groups, dtype=torch.uint8),
                    (num_outputs, num_inputs),
                    group_size,
                )
                scales = None if facts["x_scale"] is None else torch.empty(facts["x_scale"], dtype=torch.float32)
                bias = None if linear.bias is None else torch.empty_like(linear.bias)
                layer = Int4Linear(packed, bias, scales, dtype=linear.weight.dtype, layer_name=name)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"quantization_config: layers: {name}: {error}") from error
        inherit(linear, layer)
        replacements[linear] = layer
    replace(model, replacements)
    if mask_token_id is not None:
        ScalesByTokens(mask_token_id).attach(model)


def check_loaded(model: nn.Module) -> None:
    """Check that every quantized layer got its tensors, with values that the kernels take.

    Raises:
        ValueError: one did not; the message names it.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, Int4Linear):
            continue
        layer.weight_like.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        if not layer.w_q.is_meta:
            try:
                PackedInt4.from_tensors(layer.packed.to_tensors())
                if layer.x_scale is not None and not ((layer.x_scale > 0) & layer.x_scale.isfinite()).all():
                    raise ValueError("x_scale: expected positive, finite numbers")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
