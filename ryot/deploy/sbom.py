"""The bill of materials that every bundle carries: `sbom.cdx.json`, CycloneDX 1.6.

It names the model, its data, the code in `runtime/` and the packages that a device installs. Like the bundle it is the
same for the same inputs: no time, no random serial number. Packages have the range of versions that `requirements.txt`
asks for; which ones a device has is in its record.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import ryot
from ryot.mapping import Unchecked

SBOM_NAME = "sbom.cdx.json"
#: SPDX expressions of what a device installs, by the packages' metadata (onnxruntime 1.32, numpy 2.4, tokenizers 0.23).
_LICENSES = {
    "onnxruntime": "MIT",
    "numpy": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
    "tokenizers": "Apache-2.0",
}


def build_sbom(folder: Path, manifest: Unchecked) -> dict[str, object]:
    """The bill of materials of the bundle in `folder`, whose other files are written; `manifest` needs no file list."""
    name = manifest["name"]
    model_ref = f"model:{name}"
    provenance = {k: v for k, v in manifest["provenance"].items() if v}
    runtime = _tree_sha256(folder / "runtime")
    packages = [_package(line) for line in (folder / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    data = [_file(path) for path in sorted([*folder.glob("*.onnx"), *folder.glob("*.data"), folder / "tokenizer.json"])]
    model = {
        "type": "machine-learning-model",
        "bom-ref": model_ref,
        "name": name,
        "version": f"{manifest['variant'] or name}/seed-{manifest['seed']}/{manifest['precision']}",
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": manifest["model"]["architecture"],
                "modelArchitecture": f"{manifest['model']['num_parameters']} parameters",
                "inputs": [{"format": "token ids"}],
                "outputs": [{"format": "token ids"}],
            }
        },
        "properties": [
            {"name": f"ryot:provenance:{key}", "value": str(value)} for key, value in sorted(provenance.items())
        ],
        "components": data,
    }
    code = {
        "type": "library",
        "bom-ref": "pkg:pypi/ryot",
        "name": "ryot",
        "version": ryot.__version__,
        "purl": f"pkg:pypi/ryot@{ryot.__version__}",
        "description": "the modules in runtime/; the hash is of all of them, by name",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "hashes": [{"alg": "SHA-256", "content": runtime}],
    }
    refs = ["pkg:pypi/ryot", *(package["bom-ref"] for package in packages)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {"components": [{"type": "application", "name": "ryot-deploy", "version": ryot.__version__}]},
        },
        "components": [code, *packages],
        "dependencies": [
            {"ref": model_ref, "dependsOn": ["pkg:pypi/ryot"]},
            {"ref": "pkg:pypi/ryot", "dependsOn": refs[1:]},
            *({"ref": ref} for ref in refs[1:]),
        ],
    }


def _package(requirement: str) -> dict[str, object]:
    name = requirement.partition(">")[0].partition("<")[0].partition("=")[0].strip()
    license_ = {"licenses": [{"expression": _LICENSES[name]}]} if name in _LICENSES else {}
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}",
        "name": name,
        "purl": f"pkg:pypi/{name}",
        **license_,
        "properties": [{"name": "ryot:requirement", "value": requirement.strip()}],
    }


def _file(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "type": "file",
        "bom-ref": f"file:{path.name}",
        "name": path.name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _tree_sha256(folder: Path) -> str:
    """sha256 over the names and hashes of all files below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{digest}  {path.relative_to(folder).as_posix()}\n".encode())
    return found.hexdigest()
