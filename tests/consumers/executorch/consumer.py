"""ExecuTorch on the C library: `python consumer.py KERNELS.so` exports a program, runs it and prints what it draws."""

import ctypes
import sys

import torch
from executorch.exir import to_edge
from executorch.runtime import Runtime
from torch import Tensor

import mgt_kernels

# in a program, an op writes to memory that was planned at export: the form of it that kernels.cpp has the kernel of
library = torch.library.Library("mgt_kernels", "FRAGMENT")
library.define(
    "sample_tokens.out(Tensor logits, Tensor tokens, Tensor seed, Tensor step, SymInt mask_token_id, "
    "Tensor? uncond_logits, Tensor guidance_scale, Tensor noise_scale, Tensor temperature, Tensor first_position, "
    "Tensor? token_bias, str rows, str statistics, str backend, *, "
    "Tensor(a!) token_ids, Tensor(b!) logprob, Tensor(c!)[] asked) -> ()"
)


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
    program = to_edge(exported).to_executorch()
    ctypes.CDLL(sys.argv[1])
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    for size in (2, 1):
        token_ids, logprob = method.execute([tokens[:size], seed[:size], step])
        print(*token_ids.flatten().tolist(), *map(float.hex, logprob.flatten().tolist()))
