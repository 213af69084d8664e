"""Mixed-bit matmul kernels for CPUs, as TVM functions made from frozen knobs.

Every function takes symbolic shapes: one compiled function serves all sizes. ``G`` is the number
of groups, ``ceil(K / 32)``; ``W`` and ``table`` are the ``data`` and ``table`` of a
``packing.Packed`` of ``tiles`` tiles; ``N`` is at most ``16 * tiles``: the rows that pad the last
tile may be left out. ``W`` starts at a multiple of 64 bytes and its tiles lie in order::

    quantize_activation(X: f32 [M, K], Q: out i8 [M, D * 40 * G])
    normalize_activation(X: f32 [B, S, K], weight: f32 [K], Q: out i8 [B * S, D * 40 * G])
    residual_activation(R: f32 [B, S, K], Y: f32 [B, S, K], weight: f32 [K], [inner: f32 [K],]
                        H: out f32 [B, S, K], Q: out i8 [B * S, D * 40 * G])
    matmul_quantized(Q: i8 [M, D * 40 * G], W: u8 [bytes], table: i32 [tiles, 3],
                     Y: out f32 [M, N])
    matmul_f32(X: f32 [M, K], W: u8 [bytes], table: i32 [tiles, 3], Y: out f32 [M, N])
    gather_rows(ids: i64 [M], W: u8 [bytes], table: i32 [tiles, 3], Y: out f32 [M, K])

A quantized activation ``Q`` has a record of 40 bytes for every group: 32 int8, their scale as
float32, their sum as int32. One stream a row is what lets 8 rows share the registers of a CPU. An
activation of ``D`` digits has ``D`` runs of records a row, from the highest digit, whose scales
hold the digits' weights: the kernel takes them as rows that add up.

Where AVX-512 VNNI multiplies several rows, the weights' codes are the signed operand: the codes of
``Q`` are plus 128, as uint8, and its sums are the low half of a word whose high half is 128.

The inner loops keep a row of the tile in every lane: a vector of 16 words holds 4 codes of 16 rows,
and a dot product of bytes multiplies them by 4 activations that are broadcast. Codes of less than
4 bits are unpacked already shifted to 4, so that zero-points are whole numbers and a group's
``dot(code, x) - zero * sum(x)`` is exact in int32 and, being below 2**24, in float32.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import (
    FORMATS,
    GROUP,
    MIDDLE,
    ZERO_BITS,
    ActivationFormat,
    Format,
    groups,
)
from mxcompile.plan import ROW_TILE
from mxcompile.targets.cpu_norm import (
    Columns,
    Simd,
    build,
    exp,
    hold,
    int64,
    load,
    param,
    prefetch,
    reader,
    registers,
    rms_factor,
    scaled,
    scratch,
    splat,
    spread,
    store,
    symbol,
    tanh,
)
from mxcompile.targets.packing import BLOCK, QUADS, SIDE, VECTOR

Instructions = Literal["avx512vnni", "avxvnni", "avx2", "i8mm", "dotprod", "neon", "generic"]

RECORD: Final = GROUP + 8
"""Bytes of a quantized group of an activation row: codes, scale, sum."""

_ROW_BLOCK: Final = {
    "avx512vnni": 6,
    "avxvnni": 4,
    "avx2": 4,
    "i8mm": 4,
    "dotprod": 4,
    "neon": 2,
    "generic": 4,
}

LINES: Final = 4
"""Cache lines of each tile's next block that a block of activation rows asks for."""

_COSTLY: Final = 8
"""Groups of an activation function take so many times as long as groups that are rounded only."""

_TINY: Final = 2.0**-120
"""Groups whose magnitudes are all below are taken for 0: their scale has no finite inverse."""

_ROUND: Final = 1.5 * 2.0**23
"""Added to a float of magnitude below 2**22, leaves it rounded half to even in the low bits."""


def activation_bytes(columns: int, fmt: ActivationFormat) -> int:
    """The bytes of a quantized activation row."""
    return groups(columns) * RECORD * fmt.digits


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a layout's inner loops can be tuned by; results do not depend on it.

    Attributes:
        row_block: Activation rows that share the unpacked codes; 0 takes what registers hold. Where
            tiles of all layouts are multiplied in pairs, the largest that any layout has.
        prefetch: How many bytes ahead one row's product asks for the weights that it streams in,
            which the hardware alone follows at half its speed; 0 leaves it to the hardware.
    """

    row_block: int = 0
    prefetch: int = 8192


@dataclass(frozen=True, slots=True)
class Gate:
    """``act(gate) * up`` of ``size`` columns each, and where in their rows these lie.

    The function is gelu in its tanh form (arXiv 1606.08415) or silu, ``x sigmoid(x)``.
    """

    function: Literal["gelu_tanh", "silu"]
    size: int
    gate: Columns
    up: Columns


@dataclass(frozen=True, slots=True)
class Rows:
    """``X`` as it is."""

    columns: int


@dataclass(frozen=True, slots=True)
class Norm:
    """``X / sqrt(mean(X^2) + eps) * weight``."""

    columns: int
    eps: float


@dataclass(frozen=True, slots=True)
class Residual:
    """The norm of ``H = R + Y``; ``Y`` is normalized first where that has an eps."""

    columns: int
    eps: float
    inner_eps: float | None


Source = Rows | Norm | Residual | Gate
"""What rows that are rounded are made of; their columns are known."""


@dataclass(frozen=True, slots=True)
class MatmulKernel:
    """The knobs of the kernels of one target; methods make the functions.

    Every tile's layout has a branch of its own in a function, so layouts are tuned apart and share
    one function for all shapes. A shape with other knobs takes another function, made of another
    ``MatmulKernel``: hundreds of kilobytes of code, worth it only where it was measured to be.

    Attributes:
        instructions: Multiply bytes; "generic" is portable arithmetic, for any target of LLVM.
        formats: The formats that tiles can have; tiles of other layouts are skipped.
        knobs: Pairs of a format and what is not the default for its layout.
        serial_groups: Work on fewer groups than that is not worth waking threads for.
        jobs: Shares that one row's work is cut in: a multiple of most numbers of threads.
        chunk: Activation rows that all tiles are multiplied with in turn: few enough to stay in a
            cache.
    """

    instructions: Instructions = "generic"
    formats: tuple[str, ...] = tuple(FORMATS)
    knobs: tuple[tuple[str, Knobs], ...] = ()
    serial_groups: int = 1024
    jobs: int = 48
    chunk: int = 128

    def knobs_of(self, fmt: Format) -> Knobs:
        """The knobs of a format's layout, with the target's row block where none is set."""
        known = {FORMATS[name].layout: knobs for name, knobs in self.knobs}
        found = known.get(fmt.layout, Knobs())
        return replace(found, row_block=found.row_block or _ROW_BLOCK[self.instructions])

    def only(self, formats: tuple[str, ...]) -> "MatmulKernel":
        """The same kernels for fewer formats."""
        return replace(self, formats=formats)

    def quantize_activation(self, fmt: ActivationFormat) -> PrimFunc:
        """Rounds every group of 32 activations half to even to its absmax / top."""

        def emit() -> None:
            m, k, q = map(symbol, "mkq")
            x, codes = param("X", (m, k)), param("Q", (m, q), "int8")
            spread(
                m,
                m * (k // GROUP) < self.serial_groups,
                self._rounding(codes, k, fmt, lambda row: reader(x, row)),
            )

        return build(emit)

    def normalize_activation(self, norm: Norm, fmt: ActivationFormat) -> PrimFunc:
        """Rounds ``X / sqrt(mean(X^2) + eps) * weight`` as ``quantize_activation`` does.

        What the norm gives is not written to memory.
        """

        def emit() -> None:
            b, s, k, m, q = map(symbol, "bskmq")
            x, weight = param("X", (b, s, k)), param("weight", (k,))
            codes = param("Q", (m, q), "int8")

            def normalized(row: Expr) -> _Columns:
                read = reader(x, row // s, row % s)
                return scaled(read, rms_factor(read, k, norm.eps, Simd(ROW_TILE)), weight)

            rounding = self._rounding(codes, k, fmt, normalized)
            spread(b * s, b * s * (k // GROUP) < self.serial_groups, rounding)

        return build(emit)

    def residual_activation(self, residual: Residual, fmt: ActivationFormat) -> PrimFunc:
        """``H = R + Y``, whose norm is rounded; ``Y`` is normalized first where it has an eps."""

        def emit() -> None:
            b, s, k, m, q = map(symbol, "bskmq")
            eps, inner_eps = residual.eps, residual.inner_eps
            rest, added, weight = (
                param("R", (b, s, k)),
                param("Y", (b, s, k)),
                param("weight", (k,)),
            )
            inner = None if inner_eps is None else param("inner", (k,))
            total, codes = param("H", (b, s, k)), param("Q", (m, q), "int8")
            simd = Simd(ROW_TILE)

            def normalized(row: Expr) -> _Columns:
                at = row // s, row % s
                term = reader(added, *at)
                if inner is not None and inner_eps is not None:
                    term = scaled(term, rms_factor(term, k, inner_eps, simd), inner)
                read = reader(rest, *at)

                def add(column: int | Expr, lanes: int) -> Expr:
                    value = hold(read(column, lanes) + term(column, lanes))
                    store(total, value, *at, column)
                    return value

                return scaled(reader(total, *at), rms_factor(add, k, eps, simd), weight)

            rounding = self._rounding(codes, k, fmt, normalized)
            spread(b * s, b * s * (k // GROUP) < self.serial_groups, rounding)

        return build(emit)

    def gate_activation(self, gate: Gate, fmt: ActivationFormat) -> PrimFunc:
        """Rounds ``act(G) * U``; G and U may be columns of one tensor, which is passed twice."""

        def emit() -> None:
            b, s, m, q = map(symbol, "bsmq")
            opener, gated = param("G", (b, s, gate.gate.width)), param("U", (b, s, gate.up.width))
            codes = param("Q", (m, q), "int8")

            def product(row: Expr) -> _Columns:
                g, u = (reader(x, row // s, row % s) for x in (opener, gated))

                def value(column: int | Expr, lanes: int) -> Expr:
                    x = hold(g(gate.gate.offset + column, lanes))
                    return hold(_ACTIVATIONS[gate.function](x) * u(gate.up.offset + column, lanes))

                return value

            count = gate.size // GROUP
            rounding = self._rounding(codes, int64(gate.size), fmt, product)
            spread(b * s, b * s * count < self.serial_groups // _COSTLY, rounding)

        return build(emit)

    def _rounding(
        self, codes: Any, k: Expr, fmt: ActivationFormat, source: Callable[[Expr], "_Columns"]
    ) -> Callable[[Expr], None]:
        """What rounds row after row of what ``source`` gives to ``codes``."""
        flip = T.int8(0)
        if self.instructions == "avx512vnni":
            flip = hold(T.Select(codes.shape[0] > 1, T.int8(-128), T.int8(0)))

        def quantize(row: Expr) -> None:
            x = source(row)
            with T.serial(0, k // GROUP) as g:
                halves = [x(g * GROUP + i, ROW_TILE) for i in (0, ROW_TILE)]
                _quantize_group(halves, fmt, flip, codes, row, g * RECORD)
            with _when(k % GROUP != 0):
                tail = registers(2, ROW_TILE)
                start = hold(k // GROUP * GROUP)
                for i in (0, 1):
                    with T.serial(0, T.min(k - start - i * ROW_TILE, ROW_TILE)) as j:
                        store(tail[i], x(start + i * ROW_TILE + j, 1), j)
                halves = [load(half, 0, lanes=ROW_TILE) for half in tail]
                _quantize_group(halves, fmt, flip, codes, row, k // GROUP * RECORD)

        return quantize

    def matmul_rounded(self, source: Source, fmt: ActivationFormat) -> None:
        """Rounding is a kernel of its own: its result is read by all threads."""

    def matmul_quantized(self, fmt: ActivationFormat) -> PrimFunc:
        """Y = Q @ W.T with exact integer sums inside a group, for each digit."""

        def emit() -> None:
            m, n, q = map(symbol, "mnq")
            codes, weight = param("Q", (m, q), "int8"), self._declare()
            y = param("Y", (m, n))

            def block(tile: "_Tile", t: Expr, row: Expr, rows: int) -> None:
                self._quantized_block(tile, codes, fmt.digits, y, t, row, rows)

            def sizes(*known: Format) -> list[int]:
                rows = max(self.knobs_of(each).row_block for each in known)
                return _sizes(max(1, rows // fmt.digits))

            count = q // (RECORD * fmt.digits)
            if self.instructions != "avx512vnni":
                self._all_tiles(weight, m, count, sizes, block)
                return
            with T.If(m == 1):
                with T.Then():
                    self._one_row(weight, count, block)
                with T.Else():
                    self._pairs_of_tiles(weight, codes, y, count, sizes(*weight.known), fmt.digits)

        return build(emit)

    def matmul_f32(self) -> PrimFunc:
        """Y = X @ W.T in float32, with weights that are dequantized in registers."""

        def emit() -> None:
            m, n, k = map(symbol, "mnk")
            x, weight = param("X", (m, k)), self._declare()
            y = param("Y", (m, n))

            def block(tile: "_Tile", t: Expr, row: Expr, rows: int) -> None:
                _f32_block(tile, x, y, t, row, rows)

            def sizes(*known: Format) -> list[int]:
                return [self.knobs_of(known[0]).row_block, 1]

            self._all_tiles(weight, m, (k + GROUP - 1) // GROUP, sizes, block)

        return build(emit)

    def gather_rows(self) -> PrimFunc:
        """Y = W[ids], dequantized; an id past either end reads the nearest row."""

        def emit() -> None:
            m, k = map(symbol, "mk")
            ids, weight = param("ids", (m,), "int64"), self._declare()
            y = param("Y", (m, k))

            def gather(i: Expr) -> None:
                row = hold(
                    T.max(T.min(load(ids, i, lanes=1), weight.tiles * ROW_TILE - 1), T.int64(0))
                )
                for tile in weight.formats(
                    self.instructions, row // ROW_TILE, (k + GROUP - 1) // GROUP, row % ROW_TILE
                ):
                    _gather_row(tile, y, i)

            spread(m, m * (k // GROUP) < self.serial_groups, gather)

        return build(emit)

    def _declare(self) -> "_Weight":
        layouts = {(fmt := FORMATS[name]).layout: fmt for name in self.formats}
        return _Weight.declare(tuple(layouts.values()))

    def _all_tiles(
        self, weight: "_Weight", m: Expr, count: Expr, sizes: "_Sizes", block: "_Block"
    ) -> None:
        """Run ``block`` for every tile and block of activation rows, on all threads.

        Blocks have as many rows as the first of the sizes, the remainder's as the others.
        """
        with T.If(m == 1):
            with T.Then():
                self._one_row(weight, count, block)
            with T.Else(), self._chunks(m) as (first, length), T.parallel(0, weight.tiles) as t:
                for tile in weight.formats(self.instructions, t, count):
                    done: Expr = T.int64(0)
                    for rows in sizes(tile.fmt):
                        with T.serial(0, (length - done) // rows) as i:
                            block(tile, t, first + done + i * rows, rows)
                        done = hold(done + (length - done) // rows * rows)

    def _one_row(self, weight: "_Weight", count: Expr, block: "_Block") -> None:
        """Run ``block`` for every tile and one activation row.

        It costs what the weights take to stream in: threads get equal bytes, not equal tiles.
        """

        def gemv(t: Expr) -> None:
            for tile in weight.formats(self.instructions, t, count):
                block(tile, t, T.int64(0), 1)

        with T.If(weight.tiles * count < self.serial_groups):
            with T.Then(), T.serial(0, weight.tiles) as t:
                gemv(t)
            with T.Else(), T.parallel(0, self.jobs) as job, weight.share(job, self.jobs) as t:
                gemv(t)

    @contextmanager
    def _chunks(self, m: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Loop over runs of activation rows: the first row and the number of rows of each."""
        with T.serial(0, (m + self.chunk - 1) // self.chunk) as chunk:
            first = hold(chunk * self.chunk)
            yield first, hold(T.min(m - first, T.int64(self.chunk)))

    def _pairs_of_tiles(
        self,
        weight: "_Weight",
        codes: Any,
        y: Any,
        count: Expr,
        sizes: Sequence[int],
        digits: int,
    ) -> None:
        """Multiply many rows with two tiles at a time, of any formats, for AVX-512 VNNI.

        A dot product that reads its activations as it goes is bound by these loads; here each word
        of activations is loaded once for two tiles. Both are unpacked to bytes a block of groups at
        a time, once for all rows of a chunk.
        """
        m, n = y.shape
        with self._chunks(m) as (first, length), T.parallel(0, (weight.tiles + 1) // 2) as pair:
            sums = scratch(self.chunk, 2, ROW_TILE)
            block = _Unpacked.scratch()
            with T.grid(length, 2) as (r, side):
                store(sums, T.broadcast(T.float32(0), ROW_TILE), r, side, 0)
            with T.serial(0, count // BLOCK + 1) as index:
                for side in (0, 1):
                    t = hold(T.min(pair * 2 + side, weight.tiles - 1))
                    for tile in weight.formats(self.instructions, t, count):
                        # Many rows leave time to ask for the next block while they are multiplied.
                        ahead = self.knobs_of(tile.fmt).prefetch
                        ahead = hold(T.Select(length > 2 * sizes[0], T.int64(0), T.int64(ahead)))
                        block.unpack(tile, index, side, ahead)
                for offsets in {_has_offset(fmt) for fmt in weight.known}:
                    with _when(block.have_offsets(offsets)):
                        done: Expr = T.int64(0)
                        for rows in sizes:
                            with T.serial(0, (length - done) // rows) as i:
                                block.prefetch(weight.data, i)
                                row = hold(done + i * rows)
                                block.multiply(
                                    codes, first, row, index, count, rows, digits, sums, offsets
                                )
                            done = hold(done + (length - done) // rows * rows)
            with T.grid(length, T.min(n - pair * 2 * ROW_TILE, 2 * ROW_TILE)) as (r, column):
                value = load(sums, r, column // ROW_TILE, column % ROW_TILE, lanes=1)
                store(y, value, first + r, pair * 2 * ROW_TILE + column)

    def _quantized_block(
        self, tile: "_Tile", codes: Any, digits: int, y: Any, t: Expr, row: Expr, rows: int
    ) -> None:
        sums = [_Register("float32x16", 0) for _ in range(rows)]
        ahead = self.knobs_of(tile.fmt).prefetch if rows == 1 else 0
        with tile.groups(T.int64(ahead) if ahead else None) as group:

            def at_record(r: int) -> tuple[Expr, Expr]:
                """Where the record of the ``r``-th pair of a row and a digit starts."""
                run = r % digits * (codes.shape[1] // digits)
                return row + r // digits, run + group.index * RECORD

            def word(r: int, at: int | Expr, count: int = 1) -> Expr:
                """Words of 4 bytes of the ``r``-th record, from the byte ``at``."""
                i, start = at_record(r)
                dtype = "int32" if count == 1 else f"int32x{count}"
                return T.reinterpret(dtype, load(codes, i, start + at, lanes=4 * count))

            zeros, scales = hold(group.zeros()), hold(group.scales())

            def offset(r: int) -> Expr:
                """What zero-points add to the ``r``-th dot product."""
                i, start = at_record(r)
                # The sum fits its low half, and LLVM multiplies 16 bits faster than 32.
                low = load(codes, i, start + GROUP + 4, lanes=2)
                return zeros * T.cast(T.int16(0) - T.reinterpret("int16", low), "int32")

            dots = _DOTS[self.instructions](group, rows * digits, word, offset)
            for r, dot in enumerate(dots):
                scale = T.reinterpret("float32", word(r, GROUP))
                total = sums[r // digits]
                total.set(total.get() + T.cast(dot, "float32x16") * scale * scales)
        _store_block(tile, y, t, row, sums)


@dataclass(frozen=True, slots=True)
class _Unpacked:
    """A block of groups of two tiles, as bytes: what a run of activation rows is multiplied with.

    Codes are signed: less their zero-point, so that nothing is left to do for each row. Where that
    takes more than 8 bits they are less 128, and the rest times the sum of a row's activations
    comes on top. Activations are stored plus 128, which is undone by -128 times the sum of codes.

    Attributes:
        codes: int8 [groups, quads, tiles, 64].
        starts: -128 times the sum of codes: int32 [groups, tiles, 16].
        offsets: In the low halves of words 128 less the zero-point, or 0, in the high halves the
            negated sum of codes: int32 [groups, tiles, 16].
        scales: Scales times row scales, which is exact: float32 [groups, tiles, 16].
        flags: Whether each tile has offsets: int32 [tiles].
        nexts: Where each tile's next block lies: int64 [tiles].
    """

    codes: Any
    starts: Any
    offsets: Any
    scales: Any
    flags: Any
    nexts: Any

    @classmethod
    def scratch(cls) -> "_Unpacked":
        """Room for a block."""
        return cls(
            scratch(BLOCK, QUADS, 2, VECTOR, dtype="int8"),
            scratch(BLOCK, 2, ROW_TILE, dtype="int32"),
            scratch(BLOCK, 2, ROW_TILE, dtype="int32"),
            scratch(BLOCK, 2, ROW_TILE),
            scratch(2, dtype="int32"),
            scratch(2, dtype="int64"),
        )

    def have_offsets(self, wanted: bool) -> Expr:
        """Whether any of the tiles has offsets, or else whether none has."""
        count = load(self.flags, 0, lanes=1) + load(self.flags, 1, lanes=1)
        return count > 0 if wanted else count == 0

    def unpack(self, tile: "_Tile", index: Expr, side: int, ahead: Expr) -> None:
        """Fill in a tile's block."""
        offset = _has_offset(tile.fmt)
        store(self.flags, T.int32(offset), side)
        store(self.nexts, tile.start(index + 1), side)
        row_scales = hold(tile.row_scales())
        with tile.block(index, ahead) as (i, group):
            zeros = hold(group.zeros())
            by_byte = T.reinterpret("uint8x64", zeros * T.int32(0x01010101))
            total = _Register("int32x16", 0)
            for quad in range(QUADS):
                codes = T.reinterpret("uint8x64", group.quad(quad, flip=0x80 if offset else 0))
                signed = hold(T.reinterpret("int8x64", codes if offset else codes - by_byte))
                store(self.codes, signed, i, quad, side, 0)
                ones = T.broadcast(T.uint8(1), VECTOR)
                total.set(_vnni("vpdpbusd", "int32x16", total.get(), ones, signed))
            negative = hold(T.int32(0) - total.get())
            store(self.starts, negative << 7, i, side, 0)
            rest = (T.int32(128) - zeros) & T.int32(0xFFFF) if offset else T.int32(0)
            store(self.offsets, negative << 16 | rest, i, side, 0)
            store(self.scales, group.scales() * row_scales, i, side, 0)

    def prefetch(self, data: Any, turn: Expr) -> None:
        """Ask for a part of the next blocks: some turns get all of them."""
        for side in (0, 1):
            _prefetch(data, load(self.nexts, side, lanes=1) + turn * (LINES * VECTOR), LINES)

    def multiply(
        self,
        codes: Any,
        first: Expr,
        row: Expr,
        index: Expr,
        count: Expr,
        rows: int,
        digits: int,
        sums: Any,
        offsets: bool,
    ) -> None:
        """Add the products with ``rows`` activation rows to ``sums``, from row ``row`` of it on."""
        rest = hold(count % BLOCK)
        start = hold(T.Select(index == 0, T.int64(0), (index - 1) * BLOCK + rest))
        totals = [[_Register("float32x16") for _ in (0, 1)] for _ in range(rows)]
        for r, total in enumerate(totals):
            for side in (0, 1):
                total[side].set(load(sums, row + r, side, 0, lanes=ROW_TILE))
        with T.serial(0, T.Select(index == 0, rest, T.int64(BLOCK))) as i:

            def word(r: int, at: int, dtype: str) -> Expr:
                """A word of the ``r``-th pair of a row and a digit, in all lanes."""
                run = r % digits * (codes.shape[1] // digits)
                at_word = run + (start + i) * RECORD + at
                value = load(codes, first + row + r // digits, at_word, lanes=4)
                return T.reinterpret(dtype, hold(T.broadcast(T.reinterpret("int32", value), 16)))

            def of_sides(part: Any) -> list[Expr]:
                return [hold(load(part, i, side, 0, lanes=ROW_TILE)) for side in (0, 1)]

            starts = of_sides(self.offsets if offsets else self.starts)
            scales = of_sides(self.scales)
            dots = [[_Register("int32x16") for _ in (0, 1)] for _ in range(rows * digits)]
            for r, dot in enumerate(dots):
                for side in (0, 1):
                    value = starts[side]
                    if offsets:
                        parts = T.reinterpret("int16x32", value), word(r, GROUP + 4, "int16x32")
                        value = _vnni("pmaddw.d", "int32x16", *parts)
                    dot[side].set(value)
            for quad in range(QUADS):
                both = [hold(load(self.codes, i, quad, side, 0, lanes=VECTOR)) for side in (0, 1)]
                for r, dot in enumerate(dots):
                    x = word(r, 4 * quad, "uint8x64")
                    for side in (0, 1):
                        args = dot[side].get(), x, both[side]
                        dot[side].set(_vnni("vpdpbusd", "int32x16", *args))
            for r, dot in enumerate(dots):
                scale = word(r, GROUP, "float32x16")
                for side, y_sum in enumerate(totals[r // digits]):
                    value = T.cast(dot[side].get(), "float32x16") * scale
                    y_sum.set(y_sum.get() + value * scales[side])
        for r, total in enumerate(totals):
            for side in (0, 1):
                store(sums, total[side].get(), row + r, side, 0)


def _has_offset(fmt: Format) -> bool:
    """Whether codes less their zero-points take more than 8 bits."""
    return fmt.value_bits == 8 and not fmt.centred


def _vnni(name: str, dtype: str, *operands: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, f"llvm.x86.avx512.{name}.512", *operands)


def _sizes(largest: int) -> list[int]:
    """Rows of blocks: the largest, and powers of 2 for what is left over."""
    return [largest, *(1 << i for i in reversed(range((largest - 1).bit_length())))]


def _f32_block(tile: "_Tile", x: Any, y: Any, t: Expr, row: Expr, rows: int) -> None:
    # A dot product is a chain of dependent additions: few rows need several to fill the pipeline.
    chains = max(1, 4 // rows)
    sums = [_Register("float32x16", 0) for _ in range(rows)]
    with tile.groups() as group:
        start, width = group.columns(x.shape[1])
        zeros = hold(group.float_zeros())
        dots = [[_Register("float32x16", 0) for _ in range(chains)] for _ in range(rows)]

        def add(column: Expr, codes: Expr, chain: int) -> None:
            values = hold(group.values(codes, zeros))
            for r in range(rows):
                dot = dots[r][chain]
                dot.set(dot.get() + values * load(x, row + r, start + column, lanes=1))

        with T.serial(0, width // 4) as quad:
            codes = hold(group.quad(quad))
            for i in range(4):
                add(quad * 4 + i, codes >> T.uint32(8 * i), i % chains)
        with T.serial(width // 4 * 4, width) as column:
            add(column, group.quad(column // 4) >> T.cast(column % 4 * 8, "uint32"), 0)
        scales = hold(group.scales())
        for total, by_row in zip(sums, dots, strict=True):
            dot = by_row[0].get()
            for chain in by_row[1:]:
                dot = dot + chain.get()
            total.set(total.get() + dot * scales)
    _store_block(tile, y, t, row, sums)


def _gather_row(tile: "_Tile", y: Any, i: Expr) -> None:
    row_scale = hold(tile.row_scales())
    with tile.groups() as group:
        start, width = group.columns(y.shape[1])
        # At most 9 by 8 bits, so exact: only the product with the row scale is rounded.
        scale, zeros = hold(group.scales()), hold(group.float_zeros())
        with T.serial(0, width // 4) as quad:
            codes = T.broadcast(group.quad(quad), 4) >> T.cast(T.ramp(0, 8, 4), "uint32x4")
            store(y, group.values(codes, zeros) * scale * row_scale, i, start + quad * 4)
        with T.serial(width // 4 * 4, width) as column:
            codes = group.quad(column // 4) >> T.cast(column % 4 * 8, "uint32")
            store(y, group.values(codes, zeros) * scale * row_scale, i, start + column)


def _store_block(tile: "_Tile", y: Any, t: Expr, row: Expr, sums: list["_Register"]) -> None:
    """Store sums times row scales, of the last tile only the rows that y has."""
    n, scales = y.shape[1], hold(tile.row_scales())
    with T.If(t * ROW_TILE + ROW_TILE <= n):
        with T.Then():
            for r, total in enumerate(sums):
                store(y, total.get() * scales, row + r, t * ROW_TILE)
        with T.Else():
            out = scratch(len(sums), ROW_TILE)
            for r, total in enumerate(sums):
                store(out, total.get() * scales, r, 0)
            with T.grid(len(sums), n - t * ROW_TILE) as (r, i):
                store(y, load(out, r, i, lanes=1), row + r, t * ROW_TILE + i)


def _quantize_group(
    halves: list[Expr], fmt: ActivationFormat, flip: Expr, codes: Any, row: Expr, start: Expr
) -> None:
    """Quantize and store a group, the bits ``flip`` of its codes inverted."""
    halves = [hold(half) for half in halves]
    # The bits of magnitudes order like integers, NaN on top: it ends in the scale, is not hidden.
    bits = [T.reinterpret("int32x16", half) & 0x7FFFFFFF for half in halves]
    biggest = hold(T.reinterpret("float32", _reduce("smax", T.max(*bits))))
    small = biggest < T.float32(_TINY)
    scale = hold(T.Select(small, T.float32(0), biggest / T.float32(fmt.top)))
    # A division, as QuantizeLinear does it: times the inverse, exact halves round the other way.
    divisor = hold(T.Select(small, T.float32(1), scale))
    offset = T.reinterpret("int32", T.float32(_ROUND))
    quantized = [
        hold(T.reinterpret("int32x16", half / divisor + T.float32(_ROUND)) - offset)
        for half in halves
    ]
    for digit in reversed(range(fmt.digits)):
        # A digit is what is left, over its weight; half of the weight rounds to nearest.
        shift, half = 8 * digit, 1 << 8 * digit >> 1
        values = [hold(rest + half >> shift) for rest in quantized]
        quantized = [hold(r - (v << shift)) for r, v in zip(quantized, values, strict=True)]
        for i, value in enumerate(values):
            code = T.cast(value, "int8x16") ^ T.broadcast(flip, ROW_TILE)
            store(codes, code, row, start + i * ROW_TILE)
        total = hold(_reduce("add", values[0] + values[1]))
        total = T.Select(flip == 0, total, total & 0xFFFF | 128 << 16)
        for i, word in enumerate((scale * T.float32(1 << shift), total)):
            store(codes, T.reinterpret("int8x4", word), row, start + GROUP + 4 * i)
        start = start + codes.shape[1] // fmt.digits


def _reduce(operation: str, vector: Expr) -> Expr:
    return T.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{operation}", vector)


_Columns = Callable[[int | Expr, int], Expr]
"""Reads some columns of a row, from one on."""


def _gelu_tanh(x: Expr) -> Expr:
    lanes = x.ty.dtype.lanes
    inner = x + splat(0.044715, lanes) * x * x * x
    return (
        splat(0.5, lanes)
        * x
        * (splat(1, lanes) + tanh(splat(math.sqrt(2 / math.pi), lanes) * inner))
    )


def _silu(x: Expr) -> Expr:
    one = splat(1, x.ty.dtype.lanes)
    return x / (one + exp(splat(0, x.ty.dtype.lanes) - x))


_ACTIVATIONS: Final = {"gelu_tanh": _gelu_tanh, "silu": _silu}

_Sizes = Callable[[Format], Sequence[int]]
"""The rows of the blocks that activations are cut in for a format, the largest first."""

_Block = Callable[["_Tile", Expr, Expr, int], None]
"""Emits a tile's product with some activation rows: tile, its index, first row, rows."""


class _Word(Protocol):
    """Reads words from a byte of an activation row's record on, as int32."""

    def __call__(self, r: int, at: int | Expr, count: int = 1) -> Expr: ...


_Offset = Callable[[int], Expr]
"""What the zero-points of a group add to the dot product with an activation row."""


def _dots_vnni(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    # A row's dot products wait for each other; many rows fill the pipeline, one takes two sums.
    chains = 2 if rows == 1 else 1
    dots = [[_Register("int32x16", 0) for _ in range(chains)] for _ in range(rows)]
    for r, (first, *_) in enumerate(dots):
        first.set(offset(r))
    for quad in range(QUADS):
        codes = T.reinterpret("uint8x64", hold(group.quad(quad)))
        for r, sums in enumerate(dots):
            dot = sums[(quad + 1) % chains]
            x = T.reinterpret("int8x64", T.broadcast(word(r, 4 * quad), ROW_TILE))
            dot.set(_vnni("vpdpbusd", "int32x16", dot.get(), codes, x))
    return [functools.reduce(operator.add, (dot.get() for dot in sums)) for sums in dots]


def _dots_avx2(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    """Sums pairs of products in int16, and those of several quads before they are widened.

    A pair is at most ``2 * 127 * top`` for codes up to ``top``. At 4 bits and less the 8 quads of a
    group fit, as ``8 * 2 * 127 * 15 = 30480``; at 5 bits 4 quads and at 6 bits 2. At 8 bits not
    even one pair does: high and low nibbles are summed apart, and widening weighs them.
    """
    fmt = group.tile.fmt
    nibbles = [(0, 1), (4, 16)] if fmt.value_bits == 8 else [(0, 1)]
    top = 15 if fmt.value_bits == 8 else fmt.top << group.tile.shift
    step = min(QUADS, 32767 // (2 * 127 * top))
    dots = [_Register("int32x16") for _ in range(rows)]
    for first in range(0, QUADS, step):
        sums = [[_Register("int16x32") for _ in nibbles] for _ in dots]
        for quad in range(first, first + step):
            codes = hold(group.quad(quad))
            parts = [codes]
            if fmt.value_bits == 8:
                parts = [hold(codes >> _u32(shift) & _u32(0x0F0F0F0F)) for shift, _ in nibbles]
            for r, by_nibble in enumerate(sums):
                x = T.reinterpret("int8x64", T.broadcast(word(r, 4 * quad), ROW_TILE))
                for total, part in zip(by_nibble, parts, strict=True):
                    pairs = _by_halves("pmadd.ub.sw", "int16", T.reinterpret("uint8x64", part), x)
                    if quad > first:
                        # Nothing saturates, but plain sums LLVM turns into trees that spill.
                        name = "llvm.sadd.sat"
                        pairs = T.call_llvm_pure_intrin("int16x32", name, total.get(), pairs)
                    total.set(pairs)
        for r, by_nibble in enumerate(sums):
            value = dots[r].get() if first else offset(r)
            for total, (_, weight) in zip(by_nibble, nibbles, strict=True):
                weights = T.broadcast(T.int16(weight), 2 * ROW_TILE)
                value = value + _by_halves("pmadd.wd", "int32", total.get(), weights)
            dots[r].set(value)
    return [dot.get() for dot in dots]


def _by_halves(name: str, dtype: str, *operands: Expr, shrink: int = 2) -> Expr:
    """An AVX2 operation on operands of 64 bytes, as two on 32; lanes become fewer by ``shrink``."""

    def half(vector: Expr, index: int) -> Expr:
        lanes = vector.ty.dtype.lanes // 2
        return T.Shuffle([vector], list(range(index * lanes, (index + 1) * lanes)))

    lanes = operands[0].ty.dtype.lanes // (2 * shrink)
    results = [
        T.call_llvm_pure_intrin(
            f"{dtype}x{lanes}", f"llvm.x86.avx2.{name}", *(half(o, index) for o in operands)
        )
        for index in (0, 1)
    ]
    return T.Shuffle(results, list(range(2 * lanes)))


def _dots_avxvnni(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    dots = [_Register("int32x16") for _ in range(rows)]
    for r, dot in enumerate(dots):
        dot.set(offset(r))
    for quad in range(QUADS):
        codes = T.reinterpret("uint8x64", hold(group.quad(quad)))
        for r, dot in enumerate(dots):
            x = T.reinterpret("int8x32", T.broadcast(word(r, 4 * quad), ROW_TILE // 2))
            parts = zip(_parts(dot.get(), 2), _parts(codes, 2), strict=True)
            dot.set(_join([_call("x86.avx512.vpdpbusd.256", "int32x8", *p, x) for p in parts]))
    return [dot.get() for dot in dots]


def _dots_dotprod(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    """Signed products, each with one of the 4 quads of activations that a register holds."""
    dots = [_Register("int32x16") for _ in range(rows)]
    for r, dot in enumerate(dots):
        dot.set(_signed_offset(group, word, offset, r))
    for half in range(0, QUADS, 4):
        x = [hold(word(r, 4 * half, 4)) for r in range(rows)]
        for i in range(4):
            codes = T.reinterpret("int8x64", hold(_signed_quad(group, half + i)))
            for dot, words in zip(dots, x, strict=True):
                dot.set(_by_quarters("sdot", dot.get(), codes, words, i))
    return [dot.get() for dot in dots]


def _dots_i8mm(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    """Two activation rows at once: products of 2 x 8 codes with 8 x 2 activations.

    An odd row is its own partner.
    """
    dots = [_Register("int32x16") for _ in range(rows)]
    if rows == 1:
        dots[0].set(offset(0))
        for half in range(0, QUADS, 4):
            x = hold(word(0, 4 * half, 4))
            for i in range(4):
                codes = T.reinterpret("int8x64", hold(group.quad(half + i, _unpack_bytes)))
                dots[0].set(_by_quarters("usdot", dots[0].get(), codes, x, i))
        return [dots[0].get()]
    pairs = [_Register("int32x32", 0) for _ in range((rows + 1) // 2)]
    for half in range(0, QUADS, 4):
        x = [hold(word(r, 4 * half, 4)) for r in range(rows)]
        for i in (0, 2):
            quads = (group.quad(half + i + j, _unpack_bytes) for j in (0, 1))
            left, right = (_parts(hold(quad), 4) for quad in quads)
            # A register of each has 4 rows of 4 codes; these have 2 rows of 8.
            codes = [
                T.reinterpret(
                    "int8x16", hold(T.Shuffle([a, b], [first, first + 4, first + 1, first + 5]))
                )
                for a, b in zip(left, right, strict=True)
                for first in (0, 2)
            ]
            for p, pair in enumerate(pairs):
                both = T.Shuffle([x[2 * p], x[min(2 * p + 1, rows - 1)]], [i, i + 1, i + 4, i + 5])
                both = T.reinterpret("int8x16", hold(both))
                sums = zip(_parts(pair.get(), 8), codes, strict=True)
                pair.set(_join([_call("aarch64.neon.usmmla", "int32x4", *s, both) for s in sums]))
    for r, dot in enumerate(dots):
        own = T.Shuffle([pairs[r // 2].get()], list(range(r % 2, 2 * ROW_TILE, 2)))
        dot.set(own + offset(r))
    return [dot.get() for dot in dots]


def _dots_neon(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    """Sums products of several quads in int16, then pairs of those in int32.

    Activations run from -128, as low digits do. Codes up to 31 let all 8 quads of a group fit, as
    ``8 * 128 * 31 = 31744``; at 6 bits 4 quads do, and at 8 bits, where codes run from -128, one.
    """
    fmt = group.tile.fmt
    top = 128 if fmt.value_bits == 8 else fmt.top << group.tile.shift
    step = min(QUADS, 32767 // (128 * top))
    pairs = [_Register("int32x32", 0) for _ in range(rows)]
    for first in range(0, QUADS, step):
        sums = [_Register("int16x64") for _ in range(rows)]
        for quad in range(first, first + step):
            codes = T.reinterpret("int8x64", hold(_signed_quad(group, quad)))
            for r, total in enumerate(sums):
                x = T.reinterpret("int8x8", T.broadcast(word(r, 4 * quad), 2))
                products = [_call("aarch64.neon.smull", "int16x8", c, x) for c in _parts(codes, 8)]
                product = _join(products)
                total.set(total.get() + product if quad > first else product)
        for pair, total in zip(pairs, sums, strict=True):
            added = [_call("aarch64.neon.saddlp", "int32x4", s) for s in _parts(total.get(), 8)]
            pair.set(pair.get() + _join(added))
    even, odd = (list(range(i, 2 * ROW_TILE, 2)) for i in (0, 1))
    return [
        T.Shuffle([pair.get()], even)
        + T.Shuffle([pair.get()], odd)
        + _signed_offset(group, word, offset, r)
        for r, pair in enumerate(pairs)
    ]


def _by_quarters(name: str, sums: Expr, codes: Expr, words: Expr, i: int) -> Expr:
    """Sums plus NEON's dot products of codes with a word of activations."""
    x = T.reinterpret("int8x16", T.Shuffle([words], [i] * 4))
    parts = zip(_parts(sums, 4), _parts(codes, 4), strict=True)
    return _join([_call(f"aarch64.neon.{name}", "int32x4", *p, x) for p in parts])


def _signed_quad(group: "_Group", quad: int) -> Expr:
    """A quad's codes as int8: all but those of 8 bits are, and these are less 128."""
    flip = 0x80 if group.tile.fmt.value_bits == 8 else 0
    return group.quad(quad, _unpack_bytes, flip)


def _signed_offset(group: "_Group", word: _Word, offset: _Offset, r: int) -> Expr:
    """The offset of row ``r`` for the codes of ``_signed_quad``: 128 times the sum comes back."""
    if group.tile.fmt.centred:
        return T.broadcast(T.int32(0), ROW_TILE)
    if group.tile.fmt.value_bits < 8:
        return offset(r)
    return offset(r) + T.broadcast(word(r, GROUP + 4) << 7, ROW_TILE)


def _parts(vector: Expr, count: int) -> list[Expr]:
    """A vector cut in vectors."""
    lanes = vector.ty.dtype.lanes // count
    return [T.Shuffle([vector], list(range(i * lanes, (i + 1) * lanes))) for i in range(count)]


def _join(parts: list[Expr]) -> Expr:
    """Vectors in a row as one."""
    return T.Shuffle(parts, list(range(sum(p.ty.dtype.lanes for p in parts))))


def _call(name: str, dtype: str, *operands: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, f"llvm.{name}", *operands)


def _dots_generic(group: "_Group", rows: int, word: _Word, offset: _Offset) -> list[Expr]:
    dots = [_Register("int32x16") for _ in range(rows)]
    for r, dot in enumerate(dots):
        dot.set(offset(r))
    with T.serial(0, QUADS) as quad:
        codes = hold(group.quad(quad))
        for i in range(4):
            values = hold(T.reinterpret("int32x16", codes >> T.uint32(8 * i) & T.uint32(255)))
            for r, dot in enumerate(dots):
                dot.set(dot.get() + values * (word(r, 4 * quad) << (24 - 8 * i) >> 24))
    return [dot.get() for dot in dots]


_DOTS: Final[dict[str, Callable[["_Group", int, _Word, _Offset], list[Expr]]]] = {
    "avx512vnni": _dots_vnni,
    "avxvnni": _dots_avxvnni,
    "avx2": _dots_avx2,
    "i8mm": _dots_i8mm,
    "dotprod": _dots_dotprod,
    "neon": _dots_neon,
    "generic": _dots_generic,
}
"""Dot products of a group's codes with those of some activation rows, plus the rows' offsets."""


class _Register:
    """A vector that keeps its value across statements; starts undefined, or as a number."""

    def __init__(self, dtype: str, value: float | None = None) -> None:
        element, _, lanes = dtype.partition("x")
        self._lanes = int(lanes)
        self._buffer = scratch(self._lanes, dtype=element)
        if value is not None:
            self.set(T.broadcast(tirx.const(value, element), self._lanes))

    def get(self) -> Expr:
        return load(self._buffer, 0, lanes=self._lanes)

    def set(self, value: Expr) -> None:
        store(self._buffer, value, 0)


@dataclass(frozen=True, slots=True)
class _Weight:
    """The parameters that a packed weight is passed in."""

    data: Any
    table: Any
    known: tuple[Format, ...]

    @classmethod
    def declare(cls, known: tuple[Format, ...]) -> "_Weight":
        """Declares them as the next parameters; ``known`` has a format of every layout."""
        size, tiles = symbol("size"), symbol("tiles")
        return cls(param("W", (size,), "uint8"), param("table", (tiles, 3), "int32"), known)

    @property
    def tiles(self) -> Expr:
        """The number of tiles."""
        return self.table.shape[0]

    @contextmanager
    def share(self, job: Expr, jobs: int) -> Iterator[Expr]:
        """Loop over the tiles of a job's share of the bytes."""
        first, end = (scratch(1, dtype="int64") for _ in range(2))
        store(first, T.int64(0), 0)
        store(end, self.tiles, 0)
        low, high = (load(bound, 0, lanes=1) for bound in (first, end))

        def before(tile: Expr, later: Expr) -> Expr:
            """Whether a tile belongs to a job before another."""
            start = T.cast(load(self.table, tile, 1, lanes=1), "int64")
            return start * (jobs * VECTOR) < later * self.data.shape[0]

        with T.While(low < high):  # without branches inside, which could not be predicted
            middle = hold((low + high) // 2)
            below = hold(T.cast(before(middle, job), "int32")) > 0
            new_low, new_high = T.Select(below, middle + 1, low), T.Select(below, high, middle)
            new_low = hold(new_low)
            store(end, new_high, 0)
            store(first, new_low, 0)
        with T.While(T.And(low < self.tiles, before(T.min(low, self.tiles - 1), job + 1))):
            yield hold(low)
            store(first, low + 1, 0)

    def formats(
        self, instructions: Instructions, t: Expr, count: Expr, row: Expr | None = None
    ) -> Iterator["_Tile"]:
        """Tile ``t`` of ``count`` groups once for every layout, each time inside its branch."""
        layout = hold(load(self.table, t, 0, lanes=1))
        base, entries = (
            hold(T.cast(load(self.table, t, i, lanes=1), "int64") * VECTOR) for i in (1, 2)
        )
        for fmt in self.known:
            with _when(layout == fmt.layout):
                yield _Tile(self.data, base, count, fmt, row, _Codebook(instructions, entries))


@dataclass(frozen=True, slots=True)
class _Tile:
    """A packed tile inside a kernel; ``row`` picks one of its rows, None takes all 16 as lanes."""

    data: Any
    base: Expr
    count: Expr
    fmt: Format
    row: Expr | None
    codebook: "_Codebook"

    @contextmanager
    def groups(self, ahead: Expr | None = None) -> Iterator["_Group"]:
        """Loop over the groups: first a block of the remainder, then blocks of 8.

        Asks for what lies ``ahead`` bytes farther on as each group is reached.
        """
        with T.serial(0, self.count // BLOCK + 1) as index, self.block(index, ahead) as (_, group):
            yield group

    @contextmanager
    def block(self, index: Expr, ahead: Expr | None = None) -> Iterator[tuple[Expr, "_Group"]]:
        """Loop over the groups of one block, with their places in it."""
        size, header = self.fmt.bits * VECTOR, BLOCK * SIDE
        rest = hold(self.count % BLOCK)
        at_rest = index == 0
        start = hold(T.Select(at_rest, self.base, self.start(index)))
        done = hold(T.Select(at_rest, T.int64(0), (index - 1) * BLOCK + rest))
        length = hold(T.Select(at_rest, rest, T.int64(BLOCK)))
        codes = hold(start + T.Select(at_rest, self._first_header(), T.int64(header)))
        if ahead is not None:
            _prefetch(self.data, start + ahead, header // VECTOR)
        with T.serial(0, length) as i:
            if ahead is not None:
                _prefetch(self.data, codes + i * size + ahead, self.fmt.bits)
            zeros = start + length * ROW_TILE + i * (ROW_TILE // 2)
            yield i, _Group(self, done + i, start + i * ROW_TILE, zeros, codes + i * size)

    def start(self, index: Expr) -> Expr:
        """Where a block lies, of those after the first."""
        done = (index - 1) * BLOCK + self.count % BLOCK
        headers = self._first_header() + (index - 1) * (BLOCK * SIDE)
        return self.base + done * (self.fmt.bits * VECTOR) + headers

    def _first_header(self) -> Expr:
        """The bytes before the first block's codes."""
        size = self.count % BLOCK * SIDE + 2 * ROW_TILE
        return (size + VECTOR - 1) // VECTOR * VECTOR

    def row_scales(self) -> Expr:
        """The row scales as float32, in units that undo those of the codes.

        Widened by hand, as a target without the conversion would call a library: the exponent and
        fraction land in their places, and the product moves the bias, for subnormals as well.
        """
        start = self.base + self.count % BLOCK * SIDE
        half = _cast(self.lanes(start, "uint16", 2), "uint32")
        bits = (half & _u32(0x7FFF)) << _u32(13) | (half & _u32(0x8000)) << _u32(16)
        return _reinterpret(bits, "float32") * T.float32(2.0 ** (112 - self.shift))

    @property
    def shift(self) -> int:
        """The bits that codes are shifted left by to make zero-points whole."""
        return max(0, ZERO_BITS - self.fmt.value_bits)

    def lanes(self, start: Expr, dtype: str, size: int) -> Expr:
        """One value of ``size`` bytes a lane, of 16 values that start at ``start``."""
        if self.row is None:
            return T.reinterpret(f"{dtype}x16", load(self.data, start, lanes=ROW_TILE * size))
        return T.reinterpret(dtype, load(self.data, start + self.row * size, lanes=size))


def _prefetch(data: Any, start: Expr, vectors: int) -> None:
    for vector in range(vectors):
        prefetch(data, start + vector * VECTOR)


@dataclass(frozen=True, slots=True)
class _Codebook:
    """How the codes of a non-uniform format become the entries at ``start``."""

    instructions: Instructions
    start: Expr

    def entries(self, tile: _Tile, codes: Expr, flip: int = 0) -> Expr:
        """What 4 codes a lane, a byte each, look up, with the bits ``flip`` inverted."""
        lookup = _LOOKUPS[self.instructions] if tile.row is None else _lookup_generic
        return lookup(tile.data, self.start, codes, flip)


def _entries(data: Any, start: Expr, lanes: int, flip: int) -> Expr:
    return hold(load(data, start, lanes=lanes) ^ T.uint8(flip))


def _lookup_vnni(data: Any, start: Expr, codes: Expr, flip: int) -> Expr:
    entries = _entries(data, start, VECTOR, flip)
    index = T.reinterpret("uint8x64", codes)
    found = T.call_llvm_pure_intrin("uint8x64", "llvm.x86.avx512.pshuf.b.512", entries, index)
    return T.reinterpret("uint32x16", found)


def _lookup_avx2(data: Any, start: Expr, codes: Expr, flip: int) -> Expr:
    entries = _entries(data, start, VECTOR, flip)
    found = _by_halves("pshuf.b", "uint8", entries, T.reinterpret("uint8x64", codes), shrink=1)
    return T.reinterpret("uint32x16", found)


def _lookup_neon(data: Any, start: Expr, codes: Expr, flip: int) -> Expr:
    entries = _entries(data, start, VECTOR // 4, flip)
    parts = _parts(T.reinterpret("uint8x64", codes), 4)
    found = [_call("aarch64.neon.tbl1", "uint8x16", entries, part) for part in parts]
    return T.reinterpret("uint32x16", _join(found))


def _lookup_generic(data: Any, start: Expr, codes: Expr, flip: int) -> Expr:
    """Reads an entry for every byte."""
    found = None
    for i in range(4):
        index = start + _cast(codes >> _u32(8 * i) & _u32(255), "int64")
        entry = (_cast(data[index], "uint32") ^ _u32(flip)) << _u32(8 * i)
        found = entry if found is None else found | entry
    return found


_LOOKUPS: Final[dict[str, Callable[[Any, Expr, Expr, int], Expr]]] = {
    "avx512vnni": _lookup_vnni,
    "avxvnni": _lookup_avx2,
    "avx2": _lookup_avx2,
    "i8mm": _lookup_neon,
    "dotprod": _lookup_neon,
    "neon": _lookup_neon,
    "generic": _lookup_generic,
}
"""Byte shuffles: from the data, where the entries start, codes, and bits to flip to entries."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of a tile, and where its parts lie in the data."""

    tile: _Tile
    index: Expr
    at_scales: Expr
    at_zeros: Expr
    at_codes: Expr

    def columns(self, k: Expr) -> tuple[Expr, Expr]:
        """The first column and the number of columns that are not padding."""
        start = hold(self.index * GROUP)
        return start, hold(T.min(k - start, T.int64(GROUP)))

    def quad(self, quad: int | Expr, unpack: "_Unpack | None" = None, flip: int = 0) -> Expr:
        """The codes of 4 columns, a byte each, in units that make zero-points whole.

        With the bits ``flip`` of every code inverted, which costs nothing in a codebook.
        """
        codes, low = None, 0
        for width in self.tile.fmt.planes:
            vector = low + quad * width // 8
            words = self.tile.lanes(self.at_codes + vector * VECTOR, "uint32", 4)
            if width < 8:
                at, to = quad % (8 // width) * width, low + self.tile.shift
                words = (unpack or _unpack_words)(words, at, width, to)
            codes = words if codes is None else codes | words
            low += width
        if self.tile.fmt.codebook:
            return self.tile.codebook.entries(self.tile, codes, flip)
        return codes ^ _u32(0x01010101 * flip) if flip else codes

    def scales(self) -> Expr:
        """The scales as float32."""
        return _cast(self.tile.lanes(self.at_scales, "uint8", 1), "float32")

    def zeros(self) -> Expr:
        """The zero-points as int32, in the same units as the codes."""
        shift = max(0, self.tile.fmt.value_bits - ZERO_BITS)
        if self.tile.fmt.centred:
            middle = T.int32(MIDDLE << shift)
            return middle if self.tile.row is not None else T.broadcast(middle, ROW_TILE)
        both = T.reinterpret("uint64", load(self.tile.data, self.at_zeros, lanes=8))
        if (row := self.tile.row) is None:
            words = T.reinterpret("uint32x16", T.broadcast(both, ROW_TILE // 2))
            words = words >> T.cast(T.ramp(0, 1, ROW_TILE) // 2 * 4, "uint32x16")
        else:
            words = T.cast(both >> T.cast(row % 2 * 32 + row // 2 * 4, "uint64"), "uint32")
        return _cast((words & _u32(15)) << _u32(shift), "int32")

    def float_zeros(self) -> Expr:
        """The zero-points as float32, plus 2**23: what ``values`` takes."""
        return _reinterpret(_cast(self.zeros(), "uint32") | _u32(0x4B000000), "float32")

    def values(self, codes: Expr, float_zeros: Expr) -> Expr:
        """Code less zero-point, exact in float32, where the code is the low byte of every lane.

        Written into the fraction of 2**23, a code becomes a float without a conversion.
        """
        return _reinterpret(codes & _u32(255) | _u32(0x4B000000), "float32") - float_zeros


_Unpack = Callable[[Expr, Any, int, int], Expr]
"""Takes ``width`` bits of every byte of words from a bit on, and moves them to another bit."""


def _unpack_words(words: Expr, at: int | Expr, width: int, to: int) -> Expr:
    return (words >> _u32(at) & _u32(0x01010101 * ((1 << width) - 1))) << _u32(to)


def _unpack_bytes(words: Expr, at: int, width: int, to: int) -> Expr:
    """Where bytes can be shifted: what a shift drops needs no mask."""
    codes = T.reinterpret("uint8x64", words) >> T.uint8(at) & T.uint8((1 << width) - 1)
    return T.reinterpret("uint32x16", codes << T.uint8(to))


@contextmanager
def _when(condition: Expr) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


def _u32(value: int | Expr) -> Expr:
    return T.uint32(value) if isinstance(value, int) else T.cast(value, "uint32")


def _cast(value: Expr, dtype: str) -> Expr:
    return T.cast(value, _typed_like(value, dtype))


def _reinterpret(value: Expr, dtype: str) -> Expr:
    return T.reinterpret(_typed_like(value, dtype), value)


def _typed_like(value: Expr, dtype: str) -> str:
    lanes = value.ty.dtype.lanes
    return dtype if lanes == 1 else f"{dtype}x{lanes}"
