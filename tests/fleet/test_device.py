"""A bundle on the device: read-only, as another user, without network, home or a right umask; and from a stick."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ryot.deploy.archive import pack_bundle, unpack_archive
from ryot.deploy.signing import load_key, sign_bundle
from ryot.edge.trust import check_whole
from ryot.errors import BundleError, FleetError
from ryot.fleet.device.agent import Agent, open_root
from ryot.fleet.device.environment import unpack_wheel
from ryot.fleet.device.kit_hashes import HASHES_NAME, SIGNATURE_NAME
from ryot.fleet.device.store import Release, Root
from ryot.fleet.kit import INSTALL_NAME, PROGRAM_NAME, write_kit
from ryot.fleet.program import build_program, write_program
from ryot.fleet.wheels import collect_wheels
from tests.edge.test_telemetry import trace_calls
from tests.fleet.conftest import Push, plain_environment, run_current, ryot
from tests.fleet.test_hosts import GOOD

#: This Python without the packages of its environment.
BARE_PYTHON = getattr(sys, "_base_executable", sys.executable)


def test_the_program_for_devices_needs_the_standard_library_alone(tmp_path: Path) -> None:
    write_program(tmp_path / "device.pyz")
    assert (tmp_path / "device.pyz").read_bytes() == build_program()
    assert len(build_program()) < 60_000
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import ryot.fleet.device.agent, ryot.fleet.device.main
print(*sorted({m.split(".")[0] for m in sys.modules} - set(sys.stdlib_module_names) - {"__main__"}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, tmp_path / "device.pyz"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ryot"]


def test_pushing_takes_a_base_install_alone() -> None:
    code = """
import sys
import ryot.fleet.kit, ryot.fleet.push, ryot.fleet.status
print(*sorted({"torch", "onnx", "onnxruntime", "ray", "cryptography", "zstandard", "matplotlib"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_a_release_runs_read_only_as_another_user_without_home_or_network(version_1: Path, tmp_path: Path) -> None:
    """Written under umask 077, then run as `nobody` under strace: no socket is opened, no file written."""
    root = Root(tmp_path / "device")
    release = Release("r", "b", "tiny-0", "fp32", sys.executable, "", 0.0, {})
    old = os.umask(0o077)
    try:
        root.make()
        unpack_archive(pack_bundle(version_1, tmp_path / "a.tar.zst"), root.bundle("b"))
        root.build_release(release)
    finally:
        os.umask(old)
    for path in root.bundle("b").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
    log = tmp_path / "log"
    log.mkdir(mode=0o777)
    log.chmod(0o777)
    program = [*trace_calls(log / "calls"), root.release("r") / "run"]
    if os.geteuid() == 0 and can_nobody_read(root.bundle("b")):
        program = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *program]
    for arguments in (["--verify"], ["--prompt", "def ", "--max-new-tokens", "3"]):
        done = subprocess.run(
            [*map(str, program), *arguments],
            env=plain_environment(), capture_output=True, text=True, check=False, umask=0o077, cwd="/",
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        lines = (log / "calls").read_text(errors="replace").splitlines()
        assert any("libonnxruntime" in line or "onnxruntime_pybind11_state" in line for line in lines)
        assert not [line for line in lines if re.search(r"\b(socket|connect|sendto|sendmsg)\(", line)]
        writing = r"O_WRONLY|O_RDWR|O_CREAT|\b(mkdir|rename|unlink|link|symlink|truncate|chmod)(at|at2)?\("
        assert not [line for line in lines if re.search(writing, line) and not re.search(r'"/(dev|proc)/', line)]


def install(agent: Agent, root: Root, bundle: Path) -> str:
    """Put a bundle on the device by hand and switch to it; the id of its release."""
    shutil.copytree(bundle, root.bundle(bundle.parent.name))
    release = Release(f"r-{bundle.parent.name}", bundle.parent.name, "tiny", "fp32", sys.executable, "", 0.0, {})
    agent.activate({"release": release._asdict()})
    return release.id


def test_a_rollback_that_fails_leaves_the_version_before_it_good(
    version_1: Path, version_2: Path, tmp_path: Path
) -> None:
    root = Root(tmp_path / "device")
    agent = Agent(root, lambda what: None)
    with open_root(root, "session", "me"):
        first, second = install(agent, root, version_1), install(agent, root, version_2)
        assert root.read_state().good == [first, second]
        with pytest.raises(FleetError, match="the version before runs again"):
            agent.rollback({"health": "exit 1"})
        assert root.current_id() == second
        assert root.read_state().good == [first, second]
        agent.rollback({})
        assert root.current_id() == first
        assert root.read_state().good == [first]


def test_a_rollback_to_a_key_that_is_revoked_is_refused(
    signed_1: Path, version_2: Path, owner_key: Path, tmp_path: Path
) -> None:
    root = Root(tmp_path / "device")
    agent = Agent(root, lambda what: None)
    with open_root(root, "session", "me"):
        install(agent, root, signed_1)
        second = install(agent, root, version_2)
        agent.trust({"keys": (owner_key.parent / "trusted").read_text().replace("trusted", "revoked")})
        with pytest.raises(BundleError, match="revokes"):
            agent.rollback({})
        assert root.current_id() == second


def test_going_back_lets_in_nothing_that_was_signed_before(
    signed_1: Path, version_2: Path, owner_key: Path, tmp_path: Path
) -> None:
    newer = Path(shutil.copytree(version_2, tmp_path / "newer" / "bundle"))
    sign_bundle(newer, load_key(owner_key), 6)
    root = Root(tmp_path / "device")
    agent = Agent(root, lambda what: None)
    with open_root(root, "session", "me"):
        agent.trust({"keys": (owner_key.parent / "trusted").read_text()})
        first, _ = install(agent, root, signed_1), install(agent, root, newer)
        agent.rollback({})
        assert (root.current_id(), root.read_state().serial) == (first, 6)
        signer = check_whole(root.current / "bundle", root.load_keys())[1]
        assert signer is not None and signer.serial == 5
        root.check_serial(root.read_state().releases[first].bundle, signer)  # it is kept: pushing it changes nothing
        with pytest.raises(FleetError, match="serial 5, expected 6 or more"):
            root.check_serial("another", signer)


def can_nobody_read(path: Path) -> bool:
    """Opens the way to `path` (pytest's own folders are private); whether `nobody` then gets at it and this Python."""
    for parent in path.parents:
        if parent.name.startswith("pytest"):
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    test = f"test -r {path}/run.py && {sys.executable} -c 'import onnxruntime'"
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", test]
    return bool(shutil.which("setpriv")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "..\\evil.py"])
def test_a_wheel_stays_where_it_is_unpacked(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr(name, "x")
    with pytest.raises(FleetError, match="a wheel holds the path"):
        unpack_wheel(tmp_path / "bad.whl", "bad.whl", tmp_path / "library")
    assert not (tmp_path / "library").exists()


def test_a_wheel_is_unpacked_as_pip_would(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "good.whl", "w") as wheel:
        wheel.writestr("good/__init__.py", "x = 1\n")
        wheel.writestr("good-1.data/platlib/good/more.py", "y = 2\n")
        wheel.writestr("good-1.data/scripts/run", "#!python\n")
        wheel.writestr("good-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: good\nVersion: 1\n")
    unpack_wheel(tmp_path / "good.whl", "good.whl", tmp_path / "library")
    done = subprocess.run(
        [sys.executable, "-c", "import good.more, importlib.metadata as m; print(m.version('good'))"],
        env={"PYTHONPATH": str(tmp_path / "library")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1\n"
    assert not list((tmp_path / "library").rglob("run"))


def test_it_needs_no_memory_that_is_written_and_executed(version_1: Path) -> None:
    """As `MemoryDenyWriteExecute=` of the unit in deploy/systemd asks, by the kernel's own switch for it."""
    program = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, Linux 6.3
    sys.exit(77)
os.execv(sys.executable, [sys.executable, "-B", *sys.argv[1:]])
"""
    for engine in ("capi", "python"):
        command = [sys.executable, "-c", program, version_1 / "run.py", "--verify", "--engine", engine]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        if done.returncode == 77:
            pytest.skip("this kernel has no such switch")
        assert (done.returncode, done.stderr) == (0, "")


def test_a_kit_is_taken_where_the_bundle_and_the_rest_of_it_are_signed(
    signed_1: Path, owner_key: Path, tmp_path: Path
) -> None:
    """The wheels hold nothing: the Python that installs has the packages, and wheels are checked all the same."""
    for name, version in (("onnxruntime", "1.30"), ("numpy", "2.1"), ("tokenizers", "0.22")):
        make_wheel(tmp_path / "source", f"{name}-{version}-py3-none-any")
    old = os.umask(0o077)
    try:
        kit = write_kit(
            signed_1, tmp_path / "kit", machine="aarch64", python="3.11", wheels=tmp_path / "source",
            sign=load_key(owner_key).sign,
        )  # fmt: skip
    finally:
        os.umask(old)
    for path in kit.rglob("*"):
        assert path.stat().st_mode & 0o044 == 0o044, f"{path} is its owner's alone"
    trusted = owner_key.parent / "trusted"

    def install(*command: object) -> subprocess.CompletedProcess[str]:
        words = [*map(str, command), "--root", str(tmp_path / "device"), "--trusted-keys", str(trusted)]
        words += [] if command[0] == "sh" else ["--wheels", str(kit / "wheels"), "install", str(kit / "bundle")]
        environment = plain_environment() | {"PYTHON": sys.executable}
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    done = install("sh", kit / INSTALL_NAME)
    assert done.returncode == 0 and "runs: tiny-0 fp32" in done.stdout, done.stderr
    if shutil.which("openssl"):  # the command of deploy/README.md
        key = tmp_path / "owner.pub"
        subprocess.run(["openssl", "pkey", "-in", owner_key, "-pubout", "-out", key], check=True)
        words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(key), "-rawin", "-in", HASHES_NAME]
        subprocess.run([*words, "-sigfile", SIGNATURE_NAME], check=True, capture_output=True, cwd=kit)
    [wheel] = kit.glob("wheels/numpy-*")
    whole, hashes = wheel.read_bytes(), (kit / HASHES_NAME).read_text()
    wheel.write_bytes(whole + b"x")
    program = (sys.executable, "-I", kit / PROGRAM_NAME)
    for command, reason in ((("sh", kit / INSTALL_NAME), "is damaged or missing"), (program, "is not the one that")):
        assert (done := install(*command)).returncode == 1 and reason in done.stderr, done.stderr
    # Whoever changes a wheel may change the list, too.
    before, after = (hashlib.sha256(content).hexdigest() for content in (whole, wheel.read_bytes()))
    (kit / HASHES_NAME).write_text(hashes.replace(before, after))
    for command in (("sh", kit / INSTALL_NAME), program):
        assert (done := install(*command)).returncode == 1 and "signed by none of its keys" in done.stderr, done.stderr
    (kit / SIGNATURE_NAME).unlink()
    assert (done := install(*program)).returncode == 1 and "its wheels are not signed" in done.stderr


def make_wheel(folder: Path, name: str, *requires: str) -> Path:
    """An empty wheel of a name such as `numpy-2.1-py3-none-any`."""
    project, version, tag = name.split("-", 2)
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
        lines = ["Metadata-Version: 2.1", f"Name: {project}", f"Version: {version}"]
        lines += [f"Requires-Dist: {other}" for other in requires]
        wheel.writestr(f"{project}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{project}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        wheel.writestr(f"{project}-{version}.dist-info/RECORD", "")
    return folder / f"{name}.whl"


def test_wheels_are_those_for_the_devices_processor_python_and_glibc(tmp_path: Path) -> None:
    """Chosen by pip itself from a folder, whatever the processor is here."""
    offered = (
        "native-2.0-cp311-cp311-manylinux_2_39_aarch64",  # a newer glibc
        "native-2.0-cp311-cp311-manylinux_2_28_x86_64",
        "native-2.0-cp312-cp312-manylinux_2_28_aarch64",
        "native-2.0-cp311-cp311-musllinux_1_2_aarch64",
        "native-1.0-cp311-cp311-manylinux_2_28_aarch64",
        "native-1.0-cp311-cp311-manylinux_2_28_x86_64",
        "old-1.0-cp311-cp311-manylinux2014_aarch64",
        "stable-1.0-cp39-abi3-manylinux_2_17_aarch64",
        "stable-1.0-cp39-abi3-manylinux_2_17_x86_64",
        "pure-1.0-py3-none-any",
    )
    for name in offered:
        make_wheel(tmp_path / "source", name, *(["pure"] if name.startswith("native") else []))
    (tmp_path / "requirements.txt").write_text("native>=1\nold\nstable<2\n")
    collected = {}
    for machine in ("aarch64", "x86_64"):
        facts = dataclasses.replace(GOOD, machine=machine)
        try:
            paths = collect_wheels(tmp_path / "requirements.txt", facts, tmp_path / machine, tmp_path / "source")
        except FleetError as error:
            collected[machine] = [str(error)]
        else:
            collected[machine] = [path.stem for path in paths]
    assert collected["aarch64"] == [offered[4], offered[6], offered[9], offered[7]]
    [refused] = collected["x86_64"]
    assert refused.startswith("no wheels for x86_64 and Python 3.11: ") and "old" in refused


def test_an_environment_is_open_to_all_whatever_the_umask(tmp_path: Path) -> None:
    """By the device's own program, whose first command finds nothing, under umask 077."""
    wheel = make_wheel(tmp_path / "wheels", "nobodyhasthis-1.0-py3-none-any")
    (tmp_path / "device.pyz").write_bytes(build_program())
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.umask(0o077)
from pathlib import Path
from ryot.edge.bundle import hash_file
from ryot.fleet.device.environment import find_python
from ryot.fleet.device.main import main
from ryot.fleet.device.store import Root
main(["--root", sys.argv[2], "status"])
root, wheel = Root(Path(sys.argv[2])), Path(sys.argv[3])
root.make()
root.adopt(wheel, hash_file(wheel))
find_python(root, "nobodyhasthis>=1", python=sys.executable, wheels=[(wheel.name, hash_file(wheel))], tell=print)
"""
    words = [BARE_PYTHON, "-I", "-c", code, tmp_path / "device.pyz", tmp_path / "device", wheel]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = list((tmp_path / "device" / "environments").rglob("*"))
    assert any(path.name.startswith("nobodyhasthis") for path in made)
    for path in made:
        assert path.is_symlink() or path.stat().st_mode & 0o044 == 0o044, f"{path} is its owner's alone"


@pytest.fixture(scope="session")
def wheels(version_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bundle needs, as wheels for this machine; skips where there is no index."""
    folder = tmp_path_factory.mktemp("wheels")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    made = ryot("pack", version_1, "--kit", folder / "kit", "--machine", os.uname().machine, "--python", python)
    if made.returncode:
        pytest.skip(f"no package index can be reached: {made.stderr}")
    return folder / "kit" / "wheels"


@pytest.mark.slow
def test_a_kit_installs_on_a_device_without_network_and_goes_back(
    version_1: Path, version_2: Path, wheels: Path, owner_key: Path, tmp_path: Path
) -> None:
    """With real wheels, into an environment that has nothing else."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    kits = [
        write_kit(bundle, tmp_path / f"kit{number}", machine=os.uname().machine, python=python, wheels=wheels)
        for number, bundle in enumerate((version_1, version_2))
    ]
    assert {path.name for path in kits[0].iterdir()} == {"bundle", "wheels", PROGRAM_NAME, INSTALL_NAME, HASHES_NAME}
    root = tmp_path / "device"
    # A network namespace of its own has no network; where none can be made, an index is named that is not there.
    alone = ["unshare", "--net"] if os.geteuid() == 0 and shutil.which("unshare") else []
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": BARE_PYTHON, "PIP_INDEX_URL": "http://127.0.0.1:1/"}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        words = [*alone, *map(str, command)]
        return subprocess.run(words, capture_output=True, text=True, env=environment, umask=0o077, check=False)

    refused = run("sh", kits[0] / INSTALL_NAME, "--root", root, "--trusted-keys", owner_key.parent / "trusted")
    assert refused.returncode == 1 and "is not signed" in refused.stderr
    shutil.rmtree(root)
    first = run("sh", kits[0] / INSTALL_NAME, "--root", root)
    assert first.returncode == 0, first.stderr
    assert "making an environment from" in first.stderr and "runs: tiny-0 fp32" in first.stdout
    second = run("sh", kits[1] / INSTALL_NAME, "--root", root)
    assert second.returncode == 0, second.stderr
    assert "making an environment" not in second.stderr
    assert "runs: tiny-second fp32" in second.stdout and "before: tiny-0" in second.stdout
    assert run(root / "current" / "run", "--verify").returncode == 0
    back = run(BARE_PYTHON, "-I", kits[1] / PROGRAM_NAME, "--root", root, "rollback")
    assert "runs: tiny-0 fp32" in back.stdout
    status = run(BARE_PYTHON, "-I", kits[1] / PROGRAM_NAME, "--root", root, "status")
    assert "24 of 24 golden tokens" in status.stdout


@pytest.mark.slow
def test_an_offline_push_takes_wheels_along_once(
    version_1: Path, version_2: Path, wheels: Path, push: Push, root: Path
) -> None:
    host = {"python": BARE_PYTHON, "offline": True}
    first = push(version_1, host=host, wheels=wheels)
    assert first.outcome == "switched", first.reason
    [environment] = (root / "environments").iterdir()
    assert run_current(root).returncode == 0
    second = push(version_2, host=host, wheels=wheels)
    assert second.outcome == "switched", second.reason
    assert [environment] == list((root / "environments").iterdir())
    assert second.sent_bytes < 1_000_000 < first.sent_bytes


def test_a_kit_is_for_devices_that_there_are(version_1: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="got armv7l and Python"):
        write_kit(version_1, tmp_path / "kit", machine="armv7l", python="3.11", wheels=None)
