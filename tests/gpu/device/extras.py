"""What only a device has, beside the cases: graphs that are replayed, large offsets, the compiler."""

from typing import Any

import torch
from cases import sample_tokens_case

import mgt_kernels
from device.results import AbsentError


def _on(device: str, arguments: tuple) -> tuple:
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)


def graph_replays_with_fresh_draws() -> None:
    """A CUDA graph of one step, replayed with another step index and seed in place."""
    case = sample_tokens_case("graph", 8192, num_positions=64)
    arguments = case.make_arguments()
    logits, tokens, seed, step, mask_token_id, uncond, guidance_scale, *_ = _on("cuda", arguments)

    def draw() -> mgt_kernels.Sampled:
        return mgt_kernels.sample_tokens(
            logits, tokens, mask_token_id=mask_token_id, seed=seed, step=step, uncond_logits=uncond,
            guidance_scale=guidance_scale,
        )  # fmt: skip

    # compiles before the capture
    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids = draw().token_ids
    for value in (1, 2):
        step.fill_(value)
        seed += value
        graph.replay()
        torch.cuda.synchronize()
        inputs = (*arguments[:2], seed.cpu(), step.cpu(), *arguments[4:])
        assert torch.equal(token_ids.cpu(), case.expected(*inputs)[0])


def graph_replays_along_a_schedule() -> None:
    """A CUDA graph of one step, replayed with guidance, noise and temperature of each step of a schedule."""
    case = sample_tokens_case("schedule", 8192, num_positions=64)
    arguments = case.make_arguments()
    logits, tokens, seed, step, mask_token_id, uncond, *_ = _on("cuda", arguments)
    guidance_scale, noise_scale, temperature = scalars = torch.ones(3, device="cuda").unbind()
    options: dict[str, Any] = dict(mask_token_id=mask_token_id, seed=seed, step=step, temperature=temperature)
    guidance: dict[str, Any] = dict(uncond_logits=uncond, guidance_scale=guidance_scale, noise_scale=noise_scale)

    def draw() -> tuple[torch.Tensor, ...]:
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, **guidance, **options)
        masked = mgt_kernels.mask_by_confidence(token_ids, logprob, 20, **options)
        return token_ids, logprob, masked

    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = draw()
    for values in ((3.0, 0.5, 0.7), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)):
        for scalar, value in zip(scalars, values, strict=True):
            scalar.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        token_ids, logprob, masked = _on("cpu", outputs)
        numbers = [float(scalar) for scalar in scalars]
        assert torch.equal(token_ids, case.expected(*arguments[:6], *numbers, *arguments[9:])[0])
        expected = mgt_kernels.mask_by_confidence(
            token_ids, logprob, 20, temperature=numbers[2], mask_token_id=mask_token_id, seed=arguments[2],
            step=arguments[3],
        )  # fmt: skip
        assert torch.equal(masked, expected)


class _Model:
    """A model of a few matrices, whose logits depend on all tokens and on the label."""

    num_tokens, codebook_size, mask_token_id = 64, 1024, 1024

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self.device = torch.device(device)
        self.embedding = torch.randn(1025, 1024, generator=generator).to(device)
        self.position = torch.randn(64, 1024, generator=generator).to(device)

    def predict_logits(self, tokens: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        logits = 2 * self.position + self.embedding[tokens].mean(1, keepdim=True)
        return logits if condition is None else logits * (1.5 + condition[:, None, None])

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, None, :, None].float() / 1024


def generations_in_graphs(device: str = "cuda") -> None:
    """Generations whose steps are replayed have the tokens of those whose steps are called."""
    try:
        from mgt_sampler import Differential, generate
    except ImportError as error:
        raise AbsentError(str(error)) from error
    settings: tuple[dict[str, Any], ...] = (
        dict(),
        dict(noise_scale=(2.0, 0.0), token_temperature=(1.3, 0.7)),
        dict(differential=Differential()),
    )
    model = _Model(device)
    for setting in settings:
        options: dict[str, Any] = dict(labels=[1, 2], guidance_scale=(1.5, 4.0), seed=5, progress=False, **setting)
        called, replayed = (generate(model, cuda_graph=graph, **options).tokens for graph in (False, True))
        assert torch.equal(called, replayed), f"{setting}: {int((called != replayed).sum())} tokens differ"


def elements_past_two_pow_31() -> None:
    """Rows that lie further apart than 32-bit offsets reach."""
    small = torch.randn(2, 4, 2048, dtype=torch.bfloat16)
    storage = torch.empty(2**31 + 4 * 2048, dtype=torch.bfloat16, device="cuda")
    logits = storage.as_strided((2, 4, 2048), (2**31, 2048, 1))
    logits.copy_(small)
    tokens = torch.full((2, 4), 2048)
    options: dict[str, Any] = dict(mask_token_id=2048, seed=1, step=0)
    expected = mgt_kernels.sample_tokens(small, tokens, **options)
    assert torch.equal(mgt_kernels.sample_tokens(logits, tokens.cuda(), **options)[0].cpu(), expected[0])


def compiled_step() -> None:
    """torch.compile takes the public ops on the device without a graph break."""

    def step(logits: torch.Tensor, tokens: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=1000, seed=seed, step=2)
        options: dict[str, Any] = dict(mask_token_id=1000, temperature=1.0, seed=seed, step=2)
        return mgt_kernels.mask_by_confidence(token_ids, logprob, 20, **options)

    inputs = (torch.randn(2, 64, 1000), torch.full((2, 64), 1000), torch.tensor([11, 12]))
    on_device = torch.compile(step, fullgraph=True)(*_on("cuda", inputs))
    assert torch.equal(on_device.cpu(), step(*inputs))


EXTRAS = {
    "a CUDA graph replays with fresh draws": graph_replays_with_fresh_draws,
    "a CUDA graph replays along a schedule": graph_replays_along_a_schedule,
    "generations in CUDA graphs": generations_in_graphs,
    "more than 2^31 elements": elements_past_two_pow_31,
    "torch.compile": compiled_step,
}
