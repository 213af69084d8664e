"""What tuning records say: the knobs that a compile gives to the matmul kernels, without a trial.

All shapes share one function that has, for each format, the knobs that are best over all shapes. A
shape gets a function of its own only where its records say that this saves ``WORTH`` of its time:
code grows with each, and what is smaller is mostly noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mxcompile.formats import FORMATS
from mxcompile.records import Case, Records
from mxcompile.targets.cpu_matmul import Knobs, MatmulKernel
from mxcompile.targets.kernels import MatmulTemplates

Setting = tuple[tuple[str, int], ...]
"""Knobs as records have them: what is not the default, by name."""

DECODE: Final[Mapping[str, tuple[int, ...]]] = {
    "prefetch": (0, 1024, 2048, 4096, 8192, 16384),
}
PREFILL: Final[Mapping[str, tuple[int, ...]]] = {"row_block": (4, 6, 8, 10, 12)}
"""The values that are tried, for one activation row and for many."""

GAIN: Final = 0.01
"""A knob that saves less of the time than that is left as it was: noise is as large."""

WORTH: Final = 0.03
"""A shape has functions of its own where that saves more of its time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The knobs that records are for: of a format, and of shapes that deserve their own."""

    by_format: Mapping[str, Knobs] = field(default_factory=dict)
    by_shape: Mapping[tuple[str, int, int], Knobs] = field(default_factory=dict)

    def tuned(self, kernels: MatmulTemplates, rows: int, columns: int) -> MatmulTemplates:
        """Kernels with the knobs for a weight's shape; a family without such knobs as it is."""
        if not isinstance(kernels, MatmulKernel):
            return kernels
        return replace(kernels, knobs=self.knobs(rows, columns))

    def knobs(self, rows: int, columns: int) -> tuple[tuple[str, Knobs], ...]:
        """What a ``MatmulKernel`` for a weight of a shape takes."""
        found = {
            name: self.by_shape.get((name, rows, columns), self.by_format.get(name, Knobs()))
            for name in FORMATS
        }
        return tuple((name, knobs) for name, knobs in found.items() if knobs != Knobs())


def choose(records: Records, threads: int) -> Choice:
    """The knobs for a program that runs on ``threads``, without a trial."""
    cases: dict[tuple[str, int], list[Case]] = {}
    for case in records.cases():
        if case.threads == threads and () in records.times(case):
            cases.setdefault((case.format, min(case.batch, 2)), []).append(case)
    by_format: dict[str, Setting] = {}
    by_shape: dict[tuple[str, int, int], Setting] = {}
    for (name, batch), group in cases.items():
        shared = _best_of_all([records.times(case) for case in group])
        by_format[name] = _overlay(by_format.get(name, ()), shared, space_of(batch))
    for (name, _), group in cases.items():
        for case in group:
            times = records.times(case)
            own = min(times, key=times.__getitem__)
            space = space_of(case.batch)
            usual = tuple(knob for knob in by_format[name] if knob[0] in space)
            if times[own] < times[usual] * (1 - WORTH):
                key = (name, case.rows, case.columns)
                by_shape[key] = _overlay(by_shape.get(key, by_format[name]), own, space)
    return Choice(
        {name: replace(Knobs(), **dict(s)) for name, s in by_format.items()},
        {key: replace(Knobs(), **dict(s)) for key, s in by_shape.items()},
    )


def _best_of_all(cases: Sequence[Mapping[Setting, float]]) -> Setting:
    """The setting that was tried in all cases and saves most of their times on average."""
    common = set.intersection(*(set(times) for times in cases))

    def mean(setting: Setting) -> float:
        return sum(times[setting] / times[()] for times in cases) / len(cases)

    best = min(sorted(common), key=mean)
    return best if mean(best) < 1 - GAIN else ()


def space_of(batch: int) -> Mapping[str, tuple[int, ...]]:
    """The knobs that matter to so many activation rows, with the values to try."""
    return DECODE if batch == 1 else PREFILL


def _overlay(old: Setting, new: Setting, space: Mapping[str, tuple[int, ...]]) -> Setting:
    """A setting with its knobs of one space as ``new`` has them."""
    return tuple(sorted([*(knob for knob in old if knob[0] not in space), *new]))
