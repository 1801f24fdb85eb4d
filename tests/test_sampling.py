"""`generate` on a model of a few lines, whose logits for a sample are the same bits in every batch."""

import math

import numpy as np
import pytest
import torch

from mgt_sampler import Differential, GenerateOutput, ZSampling, generate
from mgt_sampler.sampling import sample_seeds
from mgt_sampler.schedules import mask_lens

N, V, MASK, NUM_CLASSES = 16, 8, 8, 3


class TinyModel:
    """A masked generative model in a few lines: a table of logits by class, and one by the left neighbour."""

    num_tokens, codebook_size, mask_token_id = N, V, MASK

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.by_class = 2 * torch.randn(NUM_CLASSES + 1, N, V, generator=generator)
        self.by_neighbour = torch.randn(V + 1, V, generator=generator)
        self.calls = []

    def predict_logits(self, tokens, condition):
        self.calls.append(condition)
        if condition is None:
            condition = torch.full((len(tokens),), NUM_CLASSES)
        return self.by_class[condition] + self.by_neighbour[tokens.roll(1, dims=1)]

    def decode(self, tokens):
        return (tokens / (V - 1)).view(-1, 1, 4, 4)


@pytest.fixture
def model():
    return TinyModel()


def sample(model, **kwargs):
    return generate(model, **{"progress": False, "labels": [0, 1, 2], "num_inference_steps": 5, **kwargs})


def half_known():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (3, N), generator=generator)
    for row, num_masked in zip(tokens, (4, 9, 16), strict=True):
        row[torch.randperm(N, generator=generator)[:num_masked]] = MASK
    return tokens


def test_output(model):
    output = sample(model)
    assert isinstance(output, GenerateOutput)
    assert output.tokens.shape == (3, N) and output.tokens.dtype == torch.int64
    assert output.tokens.min() >= 0 and output.tokens.max() < V
    assert output.images.shape == (3, 1, 4, 4) and output.images.dtype == torch.float32
    assert torch.equal(output.images, model.decode(output.tokens))


def test_images_are_clamped(model):
    model.decode = lambda tokens: torch.full((len(tokens), 1, 2, 2), 1.5, dtype=torch.bfloat16)
    images = sample(model).images
    assert images.dtype == torch.float32 and images.max() == 1


@pytest.mark.parametrize("num_inference_steps", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("schedule", ["cosine", "pow0.6", "log", [0.3] * 40])
def test_masked_counts(model, num_inference_steps, schedule):
    if isinstance(schedule, list):
        schedule = schedule[:num_inference_steps]
    counts = []
    sample(
        model,
        num_inference_steps=num_inference_steps,
        mask_schedule=schedule,
        callback=lambda step: counts.append(step.mask.sum(1).tolist()),
    )
    expected = mask_lens(schedule, num_inference_steps, N)
    assert counts == [[count] * 3 for count in expected]


def test_callback_sees_every_step(model):
    seen, known = [], torch.zeros(3, N, dtype=torch.bool)
    output = sample(model, temperature=0.0, callback=seen.append)
    assert [step.step for step in seen] == [step.draw for step in seen] == [0, 1, 2, 3, 4]
    for step in seen:
        tokens, logprob, mask = step.tokens, step.logprob, step.mask
        assert tokens.dtype == torch.int64 and logprob.dtype == torch.float32 and mask.dtype == torch.bool
        assert tokens.max() < V
        assert (logprob[known] == math.inf).all() and (logprob[~known] <= 0).all()
        # at temperature 0 the least confident are masked again
        for row, masked in zip(logprob, mask, strict=True):
            assert not masked.any() or row[masked].max() <= row[~masked].min()
        known = ~mask
    assert torch.equal(seen[-1].tokens, output.tokens) and known.all()


def test_a_token_stays_once_it_is_known(model):
    seen = []
    output = sample(model, callback=seen.append)
    for step in seen:
        assert torch.equal(step.tokens[~step.mask], output.tokens[~step.mask])


def test_known_tokens_are_kept_and_counts_start_from_the_masked(model):
    start, counts = half_known(), []
    output = sample(model, tokens=start, callback=lambda step: counts.append(step.mask.sum(1)))
    known = start != MASK
    assert torch.equal(output.tokens[known], start[known]) and (output.tokens != MASK).all()
    assert torch.stack(counts, 1).tolist() == [mask_lens("cosine", 5, n) for n in (4, 9, 16)]


def test_inputs_are_not_written(model):
    tokens, labels, seed = half_known(), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    copies = tokens.clone(), labels.clone(), seed.clone(), model.by_class.clone()
    first = sample(model, tokens=tokens, labels=labels, seed=seed, guidance_scale=2.0, noise_scale=1.0)
    for value, copy in zip((tokens, labels, seed, model.by_class), copies, strict=True):
        assert torch.equal(value, copy)
    second = sample(model, tokens=tokens, labels=labels, seed=seed, guidance_scale=2.0, noise_scale=1.0)
    assert torch.equal(first.tokens, second.tokens)


def test_everything_known_comes_back_without_a_model_call(model):
    tokens = torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(2))
    output = sample(model, tokens=tokens)
    assert torch.equal(output.tokens, tokens) and output.tokens is not tokens
    assert model.calls == []
    output.tokens.zero_()
    assert tokens.any()


def test_one_sample_of_the_batch_known(model):
    tokens = half_known()
    tokens[1] = 3
    output = sample(model, tokens=tokens)
    assert torch.equal(output.tokens[1], tokens[1]) and (output.tokens != MASK).all()


def test_empty_batch(model):
    for kwargs in ({"num_samples": 0, "labels": None}, {"labels": []}):
        output = sample(model, **kwargs)
        assert output.tokens.shape == (0, N) and output.images.shape == (0, 1, 4, 4)


SETTINGS = {"guidance_scale": (1.0, 3.0), "noise_scale": "abs_cos:1", "temperature": 1.5}


def test_a_sample_alone_equals_itself_in_a_batch(model, backend):
    labels = torch.arange(13) % NUM_CLASSES
    batch = sample(model, labels=labels, seed=11, backend=backend, **SETTINGS)
    for i in (0, 1, 7, 12):
        seed = batch.seed[i : i + 1]
        alone = sample(model, labels=labels[i : i + 1], seed=seed, backend=backend, **SETTINGS)
        assert torch.equal(alone.tokens[0], batch.tokens[i])
    backwards = sample(model, labels=labels.flip(0), seed=batch.seed.flip(0), backend=backend, **SETTINGS)
    assert torch.equal(backwards.tokens.flip(0), batch.tokens)
    # other seeds must not pass for the same
    assert not torch.equal(sample(model, labels=labels, seed=12, **SETTINGS).tokens, batch.tokens)


def test_backends_agree(model, backend):
    expected = sample(model, seed=3, **SETTINGS).tokens
    assert torch.equal(sample(model, seed=3, backend=backend, **SETTINGS).tokens, expected)


@pytest.mark.parametrize("seed", [0, 1, -1, 7, 2**63, 2**70 + 3])
def test_seeds_of_an_int(model, seed):
    seeds = sample(model, seed=seed).seed
    assert torch.equal(seeds, sample_seeds(seed, 3))
    assert torch.equal(seeds, sample_seeds(seed, 10)[:3])
    assert [s % 2**64 for s in seeds.tolist()] == [(seed * 0x9E3779B97F4A7C15 + i) % 2**64 for i in range(3)]


def test_neighbouring_seeds_share_no_sample():
    seeds = torch.cat([sample_seeds(seed, 1000) for seed in range(-20, 20)])
    assert len(seeds.unique()) == 40 * 1000


def test_the_global_generator_is_untouched(model):
    before = torch.get_rng_state()
    sample(model, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_1_makes_no_unconditional_pass(model):
    sample(model, guidance_scale=1.0)
    assert len(model.calls) == 5 and all(condition is not None for condition in model.calls)
    model.calls.clear()
    sample(model, guidance_scale=[1, 2, 1, 0, 1])
    assert [condition is None for condition in model.calls] == [False, False, True, False, True, False]


def test_guidance_formula(model):
    class Guided(TinyModel):
        def predict_logits(self, tokens, condition):
            cond, uncond = (TinyModel.predict_logits(self, tokens, c) for c in (condition, None))
            return uncond + 4.0 * (cond - uncond)

    assert torch.equal(sample(model, guidance_scale=4.0).tokens, sample(Guided()).tokens)
    assert not torch.equal(sample(model, guidance_scale=4.0).tokens, sample(model).tokens)


def test_unconditional(model):
    output = sample(model, labels=None, num_samples=2)
    assert output.tokens.shape == (2, N) and model.calls == [None] * 5


def test_labels_may_be_one_class_or_any_tensor(model):
    one = sample(model, labels=2, num_samples=3)
    assert torch.equal(one.tokens, sample(model, labels=[2, 2, 2]).tokens)
    model.by_class = torch.zeros(1, N, V)
    model.predict_logits = lambda tokens, embedding: embedding[:, None, :].expand(-1, N, -1).contiguous()
    embeddings = torch.eye(V)[:2] * 100
    assert sample(model, labels=embeddings).tokens.tolist() == [[0] * N, [1] * N]


def test_token_temperature_0_takes_the_likeliest(model):
    output = sample(model, token_temperature=0.0, num_inference_steps=1)
    logits = model.predict_logits(torch.full((3, N), MASK), torch.tensor([0, 1, 2]))
    assert torch.equal(output.tokens, logits.argmax(-1))


def test_drawn_tokens_follow_the_softmax(model):
    labels = torch.zeros(4000, dtype=torch.int64)
    tokens = sample(model, labels=labels, num_inference_steps=1).tokens
    logits = model.predict_logits(torch.full((1, N), MASK), torch.tensor([0]))[0]
    expected = 4000 * logits.double().softmax(-1)
    observed = torch.nn.functional.one_hot(tokens, V).sum(0)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # N rows of V - 1 degrees of freedom: 112 on average, and above 172 once in 5,000 seeds
    assert chi_square < 172


def test_noise_and_temperature_matter(model):
    base = sample(model).tokens
    assert not torch.equal(sample(model, noise_scale=2.0).tokens, base)
    assert not torch.equal(sample(model, temperature=20.0).tokens, base)
    assert not torch.equal(sample(model, token_temperature=3.0).tokens, base)
    assert torch.equal(sample(model, noise_scale=0.0, temperature=[2, 1.5, 1, 0.5, 0]).tokens, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(model, dtype):
    model.by_class, model.by_neighbour = model.by_class.to(dtype), model.by_neighbour.to(dtype)
    assert (sample(model, guidance_scale=3.0).tokens != MASK).all()


def test_logits_with_unit_stride_over_positions(model):
    base = sample(model).tokens
    predict = model.predict_logits
    model.predict_logits = lambda *args: predict(*args).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sample(model).tokens, base)


def test_progress_bar(model, capsys):
    sample(model, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err
    sample(model, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "error", "kwargs"),
    [
        ("num_inference_steps", ValueError, {"num_inference_steps": 0}),
        ("num_inference_steps", TypeError, {"num_inference_steps": 2.5}),
        ("guidance_scale", ValueError, {"guidance_scale": float("nan")}),
        ("guidance_scale", ValueError, {"guidance_scale": 3.0, "labels": None}),
        ("temperature", ValueError, {"temperature": -1.0}),
        ("token_temperature", ValueError, {"token_temperature": float("inf")}),
        ("noise_scale", ValueError, {"noise_scale": "abs_cos"}),
        ("noise_scale", ValueError, {"noise_scale": [1.0, 2.0, 3.0]}),
        ("mask_schedule", ValueError, {"mask_schedule": "cosin"}),
        ("mask_schedule", ValueError, {"mask_schedule": [0.5, 0.2]}),
        ("seed", TypeError, {"seed": 1.5}),
        ("seed", TypeError, {"seed": torch.tensor([1.0, 2.0, 3.0])}),
        ("seed", TypeError, {"seed": torch.tensor(1)}),
        ("seed", ValueError, {"seed": torch.tensor([1, 2])}),
        ("labels", ValueError, {"num_samples": 2}),
        ("labels", TypeError, {"labels": ["sneaker"]}),
        ("labels", TypeError, {"labels": 1.5}),
        ("num_samples", TypeError, {"num_samples": 2.0, "labels": None}),
        ("num_samples", ValueError, {"num_samples": -1, "labels": None}),
        ("tokens", TypeError, {"tokens": torch.full((3, N), MASK, dtype=torch.int32)}),
        ("tokens", TypeError, {"tokens": [[MASK] * N] * 3}),
        ("tokens", ValueError, {"tokens": torch.full((3, N + 1), MASK)}),
        ("tokens", ValueError, {"tokens": torch.full((3, N), MASK + 1)}),
        ("backend", ValueError, {"backend": "abacus"}),
    ],
)
def test_bad_arguments_are_named(model, name, error, kwargs):
    with pytest.raises(error, match=rf"^{name}: .*, got "):
        sample(model, **kwargs)


def test_a_bad_token_is_named_with_its_place(model):
    tokens = half_known()
    tokens[1, 4] = -1
    with pytest.raises(ValueError, match=r"^tokens: .* got -1 at sample 1, position 4"):
        sample(model, tokens=tokens)


def test_logits_of_another_shape_are_named(model):
    model.codebook_size = V - 1
    with pytest.raises(ValueError, match=r"^model.predict_logits: expected .*\(3, 16, 7\), got \(3, 16, 8\)"):
        sample(model)


def test_what_a_gpu_kernel_could_not_draw_is_named_with_its_place(model, monkeypatch):
    from mgt_sampler import draw as draws

    def draw(*args, **kwargs):
        drawn = original(*args, **kwargs)
        drawn.token_ids[2, 7] = MASK
        return drawn

    original = draws.sample_tokens
    monkeypatch.setattr(draws, "sample_tokens", draw)
    with pytest.raises(ValueError, match=r"^model.predict_logits: .* sample 2, position 7"):
        sample(model, num_inference_steps=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_named_with_their_place(model, bad):
    model.by_class[1, 5, 2] = bad
    with pytest.raises(ValueError, match=r"sample 1.*position 5"):
        sample(model)


TECHNIQUES = {
    "guided": {"guidance_scale": 5.0},
    "momentum": {"guidance_scale": 5.0, "momentum": 0.3, "skip": [2]},
    "differential": {"guidance_scale": 5.0, "differential": Differential(0.75)},
    "Z": {"guidance_scale": 5.0, "z_sampling": ZSampling(0.5)},
    "Z guided at some steps": {"guidance_scale": [1, 1, 5, 5, 0], "z_sampling": ZSampling(2.0, "official")},
}


class BoundOutput(TinyModel):
    """Writes its logits to the same memory at every call, as a CUDA graph or a bound output does."""

    def __init__(self, offset=0):
        super().__init__()
        self.buffer, self.offset = torch.empty(8 * N * V), offset

    def predict_logits(self, tokens, condition):
        logits = super().predict_logits(tokens, condition)
        # or to memory that laps over the last call's
        start = self.offset * (len(self.calls) % 2)
        place = self.buffer[start : start + logits.numel()].view_as(logits)
        return place.copy_(logits)


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES.keys())
def test_a_model_that_returns_the_same_buffer_at_every_call(model, technique, offset):
    expected, output = (sample(each, **technique) for each in (model, BoundOutput(offset)))
    assert torch.equal(output.tokens, expected.tokens)
    assert output.model_calls == expected.model_calls + 1
    assert not torch.equal(output.tokens, sample(model, **{**technique, "guidance_scale": 1.0}).tokens)


def test_logits_of_a_model_with_memory_of_its_own_are_not_copied(model, monkeypatch):
    from mgt_sampler import draw as draws

    made, drawn = [], []
    predict, draw = model.predict_logits, draws.sample_tokens

    def predicted(*args):
        made.append(predict(*args))
        return made[-1]

    def seen(logits, *args, **kwargs):
        drawn.append((logits.data_ptr(), kwargs["uncond_logits"].data_ptr()))
        return draw(logits, *args, **kwargs)

    model.predict_logits = predicted
    monkeypatch.setattr(draws, "sample_tokens", seen)
    sample(model, guidance_scale=5.0)
    assert drawn == [(made[k].data_ptr(), made[k + 1].data_ptr()) for k in range(0, 10, 2)]


def test_a_model_that_writes_to_its_inputs(model):
    labels, tokens = torch.tensor([0, 1, 2]), half_known()

    class Writes(TinyModel):
        def predict_logits(self, tokens, condition):
            logits = super().predict_logits(tokens, condition).clone()
            tokens.fill_(3)
            if condition is not None:
                condition.add_(1)
            return logits

        def decode(self, tokens):
            images = super().decode(tokens).clone()
            tokens.fill_(MASK)
            return images

    for given in ({"labels": labels}, {"labels": 2, "num_samples": 3}):
        arguments = {"guidance_scale": 2.0, "tokens": tokens, **given}
        output, expected = sample(Writes(), **arguments), sample(model, **arguments)
        assert torch.equal(output.tokens, expected.tokens) and torch.equal(output.images, expected.images)
    assert labels.tolist() == [0, 1, 2] and torch.equal(tokens, half_known())


def test_a_callback_may_write_to_what_it_is_given(model):
    def spoil(step):
        for tensor in (step.tokens, step.logprob, step.divergence):
            tensor.fill_(-1)
        step.mask.logical_not_()

    settings = {"guidance_scale": 2.0, "differential": Differential(), "z_sampling": ZSampling(steps=[1])}
    output, expected = sample(model, callback=spoil, **settings), sample(model, **settings)
    assert torch.equal(output.tokens, expected.tokens) and torch.equal(output.images, expected.images)


def test_seeds_are_not_those_of_the_caller(model):
    seeds = torch.tensor([5, 6, 7])
    output = sample(model, seed=seeds, callback=lambda step: seeds.zero_())
    assert output.seed.tolist() == [5, 6, 7]
    assert torch.equal(output.tokens, sample(model, seed=[5, 6, 7]).tokens)


def test_numbers_of_every_kind(model):
    plain = {
        "labels": [0, 1, 2],
        "num_samples": 3,
        "num_inference_steps": 5,
        "guidance_scale": 2.0,
        "temperature": (2.0, 0.5),
        "token_temperature": 0.5,
        "noise_scale": 1.0,
        "mask_schedule": [0.75, 0.5, 0.25, 0.125, 0.0],
        "momentum": 0.25,
        "skip": [2],
        "differential": Differential(0.5),
        "z_sampling": ZSampling(0.5, steps=[1]),
        "seed": 7,
    }
    of_numpy = {
        "labels": np.array([0, 1, 2], dtype=np.int32),
        "num_samples": np.int8(3),
        "num_inference_steps": np.int64(5),
        "guidance_scale": np.float32(2),
        "temperature": np.array([2.0, 0.5], dtype=np.float16),
        "token_temperature": np.float64(0.5),
        "noise_scale": np.int64(1),
        "mask_schedule": np.array([0.75, 0.5, 0.25, 0.125, 0.0], dtype=np.float32),
        "momentum": np.float16(0.25),
        "skip": np.array([2]),
        "differential": Differential(np.float32(0.5)),
        "z_sampling": ZSampling(np.float32(0.5), steps=np.array([1], dtype=np.uint8)),
        "seed": np.int64(7),
    }
    of_torch = {
        **of_numpy,
        "labels": torch.tensor([0, 1, 2]),
        "guidance_scale": torch.tensor(2.0),
        "temperature": torch.tensor([2.0, 0.5], dtype=torch.bfloat16),
        "noise_scale": torch.tensor(1),
        "mask_schedule": torch.tensor([0.75, 0.5, 0.25, 0.125, 0.0]),
        "num_inference_steps": torch.tensor(5),
        "skip": torch.tensor([2]),
        "differential": Differential(torch.tensor(0.5)),
        "z_sampling": ZSampling(torch.tensor(0.5), steps=range(1, 2)),
    }
    expected = sample(model, **plain).tokens
    for arguments in (of_numpy, of_torch):
        assert torch.equal(sample(model, **arguments).tokens, expected)
    seeds = sample_seeds(7, 3)
    for seed in (seeds.numpy(), seeds.tolist(), list(seeds), seeds.numpy().view(np.uint64)):
        assert torch.equal(sample(model, **{**plain, "seed": seed}).tokens, expected)
    small = torch.tensor([1, 2, 3], dtype=torch.int32)
    assert torch.equal(sample(model, seed=small).tokens, sample(model, seed=small.long()).tokens)
    one_class = sample(model, labels=2, num_samples=3).tokens
    for label in (np.int64(2), torch.tensor(2), np.array(2)):
        assert torch.equal(sample(model, labels=label, num_samples=3).tokens, one_class)


def test_a_model_whose_sizes_are_numpy_s(model):
    expected = sample(model).tokens
    model.num_tokens, model.codebook_size, model.mask_token_id = np.int64(N), np.int32(V), torch.tensor(MASK)
    assert torch.equal(sample(model).tokens, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.repeat_interleave(2, -1)[..., ::2],
        lambda logits: logits.repeat_interleave(2, 1)[:, ::2].transpose(1, 2).contiguous().transpose(1, 2),
        lambda logits: logits.requires_grad_(),
        lambda logits: torch.nn.Parameter(logits),
    ],
    ids=["no unit stride", "unit stride over positions", "requires a gradient", "a parameter"],
)
@pytest.mark.parametrize("halves", ["both", "conditional"])
def test_logits_as_a_model_may_have_them(model, change, halves):
    predict = model.predict_logits

    def changed(tokens, condition):
        with torch.enable_grad():
            logits = predict(tokens, condition)
            return change(logits) if halves == "both" or condition is not None else logits

    settings = {"guidance_scale": 3.0, "momentum": 0.1, "z_sampling": ZSampling(0.5)}
    expected = sample(model, **settings).tokens
    plain = sample(model, guidance_scale=3.0).tokens
    model.predict_logits = changed
    output = sample(model, **settings)
    assert torch.equal(output.tokens, expected) and not output.images.requires_grad
    assert torch.equal(sample(model, guidance_scale=3.0).tokens, plain)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (
            torch.zeros(3, N, V, dtype=torch.float64),
            TypeError,
            "expected float32, bfloat16 or float16, got torch.float64",
        ),
        (torch.zeros(3, N, V, dtype=torch.int64), TypeError, "expected float32, bfloat16 or float16, got torch.int64"),
        (torch.zeros(3, N, V + 1), ValueError, r"expected logits of shape \(3, 16, 8\), got \(3, 16, 9\)"),
        (torch.zeros(3, N, V, device="meta"), ValueError, "expected logits on cpu, got them on meta"),
        ((torch.zeros(3, N, V),), TypeError, "expected a tensor, got tuple"),
        (None, TypeError, "expected a tensor, got NoneType"),
    ],
)
def test_what_no_kernel_could_read_is_named(model, logits, error, message):
    model.predict_logits = lambda tokens, condition: logits
    with pytest.raises(error, match=f"^model.predict_logits: {message}"):
        sample(model)


def test_images_of_every_kind(model):
    expected = sample(model).images
    decode = model.decode
    model.decode = lambda tokens: decode(tokens).transpose(2, 3).contiguous().transpose(2, 3).double()
    output = sample(model).images
    assert torch.equal(output, expected) and output.is_contiguous() and output.dtype == torch.float32
    for images, error, message in (
        (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), TypeError, r"expected floats in \[0, 1\], got torch.uint8"),
        (torch.zeros(2, 1, 4, 4), ValueError, r"expected 3 images, got shape \(2, 1, 4, 4\)"),
        ([None] * 3, TypeError, "expected a tensor, got list"),
    ):
        model.decode = lambda tokens, images=images: images
        with pytest.raises(error, match=f"^model.decode: {message}"):
            sample(model)


@pytest.mark.parametrize(
    ("name", "error", "kwargs"),
    [
        ("num_inference_steps", TypeError, {"num_inference_steps": True}),
        ("num_inference_steps", TypeError, {"num_inference_steps": "5"}),
        ("guidance_scale", TypeError, {"guidance_scale": True}),
        ("guidance_scale", TypeError, {"guidance_scale": ["1", "2"]}),
        ("guidance_scale", ValueError, {"guidance_scale": 1e39}),
        ("temperature", TypeError, {"temperature": None}),
        ("temperature", ValueError, {"temperature": 10**400}),
        ("mask_schedule", TypeError, {"mask_schedule": torch.ones(5, 2)}),
        ("mask_schedule", TypeError, {"mask_schedule": 0.5}),
        ("mask_schedule", TypeError, {"mask_schedule": b"cosine"}),
        ("guidance_scale", TypeError, {"guidance_scale": {1.0, 2.0}}),
        ("noise_scale", TypeError, {"noise_scale": {0: 1.0, 1: 0.0}}),
        ("labels", TypeError, {"labels": [0.5, 1.5, 2.5]}),
        ("labels", TypeError, {"labels": [True, False, True]}),
        ("labels", TypeError, {"labels": np.array([0.0, 1.0, 2.0])}),
        ("seed", TypeError, {"seed": "seed"}),
        ("seed", TypeError, {"seed": [1.0, 2.0, 3.0]}),
        ("seed", TypeError, {"seed": True}),
        ("seed", TypeError, {"seed": torch.tensor([True] * 3)}),
        ("num_samples", TypeError, {"num_samples": True, "labels": None}),
        ("differential", TypeError, {"differential": {"share": 0.5}}),
        ("z_sampling", TypeError, {"z_sampling": "paper"}),
        ("skip", TypeError, {"skip": torch.tensor(1)}),
        ("callback", TypeError, {"callback": 3}),
        ("backend", ValueError, {"backend": "abacus", "tokens": torch.zeros(3, N, dtype=torch.int64)}),
        ("token_temperature", ValueError, {"token_temperature": [1, 1, 1, 1, 1e-31]}),
    ],
)
def test_more_bad_arguments_are_named_before_the_model_is_called(model, name, error, kwargs):
    with pytest.raises(error, match=rf"^{name}: .*, got "):
        sample(model, **kwargs)
    assert not model.calls


def test_a_model_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"^model: expected one with predict_logits, .*, got NoneType without predict"):
        sample(None)


def test_logits_that_momentum_carries_beyond_float32(model):
    assert (sample(model, momentum=3e38).tokens < V).all()
