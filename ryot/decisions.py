"""Decisions that this machine has measured, one JSON file each, kept for the next time."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ryot.atomic import write_atomically
from ryot.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")


def recall(path: Path, build: Callable[[Mapping[str, Any]], T], measure: Callable[[], T]) -> tuple[T, bool]:
    """(the decision, whether it was kept at `path`); one that is not there is measured and kept.

    `build` makes the decision, a dataclass, of what was kept. A file that is cut short, or that another version wrote
    in another shape, is measured again and replaced: it holds nothing that cannot be found out anew.
    """
    try:
        return build(json.loads(path.read_text(encoding="utf-8"))), True
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        log.info("%s: measured again, what was kept there cannot be read (%s)", path, error)
    decision = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dataclasses.asdict(decision), indent=1))  # type: ignore[call-overload]
    except OSError as error:
        log.warning("%s: not kept, it will be measured again next time (%s)", path, error.strerror or error)
    return decision, False
