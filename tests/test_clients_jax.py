"""`accelerate` and `restore` on the original MaskGIT's generator, in JAX, with tiny random weights."""

import functools
import importlib.machinery
import pickle
import sys
import types

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("maskgit")
stats = pytest.importorskip("scipy.stats")

import jax.numpy as jnp  # noqa: E402

from mgt_sampler import accelerate, restore  # noqa: E402
from mgt_sampler.schedules import mask_lens  # noqa: E402

CODEBOOK_SIZE, SIDE, NUM_CLASSES = 8, 4, 3


class _Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return types.SimpleNamespace()


@pytest.fixture(scope="module")
def kind():
    """The class, whose module imports what drawing does not need, and what JAX no longer has."""
    with pytest.MonkeyPatch.context() as patch:
        absent = ("matplotlib", "matplotlib.pyplot", "matplotlib.patches", "requests", "tensorflow")
        for name in (*absent, "tensorflow.compat", "tensorflow.compat.v1"):
            module = _Anything(name)
            module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None, is_package=True)
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        if not hasattr(jnp, "DeviceArray"):
            patch.setattr(jnp, "DeviceArray", jax.Array, raising=False)
        from maskgit import inference

        yield inference.ImageNet_class_conditional_generator


def generator(kind, logits=None):
    """A generator without checkpoints: a network of one layer, or logits of the tokens; images are the tokens."""
    from maskgit.nets import maskgit_transformer

    made = object.__new__(kind)
    made.maskgit_cf = types.SimpleNamespace(
        vqvae=types.SimpleNamespace(codebook_size=CODEBOOK_SIZE),
        transformer=types.SimpleNamespace(mask_token_id=-1),
        sample_choice_temperature=4.5,
    )
    made.transformer_latent_size, made.given = SIDE, []
    size = SIDE**2 + 1
    network = maskgit_transformer.Transformer(
        vocab_size=CODEBOOK_SIZE + NUM_CLASSES + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=size,
    )  # fmt: skip

    def apply(variables, tokens, deterministic):
        jax.debug.callback(lambda x: made.given.append((x[:, 1:] == -1).sum(1).tolist()), tokens, ordered=True)
        return logits(tokens) if logits else 3 * network.apply(variables, tokens, deterministic=deterministic)

    made.transformer_model = types.SimpleNamespace(apply=apply)
    made.transformer_variables = network.init(
        jax.random.PRNGKey(0), jnp.zeros((1, size), jnp.int32), deterministic=True
    )
    made.tokenizer_model = types.SimpleNamespace(
        apply=lambda variables, tokens, method, mutable: method(tokens), decode_from_indices=lambda tokens: tokens
    )
    made.tokenizer_variables = {}
    return made


def inputs(count=3, known=0):
    labels = CODEBOOK_SIZE + np.arange(count)[:, None] % NUM_CLASSES
    tokens = np.full((count, SIDE**2), -1)
    tokens[1:, :known] = 5
    return jnp.asarray(np.concatenate([labels, tokens], 1), jnp.int32)


def draw(made, tokens, seed=1, steps=6):
    made.given.clear()
    images = np.asarray(made.generate_samples(tokens, jax.random.PRNGKey(seed), num_iterations=steps))
    jax.effects_barrier()
    return images


def test_as_many_are_masked_and_known_tokens_stay(kind):
    made = generator(kind)
    before = draw(made, inputs(known=7))
    counts = list(made.given)
    assert str(accelerate(made)) == "MaskGIT in JAX: generate_samples (generate_samples)"
    after = draw(made, inputs(known=7))
    assert made.given == counts and [row[0] for row in counts] == [16, *mask_lens("cosine", 6, 16)[:-1]]
    assert (after.shape, after.dtype) == (before.shape, before.dtype) and not (after == before).all()
    assert (after.reshape(3, -1)[1:, :7] == 5).all() and (after >= 0).all() and (after < CODEBOOK_SIZE).all()


def test_a_sample_is_a_function_of_its_own_seed_under_jit_too(kind):
    made = generator(kind)
    accelerate(made)
    both = draw(made, inputs())
    assert (draw(made, inputs()[:1])[0] == both[0]).all() and not (draw(made, inputs(), seed=2) == both).all()
    jitted = jax.jit(functools.partial(made.generate_samples, num_iterations=6))
    assert (np.asarray(jitted(inputs(), jax.random.PRNGKey(1))) == both).all()


def test_one_hot_logits_give_the_originals_tokens(kind):
    wanted = jax.random.randint(jax.random.key(0), (SIDE**2 + 1,), 0, CODEBOOK_SIZE)
    made = generator(kind, lambda tokens: 1e3 * jnp.broadcast_to(jax.nn.one_hot(wanted, 8), (*tokens.shape, 8)))
    before = draw(made, inputs())
    accelerate(made)
    assert (draw(made, inputs()) == before).all() and (before[0].flatten() == np.asarray(wanted)[1:]).all()


def test_the_originals_distribution_and_the_original_comes_back(kind):
    table = 2 * jax.random.normal(jax.random.key(5), (12, SIDE**2 + 1, 8))
    # what is drawn depends on the position before
    made = generator(kind, lambda tokens: table[jnp.roll(tokens, 1, 1), jnp.arange(tokens.shape[1])])
    tables, attributes = [], set(vars(made))
    for prepare, seed in ((restore, 0), (accelerate, 1), (restore, 2)):
        prepare(made)
        images = draw(made, inputs(3000), seed, steps=3).reshape(3000, -1)
        pairs = images[:, 4] * 8 + images[:, 5]
        tables.append(np.bincount(pairs, minlength=64))
    assert set(vars(made)) == attributes

    def pvalue(one, other):
        both = np.stack([tables[one], tables[other]])
        return stats.chi2_contingency(both[:, both.sum(0) > 20]).pvalue

    assert pvalue(0, 2) > 1e-4 and pvalue(0, 1) > 1e-4


def test_what_is_set_can_be_pickled(kind):
    made = generator(kind)
    done = accelerate(made)
    assert pickle.loads(pickle.dumps(done.client)) == done.client
    restore(made)
    assert "generate_samples" not in vars(made)
