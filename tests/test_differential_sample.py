"""differential_sample: every instruction set, layout and dtype against each other, the oracle and the law."""

import dataclasses

import pytest
import torch
from compare import assert_ids_by_margin, assert_no_worse_than_naive
from scipy import stats

import mgt_kernels
from mgt_kernels import cpu, reference
from mgt_kernels.reference.differential_sample import SAME_DISTRIBUTION, difference, select_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 15, 16, 17, 33, 511, 513, 1000, 2047, 2049, 8192, 8193]
SEEDS = torch.tensor([3, -(2**62) - 9])
VARIANTS = [("paper", False), ("official", False), ("official", True)]


def position_major(logits):
    """The same values with unit stride over positions."""
    return logits.mT.contiguous().mT


def make_steps(num_tokens, batch=2, positions=37, dtype=torch.float32, std=3.0, change=0.3, num_steps=2, seed=0):
    """Logits of successive steps, both halves, that resemble each other; tokens with some known positions.

    They are multiples of 1/256, so that guidance is exact and what is measured is what comes after it.
    """
    generator = torch.Generator().manual_seed(seed + num_tokens)
    start, uncond = (torch.randn(2, batch, positions, num_tokens, generator=generator) * std * 256).round() / 256
    steps = []
    for _ in range(num_steps):
        moved = start + (torch.randn(start.shape, generator=generator) * change * std * 256).round() / 256
        steps.append((moved.to(dtype), uncond.to(dtype)))
    tokens = torch.full((batch, positions), num_tokens)
    tokens[:, ::5] = 0
    return steps, tokens


def run(steps, tokens, layout="token_major", **args):
    """All steps of a generation; per step (token_ids, logprob, state with its tensors as they were then)."""
    outputs, state = [], None
    for step, (logits, uncond) in enumerate(steps):
        if layout == "position_major":
            logits, uncond = position_major(logits), position_major(uncond)
        token_ids, logprob, state = mgt_kernels.differential_sample(
            logits, tokens, state, uncond_logits=uncond, step=step, **args
        )
        frozen = dataclasses.replace(state, history=state.history.clone(), written=state.written.clone())
        outputs.append((token_ids, logprob, frozen))
    return outputs


def codes(history):
    return history.int() & 0xFFFF


def assert_equal_steps(one, other):
    for (ids, logprob, state), (other_ids, other_logprob, other_state) in zip(one, other, strict=True):
        assert torch.equal(ids, other_ids) and torch.equal(logprob, other_logprob)
        assert torch.equal(state.divergence, other_state.divergence)
        assert torch.equal(state.written, other_state.written)
        assert torch.equal(state.history[state.written], other_state.history[other_state.written])


def assert_drawn_from(token_ids, now, rows):
    """Ids of `rows` have the best score log w + g, up to what rounding p and q in fp32 makes of the difference w."""
    p, q = now.log_p.exp(), now.log_q.exp()
    score = now.weights.log() + now.gumbel
    # p and q carry a few units in the last place of their logarithms, more where p is small
    rounding = 2.0**-21 * (p * (1 - now.log_p.clamp(min=-90)) + q * (1 - now.log_q.clamp(min=-90))) / now.weights
    slack = torch.where(now.weights > 0, rounding, 0.0) + 1e-5
    best = (score - slack).amax(-1)
    ids = token_ids.clamp(0, score.shape[-1] - 1)[..., None]
    drawn = (score + slack).gather(-1, ids)[..., 0]
    assert not (drawn < best)[rows].any(), f"{int((drawn < best)[rows].sum())} ids miss the best weight"


def naive_logits(logits, uncond, guidance_scale=1.0, temperature=1.0, mask_token_id=-1, **_):
    """PyTorch's own chain in fp32."""
    cond, uncond = logits.float(), uncond.float()
    guided = uncond + guidance_scale * (cond - uncond)
    forbidden = (cond == -torch.inf) | (uncond == -torch.inf)
    guided = guided.masked_fill(forbidden, -torch.inf) / (temperature or 1.0)
    if 0 <= mask_token_id < guided.shape[-1]:
        guided[..., mask_token_id] = -torch.inf
    return guided


def assert_equals_the_oracle(outputs, steps, tokens, variant="paper", share=0.75, **args):
    """Every step against the oracle, which takes the history that the kernel left."""
    num_tokens = steps[0][0].shape[-1]
    masked = tokens == args["mask_token_id"]
    read = masked if variant == "paper" else torch.ones_like(masked)
    before = None
    for step, ((logits, uncond), (token_ids, logprob, state)) in enumerate(zip(steps, outputs, strict=True)):
        if before is None:
            history, written = torch.full((*tokens.shape, num_tokens), -1, dtype=torch.int16), torch.zeros_like(masked)
        else:
            history, written = before.history, before.written
        draw = {name: value for name, value in args.items() if name not in ("aliased_history", "backend")}
        now = difference(logits, history, written, variant=variant, uncond_logits=uncond, step=step, **draw)
        log_p32 = naive_logits(logits, uncond, **draw).log_softmax(-1)
        if before is not None:
            log_q32 = now.log_q.float()
            p32 = log_p32.exp()
            kl32 = torch.where(p32 > 0, p32 * (log_p32 - log_q32), 0.0).sum(-1)
            p, q = now.log_p.exp(), now.log_q.exp()
            # a difference of p and q keeps only this of their relative precision
            kept = torch.where(now.weights > 0, now.weights / (p + q), 1.0)
            assert_no_worse_than_naive(state.divergence[read], now.divergence[read], kl32[read])
            w32 = (p32 - log_q32.exp()).abs() if variant == "paper" else (p32 - log_q32.exp()).clamp(min=1e-6)
            naive_w = (w32 / w32.sum(-1, keepdim=True)).log()
        assert (state.divergence[~read] == torch.inf).all() and torch.equal(state.written, read)

        # the selection itself is exact, given the divergences; where p = q to the history's precision it shows nowhere
        selected = select_rows(state.divergence, masked, share=share, variant=variant) & masked & written
        weight_sum = (now.log_p.exp() - now.log_q.exp()).abs().sum(-1)
        close_call = ((weight_sum / SAME_DISTRIBUTION - 1).abs() < 0.01) & (variant == "paper")
        differs = selected & ((weight_sum >= SAME_DISTRIBUTION) | (variant == "official")) & ~close_call
        plain = masked & ~differs & ~close_call
        assert_ids_by_margin(token_ids, now.tempered + now.gumbel, plain)
        assert torch.equal(token_ids[~masked], tokens[~masked]) and (logprob[~masked] == torch.inf).all()
        # bit for bit what sample_tokens draws
        drawn = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, step=step, **draw)
        assert torch.equal(token_ids[plain], drawn[0][plain]) and torch.equal(logprob[plain], drawn[1][plain])
        if differs.any():
            assert_drawn_from(token_ids, now, differs)
            ids = token_ids.clamp(0, num_tokens - 1)[..., None]
            truth = (now.weights.log() - now.weights.sum(-1, keepdim=True).log()).gather(-1, ids)[..., 0]
            kept_of_both = kept.gather(-1, ids)[..., 0].minimum(now.weights.sum(-1) / 2)
            ours, theirs = (
                (truth + kept_of_both * (values - truth))[differs]
                for values in (logprob, naive_w.gather(-1, ids)[..., 0])
            )
            assert_no_worse_than_naive(ours, truth[differs], theirs)

        stored = now.log_p
        if args.get("aliased_history"):
            edited = select_rows(state.divergence, masked, share=share, variant=variant) & written
            stored = torch.where(edited[..., None], now.weights.log(), now.log_p)
        apart = (codes(state.history) - codes(reference.encode_history(stored))).abs()
        allowed = torch.ones_like(now.log_p)
        if args.get("aliased_history") and before is not None:
            # 2048 codes a nat
            allowed = torch.where(edited[..., None], 1 + 2048 * 2.0**-20 / kept, allowed)
        assert (apart <= allowed)[read].all()
        before = state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("layout", ["token_major", "position_major"])
@pytest.mark.parametrize("variant, aliased", VARIANTS)
def test_equals_the_oracle(num_tokens, layout, dtype, variant, aliased):
    steps, tokens = make_steps(num_tokens, positions=9 if num_tokens > 2000 else 37, dtype=dtype, num_steps=3)
    args = dict(seed=SEEDS, mask_token_id=num_tokens, guidance_scale=2.5, variant=variant, aliased_history=aliased)
    outputs = [run(steps, tokens, layout, backend=isa, **args) for isa in cpu.available_isas()]
    for other in outputs[1:]:
        assert_equal_steps(outputs[0], other)
    assert_equals_the_oracle(outputs[0], steps, tokens, **args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant, aliased", VARIANTS)
@pytest.mark.parametrize("noise_scale, temperature", [(0.7, 0.9), (0.0, 0.0), (0.5, 0.0)])
def test_noise_and_temperature_equal_the_oracle(noise_scale, temperature, dtype, variant, aliased):
    steps, tokens = make_steps(1000, dtype=dtype)
    args = dict(seed=SEEDS, mask_token_id=1000, guidance_scale=1.5, variant=variant, aliased_history=aliased)
    args |= dict(noise_scale=noise_scale, temperature=temperature)
    outputs = [run(steps, tokens, backend=isa, **args) for isa in cpu.available_isas()]
    for other in outputs[1:]:
        assert_equal_steps(outputs[0], other)
    if noise_scale:
        # the noise is fp32, some units in the last place of 6.8 where the oracle's is exact: half that to the codes
        drawn = [mgt_kernels.sample_tokens(c, tokens, uncond_logits=u, step=k, seed=SEEDS, mask_token_id=1000,
                                           guidance_scale=1.5, noise_scale=noise_scale, temperature=temperature)
                 for k, (c, u) in enumerate(steps)]  # fmt: skip
        expected = run(steps, tokens, backend="reference", **args)
        for (ids, _, state), (_, _, oracle), (plain, *_) in zip(outputs[0], expected, drawn, strict=True):
            unselected = ~select_rows(state.divergence, tokens == 1000, share=0.75, variant=variant)
            assert torch.equal(ids[unselected], plain[unselected])
            finite = state.divergence.isfinite()
            assert torch.equal(finite, oracle.divergence.isfinite())
            assert torch.allclose(state.divergence[finite], oracle.divergence[finite], rtol=1e-3, atol=1e-4)
        return
    assert_equals_the_oracle(outputs[0], steps, tokens, **args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant, aliased", VARIANTS)
@pytest.mark.parametrize("change", [0.02, 0.3, 3.0])
def test_peaked_logits_equal_the_oracle(dtype, variant, aliased, change):
    # the published code gives NaN on every row here
    steps, tokens = make_steps(8192, positions=12, dtype=dtype, std=30.0, change=change, num_steps=3)
    args = dict(seed=SEEDS, mask_token_id=8192, variant=variant, aliased_history=aliased)
    steps = [(logits, logits) for logits, _ in steps]
    outputs = [run(steps, tokens, backend=isa, **args) for isa in cpu.available_isas()]
    for other in outputs[1:]:
        assert_equal_steps(outputs[0], other)
    assert all(state.divergence[tokens == 8192].isfinite().all() for _, _, state in outputs[0][1:])
    assert_equals_the_oracle(outputs[0], steps, tokens, **args)


def special_rows():
    """Two steps of (1, N, 600) logits with the extremes, one per row."""
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(600, generator=generator)
    one_hot, other_hot = torch.full((600,), -1e4), torch.full((600,), -1e4)
    one_hot[17], other_hot[555] = 0.0, 0.0
    first_half, second_half = random.clone(), random.clone()
    first_half[300:], second_half[:300] = -torch.inf, -torch.inf
    underflown = random.clone()
    underflown[::2] -= 200.0
    near_underflow = random.clone()
    near_underflow[::2] -= 88.0
    only = torch.full((600,), -torch.inf)
    only[599] = -3.0
    pairs = [
        (random, random), (random, random + 0.01 * random.flip(0)), (one_hot, one_hot), (one_hot, other_hot),
        (random, one_hot), (one_hot, random), (first_half, second_half), (first_half, random), (random, first_half),
        (underflown, random), (random, underflown), (underflown, underflown.flip(0)), (near_underflow, random),
        (random, near_underflow), (only, random), (random, only), (only, only), (random * 1e6, random * 1e6 + 64),
        (torch.zeros(600), torch.zeros(600)), (torch.zeros(600), random),
    ]  # fmt: skip
    return [torch.stack([pair[step] for pair in pairs])[None] for step in (0, 1)]


@pytest.mark.parametrize("variant, aliased", VARIANTS)
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_rows_equal_the_oracle(share, variant, aliased, temperature):
    logits = special_rows()
    steps = [(half, half) for half in logits]
    tokens = torch.full(logits[0].shape[:2], 600)
    args = dict(seed=SEEDS[:1], mask_token_id=600, share=share, variant=variant, aliased_history=aliased)
    args |= dict(temperature=temperature)
    outputs = [run(steps, tokens, backend=isa, **args) for isa in cpu.available_isas()]
    for other in outputs[1:]:
        assert_equal_steps(outputs[0], other)
    token_ids, logprob, state = outputs[0][1]
    assert state.divergence.isfinite().all() and logprob.isfinite().all()
    assert (logits[1].gather(-1, token_ids[..., None]) > -torch.inf).all()
    assert_equals_the_oracle(outputs[0], steps, tokens, **args)


def test_the_comparison_can_fail():
    steps, tokens = make_steps(1000, positions=150)
    args = dict(seed=SEEDS, mask_token_id=1000)
    outputs = run(steps, tokens, **args)
    assert_equals_the_oracle(outputs, steps, tokens, **args)
    for change in (dict(seed=SEEDS + 1), dict(share=0.7), dict(guidance_scale=1.01), dict(variant="official")):
        with pytest.raises(AssertionError):
            assert_equals_the_oracle(run(steps, tokens, **(args | change)), steps, tokens, **args)
    moved = dataclasses.replace(outputs[0][2], history=outputs[0][2].history.roll(1, -1))
    with pytest.raises(AssertionError):
        assert_equals_the_oracle([(*outputs[0][:2], moved), outputs[1]], steps, tokens, **args)


def test_share_zero_is_sample_tokens(backend):
    steps, tokens = make_steps(700, dtype=torch.bfloat16)
    for temperature, noise_scale in ((1.0, 0.0), (0.7, 0.4), (0.0, 0.0)):
        args = dict(seed=SEEDS, mask_token_id=700, guidance_scale=3.0, noise_scale=noise_scale)
        args |= dict(temperature=temperature, backend=backend)
        for variant in ("paper", "official"):
            outputs = run(steps, tokens, share=0, variant=variant, **args)
            for step, (logits, uncond) in enumerate(steps):
                ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, step=step, **args)
                assert torch.equal(outputs[step][0], ids)
                if backend == "reference":
                    assert torch.allclose(outputs[step][1], logprob)
                else:
                    assert torch.equal(outputs[step][1], logprob)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.29, 0.5, 0.75, 0.9, 1.0])
def test_exactly_the_share_is_selected(backend, share, variant):
    # every row has the same logits, the same history and so the same divergence: lower positions come first
    positions, num_tokens = 50, 40
    before, now = torch.randn(2, num_tokens, generator=torch.Generator().manual_seed(1))
    # w has one token that p hardly ever gives: a row tells whether it was selected
    before[3], now[3] = 14.0, -60.0
    tokens = torch.full((2, positions), num_tokens)
    tokens[0, ::3] = 1
    args = dict(seed=SEEDS, mask_token_id=num_tokens, backend=backend, temperature=0.0, share=share, variant=variant)
    if variant == "official":
        # its differences are clipped, so it is the token that p gains
        before[3], now[3], now[5] = 14.0, 13.0, 13.5
    _, _, state = mgt_kernels.differential_sample(before.expand(2, positions, -1), tokens, None, step=0, **args)
    token_ids, _, _ = mgt_kernels.differential_sample(now.expand(2, positions, -1), tokens, state, step=1, **args)
    hit = 3 if variant == "paper" else 5
    plain = int(now.argmax())
    if variant == "official":
        now[3] = 14.5
        _, _, state = mgt_kernels.differential_sample(before.expand(2, positions, -1), tokens, None, step=0, **args)
        token_ids, _, _ = mgt_kernels.differential_sample(now.expand(2, positions, -1), tokens, state, step=1, **args)
        plain = 3
    assert hit != plain
    for sample in range(2):
        masked = (tokens[sample] == num_tokens).nonzero()[:, 0]
        if variant == "paper":
            wanted = masked[: int(share * len(masked) + 0.5)]
        else:
            wanted = masked[masked < int(share * positions)]
        rest = masked[len(wanted) :]
        assert (token_ids[sample, wanted] == hit).all() and (token_ids[sample, rest] == plain).all()


def test_a_share_of_half_a_position_is_rounded_away_from_zero(backend):
    before, now = torch.zeros(1, 5, 4), torch.zeros(1, 5, 4)
    before[..., 0], now[..., 0], now[..., 1] = 9.0, 5.0, 5.5
    args = dict(seed=0, mask_token_id=4, temperature=0.0, backend=backend)
    for num_masked, share, selected in (
        (2, 0.25, 1),
        (4, 0.625, 3),
        (5, 0.5, 3),
        (3, 0.49, 1),
        (1, 0.5, 1),
        (1, 0.4, 0),
    ):
        tokens = torch.zeros(1, 5, dtype=torch.int64)
        tokens[:, :num_masked] = 4
        _, _, state = mgt_kernels.differential_sample(before, tokens, None, step=0, share=share, **args)
        token_ids, _, _ = mgt_kernels.differential_sample(now, tokens, state, step=1, share=share, **args)
        # the argmax of |p - q| is what p lost, the argmax of p what it gained
        assert token_ids[0, :num_masked].tolist() == [0] * selected + [1] * (num_masked - selected)


def published_step(probs, previous, share):
    """The published code's step on (N, V) probabilities: rank every row by its divergence, edit the first ones."""
    divergence = torch.nn.functional.kl_div(previous.log(), probs, reduction="none").sum(-1)
    chosen = divergence.sort().indices[: int(share * len(probs))]
    edited = probs.clone()
    edited[chosen] = (probs - previous)[chosen].clamp(min=1e-6)
    return divergence, chosen, edited


@pytest.mark.parametrize("aliased", [False, True])
def test_official_is_the_published_step(backend, aliased):
    """Divergences, their order and the edited distributions, where the published code is deterministic: batch 1."""
    generator = torch.Generator().manual_seed(5)
    num_positions, num_tokens, share = 64, 128, 0.75
    logits = torch.randn(1, num_positions, num_tokens, generator=generator) * 2
    tokens = torch.full((1, num_positions), num_tokens)
    tokens[:, 50:] = 3
    # the history keeps q to a relative 2^-12
    precision, state, previous = 2.0**-11, None, None
    # every row changes by an amount of its own
    change = torch.linspace(0.2, 1.5, num_positions)[torch.randperm(num_positions, generator=generator)][:, None]
    for step in range(4):
        probs = logits[0].softmax(-1)
        token_ids, logprob, state = mgt_kernels.differential_sample(
            logits, tokens, state, mask_token_id=num_tokens, seed=7, step=step, share=share, variant="official",
            aliased_history=aliased, backend=backend,
        )  # fmt: skip
        edited = probs
        if previous is not None:
            divergence, chosen, edited = published_step(probs, previous, share)
            assert (state.divergence[0] - divergence).abs().max() < precision
            # far enough apart that rounding cannot change the selection
            ranked = divergence.sort().values
            assert ranked[len(chosen)] - ranked[len(chosen) - 1] > 2 * precision
            assert set(state.divergence[0].sort().indices[: len(chosen)].tolist()) == set(chosen.tolist())
            normalised = edited / edited.sum(-1, keepdim=True)
            drawn = normalised.gather(-1, token_ids[0, :, None])[:50, 0]
            # a small difference of p and q keeps less of their precision
            slack = precision * (probs + previous).gather(-1, token_ids[0, :, None])[:50, 0] / edited.sum(-1)[:50]
            assert ((logprob[0, :50].exp() - drawn).abs() <= slack + 1e-5 + precision * drawn).all()
        # what the published code compares the next step with: the very tensor that it edited, or its own copy
        expected = edited if aliased else probs
        before, previous = 0 if previous is None else previous, reference.decode_history(state.history)[0].float().exp()
        assert ((previous - expected).abs() <= precision * (probs + before) + 1e-10).all()
        logits = logits + torch.randn(logits.shape, generator=generator) * change


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_drawn_tokens_follow_the_difference(isa, variant):
    generator = torch.Generator().manual_seed(2)
    before, now = torch.randn(2, 50, generator=generator) * 1.5
    num_rows = 100_000 if isa == "scalar" else 500_000
    tokens = torch.full((1, num_rows), 50)
    args = dict(mask_token_id=50, seed=11, share=1.0, variant=variant, backend=isa)
    for temperature in (0.5, 1.0, 2.0):
        _, _, state = mgt_kernels.differential_sample(
            before.expand(1, num_rows, 50), tokens, None, step=0, temperature=temperature, **args
        )
        token_ids, _, _ = mgt_kernels.differential_sample(
            now.expand(1, num_rows, 50), tokens, state, step=1, temperature=temperature, **args
        )
        p, q = ((logits.double() / temperature).softmax(-1) for logits in (now, before))
        weights = (p - q).abs() if variant == "paper" else (p - q).clamp(min=1e-6)
        expected = weights / weights.sum() * num_rows
        counts = torch.bincount(token_ids[0], minlength=50).double()
        merged = expected < 5
        observed = torch.cat([counts[~merged], counts[merged].sum()[None]])
        wanted = torch.cat([expected[~merged], expected[merged].sum()[None]])
        keep = wanted > 0
        assert stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_equal_distributions_fall_back_to_p(backend):
    steps, tokens = make_steps(900, change=0.0)
    steps = [steps[0], steps[0]]
    args = dict(seed=SEEDS, mask_token_id=900, share=1.0, guidance_scale=2.0, backend=backend)
    (token_ids, logprob, state) = run(steps, tokens, **args)[1]
    args.pop("share")
    plain = mgt_kernels.sample_tokens(steps[1][0], tokens, uncond_logits=steps[1][1], step=1, **args)
    assert torch.equal(token_ids, plain[0]) and torch.equal(logprob, plain[1])
    assert (state.divergence[tokens == 900].abs() < 2.0**-12 + 1e-6).all()


@pytest.mark.parametrize("variant, aliased", VARIANTS)
def test_forbidden_tokens_and_the_mask_token_are_never_drawn(backend, variant, aliased):
    num_tokens, positions = 40, 300
    before = torch.zeros(1, positions, num_tokens)
    before[..., :20] = 6.0
    now = torch.zeros(1, positions, num_tokens)
    now[..., :15] = -torch.inf
    uncond = torch.zeros_like(now)
    uncond[..., 15:18] = -torch.inf
    # the mask lies inside the codebook
    tokens = torch.full((1, positions), 18)
    args = dict(mask_token_id=18, seed=3, share=1.0, variant=variant, aliased_history=aliased, backend=backend)
    for temperature in (0.0, 1.0):
        _, _, state = mgt_kernels.differential_sample(before, tokens, None, step=0, temperature=temperature, **args)
        for step in (1, 2):
            token_ids, logprob, state = mgt_kernels.differential_sample(
                now, tokens, state, step=step, uncond_logits=uncond, guidance_scale=2.0, temperature=temperature,
                **args,
            )  # fmt: skip
            assert (token_ids >= 19).all() and logprob.isfinite().all() and state.divergence.isfinite().all()


def test_a_position_that_is_masked_again_has_no_history(backend):
    steps, tokens = make_steps(100, num_steps=3)
    late = tokens.clone()
    late[:, ::5] = 100
    args = dict(mask_token_id=100, seed=SEEDS, share=1.0, backend=backend)
    (logits, _), (logits1, _), (logits2, _) = steps
    _, _, state = mgt_kernels.differential_sample(logits, tokens, None, step=0, **args)
    token_ids, logprob, state = mgt_kernels.differential_sample(logits1, late, state, step=1, **args)
    plain = mgt_kernels.sample_tokens(logits1, late, mask_token_id=100, seed=SEEDS, step=1, backend=backend)
    new = tokens != 100
    assert (state.divergence[new] == torch.inf).all() and state.divergence[~new].isfinite().all()
    assert torch.equal(token_ids[new], plain[0][new]) and torch.equal(logprob[new], plain[1][new])
    _, _, state = mgt_kernels.differential_sample(logits2, late, state, step=2, **args)
    assert state.divergence.isfinite().all()


def test_a_sample_does_not_depend_on_its_batch_or_threads(backend):
    steps, tokens = make_steps(100, batch=16, positions=7, num_steps=3)
    tokens[::3] = 100
    seeds = torch.arange(16) * 977 - 5000
    args = dict(mask_token_id=100, guidance_scale=1.7, noise_scale=0.5, backend=backend)
    for variant, aliased in VARIANTS:
        args |= dict(variant=variant, aliased_history=aliased)
        whole = run(steps, tokens, seed=seeds, **args)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i in (0, 7, 15):
                one = slice(i, i + 1)
                alone = run([(c[one], u[one]) for c, u in steps], tokens[one], seed=int(seeds[i]), **args)
                for (ids, logprob, state), (all_ids, all_logprob, all_state) in zip(alone, whole, strict=True):
                    assert torch.equal(ids, all_ids[one]) and torch.equal(logprob, all_logprob[one])
                    assert torch.equal(state.divergence, all_state.divergence[one])
        torch.set_num_threads(1)
        assert_equal_steps(run(steps, tokens, seed=seeds, **args), whole)


def test_layouts_agree_bit_for_bit(isa):
    for positions in (1, 15, 32, 33, 70):
        steps, tokens = make_steps(2100, positions=positions)
        args = dict(seed=SEEDS, mask_token_id=2100, guidance_scale=4.0, noise_scale=0.3, backend=isa)
        assert_equal_steps(run(steps, tokens, **args), run(steps, tokens, "position_major", **args))


def test_generations_do_not_leak_into_each_other(backend):
    first, tokens = make_steps(200, num_steps=3)
    second, _ = make_steps(200, num_steps=3, seed=1)
    args = dict(seed=SEEDS, mask_token_id=200, backend=backend)
    alone = run(first, tokens, **args), run(second, tokens, **args)
    one_after_the_other = run(first, tokens, **args), run(second, tokens, **args)
    states, interleaved = [None, None], ([], [])
    for step in range(3):
        for i, steps in enumerate((first, second)):
            ids, logprob, states[i] = mgt_kernels.differential_sample(
                steps[step][0], tokens, states[i], uncond_logits=steps[step][1], step=step, **args
            )
            interleaved[i].append((ids, logprob))
    for i in (0, 1):
        assert_equal_steps(alone[i], one_after_the_other[i])
        for (ids, logprob, _), (other_ids, other_logprob) in zip(alone[i], interleaved[i], strict=True):
            assert torch.equal(ids, other_ids) and torch.equal(logprob, other_logprob)


def test_only_the_state_is_written(backend):
    steps, tokens = make_steps(100)
    (logits, uncond), (logits1, uncond1) = steps
    seed, step = SEEDS.clone(), torch.tensor(0)
    inputs = (logits, uncond, logits1, uncond1, tokens, seed)
    copies = [t.clone() for t in inputs]
    args = dict(mask_token_id=100, guidance_scale=2.0, noise_scale=1.0, backend=backend)
    _, _, state = mgt_kernels.differential_sample(
        logits, tokens, None, uncond_logits=uncond, seed=seed, step=step, **args
    )
    assert int(step) == 0
    _, _, after = mgt_kernels.differential_sample(
        logits1, tokens, state, uncond_logits=uncond1, seed=seed, step=step + 1, **args
    )
    assert all(torch.equal(a, b) for a, b in zip(copies, inputs, strict=True))
    assert after.history.data_ptr() == state.history.data_ptr() and int(state.step) == 1
    # a caller that reuses its seed tensor for the next image does not reach into this generation
    seed += 1
    assert torch.equal(state.seed, SEEDS)


def test_rows_that_no_step_reads_are_never_touched(isa):
    # untouched pages of this 4 GiB history cost no memory
    positions, num_tokens = 2**18 + 3, 8192
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(2, num_tokens, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(1, positions, dtype=torch.int64)
    tokens[0, -2:] = num_tokens
    args = dict(mask_token_id=num_tokens, seed=3, backend=isa)
    _, _, state = mgt_kernels.differential_sample(logits[0].expand(1, positions, -1), tokens, None, step=0, **args)
    assert state.history.numel() > 2**31
    token_ids, _, state = mgt_kernels.differential_sample(
        logits[1].expand(1, positions, -1), tokens, state, step=1, **args
    )
    expected = reference.encode_history(logits[1].double().log_softmax(-1))
    assert ((codes(state.history[0, -1]) - codes(expected)).abs() <= 1).all()
    assert torch.equal(state.history[0, -1], state.history[0, -2]) and (token_ids[0, :-2] == 0).all()


def test_edge_shapes(backend):
    args = dict(seed=0, backend=backend)
    for variant in ("paper", "official"):
        state = None
        for step in (0, 1):
            token_ids, logprob, state = mgt_kernels.differential_sample(
                torch.empty(0, 5, 8), torch.empty(0, 5, dtype=torch.int64), state, mask_token_id=8, step=step,
                variant=variant, **args,
            )  # fmt: skip
            assert token_ids.shape == (0, 5) and logprob.shape == (0, 5)
    known = torch.arange(6).view(1, 6)
    state = None
    for step in (0, 1):
        # NaN at known positions is not read
        token_ids, logprob, state = mgt_kernels.differential_sample(
            torch.full((1, 6, 8), torch.nan), known, state, mask_token_id=8, step=step, **args
        )
        assert torch.equal(token_ids, known) and (logprob == torch.inf).all() and not state.written.any()
    state = None
    for step in (0, 1):
        token_ids, logprob, state = mgt_kernels.differential_sample(
            torch.zeros(1, 1, 1), torch.tensor([[1]]), state, mask_token_id=1, step=step, share=1, **args
        )
        assert token_ids.item() == 0 and logprob.item() == 0


GOOD = dict(logits=torch.zeros(2, 3, 4), tokens=torch.full((2, 3), 4), mask_token_id=4, seed=0, step=1)


def begun(backend="auto", **change):
    return mgt_kernels.differential_sample(**(GOOD | dict(state=None, step=0, backend=backend) | change))[2]


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(logits=[1.0]), TypeError, "logits: expected a tensor, got list"),
        (dict(state=3), TypeError, "state: expected a DifferentialState or None, got int"),
        (dict(share=-0.1), ValueError, "share: expected a finite number >= 0, got -0.1"),
        (dict(share=1.5), ValueError, r"share: expected a number within \[0, 1\], got 1.5"),
        (dict(share=float("nan")), ValueError, "share: expected a finite number >= 0, got nan"),
        (dict(share="most"), TypeError, "share: expected a number or a 0-dimensional tensor, got str"),
        (dict(variant="ours"), ValueError, r"variant: expected one of \('paper', 'official'\), got 'ours'"),
        (dict(aliased_history=True), ValueError, "aliased_history: expected False with variant 'paper'"),
        (dict(aliased_history=1), TypeError, "aliased_history: expected a bool, got int"),
        (
            dict(variant="official"),
            ValueError,
            "state: expected one begun with variant='official', got variant='paper'",
        ),
        (dict(mask_token_id=5, tokens=torch.full((2, 3), 5)), ValueError, "begun with mask_token_id=5, got"),
        (
            dict(logits=torch.zeros(1, 3, 4), tokens=torch.full((1, 3), 4)),
            ValueError,
            r"state: expected one of shape \(1, 3, 4\) like logits, got \(2, 3, 4\)",
        ),
        (dict(logits=torch.zeros(2, 3, 5)), ValueError, r"state: expected one of shape \(2, 3, 5\)"),
        (
            dict(logits=torch.zeros(2, 3, 4, device="meta"), tokens=torch.full((2, 3), 4, device="meta")),
            ValueError,
            "state: expected device meta like logits, got cpu",
        ),
        (dict(step=0), ValueError, "state: expected None at step 0, which begins a generation, got a state of step 0"),
        (dict(step=2), ValueError, "state: expected one of step 1 at step 2, got one of step 0"),
        (dict(step=torch.tensor(3)), ValueError, "state: expected one of step 2 at step 3, got one of step 0"),
        (dict(seed=1), ValueError, "seed: expected 0 for sample 0 as in the state, got 1"),
        (dict(seed=torch.tensor([0, 7])), ValueError, "seed: expected 0 for sample 1 as in the state, got 7"),
        (dict(backend="triton"), RuntimeError, "backend: 'triton' runs on CUDA tensors"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        mgt_kernels.differential_sample(**(GOOD | dict(state=begun()) | change))


def test_a_step_is_not_taken_twice(backend):
    first = begun(backend)
    mgt_kernels.differential_sample(**GOOD, state=first, backend=backend)
    # the old handle shows the same tensors, which have moved on
    with pytest.raises(ValueError, match="state: expected one of step 0 at step 1, got one of step 1"):
        mgt_kernels.differential_sample(**GOOD, state=first, backend=backend)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, "all -inf"])
def test_bad_logits_are_named(backend, value, variant):
    num_tokens = 300 if backend == "reference" else 3000
    logits = torch.randn(3, 40, num_tokens)
    tokens = torch.full((3, 40), num_tokens)
    args = dict(mask_token_id=num_tokens, seed=0, variant=variant, backend=backend)
    _, _, state = mgt_kernels.differential_sample(logits, tokens, None, step=0, **args)
    bad = logits.clone()
    bad[1, 33] = -torch.inf if value == "all -inf" else bad[1, 33]
    if value != "all -inf":
        bad[1, 33, -1] = value
    bad[2, 5, 0] = torch.nan
    for layout in (bad, position_major(bad)):
        with pytest.raises(ValueError, match=r"logits: sample 1, position 33 holds NaN or"):
            mgt_kernels.differential_sample(layout, tokens, state, step=1, **args)
    # nothing of a state that a failed step has half overwritten is believed
    _, _, state = mgt_kernels.differential_sample(logits, tokens, state, step=1, **args)
    assert (state.divergence == torch.inf).all()
    tokens[1, 33] = tokens[2, 5] = 0
    if variant == "paper":
        mgt_kernels.differential_sample(bad, tokens, state, step=2, **args)
    else:
        with pytest.raises(ValueError, match="logits: sample 1, position 33 holds NaN or"):
            mgt_kernels.differential_sample(bad, tokens, state, step=2, **args)
