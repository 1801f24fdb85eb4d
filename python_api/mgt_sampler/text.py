"""Masked diffusion language models: text drawn block by block after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mgt_kernels.checks import check_backend

from .arguments import integer, kind
from .presets import LLADA
from .sampling import check_all_drawn, seeds_of
from .schedules import check_num_inference_steps
from .state import State
from .step import Predict, Rule, begin, look, take_step, take_steps

# tokens (B, L) int64 and bool (B, L), False where there is padding -> logits (B, L, V)
PredictText: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class TextStep(NamedTuple):
    """What `generate_text` tells its callback after every step.

    Attributes:
        block: which block, from 0.
        step: k, within the block.
        tokens: int64 (B, L), prompt and text, mask_token_id where masked.
    """

    block: int
    step: int
    tokens: Tensor


@dataclass(frozen=True)
class TextOutput:
    """What `generate_text` returns.

    Attributes:
        tokens: int64 (B, L): padding, prompt and text; behind an end of the text that end again.
        text: int64 (B, gen_length), the last part of it.
        lengths: int64 (B,), tokens of the text up to its end, that one among them.
        seed: int64 (B,), each sample's own.
        model_calls: how often `predict` was called.
        sample_calls: int64 (B,), on the CPU: how many of these each sample needed.
    """

    tokens: Tensor
    text: Tensor
    lengths: Tensor
    seed: Tensor
    model_calls: int
    sample_calls: Tensor


@torch.no_grad()
def generate_text(
    predict: PredictText,
    prompt: Sequence[Sequence[int]] | Tensor,
    rule: Rule = LLADA,
    *,
    mask_token_id: int,
    gen_length: int = 128,
    block_length: int | None = None,
    num_inference_steps: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    shift_logits: bool = False,
    max_edits: int = 0,
    seed: int | Sequence[int] | Tensor = 0,
    callback: Callable[[TextStep], object] | None = None,
    progress: bool = True,
    backend: str = "auto",
) -> TextOutput:
    """Draw text after a prompt, block by block; within a block all tokens are drawn at once, in T steps of a rule.

        model = AutoModelForMaskedLM.from_pretrained(...)
        output = generate_text(
            lambda tokens, attention_mask: model(tokens, attention_mask=attention_mask).logits,
            [tokenizer.encode("a question")],
            presets.LLADA,
            mask_token_id=126336,
            block_length=32,
            num_inference_steps=16,
        )

    Prompts may be of different lengths: they end at the same column, with padding before the shorter ones, which the
    model is told of. A draw is a function of the logits, the sample's seed, the block, the step and the place of the
    token in its own sequence: as far as the model's logits do not depend on batch and padding, the text does not. The
    mask token is never drawn, the prompt never changed.

    With a guidance scale other than 1 the unconditional half are the logits of the text whose prompt is masked, as
    LLaDA has it.

    Args:
        predict: the model: tokens (B, L) int64 and the attention mask (B, L) bool, False at padding -> logits
            (B, L, V), float32, bfloat16 or float16.
        prompt: B lists of tokens, or a tensor (B, P) without padding.
        rule: what a step does: one of `presets` or `samplers`, or one's own.
        mask_token_id: stands for a token that is not known yet.
        gen_length: tokens of the text, at least 1.
        block_length: tokens of a block, drawn before those of the next; it divides gen_length. None: all at once.
        num_inference_steps: T, steps of a block; None: the rule's, but no more than block_length.
        eos_token_id: ends the text: what is behind it is not drawn, and no block after the one that all samples end in.
            None: nothing does.
        pad_token_id: stands before shorter prompts; None: mask_token_id.
        shift_logits: the model predicts at a position the token of the next one, as Dream does.
        max_edits: with a rule that replaces known tokens: further steps of a full block, until none changes one.
        seed: an int, from which `sample_seeds` makes one for each sample; or ints (B,), one for each sample.
        callback: called with a `TextStep` after every step, whose tensor is its own to keep and to change.
        progress: show a progress bar.
        backend: of `mgt_kernels`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or logits of another shape; the message names it.
    """
    gen_length, mask_token_id = integer("gen_length", gen_length), integer("mask_token_id", mask_token_id)
    block_length = gen_length if block_length is None else integer("block_length", block_length)
    if gen_length < 1:
        raise ValueError(f"gen_length: expected at least 1, got {gen_length}")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"block_length: expected a divisor of gen_length {gen_length}, got {block_length}")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a Rule, got {kind(rule)}")
    steps = min(rule.num_inference_steps, block_length) if num_inference_steps is None else num_inference_steps
    steps = check_num_inference_steps(steps)
    canvas, padding = _canvas(prompt, gen_length, mask_token_id, pad_token_id)
    device, batch_size, prompt_length = canvas.device, len(canvas), canvas.shape[1] - gen_length
    seeds = seeds_of(seed, batch_size, device)
    if len(seeds) != batch_size:
        raise ValueError(f"seed: expected one for each of {batch_size} prompts, got {len(seeds)}")
    check_backend(backend, device)
    attention_mask = torch.arange(canvas.shape[1], device=device) >= padding[:, None]
    calls, sample_calls = 0, torch.zeros(batch_size, dtype=torch.int64, device="cpu")
    ended = torch.zeros(batch_size, dtype=torch.bool, device=device)

    def logits_of(block: Tensor, scale: float, start: int) -> tuple[Tensor, Tensor | None]:
        """Logits of a block, and those without the prompt where the scale makes a difference."""
        nonlocal calls
        tokens = torch.cat([canvas[:, :start], block, canvas[:, start + block.shape[1] :]], 1)
        halves: list[Tensor] = []
        for guided in (True, False):
            if scale == (0 if guided else 1):
                continue
            if not guided:
                tokens = torch.cat(
                    [torch.full_like(canvas[:, :prompt_length], mask_token_id), tokens[:, prompt_length:]], 1
                )
            calls += 1
            logits = predict(tokens.clone(), attention_mask.clone())
            if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
                expected = f"({tokens.shape[0]}, {tokens.shape[1]}, V)"
                raise ValueError(f"predict: expected logits of shape {expected}, got {kind(logits)}")
            if shift_logits and start == 0:
                # nothing predicts the first token
                logits = torch.cat([logits[:, :1], logits], 1)
            first = start - (shift_logits and start > 0)
            part = logits[:, first : first + block.shape[1]]
            # the second call may write over what the first returned
            halves.append(part.clone() if guided and scale != 1 else part)
        return halves[0], halves[1] if len(halves) == 2 else None

    num_blocks = gen_length // block_length
    with tqdm(total=num_blocks * steps, desc="sampling", disable=not progress) as bar:
        for index in range(num_blocks):
            start = prompt_length + index * block_length
            block = canvas[:, start : start + block_length].clone()
            if eos_token_id is not None:
                block = torch.where(ended[:, None], eos_token_id, block)
            state = begin(
                block,
                seed=seeds,
                mask_token_id=mask_token_id,
                num_inference_steps=steps,
                first_position=start - padding,
                backend=backend,
            )
            # a step with a revisit draws twice; no two blocks share a number
            state.num_draws = 2 * steps * index

            def predict_block(tokens: Tensor, scale: float, start: int = start) -> tuple[Tensor, Tensor | None]:
                return logits_of(tokens, scale, start)

            def done(before: State, after: State, calls_before: int, index: int = index, start: int = start) -> None:
                nonlocal sample_calls
                sample_calls += (calls - calls_before) * before.masked.any(1).cpu()
                if callback is not None:
                    whole = torch.cat([canvas[:, :start], after.tokens, canvas[:, start + block_length :]], 1)
                    callback(TextStep(index, before.step, whole))

            calls_before = calls
            for after, _ in take_steps(rule, predict_block, state):
                done(state, after, calls_before)
                state, calls_before = after, calls
                bar.update()
            bar.update(steps - state.step)
            state = _edited(rule, predict_block, state, max_edits)
            check_all_drawn("predict", state.tokens, mask_token_id)
            canvas[:, start : start + block_length] = state.tokens
            if eos_token_id is not None:
                ended |= (state.tokens == eos_token_id).any(1)
                if ended.all():
                    break
    text = canvas[:, prompt_length:]
    lengths = torch.full((batch_size,), gen_length, dtype=torch.int64, device=device)
    if eos_token_id is not None:
        is_end = text == eos_token_id
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, lengths)
        behind = torch.arange(gen_length, device=device) >= lengths[:, None]
        text.masked_fill_(behind, eos_token_id)
    return TextOutput(canvas, text, lengths, seeds, calls, sample_calls)


def _edited(rule: Rule, predict: Predict, state: State, most: int) -> State:
    """A full block after further steps, until none changes a token."""
    for _ in range(most):
        # the last step again, which masks nothing
        last = replace(state, step=state.num_inference_steps - 1)
        before = state.tokens
        state, _drawn = take_step(rule, look(predict, before, 1.0), last)
        if torch.equal(before, state.tokens):
            break
    return state


def _canvas(
    prompt: Sequence[Sequence[int]] | Tensor, gen_length: int, mask_token_id: int, pad_token_id: int | None
) -> tuple[Tensor, Tensor]:
    """Prompts that end at the same column, with masks behind them; and how much padding is before each, int64 (B,)."""
    if isinstance(prompt, Tensor):
        if prompt.dtype != torch.int64 or prompt.ndim != 2:
            raise TypeError(f"prompt: expected int64 (B, P) or lists of tokens, got {kind(prompt)}")
        rows = list(prompt)
    else:
        try:
            rows = [torch.tensor(list(tokens), dtype=torch.int64, device="cpu") for tokens in prompt]
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"prompt: expected int64 (B, P) or lists of tokens, got {kind(prompt)}") from None
    longest = max((len(row) for row in rows), default=0)
    pad = mask_token_id if pad_token_id is None else integer("pad_token_id", pad_token_id)
    device = prompt.device if isinstance(prompt, Tensor) else torch.device("cpu")
    canvas = torch.full((len(rows), longest + gen_length), mask_token_id, dtype=torch.int64, device=device)
    padding = torch.tensor([longest - len(row) for row in rows], dtype=torch.int64, device=device)
    for row, tokens, empty in zip(canvas, rows, padding.tolist(), strict=True):
        row[:empty] = pad
        row[empty:longest] = tokens
    return canvas, padding
