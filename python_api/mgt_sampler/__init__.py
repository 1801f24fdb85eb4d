"""Sampling from masked generative transformers, on the fused kernels of `mgt_kernels`.

`generate` is the decoding loop over any model, `MGTScheduler` the drop-in for diffusers' aMUSEd scheduler and
for Meissonic's (needs diffusers), `load_model` the bundled model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .sampling import GenerateOutput, SamplerStep, generate
from .techniques import Differential, ZSampling

if TYPE_CHECKING:
    from .models import load_model as load_model
    from .pipelines import z_sample as z_sample
    from .scheduler import MGTScheduler as MGTScheduler
    from .scheduler import MGTSchedulerOutput as MGTSchedulerOutput

__all__ = [
    "Differential",
    "GenerateOutput",
    "MGTScheduler",
    "MGTSchedulerOutput",
    "SamplerStep",
    "ZSampling",
    "generate",
    "load_model",
    "z_sample",
]

# imported when first asked for: diffusers is optional and slow to import
_LAZY = {
    "MGTScheduler": ".scheduler",
    "MGTSchedulerOutput": ".scheduler",
    "load_model": ".models",
    "z_sample": ".pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
