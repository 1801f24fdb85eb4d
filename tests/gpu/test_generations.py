"""Whole generations on the kernels: what warm_up leaves to compile, and graphs of steps."""

from functools import partial

import driver
import pytest
import recorder
import torch
from cases import launcher_of
from driver import standin_gpu
from triton.runtime import JITFunction

import mgt_kernels
from mgt_kernels import ops
from mgt_kernels.triton import launch as launching
from mgt_sampler import Differential, generate, graphs, sampling

NUM_TOKENS, CODEBOOK_SIZE = 8, 300


class Model:
    """Logits that depend on all tokens and the label."""

    num_tokens, codebook_size, mask_token_id = NUM_TOKENS, CODEBOOK_SIZE, CODEBOOK_SIZE

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(CODEBOOK_SIZE + 1, CODEBOOK_SIZE, generator=generator)
        self.position = torch.randn(NUM_TOKENS, CODEBOOK_SIZE, generator=generator)

    def predict_logits(self, tokens, condition):
        # where no kernel runs, tokens are any numbers
        logits = 2 * self.position + self.embedding[tokens.clamp(0, CODEBOOK_SIZE)].mean(1, keepdim=True)
        return logits if condition is None else logits * (1.5 + condition[:, None, None])

    def decode(self, tokens):
        return tokens[:, None].float()[..., None] / CODEBOOK_SIZE


@pytest.fixture
def on_triton(monkeypatch):
    """The ops take CPU tensors to the kernels of CUDA, as they do with tensors on CUDA."""

    def run(name, position_of_step, *arguments):
        *read, _backend = arguments
        read[position_of_step] = torch.as_tensor(read[position_of_step])
        return launcher_of(name)(*read)

    for name, position_of_step in (("sample_tokens", 3), ("differential_sample", 3), ("mask_by_confidence", 4)):
        monkeypatch.setattr(ops, f"_call_{name}", partial(run, name, position_of_step))


@pytest.fixture
def compiled(monkeypatch):
    """The names of kernels of which a variant is launched for the first time; none is compiled."""
    names = []

    class Compiled:
        function = packed_metadata = None

        def run(self, *arguments):
            pass

    def run(self, *arguments, **options):
        names.append(self.__name__)
        return Compiled()

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launching, "_LOADED", {})
    monkeypatch.setattr(launching, "_LOADED_FOR", {})
    return names


# of a generation in three steps, and of its warm-up
GENERATIONS = {
    "plain": (dict(), dict(guidance_scale=2.0)),
    "schedules": (
        dict(guidance_scale=[1.0, -1.0, 3.0], noise_scale=[1.0, 0.5, 0.0], token_temperature=[1.3, 0.0, 1.0]),
        dict(guidance_scale=[1.0, -1.0, 3.0], noise_scale=(2.0, 0.0), temperature=(1.0, 0.0)),
    ),
    "differential": (dict(differential=Differential()), dict(guidance_scale=2.0, variant="paper")),
    "differential of the published code": (
        dict(differential=Differential(variant="official", aliased_history=True), noise_scale=(1.0, 0.0)),
        dict(guidance_scale=2.0, noise_scale=(1.0, 0.0), variant="official", aliased_history=True),
    ),
}


@pytest.mark.parametrize("setting", GENERATIONS)
def test_nothing_is_compiled_after_a_warm_up(setting, on_triton, compiled):
    generation, warm_up = GENERATIONS[setting]
    model = Model()
    arguments = dict(labels=[1, 2, 3], num_inference_steps=3, guidance_scale=2.0, progress=False) | generation
    tokens = torch.full((1, NUM_TOKENS), CODEBOOK_SIZE)
    halves = [model.predict_logits(tokens, condition) for condition in (torch.tensor([1]), None)]
    with standin_gpu(80, execute=False):
        mgt_kernels.warm_up(halves[0], tokens, mask_token_id=CODEBOOK_SIZE, uncond_logits=halves[1], **warm_up)
        assert compiled
        compiled.clear()
        generate(model, tokens=tokens.repeat(3, 1), **arguments)
        assert not compiled
        # what nobody asked for is seen
        mgt_kernels.sample_tokens(halves[0].half(), tokens, mask_token_id=CODEBOOK_SIZE, seed=tokens[:, 0], step=0)
        assert compiled == ["sample_tokens_kernel"]


def test_a_warm_up_for_less_leaves_the_rest(on_triton, compiled):
    logits, tokens = torch.zeros(1, NUM_TOKENS, CODEBOOK_SIZE), torch.full((1, NUM_TOKENS), CODEBOOK_SIZE)
    options = dict(mask_token_id=CODEBOOK_SIZE, seed=tokens[:, 0])
    with standin_gpu(80, execute=False):
        mgt_kernels.warm_up(logits, tokens, mask_token_id=CODEBOOK_SIZE, confidence_temperature=1.0)
        compiled.clear()
        # where a step, the seeds and mask_len lie makes no difference, nor which values they have
        row = torch.arange(3)
        step, seed = row[1], row[1:2]
        mgt_kernels.sample_tokens(logits.repeat(2, 1, 1)[1:], tokens, mask_token_id=-1, seed=seed, step=step)
        mgt_kernels.mask_by_confidence(
            tokens, torch.zeros(tokens.shape), row[1:2], mask_token_id=1, temperature=0.3, seed=seed, step=step
        )
        assert not compiled
        # where the logits lie does
        moved = torch.zeros(logits.numel() + 1)[1:].view(logits.shape)
        for changed in (dict(logits=moved), dict(noise_scale=0.5), dict(temperature=0.0), dict(uncond_logits=logits)):
            compiled.clear()
            mgt_kernels.sample_tokens(**dict(logits=logits, tokens=tokens, step=0, **options) | changed)
            assert "sample_tokens_kernel" in compiled
        state = None
        for step in range(2):
            compiled.clear()
            *_, state = mgt_kernels.differential_sample(logits, tokens, state, step=step, **options)
            assert "compare_kernel" in compiled


def test_a_warm_up_of_truncated_draws_with_two_scales(on_triton, compiled):
    logits, tokens = torch.zeros(1, NUM_TOKENS, CODEBOOK_SIZE), torch.full((1, NUM_TOKENS), CODEBOOK_SIZE)
    options = dict(
        mask_token_id=CODEBOOK_SIZE, uncond_logits=logits, second_uncond_logits=logits, guidance="dual", softcap=30.0,
        top_k=5, logprob_of="full",
    )  # fmt: skip
    with standin_gpu(80, execute=False):
        mgt_kernels.warm_up(
            logits, tokens, guidance_scale=3.0, second_guidance_scale=2.0, top_p=(0.9, 1.0), min_p=0.1, **options
        )
        compiled.clear()
        options |= dict(seed=tokens[:, 0], step=0, guidance_scale=2.0, second_guidance_scale=-1.0, min_p=0.02)
        for top_p in (0.5, 1.0):
            mgt_kernels.sample_tokens(logits, tokens, top_p=top_p, **options)
        assert not compiled
        mgt_kernels.sample_tokens(logits, tokens, **options | dict(top_k=None))
        assert compiled == ["kept_from_kernel"]


def test_replayed_steps_draw_what_the_loop_draws(on_triton, monkeypatch):
    launcher, capturing = driver._Launcher.__call__, []

    def call(self, *arguments):
        if capturing:
            # a graph holds the launch; what it reads and writes stays where it is
            capturing[-1].add(lambda: launcher(self, *arguments))
        else:
            launcher(self, *arguments)

    def capture(step):
        capturing.append(recorder.Recorder())
        try:
            return recorder.capture(step, capturing[-1])
        finally:
            capturing.pop()

    monkeypatch.setattr(driver._Launcher, "__call__", call)
    monkeypatch.setattr(sampling, "check_graphs", lambda device: None)
    monkeypatch.setattr(graphs, "capture", capture)
    arguments = dict(labels=[1, 2], num_inference_steps=4, guidance_scale=(2.0, 4.0), temperature=(2.0, 1.0))
    with standin_gpu(80) as launches:
        eager, graphed = (generate(Model(), progress=False, cuda_graph=graph, **arguments) for graph in (False, True))
    assert torch.equal(eager.tokens, graphed.tokens) and not torch.equal(*eager.tokens)
    # a draw and a mask; the loop's last step masks nothing
    assert len(launches) == 4 * 2 - 1 + 4 * 2
