"""Pipelines of diffusers, from a folder or from the hub, that draw images from prompts: `mgt sample --pipe`."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mgt_kernels import __version__

from .clients import CLIENTS, accelerate
from .files import check_writable, make_folder, whole_file
from .images import check_suffix, image_grid
from .quantization import load_quantized, register_quantizers
from .quantization.scales import choosers_of, layers_to_choose_for
from .techniques import ZSampling


def load_pipe(
    source: str,
    *,
    scheduler: Mapping[str, Any],
    quantized: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Any:
    """Load a pipeline that draws images from prompts, and accelerate it.

    Args:
        source: a folder that `save_pretrained` wrote, or the id of a pipeline on the hub, such as amused/amused-256.
        scheduler: arguments of `MGTScheduler` that are not to be the pipeline's, its backend among them.
        quantized: a file of `save_quantized` with the pipeline's transformer.
        device: where it runs.
        dtype: of all its networks.
        progress: show the bars of loading and of the steps.

    Raises:
        TypeError, ValueError: a bad argument; or there is no such pipeline, or one that does not draw images from
            prompts here; or the hub cannot be reached; or a package is missing. The message is one line.
        OSError: there is no file `quantized`.
    """
    try:
        diffusers: Any = import_module("diffusers")
        import_module("transformers")
    except ImportError as error:
        raise ValueError(f"--pipe: {error.name} is missing: pip install diffusers transformers") from error
    if not (source and Path(source).is_dir()) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise ValueError(f"--pipe: expected a folder that exists, or an id such as amused/amused-256, got {source!r}")
    # what can be wrong is found out before gigabytes are loaded
    import_module(".scheduler", __package__).MGTScheduler(mask_token_id=0, **scheduler)
    if quantized is not None:
        quantized.open("rb").close()
    with _bars(progress):
        name = str(_load(source, diffusers.DiffusionPipeline.load_config).get("_class_name"))
        parameters = inspect.signature(getattr(diffusers, name, object).__call__).parameters.keys()
        is_known = name in {path.rpartition(".")[2] for client in CLIENTS for path in client.classes}
        if not is_known or not {"prompt", "generator", "height", "width"} <= parameters or "image" in parameters:
            raise ValueError(
                "--pipe: expected a pipeline of diffusers that `mgt clients` lists and that draws images from prompts "
                f"alone, such as AmusedPipeline, got {name} in {source!r}"
            )
        register_quantizers()
        options = {} if dtype == torch.float32 else {"torch_dtype": dtype}
        pipe = _load(source, diffusers.DiffusionPipeline.from_pretrained, **options)
    if quantized is not None:
        transformer = load_quantized(pipe.transformer, quantized, backend=scheduler.get("backend", "auto"))
        if layers_to_choose_for(transformer) and not choosers_of(transformer):
            raise ValueError(
                "--quantized: expected one scale for each layer, or a model quantized with mask_token_id, "
                f"got {str(quantized)!r}"
            )
        # it has the file's
        pipe.transformer = transformer if transformer.dtype == dtype else transformer.to(dtype)
    pipe.to(device)
    accelerate(pipe)
    pipe.scheduler.register_to_config(**scheduler)
    pipe.set_progress_bar_config(disable=not progress)
    return pipe


def sample_pipe(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    arguments: Mapping[str, Any],
    z_sampling: ZSampling | None = None,
    batch_size: int = 1,
    facts: Mapping[str, Any],
    command: Sequence[str] = (),
) -> None:
    """Draw an image for each prompt and each seed, and write them with what made them in the PNG's text chunks.

    Args:
        pipe: that `load_pipe` returned.
        prompts: a row of the grid each.
        seeds: each image's own, the same for each prompt.
        out: a PNG, of the image or of the grid, or a folder that exists, for a PNG each.
        arguments: of the pipeline's call.
        z_sampling: Z-Sampling of these steps; None: don't.
        batch_size: images drawn at once. Their draws do not depend on it; a network may round otherwise.
        facts: to be written as well.
        command: of the command line that draws one image again, all but its prompt, seed and file.

    Raises:
        ValueError: an argument that the pipeline does not take.
        OSError: a file cannot be written; those that are there are whole.
    """
    facts = {**facts, **_checked(pipe, arguments), "z_sampling": z_sampling}
    is_folder = out.is_dir()
    images, records = [], []
    for image, prompt, seed in _draw(pipe, list(product(prompts, seeds)), arguments, z_sampling, batch_size):
        own = {"prompt": prompt, "seed": seed, "width": image.width, "height": image.height}
        own["command"] = shlex.join(["mgt", "sample", *command, "--prompt", prompt, "--seed", str(seed)])
        if is_folder or len(prompts) * len(seeds) == 1:
            row = f"prompt-{prompts.index(prompt)}-" if len(prompts) > 1 else ""
            _write(image, out / f"{row}seed-{seed}.png" if is_folder else out, {**own, **facts})
        else:
            images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255)
            records.append(own)
    if images:
        grid = image_grid(torch.stack(images), num_columns=len(seeds) if len(prompts) > 1 else None)
        _write(grid, out, {"images": json.dumps(records), **facts})


def check_out(out: Path) -> None:
    """Make the folder where it is one, and check before long work that it or the PNG can be written to."""
    if out.is_dir() or not out.suffix:
        make_folder("--out", out)
    else:
        check_suffix("--out", out, (".png",))
        check_writable("--out", out)


def _draw(
    pipe: Any, pairs: Sequence[tuple[str, int]], arguments: Mapping[str, Any], z_sampling: Any, batch_size: int
) -> Iterator[tuple[Image.Image, str, int]]:
    z_sample = import_module(".pipelines", __package__).z_sample
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        call = {**arguments, "prompt": [prompt for prompt, _ in batch]}
        if "negative_prompt" in call:
            # aMUSEd does not repeat a single one
            call["negative_prompt"] = [call["negative_prompt"]] * len(batch)
        # an image depends on its own seed alone
        call["generator"] = [torch.Generator().manual_seed(seed) for _, seed in batch]
        output = pipe(**call) if z_sampling is None else z_sample(pipe, z_sampling=z_sampling, **call)
        for image, (prompt, seed) in zip(output.images, batch, strict=True):
            yield image, prompt, seed


def _checked(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of a pipeline's call, and say with what it draws, its defaults among them."""
    parameters, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    used = {key: arguments.get(key, parameter.default) for key, parameter in parameters.items()}
    for key in arguments.keys() - used.keys():
        flag = {"num_inference_steps": "steps"}.get(key, key).replace("_", "-")
        raise ValueError(f"--{flag}: expected none, for {name} does not take it")
    if "negative_prompt" in arguments and used.get("guidance_scale", 2) <= 1:
        raise ValueError("--negative-prompt: expected a guidance scale above 1 with it, got no guidance")
    # pixels of a token, times the tokens that the transformer takes together
    multiple = getattr(pipe, "vae_scale_factor", 1) * (1 + getattr(pipe.transformer.config, "downsample", False))
    for key in ("height", "width"):
        if arguments.get(key, 0) % multiple:
            raise ValueError(f"--{key}: expected a multiple of {multiple} for this pipeline, got {arguments[key]}")
    config = pipe.scheduler.config
    return {
        "pipe_class": name,
        "steps": used.get("num_inference_steps"),
        **{key: used.get(key) for key in ("guidance_scale", "temperature", "negative_prompt")},
        "mask_schedule": config.masking_schedule,
        **{key: config[key] for key in ("noise_scale", "differential", "momentum")},
        "device": pipe.device,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "mgt-kernels": __version__,
        **{package: import_module(package).__version__ for package in ("torch", "diffusers", "transformers")},
    }


def _load(source: str, loader: Callable[..., Any], **options: Any) -> Any:
    try:
        return loader(source, **options)
    except Exception as error:
        # whatever is wrong with somebody's files, or with the network
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        offline = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}
        if offline & {type(each).__name__ for each in chain}:
            message = (
                f"expected a folder that exists, or an id that the hub or its cache has, got {source!r}; "
                f"where there is a network, `hf download {source} --local-dir FOLDER` makes a folder of an id"
            )
        else:
            message = f"expected a pipeline that diffusers loads, got {source!r}: {' '.join(str(error).split())}"
        raise ValueError(f"--pipe: {message}") from error


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Without `progress`, turn off the bars of the two libraries for as long as the block takes."""
    with ExitStack() as stack:
        for library in () if progress else ("diffusers", "transformers"):
            logging = import_module(f"{library}.utils.logging")
            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                stack.callback(logging.enable_progress_bar)
        yield


def _write(image: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    chunks = PngInfo()
    for key, value in facts.items():
        if value is not None:
            chunks.add_text(key, str(value))
    with whole_file(path) as file:
        image.save(file, "PNG", pnginfo=chunks)
