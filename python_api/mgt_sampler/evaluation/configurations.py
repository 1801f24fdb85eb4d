"""Sampling configurations, and lists of them in TOML files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..merge import TokenMerging
from ..samplers import SAMPLERS
from ..techniques import Differential, ZSampling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ARGUMENTS = (
    "num_inference_steps",
    "guidance_scale",
    "temperature",
    "token_temperature",
    "noise_scale",
    "mask_schedule",
    "momentum",
    "skip",
    "differential",
    "z_sampling",
)
# those of a sampler's rule are its function's, so that these are left for the loop
LOOP_ARGUMENTS = ("num_inference_steps", "skip")
# the arguments of `quantize`; its calibration set is drawn with the configuration's other arguments
QUANTIZATION = (
    "share",
    "rank_by",
    "group_size",
    "include",
    "exclude",
    "second_calibration",
    "momentum",
    "guidance_halves",
    "num_timestep_buckets",
)
# what is done to the model, which `generate` is not told
OF_THE_MODEL = ("merge", "quantization")


@dataclass(frozen=True)
class Configuration:
    """Arguments of `generate` under a name, whose first word is the family that plots show together.

    With `sampler`, the name of a function of `samplers`, all but LOOP_ARGUMENTS are that function's. Beside them a
    table `quantization` of arguments of `quantize`, for the model's transformer, and `merge`, a ratio or a table of
    attributes of `TokenMerging`, for its blocks.

    Raises:
        TypeError: an argument of the wrong type, or one that the sampler's function does not take.
        ValueError: an argument that is not in ARGUMENTS, an unknown sampler, or a key that Differential, ZSampling,
            QUANTIZATION or TokenMerging does not have.
    """

    name: str
    arguments: Mapping[str, Any]
    """As in a TOML file: differential, z_sampling and quantization are tables, and merge may be one."""

    def __post_init__(self) -> None:
        """Check the names of the arguments."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name: expected a word at least, got {self.name!r}")
        if not isinstance(self.arguments, Mapping):
            raise TypeError(f"{self.name}: expected arguments by name, got {self.arguments!r}")
        if self.sampler is None:
            _check_keys(self.name, self.arguments, (*ARGUMENTS, *OF_THE_MODEL))
        elif self.sampler not in SAMPLERS:
            raise ValueError(f"{self.name}: sampler: expected one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        self.generate_arguments()
        if self.quantization is not None:
            self._check_table("quantization", QUANTIZATION)
        _ = self.merging

    @property
    def family(self) -> str:
        """The name's first word, without a comma after it."""
        return self.name.split()[0].rstrip(",")

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The keyword arguments of `quantize`; None: the model stays as it is."""
        return self.arguments.get("quantization")

    @property
    def merging(self) -> TokenMerging | None:
        """How tokens are merged in the transformer's blocks; None: they are not."""
        given = self.arguments.get("merge")
        if given is None:
            return None
        if isinstance(given, Mapping):
            self._check_table("merge", [field.name for field in fields(TokenMerging)])
        try:
            merging = TokenMerging(**given) if isinstance(given, Mapping) else TokenMerging.of(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from error
        return None if merging.ratio == 0 and merging.threshold is None else merging

    @property
    def sampler(self) -> str | None:
        """The name of a function of `samplers`; None: the arguments are those of `generate`."""
        return self.arguments.get("sampler")

    def generate_arguments(self, **others: Any) -> dict[str, Any]:
        """The keyword arguments of `generate`.

        Args:
            others: further arguments of the configuration.

        Raises:
            TypeError, ValueError: an argument that the sampler's function does not take.
        """
        given = {**self.arguments, **others}
        arguments = {name: value for name, value in given.items() if name not in (*OF_THE_MODEL, "sampler")}
        if self.sampler is not None:
            of_loop = {name: arguments.pop(name) for name in LOOP_ARGUMENTS if name in arguments}
            try:
                return {**of_loop, "rule": SAMPLERS[self.sampler](**arguments)}
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self.name}: {error}") from error
        if "differential" in arguments:
            arguments["differential"] = self._of_table("differential", Differential)
        if "z_sampling" in arguments:
            arguments["z_sampling"] = self._of_table("z_sampling", ZSampling)
        return arguments

    def _of_table(self, key: str, kind: Any) -> Any:
        return kind(**self._check_table(key, [field.name for field in fields(kind)]))

    def _check_table(self, key: str, known: tuple[str, ...] | list[str]) -> Mapping[str, Any]:
        table = self.arguments[key]
        if not isinstance(table, Mapping):
            raise TypeError(f"{self.name}: {key}: expected a table, got {table!r}")
        _check_keys(f"{self.name}: {key}", table, known)
        return table


def load_configurations(path: str | Path) -> list[Configuration]:
    """Read a list of configurations.

    The file has a table `[[configuration]]` for each, with a `name` and arguments of `generate`, and perhaps a table
    `[defaults]` of arguments for all of them. The first is the baseline of the winning rates.

    Args:
        path: a TOML file, or the name of a shipped list: "techniques", "samplers", "quantization", "whole_image" or
            "exact".

    Returns:
        The configurations in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument of the wrong type.
        ValueError: no TOML, an unknown key, no configuration, or a name that is missing or there twice.
    """
    shipped = Path(__file__).parent / f"{path}.toml"
    path = shipped if shipped.is_file() and not Path(path).is_file() else Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a TOML file, got {error}") from error
    _check_keys(str(path), table, ("defaults", "configuration"))
    if not isinstance(table.get("defaults", {}), Mapping):
        raise TypeError(f"{path}: defaults: expected a table, got {table['defaults']!r}")
    given_list = table.get("configuration", [])
    if not isinstance(given_list, list) or not all(isinstance(given, Mapping) for given in given_list):
        raise TypeError(f"{path}: configuration: expected tables [[configuration]], got {given_list!r}")
    configurations: list[Configuration] = []
    for i, given in enumerate(given_list):
        arguments = {**table.get("defaults", {}), **given}
        name = arguments.pop("name", None)
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: configuration {i + 1}: expected a name, got {name!r}")
        if any(name.casefold() == other.name.casefold() for other in configurations):
            raise ValueError(f"{path}: configuration {i + 1}: expected different names, got {name!r} again")
        try:
            configurations.append(Configuration(name, arguments))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
    if not configurations:
        raise ValueError(f"{path}: expected a table [[configuration]] at least, got none")
    return configurations


def _check_keys(where: str, table: Mapping[str, Any], known: tuple[str, ...] | list[str]) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"{where}: expected keys among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
