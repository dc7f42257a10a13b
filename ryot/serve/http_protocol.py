"""HTTP/1.1 by httptools, which takes a fraction of h11's time for a piece of a stream, with limits to a request's head.

What is no request is answered as OpenAI's API answers errors, and not in plain text as uvicorn would.
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ryot.serve.errors import ApiError

#: Of a request's first line and its headers together; httptools would keep whatever comes.
MAX_HEAD_BYTES = 65_536
#: Seconds in which they must have come. uvicorn counts those between requests alone.
HEAD_TIMEOUT_S = 30.0
#: Seconds in which a client that was refused may read why. Closed at once, with something of it unread, the connection
#: would be reset, and the answer lost.
LINGER_S = 2.0

_TOO_LONG = ApiError(
    431, f"the headers have more than {MAX_HEAD_BYTES} bytes, which is the limit", code="head_too_long"
)


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose headers are too long, do not end, or do not come."""

    _in_head, _refused = True, False
    #: What has come of headers that have not ended, and what of them was read.
    _come_bytes = _read_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and has to say something."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._forget_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes while headers have not ended; a part of the body before them may be among it."""
        if self._refused:
            return
        super().data_received(data)
        self._come_bytes = self._come_bytes + len(data) if self._in_head else 0
        if self._come_bytes > MAX_HEAD_BYTES:
            self._refuse(_TOO_LONG)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._read_bytes = True, 0
        self._expect_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of its address has come."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers has come."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All of them have."""
        self._in_head = False
        self._forget_deadline()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Called for what cannot be read."""
        too_long = self._read_bytes > MAX_HEAD_BYTES
        self._refuse(_TOO_LONG if too_long else ApiError(400, "this is no HTTP request", code="bad_http"))

    def _count(self, size: int) -> None:
        self._read_bytes += size
        if self._read_bytes > MAX_HEAD_BYTES:
            # The parser makes an error of it, and uvicorn calls `send_400_response`.
            raise ValueError("the headers are too long")

    def _expect_head(self) -> None:
        self._forget_deadline()
        late = ApiError(408, f"the headers did not come within {HEAD_TIMEOUT_S:g} s", code="timeout")
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, late)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, error: ApiError) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            # The answer to the request before is under way, and nothing may be written into it.
            self.transport.close()
            return
        body = json.dumps(error.body()).encode()
        head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._forget_deadline()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.close)
