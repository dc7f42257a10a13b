"""What a recipe takes from models that exist: a start, a tokenizer, a teacher; and how its weights are adapted.

    [init] from = SOURCE        the weights, shape and tokenizer to go on from
    [lora]                      train low-rank adapters beside frozen weights
    [tokenizer] from = SOURCE   the tokenizer alone
    [distill] teacher = SOURCE  learn from a teacher's probabilities; brings its tokenizer
    [rounding]                  train the last steps through the rounding of int4
    [rlvr] task = FILE          reinforce by verifiable rewards, behind the supervised steps; of these with [init] alone

SOURCE is a folder, a .gguf file, or `org/name[@revision]` of the hub. Sources, and a file of tasks, are looked at when
a recipe is resolved; what was found, the sha256 above all, becomes part of the recipe and so of every digest that a
stage is kept by.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ryot.errors import ConfigError, require
from ryot.mapping import also_called
from ryot.models.block_sizes import BLOCK_SIZES
from ryot.models.sources.naming import find_source
from ryot.models.spec import DecoderSpec, bounded_spec

#: The precisions that a teacher can be run in.
TeacherPrecision = Literal["fp32", "int8-dyn", "int8"]

#: The precisions that answers can be sampled in.
RolloutPrecision = Literal["fp32", "int8", "int8-dyn"]

#: In place of names: every matrix of the layers.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """The checkpoint that a training starts from."""

    source: str = field(metadata=also_called("from"))
    """A folder, a .gguf file, or `org/name[@revision]` of the hub."""
    context: int = 0
    """Tokens of context that the model keeps; 0 for all that the source has."""
    sha256: str = ""
    """Of the source, found when the recipe is resolved."""

    def __post_init__(self) -> None:
        require(self.context >= 0, "context", self.context, "a whole number not below 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * B A, with W frozen."""

    rank: int = 16
    """Inner width of an adapter."""
    alpha: float = 32.0
    """Numerator of the factor on an adapter's product."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Modules by the last part of their names in transformers, such as `q_proj`; or `all-linear`."""
    keep_adapter: bool = False
    """Whether the finished checkpoint also holds the adapter alone, in `adapter/`, as `peft` reads it."""

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", self.rank, "a whole number above 0")
        require(self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(bool(self.targets), "targets", self.targets, "at least one name")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The checkpoint whose tokenizer a recipe takes instead of learning one."""

    source: str = field(metadata=also_called("from"))
    """A folder, a .gguf file, or `org/name[@revision]` of the hub."""
    sha256: str = ""
    """Of the source, found when the recipe is resolved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """The teacher of a student; the student has the teacher's tokenizer."""

    teacher: str
    """A folder, a .gguf file, or `org/name[@revision]` of the hub."""
    weight: float = 0.7
    """Share of the teacher's probabilities in what is learned; the rest is the text itself."""
    top_k: int = 32
    """The most probable tokens of each position that are kept; their probabilities are made to sum to 1."""
    precision: TeacherPrecision = "int8"
    """How the teacher is run."""
    sha256: str = ""
    """Of the teacher, found when the recipe is resolved."""

    def __post_init__(self) -> None:
        require(0 < self.weight <= 1, "weight", self.weight, "a number above 0, at most 1")
        require(self.top_k > 0, "top_k", self.top_k, "a whole number above 0")
        known = typing.get_args(TeacherPrecision)
        require(self.precision in known, "precision", self.precision, " or ".join(known))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingConfig:
    """The last steps compute with rounded weights; gradients go to the unrounded ones (straight-through)."""

    share: float = 0.15
    """Share of the steps that are taken so."""
    bits: int = 4
    """Of the layers' matrices."""
    block_size: int = 32
    """Inputs that share a scale."""
    table_bits: int = 8
    """Of the embedding and of a head of its own."""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "a number above 0, at most 1")
        require(self.bits in (4, 8), "bits", self.bits, "4 or 8")
        require(self.table_bits in (4, 8), "table_bits", self.table_bits, "4 or 8")
        require(self.block_size in BLOCK_SIZES, "block_size", self.block_size, f"one of {BLOCK_SIZES}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RlvrConfig:
    """Reinforcement with verifiable rewards, behind the supervised steps: GRPO on the model's own answers."""

    task: str
    """A file of tasks (`.jsonl`), or a built-in kind: `ryot.reinforce.procedural`."""
    sha256: str = ""
    """Of a file of tasks, found when the recipe is resolved."""
    answers: int = 0
    """How many of the task's answers are known, the first of the training split: the other prompts are reinforced on;
    0 for all that the task has."""
    steps: int
    """Batches of answers that are sampled and learned from."""
    prompts_per_step: int = 16
    """Prompts in a batch."""
    samples_per_prompt: int = 16
    """Answers to each; their mean reward is what each is compared with."""
    max_new_tokens: int = 32
    """Tokens of an answer at most."""
    graded: bool = False
    """Whether an answer that does not pass is rewarded for how far it comes; a part may be all that is then learned."""
    learning_rate_share: float = 0.1
    """Learning rates in these steps, as a share of the recipe's peaks."""
    updates_per_batch: int = 1
    """Optimizer steps on each batch; 1 is on-policy."""
    micro_batch_size: int = 64
    """Answers that go through the model at a time."""
    kl: float = 0.0
    """Weight of the divergence from the model as it was before these steps; 0 keeps no copy of it."""
    clip_low: float = 0.2
    """How far below 1 a probability ratio counts; without effect while on-policy."""
    clip_high: float = 0.28
    """How far above 1 it counts."""
    divide_by_std: bool = False
    """Whether advantages are also divided by the standard deviation of their group."""
    importance_limit: float = 2.0
    """How many times more likely in training than in the sampler a token may count."""
    eval_prompts: int = 200
    """Held-out prompts that pass@k is taken over."""
    eval_samples: int = 8
    """Answers to each; k of pass@k."""
    rollout_workers: int = 0
    """Processes that sample, one core each, beside the trainer; 0 samples in the trainer, by turns with learning."""
    rollout_precision: RolloutPrecision = "fp32"
    """How the model is run that samples; rounded weights are faster, and what they change is corrected for, up to the
    limit above: look at the mismatch that is shown, above all where activations have outliers."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "max_new_tokens",
            "updates_per_batch",
            "micro_batch_size",
            "eval_prompts",
            "eval_samples",
        ):
            require(getattr(self, name) > 0, f"rlvr.{name}", getattr(self, name), "a whole number above 0")
        require(self.samples_per_prompt > 1, "rlvr.samples_per_prompt", self.samples_per_prompt, "at least 2")
        for name in ("rollout_workers", "answers"):
            require(getattr(self, name) >= 0, f"rlvr.{name}", getattr(self, name), "a whole number not below 0")
        known = typing.get_args(RolloutPrecision)
        require(self.rollout_precision in known, "rlvr.rollout_precision", self.rollout_precision, " or ".join(known))
        require(self.kl >= 0, "rlvr.kl", self.kl, "a number not below 0")
        require(0 < self.clip_low < 1, "rlvr.clip_low", self.clip_low, "a number between 0 and 1")
        for name in ("clip_high", "learning_rate_share", "importance_limit"):
            require(getattr(self, name) > 0, f"rlvr.{name}", getattr(self, name), "a number above 0")


#: The tables of a recipe that are told here, and what each is read into.
ADAPTATION = {
    "init": InitConfig,
    "lora": LoraConfig,
    "tokenizer": TokenizerConfig,
    "distill": DistillConfig,
    "rounding": RoundingConfig,
    "rlvr": RlvrConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundModel:
    """A source as it was found."""

    source: str
    """Where it is found again: an absolute path, or an id of the hub with its commit."""
    sha256: str
    spec: DecoderSpec


def find_model(source: str, where: str) -> FoundModel:
    """Open a source and read what it is made of, and all of it for its digest.

    Raises `ConfigError` for what is no source, `CheckpointError` for one that cannot be read or is of a family that is
    not known.
    """
    from ryot.models.registry import read_spec
    from ryot.models.sources.opening import open_checkpoint

    found = find_source(source)
    if found is None:
        raise ConfigError(
            f"{where}: {source!r} is no folder or file here, and no id of the hub",
            hint="give a folder, a .gguf file, or org/name[@revision]; a path counts from where the command is run",
        )
    checkpoint = open_checkpoint(found)
    if checkpoint.revision is not None:
        found = f"{found.partition('@')[0]}@{checkpoint.revision}"
    return FoundModel(source=found, sha256=checkpoint.sha256, spec=read_spec(checkpoint.config, checkpoint.where))


def resolve_sources(recipe: dict[str, Any], init_source: str | None, where: str) -> None:
    """Look at the sources that a merged recipe names, and write what was found into it.

    `init_source` is what `[init]` starts from, whatever it says itself. The shape of a model comes from `[init]`, or
    its vocabulary from whatever brings the tokenizer. Raises as `find_model` does, and `ConfigError` for tables that
    contradict each other.
    """
    if "lora" in recipe and "init" not in recipe:
        raise ConfigError(f"{where}: lora adapts a model that exists", hint="add [init] with from = SOURCE")
    if "lora" in recipe and "rounding" in recipe:
        raise ConfigError(
            f"{where}: rounding trains whole weights, which lora freezes", hint="remove [lora] or [rounding]"
        )
    if "tokenizer" in recipe and ("init" in recipe or "distill" in recipe):
        raise ConfigError(f"{where}: [init] and [distill] bring a tokenizer of their own", hint="remove [tokenizer]")
    if "rlvr" in recipe:
        recipe["rlvr"] = {**recipe["rlvr"], **_find_tasks(recipe["rlvr"].get("task"), where)}
    models: dict[str, FoundModel] = {}
    for table, key in (("init", "source"), ("tokenizer", "source"), ("distill", "teacher")):
        values = recipe.get(table)
        if values is None:
            continue
        values = dict(values)
        name = "from" if "from" in values else key
        source = values.pop(name, None)
        if table == "init":
            source = init_source or source
        if not isinstance(source, str) or not source:
            raise ConfigError(
                f"{where}: {table}.{'from' if key == 'source' else key} is missing",
                hint="give the model with --init SOURCE, or in a copy of the recipe" if table == "init" else None,
            )
        models[table] = model = find_model(source, f"{where}: {table}")
        recipe[table] = {**values, key: model.source, "sha256": model.sha256}
    if init := models.get("init"):
        recipe["model"] = _model_of(bounded_spec(init.spec, recipe["init"].get("context") or None))
    elif text := models.get("distill") or models.get("tokenizer"):
        recipe["model"]["vocab_size"] = text.spec.vocab_size
    if init and (teacher := models.get("distill")) and teacher.spec.vocab_size != init.spec.vocab_size:
        raise ConfigError(
            f"{where}: the teacher has a vocabulary of {teacher.spec.vocab_size}, the student one of "
            f"{init.spec.vocab_size}",
            hint="take a teacher with the student's tokenizer",
        )


def _find_tasks(task: object, where: str) -> dict[str, str]:
    """Where a file of tasks is found from any folder, and its sha256; nothing of a built-in kind."""
    if not isinstance(task, str) or not task.endswith(".jsonl"):
        return {}
    path = Path(task).expanduser().absolute()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{where}: rlvr.task {path}: cannot be read ({error.strerror})",
            hint="a path counts from where the command is run",
        ) from error
    return {"task": str(path), "sha256": hashlib.sha256(content).hexdigest()}


def _model_of(spec: DecoderSpec) -> dict[str, object]:
    """The `[model]` of a checkpoint's decoder."""
    from ryot.mapping import to_mapping

    sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ff_dim", "max_seq_len", "tie_embeddings")
    values: Mapping[str, object] = to_mapping(spec)
    return {"architecture": spec.family, **{size: values[size] for size in sizes}, "structure": dict(values)}
