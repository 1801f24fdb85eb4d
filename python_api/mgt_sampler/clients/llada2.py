"""LLaDA2's pipeline (diffusers): a step of its scheduler, `BlockRefinementScheduler`, is one draw and one commit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgt_kernels import TokenEdit, commit_tokens, sample_tokens

from ..scheduler import Generators, check_generators, draw_seeds

try:
    from diffusers.schedulers import scheduling_block_refinement
except ImportError as error:
    raise ImportError("LLaDA2 needs a later diffusers: pip install -U 'mgt-kernels[diffusers]'") from error

# its annotations ask for tensor types of PyTorch 0.4
theirs: Any = scheduling_block_refinement


def replacements(pipe: Any) -> dict[str, Any]:
    """A scheduler of ours, with the settings of the pipeline's."""
    before = pipe.scheduler
    if isinstance(before, BlockScheduler):
        return {}
    if type(before) is not theirs.BlockRefinementScheduler:
        raise TypeError(f"obj.scheduler: expected a BlockRefinementScheduler, got {type(before).__name__}")
    return {"scheduler": BlockScheduler.from_config(before.config)}


class BlockScheduler(theirs.BlockRefinementScheduler):  # type: ignore[misc]
    """diffusers' `BlockRefinementScheduler`, with a step that is one draw and one commit.

    A draw is a function of the sample's seed, the step within the block, the position and the token, so it does not
    depend on the batch. The seeds come from `generator` at the first step after `set_timesteps`; a list of generators
    has one for each sample. The mask token is never drawn, where the original may draw it and then never removes it.
    Without editing, only masked positions are drawn: known ones report their own token and probability 1.
    Without a mask token (uniform corruption) a step is the original's own.
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
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Take a step as the original does; generator may be a list."""
        if mask_token_id is None:
            return super().step(
                model_output, timestep, sample, temperature=temperature, top_p=top_p, top_k=top_k,
                sampling_method=sampling_method, threshold=threshold, editing_threshold=editing_threshold,
                generator=generator, return_dict=return_dict,
            )  # fmt: skip
        if self._transfer_schedule is None:
            self.set_timesteps(self.num_inference_steps)
        check_generators(generator, len(sample))
        if self._seeds is None:
            self._seeds, self._block = draw_seeds(len(sample), generator, sample.device), -1
        # timesteps count the steps of a block while anything is masked, and the first of a block always is
        first = int(timestep) == 0
        self._block, self._steps_in_block = self._block + first, 0 if first else self._steps_in_block + 1
        threshold = self.config.threshold if threshold is None else threshold
        replace_above = self.config.editing_threshold if editing_threshold is None else editing_threshold
        edits = replace_above is not None and replace_above > 0
        common: dict[str, Any] = {"mask_token_id": mask_token_id, "seed": self._seeds, "step": self._steps_in_block}
        # as the original, which does not truncate where it does not draw
        if temperature == 0 or sampling_method == "greedy":
            temperature, top_k, top_p = 0.0, None, None
        drawn = sample_tokens(
            model_output,
            torch.full_like(sample, mask_token_id) if edits else sample,
            first_position=self._block * sample.shape[1],
            temperature=temperature,
            top_k=top_k if top_k and top_k < model_output.shape[-1] else None,
            top_p=1.0 if top_p is None else top_p,
            **common,
        )
        edit = None
        if edits:
            sure = drawn.logprob if prompt_mask is None else drawn.logprob.masked_fill(prompt_mask, math.nan)
            edit = TokenEdit(drawn.token_ids, sure, _log(replace_above))
        after, _ = commit_tokens(
            drawn.token_ids,
            drawn.logprob,
            sample,
            count=int(self._transfer_schedule[min(int(timestep), len(self._transfer_schedule) - 1)]),
            # the original's are above it
            threshold=float(np.nextafter(np.float32(_log(threshold)), np.float32(math.inf))),
            edit=edit,
            **common,
        )
        masked = sample == mask_token_id
        # known positions that are not drawn have logprob +inf
        found = (
            after, masked & (after != mask_token_id), ~masked & (after != sample), drawn.token_ids,
            drawn.logprob.exp().clamp(max=1), model_output,
        )  # fmt: skip
        return theirs.BlockRefinementSchedulerOutput(*found) if return_dict else found


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -1e30
