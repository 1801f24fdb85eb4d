"""What a generation remembers from step to step, and what a step sees of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Logits(NamedTuple):
    """One look at the model: both halves, not yet combined; or the guided logits of some rows alone.

    Attributes:
        logits: (B, N, V) nats, float32, bfloat16 or float16: the conditional half. With rows (R, V): guided.
        uncond_logits: (B, N, V), or None without guidance and with rows.
        guidance_scale: s of u + s (c - u); 1 without guidance and with rows.
        rows: int64 (R,), which positions the logits are of, b N + n, every masked one among them; None: all. See
            `head.folded_logits`.
    """

    logits: Tensor
    uncond_logits: Tensor | None = None
    guidance_scale: float | Tensor = 1.0
    rows: Tensor | None = None

    def whole(self, shape: tuple[int, int]) -> Logits:
        """The logits of all positions, (B, N) of them: NaN where there are none, so that who reads those is told."""
        if self.rows is None:
            return self
        size = self.logits.shape[-1]
        whole = self.logits.new_full((shape[0] * shape[1], size), torch.nan)
        whole[self.rows] = self.logits
        return Logits(whole.view(*shape, size))


@dataclass
class State:
    """All that a generation remembers: it can be pickled, and gone on from in another process. See `begin`.

    Attributes:
        tokens: int64 (B, N), mask_token_id where masked.
        seed: int64 (B,), each sample's own.
        mask_token_id: marks masked positions.
        num_inference_steps: T.
        keep: bool (B, N), known when the generation began.
        num_masked_at_start: float32 (B,), the positions that were masked then.
        step: k of the next step, 0 to T; T where all were taken.
        num_draws: how many draws came before: the number that the kernels take as the step.
        first_position: the place of the first token in its sequence, an int or int64 (B,).
        backend: of `mgt_kernels`.
        memory: what the rule's functions have written down, by name.
    """

    tokens: Tensor
    seed: Tensor
    mask_token_id: int
    num_inference_steps: int
    keep: Tensor
    num_masked_at_start: Tensor
    step: int = 0
    num_draws: int | Tensor = 0
    first_position: int | Tensor = 0
    backend: str = "auto"
    memory: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> State:
        """A state of its own with other attributes, and a memory that may be written to; the tensors are shared."""
        other = object.__new__(State)
        other.__dict__.update(self.__dict__, memory=dict(self.memory))
        other.__dict__.update(changes)
        return other

    @property
    def is_last(self) -> bool:
        """Whether the step is the last one."""
        return self.step == self.num_inference_steps - 1

    @property
    def masked(self) -> Tensor:
        """Which positions are masked, bool (B, N)."""
        return self.tokens == self.mask_token_id

    def num_masked(self) -> Tensor:
        """How many are, int64 (B,)."""
        return self.masked.sum(-1)

    def is_done(self) -> bool:
        """Whether no sample has a masked position; waits for the device."""
        return not bool(self.masked.any())

    @property
    def draw_arguments(self) -> dict[str, Any]:
        """What every kernel takes of the state."""
        return {
            "mask_token_id": self.mask_token_id,
            "seed": self.seed,
            "step": self.num_draws,
            "backend": self.backend,
        }
