"""Write targets/runner/unicode_tables.inc: what mxrun's tokenizer must know of Unicode.

General categories, white space and word characters are asked of the tokenizers library, so that
mxrun splits text as it does, whatever version of Unicode that has. Canonical decompositions are
Python's, as far as the library's NFC agrees with them.

    python scripts/make_unicode_tables.py
"""

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

NAMES = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn"
CATEGORIES = [NAMES[i : i + 2] for i in range(0, len(NAMES), 2)]
SURROGATES = range(0xD800, 0xE000)
CHARACTERS = [c for c in range(sys.maxunicode + 1) if c not in SURROGATES]
HEADER = "// Written by scripts/make_unicode_tables.py.\n"


def members(pattern: str) -> set[int]:
    """The characters that a pattern of one character matches in the tokenizers library."""
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    text = "".join(map(chr, CHARACTERS))
    return {ord(c) for piece, _ in split.pre_tokenize_str(text) for c in piece}


def runs(value: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Where each run of characters of an equal value begins, and the value."""
    for kind, group in groupby(range(sys.maxunicode + 1), value):
        yield next(group), kind


def array(kind: str, name: str, values: Iterable[str]) -> str:
    """A C++ array, in lines."""
    words, lines = list(values), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 96:
            lines.append("")
        lines[-1] += f" {word},"
    return (
        f"constexpr {kind} {name}[{len(words)}] = {{\n"
        + "\n".join(f"   {line}" for line in lines)
        + "\n};\n"
    )


def decompositions() -> list[tuple[int, int, int]]:
    """Canonical decompositions in one step: character, first, second or 0; without Hangul."""
    found = []
    for c in CHARACTERS:
        text = unicodedata.decomposition(chr(c))
        if text and not text.startswith("<"):
            first, *second = (int(word, 16) for word in text.split())
            found.append((c, first, second[0] if second else 0))
    return found


def composes(c: int) -> bool:
    """Whether NFC makes ``c`` from its parts."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", chr(c))) == chr(c)


def combining_class(c: int) -> int:
    """Python's canonical combining class, or 0 where the library's Unicode is too old for it."""
    found = unicodedata.combining(chr(c))
    last = "\u0345"  # of class 240, the highest: whatever has a class goes before it
    if not 0 < found < 240:
        return found
    return found if normalizers.NFD().normalize_str(f"a{last}{chr(c)}")[-1] == last else 0


def main() -> None:
    """Ask, check and write."""
    nfc = normalizers.NFC()
    odd = [
        c for c in CHARACTERS if nfc.normalize_str(chr(c)) != unicodedata.normalize("NFC", chr(c))
    ]
    if odd:
        print(f"NFC of {len(odd)} characters differs from the library's, such as U+{odd[0]:04X}")
    kinds = {c: n for n, name in enumerate(CATEGORIES) for c in members(rf"\p{{{name}}}")}
    surrogate, unassigned = CATEGORIES.index("Cs"), CATEGORIES.index("Cn")
    kinds |= dict.fromkeys(SURROGATES, surrogate)
    spaces, words = members(r"\s"), members(r"\w")
    flags = {c: (c in spaces) | (c in words) << 1 for c in CHARACTERS}
    rows = decompositions()
    text = HEADER + "\n"
    text += "// Runs: first character << 5 | category.\n"
    text += array(
        "uint32_t",
        "kCategoryRuns",
        (f"{c << 5 | k:#x}" for c, k in runs(lambda c: kinds.get(c, unassigned))),
    )
    text += "\n// Runs: first character << 2 | word << 1 | space.\n"
    text += array(
        "uint32_t", "kFlagRuns", (f"{c << 2 | k:#x}" for c, k in runs(lambda c: flags.get(c, 0)))
    )
    text += "\n// Runs: first character << 8 | canonical combining class.\n"
    text += array(
        "uint32_t",
        "kCombiningRuns",
        (f"{c << 8 | k:#x}" for c, k in runs(combining_class)),
    )
    text += (
        "\n// Canonical decompositions: character, first, second or 0, whether NFC composes it.\n"
    )
    text += array(
        "Decomposition",
        "kDecompositions",
        (f"{{{c:#x}, {a:#x}, {b:#x}, {int(composes(c))}}}" for c, a, b in rows),
    )
    path = Path(__file__).parent.parent / "targets" / "runner" / "unicode_tables.inc"
    path.write_text(text)
    print(f"{path}: {len(text)} bytes")


if __name__ == "__main__":
    main()
