"""`python -m mgt_benchmarks.image`: seconds for a whole image, one part of ours after the other.

A transformer of Meissonic's size with random weights, text to image at 1024 pixels, 64 steps, guidance 9. A step is the
transformer without its last layer, whose time does not depend on how many tokens are masked, and the last layer with
guidance and the draw, whose time does. The former is timed with both halves of guidance and with one, the latter at
three masked shares; the 64 steps of the cosine schedule are added up from these, interpolated in between. The text
encoder and the image decoder, the same for all variants, are left out.

Every variant runs in a process of its own, so that memory and thread pools are its own. Processes keep freed memory.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mgt_kernels
from mgt_sampler import Int4Linear
from mgt_sampler.files import check_writable, write_csv
from mgt_sampler.head import folded_logits
from mgt_sampler.merge import MergedBlocks, TokenMerging
from mgt_sampler.state import Logits
from mgt_sampler.step import Rule, begin, take_step

from .case import in_turn
from .image_model import CheckoutModel, SuiteModel, Timed
from .kept_memory import ENVIRONMENT
from .meissonic import SCALES, Int4, Sizes, linear_maker, weight_bytes

NUM_STEPS, GUIDANCE_SCALE, INTERVAL = 64, 9.0, (0.1, 0.8)
# of tokens, before the step
SHARES = (1.0, 0.64, 0.1)
# the most that weights and peak memory may be, as shares of PyTorch's in bfloat16
WEIGHTS_TARGET, PEAK_TARGET = 0.30, 0.35
# how many times faster, by whether the processor multiplies bfloat16
TARGETS = {True: ("PyTorch bf16", 3.0), False: ("PyTorch fp32", 6.0)}


@dataclass(frozen=True)
class Variant:
    """What is timed. With `ours` the draw is ours; the other parts come on top of it."""

    name: str
    arithmetic: str = ""
    """"fp32", "bf16", "w4a8", or "" for the faster one of the former two."""
    ours: bool = True
    folds: bool = False
    interval: bool = False
    merge: float = 0.0
    single_stream: bool = False


VARIANTS = (
    Variant("PyTorch fp32", "fp32", ours=False),
    Variant("PyTorch bf16", "bf16", ours=False),
    Variant("+ kernels"),
    Variant("+ folded head", folds=True),
    Variant("+ guidance interval", folds=True, interval=True),
    Variant("+ merging 0.25", folds=True, interval=True, merge=0.25),
    Variant("+ merging 0.5", folds=True, interval=True, merge=0.5),
    Variant("+ W4A8", "w4a8", folds=True, interval=True, merge=0.5),
    Variant("all, merging 0.5 in every block", "w4a8", folds=True, interval=True, merge=0.5, single_stream=True),
    Variant("W4A8 alone", "w4a8"),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
ALL = "all, merging 0.5 in every block"


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it."""
    return bool({"avx512_bf16", "amx"} & set(mgt_kernels.info()["isas"]))  # type: ignore[arg-type]


def build(variant: Variant, sizes: Sizes, checkout: Path | None) -> Timed:
    """The model of a variant, merging included."""
    torch.manual_seed(0)
    arithmetic = variant.arithmetic or ("bf16" if multiplies_bfloat16() else "fp32")
    dtype = (
        torch.bfloat16 if arithmetic == "bf16" or (arithmetic == "w4a8" and multiplies_bfloat16()) else torch.float32
    )
    # of float, PyTorch's own layers are made, in this dtype
    make = linear_maker("w4a8" if arithmetic == "w4a8" else {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    model: Timed
    if checkout is None:
        model = SuiteModel(sizes, make, dtype)
    else:
        model = CheckoutModel(checkout, sizes, make if arithmetic == "w4a8" else None, dtype)
    if isinstance(model.head, Int4):
        # of one scale for all rows, as a calibration leaves it; a normalized state has no larger value
        x_scale = torch.tensor([[math.sqrt(sizes.width) / 127]])
        model.head = Int4Linear(model.head.weight, None, x_scale, dtype=dtype, layer_name="head")
    if variant.merge:
        merging = TokenMerging(variant.merge, single_stream=variant.single_stream)
        MergedBlocks(model.network, merging, layouts=model.layouts)
    return model


class Steps:
    """The parts of a variant's steps."""

    def __init__(self, variant: Variant, model: Timed, side: int) -> None:
        self.variant, self.model, self.side = variant, model, side
        # codes that every scale's codebook has
        self.tokens = torch.randint(0, 64, (1, side, side))

    def masked_at(self, share: float) -> Tensor:
        """Tokens (1, H, W) of which so many are masked."""
        order = torch.rand(self.side**2, generator=torch.Generator().manual_seed(1)).argsort()
        flat = self.tokens.flatten().clone()
        flat[order[: round(share * len(flat))]] = self.model.mask_token_id
        return flat.view(1, self.side, self.side)

    def body(self, num_halves: int) -> Tensor:
        """The transformer without its last layer."""
        tokens = self.masked_at(SHARES[1]).expand(num_halves, -1, -1)
        return self.model.hidden(tokens, self.model.inputs(num_halves))

    def tail(self, hidden: Tensor, share: float) -> Callable[[], object]:
        """What comes after it: last layer, guidance, draw and masking again."""
        tokens = self.masked_at(share)
        if not self.variant.ours:
            return partial(self._stock, hidden, tokens)
        rule = Rule()
        state = begin(
            tokens.flatten(1), seed=torch.zeros(1, dtype=torch.int64), mask_token_id=self.model.mask_token_id,
            num_inference_steps=NUM_STEPS,
        )  # fmt: skip
        state.num_masked_at_start = torch.tensor([float(self.side**2)])
        state.step = min(NUM_STEPS - 2, round(math.acos(share) * 2 / math.pi * NUM_STEPS))
        return partial(self._ours, hidden, rule, state)

    def _ours(self, hidden: Tensor, rule: Rule, state: Any) -> object:
        uncond, cond = (None, hidden) if len(hidden) == 1 else (hidden[:1], hidden[1:])
        if self.variant.folds:
            logits = folded_logits(
                self.model.head, cond, state.masked, uncond_hidden=uncond, guidance_scale=GUIDANCE_SCALE
            )
        else:
            both = self.model.head(hidden)
            logits = Logits(both[-1:], None, 1.0) if uncond is None else Logits(both[1:], both[:1], GUIDANCE_SCALE)
        return take_step(rule, logits, state)

    def _stock(self, hidden: Tensor, tokens: Tensor) -> object:
        from diffusers.schedulers.scheduling_amused import AmusedScheduler

        # as a pipeline has them: (B, V, H, W), codes side by side in memory
        logits = self.model.head(hidden).transpose(1, 2).unflatten(2, (self.side, self.side))
        uncond, cond = logits.chunk(2)
        guided = uncond + GUIDANCE_SCALE * (cond - uncond)
        scheduler = AmusedScheduler(mask_token_id=self.model.mask_token_id)
        scheduler.set_timesteps(NUM_STEPS)
        generator = torch.Generator().manual_seed(0)
        return scheduler.step(guided, scheduler.timesteps[NUM_STEPS // 2], tokens, generator=generator)


def measure(variant: Variant, scale: str, threads: int, checkout: Path | None) -> dict[str, Any]:
    """Time one variant in this process: seconds of the body by halves, of the tail by halves and share; memory."""
    torch.set_num_threads(threads)
    sizes = SCALES[scale]
    side = 2 * math.isqrt(sizes.num_image_tokens)
    # PyTorch's bfloat16 without instructions for it takes minutes for a forward pass
    is_slow = variant.arithmetic == "bf16" and not multiplies_bfloat16()
    repeats, warm_ups = (1, 0) if is_slow else (1, 1)
    # PyTorch's own computes all logits, whatever is masked
    shares = SHARES if variant.ours else SHARES[1:2]
    with torch.inference_mode():
        steps = Steps(variant, build(variant, sizes, checkout), side)
        # the peak so far is the construction's
        Path("/proc/self/clear_refs").write_text("5")
        found: dict[str, Any] = {"body": {}, "tail": {}}
        for num_halves in (2, 1) if variant.interval else (2,):
            seconds = []
            for turn in range(warm_ups + repeats):
                hidden, elapsed = timed(partial(steps.body, num_halves))
                if turn >= warm_ups:
                    seconds.append(elapsed)
                warm_ups = 0
            if not hidden.isfinite().all():
                raise AssertionError(f"{variant.name}: hidden states are not finite")
            found["body"][num_halves] = statistics.median(seconds)
            for share in shares:
                tail = steps.tail(hidden, share)
                if not is_slow:
                    tail()
                found["tail"][f"{num_halves} {share}"] = statistics.median(
                    timed(tail)[1] for _ in range(1 if is_slow else 3)
                )
    status = Path("/proc/self/status").read_text()
    found["peak_bytes"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    model = steps.model
    head_bytes = model.head.packed.nbytes if isinstance(model.head, Int4Linear) else weight_bytes(model.head)
    found["weight_bytes"] = weight_bytes(model.network) + head_bytes
    return found


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def shares_of_steps() -> list[float]:
    """The masked share before each step, by the cosine schedule."""
    return [math.cos(math.pi / 2 * k / NUM_STEPS) for k in range(NUM_STEPS)]


def halves_of_steps(variant: Variant) -> list[int]:
    """How many halves of guidance each step computes."""
    start, end = INTERVAL if variant.interval else (0.0, 1.0)
    return [2 if start <= k / NUM_STEPS < end else 1 for k in range(NUM_STEPS)]


def seconds_of_image(variant: Variant, measured: dict[str, Any]) -> float:
    """The steps' seconds, added up."""
    total = 0.0
    for share, halves in zip(shares_of_steps(), halves_of_steps(variant), strict=True):
        known = [at for at in sorted(SHARES) if f"{halves} {at}" in measured["tail"]]
        tail = [measured["tail"][f"{halves} {at}"] for at in known]
        total += measured["body"][str(halves)] + float(np.interp(share, known, tail))
    return total


def operations_of_image(variant: Variant, sizes: Sizes) -> float:
    """Multiplications and additions of all matrix products and attentions of an image, counted without computing."""
    side = 2 * math.isqrt(sizes.num_image_tokens)
    with torch.device("meta"), torch.inference_mode():
        model = SuiteModel(sizes, lambda k, n: nn.Linear(k, n, bias=False), torch.float32)
        if variant.merge:
            merging = TokenMerging(variant.merge, single_stream=variant.single_stream)
            MergedBlocks(model.network, merging, layouts=model.layouts)
        bodies = {}
        for halves in (1, 2):
            text = torch.empty(halves, sizes.num_text_tokens, sizes.width)
            inputs = text, torch.empty(halves, sizes.width)
            with FlopCounterMode(display=False) as counter:
                model.hidden(torch.zeros(halves, side, side, dtype=torch.int64), inputs)
            bodies[halves] = counter.get_total_flops()
    row = 2 * sizes.width * sizes.codebook_size
    total = 0.0
    for share, halves in zip(shares_of_steps(), halves_of_steps(variant), strict=True):
        rows = share * side**2 if variant.folds else halves * side**2
        total += bodies[halves] + rows * row
    return total


@dataclass(frozen=True)
class Row:
    """A variant's medians, and what they are of PyTorch's."""

    variant: str
    seconds: float
    times_fp32: float
    times_bf16: float
    body_seconds: float
    body_seconds_one_half: float
    tail_seconds: float
    """At the masked share 0.64."""
    petaflop: float
    weight_bytes: int
    weights_of_bf16: float
    peak_bytes: int
    peak_of_bf16: float
    missed: str


def rows(measured: dict[str, list[dict[str, Any]]], sizes: Sizes) -> list[Row]:
    """The table: medians over the rounds."""

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, measured[name]))

    seconds = {name: median(name, partial(seconds_of_image, BY_NAME[name])) for name in measured}
    table = []
    for name in measured:
        variant = BY_NAME[name]
        weights, peak = (median(name, lambda m, key=key: m[key]) for key in ("weight_bytes", "peak_bytes"))  # type: ignore[misc]
        of_bf16 = [median("PyTorch bf16", lambda m, key=key: m[key]) for key in ("weight_bytes", "peak_bytes")]  # type: ignore[misc]
        missed = []
        if name == ALL:
            peer, wanted = TARGETS[multiplies_bfloat16()]
            missed += [f">= {wanted}x {peer}"] if seconds[peer] / seconds[name] < wanted else []
            missed += [f"weights <= {WEIGHTS_TARGET}"] if weights / of_bf16[0] > WEIGHTS_TARGET else []
            missed += [f"peak <= {PEAK_TARGET}"] if peak / of_bf16[1] > PEAK_TARGET else []
        table.append(
            Row(
                variant=name,
                seconds=seconds[name],
                times_fp32=seconds["PyTorch fp32"] / seconds[name],
                times_bf16=seconds["PyTorch bf16"] / seconds[name],
                body_seconds=median(name, lambda m: m["body"]["2"]),
                body_seconds_one_half=median(name, lambda m: m["body"]["1"]) if variant.interval else math.nan,
                tail_seconds=median(name, lambda m: m["tail"][f"2 {SHARES[1]}"]),
                petaflop=operations_of_image(variant, sizes) / 1e15,
                weight_bytes=int(weights),
                weights_of_bf16=weights / of_bf16[0],
                peak_bytes=int(peak),
                peak_of_bf16=peak / of_bf16[1],
                missed=", ".join(missed),
            )
        )
    return table


def draw(table: list[Row], path: Path, title: str) -> None:
    """A picture of the seconds of each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.42 * len(table)))
    axes = figure.subplots()
    colours = ["C7" if row.variant.startswith("PyTorch") else "C0" for row in table]
    axes.barh([row.variant for row in table], [row.seconds for row in table], color=colours)
    # PyTorch's bfloat16 without instructions for it would push all others to the left: its bar is cut off
    others = [row.seconds for row in table if row.variant != "PyTorch bf16"]
    limit = 1.5 * max(others)
    for i, row in enumerate(table):
        text = f"{row.seconds:,.0f} s, {row.times_fp32:.1f}x PyTorch fp32"
        if row.seconds > limit:
            axes.text(limit, i, f"{text} \u2192 ", va="center", ha="right", fontsize=8, color="white")
        else:
            axes.text(row.seconds, i, f" {text}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.set_xlabel("seconds for an image of 1024 x 1024 pixels in 64 steps, less is better")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=130)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, each variant in a process of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[str, typer.Option(help="full, or tiny for a try.")] = "full",
    checkout: Annotated[Path | None, typer.Option(help="Of Meissonic: time its own transformer.")] = None,
    only: Annotated[str, typer.Option(help="Variants by name, separated by commas; beside PyTorch's two.")] = "",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the results into this PNG file.")] = None,
    variant: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time a whole image, one part of ours after the other; exit with status 1 where a target is missed."""
    if scale not in SCALES:
        raise typer.BadParameter(f"expected one of {tuple(SCALES)}, got {scale!r}", param_hint="--scale")
    if variant:
        print(json.dumps(measure(BY_NAME[variant], scale, threads, checkout)))
        return
    chosen = [name for name in only.split(",") if name]
    unknown = [name for name in chosen if name not in BY_NAME]
    if unknown:
        raise typer.BadParameter(f"expected names of {tuple(BY_NAME)}, got {unknown[0]!r}", param_hint="--only")
    for option, path in (("--csv", csv_file), ("--picture", picture)):
        if path is not None:
            try:
                check_writable(option, path)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
    names = [name for name in BY_NAME if not chosen or name in chosen or name.startswith("PyTorch")]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name, _ in in_turn(measured, turn):
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "mgt_benchmarks.image", "--variant", name, "--scale", scale]
            command += ["--threads", str(threads), *(["--checkout", str(checkout)] if checkout else [])]
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
            ).stdout
            measured[name].append(json.loads(output.splitlines()[-1]))
    table = rows(measured, SCALES[scale])
    info = mgt_kernels.info()
    conditions = f"isa {info['isa']}, {threads} threads, {rounds} rounds, torch {info['torch']}"
    print(f"{'Meissonic checkout' if checkout else 'the suite model'}, random weights, scale {scale}; {conditions}")
    shown = Table("variant", "s / image", "x fp32", "x bf16", "PFLOP", "weights of bf16", "peak of bf16", "missed")
    for r in table:
        shown.add_row(
            r.variant, f"{r.seconds:.1f}", f"{r.times_fp32:.2f}", f"{r.times_bf16:.2f}", f"{r.petaflop:.3f}",
            f"{r.weights_of_bf16:.2f}", f"{r.peak_of_bf16:.2f}", r.missed,
        )  # fmt: skip
    Console(width=130).print(shown)
    if csv_file is not None:
        write_csv(csv_file, list(asdict(table[0])), map(asdict, table))
    if picture is not None:
        draw(table, picture, conditions)
    if scale == "full" and any(r.missed for r in table):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
