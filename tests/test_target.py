"""Targets as data, and which one a name means."""

from pathlib import Path
from typing import get_args

import pytest
import tvm

from mxcompile import gpu, target
from mxcompile.errors import UsageError
from mxcompile.latency import Latency
from mxcompile.targets.cpu_matmul import Instructions


@pytest.mark.parametrize("where", target.shipped(), ids=lambda t: t.name)
def test_shipped_targets_are_what_tvm_takes(where: target.Target) -> None:
    on_gpu = where.kernels == "cuda"
    assert tvm.target.Target(dict(where.tvm)).kind.name == ("cuda" if on_gpu else "llvm")
    assert where.instructions in (("mma",) if on_gpu else get_args(Instructions))
    assert where.vector_bits in (128, 256, 512)
    assert where.description
    assert min(where.speed.bytes_per_second, where.speed.macs_per_second) > 1e9
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
        UsageError, match=r"no target vax; targets: .*x86, x86-avx2, x86-avx512vnni"
    ):
        target.find("vax")


@pytest.mark.parametrize("text", ["", "description = 3", "not toml"])
def test_malformed_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="target mine"):
        target.Target.parse("mine", text)


def test_away_from_arm_its_name_means_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "host_family", lambda: "x86")
    assert target.find("arm").name == "arm-dotprod"
    assert not target.find("arm").runs_here
    monkeypatch.setattr(target, "host_family", lambda: "arm")
    monkeypatch.setattr(target, "host_features", lambda: target.find("graviton3").requires)
    assert target.find("arm").name == "arm-i8mm"  # a board is meant only where it is named


def test_every_family_has_one_default() -> None:
    defaults = [t.family for t in target.shipped() if t.default]
    assert sorted(defaults) == sorted({t.family for t in target.shipped()})


BOARD = """
parent = "arm-dotprod"
description = "a board"
[speed]
read_gb_s = 8
[tvm]
mcpu = "cortex-a55"
"""


def test_a_board_is_a_file_that_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(BOARD)
    board, parent = target.find(str(path)), target.find("arm-dotprod")
    assert (board.name, board.parent, board.default) == ("my-board", "arm-dotprod", False)
    assert (board.requires, board.instructions) == (parent.requires, parent.instructions)
    assert dict(board.tvm) == {**parent.tvm, "mcpu": "cortex-a55"}
    assert board.speed.bytes_per_second == 8e9
    assert board.speed.macs_per_second == parent.speed.macs_per_second


def test_a_board_without_its_parent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "orphan.toml"
    path.write_text(BOARD.replace("arm-dotprod", "vax"))
    with pytest.raises(UsageError, match=r"target orphan: no parent vax; .*arm-dotprod"):
        target.find(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        target.find(str(tmp_path / "none.toml"))


def test_a_rate_follows_from_the_description() -> None:
    """A step takes as long as reading or multiplying, whichever is longer, and the rest."""
    where = target.find("raspberry-pi-4")
    speed = where.speed
    light = Latency.described(where, 10**6, {})
    spent = round(1e18 / speed.bytes_per_second)  # nanoseconds, for 10**9 bytes
    rate = 1 / (1e9 / speed.bytes_per_second + speed.step_seconds)
    assert light.rate(spent) == pytest.approx(rate)
    assert light.rate(0, 10**9) == pytest.approx(rate)
    assert light.limit(rate) == pytest.approx(spent)
    heavy = Latency.described(where, 10**12, {})
    slowest = 1 / (1e12 / speed.macs_per_second + speed.step_seconds)
    assert heavy.rate(1) == pytest.approx(slowest)
    assert heavy.limit(1.01 * slowest) == 0
    assert heavy.limit(0.99 * slowest) > 0
