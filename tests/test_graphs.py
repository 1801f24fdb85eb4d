"""Generations by CUDA graphs, with a stand-in for these: the tokens are those of the eager loop, to the bit."""

import pytest
import recorder
import torch

from mgt_sampler import Differential, ZSampling, generate, graphs, sampling


class Model:
    """A model whose logits depend on all tokens and on the label; counts its calls."""

    num_tokens, codebook_size, mask_token_id = 24, 40, 40

    def __init__(self, reuses_memory=False):
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(41, 40, generator=generator)
        self.position = torch.randn(24, 40, generator=generator)
        self.memory = torch.empty(2, 24, 40) if reuses_memory else None
        self.calls = 0

    def predict_logits(self, tokens, condition):
        self.calls += 1
        logits = 2 * self.position + self.embedding[tokens].mean(1, keepdim=True)
        if condition is not None:
            logits = logits + torch.sin(logits * (1 + condition)[:, None, None])
        return logits if self.memory is None else self.memory.copy_(logits)

    def decode(self, tokens):
        return tokens[:, None].float()[..., None] / 40


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(sampling, "check_graphs", lambda device: None)
    monkeypatch.setattr(graphs, "capture", recorder.capture)


SETTINGS = {
    "plain": dict(),
    "unconditional": dict(labels=None, num_samples=2),
    "schedules": dict(
        guidance_scale=(1.5, 3.0), noise_scale="abs_cos:2", token_temperature=(1.3, 0.0), temperature=(3.0, 0.5)
    ),
    "noise that ends": dict(noise_scale=[2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
    "halves that come and go": dict(guidance_scale=[0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 3.5]),
    "differential": dict(differential=Differential(), guidance_scale=(1.5, 3.0)),
    "differential of the published code": dict(
        differential=Differential(variant="official", aliased_history=True), noise_scale=(1.0, 0.5)
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_graphs_draw_what_the_loop_draws(setting, standin):
    arguments = dict(labels=[1, 2], num_inference_steps=7, guidance_scale=2.5, progress=False, seed=5)
    arguments |= SETTINGS[setting]
    if arguments["labels"] is None:
        arguments["guidance_scale"] = 1.0
    start = torch.full((2, 24), 40)
    # a partly known image, and one whose masks end early
    start[0, 3:9], start[1, 4:] = 7, 9
    for tokens in (None, start):
        seen = [], []
        models = Model(), Model()
        outputs = [
            generate(model, tokens=tokens, callback=steps.append, cuda_graph=graphed, **arguments)
            for model, steps, graphed in zip(models, seen, (False, True), strict=True)
        ]
        for eager, graphed in zip(*seen, strict=True):
            assert (eager.step, eager.draw) == (graphed.step, graphed.draw)
            assert torch.equal(eager.tokens, graphed.tokens) and torch.equal(eager.mask, graphed.mask)
            assert torch.equal(eager.logprob, graphed.logprob)
            assert eager.divergence is graphed.divergence is None or torch.equal(eager.divergence, graphed.divergence)
        assert torch.equal(outputs[0].tokens, outputs[1].tokens) and torch.equal(outputs[0].images, outputs[1].images)
        assert outputs[0].model_calls == outputs[1].model_calls == models[0].calls
    # the first step of a kind runs, the second is captured: seven steps of one kind call the model twice
    if setting in ("plain", "schedules"):
        assert models[1].calls == 4
    assert models[1].calls < models[0].calls


def test_a_model_that_returns_its_memory_again(standin):
    arguments = dict(labels=[1, 2], num_inference_steps=6, guidance_scale=2.5, progress=False)
    outputs = [generate(Model(True), cuda_graph=graphed, **arguments) for graphed in (False, True)]
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    assert outputs[0].model_calls == outputs[1].model_calls == 13


def test_a_model_that_waits_for_the_device(standin):
    class Waiting(Model):
        def predict_logits(self, tokens, condition):
            return super().predict_logits(tokens, condition) * float(tokens[0, 0] > -1)

    with pytest.raises(RuntimeError, match="asks for a value"):
        generate(Waiting(), num_inference_steps=3, progress=False, cuda_graph=True)


def test_a_number_in_place_of_a_table_turns_it_red(standin, monkeypatch):
    # a graph that keeps the first step's value
    monkeypatch.setattr(
        graphs.GraphedSteps, "_value", lambda self, name: getattr(self._schedules, name)[int(self._step_of_capture)]
    )
    monkeypatch.setattr(graphs.GraphedSteps, "_step_of_capture", 1, raising=False)
    arguments = dict(labels=[1, 2], num_inference_steps=7, guidance_scale=(1.5, 6.0), progress=False)
    outputs = [generate(Model(), cuda_graph=graphed, **arguments) for graphed in (False, True)]
    assert not torch.equal(outputs[0].tokens, outputs[1].tokens)


def test_what_cannot_be_captured_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="cuda_graph: expected a model on a CUDA device, got one on cpu"):
        generate(Model(), cuda_graph=True, progress=False)
    with pytest.raises(TypeError, match="cuda_graph: expected a bool, got int"):
        generate(Model(), cuda_graph=1, progress=False)
    monkeypatch.setattr(sampling, "check_graphs", lambda device: None)
    for refused in (dict(z_sampling=ZSampling()), dict(momentum=0.5), dict(skip=[1])):
        with pytest.raises(ValueError, match="cuda_graph: expected False with z_sampling, momentum or skip"):
            generate(Model(), cuda_graph=True, progress=False, **refused)
