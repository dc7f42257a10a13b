"""Whose bundles a device takes: the signature beside a manifest, and the keys that are trusted or not any more.

`ryot_signature.json` signs the sha256 of the manifest, which holds every other file's, that of `record.json`, and a
serial number that grows from one signing to the next: a device that once ran a version refuses those signed before it,
which somebody may have kept. A file of trusted keys has one key a line:

    trusted ed25519:BASE64 whose it is
    revoked ed25519:BASE64 why

Nothing here depends on the time, so a clock that is years off changes nothing. The signing side is
`ryot/deploy/signing.py`.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ryot.edge.bundle import MANIFEST_NAME, RECORD_NAME, Bundle, hash_file, load_bundle
from ryot.edge.ed25519 import verify_signature
from ryot.errors import BundleError, ConfigError

SIGNATURE_NAME = "ryot_signature.json"
#: The newest layout of a signature file that this code reads, and the one that is written.
SIGNATURE_SCHEMA = 2
#: Begins every message that is signed, so that a signature made for anything else is none of a bundle.
CONTEXT = b"ryot bundle signature 2\n"
#: And of those that were made before there were serial numbers.
CONTEXT_1 = b"ryot bundle signature 1\n"
MAX_SERIAL = 2**53
KEY_PREFIX = "ed25519:"
#: Files of a bundle that its manifest does not name.
UNLISTED = (MANIFEST_NAME, RECORD_NAME, SIGNATURE_NAME)
SIGN_HINT = "sign it with 'ryot-deploy sign BUNDLE --key FILE', or give the file that trusts its key"


class PublicKey(NamedTuple):
    """An Ed25519 public key and what its line says about it."""

    data: bytes
    comment: str = ""

    def __str__(self) -> str:
        """`ed25519:BASE64`: how files and messages write it."""
        return KEY_PREFIX + base64.b64encode(self.data).decode()


class TrustedKeys(NamedTuple):
    """What a file of trusted keys says."""

    where: str
    trusted: tuple[PublicKey, ...]
    revoked: tuple[PublicKey, ...]


class Signature(NamedTuple):
    """One signature of a bundle."""

    key: PublicKey
    signature: bytes
    serial: int = 0
    """Number of this signing; 0 for one of before there were numbers."""


class Signer(NamedTuple):
    """Who is trusted for a bundle."""

    key: PublicKey
    serial: int

    def __str__(self) -> str:
        return f"{self.key}" + (f", serial {self.serial}" if self.serial else "")


def parse_key(text: str, where: str, comment: str = "") -> PublicKey:
    """The key that `ed25519:BASE64` stands for. Raises `ConfigError` beginning with `where`."""
    try:
        if not text.startswith(KEY_PREFIX):
            raise ValueError
        data = base64.b64decode(text.removeprefix(KEY_PREFIX), validate=True)
        if len(data) != 32:
            raise ValueError
    except (ValueError, binascii.Error) as error:
        raise ConfigError(f"{where}: got {text[:60]!r}, expected {KEY_PREFIX} and 32 bytes in base64") from error
    return PublicKey(data, comment)


def parse_trusted_keys(text: str, where: str) -> TrustedKeys:
    """The keys that a file lists; a key that is revoked anywhere in it is not trusted."""
    keys: dict[str, list[PublicKey]] = {"trusted": [], "revoked": []}
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        if words[0] not in keys or len(words) < 2:
            raise ConfigError(f"{where}: line {number}: got {line[:60]!r}, expected 'trusted KEY' or 'revoked KEY'")
        keys[words[0]].append(parse_key(words[1], f"{where}: line {number}", words[2] if len(words) > 2 else ""))
    bad = {key.data for key in keys["revoked"]}
    trusted = tuple(key for key in keys["trusted"] if key.data not in bad)
    return TrustedKeys(where, trusted, tuple(keys["revoked"]))


def load_trusted_keys(path: Path) -> TrustedKeys:
    """The keys of a file. Raises `ConfigError` when it cannot be read or says something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trusted keys {path}: cannot be read ({error})") from error
    return parse_trusted_keys(text, f"trusted keys {path}")


def signed_message(folder: Path, serial: int) -> bytes:
    """What a signature of the bundle in `folder` with this number is made over."""
    digests = [f"{name} {hash_file(folder / name) if (folder / name).exists() else '-'}\n" for name in UNLISTED[:2]]
    begin = CONTEXT + f"serial {serial}\n".encode() if serial else CONTEXT_1
    return begin + "".join(digests).encode()


def read_signatures(folder: Path) -> list[Signature]:
    """The signatures beside a manifest, none where there is no file of them; `BundleError` for a malformed one."""
    path = folder / SIGNATURE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        values = json.loads(content)
        if values["schema"] > SIGNATURE_SCHEMA:
            raise BundleError(
                f"{path}: schema {values['schema']} is newer than {SIGNATURE_SCHEMA}, the newest that this ryot reads",
                hint="upgrade ryot here: pip install --upgrade ryot",
            )
        found = [
            Signature(
                parse_key(entry["key"], str(path)),
                base64.b64decode(entry["signature"], validate=True),
                check_serial(entry["serial"]) if "serial" in entry else 0,
            )
            for entry in values["signatures"]
        ]
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        raise BundleError(f"{path}: is no signature file ({error})", hint=SIGN_HINT) from error
    # Nothing signs this file itself, so there is one way to write it: a changed byte of it, too, is a change.
    if content != write_signatures(found):
        raise BundleError(f"{path}: is not as it was written", hint=SIGN_HINT)
    return found


def check_serial(value: object) -> int:
    """The serial number that a value is. Raises `ConfigError`."""
    if type(value) is not int or not 0 < value <= MAX_SERIAL:
        raise ConfigError(f"serial: got {value!r}, expected a whole number from 1 to {MAX_SERIAL}")
    return value


def write_signatures(signatures: Sequence[Signature]) -> bytes:
    """The content of a signature file."""
    entries = [
        {
            "key": str(s.key),
            **({"serial": s.serial} if s.serial else {}),
            "signature": base64.b64encode(s.signature).decode(),
        }
        for s in signatures
    ]
    schema = SIGNATURE_SCHEMA if any(s.serial for s in signatures) else 1
    return (json.dumps({"schema": schema, "signatures": entries}, indent=1) + "\n").encode()


def check_signatures(folder: Path, keys: TrustedKeys | None) -> Signer | None:
    """The trusted key that signed the bundle last; every signature that is there has to be right, trusted or not.

    Without `keys` nobody is asked for and None is returned. Raises `BundleError` for a wrong signature, and with `keys`
    for a revoked key or when none is trusted.
    """
    signatures = read_signatures(folder)
    for one in signatures:
        if not verify_signature(one.key.data, signed_message(folder, one.serial), one.signature):
            raise BundleError(
                f"bundle {folder}: its signature by {_named(one.key)} does not fit {MANIFEST_NAME} and {RECORD_NAME}",
                hint="something was changed after it was signed: " + SIGN_HINT,
            )
    if keys is None:
        return None
    if not signatures:
        raise BundleError(f"bundle {folder}: is not signed, and {keys.where} asks for a signature", hint=SIGN_HINT)
    known = {key.data: key for key in keys.trusted}
    revoked = {key.data: key for key in keys.revoked}
    if ours := [Signer(known[one.key.data], one.serial) for one in signatures if one.key.data in known]:
        return max(ours, key=lambda signer: signer.serial)
    for one in signatures:
        if one.key.data in revoked:
            why = revoked[one.key.data].comment
            reason = f" ({why})" if why else ""
            raise BundleError(
                f"bundle {folder}: signed by {_named(one.key)}, which {keys.where} revokes{reason}",
                hint="sign it with a key that is trusted",
            )
    raise BundleError(
        f"bundle {folder}: signed by {_named(signatures[0].key)}, which {keys.where} does not trust", hint=SIGN_HINT
    )


def check_whole(folder: Path, keys: TrustedKeys | None = None) -> tuple[Bundle, Signer | None]:
    """The bundle, every byte of whose folder is as it was made: signatures, hashes, and no file that it does not list.

    A file that is not listed counts as tampering, because `runtime/` is where Python looks for modules first.
    """
    bundle = load_bundle(folder, verify=False)
    signer = check_signatures(folder, keys)
    bundle = load_bundle(folder)
    check_listed(bundle)
    return bundle, signer


def check_listed(bundle: Bundle) -> None:
    """Raise `BundleError` for a file, a link or anything else in the folder that the manifest does not name."""
    for parent, folders, files in os.walk(bundle.path):
        for name in (*folders, *files):
            path = Path(parent, name)
            inside = path.relative_to(bundle.path).as_posix()
            if path.is_symlink():
                raise BundleError(f"bundle {bundle.path}: {inside} is a link, expected plain files")
            if name in files and inside not in bundle.files and inside not in UNLISTED:
                raise BundleError(
                    f"bundle {bundle.path}: {inside} is not in its manifest", hint="remove it, or copy the bundle again"
                )


def _named(key: PublicKey) -> str:
    return f"{str(key)[:20]}…" + (f" ({key.comment})" if key.comment else "")
