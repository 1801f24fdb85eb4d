"""Truncated draws against a sort in exact integers; softcap and two scales of guidance against the oracle.

`python tests/test_truncation.py --cases 100000` draws from as many random rows.
"""

import argparse
import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import assert_ids_by_margin, assert_statistics
from scipy import stats

import mgt_kernels
from mgt_kernels import cpu, reference
from mgt_kernels.reference.sample_tokens import guided_logits, kept_tokens, row_statistics

NAMES = tuple(cpu.STATISTICS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("token_major", "position_major")
# around the lanes, the words of a Philox block, and the tiles
SIZES = (1, 2, 15, 16, 17, 33, 511, 512, 513, 2047, 2048, 2049, 5000)
LARGEST_MIN_P = 1 - 2.0**-24


def position_major(x):
    return x.mT.contiguous().mT


def in_layout(layout, x):
    return x if layout == "token_major" or x is None else position_major(x)


# What the kernels compute, in NumPy: float32, a fma where they have one.


@np.errstate(invalid="ignore")
def fma(a, b, c):
    """Round a b + c once: the sum of doubles is rounded to odd, from which float32's rounding is right."""
    product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    steps = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    bits = bits + np.where(steps, np.where((error > 0) == (total > 0), 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)


def exp_nonpositive(d):
    d = np.maximum(np.float32(-87), d)
    log2e, magic = np.float32(1.44269502162933349609375), np.float32(12582912 + 127)
    exponent = fma(d, log2e, magic) - magic
    r = fma(d, log2e, -exponent)
    p = np.float32(0.0013264729641377926)
    for c in (0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0):
        p = fma(p, r, np.float32(c))
    return np.ldexp(p, exponent.astype(np.int32))


def weights_of(logits):
    """Whole units of 2^-31 of exp(l - max l), (..., V) int64."""
    below = (logits - logits.max(-1, keepdims=True)).astype(np.float32)
    return fma(exp_nonpositive(below), np.float32(2.0**31), np.float32(0.5)).astype(np.int64)


@np.errstate(invalid="ignore", over="ignore")
def staged(case):
    """The float32 logits (N, V) that a row's tokens compete with."""

    def floats(x):
        return x[0].float().numpy()

    cond = floats(case["logits"])
    logits, forbidden = cond, cond == -np.inf
    if case["uncond_logits"] is not None:
        uncond = floats(case["uncond_logits"])
        forbidden = forbidden | (uncond == -np.inf)
        logits = fma(np.float32(case["guidance_scale"]), (cond - uncond).astype(np.float32), uncond)
    if case["allowed"] is not None:
        bias = case["allowed"].numpy()
        forbidden = forbidden | (bias == -np.inf)
        logits = logits + bias
    if case["noise_scale"]:
        num_positions, num_tokens = logits.shape
        noise = [cpu.gaussian(case["seed"], n, case["step"], num_tokens).numpy() for n in range(num_positions)]
        logits = fma(np.float32(case["noise_scale"]), np.stack(noise), logits)
    if case["temperature"] not in (0.0, 1.0):
        logits = logits * (np.float32(1) / np.float32(case["temperature"]))
    if case["mask_token_id"] < logits.shape[1]:
        forbidden[:, case["mask_token_id"]] = True
    return np.where(forbidden, np.float32(-np.inf), logits)


def brute_force(logits, weights, top_k, top_p):
    """The tokens that top_k and top_p keep of one row, sorted, straight from the definition."""
    falling = sorted((j for j, logit in enumerate(logits) if logit > -math.inf), key=lambda j: -logits[j])
    if top_k:
        least = logits[falling[min(top_k, len(falling)) - 1]]
        falling = [j for j in falling if logits[j] >= least]
    if top_p < 1:
        wanted = math.ceil(Fraction(top_p) * sum(weights[j] for j in falling))
        for j, mass in zip(falling, itertools.accumulate(weights[j] for j in falling), strict=True):
            if mass >= wanted:
                falling = [i for i in falling if logits[i] >= logits[j]]
                break
    return falling


def float32(value):
    return float(np.float32(value))


def pick(generator, *values):
    return values[int(torch.randint(len(values), (), generator=generator))]


def make_case(generator, num_tokens=None, dtype=None, layout=None, num_rows=None):
    """Random rows and options; of a row in eight the tokens are flat, have few levels, or are all but one forbidden."""

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    num_tokens = num_tokens or pick(generator, *SIZES)
    dtype, layout = dtype or pick(generator, *DTYPES), layout or pick(generator, *LAYOUTS)
    num_rows = num_rows or max(3, min(200, 30_000 // num_tokens))
    shape = 1, num_rows, num_tokens
    std = pick(generator, 0.02, 1.0, 3.0, 3.0, 10.0, 100.0, 1e4, 1e30 if dtype != torch.float16 else 1e3)
    halves = torch.randn(2, *shape, generator=generator) * std
    levels = pick(generator, 0, 0, 1, 8)
    if levels:
        halves = (halves / std * levels).round() / levels * std
    halves[rand(2, *shape) < pick(generator, 0.0, 0.0, 0.2, 0.9)] = -torch.inf
    halves[:, :, 1::8] = std
    only = torch.randint(num_tokens, (num_rows,), generator=generator)
    halves[:, :, 2::8] = -torch.inf
    halves[:, :, torch.arange(num_rows), only] = std
    halves[:, :, 3::8] = (halves[:, :, 3::8] / std).clamp(-1, 1).round() * std
    # something may be drawn
    halves[..., 0] = halves[..., 0].nan_to_num(neginf=0.0)
    logits, uncond = halves.to(dtype)
    bias = None
    if pick(generator, True, False, False, False):
        bias = (torch.randn(num_tokens, generator=generator) * std).masked_fill(rand(num_tokens) < 0.2, -torch.inf)
        bias[0] = 0.0
        halves[..., 0] = 0.0
    temperature = pick(generator, 1.0, 1.0, 0.75, 3.0, 0.0) if std < 1e30 else 1.0
    case = dict(
        logits=in_layout(layout, logits),
        uncond_logits=in_layout(layout, uncond) if pick(generator, True, False) and std < 1e30 else None,
        guidance_scale=float32(pick(generator, 1.0, 3.0, 0.3, -1.5)), allowed=bias,
        noise_scale=float32(pick(generator, 0.0, 0.0, 0.0, 0.6)), temperature=temperature, step=3,
        seed=int(torch.randint(2**40, (), generator=generator)), mask_token_id=num_tokens,
    )  # fmt: skip
    if num_tokens > 1 and pick(generator, True, False, False, False):
        case["mask_token_id"] = num_tokens - 1
    some = 1 + int(torch.randint(num_tokens, (), generator=generator))
    case["top_k"] = pick(generator, None, None, 1, min(2, num_tokens), some, some, num_tokens)
    case["top_p"] = float32(
        pick(generator, 1.0, 1.0, 1e-6, 0.3, 0.5, 0.9, 0.99, 0.999999, 1 - 2.0**-24, max(1e-3, float(rand())))
    )
    case["min_p"] = float32(pick(generator, 0.0, 0.0, 0.0, 0.05, 0.5, 1e-6, 1e-30, LARGEST_MIN_P, float(rand()) * 0.9))
    return case


def expected_kept(logits, case):
    """Two (N, V) bool: what must be kept, and what may be; they differ within the rounding of the logarithm of min_p.

    What top_p does with the exact weights is what it does with float64's, but where the mass before a token is nearer
    to top_p than the rounding of the weights to units and of exp to float32 can say.
    """
    top_k, top_p, min_p = case["top_k"] or 0, case["top_p"], case["min_p"]
    weights = weights_of(logits)
    kept = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits.tolist()):
        kept[row, brute_force(values, weights[row].tolist(), top_k, top_p)] = True
    doubles = torch.from_numpy(logits).double()
    by_oracle = kept_tokens(doubles, top_k, top_p).numpy()
    for row in (kept != by_oracle).any(-1).nonzero()[0]:
        # of top_k there is nothing to round
        assert top_p < 1
        among = kept_tokens(doubles[row], top_k).numpy()
        below = np.where(among, logits[row].astype(np.float64) - logits[row].max(), -np.inf)
        mass = 2.0**31 * np.exp(below)
        with np.errstate(invalid="ignore"):
            slack = 1 + 2 * np.where(among, 0.5 + mass * (2 - below) * 2.0**-24, 0.0).sum()
        for token in (kept[row] != by_oracle[row]).nonzero()[0]:
            before = mass[below > below[token]].sum()
            until = mass[below >= below[token]].sum()
            missed = min(abs(before - top_p * mass.sum()), abs(until - top_p * mass.sum()))
            assert missed <= slack, (row, token, missed, slack)
    must, may = kept, kept
    if min_p:
        largest = logits.max(-1, keepdims=True).astype(np.float64)
        bound = largest + math.log(min_p)
        slack = 2.0**-22 * np.maximum(np.abs(largest), -math.log(min_p))
        must, may = kept & (logits >= bound + slack), kept & (logits >= bound - slack)
    return must, may


def sample(case, **changes):
    case = case | changes
    tokens = case.pop("tokens", None)
    if tokens is None:
        tokens = torch.full(case["logits"].shape[:2], case["mask_token_id"])
    return mgt_kernels.sample_tokens(case.pop("logits"), tokens, **case)


def kept_by_kernel(case, tokens, backend="auto"):
    """Which of tokens (N, P) a draw keeps: a known token that is left out has a log-probability of -inf."""
    num_probes = tokens.shape[1]
    copies = {
        name: None if case[name] is None else case[name].expand(num_probes, -1, -1)
        for name in ("logits", "uncond_logits")
    }
    # as many samples of the same row, which is read in place, with the same noise
    drawn = sample(
        case, **copies, tokens=tokens.T.contiguous(), rows="all", statistics=["known_logprob"], backend=backend
    )
    return (drawn.known_logprob > -torch.inf).T


def same_bits(first, other):
    return all(
        (a is None and b is None) or torch.equal(a.view(torch.int8), b.view(torch.int8))
        for a, b in zip(first, other, strict=True)
    )


def check_case(case, generator):
    """All backends give the bits of the first; it keeps what the sort keeps; and gives what float64 makes of that."""
    logits = staged(case)
    num_rows, num_tokens = logits.shape
    must, may = expected_kept(logits, case)
    first, *others = (sample(case, statistics=NAMES, backend=isa) for isa in cpu.available_isas())
    assert all(same_bits(first, other) for other in others)

    # every token of small rows; of large ones those at the border, and some
    order = np.argsort(-logits, -1, kind="stable")
    mask = case["mask_token_id"]
    if num_tokens <= 40:
        probes = np.tile(np.arange(num_tokens), (num_rows, 1))
    else:
        border = may.sum(-1)[:, None] + np.arange(-5, 5)
        around = np.take_along_axis(order, border.clip(0, num_tokens - 1), -1)
        some = torch.randint(num_tokens, (num_rows, 6), generator=generator).numpy()
        probes = np.concatenate([order[:, :1], around, some], -1)
    # the mask's own position would be drawn
    probes[probes == mask] = order[0, 0] if mask != order[0, 0] else order[0, 1]
    probed = kept_by_kernel(case, torch.from_numpy(probes), pick(generator, *cpu.available_isas())).numpy()
    # a kept token that is too far below the largest for float32's difference
    with np.errstate(over="ignore"):
        tiny = np.take_along_axis(logits, probes, -1) - logits.max(-1, keepdims=True) == -np.inf
    assert (probed | tiny)[np.take_along_axis(must, probes, -1)].all()
    assert not probed[~np.take_along_axis(may, probes, -1)].any()

    # bit for bit the plain draw of logits that hold -inf where a token is left out
    ids = first.token_ids[0].numpy()
    assert may[np.arange(num_rows), ids].all()
    sure = (must == may).all(-1)
    plain = dict(top_k=None, top_p=1.0, min_p=0.0)
    left_out = torch.from_numpy(~may)[None]
    masked_fill = {
        name: None if case[name] is None else case[name].masked_fill(left_out, -torch.inf)
        for name in ("logits", "uncond_logits")
    }
    alone = sample(case, **plain, **masked_fill, statistics=NAMES)
    assert same_bits((x[0, sure] for x in first), (x[0, sure] for x in alone))

    # of all tokens the same draws, and the plain statistics
    full = sample(case, logprob_of="full", statistics=NAMES)
    assert torch.equal(full.token_ids, first.token_ids)
    whole = sample(case, **plain, statistics=NAMES)
    for name in ("argmax", "max_logprob", "margin", "entropy", "logsumexp"):
        assert same_bits([getattr(full, name)], [getattr(whole, name)]), name
    if mask == num_tokens:
        known = sample(case, **plain, tokens=full.token_ids, rows="all", statistics=["known_logprob"])
        assert same_bits([known.known_logprob], [full.logprob])

    # less the largest, which float64 would lose the logsumexp in too
    largest = torch.from_numpy(logits.max(-1)[sure]).double()
    doubles = torch.from_numpy(np.where(may, logits, -np.inf)[sure]).double() - largest[:, None]
    truth = row_statistics(doubles)
    assert torch.equal(first.argmax[0, sure], truth["argmax"])
    truth["logprob"] = doubles.gather(-1, first.token_ids[0, sure, None])[:, 0] - truth["logsumexp"]
    truth["logsumexp"] += largest
    for name in ("logprob", "max_logprob", "margin", "entropy", "logsumexp"):
        found = getattr(first, name)[0, sure].double()
        torch.testing.assert_close(found, truth[name], rtol=4e-7, atol=1e-5 if name == "entropy" else 4e-6)


def check_cases(num_cases, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < num_cases:
        case = make_case(generator, **options)
        try:
            check_case(case, generator)
        except AssertionError as error:
            kind = {name: value for name, value in case.items() if not isinstance(value, torch.Tensor)}
            raise AssertionError(f"{tuple(case['logits'].shape)} {case['logits'].dtype} {kind}: {error}") from error
        done += case["logits"].shape[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_keeps_what_a_sort_keeps(dtype, layout):
    for num_tokens in SIZES:
        for seed in range(3):
            check_cases(1, seed, num_tokens=num_tokens, dtype=dtype, layout=layout, num_rows=9)


def test_random_rows_keep_what_a_sort_keeps():
    check_cases(6000, seed=1)


def test_the_comparison_can_fail():
    generator = torch.Generator().manual_seed(2)
    case = make_case(generator, num_tokens=33, num_rows=50) | dict(top_k=None, top_p=0.5, min_p=0.0)
    case["logits"] = torch.randn(1, 50, 33, generator=generator)
    case |= dict(uncond_logits=None, allowed=None, noise_scale=0.0, temperature=1.0, mask_token_id=33)
    check_case(case, generator)
    logits = staged(case)
    _, may = expected_kept(logits, case)
    probes = torch.arange(33).expand(50, -1)
    assert torch.equal(kept_by_kernel(case, probes), torch.from_numpy(may))
    for change in (dict(top_p=0.49), dict(top_k=3), dict(min_p=0.3)):
        assert not torch.equal(kept_by_kernel(case | change, probes), torch.from_numpy(may))


PLAIN = dict(mask_token_id=10**6, seed=3, step=1)


def kept_of(values, backend, **options):
    """The tokens that a draw from one row keeps."""
    logits = torch.tensor(values)[None, None] if not isinstance(values, torch.Tensor) else values[None, None]
    probes = torch.arange(logits.shape[-1])[None]
    case = PLAIN | dict(logits=logits, uncond_logits=None) | options
    return kept_by_kernel(case, probes, backend)[0].nonzero().flatten().tolist()


def test_ties_at_a_border_all_stay(backend):
    row = [3.0, 1.0, 2.0, 1.0, 3.0, 1.0, -torch.inf, 0.0]
    assert kept_of(row, backend, top_k=1) == [0, 4]
    assert kept_of(row, backend, top_k=2) == [0, 4]
    assert kept_of(row, backend, top_k=3) == [0, 2, 4]
    assert kept_of(row, backend, top_k=4) == [0, 1, 2, 3, 4, 5]
    assert kept_of(row, backend, top_k=6) == [0, 1, 2, 3, 4, 5]
    assert kept_of(row, backend, top_k=7) == [0, 1, 2, 3, 4, 5, 7]
    # more than are finite
    assert kept_of(row, backend, top_k=8) == [0, 1, 2, 3, 4, 5, 7]
    # each 3 has about 0.35 of the mass
    assert kept_of(row, backend, top_p=1e-9) == [0, 4]
    assert kept_of(row, backend, top_p=0.5) == [0, 4]
    assert kept_of(row, backend, top_p=0.75) == [0, 2, 4]
    assert kept_of(row, backend, top_p=0.9) == [0, 1, 2, 3, 4, 5]
    # exp(-1) = 0.368, exp(-2) = 0.135
    assert kept_of(row, backend, min_p=0.37) == [0, 4]
    assert kept_of(row, backend, min_p=0.36) == [0, 2, 4]
    assert kept_of(row, backend, min_p=0.13) == [0, 1, 2, 3, 4, 5]
    assert kept_of(row, backend, min_p=1 - 1e-9) == [0, 4]
    # 0 and -0 are equal
    assert kept_of([0.0, -1.0, -0.0], backend, top_k=1) == [0, 2]
    assert kept_of([-0.0, -1.0, 0.0], backend, top_p=0.1) == [0, 2]


def test_a_border_is_not_passed_by_half_a_unit(backend):
    # masses that are whole: after half of the tokens, half of the mass is reached, and no more is kept
    row = torch.zeros(64)
    row[32:] = -20.0
    assert kept_of(row, backend, top_p=0.9999) == list(range(32))
    # four logits with one weight
    for top_p, count in ((0.25, 1), (0.250001, 2), (0.5, 2), (0.500001, 3), (0.75, 3), (0.750001, 4)):
        assert (
            kept_of([-1e-10, 0.0, -3e-10, -2e-10], backend, top_p=top_p)
            == [[1], [0, 1], [0, 1, 3], [0, 1, 2, 3]][count - 1]
        )
    for count in (1, 3, 8):
        row = torch.full((64,), -torch.inf)
        row[:count] = 0.0
        row[count : count + 1] = -1.0
        share = count / (count + math.exp(-1.0))
        assert kept_of(row, backend, top_p=share * (1 - 1e-6)) == list(range(count))
        assert kept_of(row, backend, top_p=share * (1 + 1e-6)) == list(range(count + 1))


def test_top_k_comes_before_top_p_and_both_before_min_p(backend):
    row = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]
    assert kept_of(row, backend, top_p=0.65) == [0, 1]
    # of 0.4 and 0.3 the first has 0.571
    assert kept_of(row, backend, top_k=2, top_p=0.56) == [0]
    assert kept_of(row, backend, top_k=2, top_p=0.58) == [0, 1]
    assert kept_of(row, backend, top_k=3, top_p=0.8, min_p=0.7) == [0, 1]
    assert kept_of(row, backend, top_k=3, top_p=0.8, min_p=0.8) == [0]


@pytest.mark.parametrize("num_tokens", [600, 2500, 5000])
def test_as_many_tokens_as_groups(num_tokens, isa):
    # where groups of columns are looked at before tokens: their largest, the rest of a group far below or close
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 30.0):
        row = torch.randn(num_tokens, generator=generator) * spread
        row[: num_tokens // 7] -= 3 * spread
        for top_k in (*range(58, 72), 127, 128, 129, 191, 192, 193, num_tokens - 1):
            if top_k < num_tokens:
                assert kept_of(row, isa, top_k=top_k) == row.topk(top_k).indices.sort().values.tolist(), top_k


def test_masses_are_whole_units(isa):
    # the largest has 2^31; 0.7 units count as one, 0.3 as none, and 1.7 as two
    for units, count, kept in ((0.7, 1000, 1001), (0.3, 1000, 1), (1.7, 500, 501), (0.7, 100, 1), (1.2, 110, 1)):
        row = torch.full((count + 1,), math.log(units) - 31 * math.log(2.0))
        row[0] = 0.0
        # all but 128 units
        assert len(kept_of(row, isa, top_p=1 - 2.0**-24)) == kept, units


def test_a_share_that_is_reached_exactly(isa):
    # half weighs 2^30 units
    half = float32(-math.log(2))
    assert kept_of([0.0, half, half], isa, top_p=0.5) == [0]
    assert kept_of([0.0, half, half], isa, top_p=0.75) == [0, 1, 2]
    assert kept_of([half, half, 0.0, 0.0, half, half], isa, top_p=0.5) == [2, 3]
    # exp(-20) weighs four units, of which half are missed
    assert kept_of([half, half, 0.0, 0.0, half, half, -20.0], isa, top_p=0.5) == [0, 1, 2, 3, 4, 5]
    many = torch.full((9000,), half)
    many[2000:5000] = 0.0
    assert kept_of(many, isa, top_p=0.5) == list(range(2000, 5000))


@pytest.mark.parametrize("num_tokens", [8192, 70000])
def test_a_sample_that_misleads_costs_only_time(num_tokens, isa):
    # top_p is looked for where every 64th, or 128th, token and its 15 neighbours say: here the others differ
    place = torch.arange(num_tokens) % (64 if num_tokens < 2**16 else 128)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(num_tokens, generator=generator)
    shapes = (
        (0.1, (place >= 16) & (place < 20), 3.0),
        (0.1, place < 16, 3.0),
        (0.1, place < 16, -3.0),
        (2.0, (place >= 16) & (place < 20), 9.0),
        (0.1, torch.arange(num_tokens) == 20, 14.0),
        (3.0, place < 16, -30.0),
    )
    for spread, which, height in shapes:
        row = noise * spread + which * height
        logits = row.numpy()
        weights = weights_of(logits).tolist()
        falling = row.argsort(descending=True)
        for top_p in (0.1, 0.5, 0.9, 0.99):
            count = len(brute_force(logits.tolist(), weights, 0, float32(top_p)))
            # who is left out decides itself at the border
            probes = falling[max(count - 3, 0) : count + 3]
            kept = kept_by_kernel(
                PLAIN | dict(logits=row[None, None], uncond_logits=None, top_p=top_p), probes[None], isa
            )
            assert kept[0].tolist() == [i < min(count, 3) for i in range(len(probes))], (spread, height, top_p)


def test_sums_of_more_weights_than_one_vector_has_room_for(isa):
    # a million and a half weights of nearly 2^31
    num_tokens = 3 * 2**19 + 5
    row = torch.arange(num_tokens) * -1e-6
    weights = weights_of(row.numpy()).tolist()
    for top_p, top_k in itertools.product((0.3, 0.9), (None, num_tokens - 1)):
        count = len(brute_force(row.tolist(), weights, top_k, float32(top_p)))
        case = PLAIN | dict(
            logits=row[None, None], uncond_logits=None, mask_token_id=num_tokens, top_p=top_p, top_k=top_k
        )
        probes = torch.tensor([0, count - 1, count, num_tokens - 1])
        assert kept_by_kernel(case, probes[None], isa)[0].tolist() == [True, True, False, False], (top_p, top_k)


def test_min_p_is_a_share_of_the_largest(backend):
    for min_p in (0.01, 0.3, 0.9):
        border = math.log(min_p)
        assert kept_of([2.0, 2.0 + border + 1e-5, 2.0 + border - 1e-5], backend, min_p=min_p) == [0, 1]


def test_shares_that_float32_does_not_hold(backend):
    row = torch.linspace(0, -15, 50)
    # rounded to 1 and to 0, they would keep all, or be refused
    assert kept_of(row, backend, top_p=1e-300) == [0]
    assert kept_of(row, backend, min_p=1 - 1e-12) == [0]
    # denormal ones are shares too
    row = torch.tensor([0.0, -80.0, -86.0, -92.0, -97.0, -100.0])
    for min_p in (1e-39, 1e-41, 1e-43):
        by_definition = [i for i, value in enumerate(row.tolist()) if value >= math.log(float32(min_p))]
        assert kept_of(row, backend, min_p=min_p) == by_definition, min_p


def test_what_keeps_all_is_the_plain_draw(backend):
    logits = torch.randn(2, 40, 600, generator=torch.Generator().manual_seed(0)) * 3
    tokens = torch.full((2, 40), 600)
    args = dict(mask_token_id=600, seed=torch.tensor([4, 5]), step=2, statistics=NAMES, backend=backend)
    plain = mgt_kernels.sample_tokens(logits, tokens, **args)
    for options in (
        dict(top_k=600), dict(top_p=1.0), dict(min_p=0.0), dict(top_k=600, top_p=1, min_p=0, logprob_of="full"),
        dict(top_k=600, top_p=torch.tensor(1.0), min_p=torch.tensor(0.0)),
    ):  # fmt: skip
        assert same_bits(plain, mgt_kernels.sample_tokens(logits, tokens, **options, **args)), options
    if backend != "reference":
        # which float32 takes for 1
        assert same_bits(plain, mgt_kernels.sample_tokens(logits, tokens, top_p=1 - 1e-9, **args))


def test_one_token_is_drawn_whatever_the_seed(backend):
    logits = torch.randn(1, 50, 300, generator=torch.Generator().manual_seed(0))
    tokens = torch.full((1, 50), 300)
    for seed in range(20):
        for options in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=LARGEST_MIN_P)):
            drawn = mgt_kernels.sample_tokens(
                logits, tokens, mask_token_id=300, seed=seed, step=0, statistics=["entropy"], backend=backend, **options
            )
            assert torch.equal(drawn.token_ids, logits.argmax(-1))
            assert (drawn.logprob == 0).all() and (drawn.entropy == 0).all()


def test_drawn_tokens_follow_what_is_kept(isa):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 1.5
    num_rows = 100_000
    tokens = torch.full((1, num_rows), 50)
    for options in (dict(top_k=9), dict(top_p=0.8), dict(min_p=0.05), dict(top_k=20, top_p=0.9, min_p=0.02)):
        for temperature in (0.7, 1.5):
            token_ids, *_ = mgt_kernels.sample_tokens(
                logits.expand(1, num_rows, 50), tokens, mask_token_id=50, seed=11, step=0, temperature=temperature,
                backend=isa, **options,
            )  # fmt: skip
            tempered = logits.double() / temperature
            kept = kept_tokens(tempered, **options)
            counts = torch.bincount(token_ids[0], minlength=50).double()
            assert (counts[~kept] == 0).all() and 1 < kept.sum() < 50
            expected = tempered.masked_fill(~kept, -torch.inf).softmax(-1) * num_rows
            assert stats.chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 1e-4


def guided_case(num_tokens=300, positions=40, batch=2, dtype=torch.float32, std=3.0):
    generator = torch.Generator().manual_seed(num_tokens)
    logits, uncond, second = (torch.randn(3, batch, positions, num_tokens, generator=generator) * std).to(dtype)
    tokens = torch.full((batch, positions), num_tokens)
    tokens[:, ::5] = torch.arange(len(tokens[0, ::5])) % num_tokens
    return logits, uncond, second, tokens


TRUNCATED = dict(top_k=40, top_p=0.9, min_p=0.001, noise_scale=0.5, rows="all", statistics=NAMES)


def test_a_sample_does_not_depend_on_its_batch_threads_or_part(backend):
    logits, uncond, second, tokens = guided_case(batch=16)
    seeds = torch.arange(16) * 977 - 5000
    args = dict(step=4, mask_token_id=300, guidance_scale=1.7, second_guidance_scale=0.6, softcap=9.0, backend=backend)
    args |= TRUNCATED

    def draw(samples, part=slice(None), first=0):
        halves = [x[samples, part] for x in (logits, uncond, second)]
        return mgt_kernels.sample_tokens(
            halves[0], tokens[samples, part], uncond_logits=halves[1], second_uncond_logits=halves[2],
            seed=seeds[samples], first_position=first, **args,
        )  # fmt: skip

    whole = draw(slice(None))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for samples, part, first in (
            (slice(5, 6), slice(None), 0), (torch.arange(16).flip(0), slice(None), 0), (slice(3), slice(11, 30), 11),
        ):  # fmt: skip
            assert same_bits(draw(samples, part, first), [x[samples, part] for x in whole])


def test_a_ragged_batch_equals_the_padded_one(backend):
    logits, uncond, second, tokens = guided_case(positions=9)
    seeds, scales, others = torch.tensor([8, -9]), torch.tensor([1.5, 3.0]), torch.tensor([-0.5, 2.0])
    args = dict(mask_token_id=300, step=3, softcap=20.0, guidance="dual", backend=backend) | TRUNCATED
    padded = mgt_kernels.sample_tokens(
        logits, tokens, uncond_logits=uncond, second_uncond_logits=second, seed=seeds, guidance_scale=scales,
        second_guidance_scale=others, **args,
    )  # fmt: skip
    sample, position = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([8, 0, 3, 2, 5])
    flat = [x[sample, position][:, None] for x in (logits, tokens, uncond, second)]
    ragged = mgt_kernels.sample_tokens(
        *flat[:2], uncond_logits=flat[2], second_uncond_logits=flat[3], seed=seeds[sample],
        guidance_scale=scales[sample], second_guidance_scale=others[sample], first_position=position, **args,
    )  # fmt: skip
    assert same_bits([x[sample, position] for x in padded], [x[:, 0] for x in ragged])


def test_layouts_agree_bit_for_bit(isa):
    for positions in (1, 15, 31, 32, 33, 70):
        logits, uncond, second, tokens = guided_case(2100, positions)
        args = dict(seed=9, step=0, mask_token_id=2100, guidance_scale=4.0, second_guidance_scale=-0.5, softcap=30.0)
        rows, columns = (
            mgt_kernels.sample_tokens(
                in_layout(layout, logits), tokens, uncond_logits=in_layout(layout, uncond),
                second_uncond_logits=in_layout(layout, second), backend=isa, **args, **TRUNCATED,
            )
            for layout in LAYOUTS
        )  # fmt: skip
        assert same_bits(rows, columns)


def float32_chain(logits, uncond, second, scale, second_scale, guidance, softcap):
    """PyTorch's own chain in fp32."""

    def capped(x):
        return x.float() if softcap is None else softcap * torch.tanh(x.float() / softcap)

    scale, second_scale = (
        x[:, None, None].float() if isinstance(x, torch.Tensor) else x for x in (scale, second_scale)
    )
    guided = cond = capped(logits)
    if uncond is not None:
        uncond = capped(uncond)
        guided = uncond + scale * (cond - uncond)
    if second is not None:
        second = capped(second)
        if guidance == "nested":
            guided = second + second_scale * (guided - second)
        else:
            guided = cond + (scale - 1) * (cond - uncond) + (second_scale - 1) * (cond - second)
    return guided


SCALES = [(2.5, 1.7), (-1.0, 2.0), (0.0, 0.0), (1.0, 1.0), (3.0, -2.0), (torch.tensor([0.5, 3.0]), 1.5),
          (2.0, torch.tensor([-0.5, 2.0])), (torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.0]))]  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 0.5, 5.0, 30.0, 1000.0, 1e6, 1e30])
@pytest.mark.parametrize("guidance", ["none", "one", *cpu.GUIDANCE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softcap_and_two_scales_equal_the_oracle(layout, guidance, softcap):
    for (scale, second_scale), num_tokens, dtype in zip(
        SCALES, itertools.cycle((17, 600, 33)), itertools.cycle(DTYPES), strict=False
    ):
        logits, uncond, second, tokens = guided_case(num_tokens, 37, dtype=dtype)
        uncond = None if guidance == "none" else uncond
        second = second if guidance in cpu.GUIDANCE else None
        kind = "nested" if second is None else guidance
        args = dict(mask_token_id=num_tokens, seed=torch.tensor([3, -9]), step=2, guidance_scale=scale)
        args |= dict(second_guidance_scale=second_scale, guidance=kind)
        first, *others = (
            mgt_kernels.sample_tokens(
                in_layout(layout, logits), tokens, uncond_logits=in_layout(layout, uncond),
                second_uncond_logits=in_layout(layout, second), softcap=softcap, rows="all", statistics=NAMES,
                backend=isa, **args,
            )
            for isa in cpu.available_isas()
        )  # fmt: skip
        assert all(same_bits(first, other) for other in others)
        args |= dict(
            uncond_logits=uncond, second_uncond_logits=second, softcap=math.inf if softcap is None else softcap
        )
        tempered, scores = reference.perturbed_logits(logits, **args)
        assert_ids_by_margin(first.token_ids, scores, tokens == num_tokens)
        chain = float32_chain(logits, uncond, second, scale, second_scale, kind, softcap)
        # each cap may be off by a unit in the last place of the logits, as the chain's may, whose luck differs
        largest = float(tempered[tempered.isfinite()].abs().amax())
        slack = 0.0 if softcap is None else 2 * torch.finfo(torch.float32).eps * largest
        assert_statistics(first._asdict(), chain, logits, tokens, "all", slack=slack, **args)


def test_scales_of_1_change_nothing(isa):
    logits, uncond, second, tokens = guided_case(700)
    args = dict(seed=4, step=0, mask_token_id=700, statistics=NAMES, backend=isa)
    plain = mgt_kernels.sample_tokens(logits, tokens, **args)
    guided = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, guidance_scale=2.0, **args)
    for guidance in cpu.GUIDANCE:
        halves = dict(uncond_logits=uncond, second_uncond_logits=second, guidance=guidance)
        for one, options in ((guided, dict(guidance_scale=2.0)), (plain, {})):
            both = mgt_kernels.sample_tokens(logits, tokens, **halves, **options, **args)
            if guidance == "dual" and one is guided:
                assert same_bits(both, one)
            # u + (c - u) is rounded
            assert (both.token_ids == one.token_ids).float().mean() > 0.98
            torch.testing.assert_close(both.entropy, one.entropy, rtol=1e-5, atol=1e-5)
    # no guidance is guidance by what the logits are
    same = mgt_kernels.sample_tokens(
        logits, tokens, uncond_logits=logits, second_uncond_logits=logits, guidance_scale=7.0,
        second_guidance_scale=-3.0, **args,
    )  # fmt: skip
    assert same_bits(plain, same)


@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("half", range(3))
def test_infinities_in_any_half(op, half, layout, backend):
    # in vectors, and in what is left of a row or of a group of positions
    places = itertools.cycle(itertools.product((3, 16), (5, 66)))
    for guidance, softcap, scales in itertools.product(
        cpu.GUIDANCE, (None, 4.0), ((-3.0, -2.0), (-1.0, 2.0), (2.0, -1.0), (0.0, 1.0), (1.0, 0.0), (3.0, 2.0))
    ):
        args = dict(mask_token_id=70, seed=1, step=0, temperature=0.0, guidance=guidance, softcap=softcap)
        args |= dict(guidance_scale=scales[0], second_guidance_scale=scales[1], backend=backend)

        def draw(halves, args=args):
            given = [in_layout(layout, x) for x in halves]
            tokens = torch.full(halves.shape[1:3], 70)
            others = dict(uncond_logits=given[1], second_uncond_logits=given[2])
            if op == "differential_sample":
                return mgt_kernels.differential_sample(given[0], tokens, None, **others, **args)[:2]
            return mgt_kernels.sample_tokens(given[0], tokens, **others, **args)[:2]

        position, column = next(places)
        halves = torch.zeros(3, 2, 17, 70)
        for bad in (torch.inf, torch.nan):
            halves[half, 1, position, column] = bad
            with pytest.raises(ValueError, match=f"sample 1, position {position} holds NaN or"):
                draw(halves)
        # whatever a forbidden token's logits are, and whatever guidance would make of -inf
        other, value = (half + 1 + column % 2) % 3, (torch.inf, torch.nan, 1.0)[position % 3]
        halves[half, 1, position, column], halves[other, 1, position, column] = -torch.inf, value
        token_ids, logprob = draw(halves)
        assert token_ids[1, position] != column and abs(float(logprob[1, position]) + math.log(69)) < 1e-5
        assert abs(float(logprob[0, 0]) + math.log(70)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guidance", cpu.GUIDANCE)
def test_differential_sampling_has_the_same_logits(layout, guidance, isa):
    logits, uncond, second, tokens = (x if x.ndim == 2 else in_layout(layout, x) for x in guided_case(600, 37))
    args = dict(mask_token_id=600, seed=torch.tensor([5, 6]), guidance_scale=2.0, guidance=guidance, softcap=6.0)
    args |= dict(uncond_logits=uncond, second_uncond_logits=second, second_guidance_scale=torch.tensor([0.5, -1.0]))
    plain = mgt_kernels.sample_tokens(logits, tokens, step=0, backend=isa, **args)
    token_ids, logprob, state = mgt_kernels.differential_sample(logits, tokens, None, step=0, backend=isa, **args)
    assert torch.equal(token_ids, plain.token_ids) and torch.equal(logprob, plain.logprob)
    begun = [state.history.clone(), state.written.clone()]
    _, _, other = mgt_kernels.differential_sample(logits, tokens, None, step=0, backend="reference", **args)
    codes = [reference.decode_history(x.history) for x in (state, other)]
    torch.testing.assert_close(codes[0][tokens == 600], codes[1][tokens == 600], rtol=0.07, atol=1e-3)
    # nothing of a call that is refused is written
    for change in (
        dict(softcap=0.0),
        dict(guidance="both"),
        dict(second_guidance_scale=torch.tensor([1.0, torch.inf])),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: "):
            mgt_kernels.differential_sample(logits, tokens, state, step=1, backend=isa, **(args | change))
        assert torch.equal(state.history, begun[0]) and torch.equal(state.written, begun[1])
    ours = mgt_kernels.differential_sample(-logits, tokens, state, step=1, share=0.0, backend=isa, **args)
    plain = mgt_kernels.sample_tokens(-logits, tokens, step=1, backend=isa, **args)
    assert torch.equal(ours[0], plain.token_ids) and torch.equal(ours[1], plain.logprob)


GOOD = dict(logits=torch.zeros(2, 3, 4), tokens=torch.full((2, 3), 4), mask_token_id=4, seed=0, step=0)
HALF = torch.zeros(2, 3, 4)
OF_BOTH_OPS = [
    *((dict(softcap=value), ValueError, f"softcap: expected a finite number of at least 1e-30, or None, got {value}")
      for value in (0.0, -1.0, math.nan, 1e-31, 1e39)),
    *((dict(softcap=torch.tensor(value)), ValueError, "softcap: expected a finite number of at least 1e-30, or None")
      for value in (0.0, -1.0, math.nan)),
    (dict(softcap="high"), TypeError, "softcap: expected a number or a 0-dimensional tensor, got str"),
    (dict(softcap=torch.ones(2)), ValueError, "softcap: expected a number or a 0-dimensional tensor, got shape (2,)"),
    (dict(guidance="triple"), ValueError, "guidance: expected one of ('nested', 'dual'), got 'triple'"),
    (dict(uncond_logits=None), ValueError, "second_uncond_logits: expected None where uncond_logits is None"),
    (dict(second_uncond_logits=torch.zeros(2, 3, 5)), ValueError,
     "second_uncond_logits: expected shape (2, 3, 4), got (2, 3, 5)"),
    (dict(second_uncond_logits=HALF.half()), TypeError,
     "second_uncond_logits: expected dtype torch.float32, got torch.float16"),
    (dict(second_uncond_logits=HALF.to("meta")), ValueError, "second_uncond_logits: expected device cpu"),
    (dict(second_uncond_logits=HALF[0]), ValueError, "second_uncond_logits: expected 3 dimensions, got shape (3, 4)"),
    (dict(second_uncond_logits=[1.0]), TypeError, "second_uncond_logits: expected a tensor, got list"),
    (dict(second_uncond_logits=position_major(HALF)), ValueError, "expected unit stride over tokens"),
    (dict(second_uncond_logits=torch.zeros(2, 3, 8)[..., ::2]), ValueError, "expected unit stride over tokens"),
    *((dict(second_guidance_scale=value), ValueError, f"second_guidance_scale: expected a finite number, got {value}")
      for value in (math.nan, math.inf, 1e39)),
    (dict(second_guidance_scale=torch.tensor([1.0, math.nan])), ValueError,
     "second_guidance_scale: expected finite numbers, got nan for sample 1"),
    (dict(second_guidance_scale=torch.tensor([1.0, -math.inf]).half()), ValueError, "got -inf for sample 1"),
    (dict(second_guidance_scale=torch.ones(3)), ValueError, "second_guidance_scale: expected a number or a 0-dim"),
    (dict(second_guidance_scale=True), TypeError, "second_guidance_scale: expected a number"),
]  # fmt: skip
OF_THE_DRAW = [
    *((dict(top_k=value), ValueError, f"top_k: expected None or a value within [1, 4], the tokens, got {value}")
      for value in (0, -1, 5)),
    (dict(top_k=True), TypeError, "top_k: expected an integer, got a bool"),
    (dict(top_k=2.5), TypeError, "top_k: expected an integer, got float"),
    (dict(top_k=torch.tensor(2.0)), TypeError, "top_k: expected an integer, got Tensor"),
    (dict(top_k=torch.tensor(0)), ValueError, "top_k: expected None or a value within [1, 4], the tokens, got 0"),
    *((dict(top_p=value), ValueError, f"top_p: expected a number within (0, 1], got {value}")
      for value in (0.0, -0.1, 1.1, math.nan)),
    *((dict(top_p=torch.tensor(value, dtype=torch.float64)), ValueError,
       f"top_p: expected a number within (0, 1], got {value}") for value in (0.0, -0.1, 1.1, math.nan)),
    (dict(top_p=torch.ones(2)), ValueError, "top_p: expected a number or a 0-dimensional tensor, got shape (2,)"),
    (dict(top_p=None), TypeError, "top_p: expected a number or a 0-dimensional tensor, got NoneType"),
    *((dict(min_p=value), ValueError, f"min_p: expected a number within [0, 1), got {value}")
      for value in (-0.1, 1.0, math.nan)),
    *((dict(min_p=torch.tensor(value, dtype=torch.float64)), ValueError,
       f"min_p: expected a number within [0, 1), got {value}") for value in (-0.1, 1.0, math.nan)),
    (dict(logprob_of="half"), ValueError, "logprob_of: expected one of ('kept', 'full'), got 'half'"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op, change, error, words",
    [
        *(("sample_tokens", *case) for case in (*OF_THE_DRAW, *OF_BOTH_OPS)),
        *(("differential_sample", *case) for case in OF_BOTH_OPS),
    ],
)
def test_bad_arguments_are_named(op, change, error, words, backend):
    arguments = GOOD | dict(uncond_logits=HALF, second_uncond_logits=HALF) | change
    if op == "differential_sample":
        arguments["state"] = None
    with pytest.raises(error) as caught:
        getattr(mgt_kernels, op)(**arguments, backend=backend)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scalars_may_be_tensors_of_any_dtype(dtype, backend):
    logits, uncond, second, tokens = guided_case(100)
    args = dict(mask_token_id=100, seed=3, step=1, uncond_logits=uncond, second_uncond_logits=second, top_k=30)
    values = dict(second_guidance_scale=1.5, softcap=8.0, top_p=0.875, min_p=0.0078125)
    expected = mgt_kernels.sample_tokens(logits, tokens, **values, **args, backend=backend)
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    assert same_bits(mgt_kernels.sample_tokens(logits, tokens, **tensors, **args, backend=backend), expected)
    numbers = {name: np.float32(value) for name, value in values.items()}
    assert same_bits(mgt_kernels.sample_tokens(logits, tokens, **numbers, **args, backend=backend), expected)
    for top_k in (np.int64(30), torch.tensor(30), torch.tensor(30, dtype=torch.uint8)):
        args["top_k"] = top_k
        assert same_bits(mgt_kernels.sample_tokens(logits, tokens, **values, **args, backend=backend), expected)


@pytest.mark.parametrize("kind", ["floats", "tensors"])
def test_a_truncated_step_compiles_without_a_graph_break(kind):
    logits, uncond, second, tokens = guided_case(64)

    def step(logits, uncond, second, tokens, seed, second_scale, softcap, top_p, min_p):
        drawn = mgt_kernels.sample_tokens(
            logits, tokens, uncond_logits=uncond, second_uncond_logits=second, guidance_scale=2.0,
            second_guidance_scale=second_scale, softcap=softcap, guidance="dual", top_k=20, top_p=top_p, min_p=min_p,
            logprob_of="full", mask_token_id=64, seed=seed, step=1, statistics=["entropy"],
        )  # fmt: skip
        _, logprob, _ = mgt_kernels.differential_sample(
            logits, tokens, None, uncond_logits=uncond, second_uncond_logits=second, softcap=softcap,
            second_guidance_scale=second_scale, mask_token_id=64, seed=seed, step=1,
        )  # fmt: skip
        return drawn.token_ids, drawn.logprob, drawn.entropy, logprob

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    frames = torch._dynamo.utils.counters["stats"]
    for i in range(4):
        numbers = (1.5 - 0.25 * i, 8.0 + i, 0.9 - 0.125 * i, 0.01 * (i + 1))
        if kind == "tensors":
            numbers = tuple(torch.tensor(x, dtype=torch.float64) for x in numbers)
        inputs = logits, uncond, second, tokens, torch.tensor([1, 2]), *numbers
        assert same_bits(compiled(*inputs), step(*inputs))
        if i == 1:
            so_far = frames["unique_graphs"]
    assert frames["unique_graphs"] == so_far


def test_meta_tensors_have_the_shapes_of_the_results():
    logits, uncond, second, tokens = (x.to("meta") for x in guided_case(64))
    drawn = mgt_kernels.sample_tokens(
        logits, tokens, uncond_logits=uncond, second_uncond_logits=second, softcap=3.0, top_k=3, top_p=0.5, min_p=0.1,
        logprob_of="full", mask_token_id=64, seed=1, step=1, statistics=["margin"],
    )  # fmt: skip
    assert all(x.shape == (2, 40) and x.is_meta for x in (drawn.token_ids, drawn.logprob, drawn.margin))


def test_the_kept_mass_is_what_was_asked_for():
    # of real rows, in float64: no less than top_p, and without the last level less than it
    logits = torch.randn(1, 500, 3000, generator=torch.Generator().manual_seed(5)) * 2
    for top_p in (0.1, 0.5, 0.9, 0.99):
        tokens = torch.full((1, 500), 3000)
        drawn = mgt_kernels.sample_tokens(
            logits, tokens, mask_token_id=3000, seed=1, step=0, top_p=top_p, statistics=["logsumexp"]
        )
        mass = (drawn.logsumexp.double() - logits.double().logsumexp(-1)).exp()
        assert (mass >= top_p - 1e-6).all() and (mass < top_p + logits.double().softmax(-1).amax(-1) + 1e-6).all()


def test_guided_logits_of_the_oracle_are_the_definition():
    logits, uncond, second = (x.double() for x in guided_case(20, 3)[:3])
    nested = guided_logits(logits, uncond, 2.0, second, 3.0)
    torch.testing.assert_close(nested, second + 3.0 * (uncond + 2.0 * (logits - uncond) - second))
    dual = guided_logits(logits, uncond, 2.0, second, 3.0, "dual")
    torch.testing.assert_close(dual, logits + (logits - uncond) + 2.0 * (logits - second))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(2)
    start = time.perf_counter()
    check_cases(options.cases, options.seed)
    print(f"{options.cases} rows: no difference, {time.perf_counter() - start:.0f} s")
