"""The steps of a generation as CUDA graphs: captured once, replayed without the host's help.

What changes from step to step lies on the device: the tokens, the number of the step, and tables of what is scheduled,
from which the step reads its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .clock import at_step
from .counts import Ratio
from .draw import Draw
from .schedules import mask_ratios, schedule_values
from .selection import MaskLowest
from .state import Logits, State
from .step import Drawn, Rule, take_step

if TYPE_CHECKING:
    from .sampling import Predictor


class Schedules(NamedTuple):
    """What a rule has for each of the T steps."""

    guidance_scale: Sequence[float]
    noise_scale: Sequence[float]
    token_temperature: Sequence[float]
    temperature: Sequence[float]
    mask_ratio: Sequence[float]


class GraphedSteps:
    """Steps of a rule on static tensors: the first of each kind runs as it comes, the second is captured.

    Steps are of a kind where they call the model alike, agree on whether there is noise and on whether there is a
    distribution to compare with. A step of a captured kind is one launch of its graph.
    """

    def __init__(self, rule: Rule, predict: Predictor, state: State) -> None:
        """Take what the steps work on; the tokens of `state` are updated in place."""
        draw, select = rule.draw, rule.select
        if (
            not isinstance(draw, Draw)
            or not isinstance(select, MaskLowest)
            or not isinstance(select.count, Ratio)
            or callable(select.count.schedule)
        ):
            raise ValueError("cuda_graph: expected a rule of Draw and of MaskLowest with a named Ratio, got another")
        self._predict, self._state = predict, state
        steps = state.num_inference_steps
        scheduled = rule.guidance_scale, draw.noise_scale, draw.temperature, select.temperature
        guidance, noise, token_temperature, temperature = (schedule_values(values, steps) for values in scheduled)
        ratios = mask_ratios(select.count.schedule, steps, state.tokens.shape[1])
        self._schedules = schedules = Schedules(guidance, noise, token_temperature, temperature, ratios)
        self._step = torch.full((1,), state.step, dtype=torch.int64, device=state.tokens.device)
        # where all steps have the same number, the kernels are faster with the number
        self._tables = {
            name: torch.tensor(values, dtype=torch.float64, device=state.tokens.device)
            for name, values in schedules._asdict().items()
            if name != "mask_ratio" and len(set(values)) > 1
        }
        masked, counts = state.num_masked(), [torch.zeros_like(state.num_masked())] * state.step
        for ratio in schedules.mask_ratio[state.step : -1]:
            masked = select.count.left(masked, ratio, state.num_masked_at_start)
            counts.append(masked)
        # the last row is 0: nothing is masked again
        self._mask_lens = torch.stack([*counts, torch.zeros_like(masked)])
        self._rule = rule.but(
            # noise costs, and the kernel cannot tell beforehand that a tensor holds 0
            draw=replace(draw, noise_scale=self._noise_scale, temperature=self._token_temperature),
            select=MaskLowest(
                lambda state: self._mask_lens.index_select(0, self._step).squeeze(0),
                lambda k, num_steps: self._value("temperature"),
            ),
        )
        self._met: set[tuple[object, ...]] = set()
        self._graphs: dict[tuple[object, ...], tuple[Callable[[], None], Drawn]] = {}

    def take_all(self) -> Iterator[tuple[State, tuple[Drawn, ...]]]:
        """Take the steps that are left; what is yielded is written over by the next step."""
        first = self._state.step
        for k in range(first, self._state.num_inference_steps):
            drawn, replayed = self.take(k)
            if replayed:
                self._predict.num_calls += 1 if self._schedules.guidance_scale[k] in (0, 1) else 2
            yield replace(self._state, step=k + 1, num_draws=k + 1), (drawn,)

    def take(self, k: int) -> tuple[Drawn, bool]:
        """Take step k, and return what was drawn, until the next step, and whether a graph was replayed.

        A step that is captured now counts as run, not as replayed: the model was called for it.
        """
        scale = self._schedules.guidance_scale[k]
        compares = "differential" in self._state.memory
        kind = (scale if scale in (0, 1) else None, self._schedules.noise_scale[k] > 0, compares)
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
        tokens = self._state.tokens
        with at_step(k, self._state.num_inference_steps, self._step.reshape(())):
            logits, uncond_logits = self._predict(tokens, self._schedules.guidance_scale[k])
        scale = 1.0 if uncond_logits is None else self._value("guidance_scale")
        # of a longer run, for the last step of a run does not mask, and a graph is for all steps of its kind
        longer = self._state.num_inference_steps + 1
        now = replace(self._state, step=k, num_inference_steps=longer, num_draws=self._step.reshape(()))
        after, drawn = take_step(self._rule, Logits(logits, uncond_logits, scale), now)
        self._state.memory.update(after.memory)
        tokens.copy_(drawn.tokens)
        self._step.add_(1)
        return drawn._replace(tokens=tokens)

    def _noise_scale(self, k: int, num_inference_steps: int) -> float | Tensor:
        return self._value("noise_scale") if self._schedules.noise_scale[k] > 0 else 0.0

    def _token_temperature(self, k: int, num_inference_steps: int) -> float | Tensor:
        return self._value("token_temperature")

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
