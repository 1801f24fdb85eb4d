"""Stand-ins for image models that are on no package registry, with tiny random weights.

Each class lies below the original's where an environment variable names a checkout of the project (MGT_TITOK,
MGT_OPEN_MUSE, MGT_MASKBIT), and below a stand-in with the same name, path and signature elsewhere. Only `forward` is of
our own writing either way.
"""

import importlib
import os
import sys
import types
from importlib.util import find_spec

import torch
from tiny import find_clients, stand_in


def module(name, folder, *stand_ins):
    """The module of this dotted path: with its top package in a folder, whose own code is not run, or of stand-ins."""
    if name in sys.modules:
        return sys.modules[name]
    top, *parents, _ = name.split(".")
    for i in range(len(parents) + 1):
        package = ".".join([top, *parents[:i]])
        stand_in(package)
        if folder and not sys.modules[package].__path__:
            sys.modules[package].__path__.append(os.path.join(folder, *parents[:i]))
    if folder:
        return importlib.import_module(name)
    stand_in(name)
    for each in stand_ins:
        each.__module__ = name
        setattr(sys.modules[name], each.__name__, each)
    return sys.modules[name]


def checkout(variable, *folders):
    """The folder of a checkout that an environment variable names, or None."""
    found = os.environ.get(variable)
    if found:
        find_clients()
        if not find_spec("einops"):
            # which sampling does not need
            stand_in("einops", "rearrange")
            stand_in("einops.layers")
            stand_in("einops.layers.torch", "Rearrange")
        stand_in("modeling")
        stand_in("modeling.modules")
        if not hasattr(sys.modules["modeling.modules"], "BaseModel"):
            sys.modules["modeling.modules"].BaseModel = torch.nn.Module
    return found and os.path.join(found, *folders)


class Network(torch.nn.Module):
    """Logits (B, N, V) of tokens (B, N), where the mask is V, and of a vector of what is asked for.

    Attributes:
        given: the tokens of each call.
        wanted: (N,), the only tokens that are likely, or None.
        sure: (N,), by how much likelier they are than the token after them, or None.
    """

    codebook_size, num_positions = 16, 32

    def __init__(self, sharpness=1.0, num_positions=None):
        torch.nn.Module.__init__(self)
        self.num_positions = num_positions or self.num_positions
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = torch.nn.Embedding(self.codebook_size + 1, 16)
            self.places = torch.nn.Embedding(self.num_positions, 16)
            self.labels = torch.nn.Embedding(1001, 16)
            self.head = torch.nn.Linear(16, self.codebook_size)
        self.sharpness, self.given, self.wanted, self.sure = sharpness, [], None, None

    def logits(self, ids, asked):
        self.given.append(ids.clone())
        if self.wanted is not None:
            found = torch.full((*ids.shape, self.codebook_size), -1e4)
            if self.sure is not None:
                found[:, torch.arange(ids.shape[1]), (self.wanted + 1) % self.codebook_size] = 0.0
            found[:, torch.arange(ids.shape[1]), self.wanted] = 0.0 if self.sure is None else self.sure
            return found
        x = self.tokens(ids)
        x = x + x.mean(1, keepdim=True) + self.places.weight
        return self.sharpness * self.head(x + asked[:, None])


def below(original, network, **options):
    """A network of a class that is the original's too; the class is in this module, where pickle finds it."""
    name = f"Tiny{original.__name__}"
    if name not in globals():
        globals()[name] = type(name, (network, original), {"__module__": __name__})
    return globals()[name](**options).eval()


class TiTokNetwork(Network):
    """What both of TiTok's generators have."""

    mask_token_id = Network.codebook_size

    @property
    def image_seq_len(self):
        return self.num_positions

    def forward(self, input_ids=None, condition=None, cond_drop_prob=0.1):
        dropped = torch.rand_like(condition, dtype=torch.float) < cond_drop_prob
        return self.logits(input_ids, self.labels(condition.masked_fill(dropped, 1000)))


class ImageBert(torch.nn.Module):
    """A stand-in for the class of this name."""

    def generate(
        self, condition, guidance_scale=3.0, guidance_decay="constant", guidance_scale_pow=3.0,
        randomize_temperature=4.5, softmax_temperature_annealing=False, num_sample_steps=8,
    ):  # fmt: skip
        return "the original"


class UViTBert(ImageBert):
    """A stand-in for the class of this name."""


def titok_folder():
    """Where 1d-tokenizer's modules are, or None; what they import but sampling does not need has stand-ins."""
    folder = checkout("MGT_TITOK", "modeling")
    if folder:
        base = module("modeling.modules.base_model", folder).BaseModel
        sys.modules["modeling.modules"].BaseModel = base
        stand_in("modeling.modules.losses", "DiffLoss")
        stand_in("modeling.quantizer", "DiagonalGaussianDistribution")
        stand_in("omegaconf", "OmegaConf")
        stand_in("open_clip")
        stand_in("open_clip.transformer", "text_global_pool")
    return folder


def titok_model(kind="ImageBert", **options):
    """TiTok's `ImageBert` or `UViTBert`: 32 positions, 16 tokens."""
    found = module("modeling.maskgit", titok_folder(), ImageBert, UViTBert)
    return below(getattr(found, kind), TiTokNetwork, **options)


class MaskGenNetwork(Network):
    """What `MaskGen_VQ` has."""

    mask_token_id, mask_schedule_strategy, sample_aesthetic_score = Network.codebook_size, "arccos", 6.0
    image_seq_len = TiTokNetwork.image_seq_len

    def forward(self, input_tokens, condition, condition_pooled, aesthetic_score=None):
        self.aesthetic_score = aesthetic_score
        return self.logits(input_tokens, condition.mean(1) + condition_pooled[:, 0]), None


class MaskGen_VQ(torch.nn.Module):  # noqa: N801 (the name that it has)
    """A stand-in for the class of this name."""

    def generate(
        self, captions, guidance_scale=12.0, randomize_temperature=1.5, sample_aesthetic_score=None,
        softmax_temperature_annealing=True, num_sample_steps=16, guidance_decay="cosine",
        guidance_decay_scale_pow=1.0, clip_tokenizer=None, clip_encoder=None, prob_sorting=True,
    ):  # fmt: skip
        return "the original"


def encode_letters(tokenizer, encoder, captions):
    """Texts as (B, 1, 16) and pooled (B, 1, 16), of their first letter and their length."""
    generators = [torch.Generator().manual_seed(ord(text[0]) if text else 0) for text in captions]
    states = torch.stack([torch.randn(1, 16, generator=each) for each in generators])
    return states, states.flip(-1) * torch.tensor([len(text) / 10 for text in captions])[:, None, None]


def maskgen_model(**options):
    """`MaskGen_VQ`: 32 positions, 16 tokens; its text encoder looks at the first letter."""
    found = module("modeling.maskgen", titok_folder(), MaskGen_VQ)
    found.open_clip_text_encoding = encode_letters
    return below(found.MaskGen_VQ, MaskGenNetwork, **options)


class MuseNetwork(Network):
    """What both of open-muse's transformers have."""

    device = torch.device("cpu")

    @property
    def config(self):
        size = self.codebook_size
        return types.SimpleNamespace(mask_token_id=size, codebook_size=size, num_vq_tokens=self.num_positions)


class SecondMuseNetwork(MuseNetwork):
    """`MaskGiTUViT_v2`."""

    def forward(self, input_ids, encoder_hidden_states, cond_embeds, micro_conds):
        self.asked = encoder_hidden_states, cond_embeds, micro_conds
        logits = self.logits(input_ids, encoder_hidden_states.mean(1) + cond_embeds + micro_conds[:, :1] / 1000)
        # more tokens than the codebook has, as with its embeddings; they are likely
        return torch.cat([logits, logits[..., :3] + 5], dim=-1)


class FirstMuseNetwork(MuseNetwork):
    """`MaskGitTransformer`."""

    def forward(self, input_ids, encoder_hidden_states=None):
        asked = torch.zeros(len(input_ids), 16)
        with_class = input_ids.shape[1] > self.num_positions
        if with_class:
            asked, input_ids = self.labels(input_ids[:, 0] - self.codebook_size), input_ids[:, 1:]
        if encoder_hidden_states is not None:
            asked = asked + encoder_hidden_states.mean(1)
        logits = self.logits(input_ids, asked)
        logits = torch.cat([logits, logits[..., :3] + 5], dim=-1)
        return torch.cat([logits[:, :1], logits], dim=1) if with_class else logits


def cosine_schedule(t):
    return torch.cos(t * torch.pi / 2)


class MaskGiTUViT_v2(torch.nn.Module):  # noqa: N801 (the name that it has)
    """A stand-in for the class of this name."""

    def generate2(
        self, encoder_hidden_states, cond_embeds, micro_conds, empty_embeds, empty_cond_embeds, input_ids=None,
        negative_embeds=None, negative_cond_embeds=None, temperature=1.0, timesteps=18, guidance_scale=0,
        guidance_schedule=None, noise_schedule=cosine_schedule, generator=None, return_intermediate=False, seq_len=None,
        use_tqdm=None, topk_filter_thres=None, noise_type=None, predict_all_tokens=None,
    ):  # fmt: skip
        return "the original"


class MaskGitTransformer(torch.nn.Module):
    """A stand-in for the class of this name."""

    def generate2(
        self, input_ids=None, class_ids=None, encoder_hidden_states=None, negative_embeds=None, temperature=1.0,
        timesteps=18, guidance_scale=0, noise_schedule=cosine_schedule, generator=None, **kwargs,
    ):  # fmt: skip
        return "the original"


def muse_model(kind="MaskGiTUViT_v2", **options):
    """open-muse's `MaskGiTUViT_v2` or `MaskGitTransformer`: 32 positions, 16 tokens, logits of 19."""
    folder = checkout("MGT_OPEN_MUSE", "muse")
    if folder:
        stand_in("muse")
        sys.modules["muse"].__version__ = "0"
    second = kind == "MaskGiTUViT_v2"
    name = "muse.modeling_transformer_v2" if second else "muse.modeling_transformer"
    found = module(name, folder, MaskGiTUViT_v2 if second else MaskGitTransformer)
    return below(getattr(found, kind), SecondMuseNetwork if second else FirstMuseNetwork, **options)


class MaskBitNetwork(Network):
    """What both of MaskBit's generators have: 16 groups of bits, each in two parts of four bits."""

    device, splits = torch.device("cpu"), 2

    def forward(self, img_tokens, class_labels, drop_label_mask=None):
        # as the original, which writes to the caller's tensor
        class_labels[drop_label_mask] = 1000
        logits = self.logits(img_tokens.flatten(1), self.labels(class_labels))
        return logits.view(*img_tokens.shape, -1)


class LFQBert(torch.nn.Module):
    """A stand-in for the class of this name."""


class Bert(torch.nn.Module):
    """A stand-in for the class of this name."""


def maskbit_model(kind="LFQBert", **options):
    """MaskBit's `LFQBert` or `Bert`: 16 positions of 2 x 4 bits, whose tokens are the decoder's images."""
    found = module("maskbit.modeling.bert", checkout("MGT_MASKBIT"), LFQBert, Bert)
    return below(getattr(found, kind), MaskBitNetwork, **options)


class Decoder(torch.nn.Module):
    """A tokenizer of images, which are their tokens here."""

    def decode_tokens(self, tokens):
        assert tokens.dtype == torch.float32
        return tokens


def maskbit_sample():
    """MaskBit's own function `sample`, or None without a checkout."""
    folder = checkout("MGT_MASKBIT")
    return folder and module("maskbit.modeling.modules.sampling", folder).sample
