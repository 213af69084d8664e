"""Targets as data, and which one a name means."""

from pathlib import Path

import pytest
import tvm

from mxcompile import target
from mxcompile.errors import UsageError


@pytest.mark.parametrize("where", target.shipped(), ids=lambda t: t.name)
def test_shipped_targets_are_what_tvm_takes(where: target.Target) -> None:
    assert tvm.target.Target(dict(where.tvm)).kind.name == "llvm"
    assert where.instructions in ("avx512vnni", "avx2", "generic")
    assert where.description
    assert target.find(where.name) is where


def test_family_means_the_best_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    best, plain = target.find("x86-avx512vnni"), target.find("x86-avx2")
    monkeypatch.setattr(target, "host_family", lambda: "x86")
    monkeypatch.setattr(target, "host_features", lambda: best.requires | {"sse"})
    assert target.find("x86") is best
    monkeypatch.setattr(target, "host_features", lambda: plain.requires)
    assert target.find("x86") is plain
    monkeypatch.setattr(target, "host_features", lambda: frozenset({"sse"}))
    with pytest.raises(UsageError, match="this CPU lacks"):
        target.find("x86")
    monkeypatch.setattr(target, "host_family", lambda: "arm")
    assert target.find("x86") is plain


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"no target vax; targets: x86, x86-avx2, x86-avx512vnni"):
        target.find("vax")


@pytest.mark.parametrize("text", ["", "description = 3", "not toml"])
def test_malformed_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="target mine"):
        target.Target.parse("mine", text)


def test_features_are_read_from_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags : sse avx2 fma\n\nprocessor : 1\nflags : sse\n")
    assert target.host_features(path) == {"sse", "avx2", "fma"}
    assert target.host_features(tmp_path / "none") == frozenset()
