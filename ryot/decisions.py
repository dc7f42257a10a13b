"""Decisions that this machine has measured, one JSON file each, kept for the next time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ryot.atomic import write_atomically
from ryot.errors import ConfigError
from ryot.mapping import build_from_mapping, to_mapping

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def recall(path: Path, cls: type[T], measure: Callable[[], T]) -> tuple[T, bool]:
    """(the decision, a dataclass `cls`; whether it was kept at `path`); one that is not there is measured and kept.

    A file that is cut short, or that another version wrote in another shape, is measured again and replaced: it holds
    nothing that cannot be found out anew.
    """
    try:
        return build_from_mapping(cls, json.loads(path.read_text(encoding="utf-8")), str(path)), True
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        log.info("%s: measured again, what was kept there cannot be read (%s)", path, error)
    decision = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(to_mapping(decision, keep_none=True), indent=1))
    except OSError as error:
        log.warning("%s: not kept, it will be measured again next time (%s)", path, error.strerror or error)
    return decision, False
