"""Small checkpoints of both architectures with random weights, as a training run would leave them."""

from __future__ import annotations

import email
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ryot.config import ModelConfig
from ryot.models.spec import DecoderSpec
from ryot.train.checkpoint import save_checkpoint
from ryot.train.model import Decoder
from ryot.train.tokenizer import byte_lengths, train_tokenizer

VOCAB_SIZE = 384
CONTEXT = 48
CONFIGS = {
    "opt": ModelConfig(
        architecture="opt",
        vocab_size=VOCAB_SIZE,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        ff_dim=96,
        max_seq_len=CONTEXT,
        tie_embeddings=False,
    ).spec,
    "llama": ModelConfig(
        architecture="llama",
        vocab_size=VOCAB_SIZE,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ff_dim=96,
        max_seq_len=CONTEXT,
        tie_embeddings=True,
    ).spec,
}


def random_decoder(spec: DecoderSpec, seed: int = 0) -> Decoder:
    """A decoder in which no parameter is left at an initial value (zero, one) that would hide a mistake."""
    torch.manual_seed(seed)  # torch draws biases by itself
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * (parameter.shape[1] ** -0.5))
    return model


@dataclass(frozen=True)
class TextData:
    """Stands where a `Dataset` stands: windows of tokens, whatever the split."""

    tokens: np.ndarray
    byte_lengths: np.ndarray
    corpus_sha256: str = "0" * 64

    def windows(self, split: str, count: int, length: int) -> np.ndarray:
        starts = np.linspace(0, len(self.tokens) - length - 1, count).astype(np.int64)
        return self.tokens[starts[:, None] + np.arange(length + 1)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some of the standard library: on every machine, and not changed by work on this project."""
    folder = Path(email.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, VOCAB_SIZE)


@pytest.fixture(scope="session")
def data(tokenizer, texts) -> TextData:
    ids = np.concatenate([np.asarray(tokenizer.encode(text).ids, dtype=np.int64) for text in texts])
    return TextData(ids, byte_lengths(tokenizer))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def checkpoint(request, tmp_path_factory, tokenizer) -> Path:
    """A checkpoint folder of each architecture."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "checkpoint", CONFIGS[request.param], tokenizer)


def make_checkpoint(path: Path, spec: DecoderSpec, tokenizer, seed: int = 0) -> Path:
    state = random_decoder(spec, seed).state_dict()
    save_checkpoint(path, spec=spec, state=state, tokenizer_json=tokenizer.to_str().encode())
    return path
