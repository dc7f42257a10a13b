from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from ryot.events import EvalEvent, MeasureEvent, StepEvent
from ryot.report.tensorboard import TensorBoardExport


def points(files: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(e.step, float(make_ndarray(e.tensor_proto))) for e in files.Tensors(tag)]


def test_the_curves_of_each_training_can_be_read_back_from_the_event_files(tmp_path: Path) -> None:
    export = TensorBoardExport(tmp_path)
    for tokens, loss in ((128, 7.5), (256, 6.25)):
        for variant in ("a", "b"):
            export(
                StepEvent(
                    variant=variant, seed=1, step=tokens, num_steps=2, tokens=tokens, loss=loss, grad_norm=1.0,
                    learning_rate=0.5, tokens_per_s=2.0, train_wall_s=1.0, rss_bytes=1, cpu_s=1.0,
                )
            )  # fmt: skip
    export(EvalEvent(variant="a", seed=1, step=2, tokens=256, train_wall_s=1, split="test", loss=6.5, bits_per_byte=3))
    export(MeasureEvent(case="a", round=0, ok=True))
    export.close()
    a, b = (EventAccumulator(str(tmp_path / name / "seed-1")).Reload() for name in "ab")
    assert points(a, "train/loss") == points(b, "train/loss") == [(128, 7.5), (256, 6.25)]
    assert points(a, "test/bits_per_byte") == [(256, 3.0)]
    assert "train/temperature_c" not in a.Tags()["tensors"]
    assert "test/loss" not in b.Tags()["tensors"]
