"""What the C program asks of a device, as run.py does: a CPU that sums exactly, and nothing told to anybody."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ryot.edge.machine import isa_names, overflows_int8
from tests.edge.tiny_bundle import write_manifest

from .native import Native

CPUS = {
    "avx2 alone": "flags\t\t: fpu sse4_2 avx2 fma",
    "avx512 without vnni": "flags\t\t: fpu avx avx2 avx512f",
    "names that begin alike": "flags\t\t: avx2 avx512_vnni_x xavx_vnni",
    "avx512-vnni": "flags\t\t: avx2 avx512f avx512_vnni",
    "avx-vnni": "flags\t\t: avx_vnni avx2",
    "sse4.2": "flags\t\t: fpu sse4_2 avx",
    "arm without dot products": "Features\t: fp asimd",
    "arm": "Features\t: fp asimd asimddp",
    "says nothing": "Hardware\t: a board",
}
RUN_PY = """
import sys
from pathlib import Path
from ryot.edge.cli import run
sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def eight_bits(make_bundle: Callable[..., Path]) -> Path:
    """A bundle that says of itself that its products are of 8 bits."""
    bundle = make_bundle()
    write_manifest(bundle, precision="int8-dyn+int4", quantization={"dynamic_bits": 8})
    return bundle


@pytest.fixture
def on_cpu(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command where the system names another CPU: hardware that is not here, so what it is asked by is fake."""
    command = shutil.which("unshare")
    if not command or subprocess.run([command, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    told = tmp_path / "cpuinfo"

    def run(flags: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        told.write_text(f"processor\t: 0\nmodel name\t: none\n{flags}\nbogomips\t: 1\n\nprocessor\t: 1\n")
        mounted = [command, "-rm", "sh", "-c", 'mount --bind "$0" /proc/cpuinfo && exec "$@"', told]
        words = [str(a) for a in (*mounted, *arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpu_whose_sums_of_8_bit_products_overflow_is_refused(
    cpu: str, native: Native, eight_bits: Path, on_cpu: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    _, _, names = CPUS[cpu].partition(":")
    overflows = overflows_int8(isa_names(names.split()))
    done = on_cpu(CPUS[cpu], native.program, eight_bits, "--verify")
    assert (done.returncode, "no VNNI" in done.stderr) == (int(overflows), overflows), done.stderr


def test_a_cpu_is_refused_in_the_words_of_python_and_for_8_bits_alone(
    native: Native, eight_bits: Path, on_cpu: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    flags = CPUS["avx2 alone"]
    python = on_cpu(flags, sys.executable, "-c", RUN_PY, eight_bits, "--verify")
    done = on_cpu(flags, native.program, eight_bits, "--verify")
    assert python.returncode == 1 and "its weights have 8 bits" in python.stderr
    assert (done.returncode, done.stdout, done.stderr) == (python.returncode, python.stdout, python.stderr)
    copy = Path(shutil.copytree(eight_bits, tmp_path / "copy"))
    for other in ({"quantization": {"dynamic_bits": 7}}, {"quantization": None}, {"precision": "int8"}):
        write_manifest(copy, **{"precision": "int8-dyn", "quantization": {"dynamic_bits": 8}, **other})
        assert on_cpu(flags, native.program, copy, "--verify").returncode == 0


PROBE = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void tell(void) {
    const char *set = getenv("ORT_DISABLE_TELEMETRY");
    fprintf(stderr, "loaded with %s\\n", set ? set : "nothing");
}
"""


def test_telemetry_is_off_before_the_library_loads_and_an_owners_setting_wins(
    native: Native, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "probe.c").write_text(PROBE)
    probe = tmp_path / "probe.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", probe, tmp_path / "probe.c"], check=True)
    bundle = make_bundle()
    for own, expected in ({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0"), ({"ORT_DISABLE_TELEMETRY": ""}, ""):
        done = native.run(bundle, "a", RYOT_ONNXRUNTIME=str(probe), **own)
        assert done.stderr.decode() == f"loaded with {expected}\nError: {probe}: is not onnxruntime's library\n"


def test_it_opens_no_socket_and_writes_no_file_and_needs_no_home(
    native: Native, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    strace = shutil.which("strace")
    if not strace or subprocess.run([strace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace isn't installed, or processes may not be traced here")
    bundle, home, calls = make_bundle(), tmp_path / "home", tmp_path / "calls"
    home.mkdir()
    through = (strace, "-f", "-o", calls, "-e", "trace=%network,%file")
    done = native.run(bundle, "--verify", through=through, HOME=str(home), XDG_CACHE_HOME=str(home))
    assert (done.returncode, done.stderr) == (0, b"")
    lines = calls.read_text(errors="replace").splitlines()
    assert any("libonnxruntime" in line for line in lines)
    writing = r"O_WRONLY|O_RDWR|O_CREAT|\b(mkdir|rename|unlink|link|symlink|truncate|chmod)(at|at2)?\("
    told = [line for line in lines if re.search(rf"\b(socket|connect|sendto|sendmsg)\(|{writing}", line)]
    assert not [line for line in told if not re.search(r'"/(dev|proc)/', line)]
    assert list(home.iterdir()) == []
    assert native.run(bundle, "--verify", HOME="/nowhere").stderr == b""
