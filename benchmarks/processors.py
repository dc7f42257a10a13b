"""Does a bundle answer on other processors as it does here, and does `int8-dyn` need its seventh bit left free?

    apt-get install qemu-user-static debootstrap gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    apt-get install gcc-arm-linux-gnueabihf libc6-dev-armhf-cross                       for the 32-bit line alone
    python benchmarks/processors.py [--folder DIR]                        as root: it needs chroot and mount

Small bundles with random weights are made here. Then qemu's user-mode emulation runs them as other processors: an
Arm of 64 bits, with and without dot products, from a Debian root and the wheels that PyPI has for it; x86 without VNNI
and without AVX2, from this environment. In each, `processors_worker.py` compares ids of texts, checks golden tokens
through both engines and writes logits, and the bundle's own run.py and the C program of deploy/native verify it.
What another processor gives is compared with what this one gives. No speed is measured: an emulator has none.

The Arm's root is kept in DIR (default: RYOT_CACHE_DIR or ~/.cache/ryot, `processors/`), 500 MB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, describe_setting, write_result
from small_bundles import make_bundles

from ryot.config import ModelConfig
from ryot.deploy.settings import ExportSettings

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent / "deploy" / "native"
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=512,
    dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    ff_dim=256,
    max_seq_len=128,
    tie_embeddings=False,
).spec
#: Bundles by name: precision, and bits of dynamic-int8 weights.
BUNDLES = {
    "fp32": ("fp32", 7),
    "int8": ("int8", 7),
    "int4": ("int4", 7),
    "int8-dyn, 7 bits": ("int8-dyn", 7),
    "int8-dyn, 8 bits": ("int8-dyn", 8),
    "int8-dyn+int4, 7 bits": ("int8-dyn+int4", 7),
}
#: What an Arm of 64 bits runs beside Python.
WHEELS = ("onnxruntime", "numpy", "tokenizers")
ARM64_TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
ARM32_TAGS = (
    "manylinux_2_31_armv7l",
    "manylinux_2_28_armv7l",
    "manylinux_2_17_armv7l",
    "manylinux2014_armv7l",
    "linux_armv7l",
)
#: A library asks the system what its processor is; under emulation that is another one, so the root has these.
ARM64_SYSTEM = {"sys/devices/system/cpu/possible": "0\n", "sys/devices/system/cpu/present": "0\n"}
CPUINFO = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\n"
#: Goes into the root, $0, with a /proc of its own, which onnxruntime needs for weights, and a core's cpuinfo, $1.
ENTER = (
    'mount -t proc proc "$0/proc" && mount --bind "$0/$1" "$0/proc/cpuinfo" && root=$0 && shift '
    '&& exec chroot "$root" "$@"'
)


@dataclass(frozen=True)
class Processor:
    """What is emulated, and by which words of qemu's."""

    name: str
    machine: str
    cpu: str
    part: str = ""
    """An Arm core's number; a library takes what it can do from that, too."""


PROCESSORS = (
    Processor("x86 with AVX2, without VNNI", "x86_64", "Haswell"),
    Processor("x86 with SSE4.2, without AVX", "x86_64", "Nehalem"),
    Processor("Arm without dot products", "aarch64", "cortex-a72", "0xd08"),
    Processor("Arm with dot products", "aarch64", "neoverse-n1", "0xd0c"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = Path(os.environ.get("RYOT_CACHE_DIR") or Path("~/.cache/ryot").expanduser())
    parser.add_argument("--folder", type=Path, default=cache / "processors", metavar="DIR", help="where the root is")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()
    root = make_root(options.folder.resolve())
    work = root / "made"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for bits in (7, 8):
        names = {name: kind for name, (kind, its_bits) in BUNDLES.items() if its_bits == bits}
        made = make_bundles(MODEL, names.values(), work / f"made-{bits}", settings=ExportSettings(dynamic_bits=bits))
        for name, kind in names.items():
            (work / "bundles").mkdir(exist_ok=True)
            shutil.move(made[kind], work / "bundles" / name)
    shutil.copy(HERE / "processors_worker.py", work)
    here = run_worker([sys.executable], work, work, "here")
    for machine in {processor.machine for processor in PROCESSORS}:
        build_native(machine, work, root)
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda processor: examine(processor, root, work, here), PROCESSORS)
        found = {processor.name: answer for processor, answer in zip(PROCESSORS, answers, strict=True)}
    values = {**describe_setting(), "qemu": first_line("qemu-aarch64-static", "--version"), "here": here["golden"]}
    values |= {"texts": len(here["ids"]), "processors": found, "armv7": examine_arm32(options.folder)}
    print(write_result("processors", values, render(values), options.output).read_text())


def make_root(folder: Path) -> Path:
    """A Debian for 64-bit Arm with Python and the bundle's packages; nothing of it was ever configured or started."""
    root = folder / "arm64"
    if (root / ".complete").exists():
        return root
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tell("a Debian for arm64")
    packages = ["--include=python3.11-minimal,python3.11,libstdc++6", "bookworm", root]
    call("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", *packages)
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        subprocess.run(
            f"dpkg-deb --fsys-tarfile {package} | tar -xf - -C {root} --keep-directory-symlink", shell=True, check=True
        )
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    download(folder / "wheels", ARM64_TAGS, wanted)
    for wheel in (folder / "wheels").iterdir():
        call(sys.executable, "-m", "zipfile", "-e", wheel, root / "site")
    shutil.copy(shutil.which("qemu-aarch64-static") or "qemu-aarch64-static", root)
    for name in ("proc", "sys"):
        if (root / name).is_symlink():  # debootstrap leads it to this machine's where it may not mount
            (root / name).unlink()
    for name, text in ARM64_SYSTEM.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / ".complete").touch()
    return root


def build_native(machine: str, work: Path, root: Path) -> None:
    """The C program for a machine, which finds onnxruntime where Python's is there."""
    make = ["make", "-s", "-C", NATIVE, f"BUILD={work / f'native-{machine}'}", f"PYTHON={sys.executable}"]
    if machine == "aarch64":
        library = next((root / "site/onnxruntime/capi").glob("libonnxruntime.so.*")).relative_to(root)
        make += ["CC=aarch64-linux-gnu-gcc", f"ORT_LIBRARY=/{library}"]
    call(*make)


def examine(processor: Processor, root: Path, work: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """What this processor answers, beside what this machine does."""
    if processor.machine == "aarch64":
        (root / processor.cpu).write_text(CPUINFO.format(part=processor.part))
        inside = ["sh", "-c", ENTER, str(root), processor.cpu, "/qemu-aarch64-static", "-cpu", processor.cpu]
        emulator = ["unshare", "--mount", *inside]
        python, seen = [*emulator, "-E", "PYTHONPATH=/site", "/usr/bin/python3.11"], Path("/made")
    else:
        emulator = ["qemu-x86_64-static", "-cpu", processor.cpu]
        python, seen = [*emulator, sys.executable], work
    there = run_worker(python, work, seen, processor.cpu)
    native = [*emulator, str(seen / f"native-{processor.machine}" / "ryot-run")]
    bundles = {}
    for name in BUNDLES:
        folder = seen / "bundles" / name
        with np.load(work / "here.npz") as ours, np.load(work / f"{processor.cpu}.npz") as theirs:
            a, b = ours[name], theirs[name]
        bundles[name] = {
            "golden": there["golden"][name],
            "run.py": answer([*python, str(folder / "run.py"), "--verify"]),
            "ryot-run": answer([*native, str(folder), "--verify"]),
            "positions": len(a),
            "equal_tokens": int((a.argmax(-1) == b.argmax(-1)).sum()),
            "largest_difference": float(np.abs(a - b).max()),
            "relative_difference": float(np.sqrt(np.square(a - b).mean() / np.square(a).mean())),
        }
    ids = [answer([*native, str(seen / "bundles/int4"), "--ids"], stdin=text) for text in here["ids"]]
    return {
        "cpu": processor.cpu,
        "machine": there["machine"],
        "versions": there["versions"],
        "equal_ids": sum(there["ids"][text] == ids for text, ids in here["ids"].items()),
        "equal_ids_native": sum(
            line["stdout"].split() == [str(i) for i in expected]
            for line, expected in zip(ids, here["ids"].values(), strict=True)
        ),
        "bundles": bundles,
    }


def examine_arm32(folder: Path) -> dict[str, Any]:
    """What there is for an Arm of 32 bits: wheels, and whether the C program's own part runs there."""
    said = {}
    for name in WHEELS:
        done = download(folder / "armv7", ARM32_TAGS, [f"{name}=={importlib.metadata.version(name)}"], check=False)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: No matching")]
        said[name] = lines[0].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
    if not shutil.which("arm-linux-gnueabihf-gcc"):
        return {"wheels": said}
    with tempfile.TemporaryDirectory() as scratch:
        build, variables = Path(scratch) / "native", ["CC=arm-linux-gnueabihf-gcc", "LDFLAGS=-static", "ORT_LIBRARY="]
        target = f"{build}/ryot-run"
        call("make", "-s", "-C", NATIVE, f"BUILD={build}", f"PYTHON={sys.executable}", *variables, target)
        bundle = folder / "arm64/made/bundles/int4"
        ids = answer(["qemu-arm-static", target, str(bundle), "--ids"], stdin="def add(a, b):")
        here = answer([str(folder / "arm64/made/native-x86_64/ryot-run"), str(bundle), "--ids"], stdin="def add(a, b):")
        return {"wheels": said, "ids": ids, "ids_here": here}


def run_worker(python: Sequence[str], work: Path, seen: Path, name: str) -> dict[str, Any]:
    """The worker's findings; `seen` is what its processor calls the folder `work`."""
    done = answer([*python, str(seen / "processors_worker.py"), str(seen), name])
    if done["code"]:
        raise SystemExit(f"{name}: {done['stderr']}")
    return dict(json.loads((work / f"{name}.json").read_text()))


def answer(command: Sequence[str], stdin: str = "") -> dict[str, Any]:
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        command, input=stdin.encode(), capture_output=True, timeout=1800, env=environment, check=False
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return {"code": done.returncode, "stdout": out.strip(), "stderr": err.strip()}


def download(
    folder: Path, tags: Sequence[str], wanted: Sequence[str], *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", f"--dest={folder}"]
    platforms = [f"--platform={tag}" for tag in tags]
    return subprocess.run([*pip, *options, *platforms, *wanted], capture_output=True, text=True, check=check)


def call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def render(values: Mapping[str, Any]) -> str:
    """The result for people."""
    cpu = values["environment"]["cpu"]
    lines = [
        f"# Bundles on other processors, emulated on {cpu['model']}, commit {values['commit']}",
        "",
        f"`{values['command']}`; {values['qemu']}, user mode. Small bundles with random weights (2 layers, 128 wide); "
        "logits and tokens are compared with this machine's, which has "
        f"{'VNNI' if 'avx512-vnni' in cpu['isa'] or 'avx-vnni' in cpu['isa'] else 'no VNNI'}, along one text of "
        "fixed tokens. The relative difference is the RMS of the difference over the RMS of the logits.",
        "",
        "| processor | bundle | golden, python and capi | run.py | ryot-run | equal tokens | largest | relative |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in values["processors"].items():
        for bundle, row in found["bundles"].items():
            golden = " and ".join(str(row["golden"][engine]) for engine in ("python", "capi"))
            codes = [{0: "equal"}.get(row[program]["code"], "differs") for program in ("run.py", "ryot-run")]
            lines.append(
                f"| {name} ({found['cpu']}) | {bundle} | {golden} | {codes[0]} | {codes[1]} | {row['equal_tokens']} of "
                f"{row['positions']} | {row['largest_difference']:.2g} | {row['relative_difference']:.2g} |"
            )
    lines.append("")
    for name, found in values["processors"].items():
        lines.append(
            f"- {name}: Python {found['versions']['python']} on {found['machine']}, onnxruntime "
            f"{found['versions']['onnxruntime']} by its binding and by the C table's places; ids of "
            f"{found['equal_ids']} of {values['texts']} texts are this machine's, the C program's of "
            f"{found['equal_ids_native']}."
        )
    lines += ["", "Arm of 32 bits (armv7):", ""]
    lines += [f"- {name}: {line}" for name, line in values["armv7"]["wheels"].items()]
    if "ids" in values["armv7"]:
        same = values["armv7"]["ids"] == values["armv7"]["ids_here"]
        lines.append(
            f"- the C program, compiled for it, reads a bundle and gives {'the same' if same else 'OTHER'} ids;"
        )
        lines.append("  it can run a model there only with an onnxruntime that someone has built.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
