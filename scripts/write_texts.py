"""Write texts to measure quality on, none of which calibration reads.

The held-out pages of the Debian Administrator's Handbook in English, the same in German, of which
the default calibration text has a paragraph, and in Norwegian, of which it has nothing; and the
held-out chapters of the King James Bible. All are fetched as ``models/corpus.py`` fetches them::

    python scripts/write_texts.py build/texts
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from corpus import PACKAGES_DIR, SOURCES, load_split, read_handbook


def main() -> None:
    """Write the files and say how long they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, default=PACKAGES_DIR, help="unpacked sources")
    args = parser.parse_args()
    sources = {source.name: source for source in SOURCES}
    texts = {
        f"{name}-en": load_split(sources[name], args.packages).held_out
        for name in ("handbook", "bible")
    }
    for language in ("de-DE", "nb-NO"):
        pages = read_handbook(args.packages, language)
        texts[f"handbook-{language[:2]}"] = [
            text for name, text in pages if sources["handbook"].held_out.match(name)
        ]
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, parts in texts.items():
        path = args.folder / f"{name}.txt"
        path.write_text("\n\n".join(parts), encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
