"""A training that ends with reinforcement: resumed bit for bit, stopped by its gates, and really learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ryot.adaptation import InitConfig, LoraConfig
from ryot.config import VariantConfig, replace
from ryot.edge.tokenizer_config import load_token_ids
from ryot.errors import ConfigError
from ryot.events import EvalEvent, Event, PassEvent, ReinforceEvent, StepEvent
from ryot.models.token_ids import TokenIds
from ryot.reinforce.tasks import load_text
from ryot.reinforce.trainer import ReinforceTrainer, build_trainer
from ryot.run.variant_data import prepare_variant
from ryot.train.checkpoint import save_checkpoint
from ryot.train.dataset import Dataset
from ryot.train.gates import GateBreach
from ryot.train.loop import TrainJob
from ryot.train.model import Decoder
from tests.edge.tokenizer_kinds import KINDS
from tests.reinforce.conftest import MODEL, make_variant
from tests.train.adapting import adapted


def start(dataset: Dataset, variant: VariantConfig, checkpoint: Path | None = None) -> ReinforceTrainer:
    job = TrainJob(variant=variant, seed=3, dataset_dir=str(dataset.path))
    trainer = build_trainer(job, variant.kernels, None, checkpoint)
    assert isinstance(trainer, ReinforceTrainer)
    return trainer


def run(trainer: ReinforceTrainer, steps: int | None = None) -> list[Event]:
    events: list[Event] = []
    while not trainer.done:
        events += trainer.run_chunk(1e9, steps)
        if steps is not None:
            break
    trainer.close()
    return events


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_training_goes_on_bit_for_bit(dataset: Dataset, tmp_path: Path, kl: float) -> None:
    # What is rewarded is common enough that something is learned although the model knows next to nothing.
    variant = make_variant(task=str(digits_file(tmp_path)), kl=kl, updates_per_batch=2)
    whole = start(dataset, variant)
    events = run(whole)
    first = start(dataset, variant)
    run(first, whole.supervised_steps + 2)
    first.save(tmp_path / "checkpoint")
    second = start(dataset, variant, tmp_path / "checkpoint")
    later = run(second)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    steps = [event for event in events if isinstance(event, ReinforceEvent)]
    again = [event for event in later if isinstance(event, ReinforceEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4] and [event.step for event in again] == [3, 4]
    assert [event.reward for event in steps[2:]] == [event.reward for event in again]
    learned = [event for event in steps if event.mismatch is not None]
    assert learned and all(event.mismatch < 1e-5 for event in learned if event.mismatch is not None)
    assert (max(event.kl for event in steps) > 0) == bool(kl)


def digits_file(folder: Path) -> Path:
    """Tasks that any answer with a digit from 1 to 5 in it passes."""
    path = folder / "digits.jsonl"
    tasks = [
        {"prompt": f"sort {n}:", "verifier": "regex=[1-5]", "split": "test" if n % 4 == 0 else "train"}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def test_supervised_steps_are_those_of_a_training_without(dataset: Dataset) -> None:
    variant = make_variant(steps=1)
    trainer = start(dataset, variant)
    events = run(trainer, trainer.supervised_steps)
    bare = VariantConfig(
        **{name: getattr(variant, name) for name in ("name", "summary", "tune", "model", "train", "kernels")}
    )
    other = build_trainer(TrainJob(variant=bare, seed=3, dataset_dir=str(dataset.path)), bare.kernels)
    other.run_chunk(1e9)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    assert trainer.tokens == other.tokens
    assert [type(event) for event in events[:2]] == [EvalEvent, StepEvent]


def test_gradients_are_scaled_in_fp16_as_in_supervised_steps(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The policy's loss is computed in float32 all the same: its gradients are those of a plan in float32.
    variant = make_variant(task=str(digits_file(tmp_path)))
    norms = []
    for dtype in ("fp32", "fp16"):
        trainer = start(dataset, variant)
        trainer.run_chunk(1e9, trainer.supervised_steps)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == "fp16")
        scaler.scale(torch.zeros(()))
        monkeypatch.setattr(trainer._take_step, "scaler", scaler)
        norms += [event.grad_norm for event in run(trainer) if isinstance(event, ReinforceEvent)]
    assert max(norms[:4]) > 0 and norms[4:] == pytest.approx(norms[:4], rel=1e-4)


@pytest.mark.parametrize("kind", ["prepend", "byte level"])
def test_a_checkpoint_is_reinforced_with_its_own_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer, source = KINDS[kind](), tmp_path / "source"
    model = Decoder(replace(MODEL, vocab_size=512).spec)
    tokenizer_json = tokenizer.to_str().encode()
    save_checkpoint(source, spec=model.spec, state=model.state_dict(), tokenizer_json=tokenizer_json)
    config = json.loads((source / "config.json").read_text())
    ends = [tokenizer.token_to_id(token) for token in ("</s>", "<|turn|>")]
    bos = tokenizer.token_to_id("<s>") if kind == "prepend" else None
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": ends}))
    (source / "config.json").write_text(json.dumps({**config, "bos_token_id": bos, "eos_token_id": ends}))
    rlvr = '[rlvr]\ntask = "sorting:3"\nsteps = 2\nmax_new_tokens = 4\neval_prompts = 4\neval_samples = 2\n'
    variant = adapted(tmp_path, source, f"{rlvr}prompts_per_step = 4\nsamples_per_prompt = 2\n")
    data, _ = prepare_variant(variant, load_text((), [variant]), tmp_path / "cache")
    trainer = start(data, variant)
    ids = trainer._prompt_ids("sort 3 1 2:")
    text = tokenizer.encode("sort 3 1 2:", add_special_tokens=False).ids
    assert ids == (ends[0] if bos is None else bos, *text)
    # Supervised steps see the same before their answers.
    assert data.tokens("train")[0] == ids[0] and data.has_records
    events = run(trainer, trainer.supervised_steps)
    trainer.save(tmp_path / "checkpoint")
    again = start(data, variant, tmp_path / "checkpoint")
    judged = again.sample_tasks(again._held_out[:2], 2, 0)
    assert all(sample.ended == (sample.tokens[-1] in ends) for group in judged.samples for sample in group)
    events += run(again)
    assert sum(isinstance(event, ReinforceEvent) for event in events) == 2
    again.save(tmp_path / "end")
    assert load_token_ids(tmp_path / "end", tokenizer, vocab_size=10_000) == TokenIds(bos, tuple(ends), 0)


def test_adapters_are_not_reinforced() -> None:
    with pytest.raises(ConfigError, match=r"lora: got 'a table', expected none with \[rlvr\]"):
        replace(
            make_variant(),
            init=InitConfig(source="x"),
            lora=LoraConfig(),
            model=MODEL,
            train=replace(make_variant().train, normalize_embedding=False),
        )


def test_answers_that_do_not_fit_the_context_are_refused_before_training(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="got 30, and sorting:3 has a prompt of 12 tokens, but the context has 32"):
        start(dataset, make_variant(max_new_tokens=30))


def test_a_task_whose_rewards_are_all_equal_is_stopped(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "never.jsonl"
    tasks = [
        {"prompt": f"{n}", "verifier": "exact=nobody says this", "split": s} for n, s in enumerate(("train", "test"))
    ]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    trainer = start(dataset, make_variant(task=str(path), steps=100))
    with pytest.raises(GateBreach, match="all rewards of every prompt were equal"):
        run(trainer)
    trainer.close()


@pytest.mark.slow
def test_rewards_rise(dataset: Dataset, tmp_path: Path) -> None:
    variant = make_variant(
        task=str(digits_file(tmp_path)), steps=15, learning_rate_share=0.5, samples_per_prompt=8, prompts_per_step=8
    )
    events = run(start(dataset, variant))
    passes = [event for event in events if isinstance(event, PassEvent)]
    assert passes[-1].pass_at_1_low > passes[0].pass_at_1_high
    assert [event.reinforce_step for event in passes] == [0, 3, 6, 9, 12, 15]
