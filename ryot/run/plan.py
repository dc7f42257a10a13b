"""A run's plan: what its options come to, stored as `run.toml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ryot import __version__
from ryot.config import (
    PARTS,
    USUAL_PRECISIONS,
    KernelPlan,
    VariantConfig,
    build_from_mapping,
    list_named,
    load_toml,
    replace,
    resolve_variant,
    to_mapping,
)
from ryot.deploy.settings import ExportSettings
from ryot.errors import ConfigError
from ryot.report.targets import Target, build_target, load_targets
from ryot.run.options import RunOptions
from ryot.run.sources import ImportConfig, split_variants

SCHEMA = 1

#: A quick run's share of each budget; its report is marked as not comparable.
QUICK_SHARE = 1 / 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run resolved: nothing is left to be decided but what a machine measures, `kernels` and `inference`."""

    schema: int
    version: str
    options: RunOptions
    variants: tuple[VariantConfig, ...]
    targets: tuple[Target, ...]
    """What the artifacts are judged by, as their files said when the run began."""
    kernels: Mapping[str, KernelPlan] = dataclasses.field(default_factory=dict)
    """How each variant is trained: decided once, before its first step."""
    inference: Mapping[str, ExportSettings] = dataclasses.field(default_factory=dict)
    """How each variant is exported: decided at the same time."""
    imports: tuple[ImportConfig, ...] = ()
    """Models that are exported beside what is trained."""

    @property
    def names(self) -> list[str]:
        """All variants in the order of the tables: recipes, then models."""
        return [*(v.name for v in self.variants), *(i.name for i in self.imports)]

    @property
    def label(self) -> str:
        """What the run is about in a word: the preset, or the first model where nothing is trained."""
        return Path(self.options.preset).stem if self.variants else self.imports[0].name

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


def ablation_variants() -> tuple[str, ...]:
    """The variants of an ablation: all with the baseline's budget, so that time and loss can be read side by side."""
    return ("baseline", *(f"baseline+{part}" for part in list_named(PARTS)), "baseline+all")


def resolve_plan(options: RunOptions) -> RunPlan:
    """The plan that `options` come to. Raises `ConfigError` for anything in it that does not exist or fit."""
    named = ablation_variants() if options.ablate else options.variants
    chosen, imports = split_variants(named, options.context)
    init = options.init or None
    variants = [resolve_variant(name, options.preset, init=init) for name in chosen]
    if init and all(v.init is None for v in variants):
        raise ConfigError("init: none of the variants starts from a model", hint="add finetune or lora to --variants")
    names = [v.name for v in variants]
    if len(set(names)) < len(names):
        raise ConfigError(f"variants: {', '.join(names)} names one twice")
    if variants:
        variants = _scale_budgets(variants, chosen, options)
    elif options.tokens:
        raise ConfigError("tokens: is the budget of a recipe, but --variants names none")
    sizes = {v.model.vocab_size for v in variants if v.text_source is None}
    if len(sizes) > 1:
        raise ConfigError(f"variants: vocab_size differs ({sorted(sizes)}); one run has one tokenizer")
    return RunPlan(
        schema=SCHEMA,
        version=__version__,
        # The run may be resumed from another folder.
        options=replace(options, data=tuple(str(Path(path).absolute()) for path in options.data)),
        variants=tuple(variants),
        imports=imports,
        targets=tuple(load_targets(options.target)),
    )


def _scale_budgets(variants: list[VariantConfig], chosen: Sequence[str], options: RunOptions) -> list[VariantConfig]:
    """The variants with the budgets that --quick and --tokens ask for."""
    share = QUICK_SHARE if options.quick else 1.0
    if options.tokens:
        share *= options.tokens / variants[0].train.tokens
    if share == 1.0:
        return variants
    budgets = [int(v.train.tokens * share) for v in variants]
    init = options.init or None
    return [resolve_variant(name, options.preset, tokens=budget, init=init) for name, budget in zip(chosen, budgets)]


def plan_to_toml(plan: RunPlan) -> str:
    """The text of `run.toml`."""
    import tomli_w

    return tomli_w.dumps(to_mapping(plan))


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
        imports=tuple(build_from_mapping(ImportConfig, i, f"{path}: imports") for i in values.get("imports", ())),
        targets=tuple(build_target(t["name"], t, f"{path}: targets") for t in values["targets"]),
        kernels={n: build_from_mapping(KernelPlan, k, f"{path}: kernels.{n}") for n, k in values["kernels"].items()},
        inference={
            n: build_from_mapping(ExportSettings, k, f"{path}: inference.{n}") for n, k in values["inference"].items()
        },
    )
