"""What does an export cost: time, memory, temporary disk, and what the bundle weighs beside its quantized weights?

    python benchmarks/export_cost.py SOURCE [--context N] [--skip-large] [--only NAME,NAME] [--work DIR] [-o DIR]

Each case is `ryot-deploy export` as a process of its own: SOURCE to int8, SOURCE to fp32, int8 and int4, and a random
checkpoint of the shape of Qwen3-0.6B in bfloat16 (1.2 GB, made here with the tokenizer of SOURCE, removed again) to
int4. While it runs, VmHWM of the process and of each of its children is read, and the size of the temporary folder,
every tenth of a second. Then `run.py --verify` of each bundle is timed, in a fresh process.

Nothing is cached between cases: each has an empty RYOT_CACHE_DIR, so tuning and tokenizing are in the time. The figures
asked are of 2 quiet cores and SmolLM2-135M at its own context.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, describe_setting, write_result

from ryot.edge.bundle import MANIFEST_NAME, load_bundle
from ryot.errors import EXIT_OK, EXIT_QUALITY

RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]
POLL_S = 0.1
MB = 1e6
#: Qwen3-0.6B as its config.json has it: what the large case is shaped like.
QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
#: A bundle over its weights, and the seconds of `--verify`.
MAX_BUNDLE_RATIO, MAX_VERIFY_S = 1.03, 3.0
#: Temporary disk over the float32 size.
MAX_DISK_RATIO = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An export and what was asked of it; None where nothing was."""

    name: str
    precisions: str
    large: bool = False
    max_wall_s: float
    max_rss_bytes: float | None = None


CASES = (
    Case(name="int8", precisions="int8", max_wall_s=90, max_rss_bytes=1.6e9),
    Case(name="three", precisions="fp32,int8,int4", max_wall_s=360, max_rss_bytes=2e9),
    Case(name="large", precisions="int4", large=True, max_wall_s=600),
)
#: Peak memory of the large case over the size of its checkpoint.
MAX_LARGE_RATIO = 3.0


def measure_case(case: Case, source: str, context: int | None, work: Path) -> dict[str, Any]:
    """Export once; time, peaks and sizes, or the reason why there are none."""
    output, scratch = work / "bundles", work / "tmp"
    for folder in (output, scratch, work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    command = [*RYOT, "export", source, "--precisions", case.precisions, "-o", str(output)]
    command += ["--context", str(context)] if context else []
    environment = os.environ | {"TMPDIR": str(scratch), "RYOT_CACHE_DIR": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    peaks: dict[int, int] = {}
    disk = 0
    log = work / f"{case.name}.txt"
    begin = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            read_peaks(process.pid, peaks)
            disk = max(disk, disk_bytes(scratch))
            time.sleep(POLL_S)
    wall_s = time.monotonic() - begin
    children = [peak for pid, peak in peaks.items() if pid != process.pid]
    text = log.read_text(errors="replace").splitlines()
    result: dict[str, Any] = {
        "wall_s": round(wall_s, 1),
        "rss_bytes": peaks.get(process.pid, 0),
        "child_rss_bytes": max(children, default=0),
        "children": len(children),
        "disk_bytes": disk,
        "left_bytes": disk_bytes(scratch),
        "code": process.returncode,
        # Each stage with the second it began at.
        "stages": [line.strip() for line in text if line.strip()[:1].isdigit() and " s  " in line],
    }
    if process.returncode not in (EXIT_OK, EXIT_QUALITY):
        return result | {"failed": text[-1][:300] if text else "it said nothing"}
    bundles = sorted(path.parent for path in output.glob(f"*/{MANIFEST_NAME}"))
    return result | {"bundles": {path.name: describe_bundle(path) for path in bundles}}


def describe_bundle(path: Path) -> dict[str, Any]:
    """A bundle's size beside its weights, and the time of its own check."""
    bundle = load_bundle(path, verify=False)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(path / "run.py"), "--verify"], capture_output=True, text=True, check=False
    )
    verify_s = time.monotonic() - begin
    return {
        "bytes": bundle.size_bytes,
        "weight_bytes": bundle.weight_bytes,
        "num_parameters": bundle.model.num_parameters,
        "verify_s": round(verify_s, 2),
        "verify_code": done.returncode,
        "quality": {name: bundle.manifest["quality"].get(name) for name in ("bpb_ratio", "kl", "top1", "tokens")},
    }


def read_peaks(root: int, peaks: dict[int, int]) -> None:
    """Update the largest VmHWM of a process and of all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name may hold spaces and brackets; the parent is the second field behind it.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
        peaks[pid] = max(peaks.get(pid, 0), kib * 1024)


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on disk; a file of two names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                info = (Path(root) / name).lstat()
            except OSError:
                continue
            seen[info.st_dev, info.st_ino] = info.st_blocks * 512
    return sum(seen.values())


def write_large(source: str, folder: Path) -> None:
    """A random checkpoint of Qwen3-0.6B's shape; its tokenizer is the source's, whose ids all have a row."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    subprocess.run([*RYOT, "export", source, "--to", "hf", "-o", str(folder / "hf")], check=True, capture_output=True)
    ids = json.loads((folder / "hf" / "config.json").read_text())
    torch.manual_seed(0)
    config = Qwen3Config(**QWEN3, **{name: ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "large")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "hf" / name, folder / "large" / name)
    shutil.rmtree(folder / "hf")


def judge(case: Case, result: Mapping[str, Any], checkpoint_bytes: int) -> list[tuple[str, str, str]]:
    """(what was asked, what was found, verdict) of a case."""
    if "failed" in result:
        return [(f"{case.name}: exports", str(result["failed"]), "FAIL")]
    peak = max(result["rss_bytes"], result["child_rss_bytes"])
    limit = MAX_LARGE_RATIO * checkpoint_bytes if case.large else case.max_rss_bytes
    rows = [_row(f"{case.name}: wall time, s", result["wall_s"], case.max_wall_s)]
    if limit is not None:
        rows.append(_row(f"{case.name}: peak RSS, MB", peak / MB, limit / MB))
    parameters = max(bundle["num_parameters"] for bundle in result["bundles"].values())
    rows.append(
        _row(f"{case.name}: temporary disk, MB", result["disk_bytes"] / MB, MAX_DISK_RATIO * 4 * parameters / MB)
    )
    rows.append(_row(f"{case.name}: temporary disk left behind, MB", result["left_bytes"] / MB, 0))
    for name, bundle in result["bundles"].items():
        ratio = bundle["bytes"] / bundle["weight_bytes"]
        rows.append(_row(f"{case.name}: {name} bundle over its weights", ratio, MAX_BUNDLE_RATIO))
        rows.append(_row(f"{case.name}: {name} --verify, s", bundle["verify_s"], MAX_VERIFY_S))
        if bundle["verify_code"] != EXIT_OK:
            rows.append((f"{case.name}: {name} --verify", f"code {bundle['verify_code']}", "FAIL"))
    return rows


def _row(what: str, found: float, limit: float) -> tuple[str, str, str]:
    return f"{what}, at most {limit:.4g}", f"{found:.4g}", "PASS" if found <= limit else "FAIL"


def render(values: Mapping[str, Any]) -> str:
    """The result for people."""
    cpu = values["environment"]["cpu"]
    changed = f", {values['changed_files']} tracked files changed" if values["changed_files"] else ""
    lines = [f"# What an export costs, {cpu['model']}, commit {values['commit']}{changed}", ""]
    lines += ["| asked | found | verdict |", "|:--|--:|:--|"]
    lines += [f"| {' | '.join(row)} |" for row in values["verdicts"]]
    lines += ["", "| bundle | MB | weights MB | bits per parameter | bits/byte of fp32 | KL | top-1 | tokens |"]
    lines += ["|:--|--:|--:|--:|--:|--:|--:|--:|"]
    for case, result in values["cases"].items():
        for name, bundle in result.get("bundles", {}).items():
            quality = [f"{value:.5g}" if value is not None else "" for value in bundle["quality"].values()]
            bits = 8 * bundle["weight_bytes"] / bundle["num_parameters"]
            sizes = [f"{bundle['bytes'] / MB:.1f}", f"{bundle['weight_bytes'] / MB:.1f}", f"{bits:.2f}"]
            lines.append(f"| {' | '.join([f'{case} {name}', *sizes, *quality])} |")
    lines += ["", f"`{values['command']}`, {len(values['environment']['affinity'])} cores, load before "]
    lines[-1] += f"{values['environment']['load_average'][0]:.1f}. Peak RSS is VmHWM, the larger of the process's and "
    lines[-1] += "its largest child's; temporary disk was sampled. Stages, each with the second it began at:"
    for case, result in values["cases"].items():
        own, child = result["rss_bytes"] / MB, result["child_rss_bytes"] / MB
        lines += ["", f"**{case}**: process {own:.0f} MB, largest of {result['children']} children {child:.0f} MB", ""]
        lines += ["```", *result["stages"], "```"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="what `ryot-deploy export` takes")
    parser.add_argument("--context", type=int, metavar="N", help="context of the bundles (default the model's)")
    parser.add_argument("--skip-large", action="store_true", help="leave the shape of Qwen3-0.6B out")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where all files go (default the temporary folder)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.only.split(",") if name] or [case.name for case in CASES]
    source = str(Path(options.source).absolute()) if Path(options.source).exists() else options.source
    setting = describe_setting()
    cases: dict[str, Any] = {}
    verdicts: list[tuple[str, str, str]] = []
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        for case in CASES:
            if case.name not in chosen or (case.large and options.skip_large):
                continue
            print(f"exporting {case.name}", file=sys.stderr, flush=True)
            if case.large:
                write_large(source, work)
            checkpoint = work / "large" if case.large else Path(source)
            result = measure_case(case, str(checkpoint) if case.large else source, options.context, work)
            cases[case.name] = result
            size = disk_bytes(checkpoint) if checkpoint.is_dir() else 0
            verdicts += judge(case, result, size)
            # Written after each case, so that an interrupt leaves what is done.
            values = {**setting, "cases": cases, "verdicts": verdicts}
            path = write_result("export_cost", values, render(values), options.output)
    if cases:
        print(path.read_text())


if __name__ == "__main__":
    main()
