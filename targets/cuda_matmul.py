"""Mixed-bit matmul kernels for CUDA, as TVM functions made from frozen knobs.

The functions, what they take and the packed layout are those of ``cpu_matmul``; here

* one row of quantized activations is a GEMV on ``dp4a``: a warp takes 8 groups that lie in a row of
  a tile of 16 rows, a thread 4 rows (16 bytes of each vector of codes) of one of them. Warps of a
  block share the columns of a tile, or have tiles of their own where there are many. Weights are
  read once, 16 bytes a load, and unpacked in registers; the first of them are asked for before the
  kernel that makes the activations has ended. Activations wait in shared memory; short rows are
  made and rounded there, by every block for itself, which is a kernel less to wait for;
* more rows run on tensor cores: a group of 32 columns is the K of ``mma.m16n8k32`` on int8, a tile
  its 16 rows, and a word of the packed layout (a row's 4 columns) a register of its fragment. Codes
  go from memory to the tensor core through registers alone; activations wait in shared memory.
  Up to 8 rows the warps of a block split K, beyond that each has a tile of its own;
* float activations take the GEMV's way in float32, a few rows at a time.

Sums are exact in int32 within a group. What the sums of groups are added up in differs from CPUs,
so results agree to float32 rounding, not bit by bit.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import FORMATS, GROUP, ZERO_BITS, ActivationFormat, Format, groups
from mxcompile.plan import ROW_TILE
from mxcompile.targets.cpu_matmul import Gate, Norm, Residual, Rows, Source
from mxcompile.targets.cpu_norm import int64, param, symbol
from mxcompile.targets.cuda_block import (
    WARP,
    Block,
    Private,
    build,
    byte_perm,
    hold,
    launch,
    load,
    registers,
    store,
    strided,
    when,
)
from mxcompile.targets.packing import BLOCK, QUADS, SIDE, VECTOR

WORDS: Final = GROUP // 4 + 2
"""Words of a quantized group of an activation row: codes, scale, sum."""

ROWS: Final = 4
"""Rows of a tile that a thread of a GEMV takes: 16 bytes of each vector."""

COLUMNS: Final = 8
"""Activation rows that one ``mma`` takes."""

_STAGED: Final = BLOCK * WORDS + 4
"""Words of an activation row in shared memory: a block of groups, and 4 against bank conflicts."""

_AHEAD: Final = 2
"""Groups whose codes wait in registers where many activation rows use each; else a whole block."""

_ROUNDERS: Final = 256
"""Threads of a block that rounds activations, a quad of columns each."""

_SHORT: Final = 2048
"""Columns of the longest row that every block of a product makes and rounds for itself."""

_KEPT: Final = 256
"""Groups of a row, over its digits, that wait in shared memory for a GEMV: 12 KiB."""

_RECORD: Final = 12
"""Words of a group there: 10, and 2 so that loads are of 16 bytes."""

_REGISTERS: Final = 1 << 16
"""Registers of a multiprocessor."""

_WARPS: Final = 2048
"""Warps that a GPU is given before each has a tile of its own: some 16 a multiprocessor."""

_GATHERERS: Final = 128
"""Threads of a block that gathers a row, a quad of columns each."""

_ROUND: Final = 1.5 * 2.0**23
"""Added to a float of magnitude below 2**22, leaves it rounded half to even in the low bits."""

_TINY: Final = 2.0**-120
"""Groups whose magnitudes are all below are taken for 0: their scale has no finite inverse."""


@dataclass(frozen=True, slots=True)
class CudaMatmul:
    """The knobs of the kernels; methods make the functions.

    ``splits`` warps of a block share the columns of one tile where activation rows are few (in a
    GEMV of a tall matrix, those of several), ``tiles`` warps have a tile each and ``batches`` times
    8 activation rows where they are many.
    ``rows`` float activation rows share the unpacked codes. ``serial`` kernels are for a CPU.
    Tiles of other formats than ``formats`` are passed over.
    """

    splits: int = 8
    tiles: int = 8
    batches: int = 8
    rows: int = 4
    serial: bool = False
    formats: tuple[str, ...] = tuple(FORMATS)

    def only(self, formats: tuple[str, ...]) -> "CudaMatmul":
        """The same kernels for fewer formats."""
        return replace(self, formats=formats)

    def quantize_activation(self, fmt: ActivationFormat) -> PrimFunc:
        """Rounds every group of 32 activations half to even to its absmax / top."""

        def emit() -> None:
            m, k, q = map(symbol, "mkq")
            x, records = param("X", (m, k)), param("Q", (m, q), "int8")
            self._round_apart(records, fmt, lambda row, column: x[row, column], k)

        return build(emit)

    def normalize_activation(self, norm: Norm, fmt: ActivationFormat) -> PrimFunc:
        """Rounds ``X / sqrt(mean(X^2) + eps) * weight`` as ``quantize_activation`` does."""
        return self._round_rows(norm, fmt)

    def residual_activation(self, residual: Residual, fmt: ActivationFormat) -> PrimFunc:
        """``H = R + Y``, whose norm is rounded; ``Y`` is normalized first where it has an eps."""
        return self._round_rows(residual, fmt)

    def _round_rows(self, source: Norm | Residual, fmt: ActivationFormat) -> PrimFunc:
        """A block for a row."""
        threads = min(1024, max(128, -(-source.columns // (4 * WARP)) * WARP))

        def emit() -> None:
            b, s, m, q = map(symbol, "bsmq")
            inputs = declare(source, b, s)
            total = _total(source, b, s)
            records = param("Q", (m, q), "int8")

            def body(block: Block) -> None:
                at = block.index
                row = _Row(block, source.columns)
                made = _MAKERS[type(source)](source, row, inputs, total, at, None)
                codes, line = _lines(records, fmt.digits), at[0] * s + at[1]

                def put(digit: int, group: Expr, word: int | Expr, value: Expr) -> None:
                    store(codes, value, line * fmt.digits + digit, group, word)

                made.early()
                row.round(made.late(), fmt, put)

            launch([b, s], threads, self.serial, body)

        return build(emit)

    def matmul_rounded(self, source: Source, fmt: ActivationFormat) -> PrimFunc | None:
        """One row that is made, rounded and multiplied in a kernel; None for long rows."""
        columns, digits = columns_of(source), fmt.digits
        if columns > _SHORT:
            return None

        def emit() -> None:
            n, one = symbol("n"), int64(1)
            inputs = declare(source, one, one)
            open_weight = _Weight.declare(self.serial, self.formats)
            total, y = _total(source, one, one), param("Y", (one, n))
            count = groups(columns)

            def prepare(block: Block, staged: Any) -> _Staging:
                row = _Row(block, columns)
                at, is_first = (int64(0), int64(0)), block.index[0] == 0
                made = _MAKERS[type(source)](source, row, inputs, total, at, is_first)

                def put(digit: int, group: Expr, word: int | Expr, value: Expr) -> None:
                    store(staged, value, digit * (-(-count // BLOCK) * BLOCK) + group, word)

                def stage(_first: Expr) -> None:
                    values = made.late()
                    block.phase(lambda t: None)  # records may lie where sums did
                    row.round(values, fmt, put)
                    block.phase(lambda t: None)

                return made.early, stage

            self._gemv(open_weight(), y, int64(count), digits, -(-count // BLOCK), prepare)

        return build(emit)

    def gate_activation(self, gate: Gate, fmt: ActivationFormat) -> PrimFunc:
        """Rounds ``act(G) * U``; G and U may be columns of one tensor, which is passed twice."""

        def emit() -> None:
            b, s, m, q = map(symbol, "bsmq")
            opener, gated = param("G", (b, s, gate.gate.width)), param("U", (b, s, gate.up.width))
            records = param("Q", (m, q), "int8")

            def product(row: Expr, column: Expr) -> Expr:
                at = row // s, row % s
                x = hold(opener[(*at, gate.gate.offset + column)])
                return _ACTIVATIONS[gate.function](x) * gated[(*at, gate.up.offset + column)]

            self._round_apart(records, fmt, product, int64(gate.size))

        return build(emit)

    def _round_apart(
        self, records: Any, fmt: ActivationFormat, read: Callable[[Expr, Expr], Expr], k: Expr
    ) -> None:
        """Round rows of k columns, ``read(row, column)``; several blocks share a row."""
        steps = (k + 4 * _ROUNDERS - 1) // (4 * _ROUNDERS)

        def body(block: Block) -> None:
            row, step = block.index
            codes, values = _lines(records, fmt.digits), block.private(4)

            def quad(t: Expr) -> Expr:
                return step * _ROUNDERS + t

            def look(t: Expr) -> None:
                values.fill(t, T.float32(0))
                for byte in range(4):
                    column = hold(quad(t) * 4 + byte)
                    with when(column < k):
                        values.set(t, read(row, column), byte)

            def put(digit: int, group: Expr, word: int | Expr, value: Expr) -> None:
                store(codes, value, row * fmt.digits + digit, group, word)

            block.phase(look, barrier=False)
            _round_quads(block, values, 0, quad, codes.shape[1], fmt, put)

        launch([records.shape[0], steps], _ROUNDERS, self.serial, body)

    def matmul_quantized(self, fmt: ActivationFormat) -> PrimFunc:
        """Y = Q @ W.T with exact integer sums inside a group, for each digit."""

        def emit() -> None:
            m, n, q = map(symbol, "mnq")
            records, open_weight = (
                param("Q", (m, q), "int8"),
                _Weight.declare(self.serial, self.formats),
            )
            y = param("Y", (m, n))
            codes, weight = _lines(records, fmt.digits), open_weight()
            lines = codes.shape[0]
            with T.If(m == 1):
                with T.Then():
                    self._multiply_row(weight, codes, y, fmt.digits)
                with T.Else(), T.If(lines <= COLUMNS):
                    with T.Then():
                        self._mma(weight, codes, y, fmt.digits, tiles=1, batches=1)
                    with T.Else():
                        self._mma(weight, codes, y, fmt.digits, self.tiles, self.batches)

        return build(emit)

    def matmul_f32(self) -> PrimFunc:
        """Y = X @ W.T in float32, with weights that are dequantized in registers."""

        def emit() -> None:
            m, n, k = map(symbol, "mnk")
            x, open_weight = param("X", (m, k)), _Weight.declare(self.serial, self.formats)
            y = param("Y", (m, n))
            weight = open_weight()
            with T.If(m == 1):
                with T.Then():
                    self._dot_rows(weight, x, y, 1)
                with T.Else():
                    self._dot_rows(weight, x, y, self.rows)

        return build(emit)

    def gather_rows(self) -> PrimFunc:
        """Y = W[ids], dequantized; an id past either end reads the nearest row."""

        def emit() -> None:
            m, k = map(symbol, "mk")
            ids, open_weight = (
                param("ids", (m,), "int64"),
                _Weight.declare(self.serial, self.formats),
            )
            y = param("Y", (m, k))
            weight = open_weight()
            count = (k + GROUP - 1) // GROUP

            def body(block: Block) -> None:
                (i,) = block.index
                last = weight.tiles * ROW_TILE - 1

                def gather(t: Expr) -> None:
                    row = hold(T.max(T.min(ids[i], last), T.int64(0)))
                    for tile in weight.formats(row // ROW_TILE, count):
                        quads = partial(_gather_quad, tile, y, i, row % ROW_TILE)
                        strided(t, _GATHERERS, count * QUADS, quads)

                block.phase(gather)

            launch([m], _GATHERERS, self.serial, body)

        return build(emit)

    def _multiply_row(self, weight: "_Weight", q: Any, y: Any, digits: int) -> None:
        """One activation row that was rounded elsewhere; its digits are the lines of ``q``."""
        count, kept = q.shape[1], _KEPT // digits // BLOCK

        def prepare(block: Block, staged: Any) -> _Staging:
            def stage(first: Expr) -> None:
                def copy(t: Expr) -> None:
                    some = hold(T.cast(T.min(count - first, int64(kept * BLOCK)), "int32"))

                    def pair(line: int, i: Expr) -> None:
                        group, at = hold(i // (WORDS // 2)), hold(i % (WORDS // 2) * 2)
                        words = load(q, line, first + group, at, lanes=2)
                        store(staged, words, line * (kept * BLOCK) + group, at)

                    for line in range(digits):
                        strided(t, self.splits * WARP, some * (WORDS // 2), partial(pair, line))

                block.phase(copy)

            return lambda: None, stage

        self._gemv(weight, y, count, digits, kept, prepare)

    def _gemv(
        self,
        weight: "_Weight",
        y: Any,
        count: Expr,
        digits: int,
        kept: int,
        prepare: Callable[[Block, Any], "_Staging"],
    ) -> None:
        """Multiply a row of ``count`` groups.

        They wait in shared memory, ``kept`` blocks of 8 at a time. Warps that share a tile take
        these in turn; a thread asks for its part of the next block once it has multiplied this one.
        """
        n, warps = y.shape[1], self.splits
        blocks = (count + BLOCK - 1) // BLOCK
        # Powers of two by their logarithms: GPUs divide slowly.
        most = warps.bit_length() - 1
        shift = T.int32(0)
        for power in range(most):
            few = T.And(weight.tiles << power < _WARPS, blocks > 1 << power)
            shift = T.Select(few, T.int32(power + 1), shift)
        tiles = T.int32(1) << T.int32(most) - shift

        def body(block: Block) -> None:
            staged = block.shared(digits * kept * BLOCK, _RECORD, dtype="int32")
            parts = block.shared(warps, ROW_TILE)
            early, stage = prepare(block, staged)
            entry = _Kept(block, weight)
            fetched = _Fetched(block, weight)
            scale, sums = block.private(1), block.private(ROWS)

            def tile_of(t: Expr) -> Expr:
                return T.min(block.index[0] * tiles + (t // WARP >> shift), weight.tiles - 1)

            def fetch(t: Expr, step: Expr) -> None:
                split = t // WARP & (T.int32(1) << shift) - 1
                index = hold((T.cast(step, "int32") << shift) + split)
                fetched.group.set(t, T.int32(-1))
                with when(index < blocks):
                    for tile in entry.formats(t, tile_of(t), count):
                        run = tile.run(index)
                        lane_group = hold(t % WARP // 4)
                        with when(lane_group < run.length):
                            fetched.fetch(t, run.group(lane_group))

            def prefetch(t: Expr) -> None:
                tile = hold(block.index[0] * tiles + t // ROW_TILE)
                with when(T.And(t < tiles * ROW_TILE, tile < weight.tiles)):
                    scale.set(t, weight.row_scale(tile, count, hold(int64(t % ROW_TILE))))
                entry.read(t, tile_of(t))
                sums.fill(t, T.float32(0))
                fetch(t, T.int64(0))

            def multiply(first: Expr) -> Callable[[Expr], None]:
                def body(t: Expr) -> None:
                    with when(fetched.group.get(t) >= 0):
                        place = hold(fetched.group.get(t) - T.cast(first, "int32"))
                        records = [registers(_RECORD, "int32") for _ in range(digits)]
                        for line, record in enumerate(records):
                            for at, lanes in ((0, 4), (4, 4), (8, 2)):
                                row = line * (kept * BLOCK) + place
                                store(record, load(staged, row, at, lanes=lanes), at)
                        for tile in entry.formats(t, tile_of(t), count):
                            _dots(block, t, tile, fetched, records, sums)

                return body

            def keep(t: Expr) -> None:
                with when(t % WARP < 4):
                    for i in range(ROWS):
                        store(parts, sums.get(t, i), t // WARP, t % WARP * ROWS + i)

            def write(t: Expr) -> None:
                at = hold(block.index[0] * tiles * ROW_TILE + t)
                with when(T.And(t < tiles * ROW_TILE, at < n)):
                    total = registers(1, "float32")
                    store(total, T.float32(0), 0)
                    with T.serial(T.int32(0), T.int32(1) << shift) as i:
                        part = parts[(t // ROW_TILE << shift) + i, t % ROW_TILE]
                        store(total, total[0] + part, 0)
                    store(y, total[0] * scale.get(t), 0, at)

            block.phase(prefetch, barrier=False)
            early()
            block.wait()
            rest = count % BLOCK
            missing = T.Select(rest == 0, T.int64(0), BLOCK - rest)
            with T.serial(T.int64(0), (blocks + kept - 1) // kept) as turn:
                # Blocks are counted from the first that has groups.
                first = hold(T.max(turn * (kept * BLOCK) - missing, T.int64(0)))
                stage(first)
                here = T.cast(T.min(blocks - turn * kept, int64(kept)), "int32")
                with T.serial(T.int32(0), here + (T.int32(1) << shift) - 1 >> shift) as step:
                    before = turn * T.cast(T.int32(kept) >> shift, "int64")
                    block.phase(multiply(first), barrier=False)
                    block.phase(lambda t: fetch(t, hold(before + step + 1)), barrier=False)
                block.phase(lambda t: None)  # the next turn overwrites what is staged
            block.across(sums, _SAME_ROWS, operator.add)
            block.phase(keep)
            block.phase(write)

        grid = [(weight.tiles + tiles - 1) >> T.cast(T.int32(most) - shift, "int64")]
        # 80 registers a thread: a decode step of Gemma 3 270M takes 522 us on an H200, without this
        # limit 586.
        resident = _REGISTERS // (80 * warps * WARP)
        launch(grid, warps * WARP, self.serial, body, waits=True, resident=resident)

    def _dot_rows(self, weight: "_Weight", x: Any, y: Any, rows: int) -> None:
        """A block for a tile and ``rows`` rows of floats; its warps take 8 groups in turn."""
        m, n, k = x.shape[0], y.shape[1], x.shape[1]
        threads, count = self.splits * WARP, (k + GROUP - 1) // GROUP

        def body(block: Block) -> None:
            tile_index = block.index[0]
            first = block.index[1] * rows
            sums, parts = block.private(rows * ROWS), block.shared(self.splits, rows * ROW_TILE)

            def accumulate(t: Expr) -> None:
                sums.fill(t, T.float32(0))
                part, lane_group = hold(t % 4), hold(t % WARP // 4)
                for tile in weight.formats(tile_index, count):
                    with tile.blocks(t // WARP, self.splits) as run, when(lane_group < run.length):
                        group = run.group(lane_group)
                        # Rows past the end repeat the last one; they are not stored.
                        places = [hold(T.min(first + r, m - 1)) for r in range(rows)]
                        _f32_dots(x, group, part, places, lambda i, v: sums.add(t, v, i))

            def keep(t: Expr) -> None:
                with when(t % WARP < 4):
                    for i in range(sums.count):
                        at = i // ROWS * ROW_TILE + t % WARP * ROWS + i % ROWS
                        store(parts, sums.get(t, i), t // WARP, at)

            def write(t: Expr) -> None:
                def one(place: Expr) -> None:
                    total = registers(1, "float32")
                    store(total, T.float32(0), 0)
                    with T.unroll(0, self.splits) as i:
                        store(total, total[0] + parts[i, place], 0)
                    row, r = hold(place % ROW_TILE), hold(place // ROW_TILE)
                    at = hold(tile_index * ROW_TILE + row)
                    with when(T.And(at < n, first + r < m)):
                        value = total[0] * weight.row_scale(tile_index, count, row)
                        store(y, value, first + r, at)

                strided(t, threads, T.int64(rows * ROW_TILE), one)

            block.phase(accumulate)
            block.across(sums, _SAME_ROWS, operator.add)
            block.phase(keep)
            block.phase(write)

        launch([weight.tiles, (m + rows - 1) // rows], threads, self.serial, body)

    def _mma(
        self, weight: "_Weight", q: Any, y: Any, digits: int, tiles: int, batches: int
    ) -> None:
        """A block has ``tiles`` tiles and 8 times ``batches`` lines of ``q``.

        A line is a digit of an activation row; the warps of a tile split K.
        All warps walk the blocks of 8 groups in step; a warp whose block does not exist adds zeros.
        """
        splits = self.splits if tiles == 1 else 1
        ahead = BLOCK if batches == 1 else _AHEAD
        warps, width = tiles * splits, batches * COLUMNS
        lines, count = q.shape[:2]

        def body(block: Block) -> None:
            first_tile, first_line = block.index[0] * tiles, block.index[1] * width
            staged = block.shared(splits * width, _STAGED, dtype="int32")
            codes, sides = block.private(ahead * 4, "int32"), block.private(ahead * 2, "int32")
            right, dot = block.private(2, "int32"), block.private(4, "int32")
            sums = block.private(4 * batches)
            rest = count % BLOCK
            blocks = (count + BLOCK - 1) // BLOCK

            def tile_of(t: Expr) -> Expr:
                return T.min(first_tile + t // WARP // splits, weight.tiles - 1)

            def at_block(step: Expr, split: Expr) -> Expr:
                return step * splits + split

            def first_group(index: Expr) -> Expr:
                """Blocks are counted from the first that has groups."""
                return T.Select(
                    index == 0,
                    T.int64(0),
                    index * BLOCK - T.Select(rest == 0, T.int64(0), BLOCK - rest),
                )

            def stage(step: Expr) -> Callable[[Expr], None]:
                def copy(t: Expr) -> None:
                    def word(i: Expr) -> None:
                        column = hold(i % (BLOCK * WORDS))
                        place = hold(i // (BLOCK * WORDS))
                        index = at_block(step, place // width)
                        group = hold(first_group(index) + column // WORDS)
                        line = hold(T.min(first_line + place % width, lines - 1))
                        inside = T.And(index < blocks, group < count)
                        value = T.if_then_else(inside, q[line, group, column % WORDS], 0)
                        store(staged, value, place, column)

                    strided(t, warps * WARP, T.int64(splits * width * BLOCK * WORDS), word)

                return copy

            def fetch(step: Expr, first: Expr) -> Callable[[Expr], None]:
                def unpack(t: Expr) -> None:
                    codes.fill(t, T.int32(0))
                    sides.fill(t, T.int32(0))
                    lane, row = hold(t % WARP), hold(t % WARP // 4)
                    index = hold(at_block(step, t // WARP % splits))
                    with when(index < blocks):
                        for tile in weight.formats(tile_of(t), count):
                            run = tile.run(index)
                            for i in range(ahead):
                                with when(first + i < run.length):
                                    group = run.group(first + i)
                                    for r in range(2):
                                        at = row + 8 * r
                                        sides.set(t, group.side(at), 2 * i + r)
                                        for half in range(2):
                                            word = group.word(at, lane % 4 + 4 * half)
                                            codes.set(t, word, 4 * i + 2 * half + r)

                return unpack

            def multiply(group: Expr, i: int, batch: int) -> None:
                def line(t: Expr, column: Expr) -> Expr:
                    return t // WARP % splits * width + batch * COLUMNS + column

                def word(t: Expr, column: Expr, at: int | Expr) -> Expr:
                    return load(staged, line(t, column), group * WORDS + at)

                def start(t: Expr) -> None:
                    lane = hold(t % WARP)
                    for half in range(2):
                        right.set(t, word(t, lane // 4, lane % 4 + 4 * half), half)
                    for c in range(4):
                        offset = sides.get(t, 2 * i + c // 2) >> 8
                        total = word(t, lane % 4 * 2 + c % 2, WORDS - 1)
                        dot.set(t, offset * total, c)

                def add(t: Expr) -> None:
                    lane = hold(t % WARP)
                    for c in range(4):
                        scale = word(t, lane % 4 * 2 + c % 2, WORDS - 2)
                        scale = T.reinterpret("float32", scale)
                        scales = T.cast(sides.get(t, 2 * i + c // 2) & 255, "float32")
                        scaled = T.cast(dot.get(t, c), "float32") * scale
                        # Neighbouring columns are a thread's: two digits of a row add up here.
                        sums.add(t, scaled * scales, 4 * batch + c - c % digits)

                block.phase(start, barrier=False)
                block.mma(dot, codes, i * 4, right)
                block.phase(add, barrier=False)

            block.phase(lambda t: sums.fill(t, T.float32(0)), barrier=False)
            with T.serial(T.int64(0), (blocks + splits - 1) // splits) as step:
                block.phase(stage(step))
                with T.serial(T.int64(0), T.int64(BLOCK // ahead)) as part:
                    first = hold(part * ahead)
                    block.phase(fetch(step, first), barrier=False)
                    for i in range(ahead):
                        for batch in range(batches):
                            multiply(first + i, i, batch)
                block.phase(lambda t: None)  # the next step overwrites what is staged
            place = (first_tile, first_line)
            self._store_mma(block, weight, y, sums, place, (count, digits), splits)

        grid = [(weight.tiles + tiles - 1) // tiles, (lines + width - 1) // width]
        launch(grid, warps * WARP, self.serial, body)

    def _store_mma(
        self,
        block: Block,
        weight: "_Weight",
        y: Any,
        sums: Private,
        first: tuple[Expr, Expr],
        shape: tuple[Expr, int],
        splits: int,
    ) -> None:
        """Add up the warps that shared a tile, and store what lies inside y."""
        count, digits = shape
        used = range(0, sums.count, digits)

        def put(t: Expr, i: int, value: Expr) -> None:
            lane = hold(t % WARP)
            tile = hold(first[0] + t // WARP // splits)
            row = hold(lane // 4 + i % 4 // 2 * 8)
            at = hold(tile * ROW_TILE + row)
            line = hold((first[1] + i // 4 * COLUMNS + lane % 4 * 2 + i % 2) // digits)
            with when(T.And(T.And(tile < weight.tiles, at < y.shape[1]), line < y.shape[0])):
                store(y, value * weight.row_scale(tile, count, row), line, at)

        def put_all(t: Expr) -> None:
            for i in used:
                put(t, i, sums.get(t, i))

        if splits == 1:
            block.phase(put_all)
            return
        parts = block.shared(splits, sums.count * WARP)

        def keep(t: Expr) -> None:
            for i in used:
                store(parts, sums.get(t, i), t // WARP, i * WARP + t % WARP)

        def join(t: Expr) -> None:
            with when(t < WARP):
                for i in used:
                    total = parts[0, i * WARP + t]
                    for split in range(1, splits):
                        total = total + parts[split, i * WARP + t]
                    put(t, i, hold(total))

        block.phase(keep)
        block.phase(join)


_SAME_ROWS: Final = (4, 8, 16)
"""Bits of a thread's number that tell groups apart in a GEMV; the others tell rows."""


class _Kept:
    """What each thread knows of its tile, so that the table is read once."""

    def __init__(self, block: Block, weight: "_Weight") -> None:
        self._weight = weight
        self._place = block.private(2, "int32")
        coded = any(fmt.codebook for fmt in weight.known)
        self._entries = block.private(4, "uint32") if coded else None

    def read(self, t: Expr, index: Expr) -> None:
        """Look a tile up."""
        index = hold(index)
        for i in range(2):
            self._place.set(t, self._weight.table[index, i], i)
        if self._entries is not None:
            for fmt in self._weight.known:
                if fmt.codebook:
                    with when(self._place.get(t) == fmt.layout):
                        for i, word in enumerate(self._weight.entries(index)):
                            self._entries.set(t, word, i)

    def formats(self, t: Expr, index: Expr, count: Expr) -> "Iterator[_Tile]":
        """The tile once for every layout, each time inside its branch."""

        def entries() -> tuple[Expr, ...]:
            assert self._entries is not None
            return tuple(self._entries.get(t, i) for i in range(4))

        layout, base = (self._place.get(t, i) for i in range(2))
        return self._weight.by_layout(layout, base, entries, index, count)


class _Fetched:
    """A thread's part of a group, on its way from memory: codes, sides, and the group's number.

    The number is below 0 where a thread has none.
    """

    def __init__(self, block: Block, weight: "_Weight") -> None:
        self.words = block.private(ROWS * max(fmt.bits for fmt in weight.known), "uint32")
        self.sides = block.private(ROWS, "int32")
        self.group = block.private(1, "int32")

    def fetch(self, t: Expr, group: "_Group") -> None:
        """Ask for a group."""
        words, sides = group.part(t % 4)
        for i in range(ROWS * group.fmt.bits):
            self.words.set(t, words[i], i)
        for i, side in enumerate(sides):
            self.sides.set(t, side, i)
        self.group.set(t, group.index)

    def word(self, t: Expr, row: int, vector: int | Expr) -> Expr:
        """A row's word of a vector."""
        return self.words.get(t, vector * ROWS + row)


def _dots(
    block: Block, t: Expr, tile: "_Tile", fetched: _Fetched, records: list[Any], sums: Private
) -> None:
    """Add a group's product with a row's digits (``records``) to the sums of a thread's 4 rows."""
    sides = [fetched.sides.get(t, i) for i in range(ROWS)]
    dots = [[(side >> 8) * record[WORDS - 1] for side in sides] for record in records]
    for quad in range(QUADS):
        for i in range(ROWS):
            codes = hold(tile.quad(quad, partial(fetched.word, t, i)))
            for by_row, record in zip(dots, records, strict=True):
                by_row[i] = block.dp4a(codes, record[quad], by_row[i])
    for by_row, record in zip(dots, records, strict=True):
        scale = T.reinterpret("float32", record[WORDS - 2])
        for i, side in enumerate(sides):
            scales = T.cast(side & 255, "float32")
            sums.add(t, T.cast(by_row[i], "float32") * scale * scales, i)


def _f32_dots(
    x: Any, group: "_Group", part: Expr, places: list[Expr], add: Callable[[int, Expr], None]
) -> None:
    """Add a group's product with rows of x: ``r * ROWS + i`` is of place r and the part's row i."""
    words, sides = group.part(part)
    zeros = [hold(_zero(side >> 8)) for side in sides]
    dots = registers(len(places) * ROWS, "float32")
    for index in range(len(places) * ROWS):
        store(dots, T.float32(0), index)
    with T.unroll(0, QUADS) as quad:
        codes = [hold(group.tile.quad(quad, partial(_row_of, words, i))) for i in range(ROWS)]
        for byte in range(4):
            column = hold(group.index * GROUP + quad * 4 + byte)
            inside = column < x.shape[1]
            right = [hold(T.if_then_else(inside, x[p, column], T.float32(0))) for p in places]
            for i in range(ROWS):
                value = hold(_float(codes[i], byte, zeros[i]))
                for r, factor in enumerate(right):
                    store(dots, dots[r * ROWS + i] + value * factor, r * ROWS + i)
    for index in range(len(places) * ROWS):
        add(index, dots[index] * T.cast(sides[index % ROWS] & 255, "float32"))


def _gather_quad(tile: "_Tile", y: Any, i: Expr, row: Expr, quad: Expr) -> None:
    """Dequantize 4 columns of a row. A code times scale is exact: only the last product rounds."""
    group = tile.group(hold(quad // QUADS))
    side = hold(group.side(row))
    codes = hold(group.word(row, quad % QUADS))
    scale = hold(T.cast(side & 255, "float32"))
    row_scale = hold(tile.weight.row_scale(tile.index, tile.count, row))
    for byte in range(4):
        with when(quad * 4 + byte < y.shape[1]):
            value = _float(codes, byte, _zero(side >> 8))
            store(y, value * scale * row_scale, i, quad * 4 + byte)


_Staging = tuple[Callable[[], None], Callable[[Expr], None]]
"""What a product does to have records in shared memory: before it waits, and from a group on."""

_Put = Callable[[int, Expr, int | Expr, Expr], None]
"""Writes a word of a record: digit, group, which word, value."""


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


def _total(source: Source, b: Expr, s: Expr) -> Any:
    """Declares where the sum of a residual goes as the next parameter."""
    return param("H", (b, s, source.columns)) if isinstance(source, Residual) else None


def _gelu_tanh(x: Expr) -> Expr:
    inner = x * (T.float32(1) + T.float32(0.044715) * x * x) * T.float32(math.sqrt(2 / math.pi))
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


def _silu(x: Expr) -> Expr:
    return x / (T.float32(1) + T.exp(-x))


_ACTIVATIONS: Final = {"gelu_tanh": _gelu_tanh, "silu": _silu}


class _Row:
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

    def round(self, values: Private, fmt: ActivationFormat, put: _Put) -> None:
        """Round to records."""
        for i in range(self._quads):
            quad = partial(self._quad, i)
            _round_quads(self.block, values, 4 * i, quad, groups(self._columns), fmt, put)

    def _quad(self, i: int, t: Expr) -> Expr:
        return t + i * self.block.threads


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes a row; ``early`` needs nothing that other kernels write: weights of norms, at most."""

    early: Callable[[], None]
    late: Callable[[], Private]


def _as_it_is(
    _: Rows, row: _Row, inputs: list[Any], _total: Any, at: tuple[Expr, ...], keeps: Expr
) -> _Maker:
    (x,) = inputs
    values = row.room()

    def late() -> Private:
        row.load(values, lambda column: x[(*at, column)])
        return values

    return _Maker(lambda: None, late)


def _normalized(
    norm: Norm, row: _Row, inputs: list[Any], _total: Any, at: tuple[Expr, ...], keeps: Expr
) -> _Maker:
    x, weight = inputs
    values, gains = row.room(), row.room()

    def late() -> Private:
        row.load(values, lambda column: x[(*at, column)])
        row.normalize(values, gains, norm.eps)
        return values

    return _Maker(lambda: row.load(gains, lambda column: weight[column]), late)


def _added(
    residual: Residual, row: _Row, inputs: list[Any], total: Any, at: tuple[Expr, ...], keeps: Expr
) -> _Maker:
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

        def keep(t: Expr) -> None:
            with nullcontext() if keeps is None else when(keeps):
                row.each(t, lambda column, i: store(total, values.get(t, i), *at, column))

        row.block.phase(add, barrier=False)
        row.block.phase(keep, barrier=False)
        row.normalize(values, gains, residual.eps)
        return values

    return _Maker(early, late)


def _gated(
    gate: Gate, row: _Row, inputs: list[Any], _total: Any, at: tuple[Expr, ...], keeps: Expr
) -> _Maker:
    opener, gated = inputs
    values, factors = row.room(), row.room()

    def late() -> Private:
        row.load(values, lambda column: opener[(*at, gate.gate.offset + column)])
        row.load(factors, lambda column: gated[(*at, gate.up.offset + column)])

        def multiply(t: Expr) -> None:
            for i in range(values.count):
                opened = _ACTIVATIONS[gate.function](values.get(t, i))
                values.set(t, opened * factors.get(t, i), i)

        row.block.phase(multiply, barrier=False)
        return values

    return _Maker(lambda: None, late)


_MAKERS: Final[Mapping[type, Callable[..., _Maker]]] = {
    Rows: _as_it_is,
    Norm: _normalized,
    Residual: _added,
    Gate: _gated,
}


def _round_quads(
    block: Block,
    values: Private,
    first: int,
    quad: Callable[[Expr], Expr],
    count: int | Expr,
    fmt: ActivationFormat,
    put: _Put,
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


_GROUP_LANES: Final = (1, 2, 4)
"""Bits of a thread's number that tell the quads of a group apart."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """The parameters that a packed weight is passed in; ``words`` is its data, 4 bytes a time."""

    words: Any
    table: Any
    serial: bool
    known: tuple[Format, ...]

    @classmethod
    def declare(cls, serial: bool, formats: Sequence[str]) -> Callable[[], "_Weight"]:
        """Declares them as the next parameters; to be called once all parameters are declared."""
        size, tiles = symbol("size"), symbol("tiles")
        data, table = param("W", (size,), "uint8"), param("table", (tiles, 3), "int32")
        known = tuple({FORMATS[name].layout: FORMATS[name] for name in formats}.values())

        def view() -> "_Weight":
            return cls(T.decl_buffer((size // 4,), "uint32", data=data.data), table, serial, known)

        return view

    @property
    def tiles(self) -> Expr:
        """The number of tiles."""
        return self.table.shape[0]

    def formats(self, t: Expr, count: Expr) -> Iterator["_Tile"]:
        """Tile ``t`` of ``count`` groups once for every layout, each time inside its branch."""
        layout = hold(self.table[t, 0])
        base = hold(self.table[t, 1])
        return self.by_layout(layout, base, lambda: self.entries(t), t, count)

    def by_layout(
        self,
        layout: Expr,
        base: Expr,
        entries: Callable[[], tuple[Expr, ...]],
        t: Expr,
        count: Expr,
    ) -> Iterator["_Tile"]:
        """The same for a tile that has been looked up in the table."""
        for fmt in self.known:
            with when(layout == fmt.layout):
                yield _Tile(self, t, base, count, fmt, entries() if fmt.codebook else ())

    def entries(self, t: Expr) -> tuple[Expr, ...]:
        """The 16 entries that a tile's codes look up, as signed bytes."""
        at = hold(T.cast(self.table[t, 2], "int64") * (VECTOR // 4))
        return tuple(hold(self.words[at + i] ^ _u32(0x80808080)) for i in range(4))

    def row_scale(self, t: Expr, count: Expr, row: Expr) -> Expr:
        """A row's scale as float32, in units that undo those of its codes.

        The half float is widened by hand: exponent and fraction land in their places, and the
        product moves the bias, for subnormals as well.
        """
        base = T.cast(self.table[t, 1], "int64") * (VECTOR // 4) + count % BLOCK * (SIDE // 4)
        half = hold(self.words[base + row // 2] >> T.cast(row % 2 * 16, "uint32") & _u32(0xFFFF))
        bits = (half & _u32(0x7FFF)) << _u32(13) | (half & _u32(0x8000)) << _u32(16)
        shift = T.max(T.int32(ZERO_BITS) - self.table[t, 0], T.int32(0))
        unit = T.reinterpret("float32", (T.int32(112 + 127) - shift) << 23)
        return T.reinterpret("float32", bits) * unit


@dataclass(frozen=True, slots=True)
class _Tile:
    """A packed tile of a known layout inside a kernel, which starts at the vector ``base``.

    Its codes look up the vector ``entries``, if they do.
    """

    weight: _Weight
    index: Expr
    base: Expr
    count: Expr
    fmt: Format
    entries: tuple[Expr, ...]

    @contextmanager
    def blocks(self, first: Expr, step: int) -> Iterator["_Run"]:
        """Loop over every ``step``-th block of groups."""
        blocks = (self.count + BLOCK - 1) // BLOCK
        with T.serial(T.int64(0), (blocks - first + step - 1) // step) as i:
            yield self.run(hold(first + i * step))

    def run(self, index: Expr) -> "_Run":
        """A block, counted from the first that has groups.

        Vectors are counted in 32 bits, as in the table: a GPU calculates in no others.
        """
        side = BLOCK * SIDE // VECTOR
        index, rest = T.cast(index, "int32"), T.cast(self.count % BLOCK, "int32")
        header = (rest * SIDE + 2 * ROW_TILE + VECTOR - 1) // VECTOR
        at_rest = T.And(rest > 0, index == 0)
        before = index - T.Select(rest > 0, T.int32(1), T.int32(0))
        whole = header + rest * self.fmt.bits + before * (side + BLOCK * self.fmt.bits)
        start = hold(self.base + T.Select(at_rest, T.int32(0), whole))
        return _Run(
            self,
            hold(T.Select(at_rest, T.int32(0), rest + before * BLOCK)),
            hold(T.Select(at_rest, rest, T.int32(BLOCK))),
            start,
            hold(start + T.Select(at_rest, header, T.int32(side))),
        )

    def group(self, index: Expr) -> "_Group":
        """A group by its number."""
        rest = self.count % BLOCK
        skipped = T.Select(rest > 0, T.int64(1), T.int64(0))
        later = (index - rest) // BLOCK + skipped
        run = self.run(hold(T.Select(index < rest, T.int64(0), later)))
        return run.group(hold(index - run.first))

    def quad(self, quad: int | Expr, word: Callable[[int | Expr], Expr]) -> Expr:
        """The codes of 4 columns of a row, as int32; ``word`` gives the row's word of a vector."""
        shift = max(0, ZERO_BITS - self.fmt.value_bits)
        codes, low = None, 0
        for width in self.fmt.planes:
            part = word(low + quad * width // 8)
            if width < 8:
                part = part >> _u32(quad % (8 // width) * width)
                part = (part & _u32(0x01010101 * ((1 << width) - 1))) << _u32(low + shift)
            codes = part if codes is None else codes | part
            low += width
        if self.fmt.codebook:
            codes = self._look_up(hold(codes))
        elif self.fmt.bits == 8:
            codes = codes ^ _u32(0x80808080)
        return T.reinterpret("int32", hold(codes))

    def _look_up(self, codes: Expr) -> Expr:
        """The entries of 4 codes: a byte permutation picks among 8, so two of them and a choice."""
        entries, serial = self.entries, self.weight.serial
        pairs = hold(codes | codes >> _u32(4))
        selector = hold(pairs & _u32(0x77) | pairs >> _u32(8) & _u32(0x7700))
        low = byte_perm(entries[0], entries[1], selector, serial)
        if self.fmt.bits == 3:
            return low
        high = byte_perm(entries[2], entries[3], selector, serial)
        second = hold((codes >> _u32(3) & _u32(0x01010101)) * _u32(255))
        return low & ~second | high & second


@dataclass(frozen=True, slots=True)
class _Run:
    """A block of a tile: its first group, their number, the vectors at which it and codes start."""

    tile: _Tile
    first: Expr
    length: Expr
    start: Expr
    codes: Expr

    def group(self, i: Expr) -> "_Group":
        """A group by its place in the block."""
        i, start = T.cast(i, "int32"), T.cast(self.start, "int64") * ROW_TILE
        return _Group(
            self.tile,
            hold(self.first + i),
            hold(start + i * (ROW_TILE // 4)),
            hold(start + self.length * (ROW_TILE // 4) + i * (ROW_TILE // 8)),
            hold(T.cast(self.codes + i * self.tile.fmt.bits, "int64")),
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of a tile; its scales and zero-points start at these words, its codes at this vector.

    A code here is a signed byte: a weight is ``scale * (code + offset)`` in units that make
    zero-points whole. Codes of 8 bits, and entries that codes look up, are moved down by 128.
    """

    tile: _Tile
    index: Expr
    scales: Expr
    zeros: Expr
    codes: Expr

    @property
    def fmt(self) -> Format:
        """The format of the tile."""
        return self.tile.fmt

    @property
    def words(self) -> Any:
        """The packed data."""
        return self.tile.weight.words

    def word(self, row: Expr, quad: Expr) -> Expr:
        """The codes of 4 columns of a row of the tile."""
        return self.tile.quad(
            quad, lambda vector: self.words[(self.codes + vector) * ROW_TILE + row]
        )

    def side(self, row: Expr) -> Expr:
        """A row's scale in the low byte, and above it its offset, as int32."""
        scale = self.words[self.scales + row // 4] >> _u32(row % 4 * 8) & _u32(255)
        zero = self.words[self.zeros + row % 2] >> _u32(row // 2 * 4) & _u32(15)
        return self._side(scale, zero)

    def part(self, part: Expr) -> tuple[Any, list[Expr]]:
        """A thread's words of all vectors, vector by vector, and the sides of its 4 rows."""
        words = registers(self.fmt.bits * ROWS, "uint32")
        for vector in range(self.fmt.bits):
            # In this form TVM sees that it is a multiple of 4, and loads 16 bytes at once.
            at = (self.codes + vector) * ROW_TILE + part * ROWS
            store(words, load(self.words, at, lanes=ROWS), vector * ROWS)
        scales = hold(self.words[self.scales + part])
        zeros = [hold(self.words[self.zeros + i] >> _u32(part * 8)) for i in range(2)]
        sides = [
            hold(
                self._side(
                    scales >> _u32(8 * i) & _u32(255), zeros[i % 2] >> _u32(i // 2 * 4) & _u32(15)
                )
            )
            for i in range(ROWS)
        ]
        return words, sides

    def _side(self, scale: Expr, zero: Expr) -> Expr:
        top = 128 if self.fmt.value_bits == 8 else 0
        zero = T.cast(zero << _u32(max(0, self.fmt.value_bits - ZERO_BITS)), "int32")
        return T.cast(scale, "int32") | (T.int32(top) - zero) << 8


def _row_of(words: Any, row: int, vector: int | Expr) -> Expr:
    """A row's word of a vector, in what a thread of a GEMV holds."""
    return words[vector * ROWS + row]


def _lines(records: Any, digits: int) -> Any:
    """Quantized activations as [rows * digits, groups, words of a record]."""
    m, size = records.shape
    shape = (m * digits, size // (4 * WORDS * digits), WORDS)
    return T.decl_buffer(shape, "int32", data=records.data)


def _zero(offset: Expr) -> Expr:
    """What ``_float`` takes away so that an offset is added: exact in float32."""
    return T.cast(T.int32((1 << 23) + 128) - offset, "float32")


def _float(codes: Expr, byte: int, zero: Expr) -> Expr:
    """A signed byte of a word as float32, less ``zero``: written into the fraction of 2**23."""
    unsigned = (codes >> (8 * byte) & 255) ^ 0x80
    return T.reinterpret("float32", unsigned | 0x4B000000) - zero


def _u32(value: int | Expr) -> Expr:
    return T.uint32(value) if isinstance(value, int) else T.cast(value, "uint32")
