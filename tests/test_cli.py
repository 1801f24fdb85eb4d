"""The command `mgt`, on a model of a few lines: every flag arrives, every error is one kind line."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgt_sampler import Differential, ZSampling, cli
from mgt_sampler.images import image_grid
from mgt_sampler.models.fashion import WEIGHTS_DIR

N, V = 16, 8


class TinyModel:
    num_tokens, codebook_size, mask_token_id = N, V, V
    class_names = ("t-shirt", "sneaker", "boot")

    def __init__(self):
        self.by_class = 2 * torch.randn(4, N, V, generator=torch.Generator().manual_seed(0))

    def predict_logits(self, tokens, condition):
        return self.by_class[torch.full((len(tokens),), 3) if condition is None else condition]

    def decode(self, tokens):
        return (tokens / (V - 1)).view(-1, 1, 4, 4)


@pytest.fixture
def model(monkeypatch, tmp_path):
    model = TinyModel()
    monkeypatch.setattr(cli, "load_model", lambda name, device, dtype=None: model)
    monkeypatch.chdir(tmp_path)
    return model


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of `generate`."""
    seen, generate = [], cli.generate

    def spy(model, **kwargs):
        seen.append(kwargs)
        return generate(model, **kwargs)

    monkeypatch.setattr(cli, "generate", spy)
    return seen


def mgt(*args):
    return CliRunner().invoke(cli.app, [*args], catch_exceptions=False)


def test_a_grid_of_one_class(model, calls):
    result = mgt("sample", "--class", "sneaker", "--num-images", "9", "--out", "shoes.png", "--no-progress")
    assert result.exit_code == 0, result.output
    assert result.stdout == "shoes.png: 9 images, sneaker\n"
    assert calls[0]["labels"].tolist() == [1] * 9
    assert Image.open("shoes.png").size == image_grid(torch.zeros(9, 1, 4, 4), num_columns=3).size


@pytest.mark.parametrize("args", [(), ("--class", "all")])
def test_a_row_of_every_class(model, calls, args):
    result = mgt("sample", *args, "--no-progress")
    assert result.exit_code == 0
    # 40 make 14 of each of three classes
    assert "42 images, a row each of t-shirt, sneaker, boot" in result.stdout
    assert calls[0]["labels"].tolist() == [0] * 14 + [1] * 14 + [2] * 14
    assert Image.open("grid.png").size == image_grid(torch.zeros(42, 1, 4, 4), num_columns=14).size


@pytest.mark.parametrize("name", ["T-Shirt", "tshirt", "0"])
def test_class_names_are_read_kindly(model, calls, name):
    assert mgt("sample", "-c", name, "-n", "1").exit_code == 0
    assert calls[0]["labels"].tolist() == [0]


def test_several_classes(model, calls):
    assert mgt("sample", "-c", "boot", "-c", "sneaker", "-n", "4").exit_code == 0
    assert calls[0]["labels"].tolist() == [2, 2, 1, 1]


def test_defaults(model, calls):
    assert mgt("sample").exit_code == 0
    call = calls[0]
    del call["labels"]
    assert call == {
        "num_inference_steps": 12,
        "guidance_scale": [1.0, 3.0],
        "temperature": [8.0, 0.0],
        "token_temperature": 1.0,
        "noise_scale": 0.0,
        "mask_schedule": "cosine",
        "differential": None,
        "z_sampling": None,
        "momentum": 0.0,
        "skip": (),
        "seed": 0,
        "callback": None,
        "progress": True,
        "backend": "auto",
    }


@pytest.mark.parametrize(
    ("flag", "text", "name", "value"),
    [
        ("--steps", "3", "num_inference_steps", 3),
        ("--guidance-scale", "1.5", "guidance_scale", 1.5),
        ("--guidance-scale", "0,4", "guidance_scale", [0.0, 4.0]),
        ("--guidance-scale", "linear:4", "guidance_scale", "linear:4"),
        ("--temperature", "4.5,0", "temperature", [4.5, 0.0]),
        ("--temperature", "1", "temperature", 1.0),
        ("--token-temperature", "0.8", "token_temperature", 0.8),
        ("--noise-scale", "abs_cos:2", "noise_scale", "abs_cos:2"),
        ("--mask-schedule", "pow0.6", "mask_schedule", "pow0.6"),
        ("--mask-schedule", ",".join(["0.5"] * 12), "mask_schedule", [0.5] * 12),
        ("--differential", "paper", "differential", Differential()),
        ("--differential", "official:0.5", "differential", Differential(0.5, "official")),
        ("--z-sampling", "official", "z_sampling", ZSampling(variant="official")),
        ("--z-sampling", "paper:1.5", "z_sampling", ZSampling(1.5)),
        ("--momentum", "0.3,0", "momentum", [0.3, 0.0]),
        ("--skip", "2", "skip", [2]),
        ("--seed", "-7", "seed", -7),
        ("--backend", "reference", "backend", "reference"),
        ("--no-progress", None, "progress", False),
    ],
)
def test_every_flag_arrives(model, calls, flag, text, name, value):
    result = mgt("sample", "-n", "1", flag, *([] if text is None else [text]))
    assert result.exit_code == 0, result.output
    assert calls[0][name] == value


def test_model_and_device_arrive(model, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "load_model", lambda name, device: seen.append((name, device)) or model)
    assert mgt("sample", "-n", "1", "--model", "shoes", "--device", "cpu").exit_code == 0
    assert seen == [("shoes", torch.device("cpu"))]


def test_the_same_seed_gives_the_same_file(model, tmp_path):
    for name, seed in (("a.png", "0"), ("b.png", "0"), ("c.png", "1")):
        assert mgt("sample", "--out", name, "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b and a != c


@pytest.mark.parametrize("name", ["run.gif", "run.webp", "run.apng"])
def test_an_animation_of_the_tokens(model, name):
    result = mgt("sample", "-n", "2", "--steps", "4", "--trajectory", name)
    assert result.exit_code == 0 and f"{name}: 4 draws" in result.stdout
    assert Image.open(name).n_frames == 5
    assert Image.open(name).size == Image.open("grid.png").size


def test_a_strip_of_the_tokens(model):
    assert mgt("sample", "--steps", "4", "--trajectory", "run.png").exit_code == 0
    assert Image.open("run.png").width == 5 * (56 + 4) + 4


def test_info():
    result = mgt("info")
    assert result.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["torch"] == torch.__version__
    assert {"version", "isa", "isas", "triton"} <= set(facts)


def test_evaluate(model, monkeypatch):
    from mgt_sampler.evaluation import run

    seen = []
    monkeypatch.setattr(run, "evaluate", lambda *args, **kwargs: seen.append((args, kwargs)) or ["a result"])
    monkeypatch.setattr(run, "results_table", lambda results: f"a table of {results}")
    flags = (
        "-n 50 --groups 5 --steps 3 --guidance-scale 2 --seed 4 --batch-size 5 --temperature 1 --token-temperature 0.5 "
        "--noise-scale abs_cos:1 --mask-schedule linear --backend scalar --no-progress "
        "--differential official:0.5 --z-sampling paper --momentum 0.3 --skip 1 --dtype bfloat16"
    )
    result = mgt("evaluate", *flags.split())
    assert result.exit_code == 0 and result.stdout == "a table of ['a result']\n"
    (network, (configuration,)), options = seen[0]
    assert network is model
    assert options == {
        "num_images": 50,
        "num_groups": 5,
        "seed": 4,
        "batch_size": 5,
        "backend": "scalar",
        "out": None,
        "progress": False,
    }
    assert configuration.arguments == {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "temperature": 1.0,
        "token_temperature": 0.5,
        "noise_scale": "abs_cos:1",
        "mask_schedule": "linear",
        "differential": {"variant": "official", "share": 0.5},
        "z_sampling": {"variant": "paper"},
        "momentum": 0.3,
        "skip": [1],
    }


def test_evaluate_says_what_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "mgt_sampler.evaluation.run", raising=False)
    monkeypatch.delitem(sys.modules, "mgt_sampler.evaluation.intervals", raising=False)
    result = mgt("evaluate")
    assert result.exit_code == 2 and "pip install mgt-kernels[evaluate]" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--class", "sneakr"), "--class: expected all or one of t-shirt, sneaker, boot, got 'sneakr'"),
        (("--steps", "0"), "--steps"),
        (("--differential", "paper:2"), "differential.share: expected a number in [0, 1], got 2.0"),
        (("--differential", "best"), "differential.variant: expected one of"),
        (("--z-sampling", "paper:much"), "inversion_guidance_scale: expected a number after the colon"),
        (("--skip", "0"), "skip: expected steps within"),
        (("--num-images", "0"), "--num-images"),
        (("--guidance-scale", "much"), "guidance_scale: expected a number, "),
        (("--temperature", "-1"), "temperature: expected a finite number of at least 0"),
        (("--temperature", "1,2,3"), "temperature: expected (start, end) or 12 values, one per step"),
        (("--noise-scale", "sine:2"), "noise_scale: expected a number, "),
        (("--mask-schedule", "cosin"), "mask_schedule: expected cosine, "),
        (("--mask-schedule", "0.5"), "mask_schedule: expected 12 ratios"),
        (("--out", "grid.bmp"), "--out: expected a file name ending in .png"),
        (("--trajectory", "run.mp4"), "--trajectory: expected a file name ending in .gif"),
        (("--out", "no/such/folder/grid.png"), "no/such/folder"),
        (("--backend", "abacus"), "backend: expected one of"),
        (("--device", "abacus"), "--device: "),
        (("--device", "meta"), "--device: expected one that computes"),
        (("--seed", "x"), "--seed"),
    ],
)
def test_errors_are_one_kind_line(model, args, message):
    result = mgt("sample", "-n", "1", *args)
    assert result.exit_code == 2
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith("Error: ") and message in last
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("flag", "value"), [("--backend", "triton"), ("--device", "cuda")])
def test_what_is_absent_is_named_before_sampling(model, calls, flag, value):
    result = mgt("sample", flag, value)
    assert result.exit_code == 2 and f"{flag.strip('-')}: " in result.stderr
    assert calls == []


def test_an_unknown_model_is_named():
    result = mgt("sample", "--model", "shoes")
    assert result.exit_code == 2 and "name: expected one of 'fashion', got 'shoes'" in result.stderr


def test_help_lists_the_commands():
    result = mgt("--help")
    assert result.exit_code == 0
    for command in ("sample", "info", "evaluate"):
        assert command in result.stdout
    assert "abs_cos:2" in " ".join(mgt("sample", "--help").stdout.split())


def test_main(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mgt", "info"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and "torch" in capsys.readouterr().out


@pytest.mark.skipif(not (WEIGHTS_DIR / "transformer.safetensors").exists(), reason="needs the bundled weights")
def test_the_bundled_model(tmp_path):
    out = tmp_path / "grid.png"
    result = mgt("sample", "--class", "sneaker", "-n", "1", "--steps", "2", "--out", str(out))
    assert result.exit_code == 0 and Image.open(out).size == (116 + 4, 116 + 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("sample", "--trajectory", "nope/t.gif"),
            "--trajectory: expected a path in a folder that exists, got 'nope/t.gif'",
        ),
        (("sample", "--out", "nope/g.png"), "--out: expected a path in a folder that exists, got 'nope/g.png'"),
        (("sample", "--out", "folder.png"), "--out: expected the path of a file, got the folder 'folder.png'"),
        (
            ("sample", "--out", "same.png", "--trajectory", "./same.png"),
            "--trajectory: expected another file than --out",
        ),
        (("exact", "--out", "nope/e.png"), "--out: expected a path in a folder that exists, got 'nope/e.png'"),
        (("evaluate", "--out", "file/out"), "Not a directory: 'file/out"),
        (("bench", "--out", "file/out", "--quick"), "Not a directory: 'file/out'"),
        (("export", "--out", "file/out"), "Not a directory: 'file/out'"),
    ],
)
def test_outputs_are_checked_before_any_work(model, calls, tmp_path, monkeypatch, args, message):
    for name in ("mgt_sampler.evaluation.exact.judge_exactly", "mgt_benchmarks.suite.time_case"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("worked"))
    monkeypatch.setattr("mgt_sampler.sampling.generate", lambda *args, **kwargs: pytest.fail("worked"))
    if args[0] == "evaluate":
        model.device = torch.device("cpu")
        monkeypatch.setattr("mgt_sampler.evaluation.run._check", lambda *args: None)
    if args[0] == "export":
        pytest.importorskip("triton")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    result = mgt(*args)
    assert result.exit_code == 2 and not calls
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_picture_on_a_full_disk_is_the_old_one(model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "grid.png").write_bytes(b"old")
    result = mgt("sample", "-n", "3", "--no-progress")
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert (tmp_path / "grid.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_environment_that_asks_for_what_is_absent(tmp_path):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom mgt_sampler import cli\n"
        "for command in (['sample'], ['exact'], ['bench', '--list'], ['info']):\n"
        "    result = CliRunner().invoke(cli.app, command)\n"
        "    assert result.exit_code == 2 and 'MGT_ISA=nonsense' in result.stderr, (command, result.stderr)\n"
    )
    environment = {**os.environ, "MGT_ISA": "nonsense"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "list.toml: expected a TOML file"),
        (b"configuration = 3", "list.toml: configuration: expected tables [[configuration]], got 3"),
        (b"[configuration]\nname = 'a'", "list.toml: configuration: expected tables [[configuration]]"),
        (b"defaults = 3\n[[configuration]]\nname = 'a'", "list.toml: defaults: expected a table, got 3"),
        (b"[[configuration]]\nname = 'a'\nskip = 1", "a: skip: expected a collection of ints, got int"),
    ],
)
def test_lists_that_are_none(tmp_path, text, message):
    (tmp_path / "list.toml").write_bytes(text)
    result = mgt("evaluate", str(tmp_path / "list.toml"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
