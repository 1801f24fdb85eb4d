"""Cases of sampling: one step, its two ops, differential sampling, re-masking, and the sampler around them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import mgt_kernels
from mgt_kernels import cpu, reference
from mgt_kernels.reference.differential_sample import select_rows

from .case import AbsentError, Call, Case, Contestant, Job, Run, Setting, Target, Work
from .models import MEISSONIC_1024, MEISSONIC_UP, Model

NUM_STEPS = 12
# compared with the oracle: as many positions as it does quickly
CHECKED = slice(0, 16)


@dataclass(frozen=True)
class Inputs:
    """What one step works on: logits (B, N, V), uncond_logits (B, N, V) or None, and tokens (B, N)."""

    logits: Tensor
    uncond_logits: Tensor | None
    tokens: Tensor
    guidance_scale: float
    noise_scale: float
    backend: str

    @property
    def mask_token_id(self) -> int:
        """The mask lies beyond the codes."""
        return self.logits.shape[-1]

    @property
    def mask_len(self) -> Tensor:
        """Most stay masked."""
        return (self.tokens == self.mask_token_id).sum(-1) * 99 // 100

    def draw(self, some: slice = slice(None)) -> dict[str, Any]:
        """Return the keywords of a draw of some positions."""
        uncond = self.uncond_logits
        return {
            "uncond_logits": None if uncond is None else uncond[:, some],
            "mask_token_id": self.mask_token_id,
            "guidance_scale": self.guidance_scale,
            "noise_scale": self.noise_scale,
            "step": 0,
        }


@lru_cache(maxsize=4)
def random_logits(
    seed: int, model: Model, batch: int = 1, dtype: torch.dtype = torch.float32, layout: str = "token-major",
    device: str = "cpu",
) -> Tensor:  # fmt: skip
    """Logits (B, N, V) of standard deviation 2. In token-major memory, that of channels_last, the V of a position are
    neighbours; in position-major memory, that of (B, V, H, W), the N of a token are."""
    generator = torch.Generator().manual_seed(seed)
    columns = model.vocab_size or model.codebook_size
    shape = (batch, model.num_positions, columns)
    if layout == "position-major":
        shape = (batch, columns, model.num_positions)
    logits = torch.randn(shape, generator=generator).mul_(2).to(device=device, dtype=dtype)
    if layout == "position-major":
        logits = logits.transpose(1, 2)
    return logits[..., columns - model.codebook_size :]


def device_of(backend: str) -> str:
    """Where the tensors of a backend lie."""
    return "cuda" if backend == "triton" else "cpu"


def masked_tokens(model: Model, batch: int = 1, masked_share: float = 1.0, device: str = "cpu") -> Tensor:
    """Tokens (B, N) of which `masked_share` is masked, spread at random."""
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(batch, model.num_positions, generator=generator)
    return torch.where(chance < masked_share, model.codebook_size, 0).to(device)


def our_draw(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Guidance, draw and its log-probability."""
    drawn = mgt_kernels.sample_tokens(inputs.logits, inputs.tokens, seed=0, backend=inputs.backend, **inputs.draw())
    return drawn.token_ids, drawn.logprob


def our_step(inputs: Inputs) -> Tensor:
    """Guidance, draw, confidence and re-masking of one step."""
    token_ids, logprob = our_draw(inputs)
    return mgt_kernels.mask_by_confidence(
        token_ids, logprob, inputs.mask_len, mask_token_id=inputs.mask_token_id, temperature=2.0, seed=0, step=0,
        backend=inputs.backend,
    )  # fmt: skip


def oracle(inputs: Inputs) -> dict[str, Tensor]:
    """All that a draw can give, in float64, of the positions that are checked."""
    draw = inputs.draw(CHECKED)
    if draw["uncond_logits"] is not None:
        draw["uncond_logits"] = draw["uncond_logits"].cpu()
    expected, _ = reference.sample_tokens(
        inputs.logits[:, CHECKED].cpu(), inputs.tokens[:, CHECKED].cpu(),
        seed=torch.zeros(len(inputs.logits), dtype=torch.int64), **draw,
    )  # fmt: skip
    return expected


def check_draw(inputs: Inputs) -> None:
    """Compare some positions of the draw with the float64 oracle."""
    token_ids, logprob = (x[:, CHECKED].cpu() for x in our_draw(inputs))
    expected = oracle(inputs)
    if not torch.equal(token_ids, expected["token_ids"]):
        raise AssertionError("token ids differ from the oracle's")
    if not torch.allclose(logprob.double(), expected["logprob"], atol=1e-4, rtol=0):
        raise AssertionError("logprob differs from the oracle's")


def check_step(inputs: Inputs) -> None:
    """Check the draw, and count what is masked again."""
    check_draw(inputs)
    masked = (our_step(inputs) == inputs.mask_token_id).sum(-1)
    if not torch.equal(masked, inputs.mask_len):
        raise AssertionError("the number of masked positions is wrong")


def pytorch_guidance(logits: Tensor, uncond: Tensor | None, guidance_scale: float, noise_scale: float) -> Tensor:
    """Guidance and Gaussian noise as PyTorch users write them."""
    if uncond is not None:
        logits = uncond + guidance_scale * (logits - uncond)
    return logits + noise_scale * torch.randn_like(logits) if noise_scale else logits


def pytorch_draw(
    logits: Tensor, uncond: Tensor | None, tokens: Tensor, guidance_scale: float, noise_scale: float, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """The draw as PyTorch users write it: softmax, multinomial, gather, logarithm."""
    logits = pytorch_guidance(logits, uncond, guidance_scale, noise_scale)
    probs = logits.float().softmax(-1)
    drawn = torch.multinomial(probs.flatten(0, 1), 1).view_as(tokens)
    masked = tokens == mask_token_id
    logprob = probs.gather(-1, drawn[..., None])[..., 0].log().masked_fill(~masked, torch.inf)
    return torch.where(masked, drawn, tokens), logprob


def pytorch_mask(token_ids: Tensor, logprob: Tensor, mask_len: Tensor, mask_token_id: int) -> Tensor:
    """The re-masking as PyTorch users write it: Gumbel noise, sort, rank."""
    noise = -torch.log(-torch.log(torch.rand_like(logprob)))
    order = (logprob + 2.0 * noise).argsort(-1)
    indices = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, indices)
    return torch.where(rank < mask_len[:, None], mask_token_id, token_ids)


def pytorch_step(
    logits: Tensor, uncond: Tensor | None, tokens: Tensor, guidance_scale: float, noise_scale: float, mask_token_id: int
) -> Tensor:
    """The draw, then the re-masking."""
    mask_len = (tokens == mask_token_id).sum(-1) * 99 // 100
    drawn = pytorch_draw(logits, uncond, tokens, guidance_scale, noise_scale, mask_token_id)
    return pytorch_mask(*drawn, mask_len, mask_token_id)


def compiled(chain: Callable[..., Any], *arguments: object) -> Contestant:
    """What torch.compile makes of a chain, compiled for its arguments; raises AbsentError where it makes nothing."""
    torch._dynamo.reset()
    run = torch.compile(chain, dynamic=False)
    try:
        run(*arguments)
    except Exception as error:
        # no C++ compiler, or one that it cannot use
        raise AbsentError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return Call(lambda: run(*arguments))


def _amused_scheduler(mask_token_id: int) -> Any:
    try:
        from diffusers import AmusedScheduler
    except ImportError as error:
        raise AbsentError("not installed (pip install mgt-kernels[diffusers])") from error
    return AmusedScheduler(mask_token_id=mask_token_id)


def diffusers_step(inputs: Inputs) -> Contestant:
    """Guidance expression + AmusedScheduler.step, as the aMUSEd and Meissonic pipelines run them."""
    scheduler = _amused_scheduler(inputs.mask_token_id)
    scheduler.set_timesteps(NUM_STEPS)
    side = math.isqrt(inputs.tokens.shape[1])
    if side * side != inputs.tokens.shape[1]:
        raise AbsentError("takes images alone")
    as_image = (side, side)
    cond, uncond = (
        None if half is None else half.transpose(1, 2).unflatten(-1, as_image)
        for half in (inputs.logits, inputs.uncond_logits)
    )
    tokens = inputs.tokens.unflatten(-1, as_image)

    def step() -> Tensor:
        assert cond is not None
        logits = cond if uncond is None else uncond + inputs.guidance_scale * (cond - uncond)
        if inputs.noise_scale:
            logits = logits + inputs.noise_scale * torch.randn_like(logits)
        return scheduler.step(logits, scheduler.timesteps[0], tokens).prev_sample

    return Call(step)


def gather_peers(wanted: dict[str, Callable[[], Contestant]]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the peers that run here, and of the others why they do not."""
    peers: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    for name, make in wanted.items():
        try:
            peers[name] = make()
        except AbsentError as reason:
            skipped[name] = str(reason)
    return peers, skipped


def sampling_case(
    model: Model,
    *,
    op: str = "step",
    batch: int = 1,
    dtype: torch.dtype | None = None,
    layout: str = "token-major",
    masked_share: float = 1.0,
    guidance_scale: float | None = None,
    noise_scale: float = 0.0,
    backend: str = "auto",
    threads: int = 2,
    peers: tuple[str, ...] = ("pytorch",),
    against: dict[str, float] | None = None,
    targets: tuple[Target, ...] = (),
    curve: tuple[str, float] | None = None,
) -> Case:
    """A step, or the draw or the re-masking of it alone.

    `against` names our own fp32 step with every position masked, at the guidance scale it gives, as a peer.
    """
    dtype = dtype or model.dtype
    guidance_scale = guidance_scale or model.guidance_scale
    variant = ["flat" if guidance_scale in (None, 1.0) else "guided"] + ["noise"] * bool(noise_scale)
    setting = Setting(
        op, " + ".join(variant), model.name, f"B={batch} N={model.num_positions} V={model.codebook_size}", dtype,
        layout, masked_share, backend, threads,
    )  # fmt: skip

    def prepare() -> Job:
        device = device_of(backend)
        logits = random_logits(0, model, batch, dtype, layout, device)
        uncond = None if guidance_scale is None else random_logits(1, model, batch, dtype, layout, device)
        tokens = masked_tokens(model, batch, masked_share, device)
        inputs = Inputs(logits, uncond, tokens, guidance_scale or 1.0, noise_scale, backend)
        run: Run
        if op == "mask_by_confidence":
            drawn = our_draw(inputs)
            options: Any = {"mask_token_id": inputs.mask_token_id, "temperature": 2.0, "seed": 0, "step": 0}
            run = partial(mgt_kernels.mask_by_confidence, *drawn, inputs.mask_len, backend=backend, **options)
            chain: Callable[..., Any] = pytorch_mask
            arguments: tuple[Any, ...] = (*drawn, inputs.mask_len, inputs.mask_token_id)
            # ids and logprob in, tokens out
            bytes_moved = 20 * tokens.numel()
        else:
            run = partial(our_step if op == "step" else our_draw, inputs)
            chain = pytorch_step if op == "step" else pytorch_draw
            arguments = (logits, uncond, tokens, inputs.guidance_scale, noise_scale, inputs.mask_token_id)
            # every masked row of both halves is read once; tokens in, ids, logprob and tokens out are 28 bytes
            num_halves = 1 if uncond is None else 2
            num_read = num_halves * int((tokens == inputs.mask_token_id).sum()) * model.codebook_size
            bytes_moved = num_read * logits.element_size() + 28 * tokens.numel()
        wanted: dict[str, Callable[[], Contestant]] = {
            "pytorch": lambda: Call(partial(chain, *arguments)),
            "torch.compile": lambda: compiled(chain, *arguments),
            "diffusers": lambda: diffusers_step(inputs),
        }
        present, skipped = gather_peers({name: wanted[name] for name in peers})
        for name, scale in (against or {}).items():
            halves = random_logits(0, model), random_logits(1, model)
            present[name] = Call(partial(our_step, Inputs(*halves, masked_tokens(model), scale, 0.0, "auto")))
        check = partial(check_draw if op == "sample_tokens" else check_step, inputs)
        return Job(Work(bytes_moved, tokens.numel()), Call(run), present, check, skipped)

    return Case(setting, prepare, targets, curve=curve)


def scheduler_case(model: Model = MEISSONIC_1024, *, threads: int = 2) -> Case:
    """`MGTScheduler.step` in the place of `AmusedScheduler.step`, on logits that the pipeline has guided."""
    shape = f"B=1 N={model.num_positions} V={model.codebook_size}"

    def prepare() -> Job:
        from mgt_sampler import MGTScheduler

        side = math.isqrt(model.num_positions)
        logits = random_logits(0, model).transpose(1, 2).unflatten(-1, (side, side))
        tokens = masked_tokens(model).unflatten(-1, (side, side))

        def prepared(scheduler: Any) -> Callable[[], Tensor]:
            scheduler.set_timesteps(NUM_STEPS)

            def run() -> Tensor:
                generator = torch.Generator().manual_seed(0)
                return scheduler.step(logits, scheduler.timesteps[0], tokens, generator=generator).prev_sample

            return run

        def theirs() -> Contestant:
            return Call(prepared(_amused_scheduler(model.codebook_size)))

        ours = prepared(MGTScheduler(mask_token_id=model.codebook_size))
        peers, skipped = gather_peers({"diffusers": theirs})

        def check() -> None:
            runs: list[Any] = [ours, *(peer.run for peer in peers.values() if isinstance(peer, Call))]
            masked = [int((run() == model.codebook_size).sum()) for run in runs]
            # float32 uniforms tie now and then, and diffusers then masks a token less
            if not 0 <= masked[0] - masked[-1] <= 1 or not 0 < masked[0] < model.num_positions:
                raise AssertionError(f"the schedulers mask {masked} positions")

        num_bytes = logits.numel() * logits.element_size() + 28 * tokens.numel()
        return Job(Work(num_bytes, tokens.numel()), Call(ours), peers, check, skipped)

    return Case(Setting("MGTScheduler.step", "", model.name, shape, threads=threads), prepare)


def moved_logits(logits: Tensor, seed: int) -> Tensor:
    """The logits of the next step, in memory as these: a quarter of the standard deviation away."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).mul_(0.5)
    return logits.clone().add_(noise.to(logits))


def published_differential_step(
    cond: Tensor, uncond: Tensor, previous: Tensor, guidance_scale: float, num_selected: int
) -> Tensor:
    """Differential sampling as the paper's code writes it: softmax, KL, sort, difference, multinomial, gather."""
    probs = (uncond + guidance_scale * (cond - uncond)).float().softmax(-1)
    divergence = torch.nn.functional.kl_div(previous.log(), probs, reduction="none").sum(-1)
    rows = divergence.sort(-1).indices[:, :num_selected, None].expand(-1, -1, probs.shape[-1])
    probs.scatter_(1, rows, (probs.gather(1, rows) - previous.gather(1, rows)).clamp(min=1e-6))
    drawn = torch.multinomial(probs.flatten(0, 1), 1).view(probs.shape[:2])
    return probs.gather(-1, drawn[..., None])[..., 0].log()


def differential_case(
    model: Model = MEISSONIC_1024,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "token-major",
    guidance_scale: float = 3.0,
    share: float = 0.75,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """A step of differential sampling at B=1 with the previous step as its history, every position masked.

    At the guidance scale of the other cases the published code takes the logarithm of 0 and the time of denormals.
    """
    setting = Setting(
        "differential_sample", "guided", model.name, f"B=1 N={model.num_positions} V={model.codebook_size}", dtype,
        layout, backend=backend, threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        device = device_of(backend)
        first = [random_logits(seed, model, 1, dtype, layout, device) for seed in (0, 1)]
        pairs = [first, [moved_logits(logits, seed) for seed, logits in enumerate(first, start=2)]]
        tokens = masked_tokens(model, device=device)
        num_positions, codebook_size = model.num_positions, model.codebook_size

        def step(state: mgt_kernels.DifferentialState | None, index: int) -> tuple[Tensor, Tensor, Any]:
            cond, uncond = pairs[index % 2]
            return mgt_kernels.differential_sample(
                cond, tokens, state, uncond_logits=uncond, mask_token_id=codebook_size, seed=0, step=index,
                guidance_scale=guidance_scale, share=share, backend=backend,
            )  # fmt: skip

        states = [step(None, 0)[2]]

        def run() -> Tensor:
            token_ids, _, states[0] = step(states[0], int(states[0].step) + 1)
            return token_ids

        def check() -> None:
            _, _, state = step(None, 0)
            history, written = (x[:, CHECKED].cpu().clone() for x in (state.history, state.written))
            token_ids, logprob, state = step(state, 1)
            # which rows are selected depends on all of them: the oracle draws each of its rows both ways
            selected = select_rows(
                state.divergence, torch.ones_like(tokens, dtype=torch.bool), share=share, variant="paper"
            )
            token_ids, logprob, found, selected = (
                x[:, CHECKED].cpu() for x in (token_ids, logprob, state.divergence, selected)
            )
            cond, uncond = (half[:, CHECKED].cpu() for half in pairs[1])
            matches = torch.zeros_like(selected)
            for every in (0.0, 1.0):
                expected, truth, divergence, *_ = reference.differential_sample(
                    cond, tokens[:, CHECKED].cpu(), history, written, uncond_logits=uncond,
                    mask_token_id=codebook_size, seed=torch.zeros(1, dtype=torch.int64), step=1, share=every,
                    guidance_scale=guidance_scale, variant="paper",
                )  # fmt: skip
                matches |= (token_ids == expected) & ((logprob - truth).abs() < 1e-3) & (selected == bool(every))
            if not matches.all():
                raise AssertionError("token ids or logprob differ from the oracle's")
            if not torch.allclose(found.double(), divergence, atol=1e-3, rtol=1e-4):
                raise AssertionError("the divergence differs from the oracle's")

        (cond, uncond), (next_cond, next_uncond) = pairs
        previous = (uncond + guidance_scale * (cond - uncond)).float().softmax(-1)
        num_selected = int(share * num_positions)
        peer = partial(published_differential_step, next_cond, next_uncond, previous, guidance_scale, num_selected)
        # both halves once, two bytes of history in and two out per token; tokens in, ids, logprob and divergence out
        bytes_moved = num_positions * (codebook_size * (2 * dtype.itemsize + 4) + 24)
        return Job(Work(bytes_moved, num_positions), Call(run), {"pytorch": Call(peer)}, check)

    # beside what a position takes, each thread holds a row
    bytes_per_position = 64 + 4 * threads * model.codebook_size / model.num_positions
    return Case(setting, prepare, targets, bytes_per_position)


STATISTICS = ("argmax", "max_logprob", "margin", "entropy")


def pytorch_statistics(
    logits: Tensor, uncond: Tensor | None, tokens: Tensor, guidance_scale: float, noise_scale: float, mask_token_id: int
) -> tuple[Tensor, ...]:
    """The draw and STATISTICS as PyTorch users write them."""
    logits = pytorch_guidance(logits, uncond, guidance_scale, noise_scale)
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    drawn = torch.multinomial(p.flatten(0, 1), 1).view_as(tokens)
    logprob = log_p.gather(-1, drawn[..., None])[..., 0]
    largest, index = log_p.topk(2, dim=-1)
    margin = largest[..., 0].exp() - largest[..., 1].exp()
    return drawn, logprob, index[..., 0], largest[..., 0], margin, -(p * log_p).sum(-1)


def statistics_case(
    model: Model = MEISSONIC_1024, *, backend: str = "auto", threads: int = 2, targets: tuple[Target, ...] = ()
) -> Case:
    """A draw at B=1 that gives four statistics of its rows, with every position masked."""
    guidance_scale = model.guidance_scale
    setting = Setting(
        "sample_tokens", "statistics", model.name, f"B=1 N={model.num_positions} V={model.codebook_size}", model.dtype,
        backend=backend, threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        device = device_of(backend)
        logits = random_logits(0, model, dtype=model.dtype, device=device)
        uncond = None if guidance_scale is None else random_logits(1, model, dtype=model.dtype, device=device)
        tokens = masked_tokens(model, device=device)
        inputs = Inputs(logits, uncond, tokens, guidance_scale or 1.0, 0.0, backend)
        arguments = (logits, uncond, tokens, inputs.guidance_scale, 0.0, inputs.mask_token_id)

        def run() -> mgt_kernels.Sampled:
            return mgt_kernels.sample_tokens(
                logits, tokens, seed=0, backend=backend, statistics=STATISTICS, **inputs.draw()
            )

        def check() -> None:
            check_draw(inputs)
            drawn, expected = run()._asdict(), oracle(inputs)
            for name in STATISTICS:
                ours, theirs = drawn[name][:, CHECKED].cpu().double(), expected[name].double()
                if not torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5):
                    raise AssertionError(f"{name} differs from the oracle's")

        # every row of both halves is read once; tokens in, 20 bytes of the draw and as many of statistics out
        num_read = (1 if uncond is None else 2) * logits.numel()
        work = Work(num_read * logits.element_size() + 48 * tokens.numel(), tokens.numel())
        peers: dict[str, Contestant] = {
            "pytorch": Call(partial(pytorch_statistics, *arguments)),
            "plain draw": Call(partial(our_draw, inputs)),
        }
        return Job(work, Call(run), peers, check)

    return Case(setting, prepare, targets)


def commit_case(model: Model = MEISSONIC_1024, *, backend: str = "auto", threads: int = 2) -> Case:
    """The commit of one step at B=1 by a bound on the entropies, with every position masked."""
    setting = Setting(
        "commit_tokens", "entropy bound", model.name, f"B=1 N={model.num_positions}", backend=backend, threads=threads
    )

    def prepare() -> Job:
        device, shape, mask_token_id = device_of(backend), (1, model.num_positions), model.codebook_size
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(mask_token_id, shape, generator=generator).to(device)
        entropy = (3 * torch.rand(shape, generator=generator) ** 4).to(device)
        tokens = torch.full_like(token_ids, mask_token_id)
        bound = model.num_positions / 100

        def run() -> tuple[Tensor, Tensor]:
            return mgt_kernels.commit_tokens(
                token_ids, entropy, tokens, entropy_bound=bound, mask_token_id=mask_token_id, seed=0, step=0,
                backend=backend,
            )  # fmt: skip

        def pytorch() -> tuple[Tensor, Tensor]:
            masked = tokens == mask_token_id
            ordered, order = torch.where(masked, entropy, torch.inf).sort(-1)
            accepted = ordered.cumsum(-1) - ordered <= bound
            commits = torch.zeros_like(masked).scatter(-1, order, accepted) & masked
            after = torch.where(commits, token_ids, tokens)
            return after, (after != mask_token_id).all(-1)

        def check() -> None:
            # the chain adds in float32
            ours, theirs = ((after != mask_token_id).sum() for after, _ in (run(), pytorch()))
            if abs(int(ours) - int(theirs)) > 1 or not 0 < int(ours) < model.num_positions:
                raise AssertionError(f"{ours} positions are committed, {theirs} by the chain")

        # ids, entropy and tokens in, tokens out
        return Job(Work(28 * tokens.numel(), tokens.numel()), Call(run), {"pytorch": Call(pytorch)}, check)

    return Case(setting, prepare)


def remask_case(
    model: Model = MEISSONIC_1024,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "token-major",
    guidance_scale: float = 9.0,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """The re-masking of Z-Sampling at B=1 with every position known, as in its last steps."""
    setting = Setting(
        "remask_tokens", "guided", model.name, f"B=1 N={model.num_positions} V={model.codebook_size}", dtype, layout,
        backend=backend, threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        device = device_of(backend)
        cond, uncond = (random_logits(seed, model, 1, dtype, layout, device) for seed in (0, 1))
        num_positions, codebook_size = model.num_positions, model.codebook_size
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(codebook_size, (1, num_positions), generator=generator).to(device)
        remask_len = num_positions // 10

        def run() -> tuple[Tensor, Tensor]:
            return mgt_kernels.remask_tokens(
                cond, tokens, remask_len, uncond_logits=uncond, guidance_scale=guidance_scale,
                mask_token_id=codebook_size, seed=0, step=0, backend=backend,
            )  # fmt: skip

        def pytorch() -> Tensor:
            logits = uncond + guidance_scale * (cond - uncond)
            score = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            return tokens.scatter(1, score.topk(remask_len, largest=False).indices, codebook_size)

        def check() -> None:
            remasked, score = (x.cpu() for x in run())
            some, some_uncond, some_tokens = (x[:, CHECKED].cpu() for x in (cond, uncond, tokens))
            truth = reference.remask_score(
                some, some_tokens, variant="paper", mask_token_id=codebook_size, step=0,
                seed=torch.zeros(1, dtype=torch.int64), uncond_logits=some_uncond, guidance_scale=guidance_scale,
            )  # fmt: skip
            if not torch.allclose(score[:, CHECKED].double(), truth, atol=1e-4, rtol=0):
                raise AssertionError("scores differ from the oracle's")
            lowest = score[0].topk(remask_len, largest=False).indices.sort().values
            if not torch.equal((remasked == codebook_size)[0].nonzero()[:, 0], lowest):
                raise AssertionError("other positions than the lowest are masked")

        # in the order of the memory, whatever the layout
        halves = (half.transpose(1, 2) if layout == "position-major" else half for half in (cond, uncond))
        parts = [part for half in halves for part in half.flatten().view(torch.int64).chunk(32)]

        def one_read() -> None:
            # as `machine.read_bandwidth` reads
            for part in parts:
                part.amax()

        peers: dict[str, Contestant] = {"pytorch": Call(pytorch), "one read": Call(one_read)}
        return Job(Work(2 * dtype.itemsize * num_positions * codebook_size, num_positions), Call(run), peers, check)

    return Case(setting, prepare, targets, bytes_per_position=256)


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


def z_sampling_case(*, batch: int = 8, threads: int = 2) -> Case:
    """Steps of Z-Sampling of the bundled model, guided, against its model calls alone."""

    def prepare() -> Job:
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

        num_positions = batch * model.num_tokens
        peers: dict[str, Contestant] = {"its model calls": Call(model_calls)}
        # the logits of every model call
        return Job(Work(12 * 4 * num_positions * model.codebook_size, num_positions), Call(run), peers, check)

    return Case(
        Setting("Z-Sampling", "guided", "bundled", f"B={batch}", threads=threads), prepare,
        (Target(0.95, "its model calls"),), math.inf,
    )  # fmt: skip


def alternation_case(*, ours: bool, threads: int = 2) -> Case:
    """What a call costs after a call of the other side, against what it costs after one of its own.

    Two thread pools that spin while they wait would slow each other down; with one pool neither side notices. A step
    and a layer of Meissonic's sizes: small calls would also notice what the other left of their caches.
    """
    model, layer = MEISSONIC_1024, MEISSONIC_UP

    def prepare() -> Job:
        halves = random_logits(0, model), random_logits(1, model)
        inputs = Inputs(*halves, masked_tokens(model), model.guidance_scale or 1.0, 0.0, "auto")
        x, weight = torch.randn(layer.num_rows, layer.num_inputs), torch.randn(layer.num_outputs, layer.num_inputs)
        step, linear = partial(our_step, inputs), partial(torch.nn.functional.linear, x, weight)
        timed, other = (step, linear) if ours else (linear, step)
        peers: dict[str, Contestant] = {"alone": Call(timed, before=timed)}
        num_bytes = 8 * model.num_positions * model.codebook_size if ours else 4 * (x.numel() + weight.numel())
        return Job(Work(num_bytes, model.num_positions), Call(timed, before=other), peers, partial(check_step, inputs))

    variant = "our step after torch's linear" if ours else "torch's linear after our step"
    shape = f"B=1 N={model.num_positions} V={model.codebook_size}"
    return Case(
        Setting("alternation", variant, model.name, shape, threads=threads), prepare, (Target(1 / 1.1, "alone"),),
        math.inf,
    )  # fmt: skip


def kernels(op: str) -> list[str]:
    """The instruction sets of this machine that have a kernel of their own for `op`, fastest first."""
    return [isa for isa in reversed(cpu.available_isas()) if cpu.kernel_isa(op, isa) == isa]


def gpu_absent() -> str:
    """Return why the Triton kernels do not run here; "" where they do."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install mgt-kernels[gpu])"
    return ""
