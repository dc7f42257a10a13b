"""A file of requests answered as fast as the machine can: OpenAI's batch format in and out, and never a line twice.

Every answer is one line, written whole as soon as it is there. A run that was killed leaves complete lines and perhaps
a part of one; the next run cuts that off and asks only for what is missing. The longest requests go first, so that none
of them is left alone at the end, and among those of about one length the ones that begin alike are neighbours.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ryot.errors import ConfigError, DataError
from ryot.serve.answers import Body, collect
from ryot.serve.chat import ChatCompletion
from ryot.serve.completions import TextCompletion
from ryot.serve.errors import ApiError
from ryot.serve.fields import Fields, parse_body
from ryot.serve.model import ServedModel

URLS: dict[str, type[TextCompletion] | type[ChatCompletion]] = {
    "/v1/completions": TextCompletion,
    "/v1/chat/completions": ChatCompletion,
}
#: Requests that are read ahead, a row.
READ_AHEAD = 2
#: Characters of a prompt that decide who its neighbours are.
NEIGHBOUR_CHARACTERS = 200
#: What a token is taken for, in characters, where one has to be compared with the other.
TOKEN_CHARACTERS = 4
PROGRESS_S = 1.0


class Line(NamedTuple):
    """A request that is to be answered, in the file of requests."""

    offset: int
    custom_id: str
    size: int
    """About how long it takes, in characters."""
    beginning: str


class BadLine(NamedTuple):
    """A line that is no request."""

    number: int
    reason: str


@dataclass(slots=True)
class Progress:
    """How far a batch has come."""

    total: int
    """Requests in the file."""
    before: int
    """Answered by runs before this one."""
    done: int = 0
    """Answered by this one."""
    failed: int = 0
    """Of these, refused."""
    lost: int = 0
    """Not answered for an error of this machine; the next run asks again."""
    completion_tokens: int = 0
    size: int = 0
    size_total: int = 0
    """Of all that this run is to answer, in the unit of `Line.size`."""
    began_s: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.began_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second."""
        return self.completion_tokens / max(self.seconds, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Estimate of the time left; None before anything is done."""
        return None if not self.size else self.seconds * (self.size_total - self.size) / self.size


class Answered(NamedTuple):
    """What came of a request."""

    status: int
    data: bytes
    """The line of the file of answers, without its end."""
    completion_tokens: int


@dataclass(slots=True)
class Batch:
    """A file of requests and its answers, open for this process alone."""

    requests: Path
    answers: Path
    file: BinaryIO
    missing: list[Line]
    """In the order in which they are best asked."""
    bad: list[BadLine]
    progress: Progress
    on_progress: Callable[[Progress], None]
    reported_s: float = 0.0

    def write(self, size: int, answered: Answered) -> None:
        """Keep an answer to a request of this size. Raises `DataError`; a part of a last line may be there then.

        What is no fault of the request is not kept, so that the next run asks again.
        """
        if answered.status >= 500:
            self.progress.lost += 1
            return
        left = memoryview(answered.data + b"\n")
        try:
            while left:
                # A disk that fills takes a part, and the next line must not follow that.
                left = left[self.file.write(left) :]
        except OSError as error:
            raise DataError(f"{self.answers}: {error}", hint="To resume: the same command") from error
        progress = self.progress
        progress.done += 1
        progress.size += size
        progress.failed += answered.status != 200
        progress.completion_tokens += answered.completion_tokens
        if time.monotonic() - self.reported_s >= PROGRESS_S:
            self.reported_s = time.monotonic()
            self.on_progress(progress)


@contextmanager
def open_batch(requests: Path, answers: Path, on_progress: Callable[[Progress], None]) -> Iterator[Batch]:
    """What `answers` does not hold yet. Raises `DataError` for files that do not belong together."""
    lines, bad = read_requests(requests)
    with _open_answers(answers) as file:
        answered = read_answers(file, answers)
        known = {line.custom_id for line in lines}
        if foreign := [custom_id for custom_id in answered if custom_id not in known]:
            raise DataError(f"{answers}: answers {foreign[0]!r}, which {requests} does not ask", hint="give another -o")
        missing = [line for line in lines if line.custom_id not in answered]
        missing.sort(key=lambda line: (-line.size.bit_length(), line.beginning))
        progress = Progress(len(lines), len(answered), size_total=sum(line.size for line in missing))
        yield Batch(requests, answers, file, missing, bad, progress, on_progress)
        os.fsync(file.fileno())


def run_batch(
    model: ServedModel, requests: Path, answers: Path, on_progress: Callable[[Progress], None]
) -> tuple[Progress, list[BadLine]]:
    """Answer what `answers` does not hold yet. Raises `DataError` for files that do not belong together."""
    with open_batch(requests, answers, on_progress) as batch:
        if batch.missing:
            model.start()
            try:
                asyncio.run(_answer_all(model, batch))
            except* DataError as group:
                raise group.exceptions[0] from None
            finally:
                model.runner.stop()
    return batch.progress, batch.bad


def count_lines(path: Path) -> int:
    """Lines of a file. Raises `DataError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_requests(path: Path) -> tuple[list[Line], list[BadLine]]:
    """The requests of a file, and the lines that are none. Raises `DataError` where it cannot be read."""
    lines: list[Line] = []
    bad: list[BadLine] = []
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            offset = 0
            for number, data in enumerate(file, start=1):
                if number == 1 and data.startswith(BOM_UTF8):
                    data, offset = data.removeprefix(BOM_UTF8), len(BOM_UTF8)
                if data.strip():
                    try:
                        line = _read_line(data, offset)
                        if line.custom_id in seen:
                            raise ApiError(400, f"custom_id: {line.custom_id!r} was there before")
                        seen.add(line.custom_id)
                        lines.append(line)
                    except ApiError as error:
                        bad.append(BadLine(number, str(error)))
                offset += len(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return lines, bad


def _read_line(data: bytes, offset: int) -> Line:
    fields = parse_body(data)
    custom_id = fields.text("custom_id")
    if not custom_id:
        raise ApiError(400, "custom_id: is missing, expected a string")
    body = fields.table("body") or Fields({})
    said = body.get("prompt") or body.get("messages") or ""
    text = said if isinstance(said, str) else json.dumps(said)
    tokens = body.get("max_tokens") or body.get("max_completion_tokens")
    wanted = tokens if isinstance(tokens, int) and 0 < tokens < 10**6 else 0
    return Line(offset, custom_id, 1 + len(text) + TOKEN_CHARACTERS * wanted, text[:NEIGHBOUR_CHARACTERS])


def read_answers(file: BinaryIO, path: Path) -> set[str]:
    """The custom ids that a file of answers holds; cuts off a last line that is not whole.

    Raises `DataError` for a line that is no answer.
    """
    file.seek(0)
    answered: set[str] = set()
    end = 0
    for number, data in enumerate(file, start=1):
        if not data.endswith(b"\n"):
            break
        try:
            answer = json.loads(data)
            answered.add(str(answer["custom_id"]))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: line {number} is no answer of a batch", hint="give another -o") from error
        end += len(data)
    file.truncate(end)
    file.seek(end)
    return answered


@contextmanager
def _open_answers(path: Path) -> Iterator[BinaryIO]:
    """The file for reading and appending, for this process alone."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+", buffering=0)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{path}: another process is writing it") from error
        yield file  # type: ignore[misc]


async def _answer_all(model: ServedModel, batch: Batch) -> None:
    places = asyncio.Semaphore(READ_AHEAD * model.engine.batch_size)

    async def answer(line: Line, data: bytes) -> None:
        try:
            answered = await answer_line(model, line.custom_id, data)
        finally:
            places.release()
        batch.write(line.size, answered)

    with batch.requests.open("rb") as source:
        async with asyncio.TaskGroup() as tasks:
            for line in batch.missing:
                await places.acquire()
                source.seek(line.offset)
                tasks.create_task(answer(line, source.readline()))


async def answer_line(model: ServedModel, custom_id: str, data: bytes) -> Answered:
    """Answer one line of a file of requests, or say in the answer why it is refused."""
    status, body = await _answer(model, data)
    found = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body},
        "error": None,
    }
    line = json.dumps(found, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Answered(status, line, body.get("usage", {}).get("completion_tokens", 0))


async def _answer(model: ServedModel, data: bytes) -> tuple[int, Body]:
    """Status and body of one request's answer."""
    try:
        fields = parse_body(data)
        url = fields.text("url") or ""
        if fields.text("method", "POST") != "POST" or url not in URLS:
            raise ApiError(
                400, f"url: got {fields.get('method')} {url!r}, expected POST {' or '.join(URLS)}", param="url"
            )
        body = fields.table("body")
        if body is None:
            raise ApiError(400, "body: is missing, expected an object", param="body")
        if body.flag("stream"):
            raise ApiError(400, "stream: a batch is not streamed", param="stream")
        answer = URLS[url](body, model, "")
        answer.submit()
        return 200, answer.whole(await collect(answer))
    except ApiError as error:
        return error.status, error.body()
