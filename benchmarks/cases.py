"""The cases: op, real model shape, peers, bytes moved, and the target each is held to."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import mgt_kernels
from benchmarks.kept_memory import keep_freed_memory
from mgt_kernels import cpu, reference
from mgt_kernels.reference.differential_sample import select_rows

Run = Callable[[], object]

# aMUSEd's and Meissonic's: 8192 codes, the mask beyond them
CODEBOOK_SIZE, MASK_TOKEN_ID = 8192, 8255
NUM_STEPS = 12


@dataclass(frozen=True)
class Target:
    """What a case is held to: `figure` against `peer` (its time over ours), or our median in ms where peer is ""."""

    figure: float
    peer: str = ""

    def met(self, ratios: dict[str, float], median_ms: float) -> bool:
        """Whether the figures of one run reach the target."""
        return ratios[self.peer] >= self.figure if self.peer else median_ms <= self.figure

    def __str__(self) -> str:
        return f">= {self.figure:.3g}x {self.peer}" if self.peer else f"<= {self.figure:g} ms"


@dataclass(frozen=True)
class Case:
    """One thing to time. `check` raises where ours computes something else than the oracle."""

    name: str
    ours: Run
    peers: dict[str, Run]
    check: Run
    bytes_moved: int
    num_positions: int
    targets: tuple[Target, ...] = field(default=())
    bytes_per_position: float = 64
    """What a call may allocate, its outputs included."""


@cache
def logits_pair(batch: int, height: int, codebook_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional logits (B, V, H, W), std 2, in channels_last memory as the models produce them."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, height, height, codebook_size)
    cond, uncond = (torch.randn(shape, generator=generator).mul_(2).to(dtype).permute(0, 3, 1, 2) for _ in range(2))
    return cond, uncond


@cache
def masked_tokens(batch: int, height: int, share: float) -> Tensor:
    """Tokens (B, H, W) of which `share` is masked, spread at random."""
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(batch, height, height, generator=generator)
    return torch.where(chance < share, MASK_TOKEN_ID, 0)


def as_rows(logits: Tensor) -> Tensor:
    """View (B, V, H, W) as (B, N, V)."""
    batch, codebook_size, height, width = logits.shape
    return logits.reshape(batch, codebook_size, height * width).permute(0, 2, 1)


def our_step(
    cond: Tensor,
    uncond: Tensor,
    tokens: Tensor,
    guidance_scale: float,
    noise_scale: float,
    backend: str = "auto",
) -> Tensor:
    """Guidance, draw, confidence and re-masking of one step."""
    flat = tokens.flatten(1)
    token_ids, logprob = mgt_kernels.sample_tokens(
        as_rows(cond), flat, uncond_logits=as_rows(uncond), mask_token_id=MASK_TOKEN_ID, seed=0, step=0,
        guidance_scale=guidance_scale, noise_scale=noise_scale, backend=backend,
    )  # fmt: skip
    mask_len = (flat == MASK_TOKEN_ID).sum(-1) * 99 // 100
    return mgt_kernels.mask_by_confidence(
        token_ids,
        logprob,
        mask_len,
        mask_token_id=MASK_TOKEN_ID,
        temperature=2.0,
        seed=0,
        step=0,
        backend=backend,
    )


def check_step(cond: Tensor, uncond: Tensor, tokens: Tensor, guidance_scale: float, noise_scale: float) -> None:
    """Compare the first 16 positions of the draw with the float64 oracle, and count what is masked again."""
    flat = tokens.flatten(1)
    token_ids, logprob = mgt_kernels.sample_tokens(
        as_rows(cond), flat, uncond_logits=as_rows(uncond), mask_token_id=MASK_TOKEN_ID, seed=0, step=0,
        guidance_scale=guidance_scale, noise_scale=noise_scale,
    )  # fmt: skip
    some = slice(0, 16)
    expected, truth, _ = reference.sample_tokens(
        as_rows(cond)[:, some], flat[:, some], uncond_logits=as_rows(uncond)[:, some], mask_token_id=MASK_TOKEN_ID,
        seed=torch.zeros(len(cond), dtype=torch.int64), step=0, guidance_scale=guidance_scale, noise_scale=noise_scale,
    )  # fmt: skip
    if not torch.equal(token_ids[:, some], expected):
        raise AssertionError("token ids differ from the oracle's")
    if not torch.allclose(logprob[:, some].double(), truth, atol=1e-4, rtol=0):
        raise AssertionError("logprob differs from the oracle's")
    masked = (our_step(cond, uncond, tokens, guidance_scale, noise_scale) == MASK_TOKEN_ID).sum(-1)
    if not torch.equal(masked, (flat == MASK_TOKEN_ID).sum(-1) * 99 // 100):
        raise AssertionError("the number of masked positions is wrong")


def pytorch_step(cond: Tensor, uncond: Tensor, tokens: Tensor, guidance_scale: float, noise_scale: float) -> Tensor:
    """The same step as PyTorch users write it: softmax, multinomial, gather, Gumbel noise, sort."""
    logits = as_rows(uncond + guidance_scale * (cond - uncond))
    if noise_scale:
        logits = logits + noise_scale * torch.randn_like(logits)
    flat = tokens.flatten(1)
    probs = logits.float().softmax(-1)
    drawn = torch.multinomial(probs.flatten(0, 1), 1).view_as(flat)
    masked = flat == MASK_TOKEN_ID
    logprob = probs.gather(-1, drawn[..., None])[..., 0].log().masked_fill(~masked, torch.inf)
    noise = -torch.log(-torch.log(torch.rand_like(logprob)))
    order = (logprob + 2.0 * noise).argsort(-1)
    mask_len = masked.sum(-1, keepdim=True) * 99 // 100
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return torch.where(rank < mask_len, MASK_TOKEN_ID, torch.where(masked, drawn, flat))


def diffusers_step() -> Callable[[Tensor, Tensor, Tensor, float, float], Tensor]:
    """Guidance expression + AmusedScheduler.step, as the aMUSEd and Meissonic pipelines run them."""
    from diffusers import AmusedScheduler

    scheduler: Any = AmusedScheduler(mask_token_id=MASK_TOKEN_ID)
    scheduler.set_timesteps(NUM_STEPS)

    def step(cond: Tensor, uncond: Tensor, tokens: Tensor, guidance_scale: float, noise_scale: float) -> Tensor:
        logits = uncond + guidance_scale * (cond - uncond)
        if noise_scale:
            logits = logits + noise_scale * torch.randn_like(logits)
        return scheduler.step(logits, scheduler.timesteps[0], tokens).prev_sample

    return step


@cache
def step_peers() -> dict[str, Callable[..., Tensor]]:
    """The peers of a step; diffusers only where it is installed."""
    peers: dict[str, Callable[..., Tensor]] = {"pytorch": pytorch_step}
    try:
        peers["diffusers"] = diffusers_step()
    except ImportError:
        print("peer diffusers skipped: not installed (pip install mgt-kernels[diffusers])")
    return peers


def step_case(
    name: str,
    *,
    height: int = 64,
    codebook_size: int = CODEBOOK_SIZE,
    dtype: torch.dtype = torch.float32,
    share: float = 1.0,
    guidance_scale: float = 9.0,
    noise_scale: float = 0.0,
    against: dict[str, float] | None = None,
    targets: tuple[Target, ...] = (),
    backend: str = "auto",
) -> Case:
    """One whole step at B=1.

    Peers are PyTorch's and diffusers' chains, or, where `against` is given, our own fp32 step at its guidance scale.
    """
    cond, uncond = logits_pair(1, height, codebook_size, dtype)
    tokens = masked_tokens(1, height, share)
    inputs = (cond, uncond, tokens, guidance_scale, noise_scale)
    if against is None:
        peers: dict[str, Run] = {peer: partial(run, *inputs) for peer, run in step_peers().items()}
    else:
        peers = {peer: ours_fp32(scale) for peer, scale in against.items()}
    # every masked row of both halves is read once; tokens in, ids, logprob and tokens out are 28 bytes a position
    num_masked = int((tokens == MASK_TOKEN_ID).sum())
    bytes_moved = 2 * num_masked * codebook_size * cond.element_size() + 28 * tokens.numel()
    return Case(
        name,
        lambda: our_step(*inputs, backend=backend),
        peers,
        lambda: check_step(*inputs),
        bytes_moved,
        tokens.numel(),
        targets if all(target.peer in ("", *peers) for target in targets) else (),
    )


def scheduler_case(name: str) -> Case:
    """`MGTScheduler.step` in the place of `AmusedScheduler.step`, on logits that the pipeline has guided."""
    from diffusers import AmusedScheduler

    from mgt_sampler import MGTScheduler

    logits, _ = logits_pair(1, 64, CODEBOOK_SIZE, torch.float32)
    tokens = masked_tokens(1, 64, 1.0)
    schedulers: list[Any] = [AmusedScheduler(mask_token_id=MASK_TOKEN_ID), MGTScheduler(mask_token_id=MASK_TOKEN_ID)]
    for scheduler in schedulers:
        scheduler.set_timesteps(NUM_STEPS)

    def run(scheduler: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return scheduler.step(logits, scheduler.timesteps[0], tokens, generator=generator).prev_sample

    def check() -> None:
        counts = [int((run(scheduler) == MASK_TOKEN_ID).sum()) for scheduler in schedulers]
        # float32 uniforms tie now and then, and diffusers then masks a token less
        if not 0 <= counts[1] - counts[0] <= 1:
            raise AssertionError(f"the schedulers mask {counts} positions")

    num_bytes = logits.numel() * logits.element_size() + 28 * tokens.numel()
    return Case(
        name,
        partial(run, schedulers[1]),
        {"diffusers": partial(run, schedulers[0])},
        check,
        num_bytes,
        tokens.numel(),
    )


@cache
def moved_logits(height: int, codebook_size: int) -> tuple[Tensor, Tensor]:
    """The pair of the next step: a quarter of the first pair's standard deviation away from it."""
    generator = torch.Generator().manual_seed(2)
    pair = logits_pair(1, height, codebook_size, torch.float32)
    cond, uncond = (
        half.permute(0, 2, 3, 1).add(torch.randn(1, height, height, codebook_size, generator=generator), alpha=0.5)
        for half in pair
    )
    return cond.permute(0, 3, 1, 2), uncond.permute(0, 3, 1, 2)


def published_differential_step(
    cond: Tensor, uncond: Tensor, previous: Tensor, guidance_scale: float, num_selected: int
) -> Tensor:
    """Differential sampling as the paper's code writes it: softmax, KL, sort, difference, multinomial, gather."""
    probs = as_rows(uncond + guidance_scale * (cond - uncond)).softmax(-1)
    divergence = torch.nn.functional.kl_div(previous.log(), probs, reduction="none").sum(-1)
    rows = divergence.sort(-1).indices[:, :num_selected, None].expand(-1, -1, probs.shape[-1])
    probs.scatter_(1, rows, (probs.gather(1, rows) - previous.gather(1, rows)).clamp(min=1e-6))
    drawn = torch.multinomial(probs.flatten(0, 1), 1).view(probs.shape[:2])
    return probs.gather(-1, drawn[..., None])[..., 0].log()


def differential_case(name: str, *, guidance_scale: float = 3.0, share: float = 0.75) -> Case:
    """A step of differential sampling at B=1 with the previous step as its history, every position masked.

    At the guidance scale of the other cases the published code takes the logarithm of 0 and the time of denormals.
    """
    pairs = [logits_pair(1, 64, CODEBOOK_SIZE, torch.float32), moved_logits(64, CODEBOOK_SIZE)]
    tokens = masked_tokens(1, 64, 1.0).flatten(1)
    num_positions = tokens.shape[1]

    def step(state: mgt_kernels.DifferentialState | None, index: int) -> tuple[Tensor, Tensor, Any]:
        cond, uncond = pairs[index % 2]
        return mgt_kernels.differential_sample(
            as_rows(cond), tokens, state, uncond_logits=as_rows(uncond), mask_token_id=MASK_TOKEN_ID, seed=0,
            step=index, guidance_scale=guidance_scale, share=share,
        )  # fmt: skip

    states = [step(None, 0)[2]]

    def run() -> Tensor:
        token_ids, _, states[0] = step(states[0], int(states[0].step) + 1)
        return token_ids

    def check() -> None:
        _, _, state = step(None, 0)
        some = slice(0, 16)
        history, written = state.history[:, some].clone(), state.written[:, some].clone()
        cond, uncond = pairs[1]
        token_ids, logprob, state = step(state, 1)
        # which rows are selected depends on all of them: the oracle draws each of its rows both ways
        matches = torch.zeros(1, 16, dtype=torch.bool)
        for every in (0.0, 1.0):
            expected, truth, divergence, *_ = reference.differential_sample(
                as_rows(cond)[:, some], tokens[:, some], history, written, uncond_logits=as_rows(uncond)[:, some],
                mask_token_id=MASK_TOKEN_ID, seed=torch.zeros(1, dtype=torch.int64), step=1, share=every,
                guidance_scale=guidance_scale, variant="paper",
            )  # fmt: skip
            selected = select_rows(
                state.divergence, torch.ones_like(tokens, dtype=torch.bool), share=share, variant="paper"
            )[:, some]
            close = (token_ids[:, some] == expected) & ((logprob[:, some] - truth).abs() < 1e-3)
            matches |= close & (selected == bool(every))
        if not matches.all():
            raise AssertionError("token ids or logprob differ from the oracle's")
        if not torch.allclose(state.divergence[:, some].double(), divergence, atol=1e-3, rtol=1e-4):
            raise AssertionError("the divergence differs from the oracle's")

    cond, uncond = pairs[0]
    previous = as_rows(uncond + guidance_scale * (cond - uncond)).softmax(-1)
    peer = partial(published_differential_step, *pairs[1], previous, guidance_scale, int(share * num_positions))
    # both halves once, two bytes of history in and two out per token; tokens in, ids, logprob and divergence out
    bytes_moved = num_positions * (CODEBOOK_SIZE * 12 + 24)
    return Case(name, run, {"pytorch": peer}, check, bytes_moved, num_positions, (Target(25, "pytorch"),))


def remask_case(name: str, *, guidance_scale: float = 9.0) -> Case:
    """The re-masking of Z-Sampling at B=1 with every position known, as in its last steps."""
    pair = logits_pair(1, 64, CODEBOOK_SIZE, torch.float32)
    cond, uncond = map(as_rows, pair)
    num_positions = cond.shape[1]
    tokens = torch.randint(CODEBOOK_SIZE, (1, num_positions), generator=torch.Generator().manual_seed(3))
    remask_len = num_positions // 10

    def run() -> tuple[Tensor, Tensor]:
        return mgt_kernels.remask_tokens(
            cond, tokens, remask_len, uncond_logits=uncond, guidance_scale=guidance_scale,
            mask_token_id=MASK_TOKEN_ID, seed=0, step=0,
        )  # fmt: skip

    def pytorch() -> Tensor:
        logits = uncond + guidance_scale * (cond - uncond)
        score = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return tokens.scatter(1, score.topk(remask_len, largest=False).indices, MASK_TOKEN_ID)

    def check() -> None:
        remasked, score = run()
        some = slice(0, 16)
        truth = reference.remask_score(
            cond[:, some], tokens[:, some], variant="paper", mask_token_id=MASK_TOKEN_ID, step=0,
            seed=torch.zeros(1, dtype=torch.int64), uncond_logits=uncond[:, some], guidance_scale=guidance_scale,
        )  # fmt: skip
        if not torch.allclose(score[:, some].double(), truth, atol=1e-4, rtol=0):
            raise AssertionError("scores differ from the oracle's")
        lowest = score[0].topk(remask_len, largest=False).indices.sort().values
        if not torch.equal((remasked == MASK_TOKEN_ID)[0].nonzero()[:, 0], lowest):
            raise AssertionError("other positions than the lowest are masked")

    parts = [part for half in pair for part in half.permute(0, 2, 3, 1).flatten().view(torch.int64).chunk(32)]

    def one_read() -> None:
        # as `run.read_bandwidth` reads
        for part in parts:
            part.amax()

    bytes_moved = 2 * num_positions * CODEBOOK_SIZE * 4
    peers: dict[str, Run] = {"pytorch": pytorch, "one read": one_read}
    return Case(name, run, peers, check, bytes_moved, num_positions, (Target(1 / 1.5, "one read"),), 256)


class RecordedModel:
    """The bundled model, which notes what it is asked and does not decode."""

    def __init__(self) -> None:
        from mgt_sampler import load_model

        model = load_model()
        self.num_tokens, self.codebook_size = model.num_tokens, model.codebook_size
        self.mask_token_id = model.mask_token_id
        self.predict = model.predict_logits
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def predict_logits(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        self.calls.append((tokens, condition))
        return self.predict(tokens, condition)

    def decode(self, tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens), 1, 1, 1)


def z_sampling_case(name: str, *, batch: int = 8) -> Case:
    """Steps of Z-Sampling of the bundled model, guided, against its model calls alone."""
    from mgt_sampler import ZSampling, generate

    model = RecordedModel()

    def run() -> Tensor:
        model.calls.clear()
        output = generate(
            model, labels=list(range(batch)), num_inference_steps=3, guidance_scale=3.0, z_sampling=ZSampling(),
            progress=False,
        )  # fmt: skip
        return output.tokens

    def check() -> None:
        counts = [int((tokens[0] == model.mask_token_id).sum()) for tokens, _ in (run(), model.calls)[1]]
        # conditional and unconditional, the inverse pass, then both again; the last step is plain
        if len(counts) != 12 or counts[3] != counts[0] - 1 or counts[8] != counts[5] - 1:
            raise AssertionError(f"masked positions at the model calls are {counts}")

    def model_calls() -> None:
        for tokens, condition in list(model.calls):
            with torch.no_grad():
                model.predict(tokens, condition)

    logits_bytes = batch * model.num_tokens * model.codebook_size * 4
    return Case(
        name,
        run,
        {"its model calls": model_calls},
        check,
        12 * logits_bytes,
        batch * model.num_tokens,
        (Target(0.95, "its model calls"),),
        math.inf,
    )


def linear_case(
    name: str,
    *,
    op: str,
    num_rows: int = 1101,
    num_inputs: int = 1024,
    num_outputs: int = 4096,
    group_size: int = 128,
    backend: str = "auto",
    targets: tuple[Target, ...] = (),
) -> Case:
    """An int4 layer, float32 in and out, against PyTorch's layers; 1101 rows are the tokens of a Meissonic image."""
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    dense = torch.randn(num_outputs, num_inputs, generator=generator)
    weight = mgt_kernels.quantize_int4(dense, group_size)
    layer = getattr(mgt_kernels, op)
    run = partial(layer, x, weight, backend=backend)

    def check() -> None:
        y, some = run(), slice(0, num_rows, max(1, num_rows // 16))
        truth = layer(x[some], weight, backend="reference")
        error = float((y[some] - truth).abs().max() / truth.abs().max())
        if not error < 1e-5:
            raise AssertionError(f"results differ from the oracle's by {error:.1e} of the largest")

    peers: dict[str, Run] = {
        "torch fp32": partial(torch.nn.functional.linear, x, dense),
        "torch bf16": partial(torch.nn.functional.linear, x.bfloat16(), dense.bfloat16()),
    }
    bytes_moved = (x.numel() + num_rows * num_outputs) * 4 + weight.nbytes
    return Case(name, run, peers, check, bytes_moved, num_rows, targets, math.inf)


def linear_cases() -> dict[str, Callable[[str], Case]]:
    """The int4 layers at Meissonic's sizes, on every instruction set with a kernel of its own, and over the rows."""
    cases: dict[str, Callable[[str], Case]] = {}
    for op, num_inputs, num_outputs, figure in (
        ("w4a8_linear", 1024, 4096, 4.0),
        ("w4a8_linear", 4096, 1024, 3.9),
        ("w4a16_linear", 1024, 4096, 2.2),
        ("w4a16_linear", 4096, 1024, 2.2),
    ):
        cases[f"{op} fp32, M=1101 K={num_inputs} N={num_outputs}"] = partial(
            linear_case, op=op, num_inputs=num_inputs, num_outputs=num_outputs, targets=(Target(figure, "torch fp32"),)
        )
    for num_inputs, num_outputs in ((1024, 4096), (4096, 1024)):
        cases[f"w4a8_linear fp32, group 32, M=1101 K={num_inputs} N={num_outputs}"] = partial(
            linear_case, op="w4a8_linear", num_inputs=num_inputs, num_outputs=num_outputs, group_size=32,
            targets=(Target(3.0, "torch fp32"),),
        )  # fmt: skip
    for isa in cpu.available_isas():
        if isa == cpu.kernel_isa("w4a8_linear", isa) not in ("scalar", cpu.kernel_isa("w4a8_linear")):
            # the 4.0 of a processor whose best is VNNI is above its limit on one where fp32 is faster
            floor = {"avx2": 2.2, "avx512_vnni": 2.5}.get(isa)
            targets = (Target(floor, "torch fp32"),) if floor else ()
            name = f"w4a8_linear fp32, {isa}, M=1101 K=1024 N=4096"
            cases[name] = partial(linear_case, op="w4a8_linear", backend=isa, targets=targets)
    for num_rows in (1, 4, 16, 64, 256, 4096):
        cases[f"w4a8_linear fp32, M={num_rows} K=1024 N=4096"] = partial(
            linear_case, op="w4a8_linear", num_rows=num_rows, targets=(Target(1.0, "torch fp32"),)
        )
    return cases


def ours_fp32(guidance_scale: float) -> Run:
    """Our own step with every position masked, as the yardstick of the other cases."""
    inputs = (*logits_pair(1, 64, CODEBOOK_SIZE, torch.float32), masked_tokens(1, 64, 1.0))
    return lambda: our_step(*inputs, guidance_scale, 0.0)


def builders() -> dict[str, Callable[[str], Case]]:
    """Builder of every case by name, so that a filter can leave cases unbuilt."""
    big = "N=4096 V=8192"
    cases: dict[str, Callable[[str], Case]] = {
        f"step fp32 flat, {big}": partial(step_case, guidance_scale=1.0, targets=(Target(50, "diffusers"),)),
        f"step fp32 guided, {big}": partial(step_case, targets=(Target(65, "diffusers"),)),
        f"step fp32 guided + noise, {big}": partial(step_case, noise_scale=1.0, targets=(Target(40, "diffusers"),)),
        f"step bf16 guided, {big}": partial(
            step_case, dtype=torch.bfloat16, against={"ours fp32": 9.0}, targets=(Target(1.4, "ours fp32"),)
        ),
    }
    for share in (0.5, 0.25, 0.1):
        # proportional to the masked share, but for what a call costs at least
        cases[f"step fp32 guided, {share:.0%} masked, {big}"] = partial(
            step_case, share=share, against={"ours all masked": 9.0}, targets=(Target(0.7 / share, "ours all masked"),)
        )
    cases[f"differential_sample fp32 guided, {big}"] = differential_case
    cases[f"remask_tokens fp32 guided, {big}"] = remask_case
    cases["Z-Sampling, bundled model, B=8"] = z_sampling_case
    for isa in cpu.available_isas():
        if isa == cpu.kernel_isa("sample_tokens", isa) != cpu.kernel_isa("sample_tokens"):
            targets = (Target(1 / 2.5, "ours"),) if isa == "avx2" else ()
            cases[f"step fp32 flat, {isa}, {big}"] = partial(
                step_case, guidance_scale=1.0, backend=isa, against={"ours": 1.0}, targets=targets
            )
    if importlib.util.find_spec("diffusers") is not None:
        cases[f"MGTScheduler.step, {big}"] = scheduler_case
    cases["step fp32 guided, N=1024 V=8192"] = partial(step_case, height=32)
    cases["step fp32 guided, N=256 V=8192"] = partial(step_case, height=16)
    cases["step fp32 guided, N=256 V=1024"] = partial(step_case, height=16, codebook_size=1024, targets=(Target(1.0),))
    # last, as they change the allocator
    return cases | linear_cases()
