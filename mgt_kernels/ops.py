"""The public ops: arguments are checked here, once, and handed to the backend asked for."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgt_kernels import cpu, reference
from mgt_kernels.checks import (
    check_backend,
    check_bound,
    check_choice,
    check_confidence_temperature,
    check_draw,
    check_first_position,
    check_guidance_scale,
    check_min_p,
    check_noise_scale,
    check_range,
    check_rule,
    check_shape,
    check_softcap,
    check_statistics,
    check_step,
    check_step_range,
    check_temperature,
    check_tensor,
    check_top_k,
    check_top_p,
    integer,
    is_a,
    number,
    per_sample,
    token_bias,
)
from mgt_kernels.draw import Draw
from mgt_kernels.registration import register

REMASK_VARIANTS = ("paper", "official", "random")


class Sampled(NamedTuple):
    """What `sample_tokens` returns, each (B, N); None what was not asked for.

    With l and p as there. Positions that were not read have +inf, and their own token for argmax.

    Attributes:
        token_ids: int64, the drawn token of a masked position; the others keep theirs.
        logprob: float32 nats, log p of the drawn token, +inf at known positions.
        argmax: int64, the token with the largest l, the lowest of equal ones.
        max_logprob: float32 nats, log p of argmax.
        margin: float32, p of argmax less the largest p without it.
        entropy: float32 nats, -sum_j p_j log p_j, at least 0.
        logsumexp: float32 nats, log sum_j exp(l_j).
        known_logprob: float32 nats, log p of a known position's token, +inf at masked positions.
        logit: float32, l of the drawn token before temperature, +inf at known positions.
    """

    token_ids: Tensor
    logprob: Tensor
    argmax: Tensor | None = None
    max_logprob: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    known_logprob: Tensor | None = None
    logit: Tensor | None = None


def _draw(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    uncond_logits: Tensor | None,
    guidance_scale: float | Tensor,
    second_uncond_logits: Tensor | None,
    second_guidance_scale: float | Tensor,
    guidance: str,
    softcap: float | Tensor | None,
    noise_scale: float | Tensor,
    temperature: float | Tensor,
    first_position: int | Tensor,
    allowed: Tensor | None,
) -> tuple[Any, ...]:
    """Check the arguments of a draw; return the fields of a `Draw`."""
    check_draw(logits, tokens, uncond_logits, second_uncond_logits)
    device, batch = logits.device, logits.shape[0]
    return (
        logits, tokens, per_sample("seed", seed, batch, device), check_step(step, device),
        integer("mask_token_id", mask_token_id), uncond_logits,
        number("guidance_scale", guidance_scale, device, batch), number("noise_scale", noise_scale, device),
        number("temperature", temperature, device), check_first_position(first_position, batch, device),
        token_bias(allowed, logits), second_uncond_logits,
        number("second_guidance_scale", second_guidance_scale, device, batch),
        check_choice("guidance", guidance, cpu.GUIDANCE),
        math.inf if softcap is None else number("softcap", softcap, device),
    )  # fmt: skip


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    second_uncond_logits: Tensor | None = None,
    second_guidance_scale: float | Tensor = 1.0,
    guidance: str = "nested",
    softcap: float | Tensor | None = None,
    noise_scale: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    first_position: int | Tensor = 0,
    allowed: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    logprob_of: str = "kept",
    rows: str = "masked",
    statistics: Sequence[str] = (),
    backend: str = "auto",
) -> Sampled:
    r"""Draw a token for every masked position from guided, noisy logits, with its log-probability, in one read.

    With c = logits, u = uncond_logits, eps ~ N(0, 1) and g ~ Gumbel(0, 1), for each masked position and token j::

        guided_j = u_j + guidance_scale (c_j - u_j)        (c_j where uncond_logits is None)
        l_j      = (guided_j + allowed_j + noise_scale eps_j) / temperature
        token    = argmax_j (l_j + g_j) over the kept j    ties: the lowest id
        logprob  = l_token - logsumexp(l)                  nats, over the kept j

    All tokens are kept, unless top_k, top_p or min_p leave some out. A second unguided half v = second_uncond_logits,
    with s and t for guidance_scale and second_guidance_scale, joins by one of::

        guided_j = v_j + t (g_j - v_j),  g_j = u_j + s (c_j - u_j)          guidance "nested"
        guided_j = c_j + (s - 1) (c_j - u_j) + (t - 1) (c_j - v_j)          guidance "dual"

    softcap r > 0 first makes r tanh(x / r) of every finite logit x of each half.

    eps and g are functions of (seed, step, position, token id) alone: a sample's result does not depend on the batch it
    is in, on threads, instruction set or backend. Temperature 0 takes the argmax without g, and logprob is that of
    temperature 1. A logit of -inf (in either half) forbids its token; mask_token_id is never drawn. On CUDA, where
    raising would wait for the device, a bad row gives mask_token_id, and NaN for logprob and the statistics; of known
    tokens, places and what is allowed nothing is checked, and a known token outside [0, V) has known_logprob -inf. With
    16-bit logits, asking for statistics may change the last bits of logprob there; token_ids never.

    g lies within [-3.2, 22.9]. Where l is so large that neighbouring floats (float32; float64 with "reference") are
    further apart, the sum l_j + g_j loses g, and equal logits give the lowest id: the draw begins to coarsen at
    |l| = 1e5, whose neighbours are 0.008 apart, and g is lost from 3e8 on. Subtract a row's maximum before such logits.

    Integers may be Python's or NumPy's, and tensors of any integer dtype. Scales, temperature, softcap, top_p and min_p
    may be numbers of any kind, or 0-dimensional tensors on the CPU or the device of logits: then one compiled graph
    serves all values, and a CUDA graph reads those on its device anew at each replay (their ranges go unchecked there).
    What is a number, or a tensor on the CPU, when a CUDA graph is captured stays what it was at every replay: with a
    seed and a step that are ints, each replay draws the same noise.

    Args:
        logits: (B, N, V) float32, bfloat16 or float16, with unit stride over V or over N (then read without a copy).
        tokens: (B, N) int64; positions that hold mask_token_id are drawn, the others are known, and may hold any
            number where "known_logprob" is not asked for. With unit stride over V, a position that is not read costs
            nothing; with unit stride over N, 32 neighbours are read together if any of them is.
        mask_token_id: marks masked positions; may lie outside [0, V).
        seed: (B,), a seed per sample, or one integer, with which all samples get the same noise: two samples with
            equal logits get equal tokens.
        step: index of the decoding step, within [0, 2^32); an integer, which a CUDA graph keeps, or a 0-dimensional
            tensor, which it reads anew at each replay if that lies on the device of logits.
        uncond_logits: (B, N, V) of the same dtype and device, or None for no guidance.
        guidance_scale: finite; may be (B,), a scale per sample.
        second_uncond_logits: (B, N, V) like uncond_logits, which is there too, or None.
        second_guidance_scale: like guidance_scale; 1 changes nothing.
        guidance: "nested" (LaVida-O's two scales) or "dual" (an image's and a text's condition, each left out once).
        softcap: above 0, or None; what the last layer of DiffusionGemma does.
        noise_scale: standard deviation of the Gaussian logit noise, >= 0 (arXiv 2411.10781, noise regularization).
        temperature: 0, or at least 1e-30.
        first_position: (B,) or one integer, the place of a sample's first position in its sequence, of which noise is a
            function: so a part of a sequence draws what the whole draws there. A flat batch of rows (R, V) of many
            sequences is R samples of one position, `logits[:, None]`, each with its own seed and first_position.
        allowed: (V,) bool, the tokens that may be drawn at any position; or (V,) float32, added to the guided logits of
            every position, -inf to forbid; or None. A window of neighbouring ids needs none: slice the logits.
        top_k: within [1, V], an int: the k largest l are kept, and all that equal the k-th. None: all.
        top_p: within (0, 1]: of what top_k leaves, the fewest largest l whose probabilities add up to top_p are kept,
            and all that equal the last. A token counts exp(l - max l) in whole units of 2^-31, so that sums are exact.
        min_p: within [0, 1): of what those leave, the tokens of at least min_p times the largest probability are kept.
        logprob_of: "kept": logprob and the statistics are of the distribution that is drawn from, with l = -inf for
            what is left out; "full": of the one of all tokens.
        rows: the positions whose logits are read, "masked", "known" or "all". Known ones are not drawn.
        statistics: names of what else to give of every position that is read, out of "argmax", "max_logprob", "margin",
            "entropy", "logsumexp", "known_logprob" and "logit"; `Sampled` says what they are. It costs no second read.
        backend: "auto" (CPU: the best instruction set, or MGT_ISA; CUDA: Triton), or one of "reference", "scalar",
            "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "triton"; from "avx512" on, one kernel.

    Returns:
        A `Sampled`: token_ids (B, N) int64 and logprob (B, N) float32; known positions keep their token and get logprob
        +inf; and the statistics.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, stride, device, range or name is wrong, a known token whose log-probability is asked for
            is outside [0, V), nothing is allowed, or the logits of a position that is read hold NaN or +inf or forbid
            every token (the message names sample and position).
        RuntimeError: if the backend asked for is not available.
    """
    draw = _draw(
        logits, tokens, mask_token_id=mask_token_id, seed=seed, step=step, uncond_logits=uncond_logits,
        guidance_scale=guidance_scale, second_uncond_logits=second_uncond_logits,
        second_guidance_scale=second_guidance_scale, guidance=guidance, softcap=softcap, noise_scale=noise_scale,
        temperature=temperature, first_position=first_position, allowed=allowed,
    )  # fmt: skip
    device = logits.device
    asked = check_statistics(statistics)
    token_ids, logprob, others = _call_sample_tokens(
        *draw, check_choice("rows", rows, cpu.ROWS), asked, check_top_k(top_k, logits.shape[2]),
        number("top_p", top_p, device), number("min_p", min_p, device),
        check_choice("logprob_of", logprob_of, cpu.LOGPROB_OF), check_backend(backend, device),
    )  # fmt: skip
    if not asked:
        return Sampled(token_ids, logprob)
    return Sampled(token_ids, logprob, **dict(zip(asked.split(","), others, strict=True)))


@dataclass(frozen=True)
class DifferentialState:
    """What `differential_sample` remembers of one generation: a handle on tensors that each step updates in place.

    Attributes:
        history: (B, N, V) int16, the bits of 16-bit codes of -log q, q the distribution of the previous step; see
            `mgt_kernels.reference.decode_history`. Rows that no step has read are never touched.
        written: (B, N) bool, whether the row of history holds the previous step's distribution.
        divergence: (B, N) float32, KL(p || q) in nats of the step that returned this handle, +inf where there is none.
        seed: (B,) int64.
        step: 0-dimensional int64, the step that history belongs to.
        variant, aliased_history, mask_token_id: as the generation was begun with.
    """

    history: Tensor
    written: Tensor
    divergence: Tensor
    seed: Tensor
    step: Tensor
    variant: str
    aliased_history: bool
    mask_token_id: int


def differential_sample(
    logits: Tensor,
    tokens: Tensor,
    state: DifferentialState | None,
    *,
    mask_token_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    share: float = 0.75,
    variant: str = "paper",
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    second_uncond_logits: Tensor | None = None,
    second_guidance_scale: float | Tensor = 1.0,
    guidance: str = "nested",
    softcap: float | Tensor | None = None,
    noise_scale: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    first_position: int | Tensor = 0,
    allowed: Tensor | None = None,
    aliased_history: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, DifferentialState]:
    r"""Draw like `sample_tokens`, but the share of positions that changed least from what changed since the last step.

    With l as in `sample_tokens`, p = softmax(l), q the previous step's p, and g ~ Gumbel(0, 1), for each position::

        D        = sum_j p_j (log p_j - log q_j)            nats; log q_j >= -1047.9375, so D is finite
        w_j      = |p_j - q_j|                              variant "paper"
        w_j      = max(p_j - q_j, 1e-6)                     variant "official"
        token    = argmax_j (log w_j + g_j)                 if selected, else argmax_j (l_j + g_j); ties: the lowest id
        logprob  = log(w_token / sum_j w_j)                 if selected, else l_token - logsumexp(l)

    "paper" ranks the M masked positions by D and selects the round(share M) smallest (halves away from zero).
    "official", as the published code, ranks all N positions, so that the logits of known ones are read too, and selects
    the floor(share N) smallest. Ties: the lower position. A forbidden token (-inf in either half, or mask_token_id) has
    w = 0, whatever its q. In "paper", w = p where the sum of |p_j - q_j| is below 2^-11, which rounding the history can
    make of p = q. Tokens with w < 2^-100 are not drawn. Positions that are not selected get the bits that
    `sample_tokens` gives. Temperature 0 takes the argmax of w (or of l) without g; logprob is that of temperature 1.

    The history is rounded to 16 bits per token: q is relatively exact to 2^-12 down to exp(-24), to 2^-5 below. A row
    is compared with the step before, so a position that was known then (and is masked again now) has D = +inf: it ranks
    last and is drawn from p.

    On CUDA, where raising would wait for the device, a bad row ranks last, gives mask_token_id and logprob and
    divergence NaN, and counts as not written. So do all rows of a sample whose seed is not the state's; and all rows if
    step does not follow the state's, but then the state stays as it is. Known tokens go unchecked.

    Args:
        logits: (B, N, V), as for `sample_tokens`.
        tokens: (B, N) int64; positions that hold mask_token_id are drawn.
        state: None begins a generation with a plain step, whose results are `sample_tokens`'; then what the last call
            returned, whose tensors this call updates. After an error in the logits or tokens no row of it counts as
            written.
        mask_token_id: marks masked positions; may lie outside [0, V).
        seed: (B,), or one integer, with which all samples get the same noise; the same at all steps of a generation.
        step: index of the decoding step, within [0, 2^32), one more than the state's; an integer or a 0-dimensional
            tensor. A CUDA graph keeps an integer, and so ends the generation at its second replay.
        share: of the positions that are drawn from w, within [0, 1]; 0 gives `sample_tokens`' results.
        variant: "paper" or "official".
        uncond_logits: (B, N, V) of the same dtype and device, or None for no guidance.
        guidance_scale: finite; a number or a 0-dimensional tensor, as the next two, or (B,).
        second_uncond_logits, second_guidance_scale, guidance, softcap: as for `sample_tokens`.
        noise_scale: standard deviation of the Gaussian logit noise, >= 0.
        temperature: 0, or at least 1e-30.
        first_position, allowed: as for `sample_tokens`; the same at all steps of a generation.
        aliased_history: variant "official" only: selected rows leave w (not normalised) behind as the next step's q, as
            the published code does, whose stored tensor is the one it edits. Reads the logits twice.
        backend: as for `sample_tokens`.

    Returns:
        token_ids (B, N) int64, logprob (B, N) float32, known positions as in `sample_tokens`; and the state that the
        next step takes.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, stride, device or range is wrong; the state belongs to another batch, device, seed,
            setting or step; nothing is allowed; or the logits of a position that is read hold NaN or +inf or forbid
            every token.
        RuntimeError: if the backend asked for is not available.

    Source: differential sampling, arXiv 2411.10781; its authors' code for variant "official".
    """
    draw = Draw._make(
        _draw(
            logits, tokens, mask_token_id=mask_token_id, seed=seed, step=step, uncond_logits=uncond_logits,
            guidance_scale=guidance_scale, second_uncond_logits=second_uncond_logits,
            second_guidance_scale=second_guidance_scale, guidance=guidance, softcap=softcap, noise_scale=noise_scale,
            temperature=temperature, first_position=first_position, allowed=allowed,
        )
    )  # fmt: skip
    batch, num_positions, num_tokens = logits.shape
    device = logits.device
    backend = check_backend(backend, device)
    share = float(number("share", share, device))
    check_range("share", share, 0)
    if share > 1:
        raise ValueError(f"share: expected a number within [0, 1], got {share}")
    if variant not in cpu.DIFFERENTIAL_VARIANTS:
        raise ValueError(f"variant: expected one of {cpu.DIFFERENTIAL_VARIANTS}, got {variant!r}")
    if not isinstance(aliased_history, bool):
        raise TypeError(f"aliased_history: expected a bool, got {type(aliased_history).__name__}")
    if aliased_history and variant != "official":
        raise ValueError(f"aliased_history: expected False with variant {variant!r}; it is a switch of 'official'")
    settings = dict(variant=variant, aliased_history=aliased_history, mask_token_id=draw.mask_token_id)
    if state is None:
        # of the logits, so that they are batched under vmap where those are
        history = logits.new_empty(batch, num_positions, num_tokens, dtype=torch.int16)
        written = logits.new_zeros(batch, num_positions, dtype=torch.bool)
        history_step = logits.new_full((), -1, dtype=torch.int64)
        # the caller may change its tensor; the generation's seeds stay
        history_seed = _for_each(draw.seed, batch, device).clone()
    else:
        _check_state(state, logits, settings)
        history, written, history_seed, history_step = state.history, state.written, state.seed, state.step
    # torch refuses a gradient to an op that writes to its arguments
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        token_ids, logprob, divergence = _call_differential_sample(
            *draw, history, written, history_step, history_seed, state is not None, share, variant, aliased_history,
            backend,
        )  # fmt: skip
    return (
        token_ids,
        logprob,
        DifferentialState(
            history, written, divergence, history_seed, history_step, variant, aliased_history, draw.mask_token_id
        ),
    )


def mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: int | Tensor,
    *,
    mask_token_id: int,
    temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    backend: str = "auto",
) -> Tensor:
    r"""Mask again the mask_len least confident of the positions that were drawn in this step.

    With g ~ Gumbel(0, 1), a function of (seed, step, position) alone::

        confidence_i = logprob_i + temperature g_i          known positions: +inf, never masked

    and the mask_len lowest become mask_token_id; among ties lower positions are masked first. Exactly mask_len, always.

    Args:
        token_ids: (B, N) int64, as `sample_tokens` returns them.
        logprob: (B, N) float32 in nats, +inf at known positions.
        mask_len: how many positions stay masked, within [0, positions whose logprob is not +inf]; an integer for all
            samples or (B,). (On CUDA, where checking would wait for the device, a larger value masks every such
            position and NaN ranks lowest.)
        mask_token_id: what masked positions hold.
        temperature: of the confidence noise, finite and >= 0; a number or a 0-dimensional tensor.
        seed: (B,), or one integer, with which all samples get the same noise.
        step: index of the decoding step, within [0, 2^32); an integer, which a CUDA graph keeps, or a 0-dimensional
            tensor.
        backend: as for `sample_tokens`.

    Returns:
        tokens (B, N) int64.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device or range is wrong, mask_len is out of range, or logprob holds NaN.
        RuntimeError: if the backend asked for is not available.

    Source: the re-masking of MaskGIT (arXiv 2202.04200, section 3.2) with the annealed Gumbel noise of its code.
    """
    check_tensor("token_ids", token_ids, 2, (torch.int64,))
    check_tensor("logprob", logprob, 2, (torch.float32,), token_ids.device)
    check_shape("logprob", logprob, token_ids.shape)
    batch, device = token_ids.shape[0], token_ids.device
    return _call_mask_by_confidence(
        token_ids, logprob, per_sample("mask_len", mask_len, batch, device), per_sample("seed", seed, batch, device),
        check_step(step, device), integer("mask_token_id", mask_token_id), number("temperature", temperature, device),
        check_backend(backend, device),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenEdit:
    """What `commit_tokens` does to known tokens: those of which the model has become sure otherwise, or unsure.

    A known token that is not `argmax` is replaced by it where max_logprob > replace_above; any other is masked where
    known_logprob < mask_below. NaN changes nothing. The bounds are in the unit of the tensors, nats for what
    `sample_tokens` gives: log(0.9) for a probability of 0.9, -inf for 0.

    Attributes:
        argmax: (B, N) int64, the likeliest token; with max_logprob and replace_above, or None.
        max_logprob: (B, N) float32, its log-probability.
        replace_above: a number or a 0-dimensional tensor.
        known_logprob: (B, N) float32, the log-probability of the token that is there; with mask_below, or None.
        mask_below: a number or a 0-dimensional tensor.

    Source: LLaDA2.1, whose editing of known tokens (T2T) is the first.
    """

    argmax: Tensor | None = None
    max_logprob: Tensor | None = None
    replace_above: float | Tensor | None = None
    known_logprob: Tensor | None = None
    mask_below: float | Tensor | None = None


def commit_tokens(
    token_ids: Tensor,
    score: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    count: int | Tensor = 1,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    temperature: float | Tensor = 0.0,
    within: tuple[int | Tensor, int | Tensor] | None = None,
    edit: TokenEdit | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Decide which of the drawn tokens stay: the best of the masked positions become known, the others stay masked.

    The masked positions compete, with g ~ Gumbel(0, 1), a function of (seed, step, position) alone, by::

        confidence_i = score_i + temperature g_i            by entropy_bound: -score_i + temperature g_i

    in falling order, among ties the higher position first, as in `mask_by_confidence`. One rule says how many n of the
    best become known, c_1 >= c_2 >= ... being the confidences::

        count            n = count                          exactly
        threshold        the largest n with c_n >= threshold
        factor           the largest n with (n + 1) (1 - c_n) <= factor, c a probability: c_n >= 1 - factor / (n + 1)
        entropy_bound    the largest n with sum H - max H <= entropy_bound over the first n, H = -c an entropy in nats

    but at least count, where threshold, factor or entropy_bound is given, or all where fewer compete. Each H counts in
    whole units of 2^-36 nats within [0, 64], so that the sums are exact. With the count alone,
    `mask_by_confidence` of mask_len = masked positions - count masks the others.

    Args:
        token_ids: (B, N) int64, the drawn tokens, as `sample_tokens` returns them.
        score: (B, N) float32, higher is sooner: any statistic for count and threshold, such as a log-probability; a
            probability for factor, as its authors have it (logprob.exp()); an entropy in nats for entropy_bound, where
            lower is sooner. +inf counts as the largest float. What is not masked is not looked at.
        tokens: (B, N) int64, what was there before; positions that hold mask_token_id compete, the others keep their
            token unless it is edited.
        mask_token_id: marks masked positions.
        seed: (B,), or one integer, with which all samples get the same noise.
        step: index of the decoding step, within [0, 2^32); an integer, which a CUDA graph keeps, or a 0-dimensional
            tensor.
        count: an integer for all samples or (B,), at least 0; without another rule within [0, competing positions].
            (On CUDA, where checking would wait for the device, a larger value commits all that compete, and NaN ranks
            lowest and meets no rule.)
        threshold: finite, in the unit of score: log(0.9) for a probability of 0.9 where score is a log-probability; a
            number or a 0-dimensional tensor, as the next three. They are rounded to float32, as score is.
        factor: finite and >= 0.
        entropy_bound: finite and >= 0; for at most 2^20 positions.
        temperature: of the noise, finite and >= 0.
        within: (start, end), each an integer or (B,): only positions in [start, end) compete, are edited and count for
            done; None for all positions.
        edit: what becomes of known tokens, or None: they stay.
        backend: as for `sample_tokens`.

    Returns:
        tokens (B, N) int64, and done (B,) bool, whether no position is masked any more, of the window if there is one.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device or range is wrong, more than one rule is given, an edit lacks a tensor or a
            bound, count or a window is out of range, or the score of a position that competes is NaN.
        RuntimeError: if the backend asked for is not available.

    Source: count, MaskGIT (arXiv 2202.04200); threshold and factor, Fast-dLLM (arXiv 2505.22618); entropy_bound,
    EB-Sampler (arXiv 2505.24857).
    """
    check_tensor("token_ids", token_ids, 2, (torch.int64,))
    device, shape = token_ids.device, token_ids.shape
    check_tensor("score", score, 2, (torch.float32,), device)
    check_shape("score", score, shape)
    check_tensor("tokens", tokens, 2, (torch.int64,), device)
    check_shape("tokens", tokens, shape)
    rules = {"threshold": threshold, "factor": factor, "entropy_bound": entropy_bound}
    given = [name for name, bound in rules.items() if bound is not None]
    if len(given) > 1:
        raise ValueError(f"threshold, factor, entropy_bound: expected at most one of them, got {' and '.join(given)}")
    rule = given[0] if given else "count"
    value = number(rule, rules[rule], device) if given else 0.0
    if not isinstance(value, Tensor):
        check_rule(rule, value)
    if rule == "entropy_bound" and shape[1] > 2**20:
        raise ValueError(f"entropy_bound: expected at most 2^20 positions, got {shape[1]}")
    start, end = (None, None) if within is None else _window(within, shape, device)
    return _call_commit_tokens(
        token_ids, score, tokens, per_sample("count", count, shape[0], device),
        per_sample("seed", seed, shape[0], device), check_step(step, device), integer("mask_token_id", mask_token_id),
        rule, value, number("temperature", temperature, device), start, end, *_edit_arguments(edit, token_ids),
        check_backend(backend, device),
    )  # fmt: skip


def _window(
    within: tuple[int | Tensor, int | Tensor], shape: torch.Size, device: torch.device
) -> tuple[int | Tensor, int | Tensor]:
    if not isinstance(within, tuple) or len(within) != 2:
        raise TypeError(f"within: expected a tuple (start, end) or None, got {within!r}")
    start, end = (
        per_sample(name, bound, shape[0], device)
        for name, bound in zip(("within's start", "within's end"), within, strict=True)
    )
    if isinstance(start, int) and isinstance(end, int) and not 0 <= start <= end <= shape[1]:
        raise ValueError(f"within: expected 0 <= start <= end <= {shape[1]}, the positions, got ({start}, {end})")
    return start, end


def _edit_arguments(edit: TokenEdit | None, tokens: Tensor) -> tuple[Any, ...]:
    """Return argmax, max_logprob, replace_above, known_logprob and mask_below, checked."""
    if edit is None:
        return None, None, math.inf, None, -math.inf
    if not is_a(edit, TokenEdit):
        raise TypeError(f"edit: expected a TokenEdit or None, got {type(edit).__name__}")
    replaces = {"argmax": edit.argmax, "max_logprob": edit.max_logprob, "replace_above": edit.replace_above}
    masks = {"known_logprob": edit.known_logprob, "mask_below": edit.mask_below}
    for together in (replaces, masks):
        given = [name for name, value in together.items() if value is not None]
        if 0 < len(given) < len(together):
            raise ValueError(f"edit: expected all of {', '.join(together)}, or none; got {', '.join(given)}")
    device, shape = tokens.device, tokens.shape
    above: float | Tensor = math.inf
    below: float | Tensor = -math.inf
    if edit.argmax is not None and edit.max_logprob is not None:
        check_tensor("edit.argmax", edit.argmax, 2, (torch.int64,), device)
        check_shape("edit.argmax", edit.argmax, shape)
        check_tensor("edit.max_logprob", edit.max_logprob, 2, (torch.float32,), device)
        check_shape("edit.max_logprob", edit.max_logprob, shape)
        above = number("edit.replace_above", edit.replace_above, device)
    if edit.known_logprob is not None:
        check_tensor("edit.known_logprob", edit.known_logprob, 2, (torch.float32,), device)
        check_shape("edit.known_logprob", edit.known_logprob, shape)
        below = number("edit.mask_below", edit.mask_below, device)
    return edit.argmax, edit.max_logprob, above, edit.known_logprob, below


def remask_tokens(
    logits: Tensor | None,
    tokens: Tensor,
    remask_len: int | Tensor,
    *,
    mask_token_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    variant: str = "paper",
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    keep: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Mask known tokens again, those that the model thinks least of: the inverse pass of masked Z-Sampling.

    With l the guided logits of `sample_tokens` (no noise, temperature 1) and g ~ Gumbel(0, 1), a function of
    (seed, step, position) alone, for each known position i::

        score_i  = l_token - logsumexp(l)                   variant "paper": log-probability of its own token, nats
        score_i  = -(max_j l_j - logsumexp(l))              variant "official", as the published code
        score_i  = g_i                                      variant "random", which reads no logits

    and the remask_len lowest become mask_token_id; among ties lower positions are masked first. Exactly remask_len,
    always. The logits are read once, in one draw of `sample_tokens` at temperature 0, which needs no random numbers and
    gives the largest logit with its log-probability.

    Args:
        logits: (B, N, V), as for `sample_tokens`; None with variant "random".
        tokens: (B, N) int64, mask_token_id where masked; the logits there are not read.
        remask_len: how many known positions are masked again, within [0, known positions]; an integer for all samples
            or (B,). (On CUDA, where checking would wait for the device, a larger value masks every such position,
            and a bad row ranks lowest.)
        mask_token_id: what masked positions hold.
        seed: (B,), or one integer, with which all samples get the same noise; variant "random" alone draws.
        step: index of the decoding step, within [0, 2^32); an integer, which a CUDA graph keeps, or a 0-dimensional
            tensor.
        variant: "paper", "official" or "random".
        uncond_logits: (B, N, V) of the same dtype and device, or None for no guidance.
        guidance_scale: finite, the paper's inversion guidance; a number or a 0-dimensional tensor.
        keep: (B, N) bool, known positions that are never masked again, such as those of a picture that is painted in;
            they are no longer counted as known.
        backend: as for `sample_tokens`.

    Returns:
        tokens (B, N) int64, and score (B, N) float32, +inf where masked before or kept.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, stride, device or range is wrong, a known token is outside [0, V), remask_len is out of
            range, or the logits of a known position hold NaN or +inf or forbid every token.
        RuntimeError: if the backend asked for is not available.

    Source: masked Z-Sampling, arXiv 2411.10781; its authors' code for variant "official".
    """
    if variant not in REMASK_VARIANTS:
        raise ValueError(f"variant: expected one of {REMASK_VARIANTS}, got {variant!r}")
    if variant == "random":
        check_tensor("tokens", tokens, 2, (torch.int64,))
        logits = uncond_logits = None
        guidance_scale = 1.0
    elif logits is None:
        raise ValueError(f"logits: expected a tensor with variant {variant!r}, got None")
    else:
        check_draw(logits, tokens, uncond_logits, None)
    if keep is not None:
        check_tensor("keep", keep, 2, (torch.bool,), tokens.device)
        check_shape("keep", keep, tokens.shape)
    batch, device = tokens.shape[0], tokens.device
    return _call_remask_tokens(
        logits, tokens, per_sample("remask_len", remask_len, batch, device), per_sample("seed", seed, batch, device),
        check_step(step, device), integer("mask_token_id", mask_token_id), variant, uncond_logits,
        number("guidance_scale", guidance_scale, device), keep, check_backend(backend, device),
    )  # fmt: skip


def _for_each(value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int64, device=device) if isinstance(value, int) else value


def _check_state(state: DifferentialState, logits: Tensor, settings: dict[str, object]) -> None:
    if not is_a(state, DifferentialState):
        raise TypeError(f"state: expected a DifferentialState or None, got {type(state).__name__}")
    if state.history.shape != logits.shape:
        raise ValueError(
            f"state: expected one of shape {tuple(logits.shape)} like logits, got {tuple(state.history.shape)}"
        )
    if state.history.device != logits.device:
        raise ValueError(f"state: expected device {logits.device} like logits, got {state.history.device}")
    # the kernels write to them
    rows = logits.shape[:2]
    for name, tensor, dtype, shape in (
        ("history", state.history, torch.int16, logits.shape),
        ("written", state.written, torch.bool, rows),
        ("seed", state.seed, torch.int64, rows[:1]),
        ("step", state.step, torch.int64, rows[:0]),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != logits.device:
            raise ValueError(
                f"state: expected {name} of shape {tuple(shape)} and {dtype} on {logits.device}, got "
                f"{tuple(tensor.shape)} and {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"state: expected a contiguous {name}, got strides {tensor.stride()}")
    for name, value in settings.items():
        begun = getattr(state, name)
        if begun != value:
            raise ValueError(f"state: expected one begun with {name}={value!r}, got {name}={begun!r}")


def _check_generation(
    has_history: bool, history_step: Tensor, history_seed: Tensor, seed: int | Tensor, step: int
) -> None:
    if not has_history:
        return
    before = int(history_step)
    if step == 0:
        raise ValueError(f"state: expected None at step 0, which begins a generation, got a state of step {before}")
    if before != step - 1:
        raise ValueError(f"state: expected one of step {step - 1} at step {step}, got one of step {before}")
    if isinstance(seed, Tensor) and torch.equal(history_seed, seed):
        return
    sample = cpu.first_index(history_seed != seed)
    if sample >= 0:
        got = seed if isinstance(seed, int) else int(seed[sample])
        raise ValueError(f"seed: expected {int(history_seed[sample])} for sample {sample} as in the state, got {got}")


def _dense(result: Tensor) -> Tensor:
    """Return a result as the kernels lay theirs out, and as the compiler expects it."""
    return torch.empty(result.shape, dtype=result.dtype, device=result.device).copy_(result)


def _oracle_options(draw: Draw) -> dict[str, Any]:
    """Return what the oracles take of a draw besides logits and tokens."""
    cpu.check_samples(draw)
    cpu.check_token_bias(draw.token_bias)
    options = draw._asdict()
    del options["logits"], options["tokens"]
    options["seed"] = _for_each(draw.seed, draw.tokens.shape[0], draw.tokens.device)
    options["first_position"] = 0 if draw.first_position is None else draw.first_position
    return options


def _reference_sample_tokens(
    draw: Draw,
    rows: str,
    statistics: str,
    top_k: int,
    top_p: float,
    min_p: float,
    logprob_of: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    logits, tokens, mask_token_id = draw.logits, draw.tokens, draw.mask_token_id
    _, num_positions, num_tokens = logits.shape
    outputs, bad_row = reference.sample_tokens(
        logits, tokens, rows=rows, top_k=top_k, top_p=top_p, min_p=min_p, logprob_of=logprob_of,
        **_oracle_options(draw),
    )  # fmt: skip
    asked = statistics.split(",") if statistics else []
    if "known_logprob" in asked and rows != "masked":
        outside = cpu.first_index((tokens != mask_token_id) & ((tokens < 0) | (tokens >= num_tokens)))
        if outside >= 0:
            raise cpu.bad_token(tokens, outside, num_tokens)
    if bad_row >= 0:
        raise cpu.bad_logits(bad_row, num_positions)
    return (
        _dense(outputs["token_ids"]),
        _dense(outputs["logprob"].float()),
        [_dense(outputs[name].to(cpu.STATISTICS[name])) for name in asked],
    )


def _reference_mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    temperature: float,
    backend: str,
) -> Tensor:
    mask_len, seed = (_for_each(value, len(token_ids), token_ids.device) for value in (mask_len, seed))
    sample = cpu.first_index((mask_len < 0) | (mask_len > (logprob != torch.inf).sum(-1)))
    if sample >= 0:
        raise cpu.bad_mask_len(mask_len, logprob, sample)
    row = cpu.first_index(logprob.isnan())
    if row >= 0:
        raise cpu.bad_logprob(row, logprob.shape[1])
    return _dense(
        reference.mask_by_confidence(
            token_ids, logprob, mask_len, mask_token_id=mask_token_id, temperature=temperature, seed=seed, step=step
        )
    )


def _reference_commit_tokens(
    token_ids: Tensor,
    score: Tensor,
    tokens: Tensor,
    count: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    rule: str,
    value: float,
    temperature: float,
    start: Tensor | None,
    end: Tensor | None,
    argmax: Tensor | None,
    max_logprob: Tensor | None,
    replace_above: float,
    known_logprob: Tensor | None,
    mask_below: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_rule(rule, value)
    (batch, num_positions), device = tokens.shape, tokens.device
    count, seed = _for_each(count, batch, device), _for_each(seed, batch, device)
    start = _for_each(0 if start is None else start, batch, device)
    end = _for_each(num_positions if end is None else end, batch, device)
    sample = cpu.first_index((start < 0) | (start > end) | (end > num_positions))
    if sample >= 0:
        raise cpu.bad_window(start, end, num_positions, sample)
    position = torch.arange(num_positions, dtype=torch.int64, device=device)
    competes = (tokens == mask_token_id) & (position >= start[:, None]) & (position < end[:, None])
    row = cpu.first_index(competes & score.isnan())
    sample = cpu.first_index((count < 0) | ((count > competes.sum(-1)) & (rule == "count")))
    # as the kernels, one sample after the other
    if row >= 0 and (sample < 0 or row // num_positions <= sample):
        raise cpu.bad_score(row, num_positions)
    if sample >= 0:
        raise cpu.bad_count(count, tokens, mask_token_id, rule, start, end, sample)
    value, replace_above, mask_below = torch.tensor([value, replace_above, mask_below], dtype=torch.float32).tolist()
    after, done = reference.commit_tokens(
        token_ids, score, tokens, mask_token_id=mask_token_id, count=count, rule=rule, value=value, start=start,
        end=end, temperature=temperature, seed=seed, step=step, argmax=argmax, max_logprob=max_logprob,
        replace_above=replace_above, known_logprob=known_logprob, mask_below=mask_below,
    )  # fmt: skip
    return _dense(after), done


def _cpu_commit_tokens(  # type: ignore[no-untyped-def]
    token_ids, score, tokens, count, seed, step, mask_token_id, rule, value, *options
):
    check_rule(rule, value)
    return cpu.commit_tokens(token_ids, score, tokens, count, seed, step, mask_token_id, rule, value, *options)


def _fake_commit_tokens(token_ids, *_):  # type: ignore[no-untyped-def]
    return token_ids.new_empty(token_ids.shape), token_ids.new_empty(token_ids.shape[:1], dtype=torch.bool)


def _reference_differential_sample(
    draw: Draw,
    history: Tensor,
    written: Tensor,
    history_step: Tensor,
    history_seed: Tensor,
    has_history: bool,
    share: float,
    variant: str,
    aliased_history: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, step = draw.tokens, draw.step
    options = _oracle_options(draw)
    _check_generation(has_history, history_step, history_seed, options["seed"], step)
    token_ids, logprob, divergence, new_history, new_written, bad_row = reference.differential_sample(
        draw.logits, tokens, history, written & has_history, share=share, variant=variant,
        aliased_history=aliased_history, **options,
    )  # fmt: skip
    if bad_row >= 0:
        # as the kernels leave it
        cpu.overwrite(written, False)
        raise cpu.bad_logits(bad_row, tokens.shape[1])
    cpu.overwrite(history, new_history)
    cpu.overwrite(written, new_written)
    cpu.overwrite(history_step, step)
    return _dense(token_ids), _dense(logprob.float()), _dense(divergence.float())


def _remask_tokens(
    logits: Tensor | None,
    tokens: Tensor,
    remask_len: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    variant: str,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    keep: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    eligible = tokens != mask_token_id
    if keep is not None:
        eligible = eligible & ~keep
    batch, device = tokens.shape[0], tokens.device
    remask_len, seed = _for_each(remask_len, batch, device), _for_each(seed, batch, device)
    if device.type == "cpu":
        num_eligible = eligible.sum(-1)
        sample = cpu.first_index((remask_len < 0) | (remask_len > num_eligible))
        if sample >= 0:
            raise ValueError(
                f"remask_len: sample {sample} is {int(remask_len[sample])}; expected a value within "
                f"[0, {int(num_eligible[sample])}], the known positions that are not kept"
            )
    if logits is None:
        score = reference.remask_gumbel(seed, tokens.shape[1], step).float()
    else:
        # what is not eligible is not read
        name = "known_logprob" if variant == "paper" else "max_logprob"
        drawn = sample_tokens(
            logits, torch.where(eligible, tokens, mask_token_id), mask_token_id=mask_token_id, seed=seed, step=step,
            uncond_logits=uncond_logits, guidance_scale=guidance_scale, temperature=0.0, rows="known",
            statistics=(name,), backend=backend,
        )  # fmt: skip
        score = getattr(drawn, name)
        if variant == "official":
            score = -score
    score = torch.where(eligible, score, torch.inf)
    remasked = mask_by_confidence(
        tokens, score, remask_len, mask_token_id=mask_token_id, temperature=0.0, seed=seed, step=step, backend=backend
    )
    return remasked, _dense(score)


def _empty(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=dtype)


def _fake_sample_tokens(logits, tokens, *options):  # type: ignore[no-untyped-def]
    _, statistics, *_ = options[-7:]
    others = [_empty(tokens, cpu.STATISTICS[name]) for name in statistics.split(",") if name]
    return _empty(tokens, torch.int64), _empty(tokens, torch.float32), others


def _fake_differential_sample(logits, tokens, *_):  # type: ignore[no-untyped-def]
    return _empty(tokens, torch.int64), _empty(tokens, torch.float32), _empty(tokens, torch.float32)


def _fake_remask_tokens(logits, tokens, *_):  # type: ignore[no-untyped-def]
    return _empty(tokens, torch.int64), _empty(tokens, torch.float32)


def _cpu_differential_sample(  # type: ignore[no-untyped-def]
    draw, history, written, history_step, history_seed, has_history, *options
):
    _check_generation(has_history, history_step, history_seed, draw.seed, draw.step)
    outputs = cpu.differential_sample(draw, history, written, has_history, *options)
    cpu.overwrite(history_step, draw.step)
    return outputs


def _fake_mask_by_confidence(token_ids, *_):  # type: ignore[no-untyped-def]
    return token_ids.new_empty(token_ids.shape)


_STEP: dict[str, Callable[[Any], None]] = {"step": check_step_range}
_DRAW: dict[str, Callable[[Any], None]] = {
    **_STEP,
    "guidance_scale": partial(check_guidance_scale, "guidance_scale"),
    "second_guidance_scale": partial(check_guidance_scale, "second_guidance_scale"),
    "softcap": check_softcap,
    "noise_scale": check_noise_scale,
    "temperature": check_temperature,
}
_call_sample_tokens = register(
    "sample_tokens",
    _reference_sample_tokens,
    _fake_sample_tokens,
    cpu.sample_tokens,
    per_sample=("seed", "first_position"),
    numbers={**_DRAW, "top_p": check_top_p, "min_p": check_min_p},
)
_call_differential_sample = register(
    "differential_sample",
    _reference_differential_sample,
    _fake_differential_sample,
    _cpu_differential_sample,
    mutates_args=("history", "written", "history_step"),
    per_sample=("seed", "first_position"),
    numbers=_DRAW,
)
_call_mask_by_confidence = register(
    "mask_by_confidence",
    _reference_mask_by_confidence,
    _fake_mask_by_confidence,
    cpu.mask_by_confidence,
    per_sample=("mask_len", "seed"),
    numbers={**_STEP, "temperature": check_confidence_temperature},
)
_call_commit_tokens = register(
    "commit_tokens",
    _reference_commit_tokens,
    _fake_commit_tokens,
    _cpu_commit_tokens,
    per_sample=("count", "seed", "start", "end"),
    numbers={
        **_STEP,
        # its range is the rule's, which the kernels know
        "value": lambda value: None,
        "temperature": check_confidence_temperature,
        "replace_above": partial(check_bound, "edit.replace_above"),
        "mask_below": partial(check_bound, "edit.mask_below"),
    },
)
# the same on every device: what differs is in the ops it is made of
_call_remask_tokens = register(
    "remask_tokens",
    _remask_tokens,
    _fake_remask_tokens,
    per_sample=("remask_len", "seed"),
    numbers={**_STEP, "guidance_scale": partial(check_guidance_scale, "guidance_scale")},
)
