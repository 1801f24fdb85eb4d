"""How long LLaDA2's sampling step and its whole pipeline take with the original scheduler and with ours.

`python before_and_after.py` draws with a tiny random network of LLaDA2's vocabulary. `--model NAME_OR_FOLDER` loads one
with its tokenizer as LLaDA2's model card does, and generates from `--prompt`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from mgt_sampler import accelerate, restore
from mgt_sampler.clients.llada2 import BlockScheduler

# of LLaDA2.0
VOCAB_SIZE, BLOCK_LENGTH = 157184, 32


def medians(before: Callable[[], object], after: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each, timed in turns after one call that is not."""
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for call, taken in zip((before, after), seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn > 0:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def print_row(case: str, before: float, after: float) -> None:
    """Print a row of the table."""
    print(f"| {case} | {before * 1e3:.4g} | {after * 1e3:.4g} | {before / after:.1f} |", flush=True)


def compare_steps(vocab_size: int, rounds: int) -> None:
    """Time a step on one block of random logits, all of its positions masked."""
    sample = torch.full((1, BLOCK_LENGTH), vocab_size - 1)
    schedulers = BlockRefinementScheduler(), BlockScheduler()
    for scheduler in schedulers:
        scheduler.set_timesteps(BLOCK_LENGTH)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (2 * torch.randn(1, BLOCK_LENGTH, vocab_size)).to(dtype)
        for name, options in (
            ("temperature 0", {"temperature": 0.0}),
            ("temperature 1", {"temperature": 1.0}),
            ("temperature 1, editing", {"temperature": 1.0, "editing_threshold": 0.5}),
            ("temperature 1, top_k 50", {"temperature": 1.0, "top_k": 50}),
            ("temperature 1, top_p 0.9", {"temperature": 1.0, "top_p": 0.9}),
            ("temperature 1, top_k 50, top_p 0.9", {"temperature": 1.0, "top_k": 50, "top_p": 0.9}),
        ):
            before, after = (
                lambda scheduler=scheduler, logits=logits, options=options: scheduler.step(
                    logits, 0, sample, mask_token_id=vocab_size - 1, **options
                )
                for scheduler in schedulers
            )
            print_row(f"step, {str(dtype).removeprefix('torch.')}, {name}", *medians(before, after, rounds))


def compare_pipelines(pipe: LLaDA2Pipeline, rounds: int, case: str, **options: object) -> None:
    """Time whole generations."""
    pipe.set_progress_bar_config(disable=True)

    def generate(prepare: Callable[[LLaDA2Pipeline], object]) -> None:
        prepare(pipe)
        pipe(generator=torch.Generator().manual_seed(0), **options)

    print_row(case, *medians(lambda: generate(restore), lambda: generate(accelerate), rounds))


def tiny_pipeline(vocab_size: int) -> LLaDA2Pipeline:
    """LLaDA2's pipeline on a random network of one layer."""
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    return LLaDA2Pipeline(model=BertForMaskedLM(config).eval(), scheduler=BlockRefinementScheduler())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompt", default="What is the meaning of life?")
    parser.add_argument("--gen-length", type=int, default=2 * BLOCK_LENGTH)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| case | before, ms | after, ms | ratio |\n| --- | --- | --- | --- |")
    if arguments.model is None:
        vocab_size = arguments.vocab_size
        compare_steps(vocab_size, arguments.rounds)
        prompt = torch.randint(vocab_size - 1, (1, 5))
        pipe = tiny_pipeline(vocab_size)
        options = {"input_ids": prompt, "mask_token_id": vocab_size - 1, "output_type": "seq"}
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
        pipe = LLaDA2Pipeline(model=model.eval(), scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
        options = {"prompt": arguments.prompt}
    for temperature in (0.0, 1.0):
        # above 1: as many tokens are committed in each step as the schedule says, for the same number of steps
        compare_pipelines(
            pipe, arguments.rounds, f"pipeline, temperature {temperature:g}", temperature=temperature,
            gen_length=arguments.gen_length, editing_threshold=None, threshold=2.0, num_inference_steps=8, **options,
        )  # fmt: skip


if __name__ == "__main__":
    main()
