"""A diffusers scheduler in place of `AmusedScheduler` and Meissonic's `Scheduler`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mgt_kernels import mask_by_confidence
from mgt_kernels.checks import BACKENDS
from mgt_kernels.ops import Sampled

from .arguments import integer, kind, number
from .deferred import DeferredLogits
from .draw import Draw
from .interval import NextStep, Step
from .sampling import check_all_drawn
from .schedules import (
    check_num_inference_steps,
    checked_mask_schedule,
    checked_values,
    mask_len,
    mask_ratios,
    schedule_values,
)
from .state import Logits, State
from .step import Rule, begin, take_step
from .techniques import Differential

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
except ImportError as error:
    raise ImportError("MGTScheduler needs diffusers: pip install 'mgt-kernels[diffusers]'") from error

Generators: TypeAlias = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class MGTSchedulerOutput(BaseOutput):
    """What `MGTScheduler.step` returns; the fields of `AmusedSchedulerOutput`.

    Attributes:
        prev_sample: int64, the sample's shape: what to feed to the next step, mask_token_id where masked.
        pred_original_sample: int64, the same shape: every token as drawn, before any was masked again.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass(frozen=True)
class _Settings:
    """The arguments of `MGTScheduler`, checked, and in types that a JSON file keeps."""

    mask_token_id: int
    masking_schedule: str | list[float] = "cosine"
    noise_scale: float | str | list[float] = 0.0
    differential: dict[str, Any] | None = None
    momentum: float | str | list[float] = 0.0
    rng: str = "philox"
    backend: str = "auto"

    def __post_init__(self) -> None:
        plain = {
            "mask_token_id": integer("mask_token_id", self.mask_token_id),
            "masking_schedule": checked_mask_schedule(self.masking_schedule, name="masking_schedule"),
            "noise_scale": checked_values(self.noise_scale, name="noise_scale", minimum=0.0),
            "differential": _checked_differential(self.differential),
            "momentum": checked_values(self.momentum, name="momentum"),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.rng not in ("philox", "torch"):
            raise ValueError(f"rng: expected 'philox' or 'torch', got {self.rng!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {self.backend!r}")
        if self.rng == "torch" and (self.differential is not None or self.momentum not in (0.0, [0.0])):
            raise ValueError("rng: expected 'philox' with differential or momentum, got 'torch'")

    def changed_by(self, config: Any) -> _Settings:
        """These settings as a config has them now, where a host has written to its attributes or to its items."""
        changed = {}
        for f in fields(self):
            before = getattr(self, f.name)
            for value in (config.get(f.name, before), getattr(config, f.name, before)):
                if value is not before and (type(value) is not type(before) or value != before):
                    changed[f.name] = value
        return replace(self, **changed) if changed else self


class _Numbers:
    """The values of a public tensor, which may be changed; a GPU's are read again only where it was."""

    def __init__(self, tensor: Any, values: list[Any] | None = None) -> None:
        # as_tensor would move a tensor to the default device
        is_tensor = isinstance(tensor, Tensor)
        self.tensor: Tensor = tensor if is_tensor else torch.tensor(tensor, dtype=torch.float32, device="cpu")
        self._values = self.tensor.tolist() if values is None else values
        self._version = self._current_version()

    def values(self) -> list[Any]:
        if self.tensor.device.type == "cpu" or self._version != self._current_version():
            self._values, self._version = self.tensor.tolist(), self._current_version()
        return self._values

    def _current_version(self) -> int:
        return -1 if self.tensor.is_inference() else self.tensor._version


@dataclass(eq=False)
class _Run:
    """What one run has, from its first step to the one of timestep 0."""

    settings: _Settings
    timesteps: _Numbers
    temperatures: _Numbers
    generators: tuple[weakref.ref[torch.Generator] | None, ...]
    shape: tuple[int, int]
    """(B, N)."""

    ratios: list[float]
    noise_scales: list[float]
    rule: Rule = field(default_factory=Rule)
    state: State | None = None
    """With rng "philox", what the steps remember; its tokens are the host's."""

    ratio: float | Tensor | None = None
    """The share that stays masked after the step that is being taken; None at the last."""

    temperature: float = 0.0
    """Of the noise on its confidences."""

    last_index: int = -1
    sample: weakref.ref[Tensor] | None = None
    """What the last step returned: whoever has it may go on with the run."""

    is_beginning: bool = True
    """Whether its first step is being taken, in this thread or in another."""

    takes_any_sample: bool = True
    """Whether a step of the same generator belongs to this run even if its sample is another."""

    def goes_on(self, timestep: float, sample: Tensor, shape: tuple[int, int], generator: Generators) -> bool:
        """Whether a step is the next of this run."""
        if not (self.returned(sample) or self.takes_any_sample) or shape != self.shape or not self.is_of(generator):
            return False
        timesteps = self.timesteps.values()
        return timestep in timesteps and timesteps.index(timestep) > self.last_index

    def returned(self, sample: Tensor) -> bool:
        """Whether the last step returned this very tensor."""
        return self.sample is not None and self.sample() is sample

    def is_of(self, generator: Generators) -> bool:
        """Whether the run draws from these generators."""
        given = _listed(generator)
        return len(given) == len(self.generators) and all(
            g is None if ref is None else g is not None and ref() is g
            for ref, g in zip(self.generators, given, strict=True)
        )

    @property
    def is_lost(self) -> bool:
        """Whether nobody has the sample that the run goes on from."""
        return not self.is_beginning and (self.sample is None or self.sample() is None)

    def select(self, sampled: Sampled, score: Tensor, state: State) -> Tensor:
        """The part of the rule that masks again, by what the host and the timestep say of this step."""
        if self.ratio is None:
            return sampled.token_ids
        left = mask_len(state.num_masked(), self.ratio, state.tokens.shape[1])
        return mask_by_confidence(sampled.token_ids, score, left, temperature=self.temperature, **state.draw_arguments)

    def again(self, sample: Tensor) -> None:
        """Let the last step be taken once more from another sample, with draws of its own, as in Z-Sampling."""
        self.last_index -= 1
        self.sample = weakref.ref(sample)


class MGTScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Unmasks image tokens step by step, on the fused kernels.

    Takes the place of diffusers' `AmusedScheduler` (arXiv 2401.01808) and of Meissonic's `Scheduler`
    (arXiv 2410.08261):

        pipe.scheduler = MGTScheduler.from_config(pipe.scheduler.config)

    Step k of T, timestep T - 1 - k, draws a token at every masked position and masks the least confident again:

        l          = logits + sigma_k eps
        token      ~ softmax(l)
        confidence = log softmax(l)[token] + temperatures[k] gumbel
        m_k        = max(1, min(M_k - 1, floor(N starting_mask_ratio gamma((k + 1) / T))))

    with m_k = 0 at timestep 0 (MaskGIT, arXiv 2202.04200).

    With `rng="philox"` a draw is a function of the sample's seed, the step, the position and the token, so it
    does not depend on the batch. The seeds are drawn from `generator` once a run. A sample with nothing masked
    stays as it is, and known tokens stay as they are.

    With `rng="torch"` every draw is PyTorch's own, in the order of `AmusedScheduler`: on the CPU all results
    and the generator's final state equal its bit for bit, far slower than the kernels. That includes what one
    would not choose: a sample with nothing masked has one known token masked again, float16 logits mask a few
    known tokens again (a uniform draw of 0 becomes Gumbel noise of -inf), and half-precision confidences tie,
    so that fewer than m_k tokens may be masked. Noise of `noise_scale` is drawn first, where there is any.

    Runs do not disturb each other: several may take turns on one scheduler, in threads too. A step belongs to
    the run that returned its sample; a sample that was copied or edited in between, to the last run of the same
    generator since `set_timesteps`. Any other step begins a run, as does one whose timestep does not fall and one
    of another generator or shape.

    A run reads the config, `timesteps` and `temperatures` at its first step. So a change by `register_to_config`, or
    another tensor in place of one of the two, is in effect from the next run on, also between `set_timesteps` and the
    first step; values that are written into the two tensors, from the next step on. A copy by `copy.deepcopy` goes on
    with the runs that have begun; one by `copy.copy` or `pickle` does not know of them.

    Args:
        mask_token_id: the token that stands for "masked".
        masking_schedule: gamma, a name that `schedules.mask_ratio` knows ("cosine", "linear", "pow0.6", ...),
            or a list of T ratios in [0, 1].
        noise_scale: sigma, Gaussian noise on the logits in nats, for noise regularization (arXiv 2411.10781):
            a number, [start, end], T values, or a name such as "abs_cos:2", the published one
            (`schedules.schedule_values`).
        differential: arguments of `Differential`, such as {"share": 0.75}, for differential sampling
            (arXiv 2411.10781); None: don't. The previous step's distribution is forgotten when a run ends.
        momentum: carries the logits on along their change since the last step, times this: a number, [start, end]
            or T values (`techniques.Extrapolation`).
        rng: "philox" or "torch"; the latter has neither differential sampling nor momentum.
        backend: of `mgt_kernels`, for rng "philox": "auto", "reference", "triton" or an instruction set, as
            `sample_tokens` takes it.

    Raises:
        TypeError: an argument of the wrong type, or keys in differential that `Differential` does not know; here and
            in `register_to_config`.
        ValueError: an argument out of range, an unknown schedule, rng or backend, or an rng that does not go with the
            other arguments; here and in `register_to_config`. A list whose length is not T raises at `set_timesteps`.
    """

    order = 1

    config: Any
    temperatures: Tensor | None
    timesteps: Tensor | None

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        mask_token_id: int,
        masking_schedule: str | list[float] = "cosine",
        noise_scale: float | str | list[float] = 0.0,
        differential: dict[str, Any] | None = None,
        momentum: float | str | list[float] = 0.0,
        rng: str = "philox",
        backend: str = "auto",
    ) -> None:
        """See the class."""
        self.temperatures = None
        self.timesteps = None
        # appended to and removed from, but never replaced: threads may do so at once
        self._runs: list[_Run] = []
        self.next_step = NextStep()

    def register_to_config(self, **kwargs: Any) -> None:
        """Change arguments of the constructor, for the runs that begin from now on.

        Raises:
            TypeError, ValueError: as for the constructor; the config is then as before.
        """
        given = {f.name: kwargs[f.name] for f in fields(_Settings) if f.name in kwargs}
        settings = replace(self._current_settings(), **given) if hasattr(self, "_settings") else _Settings(**given)
        known = {f.name: getattr(settings, f.name) for f in fields(settings)}
        super().register_to_config(**{**kwargs, **known})
        self._settings = settings

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config's arguments for the constructor; `from_config` calls this."""
        # diffusers leaves out what it takes for defaults, positional arguments and later changes among them
        config = {key: value for key, value in config_dict.items() if key != "_use_default_values"}
        return super().extract_init_dict(config, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | Sequence[float] = (2, 0),
        device: str | torch.device | None = None,
    ) -> None:
        """Begin a run of T steps.

        Sets `timesteps`, int64 (T,) from T - 1 to 0, and `temperatures`, float32 (T,). Either may be changed or
        replaced, as long as T values stay: step k is where `timesteps` has the timestep, and its last is 0.

        Args:
            num_inference_steps: T, at least 1.
            temperature: of the confidences: (start, end), linear from the first step to the last; or a number
                for (number, 0.01), as in the original.
            device: where the two tensors live; None: the CPU.

        Raises:
            TypeError: num_inference_steps is no int, or temperature neither a number nor two.
            ValueError: num_inference_steps below 1, a temperature that is negative or not finite, or a config with
                lists of another length.
        """
        num_inference_steps = check_num_inference_steps(num_inference_steps)
        start, end = _temperature_pair(temperature)
        settings = self._current_settings()
        # a list that does not have T values is refused before the first step
        _by_step(settings, num_inference_steps, 2)
        # plain tensors even in inference mode, whose own do not say that they were changed
        with torch.inference_mode(False):
            temperatures = torch.linspace(start, end, num_inference_steps, dtype=torch.float32, device="cpu")
            timesteps = torch.arange(num_inference_steps - 1, -1, -1, device="cpu")
            device = "cpu" if device is None else device
            self.temperatures, self.timesteps = temperatures.to(device), timesteps.to(device)
        self._numbers = [
            _Numbers(self.timesteps, timesteps.tolist()),
            _Numbers(self.temperatures, temperatures.tolist()),
        ]
        for run in list(self._runs):
            run.takes_any_sample = False
            if run.is_lost:
                self._remove(run)
        self.next_step.set(Step(0, num_inference_steps))

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor | DeferredLogits,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float | Tensor = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> MGTSchedulerOutput | tuple[Tensor, Tensor]:
        """One step: draw tokens for the masked positions, then mask the least confident again.

        Neither the logits nor the sample are written; logits whose tokens or whose positions lie side by side
        in memory, (B, V, H, W) in channels_last or in the default order among them, are read where they are.

        Args:
            model_output: guided logits in nats, (B, V, H, W) or (B, N, V), float32, bfloat16 or float16; or what stands
                for them after `accelerate(pipe, head=True)`, of which the masked positions alone are computed.
            timestep: one of `timesteps`, T - 1 first and 0 last; a tensor on a GPU is waited for.
            sample: int64 (B, H, W) or (B, N): the tokens, mask_token_id where masked.
            starting_mask_ratio: share of the tokens that was masked when the run began, in [0, 1]; a tensor
                may hold one for all samples or one for each. On a GPU, where to look would wait, a tensor goes
                unchecked, and m_k stays within 1 and M_k - 1.
            generator: on any device; a list holds one for each sample, whose result then depends on its own
                alone; None: PyTorch's global one.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Returns:
            prev_sample and pred_original_sample, of the sample's shape.

        Raises:
            RuntimeError: `set_timesteps` was not called.
            TypeError: an argument of the wrong type.
            ValueError: shapes that disagree, a timestep outside the run, or, with rng "philox", logits that hold NaN
                or +inf, or nothing but -inf, at a masked position. On a GPU, where to look would wait, those stay
                masked until timestep 0, which raises for them.
        """
        at = _timestep(timestep)
        settings = self._current_settings() if isinstance(model_output, DeferredLogits) else self._settings
        logits, tokens = _look(model_output, sample, settings)
        check_generators(generator, len(tokens))
        share = _checked_share(starting_mask_ratio, len(tokens))
        run = self._run_of(at, sample, tokens, generator)
        try:
            if run.settings != settings and isinstance(model_output, DeferredLogits):
                # of a run that began before the config was changed
                logits, _ = _look(model_output, sample, run.settings)
            index, prev_sample, drawn = self._step_of(run, at, logits, tokens, share, generator)
            prev_sample, drawn = prev_sample.reshape(sample.shape), drawn.reshape(sample.shape)
            run.last_index, run.sample = index, weakref.ref(prev_sample)
        finally:
            run.is_beginning = False
        num_steps = len(run.timesteps.values())
        self.next_step.set(Step(index + 1, num_steps) if at and index + 1 < num_steps else None, prev_sample)
        if at == 0:
            self._remove(run)
        return MGTSchedulerOutput(prev_sample, drawn) if return_dict else (prev_sample, drawn)

    def _step_of(
        self,
        run: _Run,
        at: float,
        logits: Logits,
        tokens: Tensor,
        share: float | Tensor,
        generator: Generators,
    ) -> tuple[int, Tensor, Tensor]:
        """The step's index, and its tokens with and without masks."""
        index = run.timesteps.values().index(at)
        if index >= len(run.temperatures.values()):
            raise ValueError(
                f"temperatures: expected a value for each of {len(run.timesteps.values())} timesteps, "
                f"got {len(run.temperatures.values())}"
            )
        # the product is rounded to float32, as in the original
        ratio = None if at == 0 else share * run.ratios[index]
        if run.settings.rng == "torch":
            return index, *self._step_torch(run, logits.logits, tokens, index, ratio, generator)
        return index, *self._step_philox(run, logits, tokens, index, ratio)

    @property
    def num_inference_steps(self) -> int:
        """T of the runs that begin from now on; 0 before `set_timesteps`."""
        return 0 if self.timesteps is None else len(self.timesteps)

    def run_that_returned(self, prev_sample: Tensor) -> _Run:
        """The run whose last step returned this very tensor; `z_sample` takes a step of it once more."""
        return next(run for run in list(self._runs) if run.returned(prev_sample))

    def add_noise(self, sample: Tensor, timesteps: int | Tensor, generator: Generators = None) -> Tensor:
        """Mask each token with the probability that a run has after the step of this timestep.

        At timestep 0 that is 0, so image-to-image at strength 1, which asks for `timesteps[-1]`, masks
        nothing; the original does the same.

        Args:
            sample: int64 tokens, the batch first.
            timesteps: one of `timesteps`.
            generator: as for `step`; the draws are PyTorch's with either rng.

        Returns:
            A copy of the sample, mask_token_id where masked.

        Raises:
            RuntimeError: `set_timesteps` was not called.
            TypeError: an argument of the wrong type.
            ValueError: a timestep outside the run, or generators of another number than samples.
        """
        values = self._timesteps_and_temperatures()[0].values()
        index = _index(values, _timestep(timesteps))
        # image-to-image goes on with the step after this one; at strength 1, which asks for the last, with the first
        self.next_step.set(Step((index + 1) % len(values), len(values)))
        _check_sample(sample)
        check_generators(generator, len(sample))
        if isinstance(generator, (list, tuple)):
            parts = [self.add_noise(sample[i : i + 1], timesteps, g) for i, g in enumerate(generator)]
            return torch.cat(parts) if parts else sample.clone()
        settings = self._current_settings()
        num_positions = sample[:1].numel()
        ratio = mask_ratios(settings.masking_schedule, len(values), num_positions, name="masking_schedule")[index]
        device = sample.device if generator is None else generator.device
        draws = torch.rand(sample.shape, dtype=torch.float32, device=device, generator=generator).to(sample.device)
        return sample.masked_fill(draws < ratio, settings.mask_token_id)

    def _current_settings(self) -> _Settings:
        return self._settings.changed_by(self.config)

    def _timesteps_and_temperatures(self) -> tuple[_Numbers, _Numbers]:
        if self.timesteps is None or self.temperatures is None:
            raise RuntimeError("MGTScheduler: call set_timesteps before step or add_noise")
        timesteps, temperatures = self._numbers
        return (
            timesteps if timesteps.tensor is self.timesteps else _Numbers(self.timesteps),
            temperatures if temperatures.tensor is self.temperatures else _Numbers(self.temperatures),
        )

    def _run_of(self, timestep: float, sample: Tensor, tokens: Tensor, generator: Generators) -> _Run:
        """The run that a step belongs to: one that goes on, or else one that it begins."""
        shape = (tokens.shape[0], tokens.shape[1])
        going_on = [run for run in list(self._runs) if run.goes_on(timestep, sample, shape, generator)]
        for run in going_on:
            if run.returned(sample):
                return run
        if going_on:
            return going_on[-1]
        run = self._new_run(timestep, tokens, generator)
        for other in list(self._runs):
            if any(ref is not None and ref() is None for ref in other.generators):
                self._remove(other)
            elif other.is_of(generator):
                other.takes_any_sample = False
                if other.is_lost:
                    self._remove(other)
        self._runs.append(run)
        return run

    def _new_run(self, timestep: float, tokens: Tensor, generator: Generators) -> _Run:
        shape = (tokens.shape[0], tokens.shape[1])
        timesteps, temperatures = self._timesteps_and_temperatures()
        settings = self._current_settings()
        index = _index(timesteps.values(), timestep)
        ratios, noise_scales, momenta = _by_step(settings, len(timesteps.values()), shape[1])
        differential = None if settings.differential is None else Differential(**settings.differential)
        run = _Run(
            settings=settings,
            timesteps=timesteps,
            temperatures=temperatures,
            generators=tuple(None if g is None else weakref.ref(g) for g in _listed(generator)),
            shape=shape,
            ratios=ratios,
            noise_scales=noise_scales,
        )
        draw = Draw(noise_scale=noise_scales, differential=differential, momentum=momenta)
        run.rule = Rule(draw, select=run.select)
        if settings.rng == "philox":
            run.state = begin(
                tokens,
                seed=draw_seeds(shape[0], generator, tokens.device),
                mask_token_id=settings.mask_token_id,
                num_inference_steps=len(timesteps.values()),
                backend=settings.backend,
            )
            run.state.num_draws = index
        return run

    def _remove(self, run: _Run) -> None:
        with suppress(ValueError):
            self._runs.remove(run)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy by `pickle` has: no runs, whose generators and samples it could not know again."""
        return {**self.__dict__, "_runs": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> MGTScheduler:
        """Copy the runs as well: they go on with the same generators and samples."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _step_philox(
        self, run: _Run, logits: Logits, tokens: Tensor, index: int, ratio: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert run.state is not None
        if logits.logits.dtype not in _LOGITS_DTYPES:
            raise TypeError(f"model_output: expected float32, bfloat16 or float16, got {logits.logits.dtype}")
        run.ratio, run.temperature = ratio, run.temperatures.values()[index]
        after, drawn = take_step(run.rule, logits, run.state.but(tokens=tokens, step=index))
        if ratio is None:
            check_all_drawn("model_output", after.tokens, after.mask_token_id)
        # a step that raises leaves the run as it was
        run.state = after
        return after.tokens, drawn.sampled.token_ids

    def _step_torch(
        self,
        run: _Run,
        logits: Tensor,
        tokens: Tensor,
        index: int,
        ratio: float | Tensor | None,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(generator, (list, tuple)):
            steps = [
                self._step_torch(
                    run,
                    logits[i : i + 1],
                    tokens[i : i + 1],
                    index,
                    ratio[i : i + 1] if isinstance(ratio, Tensor) and ratio.ndim else ratio,
                    one,
                )
                for i, one in enumerate(generator)
            ] or [(tokens, tokens)]
            return torch.cat([prev for prev, _ in steps]), torch.cat([drawn for _, drawn in steps])

        mask_token_id, noise_scale = run.settings.mask_token_id, run.noise_scales[index]
        device = logits.device if generator is None else generator.device
        if noise_scale > 0:
            noise = torch.randn(logits.shape, dtype=torch.float32, device=device, generator=generator)
            logits = logits + noise_scale * noise.to(logits)
        probs = logits.softmax(-1)
        weights = probs.to(device)
        if device.type == "cpu":
            weights = weights.float()
        drawn = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).to(tokens.device)
        masked = tokens == mask_token_id
        token_ids = torch.where(masked, drawn.view(tokens.shape), tokens)
        if ratio is None:
            return token_ids, token_ids

        num_positions = tokens.shape[1]
        chosen = probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        chosen = chosen.masked_fill(~masked, torch.finfo(chosen.dtype).max)
        uniform = torch.empty_like(chosen, device=device).uniform_(generator=generator).to(chosen.device)
        gumbel = -(-uniform.clamp(1e-20).log()).clamp(1e-20).log()
        # a slice, not an element: of dimension 1 it lifts half-precision noise to float32
        confidence = chosen.clamp(1e-20).log() + run.temperatures.tensor[index : index + 1] * gumbel
        # at least 1, even where nothing is masked; and an index, which a single position has no second of
        counts = mask_len(masked.sum(-1), ratio, num_positions).clamp(1).clamp(max=num_positions - 1)
        cut_off = confidence.sort(-1).values.gather(-1, counts.unsqueeze(-1))
        return token_ids.masked_fill(confidence < cut_off, mask_token_id), token_ids


def _by_step(
    settings: _Settings, num_inference_steps: int, num_positions: int
) -> tuple[list[float], list[float], list[float]]:
    """Mask ratios, noise scales and momenta, one for each step."""
    return (
        mask_ratios(settings.masking_schedule, num_inference_steps, num_positions, name="masking_schedule"),
        schedule_values(settings.noise_scale, num_inference_steps, name="noise_scale", minimum=0.0),
        schedule_values(settings.momentum, num_inference_steps, name="momentum"),
    )


def _temperature_pair(temperature: object) -> tuple[float, float]:
    expected = "a number or (start, end)"
    pair = temperature.tolist() if hasattr(temperature, "tolist") else temperature
    if not isinstance(pair, (tuple, list)):
        pair = (number("temperature", pair, expected), 0.01)
    if len(pair) != 2:
        raise TypeError(f"temperature: expected {expected}, got {temperature!r}")
    start, end = (number("temperature", t, expected) for t in pair)
    for value in (start, end):
        if not 0 <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"temperature: expected finite numbers of at least 0, got {temperature!r}")
    return start, end


def _checked_differential(given: object) -> dict[str, Any] | None:
    if given is None:
        return None
    names = [f.name for f in fields(Differential)]
    if isinstance(given, Differential):
        return {name: getattr(given, name) for name in names}
    if not isinstance(given, Mapping):
        raise TypeError(f"differential: expected a dict of arguments of Differential or None, got {kind(given)}")
    unknown = [key for key in given if key not in names]
    if unknown:
        raise TypeError(f"differential: expected keys among {names}, got {', '.join(map(repr, unknown))}")
    checked = Differential(**given)
    return {name: getattr(checked, name) for name in given}


def _timestep(timestep: object) -> float:
    """A timestep as a number; a GPU is waited for."""
    if isinstance(timestep, Tensor) and timestep.numel() == 1:
        timestep = timestep.item()
    return number("timestep", timestep, "a number or a tensor of one")


def _index(timesteps: list[Any], timestep: float) -> int:
    """The step k of a timestep."""
    if timestep not in timesteps:
        low, high = min(timesteps, default=0), max(timesteps, default=0)
        expected = f"one of {timesteps}" if low < timestep < high else f"{low} to {high}"
        raise ValueError(f"timestep: expected {expected}, got {timestep:g}")
    return timesteps.index(timestep)


def _checked_share(starting_mask_ratio: float | Tensor, batch_size: int) -> float | Tensor:
    """The argument of this name: a number, or float32 () or (B,)."""
    if not isinstance(starting_mask_ratio, Tensor):
        share = number("starting_mask_ratio", starting_mask_ratio, "a number or a tensor of numbers")
        if not 0 <= share <= 1:
            raise ValueError(f"starting_mask_ratio: expected a number in [0, 1], got {share}")
        return float(torch.tensor(share, dtype=torch.float32, device="cpu"))
    shares = starting_mask_ratio.to(torch.float32)
    if shares.ndim and shares.numel() not in (1, batch_size):
        raise ValueError(
            f"starting_mask_ratio: expected a number, or one for each of {batch_size} samples, "
            f"got shape {tuple(shares.shape)}"
        )
    if shares.device.type == "cpu" and not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"starting_mask_ratio: expected numbers in [0, 1], got {shares.tolist()}")
    return shares.reshape(-1) if shares.ndim else shares


def _listed(generator: Generators) -> Sequence[torch.Generator | None]:
    return generator if isinstance(generator, (list, tuple)) else (generator,)


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise TypeError or ValueError where these are no generators, or a list that is not one for each sample."""
    for each in _listed(generator):
        if not isinstance(each, torch.Generator) and generator is not None:
            raise TypeError(f"generator: expected a torch.Generator, a list of them or None, got {kind(each)}")
    if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
        raise ValueError(f"generator: expected one for each of {batch_size} samples, got {len(generator)}")


def draw_seeds(batch_size: int, generator: Generators, device: torch.device) -> Tensor:
    """One seed for each sample, int64 (B,)."""

    def draw(count: int, one: torch.Generator | None) -> Tensor:
        at = "cpu" if one is None else one.device
        return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=at, generator=one).to(device)

    if not isinstance(generator, (list, tuple)):
        return draw(batch_size, generator)
    drawn = [draw(1, one) for one in generator]
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64, device=device)


def _check_sample(sample: object) -> None:
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if sample.dtype != torch.int64:
        raise TypeError(f"sample: expected int64, got {sample.dtype}")


def _look(model_output: Tensor | DeferredLogits, sample: Tensor, settings: _Settings) -> tuple[Logits, Tensor]:
    """The logits, of masked positions alone where they can be, and the sample as (B, N)."""
    if isinstance(model_output, DeferredLogits):
        _check_sample(sample)
        # PyTorch's own draws are of all positions
        folded = model_output.fold(sample, settings.mask_token_id) if settings.rng == "philox" else None
        if folded is not None:
            return folded, sample.flatten(1)
        model_output = model_output.tensor()
    logits, tokens = flatten_logits(model_output, sample)
    return Logits(logits), tokens


def flatten_logits(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The logits as (B, N, V) and the sample as (B, N), without a copy where a kernel can read the logits."""
    if not isinstance(model_output, Tensor):
        raise TypeError(f"model_output: expected a tensor, got {type(model_output).__name__}")
    _check_sample(sample)
    if sample.device != model_output.device:
        raise ValueError(f"sample: expected device {model_output.device} as of the logits, got {sample.device}")
    if model_output.ndim == 4:
        batch_size, _, height, width = model_output.shape
        expected: tuple[int, ...] = (batch_size, height, width)
        logits = model_output.flatten(2).transpose(1, 2)
    elif model_output.ndim == 3:
        expected = tuple(model_output.shape[:2])
        logits = model_output
    else:
        raise ValueError(f"model_output: expected (B, V, H, W) or (B, N, V), got {tuple(model_output.shape)}")
    if tuple(sample.shape) != expected:
        raise ValueError(f"sample: expected shape {expected} as of the logits, got {tuple(sample.shape)}")
    if 1 not in logits.stride()[1:]:
        # neither tokens nor positions lie side by side, so no kernel could read this
        logits = logits.contiguous()
    return logits, sample.flatten(1)
