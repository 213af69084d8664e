"""Linking for this machine, for another, and with what there is to do it."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxcompile import linker, target
from mxcompile.errors import UsageError
from tests import arm

AARCH64 = 183  # in the header of an ELF file

OBJECT = "int answer(void) { return 42; }"


def arm_object(folder: Path) -> str:
    source, path = folder / "a.c", folder / "a.o"
    source.write_text(OBJECT)
    subprocess.run([arm.COMPILER, "-fPIC", "-c", str(source), "-o", str(path)], check=True)
    return str(path)


def test_this_machine_links_for_itself() -> None:
    (own,) = {t.triple for t in target.shipped() if t.triple.startswith(platform.machine())}
    assert len(linker.find(own)) == 1


def test_without_a_linker_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    message = (
        "links for aarch64-linux-gnu: pip install ziglang, or install g\\+\\+-aarch64-linux-gnu"
    )
    with pytest.raises(UsageError, match=message):
        linker.find("aarch64-linux-gnu")


@pytest.mark.parametrize("tool", ["g++", "ziglang"])
def test_links_for_arm(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm.require()
    object_file = arm_object(tmp_path)
    if tool == "ziglang":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("ziglang is not installed")
        monkeypatch.setattr(shutil, "which", lambda _name: None)
        assert linker.find(arm.TRIPLE)[:3] == [sys.executable, "-m", "ziglang"]
    output = tmp_path / "a.so"
    linker.link(arm.TRIPLE, str(output), [object_file])
    header = output.read_bytes()[:20]
    assert (header[:4], header[18]) == (b"\x7fELF", AARCH64)


def test_what_does_not_link_is_told_in_a_line(tmp_path: Path) -> None:
    arm.require()
    path = tmp_path / "a.o"
    path.write_text("not an object file")
    with pytest.raises(UsageError, match="does not link for aarch64-linux-gnu: "):
        linker.link(arm.TRIPLE, str(tmp_path / "a.so"), [str(path)])
