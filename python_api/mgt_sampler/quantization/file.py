"""A quantized model in one file: packed weights, scales, paths and all other parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgt_kernels import PackedInt4
from mgt_kernels.checks import BACKENDS
from mgt_kernels.linear import check_scales

from ..tensor_file import TensorFile, check_object, read_tensor_file, write_tensor_file
from .hosts import attach_quantizers
from .layer import Int4Linear
from .replace import check_linear, is_linear, with_layers
from .scales import ScalesByTokens, choosers_of

FORMAT_VERSION = 2
_FACTS: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "model": str,
    "config": (dict, type(None)),
    "layers": dict,
    "mask_token_id": (int, type(None)),
}
_LAYER: dict[str, type | tuple[type, ...]] = {"shape": list, "group_size": int, "activation": str}
_PACKED = ("w_q", "scale", "zero_point")
# what a model may be kept in beside the dtype that it is made in
_COMPUTES_IN = (torch.float16, torch.bfloat16, torch.float32)


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a quantized model to one safetensors file: packed weights, scales, paths and all other parameters.

    The header holds format version, class and configuration of the model, its layers, and the SHA-256 of the file with
    64 zeros in its place. Tensors are written from where they are, tied ones once.

    Args:
        model: that `quantize` or `load_quantized` returned.
        path: the file, replaced at once when it is whole.

    Raises:
        TypeError: the model has a tensor that safetensors files cannot hold, or a state that is no tensor.
        ValueError: the model has no quantized layer, or tensors on the meta device (accelerate's offload).
        OSError: the file cannot be written; an older one is then as before.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    if not layers:
        raise ValueError("model: expected one with quantized layers, got none")
    facts = {
        "version": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": config_of(model),
        "layers": {
            name: {"shape": layer.packed.shape, "group_size": layer.group_size, "activation": layer.activation}
            for name, layer in layers.items()
        },
        "mask_token_id": next((hooks.mask_token_id for hooks in choosers_of(model)), None),
    }
    write_tensor_file(path, model.state_dict(), {"mgt_quantized": json.dumps(facts)})


@torch.inference_mode(False)
def load_quantized(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    path: str | Path,
    *,
    backend: str = "auto",
    batch_invariant: bool = True,
) -> nn.Module:
    """Rebuild the model that `save_quantized` wrote, bit for bit.

    Args:
        model_or_factory: a model of the same class and sizes that is not quantized, which stays as it is, or what makes
            one; its weights do not matter.
        path: the file.
        backend: of the kernels.
        batch_invariant: of the W4A16 layers, as in `quantize`.

    Returns:
        The quantized model in evaluation mode, on the device of the model given where it is on one, else on the CPU.
        Its tensors have the file's dtypes; those that are tied in the file are tied.

    Raises:
        TypeError: no model and nothing that makes one, or no bool.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, of another model or version, or no quantized model; the message
            names the file and the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    file = read_tensor_file(path)
    if "mgt_quantized" not in file.metadata:
        file.refuse("not of save_quantized")
    version = _version(file)
    if version != FORMAT_VERSION:
        file.refuse(f"written in version {version} of the format, expected {FORMAT_VERSION}")
    facts = file.facts("mgt_quantized", _FACTS)
    model = model_or_factory if isinstance(model_or_factory, nn.Module) else model_or_factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_or_factory: expected a torch.nn.Module, got {type(model).__name__}")
    for what, ours in (("model", type(model).__name__), ("config", config_of(model))):
        if facts[what] != ours:
            file.refuse(f"made of another model: {what} {str(facts[what])[:2000]!r}, expected {ours!r}")
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    replacements = _layers_of(file, facts, model, backend, batch_invariant)
    # what the file holds is not copied from the model first
    persistent = model.state_dict(keep_vars=True)
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for tensor in persistent.values()
        if type(tensor) in (Tensor, nn.Parameter)
    }
    quantized = with_layers(model, replacements, memo)
    _check_tensors(file, quantized, {layer: linear for linear, layer in replacements.items()})
    parameters = dict(quantized.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        state[name] = tensor
        if name in parameters:
            if tensor.dtype in _COMPUTES_IN and not tensor.isfinite().all():
                file.refuse(f"{name}: expected finite values")
            # one object for all names of a tied parameter
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            state[name] = parameter.requires_grad_(parameters[name].requires_grad)
    try:
        # assigned, not copied: what a file holds in bfloat16 is not to be widened
        quantized.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: made of another model: {' '.join(str(error).split())}") from error
    if facts["mask_token_id"] is not None:
        ScalesByTokens(facts["mask_token_id"]).attach(quantized)
    attach_quantizers(quantized)
    return quantized.to(device).eval()


def _version(file: TensorFile) -> int:
    try:
        version = json.loads(file.metadata["mgt_quantized"])["version"]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        file.refuse("damaged: mgt_quantized in its header has no version")
    if type(version) is not int:
        file.refuse(f"damaged: mgt_quantized: version: expected an int, got {str(version)[:20]!r}")
    return version


def _layers_of(
    file: TensorFile, facts: Mapping[str, Any], model: nn.Module, backend: str, batch_invariant: bool
) -> dict[nn.Module, nn.Module]:
    """The file's layers for the model's, with all facts about them checked."""
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    if not facts["layers"]:
        file.refuse("damaged: it has no quantized layer")
    for name, layer in facts["layers"].items():
        check_object(file, name, layer, _LAYER)
        shape, linear = tuple(layer["shape"]), modules.get(name)
        if not is_linear(linear) or (linear.out_features, linear.in_features) != shape:  # type: ignore[union-attr]
            file.refuse(f"made of another model: {name} is no linear layer of shape {str(shape)[:100]} here")
        assert isinstance(linear, nn.Linear)
        check_linear(name, linear)
        own = {key: file.tensors.get(f"{name}.{key}") for key in (*_PACKED, "bias", "x_scale", "weight_like")}
        try:
            layout = torch.tensor([*shape, layer["group_size"]], device="cpu")
            packed = PackedInt4.from_tensors({"layout": layout, **{k: t for k, t in own.items() if t is not None}})
            _check_own(own, linear, layer["activation"])
            like = own["weight_like"]
            assert like is not None
            quantized = Int4Linear(
                packed, own["bias"], own["x_scale"], backend=backend, batch_invariant=batch_invariant,
                dtype=like.dtype, layer_name=name,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            file.refuse(f"{name}: {' '.join(str(error).split())}")
        replacements[linear] = quantized
    several = any(layer.num_scales > 1 for layer in replacements.values())  # type: ignore[operator]
    if facts["mask_token_id"] is not None and not several:
        file.refuse("damaged: a mask_token_id, but no layer with several scales")
    return replacements


def _check_own(own: Mapping[str, Tensor | None], linear: nn.Linear, activation: str) -> None:
    """Check what belongs to a layer beside its weights."""
    bias, x_scale, like = own["bias"], own["x_scale"], own["weight_like"]
    if activation not in ("a8", "a16") or (activation == "a8") != (x_scale is not None):
        raise ValueError(f"activation: {activation[:20]!r} {'without' if x_scale is None else 'with'} x_scale")
    if like is None or like.shape != (1,) or like.dtype not in _COMPUTES_IN:
        raise ValueError("weight_like: expected one value in float32, bfloat16 or float16")
    if (linear.bias is None) != (bias is None):
        raise ValueError(f"bias: expected {'none' if linear.bias is None else 'one'}, as the model has")
    if bias is not None and (bias.shape != (linear.out_features,) or bias.dtype not in _COMPUTES_IN):
        raise ValueError(f"bias: expected {linear.out_features} values, got {bias.dtype} {tuple(bias.shape)}")
    if bias is not None and not bias.isfinite().all():
        raise ValueError("bias: expected finite values")
    if x_scale is not None:
        if x_scale.dtype != torch.float32 or x_scale.ndim != 2:
            raise ValueError(f"x_scale: expected float32 (buckets, halves), got {x_scale.dtype} {tuple(x_scale.shape)}")
        check_scales(x_scale.flatten())


def _check_tensors(file: TensorFile, quantized: nn.Module, floats: Mapping[nn.Module, Any]) -> None:
    """Check that the file has the model's tensors, in their shapes and in dtypes that fit together."""
    expected = quantized.state_dict()
    for what, names in (("lacks", expected.keys() - file.tensors.keys()), ("has", file.tensors.keys() - expected)):
        if names:
            file.refuse(f"made of another model: it {what} {', '.join(sorted(names))[:2000]}")
    dtypes = {name: tensor.dtype for name, tensor in expected.items()}
    for name, layer in quantized.named_modules(remove_duplicate=False):
        if layer in floats:
            dtypes[f"{name}.weight_like"] = floats[layer].weight.dtype
            if floats[layer].bias is not None:
                dtypes[f"{name}.bias"] = floats[layer].bias.dtype
            # their dtypes are their own
            for key in (*_PACKED, "x_scale"):
                dtypes.pop(f"{name}.{key}", None)
    kept_in: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for name, tensor in file.tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            file.refuse(f"made of another model: {name} has shape {shapes}")
        ours = dtypes.get(name, tensor.dtype)
        if tensor.dtype != ours and not {tensor.dtype, ours} <= set(_COMPUTES_IN):
            file.refuse(f"made of another model: {name} is in {tensor.dtype}, expected {ours}")
        # a whole model may be kept in another dtype than it is made in, some of its tensors alone would not fit
        first, dtype = kept_in.setdefault(ours, (name, tensor.dtype)) if name in dtypes else (name, tensor.dtype)
        if dtype != tensor.dtype:
            file.refuse(
                f"made of another model: {name} is in {tensor.dtype} and {first} in {dtype}, where the model given has "
                f"both in {ours}; make it in the dtypes of the one that was saved"
            )


# what transformers notes in a configuration when it saves or loads
_NOTES = frozenset(("architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version"))


def config_of(model: nn.Module) -> Any:
    """What tells apart two models of the same class, as JSON has it; None where there is no `config`."""
    config = getattr(model, "config", None)
    notes = _NOTES if hasattr(config, "to_dict") else frozenset(("quantization_config",))
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    elif hasattr(config, "to_dict"):
        config = config.to_dict()  # type: ignore[union-attr]
    if not isinstance(config, Mapping):
        return None
    # names with an underscore tell where a model came from, not what it is
    kept = {k: v for k, v in config.items() if not str(k).startswith("_") and k not in notes}
    return json.loads(json.dumps({str(key): value for key, value in kept.items()}, sort_keys=True, default=str))
