"""Whole steps of diffusers' schedulers of token blocks, expressed by sample_tokens and commit_tokens.

What is deterministic is equal, token for token; what is drawn has the same distribution, of tokens and committed sets.
"""

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import mgt_kernels
from mgt_kernels import TokenEdit

refinement = pytest.importorskip("diffusers.schedulers.scheduling_block_refinement")
entropy_bound = pytest.importorskip("diffusers.schedulers.scheduling_entropy_bound")
stats = pytest.importorskip("scipy.stats")

V = 90
# their logits have a column for the mask, which they may draw (below); ours is never drawn
MASK = V - 1


class Step(NamedTuple):
    """What a step of BlockRefinementScheduler is asked for."""

    threshold: float = 0.95
    editing_threshold: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def theirs(scheduler, logits, sample, timestep, step, mask_token_id=MASK, **options):
    return scheduler.step(logits, timestep, sample, mask_token_id=mask_token_id, **step._asdict(), **options)


def ours(logits, sample, count, step, seed=0, mask_token_id=MASK, prompt=None, backend="auto"):
    """The step by our ops: tokens, drawn ids, and their log-probabilities."""
    # all positions are drawn, known ones too, which a draw may edit
    masks = torch.full_like(sample, mask_token_id)
    drawn = mgt_kernels.sample_tokens(
        logits, masks, mask_token_id=mask_token_id, seed=seed, step=0, temperature=step.temperature, backend=backend,
        # they do not truncate where they do not draw
        top_k=step.top_k if step.temperature else None, top_p=(step.top_p or 1.0) if step.temperature else 1.0,
    )  # fmt: skip
    edit = None
    if step.editing_threshold is not None:
        sure = drawn.logprob if prompt is None else drawn.logprob.masked_fill(prompt, torch.nan)
        edit = TokenEdit(drawn.token_ids, sure, math.log(step.editing_threshold))
    after, _ = mgt_kernels.commit_tokens(
        drawn.token_ids, drawn.logprob, sample, threshold=math.log(step.threshold), count=count, edit=edit,
        mask_token_id=mask_token_id, seed=seed, step=0, backend=backend,
    )  # fmt: skip
    return after, drawn.token_ids, drawn.logprob


def random_step(generator, batch=3, positions=32, masked_share=0.6):
    """Logits of which some positions are sure, without the mask, and a block of which some are known."""
    # no two of them so sure that both probabilities are 1, as which of those is first is up to the sort
    logits = torch.randn(batch, positions, V, generator=generator) * 7
    logits *= torch.rand(batch, positions, 1, generator=generator)
    logits[..., MASK] = -torch.inf
    known = torch.rand(batch, positions, generator=generator) >= masked_share
    return logits, torch.randint(MASK, known.shape, generator=generator).where(known, MASK)


def block_scheduler(positions=32, steps=7, **options):
    scheduler = refinement.BlockRefinementScheduler(block_length=positions, num_inference_steps=steps, **options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    "step", [Step(0.8), Step(0.5), Step(0.6, 0.9), Step(0.6, 0.9, 0.0, 5, 0.8), Step(2.0), Step(1e-9, 1e-9)]
)
def test_greedy_refinement_is_equal(step, backend):
    scheduler = block_scheduler()
    generator = torch.Generator().manual_seed(0)
    sizes, edits = set(), False
    for timestep in range(12):
        logits, sample = random_step(generator)
        # past the schedule they stay at its last entry
        count = int(scheduler._transfer_schedule[min(timestep, 6)])
        expected = theirs(scheduler, logits, sample, timestep, step)
        after, ids, logprob = ours(logits, sample, count, step, backend=backend)
        assert torch.equal(after, expected.prev_sample)
        assert torch.equal(ids, expected.sampled_tokens)
        torch.testing.assert_close(logprob.exp(), expected.sampled_probs)
        # the masks of what was done follow from the tokens, but for edits to the same token, which they leave out too
        masked = sample == MASK
        assert torch.equal(masked & (after != MASK), expected.transfer_index)
        assert torch.equal(~masked & (after != sample), expected.editing_transfer_index)
        sizes |= set(expected.transfer_index.sum(-1).tolist())
        edits |= bool(expected.editing_transfer_index.any())
    # by the schedule alone, or by the threshold too
    assert sizes == {4, 5} if step.threshold > 1 else max(sizes) > 5
    assert edits == (step.editing_threshold is not None)


def test_a_prompt_is_not_edited(backend):
    scheduler, step = block_scheduler(), Step(0.6, 0.3)
    logits, sample = random_step(torch.Generator().manual_seed(1))
    prompt = torch.arange(32) < 11
    expected = theirs(scheduler, logits, sample, 0, step, prompt_mask=prompt).prev_sample
    count = int(scheduler._transfer_schedule[0])
    assert torch.equal(ours(logits, sample, count, step, prompt=prompt, backend=backend)[0], expected)
    assert not torch.equal(ours(logits, sample, count, step, backend=backend)[0], expected)


@pytest.mark.parametrize("step", [Step(0.9), Step(0.6, 0.8)])
def test_uniform_corruption_is_equal(step):
    """Without a mask token they remember what is committed, and the rest gets random tokens; for us it is masked."""
    generator = torch.Generator().manual_seed(2)
    scheduler = block_scheduler(positions=16, steps=5)
    sample = torch.randint(V, (3, 16), generator=generator)
    committed = torch.zeros(3, 16, dtype=torch.bool)
    for timestep in range(5):
        logits, _ = random_step(generator, positions=16)
        target = -(-(timestep + 1) * 16 // 5)
        count = (target - committed.sum(-1)).clamp(min=0)
        expected = theirs(scheduler, logits, sample, timestep, step, mask_token_id=None, generator=generator)
        after, _, _ = ours(logits, sample.where(committed, V), count, step, mask_token_id=V)
        committed = after != V
        assert torch.equal(committed, scheduler._committed)
        assert torch.equal(after[committed], expected.prev_sample[committed])
        sample = expected.prev_sample
    assert committed.all()


def outcome_probabilities(probs, sample, count, step):
    """The chance of each outcome of a step, by enumeration of what may be drawn: {tokens: probability}."""
    found = {}
    for ids in itertools.product(*(range(len(row)) for row in probs)):
        p = [float(row[i]) for row, i in zip(probs, ids, strict=True)]
        if not all(p):
            continue
        masked = [i for i, token in enumerate(sample) if token == MASK]
        sure = [i for i in masked if p[i] > step.threshold]
        best = sorted(masked, key=lambda i: -p[i])[: min(count, len(masked))]
        changed = sure if len(sure) >= count else best
        if step.editing_threshold is not None:
            changed = changed + [i for i in range(len(sample)) if i not in masked and p[i] > step.editing_threshold]
        after = tuple(ids[i] if i in changed else token for i, token in enumerate(sample))
        found[after] = found.get(after, 0.0) + math.prod(p)
    return found


def pvalue(outcomes, expected):
    """Of a chi-square test of observed outcomes against their probabilities; 0 where one is impossible."""
    observed = dict.fromkeys(expected, 0)
    for outcome in map(tuple, outcomes.tolist()):
        if outcome not in observed:
            return 0.0
        observed[outcome] += 1
    total = sum(expected.values())
    pairs = [(observed[key], len(outcomes) * p / total) for key, p in expected.items()]
    common = [pair for pair in pairs if pair[1] >= 5]
    rare = [sum(column) for column in zip(*(pair for pair in pairs if pair[1] < 5), strict=True)] or [0, 0.0]
    counts, means = zip(*common, *([rare] if rare[1] > 0 else []), strict=True)
    assert len(counts) > 3
    return stats.chisquare(counts, [mean * len(outcomes) / sum(means) for mean in means]).pvalue


def truncated_probs(logits, step):
    """What is drawn from, in float64, by definition: temperature, then the k largest, then the fewest that reach p."""
    rows = []
    for row in (logits.double() / step.temperature).softmax(-1).tolist():
        order = sorted(range(len(row)), key=lambda j: -row[j])[: step.top_k or len(row)]
        mass, before, kept = sum(row[j] for j in order), 0.0, []
        for j in order:
            if before / mass > (step.top_p or 1.0):
                break
            kept.append(j)
            before += row[j]
        rows.append([row[j] / before if j in kept else 0.0 for j in range(len(row))])
    return rows


@pytest.mark.parametrize(
    "step",
    [
        Step(0.6, None, 1.0),
        Step(0.45, None, 0.7),
        Step(0.6, 0.5, 1.3),
        Step(0.5, None, 1.0, 3),
        Step(0.5, None, 1.0, None, 0.8),
        Step(0.55, 0.4, 0.8, 4, 0.9),
        # nothing is ever sure enough: the count alone
        Step(2.0, None, 1.3, None, 0.98),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_drawn_refinement_has_the_same_distribution(step, count):
    num_samples, num_tokens = 8000, 6
    generator = torch.Generator().manual_seed(5)
    logits = torch.full((3, V), -torch.inf)
    logits[:, :num_tokens] = 1.5 * torch.randn(3, num_tokens, generator=generator)
    sample = torch.tensor([MASK, 2 if step.editing_threshold else MASK, MASK])
    expected = outcome_probabilities(truncated_probs(logits[:, :num_tokens], step), sample.tolist(), count, step)
    assert sum(expected.values()) == pytest.approx(1)
    # without the column of the mask
    many, samples = logits[:, :num_tokens].expand(num_samples, 3, num_tokens), sample.expand(num_samples, 3)
    scheduler = block_scheduler(positions=3, steps=3 // count)
    after, _, _ = ours(many.contiguous(), samples.contiguous(), count, step, seed=torch.arange(num_samples))
    assert pvalue(after, expected) > 1e-3
    before = theirs(scheduler, many, samples, 0, step, generator=torch.Generator().manual_seed(6)).prev_sample
    if count == int(scheduler._transfer_schedule[0]):
        assert pvalue(before, expected) > 1e-3
    # the test can fail
    colder, _, _ = ours(
        many.contiguous(), samples.contiguous(), count, step._replace(temperature=0.85 * step.temperature),
        seed=torch.arange(num_samples),
    )  # fmt: skip
    assert pvalue(colder, expected) < 1e-3


class TestDefectsOfTheirs:
    def test_a_drawn_mask_counts_as_committed(self):
        """Theirs draws the mask token where it is likeliest, and spends the step's count on it; ours never draws it."""
        logits, sample = random_step(torch.Generator().manual_seed(3), batch=1, masked_share=1.0)
        logits[0, 7, MASK] = 99.0
        scheduler = block_scheduler(steps=32)
        wrong = theirs(scheduler, logits, sample, 0, Step(2.0))
        assert wrong.transfer_index[0].nonzero().tolist() == [[7]] and torch.equal(wrong.prev_sample, sample)
        # meant is that a step commits a token
        logits[..., MASK] = -torch.inf
        expected = theirs(scheduler, logits, sample, 0, Step(2.0)).prev_sample
        logits[0, 7, MASK] = 99.0
        after, _, _ = ours(logits, sample, 1, Step(2.0))
        assert torch.equal(after, expected) and int((after != MASK).sum()) == 1

    def test_the_least_number_to_commit_has_no_effect(self):
        """Theirs takes minimal_topk and does not use it; meant is the least of a step, which is our count."""
        logits, sample = random_step(torch.Generator().manual_seed(4))
        scheduler = block_scheduler(steps=32)
        one, five = (theirs(scheduler, logits, sample, 0, Step(2.0), minimal_topk=n).prev_sample for n in (1, 5))
        assert torch.equal(one, five) and torch.equal(ours(logits, sample, 1, Step(2.0))[0], one)
        # a schedule of five in each step has what is meant
        fives = theirs(block_scheduler(positions=30, steps=6), logits, sample, 0, Step(2.0)).prev_sample
        assert torch.equal(ours(logits, sample, 5, Step(2.0))[0], fives) and not torch.equal(fives, five)

    def test_without_a_schedule_nothing_is_committed(self):
        """Theirs commits nothing before set_timesteps, however sure; meant is the schedule of its configuration."""
        logits, sample = random_step(torch.Generator().manual_seed(5))
        fresh = refinement.BlockRefinementScheduler(block_length=32, num_inference_steps=7)
        assert torch.equal(theirs(fresh, logits, sample, 0, Step(0.5)).prev_sample, sample)
        expected = theirs(block_scheduler(), logits, sample, 0, Step(0.5)).prev_sample
        assert torch.equal(ours(logits, sample, 5, Step(0.5))[0], expected) and not torch.equal(expected, sample)

    def test_a_threshold_is_passed_by_more(self):
        """Theirs commits above the threshold, ours from it on: the next float is theirs."""
        logits = torch.full((1, 4, V), -torch.inf)
        logits[..., :2] = 0.0
        sample = torch.full((1, 4), MASK)
        expected = theirs(block_scheduler(positions=4, steps=4), logits, sample, 0, Step(0.5)).prev_sample
        assert int((expected != MASK).sum()) == 1
        draw = mgt_kernels.sample_tokens(logits, sample, mask_token_id=MASK, seed=0, step=0, temperature=0.0)
        bound = torch.tensor(math.log(0.5))
        for threshold, committed in ((bound, 4), (bound.nextafter(torch.tensor(0.0)), 1)):
            after, _ = mgt_kernels.commit_tokens(
                draw.token_ids, draw.logprob, sample, threshold=threshold, mask_token_id=MASK, seed=0, step=0
            )
            assert int((after != MASK).sum()) == committed


def our_entropy_step(logits, temperature, bound, seed=0, softcap=None, backend="auto"):
    """A step of EntropyBoundScheduler by our ops: tokens, of which -1 is not accepted, and what was drawn."""
    masks = torch.full(logits.shape[:2], -1)
    drawn = mgt_kernels.sample_tokens(
        logits, masks, mask_token_id=-1, seed=seed, step=0, temperature=temperature, softcap=softcap,
        statistics=("entropy",), backend=backend,
    )  # fmt: skip
    after, _ = mgt_kernels.commit_tokens(
        drawn.token_ids, drawn.entropy, masks, entropy_bound=bound, mask_token_id=-1, seed=seed, step=0, backend=backend
    )
    return after, drawn


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_entropy_bound_accepts_the_same(softcap, backend):
    scheduler = entropy_bound.EntropyBoundScheduler(t_max=0.9, t_min=0.3, num_inference_steps=6)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for bound, timestep in itertools.product((0.0, 0.1, 0.5, 2.0, 20.0), range(6)):
        logits = torch.randn(3, 64, V, generator=generator) * 5
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        canvas = torch.randint(V, (3, 64), generator=generator)
        expected = scheduler.step(capped, timestep, canvas, entropy_bound=bound, generator=generator)
        # hotter first
        temperature = 0.3 + 0.6 * (6 - timestep) / 6
        after, drawn = our_entropy_step(logits, temperature, bound, softcap=softcap, backend=backend)
        assert torch.equal(after != -1, expected.accepted_index)
        assert torch.equal(after[after != -1], drawn.token_ids[after != -1])
        entropy = torch.distributions.Categorical(logits=expected.pred_logits).entropy()
        torch.testing.assert_close(drawn.entropy, entropy, atol=1e-5, rtol=1e-5)
        sizes |= set(expected.accepted_index.sum(-1).tolist())
    assert len(sizes) > 10


def test_entropy_bound_draws_from_the_same_distribution():
    num_samples, num_tokens, bound, temperature = 8000, 5, 1.2, 0.8
    logits = torch.tensor([0.5, 2.0, 1.1])[:, None] * torch.randn(
        3, num_tokens, generator=torch.Generator().manual_seed(1)
    )
    probs = (logits.double() / temperature).softmax(-1)
    order = (-(probs * probs.log()).sum(-1)).argsort()
    many = logits.expand(num_samples, 3, num_tokens).contiguous()
    after, _ = our_entropy_step(many, temperature, bound, seed=torch.arange(num_samples))
    accepted = (after[0] != -1).nonzero().flatten().tolist()
    # the same for all samples, as no draw decides it
    assert accepted == sorted(order[: len(accepted)].tolist()) and 1 < len(accepted) < 3
    assert torch.equal(after != -1, (after[:1] != -1).expand_as(after))
    scheduler = entropy_bound.EntropyBoundScheduler(bound, temperature, temperature)
    canvas = torch.zeros(num_samples, 3, dtype=torch.int64)
    before = scheduler.step(many, 0, canvas, generator=torch.Generator().manual_seed(2))
    assert torch.equal(before.accepted_index, after != -1)
    choices = [range(num_tokens) if i in accepted else [-1] for i in range(3)]
    expected = {
        ids: math.prod(float(probs[i, token]) for i, token in enumerate(ids) if token >= 0)
        for ids in itertools.product(*choices)
    }
    assert pvalue(after, expected) > 1e-3
    assert pvalue(before.prev_sample.where(before.accepted_index, -1), expected) > 1e-3
    colder, _ = our_entropy_step(many, 0.85 * temperature, bound, seed=torch.arange(num_samples))
    assert pvalue(colder, expected) < 1e-3


def test_the_pages_lines_are_these_steps():
    page = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text(encoding="utf-8").split("## ")[3]
    first, second = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    generator = torch.Generator().manual_seed(4)
    logits, block = random_step(generator)
    capped = torch.randn(3, 64, V, generator=generator) * 15
    names = {"logits": capped, "seed": 7, "step": 0, "temperature": 0.6}
    exec(first, names)
    after, drawn = our_entropy_step(capped, 0.6, 0.1, seed=7, softcap=30.0)
    accepted = after != -1
    assert torch.equal(names["canvas"][accepted], after[accepted]) and 0 < int(accepted.sum()) < accepted.numel()
    assert int((names["canvas"] == drawn.token_ids).sum()) < accepted.numel()
    assert torch.equal(names["drawn"].entropy, drawn.entropy)
    names |= {"logits": logits, "block": block, "mask_token_id": MASK, "count": 3}
    exec(second, names)
    expected, _, _ = ours(logits, block, 3, Step(0.95, 0.9, 0.6, 50, 0.95), seed=7)
    assert torch.equal(names["block"], expected) and not torch.equal(expected, block)
    assert torch.equal(names["done"], (expected != MASK).all(-1))
