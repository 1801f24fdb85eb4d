"""The command `mgt`: sample images, quantize a model, show what is installed, evaluate techniques, export kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mgt_kernels import info as kernels_info
from mgt_kernels import sample_tokens

from .clients import CLIENTS
from .files import check_writable, make_folder
from .hub import check_out, load_pipe, sample_pipe
from .images import ANIMATIONS, STILLS, check_suffix, save_grid, save_trajectory, trajectory_images
from .models import load_model
from .models.data import load_fashion_mnist, to_float_images
from .quantization import ScaledModel, load_quantized, quantize, sampler_trajectories, save_quantized
from .sampling import SamplerStep, generate
from .schedules import MASK_SCHEDULES, VALUE_SCHEDULES
from .techniques import Differential, ZSampling

app = typer.Typer(
    help="Sample images from masked generative transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_EPILOG = (
    f"Guidance scale, temperatures, noise scale and momentum each take {VALUE_SCHEDULES}; "
    "numbers are separated by commas, as in --temperature 2,0."
)

ModelName = Annotated[str, typer.Option("--model", help="A bundled model: fashion.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Number of inference steps, T.")]
# guidance that grows and a high confidence temperature: early steps stay diverse, late ones faithful. What the bundled
# model does best with, by `mgt evaluate`
Guidance = Annotated[str, typer.Option("--guidance-scale", help="How strongly the class is asked for; 1: no guidance.")]
Temperature = Annotated[
    str, typer.Option("--temperature", help="Of the confidence that decides which tokens are masked again.")
]
TokenTemperature = Annotated[str, typer.Option("--token-temperature", help="Of the draw of a token; 0: the likeliest.")]
NoiseScale = Annotated[str, typer.Option("--noise-scale", help="Gaussian noise on the logits, in nats.")]
Schedule = Annotated[
    str,
    typer.Option("--mask-schedule", help=f"How many tokens stay masked after each step: {MASK_SCHEDULES}."),
]
DifferentialOption = Annotated[
    str | None,
    typer.Option(
        "--differential", metavar="VARIANT[:SHARE]", help="Differential sampling: paper or official, as in paper:0.75."
    ),
]
ZOption = Annotated[
    str | None,
    typer.Option(
        "--z-sampling",
        metavar="VARIANT[:SCALE]",
        help="Masked Z-Sampling: paper, official or random; with the inversion guidance scale, 0: unconditional.",
    ),
]
Momentum = Annotated[str, typer.Option(help="Carries the logits on along their last change; 0: doesn't.")]
Skip = Annotated[
    list[int] | None, typer.Option(metavar="STEP", help="A step, from 0, that does without the model; repeat for more.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same images.")]
Backend = Annotated[str, typer.Option(help="Kernels: auto, reference, an instruction set of `mgt info`, or triton.")]
Progress = Annotated[bool, typer.Option(help="Show a progress bar.")]


@app.command(epilog=_EPILOG)
def sample(
    context: typer.Context,
    class_: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            "-c",
            metavar="NAME",
            help="A class by name or number; repeat for more, a row each. [default: all]",
        ),
    ] = None,
    pipe: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            help="A pipeline of diffusers in place of the bundled model: a folder, or an id on the Hugging Face hub. "
            "What is not given is as the pipeline has it.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="With --pipe: what to draw; repeat for more, a row each.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --pipe: what guidance leads away from.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="With --pipe: in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="With --pipe: in pixels.")] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            "-n",
            min=1,
            help="Images in all, rounded up to as many of each class; with --pipe, of each prompt, with the seeds from "
            "--seed on. [default: 40; with --pipe: 1]",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="With --pipe: images drawn at once; from 2 on, networks may round otherwise.")
    ] = 1,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The grid of images: .png, .jpg or .webp; with --pipe a .png, or a folder for a file each.",
        ),
    ] = Path("grid.png"),
    trajectory: Annotated[
        Path | None,
        typer.Option(help="Also the tokens appearing: an animation (.gif, .webp, .apng) or a strip (.png)."),
    ] = None,
    steps: Steps = 12,
    guidance_scale: Guidance = "1,3",
    temperature: Temperature = "8,0",
    token_temperature: TokenTemperature = "1",
    noise_scale: NoiseScale = "0",
    mask_schedule: Schedule = "cosine",
    differential: DifferentialOption = None,
    z_sampling: ZOption = None,
    momentum: Momentum = "0",
    skip: Skip = None,
    seed: Seed = 0,
    model: ModelName = "fashion",
    quantized: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its transformer as `mgt quantize` or `save_quantized` wrote it."),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="With --pipe: of its networks, float32, bfloat16 or float16.")] = "float32",
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Draw images of one class, a row of every class, or a row of every prompt, and write them as a grid."""
    states: list[tuple[Tensor, Tensor]] = []

    def record(step: SamplerStep) -> None:
        states.append((step.tokens, step.mask))

    with _errors_of_users():
        given = _given(context)
        for name in _OF_THE_BUNDLED_MODEL if pipe is not None else _OF_A_PIPE:
            if name in given:
                raise ValueError(f"{_flag(name)}: expected {'without' if pipe is not None else 'with'} --pipe")
        if pipe is not None:
            _sample_pipe(given)
            return
        check_suffix("--out", out, STILLS)
        check_writable("--out", out)
        if trajectory is not None:
            check_suffix("--trajectory", trajectory, (*ANIMATIONS, ".png"))
            check_writable("--trajectory", trajectory)
            if trajectory.resolve() == out.resolve():
                raise ValueError(f"--trajectory: expected another file than --out, got {str(trajectory)!r}")
        network: Any = load_model(model, device=_device(device, backend))
        if quantized is not None:
            network.transformer = load_quantized(network.transformer, quantized, backend=backend)
            network = ScaledModel(network)
        classes = _classes(class_, network.class_names)
        num_each = math.ceil((num_images or 40) / len(classes))
        output = generate(
            network,
            labels=torch.tensor(classes, dtype=torch.int64, device="cpu").repeat_interleave(num_each),
            num_inference_steps=steps,
            guidance_scale=_values(guidance_scale),
            temperature=_values(temperature),
            token_temperature=_values(token_temperature),
            noise_scale=_values(noise_scale),
            mask_schedule=_ratios(mask_schedule),
            differential=None if differential is None else Differential(**_variant("share", differential)),
            z_sampling=None if z_sampling is None else ZSampling(**_variant("inversion_guidance_scale", z_sampling)),
            momentum=_values(momentum),
            skip=skip or (),
            seed=seed,
            callback=None if trajectory is None else record,
            progress=progress,
            backend=backend,
        )
        num_columns = None if len(classes) == 1 else num_each
        save_grid(output.images, out, num_columns=num_columns)
        names = ", ".join(network.class_names[i] for i in classes)
        typer.echo(f"{out}: {len(output.images)} images, {names if len(classes) == 1 else 'a row each of ' + names}")
        if trajectory is not None:
            save_trajectory(trajectory_images(network, states), trajectory, num_columns=num_columns)
            typer.echo(f"{trajectory}: {len(states)} draws")


# what would do nothing with, and without, --pipe
_OF_THE_BUNDLED_MODEL = ("class_", "trajectory", "token_temperature", "skip", "model")
_OF_A_PIPE = ("prompt", "negative_prompt", "height", "width", "batch_size", "dtype")


def _sample_pipe(given: dict[str, Any]) -> None:
    """`mgt sample --pipe` with the options that are given, by their names."""
    prompts, num_images = given.get("prompt"), given.get("num_images", 1)
    if not prompts:
        raise ValueError("--prompt: expected one at least with --pipe")
    if len(set(prompts)) < len(prompts):
        raise ValueError("--prompt: expected each once, got one again; --num-images draws more of it")
    seed = given.get("seed", 0)
    if not -(2**63) <= seed <= 2**63 - num_images:
        raise ValueError(f"--seed: expected seeds of 64 bits, got {seed} to {seed + num_images - 1}")
    out = Path(given.get("out", "grid.png"))
    check_out(out)
    backend = given.get("backend", "auto")
    scheduler: dict[str, Any] = {"backend": backend}
    for name, key, read in (
        ("noise_scale", "noise_scale", _values),
        ("mask_schedule", "masking_schedule", _ratios),
        ("differential", "differential", lambda text: _variant("share", text)),
        ("momentum", "momentum", _values),
    ):
        if name in given:
            scheduler[key] = read(given[name])
    arguments: dict[str, Any] = {name: given[name] for name in ("negative_prompt", "height", "width") if name in given}
    if "steps" in given:
        arguments["num_inference_steps"] = given["steps"]
    if "temperature" in given:
        arguments["temperature"] = _values(given["temperature"])
    if "guidance_scale" in given:
        scale = arguments["guidance_scale"] = _values(given["guidance_scale"])
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise ValueError(f"--guidance-scale: expected a number with --pipe, got {given['guidance_scale']!r}")
    z_sampling = None
    if "z_sampling" in given:
        z_sampling = ZSampling(**_variant("inversion_guidance_scale", given["z_sampling"]))
    pipe = load_pipe(
        given["pipe"],
        scheduler=scheduler,
        quantized=Path(given["quantized"]) if "quantized" in given else None,
        device=_device(given.get("device", "cpu"), backend),
        dtype=_dtype(given.get("dtype", "float32")),
        progress=given.get("progress", True),
    )
    elsewhere = ("prompt", "seed", "num_images", "batch_size", "out", "progress")
    settings = {name: value for name, value in given.items() if name not in elsewhere}
    sample_pipe(
        pipe,
        prompts,
        range(seed, seed + num_images),
        out,
        arguments=arguments,
        z_sampling=z_sampling,
        batch_size=given.get("batch_size", 1),
        facts={name: given.get(name) for name in ("pipe", "quantized")},
        command=[text for name, value in settings.items() for text in (_flag(name), str(value))],
    )
    count = num_images * len(prompts)
    rows = "" if len(prompts) == 1 else ", a row each of " + ", ".join(prompts)
    typer.echo(f"{out}: {count} image{'s' if count > 1 else ''}{'' if out.is_dir() else rows}")


@app.command("quantize")
def quantize_(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of the quantized transformer: .safetensors.")],
    report: Annotated[Path | None, typer.Option(help="Also a picture of the layers: .png.")] = None,
    share: Annotated[
        float, typer.Option(help="Of the layers that compute as W4A8, 0 to 1; the others as W4A16.")
    ] = round(1 / 3, 3),
    rank_by: Annotated[
        str,
        typer.Option(help="Which those are: scale, of the least output scale; error, of the least error for the time."),
    ] = "scale",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale, a multiple of 32.")] = 128,
    second_calibration: Annotated[
        bool, typer.Option(help="Measure the scales again once the paths are assigned.")
    ] = True,
    num_images: Annotated[
        int,
        typer.Option(
            "--num-images",
            "-n",
            min=1,
            help="Drawn to calibrate on, rounded up to as many of each class.",
        ),
    ] = 20,
    steps: Steps = 12,
    guidance_scale: Guidance = "1,3",
    temperature: Temperature = "8,0",
    seed: Seed = 0,
    model: ModelName = "fashion",
    device: Device = "cpu",
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Quantize a model's transformer to 4-bit weights by secondary calibration, and print what became of its layers."""
    with _errors_of_users(), _extra():
        check_suffix("--out", out, (".safetensors",))
        check_writable("--out", out)
        if report is not None:
            check_suffix("--report", report, (".png",))
            check_writable("--report", report)
            import_module("matplotlib")
        network = load_model(model, device=_device(device, backend))
        num_classes = len(network.class_names)
        calibration = sampler_trajectories(
            network,
            labels=torch.arange(num_classes).repeat(math.ceil(num_images / num_classes)),
            num_inference_steps=steps,
            guidance_scale=_values(guidance_scale),
            temperature=_values(temperature),
            seed=seed,
            progress=progress,
            backend=backend,
        )
        transformer, layers = quantize(
            network.transformer,
            calibration,
            share=share,
            rank_by=rank_by,
            group_size=group_size,
            second_calibration=second_calibration,
            backend=backend,
            progress=progress,
        )
        typer.echo(layers.table())
        save_quantized(transformer, out)
        typer.echo(f"{out}: {out.stat().st_size:,} bytes")
        if report is not None:
            layers.plot(report)
            typer.echo(report)


@app.command()
def info() -> None:
    """Print version, instruction set, threads, PyTorch and Triton."""
    try:
        facts = kernels_info()
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="the environment") from error
    width = max(map(len, facts))
    for name, value in facts.items():
        value = [f"{op}: {isa}" for op, isa in value.items()] if isinstance(value, dict) else value
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        typer.echo(f"{name:<{width}}  {'none' if shown is None else shown}")


@app.command()
def clients() -> None:
    """List the models of other projects that `accelerate` makes draw with these kernels."""
    rows = [("project", "class", "what draws here", "source")]
    for client in CLIENTS:
        for i, path in enumerate(client.classes):
            first = i == 0
            name = path.rpartition(".")[2]
            rows.append((client.name, name, client.replaces, client.source) if first else ("", name, "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    typer.echo("\nfrom mgt_sampler import accelerate, restore; accelerate(pipe)")


@app.command(epilog=_EPILOG)
def evaluate(
    context: typer.Context,
    configurations: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file with a list of configurations, or a shipped one: 'techniques', 'samplers', "
            "'quantization' or 'whole_image'; without it, the one that the options describe.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="A folder for tables, plots, and what is drawn, so that an interrupted run goes on. "
            "[default for a list: evaluation]",
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            "-n",
            min=1,
            help="For each configuration, rounded up to as many of each class in each group. [default: 2000]",
        ),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=2, help="Groups of seeds, over which the intervals are. [default: 10]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="By default 80 images in 8 groups.")] = False,
    steps: Steps = 12,
    guidance_scale: Guidance = "1,3",
    temperature: Temperature = "8,0",
    token_temperature: TokenTemperature = "1",
    noise_scale: NoiseScale = "0",
    mask_schedule: Schedule = "cosine",
    differential: DifferentialOption = None,
    z_sampling: ZOption = None,
    momentum: Momentum = "0",
    skip: Skip = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 100,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with Fashion-MNIST: also finds the likelihood of real images' masked tokens."),
    ] = None,
    model: ModelName = "fashion",
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of the transformer: float32, bfloat16 or float16; decoder and judge stay in float32.")
    ] = "float32",
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Draw images of every class and measure them, with one configuration or with a list of them."""
    with _errors_of_users(), _extra():
        from .evaluation.configurations import Configuration, load_configurations
        from .evaluation.run import evaluate, merges, results_table, save_results

        sampling_options: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": _values(guidance_scale),
            "temperature": _values(temperature),
            "token_temperature": _values(token_temperature),
            "noise_scale": _values(noise_scale),
            "mask_schedule": _ratios(mask_schedule),
            "differential": None if differential is None else _variant("share", differential),
            "z_sampling": None if z_sampling is None else _variant("inversion_guidance_scale", z_sampling),
            "momentum": _values(momentum),
            "skip": skip or [],
        }
        if configurations is None:
            given = {name: value for name, value in sampling_options.items() if value is not None}
            chosen = [Configuration("options", given)]
        else:
            for name in ("steps", *sampling_options):
                if name in _given(context):
                    raise ValueError(f"{_flag(name)}: expected in {configurations}, got it as an option")
            chosen = load_configurations(configurations)
            out = out or Path("evaluation")
        validation: dict[str, Any] = {}
        if data is not None:
            images, labels = load_fashion_mnist(data, "test")
            validation["validation"] = (to_float_images(images), labels)
        results = evaluate(
            load_model(model, device=_device(device, backend), dtype=_dtype(dtype)),
            chosen,
            num_images=num_images or (80 if quick else 2000),
            num_groups=groups or (8 if quick else 10),
            seed=seed,
            batch_size=batch_size,
            backend=backend,
            out=out,
            progress=progress,
            **validation,
        )
        typer.echo(results_table(results))
        if out is not None:
            from .evaluation.pareto import save_pareto
            from .evaluation.plots import save_plots

            costs = save_pareto(results, out) if merges(results) else []
            for path in (*save_results(results, out), *save_plots(results, out), *costs):
                typer.echo(path)


@app.command()
def exact(
    configurations: Annotated[
        str,
        typer.Argument(
            help="A TOML file with a list of configurations, or 'exact' or 'exact_samplers', shipped lists."
        ),
    ] = "exact",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also a plot, a PNG file.")] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "-n", min=1, help="Sequences for each seed, technique and number of steps.")
    ] = 4000,
    seeds: Annotated[int, typer.Option(min=2, help="Over which the intervals are.")] = 10,
    progress: Progress = True,
) -> None:
    """Compare samplers and techniques with the truth: a Markov chain whose every conditional is known."""
    with _errors_of_users(), _extra():
        from .evaluation.configurations import load_configurations
        from .evaluation.exact import exact_table, judge_exactly, save_exact_plot

        if out is not None:
            check_suffix("--out", out, (".png",))
            check_writable("--out", out)
        _device("cpu", "auto")
        techniques = load_configurations(configurations)
        results, noise = judge_exactly(techniques, num_samples=num_samples, num_seeds=seeds, progress=progress)
        typer.echo(exact_table(results, noise))
        if out is not None:
            save_exact_plot(results, noise, out)
            typer.echo(out)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Every op once, in three minutes.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every op, model, dtype, layout, backend, and 1 thread as well.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Cases with this text in their names, or one of texts parted by |; repeat for more."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For us and for the peers. [default: PyTorch's]", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="In which all take turns. [default: 7; quick: 3]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A folder for report.html, results.csv, and results.json (pytest-benchmark)."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the ratios as a Markdown table.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the names of the cases, and stop.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Print what moved between two runs (folders, or results.csv), and stop."),
    ] = None,
    progress: Progress = True,
) -> None:
    """Time the ops beside PyTorch's chains and other libraries; exit with status 1 where a target is missed."""
    with _errors_of_users(), _extra("bench"):
        from mgt_benchmarks import suite

        _device("cpu", "auto")
        if quick and full:
            raise ValueError("--quick: expected without --full, got both")
        scale = "quick" if quick else "full" if full else "standard"
        if compare is not None:
            suite.compare(*compare)
        elif list_:
            for case in suite.select(scale, only or (), threads):
                typer.echo(case.setting.name)
        elif suite.bench(
            scale=scale,
            only=only or (),
            threads=threads,
            rounds=rounds,
            out=out,
            markdown=markdown,
            progress=progress,
        ):
            raise typer.Exit(1)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")],
    arch: Annotated[
        list[int] | None,
        typer.Option(metavar="NUMBER", help="A compute capability, as in 80; repeat for more. [default: 80, 90]"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of logits and layers: fp32, bf16 or fp16; repeat for more. [default: all]"),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of the logits: token-major or position-major. [default: both]"),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An op, as in sample_tokens; repeat for more. [default: all]"),
    ] = None,
    group_size: Annotated[
        list[int] | None,
        typer.Option(metavar="NUMBER", help="Of the weights of a linear layer; repeat for more. [default: 128]"),
    ] = None,
    progress: Progress = True,
) -> None:
    """Compile the CUDA kernels into C sources for programs without Python; takes minutes, but no GPU."""
    try:
        from mgt_kernels.triton import export as kernels
    except RuntimeError as error:
        raise typer.BadParameter("export needs Triton: pip install mgt-kernels[gpu]") from error

    with _errors_of_users():
        make_folder("--out", out)
        files = kernels.export(
            out, arch or (80, 90), dtype or kernels.DTYPES, layout or kernels.LAYOUTS, op or kernels.OPS,
            group_size or (128,), progress=progress,
        )  # fmt: skip
    for path in files:
        typer.echo(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Run the command line."""
    app(prog_name="mgt")


@contextmanager
def _errors_of_users() -> Iterator[None]:
    """Turn a bad argument, or a file that cannot be read or written, into a message."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _extra(name: str = "evaluate") -> Iterator[None]:
    """Say how to install what a command needs beside the sampler."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is missing: pip install mgt-kernels[{name}]") from error


def _given(context: typer.Context) -> dict[str, Any]:
    """The options of the command line, without those that are left at their defaults."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def _flag(name: str) -> str:
    return f"--{name.rstrip('_').replace('_', '-')}"


def _ratios(text: str) -> str | list[float]:
    """Numbers separated by commas as a list; any other text is the name of a schedule."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def _values(text: str) -> Any:
    """As `_ratios`, but a single number stands for itself."""
    values = _ratios(text)
    return values[0] if isinstance(values, list) and len(values) == 1 else values


def _variant(name: str, text: str) -> dict[str, Any]:
    """VARIANT or VARIANT:NUMBER as arguments, the number called `name`."""
    variant, colon, number = text.partition(":")
    try:
        return {"variant": variant, **({name: float(number)} if colon else {})}
    except ValueError:
        raise ValueError(f"{name}: expected a number after the colon, got {text!r}") from None


def _device(name: str, backend: str) -> torch.device:
    """The device of this name, if it is there and the backend runs on it."""
    try:
        device = torch.device(name)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {error}") from error
    try:
        logits = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
        sample_tokens(logits, token, mask_token_id=1, seed=0, step=0, backend=backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if device.type == "meta":
        raise ValueError(f"--device: expected one that computes, such as cpu or cuda, got {name!r}")
    return device


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _classes(given: Sequence[str] | None, class_names: Sequence[str]) -> list[int]:
    """The numbers of the classes asked for; every class where none or all is asked for."""
    if not given or "all" in given:
        return list(range(len(class_names)))
    numbers = {_plain(name): i for i, name in enumerate(class_names)}
    numbers |= {str(i): i for i in range(len(class_names))}
    for name in given:
        if _plain(name) not in numbers:
            raise ValueError(f"--class: expected all or one of {', '.join(class_names)}, got {name!r}")
    return [numbers[_plain(name)] for name in given]


def _plain(name: str) -> str:
    """The name's letters and digits in lower case, so that T-Shirt is t-shirt and tshirt."""
    return "".join(c for c in name.lower() if c.isalnum())
