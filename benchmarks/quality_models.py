"""Makes everything that `quality_speed.py` compares from one source, and the text that all of it is scored on.

    python benchmarks/quality_models.py PLAN.json      (written by quality_speed.py)

In the work folder: `f16.gguf` of the source and what llama.cpp's own quantizer makes of it, `hf/` and what the builders
of onnxruntime-genai and of mobius-onnx make of that, our bundles, `text.txt`, `windows.npy`, and `models.json`, which
lists the points and says what could not be had. What is there is not made again; bundles are, when the source or the
code that exports them has changed. Every step is a process of its own whose output lies in `logs/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from quality_plan import perplexity_command
from tokenizers import Tokenizer

import ryot
from ryot.edge.bundle import MANIFEST_NAME, Bundle, load_bundle
from ryot.errors import EXIT_OK, EXIT_QUALITY
from ryot.train.checkpoint import load_tokenizer
from ryot.train.corpus import load_corpus
from ryot.train.tokenizer import byte_lengths

#: llama.cpp's types, best first; the first is the source's weights, the others are quantized from it.
LLAMA_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
PRECISIONS = ("fp32", "int8", "int4", "int8-dyn", "int8-dyn+int8", "int8-dyn+int4")
GENAI_PRECISIONS = ("fp32", "int4")
#: GGUF types that mobius-onnx is given to keep, beside the float32 weights.
MOBIUS_KEPT = ("Q8_0", "Q4_0")
KV8 = " kv8"
#: The parts of the package that decide what a bundle holds.
EXPORTING = ("deploy", "models", "edge")
RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]
#: Characters of text for each token that is scored; code has fewer than 4 a token.
CHARS_PER_TOKEN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A model that an engine runs: one point of a frontier."""

    name: str
    family: str
    """`ryot`, `llama.cpp`, `genai` or `mobius`."""
    path: str
    """Bundle, GGUF file, or folder in genai's layout."""
    size_bytes: int
    step_bytes: int | None
    """Weights that a decode step reads, where the file tells."""
    graphs: tuple[str, ...] = ()
    """ONNX graphs that give all logits; the worst of them is the point's quality. None for llama.cpp."""


@dataclass
class Maker:
    """The work folder while it is filled."""

    plan: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    export_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.plan["folder"])
        self.source = self.plan["source"]
        self.llama = Path(self.plan["llama_cpp"])
        if (known := self.folder / "models.json").exists():
            self.export_s = json.loads(known.read_text())["export_s"]
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

    def make(self) -> dict[str, Any]:
        """Make what is missing and describe all of it."""
        f16 = self._once("f16.gguf", [*RYOT, "export", self.source, "--to", "gguf"], "-o")
        hf = self._once("hf", [*RYOT, "export", self.source, "--to", "hf"], "-o")
        assert f16 is not None and hf is not None
        tokens_equal = self._write_windows(f16, load_tokenizer(hf))
        points = [*self._bundles(), *self._ggufs(f16), *self._genai(hf), *self._mobius(hf)]
        return {
            "points": [dataclasses.asdict(point) for point in points],
            "notes": self.notes,
            "export_s": self.export_s,
            "tokens_equal": tokens_equal,
            "source_tensors": _tensor_types(Path(self.source)),
        }

    def _wanted(self, name: str) -> bool:
        return not self.plan["only"] or name in self.plan["only"]

    def _run(self, name: str, command: Sequence[str | Path], accept: Sequence[int] = (EXIT_OK,)) -> str | None:
        """Run a step; None when it did what it should, else its last line."""
        print(f"making {name}", file=sys.stderr, flush=True)
        log = self.folder / "logs" / f"{name.replace(' ', '-')}.txt"
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        with log.open("wb") as out:
            code = subprocess.run(
                list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=os.environ | offline, check=False
            ).returncode
        if code in accept:
            return None
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"{name}: not made, code {code}: {last[0][:200]}"

    def _once(self, name: str, command: Sequence[str | Path], *last: str, optional: bool = False) -> Path | None:
        """The file or folder `name`, which the command writes where its last argument says; it appears whole."""
        path = self.folder / name
        if path.exists():
            return path
        partial = path.with_name(f"partial-{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        if failure := self._run(name, [*command, *last, partial]):
            if not optional:
                raise SystemExit(failure)
            self.notes.append(failure)
            shutil.rmtree(partial, ignore_errors=True)
            return None
        partial.replace(path)
        return path

    def _write_windows(self, f16: Path, tokenizer: Tokenizer) -> dict[str, Any]:
        """`windows.npy`, the ids that llama.cpp scores, and `target_bytes.npy`; whether our tokenizer gives the same.

        llama-perplexity writes what it reads ahead of the logits that it is asked to keep. They go through a pipe.
        """
        plan = self.plan["quality"]
        wanted = plan["chunks"] * plan["context"] * CHARS_PER_TOKEN
        texts = list(load_corpus(tuple(self.plan["data"])).texts("test"))
        order = np.random.default_rng(0).permutation(len(texts))
        lengths = itertools.accumulate(len(texts[i]) for i in order)
        count = 1 + sum(length < wanted for length in lengths)
        text = "\n".join(texts[i] for i in order[:count])[:wanted]
        text_file = self.folder / "text.txt"
        text_file.write_text(text, encoding="utf-8")
        ids = self._read_llama_ids(f16, text_file)
        tokenizer.encode_special_tokens = True  # one that is written in the text is plain text, as in llama.cpp
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        # What it puts in front of the text it puts in front of each window, in place of the token there.
        begins = len(ids) > 1 and ids[0] != ours[0] and ids[1] == ours[0]
        windows = ids.reshape(-1, plan["context"])
        expected = np.asarray(([ids[0]] if begins else []) + ours, np.int64)[: ids.size]
        if begins:
            windows[:, 0] = ids[0]
        np.save(self.folder / "windows.npy", windows)
        first = plan["context"] // 2
        np.save(self.folder / "target_bytes.npy", byte_lengths(tokenizer, None)[windows[:, first + 1 :]])
        same = expected.size == ids.size and bool((expected == ids).all())
        if not same:
            self.notes.append("our tokenizer gives other ids than llama.cpp's for the text; all score llama.cpp's ids")
        return {"equal": same, "bos": int(ids[0]) if begins else None, "tokens": int(ids.size)}

    def _read_llama_ids(self, f16: Path, text_file: Path) -> np.ndarray:
        pipe = self.folder / "ids.pipe"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        command = [*perplexity_command(self.plan, f16, text_file), "--kl-divergence-base", str(pipe)]
        with (self.folder / "logs" / "ids.txt").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            # Nobody would open the other end if it failed before.
            threading.Thread(target=_open_if_dead, args=(process, pipe), daemon=True).start()
            with pipe.open("rb") as file:
                head = file.read(8 + 4 * 3)
                if len(head) < 20:
                    raise SystemExit(f"llama-perplexity ended without tokens, see {log.name}")
                _, context, _, chunks = struct.unpack("<8siii", head)
                ids = np.frombuffer(file.read(4 * context * chunks), np.int32).astype(np.int64)
            process.kill()
            process.wait()
        pipe.unlink()
        assert chunks == self.plan["quality"]["chunks"], f"the text has only {chunks} windows"
        return ids

    def _bundles(self) -> list[Point]:
        """Our bundles with each cache that is asked for; pairs need the quality of their prefill half."""
        names = [(p, kv) for kv in self.plan["caches"] for p in PRECISIONS]
        wanted = [(p, kv) for p, kv in names if self._wanted(p + KV8 * (kv == "int8"))]
        needed = list(dict.fromkeys(wanted + [(p.partition("+")[0], kv) for p, kv in wanted]))
        root = self.folder / f"bundles-{self._export_digest()}"
        for kv in self.plan["caches"]:
            missing = [p for p, k in needed if k == kv and not (root / kv / p / MANIFEST_NAME).exists()]
            if missing:
                self._export(root / kv, kv, missing)
        found = {(p, kv): load_bundle(root / kv / p, verify=False) for p, kv in needed}
        return [self._bundle_point(p, kv, found) for p, kv in wanted]

    def _export(self, target: Path, kv: str, precisions: Sequence[str]) -> None:
        partial = self.folder / f"partial-bundles-{kv}"
        shutil.rmtree(partial, ignore_errors=True)
        context = ["--context", str(self.plan["context"])] if self.plan["context"] else []
        data = [argument for path in self.plan["data"] for argument in ("--data", path)]
        begin = time.monotonic()
        command = [*RYOT, "export", self.source, "--precisions", ",".join(precisions), "--kv-cache", kv]
        name = f"bundles {kv}"
        if failure := self._run(name, [*command, *context, *data, "-o", partial], (EXIT_OK, EXIT_QUALITY)):
            raise SystemExit(failure)
        self.export_s[f"{','.join(precisions)} {kv}"] = round(time.monotonic() - begin, 1)
        target.mkdir(parents=True, exist_ok=True)
        for precision in precisions:
            (partial / precision).replace(target / precision)
        shutil.rmtree(partial, ignore_errors=True)

    def _bundle_point(self, precision: str, kv: str, found: dict[tuple[str, str], Bundle]) -> Point:
        bundle, (prefill, _, decode) = found[precision, kv], precision.partition("+")
        one = found.get((decode or prefill, kv))
        graphs = [bundle, found[prefill, kv]] if decode else [bundle]
        return Point(
            name=precision + KV8 * (kv == "int8"),
            family="ryot",
            path=str(bundle.path),
            size_bytes=bundle.size_bytes,
            step_bytes=one.weight_bytes if one else None,
            graphs=tuple(str(b.path / b.graphs["standard"]) for b in graphs),
        )

    def _export_digest(self) -> str:
        root = Path(ryot.__file__).parent
        digest = hashlib.sha256()
        for part in EXPORTING:
            for path in sorted((root / part).rglob("*.py")):
                digest.update(path.read_bytes())
        source = Path(self.source)
        stat = source.stat() if source.exists() else None
        digest.update(repr((self.source, stat and (stat.st_size, stat.st_mtime_ns), self.plan["data"])).encode())
        digest.update(repr(self.plan["context"]).encode())
        return digest.hexdigest()[:12]

    def _ggufs(self, f16: Path) -> list[Point]:
        points = []
        for kind in LLAMA_TYPES:
            if not self._wanted(kind):
                continue
            path: Path | None = f16
            if kind != "F16":
                partial = self.folder / f"partial-{kind}.gguf"
                path = self.folder / f"{kind}.gguf"
                if not path.exists():
                    if failure := self._run(kind, [self.llama / "llama-quantize", f16, partial, kind]):
                        self.notes.append(failure)
                        continue
                    partial.replace(path)
                log = self.folder / "logs" / f"{kind}.txt"
                if log.exists() and "fallback quantization" in log.read_text(errors="replace"):
                    self.notes.append(f"{kind}: widths that are no multiple of 256 took other types, by llama.cpp")
            assert path is not None
            tensors = sum(int(t.n_bytes) for t in GGUFReader(path).tensors)
            points.append(
                Point(
                    name=kind,
                    family="llama.cpp",
                    path=str(path),
                    size_bytes=path.stat().st_size,
                    step_bytes=tensors,
                )
            )
        return points

    def _genai(self, hf: Path) -> list[Point]:
        wanted = [p for p in GENAI_PRECISIONS if self._wanted(f"genai {p}")]
        if wanted and importlib.util.find_spec("onnxruntime_genai") is None:
            self.notes.append("genai: skipped, onnxruntime-genai is not installed")
            return []
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", hf, "-e", "cpu"]
        points = []
        for precision in wanted:
            command = [*builder, "-p", precision, "-c", self.folder / "genai-cache"]
            if path := self._once(f"genai-{precision}", command, "-o", optional=True):
                points.append(_onnx_point(f"genai {precision}", "genai", path))
        return points

    def _mobius(self, hf: Path) -> list[Point]:
        names = {"mobius fp32": None, **{f"mobius {kind}": kind for kind in MOBIUS_KEPT}}
        wanted = {name: kind for name, kind in names.items() if self._wanted(name)}
        if wanted and importlib.util.find_spec("mobius") is None:
            self.notes.append("mobius: skipped, mobius-onnx is not installed")
            return []
        mobius = [sys.executable, "-m", "mobius"]
        common = ["--ep", "cpu", "--runtime", "ort-genai"]
        # Its files of settings serve the others too: offline it writes none for a GGUF file.
        full = self._once("mobius-fp32", [*mobius, "build", *common, "--config", hf], optional=True) if wanted else None
        points = []
        for name, kind in wanted.items():
            path = full
            if kind is not None and full is not None:
                gguf = self.folder / f"{kind}.gguf"
                if not gguf.exists():
                    self.notes.append(f"{name}: skipped, it is made from {kind}, which is left out")
                    continue
                command = [*mobius, "build-gguf", gguf, "--keep-quantized", *common]
                path = self._once(f"mobius-{kind}", command, "-o", optional=True)
                if path and not (path / "genai_config.json").exists():
                    for file in full.glob("*.json"):
                        shutil.copy(file, path)
            if path:
                points.append(_onnx_point(name, "mobius", path))
        return points


def _onnx_point(name: str, family: str, path: Path) -> Point:
    files = [file for file in path.rglob("*") if file.is_file()]
    graph = next(file for file in files if file.name == "model.onnx")
    data = sum(file.stat().st_size for file in files if file.suffix == ".data")
    return Point(
        name=name,
        family=family,
        path=str(path),
        size_bytes=sum(file.stat().st_size for file in files),
        step_bytes=data or None,
        graphs=(str(graph),),
    )


def _tensor_types(source: Path) -> dict[str, int]:
    """Number of values of each type in a GGUF source: what the weights were before they became float32."""
    if source.suffix != ".gguf":
        return {}
    found: dict[str, int] = {}
    for tensor in GGUFReader(source).tensors:
        found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return found


def _open_if_dead(process: subprocess.Popen[bytes], pipe: Path) -> None:
    process.wait()
    with contextlib.suppress(FileNotFoundError):  # it was read to its end
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    made = Maker(plan).make()
    (Path(plan["folder"]) / "models.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
