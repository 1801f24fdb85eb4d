"""`accelerate` with everything at once: token merging, 4-bit layers, a guidance interval, the folded head."""

import copy
import pickle

import pytest
import tiny
import tiny_blocks
import tiny_meissonic
import torch
from tiny import randn, seeded

diffusers = pytest.importorskip("diffusers")

from mgt_sampler import Int4Linear, TokenMerging, accelerate, restore, save_quantized  # noqa: E402
from mgt_sampler import quantize as quantize_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = {"merge": TokenMerging(0.5, single_stream=True), "guidance_interval": (0.1, 0.8), "head": True}


def amused():
    scheduler = diffusers.AmusedScheduler(mask_token_id=31)
    pipe = diffusers.AmusedPipeline(scheduler=scheduler, **tiny.amused_parts())
    pipe.set_progress_bar_config(disable=True)

    def call(pipe, seed=0, rows=slice(None), generator=None, **options):
        settings = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 16, "width": 16, **options}
        embeddings = {
            "prompt_embeds": 4 * randn(2, 8)[rows],
            "encoder_hidden_states": 4 * randn(2, 5, 8)[rows],
            "negative_prompt_embeds": torch.zeros(2, 8)[rows],
            "negative_encoder_hidden_states": torch.zeros(2, 5, 8)[rows],
        }
        return pipe(**embeddings, generator=generator or seeded(seed), output_type="latent", **settings).images

    return pipe, call


def meissonic():
    """The stand-in's pipeline with a transformer that has Meissonic's blocks."""
    scheduler = type("Scheduler", (diffusers.AmusedScheduler,), {})(mask_token_id=tiny_meissonic.MASK)
    pipe = tiny_meissonic.Pipeline(scheduler)
    pipe.transformer = tiny_blocks.transformer(
        codebook_size=tiny_meissonic.CODES, mask_token_id=tiny_meissonic.MASK, patch=1, num_text=6, num_pooled=5
    )

    def call(pipe, seed=0, rows=slice(None), generator=None, **options):
        settings = {"num_inference_steps": 6, "guidance_scale": 3.0, **options}
        return pipe(4 * randn(2, 7, 6)[rows], generator=generator or seeded(seed), **settings)

    return pipe, call


@pytest.fixture(params=[amused, meissonic], ids=["aMUSEd", "Meissonic"])
def case(request):
    return request.param()


def calibration(pipe, call):
    """What the transformer is called with in one run."""
    inputs = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, dict(kwargs))), with_kwargs=True
    )
    call(pipe)
    handle.remove()
    from mgt_sampler import CalibrationInput

    return [CalibrationInput(args=args, kwargs=kwargs) for args, kwargs in inputs]


def rows_in_blocks(pipe, call, **options):
    """(samples, tokens) that the MLP of the first block sees at each call."""
    transformer = pipe.transformer
    block = transformer.transformer_blocks[0] if hasattr(transformer, "transformer_blocks") else None
    block = transformer.transformer_layers[0] if block is None else block
    seen = []
    # after the hook that merges
    handle = block.ff.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    call(pipe, **options)
    handle.remove()
    return seen


def state_of(pipe):
    """Whatever may have been set on a pipeline's parts."""
    modules = [(name, id(module)) for name, module in pipe.transformer.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()]
    attributes = [[*sorted(vars(m)), type(getattr(m, "processor", None)).__name__] for m in pipe.transformer.modules()]
    return modules, hooks, attributes, sorted(vars(pipe)), id(pipe.scheduler)


def test_parts_work_together(case):
    """The interval leaves the unconditional half out, and what is left of the tokens goes through the blocks."""
    pipe, call = case
    accelerate(pipe)
    plain = rows_in_blocks(pipe, call)
    tokens = plain[0][1]
    assert set(plain) == {(4, tokens)}
    restore(pipe)
    accelerate(pipe, **EVERYTHING)
    # k / T of 0, 1/6, 2/6, 3/6, 4/6, 5/6
    assert rows_in_blocks(pipe, call) == [(2, tokens // 2)] + [(4, tokens // 2)] * 4 + [(2, tokens // 2)]


def test_a_call_of_one_half_merges_as_one_of_both(case):
    """Outside the interval the transformer is called with the conditional half alone, its arguments in their order."""
    pipe, call = case
    accelerate(pipe, merge=EVERYTHING["merge"])
    expected = call(pipe, guidance_scale=1.0)
    restore(pipe)
    # no step is guided
    accelerate(pipe, merge=EVERYTHING["merge"], guidance_interval=(0.0, 0.0))
    assert torch.equal(call(pipe), expected)


def test_report_and_restore(case, tmp_path):
    pipe, call = case
    before = call(pipe), state_of(pipe)
    quantized, _ = quantize_model(pipe.transformer, calibration(pipe, call), share=1.0)
    path = tmp_path / "scq.safetensors"
    save_quantized(quantized, path)
    original = pipe.transformer
    done = accelerate(pipe, quantize=path, **EVERYTHING)
    lines = "\n".join(done.parts)
    for part in ("quantize: ", "W4A8 and 0 W4A16, from scq.safetensors", "head: ", "merge: ", "guidance_interval: "):
        assert part in lines
    assert lines in str(done).replace("\n  ", "\n")
    assert any(isinstance(layer, Int4Linear) for layer in pipe.transformer.modules())
    assert accelerate(pipe) is done
    assert accelerate(pipe, quantize=str(path), **EVERYTHING) is done
    with pytest.raises(ValueError, match=r"merge: expected .*restore\(obj\) first"):
        accelerate(pipe, merge=0.25)
    tokens = call(pipe)
    assert tokens.shape == before[0].shape
    assert torch.equal(call(pipe), tokens)
    assert restore(pipe) is pipe
    assert pipe.transformer is original
    assert state_of(pipe) == before[1]
    assert torch.equal(call(pipe), before[0])


def test_calibrated_on_the_spot(case):
    pipe, call = case
    inputs, original = calibration(pipe, call), pipe.transformer
    done = accelerate(pipe, quantize=inputs)
    assert "calibrated" in done.parts[0]
    with pytest.raises(ValueError, match="quantize: expected quantize='calibration'"):
        accelerate(pipe, quantize=inputs)
    call(pipe)
    restore(pipe)
    assert pipe.transformer is original


def test_a_batch_is_its_samples_alone(case):
    pipe, call = case
    accelerate(pipe, **{**EVERYTHING, "merge": TokenMerging(0.5, every=2)})
    together = call(pipe, generator=[seeded(5), seeded(6)])
    alone = [call(pipe, rows=slice(b, b + 1), generator=[seeded(5 + b)]) for b in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_corners_and_ratios_follow_the_steps(case):
    """What the pipeline's scheduler says of the step reaches the blocks."""
    pipe, call = case
    accelerate(pipe, merge=TokenMerging((0.75, 0.0), destinations="top_left"))
    tokens = rows_in_blocks(pipe, call)
    whole = tokens[-1][1]
    assert [n for _, n in tokens] == [whole - int(r * whole) for r in (0.75, 0.6, 0.45, 0.3, 0.15, 0.0)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    pipe, call = meissonic()
    plain = call(pipe)
    accelerate(pipe, **EVERYTHING)
    expected = call(pipe)
    # a pickle finds classes by their module, which the stand-in's pretends to be another
    other = copied(pipe) if copied is copy.deepcopy else None
    if other is None:
        transformer = copied(pipe.transformer)
        with torch.no_grad():
            inputs = tiny_blocks.inputs(pipe.transformer, height=4, width=4, patch=1, num_text=6, num_pooled=5)
            # both return what stands for the logits
            assert torch.equal(transformer(**inputs) + 0, pipe.transformer(**inputs) + 0)
        return
    assert torch.equal(call(other), expected)
    restore(other)
    assert torch.equal(call(other), plain)
    assert torch.equal(call(pipe), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": 0.8}, "merge: ratio: expected at most 0.75, got 0.8"),
        ({"merge": "half"}, "merge: ratio: expected"),
        ({"merge": True}, "merge: expected a ratio, a schedule or a TokenMerging, got True"),
        ({"guidance_interval": (0.8, 0.1)}, "guidance_interval: expected"),
        ({"guidance_interval": (0.0, 1.1)}, "guidance_interval: expected"),
        ({"quantize": "nothing.safetensors"}, "nothing.safetensors"),
        ({"quantize": []}, "calibration: expected one input at least"),
        ({"head": 1}, "head: expected a bool"),
    ],
)
def test_what_is_refused_leaves_the_pipeline_as_it_was(case, options, message):
    pipe, call = case
    before = call(pipe), state_of(pipe)
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        accelerate(pipe, **options)
    assert state_of(pipe) == before[1]
    assert torch.equal(call(pipe), before[0])


def test_unknown_blocks_leave_the_pipeline_as_it_was():
    scheduler = type("Scheduler", (diffusers.AmusedScheduler,), {})(mask_token_id=tiny_meissonic.MASK)
    pipe = tiny_meissonic.Pipeline(scheduler)
    before = state_of(pipe)
    with pytest.raises(ValueError, match="merge: expected a transformer with blocks of"):
        accelerate(pipe, **EVERYTHING)
    assert state_of(pipe) == before


def test_other_clients_take_no_merging():
    with pytest.raises(TypeError, match="merge: expected none with LLaDA2; aMUSEd and Meissonic take it"):
        accelerate(tiny.llada2_pipeline(), merge=0.5)
