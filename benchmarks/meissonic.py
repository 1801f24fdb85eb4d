"""`python -m mgt_benchmarks.meissonic`: a guided forward of a transformer of Meissonic's size in several arithmetics.

The weights are random and the module is our own, with the sizes that Meissonic (arXiv 2410.08261) publishes: 14 blocks
with a stream each for image and text, 28 blocks with one stream, width 1024, 8 heads, 1024 image tokens and 77 of text.
Every variant runs in a process of its own, so that memory and thread pools are its own. The processes keep freed
memory: else fresh pages take a part of each forward that differs from run to run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import mgt_kernels
from mgt_kernels.packing import packed_bytes
from mgt_sampler.files import check_writable, write_csv

from .case import in_turn
from .kept_memory import ENVIRONMENT

VARIANTS = ("fp32", "bf16", "w8a8", "w4a16", "scq", "w4a8")
# this share of variant scq's layers, spread evenly: weights are random, so no ranking means anything
A8_SHARE = 1 / 3
# (variant, peer): how many times faster, at least
SPEED_TARGETS = {("w4a8", "bf16"): 1.6, ("w4a8", "fp32"): 3.2, ("scq", "bf16"): 1.1, ("scq", "fp32"): 2.2}
# the most that weights and peak memory may be, as shares of variant bf16's
WEIGHTS_TARGET, PEAK_TARGET = 0.30, 0.45

MakeLinear = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Sizes:
    """Of the transformer and its input."""

    width: int = 1024
    num_heads: int = 8
    num_double_blocks: int = 14
    num_single_blocks: int = 28
    num_image_tokens: int = 1024
    num_text_tokens: int = 77
    codebook_size: int = 8192


SCALES = {
    "full": Sizes(),
    "tiny": Sizes(128, 2, 1, 2, 16, 5, 64),
}


class Int4(nn.Module):
    """A linear layer with random 4-bit weights and dynamic scales of the activations."""

    def __init__(self, num_inputs: int, num_outputs: int, a8: bool, bias: Tensor | None = None) -> None:
        super().__init__()
        self.a8, self.bias = a8, bias
        num_groups = -(-num_inputs // 128)
        w_q = torch.randint(0, 256, (num_outputs, packed_bytes(num_inputs)), dtype=torch.uint8)
        # 21.25 is the variance of 0..15: weights of variance 1 / num_inputs
        scale = torch.full((num_outputs, num_groups), (num_inputs * 21.25) ** -0.5, dtype=torch.float16)
        zero_point = torch.full((num_outputs, num_groups), 7, dtype=torch.uint8)
        self.weight = mgt_kernels.PackedInt4(w_q, scale, zero_point, (num_outputs, num_inputs), 128)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        if self.a8:
            return mgt_kernels.w4a8_linear(x, self.weight, bias=self.bias)
        return mgt_kernels.w4a16_linear(x, self.weight, self.bias)


def linear_maker(variant: str) -> MakeLinear:
    """Return what makes the layers of a variant, each directly in its final form."""
    count = 0

    def make(num_inputs: int, num_outputs: int) -> nn.Module:
        nonlocal count
        count += 1
        if variant in ("fp32", "bf16"):
            dtype = torch.float32 if variant == "fp32" else torch.bfloat16
            return nn.Linear(num_inputs, num_outputs, bias=False, dtype=dtype)
        if variant == "w8a8":
            dense = nn.Linear(num_inputs, num_outputs, bias=False)
            dense.qconfig = torch.ao.quantization.default_dynamic_qconfig  # type: ignore[assignment]
            return torch.ao.nn.quantized.dynamic.Linear.from_float(dense)
        share = {"w4a16": 0.0, "scq": A8_SHARE, "w4a8": 1.0}[variant]
        return Int4(num_inputs, num_outputs, int(count * share) > int((count - 1) * share))

    return make


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the linear layers' weights."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, Int4):
            total += layer.weight.nbytes
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel() * layer.weight.element_size()
        elif isinstance(layer, torch.ao.nn.quantized.dynamic.Linear):
            total += layer.weight().numel()
    return total


class Stream(nn.Module):
    """What each of a block's two streams owns: modulation, projections of the attention, an MLP."""

    def __init__(self, sizes: Sizes, make: MakeLinear) -> None:
        super().__init__()
        width = sizes.width
        self.modulation = make(width, 6 * width)
        self.qkv = make(width, 3 * width)
        self.attention_out = make(width, width)
        self.mlp_in = make(width, 4 * width)
        self.mlp_out = make(4 * width, width)


def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalize and modulate."""
    return functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def attend(qkv: Tensor, num_heads: int) -> Tensor:
    """Attend over all tokens, (B, L, 3 width) to (B, L, width)."""
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Image and text attend together; all else is each one's own."""

    def __init__(self, sizes: Sizes, make: MakeLinear) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.image, self.text = Stream(sizes, make), Stream(sizes, make)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Run the block."""
        streams, inputs = (self.text, self.image), (text, image)
        modulations = [s.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1) for s in streams]
        qkv = [s.qkv(normalize(x, m[0], m[1])) for s, x, m in zip(streams, inputs, modulations, strict=True)]
        # as many of the image's as come out of its layer: token merging leaves some out
        mixed = attend(torch.cat(qkv, dim=1), self.num_heads).tensor_split([text.shape[1]], dim=1)
        outputs = []
        for stream, x, m, h in zip(streams, inputs, modulations, mixed, strict=True):
            x = x + m[2] * stream.attention_out(h)
            h = stream.mlp_in(normalize(x, m[3], m[4]))
            outputs.append(x + m[5] * stream.mlp_out(functional.gelu(h, approximate="tanh")))
        return outputs[1], outputs[0]


class SingleBlock(nn.Module):
    """Attention and MLP side by side over image and text together."""

    def __init__(self, sizes: Sizes, make: MakeLinear) -> None:
        super().__init__()
        width = sizes.width
        self.num_heads = sizes.num_heads
        self.modulation = make(width, 3 * width)
        self.qkv = make(width, 3 * width)
        self.mlp_in = make(width, 4 * width)
        self.out = make(5 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Run the block."""
        scale, shift, gate = self.modulation(functional.silu(condition))[:, None].chunk(3, dim=-1)
        h = normalize(x, scale, shift)
        mlp = functional.gelu(self.mlp_in(h), approximate="tanh")
        return x + gate * self.out(torch.cat([attend(self.qkv(h), self.num_heads), mlp], dim=-1))


class Transformer(nn.Module):
    """Logits (B, image tokens, codebook) of random weights."""

    def __init__(self, sizes: Sizes, make: MakeLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.codebook_size + 1, sizes.width, dtype=dtype)
        self.double_blocks = nn.ModuleList(DoubleBlock(sizes, make) for _ in range(sizes.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(sizes, make) for _ in range(sizes.num_single_blocks))
        self.head = make(sizes.width, sizes.codebook_size)

    def forward(self, tokens: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        """Predict logits of tokens (B, image tokens), text (B, text tokens, width) and condition (B, width)."""
        image = self.embedding(tokens)
        for block in self.double_blocks:
            image, text = block(image, text, condition)
        x = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            x = block(x, condition)
        return self.head(functional.layer_norm(x[:, text.shape[1] :], x.shape[-1:]))


def build(variant: str, sizes: Sizes) -> tuple[Transformer, tuple[Tensor, Tensor, Tensor]]:
    """Return the model and the inputs of a guided forward: a conditional and an unconditional sample."""
    torch.manual_seed(0)
    # PyTorch's 8-bit layers take float32 alone
    dtype = torch.float32 if variant in ("fp32", "w8a8") else torch.bfloat16
    model = Transformer(sizes, linear_maker(variant), dtype)
    tokens = torch.randint(0, sizes.codebook_size, (2, sizes.num_image_tokens))
    text = torch.randn(2, sizes.num_text_tokens, sizes.width, dtype=dtype)
    return model, (tokens, text, torch.randn(2, sizes.width, dtype=dtype))


def measure(variant: str, scale: str, threads: int) -> dict[str, float]:
    """Run one variant in this process: median seconds of a forward, bytes of weights, and peak resident bytes."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        model, inputs = build(variant, SCALES[scale])
        if not model(*inputs).isfinite().all():
            raise AssertionError(f"variant {variant}: logits are not finite")
        # the peak so far is the construction's
        Path("/proc/self/clear_refs").write_text("5")
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            model(*inputs)
            seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {"seconds": statistics.median(seconds), "weight_bytes": weight_bytes(model), "peak_bytes": peak}


@dataclass(frozen=True)
class Row:
    """A variant's medians, and what they are of fp32's and bf16's."""

    variant: str
    seconds: float
    times_fp32: float
    times_bf16: float
    weight_bytes: int
    weights_of_bf16: float
    peak_bytes: int
    peak_of_bf16: float
    met: str
    missed: str


def rows(measured: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Return medians over the rounds, and the targets that are missed."""
    medians = {v: {k: statistics.median(m[k] for m in runs) for k in runs[0]} for v, runs in measured.items()}
    table = []
    for variant, m in medians.items():
        times = {peer: medians[peer]["seconds"] / m["seconds"] for peer in ("fp32", "bf16")}
        weights, peak = (m[k] / medians["bf16"][k] for k in ("weight_bytes", "peak_bytes"))
        targets = {
            f">= {figure}x {peer}": times[peer] >= figure for (v, peer), figure in SPEED_TARGETS.items() if v == variant
        }
        if variant in ("w4a16", "scq", "w4a8"):
            targets[f"weights <= {WEIGHTS_TARGET}"] = weights <= WEIGHTS_TARGET
            targets[f"peak <= {PEAK_TARGET}"] = peak <= PEAK_TARGET
        met, missed = (", ".join(t for t, reached in targets.items() if reached == wanted) for wanted in (True, False))
        table.append(
            Row(
                variant, m["seconds"], times["fp32"], times["bf16"], int(m["weight_bytes"]), weights,
                int(m["peak_bytes"]), peak, met, missed,
            )
        )  # fmt: skip
    return table


def main(
    rounds: Annotated[
        int, typer.Option(min=1, help="Interleaved rounds; each variant runs in a process of its own.")
    ] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[str, typer.Option(help="full, or tiny for a try.")] = "full",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this file.")] = None,
    variant: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time a guided forward in every arithmetic; exit with status 1 where a target is missed."""
    if scale not in SCALES:
        raise typer.BadParameter(f"expected one of {tuple(SCALES)}, got {scale!r}", param_hint="--scale")
    if variant:
        print(json.dumps(measure(variant, scale, threads)))
        return
    if csv_file is not None:
        try:
            check_writable("--csv", csv_file)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for turn in range(rounds):
        for name, _ in in_turn(measured, turn):
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
            command = [sys.executable, "-m", "mgt_benchmarks.meissonic", "--variant", name, "--scale", scale]
            command += ["--threads", str(threads)]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
            ).stdout
            measured[name].append(json.loads(output.splitlines()[-1]))
    table = rows(measured)
    with torch.device("meta"):
        model = Transformer(SCALES[scale], lambda k, n: nn.Linear(k, n, bias=False), torch.float32)
    num_parameters = sum(p.numel() for p in model.parameters())
    isa = mgt_kernels.info()["isa"]
    print(f"{num_parameters / 1e6:.0f} million parameters, {threads} threads, {rounds} rounds, isa {isa}")
    print("scq: every third layer is W4A8; w8a8: PyTorch's layers, float32 activations")
    shown = Table(
        "variant",
        "seconds",
        "x fp32",
        "x bf16",
        "linear weights, MB",
        "of bf16",
        "peak, MB",
        "of bf16",
        "met",
        "missed",
    )
    for r in table:
        shown.add_row(
            r.variant, f"{r.seconds:.2f}", f"{r.times_fp32:.2f}", f"{r.times_bf16:.2f}", f"{r.weight_bytes / 1e6:.0f}",
            f"{r.weights_of_bf16:.2f}", f"{r.peak_bytes / 1e6:.0f}", f"{r.peak_of_bf16:.2f}", r.met, r.missed,
        )  # fmt: skip
    Console(width=120).print(shown)
    if csv_file is not None:
        write_csv(csv_file, list(asdict(table[0])), map(asdict, table))
    if scale == "full" and any(r.missed for r in table):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
