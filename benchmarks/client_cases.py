"""Cases of other packages' own calls, before `accelerate` and after it, on a network that costs nothing.

It returns logits that were made before, of the client's shape, in memory as its own network leaves them: what is timed
is the sampler alone. The package is the only peer, and without it there is no call to accelerate: a case is then absent
as a whole. Those of `mgt bench` never are, and one run has all of its tables: so these stand in a list of their own.
"""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mgt_sampler import accelerate

from .case import AbsentError, Call, Case, Contestant, Job, Setting, Target, Work
from .client_packages import muse_package, omnivoice_module
from .models import AMUSED_256, LLADA2, MEISSONIC_1024, MUSE_256, OMNIVOICE, Model
from .samplers import block_logits, require
from .steps import NUM_STEPS, masked_tokens, random_logits

# the project's own: of a call that draws at a temperature, and of one that is greedy
DRAWN, GREEDY = Target(40), Target(5)
# the codebook that the package's own description has
MUSE = replace(MUSE_256, codebook_size=65536)
MUSE_STEPS = 18
# what has the calls that are timed, and where it is from
PACKAGES = {
    "AmusedPipeline": "diffusers", "LLaDA2Pipeline": "diffusers", "MaskGit": "muse-maskgit-pytorch",
    "OmniVoice": "omnivoice",
}  # fmt: skip


@dataclass(frozen=True)
class PerStep(Call):
    """A call of so many steps."""

    num_steps: int = 1

    def seconds(self) -> float:
        """Call it; return how long a step took, in the mean."""
        return super().seconds() / self.num_steps


def package_of(find: Callable[[], Any]) -> Any:
    """Import what is not among the dependencies; AbsentError where it is missing."""
    try:
        return find()
    except ImportError as error:
        raise AbsentError(f"{error} (make build/clients/installed)") from error


def replaced(obj: Any, name: str) -> tuple[Any, Any]:
    """An attribute of an object before `accelerate` and after it."""
    before = getattr(obj, name)
    accelerate(obj)
    return before, getattr(obj, name)


def sharpened(logits: Tensor, dim: int = -1) -> Tensor:
    """Logits whose every draw is the likeliest token of these, but for the last, which may be the mask."""
    best = logits.narrow(dim, 0, logits.shape[dim] - 1).argmax(dim, keepdim=True)
    return logits.scatter(dim, best, 1e4)


def expect_equal(what: str, before: Tensor, after: Tensor) -> None:
    """Raise AssertionError where two tensors differ."""
    if not torch.equal(before, after):
        raise AssertionError(f"{int((before != after).sum())} of {before.numel()} {what} differ")


def client_case(
    op: str, variant: str, model: Model, prepare: Callable[[], Job], *, target: Target, small: bool,
    dtype: torch.dtype = torch.float32, batch: int = 1, threads: int = 2,
) -> Case:  # fmt: skip
    """A call of a package; small ones have no target."""
    shape = f"B={batch} N={model.num_positions} V={model.codebook_size}"
    setting = Setting(op, variant, model.name, shape, dtype, threads=threads)
    # what is allocated beside the draw is the package's own
    return Case(setting, prepare, () if small else (replace(target, peer=PACKAGES[op]),), bytes_per_position=math.inf)


def job_of(work: Work, op: str, call: Callable[[Any], object], both: tuple[Any, Any], check: Callable[[], None],
           contestant: Callable[[Callable[[], object]], Contestant] = Call) -> Job:  # fmt: skip
    """A call of what was replaced, by the package and by us."""
    before, after = (contestant(partial(call, one)) for one in both)
    return Job(work, after, {PACKAGES[op]: before}, check)


def amused_case(model: Model, **options: Any) -> Case:
    """The scheduler's step of `AmusedPipeline`, on logits (B, V, H, W) that are guided, in memory as (B, H, W, V)."""

    def prepare() -> Job:
        library, side, mask_token_id = require("diffusers"), math.isqrt(model.num_positions), model.codebook_size
        logits = random_logits(0, model).transpose(1, 2).unflatten(-1, (side, side))
        tokens = masked_tokens(model).unflatten(-1, (side, side))
        scheduler = library.AmusedScheduler(mask_token_id=mask_token_id)
        parts = dict.fromkeys(("vqvae", "tokenizer", "text_encoder", "transformer"))
        both = replaced(library.AmusedPipeline(scheduler=scheduler, **parts), "scheduler")
        for one in both:
            one.set_timesteps(NUM_STEPS)

        def step(one: Any, logits: Tensor = logits) -> Any:
            generator = torch.Generator().manual_seed(0)
            return one.step(logits, one.timesteps[0], tokens, generator=generator)

        def check() -> None:
            theirs, ours = (int((step(one).prev_sample == mask_token_id).sum()) for one in both)
            # float32 uniforms tie now and then, and diffusers then masks a token less
            if not 0 <= ours - theirs <= 1 or not 0 < ours < model.num_positions:
                raise AssertionError(f"{theirs} positions are masked before, {ours} after")
            sharp = sharpened(logits, 1)
            expect_equal("tokens", *(step(one, sharp).pred_original_sample for one in both))

        return job_of(Work(logits.nbytes + 28 * tokens.numel(), tokens.numel()), "AmusedPipeline", step, both, check)

    return client_case("AmusedPipeline", "scheduler.step", model, prepare, target=DRAWN, **options)


def llada2_case(model: Model, settings: dict[str, float], dtype: torch.dtype, **options: Any) -> Case:
    """The scheduler's step of `LLaDA2Pipeline` on a block that is all masked; the mask is the last token."""

    def prepare() -> Job:
        library = require("diffusers.pipelines.llada2.pipeline_llada2")
        mask_token_id = model.codebook_size - 1
        logits = block_logits(model)
        # as of a network that was trained: the mask is no answer
        logits[..., mask_token_id] = -1e4
        logits = logits.to(dtype)
        tokens = torch.full(logits.shape[:2], mask_token_id)
        scheduler = library.BlockRefinementScheduler(block_length=model.num_positions)
        both = replaced(library.LLaDA2Pipeline(model=None, scheduler=scheduler), "scheduler")
        for one in both:
            one.set_timesteps(model.num_positions)

        def step(one: Any, logits: Tensor = logits, **changes: Any) -> Any:
            return one.step(logits, 0, tokens, mask_token_id=mask_token_id, **settings | changes)

        def check() -> None:
            greedy = [step(one, temperature=0.0).prev_sample for one in both]
            expect_equal("greedy tokens", *greedy)
            if not 0 < int((greedy[1] != mask_token_id).sum()) < model.num_positions:
                raise AssertionError("all tokens are committed, or none")
            sharp = sharpened(logits)
            expect_equal("tokens", *(step(one, sharp).prev_sample for one in both))
            if settings["temperature"]:
                kept = scheduler._top_k_filtering(logits.float(), settings.get("top_k"))
                kept = scheduler._top_p_filtering(kept, settings.get("top_p"))
                # of equal ones at the border, it keeps those that its sort has first, and ours all
                least = kept.masked_fill(kept == torch.finfo(kept.dtype).min, torch.inf).amin(-1, keepdim=True)
                probs = logits.float().masked_fill(logits < least, -torch.inf).softmax(-1)
                drawn = step(both[1])
                expected = probs.gather(-1, drawn.sampled_tokens[..., None])[..., 0]
                if not torch.allclose(drawn.sampled_probs, expected, atol=1e-3, rtol=0):
                    raise AssertionError("the drawn tokens have other probabilities than before")

        return job_of(Work(logits.nbytes + 48 * tokens.numel(), tokens.numel()), "LLaDA2Pipeline", step, both, check)

    variant = " + ".join(["scheduler.step", *(f"{name} {value:g}" for name, value in settings.items())])
    target = DRAWN if settings["temperature"] else GREEDY
    return client_case("LLaDA2Pipeline", variant, model, prepare, target=target, dtype=dtype, **options)


def muse_case(model: Model = MUSE, **options: Any) -> Case:
    """`MaskGit.generate`, guidance among it: the mean of its steps. The decoder returns the tokens as they are."""

    def prepare() -> Job:
        package = package_of(muse_package)
        cond, uncond = (random_logits(seed, model) for seed in (0, 1))
        side, mask_token_id = math.isqrt(model.num_positions), model.codebook_size
        # of which the width alone is asked
        package.t5.T5_CONFIGS["none"] = {"config": SimpleNamespace(d_model=8)}
        network = package.MaskGitTransformer(
            num_tokens=model.codebook_size, seq_len=model.num_positions, dim=8, depth=1, dim_head=8, heads=1,
            t5_name="none", flash=False,
        )  # fmt: skip
        vae = package.VQGanVAE(dim=16, layers=2, codebook_size=model.codebook_size, use_vgg_and_gan=False)
        maskgit = package.MaskGit(vae=vae, transformer=network, image_size=4 * side).eval()
        given: list[Tensor] = []

        def forward(ids: Tensor, *, cond_drop_prob: float, return_embed: bool = False, **_: Any) -> Any:
            given.append(ids)
            logits = uncond if cond_drop_prob else cond
            return (logits, None) if return_embed else logits

        network.forward, network.encode_text = forward, lambda texts: None
        maskgit.vae.decode_from_ids = lambda ids: ids
        both = replaced(maskgit, "generate")

        def generate(one: Any, temperature: float = 1.0) -> Tensor:
            given.clear()
            # which shows its progress
            with redirect_stderr(io.StringIO()):
                ids: Tensor = one(
                    texts=["a text"], timesteps=MUSE_STEPS, cond_scale=model.guidance_scale, fmap_size=side,
                    temperature=temperature,
                )  # fmt: skip
            return ids

        def check() -> None:
            ids, masked = [], []
            for one in both:
                ids.append(generate(one, 0.0))
                masked.append([int((each == mask_token_id).sum()) for each in given])
            if masked[0] != masked[1]:
                raise AssertionError(f"{masked[0]} positions are masked in each step before, {masked[1]} after")
            expect_equal("greedy tokens", *ids)

        # of the positions that are masked in a step, both halves are read
        share = sum(math.cos(math.pi / 2 * k / (MUSE_STEPS - 1)) for k in range(MUSE_STEPS)) / MUSE_STEPS
        work = Work(int(2 * share * cond.nbytes) + 28 * model.num_positions, model.num_positions)
        per_step = partial(PerStep, num_steps=MUSE_STEPS)
        return job_of(work, "MaskGit", generate, both, check, per_step)

    variant = f"generate, a step of {MUSE_STEPS} + temperature 1 + cond_scale {model.guidance_scale:g}"
    return client_case("MaskGit", variant, model, prepare, target=DRAWN, **options)


def omnivoice_case(
    model: Model, class_temperature: float, *, num_codebooks: int = 8, num_text: int = 50, **options: Any
) -> Case:
    """`OmniVoice._predict_tokens_with_scoring`, on the frames' part of logits that are in memory as (S, C, V)."""

    def prepare() -> Job:
        library = package_of(omnivoice_module)
        from transformers import Qwen3Config

        num_frames, vocab_size = model.num_positions, model.codebook_size
        llm = Qwen3Config(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8,
        )  # fmt: skip
        config = library.OmniVoiceConfig(
            audio_vocab_size=vocab_size, audio_mask_id=vocab_size - 1, num_audio_codebook=num_codebooks,
            audio_codebook_weights=[1] * num_codebooks, llm_config=llm,
        )  # fmt: skip
        # the frames follow the text in one half, and stand alone in the other, which is padded
        rows = replace(model, num_positions=(num_text + num_frames) * num_codebooks)
        cond, uncond = (
            random_logits(seed, rows).unflatten(1, (num_text + num_frames, num_codebooks)).permute(0, 2, 1, 3)
            for seed in (0, 1)
        )
        halves = cond[:, :, num_text:], uncond[:, :, :num_frames]
        settings = library.OmniVoiceGenerationConfig(
            guidance_scale=(model.guidance_scale or 1.0) - 1, class_temperature=class_temperature
        )
        both = replaced(library.OmniVoice(config).eval(), "_predict_tokens_with_scoring")

        def predict(one: Any, halves: tuple[Tensor, Tensor] = halves) -> Any:
            return one(*halves, settings)

        def check() -> None:
            sharp = sharpened(halves[0]), sharpened(halves[0])
            expect_equal("tokens", *(predict(one, sharp)[0] for one in both))
            (before, scores), (after, our_scores) = (predict(one) for one in both)
            if class_temperature == 0:
                expect_equal("greedy tokens", before, after)
            if not torch.allclose(scores, our_scores, atol=1e-4, rtol=0):
                raise AssertionError("the scores differ")

        num_positions = num_codebooks * num_frames
        work = Work(2 * num_positions * vocab_size * cond.element_size() + 48 * num_positions, num_positions)
        return job_of(work, "OmniVoice", predict, both, check)

    scale = (model.guidance_scale or 1.0) - 1
    variant = f"_predict_tokens_with_scoring + guidance_scale {scale:g} + class_temperature {class_temperature:g}"
    target = DRAWN if class_temperature else GREEDY
    return client_case("OmniVoice", variant, model, prepare, target=target, batch=num_codebooks, **options)


def client_cases(threads: int, *, small: bool = False) -> Iterator[Case]:
    """Every client whose package is on PyPI, at its own shapes; small ones take a moment."""

    def of(model: Model, num_positions: int, codebook_size: int) -> Model:
        return replace(model, num_positions=num_positions, codebook_size=codebook_size) if small else model

    options: dict[str, Any] = {"threads": threads, "small": small}
    yield amused_case(of(MEISSONIC_1024, 64, 128), **options)
    yield amused_case(of(AMUSED_256, 16, 64), **options)
    for dtype in (torch.float32, torch.bfloat16):
        for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}):
            yield llada2_case(of(LLADA2, 16, 1024), settings, dtype, **options)
    yield muse_case(of(MUSE, 16, 64), **options)
    for class_temperature in (0.0, 1.0):
        yield omnivoice_case(of(OMNIVOICE, 20, 65), class_temperature, num_codebooks=2 if small else 8, **options)
