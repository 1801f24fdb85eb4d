"""Packages of other projects that `build/clients` holds, imported without what drawing tokens does not need."""

import importlib.machinery
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# where `make build/clients/installed` puts them
FOLDER = Path(__file__).resolve().parent.parent / "build" / "clients"


def find_clients() -> None:
    """Let what is in the folder be imported, after all that the environment has."""
    import transformers  # noqa: F401 (looks for some of the modules that get a stand-in)

    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def find_package(name: str) -> None:
    """Let a package be imported; ImportError where neither the environment nor the folder has it."""
    find_clients()
    if name not in sys.modules and find_spec(name) is None:
        raise ImportError(f"No module named {name!r}")


def stand_in(name: str, *attributes: str) -> None:
    """An empty module in the place of one that is not installed, and that drawing tokens does not need."""
    if name in sys.modules or ("." not in name and find_spec(name)):
        return
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for attribute in attributes:
        setattr(module, attribute, lambda *args, **kwargs: None)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def omnivoice_module() -> Any:
    """The module of `OmniVoice`; ImportError where there is none."""
    find_package("omnivoice")
    stand_in("torchaudio")
    stand_in("soundfile")
    stand_in("pydub", "AudioSegment")
    stand_in("pydub.silence", "detect_leading_silence", "detect_nonsilent", "split_on_silence")
    from omnivoice.models import omnivoice

    return omnivoice


def muse_package() -> Any:
    """The package of `MaskGit`; ImportError where there is none."""
    find_package("muse_maskgit_pytorch")
    from transformers import T5Config, T5EncoderModel, T5Tokenizer  # noqa: F401 (which it imports by name)

    stand_in("torchvision", "utils")
    stand_in("torchvision.transforms", "Compose", "Lambda", "Resize", "CenterCrop", "ToTensor", "RandomHorizontalFlip")
    stand_in("torchvision.datasets", "ImageFolder")
    stand_in("torchvision.utils", "make_grid", "save_image")
    stand_in("sentencepiece")
    with warnings.catch_warnings():
        # of a class that the process which collects the warnings of these tests could not import
        warnings.simplefilter("ignore")
        import muse_maskgit_pytorch

    return muse_maskgit_pytorch
