"""`ryot-deploy doctor`: what this machine is and what would be used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys

import click

from ryot.cli.options import HELP, cache_dir, format_option, verbose_option

_PACKAGES = ("ryot", "numpy", "onnxruntime", "tokenizers", "torch", "onnx", "ray", "matplotlib")


@click.command("doctor", context_settings=HELP)
@format_option("table", "json")
@verbose_option
def command(fmt: str) -> None:
    """Show CPU, instruction sets, cores, memory, versions, and what would be used.

    Example: ryot-deploy doctor --format json
    """
    from ryot.edge.machine import describe_cpu, sums_int8_exactly

    cpu = describe_cpu()
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    facts = {
        "cpu": cpu["model"],
        "isa": cpu["isa"],
        "cores": cpu["cores"],
        "caches": cpu["caches"],
        "ram_bytes": cpu["ram_bytes"],
        "disk_free_bytes": shutil.disk_usage(".").free,
        "python": sys.version.split()[0],
        "versions": versions,
        "cache_dir": str(cache_dir()),
        "ray_address": os.environ.get("RAY_ADDRESS"),
        "would_use": {
            "training_actors_at_once": cpu["cores"],
            "compile": bool(shutil.which("g++") or shutil.which("clang++")),
            "int8_weight_bits": 8 if sums_int8_exactly(cpu["isa"]) else 7,
            "memory_limit": _memory_limit(),
        },
        "missing": missing,
    }
    if fmt == "json":
        click.echo(json.dumps(facts, indent=1))
        return
    use = facts["would_use"]
    assert isinstance(use, dict)
    rows = [
        ("cpu", cpu["model"]),
        ("instruction sets", ", ".join(cpu["isa"]) or "none that kernels are chosen by"),
        ("cores", cpu["cores"]),
        ("caches", ", ".join(f"{level} {size >> 10} KiB" for level, size in cpu["caches"].items())),
        ("memory", f"{cpu['ram_bytes'] / 1e9:.1f} GB"),
        ("disk free here", f"{facts['disk_free_bytes'] / 1e9:.1f} GB"),  # type: ignore[operator]
        ("python", facts["python"]),
        *((name, version or "not installed") for name, version in versions.items()),
        ("cache", facts["cache_dir"]),
        ("cluster", facts["ray_address"] or "embedded, loopback only"),
        ("trainings at once", use["training_actors_at_once"]),
        ("torch.compile", "tried where it can pay" if use["compile"] else "no C++ compiler"),
        ("int8-dyn weights", f"{use['int8_weight_bits']} bits"),
        ("memory limits", use["memory_limit"]),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
    if missing:
        click.echo(f"{', '.join(missing)} not installed: pip install 'ryot[all]' for training and export", err=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_limit() -> str:
    writable = any(
        os.access(path, os.W_OK) for path in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/cgroup.subtree_control")
    )
    return "enforced by a cgroup" if writable else "checked afterwards (no cgroup can be made here)"
