"""match_tokens, merge_tokens and unmerge_tokens: against float64 and brute force, ties, corners, threads."""

import math
import sys

import pytest
import torch
from merging import DTYPES, check_match, decisions, listed, same_bits, same_match, tokens_of

import mgt_kernels
from mgt_kernels import match_tokens, merge_tokens, reference, unmerge_tokens

# batch, grid, channels: below, at and above a panel of 16 destinations, a pair of them, a tile of 24 sources
SHAPES = (
    (3, (2, 2), 1),
    (2, (2, 6), 7),
    (1, (8, 8), 16),
    (2, (6, 22), 17),
    (2, (10, 14), 100),
    (1, (16, 16), 1024),
)
ISAS = mgt_kernels.info()["isas"]


RULES = [dict(ratio=r) for r in (0, 0.1, 0.5, 0.75)] + [dict(threshold=t) for t in (-1.0, 0.3, 0.9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_match_is_the_exact_one_but_within_its_rounding(shape, dtype, backend):
    x, num_tokens = tokens_of(shape, dtype), math.prod(shape[1])
    seeds = torch.arange(shape[0]) * 77 - 5
    num_different = 0
    for seed in (None, seeds):
        to = reference.destinations(*shape[1], seeds, 9, seed is not None).sort(-1).values
        for rule in RULES:
            match = match_tokens(x, shape[1], **rule, seed=seed, step=9, backend=backend)
            given = dict(rule) if "threshold" in rule else dict(num_merged=int(rule["ratio"] * num_tokens))
            num_different += check_match(x, match, to, **given)
    # what rounds to another destination is rare
    assert num_different <= 0.002 * x.shape[0] * num_tokens * len(RULES) * 2


@pytest.mark.parametrize("rule", [dict(ratio=0.5), dict(threshold=0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_paths_threads_and_batches_agree_bit_for_bit(shape, rule):
    _, grid, channels = shape
    x = tokens_of((5, grid, channels), seed=2)
    seeds = torch.arange(5) - 2
    options = dict(seed=seeds, step=3, **rule)
    first = match_tokens(x, grid, backend="scalar", **options)
    mean = merge_tokens(x, first, backend="scalar")
    for isa in (*ISAS, "auto"):
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert same_match(match_tokens(x, grid, backend=isa, **options), first)
            assert same_bits(merge_tokens(x, first, backend=isa), mean)
            back = unmerge_tokens(mean, first, backend=isa)
            assert same_bits(back, mean.gather(1, first.row[..., None].expand(-1, -1, channels)))
    for b in range(5):
        alone = match_tokens(x[b : b + 1], grid, **{**options, "seed": int(seeds[b])})
        num_rows = alone.num_rows
        assert num_rows <= first.num_rows and (num_rows == first.num_rows or "threshold" in rule)
        assert all(torch.equal(ours[0], all_of[b]) for ours, all_of in zip(alone[:3], first[:3], strict=True))
        assert same_bits(merge_tokens(x[b : b + 1], alone)[0], mean[b, :num_rows])
        assert not mean[b, num_rows:].any() and not first.sizes[b, num_rows:].any()


def brute_force(x, width, to, num_merged=None, threshold=None):
    """One sample of tokens whose channels are 1 or -1, in integers: the row of each."""
    x, channels = [[int(value) for value in token] for token in x.tolist()], x.shape[1]
    sources = [i for i in range(len(x)) if i not in to]
    product = {(s, d): sum(p * q for p, q in zip(x[s], x[d], strict=True)) for s in sources for d in to}
    nearest = {s: min(sorted(to), key=lambda d: (-product[s, d], d)) for s in sources}
    order = sorted(sources, key=lambda s: (-product[s, nearest[s]], s))
    if num_merged is None:
        merged = {s for s in sources if product[s, nearest[s]] >= threshold * channels}
    else:
        merged = set(order[:num_merged])
    place = {i: m for m, i in enumerate(i for i in range(len(x)) if i not in merged)}
    return [place[nearest[i]] if i in merged else place[i] for i in range(len(x))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_ties_equal_brute_force(channels, dtype, backend):
    # norms of 1, 2 and 4 make every cosine, and every tie, exact
    generator = torch.Generator().manual_seed(channels)
    for case in range(12):
        grid = [(2, 2), (4, 6), (12, 10)][case % 3]
        num_tokens = grid[0] * grid[1]
        signs = torch.randint(0, 2, (2, num_tokens, channels), generator=generator) * 2 - 1
        # tokens that differ in length only are alike
        x = (signs * 4.0 ** torch.randint(-2, 3, (2, num_tokens, 1), generator=generator)).to(dtype)
        seeds = torch.randint(-9, 9, (2,), generator=generator)
        to = reference.destinations(*grid, seeds, case, True)
        for rule in (dict(ratio=0.3), dict(ratio=0.7), dict(threshold=0.5), dict(threshold=1.0)):
            match = match_tokens(x, grid, **rule, seed=seeds, step=case, backend=backend)
            given = rule if "threshold" in rule else dict(num_merged=int(rule["ratio"] * num_tokens))
            expected = [brute_force(signs[b], grid[1], to[b].tolist(), **given) for b in range(2)]
            assert match.row.tolist() == expected, (grid, rule)


def test_equal_tokens_join_the_lowest_and_the_lower_merge_first(backend):
    grid, num_tokens = (8, 12), 96
    alike = torch.full((1, num_tokens, 5), 3.0)
    for x in (alike, torch.zeros(1, num_tokens, 5), -alike, alike.expand(4, -1, -1).bfloat16()):
        for ratio in (0.25, 0.5, 0.75):
            match = match_tokens(x, grid, ratio=ratio, seed=4, step=1, backend=backend)
            to = reference.destinations(*grid, torch.full((len(x),), 4), 1, True).sort(-1).values
            merged, chosen = decisions(match, to)
            sources = sorted(set(range(num_tokens)) - set(to[0].tolist()))
            for b in range(len(x)):
                assert merged[b].nonzero().flatten().tolist() == sources[: int(ratio * num_tokens)]
                assert (chosen[b][merged[b]] == to[b, 0]).all()
    # zeros are as far from all as can be told: 0, which is less than what is alike, and more than its opposite
    x = torch.ones(1, 16, 3)
    x[0, [1, 6]], x[0, [4, 15]] = 0.0, -1.0
    for num_merged, expected in ((8, []), (9, [1]), (10, [1, 6]), (11, [1, 4, 6])):
        match = match_tokens(x, (4, 4), ratio=num_merged / 16, backend=backend)
        merged, chosen = decisions(match, reference.destinations(4, 4, torch.zeros(1, dtype=torch.int64), 0, False))
        assert merged[0].nonzero().flatten().tolist() == sorted({3, 5, 7, 9, 11, 12, 13, 14} | set(expected))
        assert (chosen[0][merged[0]] == 0).all()


def test_small_integers_equal_float32_arithmetic(isa):
    # all sums are exact, so that what is left is a root, a division and two products, each rounded once
    generator = torch.Generator().manual_seed(6)
    for shape in SHAPES[1:]:
        batch, grid, channels = shape
        num_tokens = grid[0] * grid[1]
        x = torch.randint(-3, 4, (batch, num_tokens, channels), generator=generator).float()
        x[:, ::5] = 0
        to = reference.destinations(*grid, torch.zeros(batch, dtype=torch.int64), 0, False).sort(-1).values
        there = x.gather(1, to[..., None].expand(-1, -1, channels))
        inverse = [torch.where(n > 0, 1 / n, 0.0) for n in (t.square().sum(-1).sqrt() for t in (x, there))]
        score = (x.double() @ there.double().mT).float() * inverse[1][:, None]
        best, cosine = score.amax(-1), score.amax(-1) * inverse[0]
        nearest = to.gather(1, (score == best[..., None]).byte().argmax(-1))
        position = torch.arange(num_tokens).expand(batch, -1)
        is_source = torch.ones_like(position, dtype=torch.bool).scatter_(1, to, False)
        for ratio in (0.06, 0.3, 0.75):
            order = cosine.masked_fill(~is_source, -9.0).argsort(dim=-1, descending=True, stable=True)
            expected = torch.zeros_like(is_source).scatter_(1, order[:, : int(ratio * num_tokens)], True)
            merged, chosen = decisions(match_tokens(x, grid, ratio=ratio, backend=isa), to)
            assert torch.equal(merged, expected) and torch.equal(chosen[merged], nearest[merged])


def test_ratios_merge_their_floor_and_thresholds_what_reaches_them(backend):
    x, grid = tokens_of((2, (4, 10), 9)), (4, 10)
    for ratio, num_rows in (
        (0, 40),
        (0.0, 40),
        (0.024, 40),
        (0.025, 39),
        (1 / 3, 27),
        (0.5, 20),
        (0.749, 11),
        (0.75, 10),
    ):
        match = match_tokens(x, grid, ratio=ratio, backend=backend)
        assert match.num_rows == num_rows and (match.row.amax(-1) == num_rows - 1).all()
    identity = match_tokens(x, grid, ratio=0, backend=backend)
    assert torch.equal(identity.row, torch.arange(40).expand(2, -1)) and torch.equal(identity.members, identity.row)
    assert same_bits(unmerge_tokens(merge_tokens(x, identity, backend=backend), identity, backend=backend), x)
    # 12 of the first sample's 30 sources have a copy, none of the second's
    x = torch.eye(40)[None].repeat(2, 1, 1)
    x[0, 1:13:2], x[0, 13:19] = x[0, 0].clone(), x[0, 2].clone()
    match = match_tokens(x, grid, threshold=0.99, backend=backend)
    assert match.num_rows == 40 and match.sizes.shape == (2, 40) and int(match.row[0].max()) == 40 - 12 - 1
    assert (match.sizes[0, 28:] == 0).all() and (match.sizes[1] == 1).all()
    y = merge_tokens(x, match, backend=backend)
    assert not y[0, 28:].any() and torch.equal(y[1], x[1])
    assert torch.equal(unmerge_tokens(y, match, backend=backend), x)
    assert match_tokens(x[:1], grid, threshold=0.99, backend=backend).num_rows == 28
    # 30 is where all merge
    assert match_tokens(x, grid, threshold=-1, backend=backend).num_rows == 10


def kept_alone(match):
    """The tokens of the rows of one, of each sample."""
    sizes, starts = match.sizes, match.starts[:, : match.num_rows]
    return [match.members[b][starts[b][sizes[b] == 1]].tolist() for b in range(len(sizes))]


def test_corners_are_philox_draws(backend):
    # of equal tokens all sources join the lowest destination, so that the others are alone
    grid, num_cells = (20, 60), 300
    x = torch.ones(4, 1200, 1)
    options = dict(ratio=0.75, backend=backend)
    seeds = torch.tensor([0, -1, 2**63 - 1, 5])
    counts = torch.zeros(4)
    for step in (0, 1, 2**32 - 1):
        match = match_tokens(x, grid, seed=seeds, step=step, **options)
        to = reference.destinations(*grid, seeds, step, True)
        assert kept_alone(match) == [sorted(found)[1:] for found in to.tolist()]
        corner = reference.merge_corner(seeds, num_cells, step)
        counts += torch.bincount(corner.flatten(), minlength=4)
        # seeds and steps as one, as tensors, as one for each sample
        assert same_match(match_tokens(x, grid, seed=seeds, step=torch.tensor(step), **options), match)
        for same in (5, torch.tensor(5), torch.tensor(5, dtype=torch.int8), torch.full((4,), 5, dtype=torch.int32)):
            again = match_tokens(x, grid, seed=same, step=step, **options)
            assert torch.equal(again.row, match.row[3:].expand(4, -1))
    words = reference.philox(seeds[:, None], torch.zeros(1, dtype=torch.int64), torch.arange(7), 2**32 - 1, 4)[0]
    assert torch.equal(words >> 30, corner[:, :7])
    # 3600 draws: each corner about 900 times, with a standard deviation of 26
    assert counts.sum() == 3600 and ((counts - 900).abs() < 4 * 26).all()
    # without a seed the top left ones, at any step
    top_left = [i * 120 + 2 * j for i in range(10) for j in range(30)]
    for step in (0, 7):
        assert kept_alone(match_tokens(x[:1], grid, step=step, **options)) == [top_left[1:]]


@pytest.mark.parametrize("fault", ["the highest of ties", "one less", "not the nearest", "the least alike"])
def test_the_comparisons_can_fail(fault, monkeypatch):
    x, grid = tokens_of((2, (6, 8), 9)), (6, 8)
    match = match_tokens(x, grid, ratio=0.5)
    to = reference.destinations(*grid, torch.zeros(2, dtype=torch.int64), 0, False)
    assert check_match(x, match, to, num_merged=24) == 0
    if fault == "the highest of ties":
        oracle = reference.similarities

        def highest(x, to):
            best, place = oracle(x.flip(1), x.shape[1] - 1 - to)
            return best.flip(1), x.shape[1] - 1 - place.flip(1)

        monkeypatch.setattr(sys.modules["mgt_kernels.reference.match_tokens"], "similarities", highest)
        with pytest.raises(AssertionError):
            test_equal_tokens_join_the_lowest_and_the_lower_merge_first("reference")
        with pytest.raises(AssertionError):
            test_ties_equal_brute_force(4, torch.float32, "reference")
        return
    if fault == "one less":
        match = match_tokens(x, grid, ratio=23 / 48)
    elif fault == "the least alike":
        match = match_tokens(-x, grid, ratio=0.5)
        x = torch.cat([x[:, :1].expand(-1, 24, -1), x[:, 24:]], dim=1)
    else:
        # one merged token goes to the last destination
        merged, _ = decisions(match, to)
        row = match.row.clone()
        row[0, merged[0].nonzero()[0]] = int(row[0, to[0].max()])
        match = listed(row)
    with pytest.raises(AssertionError):
        check_match(x, match, to, num_merged=24)
