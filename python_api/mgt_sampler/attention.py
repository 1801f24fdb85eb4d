"""Attention over merged tokens, whose rotary tables and sizes differ from sample to sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from .merge import MergedBlocks

# of diffusers, early and late
_PROCESSORS = ("FluxAttnProcessor", "FluxAttnProcessor2_0")


class MergedAttention:
    """An attention processor of diffusers: Flux's attention, with a rotary table for each sample.

    The tokens are the text's followed by the image's, as `FluxAttnProcessor` has them. Without merged tokens it calls
    the processor that was there before.
    """

    def __init__(self, before: Any, owner: MergedBlocks) -> None:
        """Take the processor in whose place this one comes, and whose tokens are merged."""
        self.before = before
        self.owner = owner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend, as the processor before does."""
        if not self.owner.is_merging:
            return self.before(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                image_rotary_emb=image_rotary_emb,
                **kwargs,
            )

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def normalized(norm: Any, x: Tensor) -> Tensor:
            return x if norm is None else norm(x)

        query = normalized(attn.norm_q, heads(attn.to_q(hidden_states)))
        key = normalized(attn.norm_k, heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text_query = normalized(attn.norm_added_q, heads(attn.add_q_proj(encoder_hidden_states)))
            text_key = normalized(attn.norm_added_k, heads(attn.add_k_proj(encoder_hidden_states)))
            query, key = torch.cat([text_query, query], dim=2), torch.cat([text_key, key], dim=2)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=2)
        if image_rotary_emb is not None:
            tables = self.owner.merged_tables(image_rotary_emb)
            query, key = rotated(query, *tables), rotated(key, *tables)
        bias = self.owner.attention_bias(key.shape[2], query.dtype)
        if bias is not None:
            bias = bias[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        mixed = mixed.to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        length = encoder_hidden_states.shape[1]
        text, image = mixed[:, :length], mixed[:, length:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, attn.to_add_out(text)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of x (B, heads, L, D) by the tables (B, L, D), in float32."""
    y = x.float()
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (y * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def check_processor(name: str, attn: Any) -> None:
    """Check that an attention is one that `MergedAttention` can take the place of.

    Raises:
        ValueError: it is not.
    """
    found = type(getattr(attn, "processor", None)).__name__
    if found not in _PROCESSORS:
        raise ValueError(f"merge: expected {name}.processor to be diffusers' {_PROCESSORS[0]}, got {found}")
    if getattr(attn, "fused_projections", False):
        raise ValueError(f"merge: expected {name} with projections of its own, got fused ones; unfuse them first")
