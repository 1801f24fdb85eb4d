"""Differential sampling, masked Z-Sampling and momentum (arXiv 2411.10781), and informed correction."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgt_kernels import remask_tokens
from mgt_kernels.cpu import DIFFERENTIAL_VARIANTS
from mgt_kernels.ops import REMASK_VARIANTS

from .arguments import integer, is_bool, kind, number
from .state import State

_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Differential:
    """Differential sampling: what changed least since the last step is drawn from what did change.

    See `mgt_kernels.differential_sample`, which computes it.

    Attributes:
        share: z, of the positions that are drawn from the difference, in [0, 1]. 0 changes no draw, but measures the
            divergence between steps.
        variant: "paper", or "official" as the published code does it.
        aliased_history: variant "official" only: compare with the edited distribution, as the published code does.

    Raises:
        TypeError: an attribute of the wrong type.
        ValueError: share outside [0, 1], an unknown variant, or aliased_history with variant "paper".
    """

    share: float = 0.75
    variant: str = "paper"
    aliased_history: bool = False

    def __post_init__(self) -> None:
        """Check the attributes."""
        object.__setattr__(self, "share", _finite("differential.share", self.share))
        if not 0 <= self.share <= 1:
            raise ValueError(f"differential.share: expected a number in [0, 1], got {self.share}")
        _check_variant("differential.variant", self.variant, DIFFERENTIAL_VARIANTS)
        if not is_bool(self.aliased_history):
            raise TypeError(f"differential.aliased_history: expected a bool, got {kind(self.aliased_history)}")
        object.__setattr__(self, "aliased_history", bool(self.aliased_history))
        if self.aliased_history and self.variant != "official":
            raise ValueError("differential.aliased_history: expected False with variant 'paper'")


@dataclass(frozen=True)
class ZSampling:
    """Masked Z-Sampling: forward, inverse, forward in place of one step.

    The tokens that the first forward pass revealed are looked at by the model once more, at the next timestep and with
    the inversion guidance; n of the known ones are masked again, so that one position less than before the step is
    masked; then the step is taken anew. Tokens that were known when the generation began stay.
    See `mgt_kernels.remask_tokens`, which chooses the n.

    Attributes:
        inversion_guidance_scale: s of the inverse pass; 0 is unconditional and one model call.
        variant: which are masked again: "paper", those with the lowest log-probability of their own token; "official",
            those with the highest largest probability, as the published code does; "random", which spares
            the inverse pass its model call.
        steps: the steps k that are taken so; None: every step but the last. The last step can't be.

    Raises:
        TypeError: an attribute of the wrong type.
        ValueError: inversion_guidance_scale not finite, an unknown variant, or a step below 0.
    """

    inversion_guidance_scale: float = 0.0
    variant: str = "paper"
    steps: Collection[int] | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        scale = _finite("z_sampling.inversion_guidance_scale", self.inversion_guidance_scale)
        object.__setattr__(self, "inversion_guidance_scale", scale)
        _check_variant("z_sampling.variant", self.variant, REMASK_VARIANTS)
        if self.steps is not None:
            object.__setattr__(self, "steps", check_steps("z_sampling.steps", self.steps))

    def steps_of(self, num_inference_steps: int) -> frozenset[int]:
        """The steps of a run of T that are taken so.

        Raises:
            ValueError: a step that the run does not have, or its last one.
        """
        if self.steps is None:
            return frozenset(range(num_inference_steps - 1))
        return check_steps("z_sampling.steps", self.steps, 0, num_inference_steps - 2)

    def __call__(
        self, before: State, after: State, predict: Callable[[Tensor, float], tuple[Tensor, Tensor | None]]
    ) -> Tensor | None:
        """Mask known tokens again, so that one position less is masked than before the step.

        Args:
            before: the state before the step's first forward pass.
            after: and after it.
            predict: the inverse pass: (tokens, guidance scale) -> (B, N, V) logits, and the unconditional ones where
                they make a difference. Variant "random" does not call it.

        Returns:
            int64 (B, N); None at a step that is not taken so.
        """
        if before.step not in self.steps_of(before.num_inference_steps):
            return None
        logits = uncond_logits = None
        scale = self.inversion_guidance_scale
        if self.variant != "random":
            logits, uncond_logits = predict(after.tokens, scale)
        remasked, _ = remask_tokens(
            logits,
            after.tokens,
            (before.num_masked() - 1 - after.num_masked()).clamp(min=0),
            variant=self.variant,
            uncond_logits=uncond_logits,
            guidance_scale=1.0 if uncond_logits is None else scale,
            keep=before.keep,
            **after.draw_arguments,
        )
        return remasked


@dataclass(frozen=True)
class Correction:
    """At some steps known tokens are masked again and the step is taken once more: informed correction.

    Which are masked is asked of the model, at one more call without guidance: those with the lowest log-probability of
    their own token (arXiv 2407.21243). Tokens that were known when the generation began stay.

    Attributes:
        num_tokens: how many of each sample, fewer where fewer are known.
        steps: the steps that are taken so; None: every step but the last.
        variant: "paper", as above; "random", which spares the model call.

    Raises:
        TypeError: an attribute of the wrong type.
        ValueError: num_tokens below 1, an unknown variant, or a step below 0.
    """

    num_tokens: int
    steps: Collection[int] | None = None
    variant: str = "paper"

    def __post_init__(self) -> None:
        """Check the attributes."""
        object.__setattr__(self, "num_tokens", integer("num_tokens", self.num_tokens))
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: expected at least 1, got {self.num_tokens}")
        _check_variant("variant", self.variant, ("paper", "random"))
        if self.steps is not None:
            object.__setattr__(self, "steps", check_steps("steps", self.steps))

    def __call__(
        self, before: State, after: State, predict: Callable[[Tensor, float], tuple[Tensor, Tensor | None]]
    ) -> Tensor | None:
        """Mask known tokens again; None at a step that is not taken so."""
        steps = range(before.num_inference_steps - 1) if self.steps is None else self.steps
        if before.step not in steps:
            return None
        logits = None if self.variant == "random" else predict(after.tokens, 1.0)[0]
        free = (~after.masked & ~after.keep).sum(-1)
        remasked, _ = remask_tokens(
            logits,
            after.tokens,
            free.clamp(max=self.num_tokens),
            variant=self.variant,
            keep=before.keep,
            **after.draw_arguments,
        )
        return remasked


@dataclass
class Extrapolation:
    """Momentum: guided logits carried on along their last change.

        l_k <- l_k + momentum (l_k - l_{k-1})

    l are the model's guided logits, not the extrapolated ones: multistep extrapolation, as DPM-Solver++ 2M has it
    (arXiv 2211.01095). A logit that is not finite in either stays as it is. The formula is this project's: that of
    arXiv 2411.10781 is not public. What is beyond float32 becomes its largest number.
    """

    last: Tensor | None = field(default=None, init=False)
    before_last: Tensor | None = field(default=None, init=False)

    def reset(self) -> None:
        """Forget the generation so far."""
        self.last = self.before_last = None

    def observe(self, guided: Tensor) -> None:
        """Remember the guided logits of a model call, (B, N, V) in nats; the tensor is kept, so it must not change."""
        self.last, self.before_last = guided, self.last

    def logits(self, momentum: float) -> Tensor:
        """Extrapolate from the last two model calls: float32 (B, N, V); with only one seen, its logits."""
        assert self.last is not None
        if self.before_last is None or momentum == 0:
            return self.last
        change = self.last - self.before_last
        # what overflows would forbid a token, or all of them
        carried = (self.last + momentum * change).clamp(-_FLOAT32_MAX, _FLOAT32_MAX)
        return torch.where(change.isfinite(), carried, self.last)


def guided_logits(logits: Tensor, uncond_logits: Tensor | None, guidance_scale: float | Tensor) -> Tensor:
    """Return u + s (c - u) in float32, a tensor of its own; -inf where either half forbids a token."""
    if uncond_logits is None:
        return logits.to(torch.float32, copy=True)
    conditional, unconditional = logits.float(), uncond_logits.float()
    guided = unconditional + guidance_scale * (conditional - unconditional)
    return guided.masked_fill_((conditional == -math.inf) | (unconditional == -math.inf), -math.inf)


def check_steps(name: str, steps: Collection[int], first: int = 0, last: float = math.inf) -> frozenset[int]:
    """Return the steps as a set, if they are whole numbers within [first, last]."""
    if isinstance(steps, (str, bytes)) or not isinstance(steps, Collection) or getattr(steps, "ndim", 1) != 1:
        raise TypeError(f"{name}: expected a collection of ints, got {kind(steps)}")
    found = set()
    for given in steps:
        try:
            step = integer(name, given)
        except TypeError:
            raise TypeError(f"{name}: expected a collection of ints, got {given!r} in it") from None
        if not first <= step <= last:
            expected = f"at least {first}" if last == math.inf else f"within [{first}, {last}]"
            raise ValueError(f"{name}: expected steps {expected}, got {step}")
        found.add(step)
    return frozenset(found)


def _finite(name: str, value: object) -> float:
    found = number(name, value)
    if not abs(found) <= _FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite number, got {found}")
    return found


def _check_variant(name: str, value: object, variants: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in variants:
        raise ValueError(f"{name}: expected one of {variants}, got {value!r}")
