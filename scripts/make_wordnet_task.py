"""Write a zero-shot task from WordNet: the word that a gloss defines, among four.

The three others are of the same lexicographer's file (plants, feelings, motion, ...), so that the
gloss has to be understood and not only its subject guessed. WordNet is Debian's ``wordnet-base``,
fetched as ``models/corpus.py`` fetches it; the choice of items is the same every time::

    python scripts/make_wordnet_task.py wordnet.jsonl --items 1000
"""

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from corpus import PACKAGES_DIR, unpack

PARTS = ("noun", "verb", "adj")
WORD = re.compile(r"[a-z]{4,12}")


@dataclass(frozen=True)
class Entry:
    """A word, what it means, and the lexicographer's file that it is in."""

    word: str
    gloss: str
    field: str


def entries(folder: Path) -> Iterator[Entry]:
    """The plain words of WordNet's data files with the first half of their glosses."""
    for part in PARTS:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue  # the licence
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            word = fields[4].partition("(")[0]
            meaning = re.sub(r"\([^)]*\)", "", gloss).split(";")[0].strip()
            if WORD.fullmatch(word) and 30 <= len(meaning) <= 120 and word[:4] not in meaning:
                yield Entry(word, meaning, f"{part}.{fields[1]}")


def main() -> None:
    """Write the task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--packages", type=Path, default=PACKAGES_DIR, help="unpacked sources")
    args = parser.parse_args()
    unpack("wordnet-base", args.packages)
    found = list(entries(args.packages / "usr/share/wordnet"))
    by_field = defaultdict(list)
    for entry in found:
        by_field[entry.field].append(entry)
    generator = random.Random(0)
    items: list[dict[str, Any]] = []
    for entry in generator.sample(found, len(found)):
        others = {e.word for e in by_field[entry.field]} - {entry.word}
        if len(items) == args.items or len(others) < 3:
            continue
        words = [entry.word, *generator.sample(sorted(others), 3)]
        generator.shuffle(words)
        items.append(
            {
                "question": f"Definition: {entry.gloss}. The word that is defined here is",
                "choices": [f" {word}" for word in words],
                "answer": words.index(entry.word),
            }
        )
    args.output.write_text("".join(json.dumps(item) + "\n" for item in items))
    print(f"{args.output}: {len(items)} items")


if __name__ == "__main__":
    main()
