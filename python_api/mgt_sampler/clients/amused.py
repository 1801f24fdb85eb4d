"""aMUSEd's three pipelines (diffusers), and Meissonic's, which have the same scheduler."""

from __future__ import annotations

from typing import Any

from ..halves import IntervalForward
from ..head import Head, HeadForward, find_head
from ..interval import Progress
from ..quantization.scales import layers_to_choose_for
from ..scheduler import MGTScheduler
from .parts import Part


def replacements(pipe: Any) -> dict[str, Any]:
    """A scheduler of ours, with the settings of the pipeline's."""
    before = pipe.scheduler
    if isinstance(before, MGTScheduler):
        return {}
    if type(before).__name__ not in ("AmusedScheduler", "Scheduler"):
        raise TypeError(f"obj.scheduler: expected an AmusedScheduler or Meissonic's, got {type(before).__name__}")
    return {"scheduler": MGTScheduler.from_config(before.config)}


def parts(
    pipe: Any, ours: dict[str, Any], *, guidance_interval: tuple[float, float] | None = None, head: bool = False
) -> list[Part]:
    """What else is set on the pipeline and on what it holds.

    Args:
        pipe: the pipeline.
        ours: its `replacements`.
        guidance_interval: (start, end): the unconditional half is left out at steps k where k / T is not within.
        head: whether guidance goes through the transformer's last layer, for the masked positions alone.
    """
    found: list[Part] = []
    if hasattr(pipe.transformer, "_orig_mod"):
        raise TypeError(
            "obj.transformer: expected the module itself, got what torch.compile made of it; "
            "its method compile() compiles it where it is"
        )
    if head:
        found += _head_parts(pipe.transformer)
    if guidance_interval is not None:
        scheduler = ours.get("scheduler", pipe.scheduler)
        found += _interval_parts(pipe, guidance_interval, scheduler)
    return found


def _head_parts(transformer: Any) -> list[Part]:
    layer = find_head(transformer, "obj.transformer")
    line = f"{type(transformer).__name__}'s {type(layer).__name__}: guidance before it, and masked positions alone"
    return [Part(layer, "forward", HeadForward(Head(layer, "head")), f"head: {line}")]


def _interval_parts(pipe: Any, interval: tuple[float, float], scheduler: MGTScheduler) -> list[Part]:
    transformer = pipe.transformer
    if layers_to_choose_for(transformer):
        raise ValueError(
            "guidance_interval: expected a transformer whose quantized layers have one activation scale each, got one "
            "that chooses among several for a batch of both halves"
        )
    start, end = interval
    line = f"guidance_interval: no unconditional half at steps k of T where k / T is outside [{start:g}, {end:g})"
    found = [Part(transformer, "forward", IntervalForward(transformer, interval, scheduler.next_step), line)]
    if hasattr(pipe, "progress_bar"):
        found.append(Part(pipe, "progress_bar", Progress(pipe, scheduler.next_step)))
    return found
