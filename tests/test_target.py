"""Targets as data, and which one a name means."""

from pathlib import Path

import pytest
import tvm

from mxcompile import gpu, target
from mxcompile.errors import UsageError


@pytest.mark.parametrize("where", target.shipped(), ids=lambda t: t.name)
def test_shipped_targets_are_what_tvm_takes(where: target.Target) -> None:
    assert tvm.target.Target(dict(where.tvm)).kind.name == (
        "cuda" if where.kernels == "cuda" else "llvm"
    )
    assert where.instructions in ("avx512vnni", "avx2", "generic", "mma")
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


def test_cuda_means_the_best_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(n, "x86", f"cuda-sm{n}") for n in (80, 86, 89, 90)] + [(87, "arm", "cuda-sm87")]
    for capability, host, name in cases:
        monkeypatch.setattr(target, "host_family", lambda family=host: family)
        monkeypatch.setattr(gpu, "capability", lambda n=capability: n)
        assert target.find("cuda").name == name
        assert target.find("cuda").runs_here
    for capability in (0, 75):  # none, and a Turing, which no target is for
        monkeypatch.setattr(gpu, "capability", lambda n=capability: n)
        assert target.find("cuda").name == "cuda-sm80"
        assert not target.find("cuda").runs_here


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(
        UsageError, match=r"no target vax; targets: cuda, cuda-sm80, .*, x86, x86-avx2, x86-av"
    ):
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
