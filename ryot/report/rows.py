"""The one schema behind the table, Markdown, CSV, JSON and HTML, and how a report is kept on disk.

`samples` of an artifact holds what each measuring process sent, untouched; every number that a table prints is computed
from it (and from `size_bytes`, `quality` and the variant's own row). MB is 10^6 bytes everywhere.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypedDict

from ryot.artifact import ArtifactId
from ryot.atomic import write_atomically
from ryot.edge.protocol import MeasureResult
from ryot.errors import ConfigError
from ryot.mapping import Unchecked, read_mapping, to_mapping

#: Schema 1 called a sample's `case` `arm`, and a verdict had no `cause`.
SCHEMA = 2
REPORT_FILE = "report.json"
RECORD_FILE = "record.json"

VerdictWord = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Curve = tuple[tuple[float, float, float], ...]
"""Points of (tokens, train_wall_s, nats per token)."""
ReinforceCurves = Mapping[str, tuple[tuple[float, ...], ...]]
"""By figure, points of (step, value), of `pass_at_1` and `pass_at_k` (step, value, low, high)."""


class Cause(enum.StrEnum):
    """Why a verdict is what it is."""

    LIMIT = "limit"
    """The value against the limit."""
    NOT_MEASURED = "not-measured"
    DIED = "died"
    """A process that measured did not live to its end."""
    GATE = "gate"
    """A quality gate stopped the artifact."""
    THREADS = "threads"
    """It was measured with other threads than the target has, and the value alone cannot decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedArtifact:
    """What is known of an artifact before it is measured."""

    variant: str
    seed: int
    precision: str
    size_bytes: int
    context_tokens: int | None = None
    quality: Mapping[str, float | None] = field(default_factory=dict)
    """kl, top1, bpb, bpb_ratio: against this variant's own fp32."""
    passed: bool = True
    """Whether the parity and quality gates let it through."""
    reason: str = ""
    """Why a gate did not; empty when all did."""
    path: str = ""
    """Its bundle folder, relative to the run folder."""
    device: str = ""
    """The device that it was pushed to and measured on; empty for the machine of the report."""

    @property
    def id(self) -> ArtifactId:
        return ArtifactId(self.variant, self.seed, self.precision, self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantRow:
    """What one training of one variant gave, or a model that was imported: of one, only its size is known.

    Losses in nats per token, `bpb` in bits per byte.
    """

    name: str
    seed: int
    params: int
    tokens: int | None
    """Training tokens seen."""
    train_wall_s: float | None = None
    """Time in training steps, evaluation, checkpoints and compilation excluded."""
    compile_s: float | None = None
    tokens_per_s: float | None = None
    initial_val_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    test_loss: float | None = None
    test_bpb: float | None = None
    grad_norm_max: float | None = None
    time_to_baseline_loss_s: float | None = None
    """`train_wall_s` when this training is complete and ended at or below the baseline's validation loss."""
    concurrent: bool = False
    """Whether other variants trained on the same machine at the same time."""
    failed: str = ""
    """Why training was stopped; empty when it was not."""
    summary: str = ""
    source: str = ""
    """Where an imported model came from, with its commit on the hub; empty for a trained one."""
    source_sha256: str = ""
    """Of all that was read of it."""
    curve: Curve = ()
    """Held-out (validation) loss."""
    train_curve: Curve = ()
    """Training loss, thinned."""
    reinforcement: ReinforceCurves = field(default_factory=dict)
    """What its reinforcement did, step by step; empty where there was none."""


class Spread(TypedDict, total=False):
    """What the spread of one case comes from; empty of no samples."""

    round_medians: list[float]
    between_rounds: float
    first_over_rest: float | None
    lag1: float | None
    outliers: list[list[int]]
    """Round and position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRow(ExportedArtifact):
    """One exported artifact: its size, quality, measured figures and verdicts; `reason` may be a measurement's."""

    ttft_ms: float | None = None
    decode_tok_s: float | None = None
    peak_rss_bytes: int | None = None
    load_ms: float | None = None
    first_ttft_ms: float | None = None
    """The first prefill of the process, which the warm figures leave out."""
    cold_start_ms: float | None = None
    """From the start of the process to its first token."""
    e2e_ttft_ms: float | None = None
    """Like `ttft_ms`, with tokenization."""
    runs: int = 0
    """Processes started."""
    runs_ok: int = 0
    verdicts: Mapping[str, Mapping[str, VerdictWord | None]] = field(default_factory=dict)
    """By target, then ttft, throughput, memory, size, quality, context; None where the target sets no limit."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """98 % interval of each measured figure, by its field's name."""
    percentiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of `ttft_ms` and `token_ms`, only those that the samples carry."""
    spread: Mapping[str, Spread] = field(default_factory=dict)
    """What the spread comes from, by metric: see stats.describe_spread."""
    pareto: bool = False
    """Whether no other artifact is at least as good in size, speed and bits per byte, and better in one."""
    chosen: bool = False
    batch_tok_s: Mapping[str, float] = field(default_factory=dict)
    """Tokens/s of all sequences together, by batch size."""
    samples: tuple[MeasureResult, ...] = ()
    """One measure result per process, in order of the rounds."""
    batch_samples: tuple[MeasureResult, ...] = ()
    """The same for batches of more than one sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The ratio a / b of one metric with its 98 % interval."""

    metric: str
    a: str
    b: str
    ratio: float
    low: float | None
    high: float | None
    """None where one value stands on each side and no interval can be given."""
    verdict: Literal["lower", "higher", "no difference", "single values"]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One limit of one target, held against one artifact."""

    target: str
    variant: str
    seed: int
    precision: str
    metric: str
    limit_key: str
    limit: float
    value: float | None
    low: float | None
    high: float | None
    """In the limit's unit."""
    verdict: VerdictWord
    cause: Cause = Cause.LIMIT
    note: str = ""
    """The same and more, for people."""
    device: str = ""

    @property
    def id(self) -> ArtifactId:
        return ArtifactId(self.variant, self.seed, self.precision, self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which artifact goes into the bundle (or is the nearest), and why; empty names when none is left."""

    variant: str = ""
    seed: int = 0
    precision: str = ""
    reason: str
    missed: tuple[str, ...] = ()
    """What the nearest artifact misses, when none passes every limit."""
    exit_code: int

    @property
    def id(self) -> ArtifactId | None:
        return ArtifactId(self.variant, self.seed, self.precision) if self.variant else None


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """What one optimization, alone or with the others, bought against the baseline; one entry per seed."""

    name: str
    train_wall_s: tuple[float, ...]
    val_loss: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """How long a stage of a run took."""

    stage: str
    variant: str = ""
    """Whose stage it was; empty for one of all variants."""
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that a run found out."""

    schema: int = SCHEMA
    kind: Literal["report", "record"] = "report"
    """`record` is a bundle's own: one artifact, without the others."""
    run_id: str
    command: str
    created_at: str
    """UTC, ISO 8601."""
    ryot_version: str = ""
    preset: str = ""
    quick: bool = False
    """Made with a small budget: not comparable with other reports."""
    baseline: str = ""
    """The artifact that the ratios are against, by name."""
    machine: Mapping[str, object] = field(default_factory=dict)
    devices: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """What `machine` is, of each device that rows are of."""
    corpus: Mapping[str, object] = field(default_factory=dict)
    """name, sha256, train_tokens, val_tokens, test_tokens; tokenizer_sha256 and vocab_size where known."""
    plan: Mapping[str, object] = field(default_factory=dict)
    """The resolved configuration, kernel decisions included."""
    stages: tuple[StageTime, ...] = ()
    targets: tuple[Unchecked, ...] = ()
    variants: tuple[VariantRow, ...] = ()
    rows: tuple[ArtifactRow, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    choice: Choice | None = None
    ablation: tuple[AblationRow, ...] = ()
    notes: tuple[str, ...] = ()
    """Warnings for the reader: a noisy machine, a fallback, an artifact that died."""
    bundle: str | None = None
    """The bundle's folder, relative to the run folder."""

    def variant_of(self, row: ArtifactRow) -> VariantRow | None:
        """The training that an artifact comes from."""
        return next((v for v in self.variants if (v.name, v.seed) == (row.variant, row.seed)), None)

    def row_of(self, artifact: ArtifactId) -> ArtifactRow | None:
        """The row of an artifact."""
        return next((r for r in self.rows if r.id == artifact), None)

    @property
    def baseline_row(self) -> ArtifactRow | None:
        """The row that the ratios are against."""
        return next((r for r in self.rows if str(r.id) == self.baseline), None)


def report_to_dict(report: Report) -> dict[str, object]:
    """The report as plain JSON values; numbers that are not finite become null."""
    return {name: _plain(value) for name, value in to_mapping(report, keep_none=True).items()}


def report_from_dict(values: Mapping[str, object], where: str) -> Report:
    """The report that `report_to_dict` made `values` from; `ConfigError` beginning with `where` when it did not."""
    if not isinstance(values, Mapping) or "schema" not in values:
        raise ConfigError(f"{where}: not a ryot report (it has no 'schema')")
    if values["schema"] not in (1, SCHEMA):
        raise ConfigError(
            f"{where}: schema {values['schema']!r}, this version reads schema 1 to {SCHEMA}",
            hint="read it with the ryot version that wrote it, or run again"
            + (f" (it was written by ryot {values['ryot_version']})" if values.get("ryot_version") else ""),
        )
    try:
        report = read_mapping(Report, values)
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: not a complete ryot report ({error})") from error
    if values["schema"] == 1:
        verdicts = tuple(dataclasses.replace(v, cause=_cause_in_words(v)) for v in report.verdicts)
        report = dataclasses.replace(report, schema=SCHEMA, verdicts=verdicts)
    return report


def _cause_in_words(verdict: Verdict) -> Cause:
    """The cause of a verdict of schema 1, which only its note tells."""
    if "processes failed" in verdict.note:
        return Cause.DIED
    if verdict.value is None:
        return Cause.GATE if verdict.verdict == "FAIL" else Cause.NOT_MEASURED
    return Cause.THREADS if verdict.verdict == "INCONCLUSIVE" and "threads" in verdict.note else Cause.LIMIT


def save_report(report: Report, path: Path) -> None:
    """Write the report as JSON so that a reader sees the old file or the new one, never a part."""
    write_atomically(path, json.dumps(report_to_dict(report), indent=1, allow_nan=False) + "\n")


def load_report(path: Path) -> Report:
    """The report of a file, a run folder (report.json) or a bundle (record.json)."""
    file = find_report(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not JSON, or cut short ({error})") from error
    return report_from_dict(values, str(file))


def has_report(path: Path) -> bool:
    """Whether `find_report` finds one."""
    return path.is_file() or any((path / name).is_file() for name in (REPORT_FILE, RECORD_FILE))


def find_report(path: Path) -> Path:
    """The report file that a path stands for."""
    if path.is_dir():
        for name in (REPORT_FILE, RECORD_FILE):
            if (path / name).is_file():
                return path / name
        raise ConfigError(
            f"{path}: holds neither {REPORT_FILE} nor {RECORD_FILE}",
            hint="give a finished run folder, a bundle or a report file",
        )
    if not path.exists():
        raise ConfigError(f"{path}: no such file", hint="give a run folder, a bundle or a report file")
    return path


def build_record(report: Report, row: ArtifactRow) -> Report:
    """The part of a report that goes into the bundle of `row`: its own row, training, verdicts and ratios."""
    training = report.variant_of(row)
    return dataclasses.replace(
        report,
        kind="record",
        variants=(dataclasses.replace(training, curve=(), train_curve=(), reinforcement={}),) if training else (),
        rows=(row,),
        comparisons=tuple(c for c in report.comparisons if c.a == str(row.id)),
        verdicts=tuple(v for v in report.verdicts if v.id == row.id),
        ablation=(),
        stages=(),
    )


def load_schema() -> dict[str, object]:
    """The JSON Schema of report.json and record.json."""
    schema: dict[str, object] = json.loads((files("ryot.report") / "report.schema.json").read_text(encoding="utf-8"))
    return schema


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
