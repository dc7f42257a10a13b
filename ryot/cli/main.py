"""`ryot-deploy`: the group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback
from typing import NoReturn

import click

from ryot import __version__
from ryot.cli.options import check_utf8
from ryot.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RyotError
from ryot.run.signals import interrupt_on_signals

#: Command, module under `ryot.cli`. A module is imported only when its command is asked for or listed in full.
COMMANDS = {
    "cluster-run": ("cluster_run", "Train the variants, export, measure, judge and bundle the best"),
    "watch": ("watch", "Follow a run live from another terminal"),
    "train": ("train", "Train one variant in this process"),
    "slice": ("slice", "Cut an elastic checkpoint to a narrower width"),
    "export": ("export", "Export a checkpoint as bundles, one per precision"),
    "bench": ("bench", "Measure bundles in fresh processes"),
    "compare": ("compare", "Compare two runs, bundles or reports, or measure both now"),
    "reproduce": ("reproduce", "Measure a report's artifacts again and say whether it agrees"),
    "eval": ("eval", "Score a bundle on any text: bits per byte, KL, top-1"),
    "generate": ("generate", "Generate text with a bundle"),
    "serve": ("serve", "Answer requests of OpenAI's API with bundles"),
    "batch": ("batch", "Answer a file of requests"),
    "sign": ("sign", "Sign bundles, and make keys for it"),
    "verify": ("verify", "Check a bundle's or archive's signature, files and golden tokens"),
    "pack": ("pack", "Pack a bundle into one file"),
    "unpack": ("unpack", "Unpack such a file, whole and verified or not at all"),
    "push": ("push", "Put a bundle onto devices, verify and measure it there"),
    "fleet": ("fleet", "Show what devices run, and take them back to the version before"),
    "tune": ("tune", "Time kernels and weight formats on this machine"),
    "targets": ("targets", "List the limits that artifacts are judged by"),
    "runs": ("runs", "List, show and remove run folders"),
    "doctor": ("doctor", "Show this machine and what would be used"),
}


class _Commands(click.Group):
    """Loads a command's module when it is needed, so that help is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"ryot.cli.{COMMANDS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from ryot.config import unknown

        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(unknown("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ryot-deploy")
@click.option("-v", "--verbose", is_flag=True, help="Show logs, decisions with their evidence, and tracebacks")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Train small language models on a cluster and ship them to edge CPUs as quantized ONNX.

    Example: ryot-deploy cluster-run --quick
    """
    ctx.obj = verbose
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s" if verbose else "%(message)s",
        stream=sys.stderr,
    )


def run(args: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code (see `ryot/errors.py`)."""
    arguments = sys.argv[1:] if args is None else args
    verbose = bool({"-v", "--verbose"} & set(arguments))
    interrupt_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a test's
            stream.reconfigure(errors="backslashreplace")
    try:
        for number, argument in enumerate(arguments, start=1):
            check_utf8(f"argument {number}", argument)
        code = main.main(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        _complain(error.format_message(), _usage_hint(error))
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        _complain(error.format_message(), None)
        sys.exit(EXIT_USAGE)
    except RyotError as error:
        if verbose:
            traceback.print_exc()
        _complain(str(error), error.hint)
        _end(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted", None)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)
    except ModuleNotFoundError as error:
        if verbose:
            traceback.print_exc()
        _complain(
            f"this command needs {error.name}, which is not installed",
            "a base install has what a device needs; for training and export: pip install 'ryot[all]'",
        )
        sys.exit(EXIT_FAILED)
    except Exception as error:  # the outermost edge: a bug still gets one line, and a way to see more
        if verbose:
            traceback.print_exc()
        _complain(f"{type(error).__name__}: {error}", None if verbose else "run again with -v for the traceback")
        sys.exit(EXIT_FAILED)


def _end(code: int) -> NoReturn:
    """End the process; on the spot where a second Ctrl-C has given up an export that is still in native code."""
    from ryot.cluster.callbacks import is_busy

    if is_busy():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(message: str, hint: str | None) -> None:
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def _usage_hint(error: click.UsageError) -> str:
    return f"see '{error.ctx.command_path if error.ctx else 'ryot-deploy'} -h'"
