"""ExecuTorch on the C library: `python consumer.py KERNELS.so` exports a program, runs it and prints what it draws."""

import ctypes
import sys

import torch
from executorch.exir import to_edge
from executorch.runtime import Runtime
from torch import Tensor

import mgt_kernels

# in a program, an op writes to memory that was planned at export: the form of it that kernels.cpp has the kernel of.
# ExecuTorch plans no list beside tensors, as the statistics are, so this op is the draw without them, and without the
# names that say which way of two
ARGUMENTS = (
    "Tensor logits, Tensor tokens, Tensor seed, Tensor step, SymInt mask_token_id, Tensor? uncond_logits, "
    "Tensor guidance_scale, Tensor noise_scale, Tensor temperature, Tensor? first_position, Tensor? token_bias, "
    "Tensor? second_uncond_logits, Tensor second_guidance_scale, Tensor softcap, SymInt top_k, Tensor top_p, "
    "Tensor min_p"
)
library = torch.library.Library("mgt_executorch", "DEF")
library.define(f"sample_tokens({ARGUMENTS}) -> (Tensor, Tensor)")
library.define(
    f"sample_tokens.out({ARGUMENTS}, *, Tensor(a!) token_ids, Tensor(b!) logprob) -> (Tensor(a!), Tensor(b!))"
)


@torch.library.register_fake("mgt_executorch::sample_tokens", lib=library)
def _(logits: Tensor, tokens: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.float32)


def draw_alone(*arguments: object) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Make the op of a draw the one above."""
    *first, guidance, softcap, rows, statistics, top_k, top_p, min_p, logprob_of, backend = arguments
    names = guidance, rows, statistics, logprob_of, backend
    if names != ("nested", "masked", "", "kept", "auto"):
        raise ValueError(f"expected the defaults of what is named, no statistics and backend auto, got {names}")
    return *torch.ops.mgt_executorch.sample_tokens(*first, softcap, top_k, top_p, min_p), []


class Step(torch.nn.Module):
    """A network of one layer and the guided draw from it, (B, N) tokens to (B, N) tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Embedding(41, 40)
        self.head.weight.data = (torch.arange(41 * 40) % 7 * 0.5).view(41, 40)

    def forward(self, tokens: Tensor, seed: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Draw token_ids and logprob; positions that hold 40 are masked."""
        logits = self.head(tokens)
        drawn = mgt_kernels.sample_tokens(
            logits, tokens, uncond_logits=0.5 * logits, guidance_scale=3.0, mask_token_id=40, seed=seed, step=step
        )
        return drawn.token_ids, drawn.logprob


if __name__ == "__main__":
    batch = torch.export.Dim("batch", max=4)
    tokens, seed, step = torch.full((2, 5), 40), torch.tensor([7, 8]), torch.tensor(3)
    tokens[:, 2] = 11
    exported = torch.export.export(Step(), (tokens, seed, step), dynamic_shapes=({0: batch}, {0: batch}, None))
    exported = exported.run_decompositions({torch.ops.mgt_kernels.sample_tokens.default: draw_alone})
    program = to_edge(exported).to_executorch()
    ctypes.CDLL(sys.argv[1])
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    for size in (2, 1):
        token_ids, logprob = method.execute([tokens[:size], seed[:size], step])
        print(*token_ids.flatten().tolist(), *map(float.hex, logprob.flatten().tolist()))
