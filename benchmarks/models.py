"""The models whose shapes the ops are timed at: what one step of each samples from, and its linear layers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    """What a step of a model at B=1 samples from."""

    name: str
    num_positions: int
    codebook_size: int
    # None: no classifier-free guidance. Show-o and LLaDA count from the conditional half: theirs is ours minus 1
    guidance_scale: float | None
    dtype: torch.dtype = torch.float32
    # columns of the logits of which the codebook is a part; None: all of them
    vocab_size: int | None = None


@dataclass(frozen=True)
class Layer:
    """A linear layer: as many rows as an image or an answer has tokens."""

    name: str
    num_rows: int
    num_inputs: int
    num_outputs: int


AMUSED_256 = Model("aMUSEd 256", 256, 8192, 10.0)
AMUSED_512 = Model("aMUSEd 512", 1024, 8192, 10.0)
MEISSONIC_512 = Model("Meissonic 512", 1024, 8192, 9.0)
MEISSONIC_1024 = Model("Meissonic 1024", 4096, 8192, 9.0)
MASKGIT_256 = Model("MaskGIT 256", 256, 1024, None)
MASKGIT_512 = Model("MaskGIT 512", 1024, 1024, None)
# 256 tokens, and its super-resolution's 64 x 64
MUSE_256 = Model("Muse 256", 256, 8192, 3.0)
MUSE_512 = Model("Muse 512", 4096, 8192, 3.0)
# an answer of 128 tokens
LLADA = Model("LLaDA", 128, 126464, None, torch.bfloat16)
SHOW_O_256 = Model("Show-o 256", 256, 8192, 6.0, vocab_size=58498)
SHOW_O_512 = Model("Show-o 512", 1024, 8192, 6.0, vocab_size=58498)

MODELS = (
    AMUSED_256, AMUSED_512, MEISSONIC_512, MEISSONIC_1024, MASKGIT_256, MASKGIT_512, MUSE_256, MUSE_512, LLADA,
    SHOW_O_256, SHOW_O_512,
)  # fmt: skip

# what samplers of text and speech draw from at once: a canvas, a block, an answer of Qwen's vocabulary as the next are,
# and ten seconds of one of eight codebooks, whose last token is the mask
DIFFUSION_GEMMA = Model("DiffusionGemma", 256, 262144, None)
LLADA2 = Model("LLaDA2", 32, 157184, None)
DREAM = Model("Dream", 512, 151936, None)
SDAR_4 = Model("SDAR", 4, 151936, None)
SDAR_8 = Model("SDAR", 8, 151936, None)
OMNIVOICE = Model("OmniVoice", 250, 1025, 3.0)

# 1024 tokens of the image and 77 of the text
MEISSONIC_UP = Layer("Meissonic MLP", 1101, 1024, 4096)
MEISSONIC_DOWN = Layer("Meissonic MLP", 1101, 4096, 1024)
LAYERS = (
    MEISSONIC_UP,
    MEISSONIC_DOWN,
    # 256 tokens and the class
    Layer("MaskGIT MLP", 257, 768, 3072),
    Layer("MaskGIT MLP", 257, 3072, 768),
    # 128 of the prompt and 128 of the answer
    Layer("LLaDA MLP", 256, 4096, 12288),
    Layer("LLaDA MLP", 256, 12288, 4096),
    # 256 of the image, 128 of the text, 3 that frame them
    Layer("Show-o MLP", 387, 2048, 8192),
    Layer("Show-o MLP", 387, 8192, 2048),
)
