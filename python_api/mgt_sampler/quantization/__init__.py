"""SCQ, secondary calibration quantization (arXiv 2411.10781): linear layers in 4 bits, some with 8-bit activations.

`quantize` makes a quantized copy of a model, `save_quantized` and `load_quantized` keep it in one file.
"""

from .calibrate import CalibrationInput, quantize, sampler_trajectories
from .file import load_quantized, save_quantized
from .hosts import register_quantizers
from .layer import Int4Linear, Int4Weight
from .report import LayerReport, QuantizationReport
from .scales import ScaledModel, activation_scales

__all__ = [
    "CalibrationInput",
    "Int4Linear",
    "Int4Weight",
    "LayerReport",
    "QuantizationReport",
    "ScaledModel",
    "activation_scales",
    "load_quantized",
    "quantize",
    "register_quantizers",
    "sampler_trajectories",
    "save_quantized",
]
