"""The C program does what a bundle's run.py does: the same golden tokens, the same text, the same refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ryot.edge.bundle import load_bundle
from ryot.edge.c_library import PLACES
from ryot.edge.capi import CApiEngine
from ryot.edge.generate import check_golden, generate
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.tokenizer import load_tokenizer
from tests.edge.tiny_bundle import write_manifest

from .native import FOLDER, Native

BUNDLES: dict[str, dict[str, object]] = {
    "one graph": {},
    "a pair with positions": {"position_ids": True, "two_sessions": True, "seed": 3},
    "int8 cache": {"kv_dtype": "int8", "seed": 1},
    "a pair with an int8 cache": {"kv_dtype": "int8", "two_sessions": True, "seed": 2},
}
SAMPLINGS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 1.5, "seed": 3},
    "top-k": {"temperature": 1.0, "top_k": 7, "seed": 2**40 + 1},
    "top-p": {"temperature": 2.0, "top_p": 0.8},
    "min-p": {"temperature": 1.3, "min_p": 0.05, "seed": 11},
    "all cuts": {"temperature": 3.0, "top_k": 300, "top_p": 0.95, "min_p": 0.001, "seed": 5},
    "penalty": {"repetition_penalty": 1.3},
    "penalty and draw": {"temperature": 0.9, "repetition_penalty": 1.2, "seed": 8},
    "nearly no temperature": {"temperature": 1e-46, "seed": 2},
    "nearly no penalty": {"temperature": 1.5, "repetition_penalty": 1e-46, "seed": 4},
}


def python_text(
    bundle: Path,
    prompt: str,
    num_tokens: int,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    **sampling: float,
) -> str:
    """What run.py prints."""
    loaded = load_bundle(bundle)
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    generation = generate(
        CApiEngine(loaded),
        load_tokenizer(loaded),
        prompt,
        max_new_tokens=num_tokens,
        sampling=params,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    return "".join(generation) + "\n"


def flags(sampling: dict[str, float]) -> list[str]:
    return [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def tiny(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_places_are_those_of_the_python_engine():
    source = (FOLDER / "onnxruntime.c").read_text()
    body = source[source.index("enum place {") : source.index("};")]
    assert {name: int(place) for name, place in re.findall(r"(\w+) = (\d+)", body)} == PLACES


@pytest.mark.parametrize("kind", BUNDLES)
def test_golden_tokens_and_greedy_text_are_those_of_python(kind: str, native: Native, make_bundle: Callable[..., Path]):
    bundle = make_bundle(**BUNDLES[kind])
    loaded = load_bundle(bundle)
    compared = check_golden(CApiEngine(loaded))
    total = sum(len(golden.tokens) for golden in loaded.golden)
    files = f"{loaded.name}: {len(loaded.files)} files as in the manifest"
    assert native.text(bundle, "--verify") == f"{files}, {compared} of {total} golden tokens compared and equal\n"
    prompt = "def add(a, b):\n    return Gr\u00fc\u00dfe"
    assert native.text(bundle, prompt, "--max-new-tokens", 20) == python_text(bundle, prompt, 20)


@pytest.mark.parametrize("kind", ["one graph", "a pair with an int8 cache"])
def test_the_library_generates_and_verifies_as_python_does(
    kind: str, native: Native, make_bundle: Callable[..., Path]
) -> None:
    """Several texts from one model in one process, which is what a program that links it does."""
    bundle = make_bundle(**BUNDLES[kind])
    loaded = load_bundle(bundle)
    library = native.open(bundle)
    try:
        checked = library.verify()
        assert (checked.files, checked.golden_tokens) == (len(loaded.files), sum(len(g.tokens) for g in loaded.golden))
        assert checked.compared == check_golden(CApiEngine(loaded)) > 0
        for sampling in ({}, SAMPLINGS["all cuts"], {}):
            text, answer = library.generate(b"def f(x):", 12, **sampling)
            assert text == python_text(bundle, "def f(x):", 12, **sampling).removesuffix("\n")
            assert answer.whole and 0 < answer.first_token_ns <= answer.whole_ns
            assert answer.prompt_tokens == len(library.encode("def f(x):"))
            assert 0 < answer.generated_tokens <= 12
        begun, answer = library.generate(b"def f(x):", 12, pieces=1)
        assert text.startswith(begun) and not answer.whole
        with pytest.raises(ValueError, match="UTF-8"):
            library.generate(b"\xff", 4)
    finally:
        library.close()
    copy = Path(shutil.copytree(bundle, bundle.parent / "wrong"))
    golden = json.loads((copy / "ryot_manifest.json").read_text())["golden"]
    golden[0]["tokens"][0] = (golden[0]["tokens"][0] + 1) % loaded.model.vocab_size
    write_manifest(copy, golden=golden)
    library = native.open(copy)
    try:
        with pytest.raises(ValueError, match="golden"):
            library.verify()
    finally:
        library.close()


def test_a_long_text_grows_the_cache_and_is_that_of_python(native: Native, make_bundle: Callable[..., Path]):
    bundle = make_bundle(context=1100, seed=4)
    prompt = "def add(a, b): " * 40  # more than one piece of 256 tokens
    got = native.text(bundle, "-", "--max-new-tokens", 560, "--ignore-eos", stdin=prompt.encode())
    assert got == python_text(bundle, prompt, 560, ignore_eos=True)


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_seed_gives_the_text_of_python(kind: str, native: Native, tiny: Path):
    sampling = SAMPLINGS[kind]
    assert native.text(tiny, "class", "--max-new-tokens", 50, *flags(sampling)) == python_text(
        tiny, "class", 50, **sampling
    )


def test_a_stop_string_ends_the_text_before_it(native: Native, tiny: Path):
    whole = python_text(tiny, "class", 50, temperature=1.5, seed=3)
    stop = whole[7:10]
    sampling = flags({"temperature": 1.5, "seed": 3})
    got = native.text(tiny, "class", "--max-new-tokens", 50, *sampling, "--stop", "never", "--stop", stop)
    assert got == python_text(tiny, "class", 50, ("never", stop), temperature=1.5, seed=3)
    assert got == whole[: whole.index(stop)] + "\n"


def test_a_prompt_comes_from_stdin(native: Native, tiny: Path):
    prompt = "Gr\u00fc\u00dfe, \u65e5\u672c\u8a9e\n"
    ids = load_tokenizer(load_bundle(tiny)).encode(prompt)
    for arguments in ([], ["-"]):
        assert native.text(tiny, *arguments, "--ids", stdin=prompt.encode()) == " ".join(map(str, ids)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        ([], 2, "BUNDLE: is missing"),
        (["{bundle}", "a", "b"], 2, "b: one prompt is taken; put it in quotes"),
        (["{bundle}", "a", "--colour"], 2, "--colour: unknown, or without its value"),
        (["{bundle}", "a", "--seed", "x"], 2, "--seed: expected a whole number not below 0"),
        (["{bundle}", "a", "--threads", "0"], 2, "--threads: expected a whole number above 0"),
        (["{bundle}", "a", "--top-p", "1.5"], 2, "top_p: got 1.5, expected a number above 0, at most 1"),
        (["{bundle}", "a", "--stop", ""], 2, "stop: got an empty string, expected at least one character"),
        (["{bundle}", b"a\xff"], 2, "prompt: is not UTF-8 (byte 0xff at offset 1)"),
        (
            ["{bundle}", "a", "--max-new-tokens", "64"],
            1,
            "a prompt of 1 tokens and 64 new ones does not fit the context of 64 tokens",
        ),
        (["{bundle}/nowhere", "a"], 1, "{bundle}/nowhere: not a bundle (No such file or directory)"),
        (
            ["{bundle}/fast.onnx", "a"],
            1,
            "{bundle}/fast.onnx: not a bundle, it is a file; give the folder that holds ryot_manifest.json",
        ),
        (["/", "a"], 1, "/: not a bundle, it has no ryot_manifest.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str | bytes], code: int, error: str, native: Native, tiny: Path
):
    given = [a if isinstance(a, bytes) else a.format(bundle=tiny) for a in arguments]
    command = [a.decode("utf-8", "surrogateescape") if isinstance(a, bytes) else a for a in given]
    done = native.run(*command)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.decode().splitlines()[0] == f"Error: {error.format(bundle=tiny)}"


def test_a_missing_or_strange_library_is_said_in_one_line(native: Native, tiny: Path):
    done = native.run(tiny, "a", "--onnxruntime", "/nowhere/libonnxruntime.so")
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: onnxruntime's library cannot be loaded: /nowhere/libonnxruntime.so: ")
    done = native.run(tiny, "a", RYOT_ONNXRUNTIME="libm.so.6")
    assert (done.returncode, done.stderr) == (1, b"Error: libm.so.6: is not onnxruntime's library\n")


def test_a_bundle_for_a_newer_onnxruntime_or_program_is_refused(native: Native, copy: Path):
    write_manifest(copy, onnxruntime_min="999.1")
    done = native.run(copy, "a")
    assert done.returncode == 1
    assert b"is too old for this bundle, which needs 999.1 or later" in done.stderr
    write_manifest(copy, schema=2)
    done = native.run(copy, "a")
    assert done.returncode == 1
    assert (
        b"schema 2 is newer than 1, the newest that this program reads\nhint: use the bundle's own run.py"
        in done.stderr
    )


@pytest.mark.parametrize("name", ["fast.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_flipped_bit_is_refused_before_any_text(name: str, native: Native, copy: Path):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    for arguments in (["a"], ["--verify"]):
        done = native.run(copy, *arguments)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(f"Error: bundle manifest: sha256 of {name} is ".encode())


def test_verify_hashes_what_text_does_not_need(native: Native, copy: Path):
    data = bytearray((copy / "model.onnx").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx").write_bytes(data)
    assert native.run(copy, "a").returncode == 0
    assert b"sha256 of model.onnx is " in native.run(copy, "--verify").stderr


def test_wrong_golden_tokens_are_told(native: Native, copy: Path):
    manifest = json.loads((copy / "ryot_manifest.json").read_text())
    manifest["golden"][1]["tokens"][2] ^= 1
    (copy / "ryot_manifest.json").write_text(json.dumps(manifest))
    done = native.run(copy, "--verify")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b": golden prompt 2: token 3 is " in done.stderr


def test_a_reader_that_has_seen_enough_ends_it(native: Native, tiny: Path):
    command = ["bash", "-c", '"$0" "$1" class --ignore-eos | head -c 1; echo " ${PIPESTATUS[0]}"', native.program, tiny]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert done.stdout.endswith(b" 0\n")
    assert done.stderr == b""
    full = subprocess.run(f"{native.program} {tiny} class > /dev/full", shell=True, capture_output=True, text=True)
    assert (full.returncode, full.stderr) == (1, "Error: stdout cannot be written (No space left on device)\n")
