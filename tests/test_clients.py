"""`accelerate` and `restore` on the code of other projects, with tiny random weights."""

import copy
import os
import pickle
import types

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from tiny import randn, seeded
from typer.testing import CliRunner

import mgt_kernels
from mgt_sampler import MGTScheduler, accelerate, cli, restore
from mgt_sampler.clients import CLIENTS, Acceleration, client_of
from mgt_sampler.schedules import mask_lens

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


KINDS = {
    "AmusedPipeline": {"height": 16, "width": 16},
    "AmusedImg2ImgPipeline": {"image": torch.rand(2, 3, 16, 16, generator=seeded(3)), "strength": 0.5},
    "AmusedInpaintPipeline": {
        "image": torch.rand(2, 3, 16, 16, generator=seeded(3)),
        "mask_image": (torch.rand(2, 1, 16, 16, generator=seeded(4)) < 0.3).float(),
        "strength": 1.0,
    },
}


class TestAmused:
    """The three pipelines of diffusers."""

    @staticmethod
    def pipeline(kind, transformer=None):
        parts = tiny.amused_parts()
        if transformer is not None:
            parts["transformer"] = transformer
        pipe = getattr(diffusers, kind)(scheduler=diffusers.AmusedScheduler(mask_token_id=31), **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @classmethod
    def call(cls, pipe, generator, batch_size=2, rows=slice(None), **options):
        embeddings = {
            "prompt_embeds": randn(batch_size, 8)[rows],
            "encoder_hidden_states": randn(batch_size, 5, 8)[rows],
            "negative_prompt_embeds": torch.zeros(batch_size, 8)[rows],
            "negative_encoder_hidden_states": torch.zeros(batch_size, 5, 8)[rows],
        }
        kind = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in KINDS[type(pipe).__name__].items()}
        settings = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent", **kind, **options}
        counts = []
        settings.setdefault("callback", lambda i, t, tokens: counts.append((tokens == 31).flatten(1).sum(1).tolist()))
        return pipe(**embeddings, generator=generator, **settings).images, counts

    @pytest.mark.parametrize("kind", KINDS)
    def test_as_many_are_masked_and_known_tokens_stay(self, kind):
        pipe = self.pipeline(kind)
        before, counts = self.call(pipe, seeded(0))
        accelerate(pipe)
        after, ours = self.call(pipe, seeded(0))
        assert ours == counts and (after.shape, after.dtype) == (before.shape, before.dtype)
        assert after.max() < 8 and not torch.equal(after, before)
        if kind == "AmusedPipeline":
            assert [c[0] for c in ours] == mask_lens("cosine", 6, 256)
        if kind == "AmusedInpaintPipeline":
            # what is not painted is known
            pixels = KINDS[kind]["mask_image"].view(2, 16, 16) < 1
            assert torch.equal(after[pixels], before[pixels])

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_original_comes_back(self, kind):
        pipe = self.pipeline(kind)
        scheduler, state = pipe.scheduler, set(vars(pipe))
        before, _ = self.call(pipe, seeded(0))
        done = accelerate(pipe)
        assert isinstance(pipe.scheduler, MGTScheduler) and accelerate(pipe) is done
        assert done.replaced == ("scheduler",) and "aMUSEd: scheduler" in str(done)
        assert restore(pipe) is pipe and pipe.scheduler is scheduler and set(vars(pipe)) == state
        assert torch.equal(self.call(pipe, seeded(0))[0], before)
        restore(pipe)

    def test_a_sample_is_a_function_of_its_own_seed(self):
        pipe = self.pipeline("AmusedPipeline")
        accelerate(pipe)
        both, _ = self.call(pipe, [seeded(7), seeded(8)])
        alone, _ = self.call(pipe, [seeded(8)], rows=slice(1, 2))
        assert torch.equal(both[1:], alone)

    def test_a_one_hot_network_gives_the_originals_tokens(self):
        wanted = torch.randint(8, (1, 16, 16), generator=seeded(5))

        class OneHot(torch.nn.Module):
            config = types.SimpleNamespace(sample_size=32, cond_embed_dim=8, hidden_size=8, add_time_embeds=False)
            dtype = torch.float32

            def forward(self, tokens, **inputs):
                found = torch.full((len(tokens), 8, 16, 16), -1e4)
                return found.scatter(1, wanted.expand(len(tokens), -1, -1)[:, None], 0.0)

        pipe = self.pipeline("AmusedPipeline")
        # a module that is registered may be replaced by any other
        pipe.transformer.forward = OneHot().forward
        before, _ = self.call(pipe, seeded(0))
        accelerate(pipe)
        after, _ = self.call(pipe, seeded(0))
        assert torch.equal(after, before) and torch.equal(after[0], wanted[0])

    def test_copies_and_pickles(self):
        pipe = self.pipeline("AmusedPipeline")
        original, _ = self.call(pipe, seeded(0))
        accelerate(pipe)
        expected, _ = self.call(pipe, seeded(0))
        for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
            assert torch.equal(self.call(other, seeded(0))[0], expected)
            assert torch.equal(self.call(restore(other), seeded(0))[0], original)
        assert isinstance(pipe.scheduler, MGTScheduler)

    def test_what_somebody_set_since_stays(self):
        pipe = self.pipeline("AmusedPipeline")
        accelerate(pipe)
        pipe.scheduler = own = diffusers.AmusedScheduler(mask_token_id=31, masking_schedule="linear")
        assert restore(pipe).scheduler is own

    def test_a_scheduler_of_ours_stays(self):
        pipe = self.pipeline("AmusedPipeline")
        pipe.scheduler = ours = MGTScheduler(mask_token_id=31, noise_scale=1.0)
        assert accelerate(pipe).replaced == () and pipe.scheduler is ours
        assert restore(pipe).scheduler is ours

    def test_another_scheduler_is_refused(self):
        pipe = self.pipeline("AmusedPipeline")
        pipe.scheduler = diffusers.DDIMScheduler()
        with pytest.raises(TypeError, match=r"obj\.scheduler: expected an AmusedScheduler.*got DDIMScheduler"):
            accelerate(pipe)
        assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)


def test_meissonic_has_a_scheduler_of_the_same_kind():
    # a stand-in: the project is on no registry
    scheduler = type("Scheduler", (diffusers.AmusedScheduler,), {"__module__": "src.scheduler"})
    pipe = type("Pipeline", (), {"__module__": "src.pipeline"})()
    pipe.scheduler = before = scheduler(mask_token_id=8255)
    assert accelerate(pipe).client.name == "Meissonic"
    assert isinstance(pipe.scheduler, MGTScheduler) and pipe.scheduler.config.mask_token_id == 8255
    assert restore(pipe).scheduler is before


@pytest.fixture(scope="module")
def pipe():
    return tiny.llada2_pipeline()


class TestLLaDA2:
    """The pipeline of diffusers; test_frameworks.py has its scheduler."""

    @staticmethod
    def call(pipe, generator=None, prompt=None, **options):
        prompt = torch.randint(tiny.LLADA2_MASK, (3, 5), generator=seeded(3)) if prompt is None else prompt
        counts = []

        def count(pipe, step, timestep, kwargs):
            counts.append((kwargs["block_x"][:, -8:] == tiny.LLADA2_MASK).sum(1).tolist())
            return kwargs

        settings = {"gen_length": 16, "num_inference_steps": 4, "threshold": 2.0, "editing_threshold": None, **options}
        tokens = pipe(
            input_ids=prompt, mask_token_id=tiny.LLADA2_MASK, output_type="seq", generator=generator,
            callback_on_step_end=count, **settings,
        ).sequences  # fmt: skip
        return tokens, counts

    @pytest.mark.parametrize("options", [{"threshold": 0.3}, {"threshold": 2.0}, {"editing_threshold": 0.3}])
    def test_greedy_tokens_are_equal(self, pipe, options):
        restore(pipe)
        before = self.call(pipe, temperature=0.0, **options)
        accelerate(pipe)
        after = self.call(pipe, temperature=0.0, **options)
        assert torch.equal(before[0], after[0]) and before[1] == after[1]
        assert len(before[0].unique()) > 5
        restore(pipe)

    def test_drawn_ones_have_as_many_masks(self, pipe):
        restore(pipe)
        before = self.call(pipe, seeded(0), temperature=1.0)
        accelerate(pipe)
        after = self.call(pipe, seeded(0), temperature=1.0)
        # the original may draw the mask, which then stays one
        assert after[1] == [[6, 6, 6], [4, 4, 4], [2, 2, 2], [0, 0, 0]] * 2 or before[1] == after[1]
        assert not torch.equal(before[0], after[0]) and (after[0] != tiny.LLADA2_MASK).all()
        assert torch.equal(restore(pipe) and self.call(pipe, seeded(0), temperature=1.0)[0], before[0])

    def test_a_sample_is_a_function_of_its_own_seed(self, pipe):
        accelerate(pipe)
        prompt = torch.randint(tiny.LLADA2_MASK, (2, 5), generator=seeded(3))
        options = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
        both, _ = self.call(pipe, [seeded(7), seeded(8)], prompt, **options)
        alone, _ = self.call(pipe, [seeded(8)], prompt[1:], **options)
        assert torch.equal(both[1:], alone) and not torch.equal(both[0], both[1])
        restore(pipe)

    def test_pickles(self, pipe):
        accelerate(pipe)
        expected = self.call(pipe, seeded(0), temperature=1.0)[0]
        other = pickle.loads(pickle.dumps(pipe))
        assert torch.equal(self.call(other, seeded(0), temperature=1.0)[0], expected)
        assert type(restore(other).scheduler) is diffusers.BlockRefinementScheduler
        restore(pipe)


@pytest.fixture(scope="module")
def model():
    if not (tiny.CLIENTS / "omnivoice").exists():
        pytest.skip(f"omnivoice is not in {tiny.CLIENTS}: make test installs it there")
    return tiny.omnivoice_model()


class TestOmniVoice:
    """The package omnivoice."""

    @pytest.mark.parametrize("guidance_scale", [0.0, 2.0, -0.5])
    @pytest.mark.parametrize("position_temperature", [0.0, 5.0])
    def test_greedy_tokens_are_equal(self, model, guidance_scale, position_temperature):
        options = {"guidance_scale": guidance_scale, "position_temperature": position_temperature}
        before = tiny.omnivoice_tokens(model, **options)
        done = accelerate(model)
        assert accelerate(model) is done and done.client.name == "OmniVoice"
        after = tiny.omnivoice_tokens(model, **options)
        restore(model)
        again = tiny.omnivoice_tokens(model, **options)
        for expected, found, restored in zip(before, after, again, strict=True):
            assert torch.equal(found, expected) and torch.equal(restored, expected)
            assert len(expected.unique()) > 5 and expected.max() < 32

    def test_scores_are_the_originals(self, model):
        config = tiny.omnivoice_module().OmniVoiceGenerationConfig()
        # the mask is likely: it counts in the sum
        logits = [randn(1, 4, 9, 33, seed=seed) for seed in (0, 1)]
        for half in logits:
            half[..., 32] += 4
        expected = model._predict_tokens_with_scoring(*logits, config)
        accelerate(model)
        found = model._predict_tokens_with_scoring(*logits, config)
        restore(model)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=0)
        without = mgt_kernels.sample_tokens(
            logits[0][0], torch.full((4, 9), 32), uncond_logits=logits[1][0], guidance_scale=3.0, mask_token_id=32,
            temperature=0.0, seed=0, step=0,
        )  # fmt: skip
        assert (without.logprob - expected[1]).max() > 0.1

    def test_classes_are_drawn_from_the_originals_distribution(self, model):
        # sixteen tokens, of which the largest two are kept
        logits = 2 * torch.randn(4, 17, generator=seeded(3))
        halves = [logits[:, None].expand(4, 3000, 17).contiguous()[None]] * 2
        config = tiny.omnivoice_module().OmniVoiceGenerationConfig(guidance_scale=0.0, class_temperature=0.7)
        mask = model.config.audio_mask_id
        model.config.audio_mask_id = 16
        accelerate(model)
        torch.manual_seed(0)
        drawn = model._predict_tokens_with_scoring(*halves, config)[0][0]
        again = model._predict_tokens_with_scoring(*halves, config)[0][0]
        restore(model)
        model.config.audio_mask_id = mask
        assert not torch.equal(drawn, again)
        for row, codebook in zip(logits, drawn, strict=True):
            best = row[:16].topk(2)
            observed = torch.stack([(codebook == i).sum() for i in best.indices]).double()
            assert observed.sum() == 3000
            probs = (best.values.double() / 0.7).softmax(0)
            assert stats.chisquare(observed, 3000 * probs).pvalue > 1e-3
            assert stats.chisquare(observed, 3000 * (best.values.double() / 1.2).softmax(0)).pvalue < 1e-3

    def test_copies(self, model):
        expected = tiny.omnivoice_tokens(model)
        accelerate(model)
        other = copy.deepcopy(model)
        restore(model)
        assert other._predict_tokens_with_scoring.args[0] is other
        assert all(map(torch.equal, tiny.omnivoice_tokens(other), expected))
        assert "_predict_tokens_with_scoring" not in vars(restore(other))


@pytest.fixture(scope="module")
def muse():
    if not (tiny.CLIENTS / "muse_maskgit_pytorch").exists():
        pytest.skip(f"muse_maskgit_pytorch is not in {tiny.CLIENTS}: make test installs it there")
    return tiny.muse_model()


class TestMuse:
    """The package muse-maskgit-pytorch."""

    @staticmethod
    def call(model, seed=0, texts=("a cat", "a dog"), **options):
        """The token ids that the decoder is given, and what the network was given in each step."""
        ids, given = [], []
        decode = model.vae.decode_from_ids
        handle = model.transformer.token_emb.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model.vae.decode_from_ids = lambda tokens: ids.append(tokens) or decode(tokens)
        torch.manual_seed(seed)
        try:
            images = model.generate(texts=list(texts), **{"timesteps": 6, **options})
        finally:
            model.vae.decode_from_ids = decode
            handle.remove()
        return images, ids[0], given

    @pytest.mark.parametrize("cond_scale", [1.0, 3.0])
    def test_greedy_images_are_equal(self, muse, cond_scale):
        before = self.call(muse, temperature=0.0, cond_scale=cond_scale)
        accelerate(muse)
        after = self.call(muse, temperature=0.0, cond_scale=cond_scale)
        restore(muse)
        again = self.call(muse, temperature=0.0, cond_scale=cond_scale)
        for other in (after, again):
            assert torch.equal(other[1], before[1])
            torch.testing.assert_close(other[0], before[0])
            # the same inputs, step by step
            assert len(other[2]) == len(before[2]) and all(map(torch.equal, other[2], before[2]))
        assert len(before[1].unique()) > 5

    def test_as_many_are_masked(self, muse):
        accelerate(muse)
        options = {"cond_scale": 1.0, "temperature": 8.0}
        _, ids, given = self.call(muse, **options)
        _, same, _ = self.call(muse, **options)
        _, other, _ = self.call(muse, 1, **options)
        restore(muse)
        assert [(tokens == 64).sum(1).tolist() for tokens in given] == [[n, n] for n in (16, 15, 12, 9, 4, 1)]
        assert torch.equal(ids, same) and not torch.equal(ids, other)

    def test_tokens_are_drawn_from_the_originals_distribution(self, muse):
        # one step of two: the last is greedy
        texts = ["a cat"] * 2000
        counts = []
        for prepare, temperature in ((restore, 3.0), (accelerate, 3.0), (restore, 3.0), (accelerate, 2.0)):
            prepare(muse)
            given = self.call(muse, len(counts), texts, timesteps=2, cond_scale=1.0, temperature=temperature)[2]
            counts.append(given[1].flatten().bincount(minlength=65)[:64])
        restore(muse)

        def pvalue(one, other):
            table = torch.stack([counts[one], counts[other]])
            return stats.chi2_contingency(table[:, table.sum(0) > 10].numpy()).pvalue

        # which tokens stay is up to their scores, so they are not quite independent
        assert pvalue(0, 2) > 1e-3 and pvalue(0, 1) > 1e-3 and pvalue(0, 3) < 1e-6

    def test_negative_texts_take_the_place_of_the_other_half(self, muse):
        with pytest.raises(TypeError):
            muse.generate(texts=["a cat"], negative_texts=["a dog"], timesteps=2)
        accelerate(muse)
        images, ids, _ = self.call(muse, texts=["a cat"], negative_texts=["a dog"])
        _, without, _ = self.call(muse, texts=["a cat"])
        restore(muse)
        assert images.shape == (1, 3, 16, 16) and not torch.equal(ids, without)

    def test_a_token_critic_scores(self):
        pytest.importorskip("diffusers")
        if not (tiny.CLIENTS / "muse_maskgit_pytorch").exists():
            pytest.skip("make test installs it")
        model = tiny.muse_model(self_token_critic=True)
        options = {"temperature": 0.0, "critic_noise_scale": 0.0}
        before = self.call(model, **options)
        accelerate(model)
        after = self.call(model, **options)
        assert torch.equal(before[1], after[1])
        assert not torch.equal(after[1], self.call(model, force_not_use_token_critic=True, **options)[1])

    def test_bad_calls_are_refused(self, muse):
        accelerate(muse)
        with pytest.raises(ValueError, match="can_remask_prev_masked"):
            muse.generate(texts=["a"], can_remask_prev_masked=True)
        muse.resize_image_for_cond_image = True
        with pytest.raises(ValueError, match="cond_images"):
            muse.generate(texts=["a"])
        muse.resize_image_for_cond_image = False
        restore(muse)


class TestHalton:
    """Halton-MaskGIT's samplers; with MGT_HALTON_MASKGIT, the originals beside ours."""

    real = bool(os.environ.get("MGT_HALTON_MASKGIT"))
    labels = torch.tensor([3, 3, 5])

    @classmethod
    def call(cls, sampler, seed=0, labels=None, **options):
        trainer = tiny.halton_trainer()
        torch.manual_seed(seed)
        labels = cls.labels if labels is None else labels
        found = sampler(trainer, nb_sample=len(labels), labels=labels, verbose=False, **options)
        return found, trainer.vit.given

    @staticmethod
    def masked(given):
        # of the conditional half
        return [(code[: len(code) // 2] == 24).sum(1).tolist() for code in given]

    def test_positions_in_the_order_of_the_sequence(self):
        halton, _ = tiny.halton_samplers()
        sampler = halton(step=8, w=2)
        accelerate(sampler)
        (images, codes, masks), given = self.call(sampler)
        assert images.shape == (3, 8, 8) and len(codes) == len(masks) == 8
        assert [int(mask[0].sum()) for mask in masks] == [5, 10, 15, 21, 27, 34, 43, 64]
        assert self.masked(given) == [[64 - n] * 3 for n in (0, 5, 10, 15, 21, 27, 34, 43)]
        assert halton.build_halton_mask(16)[:4].tolist() == [[8, 5], [4, 10], [12, 1], [2, 7]]
        # what is drawn again in the last step is what is returned
        assert torch.equal(images, codes[-1].float() / 24)

    @pytest.mark.parametrize("randomize", ["linear", "warm_up", "random", "no"])
    def test_as_many_positions_by_confidence(self, randomize):
        _, confidence = tiny.halton_samplers()
        sampler = confidence(step=8, randomize=randomize)
        counts = [max(int(n), k + 1) for k, n in enumerate(confidence.build_sequence(8, 8, verbose=False))]
        accelerate(sampler)
        (images, codes, masks), given = self.call(sampler)
        assert self.masked(given) == [[64 - n] * 3 for n in [0, *counts[:-1]]] and counts[-1] == 64
        assert [mask.flatten(1).sum(1).tolist() for mask in masks] == [[64 - n] * 3 for n in counts]
        assert images.shape == (3, 8, 8) and codes[0].max() < 24

    @pytest.mark.parametrize("kind", [0, 1])
    def test_draws_are_a_function_of_the_seed_and_the_object_comes_back(self, kind):
        original = tiny.halton_samplers()[kind]
        sampler = original(step=6)
        attributes = dict(vars(sampler))
        done = accelerate(sampler)
        assert isinstance(sampler, original) and accelerate(sampler) is done and done.replaced == ("__class__",)
        first, again, other = (self.call(sampler, seed)[0][0] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
            assert torch.equal(self.call(twin)[0][0], first)
            assert type(restore(twin)) is original
        restore(sampler)
        assert type(sampler) is original and vars(sampler).keys() == attributes.keys()
        if not self.real:
            assert self.call(sampler)[0] == "the original"

    def test_an_initial_canvas_is_not_written_to(self):
        _, confidence = tiny.halton_samplers()
        sampler = confidence(step=4)
        accelerate(sampler)
        canvas = torch.full((3, 64), 24)
        canvas[:, :10] = 1
        before = canvas.clone()
        _, given = self.call(sampler, init_code=canvas)
        assert torch.equal(canvas, before) and self.masked(given)[0] == [54] * 3

    @pytest.mark.skipif(not real, reason="MGT_HALTON_MASKGIT names no checkout of Halton-MaskGIT")
    @pytest.mark.parametrize(
        "kind, options",
        [
            (0, {"w": 0}),
            (0, {"w": 2, "top_k": 3}),
            (0, {"w": 1, "randomize": True, "sm_temp_min": 1, "sm_temp_max": 1.3, "temp_warmup": 1}),
            (1, {"w": 0}),
            (1, {"w": 2, "sm_temp": 1.2}),
            (1, {"w": 1, "randomize": "random"}),
        ],
    )
    def test_the_originals_distribution(self, kind, options):
        sampler = tiny.halton_samplers()[kind](step=4, **options)
        labels = torch.full((600,), 3)
        counts, shown = [], []
        for prepare, seed in ((restore, 0), (accelerate, 1), (restore, 2)):
            prepare(sampler)
            np.random.seed(seed)
            (images, _, masks), _ = self.call(sampler, seed, labels)
            counts.append((images * 24).round().long().flatten().bincount(minlength=24))
            shown.append([mask.flatten(1).sum(1).tolist() for mask in masks])
        restore(sampler)
        assert shown[0] == shown[1] == shown[2]

        def pvalue(one, other):
            table = torch.stack([counts[one], counts[other]])
            return stats.chi2_contingency(table[:, table.sum(0) > 10].numpy()).pvalue

        assert pvalue(0, 2) > 1e-4 and pvalue(0, 1) > 1e-4


@pytest.fixture(scope="module")
def gemma():
    pytest.importorskip("transformers.models.diffusion_gemma")
    return tiny.diffusion_gemma()


class TestDiffusionGemma:
    """`generate` of transformers."""

    @staticmethod
    def call(model, prompts=2, seed=0, rows=slice(None), **options):
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

        settings = {
            "max_new_tokens": 16, "max_denoising_steps": 6, "t_min": 0.4, "t_max": 0.8, "eos_token_id": None,
            "sampler_config": theirs.EntropyBoundSamplerConfig(entropy_bound=1.0), "stability_threshold": 1,
            "confidence_threshold": 0.005, "pad_token_id": 0,
        }  # fmt: skip
        config = theirs.DiffusionGemmaGenerationConfig(**{**settings, **options})
        torch.manual_seed(seed)
        prompt = torch.randint(1, 50, (prompts, 5), generator=seeded(3))[rows]
        found = model.generate(prompt, generation_config=config)
        return found if isinstance(found, torch.Tensor) else found.sequences

    @staticmethod
    def step(model, prepare, seed=0, count=2, bound=3.0, confidence=2.5):
        """One step of the class's own signature on given logits: what it returns, and what was accepted."""
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

        prepare(model)
        torch.manual_seed(seed)
        sampler = theirs.EntropyBoundSampler(theirs.EntropyBoundSamplerConfig(bound), 8, 64, 6)
        logits = randn(1, 8, 64, seed=5).expand(count, -1, -1).clone() * torch.linspace(0.2, 3, 8)[:, None]
        canvas = torch.full((count, 8), 7)
        found = model._denoising_step(
            decoder_forward=lambda **options: types.SimpleNamespace(logits=logits), current_canvas=canvas,
            argmax_canvas=canvas, input_ids=canvas, decoder_position_ids=torch.arange(5, 13)[None],
            self_conditioning_logits=logits, mask_mapping=None, cache=None, cur_step=4, sampler=sampler,
            finished_denoising=torch.zeros(count, dtype=torch.bool),
            logits_processor=lambda ids, scores, cur_step: scores / 0.8,
            diffusion_stopping_criteria=theirs.StableAndConfidentStoppingCriteria(0, confidence),
        )  # fmt: skip
        restore(model)
        return found

    @pytest.mark.parametrize("confidence", [0.1, 2.5])
    def test_a_step_is_the_originals_but_for_its_draws(self, gemma, confidence):
        before, after = (self.step(gemma, prepare, confidence=confidence) for prepare in (restore, accelerate))
        assert before[3].tolist() == [confidence > 1] * 2
        for ours, theirs in zip(after[1:], before[1:], strict=True):
            assert torch.equal(ours, theirs)
        assert (after[0].shape, after[0].dtype) == (before[0].shape, before[0].dtype)

    def test_as_many_are_accepted_and_drawn_from_the_same_law(self, gemma):
        count, tables = 3000, []
        for prepare, seed in ((restore, 0), (accelerate, 1), (restore, 2)):
            canvas = self.step(gemma, prepare, seed, count)[0]
            tables.append(torch.stack([canvas[:, i].bincount(minlength=64) for i in range(8)]))
        logits = (randn(1, 8, 64, seed=5) * torch.linspace(0.2, 3, 8)[:, None] / 0.8)[0].double()
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        order = entropy.argsort()
        accepted = order[: int((entropy[order].cumsum(0) - entropy[order] <= 3.0).sum())]
        assert 1 < len(accepted) < 8
        for i in range(8):
            law = logits[i].softmax(-1) if i in accepted else torch.full((64,), 1 / 64, dtype=torch.float64)
            expected, common = law * count, law * count > 5
            assert ((tables[1][i] - expected) ** 2 / expected)[common].sum() < 120

        def pvalue(one, other):
            table = torch.stack([tables[one].flatten(), tables[other].flatten()])
            return stats.chi2_contingency(table[:, table.sum(0) > 10].numpy()).pvalue

        assert pvalue(0, 2) > 1e-4 and pvalue(0, 1) > 1e-4

    def test_sharp_logits_give_the_originals_tokens(self, gemma):
        options = {"t_min": 1e-4, "t_max": 2e-4}
        starts = torch.randint(64, (2, 8), generator=seeded(1))
        gemma._prepare_denoiser_inputs_before = gemma._prepare_denoiser_inputs

        def same_start(*args, **kwargs):
            _, *others = gemma._prepare_denoiser_inputs_before(*args, **kwargs)
            return (starts, *others)

        gemma._prepare_denoiser_inputs = same_start
        try:
            before = self.call(gemma, **options)
            accelerate(gemma)
            after = self.call(gemma, **options)
        finally:
            restore(gemma)
            del gemma._prepare_denoiser_inputs, gemma._prepare_denoiser_inputs_before
        assert torch.equal(before, after)

    def test_texts_are_a_function_of_the_seed_and_the_object_comes_back(self, gemma):
        state = set(vars(gemma))
        original = self.call(gemma)
        done = accelerate(gemma)
        assert done.replaced == ("_denoising_step",) and accelerate(gemma) is done
        first, again, other = (self.call(gemma, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert first.shape == original.shape and torch.equal(first[:, :5], original[:, :5])
        for twin in (copy.deepcopy(gemma), pickle.loads(pickle.dumps(gemma))):
            assert torch.equal(self.call(twin), first)
        restore(gemma)
        assert set(vars(gemma)) == state and torch.equal(self.call(gemma), original)


class TestUnknown:
    """Objects that are no client's."""

    @pytest.mark.parametrize("obj", [None, 3, "AmusedPipeline", object(), torch.nn.Linear(1, 1), diffusers])
    def test_are_refused_by_name(self, obj):
        with pytest.raises(TypeError, match=r"obj: expected one of AmusedPipeline, .*OmniVoice, got "):
            accelerate(obj)
        assert restore(obj) is obj

    def test_classes_are_told_by_their_paths(self):
        # as is a subclass, and not another project's class of the same name
        other = type("Pipeline", (), {"__module__": "other.pipelines"})
        with pytest.raises(TypeError, match=r"got other\.pipelines\.Pipeline"):
            client_of(other())
        subclass = type("Mine", (diffusers.AmusedPipeline,), {})
        assert client_of(object.__new__(subclass)).name == "aMUSEd"

    def test_the_command_lists_them(self):
        result = CliRunner().invoke(cli.app, ["clients"], catch_exceptions=False)
        assert result.exit_code == 0
        for client in CLIENTS:
            assert client.name in result.output and client.source in result.output
            assert all(path.rpartition(".")[2] in result.output for path in client.classes)

    def test_every_client_has_a_module(self):
        from importlib import import_module

        for client in CLIENTS:
            assert callable(import_module(f"mgt_sampler.clients.{client.module}").replacements)
        assert Acceleration(CLIENTS[0], ()).client.name == "aMUSEd"
