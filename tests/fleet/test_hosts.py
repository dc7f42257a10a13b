"""Devices that a bundle cannot run on are told so before anything is copied.

The hosts are one real sshd whose sessions find other programs first in their PATH: they answer as hardware does that
is not here. All else is real.
"""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ryot.edge.bundle import load_bundle
from ryot.errors import FleetError
from ryot.fleet.connection import Links, connect
from ryot.fleet.device.environment import PIP_ENVIRONMENT_BYTES
from ryot.fleet.facts import Facts, FactsReader, check_device, check_disk
from ryot.fleet.inventory import Host, load_hosts
from ryot.fleet.push import PushOptions, PushResult, prepare, push_all
from ryot.fleet.wheels import platform_tags
from tests.fleet.conftest import Push
from tests.fleet.sshd import Sshd, is_sshd_there

PushAs = Callable[[dict[str, str]], PushResult]

GOOD = Facts(
    system="Linux", machine="aarch64", bits=64, libc="glibc 2.36", cores=4, memory_bytes=512_000_000,
    available_bytes=400_000_000, isa=("dotprod", "neon"), clock_ahead_s=0.0, disk_free_bytes=10**9, writable=True,
    python="/usr/bin/python3", python_version=(3, 11, 2), python_bits=64,
)  # fmt: skip


@pytest.fixture
def push_as(version_1: Path, tmp_path: Path) -> Iterator[PushAs]:
    """Pushes to a host on which some programs say something else: name and shell script."""
    if not is_sshd_there():
        pytest.skip("OpenSSH's server is not installed")
    programs = tmp_path / "programs"
    programs.mkdir()
    sshd = Sshd(tmp_path / "sshd", path=f"{programs}:/usr/bin:/bin")

    def push(answers: dict[str, str]) -> PushResult:
        for old in programs.iterdir():
            old.unlink()
        for name, script in answers.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        host = Host(name="host", root=str(tmp_path / "device"), python=answers.get("python", ""))
        parcel = prepare(version_1, None)
        options = PushOptions(rounds=0, ssh_config=sshd.config)
        [result] = push_all(parcel, [host], options, jobs=1, scratch=tmp_path, tell=lambda host, what: None)
        return result

    yield push
    sshd.close()


def test_hosts_that_cannot_run_it_are_told_why(push_as: PushAs, tmp_path: Path) -> None:
    pythons = {f"python3{minor}": "exit 127" for minor in ("", ".11", ".12", ".13", ".14")}
    for answers, reason in (
        ({"getconf": "echo 32"}, "it is 32-bit "),
        ({"uname": 'if [ "$1" = -m ]; then echo armv7l; else echo Linux; fi'}, "it is armv7l, expected a 64-bit"),
        ({"uname": "echo FreeBSD"}, "it runs FreeBSD, expected Linux"),
        (
            {"getconf": 'if [ "$1" = LONG_BIT ]; then echo 64; else exit 1; fi'},
            "it has an unknown libc, expected glibc",
        ),
        (
            {"getconf": "case $1 in LONG_BIT) echo 64;; *) echo glibc 2.19;; esac"},
            "it has glibc 2.19, expected glibc 2.28",
        ),
        (pythons, "it has no Python, expected 3.11 or later"),
        (pythons | {"python3": "echo 3.9.2 64"}, "it has Python 3.9.2, expected 3.11 or later"),
        (pythons | {"python3": "echo 3.11.2 32"}, "it is 32-bit "),
    ):
        result = push_as(answers)
        assert result.outcome == "failed" and result.reason.startswith(reason), result.reason
    assert not (tmp_path / "device").exists()


def test_a_python_is_named_from_any_home(sshd: Sshd, tmp_path: Path) -> None:
    own = sshd.folder / "own python"  # in what the session there takes for its home
    own.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    own.chmod(0o755)
    user = pwd.getpwuid(os.getuid())
    from_home = os.path.relpath(own, user.pw_dir)  # where a session begins
    for name, path in (
        ("~/own python", own),
        (f"~{user.pw_name}/{from_home}", Path(user.pw_dir, from_home)),
        (from_home, Path(user.pw_dir, from_home)),
        ("~nobody-of-this-name/python", None),
        ("~$(touch evil)/python", None),
    ):
        host = Host(name="host", root=str(tmp_path / "device"), python=name)
        with connect(host, sshd.config, Links(), lambda what: None) as device:
            assert device.facts.python == ("" if path is None else str(path))


def test_a_python_that_makes_no_environment_is_refused_before_anything_is_copied(
    sshd: Sshd, push: Push, version_1: Path, root: Path, tmp_path: Path
) -> None:
    """As Debian's own without python3-venv: the same Python, whose library has all but ensurepip."""
    base, inside = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    bare = tmp_path / "bare"
    (bare / "bin").mkdir(parents=True)
    (bare / "lib" / inside).mkdir(parents=True)
    shutil.copy(Path(sys.executable).resolve(), bare / "bin" / "python3")
    for path in (*(base / "lib").glob("libpython*"), *(base / "lib" / inside).iterdir()):
        if path.name not in ("ensurepip", "site-packages", "dist-packages"):
            (bare / path.relative_to(base)).symlink_to(path)
    result = push(version_1, host={"python": str(bare / "bin" / "python3")})
    assert result.reason == f"{bare}/bin/python3 cannot make an environment: it lacks venv or ensurepip"
    assert result.hint is not None and "install python3-venv" in result.hint
    assert result.sent_bytes == 0 and not list((root / "incoming").iterdir())


def test_a_clock_that_is_years_off_is_said_and_stops_nothing(push_as: PushAs) -> None:
    result = push_as({"date": "echo 1000000000", "python3": f'exec {sys.executable} "$@"'})
    assert result.outcome == "switched", result.reason
    assert any("its clock is" in note and "behind" in note for note in result.notes)


def test_a_login_shell_that_prints_things_is_looked_through(push_as: PushAs, tmp_path: Path) -> None:
    noisy = push_as({"uname": 'echo "Linux"', "getconf": "echo 32"})
    assert "32-bit Linux" in noisy.reason


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone may mount")
def test_a_full_disk_is_noticed_before_and_while_copying(push_as: PushAs, tmp_path: Path, version_1: Path) -> None:
    device = tmp_path / "device"
    device.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", device], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        python = {"python3": f'exec {sys.executable} "$@"'}
        before = push_as(python)
        assert before.reason.startswith("its disk has 0.2 MB free, 0.")
        # Room for the bytes, but not for the last, unfilled pages of many small files.
        needed_kib = sum(path.stat().st_size for path in version_1.rglob("*") if path.is_file()) // 1024 + 16
        subprocess.run(["mount", "-o", f"remount,size={needed_kib}k", device], check=True)
        assert push_as(python).reason == "its disk is full"
        subprocess.run(["mount", "-o", "remount,size=2m", device], check=True)
        assert push_as(python).outcome == "switched"
    finally:
        subprocess.run(["umount", device], check=True)


def test_what_a_device_lacks_is_found_in_its_facts(version_1: Path) -> None:
    bundle = load_bundle(version_1)
    assert check_device(GOOD, bundle, None, "/r") == []
    assert check_device(dataclasses.replace(GOOD, available_bytes=10_000_000), bundle, None, "/r") == [
        "only 10 MB of memory are free, this bundle needs 51 MB"
    ]
    with pytest.raises(FleetError, match="it has 512 MB of memory, this bundle needs 900 MB"):
        check_device(GOOD, bundle, 900_000_000, "/r")
    with pytest.raises(FleetError, match="/r cannot be written there"):
        check_device(dataclasses.replace(GOOD, writable=False), bundle, None, "/r")
    with pytest.raises(FleetError, match="its disk has 1,000 MB free, 2,000 MB are needed"):
        check_disk(10**9, 2 * 10**9)
    with pytest.raises(FleetError, match=r"260 MB are needed \(an environment with onnxruntime takes 250 MB\)"):
        check_disk(255_000_000, 10_000_000, PIP_ENVIRONMENT_BYTES)
    eight = bundle._replace(precision="int8-dyn+int4", manifest={"quantization": {"dynamic_bits": 8}})
    # Kernels of Arm without dot products, and of x86 with SSE alone, sum in 32 bits (seen in qemu).
    for machine, isa in (("aarch64", ("dotprod", "neon")), ("aarch64", ("neon",)), ("x86_64", ())):
        assert check_device(dataclasses.replace(GOOD, machine=machine, isa=isa), eight, None, "/r") == []
    with pytest.raises(FleetError, match="has AVX2 without VNNI"):
        check_device(dataclasses.replace(GOOD, machine="x86_64", isa=("avx2",)), eight, None, "/r")


def test_facts_that_no_device_has_are_refused_in_one_line(version_1: Path) -> None:
    bundle = load_bundle(version_1)
    for line, reason in (
        ("libc=glibc 3", "it has glibc 3, expected glibc 2.28"),
        ("python=3 64", "it has Python 3, expected 3.11"),
        ("memory_kib=²", ""),
        ("now=" + "9" * 5000, ""),
        ("cores=" + "9" * 5000, ""),
    ):
        reader = FactsReader()
        facts = None
        for said in (
            "ryot_facts=1", "system=Linux", "machine=x86_64", "bits=64", "libc=glibc 2.36", "python=3.11.2 64",
            "writable=yes", line, "ryot_python=/usr/bin/python3",
        ):  # fmt: skip
            facts = reader.add(said)
        assert facts is not None
        if not reason:
            check_device(facts, bundle, None, "/r")
            continue
        with pytest.raises(FleetError, match=reason):
            check_device(facts, bundle, None, "/r")


def test_wheels_are_asked_for_by_the_devices_own_tags() -> None:
    tags = platform_tags(GOOD)
    assert tags[0] == "manylinux_2_36_aarch64" and "manylinux2014_aarch64" in tags and "manylinux_2_17_aarch64" in tags


def test_an_inventory_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    for text, reason in (
        ("", "lists no host"),
        ('[hosts.a]\nrot = "x"\n', "did you mean 'root'?"),
        ('[hosts.a]\nssh = "-F x"\n', "ssh: got '-F x'"),
        ("[hosts]\na = 3\n", "hosts.a: got 3, expected a table"),
        ('[hosts.a]\nroot = "/"\n', "root: got '/', expected a folder of its own"),
    ):
        path.write_text(text)
        with pytest.raises(Exception, match=reason.replace("?", r"\?").replace("/", "/")):
            load_hosts([], path, {})
    path.write_text('[defaults]\nroot = "/srv/r"\noffline = true\n[hosts.a]\n[hosts.b]\nroot = "/b"\n')
    hosts = load_hosts([], path, {"restart": "x"})
    assert [(h.name, h.root, h.offline, h.restart) for h in hosts] == [
        ("a", "/srv/r", True, "x"),
        ("b", "/b", True, "x"),
    ]
    assert [h.name for h in load_hosts(["b"], path, {})] == ["b"]
    with pytest.raises(Exception, match="'c' is not known"):
        load_hosts(["c"], path, {})
