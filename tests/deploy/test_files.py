"""The files for devices, as far as they can be checked without a container engine or a running systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "ryot.service"
MANIFEST = DEPLOY / "kubernetes" / "daemonset.yaml"


def manifest() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text())


def test_the_unit_is_sandboxed_and_says_nothing_that_systemd_does_not_know() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    checked = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", UNIT],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout.splitlines()[-1]
    assert "✓ User=/DynamicUser=" in rated.stdout and "✓ MemoryDenyWriteExecute=" in rated.stdout


def test_commands_of_unit_image_and_manifest_are_ones_that_ryot_has() -> None:
    from ryot.cli.main import main

    [unit] = re.findall(
        r"""^ExecStart=/bin/sh -c 'exec \S+/ryot-deploy (serve) "[^"]+" (.+)'$""", UNIT.read_text(), re.M
    )
    image = (DEPLOY / "Dockerfile").read_text()
    entry = " ".join(re.findall(r'"([^"]+)"', "".join(re.findall(r"^(?:ENTRYPOINT|CMD) (.+)$", image, re.M)))[1:])
    [container] = manifest()["spec"]["template"]["spec"]["containers"]
    for words in (" ".join(unit).split(), entry.split(), ["serve", "/bundle", *container["args"]]):
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_the_manifest_fits_kubernetes_own_schema() -> None:
    kubernetes_validate.validate(manifest(), "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest() | {"spec": {"template": 3}}, "1.33", strict=True)


def test_a_pod_runs_as_nobody_in_a_root_that_it_cannot_write() -> None:
    pod = manifest()["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    image = (DEPLOY / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}:" in image and f"{container['image']} ." in image


def test_the_dockerfile_passes_hadolint_and_copies_what_is_there() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    for paths in re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M):
        assert all((ROOT / path).exists() for path in paths.split())


def test_the_readme_names_every_file_that_lies_there() -> None:
    text = (DEPLOY / "README.md").read_text()
    tracked = subprocess.run(["git", "ls-files", "."], cwd=DEPLOY, capture_output=True, text=True, check=False)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout")
    own = [
        line for line in tracked.stdout.splitlines() if line.split("/")[0] in ("Dockerfile", "kubernetes", "systemd")
    ]
    assert len(own) == 3
    for name in own:
        assert f"| `{name}` |" in text
    for path in re.findall(r"`((?:ryot|tests)/[\w/]+\.(?:py|sh))`", text):
        assert (ROOT / path).exists(), path


def test_the_install_script_is_plain_sh() -> None:
    script = ROOT / "ryot" / "fleet" / "install.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    refused = subprocess.run(["/bin/sh", script], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and refused.stdout == ""
