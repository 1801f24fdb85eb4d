"""Sampling from masked generative transformers, on the fused kernels of `mgt_kernels`.

`generate` is the decoding loop over any model and `generate_text` the block-wise one of text; what a step does is a
`Rule`, of which `presets` has the published ones by project and `samplers` by paper. `accelerate` makes a loaded model
of another project draw here, `MGTScheduler` is the drop-in for diffusers' aMUSEd scheduler and for Meissonic's (needs
diffusers), `load_model` the bundled model; `quantize` makes a model's linear layers 4-bit ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .sampling import GenerateOutput, SamplerStep, generate
from .state import State
from .step import Rule, begin, take_step, take_steps
from .techniques import Correction, Differential, ZSampling

if TYPE_CHECKING:
    from . import presets as presets
    from . import samplers as samplers
    from .calibration import calibrate_schedule as calibrate_schedule
    from .clients import Acceleration as Acceleration
    from .clients import accelerate as accelerate
    from .clients import restore as restore
    from .head import folded_logits as folded_logits
    from .merge import MergedBlocks as MergedBlocks
    from .merge import TokenMerging as TokenMerging
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
    from .text import TextOutput as TextOutput
    from .text import TextStep as TextStep
    from .text import generate_text as generate_text

__all__ = [
    "Acceleration",
    "CalibrationInput",
    "Correction",
    "Differential",
    "GenerateOutput",
    "Int4Linear",
    "LayerReport",
    "MGTScheduler",
    "MGTSchedulerOutput",
    "MergedBlocks",
    "QuantizationReport",
    "Rule",
    "SamplerStep",
    "ScaledModel",
    "State",
    "TextOutput",
    "TextStep",
    "TokenMerging",
    "ZSampling",
    "accelerate",
    "activation_scales",
    "begin",
    "calibrate_schedule",
    "folded_logits",
    "generate",
    "generate_text",
    "load_model",
    "load_quantized",
    "presets",
    "quantize",
    "register_quantizers",
    "restore",
    "sampler_trajectories",
    "samplers",
    "save_quantized",
    "take_step",
    "take_steps",
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
    "MergedBlocks": ".merge",
    "QuantizationReport": ".quantization",
    "ScaledModel": ".quantization",
    "TextOutput": ".text",
    "TextStep": ".text",
    "TokenMerging": ".merge",
    "accelerate": ".clients",
    "activation_scales": ".quantization",
    "calibrate_schedule": ".calibration",
    "folded_logits": ".head",
    "generate_text": ".text",
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
    if name in ("presets", "samplers"):
        return import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
