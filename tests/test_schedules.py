"""Mask counts against an independent computation and the published samplers, and values of steps."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mgt_sampler.schedules import (
    check_num_inference_steps,
    mask_len,
    mask_lens,
    mask_ratio,
    mask_ratios,
    schedule_values,
)

SIZES = (16, 32, 100, 196, 256, 576, 1024, 2304, 4096)


@pytest.mark.parametrize(
    ("schedule", "num_inference_steps", "expected"),
    [
        ("cosine", 6, [247, 221, 181, 127, 66, 0]),
        ("cosine", 8, [251, 236, 212, 181, 142, 97, 49, 0]),
        ("pow2", 8, [252, 240, 220, 192, 156, 112, 60, 0]),
        ("log", 8, [96, 64, 45, 32, 21, 13, 6, 0]),
        ("exp", 8, [254, 252, 248, 240, 224, 192, 128, 0]),
        ("linear", 8, [224, 192, 160, 128, 96, 64, 32, 0]),
        ("pow1", 8, [224, 192, 160, 128, 96, 64, 32, 0]),
        ("cosine", 1, [0]),
    ],
)
def test_counts_of_256_tokens(schedule, num_inference_steps, expected):
    assert mask_lens(schedule, num_inference_steps, 256) == expected


@pytest.mark.parametrize(("name", "other"), [("square", "pow2"), ("cubic", "pow3"), ("root", "pow0.5")])
def test_powers_have_names(name, other):
    assert mask_lens(name, 12, 256) == mask_lens(other, 12, 256)


def numpy_counts(num_inference_steps, num_positions):
    """The rule of aMUSEd, Meissonic and MaskGIT in NumPy float32, one rounding at a time."""
    counts, masked = [], num_positions
    for k in range(num_inference_steps - 1):
        ratio = np.float32(k + 1) / np.float32(num_inference_steps)
        gamma = np.cos(ratio * np.float32(math.pi) / np.float32(2))
        masked = max(1, min(masked - 1, int(np.floor(np.float32(num_positions) * gamma))))
        counts.append(masked)
    return [*counts, 0]


def test_cosine_counts_equal_numpy_float32():
    for num_positions in SIZES:
        for num_inference_steps in range(1, 65):
            expected = numpy_counts(num_inference_steps, num_positions)
            assert mask_lens("cosine", num_inference_steps, num_positions) == expected
    # in float64 the fourth of six steps keeps 128: the test above would not pass for it
    assert math.floor(256 * math.cos(math.pi / 3) + 1e-9) == 128 and numpy_counts(6, 256)[3] == 127


@pytest.fixture
def one_thread():
    # thousands of tiny ops, which a second thread only slows down
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_counts_equal_amused(schedule, one_thread):
    diffusers = pytest.importorskip("diffusers")
    # seeded: where two of its confidences tie at the cut-off, it masks one fewer
    generator = torch.Generator().manual_seed(0)
    for num_positions in (16, 256):
        for num_inference_steps in range(1, 65):
            amused = diffusers.AmusedScheduler(mask_token_id=2, masking_schedule=schedule)
            amused.set_timesteps(num_inference_steps)
            sample, counts = torch.full((1, num_positions), 2), []
            for timestep in amused.timesteps:
                logits = torch.zeros(1, num_positions, 2)
                sample = amused.step(logits, timestep, sample, generator=generator).prev_sample
                counts.append(int((sample == 2).sum()))
            assert mask_lens(schedule, num_inference_steps, num_positions) == counts


@pytest.mark.parametrize(
    "schedule",
    ["cosine", "linear", "pow0.6", "pow.5", "square", "cubic", "root", "arccos", "log", "exp", "sigmoid"],
)
def test_every_schedule_falls_within_0_and_1(schedule):
    ratios = mask_ratios(schedule, 32, 256)
    assert all(0 <= ratio <= 1 for ratio in ratios)
    assert all(b < a for a, b in itertools.pairwise(ratios))
    assert ratios[-1] < 1e-6
    assert ratios == torch.tensor(ratios, dtype=torch.float32).tolist()


def test_formulas():
    r = torch.tensor([0.25])
    assert mask_ratio(r, "pow0.6") == pytest.approx(1 - 0.25**0.6)
    assert mask_ratio(r, "arccos") == pytest.approx(2 / math.pi * math.acos(0.25))
    sigmoid = [1 / (1 + math.exp(-x)) for x in (3, 6 * 0.25 - 3, -3)]
    expected = (sigmoid[0] - sigmoid[1]) / (sigmoid[0] - sigmoid[2])
    assert mask_ratio(r, "sigmoid") == pytest.approx(expected)
    assert mask_ratio(r, "log", num_positions=16) == pytest.approx(2 / 4)
    assert mask_ratio(r, "exp", num_positions=16) == pytest.approx(1 - 2**-3)


def test_an_array_of_ratios():
    assert mask_lens([0.5, 0.25, 0.9], 3, 100) == [50, 25, 0]
    assert mask_lens(np.array([0.5, 0.25, 0.9]), 3, 100) == [50, 25, 0]
    assert mask_lens(torch.tensor([0.5, 0.25, 0.9]), 3, 100) == [50, 25, 0]


@pytest.mark.parametrize("schedule", ["cosine", "log", "exp", [0.0] * 4, [1.0] * 4])
@pytest.mark.parametrize("num_positions", [1, 2, 3])
def test_more_steps_than_tokens(schedule, num_positions):
    counts = mask_lens(schedule, 4, num_positions)
    assert counts[-1] == 0
    masked = num_positions
    for count in counts[:-1]:
        assert 1 <= count <= max(1, masked - 1)
        masked = count


def test_mask_len_clamps_each_sample():
    num_masked = torch.tensor([0, 1, 2, 60, 100])
    assert mask_len(num_masked, 0.5, 100).tolist() == [0, 1, 1, 50, 50]
    assert mask_len(num_masked, 0.0, 100).tolist() == [0, 1, 1, 1, 1]
    assert mask_len(num_masked, torch.tensor(1.0), 100).tolist() == [0, 1, 1, 59, 99]
    assert mask_len(num_masked, torch.tensor([1.0, 1.0, 1.0, 0.1, 0.2]), 100).tolist() == [0, 1, 1, 10, 20]
    assert mask_len(num_masked, 0.5, num_masked.float()).tolist() == [0, 1, 1, 30, 50]
    assert mask_len(num_masked[:0], 0.5, 100).tolist() == []


def test_mask_len_never_waits_for_the_device():
    # fake tensors have no values: whatever asks for one raises
    with FakeTensorMode():
        num_masked = torch.ones(3, dtype=torch.int64, device="cuda")
        for ratio in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.1, 0.2], device="cuda")):
            assert mask_len(num_masked, ratio, 100).device.type == "cuda"
        assert mask_len(num_masked, 0.5, num_masked.float()).shape == (3,)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, [3, 3, 3, 3, 3]),
        (np.float32(3), [3, 3, 3, 3, 3]),
        (torch.tensor(3), [3, 3, 3, 3, 3]),
        ((2.0, 0.0), [2, 1.5, 1, 0.5, 0]),
        ([0, 4], [0, 1, 2, 3, 4]),
        ([5, 1, 4, 2, 3], [5, 1, 4, 2, 3]),
        (torch.tensor([5, 1, 4, 2, 3]), [5, 1, 4, 2, 3]),
        (np.array([5, 1, 4, 2, 3]), [5, 1, 4, 2, 3]),
        ("constant:3", [3, 3, 3, 3, 3]),
        ("linear:2", [2, 1.5, 1, 0.5, 0]),
        ("abs_cos:2", [2, math.sqrt(2), 0, math.sqrt(2), 2]),
        ("cosine:2", [2 * math.cos(math.pi * t / 8) for t in range(5)]),
        ("pow0.6:3", [3 * (1 - (t / 4) ** 0.6) for t in range(5)]),
        ("square:4", [4, 3.75, 3, 1.75, 0]),
    ],
)
def test_values(value, expected):
    assert schedule_values(value, 5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("value", [2.0, (2.0, 0.0), [2.0], "abs_cos:2", "linear:2", "cosine:2", "pow2:2"])
def test_a_single_step_takes_the_start(value):
    assert schedule_values(value, 1) == [2.0]


@pytest.mark.parametrize("num_inference_steps", [2, 3, 12, 64])
def test_abs_cos_is_the_published_noise(num_inference_steps):
    timesteps = range(num_inference_steps - 1, -1, -1)
    published = [2 * abs(math.cos(math.pi * t / (num_inference_steps - 1))) for t in timesteps]
    assert schedule_values("abs_cos:2", num_inference_steps) == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("abs_cos", ValueError),
        ("abs_cos:x", ValueError),
        ("sine:2", ValueError),
        ("pow:2", ValueError),
        ("pow-1:2", ValueError),
        ("", ValueError),
        ([1.0, 2.0, 3.0], ValueError),
        ([], ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (-1.0, ValueError),
        ((1.0, -1.0), ValueError),
        ("linear:-1", ValueError),
        (None, TypeError),
        (True, TypeError),
        (["a", "b"], TypeError),
    ],
)
def test_bad_values_are_named(value, error):
    with pytest.raises(error, match=r"^noise_scale: expected .*, got "):
        schedule_values(value, 5, name="noise_scale", minimum=0.0)


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ("cosin", ValueError),
        ("pow", ValueError),
        ("pow0", ValueError),
        ([0.5] * 4, ValueError),
        ([0.5, 0.5, 1.5], ValueError),
        ([0.5, 0.5, float("nan")], ValueError),
        (0.5, TypeError),
        ([None] * 3, TypeError),
    ],
)
def test_bad_mask_schedules_are_named(schedule, error):
    with pytest.raises(error, match=r"^mask_schedule: expected .*, got "):
        mask_ratios(schedule, 3, 256)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_step_counts_are_named(steps, error):
    with pytest.raises(error, match=r"^num_inference_steps: expected"):
        check_num_inference_steps(steps)
    with pytest.raises(error, match=r"^num_inference_steps: expected"):
        schedule_values(1.0, steps)
    with pytest.raises(error, match=r"^num_inference_steps: expected"):
        mask_ratios("cosine", steps, 16)
