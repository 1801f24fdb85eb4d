"""Differential sampling, masked Z-Sampling, momentum and skipping in `generate`."""

import itertools
import math

import numpy as np
import pytest
import torch

from mgt_kernels import remask_tokens
from mgt_sampler import Differential, ZSampling, generate
from mgt_sampler.schedules import mask_lens
from mgt_sampler.techniques import Extrapolation, guided_logits

N, V, MASK, NUM_CLASSES = 64, 8, 8, 3


class TinyModel:
    """Logits from tables by class, neighbours and masked count; remembers what it was called with."""

    codebook_size, mask_token_id = V, MASK

    def __init__(self, num_tokens=N):
        self.num_tokens = num_tokens
        generator = torch.Generator().manual_seed(0)
        self.by_class = torch.randn(NUM_CLASSES + 1, num_tokens, V, generator=generator)
        self.by_neighbour = torch.randn(2, V + 1, V, generator=generator)
        # without it a position may see the same logits twice, and the ranks of equal divergences are rounding's
        self.by_count = torch.randn(num_tokens + 1, V, generator=generator)
        self.tokens, self.conditional = [], []

    def predict_logits(self, tokens, condition):
        self.tokens.append(tokens.clone())
        self.conditional.append(condition is not None)
        if condition is None:
            condition = torch.full((len(tokens),), NUM_CLASSES)
        left, right = self.by_neighbour
        count = self.by_count[(tokens == MASK).sum(1)][:, None]
        return self.by_class[condition] + left[tokens.roll(1, 1)] + right[tokens.roll(-1, 1)] + count

    def decode(self, tokens):
        return (tokens / (V - 1)).view(len(tokens), 1, 1, -1)

    @property
    def masked_counts(self):
        return [(tokens == MASK).sum(1).tolist() for tokens in self.tokens]


@pytest.fixture
def model():
    return TinyModel()


def sample(model, **kwargs):
    return generate(model, **{"progress": False, "labels": [0, 1, 2], "num_inference_steps": 5, **kwargs})


EVERYTHING = {
    "noise_scale": "abs_cos:1",
    "guidance_scale": (1.0, 3.0),
    "differential": Differential(),
    "z_sampling": ZSampling(0.5),
    "momentum": 0.2,
    "skip": [2],
}
TECHNIQUES = {
    "noise": {"noise_scale": "abs_cos:2"},
    "differential": {"differential": Differential()},
    "differential official": {"differential": Differential(0.5, "official")},
    "differential aliased": {"differential": Differential(0.75, "official", aliased_history=True)},
    "Z": {"z_sampling": ZSampling()},
    "Z official": {"z_sampling": ZSampling(1.0, "official"), "guidance_scale": 2.0},
    "Z random": {"z_sampling": ZSampling(variant="random")},
    "Z at some steps": {"z_sampling": ZSampling(1.5, steps=[0, 3])},
    "momentum": {"momentum": 0.3, "guidance_scale": 2.0},
    "skip": {"momentum": (0.3, 0.1), "skip": [1, 4]},
    "everything": EVERYTHING,
}


@pytest.fixture(params=TECHNIQUES.values(), ids=TECHNIQUES.keys())
def technique(request):
    return request.param


def half_known():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (3, N), generator=generator)
    for row, num_masked in zip(tokens, (2, 30, N), strict=True):
        row[torch.randperm(N, generator=generator)[:num_masked]] = MASK
    return tokens


class TestEveryTechnique:
    def test_a_sample_alone_equals_itself_in_a_batch(self, model, technique):
        tokens = half_known()
        batch = sample(model, tokens=tokens, **technique)
        for i in range(3):
            alone = sample(model, labels=[i], tokens=tokens[i : i + 1], seed=batch.seed[i : i + 1], **technique)
            assert torch.equal(alone.tokens[0], batch.tokens[i])

    def test_every_backend_draws_the_same(self, model, technique, backend):
        assert torch.equal(
            sample(model, backend=backend, **technique).tokens, sample(model, backend="scalar", **technique).tokens
        )

    def test_known_tokens_stay_and_everything_is_drawn(self, model, technique):
        tokens = half_known()
        output = sample(model, tokens=tokens, **technique).tokens
        known = tokens != MASK
        assert torch.equal(output[known], tokens[known]) and (output < V).all()

    def test_it_changes_something(self, model, technique):
        plain = {"guidance_scale": technique.get("guidance_scale", 1.0)}
        assert not torch.equal(sample(model, **technique).tokens, sample(model, **plain).tokens)

    def test_nothing_is_left_for_the_next_image(self, model, technique):
        first, second = (sample(model, seed=seed, **technique).tokens for seed in (1, 2))
        again, fresh = (sample(TinyModel(), seed=seed, **technique).tokens for seed in (2, 1))
        assert torch.equal(first, fresh) and torch.equal(second, again)

    @pytest.mark.parametrize("num_inference_steps", [1, 2, 3])
    def test_few_steps(self, model, num_inference_steps):
        output = sample(model, num_inference_steps=num_inference_steps, **{**EVERYTHING, "skip": []}, labels=[0, 1, 2])
        assert (output.tokens < V).all()

    def test_the_model_calls_are_counted(self, model, technique):
        assert sample(model, **technique).model_calls == len(model.tokens)


class TestDifferential:
    def test_share_0_draws_what_is_drawn_without_and_measures_the_divergence(self, model):
        seen = []
        plain = sample(model, noise_scale=1.0, guidance_scale=2.0)
        measured = sample(
            model, noise_scale=1.0, guidance_scale=2.0, differential=Differential(0.0), callback=seen.append
        )
        assert torch.equal(plain.tokens, measured.tokens)
        assert (seen[0].divergence == math.inf).all()
        for before, after in itertools.pairwise(seen):
            assert torch.equal(after.divergence.isfinite(), before.mask)

    def test_a_truth_value_of_numpy_s(self):
        assert Differential(0.5, "official", np.bool_(True)) == Differential(0.5, "official", True)

    def test_divergence_is_none_without(self, model):
        seen = []
        sample(model, callback=seen.append)
        assert all(step.divergence is None for step in seen)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"share": 1.5}, ValueError, r"^differential.share: expected a number in \[0, 1\], got 1.5"),
            ({"share": math.nan}, ValueError, r"^differential.share: expected a finite number, got nan"),
            ({"share": "1"}, TypeError, r"^differential.share: expected a number, got str"),
            ({"variant": "best"}, ValueError, r"^differential.variant: expected one of .*, got 'best'"),
            ({"aliased_history": True}, ValueError, r"^differential.aliased_history: expected False"),
            ({"aliased_history": 1}, TypeError, r"^differential.aliased_history: expected a bool, got int"),
        ],
    )
    def test_bad_arguments(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            Differential(**kwargs)


class TestZSampling:
    def test_masked_counts_are_the_published_ones(self):
        model = TinyModel(256)
        sample(model, labels=[0], z_sampling=ZSampling(variant="official"))
        # what each model call sees: forward, inverse, forward of every step but the last
        after = [count for [count] in model.masked_counts[1:]]
        assert after[:5] == [243, 255, 243, 207, 242]
        assert after == [243, 255, 243, 207, 242, 207, 150, 206, 150, 79, 149, 79]

    def test_each_sample_has_counts_of_its_own(self, model):
        tokens, seen = half_known(), []
        sample(model, tokens=tokens, z_sampling=ZSampling(), callback=seen.append)
        for i, num_masked in enumerate((2, 30, N)):
            lens = mask_lens("cosine", 5, num_masked)
            first_draws = [int(step.mask[i].sum()) for step in seen if step.draw == 2 * step.step]
            assert first_draws == lens

    @pytest.mark.parametrize("variant", ["paper", "official", "random"])
    def test_a_batch_of_eight_with_masks_of_their_own(self, model, variant):
        generator, masked = torch.Generator().manual_seed(2), (0, 1, 2, 3, 17, 40, 63, N)
        tokens = torch.randint(0, V, (8, N), generator=generator)
        for row, num_masked in zip(tokens, masked, strict=True):
            row[torch.randperm(N, generator=generator)[:num_masked]] = MASK
        labels = [i % 3 for i in range(8)]
        arguments = {"z_sampling": ZSampling(variant=variant), "differential": Differential(), "guidance_scale": 2.0}
        batch = sample(model, tokens=tokens, labels=labels, seed=5, **arguments)
        # in a second forward pass one position less is masked than in the first, where there was a choice
        seen = [
            counts for counts, conditional in zip(model.masked_counts, model.conditional, strict=True) if conditional
        ]
        for first, again in zip(seen[:-1:2], seen[1:-1:2], strict=True):
            assert again == [max(before - 1, min(before, 1)) for before in first]
        for i in range(8):
            one = slice(i, i + 1)
            alone = sample(model, tokens=tokens[one], labels=labels[one], seed=batch.seed[one], **arguments)
            assert torch.equal(alone.tokens, batch.tokens[one])
            known = tokens[i] != MASK
            assert torch.equal(batch.tokens[i, known], tokens[i, known])

    def test_calls_are_forward_inverse_forward(self, model):
        sample(model, num_inference_steps=2, guidance_scale=2.0, z_sampling=ZSampling())
        assert model.conditional == [True, False, False, True, False, True, False]
        model.conditional.clear()
        sample(model, num_inference_steps=2, guidance_scale=2.0, z_sampling=ZSampling(1.0))
        assert model.conditional == [True, False, True, True, False, True, False]
        model.conditional.clear()
        sample(model, num_inference_steps=2, z_sampling=ZSampling(2.0))
        assert model.conditional == [True, True, False, True, True]
        model.conditional.clear()
        sample(model, num_inference_steps=2, z_sampling=ZSampling(variant="random"))
        assert model.conditional == [True, True, True]

    @pytest.mark.parametrize("variant", ["paper", "official"])
    def test_the_inverse_pass_masks_what_the_op_says(self, variant):
        model = TinyModel()
        sample(model, z_sampling=ZSampling(variant=variant, steps=[1]))
        # calls: step 0, step 1, its inverse pass, step 1 again
        before, inverse, again = model.tokens[1:4]
        logits = TinyModel().predict_logits(inverse, None)
        remask_len = (before == MASK).sum(1) - 1 - (inverse == MASK).sum(1)
        expected, _ = remask_tokens(
            logits, inverse, remask_len, variant=variant, mask_token_id=MASK, seed=0, step=0, backend="reference"
        )
        assert torch.equal(again, expected)

    def test_the_second_forward_pass_draws_anew(self, model):
        seen = []
        sample(model, z_sampling=ZSampling(steps=[1]), callback=seen.append)
        assert [(step.step, step.draw) for step in seen] == [(0, 0), (1, 1), (1, 2), (2, 3), (3, 4), (4, 5)]

    def test_only_the_steps_asked_for(self, model):
        assert sample(model, z_sampling=ZSampling(steps=[])).model_calls == 5
        assert sample(model, z_sampling=ZSampling(steps=[0, 2])).model_calls == 9
        assert sample(model, z_sampling=ZSampling()).model_calls == 13
        assert sample(model, z_sampling=ZSampling(), skip=[1, 2, 3]).model_calls == 4

    def test_without_labels(self, model):
        assert (sample(model, labels=None, z_sampling=ZSampling()).tokens < V).all()
        with pytest.raises(ValueError, match=r"^z_sampling.inversion_guidance_scale: guidance needs labels, got 2.0"):
            sample(model, labels=None, z_sampling=ZSampling(2.0))

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"inversion_guidance_scale": math.nan}, ValueError, "inversion_guidance_scale: .*finite number, got nan"),
            ({"inversion_guidance_scale": None}, TypeError, "inversion_guidance_scale: .*a number, got NoneType"),
            ({"variant": "worst"}, ValueError, "variant: expected one of .*, got 'worst'"),
            ({"steps": 3}, TypeError, "steps: expected a collection of ints, got int"),
            ({"steps": [0.5]}, TypeError, "steps: expected a collection of ints, got 0.5 in it"),
            ({"steps": [-1]}, ValueError, "steps: expected steps at least 0, got -1"),
        ],
    )
    def test_bad_arguments(self, kwargs, error, message):
        with pytest.raises(error, match=f"^z_sampling.{message}"):
            ZSampling(**kwargs)

    @pytest.mark.parametrize("step", [4, 9])
    def test_the_last_step_cannot(self, model, step):
        with pytest.raises(ValueError, match=rf"^z_sampling.steps: expected steps within \[0, 3\], got {step}"):
            sample(model, z_sampling=ZSampling(steps=[step]))


class TestMomentum:
    def test_extrapolation(self):
        extrapolation = Extrapolation()
        first, second = torch.tensor([[[1.0, 2.0, -math.inf]]]), torch.tensor([[[3.0, -math.inf, 1.0]]])
        extrapolation.observe(first)
        assert torch.equal(extrapolation.logits(0.5), first)
        extrapolation.observe(second)
        assert torch.equal(extrapolation.logits(0.5), torch.tensor([[[4.0, -math.inf, 1.0]]]))
        assert torch.equal(extrapolation.logits(0.0), second)
        extrapolation.reset()
        assert extrapolation.last is None

    def test_guided_logits(self):
        conditional = torch.tensor([[[1.0, -math.inf, 2.0]]], dtype=torch.bfloat16)
        unconditional = torch.tensor([[[0.5, 1.0, -math.inf]]], dtype=torch.bfloat16)
        assert torch.equal(
            guided_logits(conditional, unconditional, 3.0), torch.tensor([[[2.0, -math.inf, -math.inf]]])
        )
        alone = guided_logits(conditional.float(), None, 1.0)
        alone.zero_()
        assert conditional[0, 0, 0] == 1

    def test_it_is_what_a_model_of_extrapolated_logits_gives(self, model):
        class Extrapolated(TinyModel):
            last = None

            def predict_logits(self, tokens, condition):
                logits = super().predict_logits(tokens, condition)
                last, self.last = self.last, logits
                return logits if last is None else logits + 0.3 * (logits - last)

        assert torch.equal(sample(model, momentum=0.3).tokens, sample(Extrapolated()).tokens)

    def test_skipped_steps_do_without_the_model(self, model):
        output = sample(model, num_inference_steps=6, guidance_scale=2.0, skip=[1, 3, 5])
        assert output.model_calls == 6 and (output.tokens < V).all()

    @pytest.mark.parametrize(
        ("skip", "error", "message"),
        [
            ([0], ValueError, r"expected steps within \[1, 4\], got 0"),
            ([5], ValueError, r"expected steps within \[1, 4\], got 5"),
            ("12", TypeError, "expected a collection of ints, got str"),
            ([True], TypeError, "expected a collection of ints, got True in it"),
        ],
    )
    def test_bad_skip(self, model, skip, error, message):
        with pytest.raises(error, match=f"^skip: {message}"):
            sample(model, skip=skip)

    def test_bad_momentum(self, model):
        with pytest.raises(ValueError, match=r"^momentum: expected a finite number at every step, got nan"):
            sample(model, momentum=math.nan)
