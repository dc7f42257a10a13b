"""What `--variants` names: recipes, which are trained, and models that exist, which are imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ryot.config import list_named, unknown
from ryot.errors import ConfigError
from ryot.models.sources.naming import find_source, name_source


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """A model that a run exports, measures and judges as it does what it trains."""

    name: str
    """What the tables call it."""
    source: str
    """The absolute path of a folder or a .gguf file, or `org/name[@revision]` of the hub."""
    context: int = 0
    """Tokens that prompt and answer may have together; 0 for as many as the model has."""


def split_variants(names: Sequence[str], context: int) -> tuple[tuple[str, ...], tuple[ImportConfig, ...]]:
    """The recipes and the models among `names`, the models with this context.

    Raises `ConfigError` for a name that is neither, and for a context where there is no model that it could be for.
    """
    recipes = tuple(name for name in names if _is_recipe(name))
    taken = [Path(name).stem if name.endswith(".toml") else name for name in recipes]
    imports: list[ImportConfig] = []
    for item in names:
        if item in recipes:
            continue
        source = _find_model(item)
        if source in [known.source for known in imports]:
            raise ConfigError(f"variants: {', '.join(names)} names {source} twice")
        name = _make_unique(name_source(source), taken)
        taken.append(name)
        imports.append(ImportConfig(name=name, source=source, context=context))
    if context and not imports:
        raise ConfigError(
            "context: is that of a model among --variants, which names none",
            hint="the context of a recipe is max_seq_len in its preset",
        )
    return recipes, tuple(imports)


def _is_recipe(name: str) -> bool:
    return name.endswith(".toml") or name.split("+")[0] in list_named("variants")


def _find_model(item: str) -> str:
    source = find_source(item)
    if source is None:
        raise ConfigError(
            unknown("variant", item.split("+")[0], list_named("variants")),
            hint="or give a path to your own recipe.toml, to a model's folder or .gguf file, or org/name of the hub",
        )
    if source.endswith(".gguf") and not Path(source).exists():
        raise ConfigError(f"variant {item}: no such file")
    return source


def _make_unique(name: str, taken: Sequence[str]) -> str:
    """`name`, or the first of name-2, name-3, … that nothing else in the run is called."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique
