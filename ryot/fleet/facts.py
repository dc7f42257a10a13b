"""What a device is, asked with nothing but a shell, and whether a bundle can run there, before anything is copied."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ryot.edge.bundle import Bundle
from ryot.edge.machine import isa_names, overflows_on
from ryot.errors import FleetError

MACHINES = ("x86_64", "aarch64")
#: Wheels of onnxruntime 1.24 to 1.32 and numpy 2 ask for glibc 2.27 and 2.28 (their tags on PyPI, November 2026).
GLIBC_MIN = (2, 28)
PYTHON_MIN = (3, 11)
#: What the process of a bundle needs beside its weights: 45 MB with the smallest models (benchmarks/README.md).
PROCESS_BYTES = 50_000_000
#: A clock that is off by more makes TLS, and so pip, refuse.
CLOCK_LIMIT_S = 86_400
#: Of a number of a device: its bytes of memory have fewer.
_MAX_DIGITS = 15
#: Marks the first and the last line of the facts among whatever a login shell may print.
_FIRST, _LAST = "ryot_facts=1", "ryot_python="

_SCRIPT = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
home() {
    name=${1#'~'}; name=${name%%/*}
    case $1 in '~'*)
        case $name in *[!A-Za-z0-9._-]*) ;; *) eval "printf %s ~$name"; set -- "${1#"~$name"}";; esac;;
    esac
    printf %s "$1"
}
root=$(home "$1"); python=$(home "$2"); length=$3
echo ryot_facts=1
say system "$(uname -s)"
say machine "$(uname -m)"
say bits "$(getconf LONG_BIT 2>/dev/null)"
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc=
[ -n "$libc" ] || for file in /lib/ld-musl-*; do [ -e "$file" ] && libc=musl; done
say libc "$libc"
say cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null)"
say memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo)"
say available_kib "$(sed -n 's/^MemAvailable: *\([0-9]*\) kB$/\1/p' /proc/meminfo)"
say flags "$(sed -n -e 's/^flags[^:]*: //p' -e 's/^Features[^:]*: //p' /proc/cpuinfo | head -n 1)"
say now "$(date +%s)"
place=$root
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
say disk_kib "$(df -Pk "$place" | { read -r _; read -r _ _ _ free _; echo "$free"; })"
[ -w "$place" ] && say writable yes || say writable "$place"
chosen=
for each in "$python" python3 python3.14 python3.13 python3.12 python3.11; do
    [ -n "$each" ] || continue
    found=$("$each" -I -S -c 'import sys,struct
print("%d.%d.%d" % sys.version_info[:3], struct.calcsize("P") * 8)' 2>/dev/null) || found=
    [ -n "$found" ] && say python "$found"
    case $found in 3.1[1-9].*|3.[2-9][0-9].*) chosen=$(command -v "$each"); break;; esac
    [ -z "$python" ] || break
done
case $chosen in /*|'') ;; *) chosen=$PWD/$chosen;; esac
say ryot_python "$chosen"
[ -n "$chosen" ] || exit 0
exec "$chosen" -I -c 'import os, sys
left, parts = int(sys.argv[1]), []
while left:
    part = os.read(0, min(left, 1 << 16))
    if not part:
        sys.exit(0)
    parts.append(part)
    left -= len(part)
memory = os.memfd_create("ryot")
os.write(memory, b"".join(parts))
sys.path.insert(0, "/proc/self/fd/%d" % memory)
from ryot.fleet.device.agent import serve
serve()' "$length"
"""


def remote_command(root: str, python: str, program_bytes: int) -> str:
    """The command for ssh: it prints the facts, and then runs the program of so many bytes that comes on its stdin."""
    words = ["sh", "-c", _SCRIPT, "ryot", root, python, str(program_bytes)]
    return " ".join(map(shlex.quote, words))


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a device said of itself; numbers are 0 and texts empty where it did not."""

    system: str
    machine: str
    bits: int
    libc: str
    cores: int
    memory_bytes: int
    available_bytes: int
    isa: tuple[str, ...]
    clock_ahead_s: float
    """The device's clock minus this machine's."""
    disk_free_bytes: int
    writable: bool
    python: str
    """Path of a Python that is new enough; empty for none."""
    python_version: tuple[int, ...]
    python_bits: int

    @property
    def glibc(self) -> tuple[int, ...]:
        """Version of glibc; empty for another libc."""
        name, _, version = self.libc.partition(" ")
        return _numbers(version) if name == "glibc" else ()


class FactsReader:
    """Collects the lines that a device prints."""

    def __init__(self) -> None:
        self._begun, self._values = False, dict[str, str]()

    def add(self, line: str) -> Facts | None:
        """The facts, when this was their last line."""
        if line == _FIRST:
            self._begun = True
        elif self._begun:
            key, _, value = line.partition("=")
            self._values[key] = value
            if line.startswith(_LAST):
                return _build_facts(self._values)
        return None


def _build_facts(values: Mapping[str, str]) -> Facts:
    version, _, bits = values.get("python", "").partition(" ")
    now = _int(values.get("now"))
    return Facts(
        system=values.get("system", ""),
        machine=values.get("machine", ""),
        bits=_int(values.get("bits")),
        libc=values.get("libc", ""),
        cores=_int(values.get("cores")),
        memory_bytes=1024 * _int(values.get("memory_kib")),
        available_bytes=1024 * _int(values.get("available_kib")),
        isa=tuple(isa_names(values.get("flags", "").split())),
        clock_ahead_s=now - time.time() if now else 0.0,
        disk_free_bytes=1024 * _int(values.get("disk_kib")),
        writable=values.get("writable") == "yes",
        python=values.get("ryot_python", ""),
        python_version=_numbers(version),
        python_bits=_int(bits),
    )


def check_device(facts: Facts, bundle: Bundle, peak_rss_bytes: int | None, root: str) -> list[str]:
    """Raise `FleetError` when the bundle cannot run on such a device; else what its owner should know.

    `peak_rss_bytes` is what the bundle's own record says that it takes; it is estimated where there is none.
    """
    _check_system(facts)
    if overflows_on(bundle, facts.isa):
        raise FleetError(
            f"its CPU has AVX2 without VNNI, where sums of this bundle's 8-bit weights ({bundle.precision}) overflow",
            hint="export with a target whose device is like it, which takes 7 bits",
        )
    if not facts.writable:
        raise FleetError(f"{root} cannot be written there", hint="choose another folder with --root")
    needed = peak_rss_bytes or bundle.weight_bytes + PROCESS_BYTES
    if facts.memory_bytes and needed > facts.memory_bytes:
        raise FleetError(f"it has {_mb(facts.memory_bytes)} of memory, this bundle needs {_mb(needed)}")
    notes = []
    if facts.available_bytes and needed > facts.available_bytes:
        notes.append(f"only {_mb(facts.available_bytes)} of memory are free, this bundle needs {_mb(needed)}")
    if abs(facts.clock_ahead_s) > CLOCK_LIMIT_S:
        days = abs(facts.clock_ahead_s) / 86_400
        side = "ahead" if facts.clock_ahead_s > 0 else "behind"
        notes.append(f"its clock is {days:,.0f} days {side}; nothing here looks at it, but pip may refuse certificates")
    return notes


def check_disk(free_bytes: int, copied_bytes: int, environment_bytes: int = 0) -> None:
    """Raise `FleetError` when what is to be copied, and the environment to be made, do not fit."""
    needed = copied_bytes + environment_bytes
    if needed > free_bytes:
        whose = f" (an environment with onnxruntime takes {_mb(environment_bytes)})" if environment_bytes else ""
        raise FleetError(
            f"its disk has {_mb(free_bytes)} free, {_mb(needed)} are needed{whose}",
            hint="make room, or choose a folder elsewhere with --root",
        )


def _check_system(facts: Facts) -> None:
    if facts.system != "Linux":
        raise FleetError(f"it runs {facts.system or 'an unknown system'}, expected Linux")
    if facts.bits == 32 or facts.python_bits == 32 or facts.machine not in MACHINES:
        size = "32-bit " if 32 in (facts.bits, facts.python_bits) else ""
        raise FleetError(
            f"it is {size}{facts.machine}, expected a 64-bit system on {' or '.join(MACHINES)}",
            hint="onnxruntime has no build for it; many 32-bit systems run on hardware that takes a 64-bit one",
        )
    if len(facts.glibc) < 2 or facts.glibc < GLIBC_MIN:
        wanted = ".".join(map(str, GLIBC_MIN))
        raise FleetError(
            f"it has {facts.libc or 'an unknown libc'}, expected glibc {wanted} or later",
            hint="onnxruntime's wheels are for glibc; a container of Debian on it would do",
        )
    if not facts.python or len(facts.python_version) < 2 or facts.python_version < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        found = f"Python {'.'.join(map(str, facts.python_version))}" if facts.python_version else "no Python"
        raise FleetError(
            f"it has {found}, expected {wanted} or later", hint="install one, and name it with --python if need be"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.1f} MB"


def _int(text: str | None) -> int:
    """The number, where it is one that a device can have."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_int(part) for part in text.split(".")) if text else ()
