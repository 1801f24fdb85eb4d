"""Guidance before a linear head: the logits, the draw of rows alone, what stands for logits, and `fold_head`."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from compare import assert_no_worse_than_naive
from tiny import randn, seeded
from torch import nn

import mgt_kernels
from mgt_kernels import reference
from mgt_sampler import Differential, Int4Linear, ZSampling, folded_logits, generate, load_model, presets, samplers
from mgt_sampler.deferred import DeferredLogits, HeadLogits
from mgt_sampler.draw import Draw, ScoredAt
from mgt_sampler.head import HEADS, Head, HeadForward, find_head
from mgt_sampler.state import Logits
from mgt_sampler.step import Rule, begin, take_step

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
V, MASK, C = 50, 50, 32


def state_of(tokens, **options):
    seeds = torch.arange(len(tokens)) * 7 - 3
    return begin(tokens, seed=seeds, mask_token_id=MASK, num_inference_steps=5, **options)


def partly_known(batch_size=3, size=40, seed=1):
    tokens = torch.randint(V, (batch_size, size), generator=seeded(seed))
    return tokens.masked_fill(torch.rand(tokens.shape, generator=seeded(seed + 1)) < 0.6, MASK)


def rows_of(logits, state):
    """The same logits, of masked positions alone."""
    rows = state.masked.flatten().nonzero()[:, 0]
    return Logits(logits.flatten(0, 1)[rows], rows=rows)


def layer(kind, dtype=torch.float32, width=C, num_logits=V):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "int4":
            packed = mgt_kernels.quantize_int4(torch.randn(num_logits, width), group_size=32)
            return Int4Linear(packed, torch.randn(num_logits, dtype=dtype), dtype=dtype)
        made = (
            nn.Linear(width, num_logits) if kind == "linear" else nn.Conv2d(width, num_logits, 1, bias=kind == "conv")
        )
        return made.to(dtype)


class TestTheDrawOfRows:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 0.7, "noise_scale": 1.5},
            {"temperature": 0.0},
            {"top_k": 7, "top_p": 0.9, "min_p": 0.01, "forbidden": (3, 4)},
        ],
    )
    @pytest.mark.parametrize("first_position", [0, 1000, torch.tensor([5, 0, 2**31])])
    def test_it_is_that_of_all_positions_to_the_bit(self, dtype, options, first_position):
        state = state_of(partly_known(), first_position=first_position)
        logits = randn(3, 40, V).to(dtype)
        names = ("argmax", "max_logprob", "margin", "entropy", "logsumexp", "logit")
        for statistics in ((), names):
            expected = Draw(**options)(Logits(logits), state, statistics)
            found = Draw(**options)(rows_of(logits, state), state, statistics)
            for name, a, b in zip(expected._fields, expected, found, strict=True):
                assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype), name

    def test_the_comparison_can_fail(self):
        state, logits = state_of(partly_known()), randn(3, 40, V)
        expected, rows = Draw()(Logits(logits), state), rows_of(logits, state)
        for other in (rows._replace(rows=rows.rows - 1), rows._replace(logits=rows.logits.roll(1, 0))):
            assert not torch.equal(Draw()(other, state).token_ids, expected.token_ids)

    def test_nothing_masked(self):
        state = state_of(torch.randint(V, (2, 6), generator=seeded(0)))
        drawn = Draw()(rows_of(randn(2, 6, V), state), state, ("entropy",))
        assert torch.equal(drawn.token_ids, state.tokens) and (drawn.logprob == torch.inf).all()

    def test_an_error_names_sample_and_position(self):
        state, logits = state_of(partly_known()), randn(3, 40, V)
        state.tokens[2, 7] = MASK
        logits[2, 7, 4] = torch.nan
        with pytest.raises(ValueError, match=r"sample 2, position 7"):
            Draw()(rows_of(logits, state), state)

    @pytest.mark.parametrize(
        "draw",
        [
            ScoredAt(Draw(temperature=0.5, top_k=9), 1.3),
            Draw(differential=Differential()),
            Draw(momentum=0.4),
            samplers.moment().draw,
            presets.TruncatedNoise(),
        ],
    )
    def test_what_else_draws_draws_the_same(self, draw):
        rule = Rule(draw)
        full, folded = state_of(partly_known()), state_of(partly_known())
        for k in range(5):
            logits = randn(3, 40, V, seed=k)
            expected, _ = take_step(rule, Logits(logits), full)
            found, _ = take_step(rule, rows_of(logits, folded), folded)
            assert torch.equal(found.tokens, expected.tokens)
            full, folded = expected.but(step=k + 1), found.but(step=k + 1)
        assert (full.tokens != MASK).all()

    def test_momentum_leaves_what_it_has_not_seen(self):
        rule, tokens = Rule(Draw(momentum=0.9, temperature=0.0)), partly_known()
        state = state_of(tokens)
        state, _ = take_step(rule, rows_of(randn(3, 40, V), state), state)
        # all masked again: those that were known have logits in this call alone
        again, logits = state.but(tokens=torch.full_like(tokens, MASK), step=4), randn(3, 40, V, seed=1)
        after, _ = take_step(rule, rows_of(logits, again), again)
        assert torch.equal(after.tokens[tokens != MASK], logits.argmax(-1)[tokens != MASK])
        assert not torch.equal(after.tokens, logits.argmax(-1))

    def test_a_draw_of_known_positions_is_refused(self):
        state = state_of(partly_known())
        with pytest.raises(ValueError, match=r"^logits: expected those of all positions for a draw with rows 'all'"):
            Draw(rows="all")(rows_of(randn(3, 40, V), state), state)

    def test_a_draw_of_ones_own_is_told_of_all_positions(self):
        seen, state = [], state_of(partly_known())

        def draw(logits, state, statistics):
            seen.append(logits)
            return Draw()(logits, state, statistics)

        take_step(Rule(draw), rows_of(randn(3, 40, V), state), state)
        assert seen[0].rows is None and seen[0].logits.shape == (3, 40, V)
        assert seen[0].logits.isnan().any(-1).equal(~state.masked)


def case(kind, dtype):
    """A head, two halves of hidden states in its layout, tokens, and the layer's weights in float64."""
    head, tokens = layer(kind, dtype), partly_known(3, 48)
    shape = (3, 48, C) if kind in ("linear", "int4") else (3, C, 6, 8)
    hidden = [randn(*shape, seed=seed).to(dtype) for seed in (0, 1)]
    return head, hidden, tokens if kind in ("linear", "int4") else tokens.view(3, 6, 8)


class TestFoldedLogits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["linear", "conv", "conv without bias", "int4"])
    @pytest.mark.parametrize("scale", [1.5, 3.0, 9.0])
    @torch.no_grad()
    def test_they_are_as_exact_as_two_products(self, kind, dtype, scale):
        head, hidden, tokens = case(kind, dtype)
        masked = tokens == MASK
        found = folded_logits(head, hidden[0], masked, uncond_hidden=hidden[1], guidance_scale=scale)
        axis = 1 if kind.startswith("conv") else -1
        c, u = (head(half).movedim(axis, -1)[masked] for half in hidden)
        weight = head.weight.double().flatten(1) if kind != "int4" else head.weight.dequantize().double()
        bias = 0 if head.bias is None else head.bias.double()
        c64, u64 = (half.movedim(axis, -1)[masked].double() @ weight.mT + bias for half in hidden)
        assert found.logits.dtype == dtype and found.uncond_logits is None
        assert torch.equal(found.rows, masked.flatten().nonzero()[:, 0])
        truth = u64 + scale * (c64 - u64)
        if kind == "int4":
            # whose kernel rounds the hidden states to bfloat16 in every dtype: once here, and twice in what is usual
            h = hidden[1].double() + scale * (hidden[0].double() - hidden[1].double())
            rounding = torch.finfo(torch.bfloat16).eps * (h[masked].abs() @ weight.abs().mT + truth.abs())
            assert ((found.logits.double() - truth).abs() <= rounding).all()
        else:
            assert_no_worse_than_naive(found.logits, truth, u + scale * (c - u))

    @torch.no_grad()
    def test_the_comparison_can_fail(self):
        head, hidden, tokens = case("linear", torch.float32)
        masked = tokens == MASK
        truth = [half[masked].double() @ head.weight.double().mT + head.bias.double() for half in hidden]
        naive = [head(half[masked]) for half in hidden]
        check = partial(
            assert_no_worse_than_naive,
            truth=truth[1] + 3 * (truth[0] - truth[1]),
            naive=naive[1] + 3 * (naive[0] - naive[1]),
        )
        fold = partial(folded_logits, head, uncond_hidden=hidden[1])
        check(fold(hidden[0], masked, guidance_scale=3.0).logits)
        with pytest.raises(AssertionError):
            check(fold(hidden[0], masked, guidance_scale=3.0001).logits)
        with pytest.raises(AssertionError):
            check(fold(hidden[0].roll(1, 1), masked, guidance_scale=3.0).logits)

    @torch.no_grad()
    def test_the_tokens_are_those_of_two_products_but_for_near_ties(self):
        rows, num_logits = 20480, 128
        head = layer("linear", width=64, num_logits=num_logits)
        hidden = [randn(rows // 64, 64, 64, seed=seed) for seed in (0, 1)]
        masks = torch.full((rows // 64, 64), num_logits)
        options = dict(mask_token_id=num_logits, seed=torch.arange(rows // 64), step=3)
        c, u = (head(half) for half in hidden)
        expected = mgt_kernels.sample_tokens(c, masks, uncond_logits=u, guidance_scale=3.0, **options).token_ids
        c64, u64 = (half.double() @ head.weight.double().mT + head.bias.double() for half in hidden)
        truth = u64 + 3 * (c64 - u64)
        _, scores = reference.perturbed_logits(truth, **options)

        def check(guidance_scale=3.0, shift=0):
            halves = [half.roll(shift, 1) for half in hidden]
            found = folded_logits(
                head, halves[0], masks == num_logits, uncond_hidden=halves[1], guidance_scale=guidance_scale
            )
            drawn = mgt_kernels.sample_tokens(found.logits.view_as(truth), masks, **options).token_ids
            other = drawn != expected
            assert other.float().mean() <= 1e-4
            # an id is drawn in place of a better one where both logits are off by what they are, and where the sum with
            # the noise, some units in the last place wrong itself, is rounded
            off = (found.logits.view_as(truth) - truth).abs().amax(-1) + (u + 3 * (c - u) - truth).abs().amax(-1)
            bound = 2 * off + 16 * torch.finfo(torch.float32).eps * scores.abs().amax(-1)
            gap = (scores.gather(-1, drawn[..., None]) - scores.gather(-1, expected[..., None]))[..., 0].abs()
            assert (gap <= bound).all()
            return int(other.sum())

        # the bound itself is small
        assert check() <= 3
        for broken in ({"guidance_scale": 3.01}, {"shift": 1}):
            with pytest.raises(AssertionError):
                check(**broken)

    @torch.no_grad()
    def test_a_scale_for_each_sample(self):
        head, hidden, tokens = case("linear", torch.float32)
        scales = torch.tensor([1.5, 3.0, -2.0])
        found = folded_logits(head, hidden[0], tokens == MASK, uncond_hidden=hidden[1], guidance_scale=scales)
        alone = [
            folded_logits(head, hidden[0][i], tokens[i] == MASK, uncond_hidden=hidden[1][i], guidance_scale=float(s))
            for i, s in zip(([0], [1], [2]), scales, strict=True)
        ]
        torch.testing.assert_close(found.logits, torch.cat([each.logits for each in alone]))

    @torch.no_grad()
    def test_the_loop_of_the_docstring(self):
        body, out, rule = nn.Embedding(V + 1, C), layer("linear"), Rule()
        state, whole = state_of(partly_known()), state_of(partly_known())
        for k in range(5):
            hidden, uncond_hidden = body(state.tokens), body(state.tokens).roll(1, -1)
            logits = folded_logits(out, hidden, state.masked, uncond_hidden=uncond_hidden, guidance_scale=3.0)
            state = take_step(rule, logits, state)[0].but(step=k + 1)
            both = Logits(out(body(whole.tokens)), out(body(whole.tokens).roll(1, -1)), 3.0)
            whole = take_step(rule, both, whole)[0].but(step=k + 1)
        assert state.is_done() and torch.equal(state.tokens, whole.tokens)

    def test_what_does_not_fit(self):
        head, (hidden, uncond), tokens = case("linear", torch.float32)
        masked = tokens == MASK
        with pytest.raises(ValueError, match=r"^head: expected hidden states of width 32, got \(3, 48, 31\)"):
            folded_logits(head, hidden[..., 1:], masked)
        with pytest.raises(TypeError, match=r"^masked: expected a bool tensor, got Tensor of torch.int64"):
            folded_logits(head, hidden, tokens)
        with pytest.raises(ValueError, match=r"^masked: expected shape \(3, 48\).*got \(3, 47\)"):
            folded_logits(head, hidden, masked[:, 1:])
        with pytest.raises(ValueError, match=r"^uncond_hidden: expected"):
            folded_logits(head, hidden, masked, uncond_hidden=uncond[:2])


def hooked(name):
    made = layer("linear")
    getattr(made, name)(lambda *args: None)
    return made


def with_forward():
    made = layer("linear")
    made.forward = made.forward
    return made


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.LayerNorm(3), TypeError, "expected a torch.nn.Linear.*, got LayerNorm"),
        (lambda: "head", TypeError, "got str"),
        (lambda: _Doubled(3, 4), TypeError, "got _Doubled, which has a forward of its own"),
        (lambda: nn.Conv2d(3, 4, 3), ValueError, "expected a convolution of one pixel"),
        (lambda: nn.Conv2d(3, 4, 1, stride=2), ValueError, "expected a convolution of one pixel"),
        (lambda: nn.Conv2d(4, 4, 1, groups=2), ValueError, "expected a convolution of one pixel"),
        (lambda: hooked("register_forward_hook"), ValueError, "without hooks, got forward hooks"),
        (lambda: hooked("register_forward_pre_hook"), ValueError, "without hooks, got forward pre hooks"),
        (with_forward, ValueError, "forward of its class, got one that was set on it"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), ValueError, "without parametrizations"),
    ],
)
def test_heads_that_are_refused(make, error, message):
    with pytest.raises(error, match=f"^mine: .*{message}"):
        Head(make(), "mine")


def test_a_head_with_scales_for_each_half_is_refused():
    packed = mgt_kernels.quantize_int4(torch.randn(6, 32), group_size=32)
    with pytest.raises(ValueError, match=r"^head: expected one activation scale, got 2"):
        Head(Int4Linear(packed, None, torch.ones(1, 2)))


def test_a_head_that_is_not_known():
    with pytest.raises(TypeError, match=r"^transformer: expected one of Transformer, .*, got Sequential; .*HEADS"):
        find_head(nn.Sequential(nn.Linear(2, 3)))
    mine = type("Mine", (nn.Module,), {})()
    mine.out = nn.Linear(2, 3)
    HEADS["Mine"] = "out"
    try:
        assert find_head(mine) is mine.out
        del mine.out
        with pytest.raises(TypeError, match=r"expected a Mine with out, got one without"):
            find_head(mine)
    finally:
        del HEADS["Mine"]
    model = load_model()
    assert find_head(model.transformer) is model.head


class TestWhatStandsForLogits:
    """It is the tensor in everything but the pipeline's guidance."""

    @staticmethod
    @torch.no_grad()
    def made():
        head = layer("linear")
        hidden = randn(4, 6, C)
        stands = HeadForward(Head(head))(hidden)
        assert isinstance(stands, HeadLogits) and not isinstance(stands, torch.Tensor)
        return stands, head(hidden)

    @pytest.mark.parametrize(
        "use",
        [
            lambda x: x.shape,
            lambda x: x.float().argmax(-1),
            lambda x: torch.softmax(x, -1),
            lambda x: torch.cat([x, x], dim=0),
            lambda x: torch.stack(tensors=[x]),
            lambda x: torch.where(x > 0, x, 0.0),
            lambda x: x[1:, ..., 2],
            lambda x: -x + 2 - x / 3 + (1 - x) * x**2,
            lambda x: x.chunk(2)[1] * 2,
            lambda x: x.chunk(2)[0] + x.chunk(2)[1],
            lambda x: x.chunk(4)[3],
            lambda x: x.chunk(2, -1)[1],
            lambda x: torch.chunk(x, 2)[0],
            lambda x: torch.zeros(4, 6, V).copy_(x),
            lambda x: torch.ones(4, 6, V) * x,
            lambda x: x @ torch.ones(V, 2),
            lambda x: np.asarray(x),
            lambda x: len(x),
            lambda x: list(x)[2],
            lambda x: repr(x),
            lambda x: copy.deepcopy(x),
            lambda x: pickle.loads(pickle.dumps(x)),
            lambda x: 2 * (3 * (x.chunk(2)[1] - x.chunk(2)[0])),
            lambda x: (x.chunk(2)[1] - x.chunk(2)[0]).abs(),
            lambda x: x.chunk(2)[0] + 3.0 * (x.chunk(2)[1] - x.chunk(2)[0]),
        ],
    )
    def test_everything_else_is_done_with_the_tensor(self, use):
        stands, tensor = self.made()
        expected, found = use(tensor), use(stands)
        found = found.tensor() if isinstance(found, DeferredLogits) else found
        if isinstance(expected, torch.Tensor):
            assert type(found) is torch.Tensor and torch.equal(found, expected)
        else:
            assert type(found) is type(expected) and np.array_equal(found, expected)

    @pytest.mark.parametrize("scale", [3, 3.0, np.float32(3), np.float64(3)])
    @pytest.mark.parametrize(
        "guide", [lambda u, c, s: u + s * (c - u), lambda u, c, s: (c - u) * s + u], ids=["left", "right"]
    )
    def test_guidance_is_remembered(self, scale, guide):
        stands, tensor = self.made()
        guided = guide(*stands.chunk(2), scale)
        tokens = torch.full((2, 6), MASK)
        tokens[:, :2] = 3
        folded = guided.fold(tokens, MASK)
        assert folded.logits.shape == (8, V) and not stands.was_read and not guided.was_read
        u, c = tensor.chunk(2)
        torch.testing.assert_close(folded.logits, (u + 3.0 * (c - u))[:, 2:].flatten(0, 1), atol=1e-4, rtol=1e-4)
        assert torch.equal(guided.tensor(), u + 3.0 * (c - u))
        # who has the tensor may have written to it
        assert guided.fold(tokens, MASK) is None
        with pytest.raises(ValueError, match=r"^sample: expected shape \(4, 6\) as of the logits, got \(2, 6\)"):
            self.made()[0].fold(tokens, MASK)

    def test_what_was_written_to_counts(self):
        stands, _ = self.made()
        stands[..., 5] = -torch.inf
        u, c = stands.chunk(2)
        assert (u[..., 5] == -torch.inf).all() and type(u) is torch.Tensor
        stands, _ = self.made()
        u, c = stands.chunk(2)
        c[..., 5] = -torch.inf
        assert (stands[2:, ..., 5] == -torch.inf).all()
        assert (u + 3 * (c - u)).fold(torch.full((2, 6), MASK), MASK) is None

    def test_gradients_get_the_tensor(self):
        head, hidden = layer("linear"), randn(1, 6, C)
        found = HeadForward(Head(head))(hidden)
        assert type(found) is torch.Tensor and found.requires_grad


@pytest.fixture(scope="module")
def model():
    return load_model()


def sample(model, rule=None, **options):
    settings = {"labels": [3, 8], "num_inference_steps": 6, "seed": 5, "progress": False, **options}
    return generate(model, rule, **settings)


class TestGenerate:
    def test_the_models_logits_are_its_heads(self, model):
        tokens = torch.randint(128, (2, 196), generator=seeded(0)).masked_fill(torch.arange(196) % 3 > 0, 128)
        hidden = model.predict_hidden(tokens, torch.tensor([1, 2]))
        assert hidden.shape == (2, 196, 192)
        assert torch.equal(model.head(hidden), model.predict_logits(tokens, torch.tensor([1, 2])))
        with pytest.raises(ValueError, match=r"^condition"):
            model.predict_hidden(tokens, torch.tensor([1, 20]))

    @pytest.mark.parametrize(
        "options",
        [
            {"guidance_scale": 3.0},
            {"guidance_scale": 1.0},
            {"guidance_scale": 0.0},
            {"guidance_scale": (1.0, 4.0), "noise_scale": 1.0, "differential": Differential()},
            {"guidance_scale": 2.0, "momentum": 0.3, "skip": [2]},
            {"guidance_scale": 2.0, "z_sampling": ZSampling(0.5)},
            {"labels": None, "num_samples": 2},
            {"rule": samplers.halton(guidance_scale=2.0)},
            {"rule": samplers.entropy_bound(5.0, guidance_scale=2.0)},
        ],
    )
    def test_the_images_are_the_same(self, model, options):
        expected, found = sample(model, **options), sample(model, fold_head=True, **options)
        # rounding ties apart, of which these seeds have none
        assert torch.equal(found.tokens, expected.tokens) and found.model_calls == expected.model_calls

    def test_the_other_half_is_called_within_the_interval_alone(self, model):
        for fold_head in (False, True):
            output = sample(model, guidance_scale="interval:3:0.4:0.8", num_inference_steps=10, fold_head=fold_head)
            assert output.model_calls == 10 + 4
            calls, name = [], "predict_hidden" if fold_head else "predict_logits"

            original = getattr(model, name)

            def ask(tokens, condition, calls=calls, original=original):
                calls.append(condition is not None)
                return original(tokens, condition)

            setattr(model, name, ask)
            try:
                sample(model, guidance_scale="interval:3:0.4:0.8", num_inference_steps=10, fold_head=fold_head)
            finally:
                delattr(model, name)
            assert calls == [True] * 4 + [True, False] * 4 + [True] * 2

    def test_known_tokens_and_a_sample_alone(self, model):
        tokens = sample(model).tokens
        tokens[:, 50:] = 128
        both = sample(model, tokens=tokens, guidance_scale=3.0, fold_head=True)
        assert torch.equal(both.tokens[:, :50], tokens[:, :50])
        alone = sample(model, labels=[8], tokens=tokens[1:], seed=both.seed[1:], guidance_scale=3.0, fold_head=True)
        assert torch.equal(alone.tokens, both.tokens[1:])

    def test_what_is_refused(self, model):
        with pytest.raises(TypeError, match=r"^fold_head: expected a bool, got str"):
            sample(model, fold_head="yes")
        with pytest.raises(ValueError, match=r"^fold_head: expected False with a draw of rows 'all'"):
            sample(model, samplers.path_planning(), fold_head=True)

        class Plain:
            num_tokens, codebook_size, mask_token_id = 196, 128, 128
            predict_logits, decode = model.predict_logits, model.decode

        with pytest.raises(TypeError, match=r"^fold_head: expected a model with predict_hidden and head, got Plain"):
            sample(Plain(), fold_head=True)
        Plain.predict_hidden, Plain.head = model.predict_hidden, nn.LayerNorm(3)
        with pytest.raises(TypeError, match=r"^model.head: expected a torch.nn.Linear"):
            sample(Plain(), fold_head=True)
        Plain.head = nn.Linear(192, 127)
        with pytest.raises(ValueError, match=r"^model.head: expected 128 logits, one a code, got 127"):
            sample(Plain(), fold_head=True)
        Plain.head = nn.Linear(191, 128)
        with pytest.raises(ValueError, match=r"^model.predict_hidden: expected shape \(2, 196, 191\)"):
            sample(Plain(), fold_head=True)
