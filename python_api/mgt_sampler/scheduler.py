"""A diffusers scheduler in place of `AmusedScheduler` and Meissonic's `Scheduler`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mgt_kernels import mask_by_confidence

from .schedules import check_num_inference_steps, mask_len, mask_ratios, schedule_values
from .techniques import Differential, Extrapolation, TokenSampler, guided_logits

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
except ImportError as error:
    raise ImportError("MGTScheduler needs diffusers: pip install 'mgt-kernels[diffusers]'") from error

Generators: TypeAlias = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None


@dataclass
class MGTSchedulerOutput(BaseOutput):
    """What `MGTScheduler.step` returns; the fields of `AmusedSchedulerOutput`.

    Attributes:
        prev_sample: int64, the sample's shape: what to feed to the next step, mask_token_id where masked.
        pred_original_sample: int64, the same shape: every token as drawn, before any was masked again.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class MGTScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Unmasks image tokens step by step, on the fused kernels.

    Takes the place of diffusers' `AmusedScheduler` (arXiv 2401.01808) and of Meissonic's `Scheduler`
    (arXiv 2410.08261):

        pipe.scheduler = MGTScheduler.from_config(pipe.scheduler.config)

    Step k = T - 1 - timestep of T draws a token at every masked position and masks the least confident again:

        l          = logits + sigma_k eps
        token      ~ softmax(l)
        confidence = log softmax(l)[token] + temperatures[k] gumbel
        m_k        = max(1, min(M_k - 1, floor(N starting_mask_ratio gamma((k + 1) / T))))

    with m_k = 0 at timestep 0 (MaskGIT, arXiv 2202.04200).

    With `rng="philox"` a draw is a function of the sample's seed, the step, the position and the token, so it
    does not depend on the batch. The seeds are drawn from `generator` once a run; a run begins at the first
    step after `set_timesteps`, where the timestep does not fall, and with another generator or batch size. A
    sample with nothing masked stays as it is, and no logits are read where the token is known.

    With `rng="torch"` every draw is PyTorch's own, in the order of `AmusedScheduler`: on the CPU all results
    and the generator's final state equal its bit for bit, far slower than the kernels. That includes what one
    would not choose: a sample with nothing masked has one known token masked again, float16 logits mask a few
    known tokens again (a uniform draw of 0 becomes Gumbel noise of -inf), and half-precision confidences tie,
    so that fewer than m_k tokens may be masked. Noise of `noise_scale` is drawn first, where there is any.

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
        TypeError: differential has arguments that `Differential` does not know.
        ValueError: rng is neither, or does not go with the other arguments; a schedule that is unknown raises at
            `step`.
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
        if rng not in ("philox", "torch"):
            raise ValueError(f"rng: expected 'philox' or 'torch', got {rng!r}")
        if rng == "torch" and (differential is not None or momentum != 0):
            raise ValueError("rng: expected 'philox' with differential or momentum, got 'torch'")
        self._sampler = TokenSampler(
            mask_token_id, None if differential is None else Differential(**differential), backend
        )
        self._extrapolation = Extrapolation()
        self.temperatures = None
        self.timesteps = None
        self._temperatures: list[float] = []
        self._seeds: Tensor | None = None
        self._generator: Generators = None
        self._last_index = -1
        self._num_draws = 0

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

        Sets `timesteps`, int64 (T,) from T - 1 to 0, and `temperatures`, float32 (T,).

        Args:
            num_inference_steps: T, at least 1.
            temperature: of the confidences: (start, end), linear from the first step to the last; or a number
                for (number, 0.01), as in the original.
            device: where the two tensors live.

        Raises:
            TypeError: num_inference_steps is no int, or temperature neither a number nor two.
            ValueError: num_inference_steps below 1, or a temperature that is negative or not finite.
        """
        check_num_inference_steps(num_inference_steps)
        pair = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
        if len(pair) != 2 or not all(isinstance(t, Real) and not isinstance(t, bool) for t in pair):
            raise TypeError(f"temperature: expected a number or (start, end), got {temperature!r}")
        if not all(math.isfinite(t) and t >= 0 for t in pair):
            raise ValueError(f"temperature: expected finite numbers of at least 0, got {temperature!r}")
        temperatures = torch.linspace(float(pair[0]), float(pair[1]), num_inference_steps)
        self._temperatures = temperatures.tolist()
        self.temperatures = temperatures.to(device)
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self._forget()

    def step(
        self,
        model_output: Tensor,
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
            model_output: guided logits in nats, (B, V, H, W) or (B, N, V), float32, bfloat16 or float16.
            timestep: one of `timesteps`, T - 1 first and 0 last; a tensor on a GPU is waited for.
            sample: int64 (B, H, W) or (B, N): the tokens, mask_token_id where masked.
            starting_mask_ratio: share of the tokens that was masked when the run began, in [0, 1]; a tensor
                may hold one for all samples or, (B,), one for each.
            generator: on any device; a list holds one for each sample, whose result then depends on its own
                alone; None: PyTorch's global one.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Returns:
            prev_sample and pred_original_sample, of the sample's shape.

        Raises:
            RuntimeError: `set_timesteps` was not called.
            TypeError: an argument of the wrong type.
            ValueError: shapes that disagree, a timestep outside the run, or logits that hold NaN.
        """
        index = self._index(timestep)
        logits, tokens = flatten_logits(model_output, sample)
        batch_size, num_positions, _ = logits.shape
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(f"generator: expected one for each of {batch_size} samples, got {len(generator)}")

        num_inference_steps = len(self._temperatures)
        noise_scale = schedule_values(self.config.noise_scale, num_inference_steps, name="noise_scale", minimum=0.0)[
            index
        ]
        remask = index < num_inference_steps - 1
        ratio = self._mask_ratio(index, num_positions, starting_mask_ratio) if remask else None

        draw = self._step_torch if self.config.rng == "torch" else self._step_philox
        prev_sample, pred_original_sample = draw(logits, tokens, index, ratio, noise_scale, generator)
        prev_sample = prev_sample.reshape(sample.shape)
        pred_original_sample = pred_original_sample.reshape(sample.shape)
        if not return_dict:
            return prev_sample, pred_original_sample
        return MGTSchedulerOutput(prev_sample, pred_original_sample)

    @property
    def num_inference_steps(self) -> int:
        """T of the run that `set_timesteps` began; 0 before it."""
        return len(self._temperatures)

    @property
    def next_draw(self) -> tuple[Tensor | None, int]:
        """The samples' seeds, int64 (B,), and the number of the next draw: what the kernels take as seed and step."""
        return self._seeds, self._num_draws

    def rewind(self) -> None:
        """Let the last step be taken once more in the same run, with draws of its own, as in Z-Sampling."""
        self._last_index -= 1

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
            ValueError: a timestep outside the run.
        """
        index = self._index(timesteps)
        if isinstance(generator, (list, tuple)):
            if len(generator) != len(sample):
                raise ValueError(f"generator: expected one for each of {len(sample)} samples, got {len(generator)}")
            parts = [self.add_noise(sample[i : i + 1], timesteps, g) for i, g in enumerate(generator)]
            return torch.cat(parts) if parts else sample.clone()
        ratio = self._mask_ratio(index, sample[:1].numel())
        device = sample.device if generator is None else generator.device
        draws = torch.rand(sample.shape, device=device, generator=generator).to(sample.device)
        return sample.masked_fill(draws < ratio, self.config.mask_token_id)

    def _index(self, timestep: int | Tensor) -> int:
        """The step k of a timestep."""
        num_inference_steps = len(self._temperatures)
        if num_inference_steps == 0:
            raise RuntimeError("MGTScheduler: call set_timesteps before step or add_noise")
        index = num_inference_steps - 1 - int(timestep)
        if not 0 <= index < num_inference_steps:
            raise ValueError(f"timestep: expected 0 to {num_inference_steps - 1}, got {int(timestep)}")
        return index

    def _mask_ratio(self, index: int, num_positions: int, starting_mask_ratio: float | Tensor = 1.0) -> float | Tensor:
        """The share of N that should be masked after a step, rounded to float32 at each product."""
        ratios = mask_ratios(
            self.config.masking_schedule, len(self._temperatures), num_positions, name="masking_schedule"
        )
        ratio = ratios[index]
        if isinstance(starting_mask_ratio, Tensor):
            return starting_mask_ratio.to(torch.float32) * ratio
        if not 0 <= starting_mask_ratio <= 1:
            raise ValueError(f"starting_mask_ratio: expected a number in [0, 1], got {starting_mask_ratio}")
        return float(torch.tensor(starting_mask_ratio, dtype=torch.float32) * ratio)

    def _step_philox(
        self,
        logits: Tensor,
        tokens: Tensor,
        index: int,
        ratio: float | Tensor | None,
        noise_scale: float,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        seeds, step = self._begin_draw(index, len(tokens), generator, tokens.device)
        momentum = schedule_values(self.config.momentum, len(self._temperatures), name="momentum")
        if any(momentum):
            self._extrapolation.observe(guided_logits(logits, None, 1.0))
            logits = self._extrapolation.logits(momentum[index])
        token_ids, logprob, _ = self._sampler.draw(logits, tokens, seed=seeds, step=step, noise_scale=noise_scale)
        if ratio is None:
            self._forget()
            return token_ids, token_ids
        mask_token_id = self.config.mask_token_id
        num_masked = (tokens == mask_token_id).sum(-1)
        prev_tokens = mask_by_confidence(
            token_ids,
            logprob,
            mask_len(num_masked, ratio, tokens.shape[1]),
            mask_token_id=mask_token_id,
            temperature=self._temperatures[index],
            seed=seeds,
            step=step,
            backend=self.config.backend,
        )
        return prev_tokens, token_ids

    def _begin_draw(
        self, index: int, batch_size: int, generator: Generators, device: torch.device
    ) -> tuple[Tensor, int]:
        """One seed for each sample, int64 (B,), drawn from the generator where a run begins; and the draw's number."""
        if (
            self._seeds is None
            or len(self._seeds) != batch_size
            or index <= self._last_index
            or not self._is_last(generator)
        ):
            self._forget()
            if isinstance(generator, (list, tuple)):
                drawn = [_draw_seeds(1, g).to(device) for g in generator]
                seeds = torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64)
            else:
                seeds = _draw_seeds(batch_size, generator)
            self._seeds, self._generator, self._num_draws = seeds.to(device), generator, index
        self._last_index = index
        self._num_draws += 1
        return self._seeds.to(device), self._num_draws - 1

    def _forget(self) -> None:
        """End the run: the next step begins another."""
        self._seeds = self._generator = None
        self._last_index = -1
        self._sampler.reset()
        self._extrapolation.reset()

    def _is_last(self, generator: Generators) -> bool:
        last = self._generator
        if isinstance(generator, (list, tuple)) and isinstance(last, (list, tuple)):
            return len(generator) == len(last) and all(a is b for a, b in zip(generator, last, strict=True))
        return generator is last

    def _step_torch(
        self,
        logits: Tensor,
        tokens: Tensor,
        index: int,
        ratio: float | Tensor | None,
        noise_scale: float,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        assert self.temperatures is not None
        if isinstance(generator, (list, tuple)):
            steps = [
                self._step_torch(
                    logits[i : i + 1],
                    tokens[i : i + 1],
                    index,
                    ratio[i : i + 1] if isinstance(ratio, Tensor) and ratio.ndim else ratio,
                    noise_scale,
                    one,
                )
                for i, one in enumerate(generator)
            ] or [(tokens, tokens)]
            return torch.cat([prev for prev, _ in steps]), torch.cat([drawn for _, drawn in steps])

        mask_token_id = self.config.mask_token_id
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
        confidence = chosen.clamp(1e-20).log() + self.temperatures[index : index + 1] * gumbel
        # at least 1, even where nothing is masked; and an index, which a single position has no second of
        counts = mask_len(masked.sum(-1), ratio, num_positions).clamp(1).clamp(max=num_positions - 1)
        cut_off = confidence.sort(-1).values.gather(-1, counts.unsqueeze(-1))
        return token_ids.masked_fill(confidence < cut_off, mask_token_id), token_ids


def _draw_seeds(count: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), device=device, generator=generator)


def flatten_logits(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The logits as (B, N, V) and the sample as (B, N), without a copy where a kernel can read the logits."""
    for name, value in (("model_output", model_output), ("sample", sample)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if sample.dtype != torch.int64:
        raise TypeError(f"sample: expected int64, got {sample.dtype}")
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
