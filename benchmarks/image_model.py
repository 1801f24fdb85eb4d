"""Transformers of Meissonic's size with random weights, at 1024 pixels: what `mgt_benchmarks.image` times.

4,096 tokens go in, their 2 x 2 patches are 1,024 tokens in the blocks, and logits of 4,096 tokens come out. The suite's
own model has the blocks of `mgt_benchmarks.meissonic`; where a checkout of Meissonic is at hand, its transformer is
built with the published sizes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mgt_sampler.blocks import KNOWN_BLOCKS, BlockLayout

from .meissonic import DoubleBlock, Int4, MakeLinear, SingleBlock, Sizes

SUITE_BLOCKS = (
    BlockLayout(
        "meissonic.DoubleBlock",
        merge_input=("image.qkv", "image.mlp_in"),
        unmerge_output=("image.attention_out", "image.mlp_out"),
    ),
    BlockLayout("meissonic.SingleBlock", merge_input=("qkv", "mlp_in"), unmerge_output=("out",), is_single_stream=True),
)


class Timed(Protocol):
    """What a variant is made of: a transformer without its last layer, and that layer."""

    network: nn.Module
    head: nn.Module
    mask_token_id: int

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """Of its blocks, for token merging."""
        ...

    def hidden(self, tokens: Tensor, inputs: Any) -> Tensor:
        """Hidden states (B, H W, C) of tokens (B, H, W)."""
        ...

    def inputs(self, batch: int) -> Any:
        """What the transformer is given beside tokens."""
        ...


class SuiteTransformer(nn.Module):
    """Meissonic's shape of the suite's blocks; its result is what goes into the head."""

    def __init__(self, sizes: Sizes, make: MakeLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width = sizes.width
        self.embedding = nn.Embedding(sizes.codebook_size + 1, width, dtype=dtype)
        # a convolution of 2 x 2 patches, and back
        self.down, self.up = make(4 * width, width), make(width, 4 * width)
        self.double_blocks = nn.ModuleList(DoubleBlock(sizes, make) for _ in range(sizes.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(sizes, make) for _ in range(sizes.num_single_blocks))
        self.before_head = make(width, width)

    def forward(self, tokens: Tensor, encoder_hidden_states: Tensor, condition: Tensor) -> Tensor:
        """Hidden states (B, H W, width) of tokens (B, H, W), text (B, L, width) and condition (B, width)."""
        batch, height, width = tokens.shape
        patches = self.embedding(tokens).view(batch, height // 2, 2, width // 2, 2, self.width).transpose(2, 3)
        image, text = self.down(patches.reshape(batch, -1, 4 * self.width)), encoder_hidden_states
        for block in self.double_blocks:
            image, text = block(image, text, condition)
        x = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            x = block(x, condition)
        x = self.up(functional.layer_norm(x[:, text.shape[1] :], (self.width,)))
        x = x.view(batch, height // 2, width // 2, 2, 2, self.width).transpose(2, 3).reshape(batch, -1, self.width)
        return functional.layer_norm(self.before_head(x), (self.width,))


class SuiteModel:
    """The suite's own model."""

    layouts = SUITE_BLOCKS

    def __init__(self, sizes: Sizes, make: MakeLinear, dtype: torch.dtype) -> None:
        self.network: nn.Module = SuiteTransformer(sizes, make, dtype)
        self.head = make(sizes.width, sizes.codebook_size)
        self.mask_token_id = sizes.codebook_size
        self._sizes, self._dtype = sizes, dtype

    def hidden(self, tokens: Tensor, inputs: Any) -> Tensor:
        """See `Timed`."""
        text, condition = inputs
        result: Tensor = self.network(tokens, encoder_hidden_states=text, condition=condition)
        return result

    def inputs(self, batch: int) -> Any:
        """See `Timed`."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(self._dtype)

        return normal(self._sizes.num_text_tokens, self._sizes.width), normal(self._sizes.width)


class CheckoutModel:
    """`src.transformer.Transformer2DModel` of a checkout of Meissonic (github.com/viiika/Meissonic)."""

    layouts = KNOWN_BLOCKS

    def __init__(self, checkout: Path, sizes: Sizes, make: MakeLinear | None, dtype: torch.dtype) -> None:
        sys.path.insert(0, str(checkout))
        try:
            from src.transformer import Transformer2DModel
        except ImportError as error:
            raise ImportError(f"--checkout: expected a checkout of Meissonic, got {checkout}: {error}") from error
        head_dim = sizes.width // sizes.num_heads
        model: Any = Transformer2DModel(
            num_layers=sizes.num_double_blocks, num_single_layers=sizes.num_single_blocks,
            attention_head_dim=head_dim, num_attention_heads=sizes.num_heads, joint_attention_dim=sizes.width,
            pooled_projection_dim=sizes.width, axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
            vocab_size=sizes.codebook_size + 64, codebook_size=sizes.codebook_size, downsample=True, upsample=True,
            in_channels=sizes.width,
        )  # fmt: skip
        for module in model.modules():
            # an attention of before diffusers 0.35, a processor of after
            if type(module).__name__ == "Attention" and not hasattr(module, "head_dim"):
                module.head_dim = head_dim
        if make is not None:
            _replace_linears(model, make)
        # a 1 x 1 convolution is a linear layer over positions
        convolution = model.mlm_layer.conv2
        self.head: nn.Module
        self.head = nn.Linear(sizes.width, sizes.codebook_size, bias=False, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(convolution.weight[:, :, 0, 0])
        if make is not None:
            self.head = make(sizes.width, sizes.codebook_size)
        model.mlm_layer.conv2 = nn.Identity()
        self.network = model.to(dtype).eval()
        self.mask_token_id = sizes.codebook_size + 63
        self._sizes, self._dtype = sizes, dtype

    def hidden(self, tokens: Tensor, inputs: Any) -> Tensor:
        """See `Timed`."""
        result: Tensor = self.network(tokens, **inputs)
        return result.flatten(2).transpose(1, 2).contiguous()

    def inputs(self, batch: int) -> Any:
        """See `Timed`."""
        generator = torch.Generator().manual_seed(0)
        side = int(self._sizes.num_image_tokens**0.5)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(self._dtype)

        return {
            "encoder_hidden_states": normal(self._sizes.num_text_tokens, self._sizes.width),
            "pooled_projections": normal(self._sizes.width),
            "micro_conds": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 6.0]]).expand(batch, -1),
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
            "txt_ids": torch.zeros(self._sizes.num_text_tokens, 3),
            "timestep": torch.tensor([32]),
        }


def _replace_linears(model: nn.Module, make: Callable[[int, int], nn.Module]) -> None:
    """Put a layer that `make` makes into the place of every linear one."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = make(child.in_features, child.out_features)
                if isinstance(layer, Int4) and child.bias is not None:
                    layer.bias = child.bias.detach()
                setattr(parent, name, layer)
