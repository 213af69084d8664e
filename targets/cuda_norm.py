"""Row kernels for CUDA: RMS norm, layer norm, softmax; what they take is as in ``cpu_norm``.

A block has a run of columns. Its threads take the columns in turn, so that neighbours read
neighbours, and add up through shared memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from mxcompile.targets.cpu_norm import LOWEST, Columns, Runs, int64, param, symbol
from mxcompile.targets.cuda_block import Block, build, hold, launch, store, strided

_THREADS: Final = 128


@dataclass(frozen=True, slots=True)
class CudaNorm:
    """Makes the kernels; ``serial`` ones are for a CPU."""

    serial: bool = False

    def rms_norm(self, runs: Runs, eps: float) -> tirx.PrimFunc:
        """Make ``(x, weight, y)``: ``y = x / sqrt(mean(x^2) + eps) * weight``."""

        def emit(run: _Run) -> None:
            total = run.accumulate(lambda _, c: _square(run.x(c)))
            (weight,) = run.weights
            run.write(
                lambda: _deviation(total(), run.size, eps),
                lambda _, c, factor: run.x(c) * factor * weight(c),
            )

        return self._by_run(runs, ["weight"], emit)

    def layer_norm(self, runs: Runs, eps: float) -> tirx.PrimFunc:
        """Make ``(x, weight, bias, y)``: ``(x - mean) / sqrt(variance + eps) * weight + bias``."""

        def emit(run: _Run) -> None:
            total, means = run.accumulate(lambda _, c: run.x(c)), run.block.private(1)
            run.block.phase(lambda t: means.set(t, _mean(total(), run.size)))
            squares = run.accumulate(lambda t, c: _square(run.x(c) - means.get(t)))
            weight, bias = run.weights
            run.write(
                lambda: _deviation(squares(), run.size, eps),
                lambda t, c, factor: (run.x(c) - means.get(t)) * factor * weight(c) + bias(c),
            )

        return self._by_run(runs, ["weight", "bias"], emit)

    def softmax(self, runs: Runs) -> tirx.PrimFunc:
        """Make ``(x, y)``: ``y = exp(x - max) / sum(exp(x - max))``."""

        def emit(run: _Run) -> None:
            peak, peaks = run.accumulate(lambda _, c: run.x(c), T.max, LOWEST), run.block.private(1)
            run.block.phase(lambda t: peaks.set(t, peak()))
            total = run.accumulate(lambda t, c: T.exp(run.x(c) - peaks.get(t)))
            run.write(
                lambda: T.float32(1.0) / total(),
                lambda t, c, factor: T.exp(run.x(c) - peaks.get(t)) * factor,
            )

        return self._by_run(runs, [], emit)

    def _by_run(
        self, runs: Runs, weights: Sequence[str], emit: Callable[["_Run"], None]
    ) -> tirx.PrimFunc:
        """Make a kernel ``(x, *weights, y)``; ``emit`` handles one run."""

        def body() -> None:
            lead = [symbol(f"n{i}") for i in range(runs.rank - 1)]
            size = runs.size or symbol("size")
            source = runs.source or Columns(size * runs.parts)
            x = param("x", (*lead, source.width))
            shared = [param(name, (size,)) for name in weights]
            y = param("y", (*lead, size * runs.parts))

            def one(block: Block) -> None:
                index = [block.index[0]]
                for dim in reversed([*lead[1:], int64(runs.parts)]):
                    index[:1] = [hold(T.floordiv(index[0], dim)), hold(T.floormod(index[0], dim))]
                *row, part = index
                start = hold(part * size)
                emit(
                    _Run(
                        block,
                        int64(size),
                        lambda c: x[(*row, start + source.offset + c)],
                        lambda c, value: store(y, value, *row, start + c),
                        [w.__getitem__ for w in shared],
                    )
                )

            launch([math.prod(lead, start=int64(runs.parts))], _THREADS, self.serial, one)

        return build(body)


@dataclass(frozen=True)
class _Run:
    """A run of columns that a block treats."""

    block: Block
    size: Expr
    x: Callable[[Expr], Expr]
    put: Callable[[Expr, Expr], None]
    weights: list[Callable[[Expr], Expr]]

    def accumulate(
        self,
        term: Callable[[Expr, Expr], Expr],
        combine: Callable[[Expr, Expr], Expr] = lambda a, b: a + b,
        start: float = 0.0,
    ) -> Callable[[], Expr]:
        """Reduce ``term(thread, column)`` over the columns."""
        values = self.block.private(1)

        def body(t: Expr) -> None:
            values.set(t, T.float32(start))

            def one(c: Expr) -> None:
                values.set(t, combine(values.get(t), term(t, c)))

            strided(t, _THREADS, self.size, one)

        self.block.phase(body)
        return self.block.reduce(values, combine, start)

    def write(self, factor: Callable[[], Expr], value: Callable[[Expr, Expr, Expr], Expr]) -> None:
        """Write ``value(thread, column, factor)`` to every column."""

        def body(t: Expr) -> None:
            shared = hold(factor())
            strided(t, _THREADS, self.size, lambda c: self.put(c, value(t, c, shared)))

        self.block.phase(body)


def _square(value: Expr) -> Expr:
    value = hold(value)
    return value * value


def _mean(total: Expr, size: Expr) -> Expr:
    return total / T.Cast("float32", size)


def _deviation(total: Expr, size: Expr, eps: float) -> Expr:
    return T.float32(1.0) / T.sqrt(_mean(total, size) + T.float32(eps))
