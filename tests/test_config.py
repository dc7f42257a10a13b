from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from ryot import errors
from ryot.config import find_named, list_named, replace, resolve_variant, to_mapping
from ryot.deploy.settings import ExportSettings
from ryot.errors import CheckpointError, ConfigError, RyotError, worst_exit_code
from ryot.run.options import RunOptions
from ryot.run.plan import load_plan, plan_to_toml, resolve_plan

#: Recipes that start from a model, which `--init` names.
STARTED = ("finetune", "lora")


@pytest.mark.parametrize("preset", list_named("presets"))
@pytest.mark.parametrize("variant", sorted(set(list_named("variants")) - set(STARTED)))
def test_every_packaged_recipe_resolves_at_every_size(variant: str, preset: str) -> None:
    config = resolve_variant(variant, preset)
    assert config.name == variant and config.num_steps > config.warmup_steps


@pytest.mark.parametrize("variant", STARTED)
def test_a_recipe_that_starts_from_a_model_takes_its_shape_and_keeps_it(
    variant: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    text = find_named("variants", variant).read_text()
    recipe.write_text(text.replace("sequence_length = 256", "sequence_length = 64"))
    source = hf_checkpoint("gemma3_text")
    plan = resolve_plan(RunOptions(variants=(str(recipe),), init=str(source)))
    [config] = plan.variants
    assert config.init.source == str(source) and len(config.init.sha256) == 64
    assert config.model.spec.family == "gemma3_text" and config.sequence_length == 64
    (tmp_path / "run.toml").write_text(plan_to_toml(plan))
    assert load_plan(tmp_path / "run.toml") == plan


def test_a_recipe_that_starts_from_a_model_asks_for_it() -> None:
    with pytest.raises(ConfigError, match=r"variant lora at reference: init\.from is missing") as error:
        resolve_plan(RunOptions(variants=("lora",)))
    assert "--init SOURCE" in str(error.value.hint)
    with pytest.raises(ConfigError, match="init: none of the variants starts from a model"):
        resolve_plan(RunOptions(init="somewhere"))
    with pytest.raises(ConfigError, match="'no/such/folder' is no folder or file here"):
        resolve_plan(RunOptions(variants=("lora",), init="no/such/folder"))


def test_a_model_of_a_family_that_is_not_known_cannot_be_started_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="model_type is 'mamba', expected one of"):
        resolve_plan(RunOptions(variants=("finetune",), init=str(tmp_path)))


def test_a_shape_beside_a_start_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(find_named("variants", "lora").read_text() + "\n[model]\ndim = 64\n")
    with pytest.raises(ConfigError, match=r"model: got \['dim'\], expected nothing with \[init\]"):
        resolve_variant(str(recipe), "reference", init="anything")


def test_the_optimized_variant_is_smaller_than_the_baseline_at_every_size() -> None:
    for preset in list_named("presets"):
        sizes = [resolve_variant(v, preset).model.num_parameters for v in ("baseline", "optimized")]
        assert sizes[1] <= 0.7 * sizes[0]


def test_a_plan_survives_its_file(tmp_path) -> None:
    plan = resolve_plan(RunOptions(preset="small", seeds=2, precisions=("int8-dyn+int4",), quick=True))
    kernels = {v.name: v.kernels for v in plan.variants}
    plan = replace(plan, kernels=kernels, inference={"optimized": ExportSettings(fastest="int8-dyn+int4")})
    (tmp_path / "run.toml").write_text(plan_to_toml(plan))
    assert load_plan(tmp_path / "run.toml") == plan


def test_tokens_scale_every_budget_and_quick_is_a_twentieth() -> None:
    own = resolve_plan(RunOptions()).variants
    half = resolve_plan(RunOptions(tokens=own[0].train.tokens // 2)).variants
    quick = resolve_plan(RunOptions(quick=True)).variants
    assert [v.train.tokens for v in half] == [v.train.tokens // 2 for v in own]
    assert [v.train.tokens for v in quick] == [v.train.tokens // 20 for v in own]


def test_the_fastest_pair_is_exported_besides_the_usual_forms_unless_forms_are_named() -> None:
    inference = {"optimized": ExportSettings(fastest="int8-dyn+int4")}
    usual = replace(resolve_plan(RunOptions()), inference=inference)
    assert usual.precisions("optimized")[-1] == "int8-dyn+int4"
    assert "int8-dyn+int4" not in usual.precisions("baseline")
    named = replace(resolve_plan(RunOptions(precisions=("fp32",))), inference=inference)
    assert named.precisions("optimized") == ("fp32",)


def test_a_plan_of_another_version_is_refused(tmp_path) -> None:
    text = plan_to_toml(resolve_plan(RunOptions())).replace('version = "', 'version = "9.')
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"made by ryot 9\."):
        load_plan(tmp_path / "run.toml")


def test_a_resolved_recipe_holds_every_field() -> None:
    values = to_mapping(resolve_variant("optimized", "reference"))
    assert values["model"]["num_kv_heads"] == 2 and values["train"]["alternate_final_norm"] is True


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([], 0), ([0, 3], 3), ([3, 4], 4), ([4, 1], 1), ([1, 130], 130), ([130, 2], 2)],
)
def test_exit_codes_have_the_documented_precedence(codes: list[int], expected: int) -> None:
    assert worst_exit_code(codes) == expected


def test_every_error_crosses_processes_with_its_hint_and_is_drawn_in_the_tree() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RyotError)]
    for cls in classes:
        again = pickle.loads(pickle.dumps(cls("what", hint="next")))
        assert (type(again), str(again), again.hint) == (cls, "what", "next")
        assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("preset", list_named("presets"))
def test_the_baseline_with_all_optimizations_is_the_optimized_recipe(preset: str) -> None:
    own = {"name": "", "summary": ""}
    everything = to_mapping(resolve_variant("baseline+all", preset, tokens=10_000_000)) | own
    assert everything == to_mapping(resolve_variant("optimized", preset, tokens=10_000_000)) | own


@pytest.mark.parametrize("preset", list_named("presets"))
@pytest.mark.parametrize("part", list_named("optimizations"))
def test_each_optimization_alone_changes_the_baseline_and_keeps_its_budget(part: str, preset: str) -> None:
    base, changed = resolve_variant("baseline", preset), resolve_variant(f"baseline+{part}", preset)
    assert changed.name == f"baseline+{part}"
    assert changed.train.tokens == base.train.tokens
    assert (changed.model, changed.train, changed.kernels, changed.tune) != (
        base.model,
        base.train,
        base.kernels,
        base.tune,
    )


def test_an_ablation_trains_the_baseline_each_part_alone_and_all_with_one_budget() -> None:
    plan = resolve_plan(RunOptions(ablate=True, tokens=400_000))
    names = [v.name for v in plan.variants]
    assert names == ["baseline", *(f"baseline+{p}" for p in list_named("optimizations")), "baseline+all"]
    assert {v.train.tokens for v in plan.variants} == {400_000}
    assert plan.precisions("baseline") == ("fp32",)
    with pytest.raises(ConfigError, match="--ablate names them itself"):
        RunOptions(ablate=True, variants=("optimized",))


def test_an_unknown_optimization_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="optimization: 'rate' is not known; did you mean 'rates'"):
        resolve_variant("baseline+rate", "reference")
