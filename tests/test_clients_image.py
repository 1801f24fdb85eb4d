"""`accelerate` and `restore` on samplers of images that are on no package registry, with tiny random weights.

Where the environment variables MGT_TITOK, MGT_OPEN_MUSE and MGT_MASKBIT name checkouts of 1d-tokenizer, open-muse and
maskbit, the originals draw beside ours.
"""

import copy
import inspect
import math
import os
import pickle
from functools import partial

import pytest
import tiny_image
import torch
from scipy import stats
from tiny import randn, seeded
from tiny_image import Decoder

from mgt_sampler import accelerate, restore
from mgt_sampler.clients import maskgit, titok

pytestmark = pytest.mark.usefixtures("one_thread")

MASK = 16


def draw_titok(model, count, **options):
    return model.generate(torch.full((count,), 3), **{"num_sample_steps": 8, **options})


def draw_maskgen(model, count, **options):
    return model.generate(["a cat"] * count, **{"num_sample_steps": 8, **options})


def muse_inputs(count, batch_size_of_others=1):
    return {
        "encoder_hidden_states": randn(1, 5, 16).expand(count, -1, -1),
        "cond_embeds": randn(1, 16, seed=1).expand(count, -1),
        "micro_conds": randn(1, 5, seed=2),
        "empty_embeds": randn(batch_size_of_others, 5, 16, seed=3),
        "empty_cond_embeds": randn(batch_size_of_others, 16, seed=4),
    }


def draw_muse(model, count, **options):
    settings = {"timesteps": 8, "seq_len": 32, "guidance_scale": 3.0, "temperature": (2, 0), **options}
    return model.generate2(**muse_inputs(count), **settings)


def draw_first_muse(model, count, **options):
    given = {} if "encoder_hidden_states" in options else {"class_ids": torch.full((count,), 3)}
    return model.generate2(**given, **{"timesteps": 8, **options})


MASKBIT = {"mask_token": MASK, "patch_size": 4, "codebook_size": 256, "codebook_splits": 2}


def draw_maskbit(model, count, **options):
    settings = {"labels": torch.full((count,), 3), "num_steps": 8, "mask_schedule_strategy": "arccos", **MASKBIT}
    # a model that is not accelerated has no such method
    sample = getattr(model, "sample", None) or partial(tiny_image.maskbit_sample(), model)
    images, tokens = sample(Decoder(), count, **settings | options)
    assert torch.equal(images.long(), tokens[-1][..., 0] + 16 * tokens[-1][..., 1])
    return tokens[-1].flatten(1)


KINDS = {
    "ImageBert": (lambda **options: tiny_image.titok_model("ImageBert", **options), draw_titok),
    "UViTBert": (lambda **options: tiny_image.titok_model("UViTBert", **options), draw_titok),
    "MaskGen_VQ": (tiny_image.maskgen_model, draw_maskgen),
    "MaskGiTUViT_v2": (lambda **options: tiny_image.muse_model("MaskGiTUViT_v2", **options), draw_muse),
    "MaskGitTransformer": (lambda **options: tiny_image.muse_model("MaskGitTransformer", **options), draw_first_muse),
    "LFQBert": (lambda **options: tiny_image.maskbit_model("LFQBert", **options), draw_maskbit),
    "Bert": (lambda **options: tiny_image.maskbit_model("Bert", **options), draw_maskbit),
}
# inputs of eight steps
ARCCOS = [32, 29, 26, 24, 21, 18, 14, 10]
COSINE = [32, 31, 29, 26, 22, 17, 12, 6]


def original(kind):
    """Whether there is a checkout, so that the class is the original's."""
    variables = {"MaskGi": "MGT_OPEN_MUSE", "LFQBer": "MGT_MASKBIT", "Bert": "MGT_MASKBIT"}
    return bool(os.environ.get(variables.get(kind[:6], "MGT_TITOK")))


def run(kind, model, count=3, seed=0, **options):
    """The tokens (B, N), and what the model was given in each step, without the unconditional half."""
    model.given.clear()
    torch.manual_seed(seed)
    tokens = KINDS[kind][1](model, count, **options)
    given = [ids[:count].flatten(1) for ids in model.given]
    return tokens, [ids for i, ids in enumerate(given) if i == 0 or not torch.equal(ids, given[i - 1])]


def masked(given):
    return [(ids == MASK).sum(1).tolist() for ids in given]


def outcomes(*canvases):
    """How often each token, or the mask, is at some positions of some canvases: independent between samples."""
    return [ids[:, i].bincount(minlength=MASK + 1) for ids in canvases for i in (0, 9, 22)]


def pvalues(one, other):
    """Of a chi-square test for each of two lists of counts."""
    found = []
    for both in map(torch.stack, zip(one, other, strict=True)):
        seen = both[:, both.sum(0) > 10]
        found.append(1.0 if seen.shape[1] < 2 else stats.chi2_contingency(seen.numpy()).pvalue)
    return found


def gumbel(shape):
    return -torch.log(-torch.log(torch.rand(shape, dtype=torch.float64)))


def rewrite(halves, draw, counts, count, seed):
    """The tokens and the last input of a sampler in plain PyTorch.

    `halves` gives the logits of ids, `draw(k, c, u)` tokens and scores, and step k masks again what `counts` has next.
    """
    torch.manual_seed(seed)
    ids = torch.full((count, 32), MASK)
    for k, left in enumerate([*counts[1:], 0]):
        before = ids
        tokens, scores = draw(k, *(half.double() for half in halves(ids)))
        tokens = torch.where(ids == MASK, tokens, ids)
        lowest = torch.where(ids == MASK, scores, math.inf).argsort(dim=1)[:, :left]
        ids = tokens.scatter(1, lowest, MASK)
    return ids, before


def at(values, tokens):
    return values.gather(2, tokens[..., None])[..., 0]


class Recorded:
    """What an op is given by name, step by step."""

    def __init__(self, monkeypatch, module, name):
        self.calls, op = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **given: self.calls.append(given) or op(*args, **given))

    def __getitem__(self, name):
        return [pytest.approx(call[name], abs=1e-6) for call in self.calls]


@pytest.mark.parametrize("kind", KINDS)
class TestEach:
    """What holds for all of them."""

    def test_as_many_are_masked(self, kind):
        model = KINDS[kind][0]()
        accelerate(model)
        tokens, given = run(kind, model)
        assert masked(given) == [[n] * 3 for n in (COSINE if kind.startswith("MaskGi") else ARCCOS)]
        assert tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < MASK
        # what is known stays
        for before, after in zip(given, [*given[1:], tokens], strict=True):
            assert torch.equal(after[before != MASK], before[before != MASK])

    def test_more_steps_than_tokens(self, kind):
        model = KINDS[kind][0]()
        accelerate(model)
        steps = {"MaskGi": "timesteps", "LFQBer": "num_steps", "Bert": "num_steps"}.get(kind[:6], "num_sample_steps")
        tokens, given = run(kind, model, **{steps: 40})
        counts = [n[0] for n in masked(given)]
        assert counts[-1] == 1 and counts == sorted(set(counts), reverse=True) and tokens.max() < MASK
        assert run(kind, model, **{steps: 1})[0].max() < MASK

    def test_a_one_hot_network_gives_its_tokens(self, kind):
        model = KINDS[kind][0]()
        model.wanted = torch.randint(MASK, (32,), generator=seeded(5))
        accelerate(model)
        tokens, _ = run(kind, model)
        assert torch.equal(tokens, model.wanted.expand(3, -1))

    def test_a_sample_is_a_function_of_its_seed(self, kind):
        model = KINDS[kind][0]()
        accelerate(model)
        tokens, again, other = (run(kind, model, seed=seed)[0] for seed in (0, 0, 1))
        assert torch.equal(tokens, again) and not torch.equal(tokens, other)
        assert torch.equal(run(kind, model, count=1)[0], tokens[:1]) and not torch.equal(tokens[0], tokens[1])

    def test_the_original_comes_back(self, kind):
        model = KINDS[kind][0]()
        state = set(vars(model))
        done = accelerate(model)
        name = done.replaced[0]
        assert accelerate(model) is done and set(vars(model)) - state == {name, "_mgt_acceleration"}
        assert kind in " ".join(done.client.classes) and done.client.replaces in str(done)
        assert restore(model) is model and set(vars(model)) == state
        if kind in ("LFQBert", "Bert"):
            assert not hasattr(model, name)
        elif not original(kind):
            assert run(kind, model)[0] == "the original"

    def test_copies_and_pickles(self, kind):
        model = KINDS[kind][0]()
        name = accelerate(model).replaced[0]
        expected, _ = run(kind, model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(kind, other)[0], expected)
            # it draws with its own weights
            assert vars(other)[name].args == (other,)
            assert name not in vars(restore(other)) and name in vars(model)

    def test_the_signature_is_the_originals(self, kind):
        model = KINDS[kind][0]()
        name = accelerate(model).replaced[0]
        maskbit = kind in ("LFQBert", "Bert")
        if maskbit and not original(kind):
            pytest.skip("MGT_MASKBIT names no checkout, and a stand-in has no such function")
        found = tiny_image.maskbit_sample() if maskbit else getattr(type(model), name)
        theirs = [*inspect.signature(found).parameters.values()][1:]
        ours = inspect.signature(vars(model)[name]).parameters.values()
        assert [each.name for each in ours] == [each.name for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.kind == other.kind and (one.default == other.default or callable(other.default))


class TestTiTok:
    """`ImageBert` of 1d-tokenizer."""

    @staticmethod
    def halves(model):
        asked = torch.full((1,), 3)
        return lambda ids: [model.forward(ids, asked.expand(len(ids)), drop) for drop in (0.0, 1.0)]

    @pytest.mark.parametrize(
        "options, scales, calls",
        [
            ({}, [4.0] * 4, [2] * 4),
            ({"guidance_scale": 0.0}, [1.0] * 4, [1] * 4),
            ({"guidance_decay": "linear"}, [1.0, 1.75, 2.5, 3.25], [1, 2, 2, 2]),
            ({"guidance_decay": "power-cosine", "guidance_scale_pow": 1.0}, [1, 1.292893, 2, 2.707107], [1, 2, 2, 2]),
        ],
    )
    def test_guidance(self, monkeypatch, options, scales, calls):
        model = tiny_image.titok_model()
        accelerate(model)
        given = Recorded(monkeypatch, titok, "sample_tokens")
        run("ImageBert", model, num_sample_steps=4, **options)
        assert scales == given["guidance_scale"] and len(model.given) == sum(calls)
        assert [call["uncond_logits"] is not None for call in given.calls] == [n == 2 for n in calls]

    @pytest.mark.parametrize("annealed, factors", [(False, [1, 1, 1, 1]), (True, [1.1, 0.9, 0.7, 0.5])])
    def test_temperatures(self, monkeypatch, annealed, factors):
        model = tiny_image.titok_model()
        accelerate(model)
        drawn = Recorded(monkeypatch, titok, "sample_tokens")
        noise = Recorded(monkeypatch, titok, "mask_by_confidence")
        run("ImageBert", model, num_sample_steps=4, softmax_temperature_annealing=annealed)
        temperatures = [3.375, 2.25, 1.125, 0]
        assert temperatures == noise["temperature"]
        assert [a * t for a, t in zip(factors, temperatures, strict=True)] == drawn["temperature"]

    @pytest.mark.parametrize(
        "decay, scale, annealed", [("constant", 1.0, False), ("linear", 2.0, True), ("power-cosine", 3.0, True)]
    )
    def test_the_formulas_distribution(self, decay, scale, annealed):
        model = tiny_image.titok_model(sharpness=2.0)

        def draw(k, c, u):
            r, f = (k + 1) / 4, k / 4
            if decay == "power-cosine":
                logits = u + (1 + (scale - 1) * (1 - math.cos(math.pi * f**3)) / 2) * (c - u)
            else:
                logits = c + scale * (f if decay == "linear" else 1) * (c - u)
            logits = logits / (0.5 + 0.8 * (1 - r) if annealed else 1)
            tokens = (logits + 2 * (1 - r) * gumbel(c.shape)).argmax(-1)
            return tokens, at(logits, tokens) + 2 * (1 - r) * gumbel(tokens.shape)

        options = {"guidance_decay": decay, "guidance_scale": scale, "softmax_temperature_annealing": annealed}
        accelerate(model)
        tokens, given = run("ImageBert", model, 4000, 1, num_sample_steps=4, randomize_temperature=2.0, **options)
        other, _ = run("ImageBert", model, 4000, 1, num_sample_steps=4, randomize_temperature=3.0, **options)
        counts = [n[0] for n in masked(given)]
        assert counts == [32, 26, 21, 14]
        expected = outcomes(*rewrite(self.halves(model), draw, counts, 4000, 2))
        assert min(pvalues(outcomes(tokens, given[-1]), expected)) > 1e-3
        assert min(pvalues(outcomes(other), expected[:3])) < 1e-6

    def test_a_bad_decay_is_named(self):
        model = tiny_image.titok_model()
        accelerate(model)
        with pytest.raises(ValueError, match=r"guidance_decay: expected one of .*'power-cosine'.*, got 'cosine'"):
            run("ImageBert", model, guidance_decay="cosine")


class TestMaskGen:
    """`MaskGen_VQ` of 1d-tokenizer."""

    @pytest.mark.parametrize(
        "options, scales",
        [
            ({"guidance_decay": "none"}, [4.0] * 4),
            ({"guidance_decay": "linear"}, [2.5, 3.0, 3.5, 4.0]),
            ({"guidance_decay": "cosine"}, [2.292893, 3, 3.707107, 4]),
            ({"guidance_decay": "cosine", "guidance_decay_scale_pow": 2.0}, [2.019215, 2.292893, 3.195090, 4]),
            ({"guidance_decay": "flippedcosine"}, [2.707107, 2, 1.292893, 1]),
        ],
    )
    def test_guidance(self, monkeypatch, options, scales):
        model = tiny_image.maskgen_model()
        accelerate(model)
        given = Recorded(monkeypatch, titok, "sample_tokens")
        run("MaskGen_VQ", model, num_sample_steps=4, guidance_scale=3.0, **options)
        assert scales == given["guidance_scale"]
        # flippedcosine ends without guidance
        assert [len(ids) for ids in model.given] == [6 if scale > 1 + 1e-9 else 3 for scale in scales]

    def test_temperatures(self, monkeypatch):
        model = tiny_image.maskgen_model()
        accelerate(model)
        drawn = Recorded(monkeypatch, titok, "sample_tokens")
        noise = Recorded(monkeypatch, titok, "mask_by_confidence")
        options = {"num_sample_steps": 4, "randomize_temperature": 2.0}
        run("MaskGen_VQ", model, **options)
        assert [1.1 * 1.5, 0.9 * 1.0, 0.7 * 0.5, 0] == drawn["temperature"]
        assert [1.5, 1.0, 0.5, 0] == noise["temperature"]
        run("MaskGen_VQ", model, softmax_temperature_annealing=False, prob_sorting=False, **options)
        assert [2.25, 1.0, 0.25, 0] == drawn["temperature"][4:] and [0] * 4 == noise["temperature"][4:]

    @pytest.mark.parametrize("annealed, sorting", [(True, True), (False, True), (True, False)])
    def test_the_formulas_distribution(self, annealed, sorting):
        model = tiny_image.maskgen_model(sharpness=2.0)
        one = tiny_image.encode_letters(None, None, ["a cat"])
        none = tiny_image.encode_letters(None, None, [""])

        def draw(k, c, u):
            r = (k + 1) / 4
            t = 2 * (1 - r)
            logits = c + (1 + 1.5 * (1 - math.cos(math.pi * r)) / 2) * (c - u)
            logits = logits / (0.5 + 0.8 * (1 - r) if annealed else t or 1)
            tokens = (logits + t * gumbel(c.shape)).argmax(-1)
            return tokens, at(logits, tokens) + (t * gumbel(tokens.shape) if sorting else 0)

        accelerate(model)
        options = {"softmax_temperature_annealing": annealed, "prob_sorting": sorting, "num_sample_steps": 4}
        common = {"guidance_scale": 2.5, **options}
        tokens, given = run("MaskGen_VQ", model, 4000, 1, randomize_temperature=2.0, **common)
        other, _ = run("MaskGen_VQ", model, 4000, 1, randomize_temperature=3.0, **common)
        counts = [n[0] for n in masked(given)]
        assert counts == [32, 26, 21, 14]

        def halves(ids):
            return [model.forward(ids, *(each.expand(len(ids), -1, -1) for each in half))[0] for half in (one, none)]

        expected = outcomes(*rewrite(halves, draw, counts, 4000, 2))
        assert min(pvalues(outcomes(tokens, given[-1]), expected)) > 1e-3
        assert min(pvalues(outcomes(other), expected[:3])) < 1e-6

    def test_the_aesthetic_score_is_the_models(self):
        model = tiny_image.maskgen_model()
        accelerate(model)
        run("MaskGen_VQ", model)
        assert model.aesthetic_score is None
        run("MaskGen_VQ", model, sample_aesthetic_score=9.0)
        assert torch.equal(model.aesthetic_score, torch.full((6,), 6.0))

    def test_other_schedules(self):
        model = tiny_image.maskgen_model()
        model.mask_schedule_strategy = "cosine"
        accelerate(model)
        assert [n[0] for n in masked(run("MaskGen_VQ", model)[1])] == COSINE

    def test_bad_arguments_are_named(self):
        model = tiny_image.maskgen_model()
        accelerate(model)
        with pytest.raises(ValueError, match=r"guidance_decay: expected one of .*'flippedcosine'.*, got 'constant'"):
            run("MaskGen_VQ", model, guidance_decay="constant")
        model.mask_schedule_strategy = "cube"
        with pytest.raises(ValueError, match=r"mask_schedule_strategy: .* got 'cube'"):
            run("MaskGen_VQ", model)


class TestOpenMuse:
    """Both transformers of open-muse."""

    @pytest.mark.parametrize(
        "options, scales",
        [
            ({}, [6.0] * 4),
            ({"guidance_schedule": "linear"}, [0, 2, 4, 6]),
            ({"guidance_schedule": "cosine"}, [2, 4, 5, 6]),
        ],
    )
    def test_guidance(self, monkeypatch, options, scales):
        model = tiny_image.muse_model()
        accelerate(model)
        given = Recorded(monkeypatch, maskgit, "sample_tokens")
        run("MaskGiTUViT_v2", model, timesteps=4, guidance_scale=6.0, **options)
        assert scales == given["guidance_scale"] and [len(ids) for ids in model.given] == [6] * 4

    @pytest.mark.parametrize("temperature, noises", [((2, 0), [2, 4 / 3, 2 / 3]), (1.0, [1, 0.67, 0.34])])
    def test_noise(self, monkeypatch, temperature, noises):
        model = tiny_image.muse_model()
        accelerate(model)
        given = Recorded(monkeypatch, maskgit, "mask_by_confidence")
        run("MaskGiTUViT_v2", model, timesteps=4, temperature=temperature)
        assert noises == given["temperature"]

    def test_the_firsts_noise(self, monkeypatch):
        model = tiny_image.muse_model("MaskGitTransformer")
        accelerate(model)
        given = Recorded(monkeypatch, maskgit, "mask_by_confidence")
        run("MaskGitTransformer", model, timesteps=4, temperature=2.0)
        assert [1.5, 0.75, 0.1875] == given["temperature"]
        run("MaskGitTransformer", model, timesteps=18)
        assert given["temperature"][3 + 8] == pytest.approx(math.prod(1 - j / 18 for j in range(1, 10)))

    def test_inputs_of_the_halves(self):
        model = tiny_image.muse_model()
        accelerate(model)
        run("MaskGiTUViT_v2", model, timesteps=1)
        states, conds, micro = model.asked
        inputs = muse_inputs(3)
        assert torch.equal(
            states, torch.cat([inputs["encoder_hidden_states"], inputs["empty_embeds"].expand(3, -1, -1)])
        )
        assert torch.equal(conds, torch.cat([inputs["cond_embeds"], inputs["empty_cond_embeds"].expand(3, -1)]))
        assert torch.equal(micro, inputs["micro_conds"].expand(6, -1))
        negative = {"negative_embeds": randn(3, 5, 16, seed=8), "negative_cond_embeds": randn(1, 16, seed=9)}
        run("MaskGiTUViT_v2", model, timesteps=1, **negative)
        assert torch.equal(model.asked[0][3:], negative["negative_embeds"])
        assert torch.equal(model.asked[1][3:], negative["negative_cond_embeds"].expand(3, -1))
        # with which the original fails
        run("MaskGiTUViT_v2", model, timesteps=1, guidance_scale=0)
        assert torch.equal(model.asked[0], inputs["encoder_hidden_states"]) and len(model.asked[2]) == 3

    @pytest.mark.parametrize("kind", ["MaskGiTUViT_v2", "MaskGitTransformer"])
    def test_known_tokens_stay(self, kind):
        model = tiny_image.muse_model(kind)
        accelerate(model)
        ids = torch.full((3, 32), MASK)
        ids[0, :20], ids[1, 5:31], ids[2] = 1, 2, 3
        before = ids.clone()
        tokens, given = run(kind, model, input_ids=ids)
        assert torch.equal(ids, before) and torch.equal(tokens[ids != MASK], ids[ids != MASK]) and tokens.max() < MASK
        # samples of their own counts, and one without masks
        assert len(given) == 8
        for i, (left, n) in enumerate(zip(COSINE[1:], masked(given)[1:], strict=False)):
            assert n == [min(12 - 1 - i, left), max(1, min(6 - 1 - i, left)), 0]

    @pytest.mark.parametrize("kind", ["MaskGiTUViT_v2", "MaskGitTransformer"])
    def test_the_originals_counts_with_known_tokens(self, kind):
        if not original(kind):
            pytest.skip("MGT_OPEN_MUSE names no checkout")
        model = tiny_image.muse_model(kind)
        ids = torch.full((3, 32), MASK)
        ids[0, :20], ids[1, 5:10] = 1, 2
        _, theirs = run(kind, model, input_ids=ids)
        accelerate(model)
        assert masked(theirs) == masked(run(kind, model, input_ids=ids)[1])

    def test_generators_and_intermediate_tokens(self):
        model = tiny_image.muse_model()
        accelerate(model)
        torch.manual_seed(0)
        options = {"generator": [seeded(7), seeded(8)], "return_intermediate": True}
        both, steps = draw_muse(model, 2, **options)
        alone = draw_muse(model, 1, generator=seeded(8))
        assert torch.equal(both[1:], alone) and len(steps) == 8
        assert torch.equal(torch.rand(1), torch.rand(1, generator=seeded(0)))
        # known positions have others there
        assert all(step.shape == both.shape and step.max() < MASK for step in steps)
        assert not torch.equal(steps[-1], both)
        with pytest.raises(ValueError, match="generator: expected one for each of 3 samples, got 2"):
            draw_muse(model, 3, generator=[seeded(7), seeded(8)])
        with pytest.raises(ValueError, match="timesteps: expected at least 1, got 0"):
            draw_muse(model, 3, timesteps=0)
        with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator"):
            draw_muse(model, 3, generator=5)

    def test_a_schedule_of_the_callers(self):
        model = tiny_image.muse_model(num_positions=16)
        accelerate(model)
        _, given = run("MaskGiTUViT_v2", model, noise_schedule=lambda r: 1 - r, seq_len=16)
        assert [n[0] for n in masked(given)] == [16, 14, 12, 10, 8, 6, 4, 2]

    def test_what_the_first_is_asked(self):
        model = tiny_image.muse_model("MaskGitTransformer")
        accelerate(model)
        classes = torch.tensor([3, 4])
        model.generate2(class_ids=classes, timesteps=2)
        assert classes.tolist() == [3, 4]
        states = randn(2, 5, 16)
        for guidance_scale, rows in ((0, 2), (2.0, 4)):
            model.given.clear()
            model.generate2(encoder_hidden_states=states, timesteps=2, guidance_scale=guidance_scale, use_tqdm=True)
            assert [len(ids) for ids in model.given] == [rows, rows]
        with pytest.raises(ValueError, match="class_ids, encoder_hidden_states: expected a tensor for one of them"):
            model.generate2()

    @pytest.mark.parametrize("kind", ["MaskGiTUViT_v2", "MaskGitTransformer"])
    def test_the_formulas_distribution(self, kind):
        model = tiny_image.muse_model(kind, sharpness=2.0)
        second = kind == "MaskGiTUViT_v2"
        states, none = (randn(1, 5, 16) / 2, torch.zeros(1, 5, 16))

        def halves(ids):
            found = []
            for each in ("", "empty_") if second else (states, none):
                if second:
                    inputs = muse_inputs(1)
                    asked = inputs[each + "embeds" if each else "encoder_hidden_states"], inputs[f"{each}cond_embeds"]
                    asked = *asked, inputs["micro_conds"]
                else:
                    asked = (each,)
                found.append(model(ids, *(one.expand(len(ids), *one.shape[1:]) for one in asked))[..., :MASK])
            return found

        def draw(k, c, u):
            logits = u + (2 * k / 3 if second else 2) * (c - u)
            tokens = (logits + gumbel(c.shape)).argmax(-1)
            t = [2, 4 / 3, 2 / 3, 0][k] if second else [2 * 0.75, 2 * 0.375, 2 * 0.09375, 0][k]
            return tokens, at(logits.log_softmax(-1), tokens) + t * gumbel(tokens.shape)

        accelerate(model)
        options = {"timesteps": 4, "guidance_scale": 2.0}
        options |= {"guidance_schedule": "linear"} if second else {"encoder_hidden_states": states.expand(4000, -1, -1)}
        tokens, given = run(kind, model, 4000, 1, temperature=(2, 0) if second else 2.0, **options)
        _, other = run(kind, model, 4000, 1, temperature=(0, 0) if second else 0.0, **options)
        counts = [n[0] for n in masked(given)]
        assert counts == [32, 29, 22, 12]
        expected = outcomes(*rewrite(halves, draw, counts, 4000, 2))
        assert min(pvalues(outcomes(tokens, given[-1]), expected)) > 1e-3
        assert min(pvalues(outcomes(other[-1]), expected[3:])) < 1e-6


class TestMaskBit:
    """Both generators of MaskBit."""

    @pytest.mark.parametrize(
        "options, scales",
        [
            ({}, [4.0] * 4),
            ({"guidance_annealing": "linear"}, [1.0, 1.75, 2.5, 3.25]),
            ({"guidance_annealing": "cosine", "scale_pow": 1.0}, [1, 1.439340, 2.5, 3.560660]),
            ({"guidance_scale": 0.0}, [1.0] * 4),
        ],
    )
    def test_guidance(self, monkeypatch, options, scales):
        model = tiny_image.maskbit_model()
        accelerate(model)
        given = Recorded(monkeypatch, maskgit, "sample_tokens")
        run("LFQBert", model, num_steps=4, **options)
        assert scales == given["guidance_scale"]
        assert [len(ids) for ids in model.given] == [3 if "guidance_scale" in options else 6] * 4

    @pytest.mark.parametrize("annealed, factors", [(False, [0.9] * 4), (True, [1.1, 0.9, 0.7, 0.5])])
    def test_temperatures(self, monkeypatch, annealed, factors):
        model = tiny_image.maskbit_model()
        accelerate(model)
        drawn = Recorded(monkeypatch, maskgit, "sample_tokens")
        noise = Recorded(monkeypatch, maskgit, "mask_by_confidence")
        run("LFQBert", model, num_steps=4, softmax_temperature=0.9, use_sampling_annealing=annealed)
        assert factors == drawn["temperature"] and [3.375, 2.25, 1.125] == noise["temperature"]

    @pytest.mark.parametrize("strategy", ["linear", "square", "cosine", "root"])
    def test_other_schedules(self, strategy):
        model = tiny_image.maskbit_model()
        accelerate(model)
        shares = {
            "linear": lambda r: 1 - r,
            "square": lambda r: 1 - r**2,
            "root": lambda r: 1 - r**0.5,
            "cosine": lambda r: math.cos(r * math.pi / 2),
        }
        _, given = run("LFQBert", model, mask_schedule_strategy=strategy)
        expected = [32, *(int(32 * shares[strategy](k / 8)) for k in range(1, 8))]
        assert [n[0] for n in masked(given)] == expected

    def test_labels_and_what_is_returned(self):
        model = tiny_image.maskbit_model().train()
        accelerate(model)
        images, tokens = model.sample(Decoder(), 12, num_steps=4, use_tqdm=True, **MASKBIT)
        assert images.shape == (12, 16) and not model.training
        assert [each.shape for each in tokens] == [(12, 16, 2)] * 4 and all(each.max() < MASK for each in tokens)
        labels = torch.tensor([3, 4])
        model.sample(Decoder(), 2, labels, num_steps=2, **MASKBIT)
        assert labels.tolist() == [3, 4]

    def test_the_formulas_distribution(self):
        model = tiny_image.maskbit_model(sharpness=2.0)

        def halves(ids):
            asked = torch.full((len(ids),), 3)
            drops = (torch.zeros(len(ids), dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool))
            return [model(ids.view(-1, 16, 2), asked, drop).flatten(1, 2) for drop in drops]

        def draw(k, c, u):
            r, f = (k + 1) / 4, k / 4
            logits = c + 2 * (1 - math.cos(math.pi * f**2)) / 2 * (c - u)
            logits = logits / (0.5 + 0.8 * (1 - r))
            tokens = (logits + gumbel(c.shape)).argmax(-1)
            return tokens, at(logits.log_softmax(-1), tokens) + 4.5 * (1 - r) * gumbel(tokens.shape)

        accelerate(model)
        options = {"num_steps": 4, "guidance_scale": 2.0, "guidance_annealing": "cosine", "scale_pow": 2.0}
        tokens, given = run("LFQBert", model, 4000, 1, use_sampling_annealing=True, **options)
        other, _ = run("LFQBert", model, 4000, 1, **options)
        counts = [n[0] for n in masked(given)]
        assert counts == [32, 26, 21, 14]
        expected = outcomes(*rewrite(halves, draw, counts, 4000, 2))
        assert min(pvalues(outcomes(tokens, given[-1]), expected)) > 1e-3
        assert min(pvalues(outcomes(other), expected[:3])) < 1e-6

    def test_bad_arguments_are_named(self):
        model = tiny_image.maskbit_model()
        accelerate(model)
        with pytest.raises(ValueError, match=r"guidance_annealing: expected one of .*'cosine'.*, got 'constant'"):
            run("LFQBert", model, guidance_annealing="constant")
        with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
            run("LFQBert", model, num_steps=0)
        with pytest.raises(ValueError, match=r"mask_schedule_strategy: .* got 'cube'"):
            run("LFQBert", model, mask_schedule_strategy="cube")


REAL = [
    ("ImageBert", {}),
    ("ImageBert", {"guidance_decay": "linear", "softmax_temperature_annealing": True}),
    ("ImageBert", {"guidance_decay": "power-cosine", "randomize_temperature": 2.0}),
    ("UViTBert", {"guidance_scale": 0.0, "randomize_temperature": 1.0}),
    ("MaskGen_VQ", {"guidance_scale": 3.0}),
    ("MaskGen_VQ", {"guidance_decay": "linear", "guidance_scale": 2.0, "prob_sorting": False}),
    ("MaskGen_VQ", {"guidance_decay": "flippedcosine", "guidance_scale": 3.0, "guidance_decay_scale_pow": 2.0}),
    ("MaskGen_VQ", {"guidance_decay": "none", "guidance_scale": 0.5, "sample_aesthetic_score": 5.0}),
    ("MaskGiTUViT_v2", {}),
    ("MaskGiTUViT_v2", {"guidance_schedule": "linear", "temperature": 1.0}),
    ("MaskGiTUViT_v2", {"guidance_schedule": "cosine", "noise_schedule": lambda t: (1 - t).clamp(min=1e-6)}),
    ("MaskGitTransformer", {}),
    ("MaskGitTransformer", {"encoder_hidden_states": randn(1, 5, 16), "guidance_scale": 2.0, "temperature": 3.0}),
    ("LFQBert", {}),
    ("LFQBert", {"guidance_annealing": "cosine", "use_sampling_annealing": True}),
    ("Bert", {"guidance_annealing": "linear", "softmax_temperature": 0.8, "mask_schedule_strategy": "cosine"}),
    ("Bert", {"guidance_scale": 0.0, "randomize_temperature": 1.0, "mask_schedule_strategy": "root"}),
]


@pytest.mark.parametrize("kind, options", REAL)
class TestOriginals:
    """The code of a checkout, beside ours."""

    @pytest.fixture(autouse=True)
    def needs_a_checkout(self, kind):
        if not original(kind):
            pytest.skip("there is no checkout")

    @staticmethod
    def both(kind, model, options, count, seeds=(0, 1)):
        """What the original and ours return and give the model."""
        if "encoder_hidden_states" in options:
            options = {**options, "encoder_hidden_states": options["encoder_hidden_states"].expand(count, -1, -1)}
        restore(model)
        theirs = run(kind, model, count, seeds[0], **options)
        accelerate(model)
        return theirs, run(kind, model, count, seeds[1], **options)

    def test_as_many_are_masked(self, kind, options):
        theirs, ours = self.both(kind, KINDS[kind][0](), options, 5)
        assert masked(theirs[1]) == masked(ours[1]) and len(ours[1]) == 8
        assert theirs[0].shape == ours[0].shape and theirs[0].dtype == ours[0].dtype

    def test_one_hot_networks_give_the_same(self, kind, options):
        model = KINDS[kind][0]()
        model.wanted = torch.randint(MASK, (32,), generator=seeded(5))
        theirs, ours = self.both(kind, model, options, 3)
        assert torch.equal(theirs[0], ours[0])

    def test_without_noise_the_same_stay_masked(self, kind, options):
        temperature = "temperature" if kind.startswith("MaskGi") else "randomize_temperature"
        model = KINDS[kind][0]()
        model.wanted = torch.randint(MASK, (32,), generator=seeded(5))
        # so likely that no other is drawn, and no two alike
        model.sure = torch.linspace(8, 12, 32)[torch.randperm(32, generator=seeded(6))]
        options = {**options, temperature: (0, 0) if kind == "MaskGiTUViT_v2" else 0.0}
        if kind in ("LFQBert", "Bert"):
            # colder, and float32 would round the probabilities to 1
            options |= {"softmax_temperature": 1.0, "use_sampling_annealing": False}
        theirs, ours = self.both(kind, model, options, 1)
        assert len(ours[1]) == 8
        for one, other in zip([*theirs[1], theirs[0]], [*ours[1], ours[0]], strict=True):
            assert torch.equal(one, other)

    def test_greedy_tokens_are_equal(self, kind, options):
        if kind not in ("ImageBert", "UViTBert", "MaskGen_VQ"):
            pytest.skip("its tokens are drawn at any temperature")
        model = KINDS[kind][0]()
        torch.nn.init.normal_(model.places.weight, std=4.0, generator=seeded(0))
        theirs, ours = self.both(kind, model, {**options, "randomize_temperature": 0.0}, 3)
        assert torch.equal(theirs[0], ours[0]) and len(ours[0].unique()) > 3

    def test_the_distribution(self, kind, options):
        model = KINDS[kind][0](sharpness=2.0)
        theirs, ours = self.both(kind, model, options, 3000)
        assert min(pvalues(*(outcomes(tokens, *given[1:]) for tokens, given in (theirs, ours)))) > 1e-4
