"""Metrics of generated images as plain functions; features are those of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..calibration import masked_nll_of_samples
from ..models import FashionClassifier, FashionModel
from ..models.fashion import WEIGHTS_DIR
from ..tensor_file import read_tensor_file

_BATCH_SIZE = 500
# of an image's tokens: a quarter, a half and three quarters of them are to be guessed
MASKED_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class RealStatistics:
    """What generated images are compared with, of real images that no network was trained on."""

    feature_mean: Tensor
    """(F,) float64, mean of the classifier's features."""

    feature_covariance: Tensor
    """(F, F) float64, their covariance."""

    features: Tensor
    """(M, F) float32, the features of some of the images, of each class in turn."""

    pixel_spread: Tensor
    """(num_classes,) float32, see `pixel_spread`."""

    accuracy: Tensor
    """Share of the real images that the classifier recognises, a float32 scalar."""


def load_real_statistics(path: str | Path = WEIGHTS_DIR / "statistics.safetensors") -> RealStatistics:
    """Load the bundled statistics of the 10,000 real test images, so that the data set need not be at hand.

    Args:
        path: a file that `python -m mgt_sampler.models.train_fashion --stage statistics` wrote.

    Returns:
        The statistics.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, or holds something else.
    """
    file = read_tensor_file(path)
    tensors = file.tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    (size,), (num_classes,) = (shapes.get(name, ())[:1] or (0,) for name in ("feature_mean", "pixel_spread"))
    expected = {
        "feature_mean": (size,),
        "feature_covariance": (size, size),
        "features": (*shapes.get("features", ())[:1], size),
        "pixel_spread": (num_classes,),
        "accuracy": (),
    }
    floating = all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values())
    if shapes != expected or not floating:
        file.refuse(f"expected finite statistics of real images, of shapes {expected}, got {shapes}")
    return RealStatistics(**{**tensors, "features": tensors["features"].float()})


def class_accuracy(log_prob: Tensor, labels: Tensor) -> Tensor:
    """Share of the images of each class that a classifier takes for that class.

    Args:
        log_prob: (num_images, num_classes), the classifier's log-probabilities or logits.
        labels: (num_images,) int64, the class asked for.

    Returns:
        (num_classes,) float64 in [0, 1]; NaN for a class without images.
    """
    hits = (log_prob.argmax(1) == labels).double()
    return torch.stack([hits[labels == label].mean() for label in range(log_prob.shape[1])])


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
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (num_images, C, H, W), got {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({images.shape[0]},), got {tuple(labels.shape)}")
    spreads = []
    for label in range(num_classes):
        chosen = images[labels == label].double()
        # the unbiased variance, so that few images do not look less diverse than many
        variance = (
            chosen.var(0).mean()
            if len(chosen) > 1
            else torch.full((), torch.nan, dtype=torch.float64, device=images.device)
        )
        spreads.append(variance.sqrt())
    return torch.stack(spreads)


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F), float64, of features (num_images, F).

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"features: a covariance needs two images at least, got {len(features)}")
    return features.double().mean(0), torch.cov(features.double().T)


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


def kernel_distance(features: Tensor, real: Tensor, *, real_similarity: float | None = None) -> float:
    """Kernel distance ("KID"): the unbiased squared maximum mean discrepancy under k(x, y) = (x.y / F + 1)^3.

        d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Args:
        features: x, (n, F), two at least.
        real: y, (m, F), two at least.
        real_similarity: `mean_similarity(real)`, where it is known.

    Returns:
        The distance: 0 in expectation where both have one distribution, so it may be negative. Source:
        arXiv 1801.01401, section 4.
    """
    if real_similarity is None:
        real_similarity = mean_similarity(real)
    return mean_similarity(features) + real_similarity - 2 * float(_kernel(features, real).mean())


def mean_similarity(features: Tensor) -> float:
    """The kernel of `kernel_distance` of two different images, on average."""
    if len(features) < 2:
        raise ValueError(f"features: expected two images at least, got {len(features)}")
    values = _kernel(features, features)
    return float((values.sum() - values.trace()) / (len(values) * (len(values) - 1)))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def density_coverage(features: Tensor, real: Tensor, num_neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage: do generated images lie where real ones do, and everywhere that they do?

    With r_i the distance of real image i to its k-th nearest other real image:

        density = 1 / (k n) sum_{i, j} [|y_j - x_i| <= r_i]        coverage = 1 / m sum_i [any j: |y_j - x_i| <= r_i]

    Args:
        features: y, (n, F), of generated images; as many as of real ones where coverage shall be able to reach 1.
        real: x, (m, F), more than k.
        num_neighbours: k.

    Returns:
        Density, 0 or more, 1 for real images on average; coverage, 0 to 1. Source: arXiv 2002.09797, section 3.
    """
    if len(real) <= num_neighbours or len(features) == 0:
        raise ValueError(
            f"real, features: expected more than {num_neighbours} and 1 at least, got {len(real)}, {len(features)}"
        )
    x, y = real.double(), features.double()
    # the nearest is the image itself
    radius = torch.cdist(x, x).kthvalue(num_neighbours + 1, dim=1).values
    inside = torch.cdist(x, y) <= radius[:, None]
    return float(inside.sum()) / (num_neighbours * len(y)), float(inside.any(1).double().mean())


def token_entropy(tokens: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Entropy of an image's histogram of tokens in bits, and the number of different ones over N.

    Args:
        tokens: (n, N) int64, 0 to codebook_size - 1.
        codebook_size: V.

    Returns:
        Entropy, 0 to log2(min(N, V)), and share, 0 to 1: (n,) float32 each.
    """
    counts = torch.zeros(len(tokens), codebook_size, dtype=torch.float32, device=tokens.device)
    counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counts.dtype))
    share = counts / tokens.shape[1]
    # xlogy is 0 at 0, unlike the product
    entropy = -torch.xlogy(share, share).sum(1) / math.log(2)
    return entropy, (counts > 0).sum(1).float() / tokens.shape[1]


def winning_rate(log_prob: Tensor, baseline: Tensor, *, tie: float = 0.01) -> tuple[float, float, float]:
    """Shares of the prompts won, tied and lost against a baseline.

    Args:
        log_prob: (n,) in nats, the judge's log-probability of what was asked for, for each prompt.
        baseline: (n,), that of the baseline for the same prompts.
        tie: closer than this is a tie.

    Returns:
        Win, tie and loss, 0 to 1, together 1.
    """
    difference = (log_prob - baseline).double()
    win, loss = (difference >= tie).double().mean(), (difference <= -tie).double().mean()
    return float(win), float(1 - win - loss), float(loss)


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a network to images (num_images, ...) some hundred at a time; the result is on the CPU."""
    return torch.cat([function(part).cpu() for part in images.split(_BATCH_SIZE)])


@torch.no_grad()
def masked_token_nll(
    model: FashionModel, images: Tensor, labels: Tensor, *, seed: int = 0, batch_size: int = 100
) -> Tensor:
    r"""Negative log-likelihood of masked tokens of real images, as in training.

    For image i with tokens t, u_i uniform in [0, 1) and M_i of ceil(cos(pi u_i / 2) N) positions at random::

        nll_i = -1 / |M_i| sum_{n in M_i} log p(t_n | the tokens not in M_i, label)

    Args:
        model: with `encode`.
        images: (num_images, C, H, W) in [0, 1].
        labels: (num_images,) int64.
        seed: of shares and positions.
        batch_size: images at once.

    Returns:
        (num_images,) float32, in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    cpu: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    shares = torch.cos(torch.rand(len(images), 1, **cpu) * (torch.pi / 2))
    num_masked = (shares * model.num_tokens).ceil().clamp(1, model.num_tokens)
    order = torch.rand(len(images), model.num_tokens, **cpu).argsort(1).argsort(1)
    losses = [torch.zeros(0, dtype=torch.float32, device="cpu")]
    batches = (x.split(batch_size) for x in (images, labels, order < num_masked))
    for batch, batch_labels, masked in zip(*batches, strict=True):
        tokens, masked = model.encode(batch), masked.to(model.device)
        logits = model.predict_logits(tokens.masked_fill(masked, model.mask_token_id), batch_labels.to(model.device))
        loss = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        losses.append(((loss * masked).sum(1) / masked.sum(1)).cpu())
    return torch.cat(losses)


def nll_at_shares(
    model: FashionModel, images: Tensor, labels: Tensor, *, seed: int = 0, batch_size: int = 100
) -> Tensor:
    """Negative log-likelihood of masked tokens of real images, at each of MASKED_SHARES.

    The masks are those of `calibration.masked_nll`: every image has one order of its positions, whose last ones are
    masked, so that a larger share masks what a smaller one does and more.

    Args:
        model: with `encode`.
        images: (num_images, C, H, W) in [0, 1].
        labels: (num_images,) int64.
        seed: of the orders.
        batch_size: images at once.

    Returns:
        (num_images, number of shares) float32, in nats, on the CPU.
    """
    tokens = torch.cat([model.encode(part) for part in images.split(batch_size)])
    labels = labels.to(model.device)
    nll = [
        masked_nll_of_samples(
            model,
            tokens,
            model.num_tokens - round(share * model.num_tokens),
            labels=labels,
            batch_size=batch_size,
            seed=seed,
        )
        for share in MASKED_SHARES
    ]
    return torch.stack(nll, dim=1).float()


def judge(images: Tensor, classifier: FashionClassifier) -> tuple[Tensor, Tensor]:
    """Class log-probabilities in nats (num_images, num_classes) and features (num_images, F) of images in [0, 1]."""
    log_prob = in_batches(classifier, images).log_softmax(1)
    return log_prob, in_batches(classifier.features, images)
