"""Kernels for masked generative transformers, exact and independent of the batch: seeded sampling, int4 layers."""

from mgt_kernels.checks import BACKENDS
from mgt_kernels.cpu import DIFFERENTIAL_VARIANTS, kernel_isa
from mgt_kernels.info import __version__, include_dir, info, library_path
from mgt_kernels.linear import w4a8_linear, w4a16_linear
from mgt_kernels.merging import Match, match_tokens, merge_tokens, unmerge_tokens
from mgt_kernels.ops import (
    REMASK_VARIANTS,
    DifferentialState,
    Sampled,
    TokenEdit,
    commit_tokens,
    differential_sample,
    mask_by_confidence,
    remask_tokens,
    sample_tokens,
)
from mgt_kernels.packing import PackedInt4, quantize_int4
from mgt_kernels.warm_up import warm_up

__all__ = [
    "BACKENDS",
    "DIFFERENTIAL_VARIANTS",
    "REMASK_VARIANTS",
    "DifferentialState",
    "Match",
    "PackedInt4",
    "Sampled",
    "TokenEdit",
    "__version__",
    "commit_tokens",
    "differential_sample",
    "include_dir",
    "info",
    "kernel_isa",
    "library_path",
    "mask_by_confidence",
    "match_tokens",
    "merge_tokens",
    "quantize_int4",
    "remask_tokens",
    "sample_tokens",
    "unmerge_tokens",
    "w4a8_linear",
    "w4a16_linear",
    "warm_up",
]
