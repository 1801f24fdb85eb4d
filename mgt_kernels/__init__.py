"""Fused sampling kernels for masked generative transformers: exact, seeded, independent of the batch."""

from mgt_kernels.info import __version__, info
from mgt_kernels.ops import DifferentialState, differential_sample, mask_by_confidence, remask_tokens, sample_tokens

__all__ = [
    "DifferentialState",
    "__version__",
    "differential_sample",
    "info",
    "mask_by_confidence",
    "remask_tokens",
    "sample_tokens",
]
