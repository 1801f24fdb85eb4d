"""The published samplers as constants: their counts at every step, their temperatures and their guidance."""

import math
import pickle

import pytest
import torch

from mgt_sampler import generate, presets
from mgt_sampler.counts import Ratio
from mgt_sampler.schedules import value_at
from mgt_sampler.step import Rule, begin

MASK = 9


class Model:
    """Random logits that are the same at every call; remembers how much was masked."""

    codebook_size, mask_token_id = 9, MASK

    def __init__(self, num_tokens):
        self.num_tokens, self.masked = num_tokens, []
        self.logits = torch.randn(num_tokens, 9, generator=torch.Generator().manual_seed(0))

    def predict_logits(self, tokens, condition):
        if condition is not None:
            self.masked.append((tokens == MASK).sum(1).tolist())
        return self.logits.expand(len(tokens), -1, -1).clone() * (1 if condition is None else 2)

    def decode(self, tokens):
        return tokens[:, None, None].float() / 9


def inputs(rule, num_tokens, num_inference_steps, num_samples=1, tokens=None):
    """How many positions of the first sample are masked in the input of every model call with the class."""
    model = Model(num_tokens)
    generate(
        model,
        rule,
        labels=[0] * num_samples,
        num_inference_steps=num_inference_steps,
        tokens=tokens,
        progress=False,
    )
    return [counts[0] for counts in model.masked] if num_samples == 1 else model.masked


# clients.md, section 5: of the projects' own code
@pytest.mark.parametrize(
    "name, num_tokens, steps, expected",
    [
        ("amused", 256, 6, [256, 247, 221, 181, 127, 66]),
        ("meissonic", 256, 6, [256, 247, 221, 181, 127, 66]),
        ("muse", 16, 6, [16, 15, 12, 9, 4, 1]),
        ("titok", 32, 8, [32, 29, 26, 24, 21, 18, 14, 10]),
        ("maskgen", 32, 8, [32, 29, 26, 24, 21, 18, 14, 10]),
        ("maskbit", 32, 8, [32, 29, 26, 24, 21, 18, 14, 10]),
        ("lumina-dimoo", 256, 12, [256, 253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33]),
        ("maskgit", 256, 8, [256, 251, 236, 212, 181, 142, 97, 49]),
        ("halton", 64, 8, [64 - n for n in (0, 5, 10, 15, 21, 27, 34, 43)]),
        ("llada", 8, 8, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("llada", 10, 4, [10, 7, 4, 2]),
        ("dream", 16, 8, [16, 15, 13, 11, 9, 7, 5, 3]),
    ],
)
def test_counts_are_the_projects_own(name, num_tokens, steps, expected):
    assert inputs(presets.preset(name), num_tokens, steps) == expected


@pytest.mark.parametrize("num_tokens", [64, 576])
@pytest.mark.parametrize("steps", [2, 6, 12, 18, 32])
def test_counts_of_haltons_samplers(num_tokens, steps):
    # their formulas, in float32: what is known after a step
    progress = [(k + 1) / steps for k in range(steps)], torch.linspace(0, 1, steps).tolist()
    for rule, ratios in zip((presets.HALTON, presets.HALTON_CONFIDENCE), progress, strict=True):
        known = [int((1 - torch.arccos(torch.tensor(r)) / (math.pi * 0.5)) * num_tokens) for r in ratios]
        expected = [num_tokens - max(k + 1, n) for k, n in enumerate(known[:-1])]
        assert inputs(rule, num_tokens, steps) == [num_tokens, *expected]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("square", [252, 240, 220, 192, 156, 112, 60]),
        ("log", [96, 64, 45, 32, 21, 13, 6]),
        ("exp", [254, 252, 248, 240, 224, 192, 128]),
    ],
)
def test_counts_of_maskgits_other_schedules(schedule, expected):
    rule = presets.MASKGIT.but(select=presets.MaskLowest(Ratio(schedule)))
    assert inputs(rule, 256, 8)[1:] == expected


def test_counts_of_a_port_in_float64_may_reach_0_early():
    # its last but one step may leave nothing masked, where MaskGIT's leaves one position
    assert inputs(presets.MASKGIT_PYTORCH, 2, 4) == [2, 1, 0, 0]
    assert inputs(presets.MASKGIT, 2, 4) == [2, 1, 1, 1]


def test_counts_of_omnivoice():
    # ceil(M_0 times the part of the shifted time), the rest in the last step
    t = torch.linspace(0, 1, 9)
    t = 0.1 * t / (1 + (0.1 - 1) * t)
    left, expected = 96, []
    for k in range(8):
        expected.append(left)
        left = 0 if k == 7 else max(left - math.ceil(96 * float(t[k + 1] - t[k])), 0)
    assert inputs(presets.OMNIVOICE, 96, 8) == expected


def test_every_sample_has_its_own_count_but_with_the_quirk():
    tokens = torch.full((2, 32), MASK)
    tokens[1, :24] = 1
    own = inputs(presets.TITOK, 32, 8, 2, tokens)
    first = inputs(presets.preset("titok", quirks=True), 32, 8, 2, tokens)
    assert [counts[0] for counts in own] == [counts[0] for counts in first] == [32, 29, 26, 24, 21, 18, 14, 10]
    assert [counts[1] for counts in own] == [8, 7, 6, 5, 4, 3, 2, 1]
    # as many as the first, but no more than there are
    assert [counts[1] for counts in first] == [8, 8, 8, 8, 8, 8, 8, 8]


class TestValues:
    @staticmethod
    def values(rule, name, steps):
        value = {
            "guidance": rule.guidance_scale,
            "temperature": getattr(rule.select, "temperature", 0.0),
            "token": getattr(rule.draw, "temperature", 1.0),
        }[name]
        state = begin(torch.full((1, 4), MASK), seed=torch.zeros(1, dtype=torch.int64), mask_token_id=MASK,
                      num_inference_steps=steps)  # fmt: skip
        found = []
        for k in range(steps):
            state.step = k
            found.append(float(value_at(name, value, state)))
        return found

    def test_temperatures(self):
        assert self.values(presets.AMUSED, "temperature", 3) == [2, 1, 0]
        assert self.values(presets.MASKGIT, "temperature", 3) == pytest.approx([3, 1.5, 0])
        assert self.values(presets.TITOK, "token", 3) == pytest.approx([3, 1.5, 0])
        assert self.values(presets.HALTON_CONFIDENCE, "temperature", 4) == pytest.approx([4.5, 3, 1.5, 0])

    def test_a_compounded_temperature_is_a_quirk(self):
        # prod (1 - (j + 1) / T): 0.020 in the middle of 18 steps, where the linear one has 0.44
        quirk = self.values(presets.preset("show-o", quirks=True), "temperature", 18)
        plain = self.values(presets.SHOW_O, "temperature", 18)
        assert quirk[9] == pytest.approx(math.prod(1 - (j + 1) / 18 for j in range(10)))
        assert plain[9] == pytest.approx(8 / 18) and quirk[9] < 0.02 < 0.44 < plain[9]

    def test_guidance(self):
        assert self.values(presets.HALTON_CONFIDENCE, "guidance", 4) == pytest.approx([1, 2, 3, 4])
        assert self.values(presets.MASKGEN, "guidance", 4)[-1] == pytest.approx(13)
        assert self.values(presets.MASKBIT, "guidance", 4)[0] == 1
        assert self.values(presets.OMNIVOICE, "guidance", 2) == [3, 3]


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("quirks", [False, True])
def test_every_preset_draws_and_can_be_pickled(name, quirks):
    rule = presets.preset(name, quirks=quirks)
    assert isinstance(rule, Rule) and presets.preset(name, quirks=quirks) == rule
    again = pickle.loads(pickle.dumps(rule))
    outputs = [
        generate(Model(64), each, labels=[0, 0], num_inference_steps=5, seed=3, progress=False).tokens
        for each in (rule, again)
    ]
    assert torch.equal(*outputs) and (outputs[0] < MASK).all()
    alone = generate(Model(64), rule, labels=[0], num_inference_steps=5, seed=torch.tensor([1]), progress=False).tokens
    both = generate(
        Model(64), rule, labels=[0, 0], num_inference_steps=5, seed=torch.tensor([7, 1]), progress=False
    ).tokens
    assert torch.equal(alone[0], both[1])


def test_truncated_noise_hardly_draws_what_is_rare():
    # a token with p = 0.267 of 8192 is drawn nearly always: no noise is above 5.53
    class Wide(Model):
        codebook_size, mask_token_id = 8192, 8192

        def predict_logits(self, tokens, condition):
            logits = torch.zeros(len(tokens), self.num_tokens, 8192, dtype=torch.bfloat16)
            logits[..., 5] = 8.0
            return logits

    shares = []
    for quirks in (False, True):
        rule = presets.preset("lumina-dimoo", quirks=quirks).but(guidance_scale=1.0)
        tokens = generate(Wide(400), rule, labels=[0], num_inference_steps=1, progress=False).tokens
        shares.append((tokens == 5).double().mean())
    assert abs(shares[0] - 0.267) < 0.07 and shares[1] > 0.95


def test_muse_draws_from_the_likeliest_tenth():
    class Flat(Model):
        codebook_size = mask_token_id = 40

        def predict_logits(self, tokens, condition):
            return torch.arange(40.0).div(20).expand(len(tokens), self.num_tokens, -1).contiguous()

    tokens = generate(Flat(400), presets.MUSE, labels=[0], num_inference_steps=3, progress=False).tokens
    assert set(tokens.flatten().tolist()) == {36, 37, 38, 39}


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"^name: expected one of amused, .*omnivoice, got 'imagen'"):
        presets.preset("imagen")
