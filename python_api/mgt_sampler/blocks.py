"""Where the tokens of a transformer's blocks are merged, and where they are put apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class BlockLayout:
    """The parts of a kind of block between which fewer tokens will do.

    Submodules are named as `nn.Module.get_submodule` takes them. Between where tokens are merged and where they are put
    apart, the block itself must not count on their number.

    Attributes:
        kind: the block's class, by the end of its dotted path.
        merge_input: submodules whose first argument, (B, N, C), is merged.
        merge_output: submodules whose result, or the first one, is merged.
        unmerge_output: submodules whose result, or the first one, is put apart again.
        is_single_stream: whether the block's tokens are the text's followed by the image's; else the image's alone.
        attention: the submodule that attends over the merged tokens, which proportional attention and a threshold
            need; None: they cannot be had.
        has_rotary: whether `attention` is diffusers' attention with rotary tables for text and image together, which
            are then merged too.
    """

    kind: str
    merge_input: tuple[str, ...] = ()
    merge_output: tuple[str, ...] = ()
    unmerge_output: tuple[str, ...] = ()
    is_single_stream: bool = False
    attention: str | None = None
    has_rotary: bool = False


KNOWN_BLOCKS = (
    # Meissonic (arXiv 2410.08261): 14 blocks with a stream each for text and image, then 28 with one for both
    BlockLayout(
        "transformer.TransformerBlock",
        merge_input=("attn", "ff"),
        unmerge_output=("attn", "ff"),
        attention="attn",
        has_rotary=True,
    ),
    BlockLayout(
        "transformer.SingleTransformerBlock",
        merge_output=("norm",),
        unmerge_output=("proj_out",),
        is_single_stream=True,
        attention="attn",
        has_rotary=True,
    ),
    # aMUSEd (arXiv 2401.01808): the image's tokens attend to each other, then to the text's
    BlockLayout(
        "attention.BasicTransformerBlock",
        merge_input=("attn1", "attn2", "ff"),
        unmerge_output=("attn1", "attn2", "ff"),
        attention="attn1",
    ),
    # the bundled model
    BlockLayout("fashion._Block", merge_input=("qkv", "mlp_in"), unmerge_output=("attention_out", "mlp_out")),
)


def find_blocks(
    transformer: nn.Module, layouts: Sequence[BlockLayout], single_stream: bool
) -> list[tuple[nn.Module, BlockLayout]]:
    """A transformer's blocks that are of a known kind, in their order.

    Args:
        transformer: is searched.
        layouts: of the kinds that are looked for.
        single_stream: whether those are wanted whose tokens are the text's and the image's.

    Raises:
        ValueError: there are none.
    """
    found = []
    for module in transformer.modules():
        layout = next((layout for layout in layouts if _is_of(module, layout.kind)), None)
        if layout is not None and (single_stream or not layout.is_single_stream):
            found.append((module, layout))
    if not found:
        wanted = ", ".join(layout.kind for layout in layouts if single_stream or not layout.is_single_stream)
        raise ValueError(f"merge: expected a transformer with blocks of {wanted}, found none in {_name(transformer)}")
    return found


def _is_of(module: nn.Module, kind: str) -> bool:
    return any(
        path == kind or path.endswith("." + kind)
        for path in (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    )


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
