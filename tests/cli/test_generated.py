"""Options that are made from dataclasses: adding one is adding a field."""

from __future__ import annotations

from dataclasses import dataclass, fields

import click
import pytest
from click.testing import CliRunner, Result

from ryot.cli.cluster_run import command
from ryot.cli.generated import build_given, options_from
from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.run.options import RunOptions, option


@dataclass(frozen=True, kw_only=True)
class Example:
    count: int = option(3, "How many", metavar="N", at_least=1)
    names: tuple[str, ...] = option(("a", "b"), "Which", metavar="LIST")
    paths: tuple[str, ...] = option((), "Where", metavar="PATH", repeated=True)
    hours: float | None = option(None, "How long", metavar="H", above=0)
    fast: bool = option(False, "Whether")
    tidy: bool = option(True, "Whether, too")
    host: str = option("", "Which machine", metavar="HOST", envvar="EXAMPLE_HOST", flag="on-host")
    inner: int = 7


@click.command()
@options_from(Example)
@click.pass_context
def example(ctx: click.Context, **_: object) -> None:
    click.echo(repr(build_given(ctx, Example)))


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(example, arguments, env=environment)


def test_what_is_not_given_stays_at_the_fields_default() -> None:
    assert run().output.strip() == repr(Example())


def test_each_kind_of_field_is_read() -> None:
    given = run(
        "--count", "4", "--names", "c,d", "--paths", "x", "--paths", "y", "--hours", "0.5", "--fast", "--no-tidy",
        EXAMPLE_HOST="there",
    )  # fmt: skip
    expected = Example(count=4, names=("c", "d"), paths=("x", "y"), hours=0.5, fast=True, tidy=False, host="there")
    assert given.output.strip() == repr(expected)
    assert run("--on-host", "here", EXAMPLE_HOST="there").output.strip() == repr(Example(host="here"))


@pytest.mark.parametrize("arguments", [("--count", "0"), ("--hours", "0"), ("--inner", "8"), ("--count", "x")])
def test_what_a_field_does_not_allow_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_every_option_of_a_run_is_on_the_command_line_with_its_default() -> None:
    shown = {name for parameter in command.params for name in parameter.opts}
    assert {f"--{f.name.replace('_', '-')}" for f in fields(RunOptions)} <= shown
    assert {"--address", "--bench-on", "--max-hours", "--keep-checkpoints"} <= shown
    text = " ".join(CliRunner().invoke(command, ["-h"]).output.split())
    assert f"[default: {DriverOptions().keep_checkpoints}; x>=1]" in text
    assert f"[default: {','.join(RunOptions().variants)}]" in text
    assert ClusterOptions().address is None and "[env: RAY_ADDRESS;" in text
