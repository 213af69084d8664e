"""Targets: what a machine can do, read from ``targets/*.toml``.

A target is data: it can be described, listed and compiled for on a machine that lacks it.
"""

import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from mxcompile import gpu
from mxcompile.errors import UsageError


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine.

    ``family`` groups targets that an alias such as ``x86`` chooses from, away from such machines
    the ``default``; ``requires`` are the CPU features that it uses, in the kernel's spelling, or
    architectures of GPUs; ``instructions`` selects the kernel templates'
    inner loops; ``tvm`` is what ``tvm.target.Target`` takes; ``kernels`` names the family of kernel
    templates.
    """

    name: str
    description: str
    family: str
    requires: frozenset[str]
    instructions: str
    tvm: Mapping[str, Any]
    default: bool = False
    kernels: str = "cpu"

    @classmethod
    def parse(cls, name: str, text: str) -> Self:
        """Read a target's TOML text.

        Raises:
            UsageError: a key is missing or the text is not TOML.
        """
        try:
            data = tomllib.loads(text)
            return cls(
                name,
                data["description"],
                data["family"],
                frozenset(data["requires"]),
                data["kernels"]["instructions"],
                MappingProxyType(data["tvm"]),
                data.get("default", False),
                data["kernels"].get("family", "cpu"),
            )
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
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


@cache
def shipped() -> tuple[Target, ...]:
    """All shipped targets, the most capable of a family first."""
    folder = files("mxcompile.targets")
    found = [
        Target.parse(entry.name.removesuffix(".toml"), entry.read_text())
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    ]
    return tuple(sorted(found, key=lambda t: (t.family, -len(t.requires), t.name)))


def host_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The CPU features of this machine as Linux names them; empty where it does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())


def host_family() -> str:
    """The target family of this machine."""
    return _family(platform.machine())


def _family(machine: str) -> str:
    return {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm"}.get(machine, "")


def features() -> frozenset[str]:
    """What programs for this machine may require: of its CPU and of its GPU."""
    return host_features() | gpu.features()


def find(text: str) -> Target:
    """The target named ``text``, or for a family the best one that this machine can run.

    On a machine of another family a family's name means its default.

    Raises:
        UsageError: there is no such target.
    """
    targets = shipped()
    if named := [t for t in targets if t.name == text]:
        return named[0]
    family = [t for t in targets if t.family == text]
    if not family:
        known = sorted({t.family for t in targets} | {t.name for t in targets})
        raise UsageError(f"no target {text}; targets: {', '.join(known)}")
    if runnable := [t for t in family if t.runs_here]:
        return runnable[0]
    if text != host_family():
        return next(t for t in family if t.default)
    raise UsageError(
        f"this CPU lacks what the {text} targets need ({', '.join(sorted(family[-1].requires))}); "
        f"name the target to compile for another machine: {', '.join(t.name for t in family)}"
    )
