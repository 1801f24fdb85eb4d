"""The benchmarks of a whole image and of token merging, on tiny sizes: their sums, counts and doors."""

import csv
import math

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import typer

from mgt_benchmarks import image, merging
from mgt_benchmarks.meissonic import SCALES, Sizes

pytestmark = pytest.mark.usefixtures("one_thread")


def app(main):
    made = typer.Typer()
    made.command()(main)
    return made


def measured(body2=1.0, body1=0.6, tail=0.1):
    """Made-up seconds; a tail takes as long as its masked share says."""
    return {
        "body": {"2": body2, "1": body1},
        "tail": {f"{halves} {share}": tail * share for halves in (1, 2) for share in image.SHARES},
        "weight_bytes": 100,
        "peak_bytes": 1000,
    }


def test_the_steps_add_up():
    shares = image.shares_of_steps()
    assert len(shares) == 64
    assert shares[0] == 1
    # of the cosine schedule, on average
    assert sum(shares) / 64 == pytest.approx(0.64, abs=0.01)
    plain, interval = image.Variant("plain"), image.Variant("interval", interval=True)
    assert image.halves_of_steps(plain) == [2] * 64
    halves = image.halves_of_steps(interval)
    # 7 / 64 is the first of at least 0.1, 51 / 64 the last of less than 0.8
    assert halves == [1] * 7 + [2] * 45 + [1] * 12
    # linear in the share but below the smallest one that was measured
    tails = sum(0.1 * max(share, 0.1) for share in shares)
    assert image.seconds_of_image(plain, measured()) == pytest.approx(64 + tails)
    assert image.seconds_of_image(interval, measured()) == pytest.approx(45 + 19 * 0.6 + tails)


def test_operations_are_counted():
    sizes = Sizes(width=64, num_heads=2, num_double_blocks=2, num_single_blocks=2, num_image_tokens=64,
                  num_text_tokens=4, codebook_size=32)  # fmt: skip

    def count(**options):
        return image.operations_of_image(image.Variant("", **options), sizes)

    plain = count()
    w, n, t = 64, 64, 4
    # patches in and out, the layer before the head; the blocks' layers, modulations and attention; the head
    outside = 2 * 2 * n * (4 * w * w) * 2 + 2 * 2 * (4 * n) * w * w
    double = 2 * 2 * (n + t) * 12 * w * w + 2 * 2 * 2 * 6 * w * w + 2 * 4 * (n + t) ** 2 * w
    single = 2 * 2 * (n + t) * 12 * w * w + 2 * 2 * 3 * w * w + 2 * 4 * (n + t) ** 2 * w
    head = 2 * 2 * (4 * n) * w * 32
    assert plain == pytest.approx(64 * (outside + 2 * double + 2 * single + head), rel=0.01)
    folded = count(folds=True)
    assert plain - folded == pytest.approx(64 * head * (1 - 0.64 / 2), rel=0.02)
    half, interval = count(folds=True, merge=0.5), count(folds=True, interval=True)
    every = count(folds=True, merge=0.5, single_stream=True)
    assert every < half < folded
    assert interval < folded


def test_the_table_names_what_is_missed():
    peers = {"PyTorch fp32": [measured(10.0)], "PyTorch bf16": [measured(5.0)]}
    ours = {**measured(1.0, 0.5), "weight_bytes": 29, "peak_bytes": 340}
    table = image.rows({**peers, image.ALL: [ours]}, SCALES["tiny"])
    row = table[-1]
    assert row.missed == ""
    assert row.times_fp32 > 6
    worse = {**measured(9.0, 9.0), "weight_bytes": 31, "peak_bytes": 360}
    missed = image.rows({**peers, image.ALL: [worse]}, SCALES["tiny"])[-1].missed
    assert missed.count(",") == 2
    assert "weights <= 0.3" in missed and "peak <= 0.35" in missed


@pytest.mark.parametrize("name", ["PyTorch fp32", "+ kernels", "+ guidance interval", image.ALL])
def test_a_variant_is_measured(name):
    variant = image.BY_NAME[name]
    found = image.measure(variant, "tiny", 1, None)
    assert set(found["body"]) == ({1, 2} if variant.interval else {2})
    assert len(found["tail"]) == (3 if variant.ours else 1) * len(found["body"])
    assert all(value > 0 for value in [*found["body"].values(), *found["tail"].values(), found["peak_bytes"]])
    assert found["weight_bytes"] > 0


def test_every_variant_draws_from_the_same_logits():
    """Folded or not, with kernels or PyTorch's own: the masked positions get codes, the known ones stay."""
    with torch.inference_mode():
        for name in ("+ kernels", "+ folded head"):
            variant = image.BY_NAME[name]
            steps = image.Steps(variant, image.build(variant, SCALES["tiny"], None), 8)
            hidden = steps.body(2)
            _, drawn = steps.tail(hidden, 0.64)()
            before = steps.masked_at(0.64).flatten(1)
            known = before != steps.model.mask_token_id
            assert torch.equal(drawn.sampled.token_ids[known], before[known])
            assert (drawn.sampled.token_ids < 64).all()


def test_the_command_writes_a_table_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "image.csv", tmp_path / "image.png"
    arguments = ["--scale", "tiny", "--only", "+ folded head", "--csv", str(table), "--picture", str(picture)]
    result = CliRunner().invoke(app(image.main), [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open()))
    assert [row["variant"] for row in rows] == ["PyTorch fp32", "PyTorch bf16", "+ folded head"]
    assert float(rows[0]["times_fp32"]) == 1
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "expected one of ('full', 'tiny')"),
        (["--only", "+ magic"], "got '+ magic'"),
        (["--csv", "/nowhere/table.csv"], "--csv"),
    ],
)
def test_bad_arguments(arguments, message):
    result = CliRunner().invoke(app(image.main), arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_merging_beside_what_it_saves(monkeypatch):
    monkeypatch.setattr(merging, "SIDE", 4)
    monkeypatch.setattr(merging, "CHANNELS", 128)
    monkeypatch.setattr(merging, "Sizes", lambda: SCALES["tiny"])
    row = merging.measure(0.5, 1)
    assert row.match_ms > 0 and row.merge_ms > 0 and row.unmerge_ms > 0
    assert math.isnan(row.times_tomesd) or row.times_tomesd > 0
