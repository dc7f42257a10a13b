"""What does adapting a real model buy, and what does it cost?

    python benchmarks/adapt.py SOURCE [--parts lora,speed,distill,qat] [--minutes 15] [--seeds 3] [--threads 2]

lora     SOURCE learns 300 kB of a made-up command language by the recipe `lora`: held-out bits per byte of it and of
         general text (the standard library's source) before and after, minutes, and the peak memory of the training.
speed    tokens per second of a LoRA step against transformers with peft: same model, batch, rank, fp32; fresh processes
         in turn, peak memory beside.
distill  a student of about 10 M parameters on 400 kB of the standard library: with SOURCE as its teacher, and on the
         text alone for the same total time, the teacher's included; of the text alone the best of three budgets.
qat      a model of about 12 M parameters, its last steps through int4's rounding or not, exported to int4: beside GPTQ
         at the same size and the smallest mix of GPTQ that the gate allows.

Each job is a process of its own; what is done stays in --work and is not done again. `--tiny` is for trying the script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from adapt_data import write_command_language, write_library_part
from record import RESULTS, describe_setting, write_result
from tabulate import tabulate

from ryot.models.registry import read_spec
from ryot.models.sources.opening import open_checkpoint
from ryot.report.stats import ratio_interval, t_quantile

HERE = Path(__file__).parent
PARTS = ("lora", "speed", "distill", "qat")
#: What issue J asks for.
MAX_DOMAIN_RATIO, MAX_GENERAL_RATIO, MAX_RSS = 0.85, 1.02, 3e9
MIN_SPEED, MAX_INT4 = 1.3, 1.002
RANK = 16

STUDENT = """
summary = "10 M student"
tune = false
[model]
architecture = "llama"
tie_embeddings = true
dim = 160
num_layers = 6
num_heads = 5
num_kv_heads = 5
ff_dim = 480
max_seq_len = {length}
[train]
tokens = {tokens}
batch_size = 8
learning_rate = 2e-3
embedding_learning_rate = 5e-3
head_learning_rate = 5e-3
warmup_fraction = 0.02
schedule = "linear-decay"
beta1 = 0.9
epsilon = 1e-10
[kernels]
loss_chunk = 256
fused_optimizer = true
{more}
"""

ROUNDED = """
[rounding]
share = 0.2
block_size = {block_size}
"""


class Bench:
    """Jobs, each done once: their results are kept under the hash of what they were asked."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.length = 64 if args.tiny else 256
        self.work.mkdir(parents=True, exist_ok=True)
        checkpoint = open_checkpoint(str(args.source))
        self.source, self.vocab_size = str(args.source.absolute()), read_spec(checkpoint.config, "source").vocab_size

    def run(self, kind: str, *, again: int = 0, **values: Any) -> dict[str, Any]:
        """The figures of a job, done now or found."""
        job = {"kind": kind, "threads": self.args.threads, "cache": str(self.work / "cache"), **values}
        key = hashlib.sha256(json.dumps([job, again], sort_keys=True).encode()).hexdigest()[:16]
        kept = self.work / "done" / f"{kind}-{key}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        kept.parent.mkdir(exist_ok=True)
        order = kept.with_suffix(".job")
        order.write_text(json.dumps(job))
        print(f"{kind}: {order}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, HERE / "adapt_worker.py", order], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        kept.write_text(json.dumps(found))
        return found

    def recipe(self, name: str, text: str) -> str:
        """A recipe's file."""
        path = self.work / f"{name}.toml"
        path.write_text(text)
        return str(path)

    def output(self, name: str) -> str:
        """Where a checkpoint goes that is not there yet."""
        return str(self.work / "checkpoints" / name)

    def score(self, model: str, data: Path) -> dict[str, Any]:
        windows = 8 if self.args.tiny else 256
        return self.run(
            "score",
            model=model,
            tokenizer=self.source,
            data=str(data),
            split="test",
            windows=windows,
            length=self.length,
        )


def run_lora(bench: Bench) -> list[list[str]]:
    args = bench.args
    domain = write_command_language(bench.work / "commands", 150_000 if args.tiny else 300_000)
    general = write_library_part(bench.work / "general", 300_000 if args.tiny else 3_000_000)
    output = bench.output("lora")
    recipe = {"recipe": "lora", "init": bench.source, "tokens": 2048 if args.tiny else args.lora_tokens}
    found = bench.run("train", **recipe, data=str(domain), seed=0, output=output)
    rows = []
    texts = (("command language", domain, MAX_DOMAIN_RATIO), ("general text", general, MAX_GENERAL_RATIO))
    for name, text, limit in texts:
        before, after = (bench.score(model, text)["bpb"] for model in (bench.source, output))
        ratio = after / before
        figures = [f"{before:.4f}", f"{after:.4f}", f"{ratio:.4f}", f"{limit}"]
        rows.append([f"bpb of {name}", *figures, verdict(ratio <= limit)])
    minutes = found["wall_s"] / 60
    met = verdict(minutes <= args.minutes)
    rows.append(["minutes, losses included", "", f"{minutes:.1f}", "", f"{args.minutes}", met])
    rss = found["peak_rss_bytes"]
    rows.append(["peak RSS, GB", "", f"{rss / 1e9:.2f}", "", f"{MAX_RSS / 1e9:.1f}", verdict(rss <= MAX_RSS)])
    rows.append(["tokens trained", "", f"{found['tokens']:,}", "", "", ""])
    return [["lora", "before", "after", "ratio", "limit", ""], *rows]


def run_speed(bench: Bench) -> list[list[str]]:
    args = bench.args
    rounds, steps = (1, 1) if args.tiny else (args.rounds, 4)
    batch = 1 if args.tiny else 4
    common = {"batch": batch, "rank": RANK, "length": bench.length, "vocab_size": bench.vocab_size, "steps": steps}
    rows, ours_all, theirs_all = [], [], []
    for number in range(rounds):
        ours_all.append(bench.run("speed_ours", again=number, init=bench.source, **common))
        peer = {"model": args.peer or bench.source, "gradient_accumulation_steps": 1}
        theirs_all.append(bench.run("speed_peft", again=number, **peer, **common))
    ours, theirs = ([r["tokens_per_s"] for r in found] for found in (ours_all, theirs_all))
    interval = ratio_interval(ours, theirs) if rounds > 1 else None
    ratio = float(np.median(np.concatenate(ours)) / np.median(np.concatenate(theirs)))
    shown = f"{ratio:.2f}" + (f" [{interval.low:.2f}, {interval.high:.2f}]" if interval else "")
    for name, found in (("ryot", ours_all), ("transformers + peft", theirs_all)):
        speeds = np.concatenate([r["tokens_per_s"] for r in found])
        rss = max(r["peak_rss_bytes"] for r in found)
        rows.append([name, f"{np.median(speeds):.1f}", f"{rss / 1e9:.2f}", f"{found[0]['first_loss']:.5f}", "", ""])
    rows.append(["ratio", shown, "", "", f"{MIN_SPEED}", verdict(ratio >= MIN_SPEED)])
    return [["LoRA step, fp32", "tokens/s", "peak RSS, GB", "first loss", "limit", ""], *rows]


def run_distill(bench: Bench) -> list[list[str]]:
    args = bench.args
    data = write_library_part(bench.work / "distill", 150_000 if args.tiny else 400_000)
    length = 64 if args.tiny else 128
    step = 8 * length
    tokens = step * (3 if args.tiny else args.distill_steps)
    taught = f'[distill]\nteacher = "{bench.source}"\nweight = 0.7\ntop_k = 32\nprecision = "int8"'
    alone = f'[tokenizer]\nfrom = "{bench.source}"'
    rows = []
    for seed in range(1 if args.tiny else args.seeds):
        recipe = bench.recipe("taught", STUDENT.format(length=length, tokens=tokens, more=taught))
        name = f"taught-{seed}"
        with_teacher = bench.run(
            "train", recipe=recipe, data=str(data), seed=seed, output=bench.output(name),
            teacher_cache=str(bench.work / "teachers" / str(seed)),
        )  # fmt: skip
        probe = bench.recipe("alone-probe", STUDENT.format(length=length, tokens=step * 100, more=alone))
        measured = bench.run("train", recipe=probe, data=str(data), seed=seed, max_steps=2 if args.tiny else 20)
        per_s = measured["tokens"] / measured["train_wall_s"]
        best: tuple[float, str, dict[str, Any]] | None = None
        for share in (1.0,) if args.tiny else (0.25, 0.5, 1.0):
            budget = max(step * 3, int(per_s * with_teacher["train_wall_s"] * share / step) * step)
            recipe = bench.recipe(f"alone-{share}", STUDENT.format(length=length, tokens=budget, more=alone))
            other = bench.output(f"alone-{seed}-{share}")
            found = bench.run("train", recipe=recipe, data=str(data), seed=seed, output=other)
            if best is None or found["val_bpb"] < best[0]:
                best = (found["val_bpb"], other, found)
        assert best is not None
        a, b = bench.score(bench.output(name), data), bench.score(best[1], data)
        differences = (np.array(a["window_bits"]) - np.array(b["window_bits"])) / np.mean(a["window_bytes"])
        half = t_quantile(len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
        low, high = differences.mean() - half, differences.mean() + half
        difference = f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        rows.append([
            f"seed {seed}", f"{a['bpb']:.4f}", f"{b['bpb']:.4f}", difference,
            f"{with_teacher['train_wall_s']:.0f} / {best[2]['train_wall_s']:.0f}", verdict(high < 0),
        ])  # fmt: skip
    return [["test bpb", "taught", "text alone", "difference [98 %]", "seconds, both", ""], *rows]


def run_qat(bench: Bench) -> list[list[str]]:
    args = bench.args
    data = write_library_part(bench.work / "qat", 400_000 if args.tiny else 4_000_000)
    base = (HERE.parent / "ryot" / "variants" / "wide.toml").read_text()
    preset = "reference" if args.tiny else "small"
    tokens = 40_960 if args.tiny else args.qat_tokens
    rows = []
    for seed in range(1 if args.tiny else args.seeds):
        found = {}
        for name, more in (("plain", ""), ("rounded", ROUNDED.format(block_size=args.qat_block))):
            recipe = bench.recipe(name, base.replace("tune = true", "tune = false") + more)
            output = bench.output(f"qat-{name}-{seed}")
            trained = bench.run(
                "train", recipe=recipe, preset=preset, data=str(data), seed=seed, tokens=tokens, output=output
            )
            found[name] = bench.run(
                "export", model=output, dataset=trained["dataset"], output=f"{output}-export", limit=1.01
            )
        uniform = bench.run(
            "export_uniform", model=bench.output(f"qat-plain-{seed}"), dataset=trained["dataset"],
            output=str(bench.work / f"uniform-{seed}"), block_size=args.qat_block,
        )["gptq"]  # fmt: skip
        fp32 = found["plain"]["fp32"]["bpb"]
        for label, bpb, size in (
            ("fp32, never rounded", fp32, found["plain"]["fp32"]["size_bytes"]),
            ("int4, trained rounded", found["rounded"]["int4"]["bpb"], found["rounded"]["int4"]["size_bytes"]),
            (f"4 bits/{args.qat_block} by GPTQ, the same size", uniform["bpb"], None),
            ("int4 by GPTQ, smallest within 1 %", found["plain"]["int4"]["bpb"], found["plain"]["int4"]["size_bytes"]),
        ):
            ratio = bpb / fp32
            rows.append([
                f"seed {seed}: {label}", f"{bpb:.4f}", f"{ratio:.4f}", "" if size is None else f"{size / 1e6:.2f}",
                f"{MAX_INT4}" if "trained" in label else "", verdict(ratio <= MAX_INT4) if "trained" in label else "",
            ])  # fmt: skip
    return [["test bpb", "", "of fp32's", "MB", "limit", ""], *rows]


def verdict(met: bool) -> str:
    return "met" if met else "missed"


WHY = {
    "lora": "Limits are issue J's. The language is made by fixed rules, so much of it can be learned at all.",
    "speed": "Products of matrices take most of either step, and both call the same ones; what differs is the memory "
    "that norms, rotations, losses and logits pass through.",
    "distill": "Seconds are of training, the teacher's answers included. A difference below 0 is for the teacher.",
    "qat": "The model that is rounded in training and the one that is not have the same recipe, tokens and seed.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--peer", help="the same model where transformers reads it faster, a folder")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora-tokens", type=int, help="instead of the recipe's own budget")
    parser.add_argument("--distill-steps", type=int, default=1200)
    parser.add_argument("--qat-tokens", type=int, default=2_000_000)
    parser.add_argument("--qat-block", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("adapt-work"))
    parser.add_argument("--tiny", action="store_true", help="to try the script; not to be quoted")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work = args.work.absolute()
    bench = Bench(args)
    sections, tables = [], {}
    for part in args.parts.split(","):
        head, *rows = {"lora": run_lora, "speed": run_speed, "distill": run_distill, "qat": run_qat}[part](bench)
        tables[part] = [head, *rows]
        table = tabulate(rows, head, tablefmt="github", disable_numparse=True)
        sections.append(f"## {part}\n\n{table}\n\n{WHY[part]}")
        print(f"{table}\n", file=sys.stderr)
    setting = describe_setting()
    title = f"# Adapting {args.source.name}, {args.threads} threads, commit {setting['commit']}"
    text = "\n\n".join([title, f"`{setting['command']}`", *sections])
    jobs = {p.stem: json.loads(p.read_text()) for p in sorted((args.work / "done").glob("*.json"))}
    print(write_result("adapt", {**setting, "tables": tables, "jobs": jobs}, text, args.output))


if __name__ == "__main__":
    main()
