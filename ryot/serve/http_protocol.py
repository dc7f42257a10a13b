"""HTTP/1.1 by httptools, which takes a fraction of h11's time for a piece of a stream, with h11's limit to headers."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Of a request's first line and its headers together; httptools would keep whatever comes.
MAX_HEAD_BYTES = 65_536


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a request whose headers are too long, or do not end."""

    _in_head = True
    #: What has come of headers that have not ended, and what of them was read.
    _come_bytes = _read_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Count what comes while headers have not ended; a part of the body before them may be among it."""
        super().data_received(data)
        self._come_bytes = self._come_bytes + len(data) if self._in_head else 0
        if self._come_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._read_bytes = True, 0
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
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._read_bytes += size
        if self._read_bytes > MAX_HEAD_BYTES:
            # The parser makes an error of it, and uvicorn of that an answer.
            raise ValueError("the headers are too long")
