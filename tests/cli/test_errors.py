"""Bad input: one line that names the thing, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ryot.cli.main import run

RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]


def ryot(
    *arguments: object,
    cwd: Path | None = None,
    before: Callable[[], None] | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command; `before` is called in its process first."""
    return subprocess.run(
        [*RYOT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
        preexec_fn=before,
    )


def ryot_here(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported already what takes a command of training or export its seconds."""
    out, err, code = io.StringIO(), io.StringIO(), None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            unittest.mock.patch.dict(os.environ, env or {}),
        ):
            run(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def drop_override() -> None:
    """Let a program that root starts next meet file permissions as their owner does (Linux: CAP_DAC_OVERRIDE is 1)."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0


def check_refused(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.returncode == code, result.stderr
    assert len(errors) == 1 and re.search(message, errors[0]), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


needs_no_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")

USAGE = [
    (("--preset", "refrence"), r"preset: 'refrence' is not known; did you mean 'reference'\?"),
    (("--variants", "baseline,optimised"), r"variant: 'optimised' is not known; did you mean 'optimized'\?"),
    (("--target", "phase2"), r"target: 'phase2' is not known; did you mean 'phase1'\?"),
    (("--precisions", "fp32,int6"), r"precision: 'int6' is not known; did you mean 'int[48]'\?"),
    (("--tokens", "-5"), "-5 is not in the range"),
    (("--tokens", "9"), "tokens: got 9, expected a budget longer than the warm-up of 1 steps of 1024 tokens"),
    (("--seeds", "0"), "0 is not in the range"),
    (("--seeds", "two"), "'two' is not a valid integer"),
    (("--data", "/no/such/path"), "data: /no/such/path does not exist"),
    (("--config", "/no/such.toml"), r"/no/such\.toml: cannot be read"),
    (("--resume", "/no/such"), "resume /no/such: is not a run folder"),
    (("--variants", "baseline,baseline"), "variants: baseline, baseline names one twice"),
    (("--no-such-option",), "No such option"),
    pytest.param(
        ("--device", "cuda"), "device: got 'cuda', but torch sees no CUDA device here", marks=needs_no_gpu, id="cuda"
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), USAGE, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    check_refused(ryot("cluster-run", *arguments, cwd=tmp_path), 2, message)
    leftovers = [p for p in tmp_path.rglob("*") if p.name in ("report.json", "bundle")]
    assert leftovers == []


def test_a_grid_of_impossible_lengths_is_refused(tmp_path: Path) -> None:
    check_refused(ryot("bench", tmp_path, "-p", "0"), 2, "'0' is not a list of whole numbers above 0")


def test_a_target_file_that_is_wrong_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[limits]\nttft = 5\n")
    result = ryot("cluster-run", "--target", tmp_path / "mine.toml", "-o", tmp_path / "run")
    check_refused(result, 2, r"key 'ttft' has no unit; did you mean 'ttft_ms'\?")
    assert not (tmp_path / "run").exists()


def test_an_unknown_command_names_the_nearest() -> None:
    check_refused(ryot("cluster-rum"), 2, "command: 'cluster-rum' is not known; did you mean 'cluster-run'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("presett = 'reference'", "key: 'presett' is not known; did you mean 'preset'"),
        ("seeds = 'many'", "seeds: got 'many', expected a whole number"),
        ("device = 'gpu'", "device: 'gpu' is not known; did you mean 'cpu'"),
        ("seeds = -1", "seeds: got -1, expected a whole number above 0"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_wrong_config_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(content)
    check_refused(ryot("cluster-run", "--config", tmp_path / "run.toml"), 2, message)


def test_a_wrong_recipe_file_is_refused_with_the_nearest_key(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nlearning_rat = 1.0\n")
    result = ryot("cluster-run", "--variants", f"baseline,{tmp_path / 'mine.toml'}", "--dry-run")
    check_refused(result, 2, "key: 'learning_rat' is not known; did you mean 'learning_rate'")


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    from ryot.config import find_named

    text = find_named("variants", "optimized").read_text()
    (tmp_path / "odd.toml").write_text(text.replace("[model]\n", "[model]\nnum_heads = 3\n"))
    result = ryot("cluster-run", "--variants", tmp_path / "odd.toml", "--dry-run")
    check_refused(result, 2, "num_heads: got 3, expected a divisor of dim 128")


def test_an_output_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    check_refused(ryot("cluster-run", "-o", tmp_path), 2, "is not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_output_folder_that_is_not_writable_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    # Root may write everywhere, so that privilege is given up first.
    result = ryot("cluster-run", "-o", tmp_path / "run", before=drop_override if os.geteuid() == 0 else None)
    check_refused(result, 2, "is not writable")


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_refused(ryot("cluster-run", "-o", tmp_path / "file"), 2, "is a file, expected a folder")
    check_refused(ryot("cluster-run", "-o", tmp_path / "file" / "run"), 2, "is not writable")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("binary.dat", b"\x00\x01" * 50, "is a binary file, expected UTF-8 text"),
        ("latin.txt", "größe".encode("latin-1"), "is not UTF-8"),
        ("tiny.txt", b"short", "too few for a"),
        (
            "small.txt",
            b"".join((b"yes\n", b"no\n")[i.bit_count() % 2] for i in range(40_000)),
            "this corpus carries only",
        ),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    code = 2 if name == "small.txt" else 1
    result = ryot_here("train", "--data", tmp_path / name, "-o", tmp_path / "out")
    check_refused(result, code, message)
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(trained, tmp_path / "c"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    check_refused(ryot_here("export", path, "-o", tmp_path / "out"), 1, r"model\.safetensors: cut short")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trained", ["optimized"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "text", "code", "message"),
    [
        ((), "a few words\n" * 30, 1, "too few for a|expected more than one sequence of 32"),
        (("--precisions", "fp32,int6"), "a few words\n" * 30, 2, "precision: 'int6' is not known"),
    ],
)
def test_an_export_that_cannot_be_scored_is_refused_before_it_tunes(
    trained: Path, arguments: tuple[str, ...], text: str, code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text)
    cache = {"RYOT_CACHE_DIR": str(tmp_path / "cache")}
    result = ryot_here(
        "export", trained, "--data", tmp_path / "text.txt", "-o", tmp_path / "out", *arguments, env=cache
    )
    check_refused(result, code, message)
    assert list((tmp_path / "cache").iterdir()) == []


def test_ranks_that_cannot_share_a_batch_are_refused_before_the_text_is_read(tmp_path: Path) -> None:
    cache = {"RYOT_CACHE_DIR": str(tmp_path / "cache")}
    result = ryot_here("cluster-run", "--workers-per-variant", "3", "-o", tmp_path / "run", env=cache)
    check_refused(result, 2, "workers per variant: got 3, but baseline has a batch of 8 sequences")
    assert not (tmp_path / "run").exists() and list((tmp_path / "cache").iterdir()) == []


def test_verbose_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = ryot("-v", "cluster-run", "--preset", "refrence")
    assert result.returncode == 2 and "Traceback" in result.stderr


def test_a_plan_can_be_read_before_anything_is_done(tmp_path: Path) -> None:
    import tomllib

    result = ryot("cluster-run", "--dry-run", "--seeds", 2, "--precisions", "fp32,int8", cwd=tmp_path)
    plan = tomllib.loads(result.stdout)
    assert result.returncode == 0 and list(tmp_path.iterdir()) == []
    assert plan["options"]["seeds"] == 2 and plan["options"]["precisions"] == ["fp32", "int8"]
    assert [v["name"] for v in plan["variants"]] == ["baseline", "optimized"]


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "c.toml").write_text('seeds = 3\nrounds = 7\nvariants = ["optimized"]\n')
    result = ryot("cluster-run", "--dry-run", "--config", tmp_path / "c.toml", "--seeds", 2)
    options = tomllib.loads(result.stdout)["options"]
    assert (options["seeds"], options["rounds"], options["variants"]) == (2, 7, ["optimized"])


def test_doctor_says_what_this_machine_is() -> None:
    result = ryot("doctor", "--format", "json")
    facts = json.loads(result.stdout)
    assert result.returncode == 0 and facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["versions"]["onnxruntime"] and facts["missing"] == []
