"""What does each optimization buy at the reference size, and how does that change at the preset small?

    python benchmarks/ablation.py [--reference-tokens 409600] [--small-tokens 204800] [--seeds 1]

Runs `cluster-run --ablate` at both sizes. Every case has the same budget; the cases share the cores, so times are good
for ratios of this run alone. A small budget favours what learns fast early; the budgets stand in the result.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import describe_setting, write_result
from tabulate import tabulate

from ryot.report.rows import AblationRow, load_report


def ablate(preset: str, tokens: int, seeds: int, folder: Path) -> tuple[AblationRow, ...]:
    """The ablation rows of a run of its own."""
    options = ["--ablate", "--preset", preset, "--tokens", str(tokens), "--seeds", str(seeds)]
    options += ["--precisions", "fp32", "--rounds", "1"]
    command = [sys.executable, "-c", "from ryot.cli.main import run; run()", "cluster-run", "-o", str(folder)]
    done = subprocess.run([*command, *options], stdout=subprocess.DEVNULL)
    assert done.returncode in (0, 1, 3), done
    return load_report(folder).ablation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-tokens", type=int, default=409_600)
    parser.add_argument("--small-tokens", type=int, default=204_800)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    budgets = {"reference": args.reference_tokens, "small": args.small_tokens}
    with tempfile.TemporaryDirectory(prefix="ablation-", dir=Path.home()) as scratch:
        found = {p: ablate(p, tokens, args.seeds, Path(scratch) / p) for p, tokens in budgets.items()}
    names = list(dict.fromkeys(r.name for rows in found.values() for r in rows))
    table = []
    for name in names:
        cells: list[str] = [name]
        for rows in found.values():
            by_name = {r.name: r for r in rows}
            if name not in by_name:
                cells += ["stopped", ""]
                continue
            row, base = by_name[name], by_name["baseline"]
            loss = statistics.fmean(row.val_loss)
            cells += [
                f"{statistics.fmean(row.train_wall_s) / statistics.fmean(base.train_wall_s):.2f}",
                f"{loss:.3f} ({loss - statistics.fmean(base.val_loss):+.3f})",
            ]
        table.append(cells)
    head = ["case"]
    for preset, tokens in budgets.items():
        head += [f"{preset}, {tokens / 1e3:.0f} k tokens: time", "validation loss"]
    setting = describe_setting()
    text = "\n".join(
        [
            f"# What each optimization bought, {setting['environment']['cpu']['model']}, commit {setting['commit']}",
            "",
            f"`{setting['command']}`, {args.seeds} seed(s); time as a share of the baseline's, in brackets the"
            " difference to its loss in nats. The spread between seeds is 0.02 to 0.04 nats.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
        ]
    )
    rows = {
        preset: [{"name": r.name, "train_wall_s": r.train_wall_s, "val_loss": r.val_loss} for r in rows]
        for preset, rows in found.items()
    }
    print(write_result("ablation", {**setting, "budgets": budgets, "rows": rows}, text))


if __name__ == "__main__":
    main()
