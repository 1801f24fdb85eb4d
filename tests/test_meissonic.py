"""The benchmark's transformer of Meissonic's size: it has that size, and every variant runs."""

import pytest
import torch
from torch import nn

from mgt_benchmarks import meissonic


def test_it_has_about_a_billion_parameters():
    with torch.device("meta"):
        model = meissonic.Transformer(meissonic.SCALES["full"], lambda k, n: nn.Linear(k, n, bias=False), torch.float32)
    assert 0.9e9 < sum(p.numel() for p in model.parameters()) < 1.1e9


@pytest.mark.parametrize("variant", meissonic.VARIANTS)
def test_every_variant_runs(variant):
    sizes = meissonic.SCALES["tiny"]
    model, inputs = meissonic.build(variant, sizes)
    with torch.inference_mode():
        logits = model(*inputs)
    assert logits.shape == (2, sizes.num_image_tokens, sizes.codebook_size) and logits.isfinite().all()
    a8 = [layer.a8 for layer in model.modules() if isinstance(layer, meissonic.Int4)]
    assert sum(a8) == {"w4a8": len(a8), "scq": len(a8) // 3}.get(variant, 0)
    assert meissonic.weight_bytes(model) > 0


def test_targets_that_are_missed_are_named():
    one = {"seconds": 1.0, "weight_bytes": 100.0, "peak_bytes": 100.0}
    measured = {name: [one] for name in meissonic.VARIANTS}
    missed = {row.variant: row.missed for row in meissonic.rows(measured)}
    assert not missed["bf16"] and ">= 1.6x bf16" in missed["w4a8"] and "weights <= 0.3" in missed["w4a16"]
    good = measured | {"w4a8": [dict(seconds=0.1, weight_bytes=26.0, peak_bytes=40.0)]}
    row = meissonic.rows(good)[-1]
    assert row.met == ">= 1.6x bf16, >= 3.2x fp32, weights <= 0.3, peak <= 0.45" and not row.missed
