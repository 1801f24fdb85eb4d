"""`HaltonSampler` and `ConfidenceSampler` of Halton-MaskGIT (arXiv 2503.17076), on our draw and commit."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mgt_kernels import commit_tokens, sample_tokens

from . import ATTRIBUTE, accelerate

# what both draw where no labels are given, before random ones: from a goldfish to a teddy bear
_CLASSES = (1, 7, 282, 604, 724, 179, 751, 404, 850)

_Images = tuple[Tensor, list[Tensor], list[Tensor]]


def replacements(sampler: Any) -> dict[str, Any]:
    """A class of ours below the sampler's own, since Python looks `__call__` up in the class."""
    return {"__class__": _below(type(sampler))}


def _below(original: type) -> type:
    names = {kind.__name__ for kind in original.__mro__}
    ours = _Halton if "HaltonSampler" in names else _Confidence
    return type(original.__name__, (ours, original), {"_original": original, "__reduce__": _reduce})


def _reduce(sampler: Any) -> tuple[Any, ...]:
    original = copy.copy(vars(sampler))
    original.pop(ATTRIBUTE, None)
    return _rebuild, (sampler._original, original)


def _rebuild(original: type, state: dict[str, Any]) -> Any:
    sampler: Any = object.__new__(original)
    vars(sampler).update(state)
    accelerate(sampler)
    return sampler


class _Run:
    """One call of a sampler: its canvas, and what it returns.

    As in the originals, every position is drawn in every step, and known ones may take the new token. The mask is never
    drawn, `init_code` stays as it is, and a sample's seed is taken from PyTorch's generator.
    """

    def __init__(
        self, trainer: Any, model: Any, w: float, init_code: Tensor | None, nb_sample: int, labels: Tensor | None
    ) -> None:
        self.trainer, self.model, self.w = trainer, model, w
        device, self.mask_id, self.side = trainer.args.device, trainer.args.mask_value, trainer.input_size
        if labels is None:
            others = [random.randint(0, 999) for _ in range(nb_sample - len(_CLASSES))]
            labels = torch.tensor([*_CLASSES, *others][:nb_sample], device=device)
        masks = torch.full((nb_sample, self.side**2), self.mask_id, device=device)
        self.code = masks.clone() if init_code is None else init_code.reshape(masks.shape).clone()
        self.labels, self._masks = labels, masks
        self.seeds = torch.randint(2**63 - 1, (nb_sample,)).to(device)
        self._dropped = torch.ones(nb_sample, dtype=torch.bool, device=device)
        self._codes: list[Tensor] = []
        self._shown: list[Tensor] = []
        model.eval()

    def draw(self, k: int, w: float, temperature: float, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities, (B, N), with guidance c + w (c - u)."""
        code, uncond = self.code.view(-1, self.side, self.side), None
        if self.w == 0:
            logits = self.model(code.clone(), self.labels, ~self._dropped)
        else:
            halves = [torch.cat([self._dropped.logical_not(), self._dropped]), self.labels.repeat(2)]
            logits, uncond = self.model(code.repeat(2, 1, 1), halves[1], halves[0]).chunk(2)
        drawn = sample_tokens(
            logits, self._masks, uncond_logits=uncond, guidance_scale=1.0 + w, temperature=temperature, top_k=top_k,
            mask_token_id=self.mask_id, seed=self.seeds, step=k,
        )  # fmt: skip
        return drawn.token_ids, drawn.logprob

    def take(self, drawn: Tensor, takes: Tensor, shown: Tensor) -> None:
        """Write the drawn tokens where `takes`, and keep what is returned of the step."""
        self.code = torch.where(takes, drawn, self.code)
        self._codes.append(drawn.view(-1, self.side, self.side))
        self._shown.append(shown.view(-1, self.side, self.side).float())

    def images(self) -> _Images:
        code = self.code.view(-1, self.side, self.side).clamp(0, self.trainer.args.codebook_size - 1)
        images = self.trainer.ae.decode_code(code).clamp(-1, 1)
        self.trainer.vit.train()
        return images, self._codes, self._shown


class _Halton:
    """Positions in the order of a Halton sequence, from the first on, anew in each step."""

    @torch.no_grad()
    def __call__(
        self: Any,
        trainer: Any,
        init_code: Tensor | None = None,
        nb_sample: int = 50,
        labels: Tensor | None = None,
        verbose: bool = True,
    ) -> _Images:
        """Draw images as the original does."""
        if self.basic_halton_mask is None:
            self.basic_halton_mask = self.build_halton_mask(trainer.input_size)
        run = _Run(trainer, trainer.vit, self.w, init_code, nb_sample, labels)
        order = (self.basic_halton_mask[:, 0] * run.side + self.basic_halton_mask[:, 1]).expand(nb_sample, -1)
        if self.randomize:
            shifts = torch.randint(0, run.side**2, (nb_sample, 1))
            order = order.gather(1, (torch.arange(order.shape[1]) - shifts) % order.shape[1])
        for k in tqdm(range(self.step), leave=False, disable=not verbose):
            revealed = 1 - torch.arccos(torch.tensor((k + 1) / self.step)) / (math.pi * 0.5)
            first = order[:, : max(k + 1, int(revealed * run.side**2))].to(run.code.device)
            takes = torch.zeros_like(run.code, dtype=torch.bool).scatter(1, first, True)
            factor = float(self.temperature[k]) ** self.temp_pow * (0.5 if k < self.temp_warmup else 1)
            drawn, _ = run.draw(k, self.w, 1 / factor, self.top_k if self.top_k > 0 else None)
            run.take(drawn, takes, takes)
        return run.images()


class _Confidence:
    """The surest positions, with noise that falls to nothing."""

    @torch.no_grad()
    def __call__(
        self: Any,
        trainer: Any,
        init_code: Tensor | None = None,
        nb_sample: int = 50,
        labels: Tensor | None = None,
        verbose: bool = True,
    ) -> _Images:
        """Draw images as the original does."""
        model = trainer.ema if trainer.args.use_ema else trainer.vit
        run = _Run(trainer, model, self.w, init_code, nb_sample, labels)
        counts = self.build_sequence(self.step, run.side, mode=self.sched_mode, verbose=False).tolist()
        for k, revealed in enumerate(tqdm(counts, leave=False, disable=not verbose)):
            progress = k / max(self.step - 1, 1)
            drawn, score = run.draw(k, self.w * progress, 1 / self.sm_temp)
            temperature = self.r_temp * (1 - progress) if self.randomize == "linear" else 0.0
            if self.randomize == "random" or (self.randomize == "warm_up" and k < 2):
                score, temperature = torch.zeros_like(score), 1.0
            masked = run.code == run.mask_id
            count = (max(revealed, k + 1) - (~masked).sum(1)).clamp(min=0).minimum(masked.sum(1))
            after, _ = commit_tokens(
                drawn, score, run.code, count=count, temperature=temperature, mask_token_id=run.mask_id,
                seed=run.seeds, step=k,
            )  # fmt: skip
            still = after == run.mask_id
            run.take(drawn, ~still, still)
        return run.images()
