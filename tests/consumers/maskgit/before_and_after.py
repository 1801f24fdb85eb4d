"""How long MaskGIT's decoding takes with its own step and with ours: `python before_and_after.py HANDLERS.so`."""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from maskgit.libml import parallel_decode
from maskgit.nets.maskgit_transformer import Transformer
from maskgit_decode import decode, register

# ImageNet at 256 x 256: a class token and 16 x 16 tokens
NUM_TOKENS, NUM_CLASSES, MASK_TOKEN_ID = 256, 1000, -1


def medians(calls: list, *arguments: object, rounds: int) -> list[float]:
    """Seconds of each, timed in turns after one call that is not."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call(jax.random.key(turn), *arguments).block_until_ready()
            if turn > 0:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("handlers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    register(arguments.handlers)
    codebook_size = arguments.codebook_size
    labels = codebook_size + jnp.arange(arguments.batch) % NUM_CLASSES
    inputs = jnp.full((arguments.batch, NUM_TOKENS + 1), MASK_TOKEN_ID).at[:, 0].set(labels)
    network = Transformer(
        vocab_size=codebook_size + NUM_CLASSES + 1, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=NUM_TOKENS + 1,
    )  # fmt: skip
    weights = network.init(jax.random.key(0), inputs, deterministic=True)
    table = 2 * jax.random.normal(jax.random.key(1), (codebook_size + NUM_CLASSES + 1, codebook_size))
    print(f"jax {jax.__version__}, {arguments.batch} images, 12 iterations\n")
    print("| case | before, ms | after, ms | ratio |\n| --- | --- | --- | --- |")
    for case, parameters, logits in (
        ("decode, logits from a table", table, lambda table, tokens: table[tokens]),
        ("decode, a network of one layer", weights, partial(network.apply, deterministic=True)),
    ):

        def run(one, rng, inputs, parameters, logits=logits):
            tokens_to_logits = lambda tokens: logits(parameters, tokens)[..., :codebook_size]  # noqa: E731
            return one(inputs, rng, tokens_to_logits, mask_token_id=MASK_TOKEN_ID)

        calls = [jax.jit(partial(run, one)) for one in (parallel_decode.decode, decode)]
        before, after = medians(calls, inputs, parameters, rounds=arguments.rounds)
        print(f"| {case} | {before * 1e3:.4g} | {after * 1e3:.4g} | {before / after:.1f} |", flush=True)


if __name__ == "__main__":
    main()
