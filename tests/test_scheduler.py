"""`MGTScheduler`: rng="torch" is `AmusedScheduler` bit for bit, rng="philox" has a law of its own."""

import copy
import subprocess
import sys

import pytest
import torch

from mgt_sampler.schedules import mask_lens

diffusers = pytest.importorskip("diffusers")

from diffusers import AmusedScheduler  # noqa: E402

from mgt_sampler import MGTScheduler, MGTSchedulerOutput  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

MASK, V, H, W = 40, 32, 4, 8
N = H * W


@pytest.fixture
def one_thread():
    # thousands of tiny ops, which a second thread only slows down
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        from mgt_sampler import techniques as module

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
            run(philox(rng=rng, **config), seeded(0))

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
