"""A transformer of Meissonic's kind (arXiv 2410.08261), which is on no package registry: random weights, width 32.

Its blocks have the parts, the calls and the names of the published ones, and diffusers' own attention and norms.
"""

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


class _MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))


class TransformerBlock(nn.Module):
    """A stream for the image and one for the text, which attend together."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm1_context = AdaLayerNormZero(WIDTH), AdaLayerNormZero(WIDTH)
        self.attn = FluxAttention(
            query_dim=WIDTH, added_kv_proj_dim=WIDTH, dim_head=HEAD_DIM, heads=HEADS, out_dim=WIDTH, bias=True,
            context_pre_only=False, eps=1e-6, processor=FluxAttnProcessor(),
        )  # fmt: skip
        self.norm2, self.norm2_context = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.ff, self.ff_context = _MLP(), _MLP()

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None):
        streams = (self.norm1, self.norm2, self.ff), (self.norm1_context, self.norm2_context, self.ff_context)
        before = hidden_states, encoder_hidden_states
        normed = [norm(x, emb=temb) for (norm, _, _), x in zip(streams, before, strict=True)]
        attended = self.attn(
            hidden_states=normed[0][0], encoder_hidden_states=normed[1][0], image_rotary_emb=image_rotary_emb
        )
        after = []
        for (_, norm, mlp), x, (_, gate, shift, scale, mlp_gate), a in zip(
            streams, before, normed, attended, strict=True
        ):
            y = x + gate[:, None] * a
            h = norm(y) * (1 + scale[:, None]) + shift[:, None]
            after.append(y + mlp_gate[:, None] * mlp(h))
        return after[1], after[0]


class SingleTransformerBlock(nn.Module):
    """One stream for text and image, attention and MLP side by side."""

    def __init__(self):
        super().__init__()
        self.norm = AdaLayerNormZeroSingle(WIDTH)
        self.proj_mlp, self.act_mlp = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(5 * WIDTH, WIDTH)
        self.attn = FluxAttention(
            query_dim=WIDTH, dim_head=HEAD_DIM, heads=HEADS, out_dim=WIDTH, bias=True, pre_only=True, eps=1e-6,
            processor=FluxAttnProcessor(),
        )  # fmt: skip

    def forward(self, hidden_states, temb, image_rotary_emb=None):
        h, gate = self.norm(hidden_states, emb=temb)
        attended = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb)
        both = torch.cat([attended, self.act_mlp(self.proj_mlp(h))], dim=2)
        return hidden_states + gate[:, None] * self.proj_out(both)


class ConvMlmLayer(nn.Module):
    """The head: the last layer is linear."""

    def __init__(self, codebook_size):
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.layer_norm = RMSNorm(WIDTH, 1e-6, True)
        self.conv2 = nn.Conv2d(WIDTH, codebook_size, 1, bias=False)

    def forward(self, hidden_states):
        h = self.conv1(hidden_states)
        return self.conv2(self.layer_norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Transformer2DModel(nn.Module):
    """Tokens (B, H, W), of which blocks take `patch` x `patch` for one, to logits (B, V, H, W)."""

    def __init__(self, codebook_size=24, mask_token_id=24, patch=2, num_text=8, num_pooled=8, num_layers=3):
        super().__init__()
        self.patch = patch
        self.embed = nn.Embedding(mask_token_id + 1, WIDTH)
        self.down_block = nn.Conv2d(WIDTH, WIDTH, patch, stride=patch)
        self.context_embedder, self.time_embedder = nn.Linear(num_text, WIDTH), nn.Linear(num_pooled, WIDTH)
        self.transformer_blocks = nn.ModuleList(TransformerBlock() for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleTransformerBlock() for _ in range(num_layers))
        self.up_block = nn.ConvTranspose2d(WIDTH, WIDTH, patch, stride=patch)
        self.mlm_layer = ConvMlmLayer(codebook_size)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        img_ids,
        txt_ids,
        timestep,
        micro_conds=None,
        joint_attention_kwargs=None,
    ):
        image, text, time, rotary = self.begin(
            hidden_states, encoder_hidden_states, pooled_projections, img_ids, txt_ids, timestep
        )
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time, image_rotary_emb=rotary)
        both = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            both = block(hidden_states=both, temb=time, image_rotary_emb=rotary)
        return self.end(
            both[:, text.shape[1] :], (hidden_states.shape[1] // self.patch, hidden_states.shape[2] // self.patch)
        )

    def begin(self, hidden_states, encoder_hidden_states, pooled_projections, img_ids, txt_ids, timestep):
        image = self.down_block(self.embed(hidden_states).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        time = self.time_embedder(pooled_projections + timestep.float() / 10)
        ids = torch.cat([txt_ids, img_ids]).double()
        angles = torch.cat([ids[:, 1:2] * 10.0 ** -torch.arange(4), ids[:, 2:3] * 10.0 ** -torch.arange(4)], dim=1)
        rotary = tuple(f(angles).float().repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
        return image, self.context_embedder(encoder_hidden_states), time, rotary

    def end(self, image, grid):
        return self.mlm_layer(self.up_block(image.transpose(1, 2).unflatten(2, grid)))
