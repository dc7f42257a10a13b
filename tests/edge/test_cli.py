"""The bundle's own command line, as a process: output, errors, exit codes, imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ryot.edge.bundle import load_bundle
from ryot.edge.generate import generate
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.session import Decoder
from ryot.edge.tokenizer import load_tokenizer

RUN = """
import sys
from pathlib import Path
from ryot.edge.cli import run
sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
"""


def run_cli(bundle: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(bundle), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", check=False)


def expected_text(path: Path, prompt: str, **options: object) -> str:
    bundle = load_bundle(path)
    return "".join(generate(Decoder(bundle), load_tokenizer(bundle), prompt, **options))  # type: ignore[arg-type]


def test_the_text_goes_to_stdout(llama_path: Path) -> None:
    run = run_cli(llama_path, "--prompt", "def ", "--max-new-tokens", "12")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == expected_text(llama_path, "def ", max_new_tokens=12) + "\n"


def test_sampling_options_are_passed_on(llama_path: Path) -> None:
    flags = ["--temperature", "1.2", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", "3"]
    more = ["--repetition-penalty", "1.1", "--ignore-eos", "--max-new-tokens", "9"]
    run = run_cli(llama_path, "--prompt", "-", *flags, *more, stdin="class ")
    sampling = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, seed=3, repetition_penalty=1.1)
    text = expected_text(llama_path, "class ", max_new_tokens=9, sampling=sampling, ignore_eos=True)
    assert run.stdout == text + "\n"


def test_a_prompt_is_continued_as_far_as_the_context_goes_by_default(llama_path: Path) -> None:
    run = run_cli(llama_path, "--prompt", "def " * 12, "--ignore-eos")
    assert (run.returncode, run.stdout) == (0, expected_text(llama_path, "def " * 12, ignore_eos=True) + "\n")


@pytest.mark.parametrize("stdin", [False, True])
def test_a_prompt_is_utf8_in_every_locale(llama_path: Path, stdin: bool) -> None:
    c_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def run(prompt: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", RUN, llama_path, "--prompt", "-" if stdin else prompt, "--max-new-tokens", "4"]
        return subprocess.run(command, input=prompt, capture_output=True, env=os.environ | c_locale, check=False)

    good = run("größe ".encode())
    assert (good.returncode, good.stdout.decode()) == (0, expected_text(llama_path, "größe ", max_new_tokens=4) + "\n")
    bad = run(b"caf\xe9")
    assert (bad.returncode, bad.stdout) == (2, b"")
    assert bad.stderr == b"Error: --prompt: is not UTF-8 (byte 0xe9 at offset 3)\n"


def test_verify_checks_hashes_and_golden_tokens(llama_path: Path, tmp_path: Path) -> None:
    run = run_cli(llama_path, "--verify")
    assert (run.returncode, run.stdout) == (
        0,
        "tiny-0: 4 files as in the manifest, 24 of 24 golden tokens compared and equal\n",
    )
    copy = Path(shutil.copytree(llama_path, tmp_path / "copy"))
    manifest = json.loads((copy / "ryot_manifest.json").read_text())
    manifest["golden"][0]["tokens"][0] ^= 1
    (copy / "ryot_manifest.json").write_text(json.dumps(manifest))
    run = run_cli(copy, "--verify")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"Error: bundle {copy}: golden prompt 1: token 1 is")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--prompt", "x " * 90],
            1,
            "Error: a prompt of 180 tokens and 1 new ones does not fit the context of 64 tokens",
        ),
        (
            ["--prompt", "x", "--max-new-tokens", "0"],
            2,
            "Error: max_new_tokens: got 0, expected a whole number above 0",
        ),
        (["--prompt", "x", "--top-p", "3"], 2, "Error: top_p: got 3.0, expected a number above 0, at most 1"),
        (["--prompt", "x", "--threads", "0"], 2, "Error: --threads: got 0, expected a whole number above 0"),
        (["--prompt", "x", "--stop", ""], 2, "Error: stop: got an empty string, expected at least one character"),
        (["--bench", "--rounds", "0"], 2, "Error: --rounds: got 0, expected a whole number above 0"),
        (["--prompt", "x", "--nonsense"], 2, "run.py: error: unrecognized arguments: --nonsense"),
        ([], 2, "run.py: error: one of the arguments --prompt --verify --bench is required"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(llama_path: Path, arguments: list[str], code: int, message: str) -> None:
    run = run_cli(llama_path, *arguments)
    assert (run.returncode, run.stdout) == (code, "")
    assert message in run.stderr.splitlines()
    assert "Traceback" not in run.stderr


def test_a_damaged_bundle_answers_nothing(llama_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama_path, tmp_path / "copy"))
    content = bytearray((copy / "model.onnx.data").read_bytes())
    content[-1] ^= 1
    (copy / "model.onnx.data").write_bytes(content)
    run = run_cli(copy, "--prompt", "def ")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("Error: bundle manifest: sha256 of model.onnx.data is ")


def test_the_bench_prints_figures_or_raw_results(llama_path: Path) -> None:
    run = run_cli(llama_path, "--bench", "--rounds", "1")
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert lines[0].startswith("fp32, batch 1, threads 1, 1 processes")
    assert [line.split()[0] for line in lines[1:]] == ["TTFT", "TTFT", "decode", "first", "load", "peak"]
    run = run_cli(llama_path, "--bench", "--rounds", "1", "--json")
    assert json.loads(run.stdout)["results"][0]["ok"]


def test_help_needs_no_runtime(llama_path: Path) -> None:
    code = RUN.replace("import sys", "import sys; sys.modules['numpy'] = sys.modules['onnxruntime'] = None")
    run = subprocess.run(
        [sys.executable, "-c", code, str(llama_path), "-h"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    assert 'example: python run.py --prompt "def "' in run.stdout


def test_the_package_imports_only_what_a_device_has() -> None:
    script = (
        "import importlib, json, pkgutil, sys, ryot.edge\n"
        "for module in pkgutil.iter_modules(ryot.edge.__path__): importlib.import_module(f'ryot.edge.{module.name}')\n"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout))
    assert {"numpy", "onnxruntime", "tokenizers", "ryot"} <= loaded
    forbidden = {"torch", "onnx", "ray", "click", "tabulate", "safetensors", "transformers", "matplotlib"}
    assert not forbidden & loaded
