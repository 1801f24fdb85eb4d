"""Token merging in a transformer's blocks (TomeMGT, arXiv 2411.10781)."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgt_kernels import Match, match_tokens, merge_tokens, unmerge_tokens
from mgt_kernels.merging import MAX_RATIO

from . import clock
from .arguments import integer, is_bool, kind, number
from .attention import MergedAttention, check_processor
from .blocks import KNOWN_BLOCKS, BlockLayout, find_blocks
from .schedules import ValueSchedule, frozen_values, schedule_values

DESTINATIONS = ("random", "top_left")


@dataclass(frozen=True)
class TokenMerging:
    """How many of a grid's tokens a transformer's blocks leave out, and which: those most like another one.

    In a block the image's tokens are merged before attention and before the MLP, and put apart again after each; text
    tokens stay as they are, and rotary tables are merged with the tokens. Which tokens are alike is decided at the
    input of a block (`mgt_kernels.match_tokens`), for that and the following ones, anew in every forward pass.

    Attributes:
        ratio: the share of the image's tokens that is merged, in [0, 0.75]; a schedule over the steps, as for
            `generate`: a number, (start, end), T values, a name or a function of (k, T).
        threshold: merge all tokens whose cosine to a destination is at least this, in [-1, 1], in place of a ratio.
            Samples then differ in how many rows they have, and the longest one sets the time.
        single_stream: whether tokens are also merged in blocks with one stream for text and image; the paper's are not.
        every: blocks that share a match, at least 1.
        destinations: "random", one corner of each 2 x 2 cell by (seed, step, cell), or "top_left".
        seed: of the corners, the same for all samples, so that no sample depends on its batch.
        proportional: whether a row counts in attention as often as it has tokens: log of the number is added to the
            row's scores (arXiv 2210.09461).

    Raises:
        TypeError: an attribute of the wrong type.
        ValueError: an attribute out of range.
    """

    ratio: ValueSchedule = 0.5
    threshold: float | None = None
    single_stream: bool = False
    every: int = 1
    destinations: str = "random"
    seed: int = 0
    proportional: bool = False

    def __post_init__(self) -> None:
        """Check the attributes."""
        object.__setattr__(self, "ratio", frozen_values("merge: ratio", self.ratio, 0.0))
        given = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)
        for value in given:
            if isinstance(value, float) and not value <= MAX_RATIO:
                raise ValueError(f"merge: ratio: expected at most {MAX_RATIO}, got {value}")
        if self.threshold is not None:
            bound = number("merge: threshold", self.threshold)
            if not -1 <= bound <= 1:
                raise ValueError(f"merge: threshold: expected a number in [-1, 1], got {bound}")
            object.__setattr__(self, "threshold", bound)
        for name in ("single_stream", "proportional"):
            if not is_bool(getattr(self, name)):
                raise TypeError(f"merge: {name}: expected a bool, got {kind(getattr(self, name))}")
        for name, least in (("every", 1), ("seed", -(2**63))):
            value = integer(f"merge: {name}", getattr(self, name))
            if not least <= value < 2**63:
                raise ValueError(f"merge: {name}: expected an int of at least {least} and below 2^63, got {value}")
            object.__setattr__(self, name, value)
        if self.destinations not in DESTINATIONS:
            raise ValueError(f"merge: destinations: expected one of {DESTINATIONS}, got {self.destinations!r}")

    @classmethod
    def of(cls, value: Any) -> TokenMerging:
        """A setting, or the ratio or schedule of one.

        Raises:
            TypeError: value is neither.
        """
        if isinstance(value, cls):
            return value
        if value is None or is_bool(value):
            raise TypeError(f"merge: expected a ratio, a schedule or a TokenMerging, got {value!r}")
        return cls(ratio=value)

    def ratio_at(self, moment: clock.Moment | None) -> float:
        """The ratio at a step; outside of a generation that of the first of one step."""
        if isinstance(self.ratio, float):
            return self.ratio
        step, num_steps = (0, 1) if moment is None else moment[:2]
        if moment is not None and isinstance(moment.number, Tensor):
            raise ValueError("merge: ratio: expected one number for all steps where they are captured as a CUDA graph")
        value = schedule_values(self.ratio, num_steps, name="merge: ratio", minimum=0.0)[step]
        if value > MAX_RATIO:
            raise ValueError(f"merge: ratio: expected at most {MAX_RATIO}, got {value} at step {step}")
        return value


@dataclass(eq=False)
class _Pass:
    """What one forward pass knows of its tokens; it ends with the pass."""

    num_text_tokens: int
    input_grid: tuple[int, int] | None
    match: Match | None = None
    # of the block that is running, and how many blocks of this pass have begun
    layout: BlockLayout | None = None
    num_blocks: int = 0
    tables: tuple[Any, tuple[Tensor, Tensor]] | None = None
    bias: Tensor | None = None


class MergedBlocks:
    """A transformer whose blocks merge tokens, until `remove`.

        merged = MergedBlocks(transformer, TokenMerging(0.5))
        logits = transformer(tokens, ...)
        merged.remove()

    It is done by hooks on the blocks and their parts, so that quantized layers, adapters and other hooks stay in
    effect. Several threads may call the transformer at once. Nothing of a forward pass is left
    after it, whether it returns or raises.
    """

    def __init__(
        self,
        transformer: nn.Module,
        merging: TokenMerging | Any = 0.5,
        *,
        layouts: Sequence[BlockLayout] = KNOWN_BLOCKS,
        grid: tuple[int, int] | None = None,
        moment: Callable[[], clock.Moment | None] = clock.now,
        backend: str = "auto",
    ) -> None:
        """Hang the hooks on a transformer, and put a forward around its own.

        Args:
            transformer: whose blocks are of a kind in layouts, and whose first argument of integers is the tokens:
                (B, H, W), or (B, N) with a grid or a square number of them.
            merging: a `TokenMerging`, or the ratio of one.
            layouts: of the kinds of blocks; a model of one's own needs a `BlockLayout` for its blocks.
            grid: (height, width) of the tokens in the blocks, where the transformer's input does not tell.
            moment: tells which step the transformer is called for; by default what `generate` says.
            backend: of `mgt_kernels`.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: no block is of a known kind, a part of one is missing or is merged already, or the setting
                asks for what its attention cannot do. Nothing is changed then.
        """
        self.merging = TokenMerging.of(merging)
        self._grid = grid
        self._moment = moment
        self._backend = backend
        self._passes: dict[int, _Pass] = {}
        self._transformer = transformer
        self._attentions: list[Any] = []
        for module in transformer.modules():
            if any(isinstance(getattr(hook, "__self__", None), MergedBlocks) for hook in _hooks_of(module)):
                raise ValueError(f"merge: expected a transformer without merging, {type(transformer).__name__} has it")
        blocks = find_blocks(transformer, layouts, self.merging.single_stream)
        self.num_blocks = len(blocks)
        self._check(blocks)
        self._forward = MergedForward(self, transformer)
        transformer.forward = self._forward  # type: ignore[method-assign]
        self._layouts = {block: layout for block, layout in blocks}
        for block, layout in blocks:
            block.register_forward_pre_hook(self._enter_block, with_kwargs=True)
            block.register_forward_hook(self._leave_block)
            # before what merges the input, so that the mask is there with it
            if layout.attention is not None and not layout.has_rotary:
                block.get_submodule(layout.attention).register_forward_pre_hook(self._set_mask, with_kwargs=True)
            for name in layout.merge_input:
                block.get_submodule(name).register_forward_pre_hook(self._merge_input, with_kwargs=True)
            for name in layout.merge_output:
                block.get_submodule(name).register_forward_hook(self._merge_output)
            for name in layout.unmerge_output:
                block.get_submodule(name).register_forward_hook(self._unmerge_output)
            if layout.attention is not None and layout.has_rotary:
                attention: Any = block.get_submodule(layout.attention)
                attention.processor = MergedAttention(attention.processor, self)
                self._attentions.append(attention)

    def remove(self) -> None:
        """Take all of it off again; a forward that somebody has put around since then stays."""
        if vars(self._transformer).get("forward") is self._forward:
            if self._forward.before is None:
                del self._transformer.forward
            else:
                self._transformer.forward = self._forward.before  # type: ignore[method-assign]
        for module in self._transformer.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    # the tables beside say of each key what it takes
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        for attention in self._attentions:
            if isinstance(attention.processor, MergedAttention) and attention.processor.owner is self:
                attention.processor = attention.processor.before
        self._attentions = []

    def _check(self, blocks: Sequence[tuple[nn.Module, BlockLayout]]) -> None:
        needs_bias = self.merging.proportional or self.merging.threshold is not None
        asked = "proportional" if self.merging.proportional else "threshold"
        for block, layout in blocks:
            names = {*layout.merge_input, *layout.merge_output, *layout.unmerge_output}
            for name in sorted(names | ({layout.attention} if layout.attention else set())):
                try:
                    block.get_submodule(name)
                except AttributeError:
                    raise ValueError(
                        f"merge: expected {type(block).__name__} with a part {name}, it has none"
                    ) from None
            if needs_bias and layout.attention is None:
                raise ValueError(
                    f"merge: {asked}: expected blocks whose attention is known to take a mask, got "
                    f"{type(block).__name__}"
                )
            if layout.attention is not None and layout.has_rotary:
                check_processor(f"{type(block).__name__}.{layout.attention}", block.get_submodule(layout.attention))

    # what the hooks and the attention ask

    @property
    def _pass(self) -> _Pass | None:
        return self._passes.get(threading.get_ident())

    @property
    def is_merging(self) -> bool:
        """Whether this thread is in a block whose tokens are merged."""
        now = self._pass
        return now is not None and now.layout is not None and now.match is not None

    def merged_tables(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotary tables (L, D) of text and image as (B, L', D), the image's rows merged."""
        now = self._pass
        assert now is not None and now.match is not None
        if now.tables is None or now.tables[0] is not tables[0]:
            batch, num_tokens = now.match.row.shape
            merged = []
            for table in tables:
                whole = table.expand(batch, *table.shape)
                text, image = whole[:, : table.shape[0] - num_tokens], whole[:, table.shape[0] - num_tokens :]
                merged.append(torch.cat([text, merge_tokens(image, now.match, backend=self._backend)], dim=1))
            now.tables = tables[0], (merged[0], merged[1])
        return now.tables[1]

    def attention_bias(self, num_keys: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of each key, (B, 1, keys), or None: rows without tokens are not attended to."""
        now = self._pass
        if now is None or now.match is None or not (self.merging.proportional or self.merging.threshold is not None):
            return None
        if now.bias is None:
            sizes = now.match.sizes.float()
            now.bias = sizes.log() if self.merging.proportional else (sizes > 0).float().log()
        rows = now.bias
        text = rows.new_zeros(len(rows), num_keys - rows.shape[1])
        return torch.cat([text, rows], dim=1)[:, None].to(dtype)

    # the hooks

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Begin a forward pass of this thread, called with these arguments, by name."""
        given = [x for x in arguments.values() if isinstance(x, Tensor) and x.dtype == torch.int64 and x.ndim >= 2]
        if not given:
            raise TypeError(
                "merge: expected a transformer that is called with tokens, (B, H, W) or (B, N) int64, got none"
            )
        tokens = given[0]
        text = arguments.get("encoder_hidden_states")
        num_text_tokens = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        grid = (tokens.shape[1], tokens.shape[2]) if tokens.ndim == 3 else None
        self._passes[threading.get_ident()] = _Pass(num_text_tokens, grid)

    def end(self) -> None:
        """End it."""
        self._passes.pop(threading.get_ident(), None)

    def _enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self._pass
        if now is None:
            return
        now.layout = self._layouts[block]
        if now.num_blocks % self.merging.every == 0:
            hidden = args[0] if args else kwargs["hidden_states"]
            image = hidden[:, now.num_text_tokens :] if now.layout.is_single_stream else hidden
            now.match, now.tables, now.bias = self._matched(image.detach(), now.input_grid), None, None
        now.num_blocks += 1

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: object) -> None:
        now = self._pass
        if now is not None:
            now.layout = None

    def _matched(self, image: Tensor, input_grid: tuple[int, int] | None) -> Match | None:
        merging, moment = self.merging, self._moment()
        chosen: dict[str, Any] = {"threshold": merging.threshold}
        if merging.threshold is None:
            chosen = {"ratio": merging.ratio_at(moment)}
            if chosen["ratio"] == 0:
                return None
        is_random = merging.destinations == "random"
        return match_tokens(
            image,
            self._grid_of(image.shape[1], input_grid),
            seed=merging.seed if is_random else None,
            step=0 if moment is None else moment.number,
            backend=self._backend,
            **chosen,
        )

    def _grid_of(self, num_tokens: int, input_grid: tuple[int, int] | None) -> tuple[int, int]:
        if self._grid is not None:
            return self._grid
        if input_grid is None:
            side = math.isqrt(num_tokens)
            if side * side != num_tokens:
                raise ValueError(f"merge: grid: expected (height, width) for {num_tokens} tokens, which are no square")
            return side, side
        height, width = input_grid
        # a convolution may have taken several of the input's tokens for one
        factor = max(1, round((height * width / num_tokens) ** 0.5))
        return height // factor, width // factor

    def _merged(self, now: _Pass, x: Tensor) -> Tensor:
        assert now.match is not None and now.layout is not None
        if not now.layout.is_single_stream:
            return merge_tokens(x, now.match, backend=self._backend)
        text, image = x[:, : now.num_text_tokens], x[:, now.num_text_tokens :]
        return torch.cat([text, merge_tokens(image, now.match, backend=self._backend)], dim=1)

    def _unmerged(self, now: _Pass, x: Tensor) -> Tensor:
        assert now.match is not None and now.layout is not None
        if not now.layout.is_single_stream:
            return unmerge_tokens(x, now.match, backend=self._backend)
        text, image = x[:, : now.num_text_tokens], x[:, now.num_text_tokens :]
        return torch.cat([text, unmerge_tokens(image, now.match, backend=self._backend)], dim=1)

    def _set_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._pass
        if now is None or now.layout is None or now.match is None:
            return None
        bias = self.attention_bias(now.match.num_rows, (args[0] if args else kwargs["hidden_states"]).dtype)
        if bias is None:
            return None
        if kwargs.get("attention_mask") is not None:
            raise ValueError("merge: expected an attention without a mask of its own, got one")
        return args, {**kwargs, "attention_mask": bias}

    def _merge_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._pass
        if now is None or now.layout is None or now.match is None:
            return None
        if args:
            return (self._merged(now, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._merged(now, kwargs["hidden_states"])}

    def _merge_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self._pass
        if now is None or now.layout is None or now.match is None:
            return None
        return (self._merged(now, output[0]), *output[1:]) if isinstance(output, tuple) else self._merged(now, output)

    def _unmerge_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self._pass
        if now is None or now.layout is None or now.match is None:
            return None
        if isinstance(output, tuple):
            return (self._unmerged(now, output[0]), *output[1:])
        return self._unmerged(now, output)


class MergedForward:
    """The forward of a transformer whose blocks merge tokens: it begins and ends what one pass knows."""

    def __init__(self, blocks: MergedBlocks, transformer: nn.Module) -> None:
        """Take the forward that was set on the transformer before, or else that of its class."""
        self._blocks, self._transformer = blocks, transformer
        self.before = vars(transformer).get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the transformer's own forward."""
        return inspect.signature(self._original)

    @property
    def _original(self) -> Callable[..., Any]:
        if self.before is not None:
            return self.before  # type: ignore[no-any-return]
        return type(self._transformer).forward.__get__(self._transformer)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the transformer; nothing of the pass is left, whether it returns or raises."""
        original = self._original
        # by name, whichever way they are passed
        self._blocks.begin(inspect.signature(original).bind(*args, **kwargs).arguments)
        try:
            return original(*args, **kwargs)
        finally:
            self._blocks.end()


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
