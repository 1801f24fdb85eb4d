"""aMUSEd's three pipelines (diffusers), and Meissonic's, which have the same scheduler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..blocks import KNOWN_BLOCKS, find_blocks
from ..clock import Moment
from ..halves import IntervalForward
from ..head import Head, HeadForward, find_head
from ..interval import NextStep, Progress
from ..merge import MergedBlocks, TokenMerging
from ..quantization import Int4Linear, load_quantized
from ..quantization import quantize as quantize_model
from ..quantization.scales import layers_to_choose_for
from ..scheduler import MGTScheduler
from .parts import LatePart, MergePart, Part


def replacements(pipe: Any) -> dict[str, Any]:
    """A scheduler of ours, with the settings of the pipeline's."""
    before = pipe.scheduler
    if isinstance(before, MGTScheduler):
        return {}
    if type(before).__name__ not in ("AmusedScheduler", "Scheduler"):
        raise TypeError(f"obj.scheduler: expected an AmusedScheduler or Meissonic's, got {type(before).__name__}")
    return {"scheduler": MGTScheduler.from_config(before.config)}


def parts(
    pipe: Any,
    ours: dict[str, Any],
    *,
    guidance_interval: tuple[float, float] | None = None,
    head: bool = False,
    merge: TokenMerging | None = None,
    quantize: Any = None,
) -> list[Part]:
    """What else is set on the pipeline and on what it holds.

    Args:
        pipe: the pipeline.
        ours: its `replacements`.
        guidance_interval: (start, end): the unconditional half is left out at steps k where k / T is not within.
        head: whether guidance goes through the transformer's last layer, for the masked positions alone.
        merge: how tokens are merged in the transformer's blocks.
        quantize: a file of quantized layers, or what the transformer is calibrated with.
    """
    found: list[Part] = []
    if hasattr(pipe.transformer, "_orig_mod"):
        raise TypeError(
            "obj.transformer: expected the module itself, got what torch.compile made of it; "
            "its method compile() compiles it where it is"
        )
    transformer, scheduler = pipe.transformer, ours.get("scheduler", pipe.scheduler)
    if quantize is not None:
        found.append(_quantized_part(pipe, quantize))
        # what follows is done to the quantized one
        transformer = found[0].value
    if head:
        found += _head_parts(transformer)
    if merge is not None:
        found.append(_merge_part(transformer, merge, scheduler))
    if guidance_interval is not None:
        found += _interval_parts(pipe, transformer, guidance_interval, scheduler)
    return found


def _quantized_part(pipe: Any, quantize: Any) -> Part:
    before = pipe.transformer
    if isinstance(quantize, (str, Path)):
        quantized = load_quantized(before, quantize)
        source = f"from {Path(quantize).name}"
    else:
        quantized, _ = quantize_model(before, quantize, mask_token_id=pipe.scheduler.config.mask_token_id)
        source = "calibrated"
    layers = [layer for layer in quantized.modules() if isinstance(layer, Int4Linear)]
    num_a8 = sum(layer.activation == "a8" for layer in layers)
    line = f"quantize: {len(layers)} linear layers in 4 bits, {num_a8} W4A8 and {len(layers) - num_a8} W4A16, {source}"
    return Part(pipe, "transformer", quantized, line)


def _merge_part(transformer: Any, merge: TokenMerging, scheduler: MGTScheduler) -> Part:
    num_blocks = len(find_blocks(transformer, KNOWN_BLOCKS, merge.single_stream))
    line = f"merge: {merge}, in {num_blocks} blocks of {type(transformer).__name__}"
    make = partial(MergedBlocks, transformer, merge, moment=MomentOfScheduler(scheduler.next_step))
    return MergePart(transformer, "forward", None, line, make=make)


class MomentOfScheduler:
    """Tells token merging which step comes next, by the pipeline's scheduler."""

    def __init__(self, next_step: NextStep) -> None:
        """Hold who knows."""
        self._next_step = next_step

    def __call__(self) -> Moment | None:
        """The step of this thread's run; None: there is no run."""
        step = self._next_step.get()
        return None if step is None else Moment(step.k, step.num_inference_steps, step.k)


def _head_parts(transformer: Any) -> list[Part]:
    layer = find_head(transformer, "obj.transformer")
    line = f"{type(transformer).__name__}'s {type(layer).__name__}: guidance before it, and masked positions alone"
    return [Part(layer, "forward", HeadForward(Head(layer, "head")), f"head: {line}")]


def _interval_parts(pipe: Any, transformer: Any, interval: tuple[float, float], scheduler: MGTScheduler) -> list[Part]:
    if layers_to_choose_for(transformer):
        raise ValueError(
            "guidance_interval: expected a transformer whose quantized layers have one activation scale each, got one "
            "that chooses among several for a batch of both halves"
        )
    start, end = interval
    line = f"guidance_interval: no unconditional half at steps k of T where k / T is outside [{start:g}, {end:g})"
    # around the forward that token merging leaves
    make = partial(IntervalForward, transformer, interval, scheduler.next_step)
    found: list[Part] = [LatePart(transformer, "forward", None, line, make=make)]
    if hasattr(pipe, "progress_bar"):
        found.append(Part(pipe, "progress_bar", Progress(pipe, scheduler.next_step)))
    return found
