"""`MGTScheduler` in diffusers' pipelines, and `z_sample`, which drives them."""

import functools
import threading

import pytest
import tiny
import torch
from tiny import randn, seeded

from mgt_sampler.schedules import mask_lens

diffusers = pytest.importorskip("diffusers")

from diffusers import AmusedScheduler  # noqa: E402

from mgt_sampler import CalibrationInput, MGTScheduler, ZSampling, quantize, z_sample  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def parts():
    """aMUSEd with tiny random weights: transformer and tokenizer."""
    pytest.importorskip("transformers")
    return tiny.amused_parts()


def pipeline(kind, parts, scheduler):
    pipe = getattr(diffusers, kind)(scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, generator, batch_size=2, **kwargs):
    """The latents of a pipeline, or of z_sample with one."""
    embeddings = {
        "prompt_embeds": randn(batch_size, 8),
        "encoder_hidden_states": randn(batch_size, 5, 8),
        "negative_prompt_embeds": torch.zeros(batch_size, 8),
        "negative_encoder_hidden_states": torch.zeros(batch_size, 5, 8),
    }
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(**embeddings, generator=generator, **{**settings, **kwargs}).images


IMAGES = torch.rand(2, 3, 16, 16, generator=seeded(3))
PAINT = (torch.rand(1, 1, 16, 16, generator=seeded(4)) < 0.3).float()
CASES = [
    ("AmusedPipeline", {"height": 16, "width": 16, "guidance_scale": 1.0}),
    ("AmusedPipeline", {"height": 16, "width": 16}),
    ("AmusedPipeline", {"height": 16, "width": 16, "num_inference_steps": 1}),
    ("AmusedPipeline", {"height": 16, "width": 16, "num_inference_steps": 12, "temperature": 1.5}),
    ("AmusedImg2ImgPipeline", {"image": IMAGES, "num_inference_steps": 12, "strength": 0.25}),
    ("AmusedImg2ImgPipeline", {"image": IMAGES, "strength": 0.5}),
    ("AmusedImg2ImgPipeline", {"image": IMAGES, "strength": 1.0}),
    ("AmusedInpaintPipeline", {"image": IMAGES, "mask_image": PAINT.expand(2, -1, -1, -1), "strength": 1.0}),
]


class TestPipelines:
    @pytest.mark.parametrize(("kind", "kwargs"), CASES)
    def test_torch_gives_equal_latents(self, parts, kind, kwargs):
        amused = pipeline(kind, parts, AmusedScheduler(mask_token_id=31))
        ours = pipeline(kind, parts, MGTScheduler(mask_token_id=31, rng="torch"))
        generators = seeded(0), seeded(0)
        expected = call(amused, generators[0], **kwargs)
        assert torch.equal(call(ours, generators[1], **kwargs), expected)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert not torch.equal(call(ours, seeded(1), **kwargs), expected)

    @pytest.mark.parametrize(("kind", "kwargs"), CASES)
    def test_philox_runs(self, parts, kind, kwargs):
        pipe = pipeline(kind, parts, AmusedScheduler(mask_token_id=31))
        pipe.scheduler = MGTScheduler.from_config(pipe.scheduler.config)
        latents = call(pipe, seeded(0), **kwargs)
        assert latents.shape == (2, 16, 16) and latents.min() >= 0 and latents.max() < 8

    def test_images(self, parts):
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31))
        images = call(pipe, seeded(0), height=16, width=16, output_type="np")
        assert images.shape == (2, 16, 16, 3)
        assert (call(pipe, seeded(0), height=16, width=16, output_type="np") == images).all()

    def test_masked_counts_of_text_to_image(self, parts):
        pipe, counts = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31)), []
        call(
            pipe,
            seeded(0),
            height=16,
            width=16,
            callback=lambda i, t, x: counts.append((x == 31).sum((1, 2)).tolist()),
        )
        assert counts == [[count] * 2 for count in (247, 221, 181, 127, 66, 0)]

    def test_masked_counts_of_image_to_image(self, parts):
        pipe, counts = pipeline("AmusedImg2ImgPipeline", parts, MGTScheduler(mask_token_id=31)), []
        call(
            pipe,
            seeded(0),
            image=IMAGES,
            num_inference_steps=12,
            strength=0.25,
            callback=lambda i, t, x: counts.append((x == 31).sum((1, 2)).tolist()),
        )
        assert counts == [[66, 66], [33, 33], [0, 0]]

    def test_strength_1_changes_nothing_with_philox(self, parts):
        pipe = pipeline("AmusedImg2ImgPipeline", parts, MGTScheduler(mask_token_id=31))
        latents = parts["vqvae"].encode(IMAGES).latents
        tokens = parts["vqvae"].quantize(latents)[2][2].reshape(2, 16, 16)
        assert torch.equal(call(pipe, seeded(0), image=IMAGES, strength=1.0), tokens)

    def test_inpainting_keeps_what_is_not_painted(self, parts):
        pipe = pipeline("AmusedInpaintPipeline", parts, MGTScheduler(mask_token_id=31))
        assert pipe.scheduler.config.masking_schedule == "linear"
        tokens = parts["vqvae"].quantize(parts["vqvae"].encode(IMAGES).latents)[2][2].reshape(2, 16, 16)
        counts = []
        painted = call(
            pipe,
            seeded(0),
            image=IMAGES,
            mask_image=PAINT.expand(2, -1, -1, -1),
            strength=1.0,
            callback=lambda i, t, x: counts.append(int((x[0] == 31).sum())),
        )
        keep = PAINT[0].bool().logical_not().expand(2, -1, -1)
        assert torch.equal(painted[keep], tokens[keep])
        num_painted = int(PAINT.sum())
        assert counts == mask_lens("linear", 6, num_painted)

    def test_a_list_of_generators(self, parts):
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31))
        batch = call(pipe, [seeded(0), seeded(1)], height=16, width=16)
        again = call(pipe, [seeded(0), seeded(2)], height=16, width=16)
        assert torch.equal(batch[0], again[0]) and not torch.equal(batch[1], again[1])

    def test_a_saved_pipeline_loads(self, parts, tmp_path):
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31, noise_scale="abs_cos:2"))
        pipe.save_pretrained(tmp_path)
        loaded = diffusers.AmusedPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
        assert isinstance(loaded.scheduler, MGTScheduler) and loaded.scheduler.config.noise_scale == "abs_cos:2"

    def test_runs_do_not_know_of_each_other(self, parts):
        techniques = {"differential": {"share": 0.75}, "momentum": 0.3, "noise_scale": "abs_cos:1"}
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31, **techniques))
        first, second = (call(pipe, seeded(seed), **SIZE) for seed in (0, 1))
        other = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31, **techniques))
        assert torch.equal(call(other, seeded(1), **SIZE), second)
        assert torch.equal(call(other, seeded(0), **SIZE), first)


class TestZSampling:
    def z_call(self, pipe, z_sampling=None, **kwargs):
        return call(functools.partial(z_sample, pipe, z_sampling=z_sampling), seeded(0), **{**SIZE, **kwargs})

    @pytest.mark.parametrize("variant", ["paper", "official", "random"])
    def test_z_sampling(self, parts, variant):
        pipe, counts = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31)), []
        hook = parts["transformer"].register_forward_pre_hook(
            lambda module, args: counts.append((args[0] == 31).sum((1, 2)).tolist())
        )
        latents = self.z_call(pipe, ZSampling(variant=variant), num_inference_steps=5)
        hook.remove()
        assert latents.max() < 8
        expected = [256, 243, 255, 243, 207, 242, 207, 150, 206, 150, 79, 149, 79]
        if variant == "random":
            # no inverse pass
            del expected[1::3]
        assert counts == [[count] * 4 for count in expected]

    def test_z_sampling_at_no_step_is_a_plain_run(self, parts):
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31))
        plain = call(pipe, seeded(0), **SIZE)
        assert torch.equal(self.z_call(pipe, ZSampling(steps=[])), plain)
        assert not torch.equal(self.z_call(pipe), plain)
        # and nothing of it stays behind
        assert torch.equal(call(pipe, seeded(0), **SIZE), plain)
        assert "step" not in vars(pipe.scheduler) and not parts["transformer"]._forward_hooks
        assert not pipe.scheduler._runs

    def test_two_threads_on_one_pipeline(self, parts):
        techniques = {"differential": {"share": 0.75}, "momentum": 0.2}
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31, **techniques))
        variants = ["paper", "official", "random", "paper"]

        def run(seed):
            arguments = {"z_sampling": ZSampling(0.5, variants[seed]), **SIZE, "num_inference_steps": 4}
            return call(functools.partial(z_sample, pipe, **arguments), seeded(seed), batch_size=1 + seed % 2)

        alone = [run(seed) for seed in range(4)]
        results, barrier = {}, threading.Barrier(4)

        def work(seed):
            barrier.wait()
            results[seed] = run(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(results[seed], alone[seed]) for seed in range(4))
        assert "step" not in vars(pipe.scheduler) and not parts["transformer"]._forward_hooks

    def test_one_within_the_callback_of_another(self, parts):
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31))
        inner, settings = [], {**SIZE, "num_inference_steps": 3}

        def nested(*args):
            inner.append(call(functools.partial(z_sample, pipe), seeded(7), **settings))

        outer = call(functools.partial(z_sample, pipe), seeded(0), callback=nested, **settings)
        assert torch.equal(outer, call(functools.partial(z_sample, pipe), seeded(0), **settings))
        alone = call(functools.partial(z_sample, pipe), seeded(7), **settings)
        assert len(inner) == 3 and all(torch.equal(each, alone) for each in inner)

    def test_nothing_stays_where_the_pipeline_raises(self, parts):
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31))

        def stop(step, timestep, latents):
            raise KeyboardInterrupt

        before = vars(pipe).copy()
        with pytest.raises(KeyboardInterrupt):
            call(functools.partial(z_sample, pipe), seeded(0), callback=stop, **SIZE)
        assert vars(pipe) == before
        assert "step" not in vars(pipe.scheduler) and not parts["transformer"]._forward_hooks
        assert not pipe.scheduler._runs

    def test_what_a_gpu_kernel_could_not_draw_does_not_reach_the_decoder(self, parts, monkeypatch):
        from mgt_sampler import draw as draws

        def draw(*args, **kwargs):
            drawn = original(*args, **kwargs)
            drawn.token_ids[1, 7], drawn.logprob[1, 7] = 31, -1e30
            return drawn

        original = draws.sample_tokens
        monkeypatch.setattr(draws, "sample_tokens", draw)
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31))
        with pytest.raises(ValueError, match=r"^model_output: expected finite logits.* sample 1, position 7"):
            self.z_call(pipe, ZSampling(), output_type="np")

    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_a_transformer_that_returns_the_same_buffer_at_every_call(self, parts, scale):
        """As a CUDA graph or a bound output does."""
        buffers, latents = {}, []
        techniques = {"momentum": 0.3, "differential": {"share": 0.75}}
        pipe = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31, **techniques))

        def bind(module, args, output):
            return buffers.setdefault(output.shape, torch.empty_like(output)).copy_(output)

        for bound in (False, True):
            handle = parts["transformer"].register_forward_hook(bind) if bound else None
            latents.append(self.z_call(pipe, ZSampling(1.0 if scale == 1 else 0.5), guidance_scale=scale))
        handle.remove()
        assert torch.equal(*latents)

    def test_a_run_draws_its_seeds_once(self, parts):
        pipe, states = pipeline("AmusedPipeline", parts, MGTScheduler(mask_token_id=31)), []
        for run in (pipe, functools.partial(z_sample, pipe)):
            generator = seeded(0)
            call(run, generator, **SIZE)
            states.append(generator.get_state())
        assert torch.equal(*states)

    def test_z_sampling_in_a_batch_and_with_everything(self, parts):
        pipe = pipeline(
            "AmusedPipeline",
            parts,
            MGTScheduler(mask_token_id=31, noise_scale="abs_cos:1", differential={"share": 0.75}, momentum=0.2),
        )
        arguments = {"z_sampling": ZSampling(0.5), **SIZE}
        run = functools.partial(z_sample, pipe, **arguments)
        batch = call(run, [seeded(0), seeded(1)])
        again = call(run, [seeded(0), seeded(2)])
        assert torch.equal(batch[0], again[0]) and not torch.equal(batch[1], again[1])

    def test_z_sampling_keeps_what_is_not_painted(self, parts):
        pipe = pipeline("AmusedInpaintPipeline", parts, MGTScheduler(mask_token_id=31))
        tokens = parts["vqvae"].quantize(parts["vqvae"].encode(IMAGES).latents)[2][2].reshape(2, 16, 16)
        mask_image = PAINT.expand(2, -1, -1, -1)
        painted = call(functools.partial(z_sample, pipe), seeded(0), image=IMAGES, mask_image=mask_image, strength=1.0)
        keep = PAINT[0].bool().logical_not().expand(2, -1, -1)
        assert torch.equal(painted[keep], tokens[keep]) and painted.max() < 8

    def test_z_sampling_of_image_to_image(self, parts):
        pipe = pipeline("AmusedImg2ImgPipeline", parts, MGTScheduler(mask_token_id=31))
        assert call(functools.partial(z_sample, pipe), seeded(0), image=IMAGES, strength=0.5).max() < 8

    # Meissonic's transformer is told k as an int64 tensor, Muddit's k / T
    @pytest.mark.parametrize("told", [lambda k: k[None], lambda k: k[None] / 3, lambda k: int(k), lambda k: int(k) / 3])
    def test_the_inverse_pass_sees_the_next_timestep_and_its_own_guidance(self, told):
        """A pipeline of Meissonic's shape: keywords, and a timestep that the transformer is told."""
        calls, unit = [], float(told(torch.tensor(3))) / 3

        class Transformer(torch.nn.Module):
            def forward(self, hidden_states, timestep):
                k = round(float(timestep) / unit)
                calls.append((len(hidden_states), k, int((hidden_states[0] == 40).sum())))
                half = randn(len(hidden_states) // 2, 32, 4, 8, seed=k)
                return torch.cat([half, -half]) if uncond_is_other else torch.cat([half, half])

        class Pipeline:
            transformer, scheduler = Transformer(), MGTScheduler(mask_token_id=40)

            def __call__(self, guidance_scale=9.0, steps=3):
                self.scheduler.set_timesteps(steps)
                tokens, generator = torch.full((1, 4, 8), 40), seeded(0)
                for timestep in self.scheduler.timesteps:
                    output = self.transformer(hidden_states=torch.cat([tokens] * 2), timestep=told(timestep))
                    uncond, cond = output.chunk(2)
                    logits = uncond + guidance_scale * (cond - uncond)
                    tokens = self.scheduler.step(logits, timestep, tokens, generator=generator).prev_sample
                return tokens

        results = {}
        for uncond_is_other in (False, True):
            for scale in (0.0, 1.0, 0.5):
                calls.clear()
                results[uncond_is_other, scale] = z_sample(Pipeline(), z_sampling=ZSampling(scale))
                first, second = mask_lens("cosine", 3, 32)[:2]
                assert [k for _, k, _ in calls] == [2, 1, 2, 1, 0, 1, 0]
                assert [count for *_, count in calls] == [32, first, 31, first, second, first - 1, second]
                assert {size for size, *_ in calls} == {2}
        assert torch.equal(results[False, 0.0], results[False, 1.0])
        assert not torch.equal(results[True, 0.0], results[True, 1.0])
        assert not torch.equal(results[True, 0.5], results[True, 1.0])

    def test_z_sampling_of_what_it_cannot_drive(self, parts):
        pipe = pipeline("AmusedPipeline", parts, AmusedScheduler(mask_token_id=31))
        with pytest.raises(TypeError, match=r"^pipe: expected one with an MGTScheduler, got AmusedScheduler"):
            self.z_call(pipe)
        pipe.scheduler = MGTScheduler(mask_token_id=31, rng="torch")
        with pytest.raises(ValueError, match=r"^pipe: expected an MGTScheduler with rng 'philox', got 'torch'"):
            self.z_call(pipe)
        pipe.scheduler = MGTScheduler(mask_token_id=31)
        with pytest.raises(ValueError, match=r"^z_sampling.inversion_guidance_scale: expected 1 where the pipeline"):
            self.z_call(pipe, ZSampling(0.0), guidance_scale=1.0)
        with pytest.raises(ValueError, match=r"^z_sampling.steps: expected steps within \[0, 4\], got 7"):
            self.z_call(pipe, ZSampling(steps=[7]))
        pipe.scheduler.step = functools.partial(pipe.scheduler.step)
        with pytest.raises(TypeError, match=r"^pipe: expected a scheduler with the step of its class, got one that"):
            self.z_call(pipe)
        del pipe.scheduler.step
        with pytest.raises(TypeError, match=r"^z_sampling: expected a ZSampling or None, got str"):
            self.z_call(pipe, "paper")
        assert "step" not in vars(pipe.scheduler) and not parts["transformer"]._forward_hooks
        assert self.z_call(pipe, ZSampling(1.0), guidance_scale=1.0).max() < 8


def test_a_quantized_transformer_draws(parts):
    calls = []

    def record(module, args, kwargs):
        calls.append(CalibrationInput(args, kwargs))

    scheduler = MGTScheduler(mask_token_id=31)
    settings = {**SIZE, "num_inference_steps": 4}
    handle = parts["transformer"].register_forward_pre_hook(record, with_kwargs=True)
    before = call(pipeline("AmusedPipeline", parts, scheduler), seeded(0), **settings)
    handle.remove()
    several = dict(guidance_halves=True, num_timestep_buckets=2)
    transformer, report = quantize(parts["transformer"], calls, share=0.5, group_size=32, mask_token_id=31, **several)
    assert {layer.activation for layer in report.layers} == {"a8", "a16"}
    assert {layer.x_scale.shape for layer in report.layers if layer.x_scale is not None} == {(2, 2)}
    pipe = pipeline("AmusedPipeline", {**parts, "transformer": transformer}, scheduler)
    after = call(pipe, seeded(0), **settings)
    assert after.shape == before.shape and ((after >= 0) & (after < 8)).all()
    # the scales that it chose are those of its tokens
    chosen = []
    layer = next(module for module in transformer.modules() if getattr(module, "num_scales", 0) > 1)
    layer.register_forward_pre_hook(lambda layer, _: chosen.append(layer._scale_index.tolist()))
    call(pipe, seeded(0), **settings)
    assert chosen[0] == [2, 2, 3, 3] and chosen[-1] == [0, 0, 1, 1] and layer._scale_index is None
    assert call(functools.partial(z_sample, pipe), seeded(0), **settings).max() < 8
    nobody, _ = quantize(parts["transformer"], calls, share=0.5, group_size=32, guidance_halves=True)
    with pytest.raises(RuntimeError, match="nobody chose"):
        call(pipeline("AmusedPipeline", {**parts, "transformer": nobody}, scheduler), seeded(0), **settings)
