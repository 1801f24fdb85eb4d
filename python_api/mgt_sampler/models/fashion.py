"""A small masked generative transformer of Fashion-MNIST: its networks, their files and the model object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..tensor_file import read_tensor_file, write_tensor_file

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
WEIGHTS_DIR = Path(__file__).parent / "fashion"


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer."""

    image_size: int = 28
    codebook_size: int = 128
    code_dim: int = 8
    width: int = 64

    def __post_init__(self) -> None:
        """Check that codes of 2 x 2 pixels fill an image."""
        if self.image_size < 2 or self.image_size % 2:
            raise ValueError(f"image_size: expected an even number of pixels, got {self.image_size}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the other sizes follow from."""
        return {"codebook": (self.codebook_size, self.code_dim), "encoder.0.weight": (self.width, 1, 4, 4)}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; `num_classes` does not count the unconditional row."""

    grid_size: int = 14
    codebook_size: int = 128
    num_classes: int = 10
    width: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        """Check that the heads share the width evenly."""
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of the width {self.width}, got {self.num_heads}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the other sizes follow from."""
        return {
            "token_embedding.weight": (self.codebook_size + 1, self.width),
            "position_embedding": (self.grid_size**2, self.width),
            "blocks.0.mlp_in.weight": (self.mlp_ratio * self.width, self.width),
            "blocks.0.modulation.weight": (self.num_classes + 1, 4 * self.width),
        }


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier that judges generated images."""

    num_classes: int = 10
    width: int = 32
    num_features: int = 64

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the other sizes follow from."""
        return {"body.0.weight": (self.width, 1, 3, 3), "head.weight": (self.num_classes, self.num_features)}


class _ResidualConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.gelu(self.conv_in(F.gelu(x))))


class Tokenizer(nn.Module):
    """Turn images into a grid of codes and back: a convolutional autoencoder with a learned codebook.

    The code of a position is the codebook row nearest to the encoder's output z: argmin_j |z - e_j|^2. One
    code stands for 2 x 2 pixels; the decoder sees many codes around each pixel, so that an odd one makes no
    speckle.
    """

    codebook: Tensor
    code_usage: Tensor
    code_sum: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.config = config
        width, code_dim = config.width, config.code_dim
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, width, 3, padding=1),
            _ResidualConv(width),
            _ResidualConv(width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.GELU(),
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, 1, 3, padding=1),
        )
        # the codebook follows running means of what is assigned to each code, not gradients
        self.register_buffer("codebook", torch.randn(config.codebook_size, code_dim))
        self.register_buffer("code_usage", torch.zeros(config.codebook_size))
        self.register_buffer("code_sum", torch.zeros(config.codebook_size, code_dim))

    def nearest_codes(self, z: Tensor) -> Tensor:
        """Find the nearest code of each vector: z (..., code_dim) float to int64 (...)."""
        distances = self.codebook.square().sum(1) - 2 * z @ self.codebook.T
        return distances.argmin(-1)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images (B, 1, H, W) in [0, 1] into tokens, int64 (B, H/2 * W/2), row by row."""
        return self.nearest_codes(self.encoder(images).permute(0, 2, 3, 1)).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens, int64 (B, N), into images, float32 (B, 1, H, W) in [0, 1]."""
        side = self.config.image_size // 2
        z = self.codebook[tokens].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return self.decoder(z).float().clamp(0, 1)


class _Block(nn.Module):
    """Attention and an MLP, each after a norm that the class modulates: x + f(scale * norm(x) + shift)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, config.mlp_ratio * width)
        self.mlp_out = nn.Linear(config.mlp_ratio * width, width)
        # a table in place of adaLN's MLP: with so few classes the modulation itself can be learned
        self.modulation = nn.Embedding(config.num_classes + 1, 4 * width)
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():
            # scales start at one, shifts at zero
            self.modulation.weight.view(-1, 4, width)[:, [0, 2]] = 1
            for layer in (self.attention_out, self.mlp_out):
                layer.weight.div_((2 * config.num_layers) ** 0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        batch, _, width = x.shape
        scale_a, shift_a, scale_m, shift_m = self.modulation(condition)[:, None].chunk(4, dim=-1)
        h = torch.addcmul(shift_a, F.layer_norm(x, (width,)), scale_a)
        # as many tokens as come out of the layer: token merging leaves some out
        q, k, v = self.qkv(h).view(batch, -1, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        h = self._attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention_out(h)
        h = torch.addcmul(shift_m, F.layer_norm(x, (width,)), scale_m)
        return x + self.mlp_out(F.relu(self.mlp_in(h)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.training:
            return F.scaled_dot_product_attention(q, k, v)
        # torch's fused attention has a backward pass that takes three times as long as this on a CPU
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return weights.to(v.dtype) @ v


class Transformer(nn.Module):
    """Predict the codes of masked positions from the known ones and a class, seeing the whole grid."""

    def __init__(self, config: TransformerConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.config = config
        # the last row is the mask token
        self.token_embedding = nn.Embedding(config.codebook_size + 1, config.width)
        self.position_embedding = nn.Parameter(torch.randn(config.grid_size**2, config.width) * 0.02)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        # looks at the eight neighbours, which saves the first layers from having to find them
        self.neighbours = nn.Conv2d(config.width, config.width, 3, padding=1, groups=config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.codebook_size)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Predict logits.

        Args:
            tokens: int64 (B, N), codes or the mask token (= codebook_size).
            condition: int64 (B,), a class, or num_classes for none.

        Returns:
            Logits in nats, (B, N, codebook_size): no column for the mask token.
        """
        return self.head(self.hidden(tokens, condition))

    def hidden(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Hidden states, (B, N, width), of which the head makes logits; arguments as for `forward`."""
        side = self.config.grid_size
        x = self.token_embedding(tokens) + self.position_embedding
        grid = x.transpose(1, 2).unflatten(2, (side, side))
        x = x + self.neighbours(grid).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, condition)
        return self.norm(x)


class Classifier(nn.Module):
    """A small convolutional network that names the garment; its last hidden layer is the feature space."""

    def __init__(self, config: ClassifierConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.config = config
        width = config.width
        layers: list[nn.Module] = []
        channels = 1
        for num_convs, out_channels in ((2, width), (2, 2 * width), (2, 3 * width)):
            for _ in range(num_convs):
                layers += [
                    nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(9 * channels, config.num_features), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(config.num_features, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features of images (B, 1, 28, 28) in [0, 1]: (B, num_features), not negative."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits in nats, (B, num_classes), of images (B, 1, 28, 28) in [0, 1]."""
        return self.head(self.body(images))


_Network = TypeVar("_Network", bound=nn.Module)
_CONFIGS: dict[type[nn.Module], type] = {
    Tokenizer: TokenizerConfig,
    Transformer: TransformerConfig,
    Classifier: ClassifierConfig,
}


def save_network(network: nn.Module, path: str | Path) -> None:
    """Write a network to a safetensors file: weights as float16, sizes, class names and a checksum in the header."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    metadata = {
        "network": type(network).__name__,
        "config": json.dumps(asdict(network.config)),  # type: ignore[call-overload]
        "class_names": json.dumps(CLASS_NAMES),
    }
    write_tensor_file(path, tensors, metadata)


def load_network(kind: type[_Network], path: str | Path) -> _Network:
    """Rebuild a network from a file that `save_network` wrote.

    Args:
        kind: the class of the network: Tokenizer, Transformer or Classifier.
        path: the safetensors file.

    Returns:
        The network on the CPU, in float32 and evaluation mode, needing no gradients.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, or holds another kind of network; the message names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; mgt_sampler.models.train_fashion makes them")
    file = read_tensor_file(path)
    if file.metadata.get("network") != kind.__name__:
        file.refuse(f"expected the weights of a {kind.__name__}, got {file.metadata.get('network')!r:.100}")
    config_type = _CONFIGS[kind]
    sizes = file.facts("config", {field.name: int for field in fields(config_type)})
    for name, value in sizes.items():
        if value < 1 or (name == "num_layers" and value > len(file.tensors)):
            file.refuse(f"damaged: config: {name}: {value} is out of range")
    try:
        config = config_type(**sizes)
    except ValueError as error:
        file.refuse(f"damaged: config: {error}")
    # before a network of that size is made
    for name, shape in config.shapes.items():
        if name not in file.tensors or file.tensors[name].shape != shape:
            found = tuple(file.tensors[name].shape) if name in file.tensors else "none"
            file.refuse(f"damaged: {name}: expected shape {shape} by its config, got {found}")
    network = kind(config)
    expected = network.state_dict()
    if file.tensors.keys() != expected.keys():
        names = ", ".join(sorted(file.tensors.keys() ^ expected.keys()))
        file.refuse(f"damaged: it lacks {names[:1000]}, or should not have them")
    state = {}
    for name, tensor in file.tensors.items():
        is_float = expected[name].is_floating_point()
        dtype, shape = torch.float16 if is_float else expected[name].dtype, expected[name].shape
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            file.refuse(f"damaged: {name}: expected {dtype} {tuple(shape)}, got {found}")
        state[name] = tensor.float() if is_float else tensor
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


class FashionModel:
    """A masked generative model of 28 x 28 images of clothes by class, in 196 tokens; a `MaskedModel`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Hold the two networks on `device`: the transformer in `dtype`, the tokenizer in float32."""
        config = transformer.config
        if tokenizer.config.codebook_size != config.codebook_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.config.codebook_size} codes, "
                f"but the transformer predicts {config.codebook_size}"
            )
        if tokenizer.config.image_size != 2 * config.grid_size:
            raise ValueError(
                f"the tokenizer makes images of {tokenizer.config.image_size} pixels a side, expected two for each of "
                f"the transformer's {config.grid_size} tokens"
            )
        self.tokenizer = tokenizer.to(device)
        self.transformer = transformer.to(device, dtype)
        self.device = torch.device(device)
        self.grid_size = (config.grid_size, config.grid_size)
        self.num_tokens = config.grid_size**2
        self.codebook_size = config.codebook_size
        self.mask_token_id = config.codebook_size
        self.num_classes = config.num_classes
        self.class_names = CLASS_NAMES[: config.num_classes]

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> FashionModel:
        """Load tokenizer.safetensors and transformer.safetensors; options as for the constructor."""
        folder = Path(folder)
        tokenizer = load_network(Tokenizer, folder / "tokenizer.safetensors")
        return cls(tokenizer, load_network(Transformer, folder / "transformer.safetensors"), **options)

    @torch.no_grad()
    def predict_logits(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the logits of every position.

        Args:
            tokens: (B, N) int64: codes 0 to codebook_size - 1, or mask_token_id.
            condition: (B,) int64 classes, 0 to num_classes - 1; None: no class is asked for.

        Returns:
            (B, N, codebook_size) logits in nats, in the model's dtype; the mask token has no column.

        Raises:
            ValueError: tokens or condition of the wrong shape, or out of range.
        """
        return self.transformer(*self._inputs(tokens, condition))

    @torch.no_grad()
    def predict_hidden(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the hidden states of every position, (B, N, width), of which `head` makes logits.

        Arguments and errors are those of `predict_logits`.
        """
        return self.transformer.hidden(*self._inputs(tokens, condition))

    @property
    def head(self) -> nn.Module:
        """The last layer."""
        return self.transformer.head

    def _inputs(self, tokens: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check_tokens(tokens, self.mask_token_id)
        if condition is None:
            condition = torch.full((tokens.shape[0],), self.num_classes, device=self.device)
        else:
            if condition.shape != tokens.shape[:1]:
                raise ValueError(
                    f"condition: expected shape ({tokens.shape[0]},), one class a sample; got {tuple(condition.shape)}"
                )
            _check_range("condition", condition, self.num_classes - 1)
        return tokens.to(self.device).long(), condition.to(self.device).long()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Turn images, (B, 1, 28, 28) float in [0, 1], into tokens, (B, N) int64."""
        return self.tokenizer.encode(images.to(self.device).float())

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens into images.

        Args:
            tokens: (B, N) int64, 0 to codebook_size - 1: none may be masked.

        Returns:
            (B, 1, 28, 28) float32 in [0, 1]; 0 is black, the background.

        Raises:
            ValueError: tokens of the wrong shape, or out of range.
        """
        self._check_tokens(tokens, self.codebook_size - 1)
        return self.tokenizer.decode(tokens.to(self.device).long())

    def _check_tokens(self, tokens: Tensor, largest: int) -> None:
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise ValueError(f"tokens: expected shape (B, {self.num_tokens}), got {tuple(tokens.shape)}")
        _check_range("tokens", tokens, largest)


def _check_range(name: str, values: Tensor, largest: int) -> None:
    if values.numel() and not (0 <= int(values.min()) and int(values.max()) <= largest):
        raise ValueError(f"{name}: expected 0 to {largest}, got {int(values.min())} to {int(values.max())}")


class FashionClassifier:
    """Names the garment in an image: a judge of generated images, with features for the Fréchet distance."""

    def __init__(self, network: Classifier, *, device: str | torch.device = "cpu") -> None:
        """Hold the network on `device`, in float32."""
        # twice as fast on a CPU as torch's default layout
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = torch.device(device)
        self.num_classes = network.config.num_classes
        self.num_features = network.config.num_features
        self.class_names = CLASS_NAMES[: self.num_classes]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Class logits in nats, (B, num_classes), of images (B, 1, 28, 28) in [0, 1]."""
        return self.network(images.to(self.device).float())

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features, (B, num_features) float32, of images (B, 1, 28, 28) in [0, 1]."""
        return self.network.features(images.to(self.device).float())
