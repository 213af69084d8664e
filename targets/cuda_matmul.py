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

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import FORMATS, GROUP, ActivationFormat, groups
from mxcompile.plan import ROW_TILE
from mxcompile.targets.cpu_matmul import Gate, Norm, Residual, Source
from mxcompile.targets.cpu_norm import int64, param, symbol
from mxcompile.targets.cuda_block import (
    WARP,
    Block,
    Private,
    build,
    hold,
    launch,
    load,
    registers,
    store,
    strided,
    when,
)
from mxcompile.targets.cuda_rounding import (
    ACTIVATIONS,
    MAKERS,
    WORDS,
    Row,
    columns_of,
    declare,
    declare_total,
    round_quads,
)
from mxcompile.targets.cuda_weight import ROWS, Group, Tile, Weight, row_of
from mxcompile.targets.packing import BLOCK, QUADS

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

_Staging = tuple[Callable[[], None], Callable[[Expr], None]]
"""What a product does to have records in shared memory: before it waits, and from a group on."""


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
            total = declare_total(source, b, s)
            records = param("Q", (m, q), "int8")

            def body(block: Block) -> None:
                at = block.index
                row = Row(block, source.columns)

                def keep(column: Expr, value: Expr) -> None:
                    store(total, value, *at, column)

                made = MAKERS[type(source)](source, row, inputs, at, keep)
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
            open_weight = Weight.declare(self.serial, self.formats)
            total, y = declare_total(source, one, one), param("Y", (one, n))
            count = groups(columns)

            def prepare(block: Block, staged: Any) -> _Staging:
                row = Row(block, columns)
                at = int64(0), int64(0)

                def keep(column: Expr, value: Expr) -> None:
                    with when(block.index[0] == 0):
                        store(total, value, *at, column)

                made = MAKERS[type(source)](source, row, inputs, at, keep)

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
            (opener, gated), records = declare(gate, b, s), param("Q", (m, q), "int8")

            def product(row: Expr, column: Expr) -> Expr:
                at = row // s, row % s
                x = hold(opener[(*at, gate.gate.offset + column)])
                return ACTIVATIONS[gate.function](x) * gated[(*at, gate.up.offset + column)]

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
            round_quads(block, values, 0, quad, codes.shape[1], fmt, put)

        launch([records.shape[0], steps], _ROUNDERS, self.serial, body)

    def matmul_quantized(self, fmt: ActivationFormat) -> PrimFunc:
        """Y = Q @ W.T with exact integer sums inside a group, for each digit."""

        def emit() -> None:
            m, n, q = map(symbol, "mnq")
            records, open_weight = (
                param("Q", (m, q), "int8"),
                Weight.declare(self.serial, self.formats),
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
            x, open_weight = param("X", (m, k)), Weight.declare(self.serial, self.formats)
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
                Weight.declare(self.serial, self.formats),
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

    def _multiply_row(self, weight: Weight, q: Any, y: Any, digits: int) -> None:
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
        weight: Weight,
        y: Any,
        count: Expr,
        digits: int,
        kept: int,
        prepare: Callable[[Block, Any], _Staging],
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
            with T.serial(T.int64(0), (blocks + kept - 1) // kept) as turn:
                first = hold(_first_group(turn * kept, count))
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

    def _dot_rows(self, weight: Weight, x: Any, y: Any, rows: int) -> None:
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

    def _mma(self, weight: Weight, q: Any, y: Any, digits: int, tiles: int, batches: int) -> None:
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
            blocks = (count + BLOCK - 1) // BLOCK

            def tile_of(t: Expr) -> Expr:
                return T.min(first_tile + t // WARP // splits, weight.tiles - 1)

            def at_block(step: Expr, split: Expr) -> Expr:
                return step * splits + split

            def stage(step: Expr) -> Callable[[Expr], None]:
                def copy(t: Expr) -> None:
                    def word(i: Expr) -> None:
                        column = hold(i % (BLOCK * WORDS))
                        place = hold(i // (BLOCK * WORDS))
                        index = at_block(step, place // width)
                        group = hold(_first_group(index, count) + column // WORDS)
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
        weight: Weight,
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

    def __init__(self, block: Block, weight: Weight) -> None:
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

    def formats(self, t: Expr, index: Expr, count: Expr) -> Iterator[Tile]:
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

    def __init__(self, block: Block, weight: Weight) -> None:
        self.words = block.private(ROWS * max(fmt.bits for fmt in weight.known), "uint32")
        self.sides = block.private(ROWS, "int32")
        self.group = block.private(1, "int32")

    def fetch(self, t: Expr, group: Group) -> None:
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
    block: Block, t: Expr, tile: Tile, fetched: _Fetched, records: list[Any], sums: Private
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
    x: Any, group: Group, part: Expr, places: list[Expr], add: Callable[[int, Expr], None]
) -> None:
    """Add a group's product with rows of x: ``r * ROWS + i`` is of place r and the part's row i."""
    words, sides = group.part(part)
    zeros = [hold(_zero(side >> 8)) for side in sides]
    dots = registers(len(places) * ROWS, "float32")
    for index in range(len(places) * ROWS):
        store(dots, T.float32(0), index)
    with T.unroll(0, QUADS) as quad:
        codes = [hold(group.tile.quad(quad, partial(row_of, words, i))) for i in range(ROWS)]
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


def _gather_quad(tile: Tile, y: Any, i: Expr, row: Expr, quad: Expr) -> None:
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


def _first_group(index: Expr, count: Expr) -> Expr:
    """The first group of a block; blocks are counted from the first that has groups."""
    rest = count % BLOCK
    missing = T.Select(rest == 0, T.int64(0), BLOCK - rest)
    return T.max(index * BLOCK - missing, T.int64(0))


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
