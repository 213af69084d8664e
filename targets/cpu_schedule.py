"""Schedules for what no kernel was written for: parallel over rows, vectors along the last axis.

``schedule`` takes the PrimFuncs that Relax's legalization and fusion leave and gives each the same
treatment, from its last block back: elementwise producers are inlined, the last axis is cut in
vectors, the axes before it become one parallel loop, and reductions move into the row that needs
them and run along vectors too. Transcendental functions become polynomials, because TVM turns a
vector of them into calls of libm lane by lane. Axes without a static multiple of the vector width
are left to LLVM's loop vectorizer, which then finds only arithmetic.

Left out: searching. The hot operators have kernels of their own; here good is good enough.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, TensorLoad
from tvm.s_tir import SBlock, SBlockRealize, Schedule, ScheduleError
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.sym import Analyzer

from mxcompile.targets.cpu_norm import SERIAL_FLOATS, Simd, exp, let, rational, tanh

_CHUNK = 4096  # columns of a long row that one thread takes at a time
_LEAST_CHUNK = 64  # fewer are not worth the choice of a thread
_STEPS = 8  # reads from places that are read themselves, side by side
_LEAST_LANES = 4  # shorter vectors are not worth having
_SPATIAL, _REDUCTION = 0, 2  # IterVar.iter_type

ERF = (
    (
        1.1283792257,
        0.18517045677,
        5.2080407739e-2,
        3.5521753598e-3,
        2.8191259480e-4,
        2.1109972295e-6,
    ),
    (1.0, 0.49743631482, 0.11196788400, 1.4534550719e-2, 1.1145637836e-3, 3.8575264625e-5),
)
"""Numerator and denominator of erf(x) / x in x^2, fitted as ``cpu_norm.TANH`` up to 3.9."""


def schedule(mod: tvm.IRModule, simd: Simd) -> tvm.IRModule:
    """Schedule every PrimFunc that is not marked as scheduled."""
    out = mod.clone()
    for name, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in function.attrs:
            out.update_func(name, schedule_function(function, simd))
    return out


def schedule_function(function: tirx.PrimFunc, simd: Simd) -> tirx.PrimFunc:
    """Schedule one PrimFunc; loops within a block, such as those of a sort, stay as they are."""
    sch = Schedule(function)
    root = sch.get_sblock("root")
    if all(_is_plain(sch.get(b)) for b in sch.get_child_blocks(root)):
        _inline(sch, root, function.params)
        pending = list(sch.get_child_blocks(root))
        while pending:
            anchor = pending.pop()
            untouched = sch.copy()
            try:
                placed = _schedule_nest(sch, simd, anchor, pending)
            except ScheduleError:  # an odd nest stays serial: slow, not wrong
                sch, placed = untouched, []
            pending = [b for b in pending if not any(b.same_as(p) for p in placed)]
    scheduled = sch.mod["main"]
    body = tvm_ffi.structural_map(_spread(scheduled.body), (Call, _polynomial))
    return scheduled.with_body(body).with_attr("tirx.is_scheduled", True)


# --- blocks ---


def _is_plain(block: SBlock) -> bool:
    """Tell whether a block computes its outputs at one point, by stores only."""
    odd: list[Any] = []
    tvm_ffi.structural_walk(block.body, ((tirx.For, tirx.While, SBlockRealize), odd.append))
    return not odd and all(v.iter_type in (_SPATIAL, _REDUCTION) for v in block.iter_vars)


def _is_reduction(block: SBlock) -> bool:
    return any(v.iter_type == _REDUCTION for v in block.iter_vars)


def _used(expr: Any) -> set[Any]:
    found: set[Any] = set()
    tvm_ffi.structural_walk(expr, (tirx.Var, found.add))
    return found


def _reduced(block: SBlock) -> set[Any]:
    return {v.var for v in block.iter_vars if v.iter_type == _REDUCTION}


def _summed_reads(block: SBlock) -> list[list[Expr]]:
    """List the indices of the reads that a reduction walks along."""
    indices = [[r.min for r in read.region] for read in block.reads]
    return [index for index in indices if _used(index) & _reduced(block)]


def _gathers(block: SBlock) -> bool:
    """Tell whether each number of a row is read from where other data say."""
    column = block.iter_vars[-1].var if block.iter_vars else None
    places = [place for load in _loads(block.body) for i in load.indices for place in _loads(i)]
    return any(column in _used(place) for place in places)


def _loads(expr: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (TensorLoad, found.append))
    return found


def _inline(sch: Schedule, root: SBlockRV, params: Sequence[Any]) -> None:
    """Inline what is elementwise, except where that would compute it many times."""
    for rv in sch.get_child_blocks(root):
        block = sch.get(rv)
        consumers = [sch.get(c) for c in sch.get_consumers(rv)]
        output = any(w.source.same_as(p) for w in block.writes for p in params)
        product = any(_is_reduction(c) and len(_summed_reads(c)) > 1 for c in consumers)
        # TVM's simplifier takes exponential time for polynomials of polynomials
        nested = _is_costly(block) and any(map(_is_costly, consumers))
        if output or product or nested or _is_reduction(block):
            continue
        try:
            sch.compute_inline(rv)
        except ScheduleError:
            continue  # it stays, with loops of its own


def _is_costly(block: SBlock) -> bool:
    calls: list[Any] = []
    tvm_ffi.structural_walk(block.body, (Call, calls.append))
    return any(_formula(call) for call in calls)


# --- nests ---


@dataclass(frozen=True, slots=True)
class _Producer:
    """A block that can move into the rows of its consumers, and its variables that count rows."""

    block: SBlockRV
    rows: tuple[Any, ...]


def _schedule_nest(
    sch: Schedule, simd: Simd, anchor: SBlockRV, pending: Sequence[SBlockRV]
) -> list[SBlockRV]:
    """Schedule a block with the ones of ``pending`` that fit in its rows, and return those."""
    if _is_reduction(sch.get(anchor)) and len(sch.get(anchor).writes) == 1:
        # sums are kept in registers; the copy to the output is the nest that they move into
        pending = [*pending, anchor]
        anchor = sch.cache_write(anchor, 0, "global")
    loops = sch.get_loops(anchor)
    if not loops or _is_reduction(sch.get(anchor)):
        return []
    rank, gathers = len(loops), _gathers(sch.get(anchor))
    choices = [(r, _fitting(sch, anchor, pending, r)) for r in range(rank, 0, -1)]
    rows, producers = max(choices, key=lambda choice: len(choice[1]))

    sums = [p.block for p in producers if _is_reduction(sch.get(p.block))]
    if sums and rows == rank and all(_runs_along(sch.get(b)) for b in sums):
        outer, inner = loops, list[LoopRV]()
    elif rows == rank:
        outer, inner = _tile(sch, simd, loops, producers, gathers)
    else:
        outer, inner = loops[:rows], loops[rows:]
    walks = [_place(sch, simd, producer.block, outer[-1]) for producer in producers]
    if gathers:
        _unroll(sch, inner)
    else:
        _vectorize(sch, simd, inner, sums=bool(producers))
    sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])
    for block, loop in (walk for walk in walks if walk):
        sch.decompose_reduction(block, loop)  # last: TVM cannot tell the parts to be a reduction
    return [p.block for p in producers]


def _fitting(
    sch: Schedule, anchor: SBlockRV, pending: Sequence[SBlockRV], rows: int
) -> list[_Producer]:
    """List the blocks, consumers first, of which a row of the anchor needs only its own row."""
    known = {sch.get(anchor).name_hint: tuple(v.var for v in sch.get(anchor).iter_vars[:rows])}
    found = []
    for rv in reversed(pending):
        block = sch.get(rv)
        consumers = [sch.get(c) for c in sch.get_consumers(rv)]
        matches = {
            _row_variables(block, c, known[c.name_hint]) if c.name_hint in known else None
            for c in consumers
        }
        if len(matches) == 1 and (match := matches.pop()) is not None:
            known[block.name_hint] = match
            found.append(_Producer(rv, match))
    return found


def _row_variables(
    producer: SBlock, consumer: SBlock, rows: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Find the variables of the producer that equal the consumer's ``rows`` in all its reads."""
    for write in producer.writes:
        for read in consumer.reads:
            if read.source.same_as(write.source):
                written = {r.min: w.min for r, w in zip(read.region, write.region, strict=True)}
                if all(v in written and isinstance(written[v], tirx.Var) for v in rows):
                    return tuple(written[v] for v in rows)
    return None


def _runs_along(block: SBlock) -> bool:
    """Tell whether a reduction walks the last axis of what it reads."""
    spatial = {v.var for v in block.iter_vars if v.iter_type == _SPATIAL}
    return not any(_used(index[-1]) & spatial for index in _summed_reads(block))


def _extent(sch: Schedule, loop: LoopRV) -> int:
    """Give the static extent of a loop, or 0."""
    extent = sch.get(loop).extent
    return int(extent.value) if isinstance(extent, tirx.IntImm) else 0


def _divisor(size: int, most: int) -> int:
    """The largest divisor of a size that is no larger than ``most``; 0 of what is not known."""
    return max(d for d in range(1, most + 1) if size % d == 0) if size else 0


def _width(size: int, simd: Simd, sums: bool) -> int:
    """Choose the lanes for an axis, 0 for none.

    Sums stay in registers only as vectors that divide the axis; odd ones, which LLVM pads, beat
    very short ones. For the rest, LLVM's own vectorizer does better than vectors that are not full.
    """
    lanes = math.gcd(size, simd.lanes) if size else 0
    if sums and size and lanes < simd.lanes // 2:
        lanes = _divisor(size, simd.lanes)
    return lanes if lanes >= _LEAST_LANES and (sums or lanes in (simd.lanes, size)) else 0


def _tile(
    sch: Schedule, simd: Simd, loops: list[LoopRV], producers: list[_Producer], gathers: bool
) -> tuple[list[LoopRV], list[LoopRV]]:
    """Cut the last axis, and for a product also an axis of rows; return outer and inner loops."""
    *outer, last = loops
    size = _extent(sch, last)
    if gathers and (columns := _divisor(size, _CHUNK)) >= _LEAST_CHUNK:
        chunk, last = sch.split(last, [None, columns])
        return [*outer, chunk], [last]
    width = 0 if gathers else _width(size, simd, sums=bool(producers))
    if not width:
        return (outer, [last]) if outer else (loops, [])
    vectors = size // width
    most = 4 if producers else _CHUNK // width
    unroll = _divisor(vectors, most)
    chunk, *inner = sch.split(last, [None, unroll, width])
    for i, loop in enumerate(outer):
        shares = producers and all(_shares_vectors(sch.get(p.block), p.rows[i]) for p in producers)
        if unroll < 4 and shares and _extent(sch, loop) and _extent(sch, loop) % 4 == 0:
            outer[i], several = sch.split(loop, [None, 4])
            sch.reorder(*outer, chunk, several, *inner)
            return [*outer, chunk], [several, *inner]
    return [*outer, chunk], inner


def _shares_vectors(block: SBlock, row: Any) -> bool:
    """Tell whether the vectors that a product reads are the same for neighbouring rows."""
    spatial = {v.var for v in block.iter_vars if v.iter_type == _SPATIAL}
    vectors = [index for index in _summed_reads(block) if _used(index[-1]) & spatial]
    return len(_summed_reads(block)) > 1 and not any(row in _used(index) for index in vectors)


def _place(sch: Schedule, simd: Simd, rv: SBlockRV, at: LoopRV) -> tuple[SBlockRV, LoopRV] | None:
    """Move a block into a loop and vectorize it; tell where its vectors are to be cleared."""
    block = sch.get(rv)
    reduction = _is_reduction(block)
    if reduction and _runs_along(block) and len(block.writes) == 1:
        last = sch.get_loops(rv)[-1]
        if width := _width(_extent(sch, last), simd, sums=True):
            _, lanes = sch.split(last, [None, width])
            partial = sch.rfactor(lanes, len(block.writes[0].region))
            sch.compute_at(rv, at)
            sch.compute_at(partial, at)
            vector, *walk = _inside(sch, partial, at)
            return _reduce(sch, simd, partial, walk, [vector])
    sch.compute_at(rv, at)
    loops = _inside(sch, rv, at)
    if not reduction:
        _vectorize(sch, simd, loops, sums=False)
        return None
    count = sum(not _is_one(v.dom.extent) for v in block.iter_vars if v.iter_type == _REDUCTION)
    cut = len(loops) - count
    return _reduce(sch, simd, rv, loops[cut:], loops[:cut])


def _is_one(extent: Expr) -> bool:
    return isinstance(extent, tirx.IntImm) and extent.value == 1


def _inside(sch: Schedule, rv: SBlockRV, at: LoopRV) -> list[LoopRV]:
    """List the loops of a block within another loop."""
    loops = sch.get_loops(rv)
    depth = next(i for i, loop in enumerate(loops) if sch.get(loop).same_as(sch.get(at)))
    return list(loops[depth + 1 :])


def _reduce(
    sch: Schedule, simd: Simd, rv: SBlockRV, walk: list[LoopRV], vectors: list[LoopRV]
) -> tuple[SBlockRV, LoopRV] | None:
    """Put the loops of a reduction outside those along its vectors."""
    if not walk or not vectors:
        return None
    sch.reorder(*walk, *vectors)
    _vectorize(sch, simd, vectors, sums=True)
    return rv, walk[0]


def _unroll(sch: Schedule, loops: list[LoopRV]) -> None:
    """Write out some steps of the last of some innermost loops, so that none of them is a vector.

    Vectors of places would be made for their numbers to be taken out one by one, or be gathered:
    both take twice as long.
    """
    if loops and (size := _extent(sch, loops[-1])):
        _, inner = sch.split(loops[-1], [None, _divisor(size, _STEPS)])
        sch.unroll(inner)


def _vectorize(sch: Schedule, simd: Simd, loops: list[LoopRV], sums: bool) -> None:
    """Make the last of some innermost loops a vector, and unroll short ones around it."""
    if not loops:
        return
    *rest, last = loops
    size = _extent(sch, last)
    width = _width(size, simd, sums)
    if not width:
        return
    if width < size:
        cut, last = sch.split(last, [None, width])
        rest.append(cut)
    sch.vectorize(last)
    for loop in rest:
        if 1 < _extent(sch, loop) <= 4:
            sch.unroll(loop)


# --- after scheduling ---


def _polynomial(call: Call) -> Expr:
    """Replace a float32 transcendental by arithmetic that runs on vectors."""
    formula = _formula(call)
    return formula(*call.args) if formula else call


def _formula(call: Call) -> Callable[..., Expr] | None:
    name = getattr(call.op, "name", "").removeprefix("tirx.")
    return _FORMULAS.get(name) if str(call.ty) == "float32" else None


def _sigmoid(x: Expr) -> Expr:
    return 1.0 / (1.0 + exp(-x))


def _power(base: Expr, exponent: Expr) -> Expr:
    """Multiply out the powers that models hold; leave others to libm."""
    if isinstance(exponent, tirx.FloatImm) and exponent.value in (2.0, 3.0):
        return let(
            base, lambda b: math.prod([b] * int(exponent.value), start=tirx.const(1.0, "float32"))
        )
    if isinstance(exponent, tirx.FloatImm) and exponent.value == 0.5:
        return tirx.sqrt(base)
    return tirx.pow(base, exponent)


_FORMULAS: dict[str, Callable[..., Expr]] = {
    "exp": exp,
    "tanh": tanh,
    "erf": lambda x: rational(x, 3.9, ERF),
    "sigmoid": _sigmoid,
    "pow": _power,
}


def _work(statement: Any) -> Expr:
    """Count the iterations of the loops of a statement."""
    match statement:
        case tirx.For():
            return statement.extent * _work(statement.body)
        case tirx.SeqStmt():
            return sum((_work(s) for s in statement.seq), start=tirx.const(0, "int64"))
        case SBlockRealize():
            return _work(statement.block.body)
        case _:
            return tirx.const(1, "int64")


def _spread(realize: SBlockRealize) -> SBlockRealize:
    """Let a parallel loop run on this thread alone when its work is too little for a launch."""
    root = realize.block
    nests = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    buffers = list(root.alloc_buffers)
    used = [_used(nest) for nest in nests]
    for i, nest in enumerate(nests):
        if not isinstance(nest, tirx.For) or nest.kind != tirx.ForKind.PARALLEL:
            continue
        elsewhere = set().union(*used[:i], *used[i + 1 :])
        own = {b: tirx.Var(b.name, b.ty) for b in root.alloc_buffers if b not in elsewhere}
        small = Analyzer().simplify(_work(nest) < SERIAL_FLOATS)
        if isinstance(small, tirx.IntImm):
            nests[i] = _serial(nest) if small.value else nest
        else:
            nests[i] = tirx.IfThenElse(small, _serial(_renamed(nest, own)), nest)
            buffers += own.values()
    body = tirx.SeqStmt(nests) if len(nests) > 1 else nests[0]
    block = SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, body, None, buffers)
    return SBlockRealize(realize.iter_values, realize.predicate, block)


def _serial(loop: tirx.For) -> tirx.For:
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def _renamed(statement: Any, names: dict[Any, Any]) -> Any:
    """Copy a statement with its own variables: TVM takes each to be defined once."""
    fresh = dict(names)

    def rename(var: Any, kind: int) -> Any:
        if kind != tvm_ffi.DefRegionKind.NONE:
            fresh[var] = tirx.Var(var.name, var.ty)
        return fresh.get(var, var)

    return tvm_ffi.structural_map(statement, with_def_region_kind=(tirx.Var, rename))
