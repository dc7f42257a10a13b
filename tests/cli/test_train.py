"""`ryot-deploy train`: what is kept when a training does not end as it should."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from ryot.cli import train
from ryot.errors import CheckpointError, Interrupted, TrainingError
from ryot.train.checkpoint import load_training_state
from tests.conftest import TINY_MODEL

RECIPE = f"""
{TINY_MODEL}
architecture = "opt"
tie_embeddings = false
[train]
batch_size = 4
tokens = 128000
learning_rate = 1e-3
embedding_learning_rate = 1e-3
head_learning_rate = 1e-3
warmup_fraction = 0.0
schedule = "cosine"
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(text_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("RYOT_CACHE_DIR", str(cache))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return [
        "--variant",
        str(tmp_path / "recipe.toml"),
        "--data",
        str(text_folder),
        "--no-tune",
        "-o",
        str(tmp_path / "out"),
    ]


def test_a_breached_gate_leaves_the_last_good_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(train, "CHUNK_S", 0.0)
    recipe = tmp_path / "recipe.toml"
    # A rate that grows over the whole budget: good at first, then too much.
    wild = RECIPE.replace("warmup_fraction = 0.0", "warmup_fraction = 0.9").replace("1e-3", "30")
    recipe.write_text(wild.replace("tokens = 128000", "tokens = 1280000"))
    done = CliRunner().invoke(train.command, arguments)
    assert isinstance(done.exception, TrainingError), done.output
    [kept] = tmp_path.glob("out.step-*")
    assert str(done.exception.hint) == f"the last good checkpoint is {kept}. To resume: --resume {kept}"
    assert load_training_state(kept)[0]["step"] == int(kept.name.rpartition("-")[2])
    assert not (tmp_path / "out").exists()


def interrupt(arguments: list[str]) -> str:
    """What a training says that a signal ends at its first event."""
    told: list[object] = []

    def interrupt_once(event: object) -> None:
        told.append(event)
        if len(told) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ryot.cli.progress.Progress.__call__", lambda self, event: interrupt_once(event))
        done = CliRunner().invoke(train.command, arguments)
    assert isinstance(done.exception, Interrupted), done.output
    return str(done.exception)


def test_a_signal_ends_the_step_in_flight_and_writes_what_there_is(arguments: list[str], tmp_path: Path) -> None:
    stopped = interrupt(arguments)
    step = load_training_state(tmp_path / "out")[0]["step"]
    assert 0 < step < 1000 and f"stopped at step {step} of 1000" in stopped
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]


def test_what_cannot_be_gone_on_from_is_refused_before_work_that_takes_minutes(
    arguments: list[str], tmp_path: Path
) -> None:
    interrupt(arguments)
    again = [*arguments[:-1], str(tmp_path / "again")]

    def refused(*more: str) -> str:
        done = CliRunner().invoke(train.command, [*again, "--resume", *more])
        assert isinstance(done.exception, CheckpointError), done.output
        return str(done.exception)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ryot.run.variant_data.prepare_variant", lambda *_, **__: pytest.fail("data came first"))
        assert "training cannot go on from it" in refused(str(tmp_path))
        assert "seed was 0, now 1" in refused(str(tmp_path / "out"), "--seed", "1")
        assert "variant.train.tokens was 128000, now 64000" in refused(str(tmp_path / "out"), "--tokens", "64000")
    state = tmp_path / "out" / "training" / "state.json"
    values = json.loads(state.read_text())
    values["identity"]["corpus_sha256"] = "of another text"
    state.write_text(json.dumps(values))
    again.remove("--no-tune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ryot.optimize.kernels.choose_kernels", lambda *_, **__: pytest.fail("kernels came first"))
        assert "corpus_sha256 was 'of another text', now" in refused(str(tmp_path / "out"))
