"""Every error that ryot raises on purpose, and the exit code each one ends a command with.

RyotError                 1  something failed
├── ConfigError           2  an option, a recipe, a target or a path named by the user is wrong
├── DataError             1  the corpus cannot be used
├── CheckpointError       1  a checkpoint is cut short, changed or of a newer schema
├── TrainingError         1  a safety gate stopped a variant
├── ExportError           1  a graph cannot be built from these weights
├── BundleError           1  a bundle is cut short, changed or of a newer schema
│   └── ContextError      1  more tokens were asked for than the context holds
├── MeasureError          1  a measurement could not be taken
├── ClusterError          1  Ray cannot be started, reached or used
├── TargetMissed          3  a target was missed, or the measurement cannot tell
├── QualityError          4  a gate failed: no form is left to package, or one asked for by name breached
└── Interrupted         130  a signal ended the run; it can be resumed
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TARGET_MISSED = 3
EXIT_QUALITY = 4
EXIT_INTERRUPTED = 130


class RyotError(Exception):
    """Something failed; `hint` is the next command or change to try, where there is one."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling; these cross processes.
        return (_rebuild, (type(self), str(self), self.hint))


def _rebuild(cls: type[RyotError], message: str, hint: str | None) -> RyotError:
    return cls(message, hint=hint)


class ConfigError(RyotError):
    """An option, a recipe, a target or a path named by the user is wrong."""

    exit_code = EXIT_USAGE


class DataError(RyotError):
    """The corpus cannot be used."""


class CheckpointError(RyotError):
    """A checkpoint is cut short, changed or of a newer schema."""


class TrainingError(RyotError):
    """A safety gate stopped a variant."""


class ExportError(RyotError):
    """A graph cannot be built from these weights."""


class BundleError(RyotError):
    """A bundle is cut short, changed or of a newer schema."""


class ContextError(BundleError):
    """More tokens were asked for than the context holds."""


class MeasureError(RyotError):
    """A measurement could not be taken."""


class ClusterError(RyotError):
    """Ray cannot be started, reached or used."""


class TargetMissed(RyotError):
    """A target was missed, or the measurement cannot tell."""

    exit_code = EXIT_TARGET_MISSED


class QualityError(RyotError):
    """A gate failed: no form is left to package, or one asked for by name breached."""

    exit_code = EXIT_QUALITY


class Interrupted(RyotError):
    """A signal ended the run; it can be resumed."""

    exit_code = EXIT_INTERRUPTED


#: When several things went wrong in one run, the first of these that happened is its exit code.
EXIT_PRECEDENCE = (EXIT_USAGE, EXIT_INTERRUPTED, EXIT_FAILED, EXIT_QUALITY, EXIT_TARGET_MISSED, EXIT_OK)


def worst_exit_code(codes: list[int]) -> int:
    """The one exit code that stands for all of `codes`; 0 for none."""
    return min(codes, key=EXIT_PRECEDENCE.index, default=EXIT_OK)
