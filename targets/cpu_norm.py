"""Row kernels for CPUs (RMS norm, layer norm, softmax) and the vocabulary of all CPU kernels.

A kernel here is a PrimFunc that plain Python functions emit statement by statement. Vectors are
explicit, and a register is a one-vector buffer that LLVM promotes. No schedule is applied
afterwards: what is written is what runs. Every kernel is private, opaque to Relax fusion and
marked as scheduled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

SERIAL_FLOATS = 1 << 15
"""Below this many floats of simple work a thread launch costs more than it gains."""

LOWEST = -3.0e38
"""Stands for minus infinity where the difference of two such must not be NaN."""

TANH = (
    (1.0, 0.12928074598, 2.9299499001e-3, 9.3447388281e-6, -1.2987111830e-8, 1.8719579706e-11),
    (1.0, 0.46261382103, 2.3801662028e-2, 2.2932630964e-4),
)
"""Numerator and denominator of tanh(x) / x in x^2: the smallest greatest relative error up to 9."""

_OPAQUE = 8  # Relax's OpPatternKind.kOpaque


@dataclass(frozen=True, slots=True)
class Simd:
    """What a kernel needs to know of the machine: float32 lanes of a vector, and threads."""

    lanes: int = 16
    threads: int = 2

    @property
    def registers(self) -> int:
        """Vector registers: AVX-512 and NEON have 32, AVX2 has 16."""
        return 16 if self.lanes == 8 else 32


@dataclass(frozen=True, slots=True)
class Columns:
    """Where an operand lies in a wider row-major buffer, such as a fused matmul's output."""

    width: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of columns that a norm treats one by one.

    Each row has ``parts`` neighbouring runs of ``size`` columns; size 0 stands for a symbolic one.
    """

    size: int
    parts: int = 1
    rank: int = 3
    source: Columns | None = None


# --- vocabulary ---


def int64(value: int | Expr) -> Expr:
    """Make an index: Relax fuses and calls only PrimFuncs whose dims are int64."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def build(emit: Callable[[], None]) -> tirx.PrimFunc:
    """Run ``emit``, which declares parameters and emits the body, inside a new PrimFunc."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        emit()
    return builder.get()


def symbol(name: str) -> Expr:
    """Make a symbolic dim."""
    return IRBuilder.name(name, T.int64())


def param(name: str, shape: Sequence[int | Expr], dtype: str = "float32") -> Any:
    """Declare the next parameter of the kernel: a buffer, aligned to 64 bytes as TVM's own are."""
    handle = T.arg(name, T.handle())
    return IRBuilder.name(name, T.match_buffer(handle, [int64(d) for d in shape], dtype))


def scratch(*shape: int | Expr, dtype: str = "float32") -> Any:
    """Allocate memory; it becomes registers when small and indexed by constants."""
    return T.alloc_buffer([int64(d) for d in shape], dtype)


def splat(value: float, lanes: int) -> Expr:
    """Make a float32 constant of so many lanes."""
    return T.Broadcast(T.float32(value), lanes) if lanes > 1 else T.float32(value)


def load(buffer: Any, *index: int | Expr, lanes: int) -> Expr:
    """Load neighbours in the last dim."""
    *lead, last = (int64(i) for i in index)
    return buffer[(*lead, T.Ramp(last, int64(1), lanes) if lanes > 1 else last)]


def store(buffer: Any, value: Expr, *index: int | Expr) -> None:
    """Store neighbours in the last dim, as many as ``value`` has lanes."""
    *lead, last = (int64(i) for i in index)
    lanes = value.ty.dtype.lanes
    T.buffer_store(buffer, value, [*lead, T.Ramp(last, int64(1), lanes) if lanes > 1 else last])


def prefetch(buffer: Any, *index: int | Expr) -> None:
    """Ask for the cache line of an element that will be read soon; it may lie behind the end."""
    address = T.address_of(buffer[tuple(int64(i) for i in index)])
    read, keep, cache = T.int32(0), T.int32(3), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, read, keep, cache))


def registers(count: int, lanes: int, value: float = 0.0) -> list[Any]:
    """Allocate vectors that keep their values across iterations, each set to ``value``."""
    out = [scratch(lanes) for _ in range(count)]
    for register in out:
        store(register, splat(value, lanes), 0)
    return out


def hold(value: Expr) -> Expr:
    """Compute a value now, to be used any number of times on this thread.

    Not a variable but a register of its own: TVM's simplifier puts the definition of a variable
    back in place of each use, which grows exponentially for arithmetic such as exp, and its region
    analysis takes milliseconds for each index that is a variable.
    """
    dtype = value.ty.dtype
    register = scratch(dtype.lanes, dtype=str(dtype).split("x")[0])
    store(register, value, 0)
    return load(register, 0, lanes=dtype.lanes)


def square(value: Expr) -> Expr:
    """Compute ``value * value`` of a value that is computed once."""
    return let(value, lambda v: v * v)


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Name a value so that it is computed once: in a kernel by ``hold``, elsewhere in place."""
    if IRBuilder.is_in_scope():
        return body(hold(value))
    var = tirx.Var("t", value.ty)
    return tirx.Let(var, value, body(var))


def spread(extent: Expr, small: Expr, body: Callable[[Expr], None]) -> None:
    """Run ``body`` for each index: on all threads, or on this one when the work is ``small``."""
    with T.If(small):
        with T.Then(), T.serial(int64(0), extent) as i:
            body(i)
        with T.Else(), T.parallel(int64(0), extent) as i:
            body(i)


def fold(value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine the lanes of a vector into a scalar."""
    lanes = value.ty.dtype.lanes
    while lanes > 1:
        lanes //= 2
        value = hold(value)
        low, high = (T.Shuffle([value], list(range(s, s + lanes))) for s in (0, lanes))
        value = combine(low, high)
    return hold(value)


def exp(x: Expr) -> Expr:
    """Compute e**x within 1 ulp, from subnormal results to infinity; NaN stays NaN.

    TVM's own exp on vectors calls libm lane by lane. Here ``x = n ln2 + r``, a polynomial gives
    e**r on +-ln2/2, and 2**n is applied in two halves because a single float32 cannot hold
    2**-149 or 2**128.
    """
    dtype = x.ty.dtype
    lanes = dtype.lanes
    ints = f"int32x{lanes}" if lanes > 1 else "int32"

    def const(value: float) -> Expr:
        return splat(value, lanes)

    def power(n: Expr) -> Expr:
        return T.reinterpret(dtype, T.shift_left(n + 127, tirx.const(23, ints)))

    def poly(r: Expr) -> Expr:
        p = const(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
            p = p * r + const(c)
        return p * (r * r) + r + const(1.0)

    def scaled(r: Expr, n: Expr) -> Expr:
        return let(
            T.shift_right(n, tirx.const(1, ints)),
            lambda half: poly(r) * power(half) * power(n - half),
        )

    def reduced(x: Expr) -> Expr:  # a Select, unlike min and max, lets NaN through
        return let(T.Select(x < const(-110.0), const(-110.0), x), lambda x: split(x))

    def split(x: Expr) -> Expr:
        return let(T.nearbyint(x * const(1.44269504)), lambda n: remainder(x, n))

    def remainder(x: Expr, n: Expr) -> Expr:
        return let(
            x - n * const(0.693359375) + n * const(2.12194440e-4),
            lambda r: let(T.Cast(ints, n), lambda n: scaled(r, n)),
        )

    return let(x, lambda x: let(T.Select(x > const(89.0), const(89.0), x), reduced))


def tanh(x: Expr) -> Expr:
    """Compute tanh to 4e-7 of itself: a rational function, up to where float32 calls it 1."""
    return rational(x, 9.0, TANH)


def rational(x: Expr, limit: float, terms: tuple[Sequence[float], Sequence[float]]) -> Expr:
    """Compute the odd function ``x p(x^2) / q(x^2)``, constant beyond +-``limit``."""
    lanes = x.ty.dtype.lanes

    def poly(z: Expr, coefficients: Sequence[float]) -> Expr:
        *rest, value = (splat(c, lanes) for c in coefficients)
        for c in reversed(rest):
            value = value * z + c
        return value

    def ratio(x: Expr) -> Expr:
        return let(x * x, lambda z: x * poly(z, terms[0]) / poly(z, terms[1]))

    def clipped(x: Expr) -> Expr:  # by a Select, which lets NaN through
        low, high = splat(-limit, lanes), splat(limit, lanes)
        return T.Select(x > high, high, T.Select(x < low, low, x))

    return let(x, lambda x: let(clipped(x), ratio))


def unravel(index: Expr, dims: Sequence[Expr]) -> list[Expr]:
    """Split a flat index into one for each dim."""
    out: list[Expr] = []
    for d in reversed(dims[1:]):
        out.insert(0, hold(T.floormod(index, d)))
        index = hold(T.floordiv(index, d))
    return [index, *out]


def sweep(
    size: int | Expr, simd: Simd, body: Callable[[int | Expr, int, int], None], unroll: int = 4
) -> None:
    """Walk ``size`` columns by ``body(column, lanes, slot)``, ``unroll`` vectors (slots) a step."""
    wide = simd.lanes * unroll
    for first, step, lanes, slots in (
        (0, wide, simd.lanes, unroll),
        (size // wide * wide, simd.lanes, simd.lanes, 1),
        (size // simd.lanes * simd.lanes, 1, 1, 1),
    ):
        last = size // step * step
        if isinstance(first, int) and first == last:
            continue
        with T.serial(int64(0), int64((last - first) // step)) as i:
            for slot in range(slots):
                body(first + i * step + slot * lanes, lanes, slot)


def accumulate(
    size: int | Expr,
    simd: Simd,
    term: Callable[[int | Expr, int], Expr],
    combine: Callable[[Expr, Expr], Expr] = lambda a, b: a + b,
    start: float = 0.0,
) -> Expr:
    """Reduce ``term(column, lanes)`` over ``size`` columns to a scalar."""
    unroll = 4
    vectors = registers(unroll, simd.lanes, start)
    (rest,) = registers(1, 1, start)

    def body(column: int | Expr, lanes: int, slot: int) -> None:
        register = vectors[slot] if lanes > 1 else rest
        store(register, combine(load(register, 0, lanes=lanes), term(column, lanes)), 0)

    sweep(size, simd, body, unroll)
    values = [load(v, 0, lanes=simd.lanes) for v in vectors]
    pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return hold(combine(fold(combine(*pairs), combine), load(rest, 0, lanes=1)))


# --- kernels ---


@dataclass(frozen=True, slots=True)
class _Run:
    size: int | Expr
    x: Callable[[int | Expr, int], Expr]
    y: Callable[[int | Expr, int], Expr]
    put: Callable[[int | Expr, Expr], None]
    weights: list[Callable[[int | Expr, int], Expr]]


def _by_run(runs: Runs, weights: Sequence[str], emit: Callable[[_Run], None]) -> tirx.PrimFunc:
    """Make a kernel ``(x, *weights, y)``; ``emit`` handles one run."""

    def body() -> None:
        lead = [symbol(f"n{i}") for i in range(runs.rank - 1)]
        size = runs.size or symbol("size")
        source = runs.source or Columns(size * runs.parts)
        x = param("x", (*lead, source.width))
        shared = [param(name, (size,)) for name in weights]
        y = param("y", (*lead, size * runs.parts))

        def one(index: Expr) -> None:
            *row, part = unravel(index, [*lead, int64(runs.parts)])
            start = hold(part * size)
            emit(
                _Run(
                    size,
                    lambda c, lanes: load(x, *row, start + source.offset + c, lanes=lanes),
                    lambda c, lanes: load(y, *row, start + c, lanes=lanes),
                    lambda c, value: store(y, value, *row, start + c),
                    [reader(w) for w in shared],
                )
            )

        with T.sblock("root"):
            count = math.prod(lead, start=int64(runs.parts))
            spread(count, count * size < SERIAL_FLOATS, one)

    return build(body)


def rms_norm(runs: Runs, eps: float, simd: Simd) -> tirx.PrimFunc:
    """Make ``(x, weight, y)``: ``y = x / sqrt(mean(x^2) + eps) * weight``."""

    def emit(run: _Run) -> None:
        factor = rms_factor(run.x, run.size, eps, simd)
        (weight,) = run.weights
        sweep(run.size, simd, lambda c, n, _: run.put(c, run.x(c, n) * factor * weight(c, n)))

    return _by_run(runs, ["weight"], emit)


def rms_factor(
    x: Callable[[int | Expr, int], Expr], size: int | Expr, eps: float, simd: Simd
) -> Expr:
    """``1 / sqrt(mean(x^2) + eps)`` of the columns that ``x`` reads."""
    total = accumulate(size, simd, lambda c, n: square(x(c, n)))
    return _deviation(total, size, eps)


def scaled(
    x: Callable[[int | Expr, int], Expr], factor: Expr, weight: Any
) -> Callable[[int | Expr, int], Expr]:
    """``x * factor * weight``, by column."""
    return lambda column, lanes: x(column, lanes) * factor * load(weight, column, lanes=lanes)


def layer_norm(runs: Runs, eps: float, simd: Simd) -> tirx.PrimFunc:
    """Make ``(x, weight, bias, y)``: ``y = (x - mean) / sqrt(variance + eps) * weight + bias``."""

    def emit(run: _Run) -> None:
        mean = hold(_mean(accumulate(run.size, simd, run.x), run.size))
        total = accumulate(run.size, simd, lambda c, n: square(run.x(c, n) - mean))
        factor = _deviation(total, run.size, eps)
        weight, bias = run.weights
        sweep(
            run.size,
            simd,
            lambda c, n, _: run.put(c, (run.x(c, n) - mean) * factor * weight(c, n) + bias(c, n)),
        )

    return _by_run(runs, ["weight", "bias"], emit)


def softmax(runs: Runs, simd: Simd) -> tirx.PrimFunc:
    """Make ``(x, y)``: ``y = exp(x - max) / sum(exp(x - max))``."""

    def emit(run: _Run) -> None:
        peak = accumulate(run.size, simd, run.x, T.max, LOWEST)

        def term(c: int | Expr, lanes: int) -> Expr:
            value = hold(exp(run.x(c, lanes) - peak))
            run.put(c, value)
            return value

        factor = hold(T.float32(1.0) / accumulate(run.size, simd, term))
        sweep(run.size, simd, lambda c, n, _: run.put(c, run.y(c, n) * factor))

    return _by_run(runs, [], emit)


def reader(buffer: Any, *row: Expr) -> Callable[[int | Expr, int], Expr]:
    """Read some columns of a row, from one on."""
    return lambda c, lanes: load(buffer, *row, c, lanes=lanes)


def _mean(total: Expr, size: int | Expr) -> Expr:
    return total / T.Cast("float32", int64(size))


def _deviation(total: Expr, size: int | Expr, eps: float) -> Expr:
    return hold(T.float32(1.0) / T.sqrt(_mean(total, size) + T.float32(eps)))
