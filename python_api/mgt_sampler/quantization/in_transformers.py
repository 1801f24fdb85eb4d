"""The quantizer that transformers loads quantized models with."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .hosts import Int4Facts, Method, check_loaded, prepare
from .layer import Int4Linear


class Int4Config(Int4Facts, QuantizationConfigMixin):
    """What a model's configuration says of its quantized layers."""


class Int4Quantizer(HfQuantizer):
    """Puts the layers in place before their tensors are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config: Any = self.quantization_config
        prepare(model, config.layers, config.mask_token_id)
        for name in config.layers:
            # has weights of its own now
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
        ignored = {rf"^{re.escape(name)}\.weight$" for name in config.layers}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_loaded(model)
        # moving it to a dtype is safe
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save.

        Where our quantizer is not registered, transformers warns and loads a model with random layers. A `weight` of
        one value for each layer keeps it from that: it is of the wrong shape.
        """
        state = dict(model.state_dict())
        for name, layer in model.named_modules():
            if isinstance(layer, Int4Linear):
                state[f"{name}.weight"] = torch.zeros(1, dtype=layer.weight_like.dtype)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether models can be saved: older versions load them in another way."""
        return int(transformers.__version__.split(".")[0]) >= 5

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether models can be compiled."""
        return True


def attach(model: Any, facts: dict[str, Any]) -> None:
    """Let `save_pretrained` write what `from_pretrained` needs."""
    config = Int4Config(**facts)
    model.config.quantization_config = config
    model.hf_quantizer = Int4Quantizer(config)
    for name in facts["layers"]:
        if hasattr(model, "all_tied_weights_keys"):
            model.all_tied_weights_keys.pop(f"{name}.weight", None)


AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MGT_INT4.value] = Int4Config
AUTO_QUANTIZER_MAPPING[Method.MGT_INT4.value] = Int4Quantizer
