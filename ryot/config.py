"""What a run is made of, as plain data: presets (sizes), variants (recipes) and their resolution.

A preset is a size, `ryot/presets/NAME.toml`; a variant is a recipe, `ryot/variants/NAME.toml`; both may also be a path
to the user's own file. A recipe says its shape relative to the preset (`[shape]`) and what is to be different from some
width on (`[from_dim.512.train]`), so that any preset, whatever it is called, goes with any recipe. `VARIANT+NAME` lays
`ryot/optimizations/NAME.toml` over the variant in the same way: one part of what `optimized` does, alone. Nothing here
opens a socket, starts Ray or imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ryot.adaptation import (
    ADAPTATION,
    DistillConfig,
    InitConfig,
    LoraConfig,
    RlvrConfig,
    RoundingConfig,
    TokenizerConfig,
    resolve_sources,
)
from ryot.errors import ConfigError, require
from ryot.mapping import Unchecked, formerly
from ryot.mapping import build_from_mapping as build_from_mapping
from ryot.mapping import check_known as check_known
from ryot.mapping import to_mapping as to_mapping
from ryot.mapping import unknown as unknown
from ryot.models.registry import trained_spec
from ryot.models.spec import DecoderSpec, Sizes, narrow_spec

PACKAGE = Path(__file__).parent
T = TypeVar("T")

Schedule = Literal["cosine", "linear-decay"]
Attention = Literal["explicit", "sdpa"]
Dtype = Literal["fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]
#: `auto`: a GPU where each worker can have one.
DeviceChoice = Literal["auto", "cpu", "cuda"]
#: How an exported graph attends: in tiles with a running softmax, or with all scores at once.
GraphAttention = Literal["flash", "full"]

#: Folder of the parts that an ablation puts on the baseline one at a time.
PARTS = "optimizations"

_SECTIONS = ("model", "train", "kernels", "shape")
#: Sections that say what becomes of a model that exists; absent unless a recipe has them.
_ADAPTED = tuple(ADAPTATION)

#: What a recipe's `[shape]` says, and the field that it makes: `width` is a share of the preset's `dim`, `ff_ratio` of
#: the recipe's own, `elastic` a list of such shares.
_SHAPE = {"width": "dim", "queries_per_kv_head": "num_kv_heads", "ff_ratio": "ff_dim", "elastic": "elastic_widths"}
#: Heads of narrowed models are multiples of this; every attention operator takes those.
_HEAD_MULTIPLE = 16

#: Names of the weight formats that can be exported, smallest error first. A pair is `PREFILL+DECODE`.
PRECISIONS = ("fp32", "int8-dyn", "int8", "int4", "int8-dyn+int8", "int8-dyn+int4")
#: What is exported unless told. A pair has the weights twice, and comes on the machine's advice alone.
USUAL_PRECISIONS = ("fp32", "int8-dyn", "int8", "int4")

# What commands take unless told, each said here alone.
DEFAULT_PRESET = "reference"
DEFAULT_RECIPE = "optimized"
DEFAULT_TARGET = "phase1"
DEFAULT_DEVICE: DeviceChoice = "auto"
#: Rounds of a measurement that ends in a verdict, each in fresh processes.
DEFAULT_ROUNDS = 5
#: Seconds between two checkpoints of a training.
CHECKPOINT_EVERY_S = 30.0
#: Held-out tokens that a quality is taken over, at most where less decides and at least where it is asked for.
QUALITY_TOKENS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Sizes):
    """The decoder that a recipe trains: a family's usual structure at these sizes."""

    architecture: str
    """A family that recipes train: `ryot.models.families`, those with a `trained_spec`."""
    structure: DecoderSpec | None = None
    """What the decoder of a checkpoint is made of, of any family; None: the family's usual structure."""

    def __post_init__(self) -> None:
        if self.structure is not None:
            return
        for name in ("dim", "num_heads", "num_kv_heads"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a whole number above 0")
        require(self.dim % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of dim {self.dim}")
        assert self.spec  # raises for sizes that contradict each other

    @property
    def spec(self) -> DecoderSpec:
        """What the decoder is made of."""
        return self.structure or trained_spec(self.architecture, self)

    @property
    def num_parameters(self) -> int:
        """Number of trained values, a tied head counted once."""
        return self.spec.num_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How one variant is trained: budget, batch, learning rates, schedule."""

    tokens: int
    """Budget in training tokens; the schedule ends with it."""
    batch_size: int
    """Sequences in one optimizer step."""
    sequence_length: int = 0
    """Tokens of a sequence; 0: `max_seq_len`, the whole context."""
    learning_rate: float
    """Peak rate of the matrices inside the layers."""
    embedding_learning_rate: float
    """Peak rate of the embedding table (and of a tied head)."""
    head_learning_rate: float
    """Peak rate of an untied head."""
    output_rate: float = 1.0
    """Factor on `learning_rate` for the matrices that write to the residual stream (attention output, down)."""
    warmup_fraction: float
    """Share of the steps in which the rate rises from 0."""
    schedule: Schedule
    """`cosine` to 0, or constant and then `linear-decay` to 0."""
    decay_fraction: float = 0.6
    """Share of the steps in which `linear-decay` falls to 0."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    epsilon: float = 1e-8
    """AdamW's term in the denominator."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: float = field(default=1.0, metadata=formerly("clip_norm"))
    """Gradient norm above which gradients are scaled down."""
    normalize_embedding: bool = False
    """Train the embedding table's directions only: each row is used, and stored, with a root mean square of 1."""
    final_norm_init: float = 1.0
    """Size of the first weights of the norm before the head; small where a table of large rows is the head too."""
    alternate_final_norm: bool = False
    """Start every second of those weights negative, so that a tied head does not begin by predicting its own input:
    the logit of a token after itself is then a sum of both signs instead of a sum of squares."""
    gradient_accumulation_steps: int = field(default=1, metadata=formerly("accumulate"))
    """Micro-batches a step is split into; divides `batch_size`."""
    checkpoint_activations: bool = False
    """Recompute layer activations in the backward pass to save memory."""
    elastic_widths: tuple[int, ...] = ()
    """Narrower values of `dim` that the checkpoint can be cut to: every step also trains one of them, in turn."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "gradient_accumulation_steps"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a whole number above 0")
        require(self.sequence_length >= 0, "sequence_length", self.sequence_length, "a whole number not below 0")
        for name in (
            "learning_rate",
            "embedding_learning_rate",
            "head_learning_rate",
            "output_rate",
            "max_grad_norm",
            "epsilon",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        for name in ("warmup_fraction", "decay_fraction", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number not below 0")
        require(self.schedule in typing.get_args(Schedule), "schedule", self.schedule, "cosine or linear-decay")
        require(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"a divisor of batch_size {self.batch_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelPlan:
    """How a training step is computed on a machine; changes speed, not what is learned (within rounding)."""

    attention: Attention = "sdpa"
    """Attention written out in matrix products, or torch's fused kernel."""
    dtype: Dtype = "fp32"
    """Autocast type of the matrix products."""
    compile: bool = False
    """Whether the trunk goes through torch.compile."""
    loss_chunk: int = 0
    """Rows of logits made at a time in the loss; 0 for all at once."""
    fused_optimizer: bool = False
    """Whether AdamW updates all parameters in one kernel."""
    threads: int = 1
    """torch's intra-op threads."""
    device: Device = "cpu"
    """Where the step runs."""

    def __post_init__(self) -> None:
        require(self.attention in typing.get_args(Attention), "attention", self.attention, "explicit or sdpa")
        require(self.dtype in typing.get_args(Dtype), "dtype", self.dtype, "fp32, bf16 or fp16")
        require(self.loss_chunk >= 0, "loss_chunk", self.loss_chunk, "a whole number not below 0")
        require(self.threads > 0, "threads", self.threads, "a whole number above 0")
        require(self.device in ("cpu", "cuda"), "device", self.device, "cpu or cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """One recipe at one size: everything that decides what a training run learns."""

    name: str
    """What the tables call it."""
    summary: str
    """One line for people."""
    tune: bool
    """Whether this machine may choose the kernel plan by measuring."""
    model: ModelConfig
    train: TrainConfig
    kernels: KernelPlan
    init: InitConfig | None = None
    lora: LoraConfig | None = None
    tokenizer: TokenizerConfig | None = None
    distill: DistillConfig | None = None
    rounding: RoundingConfig | None = None
    rlvr: RlvrConfig | None = None
    """What comes behind the supervised steps; None where nothing does."""

    def __post_init__(self) -> None:
        require(
            self.sequence_length <= self.model.max_seq_len,
            "sequence_length",
            self.train.sequence_length,
            f"at most the context of {self.model.max_seq_len} tokens ({self.name})",
        )
        require(
            self.num_steps > self.warmup_steps,
            "tokens",
            self.train.tokens,
            f"a budget longer than the warm-up of {self.warmup_steps} steps of {self.step_tokens} tokens ({self.name})",
        )
        for width in self.train.elastic_widths:
            narrow_spec(self.model.spec, width)
        for name in ("init", "lora", "tokenizer", "distill", "rounding"):
            chosen = getattr(self, name) is not None
            require(not (chosen and self.train.elastic_widths), name, "a table", "none with elastic_widths")
            # Reinforced are all weights, as they are; a model that exists may be what they start from.
            require(name == "init" or not (chosen and self.rlvr), name, "a table", "none with [rlvr]")
        require(not (self.tune and self.init), "tune", self.tune, "false with [init]: kernels are the recipe's")
        # Both would change how the table of a checkpoint is used.
        for name, plain in (("normalize_embedding", False), ("alternate_final_norm", False), ("final_norm_init", 1.0)):
            value = getattr(self.train, name)
            require(self.init is None or value == plain, f"train.{name}", value, f"{plain} with [init]")

    @property
    def text_source(self) -> str | None:
        """The checkpoint whose tokenizer is used; None for one that is learned from the corpus."""
        if self.init is not None:
            return self.init.source
        if self.distill is not None:
            return self.distill.teacher
        return None if self.tokenizer is None else self.tokenizer.source

    @property
    def sources(self) -> dict[str, str]:
        """Every model that the recipe names and its sha256, by where it is found."""
        found = {}
        if self.init is not None:
            found[self.init.source] = self.init.sha256
        if self.tokenizer is not None:
            found[self.tokenizer.source] = self.tokenizer.sha256
        if self.distill is not None:
            found[self.distill.teacher] = self.distill.sha256
        return found

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.train.sequence_length or self.model.max_seq_len

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises, at least one."""
        return max(1, round(self.train.warmup_fraction * self.num_steps))

    @property
    def step_tokens(self) -> int:
        """Training tokens in one optimizer step."""
        return self.train.batch_size * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps that the budget pays for."""
        return self.train.tokens // self.step_tokens


def load_toml(path: Path) -> Unchecked:
    """The tables of a TOML file. Raises `ConfigError` when it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error


def list_named(folder: str) -> list[str]:
    """Names of the TOML files that the package carries in `folder` (presets, variants or targets)."""
    return sorted(p.stem for p in (PACKAGE / folder).glob("*.toml"))


def find_named(folder: str, name: str) -> Path:
    """The file of a preset, variant or target: a name the package knows, or a path to a `.toml` file.

    Raises `ConfigError` with the nearest known name.
    """
    if name.endswith(".toml"):
        return Path(name)
    path = PACKAGE / folder / f"{name}.toml"
    if name not in list_named(folder):
        raise ConfigError(
            unknown(folder.removesuffix("s"), name, list_named(folder)),
            hint=f"or give a path to your own {folder[:-1]}.toml",
        )
    return path


def resolve_variant(variant: str, preset: str, *, tokens: int | None = None, init: str | None = None) -> VariantConfig:
    """The recipe `variant` at the size `preset`; `tokens` overrides its budget.

    `init` is the model that a recipe with `[init]` starts from, also where it names another.

    Both are names or paths; `NAME+PART` is the recipe with that optimization, `NAME+all` with all of them. Raises
    `ConfigError` naming file, key and rule.
    """
    preset_path = find_named("presets", preset)
    recipe, *parts = [variant] if variant.endswith(".toml") else variant.split("+")
    names = [n for part in parts for n in (list_named(PARTS) if part == "all" else [part])]
    paths = [find_named("variants", recipe), *(find_named(PARTS, n) for n in names)]
    name = "+".join([paths[0].stem, *parts])
    size = load_toml(preset_path)
    check_known(size, ("summary", "model", "train"), str(preset_path))
    merged: dict[str, Any] = {section: dict(size.get(section, {})) for section in _SECTIONS}
    outer: dict[str, object] = {"summary": "", "tune": False}
    own: set[str] = set()
    for path in paths:
        values = load_toml(path)
        check_known(values, (*outer, *_SECTIONS, *_ADAPTED, "from_dim", "preset"), str(path))
        outer |= {k: values[k] for k in outer if k in values}
        for layer in (values, *_overrides(values, size, preset_path.stem, path)):
            own |= {*layer.get("model", {}), *layer.get("shape", {})}
            for section in _SECTIONS:
                merged[section] |= layer.get(section, {})
            for section in _ADAPTED:
                if section in layer:
                    merged[section] = {**merged.get(section, {}), **layer[section]}
            # A figure that is given stands above one that is worked out.
            for key, size_of in _SHAPE.items():
                if size_of in layer.get("model", {}):
                    merged["shape"].pop(key, None)
    where = f"variant {name} at {preset_path.stem}"
    if "init" in merged:
        require(not own, f"{where}: model", sorted(own), "nothing with [init]: the checkpoint says it")
    _apply_shape(merged["model"], merged["train"], merged.pop("shape"), size.get("model", {}), where)
    resolve_sources(merged, init, where)
    if tokens is not None:
        merged["train"]["tokens"] = tokens
    return build_from_mapping(VariantConfig, {"name": name, **outer, **merged}, where)


def _overrides(values: Unchecked, size: Unchecked, preset: str, path: Path) -> Iterator[Unchecked]:
    """What a recipe has for presets at least so wide (`[from_dim.512]`), narrower ones first, and for one by name."""
    dim = size.get("model", {}).get("dim", 0)
    by_width = values.get("from_dim", {})
    for key in by_width:
        require(str(key).isdigit(), f"{path}: from_dim", key, "a width, as in [from_dim.512.train]")
    for width in sorted(by_width, key=int):
        check_known(by_width[width], (*_SECTIONS, *_ADAPTED), f"{path}: from_dim.{width}")
        if int(width) <= dim:
            yield by_width[width]
    special = values.get("preset", {}).get(preset, {})
    check_known(special, (*_SECTIONS, *_ADAPTED), f"{path}: preset.{preset}")
    yield special


def _apply_shape(
    model: dict[str, Any], train: dict[str, object], shape: Unchecked, size: Unchecked, where: str
) -> None:
    """Fill in what a recipe says relative to the preset's size.

    Heads keep a width that the fused operators take: a narrowed model may have fewer of them.
    """
    check_known(shape, _SHAPE, f"{where}: shape")
    for key in ("width", "ff_ratio", "queries_per_kv_head"):
        value = shape.get(key, 1)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number and value > 0, f"{where}: shape.{key}", value, "a number above 0")
    if "dim" not in size or "num_heads" not in size:
        return  # building the config says what is missing
    if (width := shape.get("width", 1)) != 1:
        model["dim"] = round(size["dim"] * width)
    if width != 1 and model["num_heads"] == size["num_heads"]:
        heads = range(size["num_heads"], 0, -1)
        fitting = [h for h in heads if size["num_heads"] % h == 0 and model["dim"] % (h * _HEAD_MULTIPLE) == 0]
        require(bool(fitting), f"{where}: shape.width", width, f"a dim in steps of {_HEAD_MULTIPLE}")
        model["num_heads"] = fitting[0]
    if "queries_per_kv_head" in shape:
        most = model["num_heads"] // shape["queries_per_kv_head"]
        model["num_kv_heads"] = next(h for h in range(max(1, int(most)), 0, -1) if model["num_heads"] % h == 0)
    if "ff_ratio" in shape:
        model["ff_dim"] = round(model["dim"] * shape["ff_ratio"])
    if "elastic" in shape:
        # A model is cut between heads.
        kept = [max(1, round(model["num_heads"] * share)) for share in shape["elastic"]]
        widths = [model["dim"] * heads // model["num_heads"] for heads in dict.fromkeys(kept)]
        train["elastic_widths"] = [width for width in widths if width < model["dim"]]


def digest(*parts: object) -> str:
    """sha256 over the canonical JSON of `parts`: equal for equal inputs on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value, keep_none=True)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no canonical form")


def replace(config: T, **changes: object) -> T:
    """A copy of a config with some fields changed, checked again."""
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
