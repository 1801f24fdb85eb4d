"""A copy of a model in which other layers have taken the places of linear ones, with all that hosts hung on them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from .layer import OWN_TENSORS, Int4Linear

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_non_persistent_buffers_set",
)
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# forward pre-hooks that compute a tensor of the layer from others, and the names of those others
_MAKERS: dict[type, tuple[str, tuple[str, ...]]] = {
    WeightNorm: ("name", ("_g", "_v")),
    SpectralNorm: ("name", ("_orig", "_u", "_v")),
    BasePruningMethod: ("_tensor_name", ("_orig", "_mask")),
}


def matching(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers by name; each once, under its first name. Layers of adapters stay as they are."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{argument}: expected a sequence of patterns, got {patterns!r}")
    adapters = adapter_layers(model)
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            raise ValueError(f"{name or 'model'}: is quantized already")
        chosen = any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
        # the model itself has no place to put another in
        if is_linear(module) and name and chosen and module not in adapters:
            check_linear(name, module)
            linears[name] = module
    if not linears:
        raise ValueError(f"include: expected patterns that match a linear layer, got {include!r} without {exclude!r}")
    return linears


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module computes what `torch.nn.Linear` does; derived classes may compute something else."""
    return module is not None and parametrize.type_before_parametrizations(module) is nn.Linear


def adapter_layers(model: nn.Module) -> set[nn.Module]:
    """What PEFT's adapters are made of: all modules in them but the layers that they adapt."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: set[nn.Module] = set()
    for adapter in model.modules():
        if isinstance(adapter, BaseTunerLayer):
            inside.update(set(adapter.modules()) - set(adapter.get_base_layer().modules()))
    return inside


def check_linear(name: str, linear: nn.Linear) -> None:
    """Refuse a layer that a host has changed in a way which another layer in its place would lose."""
    if "forward" in vars(linear):
        raise ValueError(
            f"{name}: its forward has been replaced on the instance, as accelerate does to move weights about; "
            "quantize before that, after accelerate.hooks.remove_hook_from_module(model, recurse=True), or exclude it"
        )
    makers = _makers(linear)
    known = {id(hook) for hook in makers}
    for kind in () if parametrize.is_parametrized(linear) else _STATE_DICT_HOOKS:
        for hook in vars(linear)[kind].values():
            # those of the weight's makers carry their names
            if not known or "Norm" not in type(getattr(hook, "hook", hook)).__name__:
                raise ValueError(
                    f"{name}: has state-dict hooks, which know a Linear's tensors; remove them or exclude the layer"
                )
    made = {getattr(hook, _kind(hook)[0]) for hook in makers}
    for tensor in ("weight", "bias"):
        computed = tensor not in linear._parameters and not parametrize.is_parametrized(linear, tensor)
        if computed and tensor not in made:
            raise ValueError(
                f"{name}: its {tensor} is computed by what is not known here; make it a parameter or exclude the layer"
            )


def effective(name: str, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a layer's next forward would use in evaluation; the layer stays as it is."""
    makers = _makers(linear)
    with torch.no_grad():
        if makers or parametrize.is_parametrized(linear):
            with DetachedCopies():
                linear = copy.deepcopy(linear).eval()
            for hook in makers:
                hook(linear, ())
        weight, bias = linear.weight, linear.bias
    if weight.is_meta:
        raise ValueError(f"{name}: expected weights, got none: it is on the meta device; load or move them first")
    return weight.detach(), None if bias is None else bias.detach()


def with_layers(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], memo: dict[int, Any] | None = None
) -> nn.Module:
    """A copy of a model with other modules in place of some linear layers, whose weights are not copied on the way.

    The layers' hooks come along, as do attributes, buffers and modules that a Linear does not have by itself.
    """
    memo = {} if memo is None else memo
    memo.update({id(linear): layer for linear, layer in replacements.items()})
    with DetachedCopies():
        duplicate = copy.deepcopy(model, memo)
        for linear, layer in replacements.items():
            _move_in(linear, layer, memo)
    return duplicate


def replace(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put modules in the places of others, wherever they are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[name] = replacements[child]


def inherit(before: nn.Module, after: nn.Module) -> None:
    """Give a layer what was hung on the one that it replaces: hooks, attributes, tensors, modules."""
    for kind in _HOOKS:
        setattr(after, kind, getattr(before, kind))
    for name, value in vars(before).items():
        vars(after).setdefault(name, value)
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(before)[kind].items():
            if name not in OWN_TENSORS:
                vars(after)[kind][name] = value


def _move_in(linear: nn.Module, layer: nn.Module, memo: dict[int, Any]) -> None:
    makers = _makers(linear)
    of_makers = {getattr(hook, _kind(hook)[0]) + suffix for hook in makers for suffix in _kind(hook)[1]}
    made = {getattr(hook, _kind(hook)[0]) for hook in makers}
    maker_ids = {id(hook) for hook in makers}
    for kind in _HOOKS:
        hooks = getattr(linear, kind)
        if kind == "_forward_pre_hooks":
            hooks = type(hooks)((key, hook) for key, hook in hooks.items() if id(hook) not in maker_ids)
        setattr(layer, kind, copy.deepcopy(hooks, memo))
    plain = {*vars(nn.Module()), "in_features", "out_features"}
    for name, value in vars(linear).items():
        if name not in plain and name not in made:
            _check_free(layer, name)
            vars(layer)[name] = copy.deepcopy(value, memo)
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(linear)[kind].items():
            if name not in ("weight", "bias", "parametrizations") and name not in of_makers:
                _check_free(layer, name)
                vars(layer)[kind][name] = copy.deepcopy(value, memo)


def _check_free(layer: nn.Module, name: str) -> None:
    if hasattr(layer, name):
        raise ValueError(
            f"{layer.layer_name}: has an attribute {name}, which a quantized layer needs for itself; rename it, or "
            "exclude the layer"
        )


def _makers(linear: nn.Module) -> list[Any]:
    return [hook for hook in linear._forward_pre_hooks.values() if isinstance(hook, tuple(_MAKERS))]


def _kind(hook: Any) -> tuple[str, tuple[str, ...]]:
    return next(_MAKERS[kind] for kind in _MAKERS if isinstance(hook, kind))


class DetachedCopies(TorchFunctionMode):
    """Deep copies of tensors that are results of computations with gradients, which torch refuses, are detached."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copy the values alone."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
