"""The files that put the server on a machine, as far as they can be checked without one."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import click
import yaml

from ryot.cli.serve import command
from ryot.serve.app import OPEN_PATHS, Service, build_app
from ryot.serve.server import ServerOptions

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "deploy" / "server"


def options_of(words: list[str]) -> dict[str, object]:
    """What `ryot-deploy serve` reads from these words; it refuses what it does not know."""
    return command.make_context("serve", words, resilient_parsing=False).params


def test_the_unit_starts_ends_and_reloads_the_server() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(SERVER / "ryot-serve.service")
    service = unit["Service"]
    program, name, bundle, *words = shlex.split(service["ExecStart"])
    assert (Path(program).name, name) == ("ryot-deploy", "serve")
    params = options_of([str(ROOT), *words])
    # DynamicUser may write there alone.
    assert params["prefix_folder"] == Path("/var/lib") / service["StateDirectory"]
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID" and service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > ServerOptions().drain_s
    assert bundle in (SERVER / "ryot-serve.service").read_text().partition("[Unit]")[0]


def test_the_image_starts_the_server() -> None:
    text = (SERVER / "Dockerfile").read_text()
    found = re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    assert found
    program, name, _, *words = json.loads(found[1])
    assert (program, name) == ("ryot-deploy", "serve")
    assert options_of([str(ROOT), *words])["host"] == "0.0.0.0"
    for path in re.findall(r"^COPY (.+) \\S+$", text, re.MULTILINE):
        assert all((ROOT / part).exists() for part in path.split())
    assert "USER ryot" in text and "/ready" in text


def test_the_deployment_waits_until_ready_and_lets_requests_end() -> None:
    deployment, service = yaml.safe_load_all((SERVER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    words = [str(ROOT), *container["args"], "--host", "0.0.0.0"]
    assert options_of(words)["prefix_folder"] in [Path(m["mountPath"]) for m in container["volumeMounts"]]
    paths = {route.path for route in build_app(Service())._app.routes}  # type: ignore[attr-defined]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert path in paths and path in OPEN_PATHS
    assert pod["terminationGracePeriodSeconds"] > ServerOptions().drain_s
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["ports"][0]["targetPort"] in [port["name"] for port in container["ports"]]
    assert isinstance(command, click.Command)
