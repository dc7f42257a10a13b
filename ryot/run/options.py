"""What a user can ask of a run. A field of `RunOptions` is an option of `cluster-run` and a key of its `--config` file.

Adding an option is adding a field: its name, type, default, help and lower limit stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from ryot.config import (
    DEFAULT_DEVICE,
    DEFAULT_PRESET,
    DEFAULT_RECIPE,
    DEFAULT_ROUNDS,
    DEFAULT_TARGET,
    PRECISIONS,
    USUAL_PRECISIONS,
    DeviceChoice,
    build_from_mapping,
    check_known,
    load_toml,
    unknown,
)
from ryot.errors import ConfigError

_OPTION = "option"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionText:
    """How an option shows on the command line."""

    help: str
    metavar: str = ""
    at_least: float | None = None
    above: float | None = None
    """Smallest value, excluded."""
    repeated: bool = False
    """Whether a tuple is given by repeating the option, not as a list separated by commas."""
    envvar: str = ""
    choices: tuple[str, ...] = ()
    flag: str = ""
    """The option's name where it is not the field's."""


T = TypeVar("T")


def option(default: T, help: str, **text: Any) -> T:
    """A field with this default that is an option; `text` are further fields of `OptionText`."""
    return dataclasses.field(default=default, metadata={_OPTION: OptionText(help=help, **text)})


def option_fields(cls: type) -> dict[str, tuple[dataclasses.Field[object], OptionText]]:
    """The fields of a dataclass that are options, with their texts."""
    fields = dataclasses.fields(cls)
    return {f.name: (f, f.metadata[_OPTION]) for f in fields if _OPTION in f.metadata}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What decides what a run computes; fixed when it begins."""

    preset: str = option(DEFAULT_PRESET, "Size: a name or a TOML file", metavar="NAME")
    variants: tuple[str, ...] = option(
        ("baseline", DEFAULT_RECIPE),
        "What to compare, separated by commas: recipes (names or TOML files), which are trained, and models: folders "
        "with a config.json, .gguf files, org/name[@revision] of the Hugging Face hub",
        metavar="LIST",
    )
    init: str = option(
        "",
        "Model that recipes with [init] (finetune, lora) start from: a folder, a .gguf file, or org/name[@revision]",
        metavar="SOURCE",
    )
    context: int = option(
        0,
        "Tokens that prompt and answer of a model among --variants may have together  [default: as many as it has]",
        metavar="TOKENS",
        at_least=1,
    )
    ablate: bool = option(
        False, "Train the baseline, the baseline with each optimization alone, and with all, instead of --variants"
    )
    seeds: int = option(1, "Seeds per variant: 0, 1, …", metavar="N", at_least=1)
    precisions: tuple[str, ...] = option(
        (),
        "Weight formats; one named here that breaches its quality gate ends with exit code 4"
        f"  [default: {','.join(USUAL_PRECISIONS)}]",
        metavar="LIST",
    )
    target: tuple[str, ...] = option(
        (DEFAULT_TARGET,), "Limits to judge by: a name or a TOML file; may be repeated", metavar="NAME", repeated=True
    )
    data: tuple[str, ...] = option(
        (),
        "UTF-8 text files, folders, globs; may be repeated  [default: the standard library's source]",
        metavar="PATH",
        repeated=True,
    )
    tokens: int = option(
        0, "Budget of the first variant; scales them all  [default: the recipes' own]", metavar="N", at_least=1
    )
    quick: bool = option(False, "Small budget, brief measurement; the report is marked as not comparable")
    tune: bool = option(True, "Let the machine choose the kernels of variants that allow it")
    rounds: int = option(DEFAULT_ROUNDS, "Rounds of measurement, each in fresh processes", metavar="N", at_least=1)
    threads: int = option(1, "Threads of each training (of each of its workers)", metavar="N", at_least=1)
    device: DeviceChoice = option(  # noqa: RUF009 (its default is a string, which ruff cannot see)
        DEFAULT_DEVICE,
        "Where trainings run: auto is GPUs where each of their workers can have one",
        choices=get_args(DeviceChoice),
    )
    workers_per_variant: int = option(
        1,
        "Processes that share each training, on one node or several; on one node --threads is faster",
        metavar="K",
        at_least=1,
    )

    def __post_init__(self) -> None:
        for name, (field, text) in option_fields(type(self)).items():
            value = getattr(self, name)
            if text.at_least is not None and value != field.default and value < text.at_least:
                raise ConfigError(f"{name}: got {value}, expected a whole number above {text.at_least - 1:g}")
        for name in ("variants", "precisions", "target"):
            values = getattr(self, name)
            if not values and name != "precisions":
                raise ConfigError(f"{name}: got none, expected at least one")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: {', '.join(values)} names one twice")
        if self.ablate and self.variants != option_fields(type(self))["variants"][0].default:
            raise ConfigError("variants: --ablate names them itself", hint="give one of --ablate and --variants")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ConfigError(unknown("precision", precision, PRECISIONS))


def merge_options(file: Path | None, flags: Mapping[str, object]) -> RunOptions:
    """Options by precedence: those given as flags, then the file's, then the defaults.

    `flags` holds only what was given. Raises `ConfigError` for an unknown key in the file.
    """
    values = load_toml(file) if file else {}
    check_known(values, option_fields(RunOptions), str(file))
    return build_from_mapping(RunOptions, {**values, **flags}, str(file) if file else "options")
