"""Which cases there are: the quick ones, the standard ones with their targets and curves, and every combination."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch

from mgt_kernels import cpu

from .case import Case, Target
from .layers import linear_case
from .merging_cases import merging_case
from .models import (
    AMUSED_256,
    DIFFUSION_GEMMA,
    DREAM,
    LAYERS,
    LLADA2,
    MASKGIT_256,
    MEISSONIC_1024,
    MEISSONIC_DOWN,
    MEISSONIC_UP,
    MODELS,
    OMNIVOICE,
    SDAR_4,
    SDAR_8,
    Layer,
    Model,
)  # fmt: skip
from .samplers import (
    Truncation,
    block_case,
    dream_case,
    entropy_bound_case,
    omnivoice_case,
    truncated_case,
)  # fmt: skip
from .steps import (
    alternation_case,
    commit_case,
    differential_case,
    gpu_absent,
    kernels,
    remask_case,
    sampling_case,
    scheduler_case,
    statistics_case,
    z_sampling_case,
)  # fmt: skip

Scale = Literal["quick", "standard", "full"]
CHAINS = ("pytorch", "torch.compile", "diffusers")


def cases_of(scale: Scale, threads: int) -> list[Case]:
    """Return the cases of a scale, in their order."""
    return list({"quick": quick_cases, "standard": standard_cases, "full": full_cases}[scale](threads))


def quick_cases(threads: int) -> Iterator[Case]:
    """A few minutes: every op once, two whole steps against all peers, short curves, the pools."""
    yield sampling_case(AMUSED_256, peers=CHAINS, threads=threads)
    yield sampling_case(MASKGIT_256, peers=CHAINS, threads=threads)
    yield sampling_case(MEISSONIC_1024, threads=threads)
    yield sampling_case(MEISSONIC_1024, dtype=torch.bfloat16, peers=(), against=_fp32(), threads=threads)
    for model in MODELS:
        if model.name.startswith(("LLaDA", "Show-o 256")):
            yield sampling_case(model, op="sample_tokens", threads=threads)
    yield sampling_case(AMUSED_256, op="mask_by_confidence", threads=threads)
    yield commit_case(AMUSED_256, threads=threads)
    for op in ("match_tokens", "merge_tokens"):
        yield merging_case(op, threads=threads)
    yield statistics_case(AMUSED_256, threads=threads)
    yield from sampler_cases(threads, small=True)
    yield differential_case(AMUSED_256, threads=threads)
    yield remask_case(AMUSED_256, threads=threads)
    yield from alternations(threads)
    yield from curves(threads, (64, 1024), (1024, 16384), (1, 4), (0.1, 1.0))
    # last, as they change the allocator
    yield linear_case(MEISSONIC_UP, threads=threads, others=True)
    yield linear_case(MEISSONIC_UP, op="w4a16_linear", threads=threads)


def standard_cases(threads: int) -> Iterator[Case]:
    """What the README shows, with the target of each; every model's step; curves."""
    big = partial(sampling_case, MEISSONIC_1024, threads=threads)
    yield big(guidance_scale=1.0, peers=CHAINS, targets=(Target(50, "diffusers"),))
    yield big(peers=CHAINS, targets=(Target(65, "diffusers"),))
    yield big(noise_scale=1.0, peers=CHAINS, targets=(Target(40, "diffusers"),))
    yield big(dtype=torch.bfloat16, peers=(), against=_fp32(), targets=(Target(1.4, "ours fp32"),))
    for share in (0.5, 0.25, 0.1):
        # proportional to the masked share, but for what a call costs at least
        yield big(
            masked_share=share, peers=(), against={"ours all masked": 9.0},
            targets=(Target(0.7 / share, "ours all masked"),),
        )  # fmt: skip
    yield differential_case(threads=threads, targets=(Target(25, "pytorch"),))
    yield remask_case(threads=threads, targets=(Target(1 / 1.5, "one read"),))
    yield z_sampling_case(threads=threads)
    for isa in kernels("sample_tokens")[1:]:
        targets = (Target(1 / 2.5, "ours"),) if isa == "avx2" else ()
        yield big(guidance_scale=1.0, backend=isa, peers=(), against={"ours": 1.0}, targets=targets)
    yield scheduler_case(threads=threads)
    for model in MODELS:
        if model is not MEISSONIC_1024:
            yield sampling_case(model, peers=CHAINS, threads=threads)
    yield sampling_case(Model("", 256, 1024, 9.0), peers=CHAINS, targets=(Target(1.0),), threads=threads)
    yield sampling_case(MEISSONIC_1024, op="mask_by_confidence", peers=CHAINS[:2], threads=threads)
    yield from alternations(threads)
    yield from curves(
        threads, (16, 64, 256, 1024, 4096), (256, 1024, 4096, 16384, 65536, 131072), (1, 2, 4, 8), (0.01, 0.1, 0.3, 1.0)
    )
    # last, as they change the allocator
    yield from linear_cases(threads)


def full_cases(threads: int) -> Iterator[Case]:
    """Every op x model x dtype x layout x noise x backend x threads, each against PyTorch's chain.

    Without the scalar layers, a call of which takes seconds. Triton's kernels where they run: `gpu_absent`.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    counts = sorted({1, threads})
    on_gpu = [] if gpu_absent() else ["triton"]
    for model, dtype, layout, count in product(MODELS, dtypes, ("token-major", "position-major"), counts):
        if layout == "position-major" and model.vocab_size is not None:
            # codes that are a part of the columns are neighbours
            continue
        given: dict[str, Any] = {"dtype": dtype, "layout": layout, "threads": count}
        for backend in [*kernels("sample_tokens"), *on_gpu]:
            # PyTorch's time does not depend on our instruction set
            peers = ("pytorch",) if backend in ("triton", cpu.kernel_isa("sample_tokens")) else ()
            for noise_scale in (0.0, 1.0):
                yield sampling_case(
                    model, op="sample_tokens", noise_scale=noise_scale, peers=peers, backend=backend, **given
                )
            yield remask_case(model, backend=backend, **given)
        for backend in [*kernels("differential_sample"), *on_gpu]:
            yield differential_case(model, backend=backend, **given)
    for model, count in product(MODELS, counts):
        for backend in [*kernels("mask_by_confidence"), *on_gpu]:
            # reads no logits
            yield sampling_case(model, op="mask_by_confidence", dtype=dtypes[0], backend=backend, threads=count)
        for backend in [*kernels("sample_tokens"), *on_gpu]:
            # the draw is a peer that is to stay near
            best = backend == kernels("sample_tokens")[0] and model.name == MEISSONIC_1024.name
            targets = (Target(60, "pytorch"), Target(0.8, "plain draw")) if best else ()
            yield statistics_case(model, backend=backend, threads=count, targets=targets)
        for backend in [*kernels("commit_tokens"), *on_gpu]:
            yield commit_case(model, backend=backend, threads=count)
    for backend in ["auto", *on_gpu]:
        yield from sampler_cases(threads, backend=backend)
    for op, dtype, count in product(("match_tokens", "merge_tokens"), dtypes, counts):
        for backend in [*kernels(op), *on_gpu]:
            yield merging_case(op, dtype=dtype, backend=backend, threads=count)
    for layer, dtype, group_size, count in product(LAYERS, dtypes[:2], (128, 32), counts):
        for op in ("w4a8_linear", "w4a16_linear"):
            for backend in [*kernels(op), *on_gpu]:
                if backend != "scalar":
                    yield linear_case(layer, op=op, dtype=dtype, group_size=group_size, backend=backend, threads=count)


def sampler_cases(threads: int, *, backend: str = "auto", small: bool = False) -> Iterator[Case]:
    """Truncated draws, and the steps of the samplers of text and speech, with their targets.

    Small ones have a sixteenth of the tokens, few positions, and no targets.
    """

    def of(model: Model) -> Model:
        if not small:
            return model
        return replace(model, num_positions=min(16, model.num_positions), codebook_size=model.codebook_size // 16)

    def held_to(*targets: Target) -> dict[str, Any]:
        return {"targets": () if small or backend != "auto" else targets, "backend": backend, "threads": threads}

    # the draw of all tokens is a peer that is to stay near
    near, chain = Target(0.5, "plain draw"), Target(40, "pytorch")
    for model, truncations in (
        (LLADA2, (Truncation(0.7, 50), Truncation(0.7, None, 0.95), Truncation(0.7, 50, 0.95),
                  Truncation(0.7, min_p=0.05))),
        (DREAM, (Truncation(1.0, 50), Truncation(1.0, None, 0.95))),
    ):  # fmt: skip
        for truncation in truncations:
            yield truncated_case(of(model), truncation, others=not small, **held_to(near, chain))
    for softcap in (30.0, None):
        yield entropy_bound_case(of(DIFFUSION_GEMMA), softcap=softcap, **held_to(Target(50, "diffusers")))
    for truncation in (Truncation(0.7), Truncation(0.7, 50, 0.95)):
        yield block_case(of(LLADA2), truncation, **held_to(near, Target(40, "diffusers")))
    for model in (SDAR_4, SDAR_8):
        yield block_case(
            of(model), Truncation(1.0, 50, 0.95), threshold=0.85, replace_above=None, scheduler=False,
            **held_to(near, chain),
        )  # fmt: skip
    for truncation in (Truncation(0.2, None, 0.95), Truncation(0.2, 50)):
        yield dream_case(of(DREAM), truncation, **held_to(near, chain))
    yield omnivoice_case(of(OMNIVOICE) if not small else replace(OMNIVOICE, num_positions=25), **held_to())


def alternations(threads: int) -> Iterator[Case]:
    """Both sides of what alternating PyTorch's ops with ours costs."""
    for ours in (True, False):
        yield alternation_case(ours=ours, threads=threads)


def curves(
    threads: int,
    positions: tuple[int, ...],
    codes: tuple[int, ...],
    batches: tuple[int, ...],
    shares: tuple[float, ...],
) -> Iterator[Case]:
    """How the cost of a step grows with N, V, B and the masked share."""
    point = partial(sampling_case, threads=threads)
    for n in positions:
        yield point(Model("over N", n, 8192, 9.0), curve=("N", n))
    for v in codes:
        yield point(Model("over V", 256, v, 9.0), curve=("V", v))
    for batch in batches:
        yield point(Model("over B", 256, 8192, 9.0), batch=batch, curve=("B", batch))
    for share in shares:
        yield point(Model("over masked share", 1024, 8192, 9.0), masked_share=share, curve=("masked share", share))


def linear_cases(threads: int) -> Iterator[Case]:
    """The int4 layers at Meissonic's sizes, on every instruction set with a kernel of its own, and over the rows."""
    linear = partial(linear_case, threads=threads)
    for op, layer, figure in (
        ("w4a8_linear", MEISSONIC_UP, 4.0),
        ("w4a8_linear", MEISSONIC_DOWN, 3.9),
        ("w4a16_linear", MEISSONIC_UP, 2.2),
        ("w4a16_linear", MEISSONIC_DOWN, 2.2),
    ):
        yield linear(layer, op=op, others=op == "w4a8_linear", targets=(Target(figure, "torch fp32"),))
    for layer in (MEISSONIC_UP, MEISSONIC_DOWN):
        yield linear(layer, group_size=32, others=True, targets=(Target(3.0, "torch fp32"),))
    for isa in kernels("w4a8_linear")[1:]:
        if isa != "scalar":
            # the 4.0 of a processor whose best is VNNI is above its limit on one where fp32 is faster
            floor = {"avx2": 2.2, "avx512_vnni": 2.5}.get(isa)
            yield linear(MEISSONIC_UP, backend=isa, targets=(Target(floor, "torch fp32"),) if floor else ())
    for num_rows in (1, 4, 16, 64, 256, 4096):
        layer = Layer("over M", num_rows, MEISSONIC_UP.num_inputs, MEISSONIC_UP.num_outputs)
        yield linear(layer, targets=(Target(1.0, "torch fp32"),), curve=("M", num_rows))


def _fp32() -> dict[str, float]:
    return {"ours fp32": MEISSONIC_1024.guidance_scale or 1.0}
