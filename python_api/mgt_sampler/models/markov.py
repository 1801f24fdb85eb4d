"""A model whose true distributions are known: a Markov chain, with the exact posterior in place of a network.

What a sampler draws from it differs from the truth by the sampler's own error alone (arXiv 2602.19619).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import integer, number

_MOST_STATES = 2**20


class MarkovModel:
    """A `MaskedModel` of sequences x_1 .. x_N with p(x) = initial[x_1] prod_i transition[x_{i-1}, x_i].

    Its logits are log p(x_i | the other known tokens), by the forward-backward recursion in float64: exact for any set
    of known tokens, and all that a masked generative transformer could learn. At a known position they say how likely
    its token is beside the others, which the inverse pass of Z-Sampling asks for.

    Args:
        num_tokens: N, at least 1.
        codebook_size: V, at least 2.
        seed: of the random chain.
        std: standard deviation of the logits of its rows; 0 makes all sequences equally likely, large values make the
            tokens depend strongly on one another.

    Raises:
        TypeError: a number of the wrong type.
        ValueError: a size out of range, or std negative or not finite.
    """

    def __init__(self, num_tokens: int = 6, codebook_size: int = 4, *, seed: int = 0, std: float = 1.5) -> None:
        """Draw the chain."""
        num_tokens, codebook_size = integer("num_tokens", num_tokens), integer("codebook_size", codebook_size)
        seed, std = integer("seed", seed), number("std", std)
        if num_tokens < 1:
            raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")
        if codebook_size < 2:
            raise ValueError(f"codebook_size: expected at least 2, got {codebook_size}")
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std: expected a finite number of at least 0, got {std}")
        self.num_tokens = num_tokens
        self.codebook_size = codebook_size
        self.mask_token_id = codebook_size
        generator = torch.Generator().manual_seed(seed)
        shape = codebook_size + 1, codebook_size
        logits = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * std
        self.initial, self.transition = logits[0].softmax(-1), logits[1:].softmax(-1)

    def predict_logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        """Return log p(x_i = v | the other tokens that are not masked): (B, N, V) float32.

        Args:
            tokens: (B, N) int64, mask_token_id where not known.
            condition: None; the chain has no classes.

        Raises:
            ValueError: a condition is given.
        """
        if condition is not None:
            raise ValueError("condition: the Markov chain has no classes, expected None")
        # the likelihood of the evidence at each position: 1 for every value where nothing is known
        known = torch.nn.functional.one_hot(tokens, self.codebook_size + 1)[..., :-1].double()
        evidence = known.masked_fill((tokens == self.mask_token_id)[..., None], 1.0)
        # what the tokens before a position, and those behind it, say of it
        forward, backward = torch.empty_like(evidence), torch.ones_like(evidence)
        forward[:, 0] = self.initial
        for i in range(self.num_tokens - 1):
            # normalised, so that long sequences do not underflow
            weighted = forward[:, i] * evidence[:, i]
            forward[:, i + 1] = (weighted / weighted.sum(-1, keepdim=True)) @ self.transition
        for i in reversed(range(self.num_tokens - 1)):
            backward[:, i] = (evidence[:, i + 1] * backward[:, i + 1]) @ self.transition.T
            backward[:, i] /= backward[:, i].sum(-1, keepdim=True)
        posterior = forward * backward
        return (posterior / posterior.sum(-1, keepdim=True)).log().float()

    def decode(self, tokens: Tensor) -> Tensor:
        """Show tokens (B, N) as grey values: (B, 1, 1, N) float32 in [0, 1]."""
        return (tokens.float() / (self.codebook_size - 1))[:, None, None]

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Return log p(x) of whole sequences (B, N) int64: (B,) float64, nats."""
        steps = self.transition.log()[tokens[:, :-1], tokens[:, 1:]].sum(-1)
        return self.initial.log()[tokens[:, 0]] + steps

    def probabilities(self) -> Tensor:
        """Return p(x) of all V^N sequences, the first token the most significant digit: (V^N,) float64.

        Raises:
            ValueError: there are more than 2^20 sequences.
        """
        num_states = self.codebook_size**self.num_tokens
        if num_states > _MOST_STATES:
            raise ValueError(f"num_tokens: expected at most 2^20 sequences, got {self.codebook_size}^{self.num_tokens}")
        probability = self.initial
        for _ in range(self.num_tokens - 1):
            last = torch.arange(len(probability), device="cpu") % self.codebook_size
            probability = (probability[:, None] * self.transition[last]).flatten()
        return probability

    def counts(self, tokens: Tensor) -> Tensor:
        """Count how often each of the V^N sequences is among tokens (B, N): (V^N,) int64."""
        digits = self.codebook_size ** torch.arange(self.num_tokens - 1, -1, -1, device="cpu")
        return torch.bincount((tokens * digits).sum(-1), minlength=self.codebook_size**self.num_tokens)


def total_variation(model: MarkovModel, tokens: Tensor) -> tuple[float, float]:
    """Return the total variation distance of samples to the truth, and what sampling noise alone would give.

        distance = 1/2 sum_x |n_x / B - p(x)|          noise = its expectation for B exact samples

    The noise is exact: de Moivre's formula for the mean deviation of a binomial n ~ (B, p), with m = floor(B p) + 1::

        E|n - B p| = 2 m C(B, m) p^m (1 - p)^(B - m + 1)

    Args:
        model: the chain.
        tokens: (B, N) int64, none masked; B at least 1.

    Raises:
        ValueError: tokens of another shape, none at all, or one that is no code.
    """
    if tokens.ndim != 2 or tokens.shape[1] != model.num_tokens or len(tokens) == 0:
        raise ValueError(f"tokens: expected shape (B, {model.num_tokens}), B at least 1, got {tuple(tokens.shape)}")
    if not ((tokens >= 0) & (tokens < model.codebook_size)).all():
        raise ValueError(
            f"tokens: expected 0 to {model.codebook_size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )
    truth, num_samples = model.probabilities(), len(tokens)
    distance = (model.counts(tokens).double() / num_samples - truth).abs().sum() / 2
    m = (num_samples * truth).floor().clamp(max=num_samples - 1) + 1
    log_binomial = math.lgamma(num_samples + 1) - torch.lgamma(m + 1) - torch.lgamma(num_samples - m + 1)
    log_deviation = log_binomial + torch.xlogy(m, truth) + torch.xlogy(num_samples - m + 1, 1 - truth)
    noise = (2 * m * log_deviation.exp() / num_samples).sum() / 2
    return float(distance), float(noise)
