"""A tiny model over a built-in task, and what is needed to sample from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ryot.adaptation import RlvrConfig
from ryot.config import KernelPlan, ModelConfig, TrainConfig, VariantConfig
from ryot.reinforce.rollouts import Policy
from ryot.reinforce.tasks import task_corpus
from ryot.train.dataset import Dataset, prepare_dataset

TASK = "sorting:3"
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=257,
    dim=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    ff_dim=96,
    max_seq_len=32,
    tie_embeddings=True,
)


def make_variant(*, tokens: int = 4096, **rlvr: object) -> VariantConfig:
    values: dict[str, object] = {
        "task": TASK,
        "steps": 4,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_new_tokens": 8,
        "eval_prompts": 8,
        "eval_samples": 4,
        "micro_batch_size": 5,
    }
    train = TrainConfig(
        tokens=tokens,
        batch_size=8,
        learning_rate=3e-3,
        embedding_learning_rate=1e-2,
        head_learning_rate=3e-3,
        warmup_fraction=0.05,
        schedule="linear-decay",
        normalize_embedding=True,
    )
    return VariantConfig(
        name="tiny",
        summary="",
        tune=False,
        model=MODEL,
        train=train,
        kernels=KernelPlan(attention="explicit"),
        rlvr=RlvrConfig(**(values | rlvr)),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_dataset(task_corpus(TASK), MODEL.vocab_size, tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="session")
def policy(dataset: Dataset) -> Policy:
    tokenizer_json = Path(dataset.path / "tokenizer.json").read_bytes()
    return Policy(spec=MODEL.spec, text_files={"tokenizer.json": tokenizer_json}, eos=(0,), bos=0)
