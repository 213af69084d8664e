"""Packed weights inside CUDA kernels: where tiles, blocks and groups lie, and their codes.

The layout is that of ``packing``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import FORMATS, ZERO_BITS, Format
from mxcompile.plan import ROW_TILE
from mxcompile.targets.cpu_norm import param, symbol
from mxcompile.targets.cuda_block import byte_perm, hold, load, registers, store, when
from mxcompile.targets.packing import BLOCK, SIDE, VECTOR

ROWS: Final = 4
"""Rows of a tile that a thread of a GEMV takes: 16 bytes of each vector."""


@dataclass(frozen=True, slots=True)
class Weight:
    """The parameters that a packed weight is passed in; ``words`` is its data, 4 bytes a time."""

    words: Any
    table: Any
    serial: bool
    known: tuple[Format, ...]

    @classmethod
    def declare(cls, serial: bool, formats: Sequence[str]) -> Callable[[], "Weight"]:
        """Declares them as the next parameters; to be called once all parameters are declared."""
        size, tiles = symbol("size"), symbol("tiles")
        data, table = param("W", (size,), "uint8"), param("table", (tiles, 3), "int32")
        known = tuple({FORMATS[name].layout: FORMATS[name] for name in formats}.values())

        def view() -> "Weight":
            return cls(T.decl_buffer((size // 4,), "uint32", data=data.data), table, serial, known)

        return view

    @property
    def tiles(self) -> Expr:
        """The number of tiles."""
        return self.table.shape[0]

    def formats(self, t: Expr, count: Expr) -> Iterator["Tile"]:
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
    ) -> Iterator["Tile"]:
        """The same for a tile that has been looked up in the table."""
        for fmt in self.known:
            with when(layout == fmt.layout):
                yield Tile(self, t, base, count, fmt, entries() if fmt.codebook else ())

    def entries(self, t: Expr) -> tuple[Expr, ...]:
        """The 16 entries that a tile's codes look up, as signed bytes."""
        at = hold(T.cast(self.table[t, 2], "int64") * (VECTOR // 4))
        return tuple(hold(self.words[at + i] ^ u32(0x80808080)) for i in range(4))

    def row_scale(self, t: Expr, count: Expr, row: Expr) -> Expr:
        """A row's scale as float32, in units that undo those of its codes.

        The half float is widened by hand: exponent and fraction land in their places, and the
        product moves the bias, for subnormals as well.
        """
        base = T.cast(self.table[t, 1], "int64") * (VECTOR // 4) + count % BLOCK * (SIDE // 4)
        half = hold(self.words[base + row // 2] >> T.cast(row % 2 * 16, "uint32") & u32(0xFFFF))
        bits = (half & u32(0x7FFF)) << u32(13) | (half & u32(0x8000)) << u32(16)
        shift = T.max(T.int32(ZERO_BITS) - self.table[t, 0], T.int32(0))
        unit = T.reinterpret("float32", (T.int32(112 + 127) - shift) << 23)
        return T.reinterpret("float32", bits) * unit


@dataclass(frozen=True, slots=True)
class Tile:
    """A packed tile of a known layout inside a kernel, which starts at the vector ``base``.

    Its codes look up the vector ``entries``, if they do.
    """

    weight: Weight
    index: Expr
    base: Expr
    count: Expr
    fmt: Format
    entries: tuple[Expr, ...]

    @contextmanager
    def blocks(self, first: Expr, step: int) -> Iterator["Run"]:
        """Loop over every ``step``-th block of groups."""
        blocks = (self.count + BLOCK - 1) // BLOCK
        with T.serial(T.int64(0), (blocks - first + step - 1) // step) as i:
            yield self.run(hold(first + i * step))

    def run(self, index: Expr) -> "Run":
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
        return Run(
            self,
            hold(T.Select(at_rest, T.int32(0), rest + before * BLOCK)),
            hold(T.Select(at_rest, rest, T.int32(BLOCK))),
            start,
            hold(start + T.Select(at_rest, header, T.int32(side))),
        )

    def group(self, index: Expr) -> "Group":
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
                part = part >> u32(quad % (8 // width) * width)
                part = (part & u32(0x01010101 * ((1 << width) - 1))) << u32(low + shift)
            codes = part if codes is None else codes | part
            low += width
        if self.fmt.codebook:
            codes = self._look_up(hold(codes))
        elif self.fmt.bits == 8:
            codes = codes ^ u32(0x80808080)
        return T.reinterpret("int32", hold(codes))

    def _look_up(self, codes: Expr) -> Expr:
        """The entries of 4 codes: a byte permutation picks among 8, so two of them and a choice."""
        entries, serial = self.entries, self.weight.serial
        pairs = hold(codes | codes >> u32(4))
        selector = hold(pairs & u32(0x77) | pairs >> u32(8) & u32(0x7700))
        low = byte_perm(entries[0], entries[1], selector, serial)
        if self.fmt.bits == 3:
            return low
        high = byte_perm(entries[2], entries[3], selector, serial)
        second = hold((codes >> u32(3) & u32(0x01010101)) * u32(255))
        return low & ~second | high & second


@dataclass(frozen=True, slots=True)
class Run:
    """A block of a tile: its first group, their number, the vectors at which it and codes start."""

    tile: Tile
    first: Expr
    length: Expr
    start: Expr
    codes: Expr

    def group(self, i: Expr) -> "Group":
        """A group by its place in the block."""
        i, start = T.cast(i, "int32"), T.cast(self.start, "int64") * ROW_TILE
        return Group(
            self.tile,
            hold(self.first + i),
            hold(start + i * (ROW_TILE // 4)),
            hold(start + self.length * (ROW_TILE // 4) + i * (ROW_TILE // 8)),
            hold(T.cast(self.codes + i * self.tile.fmt.bits, "int64")),
        )


@dataclass(frozen=True, slots=True)
class Group:
    """A group of a tile; its scales and zero-points start at these words, its codes at this vector.

    A code here is a signed byte: a weight is ``scale * (code + offset)`` in units that make
    zero-points whole. Codes of 8 bits, and entries that codes look up, are moved down by 128.
    """

    tile: Tile
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
        scale = self.words[self.scales + row // 4] >> u32(row % 4 * 8) & u32(255)
        zero = self.words[self.zeros + row % 2] >> u32(row // 2 * 4) & u32(15)
        return self._side(scale, zero)

    def part(self, part: Expr) -> tuple[Any, list[Expr]]:
        """A thread's words of all vectors, vector by vector, and the sides of its 4 rows."""
        words = registers(self.fmt.bits * ROWS, "uint32")
        for vector in range(self.fmt.bits):
            # In this form TVM sees that it is a multiple of 4, and loads 16 bytes at once.
            at = (self.codes + vector) * ROW_TILE + part * ROWS
            store(words, load(self.words, at, lanes=ROWS), vector * ROWS)
        scales = hold(self.words[self.scales + part])
        zeros = [hold(self.words[self.zeros + i] >> u32(part * 8)) for i in range(2)]
        sides = [
            hold(
                self._side(
                    scales >> u32(8 * i) & u32(255), zeros[i % 2] >> u32(i // 2 * 4) & u32(15)
                )
            )
            for i in range(ROWS)
        ]
        return words, sides

    def _side(self, scale: Expr, zero: Expr) -> Expr:
        top = 128 if self.fmt.value_bits == 8 else 0
        zero = T.cast(zero << u32(max(0, self.fmt.value_bits - ZERO_BITS)), "int32")
        return T.cast(scale, "int32") | (T.int32(top) - zero) << 8


def row_of(words: Any, row: int, vector: int | Expr) -> Expr:
    """A row's word of a vector, in what a thread of a GEMV holds."""
    return words[vector * ROWS + row]


def u32(value: int | Expr) -> Expr:
    """A number as uint32."""
    return T.uint32(value) if isinstance(value, int) else T.cast(value, "uint32")
