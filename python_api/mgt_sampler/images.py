"""Pictures of samples: a grid of images, and the tokens appearing step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .arguments import integer, kind
from .files import check_writable, whole_file

if TYPE_CHECKING:
    from .models import MaskedModel

ANIMATIONS = (".gif", ".webp", ".apng")
STILLS = (".png", ".jpg", ".jpeg", ".webp")

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".apng": "PNG"}
# slate: not to be taken for a part of a grey image
_MASK_COLOUR = (0.33, 0.42, 0.56)


def image_grid(
    images: Tensor, *, num_columns: int | None = None, scale: int | None = None, gap: int = 4
) -> Image.Image:
    """Lay images out in rows, left to right, on white.

    Args:
        images: (B, C, H, W) in [0, 1], C = 1 (grey) or 3 (RGB), B at least 1.
        num_columns: images in a row; None: as square as it gets.
        scale: each pixel becomes scale x scale; None: small images grow to about 112 pixels.
        gap: white pixels around each image.

    Returns:
        An RGB picture.

    Raises:
        TypeError: images is no tensor, or a number of the wrong type.
        ValueError: images of another shape, or none, or a number out of range.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {kind(images)}")
    if images.ndim != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images: expected one at least, (B, C, H, W) with C = 1 or 3, got shape {tuple(images.shape)}"
        )
    num_images, _, height, width = images.shape
    columns = math.ceil(math.sqrt(num_images)) if num_columns is None else integer("num_columns", num_columns)
    factor = max(1, 112 // max(height, width, 1)) if scale is None else integer("scale", scale)
    for name, value, least in (("num_columns", columns, 1), ("scale", factor, 1), ("gap", integer("gap", gap), 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    # no number is black
    levels = (images.detach().cpu().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    levels = levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    cell_height, cell_width = height * factor + gap, width * factor + gap
    rows = math.ceil(num_images / columns)
    grid = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    for i, level in enumerate(levels):
        tile = Image.fromarray(level.numpy()).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(i, columns)
        grid.paste(tile, (gap + column * cell_width, gap + row * cell_height))
    return grid


def save_grid(images: Tensor, path: str | Path, *, num_columns: int | None = None) -> None:
    """Write `image_grid` to a file, as PNG, JPEG or WebP by its suffix; it is there whole or not at all.

    Raises:
        ValueError: another suffix, images of another shape, or a folder that is missing or cannot be written to.
        OSError: the disk is full; the file is then as before.
    """
    suffix = check_suffix("path", path, STILLS)
    check_writable("path", path)
    _save(image_grid(images, num_columns=num_columns), path, suffix)


def trajectory_images(model: MaskedModel, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Decode a run step by step, with the positions still masked as flat cells.

    The first frame is all masked. A cell that has appeared is decoded beside the current draws of the others.

    Args:
        model: it decodes the tokens.
        states: for each of T steps the tokens and the mask that the callback of `generate` saw: int64 (B, N),
            none masked, and bool (B, N).

    Returns:
        float32 (T + 1, B, 3, H, W) in [0, 1].

    Raises:
        ValueError: no states, or N positions that do not tile the image.
    """
    if not states:
        raise ValueError("states: expected at least one step, got none")
    colour = torch.tensor(_MASK_COLOUR, dtype=torch.float32, device="cpu").view(3, 1, 1)
    frames = []
    for tokens, mask in states:
        images = model.decode(tokens.clone()).detach().cpu().float().clamp(0, 1)
        cells = _cells(mask.cpu(), images.shape[-2], images.shape[-1])
        frames.append(torch.where(cells, colour, images.expand(-1, 3, -1, -1)))
    return torch.stack([colour.expand_as(frames[0]), *frames])


def save_trajectory(frames: Tensor, path: str | Path, *, num_columns: int | None = None, num_rows: int = 10) -> None:
    """Write frames as an animation of the grid, or as a strip with a row for each image.

    Args:
        frames: (T + 1, B, C, H, W) in [0, 1], as of `trajectory_images`.
        path: .gif, .webp and .apng are animations, .png is a strip.
        num_columns: of the animated grid, as in `image_grid`.
        num_rows: of the strip: it shows this many images at most, spread evenly over the batch.

    Raises:
        ValueError: another suffix, frames of another shape, or a folder that is missing or cannot be written to.
        OSError: the disk is full; the file is then as before.
    """
    if not isinstance(frames, Tensor) or frames.ndim != 5:
        raise ValueError(f"frames: expected a tensor (T + 1, B, C, H, W), got {kind(frames)}")
    if len(frames) == 0 or integer("num_rows", num_rows) < 1:
        raise ValueError(f"frames, num_rows: expected 1 at least, got {len(frames)}, {num_rows}")
    check_writable("path", path)
    suffix = check_suffix("path", path, (*ANIMATIONS, ".png"))
    if suffix == ".png":
        num_images = frames.shape[1]
        shown = [i * num_images // min(num_rows, num_images) for i in range(min(num_rows, num_images))]
        strip = frames[:, shown].transpose(0, 1).flatten(0, 1)
        grid = image_grid(strip, num_columns=len(frames), scale=max(1, 56 // max(frames.shape[-2:])))
        _save(grid, path, suffix)
        return
    pictures = [image_grid(frame, num_columns=num_columns) for frame in frames]
    # the eye needs longer for the start and for the result
    durations = [600, *[220] * (len(pictures) - 2), 2500][: len(pictures)]
    _save(pictures[0], path, suffix, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _save(picture: Image.Image, path: str | Path, suffix: str, **options: Any) -> None:
    with whole_file(path) as file:
        picture.save(file, _FORMATS[suffix], **options)


def check_suffix(name: str, path: str | Path, suffixes: Sequence[str]) -> str:
    """The path's suffix in lower case, if it is one of these."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{name}: expected a file name ending in {', '.join(suffixes)}, got {str(path)!r}")
    return suffix


def _cells(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask (B, N) as pixels, bool (B, 1, H, W)."""
    num_positions = mask.shape[1]
    rows = round(math.sqrt(num_positions * height / width))
    if rows == 0 or num_positions % rows or height % rows or width % (num_positions // rows):
        raise ValueError(f"states: expected positions that tile a {height} x {width} image, got {num_positions}")
    grid = mask.view(-1, 1, rows, num_positions // rows)
    return grid.repeat_interleave(height // rows, 2).repeat_interleave(width // grid.shape[3], 3)
