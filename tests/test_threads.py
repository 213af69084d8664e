"""The threads of programs, under load, in forked processes, and where a thread loses its core."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mxcompile import linker

SOURCE = Path(__file__).parent / "stress_threads.c"


def compiled(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = folder / "threads"
    words = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-isystem", linker.headers()]
    command = [compiler, *words, *flags, str(SOURCE), "-o", str(program), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and flags:
        pytest.skip(f"the compiler cannot: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("threads"))


@pytest.mark.parametrize("test", ["stress", "child", "failure", "late"])
def test_loops(program: Path, test: str) -> None:
    done = subprocess.run([program, test], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_races(tmp_path: Path) -> None:
    program = compiled(tmp_path, "-fsanitize=thread")
    # The sanitizer's memory does not fit beside randomized addresses on every kernel.
    command = ["setarch", "-R", str(program), "stress"]
    if shutil.which("setarch") is None:
        command = command[2:]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer does not run on this kernel")
    assert (done.returncode, done.stderr) == (0, "")
