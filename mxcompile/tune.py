"""Search the knobs of the matmul kernels on the machine they will run on, and what was found.

One case at a time: a format, a weight's shape, a number of activation rows. The search goes from
the defaults along one knob after another, keeps what is faster, and stops when no knob helps: the
knobs are few and hardly interact. A trial is a program of calls that stream copies of a weight from
memory, as decoding does, built by TVM and timed by TVM's evaluator through an RPC session: a local
one on this machine, those of devices in ``remote``.
"""

import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, rpc

from mxcompile import graph, lower, machine, runtime
from mxcompile.artifact import Artifact
from mxcompile.errors import UsageError
from mxcompile.formats import ACTIVATION_FORMATS, FORMATS
from mxcompile.knobs import GAIN, Setting, space_of
from mxcompile.plan import ROW_TILE, Unit, tile_bytes
from mxcompile.records import Case, Record, Records, representative
from mxcompile.target import Target
from mxcompile.targets import packing
from mxcompile.targets.cpu_matmul import Knobs, MatmulKernel, activation_bytes

INT8: Final = ACTIVATION_FORMATS["int8"]

Shape = tuple[str, int, int]
"""A product: format, rows and columns of the weight."""

BATCHES: Final = (1, 128)
"""The activation rows that are tuned for: a decode step, and what ``chunk`` takes of a prompt."""

STREAM_BYTES: Final = 96 << 20
"""Weights that a trial reads, if need be by copies: three times a large cache."""

REPEATS: Final = 15


_KERNELS: Final = {
    "RMSNormalization": 1,
    "LayerNormalization": 1,
    "Attention": 2,
    "Softmax": 1,
    "Gelu": 1,
    "Sigmoid": 1,
    "Add": 1,
    "Gather": 1,
}
"""The kernels that operators call; appending to a cache, with what turns its keys, is one besides
attention itself."""


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
        building: Entered to compile a trial: what measures on several devices compiles in turn.
        ask: Calls what waits for the device.
    """

    hardware: str
    target: Target
    session: Any
    set_threads: Callable[[int], None]
    building: AbstractContextManager[Any] = field(default_factory=nullcontext)
    ask: Callable[[Callable[[], float]], float] = lambda call: call()
    _arguments: tuple[Case, list[Any]] | None = field(default=None, init=False)
    _trials: int = field(default=0, init=False)

    @classmethod
    def local(cls, target: Target) -> "SessionMeasurer":
        """Measures on this machine, in this process."""
        logging.getLogger("RPCServer").setLevel(logging.WARNING)  # it tells of every library
        return cls(machine.here().hardware, target, rpc.LocalSession(), runtime.set_threads)

    def microseconds(self, case: Case, knobs: Knobs) -> float:
        """The least of some calls: whatever else a machine does only adds to it."""
        copies = max(1, -(-STREAM_BYTES // weight_bytes(case)))
        self._trials += 1  # a library that is loaded must not be written over
        with tempfile.TemporaryDirectory(prefix="mxcompile-") as folder:
            library = Path(folder) / f"trial{self._trials}.so"
            with self.building:
                module = program(case, knobs, self.target, copies)
                lower.compile_module(module, self.target, library)
            return self.ask(partial(self._time, library, case, copies))

    def _time(self, library: Path, case: Case, copies: int) -> float:
        device = self.session.cpu()
        self.session.upload(str(library))
        vm = relax.VirtualMachine(self.session.load_module(library.name), device)
        self.session.remove(library.name)
        if self._arguments is None or self._arguments[0] != case:
            self._arguments = None  # frees those of another case first
            self._arguments = (case, self._tensors(case, copies))
        self.set_threads(case.threads)
        evaluator = vm.time_evaluator("main", device, number=1, repeat=REPEATS)
        return float(1e6 * min(evaluator(*self._arguments[1]).results) / copies)

    def _tensors(self, case: Case, copies: int) -> list[Any]:
        """What ``program`` takes, over there: one weight is sent and copied on the spot."""
        device = self.session.cpu()
        codes, table, weight = (
            tvm.runtime.tensor(array, device) for array in inputs(case, copies=1)
        )
        empty = partial(tvm.runtime.empty, weight.shape, weight.dtype, device)
        return [codes, table, weight, *(empty().copyfrom(weight) for _ in range(copies - 1))]


def weight_bytes(case: Case) -> int:
    """The bytes of a packed weight."""
    return _tiles(case) * tile_bytes(case.columns, FORMATS[case.format])


def _tiles(case: Case) -> int:
    return -(-case.rows // ROW_TILE)


def program(case: Case, knobs: Knobs, target: Target, copies: int) -> Any:
    """A Relax module ``main(codes, table, *weights)`` that multiplies with every copy in turn."""
    kernel = MatmulKernel(
        target.instructions,  # type: ignore[arg-type]
        formats=(case.format,),
        knobs=((case.format, knobs),),
    )
    bb = relax.BlockBuilder()
    tensors = [relax.TensorType(a.shape, str(a.dtype)) for a in inputs(case, copies)]
    codes, table, *weights = (relax.Var(f"x{i}", t) for i, t in enumerate(tensors))
    product = bb.add_func(lower.rooted(kernel.matmul_quantized(INT8)), "matmul_quantized")
    out = relax.TensorType((case.batch, case.rows), "float32")
    with bb.function("main", [codes, table, *weights]):
        with bb.dataflow():
            calls = [relax.call_tir(product, [codes, weight, table], out) for weight in weights]
            found = bb.emit_output(relax.Tuple([bb.emit(call) for call in calls]))
        bb.emit_func_output(found)
    return bb.finalize()


def inputs(case: Case, copies: int) -> Iterator[np.ndarray]:
    """What ``program`` takes; what numbers they hold changes no time."""
    fmt, size = FORMATS[case.format], weight_bytes(case)
    yield np.ones((case.batch, activation_bytes(case.columns, INT8)), np.int8)
    yield packing.tile_table([fmt] * _tiles(case), case.columns)
    for _ in range(copies):
        yield np.ones(size, np.uint8)


def artifact_shapes(artifact: Artifact) -> Counter[Shape]:
    """The products of an artifact's program, with how often each is in it."""
    plan = artifact.plan()
    units = {unit.name: unit for unit in plan.units}
    found: Counter[Shape] = Counter()
    for name in artifact.manifest.weights:
        label, _, kind = name.rpartition(".")
        parts = [units[part] for part in label.split("+") if part in units]
        if kind == "packed" and parts:
            rows = sum(unit.rows for unit in parts)
            formats = {
                representative(fmt) for unit in parts for fmt in plan.tiles[unit.name].formats
            }
            found.update((fmt, rows, parts[0].columns) for fmt in formats)
    return found


def model_shapes(model: ir.Model) -> Counter[Shape]:
    """The products that a canonical model may be compiled to: every format may come up."""
    found: Counter[Shape] = Counter()
    for group in products(model):
        shape = (sum(unit.rows for unit in group), group[0].columns)
        found.update((fmt, *shape) for fmt in set(map(representative, FORMATS.values())))
    return found


def products(model: ir.Model) -> list[list[Unit]]:
    """The weights of each matrix product of a canonical model.

    What one value is multiplied with is one product, as ``fuse-qdq`` has it.
    """
    units = {unit.name: unit for unit in graph.units(model)}
    merged: dict[object, list[Unit]] = {}
    for name, uses in graph.uses(model).items():
        linear = [use for use in uses if use.kind == "linear"]
        if linear:
            alone = len(uses) > 1 or units[name].rows % ROW_TILE
            key = name if alone else linear[0].node.inputs[0]
            merged.setdefault(key, []).append(units[name])
    return list(merged.values())


def kernel_calls(model: ir.Model) -> int:
    """About how many kernels a step of a canonical model calls.

    Each product quantizes its activations first. What only looks at a tensor otherwise, or works
    on sizes, calls none; element-wise chains are fused with the first of their operators.
    """
    count = 2 * len(products(model))
    for node in model.graph:
        kinds = {v.dtype for v in node.outputs}
        if kinds == {ir.DataType.FLOAT} and node.op_type in _KERNELS:
            count += _KERNELS[node.op_type]
    return count


def main_columns(model: ir.Model) -> int:
    """The columns that most parameters of a canonical model's products have."""
    count: Counter[int] = Counter()
    for group in products(model):
        for unit in group:
            count[unit.columns] += unit.parameters
    return count.most_common(1)[0][0]


def wide_results(model: ir.Model, least: int) -> int:
    """How many numbers operators move in results that have at least so many in a row."""
    return sum(
        width
        for node in model.graph
        for value in node.outputs
        if node.op_type not in ("MatMul", "Linear") and value.shape is not None
        if len(value.shape) and isinstance(width := value.shape[-1], int) and width >= least
    )


def load(module: Any, target: Target) -> Any:
    """A Relax module, compiled and loaded on this machine."""
    with tempfile.TemporaryDirectory(prefix="mxcompile-") as folder:
        library = Path(folder) / "module.so"
        lower.compile_module(module, target, library)
        return relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())


def check_knobs(target: Target) -> None:
    """Raise UsageError when the target's kernels have no knobs."""
    if target.kernels != "cpu":
        raise UsageError(f"the kernels of {target.name} have no knobs to tune")


def check_host(target: Target) -> None:
    """Raise UsageError when this machine cannot run the target's kernels."""
    if not target.runs_here:
        raise UsageError(f"this machine cannot run the kernels of {target.name}: tune it elsewhere")


def cases(shapes: Counter[Shape], threads: int) -> list[Case]:
    """What to tune, first what takes most of a decode step, then what takes most of a prompt."""

    def weight(item: tuple[Shape, int]) -> int:
        (fmt, rows, columns), count = item
        return count * rows * columns * FORMATS[fmt].bits

    ordered = [shape for shape, _ in sorted(shapes.items(), key=weight, reverse=True)]
    return [Case(*shape, batch, threads) for batch in BATCHES for shape in ordered]


@dataclass(frozen=True, slots=True)
class Limits:
    """When a search ends: settings of a case, known or not, and seconds of all; None for no end."""

    trials: int | None = None
    seconds: float | None = None

    def end(self) -> float:
        """When a search that starts now ends, as ``time.monotonic`` has it."""
        return math.inf if self.seconds is None else time.monotonic() + self.seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to: microseconds before and after, the knobs, and trials that were run.

    ``hardware`` is the machine that it was measured on.
    """

    hardware: str
    case: Case
    default_us: float
    best_us: float
    knobs: Knobs
    trials: int

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v}" for k, v in asdict(self.knobs).items() if v)
        return f"{self.case}: {self.default_us:.1f} us, best {self.best_us:.1f} us with {shown}"


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
    end = limits.end()
    for case in cases:
        if (outcome := tune_case(case, measurer, records, limits.trials, end, keep)) is not None:
            yield outcome


def tune_case(
    case: Case,
    measurer: Measurer,
    records: Records,
    trials: int | None,
    end: float,
    keep: Callable[[Record], None],
) -> Outcome | None:
    """Search one case; None if there was no time for a trial.

    Args:
        case: What to search.
        measurer: Where kernels run.
        records: What is known; what is found is added.
        trials: The settings that are looked at, at most.
        end: When no trial begins any more, as ``time.monotonic`` has it.
        keep: Called with every record.
    """
    seen: set[Setting] = set()
    measured: list[Record] = []

    def measure(setting: Setting) -> float | None:
        if setting not in seen and len(seen) == trials:
            return None
        seen.add(setting)
        if (known := records.times(case).get(setting)) is not None:
            return known
        if time.monotonic() > end:
            return None
        us = measurer.microseconds(case, replace(Knobs(), **dict(setting)))
        record = Record(measurer.hardware, records.kernel, case, setting, us)
        records.add(record)
        keep(record)
        measured.append(record)
        return us

    default = measure(())
    if default is None:
        return None
    best, us = _search(case, default, measure)
    knobs = replace(Knobs(), **dict(best))
    return Outcome(measurer.hardware, case, default, us, knobs, len(measured))


def _search(
    case: Case, default: float, measure: Callable[[Setting], float | None]
) -> tuple[Setting, float]:
    """Descend along one knob after another until none helps; the setting and its time."""
    best: Setting = ()
    us, improved = default, True
    space = space_of(case.batch)
    while improved:
        improved = False
        for name, values in space.items():
            settings = [_with(best, name, value) for value in values]
            timed = [(spent, s) for s in settings if (spent := measure(s)) is not None]
            found = min(timed, default=(us, best))
            if found[0] < us * (1 - GAIN):
                (us, best), improved = found, len(space) > 1
    return best, us


def _with(setting: Setting, name: str, value: int) -> Setting:
    """A setting with one knob changed, without what is the default."""
    changed = replace(Knobs(), **{**dict(setting), name: value})
    default = asdict(Knobs())
    return tuple(sorted((k, v) for k, v in asdict(changed).items() if v != default[k]))
