"""diffusers' `BlockRefinementScheduler`, the sampler of `LLaDA2Pipeline`, drawing with `mgt_kernels.sample_tokens`."""

from typing import Any

import torch
from diffusers import BlockRefinementScheduler
from torch import Tensor

import mgt_kernels


class BlockScheduler(BlockRefinementScheduler):
    """Draws in one read of the logits, what is committed and edited being decided by the code that is inherited.

    A draw is a function of the sample's seed, the block, the step, the position and the token, so it does not depend on
    the batch. The seeds come from `generator` at the first step after `set_timesteps`; a list of generators has one for
    each sample. Without editing, only masked positions are drawn: known ones report their own token, probability 1.
    """

    _seeds: Tensor | None = None
    _block = 0
    _steps_in_block = 0

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Begin a generation."""
        super().set_timesteps(*args, **kwargs)
        self._seeds = None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        editing_threshold: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **options: Any,
    ) -> Any:
        """Take a step as the original does; generator may be a list."""
        if self._seeds is None:
            self._seeds, self._block, self._steps_in_block = draw_seeds(len(sample), generator), -1, 0
        # timesteps count the steps of a block while anything is masked, and the first of a block always is
        self._block, self._steps_in_block = (
            (self._block + 1, 0) if int(timestep) == 0 else (self._block, self._steps_in_block + 1)
        )
        # an id that no token has, so that any may be drawn: the original draws the mask token too
        num_tokens = model_output.shape[-1]
        threshold = self.config.editing_threshold if editing_threshold is None else editing_threshold
        if mask_token_id is None or (threshold is not None and threshold > 0):
            self._tokens = torch.full_like(sample, num_tokens)
        else:
            self._tokens = sample.masked_fill(sample == mask_token_id, num_tokens)
        return super().step(
            model_output, timestep, sample, mask_token_id=mask_token_id, editing_threshold=editing_threshold,
            generator=generator, **options,
        )  # fmt: skip

    def _sample_from_logits(
        self,
        logits: Tensor,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: object,
        use_multinomial: bool,
    ) -> tuple[Tensor, Tensor]:
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if not use_multinomial:
            temperature = 0.0
        # as the original, which does not truncate where it does not draw
        truncation: dict[str, Any] = {}
        if temperature > 0 and top_k is not None and 0 < top_k < logits.shape[-1]:
            truncation["top_k"] = top_k
        if temperature > 0 and top_p is not None and top_p < 1:
            truncation["top_p"] = top_p
        assert self._seeds is not None
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(
            logits, self._tokens, mask_token_id=logits.shape[-1], seed=self._seeds.to(logits.device),
            step=(self._block << 16) + self._steps_in_block, temperature=temperature, **truncation,
        )  # fmt: skip
        # known positions have logprob +inf
        return token_ids, logprob.exp().clamp(max=1)


def draw_seeds(count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Seeds (count,) from one generator for the batch, one for each sample, or PyTorch's global one."""
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"generator: expected one for each of {count} samples, got {len(generator)}")
        return torch.cat([draw_seeds(1, one).cpu() for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), device=device, generator=generator)
