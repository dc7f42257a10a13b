"""The server's description of itself, held against what it does by schemathesis."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ryot.serve.app import build_routes
from tests.serve.conftest import Server
from tests.serve.test_http import get

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_the_description_names_what_is_there(server: Server) -> None:
    status, text = get(server, "/openapi.json")
    found = json.loads(text)
    assert status == 200 and found["openapi"].startswith("3.1")
    described = {(path, method.upper()) for path, methods in found["paths"].items() for method in methods}
    served = {
        (route.path.replace(":path}", "}"), method)
        for route in build_routes()
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert described == served
    for path, methods in found["paths"].items():
        if "get" in methods:
            assert get(server, path.replace("{name}", "tiny-1"))[0] == 200


@pytest.mark.slow
def test_what_is_drawn_from_the_description_is_answered_as_it_says(server: Server) -> None:
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"{server.address}/openapi.json", "--checks", CHECKS, "--max-examples", "25", "--seed", "1"]
    command += ["--phases", "examples,fuzzing", "--generation-deterministic", "--no-color", "--max-response-time", "60"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert get(server, "/health")[0] == 200
