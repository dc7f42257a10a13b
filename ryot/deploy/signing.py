"""Signs bundles with Ed25519 (the `cryptography` package); devices verify with `ryot.edge.trust`, which needs none.

A private key is a PEM file in PKCS 8, as `openssl genpkey -algorithm ed25519` writes it too; it may have a passphrase.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ryot.edge.bundle import load_bundle
from ryot.edge.ed25519 import verify_signature
from ryot.edge.trust import (
    SIGNATURE_NAME,
    PublicKey,
    Signature,
    check_listed,
    check_serial,
    check_signatures,
    read_signatures,
    signed_message,
    write_signatures,
)
from ryot.errors import ConfigError


def make_key(path: Path, passphrase: str = "") -> PublicKey:
    """Write a new private key, readable by its owner alone, to a file that is not there yet; its public half."""
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(
            f"key {path}: exists, and a key that is lost is lost for good", hint="name a new file"
        ) from error
    except OSError as error:
        raise ConfigError(f"key {path}: cannot be written ({error.strerror})") from error
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
    return _public(key)


def load_key(path: Path, passphrase: str = "") -> Ed25519PrivateKey:
    """The private key of a file. Raises `ConfigError` when there is none, or it is of another kind."""
    try:
        content = path.read_bytes()
        key = serialization.load_pem_private_key(content, passphrase.encode() if passphrase else None)
    except OSError as error:
        raise ConfigError(f"key {path}: cannot be read ({error.strerror})") from error
    except TypeError as error:  # what cryptography raises for a passphrase that is missing, or given for nothing
        raise ConfigError(f"key {path}: {error}", hint="its passphrase is taken from RYOT_KEY_PASSPHRASE") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"key {path}: is no private key in PEM, or its passphrase is wrong",
            hint="make one: ryot-deploy sign --new-key FILE",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"key {path}: got {type(key).__name__}, expected an Ed25519 key")
    return key


def sign_bundle(folder: Path, key: Ed25519PrivateKey, serial: int | None = None) -> PublicKey:
    """Add the key's signature to those of a whole bundle, in place of any that does not fit it any more.

    `serial` is the number of this signing; None takes the seconds since 1970, which grow by themselves. Raises
    `BundleError` for a bundle that is damaged or holds a file that its manifest does not list.
    """
    check_listed(load_bundle(folder))
    own, serial = _public(key), check_serial(int(time.time()) if serial is None else serial)
    others = [
        s
        for s in read_signatures(folder)
        if s.key.data != own.data and verify_signature(s.key.data, signed_message(folder, s.serial), s.signature)
    ]
    mine = Signature(own, key.sign(signed_message(folder, serial)), serial)
    signatures = sorted([*others, mine], key=lambda s: s.key.data)
    (folder / SIGNATURE_NAME).write_bytes(write_signatures(signatures))
    (folder / SIGNATURE_NAME).chmod(0o644)  # as the rest of a bundle, whatever the umask
    check_signatures(folder, None)
    return own


def _public(key: Ed25519PrivateKey) -> PublicKey:
    return PublicKey(key.public_key().public_bytes_raw())
