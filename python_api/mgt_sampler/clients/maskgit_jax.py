"""The original MaskGIT in JAX (PyPI maskgit, arXiv 2202.04200): the loop of its generator, with steps of our ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from mgt_kernels import mask_by_confidence, sample_tokens

from ..schedules import mask_len, mask_ratios


def replacements(generator: Any) -> dict[str, Any]:
    """`generate_samples`, which the generator's other calls go through."""
    return {"generate_samples": partial(generate_samples, generator)}


def generate_samples(generator: Any, input_tokens: Any, rng: Any, start_iter: int = 0, num_iterations: int = 16) -> Any:
    """Draw images as the original does, from tokens (B, 1 + N) that begin with the class; under jit and pmap too.

    A sample's draws depend on rng, its place in the batch and its own tokens. What is known stays; where nothing is
    masked, nothing is masked again.
    """
    import jax.numpy as jnp

    config, size = generator.maskgit_cf, generator.transformer_latent_size

    def tokens_to_logits(tokens: Any) -> Any:
        logits = generator.transformer_model.apply(generator.transformer_variables, tokens, deterministic=True)
        return logits[..., : config.vqvae.codebook_size]

    tokens = decode(
        input_tokens, rng, tokens_to_logits, config.transformer.mask_token_id, num_iterations, start_iter,
        config.sample_choice_temperature,
    )  # fmt: skip
    return generator.tokenizer_model.apply(
        generator.tokenizer_variables, jnp.reshape(tokens[:, 1:], [-1, size, size]),
        method=generator.tokenizer_model.decode_from_indices, mutable=False,
    )  # fmt: skip


def decode(
    inputs: Any, rng: Any, tokens_to_logits: Any, mask_token_id: int, num_iter: int, start_iter: int, temperature: float
) -> Any:
    """The tokens (B, N) that the last iteration draws; in iteration k of T, with g ~ Gumbel::

    token  ~ softmax(l)
    masks  = max(1, min(M - 1, floor(M_0 cos(pi / 2 (k + 1) / T)))),  the lowest log p(token) + t_k g
    t_k    = temperature (1 - (k + 1) / T)
    """
    import jax
    import jax.numpy as jnp

    inputs = inputs.astype("int32")
    keys = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(rng, i)))(jnp.arange(len(inputs)))
    num_unknown, shape = jnp.sum(inputs == mask_token_id, axis=-1), jax.ShapeDtypeStruct(inputs.shape, jnp.int32)
    ratios = mask_ratios("cosine", num_iter, inputs.shape[1])

    def on_host(tokens: Any, logits: Any, keys: Any, unknown: Any, k: Any) -> Any:
        k = int(k)
        before, at_start = (torch.from_numpy(np.array(x, np.int64)) for x in (tokens, unknown))
        common: dict[str, Any] = {"mask_token_id": mask_token_id, "step": k}
        common["seed"] = torch.from_numpy(np.array(keys, np.int64))
        drawn = sample_tokens(torch.from_numpy(np.array(logits, np.float32)), before, **common)
        left = mask_len((before == mask_token_id).sum(1), ratios[k], at_start.float())
        noise = temperature * (1 - (k + 1) / num_iter)
        masked = mask_by_confidence(drawn.token_ids, drawn.logprob, left, temperature=noise, **common)
        return tuple(x.numpy().astype(np.int32) for x in (drawn.token_ids, masked))

    def iterate(k: Any, tokens: Any) -> Any:
        _, masked = tokens
        return tuple(
            jax.pure_callback(
                on_host, (shape, shape), masked, tokens_to_logits(masked), keys, num_unknown, k,
                vmap_method="sequential",
            )
        )  # fmt: skip

    return jax.lax.fori_loop(start_iter, num_iter, iterate, (inputs, inputs))[0]
