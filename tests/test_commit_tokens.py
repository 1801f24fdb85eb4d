"""commit_tokens: every rule against brute force, ties, windows, edits, and diffusers' schedulers.

`python tests/test_commit_tokens.py --cases 100000` runs as many random cases of each rule.
"""

import argparse
import math
import time

import numpy as np
import pytest
import torch

import mgt_kernels
from mgt_kernels import TokenEdit, cpu, reference

MASK = 99
RULES = cpu.COMMIT_RULES


def float32(value):
    return float(np.float32(value))


def brute_force(rule, value, count, start, end, token_ids, score, tokens, edit=None):
    """One sample, in lists and Python's floats, straight from the definition."""
    competing = [i for i in range(start, end) if tokens[i] == MASK]
    confidence = [-s if rule == "entropy_bound" else s for s in score]
    order = sorted(competing, key=lambda i: (-confidence[i], -i))
    size = 0
    for n in range(1, len(order) + 1):
        first = [confidence[i] for i in order[:n]]
        if rule == "threshold":
            stays = first[-1] >= value
        elif rule == "factor":
            stays = first[-1] >= 1 - value / (n + 1)
        elif rule == "entropy_bound":
            stays = math.fsum(-c for c in first[:-1]) <= value
        else:
            stays = False
        if not stays:
            break
        size = n
    size = min(max(size, count), len(order))
    after = list(tokens)
    for i in order[:size]:
        after[i] = token_ids[i]
    if edit is not None:
        argmax, best, above, own, below = edit
        for i in range(start, end):
            if tokens[i] != MASK and argmax[i] != tokens[i] and best[i] > above:
                after[i] = argmax[i]
            elif tokens[i] != MASK and own[i] < below:
                after[i] = MASK
    return after, all(after[i] != MASK for i in range(start, end))


def make_batch(rule, generator, batch=100):
    """Random rows: a third have few levels of scores and a bound on a level, so that ties and equality are common."""
    num_positions = int(torch.randint(1, 49, (), generator=generator))
    token_ids = torch.randint(0, 90, (batch, num_positions), generator=generator)
    tokens = torch.randint(0, 90, (batch, num_positions), generator=generator)
    share = torch.rand(batch, 1, generator=generator) * 1.4
    tokens[torch.rand(batch, num_positions, generator=generator) < share] = MASK
    peaked = (
        torch.rand(batch, num_positions, generator=generator)
        ** torch.tensor([0.05, 0.3, 1.0, 4.0])[torch.randint(4, (batch, 1), generator=generator)]
    )
    score = {"entropy_bound": (1 - peaked) * 3, "factor": peaked}.get(rule, peaked.log())
    value = float32(
        {"threshold": score.quantile(torch.rand((), generator=generator)).item(), "factor": 0.25 + 1.5 * float(
            torch.rand((), generator=generator)), "entropy_bound": 3 * float(torch.rand((), generator=generator)) ** 2,
         }.get(rule, 0.0)
    )  # fmt: skip
    if torch.rand((), generator=generator) < 1 / 3:
        score, value = (score * 8).round() / 8, round(value * 8) / 8
    bounds = torch.randint(0, num_positions + 1, (2, batch), generator=generator).sort(0).values
    whole = torch.rand(batch, generator=generator) < 0.4
    start, end = bounds[0].masked_fill(whole, 0), bounds[1].masked_fill(whole, num_positions)
    position = torch.arange(num_positions)
    num_competing = ((tokens == MASK) & (position >= start[:, None]) & (position < end[:, None])).sum(-1)
    count = (num_competing * torch.rand(batch, generator=generator) * 1.05).long().clamp(max=num_competing)
    if rule != "count":
        count = count.div(8, rounding_mode="floor") + torch.randint(0, 3, (batch,), generator=generator)
    return value, count, start, end, token_ids, score, tokens


def check_cases(rule, num_cases, backend, seed=0, edits=True):
    generator = torch.Generator().manual_seed(seed)
    for batch in range(-(-num_cases // 100)):
        value, count, start, end, token_ids, score, tokens = make_batch(rule, generator)
        edit = argmax = best = own = None
        above, below = -1.0, -2.5
        if edits and batch % 2:
            argmax = torch.where(torch.rand(tokens.shape, generator=generator) < 0.5, tokens, token_ids)
            best, own = -4 * torch.rand(2, *tokens.shape, generator=generator)
            edit = TokenEdit(argmax, best, above, own, below)
        after, done = mgt_kernels.commit_tokens(
            token_ids, score, tokens, mask_token_id=MASK, seed=0, step=0, count=count, within=(start, end), edit=edit,
            backend=backend, **({} if rule == "count" else {rule: value}),
        )  # fmt: skip
        rows = zip(count.tolist(), start.tolist(), end.tolist(), token_ids.tolist(), score.tolist(), tokens.tolist(),
                   strict=True)  # fmt: skip
        for i, row in enumerate(rows):
            lists = edit and (argmax[i].tolist(), best[i].tolist(), above, own[i].tolist(), below)
            expected = brute_force(rule, value, *row, lists)
            assert (after[i].tolist(), bool(done[i])) == expected, (rule, value, batch, i)


@pytest.mark.parametrize("rule", RULES)
def test_equals_brute_force(rule, backend):
    check_cases(rule, 2000, backend)


def commit(token_ids, score, tokens, **options):
    return mgt_kernels.commit_tokens(
        token_ids, score, tokens, **{**dict(mask_token_id=MASK, seed=0, step=0), **options}
    )


def committed(after, tokens):
    return ((tokens == MASK) & (after != MASK))[0].nonzero().flatten().tolist()


def row(*scores):
    score = torch.tensor([scores])
    return torch.arange(len(scores))[None], score, torch.full(score.shape, MASK)


def test_ties_commit_higher_positions_first(backend):
    inputs = row(-1.0, -2.0, 5.0, -1.0, -1.0, -0.0, 0.0, torch.inf, -torch.inf)
    inputs[2][0, 2] = 7
    order = [7, 6, 5, 4, 3, 0, 1, 8]
    for count in range(9):
        after, done = commit(*inputs, count=count, backend=backend)
        assert committed(after, inputs[2]) == sorted(order[:count])
        assert after[0, 2] == 7 and bool(done) == (count == 8)


def test_rules_at_their_bounds(backend):
    inputs = row(0.5, 0.75, 0.5, 0.875, 0.5)
    for options, expected in (
        (dict(threshold=0.75), [1, 3]),
        (dict(threshold=0.76), [3]),
        (dict(threshold=0.9), [3]),
        (dict(threshold=0.9, count=0), []),
        (dict(threshold=0.9, count=3), [1, 3, 4]),
        (dict(threshold=0.5, count=99), [0, 1, 2, 3, 4]),
        # 0.875 >= 1 - f / 2, 0.75 >= 1 - f / 3, 0.5 >= 1 - f / 4, / 5 and / 6
        (dict(factor=0.24, count=0), []),
        (dict(factor=0.25, count=0), [3]),
        (dict(factor=0.75), [1, 3]),
        (dict(factor=2.0), [1, 3, 4]),
        (dict(factor=2.5), [1, 2, 3, 4]),
        (dict(factor=3.0), [0, 1, 2, 3, 4]),
        # 0.5 + 0.5 + 0.5 + 0.75, the last of them free
        (dict(entropy_bound=0.0, count=0), [4]),
        (dict(entropy_bound=0.49), [4]),
        (dict(entropy_bound=0.5), [2, 4]),
        (dict(entropy_bound=1.5), [0, 1, 2, 4]),
        (dict(entropy_bound=2.25), [0, 1, 2, 3, 4]),
        (dict(entropy_bound=1e30), [0, 1, 2, 3, 4]),
    ):
        after, _ = commit(*inputs, backend=backend, **options)
        assert committed(after, inputs[2]) == expected, options


@pytest.mark.parametrize("rule", RULES)
def test_nothing_competes_and_nothing_is_there(rule, backend):
    options = dict(backend=backend, count=0, **({} if rule == "count" else {rule: 0.5}))
    token_ids, score, _ = row(*[0.5] * 6)
    score[0, 2] = torch.nan
    known = torch.arange(6)[None] + 40
    after, done = commit(token_ids, score, known, **options)
    assert torch.equal(after, known) and done.all()
    # nor within the window, outside which masks stay
    known[0, 2] = MASK
    for within in ((3, 6), (0, 2), (2, 2)):
        after, done = commit(token_ids, score, known, within=within, **options)
        assert torch.equal(after, known) and done.all()
    for shape in ((0, 4), (3, 0)):
        empty = torch.empty(shape, dtype=torch.int64)
        after, done = commit(empty, torch.empty(shape), empty, **options)
        assert after.shape == shape and done.shape == shape[:1] and done.all()


def test_counts_past_what_competes_are_the_least_of_other_rules(backend):
    inputs = row(0.1, 0.2)
    after, done = commit(*inputs, threshold=1.0, count=5, backend=backend)
    assert torch.equal(after, inputs[0]) and done.all()


def random_case(batch=9, positions=301, rule="threshold", seed=3):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 90, (batch, positions), generator=generator)
    tokens = torch.full((batch, positions), MASK)
    tokens[:, ::4] = 5
    probability = torch.rand(batch, positions, generator=generator) ** 0.1
    return token_ids, {"factor": probability, "entropy_bound": 1 - probability}.get(rule, probability.log()), tokens


VALUES = {
    "count": {},
    "threshold": {"threshold": -0.05},
    "factor": {"factor": 1.2},
    "entropy_bound": {"entropy_bound": 2.0},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 0.01, 3e38])
def test_paths_threads_and_batches_agree_bit_for_bit(rule, temperature):
    token_ids, score, tokens = random_case(rule=rule)
    start, end = torch.arange(9) * 3, 301 - torch.arange(9) * 20
    seed = torch.arange(9) - 4
    options = dict(temperature=temperature, step=5, count=20, **VALUES[rule])
    outputs = [
        commit(token_ids, score, tokens, within=(start, end), seed=seed, backend=isa, **options)
        for isa in mgt_kernels.info()["isas"]
    ]
    for after, done in outputs:
        assert torch.equal(after, outputs[0][0]) and torch.equal(done, outputs[0][1])
    torch.set_num_threads(1)
    for i in range(9):
        one = slice(i, i + 1)
        alone = commit(token_ids[one], score[one], tokens[one], within=(int(start[i]), int(end[i])), seed=int(seed[i]),
                       **options)  # fmt: skip
        assert torch.equal(alone[0], outputs[0][0][one]) and torch.equal(alone[1], outputs[0][1][one])


@pytest.mark.parametrize("rule", RULES)
def test_noise_takes_the_place_of_the_score(rule, backend):
    token_ids, score, tokens = random_case(rule=rule)
    temperature = 0.02
    noisy = temperature * reference.confidence_gumbel(torch.arange(9), 301, 7)
    noisy = -(noisy - score.double()) if rule == "entropy_bound" else noisy + score.double()
    options = dict(count=30, backend=backend, step=7, seed=torch.arange(9), **VALUES[rule])
    ours = commit(token_ids, score, tokens, temperature=temperature, **options)
    assert torch.equal(ours[0], commit(token_ids, noisy.float(), tokens, **options)[0])
    assert not torch.equal(ours[0], commit(token_ids, score, tokens, **options)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.3, 3e38])
def test_a_count_is_the_complement_of_mask_by_confidence(temperature, backend):
    generator = torch.Generator().manual_seed(1)
    for levels, positions in ((None, 17), (1, 300), (4, 1000)):
        token_ids = torch.randint(0, 90, (5, positions), generator=generator)
        score = -torch.rand(5, positions, generator=generator) * 8
        score = (score * levels).round() / levels if levels else score
        tokens = torch.where(torch.rand(5, positions, generator=generator) < 0.3, token_ids, MASK)
        num_masked = (tokens == MASK).sum(-1)
        count = (num_masked * torch.rand(5, generator=generator)).long()
        options = dict(mask_token_id=MASK, temperature=temperature, seed=torch.arange(5), step=4, backend=backend)
        after, _ = mgt_kernels.commit_tokens(token_ids, score, tokens, count=count, **options)
        logprob = torch.where(tokens == MASK, score, torch.inf)
        assert torch.equal(after, mgt_kernels.mask_by_confidence(token_ids, logprob, num_masked - count, **options))
        assert torch.equal((after == MASK).sum(-1), num_masked - count)


def test_edits(backend):
    tokens = torch.tensor([[10, 11, 12, 13, 14, MASK]])
    argmax = torch.tensor([[20, 11, 20, 20, MASK, 20]])
    best = torch.tensor([[-0.1, -0.1, -0.5, torch.nan, -0.1, -0.1]])
    own = torch.tensor([[-9.0, -3.0, -2.0, -9.0, -1.0, -9.0]])
    token_ids, score = torch.full((1, 6), 50), torch.zeros(1, 6)
    for edit, expected in (
        (None, [10, 11, 12, 13, 14, 50]),
        (TokenEdit(), [10, 11, 12, 13, 14, 50]),
        (TokenEdit(argmax, best, -0.5), [20, 11, 12, 13, MASK, 50]),
        (TokenEdit(argmax, best, -math.inf), [20, 11, 20, 13, MASK, 50]),
        (TokenEdit(known_logprob=own, mask_below=-2.0), [MASK, MASK, 12, MASK, 14, 50]),
        (TokenEdit(argmax, best, -0.5, own, -2.0), [20, MASK, 12, MASK, MASK, 50]),
    ):
        after, done = commit(token_ids, score, tokens, edit=edit, backend=backend)
        assert after[0].tolist() == expected and bool(done) == (MASK not in expected)
    after, done = commit(token_ids, score, tokens, edit=TokenEdit(argmax, best, -0.5), within=(1, 3), count=0,
                         backend=backend)  # fmt: skip
    assert torch.equal(after, tokens) and done.all()


def test_scalars_may_be_tensors(backend):
    for rule, value in VALUES.items():
        token_ids, score, tokens = random_case(rule=rule)
        edit = dict(argmax=token_ids, max_logprob=score, known_logprob=-score)
        for number in (torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64)):
            expected = commit(token_ids, score, tokens, **value, temperature=0.25, backend=backend,
                              edit=TokenEdit(**edit, replace_above=0.5, mask_below=0.25))  # fmt: skip
            ours = commit(token_ids, score, tokens, **{name: number(x) for name, x in value.items()},
                          temperature=number(0.25), backend=backend, count=torch.tensor(1, dtype=torch.int32),
                          edit=TokenEdit(**edit, replace_above=number(0.5), mask_below=number(0.25)))  # fmt: skip
            assert all(map(torch.equal, ours, expected))


def test_inputs_are_kept_and_strides_do_not_matter(backend):
    token_ids, score, tokens = random_case()
    copies = token_ids.clone(), score.clone(), tokens.clone()
    options = dict(threshold=-0.05, backend=backend)
    expected = commit(token_ids, score, tokens, **options)
    strided = [x.T.contiguous().T for x in copies]
    assert all(map(torch.equal, commit(*strided, **options), expected))
    assert torch.equal(token_ids, copies[0]) and torch.equal(score, copies[1]) and torch.equal(tokens, copies[2])


CASE = random_case(batch=4, positions=8)
WINDOW = torch.tensor([0, 1, 2, 3])
FLAT = torch.zeros(4, 8)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(token_ids=CASE[0].int()), TypeError, "token_ids: expected dtype torch.int64"),
        (dict(token_ids=CASE[0][0]), ValueError, "token_ids: expected 2 dimensions"),
        (dict(score=CASE[1].double()), TypeError, "score: expected dtype torch.float32"),
        (dict(score=CASE[1][:, 1:]), ValueError, r"score: expected shape \(4, 8\), got \(4, 7\)"),
        (dict(tokens=CASE[2][1:]), ValueError, r"tokens: expected shape \(4, 8\), got \(3, 8\)"),
        (dict(tokens=CASE[2].to("meta")), ValueError, "tokens: expected device cpu"),
        (dict(count=-1), ValueError, r"count: sample 0 is -1; expected a value within \[0, 6\], the positions that"),
        (dict(count=7), ValueError, r"count: sample 0 is 7; expected a value within \[0, 6\]"),
        (dict(count=torch.tensor([1, 2, 3, 9])), ValueError, "count: sample 3 is 9"),
        (dict(count=5, within=(0, 4)), ValueError, r"count: sample 0 is 5; expected a value within \[0, 3\]"),
        (dict(count=torch.tensor([1, 2])), ValueError, r"count: expected shape \(4,\)"),
        (dict(count=2.0), TypeError, "count: expected an integer, got float"),
        (dict(count=-1, threshold=0.5), ValueError, "count: sample 0 is -1; expected at least 0"),
        (dict(threshold=0.5, factor=1.0), ValueError, "expected at most one of them, got threshold and factor"),
        (dict(threshold=torch.nan), ValueError, "threshold: expected a finite number, got nan"),
        (dict(threshold="0.9"), TypeError, "threshold: expected a number"),
        (dict(threshold=torch.tensor(torch.inf)), ValueError, "threshold: expected a finite number, got inf"),
        (dict(factor=-1.0), ValueError, "factor: expected a finite number >= 0, got -1"),
        (dict(factor=torch.tensor(-1.0)), ValueError, "factor: expected a finite number >= 0, got -1"),
        (dict(entropy_bound=torch.inf), ValueError, "entropy_bound: expected a finite number >= 0, got inf"),
        (dict(temperature=-1.0), ValueError, "temperature: expected a finite number >= 0"),
        (dict(seed=torch.zeros(5, dtype=torch.int64)), ValueError, "seed: expected shape"),
        (dict(step=-3), ValueError, "step: expected"),
        (dict(within=3), TypeError, r"within: expected a tuple \(start, end\) or None, got 3"),
        (dict(within=(3, 9)), ValueError, r"within: expected 0 <= start <= end <= 8, the positions, got \(3, 9\)"),
        (dict(within=(4, 3)), ValueError, "within: expected 0 <= start <= end <= 8"),
        (dict(within=(-1, 3)), ValueError, "within: expected 0 <= start <= end <= 8"),
        (dict(within=(WINDOW, 2)), ValueError, r"within: sample 3 is \(3, 2\); expected 0 <= start <= end <= 8"),
        (dict(within=(0, WINDOW + 6)), ValueError, r"within: sample 3 is \(0, 9\)"),
        (dict(within=(0.5, 3)), TypeError, "within's start: expected an integer, got float"),
        (dict(edit=1), TypeError, "edit: expected a TokenEdit or None, got int"),
        (
            dict(edit=TokenEdit(replace_above=0.5)),
            ValueError,
            "edit: expected all of argmax, max_logprob, replace_above",
        ),
        (dict(edit=TokenEdit(known_logprob=FLAT)), ValueError, "edit: expected all of known_logprob, mask_below"),
        (dict(edit=TokenEdit(FLAT, FLAT, 0.5)), TypeError, "edit.argmax: expected dtype torch.int64"),
        (
            dict(edit=TokenEdit(known_logprob=FLAT[1:], mask_below=0.5)),
            ValueError,
            "edit.known_logprob: expected shape",
        ),
        (
            dict(edit=TokenEdit(CASE[0], FLAT, torch.nan)),
            ValueError,
            "edit.replace_above: expected a finite number or an",
        ),
        (dict(edit=TokenEdit(CASE[0], FLAT, 1e39)), ValueError, "edit.replace_above: expected a finite number or an"),
        (dict(backend="gpu"), ValueError, "backend: expected one of"),
    ],
)
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_bad_arguments_are_named(change, error, words, path):
    good = dict(zip(("token_ids", "score", "tokens"), CASE, strict=True), mask_token_id=MASK, seed=0, step=0)
    with pytest.raises(error, match=words):
        mgt_kernels.commit_tokens(**(good | dict(backend=path) | change))


def test_nan_among_the_competing_is_named(backend):
    token_ids, score, tokens = (x.clone() for x in CASE)
    score[2, 5] = torch.nan
    with pytest.raises(ValueError, match="score: sample 2, position 5 is NaN"):
        commit(token_ids, score, tokens, threshold=0.5, backend=backend)
    commit(token_ids, score, tokens, threshold=0.5, within=(0, 5), backend=backend)
    with pytest.raises(ValueError, match="entropy_bound: expected at most 2\\^20 positions, got 1048577"):
        wide = torch.zeros(1, dtype=torch.int64).expand(1, 2**20 + 1)
        commit(wide, torch.zeros(1).expand(wide.shape), wide, entropy_bound=0.1, backend=backend)


@pytest.mark.parametrize("rule", RULES)
def test_the_comparison_can_fail(rule, monkeypatch):
    op = mgt_kernels.commit_tokens
    monkeypatch.setattr(mgt_kernels, "commit_tokens", lambda *a, count, **options: op(*a, count=count // 2, **options))
    with pytest.raises(AssertionError):
        check_cases(rule, 100, "auto")


class TestDiffusers:
    def test_llada2_commits_and_edits(self):
        """BlockRefinementScheduler: a threshold with at least the schedule's count, and T2T."""
        schedulers = pytest.importorskip("diffusers.schedulers.scheduling_block_refinement")
        scheduler = schedulers.BlockRefinementScheduler(block_length=32, num_inference_steps=7)
        scheduler.set_timesteps(7)
        generator = torch.Generator().manual_seed(0)
        for case in range(40):
            logits = torch.randn(3, 32, 90, generator=generator) * torch.rand(3, 32, 1, generator=generator) * 9
            sample = torch.where(torch.rand(3, 32, generator=generator) < 0.6, MASK, 3)
            threshold, editing = (0.95, None) if case % 2 else (0.6, 0.9)
            step = case % 7
            theirs = scheduler.step(logits, step, sample, mask_token_id=MASK, threshold=threshold,
                                    editing_threshold=editing)  # fmt: skip
            ids, probability = theirs.sampled_tokens, theirs.sampled_probs
            edit = editing and TokenEdit(ids, probability, editing)
            count = int(scheduler._transfer_schedule[step])
            after, done = commit(ids, probability, sample, threshold=threshold, count=count, edit=edit)
            assert torch.equal(after, theirs.prev_sample)
            assert torch.equal(done, (theirs.prev_sample != MASK).all(-1))

    def test_entropy_bound_accepts(self):
        schedulers = pytest.importorskip("diffusers.schedulers.scheduling_entropy_bound")
        scheduler = schedulers.EntropyBoundScheduler(t_max=1.0, t_min=1.0)
        generator = torch.Generator().manual_seed(0)
        sizes = set()
        for bound in (0.0, 0.1, 0.5, 2.0, 20.0):
            for _ in range(10):
                logits = torch.randn(3, 64, 90, generator=generator) * 5
                sample = torch.full((3, 64), MASK)
                theirs = scheduler.step(logits, 0, sample, entropy_bound=bound, generator=generator)
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                after, _ = commit(theirs.sampled_tokens, entropy, sample, entropy_bound=bound)
                assert torch.equal(after != MASK, theirs.accepted_index)
                sizes |= set((after != MASK).sum(-1).tolist())
        assert len(sizes) > 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    num_cases = parser.parse_args().cases
    for rule in RULES:
        for backend in ("reference", *mgt_kernels.info()["isas"]):
            begin = time.perf_counter()
            check_cases(rule, num_cases, backend, seed=1)
            print(f"{rule}, {backend}: {num_cases} cases equal brute force, {time.perf_counter() - begin:.0f} s")
