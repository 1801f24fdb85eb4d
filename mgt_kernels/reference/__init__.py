"""The oracles: every op once more in float64 PyTorch, one line per equation."""

from mgt_kernels.reference.commit_tokens import commit_tokens
from mgt_kernels.reference.differential_sample import decode_history, differential_sample, encode_history
from mgt_kernels.reference.draws import confidence_gumbel, gaussian, merge_corner, philox, remask_gumbel, token_gumbel
from mgt_kernels.reference.mask_by_confidence import mask_by_confidence
from mgt_kernels.reference.match_tokens import destinations, match_tokens, similarities
from mgt_kernels.reference.merge_tokens import merge_tokens, unmerge_tokens
from mgt_kernels.reference.remask_tokens import remask_score
from mgt_kernels.reference.sample_tokens import perturbed_logits, sample_tokens
from mgt_kernels.reference.w4a8_linear import dynamic_scale, group_sums, quantize_activations, w4a8_linear
from mgt_kernels.reference.w4a16_linear import w4a16_linear

__all__ = [
    "commit_tokens",
    "confidence_gumbel",
    "decode_history",
    "destinations",
    "differential_sample",
    "dynamic_scale",
    "encode_history",
    "gaussian",
    "group_sums",
    "mask_by_confidence",
    "match_tokens",
    "merge_corner",
    "merge_tokens",
    "perturbed_logits",
    "philox",
    "quantize_activations",
    "remask_gumbel",
    "remask_score",
    "sample_tokens",
    "similarities",
    "token_gumbel",
    "unmerge_tokens",
    "w4a8_linear",
    "w4a16_linear",
]
