"""One job of `adapt.py` in a process of its own: JOB.json in, its figures as JSON on stdout.

A job is {"kind": ..., ...}; kinds are the functions below.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ryot.config import replace, resolve_variant
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_variant
from ryot.deploy.precisions import table_names
from ryot.deploy.quality import evaluate_artifacts, quality_windows
from ryot.deploy.quantize import Quantizer
from ryot.deploy.scorer import TorchScorer
from ryot.deploy.settings import ExportSettings
from ryot.deploy.teacher import open_teacher
from ryot.deploy.weights import load_decoder_weights
from ryot.models.sources.folder import open_folder
from ryot.models.sources.opening import open_checkpoint
from ryot.run.variant_data import prepare_variant
from ryot.train.batch import Batch
from ryot.train.checkpoint import build_decoder
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Dataset, load_dataset, prepare_dataset
from ryot.train.loop import Trainer, TrainJob
from ryot.train.source_text import read_source_text
from ryot.train.step import TrainStep


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train `recipe`, from `init` where it starts from a model, on `data`; the checkpoint goes to `output`."""
    preset = job.get("preset", "reference")
    variant = resolve_variant(job["recipe"], preset, tokens=job.get("tokens"), init=job.get("init"))
    dataset, _ = prepare_variant(variant, load_corpus([job["data"]]), Path(job["cache"]))
    plan = replace(variant.kernels, threads=job["threads"])
    begin = time.perf_counter()
    teacher = open_teacher(variant, Path(job["teacher_cache"])) if variant.distill else None
    task = TrainJob(variant=variant, seed=job["seed"], dataset_dir=str(dataset.path))
    trainer = Trainer(task, plan, teacher)
    events = trainer.run_chunk(float("inf"), job.get("max_steps"))
    wall_s = time.perf_counter() - begin
    if output := job.get("output"):
        trainer.save(Path(output))
    held_out = {e.split: e.bits_per_byte for e in events if e.kind == "eval"}
    return {
        "tokens": trainer.tokens,
        "train_wall_s": trainer.train_wall_s,
        "wall_s": wall_s,
        "dataset": str(dataset.path),
        **{f"{split}_bpb": value for split, value in held_out.items()},
    }


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of a model on the `split` of `data`, window by window, so that two can be compared in pairs."""
    checkpoint = open_checkpoint(job["model"])
    weights = load_decoder_weights(checkpoint, job["length"])
    dataset = _foreign_dataset(job, weights.spec.vocab_size)
    model = build_decoder(weights.spec, weights.arrays)
    windows = dataset.windows(job["split"], job["windows"], job["length"])
    nats, sizes = [], []
    for window in windows:
        ids = torch.from_numpy(window)[None]
        with torch.no_grad():
            total = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        nats.append(total)
        sizes.append(int(dataset.byte_lengths[window[1:]].sum()))
    return {
        "bpb": sum(nats) / np.log(2) / sum(sizes),
        "window_bits": [n / np.log(2) for n in nats],
        "window_bytes": sizes,
    }


def speed_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of our LoRA training at the settings of `job`."""
    variant = resolve_variant("lora", "reference", init=job["init"])
    assert variant.lora is not None and variant.lora.rank == job["rank"]
    step = TrainStep(variant, replace(variant.kernels, threads=job["threads"]))
    batch = Batch(*_token_batch(job))
    return _time_steps(job, lambda: step.take(batch, 1.0, 0)[0])


def speed_peft(job: dict[str, Any]) -> dict[str, Any]:
    """The same steps by transformers and peft, as their documentation has them: labels, AdamW, clipping."""
    import peft
    import transformers

    source = Path(job["model"])
    kwargs = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    folder = source.parent if kwargs else source
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    config = peft.LoraConfig(
        r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    inputs, targets = _token_batch(job)
    n = job["gradient_accumulation_steps"]

    def take() -> float:
        total = 0.0
        for x, y in zip(inputs.chunk(n), targets.chunk(n)):
            loss = model(input_ids=x, labels=y, shift_labels=y).loss / n
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return _time_steps(job, take)


def export(job: dict[str, Any]) -> dict[str, Any]:
    """fp32 and int4 of a checkpoint as a run makes them, and their bits per byte on the test split."""
    dataset = load_dataset(Path(job["dataset"]))
    results = export_variant(
        open_folder(Path(job["model"])),
        Path(job["output"]),
        ["fp32", "int4"],
        dataset,
        options=ExportOptions(max_bpb_ratio=job["limit"]),
    )
    return {
        r.precision: {"bpb": r.quality.bpb, "bpb_ratio": r.quality.bpb_ratio, "size_bytes": r.size_bytes}
        for r in results
    }


def export_uniform(job: dict[str, Any]) -> dict[str, Any]:
    """GPTQ at the size of a rounded training: all matrices at 4 bits in its blocks, tables at 8 bits."""
    dataset = load_dataset(Path(job["dataset"]))
    weights = load_decoder_weights(open_folder(Path(job["model"])))
    scratch = Path(job["output"])
    scratch.mkdir(parents=True, exist_ok=True)
    settings = ExportSettings(int4_block_size=job["block_size"], int8_block_size=job["block_size"])
    quantizer = Quantizer(weights, dataset, settings, 1.01, scratch)
    tables = table_names(weights)
    chosen = {
        name: next(o for o in options if o.label.startswith("8 " if name in tables else "4 ")).matrix
        for name, options in quantizer._options().items()
    }
    windows = quality_windows(dataset, "test", weights.spec.max_seq_len)
    found = evaluate_artifacts(TorchScorer(weights), {"gptq": quantizer.graph(chosen)}, windows, dataset.byte_lengths)[
        "gptq"
    ]
    size = sum(matrix.num_bytes for matrix in chosen.values())
    return {"gptq": {"bpb": found.bpb, "bpb_ratio": found.bpb_ratio, "matrix_bytes": size}}


def _foreign_dataset(job: dict[str, Any], vocab_size: int) -> Dataset:
    text = read_source_text(open_checkpoint(job["tokenizer"]), vocab_size)
    return prepare_dataset(load_corpus([job["data"]]), vocab_size, Path(job["cache"]), text=text)[0]


def _token_batch(job: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (job["batch"], job["length"] + 1)
    ids = torch.randint(100, job["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _time_steps(job: dict[str, Any], take: Any) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    first = take()
    times = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        take()
        times.append(time.perf_counter() - begin)
    tokens = job["batch"] * job["length"]
    return {"first_loss": first, "tokens_per_s": [tokens / t for t in times]}


KINDS = {f.__name__: f for f in (train, score, speed_ours, speed_peft, export, export_uniform)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    found = KINDS[job["kind"]](job)
    found["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(found))


if __name__ == "__main__":
    main()
