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
    exec(compile(tree, path, "exec"), scope)
    return types.SimpleNamespace(**scope)


class Network(torch.nn.Module):
    """Logits (B, N, V) of ids (B, N): of the token, of its place and of the mean of those that are attended to."""

    def __init__(self, vocab_size, mask_id, width=8, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens = torch.nn.Embedding(vocab_size, width)
            self.places = torch.nn.Embedding(64, width)
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
