"""mask_by_confidence: every instruction set against the oracle, exact counts, ties and the law of the masked sets."""

from itertools import permutations

import pytest
import torch
from scipy import stats

import mgt_kernels
from mgt_kernels import reference

MASK = 99


def make_case(batch=4, positions=64, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 90, (batch, positions), generator=generator)
    logprob = -torch.rand(batch, positions, generator=generator) * 8
    if levels:
        logprob = (logprob * levels).round() / levels
    logprob[:, ::3] = torch.inf
    return token_ids, logprob


@pytest.mark.parametrize("positions", [1, 2, 15, 16, 17, 31, 33, 196, 1000, 4096])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("levels", [None, 1])
def test_equals_the_oracle(backend, positions, temperature, levels):
    token_ids, logprob = make_case(positions=positions, levels=levels)
    num_masked = (logprob != torch.inf).sum(-1)
    mask_len = torch.stack(
        [num_masked[0] * 0, num_masked[1] // 3, num_masked[2] - num_masked[2].clamp(max=1), num_masked[3]]
    )
    args = dict(mask_token_id=MASK, temperature=temperature, seed=torch.arange(4) - 2, step=7)
    tokens = mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, backend=backend, **args)
    assert torch.equal((tokens == MASK).sum(-1), mask_len)
    assert torch.equal(tokens[tokens != MASK], token_ids[tokens != MASK])
    assert not (tokens[logprob == torch.inf] == MASK).any()
    # the float64 oracle may order two confidences otherwise only where fp32 cannot tell them apart
    oracle = mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, backend="reference", **args)
    confidence = logprob.double()
    if temperature:
        confidence = confidence + temperature * reference.confidence_gumbel(args["seed"], positions, 7)
    for sample in (tokens != oracle).any(-1).nonzero().flatten().tolist():
        swapped = confidence[sample][(tokens != oracle)[sample]]
        assert temperature and swapped.max() - swapped.min() < 1e-5


def test_ties_mask_lower_positions_first(backend):
    logprob = torch.tensor([[-1.0, -2.0, torch.inf, -1.0, -1.0, -0.0, 0.0]])
    token_ids = torch.arange(7).view(1, 7)
    masked = [[], [1], [0, 1], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 5], [0, 1, 3, 4, 5, 6]]
    for mask_len, positions in enumerate(masked):
        tokens = mgt_kernels.mask_by_confidence(
            token_ids, logprob, mask_len, mask_token_id=MASK, temperature=0.0, seed=0, step=0, backend=backend
        )
        assert (tokens[0] == MASK).nonzero().flatten().tolist() == positions


def test_all_paths_agree_bit_for_bit():
    token_ids, logprob = make_case(batch=64, positions=1001)
    mask_len = torch.arange(64) * 10
    args = dict(mask_token_id=MASK, temperature=1.3, seed=torch.arange(64), step=3)
    outputs = [
        mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, backend=isa, **args)
        for isa in mgt_kernels.info()["isas"]
    ]
    assert all(torch.equal(tokens, outputs[0]) for tokens in outputs)
    torch.set_num_threads(1)
    for i in (0, 33, 63):
        one = slice(i, i + 1)
        alone = mgt_kernels.mask_by_confidence(token_ids[one], logprob[one], int(mask_len[i]), **(args | dict(seed=i)))
        assert torch.equal(alone, outputs[0][one])


def test_masked_sets_follow_their_law():
    # keeping the largest logprob + g is drawing positions one by one without replacement, by their probabilities
    logprob = torch.tensor([-0.2, -1.0, -1.7, -0.6])
    weight = logprob.double().exp()
    wanted: dict[frozenset[int], float] = {}
    for first, second in permutations(range(4), 2):
        chance = weight[first] / weight.sum() * weight[second] / (weight.sum() - weight[first])
        key = frozenset({0, 1, 2, 3} - {first, second})
        wanted[key] = wanted.get(key, 0.0) + float(chance)
    num_samples = 100_000
    tokens = mgt_kernels.mask_by_confidence(
        torch.zeros(num_samples, 4, dtype=torch.int64), logprob.expand(num_samples, 4), 2, mask_token_id=MASK,
        temperature=1.0, seed=torch.arange(num_samples), step=1,
    )  # fmt: skip
    code = ((tokens == MASK) * torch.tensor([1, 2, 4, 8])).sum(-1)
    counts = torch.bincount(code, minlength=16)
    observed = [int(counts[sum(1 << i for i in key)]) for key in wanted]
    assert sum(observed) == num_samples
    assert stats.chisquare(observed, [chance * num_samples for chance in wanted.values()]).pvalue > 1e-4


def test_the_comparison_can_fail():
    token_ids, logprob = make_case(positions=1000)
    args = dict(mask_token_id=MASK, temperature=1.0, seed=3, step=1)
    expected = mgt_kernels.mask_by_confidence(token_ids, logprob, 100, backend="reference", **args)
    for change in (dict(seed=4), dict(step=2), dict(temperature=1.1)):
        assert not torch.equal(mgt_kernels.mask_by_confidence(token_ids, logprob, 100, **(args | change)), expected)


def test_edge_shapes_and_inputs_kept(backend):
    args = dict(mask_token_id=MASK, temperature=1.0, seed=0, step=0, backend=backend)
    empty = torch.empty(0, 4, dtype=torch.int64)
    assert mgt_kernels.mask_by_confidence(empty, torch.empty(0, 4), 0, **args).shape == (0, 4)
    token_ids, logprob = make_case()
    copies = token_ids.clone(), logprob.clone()
    mgt_kernels.mask_by_confidence(token_ids, logprob, 5, **args)
    assert torch.equal(copies[0], token_ids) and torch.equal(copies[1], logprob)
    known = torch.full_like(logprob, torch.inf)
    assert torch.equal(mgt_kernels.mask_by_confidence(token_ids, known, 0, **args), token_ids)


CASE = make_case()
GOOD = dict(token_ids=CASE[0], logprob=CASE[1], mask_len=5, mask_token_id=MASK, temperature=1.0, seed=0, step=0)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(token_ids=CASE[0].int()), TypeError, "token_ids: expected dtype torch.int64"),
        (dict(logprob=CASE[1].double()), TypeError, "logprob: expected dtype torch.float32"),
        (dict(logprob=CASE[1][:, 1:]), ValueError, r"logprob: expected shape \(4, 64\)"),
        (dict(mask_len=-1), ValueError, r"mask_len: sample 0 is -1; expected a value within \[0, 42\]"),
        (dict(mask_len=43), ValueError, r"mask_len: sample 0 is 43; expected a value within \[0, 42\]"),
        (dict(mask_len=torch.tensor([1, 2, 50, 4])), ValueError, "mask_len: sample 2 is 50"),
        (dict(mask_len=torch.tensor([1, 2])), ValueError, r"mask_len: expected shape \(4,\)"),
        (dict(mask_len=2.0), TypeError, "mask_len: expected an integer, got float"),
        (dict(temperature=-1.0), ValueError, "temperature: expected a finite number >= 0"),
        (dict(temperature=float("inf")), ValueError, "temperature: expected a finite number >= 0"),
        (dict(seed=torch.zeros(5, dtype=torch.int64)), ValueError, "seed: expected shape"),
        (dict(step=-3), ValueError, "step: expected"),
        (dict(backend="gpu"), ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        mgt_kernels.mask_by_confidence(**(GOOD | change))


@pytest.mark.parametrize("temperature", [1.6e37, 3e38])
def test_noise_past_the_largest_float_masks_exactly_as_many(temperature):
    """Row "mask_by_confidence temperature 3e38", in the reference."""
    logprob = -torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    args = dict(mask_token_id=MASK, temperature=temperature, seed=0, step=0, backend="reference")
    tokens = mgt_kernels.mask_by_confidence(torch.zeros(1, 64, dtype=torch.int64), logprob, 60, **args)
    assert (tokens == MASK).sum() == 60


def test_nan_confidence_is_named(backend):
    logprob = CASE[1].clone()
    logprob[2, 1] = torch.nan
    with pytest.raises(ValueError, match="logprob: sample 2, position 1 is NaN"):
        mgt_kernels.mask_by_confidence(**(GOOD | dict(logprob=logprob, backend=backend)))
