"""Programs that mean harm, in the sandbox: each is bounded, and nothing outside of it is reached or left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ryot.edge.sandbox import Limits, Outcome, run_sandboxed
from ryot.errors import ConfigError


def attack(code: str, *arguments: str, limits: Limits | None = None) -> Outcome:
    """Run Python in the sandbox."""
    return run_sandboxed([sys.executable, "-c", code, *arguments], "hello", limits=limits)


def test_a_program_reads_its_input_in_an_empty_folder_of_its_own() -> None:
    outcome = attack("import os; print(input(), os.listdir()); open('x', 'w').write('y'); print(os.listdir())")
    assert (outcome.status, outcome.output) == (0, "hello []\n['x']\n")
    assert {"limits", "Landlock"} <= set(outcome.in_force)
    assert {"no sockets", "network namespace"} & set(outcome.in_force)


def test_a_hang_ends_at_the_wall_time() -> None:
    began_s = time.monotonic()
    outcome = attack("import time; time.sleep(300)", limits=Limits(wall_s=0.5))
    assert (outcome.status, outcome.reason) == (None, "time")
    assert time.monotonic() - began_s < 30


def test_a_loop_ends_at_the_cpu_time() -> None:
    outcome = attack("while True: pass", limits=Limits(cpu_s=1, wall_s=60))
    assert outcome.status in (128 + 9, 128 + 24)


def test_a_fork_bomb_stays_small_and_is_gone_afterwards() -> None:
    mark = f"bomb-{os.getpid()}"
    code = """
import os, time
forks = 0
while forks < 1000:
    try:
        if os.fork() == 0: os.setsid(); time.sleep(300)
        forks += 1
    except OSError:
        break
print(forks)
"""
    outcome = attack(code, mark, limits=Limits(processes=12))
    assert outcome.status == 0
    assert 0 < int(outcome.output) <= 12
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert mark not in listed


@pytest.mark.parametrize(
    "code",
    [
        "f = open('x', 'wb')\nwhile True: f.write(bytes(10**6))",
        "i = 0\nwhile True:\n    i += 1\n    open(f'x{i}', 'wb').write(bytes(10**6))",
        "while True: print('x' * 10**6)",
    ],
    ids=["one file", "many files", "output"],
)
def test_the_disk_is_not_filled(code: str) -> None:
    outcome = attack(code, limits=Limits(disk_bytes=5_000_000, wall_s=30))
    assert outcome.status != 0
    assert outcome.reason in (None, "disk")


def test_memory_is_bounded() -> None:
    outcome = attack("bytearray(2 * 10**9)", limits=Limits(memory_bytes=500_000_000))
    assert outcome.status == 1
    assert "MemoryError" in outcome.output


def test_files_outside_are_neither_read_nor_written(tmp_path: Path) -> None:
    tmp_path.joinpath("secret").write_text("s3cret")
    code = """
import os, sys
for what in (
    lambda: open(sys.argv[1] + "/secret").read(), lambda: open("/etc/passwd").read(), lambda: os.listdir("/"),
    lambda: open(sys.argv[1] + "/new", "w"), lambda: open("/tmp/new", "w"), lambda: open("/dev/shm/new", "w"),
    lambda: open("/proc/self/environ").read(), lambda: open("/proc/1/cmdline").read(),
    lambda: os.unlink(sys.argv[1] + "/secret"), lambda: os.mkdir("../new"),
    lambda: os.link(sys.argv[1] + "/secret", "here"),
):
    try: print("got", what())
    except OSError as error: print(type(error).__name__)
"""
    outcome = attack(code, str(tmp_path))
    assert outcome.status == 0
    refused = {"PermissionError", "FileNotFoundError", "FileExistsError", "OSError"}
    assert len(outcome.output.split("\n")) == 12 and set(outcome.output.split()) <= refused
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = """
import socket, sys
for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),
                     (socket.AF_INET6, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_STREAM)):
    try:
        s = socket.socket(family, kind); s.connect(("127.0.0.1", int(sys.argv[1]))); print("connected")
    except OSError as error: print("refused")
"""
        outcome = attack(code, str(server.getsockname()[1]))
        assert outcome.output.split() == ["refused"] * 4


def test_processes_outside_get_no_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        code = """
import os, sys
for pid in (int(sys.argv[1]), os.getppid()):
    try: os.kill(pid, 9); print("killed")
    except OSError: print("refused")
"""
        outcome = attack(code, str(bystander.pid))
        assert outcome.output.split()[0] == "refused"
        assert bystander.poll() is None
        bystander.communicate(b"\n")


def test_the_environment_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    outcome = attack("import os; print(sorted(os.environ))")
    assert "API_KEY" not in outcome.output


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sandbox: /nowhere/check cannot be run \(No such file"):
        run_sandboxed(["/nowhere/check"], "")


def test_a_script_that_the_command_names_can_be_read(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text("import sys\nsys.exit(input() != 'hello')")
    assert run_sandboxed([sys.executable, str(script)], "hello").status == 0
    assert run_sandboxed([sys.executable, str(script)], "other").status == 1


def test_without_a_protection_nothing_is_run(tmp_path: Path) -> None:
    """Landlock is taken away by a seccomp filter that a parent process sets, as some containers do."""
    code = f"""
import ctypes, struct, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ryot.edge.sandbox import run_sandboxed
from ryot.errors import ConfigError
program = b"".join(struct.pack("HBBI", *line) for line in
                   [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x00050026), (6, 0, 0, 0x7FFF0000)])
code = ctypes.create_string_buffer(program)
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", 4, ctypes.addressof(code)), 0, 0) == 0
try:
    run_sandboxed(["touch", {str(tmp_path / "made")!r}], "")
except ConfigError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "sandbox: 'touch' is not run: files outside cannot be hidden" in run.stdout, run.stderr
    assert not (tmp_path / "made").exists()
