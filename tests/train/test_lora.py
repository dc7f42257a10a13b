"""Adapters against `peft`: what is trained, what is merged, and the files it is kept in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers

from ryot.config import KernelPlan
from ryot.errors import ConfigError
from ryot.models.sources.opening import open_checkpoint
from ryot.train.checkpoint import load_model
from ryot.train.corpus import Corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.initial import build_initial
from ryot.train.loop import Trainer, TrainJob
from ryot.train.lora import ADAPTER_WEIGHTS, adapter_files, adapters
from ryot.train.source_text import read_source_text
from tests.models.checkpoints import VOCAB_SIZE
from tests.train.adapting import adapted

LORA = '[lora]\nrank = 4\nalpha = 6\ntargets = ["all-linear"]\n'
#: Logits up to 20, float32 over a few layers of sums of a hundred products in another order: 20 * 100 * 2^-24 at most.
TOLERANCE = 1e-4


def randomize(model: torch.nn.Module) -> None:
    """B begins at zero, where an adapter does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapters(model):
            for B in layer.lora_B:
                B.copy_(0.1 * torch.randn(B.shape, generator=generator))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "llama_biases", "gpt2", "gpt_neox", "qwen3", "phi3", "opt"])
def test_peft_loads_the_adapter_and_gives_the_same_logits(
    name: str, hf_checkpoint: Callable[[str], Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    source = hf_checkpoint(name)
    variant = adapted(tmp_path, source, LORA)
    model = build_initial(variant, "sdpa").eval()
    randomize(model)
    (tmp_path / "adapter").mkdir()
    for file, data in adapter_files(model, variant.lora, str(source)).items():
        (tmp_path / "adapter" / file).write_bytes(data)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, expected = model(ids), theirs(ids).logits
    assert (expected - before).abs().max() > 100 * TOLERANCE, "the adapter does something"
    assert (ours - expected).abs().max() < TOLERANCE
    # peft's names and shapes, none left out.
    theirs_tensors = peft.get_peft_model_state_dict(theirs)
    import safetensors.torch

    kept = safetensors.torch.load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in theirs_tensors.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_gradients_of_adapters_are_those_of_peft(
    name: str, hf_checkpoint: Callable[[str], Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    source = hf_checkpoint(name)
    variant = adapted(tmp_path, source, LORA)
    model = build_initial(variant, "sdpa")
    randomize(model)
    (tmp_path / "adapter").mkdir()
    for file, data in adapter_files(model, variant.lora, str(source)).items():
        (tmp_path / "adapter" / file).write_bytes(data)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    theirs(input_ids=ids, labels=ids).loss.backward()
    logits = model(ids)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    expected = sum(p.grad.square().sum() for p in theirs.parameters() if p.requires_grad)
    ours = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_the_named_modules_get_adapters(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    variant = adapted(tmp_path, hf_checkpoint("llama"), '[lora]\ntargets = ["v_proj", "down_proj"]\n')
    model = build_initial(variant, "sdpa")
    found = {(name, m.leaf) for name, layer in adapters(model) for m in layer.modules_of_peft}
    assert {leaf for _, leaf in found} == {"v_proj", "down_proj"} and len(found) == 2 * model.spec.num_layers


def test_a_target_that_matches_nothing_is_refused(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    variant = adapted(tmp_path, hf_checkpoint("gpt2"), '[lora]\ntargets = ["q_proj"]\n')
    with pytest.raises(ConfigError, match=r"'q_proj' matches no module of this gpt2 model") as error:
        build_initial(variant, "sdpa")
    assert "c_attn, c_fc, c_proj" in str(error.value.hint)


@pytest.fixture(scope="module")
def data(corpus: Corpus, hf_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    small = Corpus(
        name="part",
        documents=tuple(d for d in corpus.documents if d.name.startswith(("json", "logging", "xml", "http"))),
    )
    text = read_source_text(open_checkpoint(str(hf_checkpoint("llama"))), VOCAB_SIZE)
    return prepare_dataset(small, VOCAB_SIZE, tmp_path_factory.mktemp("cache"), text=text)[0]


def test_training_lowers_the_loss_and_leaves_a_merged_model_and_the_adapter(
    data: Dataset, hf_checkpoint: Callable[[str], Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    source = hf_checkpoint("llama")
    variant = adapted(tmp_path, source, LORA + "keep_adapter = true\n", steps=20)
    trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(data.path)), KernelPlan(loss_chunk=32))
    losses = [e.loss for e in trainer.run_chunk(60) if e.kind == "eval" and e.split == "val"]
    assert losses[-1] < losses[0] - 0.05
    trainer.save(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    adapter = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        expected = adapter(ids).logits
        assert (merged(ids).logits - expected).abs().max() < TOLERANCE
        assert (load_model(tmp_path / "out")(ids) - expected).abs().max() < TOLERANCE
    tokenizers = [transformers.AutoTokenizer.from_pretrained(p) for p in (source, tmp_path / "out")]
    assert tokenizers[0]("a b").input_ids == tokenizers[1]("a b").input_ids
    assert merged.config.eos_token_id == base.config.eos_token_id == 256


@pytest.mark.parametrize("tables", [LORA, ""], ids=["lora", "finetune"])
def test_a_training_goes_on_bit_for_bit_from_its_checkpoint(
    tables: str, data: Dataset, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    variant = adapted(tmp_path, hf_checkpoint("llama"), tables)
    job = TrainJob(variant=variant, seed=0, dataset_dir=str(data.path))
    whole = Trainer(job, KernelPlan())
    whole.run_chunk(60)
    first = Trainer(job, KernelPlan())
    first.run_chunk(60, max_steps=3)
    first.save(tmp_path / "on-the-way")
    assert (tmp_path / "on-the-way" / ADAPTER_WEIGHTS).exists() == bool(tables)
    second = Trainer.resume(job, KernelPlan(), tmp_path / "on-the-way")
    second.run_chunk(60)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
