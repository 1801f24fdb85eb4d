"""What every op that reads logits is told of a draw, spelled once."""

import math
from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """Checked arguments of a draw: the first ones of the torch ops that read logits, in this order.

    Attributes are as `mgt_kernels.sample_tokens` has them, but that token_bias (V,) float32 is what `allowed` says,
    first_position None is 0, and softcap inf caps nothing. The scalars are numbers or tensors.
    """

    logits: Tensor
    tokens: Tensor
    seed: Tensor
    step: int
    mask_token_id: int
    uncond_logits: Tensor | None = None
    guidance_scale: float = 1.0
    noise_scale: float = 0.0
    temperature: float = 1.0
    first_position: Tensor | None = None
    token_bias: Tensor | None = None
    second_uncond_logits: Tensor | None = None
    second_guidance_scale: float = 1.0
    guidance: str = "nested"
    softcap: float = math.inf
