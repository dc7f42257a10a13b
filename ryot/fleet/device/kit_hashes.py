"""The hashes of what a kit holds beside its bundle, in sha256sum's own format, and who signed them.

`SHA256SUMS.sig` is the 64 bytes of an Ed25519 signature of `SHA256SUMS` as it is, so that other programs can
check it too. The bundle has signatures of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ryot.edge.bundle import hash_file
from ryot.edge.ed25519 import verify_signature
from ryot.edge.trust import PublicKey, TrustedKeys
from ryot.errors import FleetError
from ryot.fleet.device.store import check_digest

HASHES_NAME, SIGNATURE_NAME = "SHA256SUMS", "SHA256SUMS.sig"
_HINT = "make the kit again, with 'ryot-deploy pack BUNDLE --kit DIR --key FILE'"


def hash_wheels(folder: Path, keys: TrustedKeys | None) -> list[tuple[Path, str]]:
    """The wheels in `folder` and their hashes, which are those that the kit around it lists.

    Raises `FleetError` for a wheel that is changed or not listed, and with `keys` unless one of them signed the list.
    """
    wheels = [(path, hash_file(path)) for path in sorted(folder.glob("*.whl"))]
    listed = _read_hashes(folder.absolute().parent, keys)
    for path, digest in wheels:
        if listed is not None and listed.get(f"{folder.absolute().name}/{path.name}") != digest:
            raise FleetError(f"{path}: is not the one that {HASHES_NAME} lists", hint="copy the kit again")
    return wheels


def _read_hashes(kit: Path, keys: TrustedKeys | None) -> dict[str, str] | None:
    """Hashes by name; None for a folder that is no kit, where no signature is asked for."""
    path = kit / HASHES_NAME
    if keys is not None:
        _check_signature(kit, keys)
    elif not path.exists():
        return None
    listed = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        check_digest(digest)
        listed[name] = digest
    return listed


def _check_signature(kit: Path, keys: TrustedKeys) -> None:
    path, signature = kit / HASHES_NAME, kit / SIGNATURE_NAME
    if not (path.exists() and signature.exists()):
        raise FleetError(f"{kit}: its wheels are not signed, and {keys.where} asks for a signature", hint=_HINT)
    content, signed = path.read_bytes(), signature.read_bytes()
    if not _signed_by_any(keys.trusted, content, signed):
        why = "by a key that it revokes" if _signed_by_any(keys.revoked, content, signed) else "by none of its keys"
        raise FleetError(f"{path}: is signed {why}, says {keys.where}", hint=_HINT)


def _signed_by_any(keys: Sequence[PublicKey], content: bytes, signature: bytes) -> bool:
    return any(verify_signature(key.data, content, signature) for key in keys)
