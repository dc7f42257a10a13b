"""What we write as GGUF, run by llama.cpp's own server: its token ids are transformers' own."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ryot.models.sources.opening import open_checkpoint
from ryot.models.sources.write_gguf import write_gguf
from ryot.models.sources.write_hf import write_hf
from tests.models.sources.tiny import FAMILIES, byte_level

PROMPT = "def f(x): return x + 1 The quick ünïcødé<|im_end|>"


@contextmanager
def serving(program: str, model: Path) -> Iterator[Callable[[str, dict[str, object]], Any]]:
    """A server for the model; gives the function that asks it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "-t", "1", "-c", "128", "-np", "1", "--no-webui"]
    server = subprocess.Popen([program, "-m", str(model), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ask(path: str, body: dict[str, object]) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        deadline = time.monotonic() + 60
        while True:
            if server.poll() is not None:
                _, log = server.communicate()
                pytest.fail(f"llama-server ended: {log.decode(errors='replace')[-800:]}")
            try:
                ask("/tokenize", {"content": "a"})
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "llama-server does not answer"
                time.sleep(0.05)
        yield ask
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "F16") for name in FAMILIES), ("llama", "Q8_0"), ("qwen3", "Q8_0"), ("gemma3", "Q8_0")]
)
def test_llama_cpp_continues_as_transformers_does(
    name: str, kind: str, family_folder: Callable[[str], Path], llama_server: str, tmp_path: Path
) -> None:
    write_gguf(open_checkpoint(str(family_folder(name))), tmp_path / "model.gguf", kind)  # type: ignore[arg-type]
    write_hf(open_checkpoint(str(tmp_path / "model.gguf")), tmp_path / "weights")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.float32)
    ids, expected = byte_level()(PROMPT).input_ids, []
    with torch.no_grad():
        for _ in range(12):
            best = model(torch.tensor([ids + expected])).logits[0, -1].topk(2)
            # llama.cpp rounds what it multiplies with to float16, or to 8 bits in blocks of 32.
            if best.values[0] - best.values[1] < (0.02 if kind == "F16" else 0.3):
                break
            expected.append(int(best.indices[0]))
    with serving(llama_server, tmp_path / "model.gguf") as ask:
        assert ask("/tokenize", {"content": PROMPT, "add_special": True})["tokens"] == ids
        options = {"n_predict": 12, "temperature": 0.0, "return_tokens": True, "ignore_eos": True}
        tokens = ask("/completion", {"prompt": PROMPT, **options})["tokens"]
    assert tokens[: len(expected)] == expected


#: Relative error that each of llama.cpp's kinds leaves of random weights; bits and block size of ggml's blocks say so.
QUANTIZED = {"BF16": 0.003, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K_M": 0.06, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_K_M": 0.1}


@pytest.mark.parametrize("kind", [*QUANTIZED, "Q4_1", "Q4_0"])
def test_what_llama_cpp_quantized_is_read_near_to_what_it_was(
    kind: str, family_folder: Callable[[str], Path], llama_server: str, tmp_path: Path
) -> None:
    program = Path(llama_server).with_name("llama-quantize")
    if not program.exists():
        pytest.skip(f"{program} is not there")
    source = open_checkpoint(str(family_folder("llama_rope_llama3")))
    write_gguf(source, tmp_path / "f16.gguf", "F16")
    subprocess.run([program, tmp_path / "f16.gguf", tmp_path / "q.gguf", kind], check=True, capture_output=True)
    back = open_checkpoint(str(tmp_path / "q.gguf"))
    assert kind.removesuffix("_M") in {back.dtype(name) for name in back.names()}
    for name in source.names():
        values, error = source.load(name), back.load(name) - source.load(name)
        assert (error**2).mean() <= QUANTIZED.get(kind, 0.11) ** 2 * (values**2).mean(), name


def test_llama_cpp_answers_from_smollm2_written_again(llama_server: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    """The whole way with real weights, GGUF Q4_1 in and F16 out, and the answer that transformers gives.

    With activations of 8 bits (its own Q4_1, or Q8_0) llama.cpp begins in French: the first two tokens nearly tie.
    """
    write_gguf(open_checkpoint(str(smollm2_gguf)), tmp_path / "smollm2.gguf", "F16")
    question = {"role": "user", "content": "What is the capital of France?"}
    with serving(llama_server, tmp_path / "smollm2.gguf") as ask:
        answer = ask("/v1/chat/completions", {"messages": [question], "temperature": 0.0, "max_tokens": 24})
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"
