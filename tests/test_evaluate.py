"""The evaluation figures against values worked out by hand or by another route."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from mgt_sampler import evaluate as evaluation
from mgt_sampler.evaluate import (
    class_accuracy,
    evaluate,
    evaluate_model,
    feature_statistics,
    frechet_distance,
    load_real_statistics,
    pixel_spread,
)
from mgt_sampler.models import load_classifier, load_model


def random_gaussian(seed: int, num_features: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    return torch.randn(num_features, generator=generator, dtype=torch.float64), root @ root.T


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


class TestReport:
    def test_noise_is_bad(self) -> None:
        images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        report = evaluate(images, torch.arange(40) % 10)
        assert report.num_images == 40
        assert report.mean_accuracy < 0.4
        assert report.frechet_distance > 10
        assert report.min_spread_ratio <= report.mean_spread_ratio

    def test_bundled_statistics(self) -> None:
        real = load_real_statistics()
        assert real.feature_covariance.shape == (64, 64)
        assert real.feature_mean.dtype == torch.float64
        assert real.accuracy >= 0.91
        assert ((real.pixel_spread > 0.1) & (real.pixel_spread < 0.4)).all()

    def test_table(self) -> None:
        images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        text = str(evaluate(images, torch.arange(40) % 10))
        assert "sneaker" in text and "Fréchet distance" in text and "spread" in text
        assert "sampling" not in text
        assert len(set(map(len, text.splitlines()[:12]))) == 1

    def test_every_class_is_needed(self) -> None:
        with pytest.raises(ValueError, match="two images at least of each of 10 classes"):
            evaluate(torch.rand(4, 1, 28, 28), torch.zeros(4).long())
        with pytest.raises(ValueError, match="two images at least of each of 10 classes"):
            evaluate(torch.rand(22, 1, 28, 28), torch.arange(22) % 11)

    def test_accuracy_is_by_class(self) -> None:
        classifier = load_classifier()
        images = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        predicted = classifier(images).argmax(1)
        accuracy = class_accuracy(images, predicted, classifier)
        assert ((accuracy == 1) | accuracy.isnan()).all()

    def test_feature_statistics(self) -> None:
        classifier = load_classifier()
        images = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        mean, covariance = feature_statistics(images, classifier)
        features = classifier.features(images).double().numpy()
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="two at least, got 1"):
            feature_statistics(images[:1], classifier)


class TestModel:
    def test_generates_and_judges(self) -> None:
        report = evaluate_model(load_model(), num_images=20, num_inference_steps=2, batch_size=8, progress=False)
        assert report.num_images == 20
        assert report.seconds is not None and report.seconds > 0
        assert "images a second" in report.to_table()

    def test_the_batch_size_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(evaluation, "evaluate", lambda images, labels, **_: seen.append(images) or _report())
        for batch_size in (7, 20):
            evaluate_model(load_model(), num_images=20, num_inference_steps=2, batch_size=batch_size, progress=False)
        # how the batch is cut may change the last bits of the logits, and so a token here and there
        assert ((seen[0] - seen[1]).abs() < 1e-3).float().mean() > 0.98

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="num_images: expected 20 at least"):
            evaluate_model(load_model(), num_images=19)
        with pytest.raises(ValueError, match="batch_size: expected 1 at least, got 0"):
            evaluate_model(load_model(), batch_size=0)


def _report() -> evaluation.EvaluationReport:
    return evaluation.EvaluationReport(20, ("bag",), (1.0,), (1.0,), 0.0, 0.9)
