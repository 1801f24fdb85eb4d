"""The bundled model, the IDX reader and the training script."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mgt_sampler.models import FashionModel, MaskedModel, load_classifier, load_model, train_fashion
from mgt_sampler.models.data import load_fashion_mnist, read_idx, to_float_images
from mgt_sampler.models.fashion import (
    WEIGHTS_DIR,
    Classifier,
    Tokenizer,
    TokenizerConfig,
    Transformer,
    load_network,
    save_network,
)
from mgt_sampler.models.train_fashion import RECIPES, STAGES, Recipe, batch_indices, main
from mgt_sampler.tensor_file import write_tensor_file

DATA_DIR = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array: np.ndarray, type_code: int = 8) -> bytes:
    return bytes([0, 0, type_code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def model() -> FashionModel:
    return load_model("fashion")


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    random = np.random.default_rng(0)
    for prefix, num_images in (("train", 80), ("t10k", 40)):
        images = random.integers(0, 256, (num_images, 28, 28), dtype=np.uint8)
        labels = (np.arange(num_images) % 10).astype(np.uint8)
        # one of each kind, for the reader takes both
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images), 1))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


class TestModel:
    def test_is_a_masked_model(self, model: FashionModel) -> None:
        assert isinstance(model, MaskedModel)
        assert (model.num_tokens, model.grid_size, model.num_classes) == (196, (14, 14), 10)
        assert model.mask_token_id == model.codebook_size
        assert model.class_names == (
            "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
        )  # fmt: skip

    @pytest.mark.parametrize("batch", [1, 3])
    def test_logits(self, model: FashionModel, batch: int) -> None:
        tokens = torch.full((batch, 196), model.mask_token_id)
        tokens[:, ::2] = 5
        logits = model.predict_logits(tokens, torch.arange(batch))
        assert logits.shape == (batch, 196, model.codebook_size)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
        assert not logits.requires_grad

    def test_condition_changes_the_logits(self, model: FashionModel) -> None:
        tokens = torch.full((2, 196), model.mask_token_id)
        conditional = model.predict_logits(tokens, torch.tensor([0, 9]))
        unconditional = model.predict_logits(tokens, None)
        assert (conditional[0] - conditional[1]).abs().max() > 0.5
        assert (conditional - unconditional).abs().amax((1, 2)).min() > 0.5
        torch.testing.assert_close(unconditional[0], unconditional[1])

    def test_bfloat16(self, model: FashionModel) -> None:
        tokens = torch.full((1, 196), model.mask_token_id)
        half = load_model("fashion", dtype=torch.bfloat16)
        logits = half.predict_logits(tokens, torch.tensor([3]))
        assert logits.dtype == torch.bfloat16
        expected = model.predict_logits(tokens, torch.tensor([3]))
        assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
        assert half.decode(torch.zeros(1, 196, dtype=torch.int64)).dtype == torch.float32

    def test_decode(self, model: FashionModel) -> None:
        tokens = torch.randint(model.codebook_size, (4, 196), generator=torch.Generator().manual_seed(0))
        images = model.decode(tokens)
        assert images.shape == (4, 1, 28, 28)
        assert images.dtype == torch.float32
        assert 0 <= images.min() and images.max() <= 1

    @pytest.mark.parametrize("token", [-1, 129])
    def test_bad_tokens(self, model: FashionModel, token: int) -> None:
        with pytest.raises(ValueError, match="tokens: expected 0 to 128"):
            model.predict_logits(torch.full((1, 196), token), None)

    def test_mask_cannot_be_decoded(self, model: FashionModel) -> None:
        with pytest.raises(ValueError, match="tokens: expected 0 to 127, got 128 to 128"):
            model.decode(torch.full((1, 196), model.mask_token_id))

    def test_bad_shapes(self, model: FashionModel) -> None:
        tokens = torch.zeros(2, 196, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"tokens: expected shape \(B, 196\), got \(2, 195\)"):
            model.decode(tokens[:, 1:])
        with pytest.raises(ValueError, match=r"condition: expected shape \(2,\)"):
            model.predict_logits(tokens, torch.tensor([1]))
        with pytest.raises(ValueError, match="condition: expected 0 to 9, got 10 to 10"):
            model.predict_logits(tokens, torch.tensor([10, 10]))

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="expected one of 'fashion', got 'imagenet'"):
            load_model("imagenet")
        with pytest.raises(ValueError, match="expected one of 'fashion', got 'imagenet'"):
            load_classifier("imagenet")


class TestFiles:
    def test_total_size(self) -> None:
        assert sum(file.stat().st_size for file in WEIGHTS_DIR.iterdir()) <= 8e6

    @pytest.mark.parametrize("name", STAGES)
    def test_header_rebuilds_the_network(self, name: str) -> None:
        with safe_open(WEIGHTS_DIR / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["network"] == name.capitalize()
        assert '"t-shirt"' in metadata["class_names"]

    def test_wrong_kind(self) -> None:
        with pytest.raises(ValueError, match="expected the weights of a Classifier, got 'Tokenizer'"):
            load_network(Classifier, WEIGHTS_DIR / "tokenizer.safetensors")

    @pytest.mark.parametrize("name", STAGES)
    def test_flipped_and_cut_files_are_refused_with_their_name(self, name: str, tmp_path: Path) -> None:
        data = (WEIGHTS_DIR / f"{name}.safetensors").read_bytes()
        kind = {"tokenizer": Tokenizer, "classifier": Classifier, "transformer": Transformer}[name]
        path = tmp_path / "broken.safetensors"
        header_end = 8 + int.from_bytes(data[:8], "little")
        chance = np.random.default_rng(0)
        for place in (*chance.integers(header_end, size=10), *chance.integers(header_end, len(data), size=2)):
            changed = bytearray(data)
            changed[place] ^= 1 << int(chance.integers(8))
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"broken\.safetensors: (truncated|damaged)"):
                load_network(kind, path)
        for size in (0, 7, 100, len(data) - 1):
            path.write_bytes(data[:size])
            with pytest.raises(ValueError, match=r"broken\.safetensors: truncated"):
                load_network(kind, path)

    @pytest.mark.parametrize(
        "field, value",
        [("num_heads", 0), ("num_heads", 5), ("width", 2**40), ("width", -32), ("num_layers", 10**6),
         ("grid_size", 3.0), ("codebook_size", True), ("num_classes", "ten"), ("mlp_ratio", None), ("depth", 3),
         ("grid_size", 5)],
    )  # fmt: skip
    def test_a_config_that_cannot_be_is_refused(self, tmp_path: Path, field: str, value: object) -> None:
        network = Transformer(train_fashion.TransformerConfig(4, 8, 3, 32, 1, 2))
        lie = {**dataclasses.asdict(network.config), field: value}
        metadata = {"network": "Transformer", "config": json.dumps(lie), "class_names": "[]"}
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
        write_tensor_file(tmp_path / "lie.safetensors", tensors, metadata)
        with pytest.raises(ValueError, match=rf"lie\.safetensors: damaged: .*({field}|shape|expected)"):
            load_network(Transformer, tmp_path / "lie.safetensors")

    def test_a_saved_network_comes_back(self, tmp_path: Path) -> None:
        network = load_network(Classifier, WEIGHTS_DIR / "classifier.safetensors")
        save_network(network, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (WEIGHTS_DIR / "classifier.safetensors").read_bytes()
        for name, tensor in load_file(tmp_path / "again.safetensors").items():
            assert torch.equal(tensor.to(network.state_dict()[name].dtype), network.state_dict()[name])

    def test_tokenizer_and_transformer_of_other_sizes(self) -> None:
        tokenizer = Tokenizer(TokenizerConfig(image_size=12, codebook_size=8, width=8))
        transformer = Transformer(train_fashion.TransformerConfig(4, 8, 3, 32, 1, 2))
        with pytest.raises(ValueError, match="the tokenizer makes images of 12 pixels a side"):
            FashionModel(tokenizer, transformer)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="train_fashion makes them"):
            FashionModel.from_folder(tmp_path)


@pytest.mark.skipif(not DATA_DIR.is_dir(), reason=f"no Fashion-MNIST in {DATA_DIR}")
class TestRealImages:
    def test_classifier_accuracy(self) -> None:
        images, labels = load_fashion_mnist(DATA_DIR, "test")
        classifier = load_classifier()
        predicted = classifier(to_float_images(images[:1000])).argmax(1)
        assert (predicted == labels[:1000]).float().mean() >= 0.91

    def test_reconstruction(self, model: FashionModel) -> None:
        images = to_float_images(load_fashion_mnist(DATA_DIR, "test")[0][:200])
        error = (model.decode(model.encode(images)) - images).square().mean()
        # 27 dB
        assert error < 0.002


class TestIdx:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    def test_reads(self, tmp_path: Path, pack) -> None:
        array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
        (tmp_path / "file").write_bytes(pack(idx_bytes(array)))
        assert torch.equal(read_idx(tmp_path / "file"), torch.from_numpy(array))

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "expected an IDX file"),
            (b"\x89PNG....", "expected an IDX file of unsigned bytes.*89 50 4e 47"),
            (idx_bytes(np.zeros(4, np.float32), type_code=13), "expected an IDX file of unsigned bytes"),
            (idx_bytes(np.zeros((2, 3), np.uint8))[:9], "truncated inside its header: 9 bytes of 12"),
            (
                idx_bytes(np.zeros((2, 3), np.uint8))[:-1],
                r"shape \(2, 3\) needs 18 bytes, the file holds 17",
            ),
            (idx_bytes(np.zeros((2, 3), np.uint8)) + b"x", "needs 18 bytes, the file holds 19"),
            (
                gzip.compress(idx_bytes(np.zeros((2, 3), np.uint8)), mtime=0)[:-6],
                "gzip stream is damaged or truncated",
            ),
            (
                gzip.compress(idx_bytes(np.zeros((2, 3), np.uint8)), mtime=0)[:10] + b"\xff" * 20,
                "gzip stream is damaged",
            ),
            (b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"x", "expected at most 32 dimensions, got 255"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(tmp_path / "file")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte or .*dataset-fashion-mnist"):
            load_fashion_mnist(tmp_path, "train")

    def test_unknown_split(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="split: expected one of"):
            load_fashion_mnist(tmp_path, "validation")  # type: ignore[arg-type]

    def test_labels_must_match(self, tmp_path: Path, tiny_data: Path) -> None:
        (tmp_path / "train-images-idx3-ubyte.gz").symlink_to(tiny_data / "train-images-idx3-ubyte.gz")
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
        with pytest.raises(ValueError, match=r"80 images, but labels of shape \(3,\)"):
            load_fashion_mnist(tmp_path, "train")


class TestTraining:
    def test_batches_cover_each_epoch_once(self) -> None:
        first = torch.cat([batch_indices(20, 5, 0, step) for step in range(4)])
        second = torch.cat([batch_indices(20, 5, 0, step) for step in range(4, 8)])
        assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
        assert not torch.equal(first, second)
        assert not torch.equal(first[:5], batch_indices(20, 5, 1, 0))

    def test_rate(self) -> None:
        recipe = Recipe(100, 1, 1.0, 0.0, 10, 0.4, 0.99)
        rates = [recipe.schedule(step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9:60] == [1.0] * 51
        assert rates[99] == pytest.approx(1 / 40)
        assert recipe.schedule(59) == Recipe(200, 1, 1.0, 0.0, 10, 0.4, 0.99).schedule(59)

    def test_two_steps_and_resume(self, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small = {name: Recipe(2, 8, 1e-3, 0.01, 1, 0.5, 0.9, RECIPES[name].muon_rate) for name in STAGES}
        monkeypatch.setattr(train_fashion, "RECIPES", small)
        config = train_fashion.TransformerConfig(width=32, num_layers=1, num_heads=1)
        monkeypatch.setattr(train_fashion, "TransformerConfig", lambda: config)
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        main(["--data", str(tiny_data), "--out", str(whole)])
        for stage in STAGES:
            arguments = ["--data", str(tiny_data), "--out", str(halves), "--stage", stage]
            main([*arguments, "--stop-at", "1"])
            assert not (halves / f"{stage}.safetensors").exists()
            main(arguments)
        for name in (*STAGES, "statistics"):
            a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, halves))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
            checkpoints = [folder / "checkpoints" / f"{name}.pt" for folder in (whole, halves)]
            if checkpoints[0].exists():
                a, b = (torch.load(path, weights_only=True)["network"] for path in checkpoints)
                assert all(torch.equal(a[key], b[key]) for key in a)
        assert FashionModel.from_folder(halves).num_tokens == 196

    def test_the_codebook_is_not_a_parameter(self) -> None:
        tokenizer = load_network(Tokenizer, WEIGHTS_DIR / "tokenizer.safetensors")
        assert "codebook" not in dict(tokenizer.named_parameters())

    def test_masks_cover_all_ratios(self) -> None:
        seen: list[float] = []

        class Recorder(torch.nn.Module):
            config = train_fashion.TransformerConfig()

            def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
                seen.extend((tokens == 128).float().mean(1).tolist())
                seen_conditions.append(condition)
                return torch.zeros(*tokens.shape, 128)

        seen_conditions: list[torch.Tensor] = []
        tokens, labels = torch.zeros(4000, 196, dtype=torch.int64), torch.zeros(4000, dtype=torch.int64)
        generator = torch.Generator().manual_seed(0)
        loss = train_fashion.transformer_loss(Recorder(), tokens, labels, generator)  # type: ignore[arg-type]
        assert float(loss) == pytest.approx(np.log(128), rel=1e-4)
        # the mean of cos(pi r / 2) over r is 2 / pi
        assert np.mean(seen) == pytest.approx(2 / np.pi, abs=0.02)
        assert min(seen) >= 1 / 196 - 1e-6 and max(seen) == 1
        assert (seen_conditions[0] == 10).float().mean() == pytest.approx(0.1, abs=0.02)
