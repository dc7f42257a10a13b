"""A run's plan: what was asked for (`RunOptions`) and what it comes to (`RunPlan`), stored as `run.toml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryot import __version__
from ryot.config import (
    PARTS,
    PRECISIONS,
    KernelPlan,
    VariantConfig,
    build_from_mapping,
    check_known,
    list_named,
    load_toml,
    replace,
    resolve_variant,
    to_mapping,
    unknown,
)
from ryot.deploy.settings import ExportSettings
from ryot.errors import ConfigError
from ryot.report.targets import Target, build_target, load_targets, target_to_mapping

SCHEMA = 1

#: What is exported when no precision is named.
USUAL_PRECISIONS = ("fp32", "int8-dyn", "int8", "int4")

_USUAL_VARIANTS = ("baseline", "optimized")

#: A quick run's share of each budget; its report is marked as not comparable.
QUICK_SHARE = 1 / 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What a user can ask of `cluster-run`, on the command line or as keys of a `--config` file."""

    preset: str = "reference"
    """Size: a name from `ryot/presets` or a path to a TOML file."""
    variants: tuple[str, ...] = _USUAL_VARIANTS
    """Recipes: names from `ryot/variants` or paths to TOML files."""
    ablate: bool = False
    """Train the baseline, the baseline with each optimization alone, and with all of them, instead of `variants`."""
    seeds: int = 1
    """Trainings of each variant, with seeds 0, 1, …"""
    precisions: tuple[str, ...] = ()
    """Weight formats to export and measure, by name; none for the usual ones. A named one that breaches its quality
    gate fails the run."""
    target: tuple[str, ...] = ("phase1",)
    """Limits to judge by: names from `ryot/targets` or paths to TOML files."""
    data: tuple[str, ...] = ()
    """Files, folders and globs of UTF-8 text; none for the standard library's source."""
    tokens: int = 0
    """Training tokens of the first variant; the others keep their share of it. 0 for the recipes' own budgets."""
    quick: bool = False
    """Train for a twentieth of the budget and measure briefly; not comparable with other runs."""
    tune: bool = True
    """Let the machine choose the kernels of variants that allow it."""
    rounds: int = 5
    """Rounds of measurement, each in fresh processes."""
    threads: int = 1
    """Threads of each training (of each worker, where it has several)."""
    workers_per_variant: int = 1
    """Processes that train one variant together, each with its share of every batch."""

    def __post_init__(self) -> None:
        for name in ("seeds", "rounds", "threads", "workers_per_variant"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a whole number above 0")
        if self.tokens < 0:
            raise ConfigError(f"tokens: got {self.tokens}, expected a whole number above 0")
        for name in ("variants", "precisions", "target"):
            values = getattr(self, name)
            if not values and name != "precisions":
                raise ConfigError(f"{name}: got none, expected at least one")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: {', '.join(values)} names one twice")
        if self.ablate and self.variants != _USUAL_VARIANTS:
            raise ConfigError("variants: --ablate names them itself", hint="give one of --ablate and --variants")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ConfigError(unknown("precision", precision, PRECISIONS))


def merge_options(file: Path | None, flags: Mapping[str, Any]) -> RunOptions:
    """Options by precedence: those given as flags, then the file's, then the defaults.

    `flags` holds only what was given. Raises `ConfigError` for an unknown key in the file.
    """
    values = load_toml(file) if file else {}
    check_known(values, [f.name for f in dataclasses.fields(RunOptions)], str(file))
    return build_from_mapping(RunOptions, {**values, **flags}, str(file) if file else "options")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run resolved: nothing in it is left to be decided but the kernels that a machine measures."""

    schema: int
    version: str
    options: RunOptions
    variants: tuple[VariantConfig, ...]
    targets: tuple[Target, ...]
    """What the forms are judged by, as their files said when the run began."""
    kernels: Mapping[str, KernelPlan] = dataclasses.field(default_factory=dict)
    """How each variant is trained: decided once, before its first step."""
    inference: Mapping[str, ExportSettings] = dataclasses.field(default_factory=dict)
    """How each variant is exported: decided at the same time."""

    def precisions(self, variant: str) -> tuple[str, ...]:
        """Weight formats to export and measure of a variant: those named, or the usual ones and the fastest."""
        if self.options.precisions:
            return self.options.precisions
        if self.options.ablate:
            return ("fp32",)
        decision = self.inference.get(variant)
        extra = (decision.fastest,) if decision and decision.fastest not in ("", *USUAL_PRECISIONS) else ()
        return USUAL_PRECISIONS + extra

    def variant(self, name: str) -> VariantConfig:
        """The variant called `name`."""
        return next(v for v in self.variants if v.name == name)


def ablation_arms() -> tuple[str, ...]:
    """The variants of an ablation: all with the baseline's budget, so that time and loss can be read side by side."""
    return ("baseline", *(f"baseline+{part}" for part in list_named(PARTS)), "baseline+all")


def resolve_plan(options: RunOptions) -> RunPlan:
    """The plan that `options` come to. Raises `ConfigError` for anything in it that does not exist or fit."""
    chosen = ablation_arms() if options.ablate else options.variants
    variants = [resolve_variant(name, options.preset) for name in chosen]
    names = [v.name for v in variants]
    if len(set(names)) < len(names):
        raise ConfigError(f"variants: {', '.join(names)} names one twice")
    share = QUICK_SHARE if options.quick else 1.0
    if options.tokens:
        share *= options.tokens / variants[0].train.tokens
    if share != 1.0:
        budgets = [int(v.train.tokens * share) for v in variants]
        variants = [resolve_variant(name, options.preset, tokens=budget) for name, budget in zip(chosen, budgets)]
    sizes = {v.model.vocab_size for v in variants}
    if len(sizes) > 1:
        raise ConfigError(f"variants: vocab_size differs ({sorted(sizes)}); one run has one tokenizer")
    return RunPlan(
        schema=SCHEMA,
        version=__version__,
        # The run may be resumed from another folder.
        options=replace(options, data=tuple(str(Path(path).absolute()) for path in options.data)),
        variants=tuple(variants),
        targets=tuple(load_targets(options.target)),
    )


def plan_to_toml(plan: RunPlan) -> str:
    """The text of `run.toml`."""
    import tomli_w

    values = to_mapping(plan)
    values["options"] = to_mapping(plan.options)
    values["variants"] = [to_mapping(v) for v in plan.variants]
    values["targets"] = [target_to_mapping(t) for t in plan.targets]
    values["kernels"] = {name: to_mapping(k) for name, k in plan.kernels.items()}
    values["inference"] = {name: to_mapping(k) for name, k in plan.inference.items()}
    return tomli_w.dumps(values)


def load_plan(path: Path) -> RunPlan:
    """The plan in a `run.toml`. Raises `ConfigError` when it is missing, malformed or of another version."""
    values = load_toml(path)
    if values.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {values.get('schema')!r}, expected {SCHEMA}")
    if values.get("version") != __version__:
        raise ConfigError(
            f"{path}: made by ryot {values.get('version')}, this is {__version__}", hint="start a new run"
        )
    return RunPlan(
        schema=SCHEMA,
        version=__version__,
        options=build_from_mapping(RunOptions, values["options"], f"{path}: options"),
        variants=tuple(build_from_mapping(VariantConfig, v, f"{path}: variants") for v in values["variants"]),
        targets=tuple(build_target(t["name"], t, f"{path}: targets") for t in values["targets"]),
        kernels={n: build_from_mapping(KernelPlan, k, f"{path}: kernels.{n}") for n, k in values["kernels"].items()},
        inference={
            n: build_from_mapping(ExportSettings, k, f"{path}: inference.{n}") for n, k in values["inference"].items()
        },
    )
