"""Lines of JSON and raw bytes over two pipes, the same at both ends; the other may be silent for so long, no longer."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from typing import Any

CHUNK = 1 << 18
#: A line that is longer is no line of this program's: an answer holds some raw samples at most.
_MAX_LINE = 256_000_000
_MAX_TEXT_LINE = 1_000_000


class WireError(Exception):
    """The other end is gone, silent for too long, or says something else."""


class WireNonsenseError(WireError):
    """What came is nothing that this program's other end says."""


class Wire:
    """Reads from one descriptor and writes to another; `silence_s` is how long a read waits for the next bytes."""

    def __init__(self, read_from: int, write_to: int, silence_s: float):
        self._in, self._out, self.silence_s = read_from, write_to, silence_s
        self._rest = b""

    def send(self, values: dict[str, Any]) -> None:
        self.write(json.dumps(values).encode() + b"\n")

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._out, view) :]
            except BrokenPipeError as error:
                raise WireError("the connection ended") from error

    def receive(self) -> dict[str, Any]:
        """The next line."""
        parts: list[bytes] = []
        while True:
            line, newline, rest = self._next().partition(b"\n")
            parts.append(line)
            if newline:
                self._rest = rest
                break
            if sum(map(len, parts)) > _MAX_LINE:
                raise WireNonsenseError("a line that does not end")
        try:
            values = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise WireNonsenseError(f"got {b''.join(parts)[:200]!r}, expected a line of JSON") from error
        if not isinstance(values, dict):
            raise WireNonsenseError(f"got {repr(values)[:200]}, expected an object")
        return values

    def receive_bytes(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, as they come."""
        while count:
            part = self._next()
            part, self._rest = part[:count], part[count:]
            count -= len(part)
            yield part

    def receive_text_line(self) -> str:
        """The next line, whatever it says."""
        parts: list[bytes] = []
        while True:
            line, newline, rest = self._next().partition(b"\n")
            parts.append(line)
            if newline:
                self._rest = rest
                return b"".join(parts).decode("utf-8", "replace")
            if sum(map(len, parts)) > _MAX_TEXT_LINE:
                raise WireNonsenseError("a line that does not end")

    def _next(self) -> bytes:
        if self._rest:
            part, self._rest = self._rest, b""
            return part
        ready, _, _ = select.select([self._in], [], [], self.silence_s)
        if not ready:
            raise WireError(f"nothing came for {self.silence_s:g} s")
        part = os.read(self._in, CHUNK)
        if not part:
            raise WireError("the connection ended")
        return part
