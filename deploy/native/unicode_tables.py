"""Print what unicode.c knows about characters, as the installed `tokenizers` has it: a C header.

    python unicode_tables.py > build/unicode_tables.h

Python's own tables are of another Unicode version than those of `tokenizers`, and its regular expressions' are of
another than its normalizers'. So each category is asked for with an expression, and Python's decompositions and
combining classes are kept where the normalizers show them.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, normalizers

#: In the order of `enum category` in unicode.h.
CATEGORIES = (
    *("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"),
    *("Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn"),
)
CHARACTERS = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
NFC, NFD = normalizers.NFC(), normalizers.NFD()
#: Marks of combining class 1 and 240.
OVERLAY, IOTA = "\u0334", "\u0345"


def main() -> None:
    out = ["/* Made by unicode_tables.py. */", "#include <stdint.h>", ""]
    classes = [CATEGORIES.index("Cn")] * (sys.maxunicode + 1)
    left = CHARACTERS
    for name in sorted(CATEGORIES, key=["Cn", "Co", "Lo", "So"].__contains__, reverse=True):  # the largest ones first
        found = matching(rf"\p{{{name}}}", left)
        left = sorted(set(left) - set(found))
        for code in found:
            classes[code] = CATEGORIES.index(name)
    starts = [code for code in range(len(classes)) if code == 0 or classes[code] != classes[code - 1]]
    out += table("uint32_t", "CATEGORY_STARTS", (f"{start << 5 | classes[start]:#x}" for start in starts))
    out += table("uint32_t", "SPACES", (f"{code:#x}" for code in matching(r"\s", CHARACTERS)))
    pairs = [(code, *pair) for code in CHARACTERS if (pair := decomposition(chr(code)))]
    out += table("uint32_t", "DECOMPOSITIONS", (f"{{{', '.join(map(hex, row))}}}" for row in pairs), "[3]")
    composed = sorted((a, b, code) for code, a, b in pairs if b and NFC.normalize_str(chr(a) + chr(b)) == chr(code))
    out += table("uint32_t", "COMPOSITIONS", (f"{{{', '.join(map(hex, row))}}}" for row in composed), "[3]")
    marks = ((code, order) for code in CHARACTERS if (order := combining_class(chr(code))))
    out += table("uint32_t", "COMBINING", (f"{code << 8 | order:#x}" for code, order in marks))
    sys.stdout.write("\n".join(out) + "\n")


def matching(pattern: str, characters: Sequence[int]) -> list[int]:
    """Those of the characters that a regular expression of one character matches."""
    others = normalizers.Replace(Regex(pattern), "").normalize_str("".join(map(chr, characters)))
    return sorted(set(characters) - set(map(ord, others)))


def decomposition(character: str) -> Sequence[int]:
    """The one or two characters that it stands for; none where it stands for itself. Hangul is computed elsewhere."""
    text = unicodedata.decomposition(character)
    if not text or text.startswith("<") or NFD.normalize_str(character) == character:
        return ()
    codes = [int(code, 16) for code in text.split()]
    return codes if len(codes) == 2 else [*codes, 0]


def combining_class(character: str) -> int:
    """Its place among the marks of one character, 0 for what is no mark, or none to the normalizers."""
    moves = NFD.normalize_str(character + OVERLAY) != NFD.normalize_str(character) + OVERLAY
    moves = moves or NFD.normalize_str(IOTA + character) != IOTA + NFD.normalize_str(character)
    return unicodedata.combining(character) if moves else 0


def table(kind: str, name: str, values: Iterable[str], suffix: str = "") -> Iterator[str]:
    yield f"static const {kind} {name}[]{suffix} = {{"
    line = "   "
    for value in values:
        if len(line) + len(value) > 116:
            yield line
            line = "   "
        line += f" {value},"
    yield line
    yield "};"


if __name__ == "__main__":
    main()
