"""Verifies Ed25519 signatures (RFC 8032) with Python's own integers, so that a device needs no package for it.

Only verification: it handles nothing secret, so its time may depend on its inputs. The check is the one without the
cofactor, as OpenSSL's; encodings that are not canonical and keys of small order are refused.
"""

from __future__ import annotations

import hashlib

#: The field's prime, the group's order, and the curve's d and sqrt(-1) (RFC 8032, 5.1).
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
SQRT_MINUS_1 = pow(2, (P - 1) // 4, P)

Point = tuple[int, int, int, int]
"""Extended coordinates X, Y, Z, T with x = X/Z, y = Y/Z, x y = T/Z."""

_IDENTITY: Point = (0, 1, 1, 0)


def verify_signature(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) of `message` was made with the private half of `public_key` (32 bytes)."""
    if len(public_key) != 32 or len(signature) != 64:
        return False
    a, r = _decode(public_key), _decode(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= L or _is_small(a):
        return False
    digest = hashlib.sha512(signature[:32] + public_key + message).digest()
    k = int.from_bytes(digest, "little") % L
    minus_a = (P - a[0], a[1], a[2], P - a[3])
    # S B = R + k A, as S B - k A = R, both products in one pass.
    return _same(_sum_of_products(s, _BASE, k, minus_a), r)


def _decode(data: bytes) -> Point | None:
    """The point that 32 bytes stand for; None where they stand for none, or are not its only encoding."""
    number = int.from_bytes(data, "little")
    sign, y = number >> 255, number & ((1 << 255) - 1)
    if y >= P:
        return None
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    # A candidate root of u/v (RFC 8032, 5.1.3).
    x = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    if (v * x * x + u) % P == 0:
        x = x * SQRT_MINUS_1 % P
    if v * x * x % P != u or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return (x, y, 1, x * y % P)


def _add(p: Point, q: Point) -> Point:
    """The sum of two points, which may be equal (RFC 8032, 5.1.4)."""
    a = (p[1] - p[0]) * (q[1] - q[0]) % P
    b = (p[1] + p[0]) * (q[1] + q[0]) % P
    c = 2 * p[3] * q[3] * D % P
    d = 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f % P, g * h % P, f * g % P, e * h % P)


def _sum_of_products(m: int, p: Point, n: int, q: Point) -> Point:
    both, total = _add(p, q), _IDENTITY
    for bit in range(max(m.bit_length(), n.bit_length()) - 1, -1, -1):
        total = _add(total, total)
        pair = (m >> bit & 1, n >> bit & 1)
        if pair != (0, 0):
            total = _add(total, both if pair == (1, 1) else p if pair[0] else q)
    return total


def _same(p: Point, q: Point) -> bool:
    return (p[0] * q[2] - q[0] * p[2]) % P == 0 and (p[1] * q[2] - q[1] * p[2]) % P == 0


def _is_small(p: Point) -> bool:
    """Whether the point's order divides 8: such a key accepts signatures that nobody made."""
    for _ in range(3):
        p = _add(p, p)
    return _same(p, _IDENTITY)


def _base() -> Point:
    point = _decode((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))
    assert point is not None
    return point


_BASE = _base()
