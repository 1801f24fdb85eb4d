"""A quantized model in its host: whatever holds an `Int4Linear` finds a Linear, or is refused by name."""

import copy
import io
import operator
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parametrizations, prune

from mgt_kernels import quantize_int4, w4a8_linear, w4a16_linear
from mgt_kernels.checks import BACKENDS
from mgt_sampler import (
    CalibrationInput,
    Int4Linear,
    ScaledModel,
    activation_scales,
    generate,
    load_quantized,
    quantize,
    register_quantizers,
    save_quantized,
)


class Pair(nn.Module):
    """A layer with a bias and one without."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.b(self.a(x))


class Tokens(nn.Module):
    """Logits of tokens, of which 8 is the mask."""

    mask_token_id, codebook_size, num_tokens = 8, 8, 6

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 64)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, tokens, condition=None):
        return self.layers(self.embedding(tokens))

    predict_logits = forward

    def decode(self, tokens):
        return tokens


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


@pytest.fixture
def x():
    return torch.randn(4, 64)


def pair(x, **options):
    model = Pair().eval()
    return model, quantize(model, [x], share=0.5, group_size=32, **options)[0]


def error(y, truth):
    return float((y - truth).norm() / truth.norm())


def tokens_of(*shares):
    """A row of tokens for each share of masked ones."""
    rows = torch.randint(8, (len(shares), 6))
    for row, share in zip(rows, shares, strict=True):
        row[: round(6 * share)] = 8
    return rows


def bucketed(**options):
    calls = [tokens_of(share, share / 2) for share in (0, 0.5, 1, 0.9, 0.2)]
    if options:
        calls = [tokens.repeat(2, 1) for tokens in calls]
    return quantize(Tokens(), calls, share=1, num_timestep_buckets=3, mask_token_id=8, **options)[0]


class TestWhatALinearHas:
    def test_a_transformer_encoder_whose_fast_path_reads_weight(self):
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        x = torch.randn(2, 5, 64)
        quantized, _ = quantize(model, [x])
        assert error(quantized(x), model(x)) < 0.1
        with torch.enable_grad():
            assert torch.equal(quantized(x), quantized(x.requires_grad_()))

    def test_a_block_that_asks_its_parameters_for_a_dtype(self, x):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Linear(64, 64, bias=False)

            def forward(self, x):
                like = next(self.embed.parameters())
                return self.embed(x.to(like.device, like.dtype))

        quantized, _ = quantize(Block(), [x])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert quantized.to(dtype)(x).dtype == quantized.embed.weight.dtype == dtype

    def test_what_can_be_read_of_a_weight(self, x):
        model, quantized = pair(x)
        layer = quantized.a
        weight, values = layer.weight, layer.packed.dequantize()
        assert isinstance(layer, nn.Linear) and isinstance(weight, nn.Parameter)
        for name in ("shape", "dtype", "device", "ndim", "is_leaf", "requires_grad", "grad", "layout"):
            assert getattr(weight, name) == getattr(model.a.weight.requires_grad_(False), name)
        assert (layer.in_features, layer.out_features, weight.numel(), len(weight)) == (64, 64, 4096, 64)
        assert weight.stride() == (64, 1) and weight.size(0) == 64 and weight.element_size() == 4
        assert torch.equal(F.linear(x, weight, layer.bias), F.linear(x, values, layer.bias))
        for read in (
            torch.clone,
            copy.deepcopy,
            lambda w: w.detach() + 0,
            lambda w: w.data * 1,
            lambda w: torch.tensor(w.numpy()),
            lambda w: torch.tensor(w.tolist()),
            lambda w: w.T.T,
            lambda w: torch.stack(list(w)),
            lambda w: w.double().float(),
        ):
            assert type(read(weight)) is torch.Tensor and torch.equal(read(weight), values)
        assert weight[3, 5] == values[3, 5] and weight.abs().max() == values.abs().max()
        assert "Int4Weight((64, 64)" in repr(weight) and quantized.b.bias is None
        # a gradient goes through it to what it meets
        with torch.enable_grad():
            F.linear(x.requires_grad_(), weight).sum().backward()
        assert torch.allclose(x.grad, values.sum(0).expand(4, 64), atol=1e-5)

    @pytest.mark.parametrize(
        "write",
        [
            lambda layer: layer.weight.data.add_(1),
            lambda layer: layer.weight.copy_(torch.zeros(64, 64)),
            lambda layer: operator.iadd(layer.weight, 1),
            lambda layer: nn.init.normal_(layer.weight),
            lambda layer: setattr(layer.weight, "data", torch.zeros(64, 64)),
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(64, 64))),
            lambda layer: operator.setitem(layer.weight, (0, 0), 1.0),
            lambda layer: torch.add(layer.weight, 1, out=layer.weight),
            lambda layer: layer.weight.requires_grad_(),
            lambda layer: setattr(layer.weight, "requires_grad", True),
            lambda layer: layer.reset_parameters(),
        ],
    )
    def test_whatever_writes_to_a_weight_is_refused_by_name(self, x, write):
        _, quantized = pair(x)
        with pytest.raises(RuntimeError, match=r"^a: .*4 bits and cannot be written"):
            write(quantized.a)
        quantized.a.weight.requires_grad_(False).requires_grad = False
        quantized.requires_grad_(True).requires_grad_(False)

    def test_a_keyword_call(self, x):
        class Keyword(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(64, 64)

            def forward(self, x):
                return self.fc(input=x)

        model = Keyword()
        quantized, _ = quantize(model, [x])
        assert error(quantized(x), model(x)) < 0.1

    def test_gradients_go_to_activations_and_a_bias_that_is_trained(self, x):
        model, quantized = pair(x)
        with torch.enable_grad():
            x.requires_grad_()
            expected = torch.autograd.grad(model(x).square().sum(), [x, model.a.bias])
            y = quantized(x)
            assert torch.equal(y, quantized(x.detach()))
            quantized.a.bias.requires_grad_()
            found = torch.autograd.grad(quantized(x).square().sum(), [x, quantized.a.bias])
        assert all(error(a, b) < 0.2 for a, b in zip(found, expected, strict=True))

    def test_autocast_and_float16(self, x):
        _, quantized = pair(x)
        y = quantized(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert quantized(x).dtype == torch.bfloat16 and error(quantized(x).float(), y) < 0.02
        half = copy.deepcopy(quantized).half()(x.half())
        assert half.dtype == torch.float16 and error(half.float(), y) < 0.01
        with pytest.raises(
            TypeError, match=r"^a: expected activations in float32, bfloat16 or float16, got torch.float64"
        ):
            quantized(x.double())

    def test_repr_on_any_backend(self, monkeypatch):
        packed = quantize_int4(torch.randn(8, 32), 32)
        for name in BACKENDS:
            assert "kernel=" in repr(Int4Linear(packed, backend=name))
        assert "kernel=triton" in repr(Int4Linear(packed, backend="triton"))
        assert "kernel=none" in repr(Int4Linear(packed).to("meta"))
        monkeypatch.setenv("MGT_ISA", "abacus")
        assert "kernel=" in repr(Int4Linear(packed))

    @pytest.mark.parametrize("capability, limit", [((9, 0), 1024), ((8, 0), 512), ((12, 0), None)])
    def test_the_product_of_many_rows_on_cuda_is_named(self, capability, limit, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        packed = quantize_int4(torch.randn(8, 32), 32)
        layer = Int4Linear(packed, backend="triton")
        a8 = Int4Linear(packed, None, torch.ones(1, 1), backend="triton", batch_invariant=False)
        # the device is not there
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        assert layer.kernel == a8.kernel == "triton"
        layer.batch_invariant = False
        assert layer.kernel == ("triton" if limit is None else f"triton, torch.mm from {limit} rows")

    def test_copies_pickles_and_the_meta_device(self, x, tmp_path):
        _, quantized = pair(x)
        y, state = quantized(x), {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
        torch.save(quantized, tmp_path / "model.pt")
        empty = copy.deepcopy(quantized).to("meta").to_empty(device="cpu")
        empty.load_state_dict(state)
        for other in (
            empty,
            copy.deepcopy(quantized),
            pickle.loads(pickle.dumps(quantized)),
            torch.load(tmp_path / "model.pt", weights_only=False),
            quantized.to(torch.float32),
            quantized.share_memory(),
        ):
            assert torch.equal(other(x), y)
        assert copy.deepcopy(quantized).to("meta")(x.to("meta")).shape == y.shape
        buffer = io.BytesIO()
        torch.save(quantized.a.weight, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer), quantized.a.packed.dequantize())

    def test_what_is_made_in_inference_mode_works_outside(self, x, tmp_path):
        with torch.inference_mode():
            model, quantized = pair(x)
            save_quantized(quantized, tmp_path / "q.safetensors")
            made = quantized, load_quantized(model, tmp_path / "q.safetensors")
            weight = quantized.a.weight.abs()
        assert torch.equal(quantized.a.weight.abs(), weight)
        for other in made:
            other.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()})
            with torch.enable_grad():
                other(torch.ones(2, 64, requires_grad=True)).sum().backward()

    def test_a_choice_is_not_copied(self):
        quantized = bucketed()
        with activation_scales(quantized, masked=0.5):
            assert copy.deepcopy(quantized).layers[0]._scale_index is None

    def test_a_compiled_host_that_reads_a_weight(self, x):
        class Reader(Pair):
            def forward(self, x):
                return self.b(self.a(x.to(self.b.weight.dtype)) * self.a.weight.mean())

        quantized, _ = quantize(Reader(), [x], group_size=32)
        compiled = torch.compile(quantized, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), quantized(x))


class TestWhatHostsHangOnALinear:
    def test_hooks_are_kept(self, x):
        seen = []

        class Hooked(Pair):
            def __init__(self):
                super().__init__()
                self.a.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
                self.a.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
                self.a.register_forward_hook(lambda _, args, y: y + 100)
                self.a.register_forward_hook(lambda _, args, kwargs, y: y * 0.5, with_kwargs=True)
                self.b.register_forward_hook(self.count, always_call=True)
                self.b.register_full_backward_hook(lambda *_: seen.append("backward"))
                self.calls = 0

            def count(self, *_):
                self.calls += 1

        model = Hooked()
        truth = model(x)
        quantized, report = quantize(model, [x], group_size=32)
        assert error(quantized(x), truth) < 0.1
        # a bound method is that of the copy, and calibration saw what came through the hooks
        assert model.calls == 1 and quantized.calls == 4
        assert max(layer.error_a16 for layer in report.layers) < 0.1
        with torch.enable_grad():
            quantized(x.requires_grad_()).sum().backward()
        assert seen == ["backward"]

    def test_hooks_survive_the_file_and_fine_tuning(self, x, tmp_path):
        model = Pair()
        model.a.register_forward_hook(lambda _, args, y: y + 100)
        tuned = []
        quantized, _ = quantize(model, [x], group_size=32, fine_tune=lambda network: tuned.append(network(x)))
        save_quantized(quantized, tmp_path / "q.safetensors")
        assert torch.equal(load_quantized(model, tmp_path / "q.safetensors")(x), quantized(x))
        assert error(quantized(x), model(x)) < 0.1 and error(tuned[0], model(x)) < 0.1

    def test_attributes_buffers_and_modules_come_along(self, x):
        model = Pair()
        model.a.scale_attr, model.a.name = 3, "up"
        model.a.register_buffer("mask", torch.ones(64), persistent=False)
        model.a.probe = nn.LayerNorm(64)
        quantized, _ = quantize(model, [x])
        assert quantized.a.scale_attr == 3 and quantized.a.name == "up" and quantized.a.mask.shape == (64,)
        assert isinstance(quantized.a.probe, nn.LayerNorm) and quantized.a.probe is not model.a.probe
        assert "a.mask" not in quantized.state_dict()

    @pytest.mark.parametrize("name", ["scale", "x_scale", "group_size", "packed"])
    def test_an_attribute_of_a_quantized_layer_s_own_is_refused_by_name(self, x, name):
        model = Pair()
        setattr(model.b, name, 3)
        with pytest.raises(ValueError, match=rf"^b: has an attribute {name}, which a quantized layer needs"):
            quantize(model, [x])

    @pytest.mark.parametrize(
        "register",
        [
            lambda layer: layer._register_state_dict_hook(lambda *_: None),
            lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
            lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
            lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
        ],
    )
    def test_state_dict_hooks_are_refused_by_name(self, x, register):
        model = Pair()
        register(model.b)
        with pytest.raises(ValueError, match=r"^b: has state-dict hooks"):
            quantize(model, [x])
        quantize(model, [x], exclude=("b",))

    def test_a_forward_replaced_on_the_instance_is_refused_by_name(self, x):
        model = Pair()
        model.b.forward = lambda x: x
        with pytest.raises(ValueError, match=r"^b: its forward has been replaced"):
            quantize(model, [x])

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    @pytest.mark.parametrize(
        "wrap",
        [
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            parametrizations.orthogonal,
            lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
            lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "bias", 0.3), "weight", 0.3),
        ],
    )
    def test_a_weight_that_is_computed(self, x, wrap, tmp_path):
        def make():
            return nn.Sequential(wrap(nn.Linear(64, 64)), nn.Linear(64, 64)).eval()

        model, source = make(), make()
        for tensor in source.parameters():
            tensor.mul_(1.5)
        # loaded, and not called since: what stands in `weight` is stale
        model.load_state_dict(source.state_dict())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        quantized, _ = quantize(model, [x], group_size=32)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert error(quantized(x), model(x)) < 0.15
        save_quantized(quantized, tmp_path / "q.safetensors")
        assert torch.equal(load_quantized(make, tmp_path / "q.safetensors")(x), quantized(x))

    def test_a_weight_computed_by_what_is_not_known_is_refused_by_name(self, x):
        model = Pair()
        weight = model.a.weight
        del model.a.weight
        model.a.register_parameter("base", weight)
        model.a.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", layer.base * 2))
        with pytest.raises(ValueError, match=r"^a: its weight is computed"):
            quantize(model, [x])

    def test_a_model_that_keeps_its_last_activation(self, x):
        class Keeper(Pair):
            def forward(self, x):
                self.last = {"of a": [self.a(x)]}
                return self.b(self.last["of a"][0])

        model = Keeper()
        with torch.enable_grad():
            model(x)
        quantized, _ = quantize(model, [x])
        assert model.last["of a"][0].requires_grad and not quantized.last["of a"][0].requires_grad

    def test_a_model_on_the_meta_device_is_refused_by_name(self, x):
        with pytest.raises(ValueError, match=r"^a: expected weights, got none: it is on the meta device"):
            quantize(Pair().to("meta"), [x])

    def test_a_compiled_model_is_refused(self, x):
        with pytest.raises(TypeError, match="model: is compiled"):
            quantize(torch.compile(Pair(), backend="eager"), [x])


class TestCalibration:
    def test_a_layer_that_calibration_never_reached(self, x, tmp_path):
        class Experts(Pair):
            def __init__(self):
                super().__init__()
                self.closed, self.zeros = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x):
                return super().forward(x) + self.zeros(torch.zeros_like(x))

        model = Experts()
        quantized, report = quantize(model, [x, x], share=1, group_size=32)
        found = {layer.name: (layer.activation, layer.fallback) for layer in report.layers}
        assert found == {
            "a": ("a8", ""), "b": ("a8", ""), "closed": ("a16", "not reached"), "zeros": ("a16", "only zeros"),
        }  # fmt: skip
        table = report.table()
        assert "not reached" in table and "only zeros" in table and "2 of 4 w4a8" in table
        assert error(quantized.closed(x), model.closed(x)) < 0.1 and error(quantized.zeros(x), model.zeros(x)) < 0.1
        pytest.importorskip("matplotlib")
        report.plot(tmp_path / "report.svg")
        assert "only zeros" in (tmp_path / "report.svg").read_text()
        with pytest.raises(ValueError, match="not reached by the calibration, and no other"):
            quantize(model, [x], include=("closed",))

    def test_float16_models_and_numpy_scalars(self, x):
        model, numbers = Pair().half(), dict(share=np.float32(0.5), num_timestep_buckets=np.int64(1))
        quantized, _ = quantize(model, [x.half()], group_size=32, mask_token_id=np.int32(3), **numbers)
        assert (
            quantized(x.half()).dtype == torch.float16
            and error(quantized(x.half()).float(), model(x.half()).float()) < 0.1
        )

    def test_zeros_first_do_not_make_a_scale_small(self, x):
        _, once = quantize(Pair(), [x], share=1)
        torch.manual_seed(0)
        _, twice = quantize(Pair(), [torch.zeros(4, 64), x], include=("a",), share=1)
        assert once.layers[0].x_scale.tolist() == twice.layers[0].x_scale.tolist()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_default_dtype_and_device_change_nothing(self, x, dtype, tmp_path):
        model, quantized = pair(x)
        save_quantized(quantized, tmp_path / "q.safetensors")
        try:
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                again, _ = quantize(model, [x], share=0.5, group_size=32)
                loaded = load_quantized(model, tmp_path / "q.safetensors")
        finally:
            torch.set_default_dtype(torch.float32)
        for other in (again, loaded):
            states = zip(other.state_dict().items(), quantized.state_dict().items(), strict=True)
            assert all(a == b and s.dtype == t.dtype and torch.equal(s, t) for (a, s), (b, t) in states)


class TestSeveralScales:
    def test_they_raise_where_nobody_chose(self):
        quantized, _ = quantize(Tokens(), [(tokens_of(0, 0),)], guidance_halves=True, share=1)
        with pytest.raises(RuntimeError, match=r"layers\.0: has scales for 1 timestep buckets and 2 .*nobody chose"):
            quantized(tokens_of(0, 1))

    def test_a_sample_alone_is_as_in_its_batch(self):
        quantized = bucketed()
        tokens = tokens_of(1, 0.1, 0.5, 0.7)
        assert torch.equal(quantized(tokens), torch.cat([quantized(row[None]) for row in tokens]))
        # and over a whole generation, whoever else is in it
        model = ScaledModel(quantized)
        start = torch.full((3, 6), 8)
        start[1, 1:] = 3
        arguments = dict(num_inference_steps=3, temperature=2.0, progress=False)
        seeds = torch.tensor([5, 6, 7])
        together = generate(model, tokens=start, seed=seeds, **arguments).tokens
        for i in range(3):
            alone = generate(model, tokens=start[i : i + 1], seed=seeds[i : i + 1], **arguments).tokens
            assert torch.equal(alone[0], together[i])

    def test_calibration_is_per_sample(self):
        rows = {share: tokens_of(share) for share in (0, 0.5, 1)}
        together = torch.cat(list(rows.values()))
        options = dict(
            share=1, num_timestep_buckets=3, mask_token_id=8, second_calibration=False, include=("layers.0",)
        )
        model = Tokens()
        _, batch = quantize(model, [(together,)], **options)
        _, alone = quantize(model, [(row,) for row in rows.values()], **options)
        assert torch.equal(batch.layers[0].x_scale, alone.layers[0].x_scale)
        peaks = [float(model.embedding(row).abs().max()) / 127 for row in rows.values()]
        assert batch.layers[0].x_scale.flatten().tolist() == pytest.approx(peaks)

    def test_compiled_they_are_one_graph(self):
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        calls = [CalibrationInput((torch.randn(4, 64) * (k + 1),), {}, k / 2) for k in range(3)]
        quantized, _ = quantize(Pair(), calls, share=1, num_timestep_buckets=3)
        compiled = torch.compile(quantized, backend=backend, fullgraph=True)
        x, seen = torch.randn(4, 64), []
        for shares in ([0.0, 0.4, 0.7, 1.0], [1.0, 0.4, 0.7, 0.0], [0.0] * 4):
            with activation_scales(quantized, masked=torch.tensor(shares)):
                seen.append(compiled(x))
                assert torch.equal(seen[-1], quantized(x))
        assert len(graphs) == 1 and not torch.equal(seen[0], seen[1])

    def test_compiled_with_tokens_they_choose_themselves(self):
        quantized = bucketed()
        compiled = torch.compile(quantized, backend="eager", fullgraph=True)
        for shares in ((0, 1), (1, 0.5), (0.2, 0.9)):
            tokens = tokens_of(*shares)
            assert torch.equal(compiled(tokens), quantized(tokens))

    def test_a_thread_started_inside_has_the_choice(self):
        quantized, _ = quantize(Pair(), [torch.randn(4, 64)], share=1, guidance_halves=True)
        x, found = torch.randn(4, 64), []
        with activation_scales(quantized, guidance_half=1):
            thread = threading.Thread(target=lambda: found.append(quantized(x)))
            thread.start()
            thread.join()
            assert torch.equal(found[0], quantized(x))

            def choose():
                with pytest.raises(RuntimeError, match="another thread is choosing"), activation_scales(quantized):
                    pass
                found.append("refused")

            thread = threading.Thread(target=choose)
            thread.start()
            thread.join()
        assert found[1] == "refused"

    def test_threads_that_share_a_scaled_model_take_turns(self):
        model = ScaledModel(quantize(Tokens(), [(tokens_of(0, 1),)] * 2, share=1, guidance_halves=True)[0])
        tokens = [tokens_of(0.1 * i, 0.5) for i in range(8)]
        expected = [model.predict_logits(row, None if i % 2 else row[:, 0]) for i, row in enumerate(tokens)]
        found = {}

        def call(i):
            with torch.no_grad():
                for _ in range(5):
                    found[i] = model.predict_logits(tokens[i], None if i % 2 else tokens[i][:, 0])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[i], expected[i]) for i in range(8))

    def test_threads_that_share_a_model_that_reads_its_tokens_take_turns(self):
        quantized = bucketed()
        tokens = [tokens_of(0.12 * i, 1 - 0.1 * i) for i in range(8)]
        expected, found = [quantized(row) for row in tokens], {}

        def call(i):
            with torch.no_grad():
                for _ in range(5):
                    found[i] = quantized(tokens[i])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[i], expected[i]) for i in range(8))

    def test_a_model_that_reads_its_tokens(self, tmp_path):
        quantized = bucketed(guidance_halves=True)
        tokens = tokens_of(0.3, 0.9).repeat(2, 1)
        y = quantized(tokens)
        with activation_scales(quantized, masked=torch.tensor([2 / 6, 5 / 6] * 2)):
            assert torch.equal(quantized(tokens=tokens), y)
        assert quantized.layers[0]._scale_index is None
        save_quantized(quantized, tmp_path / "q.safetensors")
        for other in (load_quantized(Tokens, tmp_path / "q.safetensors"), copy.deepcopy(quantized)):
            assert torch.equal(other(tokens), y)
        with pytest.raises(ValueError, match="expected both halves of the batch with the same tokens"):
            quantized(tokens_of(0, 1))
        with pytest.raises(TypeError, match="mask_token_id: expected a model that is called with token ids"):
            quantized(torch.zeros(2, 6))
        # what failed left no choice behind
        assert torch.equal(quantized(tokens), y)
        with activation_scales(quantized, masked=0.5, guidance_half=1):
            assert quantized(tokens_of(0.5, 0.5)).shape == (2, 6, 8)

    def test_a_batch_without_samples(self):
        assert bucketed()(torch.zeros(0, 6, dtype=torch.int64)).shape == (0, 6, 8)


class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def adapted(self, peft, model, **options):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["a", "b"], r=4, **options)).eval()

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}])
    def test_an_adapter_worn_is_in_effect(self, peft, x, options, tmp_path):
        model = self.adapted(peft, Pair(), init_lora_weights=False, **options)
        quantized, report = quantize(model, [x], group_size=32)
        assert [layer.name.split(".")[-1] for layer in report.layers] == ["base_layer"] * 2
        assert error(quantized(x), model(x)) < 0.1
        with quantized.disable_adapter(), model.disable_adapter():
            assert error(quantized(x), model(x)) < 0.15
        for merge in (
            lambda: quantized.merge_adapter(),
            lambda: copy.deepcopy(quantized).merge_and_unload(),
            lambda: copy.deepcopy(quantized).merge_and_unload(safe_merge=True),
        ):
            with pytest.raises(RuntimeError, match=r"a\.base_layer: .*4 bits and cannot be written"):
                merge()
        save_quantized(quantized, tmp_path / "q.safetensors")
        loaded = load_quantized(self.adapted(peft, Pair(), **options), tmp_path / "q.safetensors")
        assert torch.equal(loaded(x), quantized(x))

    def test_an_adapter_added_after_is_trained(self, peft, x):
        _, quantized = pair(x)
        y = quantized(x)
        model = self.adapted(peft, quantized)
        assert torch.equal(model(x), y)
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
        assert len(trained) == 4
        optimizer, losses = torch.optim.Adam(trained, 1e-2), []
        with torch.enable_grad():
            for _ in range(5):
                losses.append((model(x) - 1).square().mean())
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        kbit = peft.prepare_model_for_kbit_training(pair(x)[1], use_gradient_checkpointing=False)
        torch.manual_seed(0)
        assert kbit(x).shape == y.shape


class TestAccelerate:
    @pytest.fixture
    def accelerate(self):
        return pytest.importorskip("accelerate")

    def test_offload_and_device_maps(self, accelerate, x, tmp_path):
        _, quantized = pair(x)
        y, places = quantized(x), {"a": "cpu", "b": "disk"}
        maps = dict(device_map=places, main_device="cpu", force_hooks=True)
        for place in (
            lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
            lambda model: accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True),
            lambda model: accelerate.disk_offload(model, tmp_path / "disk", execution_device="cpu"),
            lambda model: accelerate.dispatch_model(model, offload_dir=tmp_path / "a", offload_buffers=True, **maps),
            lambda model: accelerate.dispatch_model(model, offload_dir=tmp_path / "b", **maps),
            lambda model: accelerate.cpu_offload_with_hook(model, execution_device="cpu")[0],
            lambda model: accelerate.Accelerator(cpu=True).prepare(model),
        ):
            placed = place(copy.deepcopy(quantized))
            assert torch.equal(placed(x), y) and torch.equal(placed(x), y)
        sizes = accelerate.utils.compute_module_sizes(quantized)
        assert sizes["a"] == quantized.a.packed.nbytes + 4 + 64 * 4 + (4 if quantized.a.x_scale is not None else 0)

    def test_an_offloaded_model_is_refused_by_name(self, accelerate, x, tmp_path):
        model, quantized = pair(x)
        accelerate.cpu_offload(model, execution_device="cpu")
        with pytest.raises(ValueError, match="a: its forward has been replaced"):
            quantize(model, [x])
        accelerate.cpu_offload(quantized, execution_device="cpu")
        with pytest.raises(ValueError, match=r"^a\.weight_like: is on the meta device"):
            save_quantized(quantized, tmp_path / "q.safetensors")
        assert not list(tmp_path.iterdir())


class TestTransformers:
    @pytest.fixture
    def make(self):
        transformers = pytest.importorskip("transformers", minversion="5")
        sizes = dict(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
        return lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()

    # T5 reads wo.weight.dtype, and ties its head to its embedding
    @pytest.mark.parametrize("exclude", [(), ("lm_head",)])
    def test_a_saved_t5_comes_back(self, make, exclude, tmp_path):
        model, ids = make(), torch.arange(6)[None]
        call = dict(input_ids=ids, decoder_input_ids=ids)
        quantized, _ = quantize(model, [call], group_size=32, exclude=exclude)
        y = quantized(**call)[0]
        assert error(y, model(**call)[0]) < 0.2 and "quantization_config" not in model.config.to_dict()
        quantized.save_pretrained(tmp_path / "t5")
        loaded = type(model).from_pretrained(tmp_path / "t5")
        assert torch.equal(loaded(**call)[0], y)
        half = type(model).from_pretrained(tmp_path / "t5", dtype=torch.bfloat16)
        own = ("w_q", "scale", "zero_point", "x_scale")
        states = half.state_dict(), quantized.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1] if name.endswith(own))
        assert half(**call)[0].dtype == torch.bfloat16
        save_quantized(quantized, tmp_path / "q.safetensors")
        again = load_quantized(make, tmp_path / "q.safetensors")
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(type(model).from_pretrained(tmp_path / "again")(**call)[0], y)
        assert pickle.loads(pickle.dumps(quantized))(**call)[0].equal(y)


class TestDiffusers:
    @pytest.fixture
    def model(self):
        diffusers = pytest.importorskip("diffusers")
        return diffusers.UVit2DModel(
            hidden_size=32, cond_embed_dim=32, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
            encoder_hidden_size=32, vocab_size=9, codebook_size=8, num_hidden_layers=1, num_attention_heads=2,
            block_out_channels=32, in_channels=32, block_num_heads=2, num_res_blocks=1, intermediate_size=64,
        ).eval()  # fmt: skip

    def call(self, batch=2):
        ids = torch.randint(8, (batch, 8, 8))
        ids[0] = 8
        embeddings = dict(encoder_hidden_states=torch.randn(batch, 5, 32), pooled_text_emb=torch.randn(batch, 32))
        return dict(input_ids=ids, micro_conds=torch.ones(batch, 5), **embeddings)

    def test_a_saved_transformer_comes_back(self, model, tmp_path):
        pytest.importorskip("accelerate")
        call = self.call()
        options = dict(group_size=32, share=1, num_timestep_buckets=2, mask_token_id=8)
        quantized, _ = quantize(model, [call], **options)
        y = quantized(**call)
        quantized.save_pretrained(tmp_path / "uvit")
        loaded = type(model).from_pretrained(tmp_path / "uvit")
        assert torch.equal(loaded(**call), y)
        half = type(model).from_pretrained(tmp_path / "uvit", torch_dtype=torch.bfloat16)
        frozen = {name for name in quantized.state_dict() if name.endswith(("w_q", "scale", "zero_point"))}
        assert all(torch.equal(half.state_dict()[name], quantized.state_dict()[name]) for name in frozen)
        assert half.dtype == torch.bfloat16 and loaded.to(torch.bfloat16).dtype == torch.bfloat16
        save_quantized(quantized, tmp_path / "q.safetensors")
        assert torch.equal(load_quantized(model, tmp_path / "q.safetensors")(**call), y)
        # samples alone
        one = {name: value[:1] for name, value in call.items()}
        assert error(quantized(**one), y[:1]) < 1e-5

    def test_without_our_quantizers_nothing_loads(self, model, tmp_path, monkeypatch):
        pytest.importorskip("accelerate")
        transformers = pytest.importorskip("transformers", minversion="5")
        from diffusers.quantizers import auto as in_diffusers
        from transformers.quantizers import auto as in_transformers

        assert register_quantizers() == ("diffusers", "transformers")
        config = transformers.T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
        t5 = transformers.T5EncoderModel(config).eval()
        quantize(t5, [torch.arange(6)[None]], group_size=32)[0].save_pretrained(tmp_path / "t5")
        quantize(model, [self.call()], group_size=32)[0].save_pretrained(tmp_path / "uvit")
        for library in (in_diffusers, in_transformers):
            monkeypatch.delitem(library.AUTO_QUANTIZATION_CONFIG_MAPPING, "mgt_int4")
            monkeypatch.delitem(library.AUTO_QUANTIZER_MAPPING, "mgt_int4")
        with pytest.raises(ValueError, match="Unknown quantization type, got mgt_int4"):
            type(model).from_pretrained(tmp_path / "uvit")
        with pytest.raises(RuntimeError, match="mismatched"):
            type(t5).from_pretrained(tmp_path / "t5")


def test_layers_compute_what_the_ops_do_in_every_dtype(x):
    packed, bias = quantize_int4(torch.randn(8, 64), 32), torch.randn(8)
    for dtype in (torch.float32, torch.bfloat16):
        a16, a8 = (Int4Linear(packed, bias, scale) for scale in (None, torch.full((1, 1), 0.02)))
        assert torch.equal(a16(x.to(dtype)), w4a16_linear(x.to(dtype), packed, bias))
        assert torch.equal(a8(x.to(dtype)), w4a8_linear(x.to(dtype), packed, 0.02, bias))
