"""The quantizer that diffusers loads quantized models with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from .hosts import FROZEN, Int4Facts, Method, check_loaded, prepare
from .layer import Int4Linear


class Int4Config(Int4Facts, QuantizationConfigMixin):
    """What a model's configuration says of its quantized layers."""

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing has a default."""
        return self.to_dict()


class Int4Quantizer(DiffusersQuantizer):
    """Puts the layers in place, and keeps their tensors as they are whatever dtype a model is loaded in."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = self.quantization_config
        prepare(model, config.layers, config.mask_token_id)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        check_loaded(model)
        # moving it to a dtype is safe
        model.is_quantized = False
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor is one that must not be cast."""
        path, _, name = param_name.rpartition(".")
        return name in FROZEN and isinstance(model.get_submodule(path), Int4Linear)

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a tensor of the file in its place."""
        path, _, name = param_name.rpartition(".")
        model.get_submodule(path)._buffers[name] = state_dict[param_name].to(target_device)

    @property
    def is_serializable(self) -> bool:
        """Whether models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained; adapters can."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether models can be compiled."""
        return True


def attach(model: Any, facts: dict[str, Any]) -> None:
    """Let `save_pretrained` write what `from_pretrained` needs."""
    config = Int4Config(**facts)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = Int4Quantizer(config)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MGT_INT4.value] = Int4Config
auto.AUTO_QUANTIZER_MAPPING[Method.MGT_INT4.value] = Int4Quantizer
