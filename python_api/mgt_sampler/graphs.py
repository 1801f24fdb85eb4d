"""The steps of a generation as CUDA graphs: captured once, replayed without the host's help.

What changes from step to step lies on the device: the tokens, the number of the step, and tables of what is scheduled,
from which the step reads its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mgt_kernels import mask_by_confidence

from .schedules import mask_len

if TYPE_CHECKING:
    from .techniques import TokenSampler

# from tokens and a guidance scale the logits and, where the scale makes a difference, the unconditional ones
Predict = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]
# token_ids, logprob and, with differential sampling, the divergence
Drawn = tuple[Tensor, Tensor, Tensor | None]


class Schedules(NamedTuple):
    """What `generate` was told for each of the T steps."""

    guidance_scale: Sequence[float]
    noise_scale: Sequence[float]
    token_temperature: Sequence[float]
    temperature: Sequence[float]
    mask_ratio: Sequence[float]


class GraphedSteps:
    """Steps of `generate` on static tensors: the first of each kind runs as it comes, the second is captured.

    Steps are of a kind where they call the model alike, agree on whether there is noise and on whether there is a
    distribution to compare with. A step of a captured kind is one launch of its graph.
    """

    def __init__(self, predict: Predict, sampler: TokenSampler, tokens: Tensor, seeds: Tensor, schedules: Schedules):
        """Take what the steps work on; `tokens` is updated in place."""
        self._predict, self._sampler, self._tokens, self._seeds = predict, sampler, tokens, seeds
        self._schedules = schedules
        self._step = torch.zeros((1,), dtype=torch.int64, device=tokens.device)
        # where all steps have the same number, the kernels are faster with the number
        self._tables = {
            name: torch.tensor(values, dtype=torch.float64, device=tokens.device)
            for name, values in schedules._asdict().items()
            if name != "mask_ratio" and len(set(values)) > 1
        }
        masked = (tokens == sampler.mask_token_id).sum(-1)
        at_start, counts = masked.float(), []
        for ratio in schedules.mask_ratio[:-1]:
            masked = mask_len(masked, ratio, at_start)
            counts.append(masked)
        self._mask_lens = torch.stack([*counts, torch.zeros_like(masked)])
        self._met: set[tuple[object, ...]] = set()
        self._graphs: dict[tuple[object, ...], tuple[Callable[[], None], Drawn]] = {}

    def take(self, k: int) -> tuple[Drawn, bool]:
        """Take step k, after step k - 1; return what was drawn, until the next step, and whether a graph was replayed.

        A step that is captured now counts as run, not as replayed: the model was called for it.
        """
        scale = self._schedules.guidance_scale[k]
        kind = (scale if scale in (0, 1) else None, self._schedules.noise_scale[k] > 0, self._sampler.state is None)
        if kind not in self._met:
            self._met.add(kind)
            return self._run(k), False
        captured = kind in self._graphs
        if not captured:
            self._graphs[kind] = capture(lambda: self._run(k))
        replay, drawn = self._graphs[kind]
        replay()
        return drawn, captured

    def _run(self, k: int) -> Drawn:
        tokens, step, seeds = self._tokens, self._step.reshape(()), self._seeds
        logits, uncond_logits = self._predict(tokens, self._schedules.guidance_scale[k])
        token_ids, logprob, divergence = self._sampler.draw(
            logits,
            tokens,
            seed=seeds,
            step=step,
            uncond_logits=uncond_logits,
            guidance_scale=1.0 if uncond_logits is None else self._value("guidance_scale"),
            # noise costs, and the kernel cannot tell beforehand that a tensor holds 0
            noise_scale=self._value("noise_scale") if self._schedules.noise_scale[k] > 0 else 0.0,
            temperature=self._value("token_temperature"),
        )
        # the last row is 0: nothing is masked again
        masked = mask_by_confidence(
            token_ids,
            logprob,
            self._mask_lens.index_select(0, self._step).squeeze(0),
            mask_token_id=self._sampler.mask_token_id,
            temperature=self._value("temperature"),
            seed=seeds,
            step=step,
            backend=self._sampler.backend,
        )
        tokens.copy_(masked)
        self._step.add_(1)
        return token_ids, logprob, divergence

    def _value(self, name: str) -> float | Tensor:
        """The number that all steps have, or what the step reads from its table."""
        if name in self._tables:
            return self._tables[name].index_select(0, self._step).reshape(())
        number: float = getattr(self._schedules, name)[0]
        return number


def check_graphs(device: torch.device) -> None:
    """Check that there are CUDA graphs on a device.

    Raises:
        ValueError: it is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a model on a CUDA device, got one on {device}")


def capture(step: Callable[[], Drawn]) -> tuple[Callable[[], None], Drawn]:
    """Capture a step, which does not run it; return what replays it, and the tensors that each replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = step()
    return graph.replay, drawn
