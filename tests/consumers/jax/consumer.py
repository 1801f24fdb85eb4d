"""JAX on the C library: `python consumer.py HANDLERS.so` draws under jit and vmap and prints the token ids."""

import ctypes
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.jit, static_argnames=("mask_token_id", "temperature"))
def sample_tokens(
    logits: jax.Array,
    tokens: jax.Array,
    seeds: jax.Array,
    step: jax.Array,
    *,
    mask_token_id: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Draw token_ids (..., B, N) int32 and logprob (..., B, N) from logits (..., B, N, V) float32."""
    shapes = (jax.ShapeDtypeStruct(tokens.shape, jnp.int32), jax.ShapeDtypeStruct(tokens.shape, jnp.float32))
    call = jax.ffi.ffi_call("mgt_sample_tokens", shapes, vmap_method="sequential")
    return call(logits, tokens, seeds, step, mask_token_id=np.int64(mask_token_id), temperature=np.float32(temperature))


if __name__ == "__main__":
    handlers = ctypes.CDLL(sys.argv[1])
    jax.ffi.register_ffi_target("mgt_sample_tokens", jax.ffi.pycapsule(handlers.mgt_jax_sample_tokens), platform="cpu")
    logits = (jnp.arange(2 * 5 * 40, dtype=jnp.float32) % 7 * 0.5).reshape(2, 5, 40)
    tokens, seeds, step = jnp.full((2, 5), 40), jnp.array([7, 8]), jnp.int32(3)
    token_ids, _ = sample_tokens(logits, tokens, seeds, step, mask_token_id=40)
    print(*token_ids.ravel())
    # a batch of generations: each pair of logits, tokens and seeds by itself
    batched = jax.vmap(partial(sample_tokens, mask_token_id=40), in_axes=(0, 0, 0, None))
    apart, _ = batched(logits[:, None], tokens[:, None], seeds[:, None], step)
    print(*apart.ravel())
