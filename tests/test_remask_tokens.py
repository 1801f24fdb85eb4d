"""remask_tokens: scores against the oracle, exact counts and ties, backends alike, the law of the random choice."""

import math

import pytest
import torch
from compare import assert_no_worse_than_naive
from scipy import stats

import mgt_kernels
from mgt_kernels import cpu, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([3, -(2**62) - 9, 5])
VARIANTS = ["paper", "official"]


def make_case(num_tokens=1000, positions=37, dtype=torch.float32, std=3.0, seed=0):
    """Both halves of the logits, and tokens of which every fifth is masked."""
    generator = torch.Generator().manual_seed(seed + num_tokens)
    cond, uncond = (torch.randn(2, 3, positions, num_tokens, generator=generator) * std).to(dtype)
    tokens = torch.randint(0, num_tokens, (3, positions), generator=generator)
    tokens[:, ::5] = num_tokens
    return cond, uncond, tokens


def remask(logits, tokens, remask_len=0, **arguments):
    settings = {"mask_token_id": 1000, "seed": SEED, "step": 4}
    return mgt_kernels.remask_tokens(logits, tokens, remask_len, **{**settings, **arguments})


def assert_lowest_are_masked(remasked, tokens, score, remask_len, mask_token_id):
    """The remask_len lowest scores of each sample, the lower position first among ties."""
    order = score.sort(dim=-1, stable=True).indices
    for row, before, ranked, count in zip(remasked, tokens, order, remask_len.tolist(), strict=True):
        expected = before.clone()
        expected[ranked[:count]] = mask_token_id
        assert torch.equal(row, expected)


class TestScores:
    @pytest.mark.parametrize("num_tokens", [1, 7, 16, 33, 513, 2049, 8193])
    @pytest.mark.parametrize("layout", ["token_major", "position_major"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_equal_the_oracle(self, num_tokens, layout, dtype, variant):
        cond, uncond, tokens = make_case(num_tokens, dtype=dtype)
        if layout == "position_major":
            cond, uncond = (half.mT.contiguous().mT for half in (cond, uncond))
        for half, scale in ((None, 1.0), (uncond, 2.5)):
            settings = {"uncond_logits": half, "guidance_scale": scale, "variant": variant, "mask_token_id": num_tokens}
            remask_len = torch.tensor([0, 5, 29])
            remasked, score = remask(cond, tokens, remask_len, **settings)
            truth = reference.remask_score(cond, tokens, seed=SEED, step=4, **settings)
            known = tokens != num_tokens
            assert (score[~known] == math.inf).all()
            guided = cond.float() if half is None else half.float() + scale * (cond.float() - half.float())
            log_p = guided.log_softmax(-1)
            naive = -log_p.amax(-1)
            if variant == "paper":
                naive = log_p.gather(-1, torch.where(known, tokens, 0)[..., None])[..., 0]
            assert_no_worse_than_naive(score[known], truth[known], naive[known])
            assert_lowest_are_masked(remasked, tokens, score, remask_len, num_tokens)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_instruction_sets_agree_bit_for_bit(self, isa, variant):
        cond, uncond, tokens = make_case()
        settings = {"uncond_logits": uncond, "guidance_scale": 3.0, "variant": variant, "remask_len": 11}
        for ours, scalar in zip(
            remask(cond, tokens, backend=isa, **settings),
            remask(cond, tokens, backend="scalar", **settings),
            strict=True,
        ):
            assert torch.equal(ours, scalar)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_peaked_one_hot_and_forbidden(self, backend, variant):
        cond, _, tokens = make_case(std=300.0)
        cond[0, 1] = -math.inf
        cond[0, 1, 17] = 2.0
        tokens[0, 1], tokens[0, 2], tokens[0, 3] = 17, 5, 6
        cond[0, 2, 5] = -math.inf
        cond[0, 3] = 0.0
        uncond = cond.flip(-1).clone()
        uncond[0, 1:4] = cond[0, 1:4]
        for half in (None, uncond):
            settings = {"uncond_logits": half, "guidance_scale": 2.0, "variant": variant}
            remasked, score = remask(cond, tokens, 1, backend=backend, **settings)
            truth = reference.remask_score(cond, tokens, seed=SEED, step=4, mask_token_id=1000, **settings)
            known = tokens != 1000
            assert torch.allclose(score[known].double(), truth[known], atol=1e-4, rtol=1e-6)
            assert score[0, 1] == 0
            if variant == "paper":
                # a token that the model forbids goes first
                assert score[0, 2] == -math.inf and remasked[0, 2] == 1000
                assert score[0, 3] == pytest.approx(-math.log(1000), abs=1e-5)
            assert not score.isnan().any()

    def test_the_mask_token_is_no_choice_of_the_model(self, backend):
        cond, _, tokens = make_case(num_tokens=8)
        tokens = torch.where(tokens == 8, 3, tokens.clamp(max=2))
        cond[..., 3] = 50.0
        _, score = remask(cond, tokens, mask_token_id=3, backend=backend)
        truth = reference.remask_score(cond, tokens, variant="paper", seed=SEED, step=4, mask_token_id=3)
        known = tokens != 3
        assert torch.allclose(score[known].double(), truth[known], atol=1e-5, rtol=0)

    def test_official_takes_the_largest_of_the_max_probabilities(self, backend):
        """The published code's choice: topk of the largest probabilities among the known."""
        cond, _, tokens = make_case()
        largest = cond.softmax(-1).amax(-1).masked_fill(tokens == 1000, -1.0)
        expected = tokens.scatter(1, largest.topk(6).indices, 1000)
        assert torch.equal(remask(cond, tokens, 6, variant="official", backend=backend)[0], expected)


class TestChoice:
    def test_ties_mask_lower_positions_first(self, backend):
        tokens = torch.tensor([[1, 1000, 1, 1, 2]])
        for variant in VARIANTS:
            for count, expected in enumerate(([1, 1000, 1, 1, 2], [1000, 1000, 1, 1, 2], [1000, 1000, 1000, 1, 2])):
                remasked, _ = remask(torch.zeros(1, 5, 64), tokens, count, variant=variant, seed=0, backend=backend)
                assert remasked.tolist() == [expected]

    @pytest.mark.parametrize("variant", [*VARIANTS, "random"])
    def test_counts_per_sample_and_what_is_kept(self, backend, variant):
        cond, _, tokens = make_case()
        keep = torch.zeros_like(tokens, dtype=torch.bool)
        keep[1, 10:] = True
        remask_len = torch.tensor([0, 8, 29])
        remasked, score = remask(cond, tokens, remask_len, variant=variant, keep=keep, backend=backend)
        assert ((remasked == 1000).sum(1) - (tokens == 1000).sum(1)).tolist() == [0, 8, 29]
        assert torch.equal(remasked[1, 10:], tokens[1, 10:]) and (score[1, 10:] == math.inf).all()
        with pytest.raises(ValueError, match=r"^remask_len: sample 1 is 9; expected a value within \[0, 8\]"):
            remask(cond, tokens, torch.tensor([0, 9, 0]), variant=variant, keep=keep, backend=backend)

    @pytest.mark.parametrize("variant", [*VARIANTS, "random"])
    def test_a_sample_does_not_depend_on_its_batch(self, backend, variant):
        cond, uncond, tokens = make_case()
        settings = {"guidance_scale": 2.0, "variant": variant, "backend": backend}
        remasked, score = remask(cond, tokens, 7, uncond_logits=uncond, **settings)
        for i in range(3):
            one = slice(i, i + 1)
            alone = remask(cond[one], tokens[one], 7, uncond_logits=uncond[one], seed=SEED[one], **settings)
            assert torch.equal(alone[0], remasked[one]) and torch.equal(alone[1], score[one])

    def test_random_is_a_function_of_seed_step_and_position(self):
        tokens = torch.zeros(3, 5, dtype=torch.int64)
        _, score = remask(None, tokens, 0, variant="random")
        # stream 3, and word 0 of block 0 of each position
        words = [[int(cpu.philox(seed, i, 4, 3, 0, 1)[0]) for i in range(5)] for seed in SEED.tolist()]
        uniform = (torch.tensor(words).double() + 0.5) / 2**32
        torch.testing.assert_close(score, (-torch.log(-torch.log1p(-uniform))).float())

    def test_random_is_uniform(self):
        tokens = torch.zeros(20000, 6, dtype=torch.int64)
        tokens[:, 2] = 1000
        settings = {"variant": "random", "seed": torch.arange(20000)}
        remasked, _ = remask(None, tokens, 2, **settings)
        masked = (remasked == 1000).nonzero()
        positions = masked[:, 1].view(20000, 3)
        # the pair that was chosen, of ten
        pairs = torch.stack([row[row != 2] for row in positions])
        counts = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36)
        assert (counts > 0).sum() == 10
        assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3
        other, _ = remask(None, tokens, 2, **{**settings, "step": 5})
        assert 0.85 < (other != remasked).any(-1).float().mean() < 0.95

    def test_inputs_are_not_written(self, backend):
        cond, uncond, tokens = make_case()
        copies = cond.clone(), uncond.clone(), tokens.clone()
        remask(cond, tokens, 5, uncond_logits=uncond, guidance_scale=2.0, backend=backend)
        assert all(map(torch.equal, copies, (cond, uncond, tokens)))

    def test_nothing_known_and_no_samples(self, backend):
        cond, _, tokens = make_case()
        remasked, score = remask(cond, torch.full_like(tokens, 1000), 0, backend=backend)
        assert (remasked == 1000).all() and (score == math.inf).all()
        assert remask(cond[:0], tokens[:0], 0, seed=SEED[:0], backend=backend)[0].shape == (0, 37)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"variant": "worst"}, ValueError, r"^variant: expected one of \('paper', 'official', 'random'\)"),
            ({"logits": None}, ValueError, "^logits: expected a tensor with variant 'paper', got None"),
            ({"guidance_scale": math.nan}, ValueError, "^guidance_scale: expected a finite number, got nan"),
            ({"tokens": torch.zeros(3, 37)}, TypeError, "^tokens: expected dtype torch.int64"),
            ({"tokens": torch.zeros(3, 36, dtype=torch.int64)}, ValueError, r"^tokens: expected shape \(3, 37\)"),
            ({"keep": torch.zeros(3, 37)}, TypeError, "^keep: expected dtype torch.bool"),
            ({"keep": torch.zeros(3, 7, dtype=torch.bool)}, ValueError, r"^keep: expected shape \(3, 37\)"),
            ({"remask_len": torch.tensor([1, 2])}, ValueError, r"^remask_len: expected shape \(3,\)"),
            ({"remask_len": -1}, ValueError, r"^remask_len: sample 0 is -1; expected a value within \[0, 29\]"),
            ({"remask_len": 30}, ValueError, r"^remask_len: sample 0 is 30; expected a value within \[0, 29\]"),
            ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"^seed: expected shape \(3,\)"),
            ({"step": -1}, ValueError, r"^step: expected a value within \[0, 2\^32\), got -1"),
            ({"backend": "abacus"}, ValueError, "^backend: expected one of"),
        ],
    )
    def test_are_named(self, change, error, message):
        cond, _, tokens = make_case()
        arguments = {"logits": cond, "tokens": tokens, "remask_len": 3, **change}
        with pytest.raises(error, match=message):
            remask(**arguments)

    def test_a_token_outside_the_codebook(self, backend):
        cond, _, tokens = make_case()
        tokens[1, 4] = 1001
        with pytest.raises(
            ValueError, match=r"^tokens: sample 1, position 4 is 1001; expected an id within \[0, 1000\)"
        ):
            remask(cond, tokens, 3, backend=backend)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_of_known_positions(self, backend, value):
        cond, _, tokens = make_case()
        cond[1, 5, 3] = value
        # a masked one is not read
        remask(cond, tokens, 3, backend=backend)
        cond[2, 6, 900] = value
        for variant in VARIANTS:
            with pytest.raises(ValueError, match=r"^logits: sample 2, position 6 holds NaN"):
                remask(cond, tokens, 3, variant=variant, backend=backend)
