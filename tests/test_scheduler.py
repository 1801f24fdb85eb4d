"""`MGTScheduler`: rng="torch" is `AmusedScheduler` bit for bit, rng="philox" has a law of its own."""

import copy
import json
import math
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from mgt_sampler.schedules import mask_lens

diffusers = pytest.importorskip("diffusers")

from diffusers import AmusedScheduler  # noqa: E402

from mgt_sampler import MGTScheduler, MGTSchedulerOutput  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

MASK, V, H, W = 40, 32, 4, 8
N = H * W


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return (2 * torch.randn(shape, generator=seeded(seed))).to(dtype)


def logits_4d(batch_size, seed=0, dtype=torch.float32, memory_format=torch.channels_last):
    return randn(batch_size, V, H, W, seed=seed, dtype=dtype).to(memory_format=memory_format)


def all_masked(batch_size):
    return torch.full((batch_size, H, W), MASK)


def philox(num_inference_steps=6, temperature=(2, 0), **config):
    scheduler = MGTScheduler(mask_token_id=MASK, **config)
    scheduler.set_timesteps(num_inference_steps, temperature)
    return scheduler


def run(scheduler, generator, batch_size=2, **kwargs):
    """A whole run from all masked, on logits that depend on the sample and the step alone."""
    sample, counts = all_masked(batch_size), []
    for timestep in scheduler.timesteps:
        logits = torch.cat([logits_4d(1, seed=100 * int(timestep) + i) for i in range(batch_size)])
        sample = scheduler.step(logits, timestep, sample, generator=generator, **kwargs).prev_sample
        counts.append((sample == MASK).sum((1, 2)).tolist())
    return sample, counts


def assert_steps_equal(amused, ours, logits_of, sample, **kwargs):
    """Chain both over all their timesteps: outputs and generator states equal after each step."""
    generators = seeded(5), seeded(5)
    samples = sample, sample
    for timestep in amused.timesteps:
        logits = logits_of(int(timestep))
        outputs = [
            scheduler.step(logits, timestep, x, generator=g, **kwargs)
            for scheduler, x, g in zip((amused, ours), samples, generators, strict=True)
        ]
        assert torch.equal(outputs[0].prev_sample, outputs[1].prev_sample)
        assert torch.equal(outputs[0].pred_original_sample, outputs[1].pred_original_sample)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        samples = tuple(output.prev_sample for output in outputs)
    return samples[1]


def pair(num_inference_steps, temperature=(2, 0), schedule="cosine"):
    amused = AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    ours = MGTScheduler.from_config(amused.config, rng="torch")
    for scheduler in (amused, ours):
        scheduler.set_timesteps(num_inference_steps, temperature)
    return amused, ours


class TestTorch:
    """rng="torch": AmusedScheduler bit for bit."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
    @pytest.mark.parametrize("num_inference_steps", [1, 2, 6, 12, 40])
    def test_chained_steps(self, num_inference_steps, memory_format, dtype):
        amused, ours = pair(num_inference_steps)
        final = assert_steps_equal(amused, ours, lambda t: logits_4d(2, t, dtype, memory_format), all_masked(2))
        assert (final != MASK).all()

    @pytest.mark.parametrize("temperature", [(2, 0), [0, 0], (3.5, 0.5), 1, 0.7])
    @pytest.mark.parametrize("schedule", ["cosine", "linear"])
    def test_schedules(self, schedule, temperature):
        amused, ours = pair(5, temperature, schedule)
        assert torch.equal(amused.timesteps, ours.timesteps)
        assert torch.equal(amused.temperatures, ours.temperatures)
        assert_steps_equal(amused, ours, lambda t: randn(3, N, V, seed=t), torch.full((3, N), MASK))

    @pytest.mark.parametrize("ratio", [1, 0.3, torch.tensor(0.3), torch.tensor(21 / 64)])
    def test_partly_known(self, ratio):
        amused, ours = pair(6, schedule="linear")
        sample = torch.randint(0, V, (2, H, W), generator=seeded(1))
        sample[:, :2, :5] = MASK
        assert_steps_equal(amused, ours, lambda t: logits_4d(2, t), sample, starting_mask_ratio=ratio)

    def test_the_quirk_that_masks_a_known_token(self):
        amused, ours = pair(6)
        sample = torch.randint(0, V, (2, H, W), generator=seeded(1))
        assert_steps_equal(amused, ours, lambda t: logits_4d(2, t), sample)
        output = ours.step(logits_4d(2), 3, sample, generator=seeded(0))
        assert (output.prev_sample == MASK).sum((1, 2)).tolist() == [1, 1]
        # rng="philox" does not copy it
        assert torch.equal(philox().step(logits_4d(2), 3, sample, generator=seeded(0)).prev_sample, sample)

    def test_a_list_of_generators_is_every_sample_alone(self):
        amused, ours = pair(6)
        sample = all_masked(3)
        generators, alone = [seeded(i) for i in range(3)], [seeded(i) for i in range(3)]
        samples = list(sample.split(1))
        for timestep in amused.timesteps:
            logits = logits_4d(3, seed=int(timestep))
            sample = ours.step(logits, timestep, sample, generator=generators).prev_sample
            for i, one in enumerate(alone):
                step = amused.step(logits[i : i + 1], timestep, samples[i], generator=one)
                samples[i] = step.prev_sample
            assert torch.equal(sample, torch.cat(samples))
        for a, b in zip(generators, alone, strict=True):
            assert torch.equal(a.get_state(), b.get_state())

    def test_add_noise(self):
        for schedule in ("cosine", "linear"):
            amused, ours = pair(12, schedule=schedule)
            sample = torch.randint(0, V, (2, H, W), generator=seeded(1))
            for timestep in amused.timesteps:
                expected = amused.add_noise(sample, timestep, generator=seeded(2))
                assert torch.equal(ours.add_noise(sample, timestep, generator=seeded(2)), expected)
                ours_philox = philox(12, masking_schedule=schedule)
                assert torch.equal(ours_philox.add_noise(sample, timestep, generator=seeded(2)), expected)

    def test_noise_regularization_draws_from_the_generator(self):
        scheduler = philox(6, rng="torch", noise_scale=2.0)
        state = torch.get_rng_state()
        outputs = [run(scheduler, seeded(s))[0] for s in (0, 0, 1)]
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], run(philox(6, rng="torch"), seeded(0))[0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_noise_regularization_is_gaussian_noise_on_the_logits(self):
        amused, _ = pair(6)
        rows, sample, generator = randn(2, N, V), torch.full((2, N), MASK), seeded(0)
        noisy = rows + 0.5 * torch.randn(2, N, V, generator=generator)
        expected = amused.step(noisy, 5, sample, generator=generator)
        output = philox(6, rng="torch", noise_scale=0.5).step(rows, 5, sample, generator=seeded(0))
        assert torch.equal(output.prev_sample, expected.prev_sample)
        assert torch.equal(output.pred_original_sample, expected.pred_original_sample)

    def test_one_position(self):
        _, ours = pair(3)
        sample = torch.full((2, 1), MASK)
        for timestep in ours.timesteps:
            sample = ours.step(randn(2, 1, V), timestep, sample, generator=seeded(0)).prev_sample
        assert (sample != MASK).all()


class TestPhilox:
    """rng="philox": the fused kernels."""

    @pytest.mark.parametrize("num_inference_steps", [1, 2, 6, 12, 40])
    @pytest.mark.parametrize("schedule", ["cosine", "linear", "pow0.6", "arccos", "log"])
    def test_masked_counts(self, schedule, num_inference_steps):
        scheduler = philox(num_inference_steps, masking_schedule=schedule)
        _, counts = run(scheduler, seeded(0))
        assert counts == [[count] * 2 for count in mask_lens(schedule, num_inference_steps, N)]

    def test_256_tokens(self):
        scheduler, sample, counts = philox(), torch.full((1, 16, 16), MASK), []
        for timestep in scheduler.timesteps:
            sample = scheduler.step(randn(1, V, 16, 16), timestep, sample, generator=seeded(0)).prev_sample
            counts.append(int((sample == MASK).sum()))
        assert counts == [247, 221, 181, 127, 66, 0]

    def test_output_shapes(self):
        scheduler = philox()
        output = scheduler.step(logits_4d(2), 5, all_masked(2), generator=seeded(0))
        assert isinstance(output, MGTSchedulerOutput)
        drawn, prev = output.pred_original_sample, output.prev_sample
        assert drawn.shape == prev.shape == (2, H, W) and drawn.dtype == prev.dtype == torch.int64
        assert drawn.max() < V
        assert torch.equal(drawn[prev != MASK], prev[prev != MASK])
        as_tuple = philox().step(logits_4d(2), 5, all_masked(2), generator=seeded(0), return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], prev) and torch.equal(as_tuple[1], drawn)
        assert torch.equal(output[0], prev) and torch.equal(output["prev_sample"], prev)

    def test_three_layouts_give_the_same_tokens(self):
        logits = logits_4d(2)
        expected = philox().step(logits, 5, all_masked(2), generator=seeded(0)).prev_sample
        contiguous = philox().step(logits.contiguous(), 5, all_masked(2), generator=seeded(0)).prev_sample
        assert torch.equal(contiguous, expected)
        flat = logits.flatten(2).transpose(1, 2)
        for rows in (
            flat,
            flat.contiguous(),
            flat.repeat_interleave(2, 2)[..., ::2].transpose(0, 1).transpose(0, 1),
        ):
            sample = philox().step(rows, 5, all_masked(2).flatten(1), generator=seeded(0)).prev_sample
            assert torch.equal(sample, expected.flatten(1))
        # a part of a wider vocabulary, as a view
        wide = torch.cat([logits, logits], 1).to(memory_format=torch.channels_last)[:, :V]
        sample = philox().step(wide, 5, all_masked(2), generator=seeded(0)).prev_sample
        assert torch.equal(sample, expected)

    @pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
    def test_logits_go_in_without_a_copy(self, memory_format, monkeypatch):
        from mgt_sampler import draw as module

        seen = []

        def spy(logits, *args, **kwargs):
            seen.append(logits)
            return original(logits, *args, **kwargs)

        original = module.sample_tokens
        monkeypatch.setattr(module, "sample_tokens", spy)
        logits = logits_4d(2, memory_format=memory_format)
        philox().step(logits, 5, all_masked(2), generator=seeded(0))
        assert seen[0].data_ptr() == logits.data_ptr() and seen[0].shape == (2, N, V)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype, backend):
        logits = logits_4d(2, dtype=dtype)
        output = philox(backend=backend).step(logits, 5, all_masked(2), generator=seeded(0))
        upcast = philox(backend=backend).step(logits.float(), 5, all_masked(2), generator=seeded(0))
        assert torch.equal(output.prev_sample, upcast.prev_sample)

    @pytest.mark.parametrize("rng", ["philox", "torch"])
    def test_inputs_are_not_written(self, rng):
        scheduler = philox(rng=rng, noise_scale=2.0)
        logits, sample = logits_4d(2), all_masked(2)
        sample[:, 0] = 3
        copies = logits.clone(), sample.clone()
        for timestep in (5, 0):
            scheduler.step(logits, timestep, sample, generator=seeded(0))
            scheduler.add_noise(sample, timestep, generator=seeded(0))
        assert torch.equal(logits, copies[0]) and torch.equal(sample, copies[1])

    def test_known_tokens_are_kept_and_counts_clamped(self):
        scheduler = philox(masking_schedule="linear")
        sample = torch.randint(0, V, (3, H, W), generator=seeded(1))
        sample[0, :2, :5] = MASK
        sample[1, 0, :2] = MASK
        known = sample != MASK
        start, counts = sample, []
        for timestep in scheduler.timesteps:
            ratio = torch.tensor([10 / 32, 2 / 32, 0.0])
            sample = scheduler.step(logits_4d(3), timestep, sample, ratio, generator=seeded(0)).prev_sample
            counts.append((sample == MASK).sum((1, 2)).tolist())
            assert torch.equal(sample[known], start[known])
        assert counts == [[8, 1, 0], [6, 1, 0], [5, 1, 0], [3, 1, 0], [1, 1, 0], [0, 0, 0]]

    def test_noise_regularization(self):
        base = run(philox(), seeded(0))[0]
        noisy = run(philox(noise_scale="abs_cos:2"), seeded(0))[0]
        assert not torch.equal(noisy, base)
        assert torch.equal(noisy, run(philox(noise_scale="abs_cos:2"), seeded(0))[0])
        assert torch.equal(run(philox(noise_scale=[0.0, 0.0]), seeded(0))[0], base)

    @pytest.mark.parametrize("rng", ["philox", "torch"])
    def test_empty_batch(self, rng):
        for generator in (seeded(0), []):
            output = philox(rng=rng).step(logits_4d(0), 5, all_masked(0), generator=generator)
            assert output.prev_sample.shape == (0, H, W)


class TestGenerators:
    """One seed for each sample, drawn from the generator once a run."""

    def test_the_same_seed_gives_the_same_run(self):
        first, second, other = (run(philox(), seeded(s))[0] for s in (0, 0, 1))
        assert torch.equal(first, second) and not torch.equal(first, other)

    def test_drawn_once_a_run(self):
        scheduler, generator = philox(), seeded(0)
        states = [generator.get_state()]
        sample = all_masked(2)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(logits_4d(2), timestep, sample, generator=generator).prev_sample
            states.append(generator.get_state())
        assert not torch.equal(states[0], states[1])
        assert all(torch.equal(states[1], state) for state in states[2:])

    def test_what_begins_a_run(self):
        scheduler, generator = philox(), seeded(0)

        def draws(timestep, generator=generator, batch_size=2):
            before = generator.get_state()
            scheduler.step(logits_4d(batch_size), timestep, all_masked(batch_size), generator=generator)
            return not torch.equal(generator.get_state(), before)

        assert draws(5) and not draws(4) and not draws(2)
        assert draws(2), "a timestep that does not fall"
        assert draws(1, batch_size=3), "another batch size"
        assert draws(0, generator=seeded(7), batch_size=3), "another generator"
        scheduler.set_timesteps(6)
        assert draws(5) and not draws(4)
        scheduler.set_timesteps(6)
        assert draws(3), "set_timesteps"

    def test_two_runs_of_one_generator_differ(self):
        scheduler, generator = philox(), seeded(0)
        first, second = run(scheduler, generator)[0], run(scheduler, generator)[0]
        assert not torch.equal(first, second)

    def test_a_list_makes_every_sample_independent_of_the_batch(self):
        batch = run(philox(), [seeded(i) for i in range(4)], batch_size=4)[0]
        alone = run(philox(), [seeded(0)], batch_size=1)[0]
        assert torch.equal(alone[0], batch[0])
        single = run(philox(), seeded(0), batch_size=1)[0]
        assert torch.equal(single, alone)
        assert torch.equal(run(philox(), tuple(seeded(i) for i in range(4)), batch_size=4)[0], batch)

    def test_a_list_in_add_noise(self):
        scheduler, sample = philox(), torch.zeros(3, H, W, dtype=torch.int64)
        batch = scheduler.add_noise(sample, 2, generator=[seeded(i) for i in range(3)])
        for i in range(3):
            alone = scheduler.add_noise(sample[:1], 2, generator=seeded(i))
            assert torch.equal(alone[0], batch[i])
        assert not torch.equal(batch[0], batch[1])

    @pytest.mark.parametrize("rng", ["philox", "torch"])
    def test_the_global_generator_is_untouched_when_one_is_given(self, rng):
        before = torch.get_rng_state()
        run(philox(rng=rng, noise_scale=1.0), seeded(0))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("rng", ["philox", "torch"])
    def test_the_global_generator_is_used_when_none_is_given(self, rng):
        with torch.random.fork_rng():
            outputs = []
            for seed in (0, 0, 1):
                torch.manual_seed(seed)
                outputs.append(run(philox(rng=rng), None)[0])
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])

    def test_a_list_of_the_wrong_length(self):
        for rng in ("philox", "torch"):
            with pytest.raises(ValueError, match=r"^generator: expected one for each of 2 samples, got 3"):
                run(philox(rng=rng), [seeded(0)] * 3)


class TestConfig:
    def test_from_amused_and_back(self, tmp_path):
        amused = AmusedScheduler(mask_token_id=MASK, masking_schedule="linear")
        ours = MGTScheduler.from_config(amused.config, noise_scale="abs_cos:2")
        assert ours.config.mask_token_id == MASK and ours.config.masking_schedule == "linear"
        assert ours.config.rng == "philox" and ours.config.noise_scale == "abs_cos:2"
        ours.save_pretrained(tmp_path)
        for back in (AmusedScheduler.from_pretrained(tmp_path), AmusedScheduler.from_config(ours.config)):
            assert back.config.mask_token_id == MASK and back.config.masking_schedule == "linear"
        again = MGTScheduler.from_pretrained(tmp_path)
        assert again.config.noise_scale == "abs_cos:2" and again.config.masking_schedule == "linear"

    def test_from_meissonic(self):
        config = {"_class_name": "Scheduler", "mask_token_id": 8255, "masking_schedule": "cosine"}
        assert MGTScheduler.from_config(config).config.mask_token_id == 8255

    def test_a_positional_mask_token_survives(self):
        assert MGTScheduler.from_config(AmusedScheduler(MASK).config).config.mask_token_id == MASK
        assert MGTScheduler.from_config(MGTScheduler(MASK).config).config.mask_token_id == MASK

    def test_register_to_config_changes_the_schedule(self):
        scheduler = MGTScheduler(mask_token_id=MASK)
        scheduler.register_to_config(masking_schedule="linear")
        scheduler.set_timesteps(6)
        assert run(scheduler, seeded(0))[1] == [[count] * 2 for count in mask_lens("linear", 6, N)]
        assert MGTScheduler.from_config(scheduler.config).config.masking_schedule == "linear"

    def test_lists_survive_a_file(self, tmp_path):
        ratios = [0.9, 0.5, 0.2, 0.0]
        MGTScheduler(MASK, masking_schedule=ratios, noise_scale=[1.0, 0.0]).save_pretrained(tmp_path)
        scheduler = MGTScheduler.from_pretrained(tmp_path)
        scheduler.set_timesteps(4)
        assert run(scheduler, seeded(0))[1] == [[count] * 2 for count in mask_lens(ratios, 4, N)]

    def test_copies(self):
        scheduler, generator = philox(), seeded(0)
        scheduler.step(logits_4d(2), 5, all_masked(2), generator=generator)
        copied = copy.deepcopy(scheduler)
        assert copied.config == scheduler.config and len(copied.timesteps) == 6

    def test_order_and_attributes(self):
        scheduler = MGTScheduler(MASK)
        assert scheduler.order == 1 and scheduler.timesteps is None and scheduler.temperatures is None
        scheduler.set_timesteps(4, 3.0)
        assert scheduler.timesteps.tolist() == [3, 2, 1, 0]
        assert torch.equal(scheduler.temperatures, torch.linspace(3.0, 0.01, 4))


def test_without_diffusers_the_rest_works_and_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import mgt_sampler; mgt_sampler.generate\n"
        "try: from mgt_sampler import MGTScheduler\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mgt-kernels[diffusers]" in result.stdout


@pytest.mark.parametrize("rng", ["philox", "torch"])
class TestErrors:
    @pytest.mark.parametrize(
        ("message", "error", "kwargs"),
        [
            ("^timestep: expected 0 to 5, got 6", ValueError, {"timestep": 6}),
            ("^timestep: expected 0 to 5, got -1", ValueError, {"timestep": -1}),
            ("^sample: expected shape", ValueError, {"sample": all_masked(3)}),
            ("^sample: expected shape", ValueError, {"sample": all_masked(2).flatten(1)}),
            ("^sample: expected int64, got torch.int32", TypeError, {"sample": all_masked(2).int()}),
            ("^sample: expected a tensor, got list", TypeError, {"sample": [[MASK]]}),
            ("^model_output: expected a tensor, got NoneType", TypeError, {"model_output": None}),
            ("^model_output: expected .*, got ", ValueError, {"model_output": torch.zeros(2, V)}),
            ("^starting_mask_ratio: expected", ValueError, {"starting_mask_ratio": 1.5}),
            ("^starting_mask_ratio: expected", ValueError, {"starting_mask_ratio": -0.1}),
        ],
    )
    def test_step(self, rng, message, error, kwargs):
        arguments = {"model_output": logits_4d(2), "timestep": 5, "sample": all_masked(2)}
        with pytest.raises(error, match=message):
            philox(rng=rng).step(**{**arguments, "generator": seeded(0), **kwargs})

    def test_bad_logits(self, rng):
        logits = logits_4d(2)
        logits[1, 3, 2, 1] = float("nan")
        with pytest.raises(ValueError if rng == "philox" else RuntimeError, match=r"nan|NaN"):
            philox(rng=rng).step(logits, 5, all_masked(2), generator=seeded(0))

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("masking_schedule", {"masking_schedule": "cosin"}),
            ("masking_schedule", {"masking_schedule": [0.5, 0.2]}),
            ("noise_scale", {"noise_scale": "abs_cos"}),
            ("noise_scale", {"noise_scale": -1.0}),
        ],
    )
    def test_schedules_of_the_config(self, rng, name, config):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            philox(rng=rng, **config)

    def test_set_timesteps(self, rng):
        scheduler = MGTScheduler(MASK, rng=rng)
        with pytest.raises(RuntimeError, match=r"call set_timesteps"):
            scheduler.step(logits_4d(2), 0, all_masked(2))
        with pytest.raises(RuntimeError, match=r"call set_timesteps"):
            scheduler.add_noise(all_masked(2), 0)
        for error, arguments in (
            (ValueError, (0,)),
            (TypeError, (2.5,)),
        ):
            with pytest.raises(error, match=r"^num_inference_steps: "):
                scheduler.set_timesteps(*arguments)
        for error, temperature in (
            (ValueError, -1),
            (ValueError, (1, float("nan"))),
            (TypeError, (1, 2, 3)),
            (TypeError, "2"),
        ):
            with pytest.raises(error, match=r"^temperature: "):
                scheduler.set_timesteps(4, temperature)


def test_an_unknown_rng():
    with pytest.raises(ValueError, match=r"^rng: expected 'philox' or 'torch', got 'numpy'"):
        MGTScheduler(MASK, rng="numpy")


class TestTechniques:
    """Differential sampling and momentum."""

    @pytest.mark.parametrize(
        "techniques",
        [
            {"differential": {"share": 0.75}},
            {"momentum": 0.4},
            {"differential": {"variant": "official"}, "momentum": 0.2},
        ],
    )
    def test_the_scheduler_draws_what_generate_draws(self, techniques):
        from mgt_sampler import Differential, generate

        class Model:
            num_tokens, codebook_size, mask_token_id = 16, 8, MASK

            def __init__(self):
                self.table = randn(10, 16, 8)

            def predict_logits(self, tokens, condition):
                return (
                    self.table[(tokens == MASK).sum(1) % 10] + randn(1, 16, 8) * (tokens == MASK).sum(1)[:, None, None]
                )

            def decode(self, tokens):
                return tokens.view(-1, 1, 4, 4).float()

        model, scheduler = Model(), MGTScheduler(MASK, **techniques)
        scheduler.set_timesteps(5, temperature=(2, 0))
        tokens, generator = torch.full((2, 16), MASK), seeded(3)
        for timestep in scheduler.timesteps:
            tokens = scheduler.step(
                model.predict_logits(tokens, None), timestep, tokens, generator=generator
            ).prev_sample
        seed = torch.randint(2**63 - 1, (2,), generator=seeded(3))
        arguments = dict(techniques)
        if "differential" in arguments:
            arguments["differential"] = Differential(**arguments["differential"])
        expected = generate(
            model, num_inference_steps=5, temperature=(2.0, 0.0), seed=seed, progress=False, **arguments
        )
        assert torch.equal(tokens, expected.tokens)
        plain = generate(model, num_inference_steps=5, temperature=(2.0, 0.0), seed=seed, progress=False)
        assert not torch.equal(tokens, plain.tokens)

    def test_the_config_keeps_them(self, tmp_path):
        scheduler = MGTScheduler(MASK, differential={"share": 0.5, "variant": "official"}, momentum=0.1)
        scheduler.save_pretrained(tmp_path)
        loaded = MGTScheduler.from_pretrained(tmp_path)
        assert loaded.config.differential == {"share": 0.5, "variant": "official"} and loaded.config.momentum == 0.1

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"differential": {"share": 2}}, ValueError, "^differential.share: expected"),
            ({"differential": {"z": 1}}, TypeError, "'z'"),
            ({"differential": {}, "rng": "torch"}, ValueError, "^rng: expected 'philox' with differential or momentum"),
            ({"momentum": 0.1, "rng": "torch"}, ValueError, "^rng: expected 'philox' with differential or momentum"),
        ],
    )
    def test_bad_arguments(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            MGTScheduler(MASK, **kwargs)


def steps_of(scheduler, generator, logits_seed=0, batch_size=2, sample=None, shape=(H, W)):
    """A run as an iterator, so that runs can take turns: a sample after each step."""
    sample = torch.full((batch_size, *shape), MASK) if sample is None else sample
    for timestep in scheduler.timesteps.tolist():
        logits = logits_4d(batch_size, seed=1000 * logits_seed + timestep)
        sample = scheduler.step(logits, timestep, sample, generator=generator).prev_sample
        yield sample


TECHNIQUES = {
    "plain": {},
    "noise": {"noise_scale": "abs_cos:1"},
    "differential": {"differential": {"share": 0.75}},
    "momentum": {"momentum": 0.4},
    "everything": {"differential": {"variant": "official"}, "momentum": 0.2, "noise_scale": 1.0},
}


@pytest.mark.parametrize("config", TECHNIQUES.values(), ids=TECHNIQUES.keys())
class TestRunsTakeTurns:
    """Each draws as it would alone."""

    def alone(self, config, seed, num_inference_steps=6):
        return list(steps_of(philox(num_inference_steps, **config), seeded(seed), seed))

    def equal(self, one, other):
        return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_each_with_its_own_generator(self, config):
        scheduler = philox(**config)
        runs = [steps_of(scheduler, seeded(seed), seed) for seed in range(3)]
        samples = list(zip(*runs, strict=True))
        for seed in range(3):
            assert self.equal([each[seed] for each in samples], self.alone(config, seed))
        assert not scheduler._runs

    def test_set_timesteps_of_one_leaves_the_others(self, config):
        scheduler = philox(**config)
        first = steps_of(scheduler, seeded(1), 1)
        samples = [next(first), next(first)]
        scheduler.set_timesteps(4)
        second = steps_of(scheduler, seeded(2), 2)
        others = [next(second)]
        samples += list(first)
        others += list(second)
        assert self.equal(samples, self.alone(config, 1)) and self.equal(others, self.alone(config, 2, 4))

    def test_of_different_sizes(self, config):
        scheduler, generator = philox(**config), seeded(1)
        first = steps_of(scheduler, generator, 1)
        samples = [next(first)]
        second = list(steps_of(scheduler, generator, 2, batch_size=3))
        samples += list(first)
        assert self.equal(samples, self.alone(config, 1)) and len(second) == 6

    def test_of_one_generator_draw_what_the_other_order_draws(self, config):
        def runs(turns):
            scheduler, generator = philox(**config), seeded(0)
            iterators = [steps_of(scheduler, generator, seed) for seed in (1, 2)]
            samples = [[], []]
            for which in turns:
                samples[which].append(next(iterators[which]))
            return samples

        first, second = runs([0, 1] * 6), runs([0, 1, *[0] * 5, *[1] * 5])
        assert self.equal(first[0], second[0]) and self.equal(first[1], second[1])

    def test_in_threads(self, config):
        scheduler, results = philox(**config), {}

        def work(seed):
            results[seed] = list(steps_of(scheduler, seeded(seed), seed))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(self.equal(results[seed], self.alone(config, seed)) for seed in range(4))

    def test_a_deep_copy_goes_on_with_a_run(self, config):
        scheduler, generator = philox(**config), seeded(1)
        first = steps_of(scheduler, generator, 1)
        samples = [next(first), next(first)]
        copied = copy.deepcopy(scheduler)
        rest = list(first)
        again = []
        sample = samples[-1]
        for timestep in copied.timesteps.tolist()[2:]:
            sample = copied.step(logits_4d(2, seed=1000 + timestep), timestep, sample, generator=generator).prev_sample
            again.append(sample)
        assert self.equal(rest, again) and self.equal(samples + rest, self.alone(config, 1))

    def test_an_edited_sample_stays_in_its_run(self, config):
        outputs = []
        for edit in (lambda x: x, torch.clone):
            scheduler, sample, generator = philox(**config), all_masked(2), seeded(1)
            for timestep in scheduler.timesteps:
                sample = edit(sample)
                logits = logits_4d(2, seed=int(timestep))
                sample = scheduler.step(logits, timestep, sample, generator=generator).prev_sample
            outputs.append(sample)
        assert torch.equal(*outputs)

    def test_a_step_that_failed_can_be_taken_again(self, config):
        def run(break_at):
            scheduler, sample, generator = philox(**config), all_masked(2), seeded(1)
            for timestep in scheduler.timesteps:
                logits = logits_4d(2, seed=int(timestep))
                if timestep == break_at:
                    with pytest.raises(ValueError, match="NaN"):
                        scheduler.step(torch.full_like(logits, math.nan), timestep, sample, generator=generator)
                sample = scheduler.step(logits, timestep, sample, generator=generator).prev_sample
            return sample

        plain = {name: value for name, value in config.items() if name != "differential"}
        if plain == config:
            assert torch.equal(run(None), run(3))
        assert torch.equal(run(None), run(5))

    def test_what_is_abandoned_does_not_stay(self, config):
        scheduler, generator = philox(**config), seeded(0)
        for _ in range(3):
            scheduler.step(logits_4d(2), 5, all_masked(2), generator=generator)
        assert len(scheduler._runs) == 1
        scheduler.step(logits_4d(2), 5, all_masked(2), generator=seeded(1))
        scheduler.step(logits_4d(2), 5, all_masked(2), generator=seeded(2))
        assert len(scheduler._runs) <= 2
        scheduler.set_timesteps(6)
        assert not scheduler._runs

    def test_a_pickle_has_the_config_and_no_run(self, config):
        scheduler = philox(**config)
        next(steps_of(scheduler, seeded(1), 1))
        loaded = pickle.loads(pickle.dumps(scheduler))
        assert loaded.config == scheduler.config
        assert self.equal(list(steps_of(loaded, seeded(1), 1)), self.alone(config, 1))


def test_a_run_whose_first_step_is_being_taken_is_not_lost(monkeypatch):
    """Another thread may begin a run of its own meanwhile."""
    from mgt_sampler import draw

    expected, generator = run(philox(), seeded(0)), seeded(0)
    scheduler, original = philox(), draw.sample_tokens

    def while_another_begins(*args, **kwargs):
        thread = threading.Thread(target=scheduler.set_timesteps, args=(6,))
        thread.start()
        thread.join()
        return original(*args, **kwargs)

    monkeypatch.setattr(draw, "sample_tokens", while_another_begins)
    found = run(scheduler, generator)
    assert torch.equal(found[0], expected[0]) and not scheduler._runs


class TestConfigIsRead:
    """A change is in effect from the next run on."""

    @pytest.mark.parametrize(
        "change",
        [
            {"differential": {"share": 1.0}},
            {"momentum": 1.0},
            {"noise_scale": 3.0},
            {"masking_schedule": "linear"},
            {"rng": "torch"},
        ],
    )
    @pytest.mark.parametrize("when", ["before set_timesteps", "after set_timesteps"])
    def test_a_change(self, change, when):
        scheduler = MGTScheduler(MASK)
        if when == "after set_timesteps":
            scheduler.set_timesteps(6)
        scheduler.register_to_config(**change)
        if when == "before set_timesteps":
            scheduler.set_timesteps(6)
        samples = [list(steps_of(each, seeded(0)))[-1] for each in (scheduler, philox(**change), philox())]
        assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])

    def test_the_mask_token_inside_the_codebook(self):
        # hosts write to attributes of a config, and to its items
        for change in (
            lambda s: s.register_to_config(mask_token_id=3),
            lambda s: setattr(s.config, "mask_token_id", 3),
            lambda s: s.config.__setitem__("mask_token_id", np.int64(3)),
        ):
            scheduler = philox()
            change(scheduler)
            sample, noisy = torch.full((2, H, W), 3), scheduler.add_noise(torch.zeros(2, H, W).long(), 3)
            assert set(noisy.unique().tolist()) == {0, 3}
            *before, last = steps_of(scheduler, seeded(0), sample=sample)
            assert (before[-1] == 3).any() and not (last == 3).any()
            # and a later change leaves it as it is
            scheduler.register_to_config(noise_scale=0.5)
            assert scheduler.config.mask_token_id == scheduler.config["mask_token_id"] == 3

    def test_the_backend(self):
        scheduler = philox()
        scheduler.register_to_config(backend="triton")
        with pytest.raises(RuntimeError, match="'triton' runs on CUDA"):
            scheduler.step(logits_4d(2), 5, all_masked(2))

    def test_a_change_within_a_run_waits_for_the_next(self):
        scheduler = philox()
        run_ = steps_of(scheduler, seeded(0))
        first = next(run_)
        scheduler.register_to_config(noise_scale=3.0, differential={"share": 1.0}, momentum=1.0, mask_token_id=MASK + 1)
        samples = [first, *run_]
        assert torch.equal(samples[-1], list(steps_of(philox(), seeded(0)))[-1])

    def test_numbers_of_every_kind_and_their_file(self, tmp_path):
        given = {
            "mask_token_id": np.int32(MASK),
            "masking_schedule": np.linspace(0.8, 0, 6, dtype=np.float32),
            "noise_scale": (np.float16(1.5), 0),
            "momentum": torch.tensor(0.25),
            "differential": {"share": np.float32(0.5)},
        }
        scheduler = MGTScheduler(**given)
        scheduler.save_config(tmp_path)
        loaded = MGTScheduler.from_pretrained(tmp_path)
        assert json.loads((tmp_path / "scheduler_config.json").read_text())["noise_scale"] == [1.5, 0.0]
        outputs = []
        for each in (scheduler, loaded, MGTScheduler.from_config(scheduler.config), copy.deepcopy(scheduler)):
            each.set_timesteps(np.int64(6), (np.float32(2), torch.tensor(0)))
            outputs.append(list(steps_of(each, seeded(0)))[-1])
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    def test_a_differential_of_the_class(self):
        from mgt_sampler import Differential

        config = MGTScheduler(MASK, differential=Differential(0.5)).config
        assert config.differential == {"share": 0.5, "variant": "paper", "aliased_history": False}

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"mask_token_id": "40"}, TypeError, "^mask_token_id: expected an int, got str"),
            ({"mask_token_id": None}, TypeError, "^mask_token_id: expected an int, got NoneType"),
            ({"mask_token_id": 40.0}, TypeError, "^mask_token_id: expected an int, got float"),
            ({"mask_token_id": True}, TypeError, "^mask_token_id: expected an int, got bool"),
            ({"masking_schedule": "cosin"}, ValueError, "^masking_schedule: expected cosine.*, got 'cosin'"),
            ({"masking_schedule": []}, ValueError, "^masking_schedule: expected .*, got no ratio"),
            ({"masking_schedule": [0.5, 1.5]}, ValueError, r"^masking_schedule: expected ratios in \[0, 1\]"),
            ({"masking_schedule": ["0.5"]}, TypeError, "^masking_schedule: expected cosine.*, got str"),
            ({"masking_schedule": 0.5}, TypeError, "^masking_schedule: expected cosine.*, got float"),
            ({"noise_scale": math.nan}, ValueError, "^noise_scale: expected a finite number of at least 0"),
            ({"noise_scale": -1}, ValueError, "^noise_scale: expected a finite number of at least 0"),
            ({"noise_scale": "abs_cos"}, ValueError, "^noise_scale: expected a number, .*, got 'abs_cos'"),
            ({"noise_scale": [1.0, math.inf]}, ValueError, "^noise_scale: expected a finite number of at least 0"),
            ({"noise_scale": 1e39}, ValueError, "^noise_scale: expected a finite number of at least 0"),
            ({"momentum": "x:1"}, ValueError, "^momentum: expected a number, .*, got the shape 'x'"),
            ({"momentum": True}, TypeError, "^momentum: expected a number, .*, got bool"),
            ({"differential": {"shares": 0.5}}, TypeError, "^differential: expected keys among .*, got 'shares'"),
            ({"differential": 0.75}, TypeError, "^differential: expected a dict of arguments of Differential"),
            ({"differential": {"share": None}}, TypeError, "^differential.share: expected a number, got NoneType"),
            ({"rng": "numpy"}, ValueError, "^rng: expected 'philox' or 'torch', got 'numpy'"),
            ({"backend": "gpu"}, ValueError, "^backend: expected one of .*, got 'gpu'"),
            ({"backend": None}, ValueError, "^backend: expected one of .*, got None"),
        ],
    )
    def test_arguments_are_checked_when_they_are_given(self, arguments, error, message):
        with pytest.raises(error, match=message):
            MGTScheduler(**{"mask_token_id": MASK, **arguments})
        scheduler = philox()
        before = dict(scheduler.config)
        with pytest.raises(error, match=message):
            scheduler.register_to_config(**arguments)
        assert dict(scheduler.config) == before
        with pytest.raises(error, match=message):
            MGTScheduler.from_config({"mask_token_id": MASK, **arguments})

    def test_what_only_set_timesteps_can_know(self):
        for name, value in (("masking_schedule", [0.5] * 5), ("noise_scale", [1.0] * 5), ("momentum", [0.1] * 5)):
            with pytest.raises(ValueError, match=rf"^{name}: expected (.* )?6 "):
                philox(6, **{name: value})


@pytest.mark.parametrize("rng", ["philox", "torch"])
class TestPublicTensors:
    """`temperatures` and `timesteps` may be changed."""

    def last(self, scheduler):
        return list(steps_of(scheduler, seeded(0)))[-1]

    def test_temperatures(self, rng):
        expected = self.last(philox(temperature=(20, 20), rng=rng))
        assert not torch.equal(expected, self.last(philox(rng=rng)))
        in_place, replaced, listed = (philox(rng=rng) for _ in range(3))
        in_place.temperatures.fill_(20.0)
        replaced.temperatures = torch.full((6,), 20.0)
        listed.temperatures = [20.0] * 6
        for scheduler in (in_place, replaced, listed):
            assert torch.equal(self.last(scheduler), expected)

    def test_temperatures_within_a_run(self, rng):
        amused = AmusedScheduler(MASK)
        amused.set_timesteps(6)
        ours, samples = philox(rng="torch"), [all_masked(2)] * 2
        generators = seeded(0), seeded(0)
        for timestep in amused.timesteps:
            for i, scheduler in enumerate((amused, ours)):
                scheduler.temperatures.mul_(1.5)
                logits = logits_4d(2, seed=int(timestep))
                samples[i] = scheduler.step(logits, timestep, samples[i], generator=generators[i]).prev_sample
            assert torch.equal(*samples)

    def test_timesteps_of_a_part(self, rng):
        """As in the original: the step is where the timestep stands, T is how many there are."""
        amused, ours = AmusedScheduler(MASK), philox(12, rng=rng)
        amused.set_timesteps(12)
        for scheduler in (amused, ours):
            scheduler.timesteps = torch.tensor([11, 8, 5, 2, 0])
        counts, samples, generators = [[], []], [all_masked(2)] * 2, (seeded(0), seeded(0))
        for timestep in amused.timesteps:
            for i, scheduler in enumerate((amused, ours)):
                logits = logits_4d(2, seed=int(timestep))
                samples[i] = scheduler.step(logits, timestep, samples[i], generator=generators[i]).prev_sample
                counts[i].append((samples[i] == MASK).sum((1, 2)).tolist())
        assert counts[0] == counts[1]
        assert rng == "philox" or torch.equal(*samples)
        assert ours.num_inference_steps == 5
        with pytest.raises(ValueError, match=r"^timestep: expected one of \[11, 8, 5, 2, 0\], got 7"):
            ours.step(logits_4d(2), 7, samples[1])

    def test_too_few_temperatures(self, rng):
        scheduler = philox(rng=rng)
        scheduler.temperatures = scheduler.temperatures[:1]
        with pytest.raises(ValueError, match=r"^temperatures: expected a value for each of 6 timesteps, got 1"):
            self.last(scheduler)

    def test_of_inference_mode(self, rng):
        expected = self.last(philox(rng=rng))
        with torch.inference_mode():
            scheduler = philox(rng=rng)
            assert torch.equal(self.last(scheduler), expected)
            scheduler.temperatures.fill_(20.0)
            assert not torch.equal(self.last(scheduler), expected)


@pytest.mark.parametrize("rng", ["philox", "torch"])
class TestArgumentsOfAStep:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"starting_mask_ratio": torch.tensor(math.nan)},
                ValueError,
                r"^starting_mask_ratio: .* in \[0, 1\], got nan",
            ),
            ({"starting_mask_ratio": torch.tensor([0.5, 7.0])}, ValueError, r"^starting_mask_ratio: .* in \[0, 1\]"),
            ({"starting_mask_ratio": torch.tensor(-0.1)}, ValueError, r"^starting_mask_ratio: .* in \[0, 1\]"),
            (
                {"starting_mask_ratio": torch.ones(3)},
                ValueError,
                r"^starting_mask_ratio: .* 2 samples, got shape \(3,\)",
            ),
            ({"starting_mask_ratio": math.nan}, ValueError, r"^starting_mask_ratio: .* in \[0, 1\], got nan"),
            ({"starting_mask_ratio": "1"}, TypeError, "^starting_mask_ratio: expected a number or a tensor"),
            ({"starting_mask_ratio": None}, TypeError, "^starting_mask_ratio: expected a number or a tensor"),
            ({"timestep": 4.5}, ValueError, r"^timestep: expected one of \[5, 4, 3, 2, 1, 0\], got 4.5"),
            ({"timestep": "4"}, TypeError, "^timestep: expected a number or a tensor of one, got str"),
            ({"timestep": torch.tensor([4, 3])}, TypeError, "^timestep: expected a number or a tensor of one"),
            ({"generator": 0}, TypeError, "^generator: expected a torch.Generator, a list of them or None, got int"),
            ({"generator": [None, None]}, TypeError, "^generator: expected a torch.Generator, a list"),
            (
                {"sample": torch.zeros(2, H, W, dtype=torch.int64, device="meta")},
                ValueError,
                "^sample: expected device",
            ),
        ],
    )
    def test_bad_ones_are_named_and_begin_no_run(self, rng, arguments, error, message):
        scheduler, generator = philox(rng=rng), seeded(0)
        state = generator.get_state()
        with pytest.raises(error, match=message):
            scheduler.step(
                **{
                    "model_output": logits_4d(2),
                    "timestep": 5,
                    "sample": all_masked(2),
                    "generator": generator,
                    **arguments,
                }
            )
        assert torch.equal(generator.get_state(), state)

    def test_numbers_of_every_kind(self, rng):
        expected = philox(rng=rng).step(logits_4d(2), 5, all_masked(2), 0.5, generator=seeded(0)).prev_sample
        for timestep in (np.int64(5), torch.tensor(5), torch.tensor([5]), torch.tensor(5, dtype=torch.int32), 5.0):
            output = philox(rng=rng).step(
                logits_4d(2), timestep, all_masked(2), generator=seeded(0), starting_mask_ratio=0.5
            )
            assert torch.equal(output.prev_sample, expected)
        for ratio in (np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5], [0.5]]).double()):
            output = philox(rng=rng).step(logits_4d(2), 5, all_masked(2), ratio, generator=seeded(0))
            assert torch.equal(output.prev_sample, expected)
        noised = [philox(rng=rng).add_noise(all_masked(2) * 0, t, seeded(0)) for t in (3, np.int64(3), torch.tensor(3))]
        assert all(torch.equal(each, noised[0]) for each in noised)

    def test_logits_that_require_a_gradient(self, rng):
        output = philox(rng=rng).step(logits_4d(2).requires_grad_(), 5, all_masked(2), generator=seeded(0))
        expected = philox(rng=rng).step(logits_4d(2), 5, all_masked(2), generator=seeded(0))
        assert torch.equal(output.prev_sample, expected.prev_sample)


def test_logits_of_float64_are_refused():
    with pytest.raises(TypeError, match=r"^model_output: expected float32, bfloat16 or float16, got torch.float64"):
        philox().step(logits_4d(2).double(), 5, all_masked(2))


def test_what_a_gpu_kernel_could_not_draw_does_not_reach_the_decoder(monkeypatch):
    """A GPU's kernels cannot raise; a stand-in marks a row as they do."""
    from mgt_sampler import draw as draws

    def draw(*args, **kwargs):
        drawn = original(*args, **kwargs)
        drawn.token_ids[1, 7], drawn.logprob[1, 7] = MASK, -1e30
        return drawn

    original = draws.sample_tokens
    monkeypatch.setattr(draws, "sample_tokens", draw)
    scheduler = philox()
    run_ = steps_of(scheduler, seeded(0))
    for _ in range(5):
        next(run_)
    with pytest.raises(ValueError, match=r"^model_output: expected finite logits.* sample 1, position 7"):
        next(run_)


def test_momentum_keeps_no_memory_of_the_model():
    """A model may write its logits to the same memory at every call."""
    outputs, buffer = [], torch.empty_like(logits_4d(2))
    for shared in (False, True):
        scheduler, sample, generator = philox(momentum=0.4), all_masked(2), seeded(0)
        for timestep in scheduler.timesteps:
            logits = logits_4d(2, seed=int(timestep))
            logits = buffer.copy_(logits) if shared else logits
            sample = scheduler.step(logits, timestep, sample, generator=generator).prev_sample
        outputs.append(sample)
    assert torch.equal(*outputs)
