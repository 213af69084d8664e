"""Linking a program for a machine that may not be this one.

Compiled code needs no headers and next to no libraries, so any compiler driver that knows the
machine will do: this machine's own, a cross-compiler of the system, or Zig's from the package
index, which carries all it needs.
"""

import importlib.resources
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

from mxcompile.errors import UsageError

GLIBC: Final = "2.28"
"""What a device must have at least, where Zig links; TVM's wheels ask for the same."""

HEADERS: Final = "tvm_ffi/include"
"""In the packages of apache-tvm-ffi."""

_SOURCE: Final = Path(str(importlib.resources.files("mxcompile.targets"))) / "threads.c"
_THREADS: Final = ("-O2", "-fPIC", "-fvisibility=hidden")

_WORK: Final = {"cc": "links", "c++": "compiles C++"}


def find(triple: str, language: Literal["cc", "c++"] = "cc") -> list[str]:
    """The command that links for a machine such as ``aarch64-linux-gnu``, or compiles C++ for it.

    Raises:
        UsageError: there is none here; the text says what to install.
    """
    own = triple.split("-")[0] == platform.machine()
    names = ["c++", "g++", "clang++"] if own else [f"{triple}-g++"]
    if language == "cc":
        names += ["cc", "gcc", "clang"] if own else [f"{triple}-gcc"]
    if found := next(filter(None, map(shutil.which, names)), None):
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", language, "-target", f"{triple}.{GLIBC}"]
    package = "g++" if own else f"g++-{triple.replace('_', '-')}"
    raise UsageError(
        f"nothing here {_WORK[language]} for {triple}: pip install ziglang, or install {package}"
    )


def headers() -> str:
    """The folder of the headers that are installed."""
    return str(metadata.distribution("apache-tvm-ffi").locate_file(HEADERS))


def link(triple: str, output: str, objects: Sequence[str]) -> None:
    """Link object files, and the threads that run their parallel loops, to a shared library.

    Raises:
        UsageError: nothing here can, or it fails.
    """
    threads = [*_THREADS, "-isystem", headers(), "-x", "c", str(_SOURCE), "-x", "none"]
    command = [*find(triple), "-shared", *threads, "-o", output, *objects, "-lm", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UsageError(f"{command[0]} does not link for {triple}: {reason}")
