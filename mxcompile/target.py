"""Targets: what a machine can do, read from ``targets/*.toml``.

A target is data: it can be described, listed and compiled for on a machine that lacks it. A board
is a target that says what differs from its parent: the CPU's name, and how fast it is.
"""

import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from mxcompile import gpu, machine
from mxcompile.errors import UsageError
from mxcompile.machine import Machine

NO_PARENTS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Speed:
    """What a machine does at the most, all its cores together; from its data sheet.

    ``step_seconds`` is what a decode step takes besides its matrix products: waking threads and
    the many small operators.
    """

    bytes_per_second: float
    macs_per_second: float
    step_seconds: float

    @classmethod
    def parse(cls, data: Mapping[str, float]) -> Self:
        """Read the table ``[speed]``."""
        return cls(1e9 * data["read_gb_s"], 1e9 * data["int8_gmac_s"], 1e-6 * data["step_us"])


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine, or with a ``parent`` one board of that kind.

    ``family`` groups targets that an alias such as ``x86`` chooses from, away from such machines
    the ``default``; ``requires`` are the CPU features that it uses, in the kernel's spelling, or
    architectures of GPUs; ``instructions`` selects the kernel templates' inner loops and
    ``vector_bits`` the width of other kernels' vectors; ``tvm`` is what ``tvm.target.Target``
    takes; ``kernels`` names the family of kernel templates.
    """

    name: str
    description: str
    family: str
    requires: frozenset[str]
    instructions: str
    vector_bits: int
    speed: Speed
    tvm: Mapping[str, Any]
    default: bool = False
    parent: str = ""
    kernels: str = "cpu"

    @classmethod
    def parse(cls, name: str, text: str, parents: Mapping[str, str] = NO_PARENTS) -> Self:
        """Read a target's TOML text.

        What a board does not say is as its ``parent`` has it, in tables key by key; ``parents`` has
        the texts of those there are.

        Raises:
            UsageError: a key is missing or the text is not TOML.
        """
        try:
            data = own = tomllib.loads(text)
            if parent := own.get("parent", ""):
                if parent not in parents:
                    raise UsageError(f"target {name}: no parent {parent}; {', '.join(parents)}")
                data = _over(tomllib.loads(parents[parent]), own)
            return cls(
                name,
                data["description"],
                data["family"],
                frozenset(data["requires"]),
                data["kernels"]["instructions"],
                data["kernels"]["vector_bits"],
                Speed.parse(data["speed"]),
                MappingProxyType(data["tvm"]),
                own.get("default", False),
                parent,
                data["kernels"].get("family", "cpu"),
            )
        except KeyError as error:
            raise UsageError(f"target {name}: it does not say {error}") from error
        except (tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
            raise UsageError(f"target {name}: {error}") from error

    @property
    def triple(self) -> str:
        """The machine, or a GPU's host, in the spelling of linkers."""
        return str(self.tvm.get("host", self.tvm)["mtriple"])

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run what is compiled for it."""
        here = _family(self.triple.partition("-")[0]) == host_family()
        return here and self.requires <= features()


def _over(parent: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a board on top of its parent's."""
    tables = {
        key: {**value, **own.get(key, {})}
        for key, value in parent.items()
        if isinstance(value, dict)
    }
    return {**parent, **own, **tables}


def _shipped_texts() -> dict[str, str]:
    return {
        entry.name.removesuffix(".toml"): entry.read_text()
        for entry in files("mxcompile.targets").iterdir()
        if entry.name.endswith(".toml")
    }


@cache
def shipped() -> tuple[Target, ...]:
    """All shipped targets by family, the most capable first, boards after their kinds."""
    texts = _shipped_texts()
    found = [Target.parse(name, text, texts) for name, text in texts.items()]
    return tuple(sorted(found, key=lambda t: (t.family, bool(t.parent), -len(t.requires), t.name)))


def host_features() -> frozenset[str]:
    """The CPU features of this machine as Linux names them; empty where it does not tell."""
    return machine.here().features


def host_family() -> str:
    """The target family of this machine."""
    return _family(platform.machine())


def _family(kind: str) -> str:
    return {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm"}.get(kind, "")


def features() -> frozenset[str]:
    """What programs for this machine may require: of its CPU and of its GPU."""
    return host_features() | gpu.features()


def find(text: str, device: Machine | None = None) -> Target:
    """The target named ``text``, or for a family the best one that a machine can run.

    On a machine of another family a family's name means its default. A text that ends in .toml is
    a file that describes a target, or a board that has a shipped one for its parent.

    Args:
        text: a name.
        device: the machine; None for this one.

    Raises:
        UsageError: there is no such target.
    """
    if text.endswith(".toml"):
        return _read(Path(text))
    targets = shipped()
    if named := [t for t in targets if t.name == text]:
        return named[0]
    family = [t for t in targets if t.family == text and not t.parent]
    if not family:
        known = sorted({t.family for t in targets} | {t.name for t in targets})
        raise UsageError(f"no target {text}; targets: {', '.join(known)}, or a file NAME.toml")
    runs = [t.runs_here if device is None else t.requires <= device.features for t in family]
    if any(runs):
        return family[runs.index(True)]
    if text != host_family():
        return next(t for t in family if t.default)
    raise UsageError(
        f"this CPU lacks what the {text} targets need ({', '.join(sorted(family[-1].requires))}); "
        f"name the target to compile for another machine: {', '.join(t.name for t in family)}"
    )


def _read(path: Path) -> Target:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return Target.parse(path.stem, text, _shipped_texts())
