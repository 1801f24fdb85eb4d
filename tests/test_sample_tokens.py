"""sample_tokens: every instruction set, layout and dtype against each other, the oracle and the law."""

import os
import subprocess
import sys

import pytest
import torch
from compare import assert_ids_by_margin, assert_no_worse_than_naive
from scipy import stats

import mgt_kernels
from mgt_kernels import cpu, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# around every lane count, word and tile of 2048 columns
SIZES = [1, 7, 8, 15, 16, 17, 31, 33, 511, 513, 1000, 1024, 2047, 2048, 2049, 8192, 8193]


def position_major(logits):
    """The same values with unit stride over positions."""
    return logits.mT.contiguous().mT


def make_case(num_tokens, batch=2, positions=37, dtype=torch.float32, std=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed + num_tokens)
    logits, uncond = (torch.randn(2, batch, positions, num_tokens, generator=generator) * std).to(dtype)
    tokens = torch.full((batch, positions), num_tokens)
    tokens[:, ::5] = 0
    return logits, uncond, tokens


def naive_logprob(logits, uncond, token_ids, guidance_scale):
    """PyTorch's own chain in fp32."""
    cond, uncond = logits.float(), uncond.float()
    guided = uncond + guidance_scale * (cond - uncond)
    return guided.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["token_major", "position_major"])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("noise_scale, temperature", [(0.0, 1.0), (0.7, 0.9), (0.0, 0.0)])
def test_equals_the_oracle(num_tokens, layout, dtype, noise_scale, temperature):
    logits, uncond, tokens = make_case(num_tokens, dtype=dtype)
    seed = torch.tensor([3, -(2**62) - 9])
    args = dict(seed=seed, step=2, mask_token_id=num_tokens, guidance_scale=2.5)
    args |= dict(noise_scale=noise_scale, temperature=temperature)
    tempered, scores = reference.perturbed_logits(logits, uncond_logits=uncond, **args)
    if layout == "position_major":
        logits, uncond = position_major(logits), position_major(uncond)
    masked = tokens == num_tokens
    outputs = [
        mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, backend=isa, **args)
        for isa in cpu.available_isas()
    ]
    for token_ids, logprob, *_ in outputs[1:]:
        assert torch.equal(token_ids, outputs[0][0]) and torch.equal(logprob, outputs[0][1])
    token_ids, logprob, *_ = outputs[0]
    assert_ids_by_margin(token_ids, scores, masked)
    assert torch.equal(token_ids[~masked], tokens[~masked]) and (logprob[~masked] == torch.inf).all()
    truth = (tempered.gather(-1, token_ids[..., None])[..., 0] - tempered.logsumexp(-1))[masked]
    if noise_scale == 0.0 and temperature != 0.9:
        naive = naive_logprob(logits, uncond, token_ids, 2.5)[masked]
    else:
        naive = tempered.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0][masked]
        # the noise itself is fp32, some units in the last place of 6.8
        naive = naive + 4e-6
    assert_no_worse_than_naive(logprob[masked], truth, naive)


def test_a_million_rows_agree():
    num_rows = 0
    for num_tokens, positions in [
        (1, 200_000), (7, 250_000), (8, 250_000), (15, 80_000), (16, 80_000), (17, 80_000), (31, 40_000),
        (33, 40_000), (1000, 4000), (8192, 300), (8193, 300),
    ]:  # fmt: skip
        logits, uncond, tokens = make_case(num_tokens, 1, positions, std=2.0)
        tokens.fill_(num_tokens)
        num_rows += positions
        args = dict(seed=torch.tensor([num_tokens]), step=1, mask_token_id=num_tokens)
        args |= dict(uncond_logits=uncond, guidance_scale=3.0)
        outputs = [mgt_kernels.sample_tokens(logits, tokens, backend=isa, **args) for isa in cpu.available_isas()]
        for token_ids, logprob, *_ in outputs[1:]:
            assert torch.equal(token_ids, outputs[0][0]) and torch.equal(logprob, outputs[0][1])
        _, scores = reference.perturbed_logits(logits, **args)
        assert_ids_by_margin(outputs[0][0], scores, torch.ones(1, positions, dtype=torch.bool))
    assert num_rows >= 10**6


def test_the_comparison_can_fail():
    logits, _, tokens = make_case(1000, positions=500)
    args = dict(seed=torch.tensor([1, 2]), step=0, mask_token_id=1000)
    _, scores = reference.perturbed_logits(logits, **args)
    masked = tokens == 1000
    token_ids, *_ = mgt_kernels.sample_tokens(logits, tokens, **args)
    assert_ids_by_margin(token_ids, scores, masked)
    for change in (
        dict(step=1),
        dict(seed=torch.tensor([1, 3])),
        dict(temperature=1.01),
        dict(noise_scale=0.01),
    ):
        changed, *_ = mgt_kernels.sample_tokens(logits, tokens, **(args | change))
        with pytest.raises(AssertionError):
            assert_ids_by_margin(changed, scores, masked)


def test_a_sample_does_not_depend_on_its_batch_or_threads(backend):
    logits, uncond, tokens = make_case(300, batch=64, positions=5)
    seeds = torch.arange(64) * 977 - 5000
    args = dict(step=4, mask_token_id=300, guidance_scale=1.7, noise_scale=0.5, backend=backend)
    whole = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, seed=seeds, **args)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for i in (0, 17, 63):
            one = slice(i, i + 1)
            alone = mgt_kernels.sample_tokens(
                logits[one], tokens[one], uncond_logits=uncond[one], seed=int(seeds[i]), **args
            )
            assert torch.equal(alone[0], whole[0][one]) and torch.equal(alone[1], whole[1][one])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = mgt_kernels.sample_tokens(
        logits[order], tokens[order], uncond_logits=uncond[order], seed=seeds[order], **args
    )
    assert torch.equal(shuffled[0], whole[0][order])


def test_layouts_agree_bit_for_bit(isa):
    for positions in (1, 15, 16, 31, 32, 33, 100):
        logits, uncond, tokens = make_case(2100, positions=positions)
        args = dict(seed=9, step=0, mask_token_id=2100, guidance_scale=4.0, noise_scale=0.3, backend=isa)
        rows = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=uncond, **args)
        columns = mgt_kernels.sample_tokens(
            position_major(logits), tokens, uncond_logits=position_major(uncond), **args
        )
        assert torch.equal(rows[0], columns[0]) and torch.equal(rows[1], columns[1])


def test_channels_last_and_sliced_views_are_read_in_place(isa):
    grid = torch.randn(2, 40, 6, 6).contiguous(memory_format=torch.channels_last)
    view = grid.reshape(2, 40, 36).permute(0, 2, 1)
    assert view.data_ptr() == grid.data_ptr() and view.stride(2) == 1
    sliced = torch.randn(2, 36, 100)[..., 30:70]
    tokens = torch.full((2, 36), 40)
    for logits in (view, sliced):
        args = dict(seed=1, step=0, mask_token_id=40, backend=isa)
        expected = mgt_kernels.sample_tokens(logits.contiguous(), tokens, **args)
        assert torch.equal(mgt_kernels.sample_tokens(logits, tokens, **args)[0], expected[0])


def test_no_guidance_equals_guidance_scale_one(isa):
    logits, _, tokens = make_case(700)
    args = dict(seed=4, step=0, mask_token_id=700, backend=isa)
    plain = mgt_kernels.sample_tokens(logits, tokens, **args)
    same = mgt_kernels.sample_tokens(logits, tokens, uncond_logits=logits, guidance_scale=7.0, **args)
    assert torch.equal(plain[0], same[0]) and torch.equal(plain[1], same[1])


def test_drawn_tokens_follow_the_softmax(isa):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 1.5
    num_rows = 100_000 if isa == "scalar" else 1_000_000
    tokens = torch.full((1, num_rows), 50)
    for temperature in (0.5, 1.0, 2.0):
        token_ids, *_ = mgt_kernels.sample_tokens(
            logits.expand(1, num_rows, 50), tokens, mask_token_id=50, seed=11, step=0, temperature=temperature,
            backend=isa,
        )  # fmt: skip
        counts = torch.bincount(token_ids[0], minlength=50).double()
        expected = (logits.double() / temperature).softmax(-1) * num_rows
        merged = expected < 5
        observed = torch.cat([counts[~merged], counts[merged].sum()[None]]).numpy()
        wanted = torch.cat([expected[~merged], expected[merged].sum()[None]]).numpy()
        keep = wanted > 0
        assert stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_the_far_tail_is_drawn():
    # 8191 tokens 19 nats below the top one: 18.4 draws in 400,000 rows; uniforms of 24 bits reach 16.6 nats only
    num_rows = 400_000
    logits = torch.full((8192,), -19.0)
    logits[123] = 0.0
    token_ids, *_ = mgt_kernels.sample_tokens(
        logits.expand(1, num_rows, 8192), torch.full((1, num_rows), 8192), mask_token_id=8192, seed=0, step=0
    )
    hits = int((token_ids != 123).sum())
    assert 7 <= hits <= 34, hits


def test_a_row_of_each_step_and_position_is_independent():
    logits = torch.zeros(4).expand(1, 100_000, 4)
    tokens = torch.full((1, 100_000), 4)
    first, second = (
        mgt_kernels.sample_tokens(logits, tokens, mask_token_id=4, seed=0, step=step)[0] for step in (0, 1)
    )
    pairs = torch.bincount((first * 4 + second)[0], minlength=16)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4
    neighbours = torch.bincount((first[0, :-1] * 4 + first[0, 1:]), minlength=16)
    assert stats.chisquare(neighbours.numpy()).pvalue > 1e-4


def test_forbidden_tokens(backend):
    logits, uncond, tokens = make_case(100)
    logits[..., 10:] = -torch.inf
    uncond[..., 5:20] = -torch.inf
    args = dict(seed=2, step=0, mask_token_id=100, backend=backend)
    for scale in (-1.0, 0.0, 0.5, 1.0, 9.0):
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(
            logits, tokens, uncond_logits=uncond, guidance_scale=scale, **args
        )
        assert (token_ids < 5)[tokens == 100].all()
        assert logprob[tokens == 100].isfinite().all()
    only = torch.full((1, 3, 4000), -torch.inf)
    only[..., 3777] = -1e4
    masked = torch.full((1, 3), 4000)
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(only, masked, **(args | dict(mask_token_id=4000)))
    assert (token_ids == 3777).all() and (logprob == 0).all()


def test_the_mask_token_is_never_drawn(backend):
    logits = torch.zeros(1, 500, 7)
    logits[..., 3] = 50.0
    tokens = torch.full((1, 500), 3)
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=3, seed=0, step=0, backend=backend)
    assert not (token_ids == 3).any() and set(token_ids.flatten().tolist()) == {0, 1, 2, 4, 5, 6}
    assert torch.allclose(logprob, -torch.tensor(6.0).log())


def test_greedy_takes_the_lowest_of_equal_logits(backend):
    logits = torch.zeros(1, 2, 3000)
    logits[0, 0, [2999, 1700, 600]] = 4.0
    token_ids, *_ = mgt_kernels.sample_tokens(
        logits, torch.full((1, 2), 3000), mask_token_id=3000, seed=0, step=0, temperature=0.0, backend=backend
    )
    assert token_ids.tolist() == [[600, 0]]


def test_large_logits_stay_exact(isa):
    for magnitude in (1e4, 1e8, 1e30):
        logits, _, tokens = make_case(513, std=magnitude)
        args = dict(seed=torch.tensor([1, 2]), step=0, mask_token_id=513)
        _, scores = reference.perturbed_logits(logits, **args)
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, backend=isa, **args)
        assert_ids_by_margin(token_ids, scores, tokens == 513, margin=2e-7)
        assert logprob[tokens == 513].isfinite().all()


def test_ascending_logits(isa):
    # every column beats the ones before it: the filter lets all of them pass and must still be right
    logits = (torch.arange(5000.0) * 0.01).expand(2, 3, 5000)
    args = dict(seed=torch.tensor([5, 6]), step=0, mask_token_id=5000)
    _, scores = reference.perturbed_logits(logits, **args)
    tokens = torch.full((2, 3), 5000)
    token_ids, *_ = mgt_kernels.sample_tokens(logits, tokens, backend=isa, **args)
    assert torch.equal(token_ids, scores.argmax(-1))


@pytest.mark.parametrize("layout", ["token_major", "position_major"])
def test_past_two_to_the_31_elements(layout):
    positions, num_tokens = 2**19 + 3, 4099
    # untouched pages of this 4 GiB tensor cost no memory; only the last rows are written and masked
    if layout == "token_major":
        logits = torch.empty_strided(
            (1, positions, num_tokens), (positions * num_tokens, num_tokens, 1), dtype=torch.bfloat16
        )
    else:
        logits = torch.empty_strided(
            (1, positions, num_tokens), (positions * num_tokens, 1, positions), dtype=torch.bfloat16
        )
    assert logits.numel() > 2**31
    last = torch.randn(2, num_tokens).bfloat16()
    logits[0, -2:] = last
    tokens = torch.zeros(1, positions, dtype=torch.int64)
    tokens[0, -2:] = num_tokens
    token_ids, *_ = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=num_tokens, seed=3, step=0)
    small = last[1].expand(1, positions, num_tokens)
    tokens[0, -2] = 0
    expected, *_ = mgt_kernels.sample_tokens(small, tokens, mask_token_id=num_tokens, seed=3, step=0)
    assert token_ids[0, -1] == expected[0, -1] and (token_ids[0, :-2] == 0).all()


def test_edge_shapes(backend):
    args = dict(seed=0, step=0, backend=backend)
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(
        torch.empty(0, 5, 8), torch.empty(0, 5, dtype=torch.int64), mask_token_id=8, **args
    )
    assert token_ids.shape == (0, 5) and logprob.shape == (0, 5)
    known = torch.arange(6).view(1, 6)
    # NaN at known positions is not read
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(torch.full((1, 6, 8), torch.nan), known, mask_token_id=8, **args)
    assert torch.equal(token_ids, known) and (logprob == torch.inf).all()
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(
        torch.zeros(1, 1, 1), torch.tensor([[1]]), mask_token_id=1, **args
    )
    assert token_ids.item() == 0 and logprob.item() == 0


def test_inputs_are_not_written(backend):
    logits, uncond, tokens = make_case(100)
    copies = [t.clone() for t in (logits, uncond, tokens)]
    mgt_kernels.sample_tokens(
        logits, tokens, uncond_logits=uncond, guidance_scale=2.0, noise_scale=1.0, mask_token_id=100, seed=0, step=0,
        backend=backend,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(copies, (logits, uncond, tokens), strict=True))


GOOD = dict(logits=torch.zeros(2, 3, 4), tokens=torch.full((2, 3), 4), mask_token_id=4, seed=0, step=0)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(logits=[1.0]), TypeError, "logits: expected a tensor, got list"),
        (dict(logits=torch.zeros(2, 3, 4, dtype=torch.float64)), TypeError, "logits: expected dtype"),
        (dict(logits=torch.zeros(3, 4)), ValueError, "logits: expected 3 dimensions"),
        (dict(logits=torch.zeros(2, 3, 0)), ValueError, "logits: expected at least one token"),
        (dict(logits=torch.zeros(2, 3, 8)[..., ::2]), ValueError, "expected unit stride"),
        (
            dict(tokens=torch.full((2, 3), 4, dtype=torch.int32)),
            TypeError,
            "tokens: expected dtype torch.int64",
        ),
        (dict(tokens=torch.full((2, 2), 4)), ValueError, r"tokens: expected shape \(2, 3\)"),
        (dict(tokens=torch.full((2, 3), 4, device="meta")), ValueError, "tokens: expected device cpu"),
        (
            dict(tokens=torch.tensor([[4, 4, 4], [4, 7, 4]]), rows="all", statistics=["known_logprob"]),
            ValueError,
            "tokens: sample 1, position 1 is 7",
        ),
        (
            dict(tokens=torch.tensor([[4, 4, 4], [4, 4, -1]]), rows="known", statistics=["known_logprob"]),
            ValueError,
            "tokens: sample 1, position 2 is -1",
        ),
        (
            dict(uncond_logits=torch.zeros(2, 3, 4).half()),
            TypeError,
            "uncond_logits: expected dtype torch.float32",
        ),
        (dict(uncond_logits=torch.zeros(1, 3, 4)), ValueError, "uncond_logits: expected shape"),
        (dict(uncond_logits=torch.zeros(2, 4, 3).mT), ValueError, "the same for all"),
        (dict(seed=torch.zeros(3, dtype=torch.int64)), ValueError, r"seed: expected shape \(2,\)"),
        (
            dict(seed=torch.zeros(2)),
            TypeError,
            "seed: expected an integer dtype that fits into torch.int64, got torch.float32",
        ),
        (dict(seed=0.5), TypeError, "seed: expected an integer, got float"),
        (dict(seed=2**63), ValueError, "seed: expected a 64-bit"),
        (dict(step=-1), ValueError, "step: expected"),
        (dict(step=2**32), ValueError, "step: expected"),
        (dict(guidance_scale=float("nan")), ValueError, "guidance_scale: expected a finite number, got nan"),
        (dict(noise_scale=-1.0), ValueError, "noise_scale: expected a finite number >= 0, got -1.0"),
        (dict(temperature=-0.5), ValueError, "temperature: expected a finite number >= 0, got -0.5"),
        (dict(temperature=float("nan")), ValueError, "temperature: expected a finite number >= 0, got nan"),
        (dict(temperature=1e-40), ValueError, "temperature: expected 0 or at least 1e-30, got 1e-40"),
        (dict(guidance_scale=1e39), ValueError, "guidance_scale: expected a finite number"),
        *(
            (dict(guidance_scale=torch.tensor([1.0, value], dtype=dtype)), ValueError, f"got {value} for sample 1")
            for dtype in (torch.float16, torch.bfloat16, torch.float64)
            for value in (torch.inf, torch.nan)
        ),
        (dict(temperature="hot"), TypeError, "temperature: expected a number or a 0-dimensional tensor, got str"),
        (dict(backend="cuda"), ValueError, "backend: expected one of"),
        (dict(backend="triton"), RuntimeError, "backend: 'triton' runs on CUDA tensors"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        mgt_kernels.sample_tokens(**(GOOD | change))


@pytest.mark.parametrize("layout", ["token_major", "position_major"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, "all -inf"])
def test_bad_logits_are_named(backend, value, layout):
    logits = torch.randn(3, 40, 5000)
    if value == "all -inf":
        logits[1, 33] = -torch.inf
    else:
        logits[1, 33, 4321] = value
    logits[2, 5, 0] = torch.nan
    tokens = torch.full((3, 40), 5000)
    if layout == "position_major":
        logits = position_major(logits)
    args = dict(mask_token_id=5000, seed=0, step=0, backend=backend)
    with pytest.raises(ValueError, match="logits: sample 1, position 33 holds NaN or"):
        mgt_kernels.sample_tokens(logits, tokens, **args)
    with pytest.raises(ValueError, match="logits: sample 1, position 33 holds NaN or"):
        mgt_kernels.sample_tokens(logits, tokens, uncond_logits=torch.zeros_like(logits), guidance_scale=3.0, **args)
    tokens[1, 33] = 0
    tokens[2, 5] = 0
    mgt_kernels.sample_tokens(logits, tokens, **args)


ISA_FROM_THE_ENVIRONMENT = """
import os, torch, mgt_kernels
arguments = dict(logits=torch.zeros(1, 2, 5), tokens=torch.full((1, 2), 5), mask_token_id=5, seed=0, step=0)
try:
    mgt_kernels.sample_tokens(**arguments)
except RuntimeError as error:
    print(error)
else:
    print(mgt_kernels.info()["isa"])
"""


@pytest.mark.parametrize("name, printed", [("avx1024", "MGT_ISA=avx1024"), ("scalar", "scalar")])
def test_the_environment_names_an_isa(name, printed):
    # a process of its own, because the variable is read once
    command = [sys.executable, "-c", ISA_FROM_THE_ENVIRONMENT]
    done = subprocess.run(command, env={**os.environ, "MGT_ISA": name}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(printed)
