"""Where a running Ray cluster is, and whether something that speaks its protocol answers there, within seconds."""

from __future__ import annotations

import os
import socket

from ryot.errors import ClusterError, ConfigError

#: HTTP/2's connection preface and an empty SETTINGS frame (RFC 9113, 3.4): a gRPC server answers with its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS_FRAME = 4
PROBE_S = 3.0


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
    if address.startswith("ray://"):
        raise ConfigError(
            f"address: got {address!r}, a Ray Client address, expected HOST:PORT",
            hint="use the port of 'ray start --head' (6379 by default) without ray://",
        )
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"address: got {address!r}, expected HOST:PORT or auto")
    return host.strip("[]"), int(port)


def _last_started() -> str:
    from ray._private.utils import read_ray_address

    return read_ray_address() or ""


def probe_address(host: str, port: int) -> None:
    """Raise `ClusterError` unless a gRPC server answers at the address within `PROBE_S` seconds per step.

    With RAY_USE_TLS=1 only the connection is tried.
    """
    where = f"cluster {host}:{port}"
    hint = "is the head running ('ray start --head'), and is the port open from here?"
    try:
        with socket.create_connection((host, port), timeout=PROBE_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
                return
            connection.settimeout(PROBE_S)
            connection.sendall(_PREFACE)
            header = b""
            while len(header) < 9:
                received = connection.recv(9 - len(header))
                if not received:
                    break
                header += received
    except TimeoutError as error:
        raise ClusterError(f"{where}: no answer within {PROBE_S:g} s", hint=hint) from error
    except OSError as error:
        raise ClusterError(f"{where}: cannot connect ({error.strerror or error})", hint=hint) from error
    if len(header) < 9 or header[3] != _SETTINGS_FRAME:
        raise ClusterError(f"{where}: what answers there is no Ray head", hint=hint)
