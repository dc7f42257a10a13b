"""The files for real clusters, as far as they can be checked without one."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from ryot.errors import ConfigError

CLUSTER = Path(__file__).parents[2] / "cluster"
ROOT = CLUSTER.parent
RAY_UP = ["onprem.yaml", "aws.yaml"]
MANIFESTS = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/rayservice.yaml"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_version() -> str:
    """The tested version of Ray."""
    found = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def ray_cluster(name: str) -> dict[str, Any]:
    """The RayCluster spec of a manifest."""
    manifest = load(name)
    spec = manifest["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        manifest["kind"]
    ]


def start_commands(config: dict[str, Any]) -> list[str]:
    return config["head_start_ray_commands"] + config["worker_start_ray_commands"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(load(name)))
    broken = prepare_config(load(name)) | {"max_workers": "many"}
    with pytest.raises(Exception, match="many"):  # jsonschema's own error, which Ray passes on
        validate_config(broken)


@pytest.mark.parametrize("name", RAY_UP)
def test_every_ray_start_has_options_that_this_ray_knows(name: str) -> None:
    started = [c for c in start_commands(load(name)) if "ray start" in c]
    assert len(started) == 2
    for command in started:
        words = shlex.split(command.partition("ray start ")[2].replace("$RAY_HEAD_IP", "10.0.0.1"))
        # Parsing checks names, types and choices, and starts nothing.
        ray_start.make_context("start", words, resilient_parsing=False)
    with pytest.raises(click.UsageError, match="redis-shards"):
        ray_start.make_context("start", ["--redis-shards=2"])


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_demands_the_token_and_reports_nothing(name: str) -> None:
    config = load(name)
    for command in start_commands(config):
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert "--disable-usage-stats" in command
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--include-dashboard=false" in config["head_start_ray_commands"][1]


def test_the_on_prem_cluster_always_uses_all_its_machines() -> None:
    config = load("onprem.yaml")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_of_kuberays_api_with_the_tested_ray_in_every_image(name: str) -> None:
    manifest, spec = load(name), ray_cluster(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert spec["rayVersion"] == ray_version()
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        assert container["image"] == f"ryot-worker:{ray_version()}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_whole_cores_of_their_own_room_for_the_object_store_and_their_volumes(name: str) -> None:
    spec = ray_cluster(name)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["resources"]["limits"]["cpu"].isdigit()
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        [shm] = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        assert int(shm["sizeLimit"].removesuffix("Mi")) * 2**20 > max(store, 78_643_200)
        assert all(re.fullmatch(r"[\w-]+", parameter) for parameter in group["rayStartParams"])


def test_the_job_runs_in_the_cluster_that_the_standing_manifest_describes() -> None:
    standing, job = ray_cluster("kuberay/raycluster.yaml"), ray_cluster("kuberay/rayjob.yaml")
    for group in [job["headGroupSpec"], *job["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        container["env"] = [e for e in container["env"] if e["name"] != "RYOT_RUN"]
    assert job == standing


def test_the_jobs_command_is_one_that_ryot_has() -> None:
    from ryot.cli.main import main

    entrypoint = load("kuberay/rayjob.yaml")["spec"]["entrypoint"]
    [_, _, script] = shlex.split(entrypoint)
    commands = re.findall(r"exec ryot-deploy (\S+) ([^;]*);", script)
    assert len(commands) == 2
    for name, options in commands:
        command = main.get_command(click.Context(main), name)
        known = {o for p in command.params for o in p.opts}
        given = {w for w in options.split() if w.startswith("-")}
        assert given <= known
    assert load("kuberay/rayjob.yaml")["spec"]["shutdownAfterJobFinishes"] is True


def test_the_measuring_nodes_carry_the_resource_that_bench_on_names() -> None:
    for name in MANIFESTS[:2]:
        [group] = [g for g in ray_cluster(name)["workerGroupSpecs"] if g["groupName"] == "measure"]
        # KubeRay wants the JSON quoted once more.
        assert json.loads(json.loads(group["rayStartParams"]["resources"].strip("'"))) == {"measure": 1}
    assert load("aws.yaml")["available_node_types"]["measure"]["resources"] == {"measure": 1}


def test_the_service_imports_what_is_there_and_gives_it_what_it_takes(tmp_path: Path) -> None:
    config = yaml.safe_load(load("kuberay/rayservice.yaml")["spec"]["serveConfigV2"])
    [application] = config["applications"]
    module, name = application["import_path"].split(":")
    build = getattr(importlib.import_module(module), name)
    keys = tmp_path / "keys"
    keys.write_text("one two\n")
    mounts = ray_cluster("kuberay/rayservice.yaml")["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    folders = [mount["mountPath"] for mount in mounts]
    args = application["args"]
    assert all(path.startswith(tuple(folders)) for path in (*args["bundles"], args["api_keys_file"]))
    assert build(args | {"api_keys_file": str(keys)}) is not None
    with pytest.raises(ConfigError, match="rowz"):
        build({"bundles": ["x"], "rowz": 3})


def test_the_worker_image_has_the_tested_versions_and_what_the_manifests_call() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"ryot-worker:{ray_version()}" in text
    assert "-c /tmp/constraints.txt" in text
    assert "USER ryot" in text
    for path in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in path.split():
            assert (ROOT / name).exists(), name
    extra = re.search(r'"\.\[([\w-]+)\]"', text)
    assert extra
    assert extra[1] in project["project"]["optional-dependencies"]
    python = re.search(r"^FROM python:(\d+\.\d+)-", text, re.MULTILINE)
    assert python
    assert python[1] == "3.11"


def test_the_readme_names_every_file_and_only_files_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    there = {
        p.relative_to(CLUSTER).as_posix()
        for p in CLUSTER.rglob("*")
        if p.is_file() and p.name != "README.md" and "__pycache__" not in p.parts
    }
    assert named == there
    for path in re.findall(r"`((?:ryot|tests)/[\w/]+\.py)`", text):
        assert (ROOT / path).exists(), path
