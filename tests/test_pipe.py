"""`mgt sample --pipe`: a pipeline of diffusers from a folder or the hub, on a tiny one with random weights."""

import errno
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import seeded
from typer.testing import CliRunner

import mgt_kernels
import mgt_sampler
from mgt_sampler import MGTScheduler, ZSampling, accelerate, cli, hub, quantize, save_quantized, z_sample
from mgt_sampler.images import image_grid

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ("--height", "16", "--width", "16")
SHORT = (*SIZE, "--steps", "3", "--no-progress")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pipeline, and the folder where it is saved."""
    folder = tmp_path_factory.mktemp("amused")
    pipe = tiny.amused_pipeline(folder / "tokenizer")
    pipe.save_pretrained(folder / "pipe")
    return pipe, folder / "pipe"


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    (tmp_path / "pipe").symlink_to(original[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """The pipelines that the command loads."""
    pipes, load = [], cli.load_pipe
    monkeypatch.setattr(cli, "load_pipe", lambda *args, **options: pipes.append(load(*args, **options)) or pipes[-1])
    return pipes


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **options: pytest.fail("loaded the weights")
    )


def sample(*args):
    return CliRunner().invoke(cli.app, ["sample", *args], catch_exceptions=False)


def draw(*args):
    result = sample("--pipe", "pipe", *SHORT, *args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args):
    result = sample(*args)
    assert result.exit_code == 2 and "Traceback" not in result.stderr and not isinstance(result.exception, OSError)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def pixels(path):
    return np.asarray(Image.open(path))


def by_hand(call, seed=0, prompt="a cat", source="pipe", **settings):
    """What the pipeline draws when it is loaded, accelerated and called in Python."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe)
    pipe.scheduler.register_to_config(**settings)
    call = {"height": 16, "width": 16, "num_inference_steps": 3, **call}
    return np.asarray(pipe(prompt, generator=seeded(seed), **call).images[0])


class TestDraws:
    def test_one_image_is_what_the_pipeline_draws(self, folder):
        assert draw("--prompt", "a cat", "--seed", "5", "--out", "cat.png") == "cat.png: 1 image\n"
        assert np.array_equal(pixels("cat.png"), by_hand({}, seed=5))
        assert sorted(path.name for path in folder.iterdir()) == ["cat.png", "pipe"]

    def test_what_the_image_says_of_itself(self, folder):
        draw("--prompt", "eine Katze, 猫", "--seed", "5", "--guidance-scale", "3", "--out", "cat.png")
        text = Image.open("cat.png").text
        assert text.pop("command") == (
            "mgt sample --pipe pipe --height 16 --width 16 --steps 3 --guidance-scale 3 "
            "--prompt 'eine Katze, 猫' --seed 5"
        )
        assert text == {
            "prompt": "eine Katze, 猫",
            "seed": "5",
            "width": "16",
            "height": "16",
            "pipe": "pipe",
            "pipe_class": "AmusedPipeline",
            "steps": "3",
            "guidance_scale": "3.0",
            "temperature": "(2, 0)",
            "mask_schedule": "cosine",
            "noise_scale": "0.0",
            "momentum": "0.0",
            "device": "cpu",
            "dtype": "float32",
            "mgt-kernels": mgt_kernels.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }

    @pytest.mark.parametrize("batch_size", ["1", "3"])
    def test_a_folder_of_images_each_drawn_again_alone(self, folder, batch_size):
        stdout = draw(
            "--prompt", "a cat", "--prompt", "it's a dog", "-n", "2", "--seed", "7", "--out", "images",
            "--batch-size", batch_size, "--negative-prompt", "x", "--guidance-scale", "2",
        )  # fmt: skip
        assert stdout == "images: 4 images\n"
        names = [f"prompt-{i}-seed-{seed}.png" for i in (0, 1) for seed in (7, 8)]
        assert sorted(path.name for path in (folder / "images").iterdir()) == names
        images = [pixels(f"images/{name}") for name in names]
        assert len({image.tobytes() for image in images}) == 4
        for name, image in zip(names, images, strict=True):
            mgt, command, *args = shlex.split(Image.open(f"images/{name}").text["command"])
            assert (mgt, command) == ("mgt", "sample")
            assert sample(*args, "--no-progress", "--out", "alone.png").exit_code == 0
            assert np.array_equal(pixels("alone.png"), image)
            ours, alone = Image.open(f"images/{name}").text, Image.open("alone.png").text
            assert ours == alone and ours["negative_prompt"] == "x"

    def test_one_prompt_needs_no_number_in_the_names(self, folder):
        (folder / "images.v1").mkdir()
        draw("--prompt", "a cat", "-n", "2", "--out", "images.v1")
        assert sorted(os.listdir("images.v1")) == ["seed-0.png", "seed-1.png"]

    def test_a_grid_with_a_row_for_each_prompt(self, folder):
        stdout = draw("--prompt", "a cat", "--prompt", "a dog", "-n", "3")
        assert stdout == "grid.png: 6 images, a row each of a cat, a dog\n"
        draw("--prompt", "a cat", "--prompt", "a dog", "-n", "3", "--out", "images")
        pairs = [(i, seed) for i in (0, 1) for seed in range(3)]
        images = np.stack([pixels(f"images/prompt-{i}-seed-{seed}.png") for i, seed in pairs])
        expected = image_grid(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, num_columns=3)
        assert np.array_equal(pixels("grid.png"), np.asarray(expected))
        text = Image.open("grid.png").text
        own = json.loads(text["images"])
        assert [(image["prompt"], image["seed"]) for image in own] == [
            (prompt, seed) for prompt in ("a cat", "a dog") for seed in range(3)
        ]
        assert own[5]["command"].endswith("--prompt 'a dog' --seed 2") and text["steps"] == "3"

    def test_an_image_does_not_depend_on_the_other_prompts(self, folder):
        draw("--prompt", "a dog", "--prompt", "a cat", "-n", "2", "--out", "both")
        draw("--prompt", "a cat", "--seed", "1", "--out", "cat.png")
        assert np.array_equal(pixels("cat.png"), pixels("both/prompt-1-seed-1.png"))

    def test_what_is_not_given_is_the_pipelines(self, folder, loaded):
        assert sample("--pipe", "pipe", "--prompt", "a cat", *SIZE, "--no-progress").exit_code == 0
        text = Image.open("grid.png").text
        assert (text["steps"], text["guidance_scale"], text["temperature"]) == ("12", "10.0", "(2, 0)")
        assert loaded[0].scheduler.config.masking_schedule == "cosine"
        assert np.array_equal(pixels("grid.png"), by_hand({"num_inference_steps": 12}))

    def test_the_pipelines_size(self, folder):
        # 32 x 32 tokens, a pixel each
        assert sample("--pipe", "pipe", "--prompt", "a cat", "--steps", "1", "--no-progress").exit_code == 0
        assert Image.open("grid.png").size == (32, 32)
        draw("--prompt", "a cat", "--height", "8")
        assert Image.open("grid.png").size == (16, 8)

    def test_nothing_that_was_loaded_changes(self, original, folder):
        pipe, saved = original
        state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
        files = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
        bars = diffusers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled()
        random = torch.get_rng_state()
        draw("--prompt", "a cat", "--noise-scale", "1", "--z-sampling", "paper")
        assert torch.equal(torch.get_rng_state(), random)
        assert type(pipe.scheduler) is diffusers.AmusedScheduler
        assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())
        assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == files
        assert bars == (
            diffusers.utils.logging.is_progress_bar_enabled(),
            transformers.utils.logging.is_progress_bar_enabled(),
        )

    def test_a_pipeline_that_was_saved_accelerated(self, original, folder):
        draw("--prompt", "a cat")
        expected = pixels("grid.png")
        pipe = diffusers.DiffusionPipeline.from_pretrained("pipe")
        accelerate(pipe)
        pipe.save_pretrained("ours")
        result = sample("--pipe", "ours", "--prompt", "a cat", *SHORT)
        assert result.exit_code == 0 and np.array_equal(pixels("grid.png"), expected)

    def test_progress(self, folder):
        result = sample("--pipe", "pipe", "--prompt", "a cat", *SIZE, "--steps", "3")
        assert "3/3" in result.stderr and "Loading" in result.stderr
        result = sample("--pipe", "pipe", "--prompt", "a cat", *SHORT)
        assert "3/3" not in result.stderr and "Loading" not in result.stderr


class TestOptions:
    @pytest.mark.parametrize(
        ("flags", "settings", "call"),
        [
            (("--noise-scale", "abs_cos:2"), {"noise_scale": "abs_cos:2"}, {}),
            (("--mask-schedule", "linear"), {"masking_schedule": "linear"}, {}),
            (("--mask-schedule", "0.5,0.25,0"), {"masking_schedule": [0.5, 0.25, 0.0]}, {}),
            (("--differential", "official:0.5"), {"differential": {"variant": "official", "share": 0.5}}, {}),
            (("--momentum", "0.3,0"), {"momentum": [0.3, 0.0]}, {}),
            (("--backend", "reference"), {"backend": "reference"}, {}),
            (("--temperature", "9,1"), {}, {"temperature": (9, 1)}),
            (("--guidance-scale", "2.5"), {}, {"guidance_scale": 2.5}),
            (("--negative-prompt", "a dog"), {}, {"negative_prompt": "a dog"}),
        ],
    )
    def test_every_option_arrives(self, folder, flags, settings, call):
        draw("--prompt", "a cat", *flags)
        assert np.array_equal(pixels("grid.png"), by_hand(call, **settings))
        text = Image.open("grid.png").text
        for name, value in {**settings, **call}.items():
            if name == "temperature":
                assert text[name] == "[9.0, 1.0]"
            elif name != "backend":
                assert text[name.replace("masking_", "mask_")] == str(value)
        if "backend" not in settings:
            assert not np.array_equal(pixels("grid.png"), by_hand({}))

    def test_z_sampling(self, folder):
        draw("--prompt", "a cat", "--z-sampling", "official:1.5", "--seed", "3")
        pipe = diffusers.DiffusionPipeline.from_pretrained("pipe")
        pipe.set_progress_bar_config(disable=True)
        accelerate(pipe)
        expected = z_sample(
            pipe, "a cat", z_sampling=ZSampling(1.5, "official"), height=16, width=16, num_inference_steps=3,
            generator=seeded(3),
        ).images[0]  # fmt: skip
        assert np.array_equal(pixels("grid.png"), np.asarray(expected))
        assert "official" in Image.open("grid.png").text["z_sampling"]

    def test_dtype(self, folder, loaded):
        draw("--prompt", "a cat", "--dtype", "bfloat16")
        assert {loaded[0].transformer.dtype, loaded[0].text_encoder.dtype, loaded[0].vqvae.dtype} == {torch.bfloat16}
        assert Image.open("grid.png").text["dtype"] == "bfloat16"


class TestQuantized:
    @pytest.fixture
    def file(self, original, folder):
        """The transformer of 4-bit weights, which draws otherwise."""
        generator = seeded(0)
        tokens = torch.randint(8, (2, 16, 16), generator=generator)
        # a sample for each of two timestep buckets
        tokens[0] = 31
        call = {
            "input_ids": tokens,
            "encoder_hidden_states": torch.randn(2, 8, 8, generator=generator),
            "pooled_text_emb": torch.randn(2, 8, generator=generator),
            "micro_conds": torch.ones(2, 5),
        }
        options = dict(group_size=32, share=0.5, num_timestep_buckets=2, mask_token_id=31)
        transformer, _ = quantize(original[0].transformer, [call], progress=False, **options)
        save_quantized(transformer, "scq.safetensors")
        return transformer

    def test_a_quantized_transformer_draws(self, file, folder, loaded):
        draw("--prompt", "a cat", "--quantized", "scq.safetensors")
        quantized = Image.open("grid.png")
        assert quantized.text["quantized"] == "scq.safetensors" and "--quantized" in quantized.text["command"]
        layers = [m for m in loaded[0].transformer.modules() if isinstance(m, mgt_sampler.Int4Linear)]
        assert layers and {layer.activation for layer in layers} == {"a8", "a16"}
        draw("--prompt", "a cat", "--out", "float.png")
        assert not np.array_equal(pixels("float.png"), np.asarray(quantized))
        pipe = diffusers.DiffusionPipeline.from_pretrained("pipe")
        pipe.transformer = file
        pipe.save_pretrained("saved")
        assert np.array_equal(np.asarray(quantized), by_hand({}, source="saved"))
        # and so does one that was saved with it
        assert sample("--pipe", "saved", "--prompt", "a cat", *SHORT).exit_code == 0
        assert np.array_equal(np.asarray(quantized), pixels("grid.png"))

    def test_in_another_dtype(self, file, folder, loaded):
        draw("--prompt", "a cat", "--quantized", "scq.safetensors", "--dtype", "bfloat16")
        assert loaded[0].transformer.dtype == torch.bfloat16

    def test_scales_that_nobody_chooses(self, file, folder):
        for hooks in (file._forward_pre_hooks, file._forward_hooks):
            hooks.clear()
        save_quantized(file, "scq.safetensors")
        message = refused("--pipe", "pipe", "--prompt", "a cat", *SHORT, "--quantized", "scq.safetensors")
        assert "--quantized: expected one scale for each layer, or a model quantized with mask_token_id" in message

    def test_another_models_file(self, folder):
        linear, _ = quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)), [torch.randn(4, 32)], group_size=32)
        save_quantized(linear, "linear.safetensors")
        message = refused("--pipe", "pipe", "--prompt", "a cat", "--quantized", "linear.safetensors")
        assert "linear.safetensors: made of another model" in message

    def test_no_file(self, folder, no_weights):
        message = refused("--pipe", "pipe", "--prompt", "a cat", "--quantized", "nowhere.safetensors")
        assert "No such file or directory: 'nowhere.safetensors'" in message


class TestRefusals:
    @pytest.mark.parametrize(
        "flags",
        [
            ("--class", "sneaker"),
            ("--trajectory", "run.gif"),
            ("--token-temperature", "1"),
            ("--skip", "1"),
            ("--model", "fashion"),
        ],
    )
    def test_what_is_the_bundled_models(self, folder, no_weights, flags):
        assert f"{flags[0]}: expected without --pipe" in refused("--pipe", "pipe", "--prompt", "a cat", *flags)

    @pytest.mark.parametrize(
        "flags",
        [
            ("--prompt", "a cat"),
            ("--negative-prompt", "a cat"),
            ("--height", "16"),
            ("--width", "16"),
            ("--batch-size", "1"),
            ("--dtype", "float32"),
        ],
    )
    def test_what_is_a_pipelines(self, folder, monkeypatch, flags):
        monkeypatch.setattr(cli, "load_model", lambda *args, **options: pytest.fail("loaded the bundled model"))
        assert f"{flags[0]}: expected with --pipe" in refused(*flags)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--guidance-scale", "1,3"), "--guidance-scale: expected a number with --pipe, got '1,3'"),
            (("--guidance-scale", "nan"), "--guidance-scale: expected a number with --pipe, got 'nan'"),
            (("--noise-scale", "sine:2"), "noise_scale: expected a number, "),
            (("--mask-schedule", "cosin"), "masking_schedule: expected cosine, "),
            (("--differential", "best"), "differential.variant: expected one of"),
            (("--z-sampling", "best"), "variant: expected"),
            (("--momentum", "much"), "momentum: expected a number"),
            (("--backend", "abacus"), "backend: expected one of"),
            (("--device", "abacus"), "--device: "),
            (("--dtype", "int8"), "--dtype: expected one of float32, bfloat16, float16, got 'int8'"),
            (("--out", "cat.jpg"), "--out: expected a file name ending in .png, got 'cat.jpg'"),
            (("--out", "no/such/cat.png"), "--out: expected a path in a folder that exists"),
            (("--out", "pipe/model_index.json"), "--out: expected a file name ending in .png"),
            (("--prompt", "a cat"), "--prompt: expected each once, got one again"),
            (("--seed", str(2**63)), f"--seed: expected seeds of 64 bits, got {2**63} to {2**63}"),
            (("--num-images", "0"), "--num-images"),
            (("--height", "0"), "--height"),
        ],
    )
    def test_before_the_weights_are_loaded(self, folder, no_weights, flags, message):
        assert message in refused("--pipe", "pipe", "--prompt", "a cat", *flags)
        assert sorted(os.listdir()) == ["pipe"]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--height", "15"), "--height: expected a multiple of 2 for this pipeline, got 15"),
            (("--width", "7"), "--width: expected a multiple of 2 for this pipeline, got 7"),
            (("--temperature", "1,2,3"), "temperature: "),
            (("--mask-schedule", "0.5"), "masking_schedule: expected 3 ratios"),
            (
                ("--negative-prompt", "x", "--guidance-scale", "1"),
                "--negative-prompt: expected a guidance scale above 1 with it, got no guidance",
            ),
            (("--z-sampling", "paper", "--guidance-scale", "1"), "inversion_guidance_scale: expected 1 where"),
        ],
    )
    def test_before_any_file_is_written(self, folder, flags, message):
        assert message in refused("--pipe", "pipe", "--prompt", "a cat", *SHORT, *flags)
        assert sorted(os.listdir()) == ["pipe"]

    def test_no_prompt(self, folder, no_weights):
        assert "--prompt: expected one at least with --pipe" in refused("--pipe", "pipe")

    def test_an_argument_that_the_pipeline_does_not_take(self, folder, monkeypatch):
        call = diffusers.AmusedPipeline.__call__

        def without(self, prompt, height, width, num_inference_steps, generator):
            return call(self, prompt, height, width, num_inference_steps, generator=generator)

        monkeypatch.setattr(diffusers.AmusedPipeline, "__call__", without)
        message = refused("--pipe", "pipe", "--prompt", "a cat", *SHORT, "--negative-prompt", "x")
        assert "--negative-prompt: expected none, for AmusedPipeline does not take it" in message
        draw("--prompt", "a cat")
        assert "guidance_scale" not in Image.open("grid.png").text

    def test_a_full_disk(self, folder, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        (folder / "grid.png").write_bytes(b"old")
        assert "No space left on device" in refused("--pipe", "pipe", "--prompt", "a cat", *SHORT)
        assert (folder / "grid.png").read_bytes() == b"old"


class TestPipelinesThatAreNone:
    @pytest.mark.parametrize("name", ["nowhere", "./no/such", "/no/such", "a/b/c", "~/pipe", "file", ""])
    def test_no_such_folder(self, folder, no_weights, name):
        (folder / "file").write_text("")
        message = refused("--pipe", name, "--prompt", "a cat")
        assert f"--pipe: expected a folder that exists, or an id such as amused/amused-256, got {name!r}" in message

    def test_an_id_without_a_network(self, folder, no_weights, monkeypatch):
        from huggingface_hub.errors import LocalEntryNotFoundError

        def unreachable(*args, **options):
            raise LocalEntryNotFoundError("cannot find the file in the cache, and the hub cannot be reached")

        monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", unreachable)
        message = refused("--pipe", "nobody/nothing", "--prompt", "a cat")
        assert message.endswith(
            "--pipe: expected a folder that exists, or an id that the hub or its cache has, got 'nobody/nothing'; "
            "where there is a network, `hf download nobody/nothing --local-dir FOLDER` makes a folder of an id"
        )

    def test_an_id_in_a_process_that_is_offline(self, tmp_path):
        code = (
            "from typer.testing import CliRunner\nfrom mgt_sampler import cli\n"
            "result = CliRunner().invoke(cli.app, ['sample', '--pipe', 'nobody/nothing', '--prompt', 'a cat'])\n"
            "last = result.stderr.strip().splitlines()[-1]\n"
            "assert result.exit_code == 2 and 'an id that the hub or its cache has' in last, result.stderr\n"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)

    def test_an_id_is_given_to_the_hub(self, original, folder, monkeypatch):
        asked = []

        def cached(name, filename=None, **options):
            asked.append((name, filename))
            return str(original[1] / filename)

        load = diffusers.DiffusionPipeline.from_pretrained
        monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", cached)
        monkeypatch.setattr(
            diffusers.DiffusionPipeline, "from_pretrained", lambda name, **options: load("pipe", **options)
        )
        result = sample("--pipe", "amused/amused-256", "--prompt", "a cat", *SHORT)
        assert result.exit_code == 0, result.output
        assert ("amused/amused-256", "model_index.json") in asked
        assert Image.open("grid.png").text["pipe"] == "amused/amused-256"

    def test_a_folder_without_a_pipeline(self, folder, no_weights):
        message = refused("--pipe", ".", "--prompt", "a cat")
        assert (
            "--pipe: expected a pipeline that diffusers loads, got '.': " in message and "model_index.json" in message
        )

    @pytest.mark.parametrize(
        "name",
        ["StableDiffusionPipeline", "AmusedImg2ImgPipeline", "LLaDA2Pipeline", "Pipeline", "Nothing", None, ["a", "b"]],
    )
    def test_another_pipeline(self, folder, no_weights, name):
        (folder / "other").mkdir()
        (folder / "other/model_index.json").write_text(json.dumps({"_class_name": name}))
        message = refused("--pipe", "other", "--prompt", "a cat")
        assert "that draws images from prompts alone, such as AmusedPipeline, got" in message and str(name) in message

    def test_no_json(self, folder, no_weights):
        (folder / "other").mkdir()
        (folder / "other/model_index.json").write_text("{")
        assert "--pipe: expected a pipeline that diffusers loads" in refused("--pipe", "other", "--prompt", "a cat")

    def test_weights_that_are_missing(self, original, folder):
        (folder / "other").mkdir()
        (folder / "other/model_index.json").write_bytes((original[1] / "model_index.json").read_bytes())
        message = refused("--pipe", "other", "--prompt", "a cat", "--no-progress")
        assert "--pipe: expected a pipeline that diffusers loads, got 'other': " in message

    def test_another_scheduler(self, original, folder):
        for path in original[1].iterdir():
            (folder / "other").mkdir(exist_ok=True)
            (folder / "other" / path.name).symlink_to(path)
        index = json.loads((original[1] / "model_index.json").read_text())
        (folder / "other/model_index.json").unlink()
        (folder / "other/model_index.json").write_text(
            json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]})
        )
        (folder / "other/scheduler").unlink()
        diffusers.DDIMScheduler().save_pretrained("other/scheduler")
        message = refused("--pipe", "other", "--prompt", "a cat", *SHORT)
        assert "expected an AmusedScheduler or Meissonic's, got DDIMScheduler" in message

    @pytest.mark.parametrize("package", ["diffusers", "transformers"])
    def test_without_the_packages(self, folder, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        message = refused("--pipe", "pipe", "--prompt", "a cat")
        assert f"--pipe: {package} is missing: pip install diffusers transformers" in message


def test_the_help_tells_of_it():
    text = " ".join(sample("--help").stdout.split())
    for flag in ("--pipe PATH_OR_ID", "--prompt TEXT", "--negative-prompt TEXT", "--height", "--batch-size", "--dtype"):
        assert flag in text


def test_the_scheduler_has_what_the_pipelines_had(original, folder):
    pipe = hub.load_pipe("pipe", scheduler={"noise_scale": 1.0}, progress=False)
    assert isinstance(pipe.scheduler, MGTScheduler) and pipe.scheduler.config.mask_token_id == 31
    assert pipe.scheduler.config.noise_scale == 1.0 and pipe.scheduler.config.masking_schedule == "cosine"
