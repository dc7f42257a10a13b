"""A tiny bundle as a device gets it: with its runtime, `run.py` and requirements."""

from __future__ import annotations

import json
from pathlib import Path

from ryot.deploy.bundle import write_json, write_manifest, write_requirements
from ryot.deploy.runtime import copy_runtime
from ryot.deploy.sbom import SBOM_NAME, build_sbom
from tests.edge.tiny_bundle import write_bundle


def write_device_bundle(folder: Path, *, seed: int = 0, **fields: object) -> Path:
    """A whole bundle; `fields` replace values of its manifest."""
    write_bundle(folder, seed=seed)
    copy_runtime(folder)
    write_requirements(folder, "1.20")
    values = json.loads((folder / "ryot_manifest.json").read_text()) | fields
    write_json(folder / SBOM_NAME, build_sbom(folder, values))
    write_manifest(folder, values)
    return folder
