"""Packing: what goes in comes out, and the bytes lie where the kernels read them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.formats import FORMATS, groups
from mxcompile.plan import CODEBOOK_BYTES, ROW_TILE, TileFormats, tile_bytes
from mxcompile.targets import packing
from tests.test_cpu_matmul import random_codes, random_zeros

Arrays = tuple[packing.U8, packing.U8, packing.U8, np.ndarray[tuple[int], np.dtype[np.float16]]]


def weight(rows: int, columns: int, formats: TileFormats, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, rows, columns, formats)
    shape = (rows, groups(columns))
    scales, zeros = rng.integers(0, 256, shape, dtype=np.uint8), random_zeros(rng, shape, formats)
    return codes, scales, zeros, rng.uniform(1e-3, 1e-2, rows).astype(np.float16)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, TileFormats]:
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 600))
    tiles = -(-rows // ROW_TILE)
    formats = st.lists(st.sampled_from(list(FORMATS.values())), min_size=tiles, max_size=tiles)
    return rows, columns, TileFormats(tuple(draw(formats)))


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**32))
def test_round_trip(shape: tuple[int, int, TileFormats], seed: int) -> None:
    rows, columns, formats = shape
    arrays = weight(rows, columns, formats, seed)
    packed = packing.pack(*arrays, formats)
    assert packed.table.dtype == np.int32
    assert packed.table[:, 0].tolist() == [fmt.layout for fmt in formats.formats]
    sizes = [tile_bytes(columns, fmt) for fmt in formats.formats]
    assert (packed.table[:, 1] * packing.VECTOR).tolist() == [
        sum(sizes[:i]) for i in range(len(sizes))
    ]
    codebooks = [fmt for fmt in dict.fromkeys(formats.formats) if fmt.codebook]
    assert len(packed.data) == sum(sizes) + len(codebooks) * CODEBOOK_BYTES
    assert (packed.table[:, 2] > 0).tolist() == [bool(fmt.codebook) for fmt in formats.formats]
    for before, after in zip(arrays, packing.unpack(packed, rows, columns), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_lie_in_planes_of_quads(name: str) -> None:
    fmt, columns = FORMATS[name], 11 * 32  # a block of 3 groups, then one of 8
    codes, scales, zeros, row_scale = weight(16, columns, TileFormats((fmt,)))
    tile = packing.pack(codes, scales, zeros, row_scale, TileFormats((fmt,))).data
    header = 128  # 3 * 24 bytes of scales and zeros, 32 of row scales, padding
    for row, column in [(0, 0), (15, 95), (7, 96), (9, 351), (3, 130)]:
        group, quad, byte = column // 32, column % 32 // 4, column % 4
        base = header + group * 64 * fmt.bits + (192 if group >= 3 else 0)
        code, low = 0, 0
        for width in fmt.planes:
            vector = low + quad * width // 8
            value = int(tile[base + vector * 64 + row * 4 + byte])
            code |= (value >> quad % (8 // width) * width & (1 << width) - 1) << low
            low += width
        entries = np.unique(codes) if fmt.codebook else np.arange(256)
        assert entries[code] == codes[row, column]


def test_entries_of_a_codebook_fill_a_vector() -> None:
    formats = TileFormats.parse("table3,int2,nf4")
    arrays = weight(48, 70, formats)
    packed = packing.pack(*arrays, formats)
    vectors = packed.data.reshape(-1, 64)
    for tile, levels in ((0, 8), (2, 16)):
        entries = np.unique(arrays[0][16 * tile : 16 * tile + 16])
        assert len(entries) == levels  # 1,120 draws miss none of them
        assert vectors[packed.table[tile, 2]].tolist() == entries.tolist() * (64 // levels)


def test_scales_lie_before_the_codes_of_their_block() -> None:
    formats = TileFormats.parse("int4")
    codes, scales, zeros, row_scale = weight(16, 11 * 32, formats)
    tile = packing.pack(codes, scales, zeros, row_scale, formats).data
    second = 128 + 3 * 64 * 4
    for group, row in [(0, 0), (2, 13), (3, 0), (10, 15)]:
        start, size, i = (0, 3, group) if group < 3 else (second, 8, group - 3)
        assert tile[start + i * 16 + row] == scales[row, group]
        byte = int(tile[start + size * 16 + i * 8 + row % 2 * 4 + row // 4])
        assert byte >> row // 2 % 2 * 4 & 15 == zeros[row, group]
    assert tile[72:104].tobytes() == row_scale.tobytes()


def test_padding_rows_have_no_weight() -> None:
    formats = TileFormats.parse("int3*2")
    packed = packing.pack(*weight(17, 40, formats), formats)
    codes, scales, zeros, row_scale = packing.unpack(packed, 32, 40)
    assert not row_scale[17:].any()
    assert not codes[17:].any()
    assert not scales[17:].any()
    assert not zeros[17:].any()


def test_concat_is_packing_of_the_rows_below_each_other() -> None:
    formats = [TileFormats.parse(text) for text in ("int2,table3", "int4", "int5,table3")]
    parts = [weight(ROW_TILE * len(f.formats), 70, f, i) for i, f in enumerate(formats)]
    joined = packing.concat([packing.pack(*p, f) for p, f in zip(parts, formats, strict=True)])
    found = packing.unpack(joined, 5 * ROW_TILE, 70)
    for array, expected in zip(found, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(expected))


def test_what_does_not_fit_is_refused() -> None:
    formats = TileFormats.parse("int4")
    codes, scales, zeros, row_scale = weight(16, 32, formats)
    with pytest.raises(ValueError, match="a code is 16, int4 has codes below 16"):
        packing.pack(codes + np.uint8(16 - codes.max()), scales, zeros, row_scale, formats)
    with pytest.raises(ValueError, match="a zero-point is 16, they take 4 bits"):
        packing.pack(codes, scales, np.full_like(zeros, 16), row_scale, formats)
    with pytest.raises(ValueError, match="a zero-point of int8 is not 8"):
        packing.pack(codes, scales, zeros, row_scale, TileFormats.parse("int8"))
    with pytest.raises(ValueError, match="16 rows do not make 2 tiles"):
        packing.pack(codes, scales, zeros, row_scale, TileFormats.parse("int4*2"))
    every = np.arange(16 * 32).reshape(16, 32).astype(np.uint8)
    with pytest.raises(ValueError, match="256 entries, the codebook of nf4 has 16"):
        packing.pack(every, scales, zeros, row_scale, TileFormats.parse("nf4"))
    with pytest.raises(ValueError, match="need scales and zeros"):
        packing.pack(codes, scales[:, :0], zeros, row_scale, formats)
