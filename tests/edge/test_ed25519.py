"""Signatures, held against RFC 8032's vectors and OpenSSL's own verification (by way of cryptography)."""

from __future__ import annotations

import hashlib
import random

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ryot.edge.ed25519 import L, verify_signature

#: RFC 8032, 7.1: secret key, public key, message, signature. The last is test "SHA(abc)".
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
]
IDENTITY = (1).to_bytes(32, "little")


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_the_vectors_of_rfc_8032_are_accepted(secret: str, public: str, message: str, signature: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert key.public_key().public_bytes_raw().hex() == public  # the vectors are copied without a slip
    assert verify_signature(bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature))


def test_it_agrees_with_openssl_on_signatures_with_any_bit_flipped() -> None:
    rng = random.Random(8032)
    agreed = {True: 0, False: 0}
    for number in range(40):
        key = Ed25519PrivateKey.from_private_bytes(rng.randbytes(32))
        message = rng.randbytes(number)
        whole = bytearray(key.public_key().public_bytes_raw() + key.sign(message))
        if number % 4:
            bit = rng.randrange(8 * len(whole))
            whole[bit // 8] ^= 1 << bit % 8
        public, signature = bytes(whole[:32]), bytes(whole[32:])
        ours = verify_signature(public, message, signature)
        assert ours == openssl_accepts(public, message, signature) == (number % 4 == 0)
        agreed[ours] += 1
    assert agreed == {True: 10, False: 30}


def test_one_signature_has_one_form() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public, signature = key.public_key().public_bytes_raw(), key.sign(b"text")
    s = int.from_bytes(signature[32:], "little") + L
    assert not verify_signature(public, b"text", signature[:32] + s.to_bytes(32, "little"))
    assert verify_signature(public, b"text", signature)
    assert not verify_signature(public, b"text", signature + b"\0")


def test_a_key_of_small_order_signs_nothing() -> None:
    # With the neutral element as key and R, and S = 0, the equation holds for every message.
    assert not verify_signature(IDENTITY, b"any text", IDENTITY + bytes(32))


def openssl_accepts(public: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
