"""Models of other projects, whose own calls draw with our kernels after `accelerate`, and as before after `restore`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ..arguments import is_bool, kind
from ..interval import check_interval
from ..merge import TokenMerging
from .parts import Part, put_all, take_off_all

T = TypeVar("T")

# of an object that is accelerated: its `Acceleration`
ATTRIBUTE = "_mgt_acceleration"


@dataclass(frozen=True)
class Client:
    """A class of another project that `accelerate` knows.

    Attributes:
        name: of the project, as its users call it.
        classes: the classes, each by the end of its dotted path; their subclasses are known too.
        replaces: what of the object draws with our kernels.
        source: where the project is.
        module: of this package, with a function `replacements(obj)` that gives the attributes to set on the object.
        options: the keywords of `accelerate` that it takes; the module then has a function `parts(obj, replacements,
            **options)` that gives what else is set, on the object and on what it holds.
    """

    name: str
    classes: tuple[str, ...]
    replaces: str
    source: str
    module: str
    options: tuple[str, ...] = ()


CLIENTS = (
    Client(
        "aMUSEd",
        (
            "pipeline_amused.AmusedPipeline",
            "pipeline_amused_img2img.AmusedImg2ImgPipeline",
            "pipeline_amused_inpaint.AmusedInpaintPipeline",
        ),
        "scheduler",
        "diffusers, arXiv 2401.01808",
        "amused",
        ("merge", "quantize", "guidance_interval", "head"),
    ),
    Client(
        "Meissonic",
        ("src.pipeline.Pipeline", "src.pipeline_img2img.Img2ImgPipeline", "src.pipeline_inpaint.InpaintPipeline"),
        "scheduler",
        "github.com/viiika/Meissonic, arXiv 2410.08261",
        "amused",
        ("merge", "quantize", "guidance_interval", "head"),
    ),
    Client(
        "Halton-MaskGIT",
        ("halton_sampler.HaltonSampler", "confidence_sampler.ConfidenceSampler"),
        "the loop of a call",
        "github.com/valeoai/Halton-MaskGIT, arXiv 2503.17076",
        "halton",
    ),
    Client(
        "TiTok",
        ("modeling.maskgit.ImageBert", "modeling.maskgit.UViTBert"),
        "generate",
        "github.com/bytedance/1d-tokenizer, arXiv 2406.07550",
        "titok",
    ),
    Client(
        "MaskGen",
        ("modeling.maskgen.MaskGen_VQ",),
        "generate",
        "github.com/bytedance/1d-tokenizer, arXiv 2501.07730",
        "maskgen",
    ),
    Client(
        "MaskBit",
        ("modeling.bert.LFQBert", "modeling.bert.Bert"),
        "its function sample(model, ...), as a method model.sample(...)",
        "github.com/markweberdev/maskbit, arXiv 2409.16211",
        "maskbit",
    ),
    Client(
        "open-muse",
        ("muse.modeling_transformer_v2.MaskGiTUViT_v2",),
        "generate2",
        "github.com/huggingface/open-muse, arXiv 2401.01808",
        "open_muse",
    ),
    Client(
        "open-muse, its first transformer",
        ("muse.modeling_transformer.MaskGitTransformer",),
        "generate2",
        "github.com/huggingface/open-muse",
        "open_muse_v1",
    ),
    Client(
        "LLaDA",
        ("modeling_llada.LLaDAModelLM",),
        "generate: that of its generate.py, as a method; the inherited one is autoregressive",
        "github.com/ML-GSAI/LLaDA, arXiv 2502.09992",
        "llada",
    ),
    Client(
        "Dream",
        ("modeling_dream.DreamModel",),
        "the loop of diffusion_generate",
        "github.com/DreamLM/Dream, arXiv 2508.15487",
        "dream",
    ),
    Client(
        "DiffusionGemma",
        ("modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion",),
        "the step of generate",
        "transformers",
        "diffusion_gemma",
    ),
    Client(
        "MaskGIT in JAX",
        ("maskgit.inference.ImageNet_class_conditional_generator",),
        "generate_samples",
        "maskgit, arXiv 2202.04200",
        "maskgit_jax",
    ),
    Client("LLaDA2", ("pipeline_llada2.LLaDA2Pipeline",), "scheduler", "diffusers, arXiv 2512.15745", "llada2"),
    Client(
        "Lumina-DiMOO",
        ("modeling_xllmx_dimoo.LLaDAForMultiModalGeneration",),
        "generate_image: that of its generators, as a method",
        "github.com/Alpha-VLLM/Lumina-DiMOO, arXiv 2510.06308",
        "lumina",
    ),
    Client(
        "MMaDA",
        ("modeling_mmada.MMadaModelLM",),
        "its methods that generate; generate: that of its generate.py, as a method",
        "github.com/Gen-Verse/MMaDA, arXiv 2505.15809",
        "mmada",
    ),
    Client(
        "muse-maskgit-pytorch",
        ("muse_maskgit_pytorch.MaskGit",),
        "generate",
        "muse-maskgit-pytorch, arXiv 2301.00704",
        "muse",
    ),
    Client(
        "Show-o",
        ("modeling_showo.Showo",),
        "t2i_generate",
        "github.com/showlab/Show-o, arXiv 2408.12528",
        "showo",
    ),
    Client(
        "OmniVoice", ("omnivoice.OmniVoice",), "guidance, draw and confidence of each step", "omnivoice", "omnivoice"
    ),
)


@dataclass(eq=False)
class Acceleration:
    """What `accelerate` did to an object.

    Attributes:
        client: which project's class the object is of.
        replaced: the names of the object's attributes that are ours now.
        options: the keywords that `accelerate` was given.
    """

    client: Client
    replaced: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    _parts: list[Part] = field(default_factory=list)

    @property
    def parts(self) -> tuple[str, ...]:
        """What else was replaced by what, a line each."""
        return tuple(part.line for part in self._parts if part.line)

    def __str__(self) -> str:
        """Say what was replaced."""
        first = f"{self.client.name}: {', '.join(self.replaced)} ({self.client.replaces})"
        return "\n  ".join((first, *self.parts))


def accelerate(
    obj: T,
    *,
    merge: Any = None,
    quantize: Any = None,
    guidance_interval: Sequence[float] | None = None,
    head: bool = False,
) -> Acceleration:
    """Make a loaded model's own call draw with our kernels.

        accelerate(pipe)
        images = pipe("a cat", generator=torch.Generator().manual_seed(0)).images

    The call keeps its signature and its outputs. Attributes are set on this object and on modules that it holds, never
    on a class or a Python module. Where the object takes generators, a sample's draws are functions of its seed, the
    step, the position and the token: they do not depend on the batch. They are others than the original's, from the
    same distribution; what is greedy is equal.

    An object that is accelerated already stays as it is. It may be copied and pickled.

    The keywords are for aMUSEd's and Meissonic's pipelines. With either, what their transformer returns without
    gradients is no tensor but what stands for one (`deferred.DeferredLogits`) and becomes it where anything but the
    pipeline's guidance is done with it. A hook that reads it there costs what was to be saved.

    Args:
        obj: what the user has loaded: an object of one of the classes that `mgt clients` lists.
        merge: a ratio in [0, 0.75], a schedule of one, or a `TokenMerging`: the transformer's blocks merge so many of
            the image's tokens (arXiv 2411.10781). None: don't.
        quantize: a file that `save_quantized` wrote for this transformer, or inputs of it, as for
            `mgt_sampler.quantize`, with which it is calibrated now: the pipeline gets a quantized copy. The original
            transformer stays in memory for `restore`; to spare that, load a quantized one in the first place. None:
            don't.
        guidance_interval: (start, end), 0 <= start <= end <= 1: at steps k of T where not start <= k / T < end, the
            transformer is called with the conditional half alone, whose logits are then the guided ones
            (arXiv 2404.07724). None: all steps are guided. Where the pipeline runs without guidance, nothing changes.
        head: put the pipeline's guidance before the transformer's last layer, u + s (c - u) =
            W (h_u + s (h_c - h_u)) + b, and compute the logits of masked positions alone (`head.folded_logits`). The
            tokens are those without it but where two tie within the rounding of the logits. With a scheduler of
            `rng="torch"`, which draws at all positions, nothing changes.

    Returns:
        What was replaced.

    Raises:
        TypeError: an object of another class; the message lists the classes that are known. Or an object whose parts
            are not those that its class has by itself; keywords that its class does not take; a head that is not
            linear, or a transformer whose head is not known.
        ValueError: a keyword out of range, or other ones than the object was accelerated with; a head with hooks,
            parametrizations, or a forward that was set on it; several activation scales for a quantized layer.

        The object is then as it was.
    """
    if not is_bool(head):
        raise TypeError(f"head: expected a bool, got {kind(head)}")
    options: dict[str, Any] = {"head": True} if head else {}
    if merge is not None:
        options["merge"] = TokenMerging.of(merge)
    if quantize is not None:
        is_file = isinstance(quantize, (str, Path))
        # of a calibration the acceleration keeps no more than that there was one
        options["quantize"] = str(quantize) if is_file else "calibration"
    if guidance_interval is not None:
        options["guidance_interval"] = check_interval(guidance_interval)
    before = vars(obj).get(ATTRIBUTE) if hasattr(obj, "__dict__") else None
    if isinstance(before, Acceleration):
        if options and (options != before.options or options.get("quantize") == "calibration"):
            had = ", ".join(f"{name}={value!r}" for name, value in before.options.items()) or "no keywords"
            raise ValueError(f"{next(iter(options))}: expected {had}, as it is accelerated with; restore(obj) first")
        return before
    client = client_of(obj)
    for name in options:
        if name not in client.options:
            takes = [each.name for each in CLIENTS if name in each.options]
            raise TypeError(f"{name}: expected none with {client.name}; {' and '.join(takes)} take it")
    module = import_module(f".{client.module}", __name__)
    ours: dict[str, Any] = module.replacements(obj)
    parts = [Part(obj, name, value) for name, value in ours.items()]
    if options:
        given = {**options, "quantize": quantize} if quantize is not None else options
        parts += module.parts(obj, ours, **given)
    put_all(parts)
    done = Acceleration(client, tuple(ours), options, parts)
    object.__setattr__(obj, ATTRIBUTE, done)
    return done


def restore(obj: T) -> T:
    """Undo `accelerate`, and return the object.

    An attribute that somebody has set since then stays. An object that is not accelerated stays as it is.

    Args:
        obj: what was given to `accelerate`, or a copy of it.

    Returns:
        The same object.
    """
    done = vars(obj).get(ATTRIBUTE) if hasattr(obj, "__dict__") else None
    if not isinstance(done, Acceleration):
        return obj
    take_off_all(done._parts)
    object.__delattr__(obj, ATTRIBUTE)
    return obj


def client_of(obj: Any) -> Client:
    """Find the client that an object is of, by its class.

    Raises:
        TypeError: none has its class.
    """
    for found in type(obj).__mro__:
        path = f"{found.__module__}.{found.__qualname__}"
        for client in CLIENTS:
            if any(path == known or path.endswith("." + known) for known in client.classes):
                return client
    known = ", ".join(name.rpartition(".")[2] for client in CLIENTS for name in client.classes)
    raise TypeError(f"obj: expected one of {known}, got {type(obj).__module__}.{type(obj).__qualname__}")
