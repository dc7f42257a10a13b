"""The program as a process, and its library in this one."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from ryot import TELEMETRY_SWITCHES

FOLDER = Path(__file__).parents[2] / "deploy" / "native"


class Error(ctypes.Structure):
    _fields_ = [("exit_code", ctypes.c_int), ("message", ctypes.c_char * 512), ("hint", ctypes.c_char * 160)]


class Native:
    """A build of deploy/native."""

    def __init__(self, folder: Path):
        self.program = folder / "ryot-run"
        self._library = folder / "libryot.so"

    def run(
        self, *arguments: object, stdin: bytes = b"", through: tuple[object, ...] = (), **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Where nobody has switched off what reports home, as `import ryot` does for the processes that it starts."""
        command = [str(word) for word in (*through, self.program, *arguments)]
        bare = {name: value for name, value in os.environ.items() if name not in TELEMETRY_SWITCHES}
        return subprocess.run(
            command, input=stdin, capture_output=True, timeout=120, env=bare | environment, check=False
        )

    def text(self, *arguments: object, stdin: bytes = b"") -> str:
        """What it prints, where it succeeds."""
        done = self.run(*arguments, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    def open(self, bundle: Path) -> Encoder:
        return Encoder(ctypes.CDLL(str(self._library)), bundle)


class Encoder:
    """A bundle's tokenizer in the C library."""

    def __init__(self, library: ctypes.CDLL, bundle: Path):
        self._library = library
        library.ryot_open.restype = ctypes.c_void_p
        library.ryot_encode.restype = ctypes.c_int64
        self._error = Error()
        self._ryot = library.ryot_open(os.fsencode(bundle), None, 1, ctypes.byref(self._error))
        if not self._ryot:
            raise ValueError(self._error.message.decode())

    def encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int64 * (4 * len(data) + 64))()
        count = self._library.ryot_encode(
            ctypes.c_void_p(self._ryot),
            data,
            ctypes.c_size_t(len(data)),
            ctypes.c_bool(split_special_tokens),
            ids,
            ctypes.c_size_t(len(ids)),
            ctypes.byref(self._error),
        )
        if count < 0:
            raise ValueError(self._error.message.decode())
        return ids[:count]

    def close(self) -> None:
        self._library.ryot_close(ctypes.c_void_p(self._ryot))
