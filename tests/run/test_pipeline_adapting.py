"""`cluster-run` with a recipe that starts from a model and learns from a chat: stopped and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ryot.config import resolve_variant
from ryot.errors import EXIT_INTERRUPTED
from ryot.events import StepEvent, read_events
from ryot.report.rows import load_report
from ryot.run.variant_data import prepare_variant
from ryot.train.corpus import load_corpus
from ryot.train.loop import Trainer, TrainJob
from tests.train.adapting import TRAIN, write_jsonl
from tests.train.test_records import with_template

RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]
#: Seconds of training: what is stopped must still be under way.
STEPS = 900


def run(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RYOT, "cluster-run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RYOT_CACHE_DIR": str(cache)},
    )


def wait_for_step(folder: Path, driver: subprocess.Popen[str]) -> None:
    events = folder / "events.jsonl"
    deadline = time.monotonic() + 600
    while not events.exists() or not any(isinstance(e, StepEvent) for e in read_events(events)):
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[1]
        time.sleep(0.05)


def test_adapters_survive_a_stop_and_learn_the_same(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = with_template(hf_checkpoint("llama"), tmp_path / "chatty")
    said = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(400)
    ]
    data = write_jsonl(tmp_path / "chats.jsonl", said)
    recipe = tmp_path / "mine.toml"
    text = TRAIN.format(tokens=STEPS * 4 * 48, length=48)
    recipe.write_text(f"{text}\n[init]\n[lora]\nrank = 4\nkeep_adapter = true\n")
    cache, folder = tmp_path / "cache", tmp_path / "run"
    options = ["--variants", str(recipe), "--init", str(model), "--data", str(data), "--precisions", "fp32"]
    driver = run(*options, "--rounds", "1", "--no-tune", "-o", str(folder), cache=cache)
    wait_for_step(folder, driver)
    driver.send_signal(signal.SIGINT)
    assert driver.communicate(timeout=600) and driver.returncode == EXIT_INTERRUPTED
    [adapter] = folder.rglob("adapter_config.json")
    assert not (adapter.parent / "model.safetensors").exists(), "on the way adapters are kept alone"

    # What the run began with has changed: nothing is trained on it.
    config = (model / "generation_config.json").read_text()
    (model / "generation_config.json").write_text(config + "\n")
    changed = run("--resume", str(folder), cache=cache)
    assert "has changed since the run began" in changed.communicate(timeout=600)[1] and changed.returncode == 1
    (model / "generation_config.json").write_text(config)

    driver = run("--resume", str(folder), cache=cache)
    err = driver.communicate(timeout=600)[1]
    assert driver.returncode == 0, err
    [row] = load_report(folder).rows
    assert row.chosen and row.variant == "mine"

    variant = resolve_variant(str(recipe), "reference", init=str(model))
    dataset, _ = prepare_variant(variant, load_corpus([str(data)]), cache)
    alone = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), variant.kernels)
    alone.run_chunk(600)
    alone.save(tmp_path / "alone")
    [learned] = folder.rglob("variants/mine/seed-0/attempt-*/step-*/model.safetensors")
    assert learned.read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
    assert (learned.parent / "adapter" / "adapter_model.safetensors").exists()
