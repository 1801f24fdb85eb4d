"""Grids, animations and strips, pixel by pixel on images of a few pixels."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mgt_sampler.images import image_grid, save_grid, save_trajectory, trajectory_images


class Halves:
    """Decodes 4 tokens, 2 x 2, to a grey image of 4 x 4 pixels; token 0 is black, 1 white."""

    def decode(self, tokens):
        return tokens.view(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3).float()


def pixels(picture):
    return np.asarray(picture.convert("RGB"))


def test_grid_layout():
    images = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]).view(5, 1, 1, 1).expand(-1, 1, 2, 3)
    grid = pixels(image_grid(images, num_columns=3, scale=2, gap=1))
    assert grid.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    for i, level in enumerate((0, 51, 102, 153, 204)):
        top, left = 1 + 5 * (i // 3), 1 + 7 * (i % 3)
        assert (grid[top : top + 4, left : left + 6] == level).all()
    # the gaps and the empty cell are white
    assert (grid[0] == 255).all() and (grid[:, 7] == 255).all() and (grid[6:, 15:] == 255).all()


def test_pixels_are_repeated_not_smoothed():
    images = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    grid = pixels(image_grid(images, scale=3, gap=0))[..., 0]
    assert (grid == np.kron([[0, 255], [255, 0]], np.ones((3, 3)))).all()


@pytest.mark.parametrize(("size", "expected"), [(28, 112), (8, 112), (100, 100), (256, 256)])
def test_small_images_grow(size, expected):
    assert image_grid(torch.zeros(1, 1, size, size), gap=0).size == (expected, expected)


def test_colour_and_columns():
    images = torch.zeros(7, 3, 2, 2)
    images[:, 1] = 1
    grid = image_grid(images, scale=1, gap=0)
    assert grid.size == (6, 6)
    assert grid.getpixel((0, 0)) == (0, 255, 0)


def test_values_outside_0_and_1_are_clamped():
    grid = pixels(image_grid(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1), num_columns=2, scale=1, gap=0))
    assert grid[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 2, 4, 4), (1, 4, 4)])
def test_bad_images_are_named(shape):
    with pytest.raises(ValueError, match=r"^images: expected .*, got "):
        image_grid(torch.zeros(shape))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".PNG"])
def test_save_grid(tmp_path, suffix):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_grid(images, tmp_path / f"grid{suffix}")
    assert Image.open(tmp_path / f"grid{suffix}").size == image_grid(images).size


@pytest.mark.parametrize("name", ["grid.bmp", "grid", "grid.gif"])
def test_save_grid_names_a_bad_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^path: expected .*, got '.*{name}'"):
        save_grid(torch.zeros(1, 1, 8, 8), tmp_path / name)


def states():
    tokens = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    masks = torch.tensor([[[False, True, True, True]] * 2, [[False, False, True, False]] * 2, [[False] * 4] * 2])
    return [(tokens, mask) for mask in masks]


def test_trajectory_images():
    frames = trajectory_images(Halves(), states())
    assert frames.shape == (4, 2, 3, 4, 4)
    colour = frames[0, 0, :, 0, 0]
    assert (frames[0] == colour.view(3, 1, 1)).all()
    # sample 0: cells 0 1 1 0; first only cell 0 is known, then all but cell 2
    assert (frames[1, 0, :, :2, :2] == 0).all()
    assert (frames[1, 0, :, :2, 2:] == colour.view(3, 1, 1)).all() and (
        frames[1, 0, :, 2:] == colour.view(3, 1, 1)
    ).all()
    assert (frames[2, 0, :, :2, 2:] == 1).all() and (frames[2, 0, :, 2:, 2:] == 0).all()
    assert (frames[2, 0, :, 2:, :2] == colour.view(3, 1, 1)).all()
    assert torch.equal(frames[3], Halves().decode(states()[0][0]).expand(-1, 3, -1, -1))
    # neither black, white nor grey
    assert 0 < colour.min() and colour.max() < 1 and colour.max() - colour.min() > 0.1


def test_trajectory_images_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^states: expected at least one step, got none"):
        trajectory_images(Halves(), [])
    tokens, mask = states()[0]
    with pytest.raises(ValueError, match=r"^states: expected .* 4 x 4 image, got 3"):
        trajectory_images(Halves(), [(tokens, mask[:, :3])])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng"])
def test_animation(tmp_path, suffix):
    frames = trajectory_images(Halves(), states())
    save_trajectory(frames, tmp_path / f"run{suffix}", num_columns=2)
    picture = Image.open(tmp_path / f"run{suffix}")
    assert picture.n_frames == 4
    assert picture.size == image_grid(frames[0], num_columns=2).size
    picture.seek(3)
    last = pixels(picture).astype(int)
    # webp is lossy
    assert abs(last - pixels(image_grid(frames[3], num_columns=2))).mean() < 4


def test_strip(tmp_path):
    frames = trajectory_images(Halves(), states())
    save_trajectory(frames, tmp_path / "run.png")
    strip = pixels(Image.open(tmp_path / "run.png"))
    assert strip.shape == (2 * (56 + 4) + 4, 4 * (56 + 4) + 4, 3)
    assert (strip[4 + 10, 4 + 3 * 60 + 10] == 0).all() and (strip[4 + 60 + 10, 4 + 3 * 60 + 10] == 255).all()


def test_a_strip_shows_images_spread_over_the_batch(tmp_path):
    frames = torch.linspace(0, 1, 20).view(1, 20, 1, 1, 1).expand(2, -1, 1, 56, 56)
    save_trajectory(frames, tmp_path / "run.png", num_rows=5)
    strip = pixels(Image.open(tmp_path / "run.png"))
    levels = [strip[4 + 60 * row + 10, 10, 0] for row in range(5)]
    assert levels == [round(255 * i / 19) for i in (0, 4, 8, 12, 16)]


def test_save_trajectory_names_a_bad_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"^path: expected a file name ending in .gif"):
        save_trajectory(trajectory_images(Halves(), states()), tmp_path / "run.mp4")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.apng"])
class TestFiles:
    """A picture is there whole or not at all."""

    def save(self, path):
        if path.suffix in (".gif", ".apng"):
            save_trajectory(torch.zeros(3, 2, 1, 8, 8), path)
        else:
            save_grid(torch.zeros(2, 1, 8, 8), path)

    def test_a_full_disk_leaves_the_old_picture(self, tmp_path, monkeypatch, name):
        (tmp_path / name).write_bytes(b"old")

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            self.save(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_bytes() == b"old"

    def test_a_mode_and_a_link_stay(self, tmp_path, name):
        (tmp_path / "folder").mkdir()
        target = tmp_path / "folder" / name
        target.write_bytes(b"old")
        target.chmod(0o600)
        (tmp_path / name).symlink_to(target)
        self.save(tmp_path / name)
        assert (tmp_path / name).is_symlink() and target.stat().st_mode & 0o777 == 0o600
        assert Image.open(target).size[0] > 100

    def test_a_missing_folder_is_named(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"^path: expected a path in a folder that exists, got '.*none"):
            self.save(tmp_path / "none" / name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_columns": 0}, ValueError, "^num_columns: expected at least 1, got 0"),
        ({"num_columns": 1.5}, TypeError, "^num_columns: expected an int, got float"),
        ({"scale": -1}, ValueError, "^scale: expected at least 1, got -1"),
        ({"gap": -1}, ValueError, "^gap: expected at least 0, got -1"),
        ({"images": np.zeros((1, 1, 4, 4))}, TypeError, "^images: expected a tensor, got ndarray"),
        ({"images": torch.zeros(1, 1, 0, 4)}, ValueError, "^images: expected one at least"),
    ],
)
def test_bad_arguments_of_a_grid(arguments, error, message):
    with pytest.raises(error, match=message):
        image_grid(**{"images": torch.zeros(1, 1, 4, 4), **arguments})


def test_what_is_no_number_is_black():
    grid = pixels(image_grid(torch.full((1, 1, 2, 2), torch.nan), scale=1, gap=0))
    assert (grid == 0).all()


def test_a_trajectory_does_not_write_to_the_states():
    class Writes(Halves):
        def decode(self, tokens):
            images = super().decode(tokens).clone()
            tokens.zero_()
            return images

    given = states()
    assert torch.equal(trajectory_images(Writes(), given), trajectory_images(Halves(), states()))
    assert torch.equal(given[0][0], states()[0][0])
