"""The search, with a machine that is made up, and one trial on this machine."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from mxcompile import target, tune
from mxcompile.records import Case, Record, Records
from mxcompile.target import Target
from mxcompile.targets.cpu_matmul import Knobs

CASE = Case("int4", 64, 64, 1, 1)
FREE = tune.Limits()


@dataclass
class Machine:
    """Is fastest at a prefetch of 1024."""

    hardware: str = "made up"
    asked: list[tuple[Case, Knobs]] = field(default_factory=list)

    def microseconds(self, case: Case, knobs: Knobs) -> float:
        self.asked.append((case, knobs))
        return 100.0 + abs(knobs.prefetch - 1024) / 100


def run(
    machine: Machine, records: Records, limits: tune.Limits = FREE
) -> tuple[list[tune.Outcome], list[Record]]:
    kept: list[Record] = []
    return list(tune.tune([CASE], machine, records, limits, kept.append)), kept


def nothing() -> Records:
    return Records([], "made up", "kernel")


def test_the_search_finds_the_best_and_keeps_each_trial() -> None:
    machine = Machine()
    (outcome,), kept = run(machine, nothing())
    assert outcome.knobs == Knobs(prefetch=1024)
    assert outcome.best_us < outcome.default_us
    assert len(kept) == len(machine.asked) == outcome.trials
    assert len(set(machine.asked)) == len(machine.asked)  # nothing is measured twice


def test_records_are_reused_with_no_trial() -> None:
    _, kept = run(Machine(), nothing())
    machine = Machine()
    (outcome,), more = run(machine, Records(kept, "made up", "kernel"))
    assert (machine.asked, more, outcome.trials) == ([], [], 0)
    assert outcome.knobs == Knobs(prefetch=1024)


def test_records_of_another_machine_are_not_used() -> None:
    _, kept = run(Machine(), nothing())
    (outcome,), _ = run(Machine(), Records(kept, "another", "kernel"))
    assert outcome.trials > 0


def test_limits_end_the_search() -> None:
    (outcome,), _ = run(Machine(), nothing(), tune.Limits(trials=3))
    assert outcome.trials == 3
    assert run(Machine(), nothing(), tune.Limits(seconds=-1.0)) == ([], [])


def test_an_interruption_loses_no_record() -> None:
    class Interrupted(Machine):
        def microseconds(self, case: Case, knobs: Knobs) -> float:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().microseconds(case, knobs)

    kept: list[Record] = []
    with pytest.raises(KeyboardInterrupt):
        list(tune.tune([CASE], Interrupted(), nothing(), tune.Limits(), kept.append))
    assert len(kept) == 2


def test_what_takes_longest_comes_first() -> None:
    shapes = Counter({("int4", 64, 64): 1, ("int4", 64, 32): 5, ("int8", 64, 64): 1})
    order = [(c.batch, c.format, c.columns) for c in tune.cases(shapes, 2)]
    assert order[:3] == [(1, "int4", 32), (1, "int8", 64), (1, "int4", 64)]
    assert [batch for batch, *_ in order] == [1] * 3 + [128] * 3


@pytest.fixture
def here() -> Target:
    found = [t for t in target.shipped() if t.runs_here and t.kernels == "cpu"]
    if not found:
        pytest.skip("no target's kernels run on this CPU")
    return found[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_trial_runs_on_this_machine(
    here: Target, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "STREAM_BYTES", 1 << 12)
    measurer = tune.SessionMeasurer.local(here)
    assert measurer.microseconds(Case("int3", 40, 70, batch, 1), Knobs()) > 0
    assert measurer.microseconds(Case("int3", 40, 70, batch, 1), Knobs(prefetch=0)) > 0
