"""Models of other projects, whose own calls draw with our kernels after `accelerate`, and as before after `restore`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

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
    """

    name: str
    classes: tuple[str, ...]
    replaces: str
    source: str
    module: str


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
    ),
    Client(
        "Meissonic",
        ("src.pipeline.Pipeline", "src.pipeline_img2img.Img2ImgPipeline", "src.pipeline_inpaint.InpaintPipeline"),
        "scheduler",
        "github.com/viiika/Meissonic, arXiv 2410.08261",
        "amused",
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
    """

    client: Client
    replaced: tuple[str, ...]
    _ours: dict[str, Any]
    # without those that the object did not have itself
    _originals: dict[str, Any]

    def __str__(self) -> str:
        """Say what was replaced."""
        return f"{self.client.name}: {', '.join(self.replaced)} ({self.client.replaces})"


def accelerate(obj: Any) -> Acceleration:
    """Make a loaded model's own call draw with our kernels.

        accelerate(pipe)
        images = pipe("a cat", generator=torch.Generator().manual_seed(0)).images

    The call keeps its signature and its outputs. Attributes are set on this object alone, never on its class or its
    module. Where the object takes generators, a sample's draws are functions of its seed, the step, the position and
    the token: they do not depend on the batch. They are others than the original's, from the same distribution; what
    is greedy is equal.

    An object that is accelerated already stays as it is. It may be copied and pickled.

    Args:
        obj: what the user has loaded: an object of one of the classes that `mgt clients` lists.

    Returns:
        What was replaced.

    Raises:
        TypeError: an object of another class; the message lists the classes that are known. Or an object whose parts
            are not those that its class has by itself.
    """
    before = vars(obj).get(ATTRIBUTE) if hasattr(obj, "__dict__") else None
    if isinstance(before, Acceleration):
        return before
    client = client_of(obj)
    ours: dict[str, Any] = import_module(f".{client.module}", __name__).replacements(obj)
    originals = {name: found for name in ours if (found := _own(obj, name)) is not None}
    for name, value in ours.items():
        setattr(obj, name, value)
    done = Acceleration(client, tuple(ours), ours, originals)
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
    for name, ours in done._ours.items():
        if _own(obj, name) is not ours:
            continue
        if name in done._originals:
            setattr(obj, name, done._originals[name])
        else:
            object.__delattr__(obj, name)
    object.__delattr__(obj, ATTRIBUTE)
    return obj


def _own(obj: Any, name: str) -> Any:
    """An attribute that the object has itself, its class among them, or None."""
    return type(obj) if name == "__class__" else vars(obj).get(name)


def client_of(obj: Any) -> Client:
    """Find the client that an object is of, by its class.

    Raises:
        TypeError: none has its class.
    """
    for kind in type(obj).__mro__:
        path = f"{kind.__module__}.{kind.__qualname__}"
        for client in CLIENTS:
            if any(path == known or path.endswith("." + known) for known in client.classes):
                return client
    known = ", ".join(name.rpartition(".")[2] for client in CLIENTS for name in client.classes)
    raise TypeError(f"obj: expected one of {known}, got {type(obj).__module__}.{type(obj).__qualname__}")
