"""`ryot-deploy watch`: a run followed live from another terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option
from ryot.events import EVENT_TYPES, Event, event_from_dict

_POLL_S = 0.2


@click.command("watch", context_settings=HELP)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Show what has happened so far and stop")
@click.option(
    "--tensorboard",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the curves as TensorBoard event files, too",
)
@verbose_option
def command(run: Path, once: bool, tensorboard: Path | None) -> None:
    """Follow a run's events from another terminal, until the run ends or you press Ctrl-C.

    Example: ryot-deploy watch runs/first
    """
    from ryot.cli.progress import Progress
    from ryot.cluster.journal import is_held
    from ryot.errors import ConfigError

    path = run / "events.jsonl"
    if not path.exists():
        raise ConfigError(f"run {run}: has no events.jsonl, so it is not a run folder")

    with path.open(encoding="utf-8") as lines, Progress() as show, contextlib.ExitStack() as closing:
        listeners: list[Callable[[Event], None]] = [show]
        if tensorboard:
            from ryot.report.tensorboard import TensorBoardExport

            export = TensorBoardExport(tensorboard)
            closing.callback(export.close)
            listeners.append(export)
        rest = ""
        while True:
            alive = is_held(run)
            for line in lines:
                rest += line
                if rest.endswith("\n"):
                    values, rest = json.loads(rest), ""
                    if values["kind"] in EVENT_TYPES:
                        for listener in listeners:
                            listener(event_from_dict(values))
            if once or not alive:
                return
            time.sleep(_POLL_S)
