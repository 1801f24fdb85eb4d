"""Sampling from masked generative transformers, on the fused kernels of `mgt_kernels`.

`generate` is the decoding loop over any model, `accelerate` makes a loaded model of another project draw here,
`MGTScheduler` is the drop-in for diffusers' aMUSEd scheduler and for Meissonic's (needs diffusers), `load_model` the
bundled model; `quantize` makes a model's linear layers 4-bit ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .sampling import GenerateOutput, SamplerStep, generate
from .techniques import Differential, ZSampling

if TYPE_CHECKING:
    from .clients import Acceleration as Acceleration
    from .clients import accelerate as accelerate
    from .clients import restore as restore
    from .models import load_model as load_model
    from .pipelines import z_sample as z_sample
    from .quantization import CalibrationInput as CalibrationInput
    from .quantization import Int4Linear as Int4Linear
    from .quantization import LayerReport as LayerReport
    from .quantization import QuantizationReport as QuantizationReport
    from .quantization import ScaledModel as ScaledModel
    from .quantization import activation_scales as activation_scales
    from .quantization import load_quantized as load_quantized
    from .quantization import quantize as quantize
    from .quantization import register_quantizers as register_quantizers
    from .quantization import sampler_trajectories as sampler_trajectories
    from .quantization import save_quantized as save_quantized
    from .scheduler import MGTScheduler as MGTScheduler
    from .scheduler import MGTSchedulerOutput as MGTSchedulerOutput

__all__ = [
    "Acceleration",
    "CalibrationInput",
    "Differential",
    "GenerateOutput",
    "Int4Linear",
    "LayerReport",
    "MGTScheduler",
    "MGTSchedulerOutput",
    "QuantizationReport",
    "SamplerStep",
    "ScaledModel",
    "ZSampling",
    "accelerate",
    "activation_scales",
    "generate",
    "load_model",
    "load_quantized",
    "quantize",
    "register_quantizers",
    "restore",
    "sampler_trajectories",
    "save_quantized",
    "z_sample",
]

# imported when first asked for: diffusers is optional and slow to import
_LAZY = {
    "Acceleration": ".clients",
    "CalibrationInput": ".quantization",
    "Int4Linear": ".quantization",
    "LayerReport": ".quantization",
    "MGTScheduler": ".scheduler",
    "MGTSchedulerOutput": ".scheduler",
    "QuantizationReport": ".quantization",
    "ScaledModel": ".quantization",
    "accelerate": ".clients",
    "activation_scales": ".quantization",
    "load_model": ".models",
    "load_quantized": ".quantization",
    "quantize": ".quantization",
    "register_quantizers": ".quantization",
    "restore": ".clients",
    "sampler_trajectories": ".quantization",
    "save_quantized": ".quantization",
    "z_sample": ".pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
