"""Safety gates: what stops a training before it wastes its budget, checked on every step."""

from __future__ import annotations

import math

from ryot.errors import TrainingError

#: A gradient norm above this, before clipping, is a training that has come apart: healthy ones stay below 100 here.
MAX_GRAD_NORM = 1e4

#: A loss this far above that of guessing (ln V) is a training that has come apart.
MAX_LOSS_ABOVE_GUESSING = 3.0


class GateBreach(TrainingError):
    """A figure of one step was not finite or above its limit."""

    def __init__(self, gate: str, what: str, step: int, value: float, limit: float):
        self.gate, self.what, self.step, self.value, self.limit = gate, what, step, value, limit
        wanted = f"at most {limit:.6g}" if math.isfinite(value) else "a finite number"
        super().__init__(f"gate {gate}: {what} is {value:.6g} at step {step}, expected {wanted}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.gate, self.what, self.step, self.value, self.limit)


def check_step(step: int, loss: float, grad_norm: float, *, first_loss: float, vocab_size: int) -> None:
    """Raise `GateBreach` when loss or gradient of a step is not finite or out of bounds.

    `first_loss` is that of the first step: an initialization may start above guessing.
    """
    highest = max(first_loss, math.log(vocab_size)) + MAX_LOSS_ABOVE_GUESSING
    figures = [("loss", "loss", loss, highest), ("grad_norm", "gradient norm", grad_norm, MAX_GRAD_NORM)]
    # What is not finite explains what is merely large.
    for gate, what, value, limit in sorted(figures, key=lambda f: math.isfinite(f[2])):
        if not value <= limit:
            raise GateBreach(gate, what, step, value, limit)
