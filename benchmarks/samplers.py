"""Cases of samplers of large vocabularies: truncated draws, and whole steps, beside the code that their users have."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mgt_kernels
from mgt_kernels import reference

from .case import AbsentError, Call, Case, Contestant, Job, Setting, Target, Work
from .models import DIFFUSION_GEMMA, OMNIVOICE, Model
from .peers import FOLDER, Worker
from .steps import CHECKED, device_of, gather_peers, random_logits

# logits whose log-sum-exp is nearer than this kept the same tokens: the last of 50 that are kept weighs more
SAME_KEPT = 1e-4


class Truncation(NamedTuple):
    """What is drawn from: the temperature, and what of the rest is left out."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def name(self) -> str:
        """Every setting that is not what it is by default."""
        fields = self._asdict().items()
        return " + ".join(f"{name} {value:g}" for name, value in fields if value != self._field_defaults[name])


def block_logits(model: Model, device: str = "cpu") -> Tensor:
    """Logits of standard deviation 2 with four tokens of each position above the others, one above the other three.

    By a lot or by nothing: so the model is sure of some positions and not of others, as it is in a step.
    """
    logits = random_logits(0, model).clone()
    generator = torch.Generator().manual_seed(1)
    shape = (*logits.shape[:2], 1)

    def uniform(low: float, high: float, count: int = 1) -> Tensor:
        return torch.empty(*shape[:2], count).uniform_(low, high, generator=generator)

    first = torch.randint(model.codebook_size, shape, generator=generator)
    others = (first + torch.tensor([1, 2, 3])) % model.codebook_size
    best, distance = uniform(8, 24), uniform(0, 10)
    logits.scatter_(2, first, best).scatter_(2, others, best - distance * uniform(0.5, 1, 3))
    return logits.to(device)


def sorted_filter(logits: Tensor, truncation: Truncation) -> Tensor:
    """The logits that are left, as the samplers of SDAR and Dream write it: a sort, a sum and a scatter for top_p."""
    logits = logits / truncation.temperature
    if truncation.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(truncation.top_k).values[..., -1:], -torch.inf)
    if truncation.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > truncation.top_p
        # the first that reaches it stays
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], -1)
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    if truncation.min_p:
        bound = logits.amax(-1, keepdim=True) + math.log(truncation.min_p)
        logits = logits.masked_fill(logits < bound, -torch.inf)
    return logits


def warped(logits: Tensor, truncation: Truncation) -> Tensor:
    """The logits that are left, by transformers' own warpers, in the order that its generation has them."""
    try:
        from transformers.generation import logits_process
    except ImportError as error:
        raise AbsentError("not installed (pip install mgt-kernels[diffusers])") from error
    # their annotations ask for tensor types of PyTorch 0.4
    library: Any = logits_process
    rows = logits.flatten(0, 1)
    ids = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    # as `generate` leaves out what changes nothing
    if truncation.temperature != 1:
        rows = library.TemperatureLogitsWarper(truncation.temperature)(ids, rows)
    if truncation.top_k is not None:
        rows = library.TopKLogitsWarper(truncation.top_k)(ids, rows)
    if truncation.top_p < 1:
        rows = library.TopPLogitsWarper(truncation.top_p)(ids, rows)
    if truncation.min_p:
        rows = library.MinPLogitsWarper(truncation.min_p)(ids, rows)
    return rows.view(logits.shape)


Filter = Callable[[Tensor, Truncation], Tensor]
FILTERS: dict[str, Filter] = {"pytorch": sorted_filter, "transformers": warped}


def draw_of(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A token, its probability, and all probabilities: softmax, multinomial, gather."""
    probs = kept.float().softmax(-1)
    drawn = torch.multinomial(probs.flatten(0, 1), 1).view(kept.shape[:2])
    return drawn, probs.gather(-1, drawn[..., None])[..., 0], probs


def by_filter(make: Callable[[Filter], Callable[[], object]], logits: Tensor) -> dict[str, Callable[[], Contestant]]:
    """The peers that draw with each of the filters; one whose library is missing is absent."""

    def contestant(kept: Filter) -> Contestant:
        kept(logits[:, :1, :8], Truncation(0.5))
        return Call(make(kept))

    return {name: partial(contestant, kept) for name, kept in FILTERS.items()}


def require(name: str) -> Any:
    """Import a module of diffusers or transformers."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise AbsentError(f"{error} (pip install -U mgt-kernels[diffusers])") from error


def check_draw(logits: Tensor, truncation: Truncation, draw: dict[str, Any], backend: str) -> Tensor:
    """Compare some positions with the oracle, and the tokens that are left with those that the peers leave.

    Return the log-sum-exp of those that are left.
    """
    some = logits[:, CHECKED]
    tokens = torch.full(some.shape[:2], draw["mask_token_id"], device=some.device)
    settings = truncation._asdict()
    ours = mgt_kernels.sample_tokens(some, tokens, backend=backend, statistics=("logsumexp",), **settings, **draw)
    expected, _ = reference.sample_tokens(
        some.cpu(), tokens.cpu(), seed=torch.zeros(len(some), dtype=torch.int64), step=draw["step"],
        mask_token_id=draw["mask_token_id"], **settings | {"top_k": truncation.top_k or 0},
    )  # fmt: skip
    if not torch.equal(ours.token_ids.cpu(), expected["token_ids"]):
        raise AssertionError("token ids differ from the oracle's")
    if not torch.allclose(ours.logprob.cpu().double(), expected["logprob"], atol=1e-4, rtol=0):
        raise AssertionError("logprob differs from the oracle's")
    assert ours.logsumexp is not None
    for name, kept in FILTERS.items():
        try:
            theirs = kept(some, truncation).double().logsumexp(-1)
        except AbsentError:
            continue
        if not torch.allclose(ours.logsumexp.double(), theirs, atol=SAME_KEPT, rtol=0):
            raise AssertionError(f"other tokens are left than by {name}")
    return ours.logsumexp


def truncated_case(
    model: Model,
    truncation: Truncation,
    *,
    others: bool = False,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """A draw at B=1 of what top_k, top_p or min_p leave, every position masked, beside the one of all tokens.

    And, where `others`, beside vLLM's, in a process of its own.
    """
    setting = Setting(
        "sample_tokens", truncation.name, model.name, f"B=1 N={model.num_positions} V={model.codebook_size}",
        backend=backend, threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        logits = random_logits(0, model, device=device_of(backend))
        draw: dict[str, Any] = {"mask_token_id": model.codebook_size, "seed": 0, "step": 0}
        tokens = torch.full(logits.shape[:2], model.codebook_size, device=logits.device)

        def ours(settings: Truncation) -> mgt_kernels.Sampled:
            return mgt_kernels.sample_tokens(logits, tokens, backend=backend, **settings._asdict(), **draw)

        def theirs(kept: Filter) -> Callable[[], object]:
            return lambda: draw_of(kept(logits, truncation))[:2]

        def vllm() -> Contestant:
            if truncation.min_p:
                raise AbsentError("has min_p in another place")
            sizes = (model.num_positions, model.codebook_size, *truncation[:3])
            return Worker.start_draw("vllm", FOLDER, sizes, threads)

        wanted = by_filter(theirs, logits)
        if others and backend != "triton":
            wanted["vllm"] = vllm
        peers, skipped = gather_peers(wanted)
        peers["plain draw"] = Call(partial(ours, Truncation(truncation.temperature)))

        def check() -> None:
            left = check_draw(logits, truncation, draw, backend)[0]
            worker = peers.get("vllm")
            if isinstance(worker, Worker):
                theirs = torch.tensor(worker.ask("logsumexp"), dtype=torch.float64)
                if not torch.allclose(left.double(), theirs, atol=SAME_KEPT, rtol=0):
                    raise AssertionError("other tokens are left than by vllm")

        work = Work(logits.nbytes + 20 * tokens.numel(), tokens.numel())
        return Job(work, Call(partial(ours, truncation)), peers, check, skipped)

    return Case(setting, prepare, targets)


def step_setting(model: Model, variant: str, backend: str, threads: int) -> Setting:
    """The setting of a draw and a commit."""
    shape = f"B=1 N={model.num_positions} V={model.codebook_size}"
    return Setting("draw and commit", variant, model.name, shape, backend=backend, threads=threads)


def entropy_bound_case(
    model: Model = DIFFUSION_GEMMA,
    *,
    softcap: float | None = 30.0,
    temperature: float = 0.8,
    bound: float = 0.1,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """A step of DiffusionGemma: the capped draw, argmax and entropy, and a commit by the sum of the entropies.

    What is not committed gets random tokens: there are no masks between steps.
    """
    variant = f"entropy bound {bound:g}" + (f" + softcap {softcap:g}" if softcap else "")

    def prepare() -> Job:
        logits = block_logits(model, device_of(backend))
        num_tokens = model.codebook_size
        shape = logits.shape[:2]
        # every position is drawn
        masks = torch.full(shape, num_tokens, device=logits.device)
        common: Any = {"mask_token_id": num_tokens, "seed": 0, "step": 0, "backend": backend}

        def draw(**statistics: Any) -> mgt_kernels.Sampled:
            return mgt_kernels.sample_tokens(
                logits, masks, softcap=softcap, temperature=temperature, **common, **statistics
            )

        def fresh() -> Tensor:
            return torch.randint(num_tokens, shape, device=logits.device)

        def ours() -> tuple[Any, ...]:
            drawn = draw(statistics=("argmax", "entropy"))
            assert drawn.entropy is not None
            after, _ = mgt_kernels.commit_tokens(drawn.token_ids, drawn.entropy, masks, entropy_bound=bound, **common)
            accepted = after != num_tokens
            return torch.where(accepted, after, fresh()), accepted, drawn

        def capped() -> Tensor:
            # what the last layer of the model does
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap

        def pytorch() -> tuple[Any, ...]:
            tempered = capped() / temperature
            log_p = tempered.log_softmax(-1)
            probs = log_p.exp()
            drawn = torch.multinomial(probs.flatten(0, 1), 1).view(shape)
            logprob = log_p.gather(-1, drawn[..., None])[..., 0]
            entropy = -(probs * log_p).sum(-1)
            ordered, order = entropy.sort(-1)
            accepted = torch.zeros_like(masks, dtype=torch.bool).scatter(
                -1, order, ordered.cumsum(-1) - ordered <= bound
            )
            return torch.where(accepted, drawn, fresh()), accepted, drawn, logprob, tempered.argmax(-1), entropy

        def diffusers() -> Callable[[], tuple[Any, ...]]:
            schedulers = require("diffusers.schedulers.scheduling_entropy_bound")
            scheduler = schedulers.EntropyBoundScheduler(entropy_bound=bound, t_max=temperature, t_min=temperature)
            canvas = fresh()
            return lambda: scheduler.step(capped(), 0, canvas, return_dict=False)

        def transformers() -> Callable[[], tuple[Any, ...]]:
            library = require("transformers.models.diffusion_gemma.generation_diffusion_gemma")
            sampler = library.EntropyBoundSampler(
                library.EntropyBoundSamplerConfig(bound), model.num_positions, num_tokens, 48
            )
            canvas = fresh()

            def step() -> tuple[Any, ...]:
                tempered = capped() / temperature
                probs = tempered.softmax(-1, dtype=torch.float32)
                drawn = torch.multinomial(probs.flatten(0, 1), 1).view(shape)
                accepted = sampler.accept_canvas(canvas, drawn, tempered, torch.tensor(0))
                return (
                    sampler.renoise_canvas(accepted, torch.tensor(0)),
                    sampler.accepted_token_mask,
                    drawn,
                    tempered.argmax(-1),
                )

            return step

        runs: dict[str, Callable[[], Callable[[], tuple[Any, ...]]]] = {
            "diffusers": diffusers, "transformers": transformers, "pytorch": lambda: pytorch,
        }  # fmt: skip

        def check() -> None:
            _, accepted, drawn = ours()
            some = logits[:, CHECKED].cpu()
            expected, _ = reference.sample_tokens(
                some, masks[:, CHECKED].cpu(), softcap=softcap or math.inf, temperature=temperature,
                mask_token_id=num_tokens, step=0, seed=torch.zeros(len(some), dtype=torch.int64),
            )  # fmt: skip
            for name in ("token_ids", "argmax", "logprob", "entropy"):
                value = getattr(drawn, name)[:, CHECKED].cpu().double()
                if not torch.allclose(value, expected[name].double(), atol=1e-4, rtol=0):
                    raise AssertionError(f"{name} differs from the oracle's")
            if not 1 < int(accepted.sum()) < model.num_positions:
                raise AssertionError(f"{int(accepted.sum())} positions are accepted: nothing to compare")
            ordered, order = drawn.entropy.double().sort(-1)
            sums = torch.zeros_like(ordered).scatter(-1, order, ordered.cumsum(-1) - ordered)
            for name, make in runs.items():
                try:
                    theirs = make()()
                except AbsentError:
                    continue
                # the sums are in float32, and may be on the other side of the bound
                if not torch.equal(theirs[1], accepted) and (sums[theirs[1] != accepted] - bound).abs().max() > 1e-3:
                    raise AssertionError(f"{int(accepted.sum())} positions are accepted, others by {name}")
                argmax = theirs[-1] if name == "transformers" else theirs[4] if name == "pytorch" else drawn.argmax
                if not torch.equal(argmax, drawn.argmax):
                    raise AssertionError(f"argmax differs from that of {name}")

        def contestant(make: Callable[[], Callable[[], object]]) -> Contestant:
            return Call(make())

        peers, skipped = gather_peers({name: partial(contestant, make) for name, make in runs.items()})
        peers["draw alone"] = Call(draw)
        work = Work(logits.nbytes + 72 * masks.numel(), masks.numel())
        return Job(work, Call(ours), peers, check, skipped)

    return Case(step_setting(model, variant, backend, threads), prepare, targets, bytes_per_position=128)


def pytorch_commit(
    drawn: Tensor, probability: Tensor, tokens: Tensor, mask_token_id: int, threshold: float, count: int,
    replace_above: float | None,
) -> Tensor:  # fmt: skip
    """What is surer than a threshold, or the best few; known tokens are replaced where the draw is sure of another."""
    masked = tokens == mask_token_id
    sure = masked & (probability > threshold)
    confidence = torch.where(masked, probability, -1.0)
    best = torch.zeros_like(masked).scatter(-1, confidence.topk(count).indices, True) & masked
    commits = torch.where(sure.sum(-1, keepdim=True) >= count, sure, best)
    if replace_above is not None:
        commits |= ~masked & (probability > replace_above) & (drawn != tokens)
    return torch.where(commits, drawn, tokens)


def block_case(
    model: Model,
    truncation: Truncation,
    *,
    threshold: float = 0.95,
    replace_above: float | None = 0.9,
    scheduler: bool = True,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """A step of LLaDA2 or SDAR: a truncated draw of the block, and a commit of what it is sure of, one at least.

    Where known tokens are edited, a third of them are known, and drawn like the others. `scheduler`: diffusers' step.
    """
    variant = f"{truncation.name} + threshold {threshold:g}" + (f" + edit {replace_above:g}" if replace_above else "")

    def prepare() -> Job:
        logits = block_logits(model, device_of(backend))
        shape, device = logits.shape[:2], logits.device
        num_tokens = mask_token_id = model.codebook_size
        generator = torch.Generator().manual_seed(2)
        known = torch.rand(shape, generator=generator) < (1 / 3 if replace_above else 0)
        tokens = torch.randint(num_tokens, shape, generator=generator).where(known, mask_token_id).to(device)
        # every position is drawn where known ones are edited
        drawn_at = torch.full_like(tokens, mask_token_id)
        draw: dict[str, Any] = {"mask_token_id": mask_token_id, "seed": 0, "step": 0}

        def sample(settings: Truncation) -> mgt_kernels.Sampled:
            return mgt_kernels.sample_tokens(logits, drawn_at, backend=backend, **settings._asdict(), **draw)

        def commit(token_ids: Tensor, logprob: Tensor) -> Tensor:
            edit = None
            if replace_above is not None:
                edit = mgt_kernels.TokenEdit(token_ids, logprob, math.log(replace_above))
            after, _ = mgt_kernels.commit_tokens(
                token_ids, logprob, tokens, threshold=math.log(threshold), edit=edit, backend=backend, **draw
            )
            return after

        def ours(settings: Truncation = truncation) -> tuple[Tensor, ...]:
            drawn = sample(settings)
            return commit(drawn.token_ids, drawn.logprob), drawn.token_ids, drawn.logprob

        def chain_commit(drawn: Tensor, probability: Tensor) -> Tensor:
            return pytorch_commit(drawn, probability, tokens, mask_token_id, threshold, 1, replace_above)

        def by_chain(kept: Filter) -> Callable[[], object]:
            def step() -> tuple[Tensor, ...]:
                drawn, probability, _ = draw_of(kept(logits, truncation))
                return chain_commit(drawn, probability), drawn, probability

            return step

        def diffusers_step() -> Callable[..., Any]:
            library = require("diffusers.schedulers.scheduling_block_refinement")
            one = library.BlockRefinementScheduler(block_length=shape[1], num_inference_steps=shape[1])
            one.set_timesteps(shape[1], device=device)
            return partial(
                one.step, logits, 0, tokens, mask_token_id=mask_token_id, threshold=threshold,
                editing_threshold=replace_above,
            )  # fmt: skip

        options = {"temperature": truncation.temperature, "top_k": truncation.top_k, "top_p": truncation.top_p}

        def check() -> None:
            check_draw(logits, truncation, draw, backend)
            greedy, ids, logprob = ours(Truncation(0.0))
            if not int((tokens == mask_token_id).sum()) > int((greedy == mask_token_id).sum()):
                raise AssertionError("nothing is committed")
            if not torch.equal(chain_commit(ids, logprob.exp()), greedy):
                raise AssertionError("the chain commits other tokens")
            if scheduler:
                try:
                    step = diffusers_step()
                except AbsentError:
                    return
                if not torch.equal(step(temperature=0.0).prev_sample, greedy):
                    raise AssertionError("diffusers commits other tokens at temperature 0")
                theirs = step(**options)
                if not torch.equal(commit(theirs.sampled_tokens, theirs.sampled_probs.log()), theirs.prev_sample):
                    raise AssertionError("diffusers commits other tokens of its draw")

        wanted = by_filter(by_chain, logits)
        if scheduler:
            wanted["diffusers"] = lambda: Call(partial(diffusers_step(), **options))
        peers, skipped = gather_peers(wanted)
        peers["plain draw"] = Call(partial(sample, Truncation(truncation.temperature)))
        return Job(Work(logits.nbytes + 48 * tokens.numel(), tokens.numel()), Call(ours), peers, check, skipped)

    return Case(step_setting(model, variant, backend, threads), prepare, targets, bytes_per_position=256)


def dream_case(
    model: Model,
    truncation: Truncation,
    *,
    count: int = 8,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """A step of Dream by entropy: a truncated draw, and a commit of the positions of least entropy of what is left."""

    def prepare() -> Job:
        logits = block_logits(model, device_of(backend))
        tokens = torch.full(logits.shape[:2], model.codebook_size, device=logits.device)
        draw: dict[str, Any] = {"mask_token_id": model.codebook_size, "seed": 0, "step": 0}

        def ours() -> tuple[Tensor, ...]:
            drawn = mgt_kernels.sample_tokens(
                logits, tokens, backend=backend, statistics=("entropy",), **truncation._asdict(), **draw
            )
            assert drawn.entropy is not None
            after, _ = mgt_kernels.commit_tokens(
                drawn.token_ids, -drawn.entropy, tokens, count=count, backend=backend, **draw
            )
            return after, drawn.token_ids, drawn.entropy

        def plain() -> mgt_kernels.Sampled:
            return mgt_kernels.sample_tokens(
                logits, tokens, temperature=truncation.temperature, backend=backend, **draw
            )

        def entropy_of(probs: Tensor) -> Tensor:
            return -(probs * (probs + 1e-10).log()).sum(-1)

        def by_chain(kept: Filter) -> Callable[[], object]:
            def step() -> tuple[Tensor, ...]:
                drawn, _, probs = draw_of(kept(logits, truncation))
                entropy = entropy_of(probs)
                where = entropy.topk(count, largest=False).indices
                return tokens.scatter(-1, where, drawn.gather(-1, where)), drawn, entropy

            return step

        def check() -> None:
            check_draw(logits, truncation, draw, backend)
            after, ids, entropy = ours()
            committed = after != model.codebook_size
            # many are equal where one token is left
            least = entropy[committed].sort().values
            if not torch.equal(least, entropy[0].topk(count, largest=False).values.sort().values):
                raise AssertionError("other positions than those of least entropy are committed")
            if not torch.equal(after[committed], ids[committed]):
                raise AssertionError("other tokens than the drawn ones are committed")
            theirs = entropy_of(sorted_filter(logits[:, CHECKED], truncation).softmax(-1))
            if not torch.allclose(entropy[:, CHECKED], theirs, atol=1e-3, rtol=0):
                raise AssertionError("the entropies differ from the chain's")

        peers, skipped = gather_peers(by_filter(by_chain, logits))
        peers["plain draw"] = Call(plain)
        return Job(Work(logits.nbytes + 48 * tokens.numel(), tokens.numel()), Call(ours), peers, check, skipped)

    variant = f"{truncation.name} + {count} of least entropy"
    return Case(step_setting(model, variant, backend, threads), prepare, targets, bytes_per_position=128)


def omnivoice_case(
    model: Model = OMNIVOICE,
    *,
    num_codebooks: int = 8,
    share: float = 0.05,
    backend: str = "auto",
    threads: int = 2,
    targets: tuple[Target, ...] = (),
) -> Case:
    """A step of OmniVoice: guided argmax of every codebook and frame, and a commit of the surest of all of them.

    Sureness falls by 5 with each codebook, and has Gumbel noise of temperature 5. The mask is the last token.
    """
    guidance_scale = model.guidance_scale or 1.0
    setting = Setting(
        "draw and commit", "guided", model.name, f"B={num_codebooks} N={model.num_positions} V={model.codebook_size}",
        backend=backend, threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        device = device_of(backend)
        cond, uncond = (random_logits(seed, model, num_codebooks, device=device) for seed in (0, 1))
        mask_token_id = model.codebook_size - 1
        shape = cond.shape[:2]
        tokens = torch.full(shape, mask_token_id, device=device)
        penalty = 5.0 * torch.arange(num_codebooks, device=device)[:, None]
        count = int(share * tokens.numel())
        common: Any = {"mask_token_id": mask_token_id, "seed": 0, "step": 0, "backend": backend}

        def draw() -> tuple[Tensor, Tensor]:
            drawn = mgt_kernels.sample_tokens(
                cond, tokens, uncond_logits=uncond, guidance_scale=guidance_scale, temperature=0.0, **common
            )
            return drawn.token_ids, drawn.logprob - penalty

        def ours() -> tuple[Tensor, Tensor]:
            token_ids, score = draw()
            after, _ = mgt_kernels.commit_tokens(
                token_ids.view(1, -1), score.view(1, -1), tokens.view(1, -1), count=count, temperature=5.0, **common
            )
            return after.view(shape), token_ids

        def chain_draw() -> tuple[Tensor, Tensor]:
            # both halves are normalised first, which the guided ones then are again
            c, u = cond.log_softmax(-1), uncond.log_softmax(-1)
            log_p = (c + (guidance_scale - 1) * (c - u)).log_softmax(-1)
            log_p[..., mask_token_id] = -torch.inf
            score, token_ids = log_p.max(-1)
            return token_ids, score - penalty

        def pytorch() -> tuple[Tensor, Tensor]:
            token_ids, score = chain_draw()
            noise = -torch.log(-torch.log(torch.rand_like(score) + 1e-10) + 1e-10)
            where = (score / 5 + noise).flatten().topk(count).indices
            after = tokens.flatten().scatter(0, where, token_ids.flatten().gather(0, where))
            return after.view(shape), token_ids

        def check() -> None:
            (token_ids, score), (their_ids, their_score) = draw(), chain_draw()
            if not torch.equal(token_ids, their_ids):
                raise AssertionError("token ids differ from the chain's")
            # which counts the mask among what the probabilities are of
            guided = (uncond + guidance_scale * (cond - uncond)).double().log_softmax(-1)[..., mask_token_id]
            if not torch.allclose(score.double(), their_score - torch.log1p(-guided.exp()), atol=1e-4, rtol=0):
                raise AssertionError("scores differ from the chain's")
            committed = [int((after != mask_token_id).sum()) for after, _ in (ours(), pytorch())]
            if committed != [count, count]:
                raise AssertionError(f"{committed[0]} positions are committed, {committed[1]} by the chain")

        work = Work(2 * cond.nbytes + 48 * tokens.numel(), tokens.numel())
        return Job(work, Call(ours), {"pytorch": Call(pytorch), "draw alone": Call(draw)}, check)

    return Case(setting, prepare, targets, bytes_per_position=128)
