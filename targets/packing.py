"""Packing of quantized weights into the one buffer that the CPU kernels stream.

A tile is 16 rows, the 32-bit lanes of a 512-bit vector. Its columns are padded to groups of 32,
and a group is 8 quads of 4 columns. A code is stored in bit planes, low bits first, of widths that
divide a byte (``Format.planes``: 3 bits are 2 + 1). A 64-byte vector has a lane of 4 bytes for each
row, and a byte of a lane belongs to one column of a quad; a plane ``w`` bits wide holds ``8 / w``
quads side by side in the bits of each vector, so that one shift and one mask unpack a quad for 16
rows in the shape that a dot product of bytes takes.

A tile is a run of blocks: first one of ``groups % 8`` groups, then ``groups // 8`` of 8 groups. A
block of ``n`` groups is, in this order:

==========  =======================================================================================
scales      ``[n, 16]``
zeros       ``[n, 8]``: two little-endian words of 8 nibbles, even rows in the first word, odd rows
            in the second. One 64-bit broadcast and one shift by lane spread them over 16 lanes
row scales  ``float16 [16]`` and padding to a multiple of 64 bytes, in the first block only
codes       ``[n, bits, 64]``: the vectors of every plane; quad ``q`` lies in the plane's vector
            ``q * w // 8``, shifted left by ``q % (8 / w) * w``
==========  =======================================================================================

Scales close to their codes make the whole weight one stream that hardware prefetchers follow: with
the scales of a tile behind all its codes, a GEMV of 640 columns ran at half the speed of memory.

Tiles lie in row order. After them comes a vector for each non-uniform format in use: the entries
that its codes look up, repeated to fill it, which is the operand of a byte shuffle.

The tile table says for every tile the layout of its format, where it starts and where the vector of
its entries lies (0 where it has none), both in units of 64 bytes.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from mxcompile.formats import FORMATS, GROUP, MIDDLE, ZERO_BITS, Format, groups
from mxcompile.plan import ROW_TILE, TileFormats, tile_bytes
from mxcompile.quantize import codebook_of, rows_by_format

VECTOR: Final = 64
"""Bytes of a vector; the unit of offsets."""

BLOCK: Final = 8
"""Groups of a block: their scales and zeros fill 3 vectors."""

SIDE: Final = ROW_TILE + ROW_TILE // 2
"""Bytes of a group's scales and zero-points."""

QUADS: Final = GROUP // 4
"""Groups of 4 columns in a scale group."""

_CHUNK_BYTES: Final = 1 << 24
"""Codes that are packed at once: small enough that temporaries stay far below 200 MB."""

_BY_LAYOUT: Final = {fmt.layout: fmt for fmt in FORMATS.values()}
"""A format of each layout: all that is to be known where codes are unpacked."""

U8 = NDArray[np.uint8]
S = TypeVar("S", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A packed weight: its bytes and, for every tile, the row ``(layout, offset, entries)``."""

    data: U8
    table: NDArray[np.int32]


def pack(
    codes: U8, scales: U8, zeros: U8, row_scale: NDArray[np.float16], formats: TileFormats
) -> Packed:
    """Pack codes ``[rows, columns]``, scales and zeros ``[rows, groups]``, row scales ``[rows]``.

    Codes of non-uniform formats are given as the entries that they look up. Rows that pad the last
    tile have a row scale of 0, columns that pad the last group code 0.

    Raises:
        ValueError: the shapes do not fit each other or the formats, a code has too many bits, or a
            codebook too many entries.
    """
    rows, columns = codes.shape
    shape = (rows, groups(columns))
    if not (scales.shape == zeros.shape == shape and row_scale.shape == (rows,)):
        raise ValueError(f"codes {codes.shape} need scales and zeros {shape}, row scales ({rows},)")
    if len(formats.formats) != -(-rows // ROW_TILE):
        raise ValueError(f"{rows} rows do not make {len(formats.formats)} tiles")
    table = tile_table(formats.formats, columns)
    blocks = sum(tile_bytes(columns, fmt) for fmt in formats.formats) // VECTOR
    codebooks = [fmt for fmt in dict.fromkeys(formats.formats) if fmt.codebook]
    data = np.empty((blocks + len(codebooks), VECTOR), np.uint8)
    for fmt, index in rows_by_format(formats, rows):
        ours = index[::ROW_TILE] // ROW_TILE
        if fmt.centred and (zeros[index] != MIDDLE).any():
            raise ValueError(f"a zero-point of {fmt} is not {MIDDLE}")
        stored = None
        if fmt.codebook:
            entries = codebook_of(codes[index])
            if len(entries) > fmt.levels:
                raise ValueError(f"{len(entries)} entries, the codebook of {fmt} has {fmt.levels}")
            stored = np.zeros(256, np.uint8)
            stored[entries] = np.arange(len(entries))
            table[ours, 2] = blocks + codebooks.index(fmt)
            data[blocks + codebooks.index(fmt)] = np.resize(np.resize(entries, fmt.levels), VECTOR)
        for tiles in _chunks(ours, columns):
            looked_up = _rows_of(codes, tiles)
            packed = _pack_tiles(
                looked_up if stored is None else stored[looked_up],
                _rows_of(scales, tiles),
                _rows_of(zeros, tiles),
                _rows_of(row_scale, tiles),
                fmt,
            )
            at = _blocks_of(table, tiles, packed.shape[1] // VECTOR)
            data[at] = packed.reshape(-1, VECTOR)
    return Packed(data.reshape(-1), table)


def unpack(packed: Packed, rows: int, columns: int) -> tuple[U8, U8, U8, NDArray[np.float16]]:
    """The codes, scales, zeros and row scales that ``pack`` was given."""
    padded = len(packed.table) * ROW_TILE
    codes = np.empty((padded, columns), np.uint8)
    scales = np.empty((padded, groups(columns)), np.uint8)
    zeros = np.empty_like(scales)
    row_scale = np.empty(padded, np.float16)
    wholes: tuple[NDArray[Any], ...] = (codes, scales, zeros, row_scale)
    data = packed.data.reshape(-1, VECTOR)
    for layout, _, entries in np.unique(packed.table[:, [0, 0, 2]], axis=0):
        fmt = _BY_LAYOUT[int(layout)]
        same = (packed.table[:, 0] == layout) & (packed.table[:, 2] == entries)
        for tiles in _chunks(np.flatnonzero(same), columns):
            size = tile_bytes(columns, fmt)
            block = data[_blocks_of(packed.table, tiles, size // VECTOR)].reshape(-1, size)
            index = (tiles[:, None] * ROW_TILE + np.arange(ROW_TILE)).reshape(-1)
            parts = _unpack_tiles(block, columns, fmt)
            for whole, part in zip(wholes, parts, strict=True):
                whole[index] = part
            if fmt.codebook:
                codes[index] = data[entries][codes[index]]
    return codes[:rows], scales[:rows], zeros[:rows], row_scale[:rows]


def concat(parts: Sequence[Packed]) -> Packed:
    """One weight whose tiles are those of ``parts`` in order; all have the same columns."""
    starts = itertools.accumulate((len(p.data) // VECTOR for p in parts), initial=0)
    tables = []
    for part, start in zip(parts, starts, strict=False):
        table = part.table + np.array([0, start, start], np.int32)
        table[part.table[:, 2] == 0, 2] = 0
        tables.append(table)
    return Packed(np.concatenate([p.data for p in parts]), np.concatenate(tables))


def tile_table(formats: Sequence[Format], columns: int) -> NDArray[np.int32]:
    """The table of tiles that follow each other, ``(layout, offset, 0)`` in every row."""
    sizes = np.array([tile_bytes(columns, fmt) // VECTOR for fmt in formats], np.int64)
    offsets = np.cumsum(sizes) - sizes
    layouts = np.array([fmt.layout for fmt in formats])
    return np.stack([layouts, offsets, np.zeros_like(offsets)], axis=1).astype(np.int32)


def _chunks(tiles: NDArray[np.int64], columns: int) -> Iterator[NDArray[np.int64]]:
    """Tiles of one format, so many at a time that temporaries stay small."""
    step = max(1, _CHUNK_BYTES // (ROW_TILE * GROUP * groups(columns)))
    for start in range(0, len(tiles), step):
        yield tiles[start : start + step]


def _blocks_of(table: NDArray[np.int32], tiles: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    starts = table[tiles, 1].astype(np.int64)
    return np.repeat(starts, count) + np.tile(np.arange(count), len(starts))


def _rows_of(array: NDArray[S], tiles: NDArray[np.int64]) -> NDArray[S]:
    """The rows of ``tiles`` as ``[tiles, 16, ...]``; rows past the end are 0."""
    index = tiles[:, None] * ROW_TILE + np.arange(ROW_TILE)
    rows: NDArray[S] = array[np.minimum(index, len(array) - 1)]
    rows[index >= len(array)] = 0
    return rows


def _parts(columns: int, fmt: Format) -> Iterator[tuple[slice, slice, slice, slice]]:
    """For every block of a tile: its groups, and the bytes of scales, zeros and codes."""
    first = groups(columns) % BLOCK
    header = -(-(first * SIDE + 2 * ROW_TILE) // VECTOR) * VECTOR
    group, start = 0, 0
    for count in (first, *[BLOCK] * (groups(columns) // BLOCK)):
        zeros, codes = start + count * ROW_TILE, start + header
        end = codes + count * fmt.bits * VECTOR
        zeros_end = zeros + count * ROW_TILE // 2
        yield (
            slice(group, group + count),
            slice(start, zeros),
            slice(zeros, zeros_end),
            slice(codes, end),
        )
        group, start, header = group + count, end, BLOCK * SIDE


def _row_scales(tiles: U8, columns: int) -> U8:
    start = groups(columns) % BLOCK * SIDE
    return tiles[:, start : start + 2 * ROW_TILE]


def _pack_tiles(
    codes: U8, scales: U8, zeros: U8, row_scale: NDArray[np.float16], fmt: Format
) -> U8:
    count, _, columns = codes.shape
    if codes.max(initial=0) >= fmt.levels:
        raise ValueError(f"a code is {codes.max()}, {fmt} has codes below {fmt.levels}")
    if zeros.max(initial=0) >= 1 << ZERO_BITS:
        raise ValueError(f"a zero-point is {zeros.max()}, they take {ZERO_BITS} bits")
    padded = np.zeros((count, ROW_TILE, groups(columns) * GROUP), np.uint8)
    padded[:, :, :columns] = codes
    words = padded.view("<u4").reshape(count, ROW_TILE, -1, QUADS).transpose(0, 2, 3, 1)
    planes = np.zeros((count, groups(columns), fmt.bits, ROW_TILE), "<u4")
    for quad, vector, shift, low, mask in _planes(fmt):
        planes[:, :, vector] |= ((words[:, :, quad] >> low) & mask) << shift
    nibbles = zeros.reshape(count, 4, 2, 2, -1).transpose(0, 4, 3, 1, 2)
    nibbles = nibbles[..., 0] | nibbles[..., 1] << np.uint8(4)
    out = np.zeros((count, tile_bytes(columns, fmt)), np.uint8)
    for block, at_scales, at_zeros, at_codes in _parts(columns, fmt):
        out[:, at_scales] = scales[:, :, block].transpose(0, 2, 1).reshape(count, -1)
        out[:, at_zeros] = nibbles[:, block].reshape(count, -1)
        out[:, at_codes] = planes[:, block].reshape(count, -1).view(np.uint8)
    _row_scales(out, columns)[:] = np.ascontiguousarray(row_scale, "<f2").view(np.uint8)
    return out


def _unpack_tiles(tiles: U8, columns: int, fmt: Format) -> tuple[U8, U8, U8, NDArray[np.float16]]:
    count = len(tiles)
    planes = np.empty((count, groups(columns), fmt.bits * VECTOR), np.uint8)
    scales = np.empty((count, ROW_TILE, groups(columns)), np.uint8)
    nibbles = np.empty((count, groups(columns), 2, 4), np.uint8)
    for block, at_scales, at_zeros, at_codes in _parts(columns, fmt):
        size = block.stop - block.start
        scales[:, :, block] = tiles[:, at_scales].reshape(count, size, ROW_TILE).transpose(0, 2, 1)
        nibbles[:, block] = tiles[:, at_zeros].reshape(count, size, 2, 4)
        planes[:, block] = tiles[:, at_codes].reshape(count, size, fmt.bits * VECTOR)
    vectors = planes.view("<u4").reshape(count, -1, fmt.bits, ROW_TILE)
    words = np.zeros((count, ROW_TILE, groups(columns), QUADS), "<u4")
    for quad, vector, shift, low, mask in _planes(fmt):
        words[..., quad] |= (((vectors[:, :, vector] >> shift) & mask) << low).transpose(0, 2, 1)
    zeros = np.stack([nibbles & 15, nibbles >> 4], axis=-1).transpose(0, 3, 4, 2, 1)
    row_scale = np.ascontiguousarray(_row_scales(tiles, columns)).view("<f2")
    codes = words.reshape(count * ROW_TILE, -1).view(np.uint8)[:, :columns]
    rows = count * ROW_TILE
    return codes, scales.reshape(rows, -1), zeros.reshape(rows, -1), row_scale.reshape(rows)


def _planes(fmt: Format) -> Iterator[tuple[int, int, np.uint32, np.uint32, np.uint32]]:
    """Where each quad's part of each plane lies: quad, vector, shift, lowest bit of code, mask."""
    low = 0
    for width in fmt.planes:
        mask = np.uint32(0x01010101 * ((1 << width) - 1))
        for quad in range(QUADS):
            shift = quad % (8 // width) * width
            yield quad, low + quad * width // 8, np.uint32(shift), np.uint32(low), mask
        low += width
