"""Bundled models, and what the sampler asks of any model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .fashion import (
    WEIGHTS_DIR,
    Classifier,
    FashionClassifier,
    FashionModel,
    load_network,
)

__all__ = ["FashionClassifier", "FashionModel", "MaskedModel", "load_classifier", "load_model"]

_NAMES = ("fashion",)


@runtime_checkable
class MaskedModel(Protocol):
    """What the sampler asks of a masked generative model: two methods and three numbers.

    A model whose last layer is linear may also have what `generate(fold_head=True)` asks for: `head`, that layer, and
    `predict_hidden(tokens, condition) -> (B, N, C)`, what the layer is given, so that `head(predict_hidden(...))` is
    `predict_logits(...)`.
    """

    num_tokens: int
    """N, the number of image tokens."""

    codebook_size: int
    """V, the number of codes: tokens are 0 to V - 1."""

    mask_token_id: int
    """The token that stands for "not known yet"; outside 0 to V - 1."""

    def predict_logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """Predict (B, N, V) logits for tokens (B, N) int64; condition (B,) int64, or None: unconditional."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens (B, N) int64, none masked, into images (B, C, H, W) float32 in [0, 1]."""
        ...


def load_model(
    name: str = "fashion", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> FashionModel:
    """Load a bundled masked generative model.

    Args:
        name: "fashion": 28 x 28 grey clothes in 196 tokens, 128 codes, 10 classes.
        device: where it runs.
        dtype: of the transformer and its logits; the decoder stays in float32.

    Returns:
        The model, a `MaskedModel`, ready for inference.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the weights are not installed.
    """
    _check_name(name)
    return FashionModel.from_folder(WEIGHTS_DIR, device=device, dtype=dtype)


def load_classifier(name: str = "fashion", *, device: str | torch.device = "cpu") -> FashionClassifier:
    """Load the classifier that judges the images of a bundled model.

    Args:
        name: as for `load_model`.
        device: where it runs.

    Returns:
        Maps images (B, 1, 28, 28) in [0, 1] to class logits (B, 10), and has `features(images)`.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the weights are not installed.
    """
    _check_name(name)
    return FashionClassifier(load_network(Classifier, WEIGHTS_DIR / "classifier.safetensors"), device=device)


def _check_name(name: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"name: expected one of {', '.join(map(repr, _NAMES))}, got {name!r}")
