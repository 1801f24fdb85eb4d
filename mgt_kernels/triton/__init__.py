"""The CUDA backend: a Triton kernel and its launcher per op; token ids equal the CPU's bit for bit."""

try:
    import triton as _  # noqa: F401
except ImportError as error:
    raise RuntimeError("tensors on CUDA need Triton: pip install mgt-kernels[gpu]") from error

from mgt_kernels.triton.commit_tokens import commit_tokens
from mgt_kernels.triton.differential_sample import differential_sample
from mgt_kernels.triton.mask_by_confidence import mask_by_confidence
from mgt_kernels.triton.match_tokens import match_tokens
from mgt_kernels.triton.merge_tokens import merge_tokens, unmerge_tokens
from mgt_kernels.triton.sample_tokens import sample_tokens
from mgt_kernels.triton.w4a8_linear import w4a8_linear
from mgt_kernels.triton.w4a16_linear import w4a16_linear

__all__ = [
    "commit_tokens", "differential_sample", "mask_by_confidence", "match_tokens", "merge_tokens", "sample_tokens",
    "unmerge_tokens", "w4a8_linear", "w4a16_linear",
]  # fmt: skip
