"""Stand-ins for models whose code comes with their weights or their repositories: tiny random weights.

Each keeps what it is given in `given`. With the environment variable of a client, which names a checkout of its
repository, a stand-in's own sampler is the repository's.
"""

import os
import sys
import types

import torch
from tiny import stand_in


def place(kind, module):
    """Let a class be the one of its name in a module that is not installed, and be found there by pickle."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        stand_in(".".join(parts[:n]))
    kind.__module__ = module
    setattr(sys.modules[module], kind.__name__, kind)
    return kind


def source(variable, path, *names, stubs=None):
    """Functions of a file in the checkout that an environment variable names, without what the file imports.

    Args:
        variable: of the environment.
        path: of the file in the checkout.
        names: of the top-level functions and classes that are wanted; what else the file has is not run.
        stubs: what they need besides torch.
    """
    import __future__

    import ast
    import math
    import time
    import typing
    from pathlib import Path

    import numpy as np

    tree = ast.parse((Path(os.environ[variable]) / path).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope = {name: getattr(typing, name) for name in ("Any", "Callable", "Dict", "Optional", "Tuple", "Union")}
    scope |= {"torch": torch, "F": torch.nn.functional, "np": np, "math": math, "time": time}
    scope |= {"dists": torch.distributions, "print": lambda *args: None, **(stubs or {})}
    exec(compile(tree, path, "exec", __future__.annotations.compiler_flag), scope)
    return types.SimpleNamespace(**scope)


class Network(torch.nn.Module):
    """Logits (B, N, V) of ids (B, N): of the token, of its place and of the mean of those that are attended to."""

    def __init__(self, vocab_size, mask_id, width=8, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens = torch.nn.Embedding(vocab_size, width)
            self.places = torch.nn.Embedding(320, width)
            self.head = torch.nn.Linear(width, vocab_size)
        # as a model that was trained: the mask is no answer
        torch.nn.init.constant_(self.head.bias[mask_id], -1e4)
        self.given = []
        # of each place, the one token that is likely, or None
        self.certain = None

    @property
    def device(self):
        return self.head.weight.device

    def logits(self, ids, attended=None):
        self.given.append(ids.clone())
        if self.certain is not None:
            hot = torch.nn.functional.one_hot(self.certain[: ids.shape[1]], self.head.out_features)
            return (100.0 * hot).expand(len(ids), -1, -1).clone()
        weights = torch.ones(ids.shape) if attended is None else attended.float()
        x = self.tokens(ids)
        mean = (x * weights[..., None]).sum(1, keepdim=True) / weights.sum(1)[:, None, None]
        return 3 * self.head(x + 2 * mean + self.places(torch.arange(ids.shape[1])))


class LLaDAModelLM(Network):
    """A stand-in for LLaDA's remote code."""

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(logits=self.logits(input_ids, attention_mask))

    def generate(self, inputs=None, **options):
        return "autoregressive"


def llada_model(vocab_size=32, mask_id=31):
    return place(LLaDAModelLM, "transformers_modules.llada.modeling_llada")(vocab_size, mask_id).eval()


class DreamModelOutput(dict):
    """What `diffusion_generate` returns with return_dict_in_generate."""

    sequences = property(lambda self: self["sequences"])
    history = property(lambda self: self["history"])


class DreamModel(Network):
    """A stand-in for Dream's remote code: logits of a position are those of the one before."""

    asked_with = None

    def forward(self, input_ids, attention_mask="full", position_ids=None):
        attended = None if isinstance(attention_mask, str) else attention_mask[:, 0].any(1)
        type(self).asked_with = attention_mask, position_ids
        return types.SimpleNamespace(logits=self.logits(input_ids, attended))

    def diffusion_generate(self, inputs, attention_mask=None, **config):
        hooks = {
            "generation_tokens_hook_func": config.pop("generation_tokens_hook_func", lambda step, x, logits: x),
            "generation_logits_hook_func": config.pop("generation_logits_hook_func", lambda step, x, logits: logits),
        }
        threshold = {"threshold": config.pop("threshold")} if "threshold" in config else {}
        settings = dict(
            temperature=0.0, top_p=None, top_k=None, eps=1e-3, steps=512, alg="origin", alg_temp=None,
            return_dict_in_generate=False, output_history=False, mask_token_id=self.head.out_features - 1,
        )  # fmt: skip
        settings |= {"max_length": inputs.shape[1] + config.pop("max_new_tokens"), **config}
        return self._sample(
            inputs,
            attention_mask=attention_mask,
            generation_config=types.SimpleNamespace(**settings),
            **hooks,
            **threshold,
        )

    def _sample(self, input_ids, **options):
        return "the original"


def dream_model(vocab_size=32):
    """With MGT_DREAM, a checkout of NVlabs/Fast-dLLM, its `_sample` is the one there."""
    module = "transformers_modules.dream.modeling_dream"
    place(DreamModelOutput, module)
    if os.environ.get("MGT_DREAM"):
        names = ("top_p_logits", "top_k_logits", "sample_tokens", "DreamGenerationMixin")
        stubs = dict.fromkeys(("DreamGenerationConfig", "is_torchdynamo_compiling", "logger", "warnings", "copy"))
        stubs["DreamModelOutput"] = DreamModelOutput
        original = source("MGT_DREAM", "dream/model/generation_utils.py", *names, stubs=stubs).DreamGenerationMixin
        original._sample.__module__ = module
        DreamModel._sample = original._sample
    else:
        DreamModel._sample.__module__ = module
    return place(DreamModel, module)(vocab_size, vocab_size - 1).eval()


class Showo(Network):
    """A stand-in for Show-o: 20 text tokens, 2 special ones, a codebook of 24 and the mask."""

    def __init__(self):
        super().__init__(47, 46)
        self.config = types.SimpleNamespace(mask_token_id=46)

    def forward(self, input_ids, attention_mask=None):
        return self.logits(input_ids, attention_mask)

    def t2i_generate(self, input_ids=None, **options):
        return "the original"


SHOWO_CONFIG = types.SimpleNamespace(
    model=types.SimpleNamespace(
        showo=types.SimpleNamespace(num_vq_tokens=None, num_new_special_tokens=2, llm_vocab_size=20)
    ),
    dataset=types.SimpleNamespace(preprocessing=types.SimpleNamespace(max_seq_length=3)),
)


class _Base:
    """In the place of a base class that a repository's own has."""


def showo_model():
    """With MGT_SHOWO, a checkout of showlab/Show-o, its `t2i_generate` is the one there."""
    if os.environ.get("MGT_SHOWO"):
        names = ("log", "gumbel_noise", "mask_by_random_topk", "cosine_schedule")
        stubs = vars(source("MGT_SHOWO", "models/sampling.py", *names))
        stubs = {**stubs, "ModelMixin": _Base, "ConfigMixin": type("Other", (), {}), "register_to_config": lambda f: f}
        Showo.t2i_generate = source("MGT_SHOWO", "models/modeling_showo.py", "Showo", stubs=stubs).Showo.t2i_generate
    return place(Showo, "models.modeling_showo")().eval()


class MMadaModelLM(LLaDAModelLM):
    """A stand-in for MMaDA: 20 text tokens, a codebook of 24 and the mask."""

    def __init__(self):
        super().__init__(45, 44)

    def forward(self, input_ids, attention_bias=None):
        attended = None if attention_bias is None else attention_bias[:, 0].any(1)
        return types.SimpleNamespace(logits=self.logits(input_ids, attended))

    def t2i_generate(self, input_ids=None, **options):
        return "the original"

    def mmu_generate(self, idx=None, **options):
        return "the original"

    mmu_generate_fast = mmu_generate


def mmada_model():
    """With MGT_MMADA, a checkout of Gen-Verse/MMaDA, its methods are the ones there."""
    if os.environ.get("MGT_MMADA"):
        names = ("log", "gumbel_noise", "mask_by_random_topk", "cosine_schedule")
        stubs = {**vars(source("MGT_MMADA", "models/sampling.py", *names)), "MMadaConfig": None, "LLaDAModelLM": _Base}
        names = ("add_gumbel_noise", "get_num_transfer_tokens", "MMadaModelLM")
        original = source("MGT_MMADA", "models/modeling_mmada.py", *names, stubs=stubs).MMadaModelLM
        for name in ("t2i_generate", "mmu_generate", "mmu_generate_fast"):
            setattr(MMadaModelLM, name, getattr(original, name))
    place(LLaDAModelLM, "models.modeling_llada")
    return place(MMadaModelLM, "models.modeling_mmada")().eval()


class LLaDAForMultiModalGeneration(LLaDAModelLM):
    """A stand-in for Lumina-DiMOO: 24 text tokens, the mask 23 and a new line 22 among them, a codebook of 20.

    With a cache, what is not computed again keeps its logits, and what is attended to its ids.
    """

    def __init__(self):
        super().__init__(44, 23)
        self.calls, self.cache = [], None

    def caching(self, enable=True):
        self.cache = {} if enable else None

    def empty_cache(self):
        self.calls.append("empty")
        self.cache = {}

    def forward(self, input_ids=None, infer=False, use_cache=False, to_compute_mask=None, cat="", **options):
        assert infer
        computed = None if to_compute_mask is None else to_compute_mask.sum(1).tolist()
        self.calls.append((cat, use_cache, computed))
        logits = self.logits(torch.tensor(input_ids.tolist()))
        if self.cache is not None and use_cache:
            if to_compute_mask is not None:
                logits = torch.where(to_compute_mask[..., None], logits, self.cache[cat])
            self.cache[cat] = logits
        return types.SimpleNamespace(logits=logits)


def lumina_model():
    place(LLaDAModelLM, "model.modeling_llada")
    return place(LLaDAForMultiModalGeneration, "model.modeling_xllmx_dimoo")().eval()


def lumina_original():
    """`generate_image` of the checkout of Alpha-VLLM/Lumina-DiMOO that MGT_LUMINA names."""
    names = ("cosine_schedule", "gumbel_noise", "gumbel_max_sample", "mask_by_random_topk")
    stubs = vars(source("MGT_LUMINA", "utils/generation_utils.py", *names))
    stubs = {**stubs, "LLaDAForMultiModalGeneration": LLaDAForMultiModalGeneration}
    return source(
        "MGT_LUMINA", "generators/image_generation_generator.py", "generate_image", stubs=stubs
    ).generate_image
