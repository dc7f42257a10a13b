"""Existing models as variants of a run: exported on Ray, measured and judged beside a recipe, resumed and refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file, save_file

from ryot.artifact import ArtifactId
from ryot.errors import ConfigError
from ryot.events import Event, GateEvent, StageEvent, read_events
from ryot.models.sources.opening import open_checkpoint
from ryot.models.sources.write_gguf import write_gguf
from ryot.report.rows import Report, load_report
from ryot.run.options import RunOptions
from ryot.run.plan import load_plan, plan_to_toml, resolve_plan
from tests.models.sources.tiny import save_model
from tests.run.test_pipeline import ryot, start
from tests.run.tiny import tiny_recipes

#: Positions of the tiny model that a run uses of its 128.
MODEL_CONTEXT = 48


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny model twice: as Hugging Face saves it, and as GGUF that holds the same weights."""
    root = tmp_path_factory.mktemp("models")
    save_model("llama", root / "Tiny-0.1")
    write_gguf(open_checkpoint(str(root / "Tiny-0.1")), root / "mine.gguf", "F16")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a preset and a recipe that train in a second."""
    return tiny_recipes(tmp_path_factory.mktemp("inputs"), "baseline")


@pytest.fixture(scope="module")
def finished(
    models: Path, recipe: list[str], text_folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole run: a recipe, the folder, the file."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    variants = f"{recipe[-1]},{models / 'Tiny-0.1'},{models / 'mine.gguf'}"
    options = [*recipe[:-1], variants, "--context", str(MODEL_CONTEXT), "--precisions", "fp32,int8-dyn", "--quick"]
    process = start(*options, "--data", str(text_folder), "-o", str(run_dir), cache=cache)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return run_dir, subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.fixture(scope="module")
def report(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> Report:
    return load_report(finished[0])


def stages(run_dir: Path, stage: str = "export") -> list[StageEvent]:
    return [e for e in read_events(run_dir / "events.jsonl") if isinstance(e, StageEvent) and e.stage == stage]


def test_models_stand_in_the_table_beside_a_recipe(
    finished: tuple[Path, subprocess.CompletedProcess[str]], report: Report
) -> None:
    assert [(r.variant, r.precision) for r in report.rows] == [
        (variant, precision) for variant in ("baseline", "Tiny-0.1", "mine") for precision in ("fp32", "int8-dyn")
    ]
    for row in report.rows:
        assert row.runs_ok == row.runs == 3 and row.passed and row.ttft_ms and row.decode_tok_s
        assert row.context_tokens == (32 if row.variant == "baseline" else MODEL_CONTEXT)
    by_id = {str(r.id): r for r in report.rows}
    folder, file = (by_id[f"{name}/seed-0/fp32"].quality["bpb"] for name in ("Tiny-0.1", "mine"))
    # The same weights and ids, read from two kinds of file.
    assert folder is not None and folder == pytest.approx(file, rel=1e-6)
    assert f"{folder:.3f}" in finished[1].stdout
    [chosen] = [row for row in report.rows if row.chosen]
    assert chosen.size_bytes == min(row.size_bytes for row in report.rows)
    assert (finished[0] / "bundle" / "run.py").exists()
    artifacts = {name: finished[0] / "variants" / name / "seed-0/artifacts/fp32" for name in ("baseline", "mine")}
    cards = {name: (path / "README.md").read_text() for name, path in artifacts.items()}
    assert "It was trained on one corpus" in cards["baseline"] and "an existing model, whose own card" in cards["mine"]


def test_a_model_has_a_size_and_no_training(
    finished: tuple[Path, subprocess.CompletedProcess[str]], report: Report, models: Path
) -> None:
    trained, *imported = json.loads((finished[0] / "report.json").read_text())["variants"]
    assert trained["source"] == "" and trained["tokens"] > 0
    weights = load_file(models / "Tiny-0.1" / "model.safetensors")
    for row, path in zip(imported, (models / "Tiny-0.1", models / "mine.gguf")):
        assert row["params"] == sum(array.size for array in weights.values())
        assert row["source"] == str(path) and row["source_sha256"] == open_checkpoint(str(path)).sha256
        training = ("tokens", "train_wall_s", "tokens_per_s", "val_loss", "val_bpb", "test_loss", "test_bpb")
        assert [row[name] for name in training] == [None] * len(training)
    markdown = (finished[0] / "report.md").read_text()
    training, _, rest = markdown.partition("## Imported models")
    assert "mine" not in training.partition("## Training")[2] and str(models / "mine.gguf") in rest


def test_timings_are_compared_at_one_length_and_bits_per_byte_at_any(report: Report) -> None:
    against = {(c.a, c.metric): c.b for c in report.comparisons}
    assert report.baseline == "baseline/seed-0/fp32"
    assert against["mine/seed-0/int8-dyn", "ttft_ms"] == "mine/seed-0/fp32"
    assert ("mine/seed-0/fp32", "ttft_ms") not in against
    assert against["baseline/seed-0/int8-dyn", "ttft_ms"] == report.baseline
    bpb = {c.a: c for c in report.comparisons if c.metric == "bpb"}["mine/seed-0/fp32"]
    rows = {str(r.id): r.quality["bpb"] for r in report.rows}
    mine, base = rows["mine/seed-0/fp32"], rows[report.baseline]
    assert mine and base and bpb.b == report.baseline and bpb.ratio == pytest.approx(mine / base)
    assert any("mine is measured with prompts of 48 tokens, baseline with 32" in note for note in report.notes)


def test_the_report_of_models_fits_its_schema(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    from jsonschema import Draft202012Validator

    from ryot.report.rows import load_schema

    validator = Draft202012Validator(load_schema())
    for name in ("report.json", "bundle/record.json"):
        values = json.loads((finished[0] / name).read_text())
        assert values["rows"] and not list(validator.iter_errors(values)), name
        assert list(validator.iter_errors({**values, "rows": [{}]})), "a schema that refuses nothing"


def test_gates_and_progress_of_a_model_are_events(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import transformers

    gates = [e for e in read_events(finished[0] / "events.jsonl") if isinstance(e, GateEvent)]
    for name in ("Tiny-0.1", "mine"):
        own = {g.gate: g for g in gates if g.variant == name}
        assert set(own) == {"parity", "oracle", "quality fp32", "quality int8-dyn"}
        assert own["oracle"].detail == f"transformers {transformers.__version__}"
        assert all(g.passed and g.value is not None and g.value <= g.limit for g in own.values())
        told = [e for e in stages(finished[0]) if e.variant == name]
        assert [e.status for e in told if e.status != "progress"] == ["begin", "end"]
        assert "writing int8-dyn" in [e.detail for e in told if e.status == "progress"]
    assert "export mine seed 0 in progress: scoring fp32, int8-dyn" in finished[1].stderr


def test_a_run_of_models_is_watched_listed_and_reproduced(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    assert "export mine seed 0 done" in ryot("watch", "--once", finished[0]).stderr
    shown = json.loads(ryot("runs", "show", finished[0], "--format", "json").stdout)
    assert {t["key"]: t["state"] for t in shown["trainings"]} == dict.fromkeys(
        ("Tiny-0.1/seed-0", "mine/seed-0", "baseline/seed-0"), "done"
    )
    again = ryot("reproduce", finished[0] / "bundle", "--rounds", 1, "--format", "json")
    assert {line["key"] for line in json.loads(again.stdout)["lines"]} >= {"ttft_ms", "size_bytes"}, again.stderr


def test_what_is_unchanged_is_cached_and_a_changed_model_is_exported_anew(
    finished: tuple[Path, subprocess.CompletedProcess[str]], models: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    changed = Path(shutil.copytree(models / "Tiny-0.1", tmp_path / "other" / "Tiny-0.1"))
    weights = load_file(changed / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, changed / "model.safetensors")
    plan = (run_dir / "run.toml").read_text()
    (run_dir / "run.toml").write_text(plan.replace(f'source = "{models / "Tiny-0.1"}"', f'source = "{changed}"'))
    before = len(stages(run_dir))
    process = start("--resume", str(run_dir), cache=cache)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    ended = {e.variant: e.status for e in stages(run_dir)[before:] if e.status != "progress"}
    assert ended == {"baseline": "cached", "mine": "cached", "Tiny-0.1": "end"}
    row, old = (load_report(path).row_of(ArtifactId("Tiny-0.1", 0, "fp32")) for path in (run_dir, finished[0]))
    assert row and old and row.quality["bpb"] != old.quality["bpb"]


def wait_for(run_dir: Path, process: subprocess.Popen[str], matches: Callable[[Event], bool], count: int = 1) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if sum(map(matches, read_events(run_dir / "events.jsonl"))) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("did not come within ten minutes")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of our own with a path short enough for Ray."""
    with tempfile.TemporaryDirectory(prefix="i", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def test_a_killed_worker_is_replaced_and_a_stopped_run_leaves_nothing_and_goes_on(
    models: Path, text_folder: Path, tmp_path: Path, temporary: Path
) -> None:
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    options = ["--variants", str(models / "mine.gguf"), "--precisions", "fp32", "--quick"]
    process = start(*options, "--data", str(text_folder), "-o", str(run_dir), cache=cache)

    def is_progress(event: Event) -> bool:
        return isinstance(event, StageEvent) and (event.stage, event.status) == ("export", "progress")

    wait_for(run_dir, process, is_progress)
    [worker] = [p for p in psutil.Process(process.pid).children(recursive=True) if "_export" in p.name()]
    worker.kill()
    wait_for(run_dir, process, lambda e: isinstance(e, StageEvent) and e.status == "lost")
    told = sum(map(is_progress, read_events(run_dir / "events.jsonl")))
    wait_for(run_dir, process, is_progress, told + 1)
    assert list(temporary.glob("ryot-export-*"))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and out == "" and f"--resume {run_dir}" in err and "Traceback" not in err, err
    deadline = time.monotonic() + 60  # the folder's reaper outlives its worker by a moment
    while list(temporary.glob("ryot-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(temporary.glob("ryot-*")) == []

    resumed = start("--resume", str(run_dir), cache=cache)
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    begun = [e.detail.rpartition(", ")[2] for e in stages(run_dir) if e.status == "begin"]
    assert begun == ["attempt 1", "attempt 2", "attempt 3"]
    assert load_report(run_dir).corpus.keys() == {"name", "sha256"} and not stages(run_dir, "train")
    assert {(r.variant, r.precision) for r in load_report(run_dir).rows} == {("mine", "fp32")}
    assert not (cache / "datasets").exists()


def test_a_model_that_lacks_a_tensor_is_refused_before_anything_starts(
    models: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(models / "Tiny-0.1", tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors")
    process = start("--variants", str(broken), "--data", str(text_folder), "-o", str(tmp_path / "run"), cache=cache)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("Error")] == [
        f"Error: {broken}: tensor model.norm.weight is missing"
    ]
    assert not list((tmp_path / "run").glob("logs/*"))


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("./nowhere", "variant: './nowhere' is not known"),
        ("baseline,nowhere.gguf", "variant nowhere.gguf: no such file"),
        ("optimised", "variant: 'optimised' is not known; did you mean 'optimized'?"),
    ],
)
def test_a_name_that_is_neither_recipe_nor_model_is_one_line(variants: str, message: str) -> None:
    result = ryot("cluster-run", "--variants", variants, "--dry-run")
    assert (result.returncode, result.stdout) == (2, "")
    error, *hint = result.stderr.splitlines()
    assert error.startswith(f"Error: {message}")
    assert all("a model's folder or .gguf file" in line for line in hint)


def test_names_are_those_of_the_files_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/Some Model-1.5", "b/Some Model-1.5", "baseline"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "tiny.Q4_0.gguf").touch()
    monkeypatch.chdir(tmp_path)
    named = ("baseline", "./baseline", "a/Some Model-1.5", "b/Some Model-1.5", "a/tiny.Q4_0.gguf", "org/name-2.0@v1")
    plan = resolve_plan(RunOptions(variants=named, context=64))
    assert plan.names == ["baseline", "baseline-2", "Some-Model-1.5", "Some-Model-1.5-2", "tiny.Q4_0", "name-2.0"]
    assert [i.source for i in plan.imports][-2:] == [str(tmp_path / "a" / "tiny.Q4_0.gguf"), "org/name-2.0@v1"]
    assert {i.context for i in plan.imports} == {64}
    (tmp_path / "run.toml").write_text(plan_to_toml(plan))
    assert load_plan(tmp_path / "run.toml") == plan


def test_a_plan_without_models_is_read_as_before(tmp_path: Path) -> None:
    plan = resolve_plan(RunOptions(variants=("baseline",)))
    text = plan_to_toml(plan)
    assert "imports = []\n" in text and "context = 0\n" in text
    (tmp_path / "run.toml").write_text(text.replace("imports = []\n", "").replace("context = 0\n", ""))
    assert load_plan(tmp_path / "run.toml") == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("baseline",), "context": 64}, "context: is that of a model among --variants, which names none"),
        ({"variants": ("org/name",), "tokens": 64}, "tokens: is the budget of a recipe, but --variants names none"),
        ({"variants": ("m.gguf", "./m.gguf")}, "variants: m.gguf, ./m.gguf names .*/m.gguf twice"),
    ],
)
def test_options_that_are_for_nothing_are_refused(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_plan(RunOptions(**options))  # type: ignore[arg-type]
