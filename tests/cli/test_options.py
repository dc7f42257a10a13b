"""What enters by options and the environment: a cache that cannot be written, arguments that are not UTF-8."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ryot.cli.main import COMMANDS
from ryot.cli.model_options import MEGABYTE
from ryot.cli.options import cache_dir
from ryot.edge.cli import build_parser
from ryot.edge.sampling_params import SamplingParams
from ryot.errors import ConfigError
from ryot.serve.model import ModelOptions
from ryot.serve.server import ServerOptions

#: The dataclasses that a command's options end up in, but for `cluster-run`, whose options are made from them.
FIELDS_OF: dict[str, tuple[type, ...]] = {"serve": (ServerOptions, ModelOptions), "batch": (ModelOptions,)}
RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, with no RYOT_CACHE_DIR and a home in which nothing can be made."""
    (tmp_path / "home").write_text("a file, so that root cannot make a folder in it either")
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("RYOT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_the_cache_is_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RYOT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/ryot"
    assert list(cache_dir().iterdir()) == []


def test_a_home_that_cannot_be_written_is_not_the_end(temporary: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = cache_dir()
    assert found == temporary / f"ryot-cache-{os.getuid()}"
    assert found.stat().st_mode & 0o777 == 0o700
    [said] = caplog.records
    assert said.getMessage() == (
        f"cache {temporary.parent}/home/.cache/ryot: Not a directory; {found} is used instead "
        "(RYOT_CACHE_DIR chooses another)"
    )
    assert cache_dir() == found


@pytest.mark.parametrize("trap", ["link", "open to all", "file"])
def test_a_temporary_cache_that_others_could_have_made_is_not_taken(temporary: Path, trap: str) -> None:
    made = temporary / f"ryot-cache-{os.getuid()}"
    if trap == "link":
        (temporary / "theirs").mkdir()
        made.symlink_to(temporary / "theirs")
    elif trap == "file":
        made.write_text("")
    else:
        made.mkdir()
        made.chmod(0o777)
    found = cache_dir()
    assert found != made and found.parent == temporary
    assert found.stat().st_mode & 0o777 == 0o700


def test_a_cache_asked_for_by_name_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RYOT_CACHE_DIR", str(tmp_path / "file/cache"))
    with pytest.raises(ConfigError, match=f"cache {tmp_path}/file/cache: Not a directory") as error:
        cache_dir()
    assert "RYOT_CACHE_DIR" in str(error.value.hint)


def run(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RYOT, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_an_argument_that_is_not_utf8_is_refused_in_one_line() -> None:
    done = run("export", b"caf\xe9", "-o", "/tmp/none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        r"Error: argument 2: caf\xe9 is not UTF-8",
        "hint: rename the file, or give the text in UTF-8",
    ]


def test_the_c_locale_is_told_what_it_lacks() -> None:
    # As it was before Python 3.7, and is with these two settings.
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run("export", "größe", "-o", "/tmp/none", **ascii_only)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].endswith("is not ASCII")
    assert "PYTHONUTF8=1" in done.stderr
    assert run("targets", **ascii_only).returncode == 0


@pytest.mark.parametrize("name", sorted(FIELDS_OF))
def test_a_default_of_an_option_is_that_of_the_field_it_sets(name: str) -> None:
    """Options are matched with fields by name, and by what `build_model_options` and `serve` make of them."""
    module = importlib.import_module(f"ryot.cli.{COMMANDS[name][0]}")
    units = {"kv_bytes": ("kv_memory", MEGABYTE), "prefix_cache_bytes": ("prefix_cache", MEGABYTE)}
    units |= {"max_body_bytes": ("max_body", 1e6), "timeout_s": ("timeout", 1), "drain_s": ("drain", 1)}
    given = {p.name: p.default for p in module.command.params if isinstance(p, click.Option)}
    for cls in FIELDS_OF.get(name, ()):
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        compared = 0
        for field, default in defaults.items():
            option, factor = units.get(field, (field, None))
            if isinstance(given.get(option), (int, float, str)) and not isinstance(given[option], bool):
                compared += 1
                assert default == (given[option] if factor is None else given[option] * factor), (cls, field)
        assert compared, cls


def test_run_py_draws_as_the_engines_do_unless_told() -> None:
    given = vars(build_parser().parse_args(["--prompt", "x"]))
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    assert {name: given[name] for name in defaults if name in given}.items() <= defaults.items()
    assert len(given.keys() & defaults.keys()) >= 6
