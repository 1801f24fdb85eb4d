"""Train the bundled networks: `python -m mgt_sampler.models.train_fashion --data DIR --out DIR`.

Three stages, each of which writes a safetensors file to --out and resumes from its checkpoint:

    tokenizer     images <-> a 14 x 14 grid of codes
    classifier    the judge of generated images, and the statistics of the real test images
    transformer   masked code prediction; needs the tokenizer

`--stage statistics` writes the statistics of the real test images alone, for the classifier in --out.

Everything random is a function of (--seed, step), so that a run that was stopped and resumed ends with the
very weights of one that was not, on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

from ..files import check_writable, whole_file
from ..tensor_file import write_tensor_file
from .data import load_fashion_mnist, to_float_images
from .fashion import (
    CLASS_NAMES,
    Classifier,
    ClassifierConfig,
    FashionClassifier,
    Tokenizer,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
    load_network,
    save_network,
)

STAGES = ("tokenizer", "classifier", "transformer")

# one label in ten is dropped, which teaches the unconditional prediction that guidance needs
LABEL_DROPOUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """How one stage is optimised: a short warmup, a constant rate, then a linear fall to zero.

    AdamW moves the parameters; where `muon_rate` is given, Muon moves the matrices of blocks, at that rate.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay_share: float
    ema_decay: float
    muon_rate: float | None = None

    def schedule(self, step: int) -> float:
        """Share of the full learning rate at a step, 0 to num_steps - 1.

        The constant part does not depend on num_steps, so that a run can be resumed with another num_steps
        for as long as it has not begun to decay.
        """
        warmup = (step + 1) / self.warmup_steps
        decay = (self.num_steps - step) / (self.decay_share * self.num_steps)
        return min(1.0, warmup, decay)


RECIPES = {
    "tokenizer": Recipe(2500, 64, 2e-3, 0.0, 100, 0.5, 0.99),
    "classifier": Recipe(3300, 128, 2e-3, 0.05, 200, 0.8, 0.99),
    "transformer": Recipe(3200, 64, 1.5e-3, 0.05, 100, 0.5, 0.998, muon_rate=4e-3),
}


def batch_indices(num_items: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the items of a step's batch: epochs of a fresh order each, as a function of (seed, step)."""
    batch_size = min(batch_size, num_items)
    epoch, position = divmod(step, num_items // batch_size)
    return _epoch_order(num_items, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _epoch_order(num_items: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_items, generator=_generator(seed, 0, epoch))


def _generator(seed: int, stream: int, step: int) -> torch.Generator:
    # streams: 0 the order of the data, 1 what a step draws; the generator sees no more than 32 bits of its seed,
    # so the odd multiplier keeps runs apart
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + stream * 2**31 + step) % 2**32)


def train(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    recipe: Recipe,
    *,
    name: str,
    checkpoint_path: Path,
    checkpoint_every: int,
    stop_at: int | None = None,
) -> nn.Module | None:
    """Train a network, or go on from its checkpoint.

    Args:
        network: trained in place.
        loss_at: the loss of a step, a scalar; it may update buffers of the network.
        recipe: the optimiser's settings.
        name: shown by the progress bar.
        checkpoint_path: where the state is kept, and read from if there.
        checkpoint_every: steps between two checkpoints.
        stop_at: stop, with a checkpoint, before this step.

    Returns:
        The network with the exponential moving average of its weights, in evaluation mode; None if it stopped
        before the end.
    """
    optimizers = _optimizers(network, recipe)
    full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = copy.deepcopy(network).requires_grad_(False).eval()
    first_step = 0
    if checkpoint_path.is_file():
        state = torch.load(checkpoint_path, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        first_step = state["step"]
    last_step = recipe.num_steps if stop_at is None else min(stop_at, recipe.num_steps)
    network.train()
    steps = range(first_step, last_step)
    progress = tqdm(steps, desc=name, initial=first_step, total=recipe.num_steps, mininterval=5)
    for step in progress:
        loss = loss_at(step)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, rates in zip(optimizers, full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * recipe.schedule(step)
            optimizer.step()
        # early weights are forgotten sooner, or a short run would average in its own beginning
        _update_average(average, network, min(recipe.ema_decay, (step + 1) / (step + 10)))
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % checkpoint_every == 0 or step + 1 == last_step:
            _save_checkpoint(checkpoint_path, network, average, optimizers, step + 1)
    return average if last_step == recipe.num_steps else None


def _optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    tables = {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    # embedding tables, biases and gains set a scale of their own: decay would only pull them to zero
    free: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or parameter in tables:
            free.append(parameter)
        elif recipe.muon_rate is not None and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    if recipe.muon_rate is None:
        return [adamw]
    # its steps are as long as AdamW's at the same rate, whatever the shape of the matrix
    muon = torch.optim.Muon(hidden, recipe.muon_rate, recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    source = network.state_dict()
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(source[name], 1 - decay)
        else:
            tensor.copy_(source[name])


def _save_checkpoint(
    path: Path, network: nn.Module, average: nn.Module, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    with whole_file(path) as file:
        torch.save(state, file)


def tokenizer_loss(tokenizer: Tokenizer, images: Tensor, generator: torch.Generator, *, revive: bool) -> Tensor:
    """Reconstruction and commitment loss of a batch; moves the codebook towards what was assigned to it.

        loss = mean |x - y| + 4 mean (x - y)^2 + mean (z - e)^2 / 4

    Args:
        tokenizer: its codebook is updated in place.
        images: (B, 1, H, W) float in [0, 1].
        generator: picks the vectors that unused codes are moved to.
        revive: whether unused codes are moved.

    Returns:
        The loss, a scalar.
    """
    with torch.autocast("cpu", torch.bfloat16):
        z = tokenizer.encoder(images)
    z = z.float().permute(0, 2, 3, 1)
    codes = tokenizer.nearest_codes(z.detach())
    quantized = tokenizer.codebook[codes]
    # straight through: the decoder sees codes, the encoder gets their gradient
    passed = z + (quantized - z).detach()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction = tokenizer.decoder(passed.permute(0, 3, 1, 2))
    error = reconstruction.float() - images
    commitment = F.mse_loss(z, quantized)
    _update_codebook(tokenizer, z.detach().flatten(0, 2), codes.flatten(), generator, revive)
    return error.abs().mean() + 4 * error.square().mean() + 0.25 * commitment


@torch.no_grad()
def _update_codebook(
    tokenizer: Tokenizer, vectors: Tensor, codes: Tensor, generator: torch.Generator, revive: bool
) -> None:
    codebook, usage, code_sum = tokenizer.codebook, tokenizer.code_usage, tokenizer.code_sum
    usage.lerp_(torch.bincount(codes, minlength=len(codebook)).float(), 0.01)
    code_sum.lerp_(torch.zeros_like(code_sum).index_add_(0, codes, vectors), 0.01)
    if revive:
        unused = (usage < 0.5).nonzero().flatten()
        chosen = torch.randint(len(vectors), (len(unused),), generator=generator)
        usage[unused] = 1.0
        code_sum[unused] = vectors[chosen]
    codebook.copy_(code_sum / usage.clamp(min=1e-3).unsqueeze(1))


def transformer_loss(transformer: Transformer, tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of the masked positions, in nats.

    The share of masked positions is cos(pi r / 2), r ~ U(0, 1), at least one position; which ones is uniform.

    Args:
        transformer: predicts the codes.
        tokens: (B, N) int64.
        labels: (B,) int64; one in ten is replaced by "none".
        generator: draws r, the positions and the dropped labels.

    Returns:
        The mean over all masked positions of the batch, a scalar.
    """
    batch, num_tokens = tokens.shape
    ratio = torch.cos(torch.rand(batch, 1, generator=generator) * (math.pi / 2))
    num_masked = (ratio * num_tokens).ceil().clamp(1, num_tokens)
    masked = torch.rand(batch, num_tokens, generator=generator).argsort(1).argsort(1) < num_masked
    dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    condition = labels.masked_fill(dropped, transformer.config.num_classes)
    with torch.autocast("cpu", torch.bfloat16):
        logits = transformer(tokens.masked_fill(masked, transformer.config.codebook_size), condition)
    return F.cross_entropy(logits[masked].float(), tokens[masked])


def classifier_loss(classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy, label smoothing 0.1, in nats, of images shifted by up to 2 pixels, half mirrored.

    Args:
        classifier: in training mode.
        images: (B, 1, 28, 28) float in [0, 1].
        labels: (B,) int64.
        generator: draws the shift of the batch and the mirrored images.

    Returns:
        The mean over the batch, a scalar.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, right = torch.randint(5, (2,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2))[:, :, down : down + 28, right : right + 28]
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(images)
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def tokenizer_stage(images: Tensor, recipe: Recipe, seed: int) -> tuple[Tokenizer, Callable[[int], Tensor]]:
    """Make an untrained tokenizer and its loss by step, for images (num_images, 28, 28) uint8."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig())

    def loss_at(step: int) -> Tensor:
        batch = to_float_images(images[batch_indices(len(images), recipe.batch_size, seed, step)])
        # no code jumps while the rate falls, so that encoder, decoder and codebook settle together
        revive = step < (1 - recipe.decay_share) * recipe.num_steps
        return tokenizer_loss(tokenizer, batch, _generator(seed, 1, step), revive=revive)

    return tokenizer, loss_at


def classifier_stage(
    images: Tensor, labels: Tensor, recipe: Recipe, seed: int
) -> tuple[Classifier, Callable[[int], Tensor]]:
    """Make an untrained classifier and its loss by step, for images (num_images, 28, 28) uint8."""
    torch.manual_seed(seed)
    # convolutions and their norms are half as fast in torch's default layout
    classifier = Classifier(ClassifierConfig())
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_at(step: int) -> Tensor:
        chosen = batch_indices(len(images), recipe.batch_size, seed, step)
        generator = _generator(seed, 1, step)
        return classifier_loss(classifier, to_float_images(images[chosen]), labels[chosen], generator)

    return classifier, loss_at


def transformer_stage(
    tokens: Tensor, labels: Tensor, recipe: Recipe, seed: int
) -> tuple[Transformer, Callable[[int], Tensor]]:
    """Make an untrained transformer and its loss by step, for tokens (num_images, N) int64, labels int64."""
    torch.manual_seed(seed)
    transformer = Transformer(TransformerConfig())

    def loss_at(step: int) -> Tensor:
        chosen = batch_indices(len(tokens), recipe.batch_size, seed, step)
        return transformer_loss(transformer, tokens[chosen], labels[chosen], _generator(seed, 1, step))

    return transformer, loss_at


def encode_images(tokenizer: Tokenizer, images: Tensor, batch_size: int = 500) -> Tensor:
    """Turn images, (num_images, 28, 28) uint8, into tokens, (num_images, N) int64."""
    with torch.no_grad():
        parts = tqdm(images.split(batch_size), desc="encode")
        return torch.cat([tokenizer.encode(to_float_images(part)) for part in parts])


def real_statistics(classifier: FashionClassifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What `mgt evaluate` compares generated images with, of real images.

    Args:
        classifier: gives the features.
        images: (num_images, 28, 28) uint8.
        labels: (num_images,) int64.

    Returns:
        feature_mean (F,) and feature_covariance (F, F), float64; features (M, F), float16, of the first M / 10 images
        of every class, the classes in turn, M at most 2,000; pixel_spread (num_classes,), float32; accuracy, a
        float32 scalar: the share that the classifier recognises.
    """
    from ..evaluation.metrics import class_accuracy, feature_statistics, judge, pixel_spread

    float_images = to_float_images(images)
    log_prob, features = judge(float_images, classifier)
    mean, covariance = feature_statistics(features)
    num_classes = len(CLASS_NAMES)
    num_each = min(200, int(torch.bincount(labels, minlength=num_classes).min()))
    # the classes in turn, so that the first rows are a balanced choice too
    chosen = torch.stack([(labels == c).nonzero().flatten()[:num_each] for c in range(num_classes)], dim=1)
    return {
        "feature_mean": mean,
        "feature_covariance": covariance,
        "features": features[chosen.flatten()].half(),
        "pixel_spread": pixel_spread(float_images, labels, num_classes=num_classes).float(),
        "accuracy": class_accuracy(log_prob, labels).mean().float(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m mgt_sampler.models.train_fashion", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with the IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the safetensors files")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints (default: OUT/checkpoints)")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--stage", choices=(*STAGES, "statistics", "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument("--stop-at", type=int, help="stop before this step, to be resumed later")
    options = parser.parse_args(arguments)

    stages = STAGES if options.stage == "all" else (options.stage,)
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable("--out", options.out / "statistics.safetensors")
    if options.stage == "statistics":
        _save_statistics(options.data, options.out)
        return
    images, labels = load_fashion_mnist(options.data, "train")
    for stage in stages:
        recipe = RECIPES[stage]
        if options.steps is not None:
            recipe = replace(recipe, num_steps=options.steps)
        network: nn.Module
        if stage == "tokenizer":
            network, loss_at = tokenizer_stage(images, recipe, options.seed)
        elif stage == "classifier":
            network, loss_at = classifier_stage(images, labels, recipe, options.seed)
        else:
            # the tokenizer as it ships, in float16, so that training and sampling speak of the same codes
            tokenizer = load_network(Tokenizer, options.out / "tokenizer.safetensors")
            tokens = encode_images(tokenizer, images)
            network, loss_at = transformer_stage(tokens, labels, recipe, options.seed)
        average = train(
            network,
            loss_at,
            recipe,
            name=stage,
            checkpoint_path=(options.checkpoints or options.out / "checkpoints") / f"{stage}.pt",
            checkpoint_every=options.checkpoint_every,
            stop_at=options.stop_at,
        )
        if average is None:
            return
        save_network(average, options.out / f"{stage}.safetensors")
        if stage == "classifier":
            _save_statistics(options.data, options.out)


def _save_statistics(data: Path, out: Path) -> None:
    judge = FashionClassifier(load_network(Classifier, out / "classifier.safetensors"))
    write_tensor_file(out / "statistics.safetensors", real_statistics(judge, *load_fashion_mnist(data, "test")), {})


if __name__ == "__main__":
    main()
