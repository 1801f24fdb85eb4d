"""A transformer of Meissonic's kind with random weights, and inputs as its pipeline makes them."""

import pytest
import torch

pytest.importorskip("diffusers")

from .by_hand import merged_by_hand
from .transformer import Transformer2DModel

__all__ = ["Transformer2DModel", "inputs", "merged_by_hand", "sample", "transformer"]


def transformer(seed=0, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer2DModel(**sizes).eval().requires_grad_(False)
        # sharp enough that blocks make a difference
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(2)
    return model


def inputs(model, batch=2, height=8, width=8, seed=0, patch=2, num_text=8, num_pooled=8):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height // patch), torch.arange(width // patch), indexing="ij")
    return {
        "hidden_states": torch.randint(0, model.embed.num_embeddings, (batch, height, width), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, num_text, generator=generator),
        "pooled_projections": torch.randn(batch, num_pooled, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(5, 3),
        "timestep": torch.tensor([3]),
    }


def sample(given, b):
    """The inputs of one sample."""
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    return {name: value[b : b + 1] if name in names else value for name, value in given.items()}
