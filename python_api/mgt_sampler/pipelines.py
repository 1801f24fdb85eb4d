"""Masked Z-Sampling for diffusers-shaped pipelines, whose scheduler alone cannot call the model again."""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arguments import kind, number
from .deferred import DeferredLogits, tensor_of
from .scheduler import Generators, MGTScheduler, MGTSchedulerOutput, flatten_logits
from .techniques import ZSampling


def z_sample(pipe: Any, *args: Any, z_sampling: ZSampling | None = None, **kwargs: Any) -> Any:
    """Call a pipeline with masked Z-Sampling (arXiv 2411.10781).

        images = z_sample(pipe, "a cat", guidance_scale=9.0, z_sampling=ZSampling(variant="paper")).images

    At each step of `z_sampling` the transformer is called twice more, with the inputs the pipeline gave it but for the
    tokens and, in the inverse pass, the next timestep (where `timestep` is among its keywords); its batch of both
    guidance halves stays one call. The pipeline's callbacks and its progress bar see the step as one. Tokens that were
    known in the first step, as in inpainting, are never masked again.

    What is called is a shallow copy of the pipeline with a copy of its scheduler, so several threads may do so at once
    with one pipeline, each with its own generator, and nothing stays behind in it.

    Args:
        pipe: a pipeline such as `AmusedPipeline` or Meissonic's: with a `transformer` that maps tokens (B, H, W) or
            (B, N), unconditional half first where there is guidance, to logits (B, V, H, W) or (B, N, V), a
            parameter `guidance_scale`, and an `MGTScheduler`.
        args: of the pipeline.
        z_sampling: which steps, how tokens are chosen; by default `ZSampling()`.
        kwargs: of the pipeline.

    Returns:
        What the pipeline returns.

    Raises:
        TypeError: the scheduler is another, or its step was replaced on it; or the transformer's inputs or outputs are
            none of these.
        ValueError: `MGTScheduler` has rng "torch", an inversion guidance scale that needs guidance in the pipeline,
            or steps that the run does not have.
    """
    scheduler = pipe.scheduler
    if not isinstance(scheduler, MGTScheduler):
        raise TypeError(f"pipe: expected one with an MGTScheduler, got {type(scheduler).__name__}")
    if scheduler.config.rng != "philox":
        raise ValueError(f"pipe: expected an MGTScheduler with rng 'philox', got {scheduler.config.rng!r}")
    if "step" in vars(scheduler):
        raise TypeError(
            "pipe: expected a scheduler with the step of its class, got one that was replaced on the instance"
        )
    if not (z_sampling is None or isinstance(z_sampling, ZSampling)):
        raise TypeError(f"z_sampling: expected a ZSampling or None, got {kind(z_sampling)}")
    call = inspect.signature(pipe).bind(*args, **kwargs)
    call.apply_defaults()
    if "guidance_scale" not in call.arguments:
        raise TypeError(f"pipe: expected a parameter guidance_scale, {type(pipe).__name__} has none")
    scale = number("guidance_scale", call.arguments["guidance_scale"])
    pipe, scheduler = copy.copy(pipe), copy.copy(scheduler)
    zigzag = _Zigzag(pipe.transformer, scheduler, z_sampling or ZSampling(), scale)
    scheduler.step = zigzag.step
    pipe.scheduler = scheduler
    handle = pipe.transformer.register_forward_hook(zigzag.record, with_kwargs=True)
    try:
        return pipe(*args, **kwargs)
    finally:
        handle.remove()
        # the two refer to each other, and to the pipeline's inputs
        del scheduler.step


class _Zigzag:
    """One run: remembers how the pipeline called the transformer, and takes each step forward, back and forward."""

    def __init__(
        self, transformer: torch.nn.Module, scheduler: MGTScheduler, z_sampling: ZSampling, guidance_scale: float
    ) -> None:
        self._transformer, self._scheduler, self._z_sampling = transformer, scheduler, z_sampling
        self._guidance_scale = guidance_scale
        self._step_once = scheduler.step
        self._thread = threading.get_ident()
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._is_ours = False

    def record(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Remember a call of this run's pipeline."""
        if not self._is_ours and threading.get_ident() == self._thread:
            self._inputs = args, kwargs

    def step(
        self,
        model_output: Tensor | DeferredLogits,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float | Tensor = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> MGTSchedulerOutput | tuple[Tensor, Tensor]:
        """`MGTScheduler.step`, and for the steps of Z-Sampling what comes after it."""
        now, steps = int(timestep), self._scheduler.next_step
        this_step = steps.get()
        prev_sample, drawn = self._step_once(model_output, now, sample, starting_mask_ratio, generator, False)
        next_step = steps.get()
        run = self._scheduler.run_that_returned(prev_sample) if now else None
        if run is not None:
            assert run.state is not None
            # the inverse pass has a guidance of its own, whatever the interval of the pipeline's
            steps.set(None)
            remasked = self._z_sampling(
                replace(run.state, tokens=sample.flatten(1)),
                run.state,
                lambda tokens, scale: self._inverse(tokens.view_as(sample), now, scale),
            )
            steps.set(next_step, prev_sample)
            if remasked is not None:
                remasked = remasked.view_as(sample)
                steps.set(this_step, sample)
                uncond_logits, logits = self._call(remasked)
                if uncond_logits is not None:
                    logits = uncond_logits + self._guidance_scale * (logits - uncond_logits)
                run.again(remasked)
                prev_sample, drawn = self._step_once(logits, now, remasked, starting_mask_ratio, generator, False)
        return MGTSchedulerOutput(prev_sample, drawn) if return_dict else (prev_sample, drawn)

    def _inverse(self, tokens: Tensor, now: int, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        # k, k / T or 1000 k: whatever a pipeline makes of the timestep k, the next one's is (k - 1) / k of it
        time, following = self._inputs[1].get("timestep"), {}
        if time is not None:
            whole = not time.is_floating_point() if isinstance(time, Tensor) else isinstance(time, int)
            following["timestep"] = time * (now - 1) // now if whole else time * (now - 1) / now
        uncond_logits, logits = (
            None if half is None else flatten_logits(tensor_of(half), tokens)[0]
            for half in self._call(tokens, **following)
        )
        assert logits is not None
        if uncond_logits is None:
            if guidance_scale != 1:
                raise ValueError(
                    "z_sampling.inversion_guidance_scale: expected 1 where the pipeline runs without guidance, "
                    f"got {guidance_scale}"
                )
            return logits, None
        if guidance_scale == 0:
            return uncond_logits, None
        return logits, uncond_logits if guidance_scale != 1 else None

    def _call(self, tokens: Tensor, **others: Any) -> tuple[Any, Any]:
        """The transformer's unconditional (None without guidance) and conditional logits for other inputs.

        Tensors, or what stands for them.
        """
        args, kwargs = self._inputs
        factors: list[int] = []

        def replaced(value: Any) -> Any:
            is_tokens = isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape[1:] == tokens.shape[1:]
            if not is_tokens or len(value) not in (len(tokens), 2 * len(tokens)):
                return value
            factors.append(2 if len(value) > len(tokens) else 1)
            return torch.cat([tokens] * factors[-1])

        args = tuple(map(replaced, args))
        kwargs = {name: replaced(value) for name, value in kwargs.items()}
        if len(factors) != 1:
            raise TypeError(
                f"pipe: expected a transformer with one input of tokens of shape {tuple(tokens.shape)}, "
                f"or twice as many for guidance, got {len(factors)}"
            )
        self._is_ours = True
        try:
            output = self._transformer(*args, **{**kwargs, **others})
        finally:
            self._is_ours = False
        if not isinstance(output, (Tensor, DeferredLogits)):
            raise TypeError(f"pipe: expected a transformer that returns logits, got {type(output).__name__}")
        if factors == [1]:
            return None, output
        uncond_logits, logits = output.chunk(2)
        return uncond_logits, logits
