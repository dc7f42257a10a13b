"""`ryot-deploy watch`: a run followed live from another terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option
from ryot.events import Event, EventReader

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
    from ryot.errors import ConfigError
    from ryot.run.folder import RunFolder
    from ryot.run.lock import is_held

    folder = RunFolder(run)
    if not folder.events.exists():
        raise ConfigError(f"run {run}: has no {folder.events.name}, so it is not a run folder")

    with (
        contextlib.closing(EventReader(folder.events)) as reader,
        Progress() as show,
        contextlib.ExitStack() as closing,
    ):
        listeners: list[Callable[[Event], None]] = [show]
        if tensorboard:
            from ryot.report.tensorboard import TensorBoardExport

            export = TensorBoardExport(tensorboard)
            closing.callback(export.close)
            listeners.append(export)
        while True:
            alive = is_held(folder)
            for event in reader.read():
                for listener in listeners:
                    listener(event)
            if once or not alive:
                return
            time.sleep(_POLL_S)
