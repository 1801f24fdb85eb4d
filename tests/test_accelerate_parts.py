"""`accelerate(pipe, head=, guidance_interval=)`: aMUSEd's pipelines, and Meissonic's by a stand-in."""

import copy
import functools
import inspect
import pickle
import re
import threading
import time
from pathlib import Path

import pytest
import tiny
import tiny_meissonic
import torch
from tiny import randn, seeded

from mgt_sampler import MGTScheduler, ZSampling, accelerate, restore, z_sample
from mgt_sampler.deferred import DeferredLogits
from mgt_sampler.halves import conditional_half
from mgt_sampler.interval import NextStep, Step, check_interval

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.rand(2, 3, 16, 16, generator=seeded(3))
AMUSED = {
    "AmusedPipeline": {"height": 16, "width": 16},
    "AmusedImg2ImgPipeline": {"image": IMAGES, "strength": 0.5},
    "AmusedInpaintPipeline": {
        "image": IMAGES,
        "mask_image": (torch.rand(1, 1, 16, 16, generator=seeded(4)) < 0.4).float().expand(2, -1, -1, -1),
        "strength": 0.8,
    },
}
MEISSONIC = {"Pipeline": 0, "Img2ImgPipeline": 5, "InpaintPipeline": 2}
KINDS = [*AMUSED, *MEISSONIC]
START = {"AmusedPipeline": 0, "AmusedImg2ImgPipeline": 5, "AmusedInpaintPipeline": 2, **MEISSONIC}


class Case:
    """A pipeline, its calls, and the batch sizes that its transformer's embedding saw."""

    def __init__(self, kind):
        self.kind = kind
        if kind in AMUSED:
            scheduler = diffusers.AmusedScheduler(mask_token_id=31)
            self.pipe = getattr(diffusers, kind)(scheduler=scheduler, **tiny.amused_parts())
            self.pipe.set_progress_bar_config(disable=True)
        else:
            scheduler = type("Scheduler", (diffusers.AmusedScheduler,), {})(mask_token_id=tiny_meissonic.MASK)
            self.pipe = getattr(tiny_meissonic, kind)(scheduler)

    def __call__(self, generator=None, *, pipe=None, run=None, rows=slice(None), batch_size=2, **options):
        pipe = pipe or self.pipe
        settings = {"num_inference_steps": 10, "guidance_scale": 3.0, **options}
        generator = seeded(0) if generator is None else generator
        if self.kind in MEISSONIC:
            return (run or pipe)(4 * randn(batch_size, 7, 6)[rows], generator=generator, **settings)
        embeddings = {
            "prompt_embeds": 4 * randn(batch_size, 8)[rows],
            "encoder_hidden_states": 4 * randn(batch_size, 5, 8)[rows],
            "negative_prompt_embeds": torch.zeros(batch_size, 8)[rows],
            "negative_encoder_hidden_states": torch.zeros(batch_size, 5, 8)[rows],
        }
        kind = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in AMUSED[self.kind].items()}
        settings = {"output_type": "latent", **kind, **settings}
        return (run or pipe)(**embeddings, generator=generator, **settings).images

    def sizes(self, *args, **options):
        """The batch sizes of the transformer's calls."""
        sizes, transformer = [], self.pipe.transformer
        embed = transformer.embed if self.kind in AMUSED else transformer.tokens
        handle = embed.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        try:
            self(*args, **options)
        finally:
            handle.remove()
        return sizes


@pytest.fixture(params=KINDS)
def case(request):
    return Case(request.param)


def attributes(pipe):
    """All that may be set on a pipeline and its transformer, by name."""
    modules = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    hooks = {name: [list(v) for k, v in attrs.items() if "hooks" in k] for name, attrs in modules.items()}
    names = {name: set(attrs) for name, attrs in modules.items()}
    return set(vars(pipe)), pipe.scheduler, names, hooks


class Halved:
    """A forward that gives the conditional half twice at steps outside an interval, all of it computed."""

    def __init__(self, forward, interval, first):
        self.forward, self.interval, self.step = forward, interval, first

    def __call__(self, *args, **kwargs):
        output = self.forward(*args, **kwargs)
        share, self.step = self.step / 10, self.step + 1
        return output if self.interval[0] <= share < self.interval[1] else torch.cat([output.chunk(2)[1]] * 2)


class TestHead:
    @pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
    def test_the_tokens_are_the_same(self, case, guidance_scale):
        accelerate(case.pipe)
        expected = case(guidance_scale=guidance_scale)
        restore(case.pipe)
        done = accelerate(case.pipe, head=True)
        assert done.replaced == ("scheduler",) and len(done.parts) == 1
        assert "Conv2d" in done.parts[0] and done.parts[0] in str(done) and done.options == {"head": True}
        # of rounding ties these seeds have none
        assert torch.equal(case(guidance_scale=guidance_scale), expected)

    def test_the_head_is_given_masked_rows_alone(self, case, monkeypatch):
        accelerate(case.pipe, head=True)
        from mgt_sampler.head import Head

        rows, counts = [], []
        logits = Head.logits
        monkeypatch.setattr(Head, "logits", lambda self, h, *args: rows.append(len(h)) or logits(self, h, *args))
        monkeypatch.setattr(Head, "forward", lambda *args: pytest.fail("all logits were computed"))
        mask = case.pipe.scheduler.config.mask_token_id
        case(callback=lambda i, t, tokens: counts.append(int((tokens == mask).sum())))
        assert len(rows) == 10 - START[case.kind] and rows[1:] == counts[:-1] and counts[-1] == 0

    def test_a_batch_is_its_samples(self, case):
        accelerate(case.pipe, head=True, guidance_interval=(0.3, 0.8))
        both = case([seeded(7), seeded(8)])
        alone = case([seeded(8)], rows=slice(1, 2)) if case.kind != "Img2ImgPipeline" else both[1:]
        assert torch.equal(both[1:], alone) and not torch.equal(both[0], both[1])

    def test_pytorchs_own_draws_are_of_all_logits(self, case):
        mask = case.pipe.scheduler.config.mask_token_id
        case.pipe.scheduler = MGTScheduler(mask_token_id=mask, rng="torch")
        expected = case()
        accelerate(case.pipe, head=True)
        assert torch.equal(case(), expected)

    @pytest.mark.parametrize("scheduler", [{"momentum": 0.3}, {"differential": {"share": 0.75}}, {"noise_scale": 1.0}])
    def test_techniques(self, scheduler):
        case = Case("AmusedPipeline")
        case.pipe.scheduler = MGTScheduler(mask_token_id=31, **scheduler)
        expected = case()
        done = accelerate(case.pipe, head=True)
        assert done.replaced == () and torch.equal(case(), expected)

    def test_the_transformer_is_called_by_others(self, case):
        accelerate(case.pipe, head=True, guidance_interval=(0.5, 0.5))
        given = []
        handle = case.pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        case()
        handle.remove()
        args, kwargs = given[0]
        with torch.no_grad():
            stands = case.pipe.transformer(*args, **kwargs)
            expected = restore(case.pipe).transformer(*args, **kwargs)
        assert isinstance(stands, DeferredLogits) and torch.equal(torch.relu(stands), expected.relu())
        accelerate(case.pipe, head=True)
        assert type(case.pipe.transformer(*args, **kwargs)) is torch.Tensor

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda t: setattr(t.mlm_layer, "conv2", torch.nn.Tanh()), TypeError, "^head: expected a torch.nn.Linear"),
            (lambda t: t.mlm_layer.conv2.register_forward_hook(print), ValueError, "^head: expected a layer without"),
            (lambda t: setattr(t.mlm_layer.conv2, "forward", print), ValueError, "^head: expected a layer with the"),
            (lambda t: delattr(t, "mlm_layer"), TypeError, "^obj.transformer: expected a .* with mlm_layer.conv2"),
            (lambda t: setattr(t, "__class__", torch.nn.Identity), TypeError, "^obj.transformer: expected one of"),
        ],
    )
    def test_a_failure_leaves_all_as_it_was(self, case, spoil, error, message):
        spoil(case.pipe.transformer)
        before = attributes(case.pipe)
        with pytest.raises(error, match=message):
            accelerate(case.pipe, head=True, guidance_interval=(0.1, 0.8))
        assert attributes(case.pipe) == before

    def test_hidden_states_of_another_width(self):
        case = Case("AmusedPipeline")
        accelerate(case.pipe, head=True)
        case.pipe.transformer.mlm_layer.conv1 = torch.nn.Conv2d(8, 9, 1)
        case.pipe.transformer.mlm_layer.layer_norm = torch.nn.Identity()
        with pytest.raises(ValueError, match=r"^head: expected hidden states of width 8, got \(4, 9, 16, 16\)"):
            case()


class TestInterval:
    @pytest.mark.parametrize("head", [False, True])
    def test_the_other_half_is_left_out(self, case, head):
        interval, first = (0.3, 0.8), START[case.kind]
        accelerate(case.pipe)
        case.pipe.transformer.forward = Halved(case.pipe.transformer.forward, interval, first)
        expected = case()
        del case.pipe.transformer.forward
        unguided = case()
        restore(case.pipe)
        done = accelerate(case.pipe, guidance_interval=interval, head=head)
        assert "[0.3, 0.8)" in str(done) and len(done.parts) == 1 + head
        assert torch.equal(case(), expected) and not torch.equal(expected, unguided)
        assert case.sizes() == [4 if 0.3 <= k / 10 < 0.8 else 2 for k in range(first, 10)]

    def test_without_guidance_nothing_changes(self, case):
        accelerate(case.pipe)
        expected = case(guidance_scale=1.0)
        restore(case.pipe)
        accelerate(case.pipe, guidance_interval=(0.3, 0.8))
        assert torch.equal(case(guidance_scale=1.0), expected)
        assert case.sizes(guidance_scale=1.0) == [2] * (10 - START[case.kind])

    @pytest.mark.parametrize("interval", [(0, 1), [0.0, 1.0], torch.tensor([0.0, 1.0])])
    def test_all_steps(self, case, interval):
        accelerate(case.pipe)
        expected = case()
        restore(case.pipe)
        accelerate(case.pipe, guidance_interval=interval)
        assert torch.equal(case(), expected) and set(case.sizes()) == {4}

    def test_a_run_that_was_interrupted(self, case):
        accelerate(case.pipe, guidance_interval=(0.3, 0.8))
        expected = case()

        def stop(i, t, tokens):
            if i >= START[case.kind] + 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            case(callback=stop)
        assert torch.equal(case(), expected)
        # nobody goes on with that run
        with pytest.raises(KeyboardInterrupt):
            case(callback=stop)
        assert case.pipe.scheduler.next_step.get() is None

    def test_threads(self, case):
        accelerate(case.pipe, guidance_interval=(0.3, 0.8), head=True)
        expected, found, barrier = [case(seeded(i)) for i in range(3)], {}, threading.Barrier(3)

        def work(i):
            barrier.wait()
            # each is at another step than the others
            found[i] = case(seeded(i), callback=lambda *args: time.sleep(0.002 * i))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[i], expected[i]) for i in range(3))

    def test_image_to_image_at_strength_1_begins_at_the_first_step(self):
        case = Case("AmusedImg2ImgPipeline")
        accelerate(case.pipe, guidance_interval=(0.0, 0.2))
        assert case.sizes(strength=1.0) == [4, 4] + [2] * 8

    def test_a_hook_that_reads_the_output(self, case):
        accelerate(case.pipe, guidance_interval=(0.3, 0.8))
        expected = case()
        handle = case.pipe.transformer.register_forward_hook(lambda module, args, output: output.shape and None)
        # it costs the other half, and changes nothing
        assert torch.equal(case(), expected) and set(case.sizes()) == {4}
        handle.remove()

    def test_z_sampling(self):
        case = Case("AmusedPipeline")
        accelerate(case.pipe)
        run = functools.partial(z_sample, case.pipe, z_sampling=ZSampling(0.0, steps=[1, 4]))
        whole = case(run=run)
        restore(case.pipe)
        accelerate(case.pipe, head=True)
        assert torch.equal(case(run=functools.partial(run.func, case.pipe, **run.keywords)), whole)
        restore(case.pipe)
        accelerate(case.pipe, guidance_interval=(0.3, 0.8), head=True)
        # the inverse pass needs both halves at any step: its guidance is its own
        assert case.sizes(run=run) == [2, 2, 4, 2, 2, 4, 4, 4, 4, 4, 4, 4, 2, 2]
        assert case.pipe.scheduler.next_step.get() is None

    @pytest.mark.parametrize(
        ("interval", "error"),
        [((0.1,), TypeError), (0.5, TypeError), ("01", TypeError), ((0.1, "a"), TypeError), ((True, 1), TypeError),
         ((0.8, 0.1), ValueError), ((-0.1, 0.5), ValueError), ((0, 1.1), ValueError), ((0, float("nan")), ValueError)],
    )  # fmt: skip
    def test_what_is_no_interval(self, interval, error):
        case = Case("Pipeline")
        before = attributes(case.pipe)
        with pytest.raises(error, match=r"^guidance_interval: expected"):
            accelerate(case.pipe, guidance_interval=interval)
        assert attributes(case.pipe) == before
        assert check_interval((0.5, 0.5)) == (0.5, 0.5)


class TestConditionalHalf:
    @staticmethod
    def forward(tokens, text, *more, img_ids=None, timestep=None, **others):
        return None

    def test_what_has_both_halves_is_cut(self):
        tokens, text = torch.arange(32).view(4, 8), torch.randn(4, 3)
        ids = torch.zeros(4, 3)
        nested = {"a": [text, (text, 7)], "b": torch.tensor(3.0), "c": torch.zeros(5, 4)}
        args, kwargs = conditional_half(
            self.forward,
            (tokens, text, text),
            {"img_ids": ids, "timestep": torch.zeros(1), "kw": nested, "txt_ids": ids},
        )
        assert torch.equal(args[0], tokens[2:]) and torch.equal(args[1], text[2:]) and torch.equal(args[2], text[2:])
        assert kwargs["img_ids"] is ids and kwargs["txt_ids"] is ids and kwargs["timestep"].shape == (1,)
        found = kwargs["kw"]
        assert (
            torch.equal(found["a"][0], text[2:]) and torch.equal(found["a"][1][0], text[2:]) and found["a"][1][1] == 7
        )
        assert found["b"] is nested["b"] and found["c"] is nested["c"] and nested["a"][0] is text

    def test_what_has_no_halves(self):
        with pytest.raises(ValueError, match=r"^transformer: expected tokens of both guidance halves"):
            conditional_half(self.forward, (torch.zeros(3, 8, dtype=torch.int64), None), {})
        with pytest.raises(TypeError, match=r"^transformer: expected one that is called with token ids"):
            conditional_half(self.forward, (torch.zeros(4, 8), torch.zeros(4)), {})

    def test_as_many_positions_as_samples(self):
        case = Case("Pipeline")
        accelerate(case.pipe, guidance_interval=(0.3, 0.8))
        # img_ids has 16 rows, as both halves have
        ip = randn(8, 3, 16)
        assert case.sizes(batch_size=8, ip=ip) == [8] * 3 + [16] * 5 + [8] * 2


class TestRestore:
    OPTIONS = ({"head": True}, {"guidance_interval": (0.3, 0.8)}, {"head": True, "guidance_interval": (0.3, 0.8)})

    @pytest.mark.parametrize("options", OPTIONS)
    def test_all_comes_back_in_copies_too(self, case, options):
        before, original = attributes(case.pipe), case()
        done = accelerate(case.pipe, **options)
        assert accelerate(case.pipe) is done and accelerate(case.pipe, **options) is done
        expected = case()
        copies = [copy.deepcopy(case.pipe)]
        if case.kind in AMUSED:
            copies.append(pickle.loads(pickle.dumps(case.pipe)))
        for other in copies:
            assert torch.equal(case(pipe=other), expected)
            assert torch.equal(case(pipe=restore(other)), original)
            names, _, of_modules, hooks = attributes(other)
            assert (names, of_modules, hooks) == (before[0], before[2], before[3])
        assert torch.equal(case(), expected)
        assert attributes(restore(case.pipe)) == before and torch.equal(case(), original)

    def test_other_keywords_are_refused(self, case):
        accelerate(case.pipe, head=True)
        with pytest.raises(ValueError, match=r"^guidance_interval: expected head=True, as it .* restore\(obj\) first"):
            accelerate(case.pipe, guidance_interval=(0.1, 0.8))
        accelerate(restore(case.pipe))
        with pytest.raises(ValueError, match=r"^head: expected no keywords, as it .* restore\(obj\) first"):
            accelerate(case.pipe, head=True)
        with pytest.raises(TypeError, match=r"^head: expected a bool, got int"):
            accelerate(restore(case.pipe), head=1)

    def test_other_clients_take_none(self):
        pipe = tiny.llada2_pipeline()
        for options in ({"head": True}, {"guidance_interval": (0.1, 0.8)}):
            name = next(iter(options))
            with pytest.raises(TypeError, match=f"^{name}: expected none with LLaDA2; aMUSEd and Meissonic take it"):
                accelerate(pipe, **options)
            assert not isinstance(pipe.scheduler, MGTScheduler)

    def test_a_quantized_transformer_with_several_scales_is_refused(self):
        from mgt_kernels import quantize_int4
        from mgt_sampler import Int4Linear

        case = Case("Pipeline")
        packed = quantize_int4(torch.randn(16, 32), group_size=32)
        case.pipe.transformer.more = Int4Linear(packed, None, torch.ones(1, 2))
        with pytest.raises(
            ValueError, match=r"^guidance_interval: expected a transformer whose quantized layers have one"
        ):
            accelerate(case.pipe, guidance_interval=(0.1, 0.8))
        assert not isinstance(case.pipe.scheduler, MGTScheduler)

    def test_the_forward_that_was_there_is_called(self, case):
        transformer, calls = case.pipe.transformer, []
        original = transformer.forward

        def wrapped(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

        transformer.forward = functools.wraps(original)(wrapped)
        accelerate(case.pipe, guidance_interval=(0.3, 0.8))
        assert inspect.signature(transformer.forward) == inspect.signature(original)
        case()
        assert len(calls) == 10 - START[case.kind] and restore(case.pipe).transformer.forward.__wrapped__ == original


@pytest.mark.parametrize("options", TestRestore.OPTIONS)
def test_a_transformer_that_is_compiled(options):
    case = Case("Pipeline")
    accelerate(case.pipe, **options)
    expected = case()
    case.pipe.transformer.compile(backend="eager")
    assert torch.equal(case(), expected)
    case = Case("Pipeline")
    case.pipe.transformer = torch.compile(case.pipe.transformer, backend="eager")
    with pytest.raises(TypeError, match=r"^obj.transformer: expected the module itself.* compile\(\)"):
        accelerate(case.pipe, **options)


def test_the_next_step_of_a_scheduler():
    scheduler = MGTScheduler(mask_token_id=4)
    assert scheduler.next_step.get() is None
    scheduler.set_timesteps(3)
    assert scheduler.next_step.get() == Step(0, 3)
    tokens = torch.full((1, 6), 4)
    tokens = scheduler.step(randn(1, 6, 4), 2, tokens, generator=seeded(0)).prev_sample
    assert scheduler.next_step.get() == Step(1, 3) and Step(1, 4).share == 0.25
    other = copy.deepcopy(scheduler)
    assert other.next_step.get() == Step(1, 3) and pickle.loads(pickle.dumps(scheduler)).next_step.get() is None
    found = []
    thread = threading.Thread(target=lambda: found.append(scheduler.next_step.get()))
    thread.start()
    thread.join()
    assert found == [None]
    other.next_step.set(None)
    assert scheduler.next_step.get() == Step(1, 3)
    del tokens
    # nobody can go on
    assert scheduler.next_step.get() is None
    assert isinstance(scheduler.next_step, NextStep)


def test_the_lines_of_the_page_run(capsys):
    page = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page.split("## Less of the transformer")[1], flags=re.DOTALL)
    case = Case("AmusedPipeline")
    exec(compile(code, "frameworks.md", "exec"), {"pipe": case.pipe})
    assert capsys.readouterr().out.count("\n") == 4
    assert case.sizes() == [2] + [4] * 7 + [2] * 2
