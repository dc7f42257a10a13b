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


class Sampling(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("repetition_penalty", ctypes.c_double),
        ("seed", ctypes.c_uint64),
    ]


class Answer(ctypes.Structure):
    _fields_ = [
        ("whole", ctypes.c_bool),
        ("prompt_tokens", ctypes.c_size_t),
        ("generated_tokens", ctypes.c_size_t),
        ("first_token_ns", ctypes.c_int64),
        ("whole_ns", ctypes.c_int64),
    ]


Write = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Request(ctypes.Structure):
    _fields_ = [
        ("prompt", ctypes.c_char_p),
        ("prompt_bytes", ctypes.c_size_t),
        ("max_new_tokens", ctypes.c_int64),
        ("ignore_eos", ctypes.c_bool),
        ("split_special_tokens", ctypes.c_bool),
        ("stop", ctypes.POINTER(ctypes.c_char_p)),
        ("num_stop", ctypes.c_size_t),
        ("sampling", Sampling),
        ("write", Write),
        ("context", ctypes.c_void_p),
        ("answer", ctypes.POINTER(Answer)),
    ]


class Checked(ctypes.Structure):
    _fields_ = [("files", ctypes.c_size_t), ("golden_tokens", ctypes.c_size_t), ("compared", ctypes.c_size_t)]


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

    def open(self, bundle: Path) -> Library:
        return Library(ctypes.CDLL(str(self._library)), bundle)


class Library:
    """A bundle in the C library, as a program that links it has it; `ryot.h` says what the fields of structures are."""

    def __init__(self, library: ctypes.CDLL, bundle: Path):
        self._library = library
        library.ryot_open.restype = ctypes.c_void_p
        library.ryot_encode.restype = ctypes.c_int64
        library.ryot_generate.restype = library.ryot_verify.restype = ctypes.c_bool
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

    def generate(
        self, prompt: bytes, max_new_tokens: int, *, pieces: int | None = None, **sampling: float
    ) -> tuple[str, Answer]:
        """The text that it writes, of which it is told to end after so many pieces."""
        parts: list[bytes] = []

        def write(_context: int, text: int, count: int) -> bool:
            parts.append(ctypes.string_at(text, count))
            return pieces is None or len(parts) < pieces

        answer = Answer()
        request = Request(
            prompt=prompt,
            prompt_bytes=len(prompt),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
            write=Write(write),
            answer=ctypes.pointer(answer),
        )
        if not self._library.ryot_generate(
            ctypes.c_void_p(self._ryot), ctypes.byref(request), ctypes.byref(self._error)
        ):
            raise ValueError(self._error.message.decode())
        return b"".join(parts).decode(), answer

    def verify(self) -> Checked:
        checked = Checked()
        if not self._library.ryot_verify(ctypes.c_void_p(self._ryot), ctypes.byref(checked), ctypes.byref(self._error)):
            raise ValueError(self._error.message.decode())
        return checked

    def close(self) -> None:
        self._library.ryot_close(ctypes.c_void_p(self._ryot))
