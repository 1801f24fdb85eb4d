"""Evaluation of sampling configurations: images drawn group by group, kept in a folder, and measured."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from mgt_kernels import __version__, cpu

from .. import sampling
from ..arguments import integer, kind
from ..files import make_folder, whole_file, write_csv
from ..models import FashionClassifier, FashionModel, load_classifier
from ..tables import aligned
from ..techniques import Differential
from .configurations import Configuration
from .drawers import Drawer, TransformerTime, make_drawer, merged
from .intervals import Estimate, jackknife
from .metrics import (
    MASKED_SHARES,
    RealStatistics,
    class_accuracy,
    density_coverage,
    feature_statistics,
    frechet_distance,
    judge,
    kernel_distance,
    load_real_statistics,
    masked_token_nll,
    mean_similarity,
    nll_at_shares,
    pixel_spread,
    token_entropy,
    winning_rate,
)

if TYPE_CHECKING:
    from ..sampling import SamplerStep


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: value times `factor`, with `digits` after the point."""

    label: str
    better: str = ""
    """"higher", "lower", or neither."""

    factor: float = 1.0
    digits: int = 2


METRICS = {
    "accuracy": Metric("accuracy, %", "higher", 100, 1),
    "frechet_distance": Metric("Fréchet", "lower"),
    "kernel_distance": Metric("kernel", "lower", digits=3),
    "density": Metric("density", "higher"),
    "coverage": Metric("coverage", "higher"),
    "spread": Metric("spread, %", "higher", 100, 1),
    "entropy": Metric("entropy, bits", digits=2),
    "unique": Metric("unique, %", "", 100, 1),
    "divergence": Metric("KL, nats", digits=3),
    "model_calls": Metric("calls", "lower", digits=0),
    "seconds": Metric("seconds", "lower", digits=3),
    "weight_bytes": Metric("weights, MB", "lower", 1e-6, 2),
    "token_nll": Metric("NLL, nats", "lower", digits=3),
    "nll": Metric("NLL at shares, nats", "lower", digits=3),
    "nll_lost": Metric("NLL lost, nats", "lower", digits=3),
    "frechet_lost": Metric("Fréchet lost", "lower"),
    "model_flops": Metric("model GFLOP", "lower", 1e-9),
    "transformer_seconds": Metric("transformer, CPU s", "lower", digits=3),
    "others_busy": Metric("others' cores", digits=1),
    "win": Metric("win, %", "higher", 100, 0),
    "tie": Metric("tie, %", "", 100, 0),
    "loss": Metric("loss, %", "lower", 100, 0),
}
STEP_METRICS = {
    "step_entropy": Metric("token entropy, bits"),
    "step_unique": Metric("different tokens, %", factor=100),
    "step_divergence": Metric("KL to the step before, nats"),
}
CLASS_METRICS = {
    "class_accuracy": Metric("accuracy, %", "higher", 100, 1),
    "class_spread": Metric("spread, %", "higher", 100, 1),
}
# of each of MASKED_SHARES
NLL_METRICS = {
    "share_nll": Metric("NLL, nats", "lower", digits=3),
    "share_nll_lost": Metric("NLL lost, nats", "lower", digits=3),
}


def _nan() -> Tensor:
    return _scalar(math.nan)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Group:
    """What is kept of n images of one configuration, one group of seeds: enough to work out every metric."""

    images: Tensor
    """(n, C, H, W) uint8."""

    labels: Tensor
    """(n,) int64, the class asked for."""

    log_prob: Tensor
    """(n, num_classes) float32, the classifier's, in nats."""

    features: Tensor
    """(n, F) float32, the classifier's."""

    step_entropy: Tensor
    """(n, T) float32, of the tokens known after each step, in bits."""

    step_unique: Tensor
    """(n, T) float32, the number of different tokens over N."""

    step_divergence: Tensor
    """(n, T) float32, KL(p_k || p_{k-1}) of a position on average, in nats; NaN where there is none."""

    model_calls: Tensor
    """A float64 scalar, for each image on average."""

    seconds: Tensor
    """A float64 scalar, for each image."""

    weight_bytes: Tensor = field(default_factory=_nan)
    """A float64 scalar, of the transformer; NaN in files from before it was kept."""

    token_nll: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))
    """(n,) float32, see `masked_token_nll`, of n real images; (0,) without any."""

    share_nll: Tensor = field(
        default_factory=lambda: torch.zeros(0, len(MASKED_SHARES), dtype=torch.float32, device="cpu")
    )
    """(n, number of MASKED_SHARES) float32, see `nll_at_shares`, of the same images."""

    model_flops: Tensor = field(default_factory=_nan)
    """A float64 scalar, of the transformer's calls, for each image."""

    transformer_seconds: Tensor = field(default_factory=_nan)
    """A float64 scalar, of the processor in these calls, for each image."""

    others_busy: Tensor = field(default_factory=_nan)
    """A float64 scalar, the cores that other processes kept busy meanwhile, on average."""


@dataclass(frozen=True)
class Result:
    """What was found of one configuration."""

    configuration: Configuration
    num_images: int
    class_names: tuple[str, ...]
    estimates: dict[str, Estimate]
    """Scalars by the names of METRICS, (T,) by STEP_METRICS, (num_classes,) by CLASS_METRICS, one for each of
    MASKED_SHARES by NLL_METRICS."""

    examples: Tensor
    """(num_classes, C, H, W) in [0, 1], the first image of each class; of the same seed in each configuration."""


def evaluate(
    model: FashionModel,
    configurations: Sequence[Configuration],
    *,
    num_images: int = 2000,
    num_groups: int = 10,
    seed: int = 0,
    batch_size: int = 100,
    backend: str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
    classifier: FashionClassifier | None = None,
    real: RealStatistics | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
) -> list[Result]:
    """Draw images of every class under each configuration and measure them.

    Image i has class i % num_classes and the i-th seed of `sample_seeds(seed)`, under every configuration; groups are
    runs of images. What is drawn is kept in `out`, and not drawn again when an interrupted evaluation is repeated. With
    it is kept what an image depends on: configuration, classes, seeds, weights, the versions of this package and of
    PyTorch, the kind of device, the instruction set that PyTorch computes with and, for a quantized transformer, the
    kernels of its layers. Where one of them is another, the evaluation is refused. Batch size, number of threads and
    backend of the draws are not among them: draws do not depend on those, and logits by rounding at most.

    Args:
        model: what draws the images.
        configurations: the first is the baseline of the winning rates.
        num_images: for each configuration, rounded up to as many of each class in each group.
        num_groups: of seeds, over which the intervals are; two at least.
        seed: of all images.
        batch_size: images drawn at once, at least 1.
        backend: as in `generate`.
        out: a folder for what is drawn; None: nothing is kept.
        progress: show a progress bar.
        classifier: the judge; the bundled one by default.
        real: what to compare with; the bundled statistics by default. They belong to the classifier.
        validation: images (M, C, H, W) in [0, 1] and labels (M,) int64, from which each group takes as many as it draws
            to find the likelihood of their masked tokens; None: it is not found.

    Returns:
        A result for each configuration.

    Raises:
        TypeError, ValueError: an argument out of range, a configuration that `generate` refuses, two names that make
            one file name, or a folder with other images; the message names it.
        OSError: the folder cannot be made.
    """
    num_images, num_groups, batch_size = (
        integer(name, value)
        for name, value in (("num_images", num_images), ("num_groups", num_groups), ("batch_size", batch_size))
    )
    if not configurations:
        raise ValueError("configurations: expected one at least, got none")
    if num_groups < 2:
        raise ValueError(f"num_groups: an interval needs two at least, got {num_groups}")
    if min(num_images, batch_size) < 1:
        raise ValueError(f"num_images, batch_size: expected 1 at least, got {num_images}, {batch_size}")
    classifier = classifier or load_classifier(device=model.device)
    real = real or load_real_statistics()
    paths = _paths(configurations, None if out is None else Path(out))
    for configuration in configurations:
        _check(model, configuration, backend, validation is not None)
    if validation is not None:
        _check_validation(*validation)
    for path in paths:
        if path is not None:
            make_folder("out", path)

    group_size = math.ceil(num_images / (num_groups * model.num_classes)) * model.num_classes
    labels = torch.arange(group_size, device="cpu") % model.num_classes
    seeds = sampling.sample_seeds(seed, num_groups * group_size).split(group_size)
    weights = _digest_of_weights(model, classifier)
    if validation is not None:
        weights += _digest_of_tensors(enumerate(validation))
    groups: list[list[Group]] = [[] for _ in configurations]
    # made when the first image is to be drawn with them
    drawers: dict[str, Drawer] = {}
    with tqdm(total=num_groups * group_size * len(configurations), unit="image", disable=not progress) as bar:
        # configurations in turn, so that a machine that slows down slows all of them
        for g in range(num_groups):
            for configuration, folder, done in zip(configurations, paths, groups, strict=True):
                bar.set_description(f"{configuration.name}, group {g + 1} of {num_groups}")
                facts = _facts(model, configuration, labels, seeds[g], weights, backend)
                path = None if folder is None else folder / f"{g:02}.safetensors"
                group = _load(path, facts)
                if group is None:
                    if configuration.name not in drawers:
                        drawers[configuration.name] = make_drawer(model, configuration, seed, backend)
                    drawer = drawers[configuration.name]
                    group = _draw(drawer, configuration, labels, seeds[g], batch_size, backend, classifier)
                    if validation is not None:
                        chosen = torch.arange(g * group_size, (g + 1) * group_size, device="cpu") % len(validation[1])
                        images, real_labels = (tensor[chosen] for tensor in validation)
                        chosen_masks = {"seed": g, "batch_size": batch_size}
                        group = replace(
                            group,
                            token_nll=masked_token_nll(drawer.model, images, real_labels, **chosen_masks),
                            share_nll=nll_at_shares(drawer.model, images, real_labels, **chosen_masks),
                        )
                    _save(group, path, facts)
                    bar.update(group_size)
                else:
                    bar.total -= group_size
                done.append(group)

    results = []
    for configuration, done in zip(configurations, groups, strict=True):
        results.append(
            Result(
                configuration,
                num_groups * group_size,
                model.class_names,
                measure(done, groups[0], real),
                done[0].images[: model.num_classes].float() / 255,
            )
        )
    return results


def measure(groups: Sequence[Group], baseline: Sequence[Group], real: RealStatistics) -> dict[str, Estimate]:
    """Every metric of the images of some groups, with its interval.

    Args:
        groups: of one configuration.
        baseline: of the configuration to win against, the same seeds.
        real: of the classifier that judged the images.

    Returns:
        Estimates by the names of METRICS, STEP_METRICS, CLASS_METRICS and NLL_METRICS.
    """
    # as many real images as generated ones, as coverage wants it
    neighbours = real.features[: max(50, sum(len(group.labels) for group in groups))]

    real_similarity = mean_similarity(real.features)

    def distance(features: Tensor) -> float:
        return frechet_distance(*feature_statistics(features), real.feature_mean, real.feature_covariance)

    def statistic(kept: list[int]) -> dict[str, Tensor]:
        ours, theirs = ({f.name: _pooled(g, kept, f.name) for f in fields(Group)} for g in (groups, baseline))
        features, labels, log_prob = ours["features"], ours["labels"], ours["log_prob"]
        num_classes = log_prob.shape[1]
        accuracy = class_accuracy(log_prob, labels)
        spread = pixel_spread(ours["images"].float() / 255, labels, num_classes=num_classes) / real.pixel_spread
        density, coverage = density_coverage(features, neighbours)
        asked, asked_theirs = (x["log_prob"].gather(1, labels[:, None])[:, 0] for x in (ours, theirs))
        win, tie, loss = winning_rate(asked, asked_theirs)
        steps = {name: ours[name].double().nanmean(0) for name in STEP_METRICS}
        frechet = distance(features)
        lost = ours["share_nll"].double().mean(0) - theirs["share_nll"].double().mean(0)
        scalars = {
            "frechet_distance": frechet,
            "frechet_lost": frechet - distance(theirs["features"]),
            "kernel_distance": kernel_distance(features, real.features, real_similarity=real_similarity),
            "density": density,
            "coverage": coverage,
            "win": win,
            "tie": tie,
            "loss": loss,
        }
        return {
            **{name: _scalar(value) for name, value in scalars.items()},
            "accuracy": accuracy.mean(),
            "spread": spread.mean(),
            "entropy": steps["step_entropy"][-1],
            "unique": steps["step_unique"][-1],
            "divergence": steps["step_divergence"].nanmean(),
            "model_calls": ours["model_calls"].double().mean(),
            "token_nll": ours["token_nll"].double().mean(),
            "nll": ours["share_nll"].double().mean(),
            "nll_lost": lost.mean(),
            "share_nll": ours["share_nll"].double().mean(0),
            "share_nll_lost": lost,
            "class_accuracy": accuracy,
            "class_spread": spread,
            **steps,
        }

    estimates = jackknife(statistic, len(groups))
    # the median forgives a busy machine, but the jackknife of a median tells nothing of its error
    for name in ("seconds", "transformer_seconds", "others_busy", "model_flops"):
        estimates[name] = Estimate(torch.stack([getattr(group, name) for group in groups]).median(), _nan())
    estimates["weight_bytes"] = Estimate(groups[0].weight_bytes, _nan())
    return estimates


def save_results(results: Sequence[Result], out: str | Path) -> list[Path]:
    """Write results.csv, a row for each configuration, steps.csv and classes.csv; return their paths.

    Beside them nll.csv, a row for each share of masked tokens, where their likelihood was found.

    Every metric has a column of its name and one of half its 95 % interval, `<name>_interval`; empty where there is
    none. Shares are 0 to 1, divergences in nats, entropies in bits.

    Raises:
        ValueError: there are no results.
        OSError: a file cannot be written; it is then as before.
    """
    if not results:
        raise ValueError("results: expected one at least, got none")
    Path(out).mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {"results": [], "steps": [], "classes": []}
    for result in results:
        name, estimates = result.configuration.name, result.estimates
        tables["results"].append({"name": name, "num_images": result.num_images, **_cells(estimates, METRICS)})
        for k in range(len(estimates["step_entropy"].value)):
            tables["steps"].append({"name": name, "step": k, **_cells(estimates, STEP_METRICS, k)})
        for c, class_name in enumerate(result.class_names):
            tables["classes"].append({"name": name, "class": class_name, **_cells(estimates, CLASS_METRICS, c)})
        for i, share in enumerate(MASKED_SHARES if not estimates["nll"].value.isnan() else ()):
            tables.setdefault("nll", []).append({"name": name, "masked": share, **_cells(estimates, NLL_METRICS, i)})
    paths = []
    for table, rows in tables.items():
        paths.append(Path(out) / f"{table}.csv")
        write_csv(paths[-1], list(rows[0]), rows)
    return paths


def hidden_metrics(results: Sequence[Result]) -> set[str]:
    """Metrics that say nothing here: the weights where none are quantized, the likelihood where it was not found."""
    hidden = set()
    if all(result.configuration.quantization is None for result in results):
        hidden.add("weight_bytes")
    if not merges(results):
        hidden |= {"model_flops", "transformer_seconds", "others_busy", "frechet_lost"}
    for name in ("token_nll", "nll", "nll_lost"):
        if all(result.estimates[name].value.isnan() for result in results):
            hidden.add(name)
    return hidden


def merges(results: Sequence[Result]) -> bool:
    """Whether any configuration merges tokens, so that a call of the model is not like another."""
    return any(result.configuration.merging is not None for result in results)


def results_table(results: Sequence[Result]) -> str:
    """Lay results out as text: a line for each configuration, or for each class and metric of a single one."""
    if len(results) > 1:
        hidden = hidden_metrics(results)
        metrics = {name: metric for name, metric in METRICS.items() if name not in hidden}
        header = ["configuration", *(metric.label for metric in metrics.values())]
        lines = [[r.configuration.name, *(shown(r.estimates[name], m) for name, m in metrics.items())] for r in results]
        return aligned([header, *lines])
    (result,) = results
    estimates = result.estimates
    header = ["class", *(metric.label for metric in CLASS_METRICS.values())]
    lines = [
        [name, *(shown(estimates[key], metric, c) for key, metric in CLASS_METRICS.items())]
        for c, name in enumerate(result.class_names)
    ]
    lines.append(
        ["mean", shown(estimates["accuracy"], METRICS["accuracy"]), shown(estimates["spread"], METRICS["spread"])]
    )
    # against itself there is nothing to win
    hidden = {"accuracy", "spread", "win", "tie", "loss", "nll_lost", "frechet_lost", *hidden_metrics(results)}
    names = [name for name in METRICS if name not in hidden]
    totals = [[METRICS[name].label, shown(estimates[name], METRICS[name])] for name in names]
    return "\n\n".join([aligned([header, *lines]), aligned([*totals, ["images", f"{result.num_images}"]])])


def shown(estimate: Estimate, metric: Metric, index: int | None = None) -> str:
    """One value with its interval, as text."""
    value, half_width = (
        float(x if index is None else x[index]) * metric.factor for x in (estimate.value, estimate.half_width)
    )
    if math.isnan(value):
        return "-"
    if math.isnan(half_width) or half_width == 0:
        return f"{value:.{metric.digits}f}"
    return f"{value:.{metric.digits}f} ±{half_width:.{metric.digits}f}"


def _draw(
    drawer: Drawer,
    configuration: Configuration,
    labels: Tensor,
    seeds: Tensor,
    batch_size: int,
    backend: str,
    classifier: FashionClassifier,
) -> Group:
    arguments, model = _arguments(configuration, backend), drawer.model
    images, curves, model_calls, seconds = [], [], [], 0.0
    watch = TransformerTime(model.transformer)
    for batch_labels, batch_seeds in zip(labels.split(batch_size), seeds.split(batch_size), strict=True):
        steps: dict[int, Tensor] = {}

        def record(step: SamplerStep, steps: dict[int, Tensor] = steps) -> None:
            # where a step draws more than once, its last draw stays
            steps[step.step] = _curves(step, model.codebook_size).cpu()

        start = time.perf_counter()
        with watch:
            output = sampling.generate(model, labels=batch_labels, seed=batch_seeds, callback=record, **arguments)
            images.append(output.images.cpu())
        seconds += time.perf_counter() - start
        of_steps = [steps[k] for k in sorted(steps)]
        if "rule" in arguments:
            # where all was known before the last step, nothing changes until then
            num_steps = arguments.get("num_inference_steps", arguments["rule"].num_inference_steps)
            of_steps += of_steps[-1:] * (num_steps - len(of_steps))
        curves.append(torch.stack(of_steps, dim=-1))
        model_calls.append(output.sample_calls)
    drawn = torch.cat(images)
    log_prob, features = judge(drawn, classifier)
    entropy, unique, divergence = torch.cat(curves, dim=1)
    calls = torch.cat(model_calls).double().mean()
    return Group(
        images=(drawn * 255).round().to(torch.uint8),
        labels=labels,
        log_prob=log_prob,
        features=features,
        step_entropy=entropy,
        step_unique=unique,
        step_divergence=divergence,
        model_calls=calls,
        seconds=_scalar(seconds / len(labels)),
        weight_bytes=_scalar(
            sum(tensor.numel() * tensor.element_size() for tensor in model.transformer.state_dict().values())
        ),
        model_flops=calls * drawer.flops,
        transformer_seconds=_scalar(watch.seconds / len(labels)),
        others_busy=_scalar(watch.others),
    )


def _curves(step: SamplerStep, codebook_size: int) -> Tensor:
    """Entropy, share of different tokens and mean divergence of each image after a step: (3, B) float32."""
    entropy, unique = token_entropy(step.tokens, codebook_size)
    divergence = torch.full_like(entropy, math.nan)
    if step.divergence is not None:
        # +inf where there is none
        divergence = step.divergence.where(step.divergence.isfinite(), math.nan).nanmean(1)
    return torch.stack([entropy, unique, divergence])


def _arguments(configuration: Configuration, backend: str) -> dict[str, Any]:
    arguments = configuration.generate_arguments()
    if configuration.sampler is None:
        # a share of 0 draws what no differential sampling draws, and tells the divergence
        arguments.setdefault("differential", Differential(share=0.0))
    return {**arguments, "backend": backend, "progress": False}


def _check_validation(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"validation: expected float images (M, C, H, W), got {kind(images)}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"validation: expected int64 labels of shape ({len(images)},), got {kind(labels)}")


def _check(model: FashionModel, configuration: Configuration, backend: str, has_validation: bool) -> None:
    """Let `generate` look at the arguments before hours are spent on the configurations before this one."""
    merging = configuration.merging
    if has_validation and merging is not None and merging.threshold is None and not isinstance(merging.ratio, float):
        raise ValueError(
            f"{configuration.name}: merge: ratio: the likelihood belongs to no step; expected one number, got "
            f"{merging.ratio!r}"
        )
    try:
        merged(model, merging, backend)
        sampling.generate(model, labels=[], **_arguments(configuration, backend))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{configuration.name}: {error}") from error


def _paths(configurations: Sequence[Configuration], out: Path | None) -> Sequence[Path | None]:
    """A folder for each configuration, named after it."""
    names = [re.sub(r"[^\w.]+", "-", configuration.name).strip("-.").lower() for configuration in configurations]
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            raise ValueError(f"name: expected names that make different folders, got {configurations[i].name!r} twice")
    return [None if out is None else out / "groups" / name for name in names]


def _facts(
    model: FashionModel, configuration: Configuration, labels: Tensor, seeds: Tensor, weights: str, backend: str
) -> dict[str, str]:
    """What an image depends on, by name."""
    facts = {
        "configuration": json.dumps(
            dict(configuration.arguments), sort_keys=True, default=lambda value: value.tolist()
        ),
        "classes and seeds": _digest_of_tensors(enumerate([labels, seeds])),
        "weights": weights,
        "mgt-kernels": __version__,
        "torch": torch.__version__,
        "device": model.device.type,
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
    }
    if configuration.quantization is not None:
        # sums of W4A16 layers are rounded in an order of each kernel's own
        isa = backend if backend in ("reference", "triton") else cpu.kernel_isa("w4a16_linear", backend)
        facts["kernels of quantized layers"] = isa if model.device.type == "cpu" else "triton"
    return facts


def _digest_of_weights(*holders: object) -> str:
    networks = (value for holder in holders for value in vars(holder).values() if isinstance(value, nn.Module))
    return _digest_of_tensors(item for network in networks for item in network.state_dict().items())


def _digest_of_tensors(tensors: Iterable[tuple[object, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(path: Path | None, facts: dict[str, str]) -> Group | None:
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            others = [name for name in {**facts, **found} if facts.get(name) != found.get(name)]
            if not others:
                return Group(**{name: file.get_tensor(name) for name in file.keys()})
    except SafetensorError as error:
        raise ValueError(f"{path}: expected images that an evaluation kept, got {error}; delete it") from error
    raise ValueError(
        f"{path}: expected images of this evaluation, got those of other {', '.join(others)}; "
        f"delete {path.parent} to draw them again, or choose another folder"
    )


def _save(group: Group, path: Path | None, facts: dict[str, str]) -> None:
    if path is None:
        return
    with whole_file(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in vars(group).items()}, facts))


def _pooled(groups: Sequence[Group], kept: Sequence[int], name: str) -> Tensor:
    tensors = [getattr(groups[i], name) for i in kept]
    return torch.cat(tensors) if tensors[0].ndim else torch.stack(tensors)


def _cells(estimates: dict[str, Estimate], metrics: dict[str, Metric], index: int | None = None) -> dict[str, Any]:
    def cells() -> Iterator[tuple[str, Any]]:
        for name in metrics:
            estimate = estimates[name]
            for column, tensor in ((name, estimate.value), (f"{name}_interval", estimate.half_width)):
                number = float(tensor if index is None else tensor[index])
                # the table tells of what its metrics are
                yield re.sub("^(step|class|share)_", "", column), "" if math.isnan(number) else repr(number)

    return dict(cells())
