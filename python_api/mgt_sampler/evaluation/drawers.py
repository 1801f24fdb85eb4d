"""What draws a configuration's images: the model as it asks for, and what a call of its transformer costs."""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..merge import MergedBlocks, TokenMerging
from ..models import FashionModel
from ..quantization import ScaledModel, quantize, sampler_trajectories
from .configurations import Configuration


@dataclass(frozen=True)
class Drawer:
    """A model that draws a configuration's images."""

    model: Any
    """The model, its tokens merged and its layers quantized where the configuration says so."""

    flops: float
    """Of a call of its transformer for one image, see `flops_of_call`."""


def make_drawer(model: FashionModel, configuration: Configuration, seed: int, backend: str) -> Drawer:
    """The drawer of a configuration; the model stays as it is.

    Layers are calibrated on two images of each class that the configuration would draw in float, tokens merged.

    Raises:
        TypeError, ValueError: what `MergedBlocks` or `quantize` refuses.
    """
    try:
        drawer = merged(model, configuration.merging, backend)
        flops = flops_of_call(drawer, configuration.merging)
        if configuration.quantization is None:
            return Drawer(drawer, flops)
        calibration = sampler_trajectories(
            drawer,
            labels=torch.arange(model.num_classes, device="cpu").repeat(2),
            # a seed that no evaluated image has
            seed=~seed,
            progress=False,
            backend=backend,
            **configuration.generate_arguments(),
        )
        quantized = copy.copy(drawer)
        # the hooks that merge tokens come along
        quantized.transformer, _ = quantize(  # type: ignore[assignment]
            drawer.transformer, calibration, backend=backend, **configuration.quantization
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{configuration.name}: {error}") from error
    return Drawer(ScaledModel(quantized), flops)


def merged(model: FashionModel, merging: TokenMerging | None, backend: str) -> FashionModel:
    """A copy of a model whose transformer merges tokens, or the model itself."""
    if merging is None:
        return model
    duplicate = copy.copy(model)
    duplicate.transformer = copy.deepcopy(model.transformer)
    MergedBlocks(duplicate.transformer, merging, backend=backend)
    return duplicate


def flops_of_call(model: FashionModel, merging: TokenMerging | None) -> float:
    """Floating-point operations of a call of a float transformer for one image; a multiplication and an addition are 2.

    Those of matrix products, convolutions and attention, as PyTorch counts them, and of the cosines of `match_tokens`,
    2 C (3 N / 4) (N / 4) for each match. Layers of 4 bits do as many in another kind of number. NaN where their number
    depends on the step or the image.
    """
    if merging is not None and not isinstance(merging.ratio, float):
        return math.nan
    if merging is not None and merging.threshold is not None:
        return math.nan
    tokens = torch.full((1, model.num_tokens), model.mask_token_id, device=model.device)
    condition = torch.zeros(1, dtype=torch.int64, device=model.device)
    # the fused attention of CPUs is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.predict_logits(tokens, condition)
    counted = float(counter.get_total_flops())
    if merging is None:
        return counted
    config = model.transformer.config
    num_matches = math.ceil(config.num_layers / merging.every)
    pairs = (model.num_tokens - model.num_tokens // 4) * (model.num_tokens // 4)
    return counted + 2.0 * num_matches * pairs * config.width


class TransformerTime:
    """The time of the processor that this process spends in a transformer, inside one `with` or several.

        watch = TransformerTime(transformer)
        with watch: ...
        watch.seconds, watch.others

    Attributes:
        seconds: of the processor, all threads of this process together; NaN where the transformer is not on the CPU.
        others: how many cores other processes kept busy meanwhile, on average; NaN where the system does not tell.
    """

    def __init__(self, transformer: nn.Module) -> None:
        """Take the transformer."""
        on_cpu = next(transformer.parameters()).device.type == "cpu"
        self.seconds = 0.0 if on_cpu else math.nan
        self._transformer = transformer
        self._started = self._wall = self._busy_of_others = 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> TransformerTime:
        """Start."""
        self._handles = [
            # before and after what merges tokens
            self._transformer.register_forward_pre_hook(self._begin, prepend=True),
            self._transformer.register_forward_hook(self._end),
        ]
        self._before = _clocks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        wall, own, busy = (now - before for now, before in zip(_clocks(), self._before, strict=True))
        self._wall += wall
        self._busy_of_others += busy - own
        for handle in self._handles:
            handle.remove()

    @property
    def others(self) -> float:
        """See above."""
        # the system counts in hundredths of a second
        share = self._busy_of_others / self._wall if self._wall else math.nan
        return share if math.isnan(share) else max(0.0, share)

    def _begin(self, *_: object) -> None:
        self._started = time.process_time()

    def _end(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), _busy_seconds()


def _busy_seconds() -> float:
    """What all cores of the machine have worked since it started, or would have with the time that was stolen."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = ticks
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return math.nan
