"""Nothing ambient: no result depends on PyTorch's default dtype, default device or device context."""

import math

import pytest
import torch
from ambient import default_device, default_dtype, flush_denormals

from mgt_sampler import Differential, ZSampling, generate
from mgt_sampler.evaluation import metrics
from mgt_sampler.evaluation.intervals import jackknife
from mgt_sampler.images import image_grid, save_grid, save_trajectory, trajectory_images
from mgt_sampler.models.markov import MarkovModel, total_variation
from mgt_sampler.sampling import sample_seeds
from mgt_sampler.schedules import mask_len, mask_lens, mask_ratio, mask_ratios

N, V, MASK = 16, 8, 8


AMBIENT = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "device context meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "denormals are zero": flush_denormals,
}


def cpu_randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class Model:
    """A table of logits by class and masked count; its tensors were made before."""

    num_tokens, codebook_size, mask_token_id = N, V, MASK

    def __init__(self):
        self.by_class, self.by_count = cpu_randn(4, N, V), cpu_randn(N + 1, 1, V, seed=1)
        self.by_neighbour = cpu_randn(V + 1, V, seed=2)

    def predict_logits(self, tokens, condition):
        condition = tokens.new_full((len(tokens),), 3) if condition is None else condition
        count = self.by_count[(tokens == MASK).sum(1)]
        return self.by_class[condition] + self.by_neighbour[tokens.roll(1, 1)] + count

    def decode(self, tokens):
        return (tokens.float() / V).view(-1, 1, 4, 4)


def generated(model):
    tokens = model.by_class.new_full((3, N), MASK, dtype=torch.int64)
    states = []
    settings = {
        "num_inference_steps": 5,
        "guidance_scale": (1.0, 3.0),
        "noise_scale": "abs_cos:1",
        "mask_schedule": "pow0.6",
        "differential": Differential(),
        "z_sampling": ZSampling(0.5),
        "momentum": 0.2,
        "skip": [2],
        "progress": False,
    }
    outputs = [
        generate(model, labels=[0, 1, 2], callback=lambda s: states.append((s.tokens, s.mask)), **settings),
        generate(model, labels=1, num_samples=2, num_inference_steps=3, seed=5, progress=False),
        generate(model, labels=[0, 1, 2], tokens=tokens, num_inference_steps=2, seed=3, progress=False),
    ]
    yield from (tensor for output in outputs for tensor in (output.tokens, output.images, output.seed))
    yield trajectory_images(model, states)


def scheduled(logits, tokens):
    diffusers = pytest.importorskip("diffusers")
    assert diffusers
    from mgt_sampler import MGTScheduler

    configs = (
        {"masking_schedule": "linear", "noise_scale": "abs_cos:1"},
        {"differential": {"share": 0.75}, "momentum": 0.2},
        {"rng": "torch", "noise_scale": 0.5},
    )
    for config in configs:
        scheduler = MGTScheduler(MASK, **config)
        scheduler.set_timesteps(6, (2.3, 0.1))
        sample, generator = tokens, torch.Generator().manual_seed(0)
        yield scheduler.add_noise(tokens.new_zeros(3, N), 3, generator)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(logits[int(timestep)], timestep, sample, 0.9, generator).prev_sample
            yield sample
        yield scheduler.timesteps
        yield scheduler.temperatures


def measured(tokens, images, features, labels, model):
    yield from metrics.token_entropy(tokens, V)
    yield metrics.class_accuracy(features, labels)
    yield metrics.pixel_spread(images, labels, num_classes=4)
    mean, covariance = metrics.feature_statistics(features)
    other = metrics.feature_statistics(features.flip(0) * 0.5)
    yield torch.tensor(
        [
            metrics.frechet_distance(mean, covariance, *other),
            metrics.kernel_distance(features, features * 0.5),
            *metrics.density_coverage(features, features.flip(1), 3),
            *metrics.winning_rate(features[:, 0], features[:, 1]),
            *total_variation(model, tokens[:, :4] % 3),
        ],
        dtype=torch.float64,
        device="cpu",
    )
    estimate = jackknife(lambda kept: {"mean": features[kept].mean()}, 6)["mean"]
    yield from (estimate.value, estimate.half_width)


def schedules(num_masked, r):
    values = [*mask_ratios("cosine", 6, 256), *mask_ratios([0.3, 0.1], 2, 256), *map(float, mask_lens("log", 7, 100))]
    yield torch.tensor(values, dtype=torch.float64, device="cpu")
    yield from (mask_ratio(r, name) for name in ("cosine", "pow0.6", "arccos", "log", "exp", "sigmoid"))
    yield mask_len(num_masked, 0.3, 256)
    yield sample_seeds(-3, 5)


def everything(tmp_path, model, chain, logits, tokens, labels, images, features, r, num_masked):
    """Every result, and files as bytes."""
    yield from generated(model)
    yield from scheduled(logits, tokens)
    yield from measured(logits[0].argmax(-1), images, features, labels, chain)
    yield from schedules(num_masked, r)
    new_chain = MarkovModel(4, 3)
    yield from (new_chain.transition, new_chain.predict_logits(tokens[:, :4] % 4, None), new_chain.decode(tokens % 3))
    yield image_grid(images).tobytes()
    save_grid(images, tmp_path / "a.png")
    save_trajectory(images[None].expand(3, -1, -1, -1, -1), tmp_path / "a.gif")
    yield from ((tmp_path / name).read_bytes() for name in ("a.png", "a.gif"))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "model": Model(),
        "chain": MarkovModel(4, 3),
        "logits": cpu_randn(6, 3, N, V, seed=3),
        "tokens": torch.full((3, N), MASK),
        "labels": torch.tensor([0, 1, 0, 1, 2, 0]),
        "images": torch.rand(6, 1, 4, 4, generator=generator),
        "features": cpu_randn(6, 4, seed=4),
        "r": torch.arange(1, 7, dtype=torch.float32) / 6,
        "num_masked": torch.tensor([5, 100, 256]),
    }


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    return list(everything(tmp_path_factory.mktemp("expected"), **inputs))


@pytest.mark.parametrize("state", AMBIENT)
def test_the_same_bits_in_every_ambient_state(state, inputs, expected, tmp_path):
    with AMBIENT[state]():
        found = list(everything(tmp_path, **inputs))
    assert len(found) == len(expected) > 50
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if isinstance(theirs, bytes):
            assert ours == theirs, i
            continue
        assert ours.dtype == theirs.dtype and ours.device == theirs.device, i
        assert torch.equal(ours.nan_to_num(math.pi), theirs.nan_to_num(math.pi)), i
