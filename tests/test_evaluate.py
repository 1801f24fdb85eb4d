"""The evaluation: metrics by hand or by another route, intervals, lists of configurations, runs that go on."""

from __future__ import annotations

import csv
import errno
import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy import stats
from scipy.spatial import distance
from typer.testing import CliRunner

from mgt_kernels import cpu
from mgt_sampler import cli, samplers, sampling
from mgt_sampler.evaluation import exact, plots, run
from mgt_sampler.evaluation.configurations import Configuration, load_configurations
from mgt_sampler.evaluation.intervals import jackknife
from mgt_sampler.evaluation.metrics import (
    RealStatistics,
    class_accuracy,
    density_coverage,
    feature_statistics,
    frechet_distance,
    judge,
    kernel_distance,
    load_real_statistics,
    masked_token_nll,
    nll_at_shares,
    pixel_spread,
    token_entropy,
    winning_rate,
)
from mgt_sampler.evaluation.plots import save_plots
from mgt_sampler.merge import TokenMerging
from mgt_sampler.models import FashionModel, load_classifier, load_model
from mgt_sampler.models.fashion import Transformer, TransformerConfig
from mgt_sampler.techniques import Differential, ZSampling
from mgt_sampler.tensor_file import write_tensor_file


def random_gaussian(seed: int, num_features: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    return torch.randn(num_features, generator=generator, dtype=torch.float64), root @ root.T


def random_features(num_images: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num_images, 4, generator=torch.Generator().manual_seed(seed)) + shift


class TestFrechet:
    def test_against_scipy(self) -> None:
        (mean_a, cov_a), (mean_b, cov_b) = random_gaussian(0), random_gaussian(1)
        root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
        expected = float((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace()) - 2 * np.trace(root)
        assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)

    def test_same_is_zero(self) -> None:
        mean, covariance = random_gaussian(2)
        assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)

    def test_shift(self) -> None:
        mean, covariance = random_gaussian(3)
        assert frechet_distance(mean, covariance, mean + 2, covariance) == pytest.approx(4 * 6, rel=1e-9)

    def test_scale(self) -> None:
        eye, zero = torch.eye(6), torch.zeros(6)
        # sum of (1 - 3)^2, the difference of the standard deviations
        assert frechet_distance(zero, eye, zero, 9 * eye) == pytest.approx(6 * 4, rel=1e-9)

    def test_singular(self) -> None:
        covariance = torch.zeros(6, 6)
        covariance[0, 0] = 4
        assert frechet_distance(torch.zeros(6), covariance, torch.zeros(6), 0 * covariance) == pytest.approx(4)

    def test_feature_statistics(self) -> None:
        features = random_features(30, 0)
        mean, covariance = feature_statistics(features)
        np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="two images at least, got 1"):
            feature_statistics(features[:1])


class TestKernelDistance:
    def test_by_brute_force(self) -> None:
        x, y = random_features(5, 0).double().numpy(), random_features(7, 1, 0.5).double().numpy()

        def kernel(a: np.ndarray, b: np.ndarray) -> float:
            return float(sum(p * q for p, q in zip(a, b, strict=True)) / 4 + 1) ** 3

        within = [np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
        between = np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
        got = kernel_distance(torch.tensor(x), torch.tensor(y))
        assert got == pytest.approx(sum(within) - 2 * between, rel=1e-9)

    def test_unbiased(self) -> None:
        # without bias, distances between samples of one distribution scatter around 0
        found = [kernel_distance(random_features(20, 2 * i), random_features(20, 2 * i + 1)) for i in range(400)]
        assert stats.ttest_1samp(found, 0).pvalue > 0.01
        assert np.mean([kernel_distance(random_features(20, i), random_features(20, i, 0.5)) for i in range(20)]) > 0.2


class TestDensityCoverage:
    def test_by_brute_force(self) -> None:
        real, features, k = random_features(40, 0).double(), random_features(25, 1, 0.7).double(), 5
        between = distance.cdist(real.numpy(), features.numpy())
        radius = np.sort(distance.cdist(real.numpy(), real.numpy()), axis=1)[:, k]
        inside = [[between[i, j] <= radius[i] for j in range(25)] for i in range(40)]
        assert density_coverage(features, real) == pytest.approx(
            (sum(map(sum, inside)) / (k * 25), sum(map(any, inside)) / 40)
        )

    def test_real_images_score_one(self) -> None:
        density, coverage = density_coverage(random_features(1000, 0), random_features(1000, 1))
        assert density == pytest.approx(1, abs=0.1)
        # 1 - 2^-k for equal numbers that are large
        assert coverage == pytest.approx(1 - 2**-5, abs=0.02)

    def test_collapse(self) -> None:
        real = random_features(500, 0)
        density, coverage = density_coverage(real[:1].expand(500, -1), real)
        assert density >= 1 and coverage < 0.1
        assert density_coverage(real + 100, real) == (0, 0)


class TestTokens:
    def test_by_hand(self) -> None:
        tokens = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [5, 5, 1, 1], [7, 7, 7, 0]])
        entropy, unique = token_entropy(tokens, 8)
        expected = [stats.entropy(np.bincount(row), base=2) for row in tokens.numpy()]
        np.testing.assert_allclose(entropy, expected, atol=1e-6)
        assert unique.tolist() == [0.25, 1.0, 0.5, 0.5]


class TestSpread:
    def test_by_hand(self) -> None:
        images = torch.zeros(5, 1, 2, 2)
        images[1] = 1
        labels = torch.tensor([0, 0, 1, 1, 2])
        spread = pixel_spread(images, labels, num_classes=3)
        assert spread[0] == pytest.approx(math.sqrt(0.5))
        assert spread[1] == 0
        assert spread[2].isnan()

    def test_half_the_pixels(self) -> None:
        images = torch.zeros(2, 1, 2, 2)
        images[1, :, 0] = 1
        assert pixel_spread(images, torch.zeros(2).long(), num_classes=1)[0] == pytest.approx(0.5)

    def test_bad_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(3,\)"):
            pixel_spread(torch.zeros(2, 1, 2, 2), torch.zeros(3).long(), num_classes=1)
        with pytest.raises(ValueError, match="images: expected shape"):
            pixel_spread(torch.zeros(2, 2, 2), torch.zeros(2).long(), num_classes=1)


class TestJudge:
    def test_masked_token_nll_by_hand(self) -> None:
        class Model:
            num_tokens, codebook_size, mask_token_id, device = 4, 3, 3, torch.device("cpu")

            def encode(self, images: torch.Tensor) -> torch.Tensor:
                return images.view(len(images), 4).long()

            def predict_logits(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
                seen.append(tokens)
                return torch.tensor([0.0, 1.0, 2.0]).expand(len(tokens), 4, 3)

        seen: list[torch.Tensor] = []
        images = torch.randint(3, (40, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        nll = masked_token_nll(Model(), images, torch.zeros(40).long(), batch_size=16)  # type: ignore[arg-type]
        log_prob = torch.tensor([0.0, 1.0, 2.0]).log_softmax(0)
        tokens, masked = images.view(40, 4), torch.cat(seen) == 3
        assert set(masked.sum(1).tolist()) == {1, 2, 3, 4}
        expected = [-log_prob[row[hidden]].mean() for row, hidden in zip(tokens, masked, strict=True)]
        assert torch.allclose(nll, torch.stack(expected))
        assert ((torch.cat(seen) == tokens) | masked).all()

    def test_nll_at_shares_by_hand(self) -> None:
        class Model:
            num_tokens, codebook_size, mask_token_id, device = 8, 3, 3, torch.device("cpu")

            def encode(self, images: torch.Tensor) -> torch.Tensor:
                return images.view(len(images), 8).long()

            def predict_logits(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
                seen.append(tokens)
                return torch.tensor([0.0, 1.0, 2.0]).expand(len(tokens), 8, 3)

        seen: list[torch.Tensor] = []
        images = torch.randint(3, (10, 1, 2, 4), generator=torch.Generator().manual_seed(0))
        nll = nll_at_shares(Model(), images, torch.zeros(10).long(), batch_size=10)  # type: ignore[arg-type]
        log_prob, tokens = torch.tensor([0.0, 1.0, 2.0]).log_softmax(0), images.view(10, 8)
        masks = [part == 3 for part in seen]
        assert [mask.sum(1).unique().tolist() for mask in masks] == [[2], [4], [6]]
        expected = torch.stack([-(log_prob[tokens] * mask).sum(1) / mask.sum(1) for mask in masks], dim=1)
        torch.testing.assert_close(nll, expected)
        # a larger share masks more of the same
        assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all()
        one_by_one = nll_at_shares(Model(), images, torch.zeros(10).long(), batch_size=1)  # type: ignore[arg-type]
        torch.testing.assert_close(one_by_one, nll)

    def test_accuracy_is_by_class(self) -> None:
        log_prob, features = judge(torch.rand(30, 1, 28, 28), load_classifier())
        torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(30))
        assert features.shape == (30, 64)
        accuracy = class_accuracy(log_prob, log_prob.argmax(1))
        assert ((accuracy == 1) | accuracy.isnan()).all()
        assert class_accuracy(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 1, 2])).tolist() == [1, 0.5, 1]

    def test_winning_rate(self) -> None:
        ours, theirs = torch.tensor([-1.0, -1.0, -1.0, -0.5, -2.0]), torch.tensor([-1.009, -1.02, -0.991, -0.6, -0.1])
        assert winning_rate(ours, theirs) == pytest.approx((0.4, 0.4, 0.2))
        assert winning_rate(theirs, ours) == pytest.approx((0.2, 0.4, 0.4))

    def test_bundled_statistics(self) -> None:
        real = load_real_statistics()
        assert real.feature_covariance.shape == (64, 64)
        assert real.feature_mean.dtype == torch.float64
        assert real.accuracy >= 0.91
        assert ((real.pixel_spread > 0.1) & (real.pixel_spread < 0.4)).all()
        assert real.features.shape == (2000, 64) and real.features.dtype == torch.float32
        # the features are those of the images that mean and covariance were taken from
        assert frechet_distance(*feature_statistics(real.features), real.feature_mean, real.feature_covariance) < 1


class TestJackknife:
    def test_the_mean_has_its_textbook_interval(self) -> None:
        values = torch.tensor([0.3, 1.0, -0.4, 2.0, 0.7])
        estimate = jackknife(lambda kept: {"mean": values[kept].mean()}, 5)["mean"]
        expected = stats.t.ppf(0.975, 4) * stats.sem(values.numpy())
        assert float(estimate.value) == pytest.approx(float(values.mean()))
        assert float(estimate.half_width) == pytest.approx(expected, rel=1e-6)

    def test_it_covers(self) -> None:
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(500, 10, 20, generator=generator, dtype=torch.float64)
        hits = 0
        for groups in samples:
            estimate = jackknife(lambda kept, groups=groups: {"deviation": groups[kept].std()}, 10)["deviation"]
            hits += int(abs(float(estimate.value) - 1) <= float(estimate.half_width))
        assert 0.92 <= hits / 500 <= 0.98

    def test_one_group_is_none(self) -> None:
        with pytest.raises(ValueError, match="num_groups: an interval needs two at least, got 1"):
            jackknife(lambda kept: {}, 1)


class TestConfigurations:
    def read(self, tmp_path: Path, text: str) -> list[Configuration]:
        path = tmp_path / "list.toml"
        path.write_text(text)
        return load_configurations(path)

    def test_defaults_and_tables(self, tmp_path: Path) -> None:
        first, second = self.read(
            tmp_path,
            """
            [defaults]
            num_inference_steps = 3
            [[configuration]]
            name = "plain"
            [[configuration]]
            name = "both of them"
            num_inference_steps = 5
            noise_scale = "abs_cos:1"
            differential = { share = 0.5 }
            z_sampling = { steps = [1] }
            """,
        )
        assert first.generate_arguments() == {"num_inference_steps": 3}
        assert second.generate_arguments() == {
            "num_inference_steps": 5,
            "noise_scale": "abs_cos:1",
            "differential": Differential(share=0.5),
            "z_sampling": ZSampling(steps=[1]),
        }
        assert second.family == "both"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected a table"),
            ("[[configuration]]\nsteps = 3\n", r"configuration 1: expected a name, got None"),
            ("[[configuration]]\nname = ' '\n", "expected a name, got ' '"),
            ("[[configuration]]\nname = 'a'\nsteps = 3\n", "a: expected keys among num_inference_steps, .*'steps'"),
            ("[[configuration]]\nname = 'a'\n[[configuration]]\nname = 'A'\n", "expected different names, got 'A'"),
            ("[default]\ntemperature = 1\n", "expected keys among defaults, configuration, got 'default'"),
            ("[[configuration]]\nname = 'a'\ndifferential = {z = 1}\n", "a: differential: expected keys .*'z'"),
            ("name = \n", "line 1"),
        ],
    )
    def test_errors_are_kind(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path, text)

    def test_a_table_is_no_number(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"a: differential: expected a table, got 0\.5"):
            self.read(tmp_path, "[[configuration]]\nname = 'a'\ndifferential = 0.5\n")

    def test_quantization_is_no_argument_of_generate(self, tmp_path: Path) -> None:
        text = "[[configuration]]\nname = 'a'\nmomentum = 0.1\nquantization = {share = 0.5}\n"
        (configuration,) = self.read(tmp_path, text)
        assert configuration.generate_arguments() == {"momentum": 0.1}
        assert configuration.quantization == {"share": 0.5}
        with pytest.raises(ValueError, match=r"a: quantization: expected keys among share, .*'bits'"):
            self.read(tmp_path, "[[configuration]]\nname = 'a'\nquantization = {bits = 4}\n")
        shares = [(c.quantization or {}).get("share") for c in load_configurations("quantization")]
        assert shares == [None, 0, 0.3333, 0.3333, 0.6667, 0.6667, 1, 1]

    def test_a_sampler_takes_its_own_arguments(self, tmp_path: Path) -> None:
        path = tmp_path / "list.toml"
        path.write_text(
            '[defaults]\nguidance_scale = [1.0, 3.0]\n[[configuration]]\nname = "halton 4"\nsampler = "halton"\n'
            "num_inference_steps = 4\ntoken_temperature = 0.75\nroll = false\n"
        )
        (configuration,) = load_configurations(path)
        expected = samplers.halton(guidance_scale=(1.0, 3.0), token_temperature=0.75, roll=False)
        assert configuration.generate_arguments() == {"num_inference_steps": 4, "rule": expected}
        more = configuration.generate_arguments(num_inference_steps=2, mask_schedule=[0.5, 0.0])
        assert more["num_inference_steps"] == 2 and more["rule"].select.count.schedule == (0.5, 0.0)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"sampler": "dice"}, ValueError, r"^x: sampler: expected one of maskgit, .* got 'dice'"),
            ({"sampler": "halton", "beauty": 1}, TypeError, r"^x: .*beauty"),
            ({"sampler": "remdm", "strategy": "hope"}, ValueError, r"^x: strategy: expected cap"),
            ({"sampler": "halton", "differential": {}}, TypeError, r"^x: .*differential"),
        ],
    )
    def test_bad_samplers_are_named(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Configuration("x", arguments)

    def test_merging_is_no_argument_of_generate(self, tmp_path: Path) -> None:
        ratio, table, none, of_sampler = self.read(
            tmp_path,
            """
            [defaults]
            num_inference_steps = 3
            [[configuration]]
            name = "ratio"
            merge = 0.25
            [[configuration]]
            name = "table"
            merge = { ratio = 0.5, every = 2, destinations = "top_left" }
            quantization = { share = 1.0 }
            [[configuration]]
            name = "none"
            merge = 0
            [[configuration]]
            name = "of a sampler"
            sampler = "halton"
            merge = 0.75
            """,
        )
        assert ratio.merging == TokenMerging(0.25) and none.merging is None
        assert table.merging == TokenMerging(0.5, every=2, destinations="top_left") and table.quantization
        assert of_sampler.merging == TokenMerging(0.75)
        for configuration in (ratio, table, none):
            assert configuration.generate_arguments() == {"num_inference_steps": 3}

    @pytest.mark.parametrize(
        ("merge", "error", "message"),
        [
            ("0.8", ValueError, r"a: merge: ratio: expected at most 0\.75, got 0\.8"),
            ("{ ratio = 0.5, rate = 1 }", ValueError, "a: merge: expected keys among ratio, .*'rate'"),
            ("{ every = 0 }", ValueError, "a: merge: every: expected an int of at least 1"),
            ("true", TypeError, "a: merge: expected a ratio"),
        ],
    )
    def test_bad_merging_is_named(self, tmp_path: Path, merge: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.read(tmp_path, f"[[configuration]]\nname = 'a'\nmerge = {merge}\n")

    def test_the_shipped_list_of_whole_images(self) -> None:
        configurations = load_configurations("whole_image")
        assert len(configurations) <= 16 and configurations[0].arguments.keys().isdisjoint({"merge", "quantization"})
        ratios = {c.merging.ratio for c in configurations if c.merging is not None}
        assert ratios == {0.1, 0.25, 0.5, 0.75}
        # beside the first one, each axis alone, and all together
        axes = [
            (c.merging is not None, c.quantization is not None, "interval" in str(c.arguments["guidance_scale"]))
            for c in configurations
        ]
        assert {(False, False, True), (False, True, False), (True, False, False), (True, True, True)} <= set(axes)
        assert {c.family for c in configurations} == {"float", "interval", "merge", "w4a8", "scq"}

    @pytest.mark.parametrize("name", ["samplers", "exact_samplers"])
    def test_the_shipped_lists_of_samplers(self, name: str) -> None:
        configurations = load_configurations(name)
        used = {configuration.sampler for configuration in configurations}
        assert {"maskgit", "halton", "checkerboard", "moment"} <= used
        if name == "samplers":
            steps = {configuration.arguments.get("num_inference_steps") for configuration in configurations}
            assert steps >= {4, 6, 8, 12, 24}

    def test_the_shipped_list(self) -> None:
        techniques = load_configurations("techniques")
        assert techniques[0].name == "vanilla" and len(techniques) > 20
        with pytest.raises(FileNotFoundError, match="technique"):
            load_configurations("technique")


class Judge:
    """A classifier in two matrices, so that what is shown of an evaluation does not wait for convolutions."""

    def __init__(self, **_: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.network = torch.nn.Linear(784, 16, bias=False)
        self.network.weight.data = torch.randn(16, 784, generator=generator) / 10
        self.head = torch.randn(16, 10, generator=generator)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images) @ self.head

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.float().flatten(1))

    def statistics(self) -> RealStatistics:
        images = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(1)) / 10
        mean, covariance = feature_statistics(self.features(images))
        return RealStatistics(mean, covariance, self.features(images), torch.full((10,), 0.1), torch.tensor(0.9))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A sampler that draws images at random, which a quick judge sees, and the calls that it got."""
    calls: list[Any] = []
    monkeypatch.setattr(run, "load_classifier", Judge)
    monkeypatch.setattr(run, "load_real_statistics", Judge().statistics)

    def generate(model: Any, *, callback: Any = None, **arguments: Any) -> SimpleNamespace:
        seeds, num_steps = arguments.get("seed", torch.zeros(0).long()), arguments.get("num_inference_steps", 12)
        if arguments.get("temperature") == -1:
            raise ValueError("temperature: expected a finite number of at least 0")
        if len(arguments.get("labels", seeds)):
            calls.append(arguments)
        tokens = torch.zeros(0, model.num_tokens).long()
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed + num_steps)
            tokens = torch.cat([tokens, torch.randint(model.codebook_size, (1, model.num_tokens), generator=generator)])
        for k in range(num_steps if len(tokens) else 0):
            divergence = torch.full(tokens.shape, math.inf)
            divergence[:, ::2] = math.inf if k == 0 else 1 / k
            recorded = divergence if arguments.get("differential") else None
            # a Z-Sampling step draws twice; the second draw is the one that counts
            for shown in (torch.zeros_like(tokens), tokens):
                callback(SimpleNamespace(step=k, tokens=shown, divergence=recorded))
        images = (tokens / 127).view(-1, 1, 14, 14).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return SimpleNamespace(
            tokens=tokens,
            images=images,
            model_calls=2 * num_steps,
            sample_calls=torch.full((len(images),), 2 * num_steps),
        )

    monkeypatch.setattr(sampling, "generate", generate)
    return calls


TIMES = {"seconds", "transformer_seconds", "others_busy"}
TWO = (Configuration("base", {"num_inference_steps": 2}), Configuration("more steps", {"num_inference_steps": 3}))


def small_model(width: int = 192, **sizes: int) -> FashionModel:
    """The bundled model with a random transformer of one layer, which makes as many calls in less time."""
    model = load_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.transformer = Transformer(TransformerConfig(width=width, num_layers=1, **sizes)).eval()
    return model


def evaluate(configurations: Any = TWO, **options: Any) -> list[run.Result]:
    return run.evaluate(
        small_model(), configurations, **{"num_images": 60, "num_groups": 3, "progress": False, **options}
    )


class TestRun:
    def test_figures(self, drawn: list[Any]) -> None:
        base, more = evaluate()
        assert base.num_images == more.num_images == 60
        assert all(call["differential"] == Differential(share=0.0) for call in drawn)
        values = {name: float(base.estimates[name].value) for name in run.METRICS}
        assert values["model_calls"] == 4 and float(more.estimates["model_calls"].value) == 6
        assert 6 < values["entropy"] < 7 and values["divergence"] == 1
        assert values["frechet_distance"] > 10 and values["kernel_distance"] > 1 and values["coverage"] < 1
        assert values["seconds"] > 0 and base.estimates["seconds"].half_width.isnan()
        assert (values["win"], values["tie"], values["loss"]) == (0, 1, 0)
        shares = [more.estimates[name] for name in ("win", "tie", "loss")]
        assert sum(float(share.value) for share in shares) == pytest.approx(1)
        assert float(shares[0].half_width) > 0
        divergence = more.estimates["step_divergence"].value
        assert divergence[0].isnan() and divergence[1:].tolist() == [1, 0.5]
        assert torch.equal(base.estimates["step_entropy"].value[0], base.estimates["step_entropy"].value[1])
        assert base.estimates["class_accuracy"].value.shape == (10,)
        assert base.examples.shape == (10, 1, 28, 28)

    def test_every_configuration_has_the_same_seeds(self, drawn: list[Any]) -> None:
        evaluate(batch_size=7, seed=3)
        seeds = {steps: [c["seed"] for c in drawn if c["num_inference_steps"] == steps] for steps in (2, 3)}
        for given in seeds.values():
            assert torch.equal(torch.cat(given), sampling.sample_seeds(3, 60))
        assert torch.cat([call["labels"] for call in drawn])[:20].tolist() == [*range(10)] * 2

    def test_the_batch_size_changes_nothing(self, drawn: list[Any]) -> None:
        (whole,), (cut,) = (evaluate(TWO[:1], batch_size=size) for size in (100, 7))
        for name in run.METRICS.keys() - TIMES:
            expected = pytest.approx(float(cut.estimates[name].value), rel=1e-3, nan_ok=True)
            assert float(whole.estimates[name].value) == expected, name

    def test_an_interrupted_run_goes_on(
        self, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = evaluate()
        drawn.clear()
        generate = sampling.generate

        def broken(model: Any, **arguments: Any) -> Any:
            if len(drawn) == 3:
                raise KeyboardInterrupt
            return generate(model, **arguments)

        monkeypatch.setattr(sampling, "generate", broken)
        with pytest.raises(KeyboardInterrupt):
            evaluate(out=tmp_path)
        assert len(drawn) == 3
        monkeypatch.setattr(sampling, "generate", generate)
        resumed = evaluate(out=tmp_path)
        assert len(drawn) == 6
        for a, b in zip(whole, resumed, strict=True):
            for name in a.estimates.keys() - TIMES:
                torch.testing.assert_close(a.estimates[name].value, b.estimates[name].value, equal_nan=True)
        evaluate(out=tmp_path)
        assert len(drawn) == 6

    def test_other_images_are_refused(self, drawn: list[Any], tmp_path: Path) -> None:
        evaluate(out=tmp_path)
        for changed in (
            {"seed": 1},
            {"num_images": 90},
            {"configurations": [Configuration("base", {"num_inference_steps": 4})]},
        ):
            with pytest.raises(ValueError, match=r"base/00.safetensors: expected images of this evaluation.*delete"):
                evaluate(out=tmp_path, **changed)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("mgt_sampler.evaluation.run.__version__", "9.9.9", "those of other mgt-kernels; delete"),
            ("torch.__version__", "9.9.9", "those of other torch; delete"),
            ("torch.backends.cpu.get_cpu_capability", lambda: "PDP11", "other instruction set of torch; delete"),
        ],
    )
    def test_images_of_another_version_are_not_mixed(
        self, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
    ) -> None:
        settings: Any = {"out": tmp_path, "num_images": 20, "num_groups": 2}
        evaluate(TWO[:1], **settings)
        monkeypatch.setattr(name, value)
        with pytest.raises(ValueError, match=message):
            evaluate(TWO[:1], **settings)

    def test_what_an_image_depends_on(self) -> None:
        model, seeds = load_model(), torch.arange(4)
        plain, quantized = TWO[0], Configuration("w4a16", {"quantization": {"share": 0}})

        def facts(configuration: Configuration, backend: str, weights: str = "") -> dict[str, str]:
            return run._facts(model, configuration, seeds % 2, seeds, weights, backend)

        assert facts(plain, "scalar") == facts(plain, "reference")
        assert facts(quantized, "scalar") != facts(quantized, "reference")
        assert facts(quantized, "auto") == facts(quantized, cpu.kernel_isa("w4a16_linear"))
        digests = {run._digest_of_weights(load_model(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
        assert len(digests) == 2

    def test_a_damaged_file_is_named(self, drawn: list[Any], tmp_path: Path) -> None:
        settings: Any = {"out": tmp_path, "num_images": 20, "num_groups": 2}
        evaluate(TWO[:1], **settings)
        path = tmp_path / "groups" / "base" / "00.safetensors"
        for damaged in (b"", b"\xff" * 100, path.read_bytes()[:-1]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"00.safetensors: expected images that an evaluation kept"):
                evaluate(TWO[:1], **settings)

    def test_a_full_disk_leaves_what_was_there(
        self, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results = evaluate(TWO[:1], num_images=20, num_groups=2)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        names = ["results.csv", "metrics.png"]
        for name in names:
            (tmp_path / name).write_text("old")
        monkeypatch.setattr(os, "fsync", full)
        for save in (run.save_results, save_plots):
            with pytest.raises(OSError, match="No space"):
                save(results, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        assert all((tmp_path / name).read_text() == "old" for name in names)

    def test_other_weights_are_refused(self, drawn: list[Any], tmp_path: Path) -> None:
        evaluate(out=tmp_path)
        model = small_model()
        model.transformer.head.bias.data[0] += 1
        with pytest.raises(ValueError, match="expected images of this evaluation"):
            run.evaluate(model, TWO, num_images=60, num_groups=3, out=tmp_path, progress=False)

    def test_a_quantized_configuration_draws_with_quantized_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawers = []
        generate = sampling.generate
        monkeypatch.setattr(run, "load_classifier", Judge)
        monkeypatch.setattr(run, "load_real_statistics", Judge().statistics)

        def spy(model: Any, **arguments: Any) -> Any:
            drawers.append(model)
            return generate(model, **arguments)

        monkeypatch.setattr(sampling, "generate", spy)
        arguments = {"num_inference_steps": 1}
        quantization = {"share": 1, "include": ["head"], "group_size": 64}
        pair = (
            Configuration("float", arguments),
            Configuration("w4a8", {**arguments, "quantization": quantization}),
        )
        results = evaluate(pair, num_images=20, num_groups=2)
        plain, quantized = (float(result.estimates["weight_bytes"].value) for result in results)
        # 192 x 128 weights: 4 bytes each before, half a byte, and scale and zero point of groups of 64, after
        assert plain - quantized == 192 * 128 * 4 - 192 * 128 // 2 - 3 * 3 * 128 - 4 - 4
        heads = [type(model.transformer.head).__name__ for model in drawers[2:]]
        assert heads == ["Linear", "Int4Linear"] * 2
        assert "weights, MB" in run.results_table(results)
        # and what they cost, in place of model calls
        titles = [ax.get_title() for ax in plots._metrics(results).axes]
        assert {"weights, MB ←", "seconds ←"} <= set(titles) and "calls ←" not in titles
        bad = Configuration("bad", {**arguments, "quantization": {"share": 2}})
        with pytest.raises(ValueError, match="bad: share"):
            evaluate([bad], num_images=20, num_groups=2)

    def test_likelihood_of_real_images(self, drawn: list[Any], tmp_path: Path) -> None:
        images = torch.rand(25, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        validation = (images, torch.arange(25) % 10)
        results = evaluate(num_images=20, num_groups=2, validation=validation, out=tmp_path)
        estimate = results[0].estimates["token_nll"]
        for name in ("nll", "token_nll"):
            assert float(results[0].estimates[name].half_width) > 0, name
        assert float(results[1].estimates["nll_lost"].value) == float(results[1].estimates["nll_lost"].half_width) == 0
        # the same images and the same masks for every configuration
        assert float(estimate.value) == float(results[1].estimates["token_nll"].value)
        nll = masked_token_nll(small_model(), images[:10], validation[1][:10], seed=0, batch_size=7)
        second = masked_token_nll(small_model(), images[10:20], validation[1][10:20], seed=1)
        assert float(estimate.value) == pytest.approx(float((nll.mean() + second.mean()) / 2), rel=1e-4)
        assert "NLL" in run.results_table(results) and "NLL" in run.results_table(results[:1])
        with pytest.raises(ValueError, match="expected images of this evaluation"):
            evaluate(num_images=20, num_groups=2, out=tmp_path)

    def test_bad_arguments(self, drawn: list[Any]) -> None:
        with pytest.raises(ValueError, match="num_groups: an interval needs two at least, got 1"):
            evaluate(num_groups=1)
        with pytest.raises(ValueError, match="num_images, batch_size: expected 1 at least, got 60, 0"):
            evaluate(batch_size=0)
        with pytest.raises(ValueError, match="expected names that make different folders, got 'base!'"):
            evaluate([TWO[0], Configuration("base!", {})])
        for validation in ((torch.zeros(0, 1, 28, 28), torch.zeros(0)), (torch.zeros(2, 1, 28, 28), torch.zeros(2))):
            with pytest.raises(ValueError, match=r"^validation: expected .*, got Tensor of"):
                evaluate(validation=validation)
        with pytest.raises(ValueError, match="configurations: expected one at least, got none"):
            evaluate([])
        with pytest.raises(TypeError, match="num_images: expected an int, got float"):
            evaluate(num_images=60.0)
        # before anything is drawn
        with pytest.raises(ValueError, match="cold: temperature: expected"):
            evaluate([TWO[0], Configuration("cold", {"temperature": -1})])
        assert not drawn


class TestReport:
    def test_tables_and_plots(self, drawn: list[Any], tmp_path: Path) -> None:
        results = evaluate()
        tables, plots = run.save_results(results, tmp_path), save_plots(results, tmp_path)
        rows = {path.name: list(csv.DictReader(path.open())) for path in tables}
        assert [row["name"] for row in rows["results.csv"]] == ["base", "more steps"]
        assert {*run.METRICS, *(f"{name}_interval" for name in run.METRICS)} <= rows["results.csv"][0].keys()
        assert rows["results.csv"][0]["seconds_interval"] == ""
        assert float(rows["results.csv"][1]["model_calls"]) == 6
        assert [row["step"] for row in rows["steps.csv"]] == ["0", "1", "0", "1", "2"]
        assert rows["steps.csv"][0]["divergence"] == "" and float(rows["steps.csv"][1]["divergence"]) == 1
        assert len(rows["classes.csv"]) == 20
        for path in plots:
            image = np.asarray(Image.open(path).convert("L"))
            assert image.std() > 5, path
        assert {path.name for path in plots} == {
            *("metrics.png", "steps.png", "winning_rates.png", "calls.png", "grid.png"),
            *("metrics_base.png", "metrics_more.png"),
        }
        assert len(save_plots(results[:1], tmp_path)) == 5

    def test_the_table_of_a_list(self, drawn: list[Any]) -> None:
        header, base, more = run.results_table(evaluate()).splitlines()
        assert header.startswith("configuration") and "Fréchet" in header
        assert base.startswith("base ") and "±" in base and more.startswith("more steps ")

    def test_the_table_of_one(self, drawn: list[Any]) -> None:
        text = run.results_table(evaluate(TWO[:1]))
        assert "sneaker" in text and "mean" in text and "Fréchet" in text and "win" not in text
        assert len(set(map(len, text.splitlines()[:12]))) == 1


class TestCommands:
    def mgt(self, *args: str) -> Any:
        return CliRunner().invoke(cli.app, [*args], catch_exceptions=False)

    def test_a_list(self, drawn: list[Any], tmp_path: Path) -> None:
        path = tmp_path / "list.toml"
        path.write_text("[[configuration]]\nname = 'a'\n[[configuration]]\nname = 'b'\nnum_inference_steps = 2\n")
        out = tmp_path / "out"
        result = self.mgt("evaluate", str(path), "--out", str(out), "-n", "20", "--groups", "2", "--no-progress")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("configuration") and "winning_rates.png" in result.stdout
        assert len(list(out.glob("*.png"))) == 7 and len(list(out.glob("groups/*/*.safetensors"))) == 4

    def test_every_technique(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # plots are shown elsewhere
        monkeypatch.setattr(plots, "save_plots", lambda results, out: [])
        monkeypatch.setattr(cli, "load_model", lambda name, **_: small_model(32, num_heads=1))
        monkeypatch.setattr(run, "load_classifier", Judge)
        monkeypatch.setattr(run, "load_real_statistics", Judge().statistics)
        path = tmp_path / "list.toml"
        path.write_text(
            """
            [defaults]
            num_inference_steps = 3
            guidance_scale = [1.0, 3.0]
            [[configuration]]
            name = "vanilla"
            [[configuration]]
            name = "all of them"
            noise_scale = "abs_cos:1"
            mask_schedule = "pow0.6"
            momentum = 0.3
            differential = { share = 0.75 }
            z_sampling = { variant = "paper", steps = [1] }
            [[configuration]]
            name = "momentum skip"
            momentum = 0.3
            skip = [1]
            """
        )
        out = tmp_path / "out"
        result = self.mgt("evaluate", str(path), "--out", str(out), "-n", "20", "--groups", "2", "--no-progress")
        assert result.exit_code == 0, result.output
        rows = list(csv.DictReader((out / "results.csv").open()))
        # 1 + 2 + 2, three more for the step of Z-Sampling, two less for the one that is skipped
        assert [float(row["model_calls"]) for row in rows] == [5, 8, 3]
        assert all(float(row["divergence"]) > 0 for row in rows)

    def test_quick(self, drawn: list[Any]) -> None:
        assert self.mgt("evaluate", "--quick", "--no-progress").exit_code == 0
        assert sum(len(call["seed"]) for call in drawn) == 80

    def test_errors(self, drawn: list[Any], tmp_path: Path) -> None:
        result = self.mgt("evaluate", "techniques", "--steps", "3")
        assert result.exit_code == 2 and "--steps: expected in techniques" in result.stderr
        result = self.mgt("evaluate", str(tmp_path / "none.toml"))
        assert result.exit_code == 2 and "none.toml" in result.stderr


def test_too_few_images_are_named() -> None:
    few = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"^features: expected two images at least, got 1"):
        kernel_distance(few, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"^real, features: expected more than 5 and 1 at least, got 4, 1"):
        density_coverage(few, torch.zeros(4, 4))


def test_a_configuration_has_a_name_and_arguments_by_name() -> None:
    for name in ("", 3):
        with pytest.raises(ValueError, match=r"^name: expected a word at least, got"):
            Configuration(name, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^x: expected arguments by name, got \[1\]"):
        Configuration("x", [1])  # type: ignore[arg-type]


class TestStatistics:
    def save(self, path: Path, **changes: Any) -> None:
        tensors = {**vars(Judge().statistics()), **changes}
        write_tensor_file(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, {})

    def test_they_come_back(self, tmp_path: Path) -> None:
        self.save(tmp_path / "s.safetensors")
        loaded = load_real_statistics(tmp_path / "s.safetensors")
        assert torch.equal(loaded.feature_mean, Judge().statistics().feature_mean)

    @pytest.mark.parametrize(
        "changes",
        [
            {"feature_mean": None},
            {"more": torch.zeros(1)},
            {"feature_mean": torch.zeros(3)},
            {"feature_covariance": torch.zeros(16)},
            {"features": torch.zeros(5, 16, dtype=torch.int64)},
            {"accuracy": torch.tensor(math.nan)},
            {"pixel_spread": torch.tensor(0.1)},
        ],
    )
    def test_others_are_named(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        self.save(tmp_path / "s.safetensors", **changes)
        with pytest.raises(ValueError, match=r"s.safetensors: expected finite statistics"):
            load_real_statistics(tmp_path / "s.safetensors")

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        for content in (b"", b"\xff" * 50):
            (tmp_path / "s.safetensors").write_bytes(content)
            with pytest.raises(ValueError, match=r"s.safetensors: truncated, or no safetensors file"):
                load_real_statistics(tmp_path / "s.safetensors")


class TestExact:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"steps": (4,)}, ValueError, "steps: expected divisors of 6, got 4"),
            ({"steps": (1.5,)}, TypeError, "steps: expected an int, got float"),
            ({"num_seeds": 1}, ValueError, "num_seeds: an interval needs two at least, got 1"),
            ({"num_samples": 0}, ValueError, "num_samples: expected 1 at least, got 0"),
            ({"seed": "0"}, TypeError, "seed: expected an int, got str"),
        ],
    )
    def test_bad_arguments(
        self, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        monkeypatch.setattr(sampling, "generate", lambda *_, **__: pytest.fail("worked"))
        with pytest.raises(error, match=f"^{message}"):
            exact.judge_exactly([Configuration("vanilla", {})], progress=False, **arguments)

    def test_one_token_a_step_in_random_order_is_exact(self) -> None:
        techniques = [Configuration("random order", {"temperature": 1e6}), Configuration("vanilla", {})]
        results, noise = exact.judge_exactly(techniques, steps=(1, 6), num_samples=2000, num_seeds=3, progress=False)
        random, vanilla = results
        assert float(random.distances[1].value) < 1.05 * noise < float(vanilla.distances[1].value)
        assert float(random.distances[0].value) > 2 * noise
        text = exact.exact_table(results, noise, (1, 6))
        assert "random order" in text and "±" in text and f"{noise:.3f}" in text

    def test_samplers_of_the_shipped_list(self) -> None:
        chosen = [c for c in load_configurations("exact_samplers") if c.name in ("maskgit", "repulsion entropy")]
        results, noise = exact.judge_exactly(chosen, steps=(3,), num_samples=2000, num_seeds=2, progress=False)
        plain, repulsion = (float(result.distances[0].value) for result in results)
        assert repulsion < plain and repulsion < 1.15 * noise

    def test_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load(name: str) -> list[Configuration]:
            asked.append(name)
            return [Configuration("vanilla", {})]

        monkeypatch.setattr("mgt_sampler.evaluation.configurations.load_configurations", load)
        out = tmp_path / "exact.png"
        args = ["exact", "-n", "50", "--seeds", "2", "--out", str(out), "--no-progress"]
        result = CliRunner().invoke(cli.app, args, catch_exceptions=False)
        assert result.exit_code == 0 and "exact samples" in result.stdout and asked == ["exact"]
        assert np.asarray(Image.open(out).convert("L")).std() > 5
