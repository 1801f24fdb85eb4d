"""Fused sampling kernels for masked generative transformers: exact, seeded, independent of the batch."""

from mgt_kernels.info import __version__, info
from mgt_kernels.ops import mask_by_confidence, sample_tokens

__all__ = ["__version__", "info", "mask_by_confidence", "sample_tokens"]
