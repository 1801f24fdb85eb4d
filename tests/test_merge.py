"""Token merging in the blocks of transformers: of Meissonic's kind, aMUSEd's, the bundled model's and one's own."""

import copy
import math
import pickle
import threading

import pytest
import tiny_blocks
import torch
from torch import nn

from mgt_kernels import match_tokens, merge_tokens, unmerge_tokens
from mgt_sampler import clock, load_model
from mgt_sampler.blocks import BlockLayout
from mgt_sampler.merge import MergedBlocks, TokenMerging

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def meissonic():
    return tiny_blocks.transformer()


@pytest.fixture(scope="module")
def fashion():
    return load_model().transformer


def called(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs)


def merged(transformer, inputs, merging, **options):
    blocks = MergedBlocks(transformer, merging, **options)
    try:
        return called(transformer, inputs)
    finally:
        blocks.remove()


SETTINGS = [
    TokenMerging(0.5),
    TokenMerging(0.75, seed=3),
    TokenMerging(0.5, every=3),
    TokenMerging(0.5, single_stream=True),
    TokenMerging(0.3, single_stream=True, proportional=True, every=2),
]


@pytest.mark.parametrize("merging", SETTINGS, ids=str)
def test_meissonics_blocks_compute_what_plain_steps_do(meissonic, merging):
    inputs = tiny_blocks.inputs(meissonic)
    plain = called(meissonic, inputs)
    found = merged(meissonic, inputs, merging)
    with torch.no_grad():
        expected = tiny_blocks.merged_by_hand(meissonic, inputs, merging)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    assert torch.equal(called(meissonic, inputs), plain)


def test_ratio_0_changes_no_bit(meissonic, fashion):
    inputs = tiny_blocks.inputs(meissonic)
    assert torch.equal(merged(meissonic, inputs, 0.0), called(meissonic, inputs))
    tokens, condition = torch.full((2, 196), 128), torch.tensor([1, 2])
    given = {"tokens": tokens, "condition": condition}
    assert torch.equal(merged(fashion, given, 0.0), called(fashion, given))


def test_a_match_that_leaves_out_nothing_changes_no_bit(meissonic):
    """By a threshold that none reaches, with our attention in the place of diffusers'."""
    inputs = tiny_blocks.inputs(meissonic)
    found = merged(meissonic, inputs, TokenMerging(threshold=1.0, single_stream=True, proportional=True))
    torch.testing.assert_close(found, called(meissonic, inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "merging", [*SETTINGS, TokenMerging(threshold=0.8), TokenMerging(threshold=0.8, proportional=True)], ids=str
)
def test_a_sample_does_not_depend_on_its_batch(meissonic, merging):
    inputs = tiny_blocks.inputs(meissonic, batch=3)
    together = merged(meissonic, inputs, merging)
    for b in range(3):
        alone = merged(meissonic, tiny_blocks.sample(inputs, b), merging)
        # PyTorch's products of other sizes round otherwise
        torch.testing.assert_close(together[b : b + 1], alone, atol=2e-5, rtol=1e-4)


def test_a_threshold_leaves_samples_their_own_number_of_rows(meissonic):
    """Rows without tokens are not attended to: one sample has duplicates, the other none."""
    inputs = tiny_blocks.inputs(meissonic, batch=2)
    inputs["hidden_states"][0] = 3
    merging = TokenMerging(threshold=0.999, destinations="top_left")
    sizes = []
    blocks = MergedBlocks(meissonic, merging)
    handle = meissonic.transformer_blocks[0].attn.register_forward_hook(
        lambda *_: sizes.append(blocks._pass.match.sizes)
    )
    together = called(meissonic, inputs)
    handle.remove()
    alone = [called(meissonic, tiny_blocks.sample(inputs, b)) for b in range(2)]
    blocks.remove()
    assert (sizes[0][0] > 0).sum() < (sizes[0][1] > 0).sum() == 16
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_no_match_outlives_a_forward_pass(meissonic):
    """The published code keeps its maps from one call to the next; kept maps are another model."""
    first, second = tiny_blocks.inputs(meissonic, seed=1), tiny_blocks.inputs(meissonic, seed=2)
    merging = TokenMerging(0.5, every=100)
    fresh = merged(meissonic, second, merging)
    blocks = MergedBlocks(meissonic, merging)
    called(meissonic, first)
    assert torch.equal(called(meissonic, second), fresh)
    assert blocks._passes == {}

    kept = {}

    class Stale(MergedBlocks):
        def _matched(self, image, input_grid):
            return kept.setdefault("match", super()._matched(image, input_grid))

    blocks.remove()
    stale = Stale(meissonic, merging)
    called(meissonic, first)
    assert (called(meissonic, second) - fresh).abs().max() > 1e-2
    stale.remove()


def test_a_pass_that_raises_leaves_nothing(meissonic):
    inputs = tiny_blocks.inputs(meissonic)
    expected = merged(meissonic, inputs, 0.5)
    blocks = MergedBlocks(meissonic, 0.5)
    handle = meissonic.transformer_blocks[1].ff.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        called(meissonic, inputs)
    assert blocks._passes == {}
    handle.remove()
    assert torch.equal(called(meissonic, inputs), expected)


def test_blocks_share_a_match_as_often_as_asked(meissonic):
    counts = []

    class Counting(MergedBlocks):
        def _matched(self, image, input_grid):
            counts.append(image.shape)
            return super()._matched(image, input_grid)

    num_blocks = len(meissonic.transformer_blocks) + len(meissonic.single_transformer_blocks)
    for every in (1, 2, 3, 100):
        counts.clear()
        blocks = Counting(meissonic, TokenMerging(0.5, single_stream=True, every=every))
        called(meissonic, tiny_blocks.inputs(meissonic))
        blocks.remove()
        assert blocks.num_blocks == num_blocks
        assert len(counts) == math.ceil(num_blocks / every)
        # text takes no part
        assert {shape[1] for shape in counts} == {16}


def test_steps_change_the_corners_and_the_ratio(meissonic):
    inputs = tiny_blocks.inputs(meissonic)
    blocks = MergedBlocks(meissonic, TokenMerging((0.0, 0.75)))
    plain_first = []
    for k in range(3):
        with clock.at_step(k, 3):
            plain_first.append(called(meissonic, inputs))
    blocks.remove()
    assert torch.equal(plain_first[0], called(meissonic, inputs))
    for k, ratio in ((1, 0.375), (2, 0.75)):
        with clock.at_step(k, 3):
            assert torch.equal(plain_first[k], merged(meissonic, inputs, ratio))
    assert not torch.equal(plain_first[1], merged(meissonic, inputs, 0.375))
    top_left = TokenMerging(0.5, destinations="top_left")
    with clock.at_step(1, 3):
        assert torch.equal(merged(meissonic, inputs, top_left), merged(meissonic, inputs, top_left))
    assert clock.now() is None


def test_threads_share_a_transformer(meissonic):
    """With one setting each call has its own match."""
    calls = [tiny_blocks.inputs(meissonic, seed=seed) for seed in range(4)]
    expected = [merged(meissonic, inputs, 0.5) for inputs in calls]
    blocks = MergedBlocks(meissonic, 0.5)
    found = [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = called(meissonic, calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_merge_too_and_can_be_put_right(meissonic, copied):
    inputs = tiny_blocks.inputs(meissonic)
    plain = called(meissonic, inputs)
    blocks = MergedBlocks(meissonic, 0.5)
    other, its_blocks = copied((meissonic, blocks))
    expected = called(meissonic, inputs)
    assert torch.equal(called(other, inputs), expected)
    its_blocks.remove()
    assert torch.equal(called(other, inputs), plain)
    assert torch.equal(called(meissonic, inputs), expected)
    blocks.remove()


@pytest.mark.parametrize("merging", [TokenMerging(0.5), TokenMerging(threshold=0.2, proportional=True)], ids=str)
def test_amused(merging):
    """Self-attention, cross-attention and the MLP of its blocks."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.UVit2DModel(
            hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=8,
            vocab_size=32, codebook_size=8, in_channels=8, block_out_channels=8, num_res_blocks=1, downsample=True,
            upsample=True, block_num_heads=1, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
            sample_size=32,
        ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, 8, (2, 8, 8), generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
        "pooled_text_emb": torch.randn(2, 8, generator=generator),
        "micro_conds": torch.randn(2, 5, generator=generator),
    }
    plain = called(transformer, inputs)
    rows = {"attn1": [], "attn2": [], "ff": []}
    blocks = MergedBlocks(transformer, merging)
    for block in transformer.transformer_layers:
        for name, seen in rows.items():
            part = getattr(block, name)
            part.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
    found = called(transformer, inputs)
    alone = torch.cat([called(transformer, {k: v[b : b + 1] for k, v in inputs.items()}) for b in range(2)])
    blocks.remove()
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)
    if merging.threshold is None:
        assert set(rows["attn1"] + rows["attn2"] + rows["ff"]) == {8}
    assert (found - plain).abs().max() > 1e-4
    # the other hooks of this test only look
    assert torch.equal(called(transformer, inputs), plain)


def test_the_bundled_model(fashion):
    """Merging costs little at a small ratio, more at a large one, and the class is still what is seen."""
    tokens = torch.randint(0, 128, (4, 196), generator=torch.Generator().manual_seed(0))
    given = {"tokens": tokens, "condition": torch.arange(4)}
    plain = called(fashion, given)
    distances = [(merged(fashion, given, ratio) - plain).abs().mean() for ratio in (0.1, 0.25, 0.5, 0.75)]
    assert distances == sorted(distances)
    assert distances[0] > 0


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.last(self.first(x).relu())


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(10, 8), OwnBlock(), nn.Linear(8, 9)

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


OWN = BlockLayout("test_merge.OwnBlock", merge_input=("first",), unmerge_output=("last",))


def test_a_model_of_ones_own_needs_a_layout_and_a_grid():
    model, tokens = OwnModel(), torch.randint(0, 10, (2, 24))
    blocks = MergedBlocks(model, 0.5, layouts=[OWN], grid=(4, 6))
    with torch.no_grad():
        found = model(tokens)
        x = model.embedding(tokens)
        match = match_tokens(x, (4, 6), ratio=0.5, seed=0, step=0)
        y = x + unmerge_tokens(model.block.last(model.block.first(merge_tokens(x, match)).relu()), match)
        assert torch.equal(found, model.head(y))
    blocks.remove()
    MergedBlocks(model, 0.5, layouts=[OWN])
    with pytest.raises(ValueError, match=r"merge: grid: expected \(height, width\) for 24 tokens, which are no square"):
        model(tokens)
    with pytest.raises(TypeError, match="merge: expected a transformer that is called with tokens"):
        model(torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.76}, "ratio: expected at most 0.75, got 0.76"),
        ({"ratio": -0.1}, "ratio: expected a finite number of at least 0"),
        ({"ratio": (0.2, 0.8)}, "ratio: expected at most 0.75, got 0.8"),
        ({"threshold": 1.5}, r"threshold: expected a number in \[-1, 1\], got 1.5"),
        ({"threshold": math.nan}, "threshold: expected a number"),
        ({"every": 0}, "every: expected an int of at least 1"),
        ({"destinations": "middle"}, "destinations: expected one of"),
        ({"proportional": 1}, "proportional: expected a bool, got int"),
        ({"seed": 1.5}, "seed: expected an int, got float"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises((TypeError, ValueError), match="merge: " + message):
        TokenMerging(**arguments)


def test_a_transformer_that_cannot_be_merged_stays_as_it_was(meissonic, fashion):
    def hooks(module):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    with pytest.raises(ValueError, match=r"expected a transformer with blocks of .*TransformerBlock.*, found none in"):
        MergedBlocks(nn.Sequential(nn.Linear(2, 2)), 0.5)
    with pytest.raises(ValueError, match="proportional: expected blocks whose attention is known to take a mask"):
        MergedBlocks(fashion, TokenMerging(0.5, proportional=True))
    with pytest.raises(ValueError, match="threshold: expected blocks whose attention is known to take a mask"):
        MergedBlocks(fashion, TokenMerging(threshold=0.5))
    with pytest.raises(TypeError, match="expected a ratio, a schedule or a TokenMerging, got True"):
        MergedBlocks(fashion, True)
    with pytest.raises(ValueError, match="expected _Block with a part nothing, it has none"):
        MergedBlocks(fashion, 0.5, layouts=[BlockLayout("fashion._Block", merge_input=("nothing",))])
    assert hooks(fashion) == 0
    attention = meissonic.transformer_blocks[1].attn
    attention.processor, before = nn.Identity.forward, attention.processor
    with pytest.raises(
        ValueError, match=r"expected TransformerBlock.attn.processor to be diffusers' FluxAttnProcessor"
    ):
        MergedBlocks(meissonic, 0.5)
    attention.processor = before
    assert hooks(meissonic) == 0
    blocks = MergedBlocks(meissonic, 0.5)
    with pytest.raises(ValueError, match=r"expected a transformer without merging, .* has it"):
        MergedBlocks(meissonic, 0.5)
    blocks.remove()
    assert hooks(meissonic) == 0
    with pytest.raises(ValueError, match="grid: expected even sides, which 2 x 2 cells tile"):
        merged(meissonic, tiny_blocks.inputs(meissonic, height=6, width=8), 0.5)
