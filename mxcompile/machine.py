"""What Linux says of a machine's CPUs: this one's, or those of one that can be asked for its files.

What tuning records hold for, which target's kernels a CPU can run, and how many threads suit it
all follow from a few files, wherever they were read.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

Read = Callable[[str], str]
"""Gives the text of a file by its path, "" where there is none."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as a process on it sees it.

    Attributes:
        cpuinfo: The text of /proc/cpuinfo.
        cpus: The numbers of the CPUs that the process may use.
        cores: The physical cores among them.
    """

    cpuinfo: str
    cpus: tuple[int, ...]
    cores: int

    @classmethod
    def described(cls, read: Read) -> Self:
        """Look at the files of a machine."""
        cpus = tuple(_ranges(_fields(read("/proc/self/status")).get("Cpus_allowed_list", "0")))
        place = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        siblings = {read(place.format(cpu)) or str(cpu) for cpu in cpus}
        return cls(read("/proc/cpuinfo"), cpus, len(siblings))

    @property
    def features(self) -> frozenset[str]:
        """The features of the first CPU as Linux names them; empty where it does not tell."""
        about = _fields(self.cpuinfo)
        return frozenset(about.get("flags", about.get("Features", "")).split())

    @property
    def hardware(self) -> str:
        """The CPU, its features, and how many there are: what tuning records hold for."""
        about = _fields(self.cpuinfo)
        model = about.get("model name", about.get("CPU part", "unknown CPU"))
        revision = "-".join(about.get(key, "") for key in ("cpu family", "model", "stepping"))
        features = " ".join(sorted(self.features))
        digest = hashlib.sha256(f"{revision} {features}".encode()).hexdigest()[:12]
        return f"{model} x{len(self.cpus)} {digest}"


def here() -> Machine:
    """This machine."""
    return Machine.described(_read)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _fields(text: str) -> dict[str, str]:
    """Lines of ``name : value``; of names that come again, the first."""
    lines = (line.partition(":") for line in reversed(text.splitlines()))
    return {name.strip(): value.strip() for name, _, value in lines}


def _ranges(text: str) -> Iterator[int]:
    """The numbers of a list such as 0-2,5."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
