"""What an image costs and what that does to it: merging in evaluations, counts, times and fronts, on few images."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import Judge, small_model
from torch import nn
from typer.testing import CliRunner

from mgt_sampler import cli, sampling
from mgt_sampler.evaluation import drawers, exact, run
from mgt_sampler.evaluation.configurations import Configuration
from mgt_sampler.evaluation.intervals import Estimate
from mgt_sampler.evaluation.metrics import MASKED_SHARES, nll_at_shares
from mgt_sampler.evaluation.pareto import front, fronts, save_pareto
from mgt_sampler.merge import MergedBlocks, TokenMerging
from mgt_sampler.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_STEP = {"num_inference_steps": 1}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_classifier", Judge)
    monkeypatch.setattr(run, "load_real_statistics", Judge().statistics)


def evaluate(*configurations: Configuration, **options: Any) -> list[run.Result]:
    given = {"num_images": 20, "num_groups": 2, "progress": False, **options}
    return run.evaluate(small_model(), configurations, **given)


def number(result: run.Result, name: str) -> float:
    return float(result.estimates[name].value)


def flops_by_hand(rows: int, num_layers: int = 1, width: int = 192) -> int:
    """Of the bundled model's transformer where that many rows are left in each block."""
    neighbours, head = 2 * 196 * 9 * width, 2 * 196 * width * 128
    linear = 2 * rows * width * (3 + 1 + 4 + 4) * width
    return neighbours + head + num_layers * (linear + 4 * rows * rows * width)


class TestDrawers:
    def test_flops_by_hand(self) -> None:
        model = small_model()
        assert drawers.flops_of_call(model, None) == flops_by_hand(196)
        match = 2 * 192 * 147 * 49
        for ratio, rows in ((0.25, 147), (0.75, 49)):
            merging = TokenMerging(ratio)
            merged = drawers.merged(model, merging, "auto")
            assert drawers.flops_of_call(merged, merging) == flops_by_hand(rows) + match
        assert math.isnan(drawers.flops_of_call(model, TokenMerging((0.5, 0.0))))

    def test_layers_that_share_a_match(self) -> None:
        model = small_model()
        merging = TokenMerging(0.5, every=2)
        drawer = drawers.make_drawer(model, Configuration("a", {"merge": {"ratio": 0.5, "every": 2}}), 0, "auto")
        assert drawer.flops == flops_by_hand(98) + 2 * 192 * 147 * 49
        assert drawers.merged(model, merging, "auto").transformer is not model.transformer

    def test_what_is_merged_stays_merged(self) -> None:
        """Tokens that are merged in the first block are the most alike in the blocks behind it, too."""
        model = load_model()
        tokens = torch.randint(128, (2, 196), generator=torch.Generator().manual_seed(0))
        tokens[:, ::2] = model.mask_token_id
        each, every_second = (
            drawers.merged(model, TokenMerging(0.25, every=every), "auto").predict_logits(tokens, torch.tensor([1, 2]))
            for every in (1, 2)
        )
        assert torch.equal(each, every_second)

    def test_the_model_stays_as_it_is(self) -> None:
        model = small_model()
        tokens, condition = torch.full((2, 196), 128), torch.tensor([1, 2])
        plain = model.predict_logits(tokens, condition)
        drawer = drawers.make_drawer(model, Configuration("a", {"merge": 0.5}), 0, "auto")
        found = drawer.model.predict_logits(tokens, condition)
        assert torch.equal(model.predict_logits(tokens, condition), plain)
        MergedBlocks(model.transformer, 0.5)
        assert torch.equal(model.predict_logits(tokens, condition), found) and not torch.equal(found, plain)

    def test_merged_and_quantized(self) -> None:
        quantization = {"share": 1.0, "group_size": 64, "second_calibration": False}
        asked = Configuration("a", {**ONE_STEP, "merge": 0.25, "quantization": quantization})
        model = small_model()
        drawer = drawers.make_drawer(model, asked, 0, "auto")
        block, rows = drawer.model.transformer.blocks[0], []
        for layer in (block.qkv, block.mlp_in, block.attention_out, block.mlp_out):
            assert type(layer).__name__ == "Int4Linear"
            layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
        drawer.model.predict_logits(torch.full((2, 196), 128), torch.tensor([1, 2]))
        # hooks of before come first, so that what is merged has been merged
        assert rows == [147] * 4
        assert drawer.flops == flops_by_hand(147) + 2 * 192 * 147 * 49

    def test_time_of_the_processor(self) -> None:
        class Slow(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                until = time.process_time() + 0.05
                while time.process_time() < until:
                    pass
                time.sleep(0.2)
                return x

        layer = Slow(1, 1)
        watch = drawers.TransformerTime(layer)
        for _ in range(2):
            with watch:
                layer(torch.zeros(1))
                time.sleep(0.01)
        layer(torch.zeros(1))
        assert 0.1 <= watch.seconds < 0.25
        assert math.isnan(watch.others) or 0 <= watch.others < 10_000
        assert not layer._forward_hooks and not layer._forward_pre_hooks


class TestRun:
    def test_a_merged_configuration_is_drawn_with_fewer_tokens(
        self, judge: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, generate = [], sampling.generate

        def spy(model: Any, **arguments: Any) -> Any:
            block = model.transformer.blocks[0]
            handle = block.mlp_in.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
            try:
                return generate(model, **arguments)
            finally:
                handle.remove()

        monkeypatch.setattr(sampling, "generate", spy)
        plain, merged = evaluate(Configuration("float", ONE_STEP), Configuration("merge", {**ONE_STEP, "merge": 0.5}))
        assert rows == [196, 98] * 2
        assert number(plain, "model_flops") == flops_by_hand(196)
        assert number(merged, "model_flops") == flops_by_hand(98) + 2 * 192 * 147 * 49
        assert 0 < number(merged, "transformer_seconds") and number(plain, "frechet_lost") == 0
        assert number(merged, "frechet_lost") == pytest.approx(
            number(merged, "frechet_distance") - number(plain, "frechet_distance")
        )
        assert "model GFLOP" in run.results_table([plain, merged])
        assert "model GFLOP" not in run.results_table([plain, plain])

    def test_guidance_in_an_interval_costs_fewer_calls(self, judge: None) -> None:
        arguments = {"num_inference_steps": 4, "merge": 0.75}
        always, interval = evaluate(
            Configuration("a", {**arguments, "guidance_scale": 2.0}),
            Configuration("b", {**arguments, "guidance_scale": "interval:2:0.1:0.8"}),
        )
        assert (number(always, "model_calls"), number(interval, "model_calls")) == (8, 7)
        assert number(interval, "model_flops") == pytest.approx(7 / 8 * number(always, "model_flops"))

    def test_likelihood_of_merged_tokens(self, judge: None, tmp_path: Path) -> None:
        images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(20) % 10
        results = evaluate(
            Configuration("float", ONE_STEP),
            Configuration("merge", {**ONE_STEP, "merge": 0.5}),
            validation=(images, labels),
        )
        model = small_model()
        plain = [nll_at_shares(model, images[g * 10 :][:10], labels[:10], seed=g) for g in range(2)]
        MergedBlocks(model.transformer, 0.5)
        merged = [nll_at_shares(model, images[g * 10 :][:10], labels[:10], seed=g) for g in range(2)]
        lost = torch.cat(merged) - torch.cat(plain)
        assert float(lost.abs().mean()) > 1e-4
        assert number(results[1], "nll") == pytest.approx(float(torch.cat(merged).mean()), rel=1e-5)
        assert number(results[1], "nll_lost") == pytest.approx(float(lost.mean()), rel=1e-2, abs=1e-6)
        run.save_results(results, tmp_path)
        with (tmp_path / "nll.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["name"], float(row["masked"])) for row in rows] == [
            (name, share) for name in ("float", "merge") for share in MASKED_SHARES
        ]
        found = [float(row["nll_lost"]) for row in rows[3:]]
        assert found == pytest.approx(lost.double().mean(0).tolist(), rel=1e-2, abs=1e-6)

    def test_other_merging_is_refused_where_images_are_kept(self, judge: None, tmp_path: Path) -> None:
        evaluate(Configuration("a", {**ONE_STEP, "merge": 0.25}), out=tmp_path)
        for merge in (0.5, {"ratio": 0.25, "every": 2}):
            with pytest.raises(ValueError, match="got those of other configuration"):
                evaluate(Configuration("a", {**ONE_STEP, "merge": merge}), out=tmp_path)

    def test_what_cannot_be_merged_is_named_before_anything_is_drawn(
        self, judge: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run, "_draw", lambda *_: pytest.fail("drew"))
        first = Configuration("first", ONE_STEP)
        with pytest.raises(ValueError, match="a: merge: proportional: expected blocks"):
            evaluate(first, Configuration("a", {**ONE_STEP, "merge": {"proportional": True}}))
        validation = torch.zeros(2, 1, 28, 28), torch.zeros(2).long()
        with pytest.raises(ValueError, match=r"a: merge: ratio: the likelihood belongs to no step.*\(0\.5, 0\.0\)"):
            evaluate(first, Configuration("a", {**ONE_STEP, "merge": {"ratio": [0.5, 0.0]}}), validation=validation)
        with pytest.raises(ValueError, match="a: expected no merge and no quantization: a chain has no transformer"):
            exact.judge_exactly([Configuration("a", {"merge": 0.5})], progress=False)


def result(name: str, **values: float) -> run.Result:
    estimates = {
        key: Estimate(torch.tensor(value, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
        for key, value in {"nll_lost": 0.0, **values}.items()
    }
    return run.Result(Configuration(name, {}), 20, ("shoe",), estimates, torch.zeros(1, 1, 2, 2))


class TestPareto:
    def test_the_front_by_hand(self) -> None:
        nan = math.nan
        points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (4.0, 0.5), (3.0, 2.0), (0.5, nan), (nan, 0.0)]
        assert front(points) == [1, 3, 0, 4]
        assert front([(1.0, 1.0), (1.0, 1.0)]) == [0] and front([(nan, nan)]) == []

    def test_no_point_beats_one_of_the_front(self) -> None:
        points = np.random.default_rng(0).integers(0, 12, (60, 2)).astype(float).tolist()
        chosen = {tuple(points[i]) for i in front(points)}

        def beaten(p: list[float]) -> bool:
            return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

        assert chosen == {tuple(p) for p in points if not beaten(p)}

    def test_table_and_picture(self, tmp_path: Path) -> None:
        costs = {"transformer_seconds": 1.0}
        results = [
            result("float", frechet_distance=1.0, nll=2.0, model_flops=9e9, **costs),
            result("merge", frechet_distance=3.0, nll=2.5, model_flops=3e9, **costs),
            result("worse", frechet_distance=4.0, nll=2.0, model_flops=9.5e9, **costs),
        ]
        rows = fronts(results)
        names: dict[tuple[str, str], list[str]] = {(row["quality"], row["cost"]): [] for row in rows}
        for row in rows:
            names[row["quality"], row["cost"]].append(row["name"])
        assert names == {
            ("frechet_distance", "model_flops"): ["merge", "float"],
            ("frechet_distance", "transformer_seconds"): ["float"],
            ("nll", "model_flops"): ["merge", "float"],
            ("nll", "transformer_seconds"): ["float"],
        }
        table, picture = save_pareto(results, tmp_path)
        with table.open() as file:
            assert list(csv.DictReader(file)) == rows
        assert np.asarray(Image.open(picture).convert("L")).std() > 5
        unknown = [result("a", frechet_distance=1.0, nll=math.nan, model_flops=math.nan, transformer_seconds=math.nan)]
        with pytest.raises(ValueError, match="results: expected some of known costs, got none"):
            save_pareto(unknown, tmp_path)

    def test_the_command(self, judge: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "load_model", lambda name, **_: small_model())
        path, out = tmp_path / "list.toml", tmp_path / "out"
        path.write_text(
            "[defaults]\nnum_inference_steps = 1\n[[configuration]]\nname = 'float'\n"
            "[[configuration]]\nname = 'merge 0.5'\nmerge = 0.5\n"
        )
        args = ["evaluate", str(path), "--out", str(out), "-n", "20", "--groups", "2", "--no-progress"]
        done = CliRunner().invoke(cli.app, args, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "pareto.png" in done.stdout and (out / "grid.png").is_file()
        with (out / "fronts.csv").open() as file:
            assert {row["quality"] for row in csv.DictReader(file)} == {"frechet_distance"}
