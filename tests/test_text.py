"""Text drawn block by block: LLaDA's, Dream's, LLaDA2's and SDAR's loops as rules of `generate_text`."""

import pickle

import pytest
import torch

from mgt_sampler import presets
from mgt_sampler.counts import even_split
from mgt_sampler.draw import Draw, ScoredAt
from mgt_sampler.order import random_order
from mgt_sampler.selection import Commit, MaskLowest
from mgt_sampler.text import generate_text

V, MASK, EOS = 24, 23, 3
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


class Language:
    """Logits of a token's own place in its text, its neighbours and the mean of what is not padding."""

    def __init__(self, dtype=torch.float32, shift=False, strength=1.0):
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(V, V, generator=generator)
        self.left, self.right = (strength * torch.randn(V, V, generator=generator) for _ in range(2))
        self.place = torch.randn(64, V, generator=generator)
        self.dtype, self.shift, self.strength, self.given, self.calls = dtype, shift, strength, [], 0

    def __call__(self, tokens, attention_mask):
        self.calls += 1
        self.given.append(tokens.clone())
        weights = attention_mask.double()[..., None]
        # in float64, so that a sum over more padding is the same float32
        mean = (self.embedding[tokens].double() * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        place = (attention_mask.cumsum(1) - 1).clamp(min=0)
        known = attention_mask[..., None]
        left = torch.where(known, self.left[tokens], 0.0).roll(1, 1)
        left[:, 0] = 0
        right = self.right[tokens].roll(-1, 1)
        right[:, -1] = 0
        logits = 2 * self.strength * mean.float() + left + right + self.place[place]
        # the mask is never an answer, however likely
        logits[..., MASK] = 9
        return (logits.roll(-1, 1) if self.shift else logits).to(self.dtype)


def draw(prompt=PROMPTS, rule=presets.LLADA, model=None, **options):
    settings = {"mask_token_id": MASK, "gen_length": 16, "block_length": 8, "num_inference_steps": 4, "progress": False}
    return generate_text(model or Language(), prompt, rule, **{**settings, **options})


RULES = {
    "llada": presets.LLADA,
    "llada at a temperature": presets.LLADA.but(draw=ScoredAt(Draw(temperature=0.8))),
    "llada at random": presets.LLADA.but(
        draw=Draw(temperature=0.7), score=random_order, select=MaskLowest(even_split, 1.0)
    ),
    "guided": presets.LLADA.but(guidance_scale=2.0),
    "dream": presets.DREAM.but(draw=Draw(temperature=0.4, top_p=0.95), score="margin"),
    "llada2": presets.LLADA2,
    "threshold": presets.FAST_DLLM.but(select=Commit(threshold=0.6)),
    "factor": presets.FAST_DLLM.but(select=Commit(factor=1.5)),
    "entropy bound": presets.DREAM.but(select=Commit(entropy_bound=1.0)),
    "sdar": presets.SDAR.but(draw=Draw(temperature=1.0, top_k=8, top_p=0.9)),
    "editing": presets.LLADA2.but(
        draw=Draw(temperature=0.0, rows="all"), select=Commit(threshold=0.6, replace_above=0.3)
    ),
    "masking again": presets.LLADA2.but(
        draw=Draw(temperature=1.0, rows="all"), select=Commit(even_split, threshold=0.9, mask_below=0.05)
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
class TestEveryRule:
    def test_a_text_alone_equals_itself_in_a_batch(self, rule):
        batch = draw(rule=rule, seed=[1, 2, 3])
        for i, prompt in enumerate(PROMPTS):
            alone = draw([prompt], rule, seed=[[1, 2, 3][i]])
            assert torch.equal(alone.text[0], batch.text[i])
            assert alone.tokens[0].tolist() == [*prompt, *alone.text[0].tolist()]

    def test_prompts_stay_and_no_mask_is_left(self, rule):
        seen = []
        output = draw(rule=rule, callback=seen.append)
        for step in seen:
            for row, prompt in zip(step.tokens, PROMPTS, strict=True):
                assert row[4 - len(prompt) : 4].tolist() == prompt
        assert (output.text != MASK).all() and (output.text < V).all()
        assert output.lengths.tolist() == [16, 16, 16]

    def test_blocks_come_one_after_the_other(self, rule):
        seen = []
        draw(rule=rule, callback=seen.append)
        for step in seen:
            text = step.tokens[:, 4:]
            if step.block == 0:
                assert (text[:, 8:] == MASK).all()
            else:
                assert (text[:, :8] != MASK).all()

    def test_rules_can_be_pickled(self, rule):
        assert torch.equal(draw(rule=pickle.loads(pickle.dumps(rule))).text, draw(rule=rule).text)


def llada(model, prompt, *, temperature, gen_length, block_length, steps, scale=1.0):
    """LLaDA's loop in plain PyTorch, for temperature 0 and one prompt."""
    assert temperature == 0
    x = torch.tensor([[*prompt, *[MASK] * gen_length]])
    attention = torch.ones_like(x, dtype=torch.bool)
    for block in range(gen_length // block_length):
        end = len(prompt) + (block + 1) * block_length
        masked = int((x[:, :end] == MASK).sum())
        counts = [masked // steps + (k < masked % steps) for k in range(steps)]
        for count in counts:
            logits = model(x, attention)
            if scale != 1:
                other = x.clone()
                other[:, : len(prompt)] = MASK
                unconditional = model(other, attention)
                logits = unconditional + scale * (logits - unconditional)
            # ours never draws the mask
            logits[..., MASK] = -torch.inf
            best = logits.argmax(-1)
            score = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
            score[:, end:] = -torch.inf
            score[x != MASK] = -torch.inf
            chosen = score.topk(count).indices
            x[0, chosen[0]] = best[0, chosen[0]]
    return x[0]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_greedy_text_is_lladas(scale, steps):
    rule = presets.LLADA.but(guidance_scale=scale)
    for prompt in PROMPTS:
        ours = draw([prompt], rule, num_inference_steps=steps).tokens[0]
        theirs = llada(Language(), prompt, temperature=0, gen_length=16, block_length=8, steps=steps, scale=scale)
        assert torch.equal(ours, theirs)


def test_counts_are_lladas():
    # clients.md, section 5: 16 tokens in blocks of 8, 8 steps
    model = Language()
    draw([[5]], model=model)
    assert [int((tokens == MASK).sum()) for tokens in model.given] == [16, 14, 12, 10, 8, 6, 4, 2]


def test_counts_are_dreams():
    model = Language(shift=True)
    draw([[5]], presets.DREAM, model, block_length=16, num_inference_steps=8, shift_logits=True)
    assert [int((tokens == MASK).sum()) for tokens in model.given] == [16, 15, 13, 11, 9, 7, 5, 3]


@pytest.mark.parametrize("prompt", [[5, 6], []])
def test_shifted_logits_are_those_of_the_place_before(prompt):
    plain, shifted = (
        draw([prompt], model=Language(shift=shift), shift_logits=shift, num_inference_steps=8)
        for shift in (False, True)
    )
    if prompt:
        assert torch.equal(plain.text, shifted.text)
    assert (shifted.text != MASK).all()


def test_what_is_sure_takes_fewer_steps():
    class Sure(Language):
        def __call__(self, tokens, attention_mask):
            return 20 * super().__call__(tokens, attention_mask)

    output = draw(rule=presets.FAST_DLLM, model=Sure(), num_inference_steps=8)
    slow = draw(rule=presets.LLADA, model=Sure(), num_inference_steps=8)
    assert output.model_calls < 8 < slow.model_calls == 16
    assert output.sample_calls.max() <= output.model_calls


def test_no_two_blocks_have_the_same_random_order():
    seen = []
    draw([[5]], RULES["llada at random"], callback=seen.append, gen_length=32, seed=[4])
    orders = []
    for block in range(4):
        places = slice(1 + 8 * block, 9 + 8 * block)
        orders.append([(step.tokens[0, places] == MASK).tolist() for step in seen if step.block == block])
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_an_end_ends_the_text():
    class Ends(Language):
        """The second and third text end in the first block, the first in the second."""

        def __call__(self, tokens, attention_mask):
            logits = super().__call__(tokens, attention_mask)
            place = (attention_mask.cumsum(1) - 1)[:, 4:] if tokens.shape[1] > 20 else None
            start = tokens.shape[1] - 24
            ends = [start + 12, start + 3, start + 5][: len(tokens)]
            for row, end in zip(logits, ends, strict=True):
                row[:, EOS] = -20
                row[end, EOS] = 40
            assert place is None or place.shape[1] == 24
            return logits

    model = Ends()
    output = draw(model=model, gen_length=24, eos_token_id=EOS)
    assert output.lengths.tolist() == [13, 4, 6]
    for text, length in zip(output.text.tolist(), output.lengths.tolist(), strict=True):
        assert text[length - 1 :] == [EOS] * (25 - length) and EOS not in text[: length - 1]
    # the third block of none is drawn, and the second of the first text alone
    assert output.model_calls == 8 and output.sample_calls.tolist() == [8, 4, 4]
    assert model.calls == 8
    forbidden = presets.LLADA.but(draw=ScoredAt(Draw(temperature=0.0, forbidden=(EOS,))))
    assert draw(rule=forbidden, model=Ends(), gen_length=24, eos_token_id=EOS).lengths.tolist() == [24] * 3


def test_known_tokens_are_edited_until_none_changes():
    rule = presets.LLADA2.but(draw=Draw(temperature=0.0, rows="all"), select=Commit(threshold=0.3, replace_above=0.2))
    # neighbours so weak that edits come to rest
    plain, edited = (draw(rule=rule, model=Language(strength=0.4), max_edits=n) for n in (0, 16))
    assert not torch.equal(plain.text, edited.text)
    # where an edit changed nothing, the most probable token is there wherever it is probable enough
    logits = Language(strength=0.4)(edited.tokens, edited.tokens != MASK)
    logits[..., MASK] = -torch.inf
    best = logits.log_softmax(-1).max(-1)
    last_block = slice(-8, None)
    sure = best.values[:, last_block].exp() > 0.2
    assert torch.equal(best.indices[:, last_block][sure], edited.tokens[:, last_block][sure])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    assert (draw(model=Language(dtype), rule=RULES["llada at a temperature"]).text != MASK).all()


def test_tokens_are_drawn_from_the_models_distribution():
    """One token after a prompt, thousands of times: chi-square against softmax(l / t), truncated."""
    count = 4000
    rule = presets.LLADA.but(draw=Draw(temperature=1.5, top_k=6))
    output = draw([[5, 6]] * count, rule, gen_length=1, block_length=1, num_inference_steps=1)
    logits = Language()(torch.tensor([[5, 6, MASK]]), torch.ones(1, 3, dtype=torch.bool))[0, 2]
    logits[MASK] = -torch.inf
    kept = logits.topk(6)
    expected = (kept.values / 1.5).softmax(-1).double() * count
    found = output.text[:, 0].bincount(minlength=V)[kept.indices]
    assert found.sum() == count
    assert ((found - expected) ** 2 / expected).sum() < 25


@pytest.mark.parametrize(
    "options, error",
    [
        ({"gen_length": 0}, r"^gen_length: expected at least 1, got 0"),
        ({"block_length": 5}, r"^block_length: expected a divisor of gen_length 16, got 5"),
        ({"seed": [1]}, r"^seed: expected one for each of 3 prompts, got 1"),
        (
            {"model": lambda tokens, attention_mask: torch.zeros(3, 4, V)},
            r"^predict: expected logits of shape \(3, 20, V\)",
        ),
        ({"num_inference_steps": 0}, r"^num_inference_steps"),
    ],
)
def test_bad_arguments_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        draw(**options)
    with pytest.raises(TypeError, match=r"^rule: expected a Rule"):
        draw(rule="llada")
    with pytest.raises(TypeError, match=r"^prompt: expected int64"):
        draw(prompt=[["a"]])
