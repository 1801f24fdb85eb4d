"""Models of other projects with tiny random weights, and a stand-in for one that is on no package registry."""

import json
import os
import sys
import types

import torch

from mgt_benchmarks.client_packages import FOLDER as CLIENTS
from mgt_benchmarks.client_packages import find_clients, muse_package, omnivoice_module, stand_in

__all__ = ["CLIENTS", "find_clients", "stand_in"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return 2 * torch.randn(shape, generator=seeded(seed))


def amused_parts():
    """All of an aMUSEd pipeline but its scheduler: mask token 31, codebook of 8, images of 16 x 16."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.UVit2DModel(
            hidden_size=8, cond_embed_dim=8, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=8,
            vocab_size=32, codebook_size=8, in_channels=8, block_out_channels=8, num_res_blocks=1, downsample=True,
            upsample=True, block_num_heads=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
            sample_size=32,
        ).eval()  # fmt: skip
        vqvae = diffusers.VQModel(
            act_fn="silu", block_out_channels=[8], down_block_types=["DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"], in_channels=3, out_channels=3, latent_channels=8, layers_per_block=1,
            norm_num_groups=8, num_vq_embeddings=8, sample_size=32, mid_block_add_attention=False,
            lookup_from_codebook=True,
        ).eval()  # fmt: skip
    return {"vqvae": vqvae, "tokenizer": None, "text_encoder": None, "transformer": transformer}


def amused_pipeline(folder):
    """All of it: with a tokenizer of letters, which has its files in `folder`, and a text encoder."""
    import diffusers
    import transformers

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=8, bos_token_id=start, eos_token_id=end, pad_token_id=end,
        initializer_factor=20.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = transformers.CLIPTextModelWithProjection(config).eval()
    parts = {**amused_parts(), "tokenizer": tokenizer, "text_encoder": text_encoder}
    return diffusers.AmusedPipeline(scheduler=diffusers.AmusedScheduler(mask_token_id=31), **parts)


LLADA2_MASK = 39


def llada2_pipeline():
    """LLaDA2's pipeline with a network of one layer: blocks of 8 tokens, in 4 steps."""
    import diffusers
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=LLADA2_MASK + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64, initializer_range=0.5,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config).eval()
        # as a model that was trained: the mask is no answer
        torch.nn.init.constant_(model.cls.predictions.bias[LLADA2_MASK], -1e4)
    scheduler = diffusers.BlockRefinementScheduler(block_length=8, num_inference_steps=4)
    pipe = diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusion_gemma():
    """DiffusionGemma of two layers: 64 tokens, canvases of 8."""
    import transformers

    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, global_head_dim=16, sliding_window=8, max_position_embeddings=128,
        num_experts=2, top_k_experts=1, moe_intermediate_size=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=8, image_token_id=60, boi_token_id=61, eoi_token_id=62
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
        # sharp enough that steps differ
        torch.nn.init.normal_(model.model.decoder.embed_tokens.weight, std=1.0)
    return model


class _Letters:
    """A tokenizer of bytes."""

    def __call__(self, text, **options):
        ids = torch.tensor([[ord(letter) % 64 for letter in text]])
        return types.SimpleNamespace(input_ids=ids if options.get("return_tensors") else ids[0].tolist())


def omnivoice_model(num_codebooks=4, vocab_size=33):
    """OmniVoice on a Qwen3 of one layer; the mask is its last token."""
    omnivoice = omnivoice_module()
    from transformers import Qwen3Config

    llm = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = omnivoice.OmniVoice(
            omnivoice.OmniVoiceConfig(
                audio_vocab_size=vocab_size,
                audio_mask_id=vocab_size - 1,
                num_audio_codebook=num_codebooks,
                audio_codebook_weights=[1] * num_codebooks,
                llm_config=llm,
            )
        ).eval()
        # sharp enough that steps differ
        torch.nn.init.normal_(model.audio_heads.weight, std=0.5)
    model.text_tokenizer = _Letters()
    return model


def omnivoice_tokens(model, seed=0, lengths=(7, 12), **options):
    """Generate tokens [(C, T)] for as many texts as there are lengths."""
    omnivoice = omnivoice_module()
    count = len(lengths)
    task = omnivoice.GenerationTask(
        batch_size=count, texts=["a text", "another one"][:count], target_lens=list(lengths), langs=[None] * count,
        instructs=[None] * count, ref_texts=[None] * count, ref_audio_tokens=[None] * count,
        ref_rms=[None] * count,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        return model._generate_iterative(task, omnivoice.OmniVoiceGenerationConfig(**{"num_step": 6, **options}))


class _Embedding(torch.nn.Module):
    """A text encoder, one embedding for each letter."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 32)

    def forward(self, input_ids, attention_mask):
        return types.SimpleNamespace(last_hidden_state=self.embedding(input_ids))


class _LettersOfTexts:
    """Its tokenizer."""

    def batch_encode_plus(self, texts, **options):
        length = max(map(len, texts))
        ids = torch.tensor([[ord(letter) % 255 + 1 for letter in text.ljust(length)] for text in texts])
        return types.SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def muse_model(num_tokens=64, **options):
    """`MaskGit` of muse-maskgit-pytorch: 16 positions, its T5 an embedding of letters."""
    package = muse_package()
    from transformers import T5Config

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(d_model=32)
        package.t5.T5_CONFIGS["tiny"] = {"config": config, "model": _Embedding(), "tokenizer": _LettersOfTexts()}
        vae = package.VQGanVAE(dim=16, layers=2, codebook_size=num_tokens, use_vgg_and_gan=False)
        transformer = package.MaskGitTransformer(
            num_tokens=num_tokens, seq_len=16, dim=32, depth=1, dim_head=16, heads=2, t5_name="tiny", flash=False
        )
        # sharp enough that steps differ
        torch.nn.init.normal_(transformer.to_logits.weight, std=0.5)
        return package.MaskGit(vae=vae, transformer=transformer, image_size=16, **options).eval()


class _Sampler:
    """What the two samplers of Halton-MaskGIT have in common; their own call is not here."""

    def __call__(self, trainer, init_code=None, nb_sample=50, labels=None, verbose=True):
        return "the original"


class HaltonSampler(_Sampler):
    """A stand-in for the class of this name."""

    def __init__(
        self, sm_temp_min=1, sm_temp_max=1, temp_pow=1, w=4, step=64, randomize=False, top_k=-1, temp_warmup=0
    ):
        self.temp_pow, self.w, self.step, self.randomize, self.top_k = temp_pow, w, step, randomize, top_k
        self.temp_warmup, self.basic_halton_mask = temp_warmup, None
        self.temperature = torch.linspace(sm_temp_min, sm_temp_max, step)

    @staticmethod
    def build_halton_mask(input_size, nb_point=10_000):
        def radical_inverse(base, n):
            result, scale = 0.0, 1.0
            while n:
                scale /= base
                result += scale * (n % base)
                n //= base
            return result

        cells = [tuple(int(radical_inverse(b, n) * input_size) for b in (2, 3)) for n in range(1, nb_point + 1)]
        return torch.tensor(list(dict.fromkeys(cells)))


class ConfidenceSampler(_Sampler):
    """A stand-in for the class of this name."""

    def __init__(self, sm_temp=1, w=3, randomize="linear", r_temp=4.5, sched_mode="arccos", step=12):
        self.sm_temp, self.w, self.randomize, self.r_temp = sm_temp, w, randomize, r_temp
        self.sched_mode, self.step = sched_mode, step

    @staticmethod
    def build_sequence(step, input_size, mode="arccos", leave=False, verbose=True):
        progress = torch.linspace(0, 1, step)
        shares = {"linear": progress, "arccos": 1 - torch.arccos(progress) / (torch.pi / 2)}
        return (shares[mode] * input_size**2).int()


def halton_samplers():
    """The two classes: Halton-MaskGIT's where MGT_HALTON_MASKGIT names a checkout of it, else their stand-ins."""
    checkout = os.environ.get("MGT_HALTON_MASKGIT")
    if checkout:
        sys.path.append(checkout)
        from Sampler.confidence_sampler import ConfidenceSampler as Confidence
        from Sampler.halton_sampler import HaltonSampler as Halton

        return Halton, Confidence
    for kind, module in ((HaltonSampler, "Sampler.halton_sampler"), (ConfidenceSampler, "Sampler.confidence_sampler")):
        stand_in("Sampler")
        stand_in(module)
        kind.__module__ = module
        setattr(sys.modules[module], kind.__name__, kind)
    return HaltonSampler, ConfidenceSampler


class _Vit(torch.nn.Module):
    """Logits (B, N, V + 1) of a canvas (B, side, side), labels and what drops them."""

    def __init__(self, codebook_size):
        super().__init__()
        self.tokens = torch.nn.Embedding(codebook_size + 1, 16)
        self.labels = torch.nn.Embedding(1000, 16)
        self.places = torch.nn.Embedding(64, 16)
        self.head = torch.nn.Linear(16, codebook_size + 1)
        # as a model that was trained: the mask is no answer
        torch.nn.init.constant_(self.head.bias[-1], -1e4)
        self.given = []

    def forward(self, code, labels, drop_label):
        self.given.append(code.flatten(1))
        x = self.tokens(code.flatten(1))
        x = x + x.mean(1, keepdim=True) + self.places(torch.arange(x.shape[1]))
        return 3 * self.head(x + self.labels(labels)[:, None] * ~drop_label[:, None, None])


def halton_trainer(codebook_size=24):
    """What the samplers ask of a trainer: 8 x 8 tokens; images are their numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = _Vit(codebook_size)
    args = types.SimpleNamespace(device="cpu", mask_value=codebook_size, codebook_size=codebook_size, use_ema=False)
    ae = types.SimpleNamespace(decode_code=lambda code: code.float() / codebook_size)
    return types.SimpleNamespace(vit=vit, ema=vit, args=args, ae=ae, input_size=8)
