"""What several test folders need: a small corpus on disk, a tiny recipe, a trained checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A cluster that someone works with is none of the tests'.
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch

from ryot.config import KernelPlan, VariantConfig, build_from_mapping, resolve_variant, to_mapping
from ryot.train.corpus import Corpus, Document, load_corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.loop import Trainer, TrainJob

torch.set_num_threads(1)
# What the shell ignores or blocks (SIGINT under `nohup pytest &`) would go on to every process that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

VOCAB_SIZE = 384
CONTEXT = 32
#: The shape of recipes and presets that tests write: as small as the fused kernels take.
TINY_MODEL = f"""
[model]
vocab_size = {VOCAB_SIZE}
dim = 64
num_layers = 2
num_heads = 4
num_kv_heads = 4
ff_dim = 64
max_seq_len = {CONTEXT}
"""


#: Whatever starts a Ray. Two at once, not more: they wait for each other's cores, but mostly for something else.
_RAY = ("tests/cluster/", "tests/run/test_pipeline", "tests/run/test_imports")
#: With several processes the tests of each of these stay in one, for Ray's sake or for what they share, whose making
#: takes seconds; the others' stay together by file.
_TOGETHER = (_RAY[:1], _RAY[1:], ("tests/browser/",), ("tests/native/",))
#: What takes longest comes first, so that it isn't left over at the end.
_FIRST = (
    *(_RAY, "tests/fleet/test_faults.py", "tests/deploy/test_export.py", "tests/models/test_families.py"),
    *("tests/fleet/test_push.py", "tests/browser/", "tests/native/", "tests/fleet/", "tests/deploy/", "tests/models/"),
)


def _scope(nodeid: str) -> str:
    return next((names[0] for names in _TOGETHER if nodeid.startswith(names)), nodeid.partition("::")[0])


def _rank(item: pytest.Item) -> int:
    return next((n for n, names in enumerate(_FIRST) if item.nodeid.startswith(names)), len(_FIRST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what takes minutes, clusters and whole runs."""
    for item in items:
        if item.nodeid.startswith(_RAY):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        items.sort(key=_rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes a file's tests stay together, and those of `_TOGETHER`.

    Not by pytest-xdist's own groups, whose marks pytest 9.2 does not pass on.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    # By their number, as xdist would have it, a few long ones come last.
    config.option.loadscopereorder = False
    return Scheduler(config, log)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Real text, small: some packages of the standard library."""
    documents = [
        d
        for d in load_corpus().documents
        if d.name.startswith(("json/", "email/", "http/", "xml/", "logging/", "asyncio/"))
    ]
    return Corpus(name="stdlib-part", documents=tuple(Document(d.name, d.text) for d in documents))


@pytest.fixture(scope="session")
def text_folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as files, as a user would give it with --data; tests that change them copy the folder."""
    folder = tmp_path_factory.mktemp("text")
    for document in corpus.documents:
        path = folder / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_dataset(corpus, VOCAB_SIZE, tmp_path_factory.mktemp("cache"))[0]


def tiny_variant(name: str, *, steps: int = 12, **train: object) -> VariantConfig:
    """The packaged recipe `name` at a size that trains in a second: 32 wide, 2 layers, context 32."""
    values = to_mapping(resolve_variant(name, "reference"))
    values["model"] |= {"vocab_size": VOCAB_SIZE, "dim": 64, "ff_dim": 64, "max_seq_len": CONTEXT}
    values["train"] |= {"batch_size": 4, "tokens": steps * 4 * CONTEXT, "warmup_fraction": 0.25, **train}
    return build_from_mapping(VariantConfig, values, name)


@pytest.fixture(scope="session", params=["baseline", "optimized"])
def trained(request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint of either architecture."""
    job = TrainJob(variant=tiny_variant(request.param), seed=0, dataset_dir=str(dataset.path))
    trainer = Trainer(job, KernelPlan())
    trainer.run_chunk(60)
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    trainer.save(path)
    return path


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a tiny random checkpoint by its name in `tests.models.checkpoints.CHECKPOINTS`, once; read-only."""
    from tests.models.checkpoints import CHECKPOINTS

    root = tmp_path_factory.mktemp("hf")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else CHECKPOINTS[name](root / name)

    return folder


def build_environment(folder: Path, *requirements: object) -> Path:
    """The Python of a new virtual environment in `folder` with these packages alone; skips where there is no index."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    # Nothing here runs often enough for compiling it ahead to pay.
    options = ["--no-compile", "--retries", "1", "--timeout", "15"]
    done = subprocess.run([*pip, *options, *requirements], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    return python
