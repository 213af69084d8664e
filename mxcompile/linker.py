"""Linking a program for a machine that may not be this one.

Compiled code needs no headers and next to no libraries, so any compiler driver that knows the
machine will do: this machine's own, a cross-compiler of the system, or Zig's from the package
index, which carries all it needs.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

from mxcompile.errors import UsageError

_OWN = ("c++", "g++", "clang++", "cc", "gcc", "clang")


def find(triple: str) -> list[str]:
    """The command that links for a machine such as ``aarch64-linux-gnu``.

    Raises:
        UsageError: there is none here; the text says what to install.
    """
    own = triple.split("-")[0] == platform.machine()
    names = _OWN if own else tuple(f"{triple.replace('_', '-')}-{cc}" for cc in ("g++", "gcc"))
    if found := next(filter(None, map(shutil.which, names)), None):
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", triple]
    package = "g++" if own else f"g++-{triple.replace('_', '-')}"
    raise UsageError(f"nothing here links for {triple}: pip install ziglang, or install {package}")


def link(triple: str, output: str, objects: Sequence[str]) -> None:
    """Link object files to a shared library.

    Raises:
        UsageError: nothing here can, or it fails.
    """
    command = [*find(triple), "-shared", "-o", output, *objects, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UsageError(f"{command[0]} does not link for {triple}: {reason}")
