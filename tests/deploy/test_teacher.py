"""Distillation: what a teacher says, that it says it once, and that a student learns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ryot.config import KernelPlan, VariantConfig, resolve_variant
from ryot.deploy.teacher import open_teacher
from ryot.errors import CheckpointError, ConfigError
from ryot.run.variant_data import prepare_variant
from ryot.train.batch import Batch
from ryot.train.checkpoint import load_model
from ryot.train.corpus import Corpus
from ryot.train.dataset import Dataset
from ryot.train.loop import Trainer, TrainJob
from ryot.train.loss import SoftTargets, cross_entropy
from tests.conftest import TINY_MODEL
from tests.models.checkpoints import VOCAB_SIZE
from tests.train.adapting import LENGTH, TRAIN

TOP_K = 8


def student(folder: Path, teacher: Path, more: str = "") -> VariantConfig:
    path = folder / "student.toml"
    shape = TINY_MODEL.replace("vocab_size = 384\n", "")
    recipe = (
        f'{TRAIN.format(tokens=16 * 4 * LENGTH, length=LENGTH)}{shape}architecture = "llama"\ntie_embeddings = true\n'
    )
    path.write_text(f'{recipe}[distill]\nteacher = "{teacher}"\ntop_k = {TOP_K}\nprecision = "fp32"\n{more}')
    return resolve_variant(str(path), "reference")


@pytest.fixture
def teacher(hf_checkpoint: Callable[[str], Path]) -> Path:
    return hf_checkpoint("llama")


@pytest.fixture
def variant(teacher: Path, tmp_path: Path) -> VariantConfig:
    return student(tmp_path, teacher)


@pytest.fixture
def data(corpus: Corpus, variant: VariantConfig, tmp_path: Path) -> Dataset:
    documents = tuple(d for d in corpus.documents if d.name.startswith(("json", "logging", "xml", "http")))
    small = Corpus(name="part", documents=documents)
    return prepare_variant(variant, small, tmp_path / "cache")[0]


def batch_of(data: Dataset) -> Batch:
    ids = torch.from_numpy(data.tokens("train")[: 2 * LENGTH + 1].astype(np.int64))
    return Batch(ids[:-1].view(2, LENGTH), ids[1:].view(2, LENGTH))


def test_a_student_has_the_teachers_vocabulary_and_tokenizer(variant: VariantConfig, data: Dataset) -> None:
    assert variant.model.vocab_size == data.vocab_size == VOCAB_SIZE
    assert data.text_files and data.token_ids.eos == (256,)


def test_what_is_kept_are_the_teachers_best_tokens(
    variant: VariantConfig, data: Dataset, teacher: Path, tmp_path: Path
) -> None:
    taught = open_teacher(variant, tmp_path / "cache").teach(batch_of(data))
    with torch.no_grad():
        values, ids = load_model(teacher)(taught.inputs_BT).topk(TOP_K, dim=-1)
    expected = torch.zeros(2, LENGTH, VOCAB_SIZE).scatter_(2, ids, values.softmax(dim=-1))
    found = torch.zeros(2, LENGTH, VOCAB_SIZE).scatter_(2, taught.taught_ids_BTS, taught.taught_BTS)
    # Probabilities are kept as float16.
    assert (found - expected).abs().max() < 1e-3


def test_a_teacher_is_asked_once_whatever_process_asks(
    variant: VariantConfig, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_teacher(variant, tmp_path / "cache").teach(batch_of(data))
    [file] = (tmp_path / "cache" / "teachers").rglob("*.bin")
    with file.open("ab") as half:  # a process was killed while it wrote the next record
        half.write(b"\1" * 100)
    monkeypatch.setattr("ryot.deploy.teacher.write_standard_graph", None)  # asking again would fail
    again = open_teacher(variant, tmp_path / "cache").teach(batch_of(data))
    assert torch.equal(first.taught_ids_BTS, again.taught_ids_BTS) and torch.equal(first.taught_BTS, again.taught_BTS)


def test_a_teacher_is_asked_anew_by_another_onnxruntime(
    variant: VariantConfig, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_teacher(variant, tmp_path / "cache").teach(batch_of(data))
    monkeypatch.setattr("onnxruntime.__version__", "0.0.1")
    open_teacher(variant, tmp_path / "cache").teach(batch_of(data))
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 2


@pytest.mark.parametrize("chunk", [0, 5])
def test_the_loss_is_the_cross_entropy_with_the_mixed_target(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(12, 8, generator=generator, requires_grad=True)
    W = torch.randn(30, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 30, (12,), generator=generator)
    ids = torch.stack([torch.randperm(30, generator=generator)[:4] for _ in range(12)])
    soft = SoftTargets(ids, torch.rand(12, 4, generator=generator).softmax(dim=-1), 0.7)
    mixed = 0.3 * torch.nn.functional.one_hot(targets, 30).float()
    mixed = mixed.scatter_add(1, ids, 0.7 * soft.probabilities_RS)
    expected = torch.nn.functional.cross_entropy(h @ W.t(), mixed)
    found = cross_entropy(h, W, targets, chunk, soft)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(found, (h, W)), torch.autograd.grad(expected, (h, W))):
        assert (a - b).abs().max() < 1e-6


def test_a_student_comes_nearer_to_its_teacher_and_goes_on_bit_for_bit(
    variant: VariantConfig, data: Dataset, teacher: Path, tmp_path: Path
) -> None:
    job = TrainJob(variant=variant, seed=0, dataset_dir=str(data.path))

    def divergence(trainer: Trainer) -> float:
        inputs = batch_of(data).inputs_BT
        with torch.no_grad():
            p, q = (m(inputs).log_softmax(dim=-1) for m in (load_model(teacher), trainer.model))
        return (p.exp() * (p - q)).sum(dim=-1).mean().item()

    whole = Trainer(job, KernelPlan(loss_chunk=32), open_teacher(variant, tmp_path / "cache"))
    before = divergence(whole)
    whole.run_chunk(60, max_steps=4)
    whole.save(tmp_path / "on-the-way")
    whole.run_chunk(60)
    assert divergence(whole) < before
    other = open_teacher(variant, tmp_path / "elsewhere")
    second = Trainer.resume(job, KernelPlan(loss_chunk=32), tmp_path / "on-the-way", other)
    second.run_chunk(60)
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_teacher_with_another_vocabulary_is_refused(
    hf_checkpoint: Callable[[str], Path], corpus: Corpus, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in hf_checkpoint("llama").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"a": ', '"swap": ').replace('"b": ', '"a": ').replace('"swap": ', '"b": ')
    )
    path = tmp_path / "x.toml"
    recipe = TRAIN.format(tokens=16 * 4 * LENGTH, length=LENGTH)
    path.write_text(f'{recipe}[init]\nfrom = "{hf_checkpoint("llama")}"\n[distill]\nteacher = "{other}"\n')
    with pytest.raises(CheckpointError, match=r"has another vocabulary than .*llama \('a' is"):
        prepare_variant(resolve_variant(str(path), "reference"), corpus, tmp_path / "cache")


def test_a_teacher_that_changes_is_refused(variant: VariantConfig, teacher: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in teacher.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    recipe = student(tmp_path, moved)
    config = (moved / "config.json").read_text()
    (moved / "config.json").write_text(config + " ")
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        open_teacher(recipe, tmp_path / "cache")


def test_tables_that_contradict_each_other_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bring a tokenizer of their own"):
        student(tmp_path, teacher, f'[tokenizer]\nfrom = "{teacher}"\n')
    with pytest.raises(ConfigError, match="lora adapts a model that exists"):
        student(tmp_path, teacher, "[lora]\nrank = 4\n")
