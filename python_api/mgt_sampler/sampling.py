"""The decoding loop of a masked generative transformer (MaskGIT, arXiv 2202.04200)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mgt_kernels.checks import check_backend

from .arguments import integer, is_bool, kind
from .graphs import GraphedSteps, check_graphs
from .samplers import maskgit
from .schedules import (
    MaskSchedule,
    ValueSchedule,
    check_num_inference_steps,
    mask_ratios,
    schedule_values,
)
from .state import Logits, State
from .step import Drawn, Rule, begin, take_steps
from .techniques import Differential, Extrapolation, ZSampling, check_steps

if TYPE_CHECKING:
    from .models import MaskedModel


_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SamplerStep:
    """What `generate` tells its callback after every draw; a step of Z-Sampling draws twice.

    Attributes:
        step: k.
        draw: how many draws came before.
        tokens: int64 (B, N), the tokens drawn and those known before.
        logprob: float32 (B, N), their log-probability in nats, +inf where known before.
        mask: bool (B, N), the positions that are masked again.
        divergence: float32 (B, N), KL divergence to the previous draw's distribution in nats, +inf where there is none;
            None without differential sampling.
        state: what the generation remembers after the step: pickled before the callback returns, it is what
            `generate(state=...)` goes on from. None at the first draw of two, and with cuda_graph.
    """

    step: int
    draw: int
    tokens: Tensor
    logprob: Tensor
    mask: Tensor
    divergence: Tensor | None
    state: State | None = None


Callback: TypeAlias = Callable[[SamplerStep], object]


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        tokens: int64 (B, N), no position masked.
        images: float32 (B, C, H, W) in [0, 1].
        seed: int64 (B,), each sample's own: `generate(..., seed=output.seed[i:i+1])` makes sample i alone.
        model_calls: how often `predict_logits` was called; a step with guidance calls it twice, and the first such step
            once more where the model returns the memory of its last call again.
        sample_calls: int64 (B,), on the CPU: how many of these each sample needed, until none of its positions was
            masked. Fewer than model_calls with rules that end early, such as an entropy bound.
    """

    tokens: Tensor
    images: Tensor
    seed: Tensor
    model_calls: int
    sample_calls: Tensor


@torch.no_grad()
def generate(
    model: MaskedModel,
    rule: Rule | None = None,
    *,
    labels: int | Sequence[int] | Tensor | None = None,
    num_samples: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: ValueSchedule = 1.0,
    temperature: ValueSchedule = (2.0, 0.0),
    token_temperature: ValueSchedule = 1.0,
    noise_scale: ValueSchedule = 0.0,
    mask_schedule: MaskSchedule = "cosine",
    differential: Differential | None = None,
    z_sampling: ZSampling | None = None,
    momentum: ValueSchedule = 0.0,
    skip: Collection[int] = (),
    seed: int | Tensor = 0,
    tokens: Tensor | None = None,
    state: State | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    backend: str = "auto",
    cuda_graph: bool = False,
    fold_head: bool = False,
) -> GenerateOutput:
    """Draw images from a masked generative transformer in T steps.

    Step k of T draws a token for every masked position and masks the least confident again:

        l          = (u + s_k (c - u) + sigma_k eps) / token_temperature_k
        token      ~ softmax(l)
        confidence = log softmax(l)[token] + temperature_k gumbel
        m_k        = max(1, min(M_k - 1, floor(M_0 gamma((k + 1) / T))))      0 at the last step

    with M_0 the masked positions of the sample at the start, so a partly known image keeps what is known.
    What is drawn is a function of the logits, the sample's seed, the step and the position alone: as far as
    the model's logits do not depend on the batch, the image does not.

    Noise, differential sampling, masked Z-Sampling and momentum (arXiv 2411.10781) compose. Draws are numbered from 0,
    and a draw's number is the step that the kernels take: without Z-Sampling it is k.

    Guidance scale, both temperatures, noise scale and momentum each take a number, (start, end), T values, or a named
    schedule such as "abs_cos:2" (`schedules.schedule_values`).

    These are the settings of MaskGIT's rule. Another `rule` says by itself how a step draws, orders the positions,
    chooses among them and is guided: one of `samplers` or `presets`, or a `Rule` of one's own.

    Args:
        model: anything with `predict_logits(tokens, condition) -> (B, N, V)`, where condition None means
            unconditional, `decode(tokens) -> (B, C, H, W)`, `num_tokens` (N), `codebook_size` (V) and
            `mask_token_id`; where it has a `device`, the tokens live there. Logits are float32, bfloat16 or float16,
            and the memory of one call may be that of the next; what the model is given is its own to change.
        rule: what a step does, in place of guidance_scale, temperature, token_temperature, noise_scale, mask_schedule,
            differential, z_sampling and momentum, which then must not be given.
        labels: what `predict_logits` takes as its condition, the batch first: a class for every sample, or
            one class for all of them, or any tensor (B, ...); None: unconditional.
        num_samples: B, where neither labels, tokens nor seed tell it; 1 by default.
        num_inference_steps: T, at least 1; the rule's own by default, 12 for MaskGIT's.
        guidance_scale: s; 1 takes the conditional logits alone, 0 the unconditional ones, and spares the other pass.
        temperature: of the confidence that decides which tokens are masked again, at least 0.
        token_temperature: of the draw of a token: 0, which takes the likeliest, or at least 1e-30.
        noise_scale: sigma, the Gaussian noise on the logits in nats, at least 0 (arXiv 2411.10781).
        mask_schedule: gamma: a name that `schedules.mask_ratio` knows, or T ratios in [0, 1].
        differential: draw what changed least since the previous draw from what did change; None: don't.
        z_sampling: take steps forward, backward and forward again; None: don't.
        momentum: carry the guided logits on along their change since the previous model call, times this
            (`techniques.Extrapolation`); 0: don't.
        skip: steps k, of 1 to T - 1, that do without the model: they take the last call's logits, carried on by
            momentum. A skipped step takes no part in Z-Sampling.
        seed: an int, from which `sample_seeds` makes one for each sample; or ints (B,), one for each sample.
        tokens: int64 (B, N) to start from, mask_token_id where a token is wanted; None: all masked.
        state: what a callback was given as `SamplerStep.state`: the steps that are left are taken, with the same tokens
            as if the generation had not been stopped. All other arguments are to be what they were, but for tokens,
            seed, num_samples and num_inference_steps, which the state has.
        callback: called with a `SamplerStep` after every draw, whose tensors are its own to keep and to change.
        progress: show a progress bar.
        backend: of `mgt_kernels`: "auto", "reference", "triton" or an instruction set, as `sample_tokens` takes it.
        cuda_graph: capture a step, the model's part with the sampler's, as a CUDA graph, and replay it: small models
            wait for the host otherwise. The first step of each kind runs as ever, the next is captured, those after it
            are replayed; kinds differ in which halves guidance asks for, in whether there is noise, and with
            `differential` the first step is one of its own. The images are the same to the bit. `predict_logits` must
            be what a graph can hold: the same kernels at each step, nothing that waits for the device or copies from
            the host, no graphs of its own. Not with z_sampling, momentum and skip.
        fold_head: combine the halves before the model's last layer, and apply that to the masked positions alone
            (`head.folded_logits`): one product in place of two, and half the logits to read. The model has
            `predict_hidden(tokens, condition) -> (B, N, C)` and `head`, the linear layer that makes logits of it. The
            images are the same but where two tokens tie within the rounding of the logits. A `rule` that looks at known
            positions again asks `predict_logits`; with momentum, a position that the last call did not have is drawn
            from its logits as they are. On a GPU, each step waits for the number of masked positions.

    Returns:
        The tokens, the images, each sample's seed and the number of model calls. Where nothing is masked at the start
        the model is not called and the tokens come back as they are.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range or sizes that disagree; the message names it.
    """
    asked = ("predict_logits", "decode", "num_tokens", "codebook_size", "mask_token_id")
    absent = [name for name in asked if not hasattr(model, name)]
    if absent:
        raise TypeError(f"model: expected one with {', '.join(asked)}, got {kind(model)} without {', '.join(absent)}")
    mask_token_id, num_tokens, codebook_size = (
        integer(f"model.{name}", getattr(model, name)) for name in ("mask_token_id", "num_tokens", "codebook_size")
    )
    for name, given, expected in (("differential", differential, Differential), ("z_sampling", z_sampling, ZSampling)):
        if not (given is None or isinstance(given, expected)):
            raise TypeError(f"{name}: expected a {expected.__name__} or None, got {kind(given)}")
    if not is_bool(cuda_graph):
        raise TypeError(f"cuda_graph: expected a bool, got {kind(cuda_graph)}")
    if not is_bool(fold_head):
        raise TypeError(f"fold_head: expected a bool, got {kind(fold_head)}")
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback: expected a function or None, got {kind(callback)}")
    settings: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "token_temperature": token_temperature,
        "noise_scale": noise_scale,
        "mask_schedule": mask_schedule,
        "differential": differential,
        "z_sampling": z_sampling,
        "momentum": momentum,
    }
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a Rule or None, got {kind(rule)}")
    if state is not None:
        if not isinstance(state, State):
            raise TypeError(f"state: expected a State or None, got {kind(state)}")
        told = tokens is not None or num_samples is not None or num_inference_steps is not None
        if told or not _is_one_int(seed) or seed != 0:
            raise ValueError("state: expected None with tokens, seed, num_samples or num_inference_steps")
        tokens, seed, num_inference_steps = state.tokens, state.seed, state.num_inference_steps
    if num_inference_steps is None:
        num_inference_steps = Rule.num_inference_steps if rule is None else rule.num_inference_steps
    num_inference_steps = check_num_inference_steps(num_inference_steps)
    device = _device(model, tokens, labels)
    batch_size = _batch_size(num_samples, tokens, labels, seed)
    condition = _condition(labels, batch_size, device)
    seeds = seeds_of(seed, batch_size, device)
    check_backend(backend, device)
    if rule is None:
        rule = _maskgit(num_inference_steps, num_tokens, **settings)
    else:
        defaults = inspect.signature(generate).parameters
        told_twice = [name for name, value in settings.items() if value is not defaults[name].default]
        if told_twice:
            raise ValueError(f"{told_twice[0]}: expected none beside a rule, which has its own")
    guidance_scales = schedule_values(rule.guidance_scale, num_inference_steps, name="guidance_scale")
    skipped = check_steps("skip", skip, 1, num_inference_steps - 1)
    if condition is None and any(s != 1 for s in guidance_scales):
        raise ValueError("guidance_scale: guidance needs labels, got a scale other than 1 and labels None")
    if isinstance(rule.revisit, ZSampling):
        rule.revisit.steps_of(num_inference_steps)
        scale = rule.revisit.inversion_guidance_scale
        if condition is None and scale not in (0, 1):
            raise ValueError(f"z_sampling.inversion_guidance_scale: guidance needs labels, got {scale} and labels None")

    if tokens is None:
        tokens = torch.full((batch_size, num_tokens), mask_token_id, dtype=torch.int64, device=device)
        anything_masked = batch_size > 0
    else:
        tokens = _checked_tokens(tokens, num_tokens, codebook_size, mask_token_id).to(device, copy=True)
        anything_masked = bool((tokens == mask_token_id).any())
    if state is None:
        memory = {"extrapolation": Extrapolation()} if skipped else {}
        state = begin(
            tokens,
            seed=seeds,
            mask_token_id=mask_token_id,
            num_inference_steps=num_inference_steps,
            backend=backend,
            memory=memory,
        )
    else:
        state = replace(state, tokens=tokens, backend=backend)

    shape = (batch_size, num_tokens, codebook_size)
    if fold_head:
        if getattr(rule.draw, "rows", "masked") == "all":
            raise ValueError(
                "fold_head: expected False with a draw of rows 'all', which reads known positions, got True"
            )
        if cuda_graph:
            raise ValueError(
                "fold_head: expected False with cuda_graph, for the masked positions are counted, got True"
            )
        predictor: Predictor = FoldedPredictor(model, condition, shape, device, mask_token_id)
    else:
        predictor = Predictor(model, condition, shape, device)
    if cuda_graph:
        check_graphs(device)
        if rule.revisit is not None or getattr(rule.draw, "momentum", 0.0) != 0.0 or skipped:
            raise ValueError("cuda_graph: expected False with z_sampling, momentum or skip, got True")
        steps = GraphedSteps(rule, predictor, state).take_all()
    else:
        steps = take_steps(rule, predictor, state, skip=skipped)
    calls, sample_calls = 0, torch.zeros(batch_size, dtype=torch.int64, device="cpu")
    steps_left = num_inference_steps - state.step if anything_masked else 0
    with tqdm(total=steps_left, desc="sampling", disable=not progress) as bar:
        for after, draws in steps if anything_masked else ():
            busy = state.masked.any(1).cpu() if rule.ends_early else 1
            sample_calls += (predictor.num_calls - calls) * busy
            calls = predictor.num_calls
            if callback is not None:
                _tell(callback, state, after, draws, cuda_graph)
            state = after
            bar.update()
    if anything_masked:
        check_all_drawn("model.predict_logits", state.tokens, mask_token_id)
    return GenerateOutput(state.tokens, _decoded(model, state.tokens), seeds, predictor.num_calls, sample_calls)


def _maskgit(
    num_inference_steps: int,
    num_tokens: int,
    *,
    guidance_scale: ValueSchedule,
    temperature: ValueSchedule,
    token_temperature: ValueSchedule,
    noise_scale: ValueSchedule,
    mask_schedule: MaskSchedule,
    differential: Differential | None,
    z_sampling: ZSampling | None,
    momentum: ValueSchedule,
) -> Rule:
    """The rule of `generate`'s own arguments, checked under their names."""

    def check(name: str, value: ValueSchedule, minimum: float = -math.inf) -> list[float]:
        return schedule_values(value, num_inference_steps, name=name, minimum=minimum)

    check("guidance_scale", guidance_scale)
    check("temperature", temperature, 0.0)
    for k, value in enumerate(check("token_temperature", token_temperature, 0.0)):
        if 0 < value < 1e-30:
            raise ValueError(f"token_temperature: expected 0 or at least 1e-30 at every step, got {value} at step {k}")
    check("noise_scale", noise_scale, 0.0)
    check("momentum", momentum)
    mask_ratios(mask_schedule, num_inference_steps, num_tokens)
    rule = maskgit(
        guidance_scale=guidance_scale,
        temperature=temperature,
        token_temperature=token_temperature,
        noise_scale=noise_scale,
        mask_schedule=mask_schedule,
        differential=differential,
        momentum=momentum,
    )
    return rule.but(revisit=z_sampling)


def _tell(callback: Callback, before: State, after: State, draws: tuple[Drawn, ...], cuda_graph: bool) -> None:
    """Call the callback for each draw of a step, with tensors of its own."""
    for i, drawn in enumerate(draws):
        last = i == len(draws) - 1
        tokens = drawn.sampled.token_ids
        callback(
            SamplerStep(
                step=before.step,
                draw=int(before.num_draws) + i,
                # the last step's are what is returned, and a graph's are written over by the next step
                tokens=tokens.clone(),
                logprob=drawn.sampled.logprob.clone(),
                mask=drawn.tokens == after.mask_token_id,
                divergence=None if drawn.divergence is None else drawn.divergence.clone(),
                state=replace(after, tokens=after.tokens.clone()) if last and not cuda_graph else None,
            )
        )


class Predictor:
    """Calls the model, as often as guidance needs it."""

    def __init__(
        self, model: MaskedModel, condition: Tensor | None, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        """Take the model, what it is asked for, and the shape (B, N, V) of what it is to give."""
        self.num_calls = 0
        self._model, self._condition, self._shape, self._device = model, condition, shape, device
        self._reuses_memory = False

    def __call__(self, tokens: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        """The logits and, where the scale makes a difference, the unconditional ones; both until the next call."""
        if guidance_scale == 0:
            return self._predict(tokens, None), None
        logits = self._predict(tokens, self._condition)
        if guidance_scale == 1 or self._condition is None:
            return logits, None
        if self._reuses_memory:
            logits = logits.clone()
        uncond_logits = self._predict(tokens, None)
        if _overlap(logits, uncond_logits):
            # the second call has written over what the first returned, as a CUDA graph does; copied from now on
            self._reuses_memory = True
            uncond_logits = uncond_logits.clone()
            logits = self._predict(tokens, self._condition)
        if not any(_unit_strides(logits) & _unit_strides(uncond_logits)):
            logits, uncond_logits = logits.contiguous(), uncond_logits.contiguous()
        return logits, uncond_logits

    def _predict(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        self.num_calls += 1
        # copies, for some models write to what they are given
        logits = self._model.predict_logits(tokens.clone(), None if condition is None else condition.clone())
        if not isinstance(logits, Tensor):
            raise TypeError(f"model.predict_logits: expected a tensor, got {kind(logits)}")
        if tuple(logits.shape) != self._shape:
            raise ValueError(f"model.predict_logits: expected logits of shape {self._shape}, got {tuple(logits.shape)}")
        if logits.dtype not in _LOGITS_DTYPES:
            raise TypeError(f"model.predict_logits: expected float32, bfloat16 or float16, got {logits.dtype}")
        if logits.device.type != self._device.type:
            raise ValueError(f"model.predict_logits: expected logits on {self._device}, got them on {logits.device}")
        return logits if _unit_strides(logits) else logits.contiguous()


class FoldedPredictor(Predictor):
    """Calls the model but for its head, and applies that to what is masked; see `head.folded_logits`."""

    def __init__(
        self,
        model: MaskedModel,
        condition: Tensor | None,
        shape: tuple[int, int, int],
        device: torch.device,
        mask_token_id: int,
    ) -> None:
        """Check the model's head."""
        # which knows the quantized layers, and those this module
        from .head import Head

        super().__init__(model, condition, shape, device)
        absent = [name for name in ("predict_hidden", "head") if not hasattr(model, name)]
        if absent:
            found = f"{kind(model)} without {', '.join(absent)}"
            raise TypeError(f"fold_head: expected a model with predict_hidden and head, got {found}")
        self._head = Head(model.head, "model.head")  # type: ignore[attr-defined]
        self._mask_token_id = mask_token_id
        if self._head.num_logits != shape[2]:
            raise ValueError(f"model.head: expected {shape[2]} logits, one a code, got {self._head.num_logits}")

    def look(self, tokens: Tensor, guidance_scale: float) -> Logits:
        """The guided logits of the masked positions."""
        rows = (tokens == self._mask_token_id).flatten().nonzero().squeeze(-1)
        has_both = guidance_scale not in (0, 1) and self._condition is not None
        hidden = self._hidden(tokens, None if guidance_scale == 0 else self._condition, rows)
        uncond_hidden = self._hidden(tokens, None, rows) if has_both else None
        logits = self._head.logits(hidden, uncond_hidden, guidance_scale)
        if logits.dtype not in _LOGITS_DTYPES:
            raise TypeError(f"model.head: expected float32, bfloat16 or float16, got {logits.dtype}")
        return Logits(logits, rows=rows)

    def _hidden(self, tokens: Tensor, condition: Tensor | None, rows: Tensor) -> Tensor:
        """What the rows' hidden states are: copies, for the next call may write over the model's."""
        self.num_calls += 1
        hidden = self._model.predict_hidden(  # type: ignore[attr-defined]
            tokens.clone(), None if condition is None else condition.clone()
        )
        if not isinstance(hidden, Tensor):
            raise TypeError(f"model.predict_hidden: expected a tensor, got {kind(hidden)}")
        expected = (*self._shape[:2], self._head.width)
        if tuple(hidden.shape) != expected:
            raise ValueError(f"model.predict_hidden: expected shape {expected}, got {tuple(hidden.shape)}")
        return self._head.take(hidden, rows)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory that two tensors span has a byte in common."""
    (first, past_first), (second, past_second) = map(_span, (a, b))
    return a.device == b.device and first < past_second and second < past_first


def _span(tensor: Tensor) -> tuple[int, int]:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    num_bytes = (steps + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + num_bytes


def _unit_strides(logits: Tensor) -> set[int]:
    """The dimensions of (B, N, V), of the latter two, that lie side by side in memory, as a kernel wants one to."""
    return {dim for dim in (1, 2) if logits.stride(dim) == 1 or logits.shape[dim] == 1}


def _decoded(model: MaskedModel, tokens: Tensor) -> Tensor:
    """The images of tokens, float32 in [0, 1]."""
    images = model.decode(tokens.clone())
    if not isinstance(images, Tensor):
        raise TypeError(f"model.decode: expected a tensor, got {kind(images)}")
    if len(images) != len(tokens):
        raise ValueError(f"model.decode: expected {len(tokens)} images, got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        raise TypeError("model.decode: expected floats in [0, 1], got torch.uint8; divide by 255")
    return images.detach().to(torch.float32, memory_format=torch.contiguous_format).clamp(0, 1)


def sample_seeds(seed: int, num_samples: int) -> Tensor:
    """One seed for each sample, made from a single one.

        seeds[i] = (seed * 0x9E3779B97F4A7C15 + i) mod 2^64

    so sample i is the same however many there are, and neighbouring seeds share no sample.

    Args:
        seed: any int; seed 0 gives 0, 1, 2, ...
        num_samples: B.

    Returns:
        int64 (B,), the 64 bits read as signed.

    Raises:
        TypeError: seed is no int.
    """
    seed = integer("seed", seed, "an int or ints (B,)")
    # an odd multiplier keeps ints apart, and the golden ratio's keeps their runs of B far apart
    return _int64([seed * 0x9E3779B97F4A7C15 + i for i in range(integer("num_samples", num_samples))])


def _int64(values: Sequence[int]) -> Tensor:
    """Ints mod 2^64 as int64."""
    signed = [(value + 2**63) % 2**64 - 2**63 for value in values]
    return torch.tensor(signed, dtype=torch.int64, device="cpu")


def _device(model: MaskedModel, tokens: Tensor | None, labels: object) -> torch.device:
    """The model's device where it names one, else the device of the tensors given, else the CPU."""
    given = getattr(model, "device", None)
    if given is not None:
        return torch.device(given)
    for tensor in (tokens, labels):
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def _batch_size(num_samples: int | None, tokens: object, labels: object, seed: object) -> int:
    """B, on which every argument that implies one must agree."""
    if num_samples is not None:
        num_samples = integer("num_samples", num_samples)
        if num_samples < 0:
            raise ValueError(f"num_samples: expected at least 0, got {num_samples}")
    sizes = {"num_samples": num_samples}
    for name, value in (("tokens", tokens), ("labels", labels), ("seed", seed)):
        if value is not None and not _is_one_int(value):
            if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
                raise TypeError(f"{name}: expected ints or a tensor, got {kind(value)}")
            sizes[name] = len(value)
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in given.items())
        raise ValueError(f"{list(given)[-1]}: expected one batch size, got {listed}")
    return next(iter(given.values()), 1)


def _is_one_int(value: object) -> bool:
    try:
        integer("value", value)
    except TypeError:
        return False
    return True


def _condition(labels: object, batch_size: int, device: torch.device) -> Tensor | None:
    """A tensor of its own for labels, (B, ...)."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        try:
            given = torch.tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"labels: expected ints or a tensor, got {labels!r}") from None
        if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
            raise TypeError(f"labels: expected ints or a tensor, got {labels!r}")
        labels = given.to(torch.int64)
    labels = labels.to(device, copy=True)
    return labels.expand(batch_size) if labels.ndim == 0 else labels


def seeds_of(seed: object, batch_size: int, device: torch.device) -> Tensor:
    """A tensor of its own for the seeds, int64 (B,)."""
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool or seed.ndim != 1:
            raise TypeError(f"seed: expected an int or ints (B,), got {seed.dtype} {tuple(seed.shape)}")
        return seed.to(device, torch.int64, copy=True)
    if _is_one_int(seed):
        return sample_seeds(seed, batch_size).to(device)  # type: ignore[arg-type]
    return _int64([integer("seed", one, "an int or ints (B,)") for one in seed]).to(device)  # type: ignore[attr-defined]


def check_all_drawn(name: str, tokens: Tensor, mask_token_id: int) -> None:
    """Raise where a GPU kernel, which cannot raise, marked logits that it could not draw from."""
    left = tokens == mask_token_id
    if left.any():
        sample, position = left.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite logits, or -inf to forbid a token, got NaN, +inf or "
            f"nothing but -inf at sample {sample}, position {position}"
        )


def _checked_tokens(tokens: Tensor, num_tokens: int, codebook_size: int, mask_token_id: int) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected an int64 tensor, got {kind(tokens)}")
    if tokens.ndim != 2 or tokens.shape[1] != num_tokens:
        raise ValueError(f"tokens: expected shape (B, {num_tokens}), got {tuple(tokens.shape)}")
    outside = ((tokens < 0) | (tokens >= codebook_size)) & (tokens != mask_token_id)
    if outside.any():
        sample, position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"tokens: expected 0 to {codebook_size - 1} or the mask token {mask_token_id}, "
            f"got {int(tokens[sample, position])} at sample {sample}, position {position}"
        )
    return tokens
