"""The exact judge: its conditionals by brute force, and the decoding loop against the true distribution."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import mgt_sampler
from mgt_sampler.models.markov import MarkovModel, total_variation

NUM_SAMPLES = 50_000
# so much noise on the confidences that the order of the positions does not depend on what was drawn
RANDOM_ORDER = dict(temperature=1e6, progress=False, num_samples=NUM_SAMPLES)


def all_sequences(model):
    return torch.tensor(list(itertools.product(range(model.codebook_size), repeat=model.num_tokens)))


def chi_square(model, tokens):
    """The p-value of samples; sequences that are hardly ever drawn count as one."""
    expected, counts = model.probabilities() * len(tokens), model.counts(tokens)
    rare = expected < 10
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    return stats.chisquare(*pooled).pvalue


def test_probabilities_are_those_of_the_sequences():
    model = MarkovModel(4, 3)
    sequences = all_sequences(model)
    torch.testing.assert_close(model.probabilities(), model.log_prob(sequences).exp())
    assert float(model.probabilities().sum()) == pytest.approx(1)
    assert torch.equal(model.counts(sequences[[5, 5, 0]])[:6], torch.tensor([1, 0, 0, 0, 0, 2]))


def test_logits_are_the_true_conditionals():
    model = MarkovModel(5, 3, std=3.0)
    sequences, probability = all_sequences(model), model.probabilities()
    mask = model.mask_token_id
    tokens = torch.tensor([[mask] * 5, [mask, 2, mask, mask, 0], [1, mask, 1, mask, mask], [0, 1, 2, 0, mask]])
    logits = model.predict_logits(tokens, None)
    for row, row_logits in zip(tokens, logits, strict=True):
        for i in range(5):
            others = torch.arange(5) != i
            agrees = ((sequences == row) | (row == mask) | ~others).all(-1)
            expected = torch.zeros(3, dtype=torch.float64).index_add_(0, sequences[agrees][:, i], probability[agrees])
            torch.testing.assert_close(row_logits[i].exp().double(), expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_long_sequences_do_not_underflow():
    model = MarkovModel(2000, 2, std=5.0)
    tokens = torch.full((1, 2000), model.mask_token_id)
    tokens[0, ::7] = 1
    assert model.predict_logits(tokens, None).isfinite().all()


def test_one_token_a_step_in_random_order_is_exact():
    model = MarkovModel(5, 3, std=0.7)
    linear = [1 - (k + 1) / 5 for k in range(5)]
    tokens = mgt_sampler.generate(model, num_inference_steps=5, mask_schedule=linear, **RANDOM_ORDER).tokens
    assert chi_square(model, tokens) > 1e-3
    # the test can fail: the same draws of another chain
    assert chi_square(MarkovModel(5, 3, std=0.72), tokens) < 1e-3
    distance, noise = total_variation(model, tokens)
    assert distance < 1.2 * noise


@pytest.mark.parametrize("num_samples", [1, 7, 4000])
def test_the_noise_of_exact_samples(num_samples):
    model = MarkovModel(3, 3)
    tokens = all_sequences(model)[torch.zeros(num_samples, dtype=torch.int64)]
    counts = torch.arange(num_samples + 1, dtype=torch.float64)
    truth = model.probabilities()
    mass = torch.from_numpy(stats.binom.pmf(counts[:, None], num_samples, truth))
    expected = (mass * (counts[:, None] / num_samples - truth).abs()).sum() / 2
    assert total_variation(model, tokens)[1] == pytest.approx(float(expected), rel=1e-9)


def test_fewer_steps_are_further_from_the_truth():
    model = MarkovModel(6, 3, std=2.0)
    distances = []
    for num_steps in (1, 2, 6):
        ratios = [1 - (k + 1) / num_steps for k in range(num_steps)]
        arguments = {**RANDOM_ORDER, "num_samples": 20_000}
        tokens = mgt_sampler.generate(model, num_inference_steps=num_steps, mask_schedule=ratios, **arguments).tokens
        distances.append(total_variation(model, tokens)[0])
    noise = total_variation(model, tokens)[1]
    assert all(more > less + noise for more, less in itertools.pairwise(distances))
    # all tokens at once: the product of the marginals
    sequences, truth = all_sequences(model), model.probabilities()
    marginal = model.predict_logits(torch.full((1, 6), model.mask_token_id), None)[0].double()
    product = marginal[torch.arange(6), sequences].sum(-1).exp()
    assert distances[0] == pytest.approx(float((product - truth).abs().sum() / 2), abs=2 * noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_tokens=0), "num_tokens: expected at least 1, got 0"),
        (dict(codebook_size=1), "codebook_size: expected at least 2, got 1"),
        (dict(std=-1.0), "std: expected a finite number of at least 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MarkovModel(**arguments)


def test_what_the_chain_cannot_do_is_named():
    model = MarkovModel(12, 4)
    with pytest.raises(ValueError, match="condition: the Markov chain has no classes"):
        model.predict_logits(torch.zeros(1, 12, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected at most 2\^20 sequences, got 4\^12"):
        model.probabilities()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_tokens=2.5), "num_tokens: expected an int, got float"),
        (dict(codebook_size=True), "codebook_size: expected an int, got bool"),
        (dict(std="1"), "std: expected a number, got str"),
        (dict(seed=None), "seed: expected an int, got NoneType"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(arguments, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        MarkovModel(**arguments)


def test_numbers_of_numpy():
    model = MarkovModel(np.int64(3), np.int32(3), seed=np.uint8(0), std=np.float32(1.5))
    assert torch.equal(model.transition, MarkovModel(3, 3).transition)
    assert torch.equal(model.probabilities(), MarkovModel(3, 3).probabilities())


@pytest.mark.parametrize(
    "tokens", [torch.zeros(0, 3).long(), torch.zeros(2, 4).long(), torch.full((2, 3), 3), torch.full((2, 3), -1)]
)
def test_tokens_that_are_no_samples_are_named(tokens):
    with pytest.raises(ValueError, match=r"^tokens: expected .*, got "):
        total_variation(MarkovModel(3, 3), tokens)
