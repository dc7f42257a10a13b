"""Safety gates: what stops a training before it wastes its budget, checked on every step."""

from __future__ import annotations

import math

from ryot.errors import TrainingError

#: A gradient norm above this, before clipping, is a training that has come apart: healthy ones stay below 100 here.
MAX_GRAD_NORM = 1e4

#: A loss this far above that of guessing (ln V) is a training that has come apart.
MAX_LOSS_ABOVE_GUESSING = 3.0


def check_step(step: int, loss: float, grad_norm: float, *, first_loss: float, vocab_size: int) -> None:
    """Raise `TrainingError` naming the gate when loss or gradient of a step is not finite or out of bounds.

    `first_loss` is that of the first step: an initialization may start above guessing.
    """
    limit = max(first_loss, math.log(vocab_size)) + MAX_LOSS_ABOVE_GUESSING
    if not math.isfinite(loss):
        raise TrainingError(f"gate loss: loss is {loss} at step {step}, expected a finite number")
    if not math.isfinite(grad_norm):
        raise TrainingError(f"gate grad_norm: gradient norm is {grad_norm} at step {step}, expected a finite number")
    if loss > limit:
        raise TrainingError(f"gate loss: loss is {loss:.3f} at step {step}, expected at most {limit:.3f}")
    if grad_norm > MAX_GRAD_NORM:
        raise TrainingError(
            f"gate grad_norm: gradient norm is {grad_norm:.3g} at step {step}, expected at most {MAX_GRAD_NORM:g}"
        )
