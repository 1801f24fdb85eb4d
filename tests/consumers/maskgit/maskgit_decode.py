"""`parallel_decode.decode` of the original MaskGIT, with its step on the C library."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from maskgit.libml import mask_schedule


def register(handlers: str | Path) -> None:
    """Make the handlers known to XLA; once, before the first decode."""
    library = ctypes.CDLL(str(handlers))
    for name in ("sample_tokens", "mask_by_confidence"):
        capsule = jax.ffi.pycapsule(getattr(library, f"mgt_jax_{name}"))
        jax.ffi.register_ffi_target(f"mgt_{name}", capsule, platform="cpu")


def decode(
    inputs: jax.Array,
    rng: jax.Array,
    tokens_to_logits: Callable[[jax.Array], jax.Array],
    mask_token_id: int = -1,
    num_iter: int = 12,
    start_iter: int = 0,
    choice_temperature: float = 1.0,
    mask_scheduling_method: str = "cosine",
) -> jax.Array:
    """Return what is drawn in each iteration, (B, num_iter, N) int32; arguments as in the original.

    Sample i's draws depend on rng and i, not on the batch. A sample without a mask stays as it is.
    """
    inputs = inputs.astype("int32")
    num_unknown = jnp.sum(inputs == mask_token_id, axis=-1)
    seeds = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(rng, i)))(jnp.arange(len(inputs))).view(jnp.int32)
    integers, floats = (jax.ShapeDtypeStruct(inputs.shape, dtype) for dtype in (jnp.int32, jnp.float32))
    draw = jax.ffi.ffi_call("mgt_sample_tokens", (integers, floats))
    mask = jax.ffi.ffi_call("mgt_mask_by_confidence", integers)
    mask_id = np.int64(mask_token_id)

    def iterate(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, history = state
        logits = tokens_to_logits(tokens).astype(jnp.float32)
        unknown = tokens == mask_token_id
        token_ids, logprob = draw(logits, tokens, seeds, step, mask_token_id=mask_id, temperature=np.float32(1))
        history = history.at[:, step].set(token_ids)
        ratio = (step + 1) / num_iter
        mask_ratio = mask_schedule.schedule(ratio, num_unknown, mask_scheduling_method)
        masked = jnp.sum(unknown, axis=-1)
        mask_len = jnp.maximum(1, jnp.minimum(masked - 1, jnp.floor(num_unknown * mask_ratio)))
        mask_len = jnp.minimum(masked, mask_len).astype(jnp.int32)
        # XLA multiplies by the inverse of num_iter, which may lead past 1
        temperature = jnp.float32(choice_temperature * jnp.maximum(0, 1 - ratio))
        return mask(token_ids, logprob, mask_len, seeds, step, temperature, mask_token_id=mask_id), history

    history = jnp.repeat(inputs[:, None], num_iter, axis=1)
    return jax.lax.fori_loop(start_iter, num_iter, iterate, (inputs, history))[1]
