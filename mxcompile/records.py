"""Tuning records: how long a kernel took with some knobs, on some machine, for some shape.

A log is JSON lines, one record each, appended as they are measured: a log that was cut off in the
middle of a line loses that line only, and logs are merged by concatenation. A record says what it
holds for: the machine, the kernels' source, format, shape and threads. Records of other machines
and of other kernels are kept but not used.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Self

from mxcompile import machine
from mxcompile.errors import UsageError
from mxcompile.files import whole
from mxcompile.formats import FORMATS, Format

FILE: Final = "records.jsonl"

KERNEL_SOURCES: Final = ("cpu_matmul.py", "cpu_norm.py", "packing.py", "threads.c")
"""What a measured time depends on; comments too, as telling them apart is worth no mistake."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is tuned: the product of ``batch`` activation rows with a weight ``[rows, columns]``."""

    format: str
    rows: int
    columns: int
    batch: int
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.format} {self.rows}x{self.columns}, {self.batch} "
            f"row{'s'[: self.batch > 1]}, {self.threads} thread{'s'[: self.threads > 1]}"
        )


@dataclass(frozen=True, slots=True)
class Record:
    """A measurement.

    Attributes:
        hardware: The machine; see ``machine.Machine``.
        kernel: The version of the kernels; see ``kernel_version``.
        case: What was measured.
        knobs: What of the knobs is not the default, by name.
        us: Microseconds of one call, weights streamed from memory.
    """

    hardware: str
    kernel: str
    case: Case
    knobs: tuple[tuple[str, int], ...]
    us: float

    def to_line(self) -> str:
        """The record as a line of JSON."""
        data = {"hardware": self.hardware, "kernel": self.kernel, **asdict(self.case)}
        return json.dumps({**data, "knobs": dict(self.knobs), "us": self.us}) + "\n"

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read a line.

        Raises:
            ValueError: it is not a record.
        """
        try:
            data: Any = json.loads(line)
            case = Case(
                str(data["format"]),
                *(int(data[name]) for name in ("rows", "columns", "batch", "threads")),
            )
            knobs = tuple(sorted((str(k), int(v)) for k, v in data["knobs"].items()))
            us = float(data["us"])
            if not us > 0:
                raise ValueError("a time is above 0")
            return cls(str(data["hardware"]), str(data["kernel"]), case, knobs, us)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tuning record: {error!r}") from error


def kernel_version() -> str:
    """A hash of the kernels' source: what was measured of others says nothing of these."""
    folder = files("mxcompile.targets")
    text = "".join(folder.joinpath(name).read_text() for name in KERNEL_SOURCES)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def representative(fmt: Format) -> str:
    """The first format that is laid out like ``fmt``: to kernels they are one, and to records."""
    return next(name for name, other in FORMATS.items() if other.layout == fmt.layout)


class Records:
    """The best times known, of one machine and one version of the kernels."""

    def __init__(self, records: Iterable[Record], hardware: str, kernel: str) -> None:
        self.hardware, self.kernel = hardware, kernel
        self._us: dict[Case, dict[tuple[tuple[str, int], ...], float]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> bool:
        """Take a record in; tells whether it is for this machine and these kernels."""
        if (record.hardware, record.kernel) != (self.hardware, self.kernel):
            return False
        times = self._us.setdefault(record.case, {})
        times[record.knobs] = min(record.us, times.get(record.knobs, record.us))
        return True

    def __len__(self) -> int:
        return sum(map(len, self._us.values()))

    def times(self, case: Case) -> Mapping[tuple[tuple[str, int], ...], float]:
        """Microseconds by knobs; empty when nothing is known."""
        return self._us.get(case, {})

    def best(self, case: Case) -> float | None:
        """The fewest microseconds, with any knobs."""
        return min(self.times(case).values(), default=None)

    def cases(self) -> Iterator[Case]:
        """What something is known of."""
        return iter(self._us)


def user_folder() -> Path:
    """Where records are kept if nothing else is said, as the XDG base directories have it."""
    return Path.home() / ".local" / "share" / "mxcompile"


def read(path: Path) -> list[Record]:
    """The records of a file; lines that are none, such as one cut short, are skipped."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(Record.parse(line))
        except ValueError:
            continue
    return found


def load(folder: Path, hardware: str | None = None) -> Records:
    """What is known of a machine, None for this one: of the records kept in ``folder``."""
    hardware = machine.here().hardware if hardware is None else hardware
    return Records(read(folder / FILE), hardware, kernel_version())


def append(folder: Path, records: Iterable[Record]) -> None:
    """Add records to those kept in ``folder``, each with one write of a whole line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("ab", buffering=0) as file:
        if cut:  # by an end in the middle of a write: what follows is a line of its own
            file.write(b"\n")
        for record in records:
            file.write(record.to_line().encode())


def merge(source: Path, folder: Path) -> int:
    """Take in the records of a file that are not there yet; gives how many.

    Raises:
        UsageError: the file is not there, or has no record.
    """
    if not source.is_file():
        raise UsageError(f"{source} is not a file of tuning records")
    found = read(source)
    if not found:
        raise UsageError(f"{source} has no tuning record")
    known = set(read(folder / FILE))
    new = [record for record in dict.fromkeys(found) if record not in known]
    append(folder, new)
    return len(new)


def export(folder: Path, path: Path) -> int:
    """Write what is kept in ``folder``, each record once, whole or not at all; gives how many."""
    found = list(dict.fromkeys(read(folder / FILE)))
    with whole(path) as draft:
        draft.write_text("".join(record.to_line() for record in found))
    return len(found)
