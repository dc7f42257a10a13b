"""Where a running Ray cluster is, and whether something that speaks its protocol answers there, within seconds."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time

from ryot.errors import ClusterError, ConfigError

#: HTTP/2's connection preface and an empty SETTINGS frame (RFC 9113, 3.4): a gRPC server answers with its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS_FRAME = 4
PROBE_S = 3.0


def describe_address(address: str) -> str:
    """`cluster HOST:PORT` for messages, with RAY_ADDRESS where the address is from there: it may be a stale one."""
    return f"cluster {address}{' (RAY_ADDRESS)' if os.environ.get('RAY_ADDRESS') == address else ''}"


def resolve_address(address: str) -> tuple[str, int]:
    """Host and port of `address`; `auto` is RAY_ADDRESS or the cluster started last on this machine.

    Raises `ConfigError` for what is no address and `ClusterError` when `auto` finds none.
    """
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS") or _last_started()
        if not found or found == "auto":
            raise ClusterError(
                "address auto: no Ray cluster runs on this machine and RAY_ADDRESS is not set",
                hint="give --address HOST:PORT, or leave it out for an embedded cluster",
            )
        address = found
    option = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") == address else "address"
    if address.startswith("ray://"):
        raise ConfigError(
            f"{option}: got {address!r}, a Ray Client address, expected HOST:PORT",
            hint="use the port of 'ray start --head' (6379 by default) without ray://",
        )
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{option}: got {address!r}, expected HOST:PORT or auto")
    return host.strip("[]"), int(port)


def _last_started() -> str:
    from ray._private.utils import read_ray_address

    return read_ray_address() or ""


def probe_address(host: str, port: int) -> None:
    """Raise `ClusterError` unless a gRPC server answers at the address; it takes at most `3 * PROBE_S` seconds.

    With RAY_USE_TLS=1 only the connection is tried.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    where = describe_address(address)
    hint = "is the head running ('ray start --head'), and is the port open from here?"
    if os.environ.get("RAY_ADDRESS") == address:
        hint += " If RAY_ADDRESS is a leftover, unset it: a run then has an embedded cluster"
    deadline = time.monotonic() + 2 * PROBE_S
    try:
        with _connect(host, port, deadline) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
                return
            header = _read_header(connection, deadline)
    except TimeoutError as error:
        raise ClusterError(f"{where}: no answer within {PROBE_S:g} s", hint=hint) from error
    except OSError as error:
        raise ClusterError(f"{where}: cannot connect ({error.strerror or error})", hint=hint) from error
    if len(header) < 9 or header[3] != _SETTINGS_FRAME:
        raise ClusterError(f"{where}: what answers there is no Ray head", hint=hint)


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to the first of the host's addresses that takes one."""
    failure: OSError = TimeoutError()
    for address in _look_up(host, port):
        try:
            return socket.create_connection((address, port), timeout=_time_left(deadline))
        except OSError as error:
            failure = error
    raise failure


def _read_header(connection: socket.socket, deadline: float) -> bytes:
    """The header of the first HTTP/2 frame that is answered, shorter where less is."""
    connection.settimeout(PROBE_S)
    connection.sendall(_PREFACE)
    header = b""
    while len(header) < 9 and (received := connection.recv(9 - len(header))):
        header += received
        connection.settimeout(_time_left(deadline))
    return header


def _time_left(deadline: float) -> float:
    return max(0.01, min(PROBE_S, deadline - time.monotonic()))


def _look_up(host: str, port: int) -> list[str]:
    """The addresses of a host name. A resolver that does not answer would take a minute, and takes no limit."""
    found: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put([str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except OSError as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        answer = found.get(timeout=PROBE_S)
    except queue.Empty:
        raise TimeoutError(f"no name server answers for {host}") from None
    if isinstance(answer, OSError):
        raise answer
    return answer
