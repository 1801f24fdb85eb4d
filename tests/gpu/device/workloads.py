"""What is timed, in the order of importance: our ops at the shapes of models, and what does the same job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import mgt_kernels
from device.clock import Call
from device.results import REHEARSED, AbsentError
from mgt_benchmarks.case import DTYPE_NAMES
from mgt_benchmarks.models import LLADA, MASKGIT_512, MEISSONIC_512, MEISSONIC_1024, MUSE_256, SHOW_O_256, Model
from mgt_benchmarks.run import OURS
from mgt_benchmarks.steps import published_differential_step, pytorch_draw, pytorch_guidance, pytorch_mask

# splits few rows, and multiplies many by torch.mm; in between it is w4a16_linear once more
NOT_INVARIANT = "w4a16_linear, batch_invariant=False"
# token in, token id and log-probability out
_BYTES_PER_POSITION = 8 + 8 + 4


@dataclass(frozen=True)
class Workload:
    """One call that is timed."""

    name: str
    contestant: str
    # makes the inputs on a device, with random values or without any, and returns the call
    make: Callable[[str, bool], Call]
    # the least that has to be read and written
    num_bytes: int
    operations: int = 0
    # the ceiling that bounds the operations
    arithmetic: str = ""
    # False: it waits for the device, and so has no graph
    captured: bool = True

    @property
    def item(self) -> str:
        """The workload and who does it."""
        return f"{self.name} [{self.contestant}]"


@dataclass(frozen=True)
class Draw:
    """What a draw reads."""

    model: Model
    dtype: torch.dtype = torch.bfloat16
    guided: bool = True
    noise_scale: float = 0.0
    position_major: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        """Every parameter that is not what it is by default."""
        num_columns = self.model.vocab_size
        parts = (
            DTYPE_NAMES[self.dtype],
            "guided" if self.guided else "unguided",
            "noise" if self.noise_scale else "",
            "position-major" if self.position_major else "",
            f"of {num_columns} columns" if num_columns else "",
            f"B={self.batch} N={self.model.num_positions} V={self.model.codebook_size}",
        )
        return ", ".join(filter(None, parts))

    @property
    def num_elements(self) -> int:
        """Logits of both halves."""
        return self.batch * self.model.num_positions * self.model.codebook_size * (2 if self.guided else 1)

    @property
    def num_bytes(self) -> int:
        """Logits read, tokens read, ids and log-probabilities written."""
        return self.num_elements * self.dtype.itemsize + self.batch * self.model.num_positions * _BYTES_PER_POSITION

    def logits(self, device: str, filled: bool) -> Tensor:
        """Return one half, (B, N, V), of standard deviation 2."""
        num_columns = self.model.vocab_size or self.model.codebook_size
        shape = (self.batch, self.model.num_positions, num_columns)
        if self.position_major:
            logits = torch.empty(shape[0], shape[2], shape[1], dtype=self.dtype, device=device).transpose(1, 2)
        else:
            logits = torch.empty(shape, dtype=self.dtype, device=device)
        if filled:
            logits.normal_(0, 2)
        return logits[..., num_columns - self.model.codebook_size :]

    def arguments(self, device: str, filled: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return logits, tokens, of which all are masked, and the keywords of a draw, with seeds and step on device."""
        mask = self.model.codebook_size
        tokens = torch.full((self.batch, self.model.num_positions), mask, device=device)
        return self.logits(device, filled), tokens, dict(
            mask_token_id=mask, seed=torch.arange(self.batch, device=device),
            step=torch.zeros((), dtype=torch.int64, device=device),
            uncond_logits=self.logits(device, filled) if self.guided else None,
            guidance_scale=3.0 if self.guided else 1.0, noise_scale=self.noise_scale,
        )  # fmt: skip


def _size(full: int, rehearsed: int) -> int:
    return min(full, rehearsed) if REHEARSED else full


def _shrunk(model: Model) -> Model:
    if not REHEARSED:
        return model
    vocab_size = None if model.vocab_size is None else 58
    return replace(model, num_positions=min(model.num_positions, 4), codebook_size=32, vocab_size=vocab_size)


def our_draw(draw: Draw) -> Workload:
    def make(device: str, filled: bool) -> Call:
        logits, tokens, options = draw.arguments(device, filled)
        return lambda: mgt_kernels.sample_tokens(logits, tokens, **options)

    return Workload(f"sample_tokens, {draw.name}", OURS, make, draw.num_bytes)


def our_mask(num_positions: int, batch: int = 1) -> Workload:
    def make(device: str, filled: bool) -> Call:
        logprob, token_ids, mask_len, options = _drawn(device, num_positions, batch)
        return lambda: mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, temperature=1.3, **options)

    num_bytes = batch * num_positions * _BYTES_PER_POSITION
    return Workload(f"mask_by_confidence, B={batch} N={num_positions}", OURS, make, num_bytes)


def pytorchs_mask(num_positions: int, batch: int = 1) -> Workload:
    def make(device: str, filled: bool) -> Call:
        logprob, token_ids, mask_len, _ = _drawn(device, num_positions, batch)
        return partial(pytorch_mask, token_ids, logprob, mask_len, 8192)

    return replace(our_mask(num_positions, batch), contestant="PyTorch", make=make)


def _drawn(device: str, num_positions: int, batch: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    logprob = -torch.rand(batch, num_positions, device=device)
    token_ids = torch.zeros(batch, num_positions, dtype=torch.int64, device=device)
    mask_len = torch.full((batch,), num_positions // 2, device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    return logprob, token_ids, mask_len, dict(mask_token_id=8192, seed=torch.arange(batch, device=device), step=step)


def our_step(draw: Draw) -> Workload:
    def make(device: str, filled: bool) -> Call:
        logits, tokens, options = draw.arguments(device, filled)
        mask_len = torch.full((draw.batch,), draw.model.num_positions // 2, device=device)
        shared = {name: options[name] for name in ("mask_token_id", "seed", "step")}

        def step() -> Tensor:
            token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, **options)
            return mgt_kernels.mask_by_confidence(token_ids, logprob, mask_len, temperature=1.3, **shared)

        return step

    num_bytes = draw.num_bytes + draw.batch * draw.model.num_positions * _BYTES_PER_POSITION
    return Workload(f"step, {draw.name}", OURS, make, num_bytes)


def our_differential_step(draw: Draw, variant: str, aliased: bool = False) -> Workload:
    """A step with a history. What is timed puts the state's step back first, a copy of one number."""

    def make(device: str, filled: bool) -> Call:
        logits, tokens, options = draw.arguments(device, filled)
        options |= dict(variant=variant, aliased_history=aliased)
        state = mgt_kernels.differential_sample(logits, tokens, None, **options)[2]
        options["step"] = torch.ones((), dtype=torch.int64, device=device)

        def step() -> object:
            state.step.zero_()
            return mgt_kernels.differential_sample(logits, tokens, state, **options)

        return step

    # codes of 16 bits are read and written; aliased, the logits are read again
    codes = 2 * 2 * draw.num_elements // (2 if draw.guided else 1)
    num_bytes = draw.num_bytes + codes + aliased * draw.num_elements * draw.dtype.itemsize
    return Workload(f"differential_sample, {variant}{', aliased' * aliased}, {draw.name}", OURS, make, num_bytes)


def published_step(draw: Draw) -> Workload:
    """Differential sampling as the paper's code writes it."""

    def make(device: str, filled: bool) -> Call:
        logits, _, options = draw.arguments(device, filled)
        previous = draw.logits(device, filled).float().softmax(-1)
        num_selected = draw.model.num_positions * 3 // 4
        return partial(published_differential_step, logits, options["uncond_logits"], previous, 3.0, num_selected)

    ours = our_differential_step(draw, "paper")
    return replace(ours, contestant="PyTorch", make=make, captured=False)


def our_remask(draw: Draw) -> Workload:
    def make(device: str, filled: bool) -> Call:
        logits, tokens, options = draw.arguments(device, filled)
        tokens = tokens.zero_()
        remask_len = torch.full((draw.batch,), draw.model.num_positions // 10, device=device)
        del options["noise_scale"]
        return lambda: mgt_kernels.remask_tokens(logits, tokens, remask_len, **options)

    return Workload(f"remask_tokens, {draw.name}", OURS, make, draw.num_bytes)


def pytorchs_step(draw: Draw) -> Workload:
    """PyTorch's draw and its sort for the re-masking."""

    def make(device: str, filled: bool) -> Call:
        return partial(_chain_step, pytorch_draw, *_step_arguments(draw, device, filled))

    return replace(our_step(draw), contestant="PyTorch", make=make, captured=False)


def compiled_step(draw: Draw) -> Workload:
    """The same, waiting for nothing, through torch.compile."""

    def make(device: str, filled: bool) -> Call:
        return partial(_compiled(_chain_step), pytorch_race, *_step_arguments(draw, device, filled))

    return replace(our_step(draw), contestant="torch.compile", make=make)


def _chain_step(chain: Callable[..., tuple[Tensor, Tensor]], mask_len: Tensor, *arguments: Any) -> Tensor:
    return pytorch_mask(*chain(*arguments), mask_len, arguments[-1])


def _step_arguments(draw: Draw, device: str, filled: bool) -> tuple[Any, ...]:
    mask_len = torch.full((draw.batch,), draw.model.num_positions // 2, device=device)
    return (mask_len, *_chain_arguments(draw, device, filled))


def pytorchs_draw(draw: Draw) -> Workload:
    """Guidance, softmax, multinomial and gather, which waits for the device to check the probabilities."""

    def make(device: str, filled: bool) -> Call:
        return partial(pytorch_draw, *_chain_arguments(draw, device, filled))

    return replace(our_draw(draw), contestant="PyTorch", make=make, captured=False)


def compiled_draw(draw: Draw) -> Workload:
    """The same with a race of exponentials for multinomial, which waits for nothing, through torch.compile."""

    def make(device: str, filled: bool) -> Call:
        return partial(_compiled(pytorch_race), *_chain_arguments(draw, device, filled))

    return replace(our_draw(draw), contestant="torch.compile", make=make)


def pytorch_race(
    logits: Tensor, uncond: Tensor | None, tokens: Tensor, guidance_scale: float, noise_scale: float, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    logits = pytorch_guidance(logits, uncond, guidance_scale, noise_scale)
    logprobs = logits.float().log_softmax(-1)
    drawn = (logprobs.exp() / torch.empty_like(logprobs).exponential_()).argmax(-1)
    masked = tokens == mask_token_id
    logprob = logprobs.gather(-1, drawn[..., None])[..., 0].masked_fill(~masked, torch.inf)
    return torch.where(masked, drawn, tokens), logprob


def _chain_arguments(draw: Draw, device: str, filled: bool) -> tuple[Any, ...]:
    logits, tokens, options = draw.arguments(device, filled)
    return (
        logits, options["uncond_logits"], tokens, options["guidance_scale"], options["noise_scale"],
        options["mask_token_id"],
    )  # fmt: skip


@lru_cache
def _compiled(chain: Callable[..., Any]) -> Callable[..., Any]:
    # the rehearsal is not one of PyTorch's compiler
    return chain if REHEARSED else torch.compile(chain, dynamic=False)


def flashinfers_draw(draw: Draw) -> Workload:
    """The draw alone: no guidance, no log-probability; it takes float32, which is made of the logits before."""

    def make(device: str, filled: bool) -> Call:
        try:
            from flashinfer.sampling import sampling_from_logits
        except ImportError as error:
            raise AbsentError(str(error)) from error
        logits = draw.logits(device, filled).flatten(0, 1)
        return lambda: sampling_from_logits(logits.float())

    # it asks the generator for its offset, which a graph being captured does not tell
    return replace(our_draw(draw), contestant="FlashInfer", make=make, captured=False)


@dataclass(frozen=True)
class Layer:
    """A linear layer on M rows."""

    num_rows: int
    num_inputs: int
    num_outputs: int

    def workload(self, contestant: str, make: Callable[[str], Call], weight_bytes: float, arithmetic: str) -> Workload:
        """Return what multiplies bfloat16 by a weight of so many bytes per number, or by rows that were quantized."""
        m, k, n = self.num_rows, self.num_inputs, self.num_outputs
        return Workload(
            f"linear, M={m} K={k} N={n}", contestant, lambda device, filled: make(device),
            int(2 * m * (k + n) + n * k * weight_bytes), 2 * m * n * k, arithmetic,
        )  # fmt: skip

    def workloads(self) -> Iterator[Workload]:
        """Ours, and PyTorch's products; those of 8 bits without the quantization of the activations."""
        ours = 0.5 + 3 / 128
        yield self.workload("w4a8_linear", partial(self._ours, "w4a8_linear"), ours, "int8 product")
        yield self.workload("w4a16_linear", partial(self._ours, "w4a16_linear"), ours, "bf16 product")
        yield self.workload(NOT_INVARIANT, self._not_invariant, ours, "bf16 product")
        yield self.workload("torch.mm bf16", self._bf16, 2, "bf16 product")
        yield self.workload("torch._int_mm, product alone", self._int8, 1, "int8 product")
        yield self.workload("torch._scaled_mm fp8, product alone", self._fp8, 1, "fp8 product")

    def _rows(self, device: str) -> Tensor:
        return torch.randn(self.num_rows, self.num_inputs, device=device).bfloat16()

    def _ours(self, op: str, device: str) -> Call:
        x, weight = self._rows(device), packed(self.num_outputs, self.num_inputs).to(device)
        return lambda: getattr(mgt_kernels, op)(x, weight)

    def _bf16(self, device: str) -> Call:
        x, weight = self._rows(device), torch.randn(self.num_outputs, self.num_inputs, device=device).bfloat16()
        return lambda: torch.mm(x, weight.T)

    def _not_invariant(self, device: str) -> Call:
        x, weight = self._rows(device), packed(self.num_outputs, self.num_inputs).to(device)
        return lambda: mgt_kernels.w4a16_linear(x, weight, batch_invariant=False)

    def _int8(self, device: str) -> Call:
        if self.num_rows <= 16 and not REHEARSED:
            raise AbsentError("takes more than 16 rows")
        x, weight = (
            torch.randint(-128, 128, (rows, self.num_inputs), device=device).to(torch.int8)
            for rows in (self.num_rows, self.num_outputs)
        )
        return lambda: torch._int_mm(x, weight.T)

    def _fp8(self, device: str) -> Call:
        if device != "cuda":
            raise AbsentError("a rehearsal has no tensor cores for 8-bit floats")
        if torch.cuda.get_device_capability() < (8, 9):
            raise AbsentError("this GPU has no 8-bit floats")
        x, weight = (
            torch.randn(rows, self.num_inputs, device=device).to(torch.float8_e4m3fn)
            for rows in (self.num_rows, self.num_outputs)
        )
        scale_x, scale_w = torch.ones(self.num_rows, 1, device=device), torch.ones(1, self.num_outputs, device=device)
        return lambda: torch._scaled_mm(x, weight.T, scale_x, scale_w, out_dtype=torch.bfloat16)


@lru_cache
def packed(num_outputs: int, num_inputs: int) -> mgt_kernels.PackedInt4:
    """Return a weight, on the CPU."""
    return mgt_kernels.quantize_int4(torch.randn(num_outputs, num_inputs), 128)


def ceilings() -> list[Workload]:
    """What this card reaches: of bytes, in a copy and in reading, and of operations, in large products."""
    num_bytes, size = _size(2**30, 2**10), _size(8192, 64)

    def copy(num_bytes: int, device: str, filled: bool) -> Call:
        source, target = torch.ones(2, num_bytes // 8, dtype=torch.int64, device=device)
        return lambda: target.copy_(source)

    def read(device: str, filled: bool) -> Call:
        source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
        return source.amax

    products = [workload for workload in Layer(size, size, size).workloads() if workload.contestant.startswith("torch")]
    return [
        Workload("copy", "card", partial(copy, num_bytes), 2 * num_bytes),
        # as many bytes as a draw of 4096 tokens of 8192 reads
        Workload("copy of 64 MiB", "card", partial(copy, _size(2**26, 2**10)), 2 * _size(2**26, 2**10)),
        Workload("read", "card", read, num_bytes),
        *(replace(product, name=product.arithmetic, contestant="card") for product in products),
    ]


def timed() -> list[Workload]:
    """Return every workload; each has a name and contestant of its own."""
    big, middle, small, few_codes = map(_shrunk, (MEISSONIC_1024, MEISSONIC_512, MUSE_256, MASKGIT_512))
    llada, show_o = _shrunk(LLADA), _shrunk(SHOW_O_256)
    fp32, fp16 = torch.float32, torch.float16
    guided = Draw(big)
    rows = (1, 16, 256, 1101, 4096, 8192)
    layers = [Layer(_size(m, 2 + i), *sizes) for sizes in _sizes() for i, m in enumerate(rows)]
    found = [
        our_draw(guided),
        our_draw(Draw(big, fp32)),
        our_draw(Draw(big, noise_scale=1.0)),
        our_draw(Draw(big, guided=False)),
        our_draw(Draw(small)),
        our_draw(Draw(big, batch=8)),
        our_draw(Draw(llada, guided=False)),
        *(our_step(Draw(model)) for model in (small, middle, big)),
        our_mask(small.num_positions),
        our_mask(big.num_positions),
        our_differential_step(guided, "paper"),
        our_differential_step(guided, "official", aliased=True),
        our_remask(guided),
        *(workload for layer in layers for workload in layer.workloads()),
        pytorchs_draw(guided),
        pytorchs_draw(Draw(small)),
        pytorchs_draw(Draw(big, fp32)),
        pytorchs_draw(Draw(llada, guided=False)),
        pytorchs_step(Draw(small)),
        pytorchs_step(guided),
        pytorchs_mask(big.num_positions),
        published_step(guided),
        our_draw(Draw(big, fp16)),
        our_draw(Draw(big, position_major=True)),
        our_draw(Draw(show_o)),
        our_draw(Draw(replace(few_codes, vocab_size=_size(2025, 57)), fp32, guided=False)),
        our_draw(Draw(middle)),
        our_draw(Draw(big, fp32, batch=8)),
        our_mask(big.num_positions, batch=8),
        compiled_draw(guided),
        compiled_step(Draw(small)),
        compiled_draw(Draw(small)),
        compiled_draw(Draw(llada, guided=False)),
        flashinfers_draw(Draw(big, guided=False)),
        flashinfers_draw(Draw(llada, guided=False)),
    ]
    # tiny models may be the same
    return list({workload.item: workload for workload in found}.values())


def _sizes() -> tuple[tuple[int, int], ...]:
    # inputs and outputs of Meissonic's MLP
    return ((64, 32), (32, 64)) if REHEARSED else ((1024, 4096), (4096, 1024))
