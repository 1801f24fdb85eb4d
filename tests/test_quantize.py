"""SCQ: paths and scales of a quantized model, the files it is kept in, and the two defects of the published script."""

import copy
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from typer.testing import CliRunner

from mgt_kernels import PackedInt4, cpu, quantize_int4, w4a8_linear, w4a16_linear
from mgt_sampler import (
    CalibrationInput,
    Int4Linear,
    ScaledModel,
    activation_scales,
    cli,
    generate,
    load_quantized,
    sampler_trajectories,
    save_quantized,
)
from mgt_sampler import quantize as quantize_model
from mgt_sampler.models.fashion import FashionModel, Tokenizer, TokenizerConfig, Transformer, TransformerConfig
from mgt_sampler.quantization import file as quantized_file

# the backend of the kernels in these tests
BACKEND = "auto"


def load_fuzzer():
    """`fuzz/files.py`, which knows how to break files and how to sign them again."""
    path = Path(__file__).parents[1] / "fuzz" / "files.py"
    spec = importlib.util.spec_from_file_location("fuzz_files", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Net(nn.Module):
    """Three layers whose outputs differ in size: middle, large, small."""

    def __init__(self, sizes=(40, 24, 72, 8)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=n != 72) for k, n in itertools.pairwise(sizes)).requires_grad_(
            False
        )
        for layer, gain in zip(self.layers, (1.0, 6.0, 0.02), strict=True):
            layer.weight.copy_(gain * torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            if layer.bias is not None:
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
        self.norm = nn.LayerNorm(sizes[-1])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def inputs(count=3, rows=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 40, generator=generator) * (1 + i) for i in range(count)]


def quantize(model, calibration=None, **options):
    calibration = inputs() if calibration is None else calibration
    return quantize_model(model, calibration, **{"group_size": 32, "backend": BACKEND, **options})


def paths(report):
    return [layer.activation for layer in report.layers]


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def tiny():
    """The bundled model's networks, tiny and random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = Tokenizer(TokenizerConfig(image_size=8, codebook_size=8, code_dim=4, width=8))
        transformer = Transformer(TransformerConfig(grid_size=4, codebook_size=8, width=32, num_layers=1, num_heads=2))
    return FashionModel(tokenizer.eval(), transformer.eval().requires_grad_(False))


def test_a_layer_runs_the_op_that_it_names():
    weight, bias, x = torch.randn(6, 40), torch.randn(6), torch.randn(2, 3, 40)
    packed = quantize_int4(weight, 32)
    a16 = Int4Linear(packed, bias, backend=BACKEND)
    a8 = Int4Linear(packed, bias, torch.full((1, 1), 0.02), backend=BACKEND)
    assert torch.equal(a16(x), w4a16_linear(x, packed, bias, backend=BACKEND))
    assert torch.equal(a8(x), w4a8_linear(x, packed, 0.02, bias, backend=BACKEND))
    assert (a8.activation, a16.activation) == ("a8", "a16")
    assert f"w4a8, group_size=32, kernel={cpu.kernel_isa('w4a8_linear')}" in repr(a8) and "w4a16" in repr(a16)


def test_scales_of_halves_and_buckets():
    packed, x = quantize_int4(torch.randn(6, 40), 32), torch.randn(4, 40)
    scales = torch.tensor([[0.01, 0.02], [0.03, 0.04], [0.05, 0.06]])
    layer = Int4Linear(packed, None, scales, backend=BACKEND, layer_name="fc")

    def expected(*x_scale):
        return w4a8_linear(x, packed, torch.tensor(x_scale), backend=BACKEND)

    with activation_scales(layer, masked=1.0):
        assert torch.equal(layer(x), expected(0.05, 0.06))
    with activation_scales(layer, masked=0.0):
        assert torch.equal(layer(x), expected(0.01, 0.02))
    with activation_scales(layer, masked=0.5, guidance_half=1):
        assert torch.equal(layer(x), expected(0.04))
        with activation_scales(layer, masked=1.0, guidance_half=0):
            assert torch.equal(layer(x), expected(0.05))
        assert torch.equal(layer(x), expected(0.04))
    # a sample each, in two halves
    with activation_scales(layer, masked=torch.tensor([1.0, 0.1, 0.4, 0.99])):
        assert torch.equal(layer(x), expected(0.05, 0.01, 0.04, 0.06))
        y = layer(x[:, None].expand(4, 3, 40))
        assert torch.equal(y, layer(x)[:, None].expand(4, 3, 6))
        with pytest.raises(ValueError, match=r"fc: expected as many rows for each of 4 samples .* got 6"):
            layer(torch.zeros(6, 40))
    for wrong, message in (
        (dict(masked=1.5), "masked"),
        (dict(masked=torch.tensor([0.5, float("nan")])), "masked"),
        (dict(masked=torch.zeros(3)), "masked: expected samples of two guidance halves, got 3"),
        (dict(masked=0.5, guidance_half=2), "guidance_half"),
        (dict(guidance_half=1), "masked: expected the share of masked tokens, for fc has 3 buckets"),
    ):
        with pytest.raises(ValueError, match=message), activation_scales(layer, **wrong):
            pass
    for wrong in (torch.zeros(2, 2), torch.ones(2, dtype=int), "all", [0.5]):
        with pytest.raises(TypeError, match="masked"), activation_scales(layer, masked=wrong):
            pass


def test_moving_a_model_to_a_dtype_leaves_the_scales():
    quantized, _ = quantize(Net(), share=1)
    before = copy.deepcopy(quantized.state_dict())
    quantized.to(torch.bfloat16)
    after = quantized.state_dict()
    moved = {key for key in before if after[key].dtype != before[key].dtype}
    follow = (
        "norm.weight",
        "norm.bias",
        "layers.0.bias",
        "layers.2.bias",
        *(f"layers.{i}.weight_like" for i in range(3)),
    )
    assert moved == set(follow)
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - moved)
    assert quantized(inputs()[0].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, ["a16", "a16", "a16"]),
        (1 / 3, ["a16", "a16", "a8"]),
        (2 / 3, ["a8", "a16", "a8"]),
        (1.0, ["a8", "a8", "a8"]),
        (0.1, ["a16", "a16", "a16"]),
    ],
)
def test_the_share_with_the_smallest_output_scale_is_a8(share, expected):
    quantized, report = quantize(Net(), share=share)
    assert paths(report) == expected == [layer.activation for layer in quantized.layers]
    assert all(isinstance(layer, Int4Linear) for layer in quantized.layers)
    # and what a layer says is what it runs
    for layer in quantized.layers:
        x = torch.randn(3, layer.in_features)
        if layer.activation == "a8":
            assert torch.equal(layer(x), w4a8_linear(x, layer.packed, layer.x_scale[0], layer.bias, backend=BACKEND))
        else:
            assert torch.equal(layer(x), w4a16_linear(x, layer.packed, layer.bias, backend=BACKEND))


def test_the_share_changes_what_a_model_computes():
    # the published script's selection changed nothing
    x = inputs()[0]
    outputs = [quantize(Net(), share=share)[0](x) for share in (0, 1 / 3, 2 / 3, 1)]
    for i, output in enumerate(outputs):
        assert not any(torch.equal(output, other) for other in outputs[:i])


def test_ties_go_to_the_first():
    class Sum(nn.Sequential):
        def forward(self, x):
            return self[0](x) + self[1](x)

    model = Sum(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    for layer in model:
        nn.init.zeros_(layer.weight)
    _, report = quantize(model, [torch.ones(2, 32)], share=0.5)
    assert paths(report) == ["a8", "a16"]


def test_the_first_calibration_by_hand():
    model, calibration = Net(), inputs()
    _, report = quantize(model, calibration, share=1, second_calibration=False, momentum=0.75)
    packed = [quantize_int4(layer.weight, 32) for layer in model.layers]
    x_scale, output_scale = [None] * 3, [None] * 3

    def running(old, new):
        return new if old is None else 0.75 * old + 0.25 * new

    for x in calibration:
        for i, layer in enumerate(model.layers):
            x_scale[i] = running(x_scale[i], x.abs().amax() / 127)
            x = w4a8_linear(x, packed[i], x_scale[i], layer.bias, backend=BACKEND)
            output_scale[i] = running(output_scale[i], x.abs().amax() / 127)
    for layer, x, y in zip(report.layers, x_scale, output_scale, strict=True):
        assert layer.x_scale.tolist() == [[pytest.approx(float(x), rel=1e-6)]]
        assert layer.output_scale == pytest.approx(float(y), rel=1e-6)


def test_the_second_calibration_measures_behind_w4a16():
    model, calibration = Net(), inputs(1)
    (once, first), (twice, second) = (quantize(model, calibration, second_calibration=again) for again in (False, True))
    assert paths(first) == paths(second) == ["a16", "a16", "a8"]
    x = calibration[0]
    for layer in twice.layers[:2]:
        x = w4a16_linear(x, layer.packed, layer.bias, backend=BACKEND)
    assert float(twice.layers[2].x_scale) == float(x.abs().amax() / 127)
    assert float(once.layers[2].x_scale) != float(twice.layers[2].x_scale)


def test_errors_of_the_report_are_those_of_the_paths():
    model, calibration = Net(), inputs(1)
    _, report = quantize(model, calibration, share=1)
    x, layer = calibration[0], model.layers[0]
    packed, truth = quantize_int4(layer.weight, 32), F.linear(x, layer.weight, layer.bias)
    a8 = w4a8_linear(x, packed, x.abs().amax() / 127, layer.bias, backend=BACKEND)
    a16 = w4a16_linear(x, packed, layer.bias, backend=BACKEND)
    assert report.layers[0].error_a8 == pytest.approx(float((a8 - truth).norm() / truth.norm()), rel=1e-4)
    assert report.layers[0].error_a16 == pytest.approx(float((a16 - truth).norm() / truth.norm()), rel=1e-4)
    assert 0 < report.layers[0].error_a16 < 0.2


def test_ranking_by_error_spares_the_layer_that_outliers_hurt():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    nn.init.eye_(model[0].weight)
    # a second layer with smaller outputs, whose inputs have an outlier that it doesn't look at
    nn.init.normal_(model[1].weight, std=1e-3)
    model[1].weight.data[:, 0] = 0
    model[0].weight.data[0, 1] = 300.0
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    assert paths(quantize(model, [x], share=0.5)[1]) == ["a16", "a8"]
    assert paths(quantize(model, [x], share=0.5, rank_by="error")[1]) == ["a8", "a16"]


def test_guidance_halves_and_buckets_have_scales_of_their_own():
    model = nn.Sequential(nn.Linear(32, 8))
    x = torch.cat([torch.ones(2, 3, 32), 3 * torch.ones(2, 3, 32)])
    _, report = quantize(model, [x], share=1, guidance_halves=True)
    assert report.layers[0].x_scale.tolist() == [[pytest.approx(1 / 127), pytest.approx(3 / 127)]]
    places = [(0.25, 1), (0.5, 0), (0.75, 1), (0.0, 0)]
    calls = [CalibrationInput((k * torch.ones(1, 32),), {}, *place) for k, place in enumerate(places, 1)]
    _, report = quantize(model, calls, share=1, guidance_halves=True, num_timestep_buckets=2)
    assert (127 * report.layers[0].x_scale).tolist() == [[pytest.approx(4), pytest.approx(1)], [2, 3]]


def test_a_bucket_without_inputs_is_named():
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(ValueError, match=r"0: calibration: expected inputs of every .* bucket 0, half 0"):
        quantize(model, [torch.ones(1, 32)], num_timestep_buckets=2)
    with pytest.raises(ValueError, match="0: expected as many rows for each of 2 samples or guidance halves, got 3"):
        quantize(model, [torch.ones(3, 32)], guidance_halves=True)


@pytest.mark.parametrize("calls", [[(torch.ones(2, 32),)], [{"input": torch.ones(2, 32)}], iter([torch.ones(2, 32)])])
def test_inputs_are_arguments_keywords_or_one_tensor(calls):
    _, report = quantize(nn.Sequential(nn.Linear(32, 8)), calls, share=1)
    assert float(report.layers[0].x_scale) == pytest.approx(1 / 127)


def test_include_and_exclude():
    quantized, report = quantize(Net(), include=("layers.*",), exclude=("*.1",))
    assert [layer.name for layer in report.layers] == ["layers.0", "layers.2"]
    assert type(quantized.layers[1]) is nn.Linear


def test_a_layer_in_two_places_stays_one():
    linear = nn.Linear(32, 32)
    quantized, report = quantize(nn.Sequential(linear, nn.ReLU(), linear), [torch.ones(2, 32)])
    assert quantized[0] is quantized[2] and isinstance(quantized[0], Int4Linear) and len(report.layers) == 1


class TestFineTune:
    def tune(self, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in inputs():
            optimizer.zero_grad()
            model(x)[:, 0].sum().backward()
            optimizer.step()

    def test_it_trains_through_the_rounding_what_is_packed(self):
        model = Net()
        before = copy.deepcopy(model)
        seen = []

        def fine_tune(network):
            x = inputs()[0]
            with torch.no_grad():
                expected = quantize(model, share=1, second_calibration=False)[0](x)
                # the fake rounding is that of the kernels
                assert torch.allclose(network(x), expected, atol=1e-4)
            self.tune(network)
            seen.extend(layer.weight.detach().clone() for layer in network.layers)

        quantized, _ = quantize(model, fine_tune=fine_tune)
        assert equal_states(model, before)
        for layer, tuned, original in zip(quantized.layers, seen, model.layers, strict=True):
            assert not torch.equal(tuned, original.weight)
            expected = quantize_int4(tuned, 32)
            assert torch.equal(layer.w_q, expected.w_q) and torch.equal(layer.scale, expected.scale)

    def test_the_tuned_weights_survive_the_file(self, tmp_path):
        # the published script dropped them when it loaded its file
        tuned, _ = quantize(Net(), fine_tune=self.tune)
        plain, _ = quantize(Net())
        save_quantized(tuned, tmp_path / "tuned.safetensors")
        loaded = load_quantized(Net, tmp_path / "tuned.safetensors", backend=BACKEND)
        assert equal_states(loaded, tuned) and not equal_states(loaded, plain)
        # the norm was trained too
        assert not torch.equal(loaded.norm.weight, Net().norm.weight)
        x = inputs()[0]
        assert torch.equal(loaded(x), tuned(x)) and not torch.equal(loaded(x), plain(x))


class TestFile:
    @pytest.fixture
    def saved(self, tmp_path):
        quantized, _ = quantize(Net(), share=2 / 3)
        save_quantized(quantized, tmp_path / "net.safetensors")
        return quantized, tmp_path / "net.safetensors"

    def test_a_new_process_computes_the_same_bits(self, saved, tmp_path):
        quantized, _ = saved
        x = inputs()[1]
        torch.save(x, tmp_path / "x.pt")
        code = (
            "import sys, torch; sys.path[:0] = sys.argv[3:]; from test_quantize import Net, BACKEND\n"
            "from mgt_sampler import load_quantized\n"
            "model = load_quantized(Net(), sys.argv[1] + '/net.safetensors', backend=BACKEND)\n"
            "torch.save(model(torch.load(sys.argv[1] + '/x.pt')), sys.argv[1] + '/y.pt')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path), "-", *sys.path], check=True)
        assert torch.equal(torch.load(tmp_path / "y.pt"), quantized(x))

    def test_it_carries_everything(self, saved):
        quantized, path = saved
        model = Net()
        # whatever the model holds, the file's is taken: in its dtype, on no more than shapes
        for other in (model, model.to(torch.bfloat16), model.to("meta"), lambda: Net()):
            loaded = load_quantized(other, path, backend=BACKEND)
            assert equal_states(loaded, quantized) and not loaded.training
            assert [layer.activation for layer in loaded.layers] == [layer.activation for layer in quantized.layers]
        assert not any(isinstance(module, Int4Linear) for module in model.modules())

    def test_bfloat16_stays_bfloat16(self, tmp_path):
        model = Net().to(torch.bfloat16)
        quantized, _ = quantize(model, [x.bfloat16() for x in inputs()])
        save_quantized(quantized, tmp_path / "a.safetensors")
        assert equal_states(load_quantized(Net(), tmp_path / "a.safetensors", backend=BACKEND), quantized)

    def test_flipped_bytes_of_the_header_are_caught(self, saved):
        _, path = saved
        data = path.read_bytes()
        header_end = 8 + int.from_bytes(data[:8], "little")
        model = Net()
        before = copy.deepcopy(model)
        for i in [*range(12), *range(12, header_end, 7), header_end + 5, len(data) - 1]:
            path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
            with pytest.raises(ValueError, match=r"net\.safetensors: (truncated|damaged)"):
                load_quantized(model, path)
        assert equal_states(model, before)

    @pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
    def test_a_truncated_file(self, saved, size):
        _, path = saved
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"net\.safetensors: truncated"):
            load_quantized(Net(), path)

    def test_another_version(self, monkeypatch, saved):
        quantized, path = saved
        with monkeypatch.context() as patch:
            patch.setattr(quantized_file, "FORMAT_VERSION", 7)
            save_quantized(quantized, path)
        with pytest.raises(ValueError, match=r"net\.safetensors: written in version 7 of the format, expected 2"):
            load_quantized(Net(), path)

    def test_another_model(self, saved, tiny):
        quantized, path = saved
        model = Net((40, 24, 72, 9))
        with pytest.raises(ValueError, match=r"another model: layers\.2 is no linear layer of shape \(8, 72\)"):
            load_quantized(model, path)
        with pytest.raises(ValueError, match=r"another model: model 'Net', expected 'Transformer'"):
            load_quantized(tiny.transformer, path)
        model = Net()
        model.extra = nn.LayerNorm(3)
        with pytest.raises(ValueError, match=r"another model: .*extra\.weight"):
            load_quantized(model, path)
        with pytest.raises(ValueError, match=r"another model: layers\.0 is no linear"):
            load_quantized(quantized, path)

    def test_another_configuration_of_the_same_sizes(self, tmp_path, tiny):
        quantized, _ = quantize(tiny.transformer, [(torch.zeros(1, 16, dtype=int), torch.zeros(1, dtype=int))])
        save_quantized(quantized, tmp_path / "a.safetensors")
        other = Transformer(TransformerConfig(grid_size=4, codebook_size=8, width=32, num_layers=1, num_heads=4))
        with pytest.raises(ValueError, match="another model: config"):
            load_quantized(other, tmp_path / "a.safetensors")

    def test_other_files(self, tmp_path, saved):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="not of this package"):
            load_quantized(Net(), tmp_path / "a.safetensors")
        with pytest.raises(FileNotFoundError):
            load_quantized(Net(), tmp_path / "none.safetensors")
        with pytest.raises(ValueError, match="expected one with quantized layers"):
            save_quantized(Net(), tmp_path / "b.safetensors")
        assert not (tmp_path / "b.safetensors").exists()

    @pytest.mark.parametrize(
        ("lie", "message"),
        [
            (lambda header, facts: header["__metadata__"].update(mgt_quantized="[]"), "has no version"),
            (lambda header, facts: header["__metadata__"].update(mgt_quantized="[" * 99_999), "has no version"),
            (lambda header, facts: header["__metadata__"].update(mgt_quantized='{"version":2}'), "expected mgt"),
            (lambda header, facts: header["__metadata__"].pop("aliases"), "has no aliases"),
            (lambda header, facts: header["__metadata__"].update(aliases='{"a": "b"}'), "a stands for no tensor"),
            (lambda header, facts: header.update(deep=json.loads("[" * 900 + "]" * 900)), "deep: expected dtype"),
            (lambda header, facts: header["norm.weight"].update(dtype="F64", shape=[4]), "norm.weight has shape"),
            (lambda header, facts: header["norm.weight"].update(dtype="I32"), "norm.weight is in torch.int32"),
            (lambda header, facts: header["norm.weight"].update(shape=[2**62, 2**62]), "within 0 to 2"),
            (lambda header, facts: header["norm.weight"].update(shape=[True, 8]), "within 0 to 2"),
            (lambda header, facts: header["norm.weight"].update(dtype=[]), "unknown dtype"),
            (lambda header, facts: header["norm.weight"].pop("shape"), "expected dtype, shape and data_offsets"),
            (lambda header, facts: header["layers.0.bias"].update(shape=[2, 12]), "layers.0: bias: expected 24 values"),
            (lambda header, facts: header["layers.0.scale"].update(dtype="BF16"), "layers.0: scale: expected dtype"),
            (lambda header, facts: facts.update(version=True), "version: expected an int"),
            (lambda header, facts: facts.update(layers=[]), "layers: unexpected list"),
            (lambda header, facts: facts.update(layers={}), "no quantized layer"),
            (lambda header, facts: facts.update(mask_token_id="x"), "mask_token_id: unexpected str"),
            (lambda header, facts: facts.update(mask_token_id=3), "no layer with several scales"),
            (lambda header, facts: facts["layers"].update({"layers.0": 3}), "expected layers.0 with shape"),
            (lambda header, facts: facts["layers"].update(nothing=facts["layers"]["layers.0"]), "nothing is no linear"),
            (lambda header, facts: facts["layers"]["layers.0"].update(group_size=10**30), "layers.0: "),
            (lambda header, facts: facts["layers"]["layers.0"].update(group_size=64.0), "group_size: unexpected float"),
            (lambda header, facts: facts["layers"]["layers.0"].update(shape=[24, None]), "no linear layer of shape"),
            (lambda header, facts: facts["layers"]["layers.1"].update(activation="a8"), "layers.1: activation: 'a8'"),
        ],
    )  # fmt: skip
    def test_lies_with_a_valid_checksum_are_refused_with_the_file_s_name(self, saved, lie, message):
        _, path = saved
        fuzz = load_fuzzer()
        data = path.read_bytes()
        header = fuzz.header_of(data)
        facts = json.loads(header["__metadata__"]["mgt_quantized"])
        before = json.dumps(facts)
        lie(header, facts)
        if json.dumps(facts) != before:
            header["__metadata__"]["mgt_quantized"] = json.dumps(facts)
        path.write_bytes(fuzz.packed(header, data))
        with pytest.raises(ValueError, match=rf"net\.safetensors: .*{re.escape(message)}"):
            load_quantized(Net(), path)

    def test_a_tensor_in_float64_or_alone_in_another_dtype_is_refused_at_loading(self, saved):
        quantized, path = saved
        for dtype in (torch.float64, torch.bfloat16):
            quantized.norm.weight.data = quantized.norm.weight.data.to(dtype)
            save_quantized(quantized, path)
            with pytest.raises(ValueError, match=rf"net\.safetensors: .*norm\.weight is in {dtype}"):
                load_quantized(Net(), path)
        quantized.norm.weight.data = torch.full((8,), torch.nan)
        save_quantized(quantized, path)
        with pytest.raises(ValueError, match=r"net\.safetensors: norm\.weight: expected finite values"):
            load_quantized(Net(), path)

    def test_broken_files_of_both_formats(self, tmp_path):
        fuzz = load_fuzzer()
        valid, outcomes = fuzz.make_files(tmp_path), {"refused": 0, "taken": 0}
        for number in range(300):
            source, load = valid[number % len(valid)]
            data, what = fuzz.broken(source, random.Random(number))
            (tmp_path / "broken.safetensors").write_bytes(data)
            assert not fuzz.judge(tmp_path / "broken.safetensors", load, outcomes), (number, what)
        assert outcomes["refused"] > 200 and outcomes["taken"] > 3

    def test_tied_tensors_are_stored_once_and_come_back_tied(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.fc = nn.Embedding(99, 64), nn.Linear(64, 64)
                self.head = nn.Linear(64, 99, bias=False)
                self.head.weight = self.embedding.weight

            def forward(self, ids):
                return self.head(self.fc(self.embedding(ids)))

        ids, path = torch.arange(6)[None], tmp_path / "tied.safetensors"
        quantized, _ = quantize(Tied(), [ids], exclude=("head",))
        save_quantized(quantized, path)
        loaded = load_quantized(Tied, path)
        assert loaded.head.weight is loaded.embedding.weight and torch.equal(loaded(ids), quantized(ids))
        assert loaded.head.weight.requires_grad
        assert path.stat().st_size < 1.5 * 99 * 64 * 4

    def test_saving_keeps_the_mode_and_the_old_file_where_it_fails(self, saved, monkeypatch):
        quantized, path = saved
        path.chmod(0o600)
        save_quantized(quantized, path)
        assert path.stat().st_mode & 0o777 == 0o600
        before = path.read_bytes()

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_quantized(quantized, path)
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]

    def test_saving_and_loading_need_the_memory_of_the_file(self, tmp_path):
        # measured on a layer of 64 MiB, in a process of its own, whose peak is its own
        code = (
            "import sys, torch; from torch import nn; from mgt_kernels import PackedInt4\n"
            "from mgt_sampler import Int4Linear, load_quantized, save_quantized\n"
            "def status(name):\n"
            "    return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1]) * 1024\n"
            "n, k, path = 8192, 16384, sys.argv[1]\n"
            "small = torch.full((n, k // 128), 7, dtype=torch.uint8)\n"
            "packed = PackedInt4(torch.full((n, k // 2), 7, dtype=torch.uint8), small.half(), small, (n, k), 128)\n"
            "model = nn.Sequential(Int4Linear(packed))\n"
            "before = status('VmRSS'); save_quantized(model, path); print(status('VmHWM') - before)\n"
            "del model, packed\n"
            "with torch.device('meta'): model = nn.Sequential(nn.Linear(k, n, bias=False))\n"
            "before = status('VmRSS'); load_quantized(model, path); print(status('VmHWM') - before)\n"
        )
        path = tmp_path / "big.safetensors"
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        save, load = (int(line) / path.stat().st_size for line in done.stdout.split())
        assert save < 0.2 and load < 1.8, (save, load)

    def test_a_file_with_a_forged_checksum_is_still_checked(self, saved):
        quantized, path = saved
        quantized.layers[0].scale[0, 0] = float("nan")
        save_quantized(quantized, path)
        with pytest.raises(ValueError, match=r"net\.safetensors: layers\.0: scale: expected positive"):
            load_quantized(Net(), path)

    def test_the_checksum_is_of_the_file(self, saved):
        data = saved[1].read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        digest = header["__metadata__"]["checksum"]
        assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


@pytest.mark.parametrize("fine_tune", [None, lambda model: None])
def test_batch_invariance_is_given_up_where_asked_for(fine_tune, tmp_path):
    for batch_invariant in (True, False):
        quantized, _ = quantize(Net(), fine_tune=fine_tune, batch_invariant=batch_invariant)
        # a file holds no settings of the machine
        save_quantized(quantized, tmp_path / "net.safetensors")
        loaded = load_quantized(Net(), tmp_path / "net.safetensors", batch_invariant=batch_invariant)
        for model in (quantized, copy.deepcopy(quantized), loaded):
            assert {layer.batch_invariant for layer in model.layers} == {batch_invariant}
    with pytest.raises(TypeError, match="batch_invariant: expected a bool, got None"):
        load_quantized(Net(), tmp_path / "net.safetensors", batch_invariant=None)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"share": -0.1}, "share"),
            ({"share": 1.1}, "share"),
            ({"share": float("nan")}, "share"),
            ({"share": "all"}, "share"),
            ({"rank_by": "size"}, "rank_by: expected one of scale, error, got 'size'"),
            ({"momentum": 1.0}, "momentum"),
            ({"num_timestep_buckets": 0}, "num_timestep_buckets"),
            ({"group_size": 33}, r"layers\.0: group_size"),
            ({"include": ("blocks.*",)}, "include: expected patterns that match"),
            ({"exclude": ("*",)}, "include: expected patterns that match"),
            ({"backend": "abacus"}, "backend"),
            ({"calibration": []}, "calibration: expected one input at least"),
            ({"calibration": [torch.full((2, 40), torch.inf)]}, r"layers\.0: expected finite activations"),
        ],
    )
    def test_values(self, options, message):
        model = Net()
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=message):
            quantize(model, **options)
        assert equal_states(model, before) and all(type(layer) is nn.Linear for layer in model.layers)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"include": "*"}, "include: expected a sequence"),
            ({"calibration": torch.zeros(2, 40)}, "calibration: expected an iterable"),
            ({"calibration": 3}, "calibration: expected an iterable"),
            ({"calibration": [torch.zeros(2, 40).double()]}, r"layers\.0: expected activations in float32"),
            ({"scale_dtype": torch.bfloat16}, "scale_dtype"),
            ({"batch_invariant": 1}, "batch_invariant: expected a bool, got 1"),
        ],
    )
    def test_types(self, options, message):
        with pytest.raises(TypeError, match=message):
            quantize(Net(), **options)

    def test_weights_that_are_not_finite(self):
        for tensor in ("weight", "bias"):
            model = Net()
            getattr(model.layers[2], tensor)[3] = torch.nan
            with pytest.raises(ValueError, match=rf"layers\.2: {tensor}"):
                quantize(model)

    def test_a_layer_that_is_quantized_already(self):
        quantized, _ = quantize(Net())
        with pytest.raises(ValueError, match=r"layers\.0: is quantized already"):
            quantize(quantized)

    def test_no_module(self, tiny):
        with pytest.raises(TypeError, match="model"):
            quantize(tiny)


def test_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    quantized, report = quantize(Net())
    lines = report.table().splitlines()
    assert (
        len(lines) == 5 and "w4a8" in lines[3] and cpu.kernel_isa("w4a8_linear") in lines[3] and "24 x 40" in lines[1]
    )
    assert lines[-1].split() == ["all", "1", "of", "3", "w4a8", f"{report.weight_bytes:,}"]
    packed: list[PackedInt4] = [layer.packed for layer in quantized.layers]
    assert report.weight_bytes == sum(weight.nbytes for weight in packed)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


class TestSampler:
    def test_trajectories_are_what_the_transformer_gets(self, tiny):
        calls = sampler_trajectories(
            tiny, labels=[1, 2], num_inference_steps=3, guidance_scale=2.0, seed=0, backend=BACKEND
        )
        assert len(calls) == 6 and [call.guidance_half for call in calls] == [0, 1] * 3
        assert (calls[0].masked == 1).all() and (calls[-1].masked < 0.6).all()
        assert calls[0].args[1].tolist() == [1, 2] and calls[1].args[1].tolist() == [10, 10]
        assert not tiny.transformer._forward_pre_hooks

    def test_a_quantized_model_generates(self, tiny):
        arguments = dict(labels=[1, 2], num_inference_steps=2, guidance_scale=2.0, seed=0, backend=BACKEND)
        calls = sampler_trajectories(tiny, **arguments)
        tiny.transformer, report = quantize(
            tiny.transformer, calls, share=1, guidance_halves=True, num_timestep_buckets=1
        )
        assert len(report.layers) == 5 and report.layers[0].x_scale.shape == (1, 2)
        output = generate(ScaledModel(tiny), **arguments)
        assert output.images.shape == (2, 1, 8, 8)
        # a sample is the same without the other
        alone = generate(ScaledModel(tiny), **{**arguments, "labels": [2], "seed": output.seed[1:]})
        assert torch.equal(alone.tokens, output.tokens[1:])

    def test_no_transformer(self):
        with pytest.raises(TypeError, match="model: expected one with a transformer"):
            sampler_trajectories(object())


class TestCommand:
    @pytest.fixture
    def model(self, tiny, monkeypatch, tmp_path):
        monkeypatch.setattr(cli, "load_model", lambda name, device, dtype=None: copy.deepcopy(tiny))
        monkeypatch.chdir(tmp_path)
        return tiny

    def mgt(self, *args):
        options = ["--backend", BACKEND, "--no-progress", "--steps", "2"]
        return CliRunner().invoke(cli.app, [*args, *options], catch_exceptions=False)

    def test_quantize_and_sample(self, model, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        result = self.mgt("quantize", "--share", "0.4", "--out", "q.safetensors", "--report", "report.png", "-n", "3")
        assert result.exit_code == 0, result.output
        assert "2 of 5 w4a8" in result.stdout and "blocks.0.mlp_out" in result.stdout
        assert "q.safetensors: " in result.stdout and (tmp_path / "report.png").exists()
        sampled = []
        monkeypatch.setattr(
            cli, "generate", lambda model, **options: sampled.append(model) or generate(model, **options)
        )
        result = self.mgt("sample", "--quantized", "q.safetensors", "-n", "1")
        assert result.exit_code == 0, result.output
        # what is in the file is what samples
        loaded = load_quantized(model.transformer, "q.safetensors")
        assert equal_states(sampled[0].transformer, loaded)
        layers = [module for module in sampled[0].transformer.modules() if isinstance(module, Int4Linear)]
        assert len(layers) == 5 and {layer.backend for layer in layers} == {BACKEND}

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("quantize", "--out", "q.txt"), "--out: expected a file name ending in .safetensors"),
            (("quantize", "--out", "q.safetensors", "--share", "2"), "share: expected a number in [0, 1], got 2.0"),
            (("quantize", "--out", "q.safetensors", "--rank-by", "size"), "rank_by: expected one of"),
            (("quantize", "--out", "q.safetensors", "--group-size", "20"), "group_size: expected a multiple of 32"),
            (("quantize", "--out", "no/folder/q.safetensors"), "--out: expected a path in a folder that exists"),
            (("quantize", "--out", "q.safetensors", "--report", "no/r.png"), "--report: expected a path in a folder"),
            (("sample", "--quantized", "none.safetensors"), "none.safetensors"),
        ],
    )
    def test_errors_are_one_line(self, model, args, message, monkeypatch):
        if "no/" in str(args):
            # refused before any work
            monkeypatch.setattr(cli, "sampler_trajectories", None)
        result = self.mgt(*args, "-n", "1")
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
