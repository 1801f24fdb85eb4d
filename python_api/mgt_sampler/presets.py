"""The published samplers as constants: what each project's own loop does, with its defaults.

    generate(model, presets.AMUSED, labels=labels)
    generate(model, presets.preset("show-o", quirks=True), labels=labels)

Guidance scales are in the form u + s (c - u), so that a project's w in (1 + w) c - w u is s = 1 + w. Where a project's
code does what its authors can't have meant, the constant does what they meant, and `preset(name, quirks=True)` what it
does to the letter. Draws are functions of the seed, as everywhere here: others than the project's, from the same law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgt_kernels.ops import Sampled

from .counts import (
    Known,
    LinearTime,
    OfFirstSample,
    Ratio,
    ShiftedTime,
    arccos_known,
    arccos_known_from_0,
    cosine_before,
    even_split,
)
from .draw import Draw, ScoredAt
from .order import HaltonOrder
from .selection import Commit, MaskLowest
from .state import Logits, State
from .step import Rule
from .techniques import Differential, ZSampling


def falling(start: float, k: int, num_inference_steps: int) -> float:
    """start (1 - (k + 1) / T): a temperature that is 0 at the last step."""
    return start * (1 - (k + 1) / num_inference_steps)


def falling_before(start: float, k: int, num_inference_steps: int) -> float:
    """start (1 - k / (T - 1)): a temperature that begins at start."""
    return start * (1 - k / max(num_inference_steps - 1, 1))


def rising_guidance(w: float, k: int, num_inference_steps: int) -> float:
    """1 + w k / (T - 1): c + w k / (T - 1) (c - u)."""
    return 1 + w * k / max(num_inference_steps - 1, 1)


def maskgen_guidance(k: int, num_inference_steps: int) -> float:
    """2 + 11 (1 - cos(pi (k + 1) / T)) / 2: c + s (c - u) with s from 1 to 12."""
    return 2 + 11 * (1 - math.cos(math.pi * (k + 1) / num_inference_steps)) / 2


def maskbit_guidance(k: int, num_inference_steps: int) -> float:
    """1 + 7.1 (1 - cos(pi (k / T)^3)) / 2: c + s (c - u) with s from 0 to 7.1."""
    return 1 + 7.1 * (1 - math.cos(math.pi * (k / num_inference_steps) ** 3)) / 2


def _sharpness(k: int, num_inference_steps: int) -> float:
    return 0.5 + 0.8 * (1 - (k + 1) / num_inference_steps)


def maskgen_temperature(k: int, num_inference_steps: int) -> float:
    """The logits are divided by 0.5 + 0.8 (1 - (k + 1) / T), and get noise of 1.5 (1 - (k + 1) / T)."""
    return _sharpness(k, num_inference_steps) * falling(1.5, k, num_inference_steps)


def maskgen_score(sampled: Sampled, state: State) -> Tensor:
    """The guided logit of the drawn token, divided by the same."""
    assert sampled.logit is not None
    return sampled.logit / _sharpness(state.step, state.num_inference_steps)


maskgen_score.statistics = ("logit",)  # type: ignore[attr-defined]


def compounded_temperature(start: float, k: int, num_inference_steps: int) -> float:
    """Start prod_{j <= k} (1 - (j + 1) / T): a quirk of open-muse, Show-o and MMaDA.

    Their loop overwrites the temperature with the annealed one, from which the next step's is made.
    """
    value = start
    for j in range(k + 1):
        value *= 1 - (j + 1) / num_inference_steps
    return value


@dataclass(frozen=True)
class TruncatedNoise:
    """Gumbel noise of uniform numbers in the logits' own dtype: a quirk of Lumina-DiMOO.

    The largest number below 1 of bfloat16 is 0.996, so no noise is above 5.53, and rare tokens are hardly drawn. The
    numbers are PyTorch's, of a generator for each sample and draw.
    """

    temperature: float = 1.0

    def __call__(self, logits: Logits | None, state: State, statistics: tuple[str, ...] = ()) -> Sampled:
        """Draw; logprob is that of temperature 1."""
        if statistics or logits is None:
            raise ValueError("score: truncated noise knows the logprob alone, and takes no skipped steps")
        guided, uncond_logits, scale, _ = logits
        if uncond_logits is not None:
            guided = uncond_logits + scale * (guided - uncond_logits)
        generators = [
            torch.Generator(guided.device).manual_seed((int(seed) * 1_000_003 + int(state.num_draws)) % 2**63)
            for seed in state.seed.tolist()
        ]
        uniform = torch.stack([torch.empty_like(guided[0]).uniform_(generator=generator) for generator in generators])
        noisy = guided / self.temperature - torch.log(-torch.log(uniform + 1e-20) + 1e-20)
        drawn = torch.where(state.masked, noisy.argmax(-1), state.tokens)
        inside = drawn.clamp(max=guided.shape[-1] - 1)
        logprob = guided.float().log_softmax(-1).gather(-1, inside[..., None])[..., 0]
        return Sampled(drawn, torch.where(state.masked, logprob, torch.inf))


@dataclass(frozen=True)
class CodebookPenalty:
    """max_j log p_j less `penalty` for each codebook before a position's own: OmniVoice's order.

    Attributes:
        num_codebooks: C; positions are codebook by codebook, N / C of each.
        penalty: nats.
    """

    num_codebooks: int = 8
    penalty: float = 5.0
    statistics = ("max_logprob",)

    def __call__(self, sampled: Sampled, state: State) -> Tensor:
        """The score of each position, (B, N)."""
        assert sampled.max_logprob is not None
        each = state.tokens.shape[1] // self.num_codebooks
        codebook = torch.arange(state.tokens.shape[1], device=state.tokens.device) // each
        return sampled.max_logprob - self.penalty * codebook


AMUSED = Rule(guidance_scale=10.0, num_inference_steps=12)
"""aMUSEd (arXiv 2401.01808), diffusers' AmusedPipeline."""

AMUSED_INPAINT = AMUSED.but(select=MaskLowest(Ratio("linear")))
"""aMUSEd's AmusedInpaintPipeline, whose mask schedule is linear."""

MEISSONIC = AMUSED.but(guidance_scale=9.0, num_inference_steps=64)
"""Meissonic (arXiv 2410.08261), viiika/Meissonic."""

BAG_OF_DESIGN_CHOICES = MEISSONIC.but(
    draw=Draw(noise_scale="abs_cos:2", differential=Differential(0.75)), revisit=ZSampling()
)
"""arXiv 2411.10781, all of its techniques on Meissonic."""

MUDDIT = MEISSONIC
"""Muddit (arXiv 2505.23606), M-E-AGI-Lab/Muddit: Meissonic's loop."""

OPEN_MUSE = AMUSED.but(num_inference_steps=16)
"""open-muse, huggingface/open-muse, MaskGiTUViT_v2.generate2."""

MASKGIT = Rule(select=MaskLowest(Ratio("cosine"), partial(falling, 4.5)), num_inference_steps=12)
"""MaskGIT (arXiv 2202.04200), google-research/maskgit, parallel_decode.decode."""

MASKGIT_PYTORCH = MASKGIT.but(select=MaskLowest(Ratio(at_least=0), partial(falling, 4.5)), num_inference_steps=11)
"""dome272/MaskGIT-pytorch, VQGANTransformer.sample_good."""

HALTON_CONFIDENCE = Rule(
    select=MaskLowest(Known(arccos_known_from_0), partial(falling_before, 4.5)),
    guidance_scale=partial(rising_guidance, 3.0),
    num_inference_steps=12,
)
"""Halton-MaskGIT's ConfidenceSampler, valeoai/Halton-MaskGIT."""

HALTON = Rule(
    score=HaltonOrder(roll=False),
    select=MaskLowest(Known(arccos_known), 0.0),
    guidance_scale=5.0,
    num_inference_steps=32,
)
"""Halton-MaskGIT (arXiv 2503.17076), HaltonSampler."""

MUSE = Rule(
    draw=ScoredAt(Draw(temperature=partial(falling, 1.0), top_k=0.1)),
    select=MaskLowest(Ratio(cosine_before, at_a_time=0), 0.0),
    guidance_scale=3.0,
    num_inference_steps=18,
)
"""Muse (arXiv 2301.00704), lucidrains' muse-maskgit-pytorch: drawn from the likeliest tenth."""

TITOK = Rule(
    draw=Draw(temperature=partial(falling, 4.5)),
    score="logit",
    select=MaskLowest(Ratio("arccos"), partial(falling, 4.5)),
    guidance_scale=4.0,
    num_inference_steps=8,
)
"""TiTok (arXiv 2406.07550), bytedance/1d-tokenizer, ImageBert.generate."""

MASKGEN = Rule(
    draw=Draw(temperature=maskgen_temperature),
    score=maskgen_score,
    select=MaskLowest(Ratio("arccos"), partial(falling, 1.5)),
    guidance_scale=maskgen_guidance,
    num_inference_steps=16,
)
"""MaskGen (arXiv 2501.07730), bytedance/1d-tokenizer, MaskGen_VQ.generate."""

MASKBIT = Rule(
    select=MaskLowest(Ratio("arccos"), partial(falling, 7.8)), guidance_scale=maskbit_guidance, num_inference_steps=64
)
"""MaskBit (arXiv 2409.16211), markweberdev/maskbit, sample, with 14 bits; positions are N groups of bits."""

SHOW_O = Rule(select=MaskLowest(Ratio("cosine"), partial(falling, 1.0)), guidance_scale=6.0, num_inference_steps=50)
"""Show-o (arXiv 2408.12528), showlab/Show-o, t2i_generate."""

MMADA = SHOW_O.but(guidance_scale=4.5, num_inference_steps=15)
"""MMaDA (arXiv 2505.15809), Gen-Verse/MMaDA, t2i_generate."""

LUMINA_DIMOO = Rule(select=MaskLowest(Ratio("cosine", at_a_time=0), 1.0), guidance_scale=5.0, num_inference_steps=64)
"""Lumina-DiMOO (arXiv 2510.06308), Alpha-VLLM/Lumina-DiMOO, generate_image."""

LLADA = Rule(draw=ScoredAt(Draw(temperature=0.0)), select=MaskLowest(even_split, 0.0), num_inference_steps=128)
"""LLaDA (arXiv 2502.09992), ML-GSAI/LLaDA, generate; T is that of a block."""

DREAM = Rule(draw=Draw(temperature=0.0), score="entropy", select=MaskLowest(LinearTime(), 0.0), num_inference_steps=512)
"""Dream (arXiv 2508.15487), diffusion_generate with alg="entropy"; its logits are those of the position before."""

LLADA2 = Rule(draw=Draw(temperature=0.0), select=Commit(even_split, threshold=0.95), num_inference_steps=32)
"""LLaDA2 (arXiv 2512.15745), diffusers' LLaDA2Pipeline; blocks of 32."""

SDAR = LLADA2.but(select=Commit(even_split, threshold=0.85), num_inference_steps=4)
"""SDAR (arXiv 2510.06303), block_diffusion_generate with low_confidence_dynamic; blocks of 4."""

FAST_DLLM = LLADA.but(select=Commit(threshold=0.9), num_inference_steps=32)
"""Fast-dLLM (arXiv 2505.22618), by threshold; blocks of 32."""

OMNIVOICE = Rule(
    draw=Draw(temperature=0.0),
    score=CodebookPenalty(8, 5.0),
    select=MaskLowest(ShiftedTime(0.1), 5.0),
    guidance_scale=3.0,
    num_inference_steps=32,
)
"""OmniVoice, k2-fsa/OmniVoice: 8 codebooks, each after the one before."""

PRESETS = {
    "amused": AMUSED,
    "amused-inpaint": AMUSED_INPAINT,
    "meissonic": MEISSONIC,
    "bag-of-design-choices": BAG_OF_DESIGN_CHOICES,
    "muddit": MUDDIT,
    "open-muse": OPEN_MUSE,
    "maskgit": MASKGIT,
    "maskgit-pytorch": MASKGIT_PYTORCH,
    "halton-confidence": HALTON_CONFIDENCE,
    "halton": HALTON,
    "muse": MUSE,
    "titok": TITOK,
    "maskgen": MASKGEN,
    "maskbit": MASKBIT,
    "show-o": SHOW_O,
    "mmada": MMADA,
    "lumina-dimoo": LUMINA_DIMOO,
    "llada": LLADA,
    "dream": DREAM,
    "llada2": LLADA2,
    "sdar": SDAR,
    "fast-dllm": FAST_DLLM,
    "omnivoice": OMNIVOICE,
}

# what a project's code does to the letter, where its authors can't have meant it
_QUIRKS: dict[str, dict[str, Any]] = {
    "bag-of-design-choices": {
        "draw": Draw(noise_scale="abs_cos:2", differential=Differential(0.75, "official", aliased_history=True)),
        "revisit": ZSampling(variant="official"),
    },
    "open-muse": {"select": MaskLowest(Ratio("cosine"), partial(compounded_temperature, 1.0))},
    "show-o": {"select": MaskLowest(Ratio("cosine"), partial(compounded_temperature, 1.0))},
    "mmada": {"select": MaskLowest(Ratio("cosine"), partial(compounded_temperature, 1.0))},
    "titok": {"select": MaskLowest(OfFirstSample(Ratio("arccos")), partial(falling, 4.5))},
    "maskgen": {"select": MaskLowest(OfFirstSample(Ratio("arccos")), partial(falling, 1.5))},
    "maskbit": {"select": MaskLowest(OfFirstSample(Ratio("arccos")), partial(falling, 7.8))},
    "lumina-dimoo": {"draw": TruncatedNoise()},
}


def preset(name: str, *, quirks: bool = False) -> Rule:
    """A published sampler by name.

    Args:
        name: of PRESETS.
        quirks: as the project's code has it to the letter, where that is not what its authors can have meant: the
            compounded temperature of open-muse, Show-o and MMaDA; the first sample's count in TiTok, MaskGen and
            MaskBit; the truncated noise of Lumina-DiMOO; the aliased history and the reversed choices of
            arXiv 2411.10781's code. The others have none.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name].but(**_QUIRKS.get(name, {})) if quirks else PRESETS[name]
