"""The oracles: every op once more in float64 PyTorch, one line per equation."""

from mgt_kernels.reference.differential_sample import decode_history, differential_sample, encode_history
from mgt_kernels.reference.draws import confidence_gumbel, gaussian, philox, remask_gumbel, token_gumbel
from mgt_kernels.reference.mask_by_confidence import mask_by_confidence
from mgt_kernels.reference.remask_tokens import remask_score
from mgt_kernels.reference.sample_tokens import perturbed_logits, sample_tokens

__all__ = [
    "confidence_gumbel",
    "decode_history",
    "differential_sample",
    "encode_history",
    "gaussian",
    "mask_by_confidence",
    "perturbed_logits",
    "philox",
    "remask_gumbel",
    "remask_score",
    "sample_tokens",
    "token_gumbel",
]
