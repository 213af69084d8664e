"""Search the knobs of the matmul kernels on the machine they will run on, and what was found.

One case at a time: a format, a weight's shape, a number of activation rows. The search goes from
the defaults along one knob after another, keeps what is faster, and stops when no knob helps: the
knobs are few and hardly interact. A trial is a program of calls that stream copies of a weight from
memory, as decoding does, built by TVM and timed by TVM's evaluator through an RPC session: the
local one here, but nothing in this module would differ for one that is connected to a device.

What a compile makes of the records is in ``choose``. All shapes share one function that has the
knobs that are best for a format over all shapes; a shape gets a function of its own only where its
records say that this saves ``WORTH`` of its time.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import tvm
from tvm import relax, rpc

from mxcompile import lower, runtime
from mxcompile.formats import FORMATS
from mxcompile.plan import ROW_TILE, tile_bytes
from mxcompile.records import Case, Record, Records, hardware_id
from mxcompile.target import Target
from mxcompile.targets.cpu_matmul import Knobs, MatmulKernel, activation_bytes

Setting = tuple[tuple[str, int], ...]
"""Knobs as records have them: what is not the default, by name."""

DECODE: Final[Mapping[str, tuple[int, ...]]] = {
    "prefetch": (0, 1024, 2048, 4096, 8192, 16384),
    "chains": (1, 2, 4),
}
PREFILL: Final[Mapping[str, tuple[int, ...]]] = {"row_block": (4, 6, 8, 10, 12)}
"""The values that are tried, for one activation row and for many."""

BATCHES: Final = (1, 128)
"""The activation rows that are tuned for: a decode step, and what ``chunk`` takes of a prompt."""

STREAM_BYTES: Final = 96 << 20
"""Weights that a trial reads, if need be by copies: three times a large cache."""

REPEATS: Final = 15

GAIN: Final = 0.01
"""A knob that saves less of the time than that is left as it was: noise is as large."""

WORTH: Final = 0.03
"""A shape has functions of its own where that saves more of its time."""


class Measurer(Protocol):
    """Where kernels run: this machine, or a device."""

    @property
    def hardware(self) -> str:
        """What its records hold for."""

    def microseconds(self, case: Case, knobs: Knobs) -> float:
        """The time of one call, its weight streamed from memory."""


@dataclass
class SessionMeasurer:
    """Measures through a session of TVM's RPC.

    Attributes:
        hardware: What the machine at the other end is called in records.
        target: What kernels are built for.
        session: ``tvm.rpc.LocalSession()``, or a session that ``tvm.rpc.connect`` gave.
        set_threads: Has kernels run on so many threads there.
    """

    hardware: str
    target: Target
    session: Any
    set_threads: Callable[[int], None]
    _arguments: tuple[Case, list[Any]] | None = field(default=None, init=False)
    _trials: int = field(default=0, init=False)

    @classmethod
    def local(cls, target: Target) -> "SessionMeasurer":
        """Measures on this machine, in this process."""
        logging.getLogger("RPCServer").setLevel(logging.WARNING)  # it tells of every library
        return cls(hardware_id(), target, rpc.LocalSession(), runtime.set_threads)

    def microseconds(self, case: Case, knobs: Knobs) -> float:
        """The least of some calls: whatever else a machine does only adds to it."""
        device = self.session.cpu()
        self._trials += 1  # a library that is loaded must not be written over
        with tempfile.TemporaryDirectory(prefix="mxcompile-") as folder:
            library = Path(folder) / f"trial{self._trials}.so"
            program = lower.compile_module(_program(case, knobs, self.target), self.target)
            program.export_library(str(library))
            self.session.upload(str(library))
        machine = relax.VirtualMachine(self.session.load_module(library.name), device)
        self.session.remove(library.name)
        if self._arguments is None or self._arguments[0] != case:
            self._arguments = (case, [tvm.runtime.tensor(a, device) for a in _inputs(case)])
        self.set_threads(case.threads)
        evaluator = machine.time_evaluator("main", device, number=1, repeat=REPEATS)
        return 1e6 * min(evaluator(*self._arguments[1]).results) / _copies(case)


def _copies(case: Case) -> int:
    return max(1, -(-STREAM_BYTES // _weight_bytes(case)))


def _tiles(case: Case) -> int:
    return -(-case.rows // ROW_TILE)


def _weight_bytes(case: Case) -> int:
    return _tiles(case) * tile_bytes(case.columns, FORMATS[case.format])


def _program(case: Case, knobs: Knobs, target: Target) -> Any:
    """A Relax module that multiplies with every copy of a weight in turn."""
    kernel = MatmulKernel(
        target.instructions,  # type: ignore[arg-type]
        formats=(case.format,),
        knobs=((case.format, knobs),),
    )
    bb = relax.BlockBuilder()
    tensors = [relax.TensorType(a.shape, str(a.dtype)) for a in _inputs(case)]
    codes, table, *weights = (relax.Var(f"x{i}", t) for i, t in enumerate(tensors))
    product = bb.add_func(lower.rooted(kernel.matmul_int8()), "matmul_int8")
    out = relax.TensorType((case.batch, case.rows), "float32")
    with bb.function("main", [codes, table, *weights]):
        with bb.dataflow():
            results = [
                bb.emit(relax.call_tir(product, [codes, weight, table], out)) for weight in weights
            ]
            found = bb.emit_output(relax.Tuple(results))
        bb.emit_func_output(found)
    return bb.finalize()


def _inputs(case: Case) -> Iterator[np.ndarray]:
    """Codes, table and copies of a weight; what numbers they hold changes no time."""
    fmt, size = FORMATS[case.format], _weight_bytes(case)
    yield np.ones((case.batch, activation_bytes(case.columns)), np.int8)
    starts = np.arange(_tiles(case)) * (size // _tiles(case) // 64)
    yield np.stack([np.full(_tiles(case), fmt.bits), starts], axis=1).astype(np.int32)
    for _ in range(_copies(case)):
        yield np.ones(size, np.uint8)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a search ends: trials of a case, and seconds of all; None for no end but its own."""

    trials: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to: microseconds before and after, the knobs, and trials that were run."""

    case: Case
    default_us: float
    best_us: float
    knobs: Knobs
    trials: int


def tune(
    cases: Sequence[Case],
    measurer: Measurer,
    records: Records,
    limits: Limits,
    keep: Callable[[Record], None],
) -> Iterator[Outcome]:
    """Search every case; what is recorded already is not measured again.

    Args:
        cases: The most important first, as time may be short.
        measurer: Where kernels run.
        records: What is known; what is found is added.
        limits: When to stop. A case that is stopped before its first trial has no outcome.
        keep: Called with every record as it is measured, so that an interruption loses none.
    """
    end = time.monotonic() + limits.seconds if limits.seconds is not None else None
    for case in cases:
        trials = 0

        def measure(setting: Setting, case: Case = case) -> float | None:
            nonlocal trials
            if (known := records.times(case).get(setting)) is not None:
                return known
            if trials == limits.trials or (end is not None and time.monotonic() > end):
                return None
            trials += 1
            us = measurer.microseconds(case, replace(Knobs(), **dict(setting)))
            record = Record(measurer.hardware, records.kernel, case, setting, us)
            records.add(record)
            keep(record)
            return us

        default = measure(())
        if default is not None:
            best, us = _search(case, default, measure)
            yield Outcome(case, default, us, replace(Knobs(), **dict(best)), trials)


def _search(
    case: Case, default: float, measure: Callable[[Setting], float | None]
) -> tuple[Setting, float]:
    """Descend along one knob after another until none helps; the setting and its time."""
    best, us, improved = (), default, True
    space = _space(case.batch)
    while improved:
        improved = False
        for name, values in space.items():
            tried = [(_with(best, name, value), value) for value in values]
            timed = [(measure(setting), setting) for setting, _ in tried]
            found = min((t for t in timed if t[0] is not None), default=None, key=lambda t: t[0])
            if found is not None and found[0] is not None and found[0] < us * (1 - GAIN):
                (us, best), improved = found, len(space) > 1
    return best, us


def _with(setting: Setting, name: str, value: int) -> Setting:
    """A setting with one knob changed, without what is the default."""
    changed = replace(Knobs(), **{**dict(setting), name: value})
    default = asdict(Knobs())
    return tuple(sorted((k, v) for k, v in asdict(changed).items() if v != default[k]))


@dataclass(frozen=True, slots=True)
class Choice:
    """The knobs that records are for: of a format, and of shapes that deserve their own."""

    by_format: Mapping[str, Knobs] = field(default_factory=dict)
    by_shape: Mapping[tuple[str, int, int], Knobs] = field(default_factory=dict)

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
        by_format[name] = _overlay(by_format.get(name, ()), shared, _space(batch))
    for (name, _), group in cases.items():
        for case in group:
            times = records.times(case)
            own = min(times, key=times.__getitem__)
            space = _space(case.batch)
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


def _space(batch: int) -> Mapping[str, tuple[int, ...]]:
    return DECODE if batch == 1 else PREFILL


def _overlay(old: Setting, new: Setting, space: Mapping[str, tuple[int, ...]]) -> Setting:
    """A setting with its knobs of one space as ``new`` has them."""
    return tuple(sorted([*(knob for knob in old if knob[0] not in space), *new]))
