"""Serve a built page on this machine, with the headers that threads in a browser need.

    python serve.py [FOLDER] [--port PORT]

Only this machine can reach it, unless told otherwise with `--host`. Browsers let pages of other machines use threads
and work offline over https alone: that is a matter for a real web server.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEADERS = {
    # What makes a page cross-origin isolated.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Ask whether a file has changed before a kept one is used.
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".webmanifest": "application/manifest+json",
        ".svg": "image/svg+xml",
    }

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:  # requests are of no interest
        pass


def build_server(folder: Path, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server of `folder`; with port 0 on a port that is free."""
    return ThreadingHTTPServer((host, port), functools.partial(Handler, directory=str(folder)))


def main() -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve a built page with the headers that threads need.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).parent / "dist", help="what build.mjs made"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port (default: %(default)s)")
    arguments = parser.parse_args()
    if not (arguments.folder / "index.html").is_file():
        sys.stderr.write(f"Error: {arguments.folder}: no page in it; run 'npm run build -- BUNDLE' first\n")
        return 2
    with build_server(arguments.folder, arguments.host, arguments.port) as server:
        sys.stdout.write(f"http://{arguments.host}:{server.server_port}/\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
