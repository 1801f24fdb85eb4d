"""`accelerate` on language models and their relatives: stand-ins of our own, and loops in plain PyTorch beside them.

Where MGT_LLADA, MGT_DREAM, MGT_SHOWO, MGT_MMADA or MGT_LUMINA names a checkout of the client's repository, its own loop
takes the place of the plain one.
"""

import copy
import math
import os
import pickle
import types
from contextlib import contextmanager

import pytest
import tiny_text
import torch
from scipy import stats
from tiny import seeded

from mgt_sampler import accelerate, restore
from mgt_sampler.schedules import mask_lens

pytestmark = pytest.mark.usefixtures("one_thread")


def same_distribution(one, other, num_tokens):
    """The p-value of two samples of tokens, of any shape, whose first dimension counts samples."""
    table = torch.stack([tokens.flatten().bincount(minlength=num_tokens) for tokens in (one, other)])
    return stats.chi2_contingency(table[:, table.sum(0) > 10].numpy()).pvalue


def marginals(one, other, num_tokens):
    """The least p-value over the positions of (B, N) tokens, times how many there are."""
    columns = zip(one.T, other.T, strict=True)
    pvalues = [same_distribution(a, b, num_tokens) for a, b in columns if len(torch.cat([a, b]).unique()) > 1]
    return min(pvalues) * len(pvalues)


def check_that_it_goes_and_comes(model, name, method, call):
    """Attributes of the object alone, copies, pickles, and the original again; call(model) gives ids."""
    before = dict(vars(model))
    done = accelerate(model)
    assert accelerate(model) is done and done.client.name == name and method in done.replaced
    assert method not in vars(type(model)) or getattr(type(model), method) is not getattr(model, method)
    expected = call(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert getattr(twin, method).args[0] is twin
        assert torch.equal(call(twin), expected)
        assert method not in vars(restore(twin))
    assert restore(model) is model and vars(model).keys() == before.keys()


@contextmanager
def second_seed(monkeypatch, module):
    """Give a lone sample the seed that the second of three has after torch.manual_seed(0)."""
    seeds = torch.randint(2**63 - 1, (3,), generator=seeded(0))[1:2]
    with monkeypatch.context() as patch:
        patch.setattr(f"mgt_sampler.clients.{module}.draw_seeds", lambda *_: seeds)
        yield


def softmax_draw(logits, temperature):
    """Tokens (B, N) of logits (B, N, V), by PyTorch."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def plain_blocks(
    logits_of, ids, start, steps, length, block_length, temperature, cfg_scale, remasking, mask_id, never=(), last=()
):
    """LLaDA's loop."""
    ids, known = ids.clone(), ids != mask_id
    steps //= length // block_length
    for begin in range(start, start + length, block_length):
        masked = (ids[:, begin : begin + block_length] == mask_id).sum(1).tolist()
        for i in range(steps):
            logits = logits_of(ids)
            if cfg_scale > 0:
                uncond = logits_of(ids.masked_fill(known, mask_id))
                logits = uncond + (cfg_scale + 1) * (logits - uncond)
            logits[..., list(never)] = -torch.inf
            tokens = softmax_draw(logits, temperature)
            logits[..., list(last)] = -torch.inf
            score = logits.double().softmax(-1).gather(-1, tokens[..., None])[..., 0]
            if remasking == "random":
                score = torch.rand(score.shape)
            score[:, begin + block_length :] = -1
            score[ids != mask_id] = -1
            for b, count in enumerate(masked):
                best = score[b].topk(count // steps + (i < count % steps)).indices
                ids[b, best] = tokens[b, best]
    return ids


class TestLLaDA:
    """LLaDA's model, and the loop of its generate.py."""

    mask_id = 31
    prompt = torch.randint(0, 30, (3, 4), generator=seeded(1))
    options = {"steps": 8, "gen_length": 16, "block_length": 8, "mask_id": 31}  # noqa: RUF012

    @classmethod
    def generate(cls, model, prompt=None, seed=0, **options):
        """The ids, and the numbers of masks that the network was given."""
        model.given.clear()
        torch.manual_seed(seed)
        prompt = cls.prompt if prompt is None else prompt
        found = model.generate(prompt, **{**cls.options, **options})
        return found, [(ids[: len(prompt)] == model.head.out_features - 1).sum(1).tolist() for ids in model.given]

    @classmethod
    def plain(cls, model, prompt=None, seed=0, attention_mask=None, **options):
        torch.manual_seed(seed)
        prompt = cls.prompt if prompt is None else prompt
        settings = {"temperature": 0.0, "cfg_scale": 0.0, "remasking": "low_confidence", **cls.options, **options}
        if os.environ.get("MGT_LLADA"):
            names = ("add_gumbel_noise", "get_num_transfer_tokens", "generate")
            return tiny_text.source("MGT_LLADA", "generate.py", *names).generate(
                model, prompt, attention_mask, **settings
            )
        length = settings.pop("gen_length")
        never = [126081] * settings.pop("logits_eos_inf", False)
        last = [126081, 126348] * settings.pop("confidence_eos_eot_inf", False)
        ids = torch.cat([prompt, torch.full((len(prompt), length), settings["mask_id"])], 1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones(len(prompt), length)], 1)
        return plain_blocks(
            lambda ids: model.logits(ids, attention_mask), ids, prompt.shape[1], length=length, never=never, last=last,
            **settings,
        )  # fmt: skip

    def test_as_many_become_known_in_each_step(self):
        model = tiny_text.llada_model()
        accelerate(model)
        found, masked = self.generate(model, temperature=1.0)
        assert masked == [[n] * 3 for n in (16, 14, 12, 10, 8, 6, 4, 2)]
        assert found.shape == (3, 20) and found.dtype == torch.int64 and found.max() < self.mask_id
        assert torch.equal(found[:, :4], self.prompt)
        # what is left over comes first
        _, masked = self.generate(model, steps=6, remasking="random")
        assert [n for n, *_ in masked] == [16, 13, 10, 8, 5, 2]
        # guidance masks the prompt in the other half
        self.generate(model, cfg_scale=1.0, attention_mask=torch.ones(3, 4))
        assert all(ids.shape == (6, 20) and (ids[3:, :4] == self.mask_id).all() for ids in model.given)

    @pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
    @pytest.mark.parametrize("block_length, steps", [(16, 5), (4, 8), (8, 16)])
    def test_greedy_ids_are_equal(self, cfg_scale, block_length, steps):
        model = tiny_text.llada_model()
        attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
        options = {"cfg_scale": cfg_scale, "attention_mask": attention_mask}
        options |= {"block_length": block_length, "steps": steps}
        expected = self.plain(model, **options)
        accelerate(model)
        found, _ = self.generate(model, **options)
        assert torch.equal(found, expected) and len(found.unique()) > 8

    def test_masks_within_the_prompt_compete_as_in_the_original(self):
        model = tiny_text.llada_model()
        prompt = self.prompt.clone()
        prompt[1, 1:3] = self.mask_id
        expected = self.plain(model, prompt)
        accelerate(model)
        found, _ = self.generate(model, prompt)
        assert torch.equal(found, expected)
        assert (prompt == self.mask_id).sum() == 2

    @pytest.mark.parametrize("never", [True, False])
    def test_the_ends_of_a_text_and_of_a_turn_are_kept_back(self, never):
        model = tiny_text.llada_model(126464, 126336)
        model.head.bias.data[[126081, 126348]] = torch.tensor([3.0, 2.5])
        options = {"gen_length": 8, "steps": 8, "mask_id": 126336, "logits_eos_inf": never}
        options["confidence_eos_eot_inf"] = not never
        expected = self.plain(model, self.prompt[:1], **options)
        plain = list(model.given)
        accelerate(model)
        found, _ = self.generate(model, self.prompt[:1], **options)
        ended = [bool(torch.isin(ids, torch.tensor([126081, 126348])).any()) for ids in (*model.given, found)]
        if never:
            assert torch.equal(found, expected) and (found != 126081).all()
        else:
            # those that are kept back are in no order
            assert ended == sorted(ended) and ended.index(True) > 3 and ended[-1]
            count = ended.index(True)
            assert all(map(torch.equal, model.given[:count], plain[:count]))

    @pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.6, "cfg_scale": 0.5}])
    def test_what_is_certain_is_equal(self, options):
        model = tiny_text.llada_model()
        options = {**options, "attention_mask": torch.ones(3, 4)}
        model.certain = torch.randint(0, 31, (20,), generator=seeded(2))
        expected = self.plain(model, **options)
        accelerate(model)
        assert torch.equal(expected[:, 4:], model.certain[4:].expand(3, -1))
        assert torch.equal(self.generate(model, **options)[0], expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 1.0},
            {"temperature": 2.0},
            {"temperature": 0.5, "cfg_scale": 0.5},
            {"temperature": 1.0, "remasking": "random"},
        ],
    )
    def test_draws_have_the_originals_distribution(self, options):
        model = tiny_text.llada_model()
        model.head.weight.data /= 3
        prompt = self.prompt[:1].expand(3000, -1)
        options = {"gen_length": 4, "block_length": 4, "steps": 2, "attention_mask": torch.ones(3000, 4), **options}
        expected = self.plain(model, prompt, 1, **options)[:, 4:]
        accelerate(model)
        found = self.generate(model, prompt, **options)[0][:, 4:]
        assert marginals(found, expected, 32) > 1e-3
        other = self.generate(model, prompt, **{**options, "temperature": options["temperature"] * 2})[0][:, 4:]
        assert marginals(other, expected, 32) < 1e-3

    def test_a_sample_is_a_function_of_its_seed(self, monkeypatch):
        model = tiny_text.llada_model()
        accelerate(model)
        for options in ({"temperature": 1.0}, {"temperature": 0.7, "cfg_scale": 1.0}, {"remasking": "random"}):
            together, _ = self.generate(model, **options)
            assert torch.equal(self.generate(model, **options)[0], together)
            assert not torch.equal(self.generate(model, seed=1, **options)[0], together)
            with second_seed(monkeypatch, "blocks"):
                assert torch.equal(self.generate(model, self.prompt[1:2], **options)[0], together[1:2])
            # blocks and steps differ
            same = self.generate(model, self.prompt[:1], temperature=1e4)[0][0, 4:]
            assert len(same.unique()) > 5

    def test_copies_and_the_original(self):
        model = tiny_text.llada_model()
        check_that_it_goes_and_comes(model, "LLaDA", "generate", lambda model: self.generate(model, temperature=1.0)[0])
        assert model.generate() == "autoregressive"

    @pytest.mark.parametrize("name, value", [("block_length", 5), ("block_length", 0), ("steps", 3), ("steps", 0)])
    def test_bad_arguments_are_named(self, name, value):
        model = tiny_text.llada_model()
        accelerate(model)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            self.generate(model, **{name: value})
        with pytest.raises(ValueError, match=r"^remasking: expected"):
            self.generate(model, remasking="best")


def plain_filter(logits, top_p, top_k):
    """-inf for what top_p and top_k leave out, each of all tokens."""
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    out = torch.zeros_like(logits, dtype=torch.bool)
    if top_p is not None:
        out |= probs.cumsum(-1) - probs >= top_p
    if top_k is not None:
        out |= torch.arange(logits.shape[-1]) >= top_k
    return logits.masked_fill(out.gather(-1, order.argsort(-1)), -torch.inf)


def plain_dream(
    model, prompt, attention_mask=None, *, max_new_tokens, steps, alg="origin", alg_temp=None, temperature=0.0,
    top_p=None, top_k=None, eps=1e-3, threshold=0.9,
):  # fmt: skip
    """Dream's loop, on equally many masks in each sample."""
    mask_id = model.head.out_features - 1
    ids = torch.cat([prompt, torch.full((len(prompt), max_new_tokens), mask_id)], 1)
    times, owed, step = torch.linspace(1, eps, steps + 1), torch.zeros(len(ids)), 0
    share = (ids == mask_id).sum(1) // steps
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones(len(ids), max_new_tokens)], 1)
    while step < steps or owed.any():
        logits = model.logits(ids, attention_mask)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        logits = plain_filter(logits / temperature if temperature else logits, top_p, top_k)
        tokens = softmax_draw(logits, 1.0 if temperature else 0.0)
        probs = logits.softmax(-1)
        best = probs.sort(-1, descending=True).values
        score = {
            "topk_margin": best[..., 0] - best[..., 1],
            "entropy": (probs * (probs + 1e-10).log()).sum(-1),
        }.get(alg, probs.gather(-1, tokens[..., None])[..., 0])
        masked = ids == mask_id
        share_now = 1 - times[step + 1] / times[step] if step < steps - 1 else 1.0
        for b in range(len(ids)):
            where = masked[b].nonzero()[:, 0]
            count = int(len(where) * share_now)
            if alg == "origin":
                chosen = where[torch.rand(len(where)) < share_now]
            elif alg == "confidence_threshold":
                owed[b] += share[b] if step < steps else 0
                chosen = where[score[b, where].topk(int(owed[b])).indices]
                chosen = torch.cat([chosen[:1], chosen[1:][score[b, chosen[1:]] >= threshold]])
                owed[b] -= len(chosen)
            elif alg_temp:
                chosen = where[torch.multinomial((score[b, where] / alg_temp).softmax(0), max(count, 1))[:count]]
            else:
                chosen = where[score[b, where].topk(count).indices]
            ids[b, chosen] = tokens[b, chosen]
        step += 1
    return ids


class TestDream:
    """Dream's model, and the loop in its `_sample`."""

    real = bool(os.environ.get("MGT_DREAM"))
    prompt = torch.randint(0, 30, (3, 4), generator=seeded(1))

    @classmethod
    def generate(cls, model, prompt=None, seed=0, **options):
        """The ids, and the numbers of masks that the network was given."""
        model.given.clear()
        torch.manual_seed(seed)
        settings = {"max_new_tokens": 16, "steps": 8, "alg": "maskgit_plus", **options}
        found = model.diffusion_generate(cls.prompt if prompt is None else prompt, **settings)
        return found, [(ids == 31).sum(1).tolist() for ids in model.given]

    @classmethod
    def plain(cls, model, prompt=None, seed=0, **options):
        torch.manual_seed(seed)
        prompt = cls.prompt if prompt is None else prompt
        settings = {"max_new_tokens": 16, "steps": 8, "alg": "maskgit_plus", **options}
        if cls.real and (settings["alg"] != "confidence_threshold" or len(prompt) == 1):
            return model.diffusion_generate(prompt, **settings)
        return plain_dream(model, prompt, **settings)

    @pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
    def test_as_many_become_known_in_each_step(self, alg):
        model = tiny_text.dream_model()
        accelerate(model)
        options = {"temperature": 1.0, "alg": alg, "return_dict_in_generate": True}
        found, masked = self.generate(model, output_history=True, **options)
        assert masked == [[n] * 3 for n in (16, 15, 13, 11, 9, 7, 5, 3)]
        assert type(found).__name__ == "DreamModelOutput" and len(found.history) == 8
        assert [int((ids[0] == 31).sum()) for ids in found.history] == [15, 13, 11, 9, 7, 5, 3, 0]
        assert torch.equal(found.sequences, found.history[-1]) and torch.equal(found.sequences[:, :4], self.prompt)
        assert self.generate(model, **options)[0].history is None
        # the first of sixteen steps has no whole position
        assert [n for n, *_ in self.generate(model, steps=16, alg=alg)[1]][:4] == [16, 16, 15, 14]

    @pytest.mark.parametrize(
        "options",
        [
            {"alg": "maskgit_plus", "steps": 5},
            {"alg": "topk_margin", "top_k": 4},
            {"alg": "entropy", "top_p": 0.9},
            {"alg": "entropy", "top_p": 0.9, "top_k": 3},
            {"alg": "maskgit_plus", "top_p": 0.8, "top_k": 2, "eps": 1e-2},
        ],
    )
    def test_greedy_ids_are_equal(self, options):
        model = tiny_text.dream_model()
        # so flat that more than one token is kept: else confidences are equal, and their order is anyone's
        model.head.weight.data /= 5
        for attention_mask in (None, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])):
            restore(model)
            expected = self.plain(model, attention_mask=attention_mask, **options)
            accelerate(model)
            found, _ = self.generate(model, attention_mask=attention_mask, **options)
            assert torch.equal(found, expected) and len(found[:, 4:].unique()) > 2
        mask, places = model.asked_with
        assert mask.shape == (3, 1, 20, 20) and places[0].tolist() == [1, 1, *range(18)]
        there = torch.arange(20) > 1
        assert torch.equal(mask[0, 0], there[:, None] & there)

    @pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 2.0])
    def test_the_threshold_of_fast_dllm(self, threshold):
        model = tiny_text.dream_model()
        options = {"alg": "confidence_threshold", "threshold": threshold, "steps": 4}
        expected = torch.cat([self.plain(model, prompt[None], **options) for prompt in self.prompt])
        accelerate(model)
        found, masked = self.generate(model, **options)
        assert torch.equal(found, expected)
        assert masked[1][0] == {0.0: 12, 2.0: 15}.get(threshold, masked[1][0])
        assert len(masked) == {0.0: 4, 2.0: 16}.get(threshold, len(masked))

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_what_is_certain_is_equal(self, temperature):
        model = tiny_text.dream_model()
        model.certain = torch.randint(0, 31, (20,), generator=seeded(2))
        for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
            restore(model)
            expected = self.plain(model, alg=alg, temperature=temperature)
            # of the position before
            assert torch.equal(expected[:, 4:], model.certain[3:-1].expand(3, -1))
            accelerate(model)
            assert torch.equal(self.generate(model, alg=alg, temperature=temperature)[0], expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"alg": "origin", "temperature": 1.0},
            {"alg": "origin", "temperature": 0.6, "top_p": 0.8},
            {"alg": "maskgit_plus", "temperature": 1.0, "top_k": 5, "top_p": 0.7},
            {"alg": "topk_margin", "temperature": 1.0, "top_k": 3, "top_p": 0.95},
            {"alg": "maskgit_plus", "temperature": 0.0, "alg_temp": 0.3},
            {"alg": "entropy", "temperature": 1.0, "alg_temp": 0.5},
        ],
    )
    def test_draws_have_the_originals_distribution(self, options):
        model = tiny_text.dream_model()
        model.head.weight.data /= 3
        prompt = self.prompt[:1].expand(3000, -1)
        options = {"max_new_tokens": 4, "steps": 3, **options}
        expected = self.plain(model, prompt, 1, **options)[:, 4:]
        accelerate(model)
        found = self.generate(model, prompt, **options)[0][:, 4:]
        assert marginals(found, expected, 32) > 1e-3
        for name, factor in (("temperature", 1.5), ("alg_temp", 100.0)):
            if options.get(name):
                other = self.generate(model, prompt, **{**options, name: options[name] * factor})[0][:, 4:]
                assert marginals(other, expected, 32) < 1e-3
                break

    def test_positions_are_revealed_one_by_one(self):
        # with "origin" their number is binomial
        model = tiny_text.dream_model()
        accelerate(model)
        prompt = self.prompt[:1].expand(3000, -1)
        _, masked = self.generate(model, prompt, alg="origin", temperature=1.0, steps=4)
        left = torch.tensor(masked[1])
        probs = torch.tensor(stats.binom.pmf(range(17), 16, float(1 - 0.25 * (1 - 1e-3))))
        counts = left.bincount(minlength=17)
        keep = probs * 3000 > 5
        assert stats.chisquare(counts[keep], probs[keep] / probs[keep].sum() * counts[keep].sum()).pvalue > 1e-3

    def test_each_sample_counts_its_own_masks(self):
        model = tiny_text.dream_model()
        accelerate(model)
        prompt = self.prompt.clone()
        prompt[0, 1:] = 31
        found, masked = self.generate(model, prompt)
        assert masked[0] == [19, 16, 16] and masked[-1] == [4, 3, 3] and (found < 31).all()
        assert torch.equal(
            found[prompt.new_ones(3, 20).bool() & (torch.nn.functional.pad(prompt, (0, 16), value=31) != 31)],
            prompt[prompt != 31],
        )
        assert torch.equal(found[1:], self.generate(model, prompt[1:])[0])

    def test_a_sample_is_a_function_of_its_seed(self, monkeypatch):
        model = tiny_text.dream_model()
        accelerate(model)
        for alg in ("origin", "entropy", "confidence_threshold"):
            options = {"alg": alg, "temperature": 1.0, "alg_temp": 0.2}
            together, _ = self.generate(model, **options)
            assert torch.equal(self.generate(model, **options)[0], together)
            assert not torch.equal(self.generate(model, seed=1, **options)[0], together)
            with second_seed(monkeypatch, "dream"):
                assert torch.equal(self.generate(model, self.prompt[1:2], **options)[0], together[1:2])

    def test_hooks(self):
        model = tiny_text.dream_model()
        accelerate(model)
        seen = []

        def tokens_hook(step, ids, logits):
            seen.append((step, None if logits is None else logits.argmax(-1)))
            return ids.masked_fill(torch.arange(ids.shape[1]) == 7, 3)

        def logits_hook(step, ids, logits):
            logits[..., 5] = 1e3
            return logits

        found, masked = self.generate(
            model, generation_tokens_hook_func=tokens_hook, generation_logits_hook_func=logits_hook
        )
        assert [step for step, _ in seen] == [None, *range(8)] and (seen[1][1] == 5).all()
        assert masked[0] == [15] * 3 and (found[:, 7] == 3).all() and (found[:, 8:] == 5).all()

    def test_copies_and_the_original(self):
        model = tiny_text.dream_model()
        check_that_it_goes_and_comes(
            model, "Dream", "_sample", lambda model: self.generate(model, temperature=1.0, alg="origin")[0]
        )
        if not self.real:
            assert self.generate(model)[0] == "the original"

    @pytest.mark.parametrize(
        "options, name",
        [
            ({"alg": "best"}, "alg"),
            ({"steps": 0}, "steps"),
            ({"steps": 3, "alg": "confidence_threshold"}, "steps"),
            ({"mask_token_id": None}, "mask_token_id"),
            ({"temperature": -1.0}, "temperature"),
            ({"top_p": 0.0}, "top_p"),
        ],
    )
    def test_bad_arguments_are_named(self, options, name):
        model = tiny_text.dream_model()
        accelerate(model)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            self.generate(model, **options)

    def test_a_loop_that_was_replaced_is_left_alone(self):
        model = tiny_text.dream_model()
        model._sample = print
        with pytest.raises(TypeError, match=r"obj\._sample"):
            accelerate(model)
        assert model._sample is print


def plain_image(
    logits_of, ids, uncond, mask_id, first_id, prefix, *, temperature=1.0, timesteps=18, guidance_scale=0,
    noise_schedule=lambda r: torch.cos(r * math.pi / 2),
):  # fmt: skip
    """Show-o's loop, on equally many masks in each sample; the codebook has 24 ids."""
    ids = ids.clone()
    image = ids[:, prefix:-1]
    num_tokens = image.shape[1]
    for step in range(timesteps):
        logits = logits_of(ids)
        if uncond is not None and guidance_scale > 0:
            other = logits_of(torch.cat([uncond[:, :prefix], ids[:, prefix:]], 1))
            logits = (1 + guidance_scale) * logits - guidance_scale * other
        logits = logits[:, prefix:-1, first_id : first_id + 24]
        masked = image == mask_id
        code = torch.where(masked, softmax_draw(logits, 1.0), image - first_id)
        if step == timesteps - 1:
            return code
        ratio = (step + 1) / timesteps
        temperature *= 1 - ratio
        score = logits.log_softmax(-1).gather(-1, code.clamp(0, 23)[..., None])[..., 0]
        score = score - temperature * torch.empty(score.shape).exponential_().log()
        score[~masked] = torch.inf
        count = min(int(masked[0].sum()) - 1, int((num_tokens * noise_schedule(torch.tensor(ratio))).floor()))
        image.copy_((code + first_id).scatter(1, score.topk(max(count, 1), largest=False).indices, mask_id))


class Showo:
    """What the tests of `TestImages` ask of Show-o."""

    name, mask_id, first_id, model, real = "Show-o", 46, 22, staticmethod(tiny_text.showo_model), "MGT_SHOWO"

    @staticmethod
    def call(model, ids, uncond, guided, **options):
        config = copy.deepcopy(tiny_text.SHOWO_CONFIG)
        config.model.showo.num_vq_tokens = ids.shape[1] - 5
        attended = torch.ones(len(ids) * (2 if guided else 1), ids.shape[1])
        return model.t2i_generate(ids, uncond, attended, config=config, **options)


class MMaDA:
    """What they ask of MMaDA."""

    name, mask_id, first_id, model, real = "MMaDA", 44, 20, staticmethod(tiny_text.mmada_model), "MGT_MMADA"

    @staticmethod
    def call(model, ids, uncond, guided, **options):
        attended = torch.ones(ids.shape, dtype=torch.int64)
        return model.t2i_generate(
            ids, uncond, attended, attended, seq_len=ids.shape[1] - 5, mask_token_id=44, resolution=3,
            codebook_size=24, uni_prompting=types.SimpleNamespace(text_tokenizer=range(20)), **options,
        )  # fmt: skip


@pytest.fixture(params=[Showo, MMaDA])
def client(request):
    return request.param


class TestImages:
    """`t2i_generate` of Show-o and of MMaDA: three text tokens and one more, the image, one more."""

    @staticmethod
    def inputs(client, num_samples=3, num_tokens=16):
        image = torch.full((num_samples, num_tokens), client.mask_id)
        text = torch.randint(0, 20, (num_samples, 5), generator=seeded(1))
        uncond = torch.randint(0, 20, (num_samples, 5), generator=seeded(2))
        return tuple(torch.cat([ids[:, :4], image, ids[:, 4:]], 1) for ids in (text, uncond))

    @classmethod
    def call(cls, client, model, ids=None, uncond=None, seed=0, **options):
        """The code, and the numbers of masks that the network was given."""
        model.given.clear()
        torch.manual_seed(seed)
        ids = cls.inputs(client)[0] if ids is None else ids
        guided = uncond is not None and options.get("guidance_scale", 0) > 0
        found = client.call(model, ids.clone(), uncond, guided, **options)
        return found, [(ids[: len(found)] == client.mask_id).sum(1).tolist() for ids in model.given]

    @classmethod
    def plain(cls, client, model, ids, uncond=None, seed=0, **options):
        if os.environ.get(client.real):
            with torch.no_grad():
                return cls.call(client, restore(model), ids, uncond, seed, **options)[0]
        torch.manual_seed(seed)
        return plain_image(model.logits, ids, uncond, client.mask_id, client.first_id, 4, **options)

    def test_as_many_are_masked(self, client):
        model = client.model()
        ids, uncond = self.inputs(client, 2, 256)
        accelerate(model)
        before = ids.clone()
        found, masked = self.call(client, model, ids, uncond, timesteps=12, guidance_scale=2)
        assert [n for n, _ in masked] == [256, 253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33]
        assert masked == [[n, n] for n in [256, *mask_lens("cosine", 12, 256)[:-1]]]
        assert found.shape == (2, 256) and 0 <= found.min() and found.max() < 24
        # the other half has its own text, and the same image
        assert torch.equal(ids, before) and torch.equal(model.given[3][2:, :4], uncond[:, :4])
        assert torch.equal(model.given[3][2:, 4:], model.given[3][:2, 4:])
        # more steps than tokens: one is masked until the end
        _, masked = self.call(client, model, timesteps=20, noise_schedule=lambda r: 1 - r)
        assert [n for n, *_ in masked] == [16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1]
        # without guidance, the other half is not asked for
        self.call(client, model, uncond=self.inputs(client)[1])
        assert len(model.given[0]) == 3

    def test_what_is_known_stays(self, client):
        model = client.model()
        ids, _ = self.inputs(client)
        ids[0, 5:20] = client.first_id + 7
        ids[1, 4:20] = client.first_id + 3
        accelerate(model)
        found, masked = self.call(client, model, ids)
        assert masked[0] == [1, 0, 16] and masked[-1] == [1, 0, 1]
        assert (found[0, 1:] == 7).all() and (found[1] == 3).all()

    @pytest.mark.parametrize("guidance_scale", [0, 1.5])
    def test_what_is_certain_is_equal(self, client, guidance_scale):
        model = client.model()
        model.certain = client.first_id + torch.randint(0, 24, (21,), generator=seeded(3))
        ids, uncond = self.inputs(client)
        expected = self.plain(client, model, ids, uncond, guidance_scale=guidance_scale)
        accelerate(model)
        found, _ = self.call(client, model, ids, uncond, guidance_scale=guidance_scale)
        assert torch.equal(found, expected)
        assert torch.equal(found[0], model.certain[4:20] - client.first_id)

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 4.0}, {"guidance_scale": 0.5}])
    def test_draws_have_the_originals_distribution(self, client, options):
        model = client.model()
        model.head.weight.data /= 3
        ids, uncond = (ids[:1].expand(3000, -1) for ids in self.inputs(client, 1, 6))
        expected = self.plain(client, model, ids, uncond, 1, timesteps=3, **options)
        accelerate(model)
        found, _ = self.call(client, model, ids, uncond, timesteps=3, **options)
        assert marginals(found, expected, 24) > 1e-3
        other = {"guidance_scale": 3.0} if "guidance_scale" in options else {"temperature": 4 - options["temperature"]}
        assert marginals(self.call(client, model, ids, uncond, timesteps=3, **other)[0], expected, 24) < 1e-3

    def test_a_sample_is_a_function_of_its_seed(self, client, monkeypatch):
        model = client.model()
        ids, uncond = self.inputs(client)
        accelerate(model)
        together, _ = self.call(client, model, ids, uncond, guidance_scale=1)
        assert not torch.equal(self.call(client, model, ids, uncond, seed=1, guidance_scale=1)[0], together)
        with second_seed(monkeypatch, "showo"):
            alone, _ = self.call(client, model, ids[1:2], uncond[1:2], guidance_scale=1)
        assert torch.equal(alone, together[1:2])
        state = torch.get_rng_state()
        several = [client.call(model, ids, None, False, generator=seeded(5)) for _ in range(2)]
        each = client.call(model, ids, None, False, generator=[seeded(n) for n in range(3)])
        assert torch.equal(*several) and not torch.equal(each, several[0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_copies_and_the_original(self, client):
        model = client.model()
        check_that_it_goes_and_comes(model, client.name, "t2i_generate", lambda model: self.call(client, model)[0])
        if not os.environ.get(client.real):
            assert model.t2i_generate() == "the original"

    def test_bad_arguments_are_named(self, client):
        model = client.model()
        accelerate(model)
        for name, options in (
            ("timesteps", {"timesteps": 0}),
            ("generator", {"generator": [seeded(0)]}),
            ("temperature", {"temperature": -1.0}),
        ):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                self.call(client, model, **options)
        with pytest.raises(ValueError, match=r"^input_ids: expected"):
            tiny = torch.zeros(1, 3, dtype=torch.int64)
            options = {"config": copy.deepcopy(tiny_text.SHOWO_CONFIG)}
            options["config"].model.showo.num_vq_tokens = 16
            model.t2i_generate(
                tiny, attention_mask=tiny, seq_len=16, uni_prompting=types.SimpleNamespace(text_tokenizer=""), **options
            )
        if client is MMaDA:
            with pytest.raises(ValueError, match=r"^uni_prompting: expected"):
                model.t2i_generate(self.inputs(client)[0])


class TestMMaDA:
    """Texts of MMaDA: LLaDA's loop."""

    prompt = torch.randint(0, 20, (3, 4), generator=seeded(1))

    @classmethod
    def call(cls, model, method="mmu_generate", prompt=None, seed=0, **options):
        torch.manual_seed(seed)
        model.given.clear()
        options = {"steps": 8, "block_length": 8, "mask_id": 44, **options}
        options["gen_length" if method == "generate" else "max_new_tokens"] = 16
        return getattr(model, method)(cls.prompt if prompt is None else prompt, **options)

    @classmethod
    def plain(cls, model, attention_mask=None, **options):
        if os.environ.get("MGT_MMADA"):
            return cls.call(restore(model), attention_mask=attention_mask, **options)
        settings = {"temperature": 0.0, "cfg_scale": 0.0, "remasking": "low_confidence", **options}
        ids = torch.cat([cls.prompt, torch.full((3, 16), 44)], 1)
        return plain_blocks(lambda ids: model.logits(ids, attention_mask), ids, 4, 8, 16, 8, mask_id=44, **settings)

    @pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
    def test_greedy_ids_are_equal(self, cfg_scale):
        model = tiny_text.mmada_model()
        attention_mask = torch.ones(3, 20, dtype=torch.int64)
        if not cfg_scale:
            attention_mask[0, :2] = 0
        expected = self.plain(model, attention_mask, cfg_scale=cfg_scale)
        accelerate(model)
        for method in ("generate", "mmu_generate", "mmu_generate_fast"):
            # the mask may be the prompt's alone
            for mask in (attention_mask, attention_mask[:, :4]):
                found = self.call(model, method, cfg_scale=cfg_scale, attention_mask=mask)
                assert torch.equal(found, expected)
        counts = [int((ids[0] == 44).sum()) for ids in model.given]
        assert counts == [16, 14, 12, 10, 8, 6, 4, 2]
        # and holds for both halves
        if cfg_scale:
            attention_mask[0, :2] = 0
            other = self.call(model, cfg_scale=cfg_scale, attention_mask=attention_mask)
            assert not torch.equal(other[0], expected[0]) and torch.equal(other[1:], expected[1:])

    def test_a_sample_ends_with_the_block_that_ends_in_a_token(self):
        model = tiny_text.mmada_model()
        model.head.weight.data /= 5
        accelerate(model)
        whole = self.call(model, temperature=1.0)
        eot = int(whole[0, 11])
        ends = whole[:, 11] == eot
        assert not ends.all()
        found = self.call(model, "mmu_generate_fast", temperature=1.0, eot_token=eot)
        assert torch.equal(found[:, :12], whole[:, :12]) and torch.equal(found[~ends], whole[~ends])
        assert (found[ends, 12:] == 44).all() and len(model.given) == 8
        # nothing is left to do
        whole = self.call(model)
        found = self.call(model, "mmu_generate_fast", self.prompt[:1], eot_token=int(whole[0, 11]))
        assert len(model.given) == 4 and torch.equal(found[0, :12], whole[0, :12]) and (found[0, 12:] == 44).all()
        if os.environ.get("MGT_MMADA"):
            restore(model)
            original = self.call(model, "mmu_generate_fast", self.prompt[:1], eot_token=int(whole[0, 11]))
            assert torch.equal(original, found)

    def test_draws_are_a_function_of_the_seed(self):
        model = tiny_text.mmada_model()
        accelerate(model)
        found = self.call(model, temperature=1.0)
        assert torch.equal(self.call(model, "generate", temperature=1.0), found)
        assert not torch.equal(self.call(model, seed=1, temperature=1.0), found)
        assert accelerate(model).client.name == "MMaDA"
        with pytest.raises(ValueError, match=r"^steps: expected"):
            self.call(model, steps=3)


def plain_lumina(
    model, prompt, *, seq_len, uncon_ids, code_start, timesteps=18, temperature=1.0, cfg_scale=0.0, use_cache=False,
    cache_ratio=0.9, refresh_interval=5, warmup_ratio=0.3, noise_schedule=lambda r: torch.cos(r * math.pi / 2),
):  # fmt: skip
    """Lumina-DiMOO's loop, on equally many masks in each sample."""
    ids, stale = prompt.clone(), {}
    total = int((ids[0] == 23).sum())
    warm_up = int(timesteps * warmup_ratio)
    fresh = [not use_cache or k <= warm_up or (k - warm_up) % refresh_interval == 0 for k in range(timesteps)]
    model.caching(use_cache)
    for k in range(timesteps):
        masked = ids == 23
        left = int(masked[0].sum())
        if left == 0:
            break
        if use_cache and k and fresh[k]:
            model.empty_cache()
        rows = masked.nonzero(as_tuple=True)
        logits = {"cond": ids}
        if cfg_scale > 0:
            logits["uncond"] = torch.cat([uncon_ids.expand(len(ids), -1), ids[:, code_start - 2 :]], 1)
        for name, given in list(logits.items()):
            computed = None if fresh[k] else stale[name]
            out = model(given, infer=True, cat=name, use_cache=use_cache, to_compute_mask=computed).logits[..., 24:44]
            stale[name] = out.amax(-1) <= out.amax(-1).quantile(1 - cache_ratio, dim=-1, keepdim=True)
            logits[name] = out[given == 23].view(len(ids), left, 20)
        l = logits["cond"]  # noqa: E741
        if cfg_scale > 0:
            l = (1 + cfg_scale) * l - cfg_scale * logits["uncond"]  # noqa: E741
        tokens = softmax_draw(l, temperature)
        score = l.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        score = score - temperature * torch.empty(score.shape).exponential_().log()
        ids[rows] = tokens.flatten() + 24
        if k < timesteps - 1:
            count = max(int((total * noise_schedule(torch.tensor((k + 1) / timesteps))).floor()), 1)
            lowest = score.topk(min(count, left - 1), largest=False).indices
            ids.scatter_(1, rows[1].view(len(ids), left).gather(1, lowest), 23)
    image = ids[:, code_start:-2]
    return image[image != 22].view(len(ids), seq_len)


class TestLumina:
    """Lumina-DiMOO's model, and the loop of its generate_image: four text tokens, two more, the image, two more."""

    real = bool(os.environ.get("MGT_LUMINA"))

    @staticmethod
    def inputs(num_samples=3, side=4):
        rows = torch.full((num_samples, side, side + 1), 23)
        rows[..., -1] = 22
        text = torch.randint(0, 20, (num_samples, 8), generator=seeded(1))
        return torch.cat([text[:, :6], rows.flatten(1), text[:, 6:]], 1), torch.randint(
            0, 20, (1, 3), generator=seeded(2)
        )

    @classmethod
    def settings(cls, prompt, uncon_ids, options):
        seq_len = int(((prompt[0, 6:-2]) != 22).sum())
        return {"seq_len": seq_len, "uncon_ids": uncon_ids, "code_start": 6, "cfg_scale": 0.0} | options

    @classmethod
    def call(cls, model, prompt=None, seed=0, **options):
        """The tokens, and the numbers of masks that the network was given."""
        inputs = cls.inputs()
        prompt = inputs[0] if prompt is None else prompt
        model.given.clear()
        model.calls.clear()
        torch.manual_seed(seed)
        settings = {"mask_token_id": 23, "newline_id": 22, "codebook_size": 20, "text_vocab_size": 24}
        found = model.generate_image(prompt, **cls.settings(prompt, inputs[1], settings | options))
        return found, [(ids == 23).sum(1).tolist() for ids in model.given]

    @classmethod
    def plain(cls, model, prompt=None, seed=0, **options):
        inputs = cls.inputs()
        prompt = inputs[0] if prompt is None else prompt
        model.given.clear()
        model.calls.clear()
        torch.manual_seed(seed)
        settings = cls.settings(prompt, inputs[1], options)
        if not cls.real:
            return plain_lumina(model, prompt, **settings)
        ids = {"mask_token_id": 23, "newline_id": 22, "codebook_size": 20, "text_vocab_size": 24}
        original = tiny_text.lumina_original()
        return torch.cat([original(model, each[None].clone(), **ids, **settings) for each in prompt])

    def test_as_many_are_masked(self):
        model = tiny_text.lumina_model()
        accelerate(model)
        prompt, uncon_ids = self.inputs(2, 16)
        before = prompt.clone()
        found, masked = self.call(model, prompt, timesteps=12, text_vocab_size=None)
        # the first call asks for the size of the vocabulary
        assert masked[1:] == [[n, n] for n in (256, 253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33)]
        assert found.shape == (2, 256) and found.min() >= 24 and torch.equal(prompt, before)
        assert (model.given[-1][:, :6] == prompt[:, :6]).all() and (model.given[-1][:, -2:] == prompt[:, -2:]).all()
        assert ((model.given[-1] == 22) == (prompt == 22)).all()
        _, masked = self.call(model, prompt, timesteps=3, cfg_scale=1.0)
        assert [ids.shape[1] for ids in model.given] == [280, 279] * 3 and masked[0] == masked[1]
        assert torch.equal(model.given[3][:, :3], uncon_ids.expand(2, -1))
        assert torch.equal(model.given[3][:, 3:], model.given[2][:, 4:])
        # one less in each step, and no step without a mask
        _, masked = self.call(model, timesteps=30, noise_schedule=lambda r: 1 + 0 * r)
        assert [n for n, *_ in masked] == list(range(16, 0, -1))

    @pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.5}, {"cfg_scale": 2.0, "timesteps": 40}])
    def test_greedy_tokens_are_equal(self, options):
        model = tiny_text.lumina_model()
        model.places.weight.data *= 2
        prompt, _ = self.inputs()
        prompt[:, 7:9] = torch.tensor([30, 31])
        expected = self.plain(model, prompt, temperature=0.0, **options)
        accelerate(model)
        found, _ = self.call(model, prompt, temperature=0.0, **options)
        assert torch.equal(found, expected) and len(found.unique()) > 3
        assert found[:, 1:3].tolist() == [[30, 31]] * 3

    def test_the_cache_is_asked_for_as_in_the_original(self):
        model = tiny_text.lumina_model()
        prompt, _ = self.inputs(1)
        options = {"temperature": 0.0, "cfg_scale": 1.5, "use_cache": True, "timesteps": 12, "refresh_interval": 3}
        options |= {"cache_ratio": 0.6, "warmup_ratio": 0.2}
        expected = self.plain(model, prompt, **options)
        calls = list(model.calls)
        accelerate(model)
        found, _ = self.call(model, prompt, **options)
        assert torch.equal(found, expected) and model.calls == calls
        assert ("cond", True, [11]) in calls and calls.count("empty") > 2
        # without guidance too
        self.call(model, **{**options, "cfg_scale": 0.0})
        assert {call[0] for call in model.calls if call != "empty"} == {"cond"}

    def test_what_is_certain_is_equal(self):
        model = tiny_text.lumina_model()
        model.certain = 24 + torch.randint(0, 20, (40,), generator=seeded(3))
        expected = self.plain(model)
        accelerate(model)
        found, _ = self.call(model)
        assert torch.equal(found, expected)
        assert torch.equal(found[0], model.certain[6:26].view(4, 5)[:, :4].flatten())

    @pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 2.0}, {"cfg_scale": 0.5}])
    def test_draws_have_the_originals_distribution(self, options):
        model = tiny_text.lumina_model()
        model.head.weight.data /= 3
        prompt = self.inputs(1, 2)[0].expand(2500, -1)
        expected = self.plain(model, prompt, 1, timesteps=3, **options) - 24
        accelerate(model)
        found = self.call(model, prompt, timesteps=3, **options)[0] - 24
        assert marginals(found, expected, 20) > 1e-3
        other = {name: value * 4 for name, value in options.items()}
        assert marginals(self.call(model, prompt, timesteps=3, **other)[0] - 24, expected, 20) < 1e-3

    def test_a_sample_is_a_function_of_its_seed(self, monkeypatch):
        model = tiny_text.lumina_model()
        accelerate(model)
        prompt, _ = self.inputs()
        for options in ({}, {"cfg_scale": 1.0, "temperature": 0.5}):
            together, _ = self.call(model, **options)
            assert not torch.equal(self.call(model, seed=1, **options)[0], together)
            with second_seed(monkeypatch, "lumina"):
                assert torch.equal(self.call(model, prompt[1:2], **options)[0], together[1:2])
        one, other = (self.call(model, seed=n, generator=seeded(5))[0] for n in range(2))
        assert torch.equal(one, other)

    def test_copies_and_the_original(self):
        model = tiny_text.lumina_model()
        check_that_it_goes_and_comes(
            model, "Lumina-DiMOO", "generate_image", lambda model: self.call(model, cfg_scale=1.0)[0]
        )
        assert not hasattr(model, "generate_image")

    def test_bad_arguments_are_named(self):
        model = tiny_text.lumina_model()
        accelerate(model)
        for name, options in (
            ("seq_len", {"seq_len": 15}),
            ("code_start", {"code_start": None, "cfg_scale": 1.0}),
            ("generator", {"generator": [seeded(0)]}),
            ("temperature", {"temperature": -1.0}),
        ):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                self.call(model, **options)
        # without guidance nobody reads it
        assert self.call(model, uncon_ids=None)[0].shape == (3, 16)
