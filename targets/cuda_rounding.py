"""Rows of activations for CUDA: made of what a graph has, and rounded to records.

What a record is says ``cpu_matmul``. The threads of a block hold a row in registers, quads of
columns in turn; a group of 32 columns is 8 neighbouring threads, which share its scale and sum.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import GROUP, ActivationFormat, groups
from mxcompile.targets.cpu_matmul import Gate, Norm, Residual, Rows, Source
from mxcompile.targets.cpu_norm import param
from mxcompile.targets.cuda_block import Block, Private, hold, registers, store, when
from mxcompile.targets.packing import QUADS

WORDS: Final = GROUP // 4 + 2
"""Words of a quantized group of an activation row: codes, scale, sum."""

_ROUND: Final = 1.5 * 2.0**23
"""Added to a float of magnitude below 2**22, leaves it rounded half to even in the low bits."""

_TINY: Final = 2.0**-120
"""Groups whose magnitudes are all below are taken for 0: their scale has no finite inverse."""

_GROUP_LANES: Final = (1, 2, 4)
"""Bits of a thread's number that tell the quads of a group apart."""

Put = Callable[[int, Expr, int | Expr, Expr], None]
"""Writes a word of a record: digit, group, which word, value."""

Keep = Callable[[Expr, Expr], None]
"""Writes a column of a residual's sum."""


def columns_of(source: Source) -> int:
    """The columns of a row."""
    return source.size if isinstance(source, Gate) else source.columns


def declare(source: Source, b: Expr, s: Expr) -> list[Any]:
    """Declares what rows are made of as the next parameters."""
    if isinstance(source, Gate):
        return [param("G", (b, s, source.gate.width)), param("U", (b, s, source.up.width))]
    shape, weight = (b, s, source.columns), (source.columns,)
    if isinstance(source, Rows):
        return [param("X", shape)]
    if isinstance(source, Norm):
        return [param("X", shape), param("weight", weight)]
    names = ["R", "Y", "weight", *([] if source.inner_eps is None else ["inner"])]
    return [param(name, shape if name in "RY" else weight) for name in names]


def declare_total(source: Source, b: Expr, s: Expr) -> Any:
    """Declares where the sum of a residual goes as the next parameter."""
    return param("H", (b, s, source.columns)) if isinstance(source, Residual) else None


def _gelu_tanh(x: Expr) -> Expr:
    inner = x * (T.float32(1) + T.float32(0.044715) * x * x) * T.float32(math.sqrt(2 / math.pi))
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


def _silu(x: Expr) -> Expr:
    return x / (T.float32(1) + T.exp(-x))


ACTIVATIONS: Final = {"gelu_tanh": _gelu_tanh, "silu": _silu}


class Row:
    """A row that the threads of a block hold, quads of columns in turn."""

    def __init__(self, block: Block, columns: int) -> None:
        self.block, self._columns = block, columns
        self._quads = -(-columns // (4 * block.threads))

    def room(self) -> Private:
        """Make room for numbers."""
        return self.block.private(4 * self._quads)

    def each(self, t: Expr, body: Callable[[Expr, int], None]) -> None:
        """Run ``body(column, which of the thread's)`` for the columns of a thread."""
        for i in range(4 * self._quads):
            column = hold(self._quad(i // 4, t) * 4 + i % 4)
            with when(column < self._columns):
                body(column, i)

    def load(self, into: Private, read: Callable[[Expr], Expr]) -> None:
        """Read all columns; zeros follow them."""

        def body(t: Expr) -> None:
            into.fill(t, T.float32(0))
            self.each(t, lambda column, i: into.set(t, read(column), i))

        self.block.phase(body, barrier=False)

    def normalize(self, values: Private, gains: Private, eps: float) -> None:
        """Divide by the root of the mean square and multiply by gains."""
        squares = self.block.private(1)

        def square(t: Expr) -> None:
            squares.set(t, T.float32(0))
            for i in range(values.count):
                squares.add(t, values.get(t, i) * values.get(t, i))

        self.block.phase(square, barrier=False)
        total = self.block.reduce(squares, operator.add, 0.0)

        def scale(t: Expr) -> None:
            factor = hold(T.rsqrt(total() * T.float32(1 / self._columns) + T.float32(eps)))
            for i in range(values.count):
                values.set(t, values.get(t, i) * factor * gains.get(t, i), i)

        self.block.phase(scale, barrier=False)

    def round(self, values: Private, fmt: ActivationFormat, put: Put) -> None:
        """Round to records."""
        for i in range(self._quads):
            quad = partial(self._quad, i)
            round_quads(self.block, values, 4 * i, quad, groups(self._columns), fmt, put)

    def _quad(self, i: int, t: Expr) -> Expr:
        return t + i * self.block.threads


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes a row; ``early`` needs nothing that other kernels write: weights of norms, at most."""

    early: Callable[[], None]
    late: Callable[[], Private]


def _as_it_is(_: Rows, row: Row, inputs: list[Any], at: tuple[Expr, ...], _keep: Keep) -> Maker:
    (x,) = inputs
    values = row.room()

    def late() -> Private:
        row.load(values, lambda column: x[(*at, column)])
        return values

    return Maker(lambda: None, late)


def _normalized(
    norm: Norm, row: Row, inputs: list[Any], at: tuple[Expr, ...], _keep: Keep
) -> Maker:
    x, weight = inputs
    values, gains = row.room(), row.room()

    def late() -> Private:
        row.load(values, lambda column: x[(*at, column)])
        row.normalize(values, gains, norm.eps)
        return values

    return Maker(lambda: row.load(gains, lambda column: weight[column]), late)


def _added(
    residual: Residual, row: Row, inputs: list[Any], at: tuple[Expr, ...], keep: Keep
) -> Maker:
    rest, added, weight, *inner = inputs
    values, terms, gains = row.room(), row.room(), row.room()
    inner_gains = row.room() if inner else gains

    def early() -> None:
        row.load(gains, lambda column: weight[column])
        if inner:
            row.load(inner_gains, lambda column: inner[0][column])

    def late() -> Private:
        row.load(terms, lambda column: added[(*at, column)])
        row.load(values, lambda column: rest[(*at, column)])
        if residual.inner_eps is not None:
            row.normalize(terms, inner_gains, residual.inner_eps)

        def add(t: Expr) -> None:
            for i in range(values.count):
                values.add(t, terms.get(t, i), i)

        def keep_all(t: Expr) -> None:
            row.each(t, lambda column, i: keep(column, values.get(t, i)))

        row.block.phase(add, barrier=False)
        row.block.phase(keep_all, barrier=False)
        row.normalize(values, gains, residual.eps)
        return values

    return Maker(early, late)


def _gated(gate: Gate, row: Row, inputs: list[Any], at: tuple[Expr, ...], _keep: Keep) -> Maker:
    opener, gated = inputs
    values, factors = row.room(), row.room()

    def late() -> Private:
        row.load(values, lambda column: opener[(*at, gate.gate.offset + column)])
        row.load(factors, lambda column: gated[(*at, gate.up.offset + column)])

        def multiply(t: Expr) -> None:
            for i in range(values.count):
                opened = ACTIVATIONS[gate.function](values.get(t, i))
                values.set(t, opened * factors.get(t, i), i)

        row.block.phase(multiply, barrier=False)
        return values

    return Maker(lambda: None, late)


MAKERS: Final[Mapping[type, Callable[..., Maker]]] = {
    Rows: _as_it_is,
    Norm: _normalized,
    Residual: _added,
    Gate: _gated,
}


def round_quads(
    block: Block,
    values: Private,
    first: int,
    quad: Callable[[Expr], Expr],
    count: int | Expr,
    fmt: ActivationFormat,
    put: Put,
) -> None:
    """Round the quad of columns that each thread holds from ``first`` on, of ``count`` groups.

    The 8 threads of a group share its scale and sum.
    """
    peak, scale = block.private(1, "int32"), block.private(1)
    words, totals = block.private(fmt.digits, "int32"), block.private(fmt.digits, "int32")

    def look(t: Expr) -> None:
        peak.set(t, T.int32(0))
        for byte in range(4):
            # The bits of magnitudes order like integers, NaN on top: it ends in the scale.
            bits = T.reinterpret("int32", values.get(t, first + byte)) & 0x7FFFFFFF
            peak.set(t, T.max(peak.get(t), bits))

    def round_all(t: Expr) -> None:
        biggest = hold(T.reinterpret("float32", peak.get(t)))
        small = biggest < T.float32(_TINY)
        scale.set(t, T.Select(small, T.float32(0), biggest / T.float32(fmt.top)))
        # A division, as QuantizeLinear does it: times the inverse, exact halves go the other way.
        divisor = hold(T.Select(small, T.float32(1), scale.get(t)))
        offset = T.reinterpret("int32", hold(T.float32(_ROUND)))
        rest = registers(4, "int32")
        for byte in range(4):
            rounded = hold(values.get(t, first + byte) / divisor + T.float32(_ROUND))
            store(rest, T.reinterpret("int32", rounded) - offset, byte)
        for digit in reversed(range(fmt.digits)):
            # A digit is what is left, over its weight; half of the weight rounds to nearest.
            shift, half = 8 * digit, 1 << 8 * digit >> 1
            words.set(t, T.int32(0), digit)
            totals.set(t, T.int32(0), digit)
            for byte in range(4):
                value = hold(rest[byte] + half >> shift)
                store(rest, rest[byte] - (value << shift), byte)
                totals.add(t, value, digit)
                words.set(t, words.get(t, digit) | (value & 255) << (8 * byte), digit)

    def write(t: Expr) -> None:
        at = hold(quad(t))
        with when(at < count * QUADS):
            for digit in range(fmt.digits):
                line, group = fmt.digits - 1 - digit, at // QUADS
                put(line, group, at % QUADS, words.get(t, digit))
                with when(at % QUADS == 0):
                    weighted = hold(scale.get(t) * T.float32(1 << 8 * digit))
                    put(line, group, WORDS - 2, T.reinterpret("int32", weighted))
                    put(line, group, WORDS - 1, totals.get(t, digit))

    block.phase(look, barrier=False)
    block.across(peak, _GROUP_LANES, T.max)
    block.phase(round_all, barrier=False)
    block.across(totals, _GROUP_LANES, operator.add)
    block.phase(write, barrier=False)
