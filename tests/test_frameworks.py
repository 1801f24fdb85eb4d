"""The part of docs/frameworks.md on LLaDA2; test_consumers.py has the one that needs JAX."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "LLaDA2Pipeline"):
    pytest.skip("needs a diffusers with LLaDA2Pipeline", allow_module_level=True)
stats = pytest.importorskip("scipy.stats")

import tiny  # noqa: E402
from diffusers import BlockRefinementScheduler  # noqa: E402

from mgt_sampler.clients.llada2 import BlockScheduler  # noqa: E402

MASK = tiny.LLADA2_MASK


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny.llada2_pipeline()


def generate(pipe, scheduler, prompt=None, **options):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    prompt = torch.randint(MASK, (3, 5), generator=seeded(3)) if prompt is None else prompt
    settings = {"gen_length": 16, "num_inference_steps": 4, "threshold": 0.9, "editing_threshold": None, **options}
    return pipe(input_ids=prompt, mask_token_id=MASK, output_type="seq", **settings).sequences


@pytest.mark.parametrize("editing_threshold", [None, 0.3])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 0.7, "sampling_method": "greedy"}, {"temperature": 0.7, "top_k": 1}],
)
@pytest.mark.parametrize("threshold", [0.3, 2.0])
def test_greedy_tokens_are_the_originals(pipe, editing_threshold, options, threshold):
    if "top_k" in options and threshold > 1:
        pytest.skip("all are equally sure, and torch.topk takes any of them first")
    options = {"editing_threshold": editing_threshold, "threshold": threshold, **options}
    before, after = (generate(pipe, kind, **options) for kind in (BlockRefinementScheduler, BlockScheduler))
    assert torch.equal(before, after)
    # a network whose answers are all alike would show nothing
    assert len(before.unique()) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("editing_threshold", [None, 0.3])
def test_a_greedy_step_is_the_originals(dtype, editing_threshold):
    logits = (3 * torch.randn(4, 16, 1000, generator=seeded(0))).to(dtype)
    # which the original may draw
    logits[..., 999] = -torch.inf
    sample = torch.randint(999, (4, 16), generator=seeded(1))
    sample[:, ::2] = 999
    outputs = []
    for kind in (BlockRefinementScheduler, BlockScheduler):
        scheduler = kind(block_length=16, num_inference_steps=4)
        scheduler.set_timesteps(4)
        outputs.append(
            scheduler.step(logits, 0, sample, mask_token_id=999, editing_threshold=editing_threshold, threshold=0.5)
        )
    before, after = outputs
    for name in ("prev_sample", "transfer_index", "editing_transfer_index"):
        assert torch.equal(before[name], after[name])
    assert before.transfer_index.any() and before.editing_transfer_index.any() == (editing_threshold is not None)
    drawn = torch.full_like(sample, True, dtype=torch.bool) if editing_threshold else sample == 999
    assert torch.equal(before.sampled_tokens[drawn], after.sampled_tokens[drawn])
    torch.testing.assert_close(before.sampled_probs[drawn], after.sampled_probs[drawn])
    assert torch.equal(after.sampled_tokens[~drawn], sample[~drawn]) and (after.sampled_probs[~drawn] == 1).all()


def drawn_histogram(kind, options, generator, num_samples=4096):
    """How often each token is drawn from the same logits, with the largest error of its probability."""
    logits = 1.5 * torch.randn(12, generator=seeded(5))
    scheduler = kind(block_length=4, num_inference_steps=2)
    scheduler.set_timesteps(2)
    sample = torch.full((num_samples, 4), 12)
    output = scheduler.step(
        logits.expand(num_samples, 4, 12).contiguous(), 0, sample, mask_token_id=12, threshold=0.0,
        generator=generator, **options,
    )  # fmt: skip
    filtered = BlockRefinementScheduler._top_k_filtering(logits / options["temperature"], options.get("top_k"))
    probs = BlockRefinementScheduler._top_p_filtering(filtered, options.get("top_p")).softmax(-1)
    error = (output.sampled_probs - probs[output.sampled_tokens]).abs().max()
    return output.sampled_tokens.flatten().bincount(minlength=12).double(), probs.double(), error


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
    ],
)
def test_draws_are_from_the_originals_distribution(options):
    observed, probs, error = drawn_histogram(BlockScheduler, options, seeded(1))
    possible = probs > 0
    assert possible.sum() == 12 or options.keys() > {"temperature"}
    assert observed[~possible].sum() == 0 and error < 1e-6
    assert stats.chisquare(observed[possible], observed.sum() * probs[possible] / probs.sum()).pvalue > 1e-3
    # the test can fail
    wrong = (1.1 * probs[possible].log()).softmax(-1)
    assert stats.chisquare(observed[possible], observed.sum() * wrong).pvalue < 1e-4


def test_generations_are_from_the_originals_distribution(pipe):
    # two tokens after two of the prompt, in two steps: what the network says of one depends on which the other is
    prompt = torch.tensor([[3, 5]]).expand(3000, 2)
    options = {"gen_length": 2, "block_length": 4, "num_inference_steps": 2, "threshold": 2.0}
    counts = []
    for kind, temperature in ((BlockRefinementScheduler, 1.0), (BlockScheduler, 1.0), (BlockScheduler, 0.7)):
        drawn = generate(pipe, kind, prompt, temperature=temperature, generator=seeded(2), **options)
        counts.append((drawn[:, 0] * (MASK + 1) + drawn[:, 1]).bincount(minlength=(MASK + 1) ** 2))
    before, after, colder = (torch.stack([counts[0], other]) for other in (counts[0], *counts[1:]))
    common = counts[0] + counts[1] >= 16

    def pvalue(table):
        pooled = torch.cat([table[:, common], table[:, ~common].sum(1, keepdim=True)], 1)
        return stats.chi2_contingency(pooled[:, pooled.sum(0) > 0].numpy()).pvalue

    assert common.sum() > 20
    assert pvalue(before) > 0.99 and pvalue(after) > 1e-3 and pvalue(colder) < 1e-4


@pytest.mark.parametrize("editing_threshold", [None, 0.3])
def test_generations_are_seeded(pipe, editing_threshold):
    options = {"temperature": 1.0, "editing_threshold": editing_threshold}
    first, again, other = (generate(pipe, BlockScheduler, generator=seeded(seed), **options) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # a generator goes on from one generation to the next
    generator = seeded(1)
    assert torch.equal(first, generate(pipe, BlockScheduler, generator=generator, **options))
    assert not torch.equal(first, generate(pipe, BlockScheduler, generator=generator, **options))


def test_a_generation_does_not_depend_on_its_batch(pipe):
    prompt = torch.randint(MASK, (4, 5), generator=seeded(3))
    # at this threshold, blocks take more steps for some samples than for others
    options = {"temperature": 1.0, "threshold": 0.4, "gen_length": 32}
    together = generate(pipe, BlockScheduler, prompt, generator=[seeded(seed) for seed in range(4)], **options)
    for i in range(4):
        alone = generate(pipe, BlockScheduler, prompt[i : i + 1], generator=[seeded(i)], **options)
        assert torch.equal(alone, together[i : i + 1])
    assert not torch.equal(
        together, generate(pipe, BlockScheduler, prompt, generator=[seeded(9 + i) for i in range(4)], **options)
    )


def test_each_step_draws_anew():
    logits = torch.zeros(1, 8, 1000)
    scheduler = BlockScheduler(block_length=8, num_inference_steps=8)
    scheduler.set_timesteps(8)
    sample = torch.full((1, 8), 1000)
    # two blocks; timesteps repeat where edits go on after the last mask is gone
    draws = [
        scheduler.step(logits, timestep, sample, mask_token_id=1000, temperature=1.0).sampled_tokens
        for timestep in (0, 1, 2, 2, 2, 0, 1, 2)
    ]
    assert len(torch.cat(draws).unique(dim=0)) == len(draws)


def test_known_positions_are_read_for_edits_only():
    logits = torch.zeros(1, 4, 10)
    logits[0, 1] = torch.nan
    sample = torch.tensor([[10, 3, 10, 10]])
    scheduler = BlockScheduler(block_length=4, num_inference_steps=4)
    scheduler.set_timesteps(4)
    scheduler.step(logits, 0, sample, mask_token_id=10, temperature=1.0)
    with pytest.raises(ValueError, match="position 1"):
        scheduler.step(logits, 0, sample, mask_token_id=10, temperature=1.0, editing_threshold=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": -1.0, "top_k": 3}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "generator": [seeded(0)] * 2}, "generator"),
    ],
)
def test_what_it_cannot_do_it_refuses(options, message):
    scheduler = BlockScheduler(block_length=4, num_inference_steps=4)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        scheduler.step(torch.zeros(1, 4, 10), 0, torch.full((1, 4), 10), mask_token_id=10, **options)


def page_blocks(language):
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8").split("## ")[1]
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def run_command(command, **environment):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]


def check_table(rows, *cases):
    head, _, *body = rows
    assert head == ["case", "before, ms", "after, ms", "ratio"]
    assert {case.split(",")[0] for case, *_ in body} == set(cases)
    for _, before, after, ratio in body:
        assert float(before) > 0 and float(after) > 0
        assert float(ratio) == pytest.approx(float(before) / float(after), rel=0.01, abs=0.06)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pipe):
    """A model and its tokenizer on disk, as `from_pretrained` finds them."""
    folder = tmp_path_factory.mktemp("model")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"word{i}" for i in range(MASK + 1 - len(special)))]))
    transformers.BertTokenizer(str(folder / "vocab.txt"), eos_token="[SEP]").save_pretrained(folder)
    pipe.model.save_pretrained(folder)
    return folder


def test_the_pages_lines_run(checkpoint):
    before, change, generation = page_blocks("python")
    printed = []
    code = (before + change + generation).replace('"inclusionAI/LLaDA2.0-mini"', repr(str(checkpoint)))
    assert str(checkpoint) in code
    namespace = {"print": printed.append}
    exec(code.replace("gen_length=256", "gen_length=16"), namespace)
    assert isinstance(namespace["pipe"].scheduler, BlockScheduler)
    assert len(printed) == 1 and isinstance(printed[0], str)


def test_the_pages_commands_run(checkpoint):
    tiny, real = page_blocks("sh")
    check_table(run_command(tiny.strip() + " --vocab-size 300 --rounds 1 --gen-length 8"), "step", "pipeline")
    real = real.strip().replace("inclusionAI/LLaDA2.0-mini", str(checkpoint))
    assert str(checkpoint) in real
    check_table(run_command(real + " --prompt 'word1 word2' --rounds 1 --gen-length 8"), "pipeline")
