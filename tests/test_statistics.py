"""What sample_tokens gives beside a draw: statistics of the rows, known ones too, bias, places in a sequence."""

import itertools

import pytest
import torch
from compare import assert_statistics

import mgt_kernels
from mgt_kernels import cpu, reference
from mgt_kernels.reference.sample_tokens import row_statistics

NAMES = tuple(cpu.STATISTICS)
FLOATS = tuple(name for name in NAMES if name != "argmax")
# around the lanes, the words of a Philox block, and the tiles
SIZES = (1, 2, 7, 15, 16, 17, 33, 511, 513, 1025, 2047, 2049, 5000)


def make_case(num_tokens, positions=23, dtype=torch.float32, std=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed + num_tokens)
    logits, uncond = (torch.randn(2, 2, positions, num_tokens, generator=generator) * std).to(dtype)
    tokens = torch.randint(num_tokens, (2, positions), generator=generator)
    tokens[:, ::2] = num_tokens
    return logits, uncond, tokens


def position_major(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("rows", cpu.ROWS)
@pytest.mark.parametrize("layout", ["token_major", "position_major"])
@pytest.mark.parametrize("noise_scale, temperature", [(0.0, 1.0), (0.7, 0.9), (0.0, 0.0)])
def test_every_instruction_set_equals_the_oracle(rows, layout, noise_scale, temperature):
    for num_tokens, dtype in zip(SIZES, itertools.cycle((torch.float32, torch.bfloat16)), strict=False):
        logits, uncond, tokens = make_case(num_tokens, dtype=dtype)
        args = dict(seed=torch.tensor([3, -9]), step=2, mask_token_id=num_tokens, guidance_scale=2.5)
        args |= dict(noise_scale=noise_scale, temperature=temperature)
        halves = [logits, uncond] if layout == "token_major" else [position_major(x) for x in (logits, uncond)]
        first, *others = (
            mgt_kernels.sample_tokens(
                halves[0], tokens, uncond_logits=halves[1], rows=rows, statistics=NAMES, backend=isa, **args
            )
            for isa in cpu.available_isas()
        )
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        chain, _ = reference.perturbed_logits(logits, uncond_logits=uncond, **args)
        chain = chain.float()
        if noise_scale == 0.0:
            chain = uncond.float() + 2.5 * (logits.float() - uncond.float())
        assert_statistics(first._asdict(), chain, logits, tokens, rows, uncond_logits=uncond, **args)
        plain = mgt_kernels.sample_tokens(halves[0], tokens, uncond_logits=halves[1], **args)
        assert plain[2:] == (None,) * len(NAMES)
        if rows != "known":
            assert torch.equal(plain.token_ids, first.token_ids) and torch.equal(plain.logprob, first.logprob)
        else:
            assert torch.equal(first.token_ids, tokens) and (first.logprob == torch.inf).all()


@pytest.mark.parametrize("kind", ["flat", "one-hot", "ties", "forbidden", "wide", "one token"])
def test_rows_at_the_edge(kind, backend):
    logits = torch.zeros(1, 6, 4100)
    if kind == "one-hot":
        logits.fill_(-torch.inf)[0, torch.arange(6), torch.tensor([0, 15, 16, 2047, 2048, 4099])] = 3.0
    elif kind == "ties":
        logits[..., [7, 2050, 4000]] = 2.0
    elif kind == "forbidden":
        logits[..., 1::2] = -torch.inf
    elif kind == "wide":
        logits[..., :2048] = -3e38
        logits[..., 2048:] = torch.linspace(-40, 0, 2052)
    elif kind == "one token":
        logits = logits[..., :1]
    tokens = torch.full((1, 6), 5000)
    args = dict(mask_token_id=5000, seed=torch.tensor([5]), step=0)
    drawn = mgt_kernels.sample_tokens(logits, tokens, statistics=NAMES, backend=backend, **args)
    expected, _ = reference.sample_tokens(logits, tokens, **args)
    assert torch.equal(drawn.argmax, expected["argmax"])
    for name in ("max_logprob", "margin", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(drawn, name).double(), expected[name], rtol=2e-6, atol=2e-6)
    assert (drawn.entropy >= 0).all() and (drawn.margin >= 0).all()
    if kind in ("one-hot", "one token"):
        assert (drawn.entropy == 0).all() and (drawn.margin == 1).all() and (drawn.max_logprob == 0).all()
    if kind in ("flat", "ties"):
        assert (drawn.margin == 0).all()


def test_each_statistic_alone_is_the_same(isa):
    logits, uncond, tokens = make_case(3000, dtype=torch.bfloat16)
    args = dict(seed=3, step=1, mask_token_id=3000, uncond_logits=uncond, guidance_scale=3.0, rows="all", backend=isa)
    together = mgt_kernels.sample_tokens(logits, tokens, statistics=NAMES, **args)
    for name in NAMES:
        alone = mgt_kernels.sample_tokens(logits, tokens, statistics=[name], **args)
        assert torch.equal(getattr(alone, name), getattr(together, name))
        assert torch.equal(alone.token_ids, together.token_ids) and torch.equal(alone.logprob, together.logprob)
        assert [x is None for x in alone[2:]] == [other != name for other in NAMES]


def test_a_hundred_thousand_rows_agree():
    # ties at 16-bit logits are common, and so is the second largest in another lane, word or tile than the largest
    for num_tokens, positions in ((3, 40_000), (16, 20_000), (33, 20_000), (600, 15_000), (4100, 5_000)):
        generator = torch.Generator().manual_seed(num_tokens)
        logits = (torch.randn(1, positions, num_tokens, generator=generator) * 2).bfloat16()
        logits[0, ::7, : num_tokens // 2] = -torch.inf
        tokens = torch.randint(num_tokens, (1, positions), generator=generator)
        tokens[:, ::3] = num_tokens
        args = dict(seed=torch.tensor([1]), step=1, mask_token_id=num_tokens, rows="all")
        first, *others = (
            mgt_kernels.sample_tokens(logits, tokens, statistics=NAMES, backend=isa, **args)
            for isa in cpu.available_isas()
        )
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        expected = row_statistics(logits.double())
        assert torch.equal(first.argmax, expected["argmax"])
        for name in ("max_logprob", "margin", "entropy", "logsumexp"):
            torch.testing.assert_close(getattr(first, name).double(), expected[name], rtol=3e-6, atol=3e-6)


def test_known_tokens_may_be_anything_where_they_are_not_read(backend):
    logits, _, tokens = make_case(40)
    args = dict(mask_token_id=40, seed=1, step=0, backend=backend)
    expected = mgt_kernels.sample_tokens(logits, tokens, statistics=["entropy"], rows="all", **args)
    tokens[0, 1], tokens[1, 3] = 1000, -5
    drawn = mgt_kernels.sample_tokens(logits, tokens, statistics=["entropy"], rows="all", **args)
    assert torch.equal(drawn.entropy, expected.entropy)
    assert drawn.token_ids[0, 1] == 1000 and drawn.token_ids[1, 3] == -5
    mgt_kernels.sample_tokens(logits, tokens, statistics=["known_logprob"], **args)
    for rows in ("known", "all"):
        with pytest.raises(ValueError, match=r"tokens: sample 0, position 1 is 1000; expected an id within \[0, 40\)"):
            mgt_kernels.sample_tokens(logits, tokens, statistics=["known_logprob"], rows=rows, **args)


def test_what_is_not_read_may_be_bad(backend):
    logits, _, tokens = make_case(40)
    logits[0, 1] = torch.nan
    args = dict(mask_token_id=40, seed=1, step=0, statistics=["argmax"], backend=backend)
    mgt_kernels.sample_tokens(logits, tokens, **args)
    for rows in ("known", "all"):
        with pytest.raises(ValueError, match="logits: sample 0, position 1 holds NaN"):
            mgt_kernels.sample_tokens(logits, tokens, rows=rows, **args)


@pytest.mark.parametrize("op", ["sample_tokens", "differential_sample"])
@pytest.mark.parametrize("noise_scale", [0.0, 1.0])
def test_a_part_of_a_sequence_draws_what_the_whole_does(op, noise_scale, backend):
    logits, uncond, tokens = make_case(300, positions=40)
    tokens.fill_(300)
    args = dict(mask_token_id=300, noise_scale=noise_scale, guidance_scale=1.5, backend=backend)
    ways = {}
    for name, part, first in (("whole", slice(None), 0), ("part", slice(11, 30), 11)):
        halves = [x[:, part] for x in (logits, uncond)]
        drawn, state = [], None
        for step in range(2):
            common = dict(uncond_logits=halves[1], seed=torch.tensor([8, 9]), step=step, first_position=first, **args)
            if op == "sample_tokens":
                drawn.append(mgt_kernels.sample_tokens(halves[0], tokens[:, part], **common)[:2])
            else:
                # a share of 1, so that the selection is the same
                *outputs, state = mgt_kernels.differential_sample(
                    halves[0] * (step + 1), tokens[:, part], state, share=1.0, **common
                )
                drawn.append(outputs)
        ways[name] = drawn
    for whole, part in zip(ways["whole"], ways["part"], strict=True):
        assert all(torch.equal(a[:, 11:30], b) for a, b in zip(whole, part, strict=True))


def test_a_ragged_batch_equals_the_padded_one(isa):
    logits, uncond, tokens = make_case(300, positions=9)
    seeds, scales = torch.tensor([8, -9]), torch.tensor([1.5, 3.0])
    args = dict(mask_token_id=300, step=3, noise_scale=0.5, statistics=NAMES, rows="all", backend=isa)
    padded = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, seed=seeds, guidance_scale=scales, **args)
    # rows of the two sequences in any order, as continuous batching has them
    sample, position = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([8, 0, 3, 2, 5])
    flat = [x[sample, position][:, None] for x in (logits, tokens, uncond)]
    ragged = mgt_kernels.sample_tokens(
        *flat[:2], uncond_logits=flat[2], seed=seeds[sample], guidance_scale=scales[sample], first_position=position,
        **args,
    )  # fmt: skip
    for a, b in zip(padded, ragged, strict=True):
        assert torch.equal(a[sample, position], b[:, 0])


def test_a_scale_per_sample(backend):
    logits, uncond, tokens = make_case(100)
    args = dict(mask_token_id=100, step=0, uncond_logits=uncond, backend=backend)
    scales = torch.tensor([-1.0, 4.0], dtype=torch.float64)
    together = mgt_kernels.sample_tokens(logits, tokens, seed=3, guidance_scale=scales, **args)
    for sample, scale in enumerate(scales.tolist()):
        alone = mgt_kernels.sample_tokens(logits, tokens, seed=3, guidance_scale=scale, **args)
        assert torch.equal(together.token_ids[sample], alone.token_ids[sample])
        assert torch.equal(together.logprob[sample], alone.logprob[sample])


@pytest.mark.parametrize("layout", ["token_major", "position_major"])
def test_allowed_tokens(layout, backend):
    logits, uncond, tokens = make_case(2300)
    tokens.fill_(2300)
    halves = [logits, uncond] if layout == "token_major" else [position_major(x) for x in (logits, uncond)]
    allowed = torch.rand(2300, generator=torch.Generator().manual_seed(0)) < 0.3
    args = dict(mask_token_id=2300, seed=torch.tensor([3, 4]), step=0, guidance_scale=2.0, noise_scale=0.5)
    args |= dict(statistics=NAMES, backend=backend)
    drawn = mgt_kernels.sample_tokens(halves[0], tokens, uncond_logits=halves[1], allowed=allowed, **args)
    forbidden = logits.masked_fill(~allowed, -torch.inf)
    expected = mgt_kernels.sample_tokens(forbidden, tokens, uncond_logits=uncond, **args)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    # a bias is added to what is guided
    bias = torch.randn(2300, generator=torch.Generator().manual_seed(1))
    drawn = mgt_kernels.sample_tokens(halves[0], tokens, uncond_logits=halves[1], allowed=bias, **args)
    guided = uncond.double() + 2.0 * (logits.double() - uncond.double()) + bias.double()
    expected = mgt_kernels.sample_tokens(guided.float(), tokens, **args)
    assert torch.equal(drawn.token_ids, expected.token_ids)
    torch.testing.assert_close(drawn.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    # a forbidden token stays so, whatever its logit
    logits[..., 5] = torch.inf
    with pytest.raises(ValueError, match="sample 0, position 0 holds NaN or"):
        mgt_kernels.sample_tokens(logits, tokens, **args)
    allowed[5] = False
    assert not (mgt_kernels.sample_tokens(logits, tokens, allowed=allowed, **args).token_ids == 5).any()


GOOD = dict(logits=torch.zeros(2, 3, 4), tokens=torch.full((2, 3), 4), mask_token_id=4, seed=0, step=0)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            dict(statistics=["entropie"]),
            ValueError,
            r"statistics: expected names out of \('argmax'.*got \['entropie'\]",
        ),
        (dict(statistics="entropy"), ValueError, "statistics: expected names out of"),
        (dict(rows="unknown"), ValueError, r"rows: expected one of \('masked', 'known', 'all'\), got 'unknown'"),
        (dict(allowed=torch.ones(5, dtype=torch.bool)), ValueError, r"allowed: expected shape \(4,\), got \(5,\)"),
        (dict(allowed=torch.ones(4)[None]), ValueError, "allowed: expected 1 dimensions"),
        (dict(allowed=torch.ones(4, dtype=torch.int64)), TypeError, "allowed: expected dtype torch.bool or torch.floa"),
        (dict(allowed=torch.zeros(4, dtype=torch.bool)), ValueError, "allowed: expected at least one token"),
        (dict(allowed=torch.full((4,), -torch.inf)), ValueError, "allowed: expected at least one token"),
        (dict(allowed=torch.full((4,), torch.nan)), ValueError, "allowed: expected at least one token|sample 0, posit"),
        (dict(first_position=-1), ValueError, r"first_position: expected a value within \[0, 4294967293\], got -1"),
        (dict(first_position=2**32 - 2), ValueError, "first_position: expected a value within"),
        (dict(first_position=torch.tensor([0, -3])), ValueError, "first_position: .* got -3 for sample 1"),
        (dict(first_position=torch.tensor([0, 1, 2])), ValueError, r"first_position: expected shape \(2,\)"),
        (dict(first_position=0.5), TypeError, "first_position: expected an integer, got float"),
        (dict(guidance_scale=torch.ones(3)), ValueError, r"guidance_scale: expected a number .*, or shape \(2,\), got"),
        (dict(guidance_scale=torch.tensor([1.0, torch.nan])), ValueError, "guidance_scale: .* got nan for sample 1"),
        (dict(noise_scale=torch.ones(2)), ValueError, "noise_scale: expected a number or a 0-dimensional tensor, got"),
    ],
)
def test_bad_arguments_are_named(change, error, words, backend):
    with pytest.raises(error, match=words):
        mgt_kernels.sample_tokens(**(GOOD | dict(uncond_logits=torch.zeros(2, 3, 4)) | change), backend=backend)


def test_compiled_graphs_and_checks_of_the_op():
    logits, uncond, tokens = make_case(64)
    options = dict(mask_token_id=64, uncond_logits=uncond, statistics=("margin", "entropy"), rows="all")

    def step(logits, tokens, seed, scale, first, allowed):
        drawn = mgt_kernels.sample_tokens(
            logits, tokens, seed=seed, step=1, guidance_scale=scale, first_position=first, allowed=allowed, **options
        )
        return drawn.token_ids, drawn.entropy, drawn.margin

    varied = (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.tensor([5, 0]), torch.arange(64) > 3)
    expected = step(logits, tokens, *varied)
    compiled = torch.compile(step, fullgraph=True)(logits, tokens, *varied)
    assert all(torch.equal(a, b) for a, b in zip(expected, compiled, strict=True))
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.mgt_kernels.sample_tokens.default,
        (
            logits, tokens, torch.tensor([1, 2]), torch.tensor(1), 64, uncond, torch.tensor([1.0, 2.0]), one, one,
            torch.tensor([5, 0]), torch.zeros(64), None, one, "nested", one, "all", "margin,entropy", 0, one, 0 * one,
            "kept", "auto",
        ),
    )  # fmt: skip
