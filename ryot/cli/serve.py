"""`ryot-deploy serve`: bundles over HTTP, with OpenAI's API."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.model_options import MEGABYTE, address_option, build_model_options, model_options
from ryot.cli.options import HELP, verbose_option
from ryot.errors import ConfigError

if TYPE_CHECKING:
    from ryot.serve.model import ServedModel


def _check_verifiers(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        kind, _, function = value.partition("=")
        if value not in ("tests", "command") and (kind != "entry_point" or ":" not in function):
            raise click.BadParameter(f"{value!r} is not one of tests, command, entry_point=MODULE:FUNCTION")
    return values


@click.command("serve", context_settings=HELP)
@click.argument(
    "bundles",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="BUNDLE...",
)
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Address to listen on")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one",
)
@click.option(
    "--api-key",
    "api_keys",
    metavar="KEY",
    multiple=True,
    envvar="RYOT_API_KEY",
    help="Key that requests must bring; repeatable, and needed where other machines can connect  [env: RYOT_API_KEY]",
)
@model_options(threads=1, rows=16)
@click.option(
    "--max-waiting", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait"
)
@click.option(
    "--prefix-folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep them here when the server ends  [default: they are forgotten]",
)
@click.option(
    "--speculate",
    is_flag=True,
    help="Compute several tokens at once where one text repeats itself and that pays; takes the weights once more, and "
    "may take another of two tokens that are nearly as likely",
)
@click.option("--share-prefixes", is_flag=True, help="Share beginnings between API keys too")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), metavar="S", default=600.0, show_default=True, help="Time of a request"
)
@click.option(
    "--drain", type=click.IntRange(min=0), metavar="S", default=30, show_default=True, help="Time to finish at the end"
)
@click.option(
    "--max-body",
    type=click.FloatRange(min=0.001),
    metavar="MB",
    default=4.0,
    show_default=True,
    help="Size of a request",
)
@click.option(
    "--tls-certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificate (PEM)"
)
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its private key (PEM)")
@click.option(
    "--allow-verifier",
    "allowed_verifiers",
    metavar="KIND",
    multiple=True,
    callback=_check_verifiers,
    help="Let requests have programs run: tests and command in a sandbox, entry_point=MODULE:FUNCTION, that one alone, "
    "in the server itself; repeatable",
)
@click.option(
    "--metrics-to",
    metavar="URL",
    help="Send counts and latencies, no text, to this OTLP receiver every minute  [default: to nobody]",
)
@address_option
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    metavar="N",
    default=4,
    show_default=True,
    help="With --address: replicas at most, as requests queue up",
)
@click.option("--no-access-log", is_flag=True, help="Do not log a line for each request")
@verbose_option
def command(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    threads: int,
    rows: int,
    max_waiting: int,
    context: int | None,
    kv_memory: int | None,
    prefix_cache: int,
    prefix_folder: Path | None,
    speculate: bool,
    share_prefixes: bool,
    timeout: float,
    drain: int,
    max_body: float,
    tls_certificate: Path | None,
    tls_key: Path | None,
    allowed_verifiers: tuple[str, ...],
    metrics_to: str | None,
    address: str | None,
    replicas: int,
    no_access_log: bool,
) -> None:
    """Answer requests of OpenAI's API with bundles: completions, chats, streams, and a page to try them.

    Example: ryot-deploy serve runs/first/bundle
    """
    if address is None:
        # A reload that is asked for before the bundles are read is done by reading them.
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    from ryot.serve.server import ServerOptions, run_server

    logging.getLogger("ryot.serve.access").setLevel(logging.WARNING if no_access_log else logging.INFO)
    # It warns of each write to a client that has gone, which is no fault.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    model = build_model_options(
        threads,
        rows,
        context,
        kv_memory,
        prefix_cache,
        max_waiting=max_waiting,
        prefix_folder=prefix_folder,
        speculate=speculate,
        allowed_verifiers=frozenset(allowed_verifiers),
    )
    options = ServerOptions(
        host=host,
        port=port,
        api_keys=api_keys,
        share_prefixes=share_prefixes,
        max_body_bytes=int(max_body * MEGABYTE),
        timeout_s=timeout,
        drain_s=drain,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        metrics_to=metrics_to,
    )
    if address is None:
        run_server(bundles, model, options, _announce)
        return
    from ryot.cluster.options import ClusterOptions
    from ryot.cluster.serving import check_installed, deploy

    if tls_certificate is not None:
        raise ConfigError("TLS: Ray Serve's proxies have none", hint="end it in front of them")
    if metrics_to is not None:
        raise ConfigError("--metrics-to: replicas on Ray send nothing", hint="have each one's /metrics read")
    if prefix_folder is not None:
        raise ConfigError(
            "--prefix-folder: is of no use with --address, where each replica has a machine of its choice"
        )
    check_installed()
    where = deploy(bundles, model, options, ClusterOptions(address=address, malloc_tunables=""), max_replicas=replicas)
    sys.stderr.write(f"deployed at {where}/v1; 'serve shutdown' on a node of the cluster ends it\n")


def _announce(address: str, models: Sequence[ServedModel]) -> None:
    names = ", ".join(model.name for model in models)
    sys.stderr.write(f"ready: {names} at {address}/v1 (a page to try it: {address}/)\n")
    sys.stderr.flush()
