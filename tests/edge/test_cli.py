"""The bundle's own command line, as a process: output, errors, exit codes, imports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ryot.edge.bundle import load_bundle
from ryot.edge.cli import run
from ryot.edge.generate import generate
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.tokenizer import load_tokenizer

from .tiny_bundle import write_manifest

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
    return "".join(generate(OnnxruntimeEngine(bundle), load_tokenizer(bundle), prompt, **options))  # type: ignore[arg-type]


def test_the_text_goes_to_stdout(llama_path: Path) -> None:
    run = run_cli(llama_path, "--prompt", "def ", "--max-new-tokens", "12")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == expected_text(llama_path, "def ", max_new_tokens=12) + "\n"


def test_drafts_change_no_text(llama_path: Path) -> None:
    options = ("--prompt", "def def def def ", "--max-new-tokens", "40", "--ignore-eos")
    run = run_cli(llama_path, *options, "--speculate")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == run_cli(llama_path, *options).stdout
    run = run_cli(llama_path, *options, "--speculate", "--best-of", "2", "--verifier", "json", "--temperature", "1")
    assert run.returncode == 2 and "--speculate: is for --prompt alone" in run.stderr


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


def test_verify_refuses_8_bit_products_where_their_sums_overflow(
    llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The CPU is a fake one: golden tokens alone were seen to pass on a real kernel that overflows."""
    copy = Path(shutil.copytree(llama_path, tmp_path / "bundle"))
    write_manifest(copy, precision="int8-dyn+int4", quantization={"dynamic_bits": 8})
    for isa, code in ((["avx2"], 1), (["avx2", "avx512"], 1), (["avx2", "avx-vnni"], 0), (["neon"], 0), ([], 0)):
        monkeypatch.setattr("ryot.edge.machine.describe_cpu", lambda isa=isa: {"isa": isa})
        assert run(copy, ["--verify"]) == code
        assert ("no VNNI" in capsys.readouterr().err) == (code == 1)


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
        ([], 2, "run.py: error: one of the arguments --prompt --chat --verify --bench is required"),
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
    forbidden = {"torch", "onnx", "ray", "click", "tabulate", "safetensors", "transformers", "matplotlib", "jinja2"}
    assert not forbidden & loaded


def test_a_first_token_waits_for_no_dataclass() -> None:
    """`dataclasses` imports `inspect` and compiles what it makes: milliseconds of every start."""
    script = (
        "import json, sys\n"
        "import ryot.edge.cli, ryot.edge.capi, ryot.edge.text_stream\n"
        "print(json.dumps(list(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"dataclasses", "inspect", "ryot.mapping", "numpy"} & set(json.loads(run.stdout))


#: Short, for a context of 64 tokens.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def chat_path(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(llama_path, tmp_path_factory.mktemp("bundle") / "chat"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    write_manifest(path)
    return path


def answer_to(path: Path, text: str, num_tokens: int) -> str:
    bundle = load_bundle(path)
    tokenizer = load_tokenizer(bundle)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return "".join(generate(OnnxruntimeEngine(bundle), tokenizer, ids, max_new_tokens=num_tokens, ignore_eos=True))


CUT = "note: the answer was cut after 4 tokens\n"
SHORT = ["--max-new-tokens", "4", "--ignore-eos"]


def test_one_message_is_answered_by_the_template(chat_path: Path) -> None:
    run = run_cli(chat_path, "--chat", "--prompt", "hi", "--system", "S", *SHORT)
    assert (run.returncode, run.stderr) == (0, CUT)
    assert run.stdout == answer_to(chat_path, "s:S\nu:hi\na:", 4) + "\n"


def test_a_chat_answers_each_line_of_stdin_until_it_ends(chat_path: Path) -> None:
    run = run_cli(chat_path, "--chat", *SHORT, stdin="hi\n\n  \r\nü go\r\n")
    first = answer_to(chat_path, "u:hi\na:", 4)
    second = answer_to(chat_path, f"u:hi\na:{first}\nu:ü go\na:", 4)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{first}\n{second}\n", CUT + CUT)


def test_a_line_that_does_not_fit_is_left_out_and_the_chat_goes_on(chat_path: Path) -> None:
    run = run_cli(chat_path, "--chat", *SHORT, stdin="z" * 90 + "\nhi\n")
    assert (run.returncode, run.stdout) == (0, answer_to(chat_path, "u:hi\na:", 4) + "\n")
    assert run.stderr.startswith("Error: a message of 95 tokens, template included, and 4 for its answer do not fit")
    run = run_cli(chat_path, "--chat", "--prompt", "z" * 90, *SHORT)
    assert (run.returncode, run.stdout) == (1, "")


def test_an_interrupted_chat_ends_with_130(chat_path: Path) -> None:
    # The child takes SIGINT also where this process was started with it ignored.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + RUN
    command = [sys.executable, "-c", program, str(chat_path), "--chat", *SHORT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"hi\n")
        child.stdin.flush()
        answer = answer_to(chat_path, "u:hi\na:", 4).encode() + b"\n"
        assert child.stdout.read(len(answer)) == answer
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate()
    assert child.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "x", "--system", "S"], 2, "Error: --system: is for a chat; give --chat too"),
        (
            ["--chat", "--best-of", "2", "--verifier", "json"],
            2,
            "Error: --best-of: is for --prompt alone, not for a chat",
        ),
        (["--chat", "--prompt", "x", "--max-new-tokens", "0"], 2, "Error: max_new_tokens: got 0, expected a whole"),
        (["--prompt", "a\udcff"], 2, "Error: --prompt: is not UTF-8 (byte 0xff at offset 1)"),
    ],
)
def test_options_of_a_chat_are_checked(chat_path: Path, arguments: list[str], code: int, message: str) -> None:
    run = run_cli(chat_path, *arguments)
    assert (run.returncode, run.stdout) == (code, "")
    assert run.stderr.startswith(message)
    assert "Traceback" not in run.stderr


def test_a_bundle_without_a_template_has_no_chat(llama_path: Path) -> None:
    run = run_cli(llama_path, "--chat", "--prompt", "hi")
    assert (run.returncode, run.stdout) == (1, "")
    assert "the model has no chat template" in run.stderr
    assert "hint: use --prompt" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat"], b"Error: stdin: is not UTF-8 (invalid start byte at byte 1)\n"),
        (["--prompt", "-"], b"Error: --prompt: is not UTF-8 (byte 0xff at offset 1)\n"),
    ],
)
def test_stdin_that_is_not_utf8_is_refused_in_one_line(chat_path: Path, arguments: list[str], message: bytes) -> None:
    command = [sys.executable, "-c", RUN, str(chat_path), *arguments]
    run = subprocess.run(command, input=b"a\xff\n", capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (1 if arguments == ["--chat"] else 2, b"")
    assert run.stderr == message


def test_special_tokens_in_a_prompt_can_be_plain_text(chat_path: Path) -> None:
    bundle = load_bundle(chat_path)
    tokenizer = load_tokenizer(bundle)
    prompt = "<|endoftext|>"
    for flags, split in ((), False), (["--split-special-tokens"], True):
        ids = tokenizer.encode(prompt, split_special_tokens=split)
        assert (len(ids) > 1) is split
        run = run_cli(chat_path, "--prompt", prompt, *flags, *SHORT)
        text = "".join(generate(OnnxruntimeEngine(bundle), tokenizer, ids, max_new_tokens=4, ignore_eos=True))
        assert run.stdout == text + "\n"
