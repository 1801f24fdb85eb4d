"""How good generated images are: class accuracy, spread within each class, Fréchet distance to real ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from .models import FashionClassifier, FashionModel, load_classifier
from .models.fashion import WEIGHTS_DIR

if TYPE_CHECKING:
    from .schedules import ValueSchedule

_BATCH_SIZE = 500


@dataclass(frozen=True)
class RealStatistics:
    """What generated images are compared with, of real images that no network was trained on."""

    feature_mean: Tensor
    """(F,) float64, mean of the classifier's features."""

    feature_covariance: Tensor
    """(F, F) float64, their covariance."""

    pixel_spread: Tensor
    """(num_classes,) float32, see `pixel_spread`."""

    accuracy: Tensor
    """Share of the real images that the classifier recognises, a float32 scalar."""


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` found; each tuple has one entry a class."""

    num_images: int
    class_names: tuple[str, ...]
    accuracy: tuple[float, ...]
    """Share of the images that the classifier takes for the class asked for, 0 to 1."""

    spread_ratio: tuple[float, ...]
    """Pixel spread within the class, divided by that of real images; 1 is as diverse as real ones."""

    frechet_distance: float
    """To real test images, in the classifier's features; 0 is best."""

    real_accuracy: float
    """Share of real test images that the classifier recognises: the yardstick of `accuracy`."""

    seconds: float | None = None
    """Time the sampling took, where it was done here."""

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy` over the classes."""
        return sum(self.accuracy) / len(self.accuracy)

    @property
    def mean_spread_ratio(self) -> float:
        """Mean of `spread_ratio` over the classes."""
        return sum(self.spread_ratio) / len(self.spread_ratio)

    @property
    def min_spread_ratio(self) -> float:
        """Smallest `spread_ratio` of a class."""
        return min(self.spread_ratio)

    def to_table(self) -> str:
        """Lay the report out as a table, one line a class."""
        width = max(len(name) for name in (*self.class_names, "class"))
        lines = [f"{'class':<{width}}  accuracy  spread"]
        for name, accuracy, ratio in zip(self.class_names, self.accuracy, self.spread_ratio, strict=True):
            lines.append(f"{name:<{width}}  {accuracy:>8.1%}  {ratio:>6.1%}")
        lines.append(f"{'mean':<{width}}  {self.mean_accuracy:>8.1%}  {self.mean_spread_ratio:>6.1%}")
        lines += [
            "",
            f"Fréchet distance  {self.frechet_distance:.2f}  (classifier features, to real test images)",
            f"smallest spread   {self.min_spread_ratio:.1%}  (of the spread of real images of the class)",
            f"real images       {self.real_accuracy:.1%}  recognised by the same classifier",
            f"images            {self.num_images}",
        ]
        if self.seconds is not None:
            rate = self.num_images / self.seconds
            lines.append(f"sampling          {self.seconds:.1f} s, {rate:.1f} images a second")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The same as `to_table`."""
        return self.to_table()


def class_accuracy(images: Tensor, labels: Tensor, classifier: FashionClassifier) -> Tensor:
    """Share of the images of each class that a classifier recognises as that class.

    Args:
        images: (num_images, 1, H, W) float in [0, 1].
        labels: (num_images,) int64, the class asked for.
        classifier: judges the images.

    Returns:
        (num_classes,) float64 in [0, 1]; NaN for a class without images.

    Raises:
        ValueError: shapes that do not match.
    """
    _check_images(images, labels)
    predicted = _in_batches(classifier, images).argmax(1)
    hits = (predicted == labels.cpu()).double()
    return torch.stack([hits[labels.cpu() == label].mean() for label in range(classifier.num_classes)])


def pixel_spread(images: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """How much the images of each class differ from one another.

        spread_c = sqrt(mean over pixels of (variance over the images of class c))

    Args:
        images: (num_images, C, H, W) float in [0, 1].
        labels: (num_images,) int64.
        num_classes: labels are 0 to num_classes - 1.

    Returns:
        (num_classes,) float64, 0 or more, in units of brightness; NaN for a class of fewer than two images.

    Raises:
        ValueError: shapes that do not match.
    """
    _check_images(images, labels)
    spreads = []
    for label in range(num_classes):
        chosen = images[labels == label].double().cpu()
        # the unbiased variance, so that few images do not look less diverse than many
        variance = chosen.var(0).mean() if len(chosen) > 1 else chosen.new_tensor(torch.nan).cpu()
        spreads.append(variance.sqrt())
    return torch.stack(spreads)


def feature_statistics(images: Tensor, classifier: FashionClassifier) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a classifier's features.

    Args:
        images: (num_images, 1, H, W) float in [0, 1], two at least.
        classifier: gives F features an image.

    Returns:
        Mean (F,) and unbiased covariance (F, F), float64.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"images: a covariance needs two at least, got {len(images)}")
    features = _in_batches(classifier.features, images).double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Fréchet distance between two Gaussians, the "FID" of whatever features they are of.

        d = |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    Args:
        mean_a: (F,).
        covariance_a: (F, F), positive semidefinite.
        mean_b: (F,).
        covariance_b: (F, F), positive semidefinite.

    Returns:
        The distance, 0 or more; computed in float64. Source: arXiv 1706.08500, equation 6.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        x.double().cpu() for x in (mean_a, covariance_a, mean_b, covariance_b)
    )
    # the eigenvalues of the product are not negative, and their roots add up to the trace of its root
    eigenvalues = torch.linalg.eigvals(covariance_a @ covariance_b).real.clamp(min=0)
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace()
    return max(0.0, float(distance - 2 * eigenvalues.sqrt().sum()))


def load_real_statistics(path: str | Path = WEIGHTS_DIR / "statistics.safetensors") -> RealStatistics:
    """Load the bundled statistics of the 10,000 real test images, so that the data set need not be at hand.

    Args:
        path: a file that `mgt_sampler.models.train_fashion` wrote.

    Returns:
        The statistics.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return RealStatistics(**load_file(path))


def evaluate(
    images: Tensor,
    labels: Tensor,
    *,
    classifier: FashionClassifier | None = None,
    real: RealStatistics | None = None,
) -> EvaluationReport:
    """Judge images that were generated for given classes.

    Args:
        images: (num_images, 1, 28, 28) float in [0, 1]; some hundred a class give steady figures.
        labels: (num_images,) int64, the class asked for.
        classifier: the judge; the bundled one by default.
        real: what to compare with; the bundled statistics by default. They belong to the classifier.

    Returns:
        The report.

    Raises:
        ValueError: shapes that do not match, labels out of range, or fewer than two images of a class.
    """
    _check_images(images, labels)
    classifier = classifier or load_classifier()
    real = real or load_real_statistics()
    counts = torch.bincount(labels.cpu(), minlength=classifier.num_classes)
    if len(counts) > classifier.num_classes or int(counts.min()) < 2:
        raise ValueError(
            f"labels: expected two images at least of each of {classifier.num_classes} classes, got {counts.tolist()}"
        )
    mean, covariance = feature_statistics(images, classifier)
    spread = pixel_spread(images, labels, num_classes=classifier.num_classes)
    return EvaluationReport(
        num_images=len(images),
        class_names=classifier.class_names,
        accuracy=tuple(class_accuracy(images, labels, classifier).tolist()),
        spread_ratio=tuple((spread / real.pixel_spread).tolist()),
        frechet_distance=frechet_distance(mean, covariance, real.feature_mean, real.feature_covariance),
        real_accuracy=float(real.accuracy),
    )


def evaluate_model(
    model: FashionModel,
    *,
    num_images: int = 2000,
    num_inference_steps: int = 12,
    guidance_scale: ValueSchedule = (1.0, 3.0),
    temperature: ValueSchedule = (8.0, 0.0),
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = True,
    classifier: FashionClassifier | None = None,
    real: RealStatistics | None = None,
    **sampling: Any,
) -> EvaluationReport:
    """Generate images of every class in turn and judge them.

    Args:
        model: what draws the images.
        num_images: how many in all; image i is asked for as class i % num_classes.
        num_inference_steps: model calls an image, as in `generate`.
        guidance_scale: a number or a schedule, as in `generate`.
        temperature: of the confidences, likewise.
        seed: gives each image a seed of its own, so that `batch_size` does not change the images.
        batch_size: images drawn at once.
        progress: whether a progress bar is shown.
        classifier: the judge; the bundled one by default.
        real: what to compare with; the bundled statistics by default.
        sampling: further arguments of `generate`, such as `mask_schedule` and `noise_scale`.

    Returns:
        The report, with the seconds that the sampling took.

    Raises:
        ValueError: fewer than two images a class, or a batch size below 1.
    """
    # here and not above, so that images from elsewhere can be judged without the sampler's kernels
    from .sampling import generate, sample_seeds

    if num_images < 2 * model.num_classes:
        raise ValueError(f"num_images: expected {2 * model.num_classes} at least, two of each class; got {num_images}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 at least, got {batch_size}")
    labels = torch.arange(num_images) % model.num_classes
    seeds = sample_seeds(seed, num_images)
    batches = []
    start = time.perf_counter()
    for first in tqdm(range(0, num_images, batch_size), desc="sampling", disable=not progress):
        generated = generate(
            model,
            labels=labels[first : first + batch_size],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            seed=seeds[first : first + batch_size],
            progress=False,
            **sampling,
        )
        batches.append(generated.images.cpu())
    seconds = time.perf_counter() - start
    report = evaluate(torch.cat(batches), labels, classifier=classifier, real=real)
    return replace(report, seconds=seconds)


def _check_images(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (num_images, C, H, W), got {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({images.shape[0]},), got {tuple(labels.shape)}")


def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(part).cpu() for part in images.split(_BATCH_SIZE)])
