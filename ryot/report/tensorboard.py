"""A run's curves for TensorBoard: one folder per training, so that they lie over each other in one plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ryot.errors import ConfigError
from ryot.events import EvalEvent, Event, PassEvent, ReinforceEvent, StepEvent

#: What a step event carries that makes a curve.
_STEP_CURVES = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "rss_bytes", "temperature_c", "frequency_mhz")

_REINFORCE_CURVES = ("reward", "entropy", "length", "cut", "mismatch", "kl", "grad_norm", "rollout_s", "update_s")


class TensorBoardExport:
    """Writes each event it is called with into `folder`; the step axis is training tokens, or reinforced steps."""

    def __init__(self, folder: Path):
        """Raises `ConfigError` when the package tensorboard is not installed."""
        try:
            from tensorboard.summary import Writer
        except ModuleNotFoundError as error:
            raise ConfigError(
                "tensorboard is not installed, which its event files need", hint="pip install 'ryot[tensorboard]'"
            ) from error
        self.folder = folder
        self._new_writer = Writer
        self._writers: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        """Write the curves' points that the event holds, if any."""
        if isinstance(event, StepEvent):
            for name in _STEP_CURVES:
                value = getattr(event, name)
                if value is not None:
                    self._add(event, f"train/{name}", value)
        elif isinstance(event, EvalEvent):
            self._add(event, f"{event.split}/loss", event.loss)
            self._add(event, f"{event.split}/bits_per_byte", event.bits_per_byte)

        elif isinstance(event, ReinforceEvent):
            for name in _REINFORCE_CURVES:
                value = getattr(event, name)
                if value is not None:
                    self._add(event, f"reinforce/{name}", value, event.step)
        elif isinstance(event, PassEvent):
            self._add(event, "reinforce/pass_at_1", event.pass_at_1, event.reinforce_step)
            self._add(event, "reinforce/pass_at_k", event.pass_at_k, event.reinforce_step)

    def _add(
        self,
        event: StepEvent | EvalEvent | ReinforceEvent | PassEvent,
        tag: str,
        value: float,
        position: int | None = None,
    ) -> None:
        name = f"{event.variant}/seed-{event.seed}"
        if name not in self._writers:
            self._writers[name] = self._new_writer(str(self.folder / name))
        if position is None:
            assert isinstance(event, (StepEvent, EvalEvent))
            position = event.tokens
        self._writers[name].add_scalar(tag, value, position)

    def close(self) -> None:
        """Flush and close all files."""
        for writer in self._writers.values():
            writer.close()
