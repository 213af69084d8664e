"""The CPU matmul kernels against numpy float64 of the formats' definition.

Tolerances are rounding-error bounds: n float32 operations are off by at most n * 2**-24 of the sum
of the magnitudes of the terms, to first order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from mxcompile import target
from mxcompile.formats import FORMATS, GROUP, groups
from mxcompile.plan import ROW_TILE, TileFormats
from mxcompile.targets import packing
from mxcompile.targets.cpu_matmul import (
    RECORD,
    Instructions,
    Knobs,
    MatmulKernel,
    activation_bytes,
)

UNIT = 2.0**-24
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
REQUIRES = {"avx512vnni": "avx512_vnni", "avx2": "avx2", "generic": None}
CPUS = {"avx512vnni": "cascadelake", "avx2": "haswell", "generic": None}
NAMES = ("quantize_activation", "matmul_int8", "matmul_f32", "gather_rows")


@dataclass(frozen=True)
class Library:
    """The compiled kernels, called with arrays."""

    module: Any
    kernel: MatmulKernel

    def __call__(self, name: str, *inputs: Any, shape: tuple[int, ...], dtype: str = "f4") -> Any:
        # What a kernel must write is NaN or 85 before.
        out = tvm.runtime.tensor(np.full(shape, np.nan if dtype == "f4" else 85, dtype))
        self.module[name](*(tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs), out)
        return out.numpy()


@cache
def build(kernel: MatmulKernel, names: tuple[str, ...] = NAMES) -> Library:
    """A kernel's functions; cached because it takes seconds."""
    functions = {name: getattr(kernel, name)().with_attr("global_symbol", name) for name in names}
    options = {"kind": "llvm"} | ({"mcpu": cpu} if (cpu := CPUS[kernel.instructions]) else {})
    module = tvm.tirx.build(tvm.IRModule(functions), target=tvm.target.Target(options))
    return Library(module, kernel)


@pytest.fixture(params=get_args(Instructions))
def library(request: pytest.FixtureRequest) -> Library:
    needed = REQUIRES[request.param]
    if needed and needed not in target.host_features():
        pytest.skip(f"this CPU lacks {needed}")
    return build(MatmulKernel(request.param))


@dataclass(frozen=True)
class Weight:
    packed: packing.Packed
    values: F64

    @classmethod
    def random(cls, rows: int, columns: int, formats: TileFormats, seed: int = 0) -> "Weight":
        rng = np.random.default_rng(seed)
        bits = np.repeat([fmt.bits for fmt in formats.formats], ROW_TILE)[:rows, None]
        codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        shape = (rows, groups(columns))
        scales, zeros = (rng.integers(0, top, shape, dtype=np.uint8) for top in (256, 16))
        row_scale = rng.uniform(-1e-3, 1e-3, rows).astype(np.float16)
        row_scale[0] = 2.0**-24  # the smallest subnormal
        scale, zero = (np.repeat(a, GROUP, 1)[:, :columns].astype(float) for a in (scales, zeros))
        values = row_scale.astype(float)[:, None] * scale * (codes - zero * 2.0 ** (bits - 4))
        return cls(packing.pack(codes, scales, zeros, row_scale, formats), values)

    @property
    def arguments(self) -> tuple[Any, Any]:
        return self.packed.data, self.packed.table


def activations(m: int, columns: int) -> F32:
    return np.random.default_rng(m).standard_normal((m, columns)).astype(np.float32)


def quantized(library: Library, x: F32) -> NDArray[np.int8]:
    shape = (len(x), activation_bytes(x.shape[1]))
    return np.asarray(library("quantize_activation", x, shape=shape, dtype="i1"))


def parts(q: NDArray[np.int8]) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """The codes [m, groups, 32], scales and sums [m, groups] of a quantized activation."""
    records = q.reshape(len(q), -1, RECORD)
    scales, sums = (np.ascontiguousarray(records[..., i : i + 4]) for i in (GROUP, GROUP + 4))
    return records[..., :GROUP], scales.view("<f4")[..., 0], sums.view("<i4")[..., 0]


def check_int8(library: Library, weight: Weight, x: F32) -> None:
    q = quantized(library, x)
    codes, scales, _ = parts(q)
    columns = x.shape[1]
    seen = (codes * scales.astype(float)[..., None]).reshape(len(x), -1)[:, :columns]
    rows = len(weight.values)
    y = library("matmul_int8", q, *weight.arguments, shape=(len(x), rows))
    # A group is exact; its sum is rounded when multiplied by two scales and when added up.
    by_group = np.add.reduceat(seen[:, None] * weight.values, range(0, columns, GROUP), axis=2)
    bound = (groups(columns) + 3) * UNIT * np.abs(by_group).sum(2)
    assert (np.abs(y - by_group.sum(2)) <= bound).all()


def check_f32(library: Library, weight: Weight, x: F32) -> None:
    y = library("matmul_f32", x, *weight.arguments, shape=(len(x), len(weight.values)))
    terms = x[:, None] * weight.values
    # Products and sums inside a group, adding up to 4 chains, two scales, and sums of groups.
    operations = GROUP + 1 + 3 + 2 + groups(x.shape[1])
    assert (np.abs(y - terms.sum(2)) <= operations * UNIT * np.abs(terms).sum(2)).all()


CHECKS = {"int8": check_int8, "f32": check_f32}
MIX = "int8,int2,int5,int3,int6,int4"


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("fmt", FORMATS)
def test_uniform(library: Library, check: Callable[..., None], m: int, fmt: str) -> None:
    columns = 9 * GROUP  # a block of 1 group and one of 8
    weight = Weight.random(2 * ROW_TILE, columns, TileFormats.parse(f"{fmt}*2"))
    check(library, weight, activations(m, columns))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("columns", [1, 31, 70, 256, 259, 640])
def test_mixed_and_odd(library: Library, check: Callable[..., None], m: int, columns: int) -> None:
    rows = 5 * ROW_TILE + 3
    check(library, Weight.random(rows, columns, TileFormats.parse(MIX)), activations(m, columns))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_prefill_in_chunks(library: Library, check: Callable[..., None]) -> None:
    weight = Weight.random(2 * ROW_TILE, 70, TileFormats.parse("int3,int8"))
    check(library, weight, activations(2 * 128 + 13, 70))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("formats", ["int2*400,int8*300", "int8*300,int2*400", "int4*700"])
def test_threads_share_bytes(library: Library, check: Callable[..., None], formats: str) -> None:
    weight = Weight.random(700 * ROW_TILE, 64, TileFormats.parse(formats))
    check(library, weight, activations(1, 64))


def test_the_worst_sums_do_not_overflow(library: Library) -> None:
    """All codes and activations at their ends, with either sign."""
    for fmt in FORMATS.values():
        codes = np.full((ROW_TILE, GROUP), fmt.levels - 1, np.uint8)
        ones = np.ones((ROW_TILE, 1), np.uint8)
        row_scale = np.ones(ROW_TILE, np.float16)
        for zero in (0, 15):
            packed = packing.pack(
                codes, ones, ones * np.uint8(zero), row_scale, TileFormats((fmt,))
            )
            values = np.full((ROW_TILE, GROUP), fmt.levels - 1 - zero * fmt.zero_step)
            for sign in (-1, 1):
                x = np.full((1, GROUP), sign, np.float32)
                check_int8(library, Weight(packed, values), x)


def test_knobs_change_no_result(library: Library) -> None:
    """Sums inside a group are exact in any order, and groups are added in the same."""
    knobs = (("int3", Knobs(row_block=3, chains=4, prefetch=640)),)
    formats = ("int3",)
    other = MatmulKernel(library.kernel.instructions, formats, knobs, jobs=3, chunk=8)
    changed = build(other, ("matmul_int8",))
    weight = Weight.random(5 * ROW_TILE + 3, 640, TileFormats.parse("int3*6"))
    for m in (1, 13):
        q, shape = quantized(library, activations(m, 640)), (m, len(weight.values))
        expected = library("matmul_int8", q, *weight.arguments, shape=shape)
        found = changed("matmul_int8", q, *weight.arguments, shape=shape)
        np.testing.assert_array_equal(found, expected)


def test_formats_that_a_kernel_leaves_out_are_not_computed() -> None:
    weight = Weight.random(2 * ROW_TILE, 64, TileFormats.parse("int4,int3"))
    only = build(MatmulKernel(formats=("int4",)), ("matmul_f32",))
    y = only("matmul_f32", activations(1, 64), *weight.arguments, shape=(1, 2 * ROW_TILE))
    assert np.isfinite(y[0, :ROW_TILE]).all() and np.isnan(y[0, ROW_TILE:]).all()


@pytest.mark.parametrize("columns", [1, 4, 70, 256, 640])
def test_gather_rows(library: Library, columns: int) -> None:
    rows = 6 * ROW_TILE
    weight = Weight.random(rows, columns, TileFormats.parse(MIX))
    ids = np.random.default_rng(0).permutation(rows)
    y = library("gather_rows", ids, *weight.arguments, shape=(rows, columns))
    # Only the product with the row scale is rounded.
    np.testing.assert_array_equal(y, weight.values[ids].astype(np.float32))


def test_gather_stays_inside(library: Library) -> None:
    weight = Weight.random(2 * ROW_TILE, 40, TileFormats.parse("int4,int3"))
    ids = np.array([-1, -(2**62), 32, 2**62])
    y = library("gather_rows", ids, *weight.arguments, shape=(4, 40))
    np.testing.assert_array_equal(y, weight.values[[0, 0, 31, 31]].astype(np.float32))


@pytest.mark.parametrize("columns", [1, 16, 17, 32, 70, 640])
@pytest.mark.parametrize("m", [1, 3, 100])
def test_quantize(library: Library, m: int, columns: int) -> None:
    x = activations(m, columns)
    padded = np.zeros((m, groups(columns) * GROUP), np.float32)
    padded[:, :columns] = x
    by_group = padded.reshape(m, -1, GROUP)
    codes, scales, sums = parts(quantized(library, x))
    np.testing.assert_array_equal(sums, codes.sum(2, dtype=np.int32))
    np.testing.assert_array_equal(scales, np.abs(by_group).max(2) / np.float32(127))
    # The inverse, its product and the rounding's sum are each rounded.
    exact = by_group / scales.astype(float)[..., None]
    assert np.abs(codes - exact).max() <= 0.5 + 4 * 127 * UNIT
    assert np.abs(codes).max() == 127


def test_quantize_rounds_half_to_even(library: Library) -> None:
    x = np.zeros((1, GROUP), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49]
    codes, scales, _ = parts(quantized(library, x))
    assert scales.item() == 1
    assert codes[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 0]


def test_quantize_hides_no_nan_and_takes_zeros(library: Library) -> None:
    x = np.zeros((4, GROUP), np.float32)
    x[1, 3] = np.nan
    x[2, 5] = -np.inf
    x[3, :2] = [1e-40, -1e-38]
    codes, scales, _ = parts(quantized(library, x))
    assert not codes[[0, 3]].any()
    assert scales[[0, 3]].tolist() == [[0], [0]]
    assert np.isnan(scales[1, 0])
    assert np.isinf(scales[2, 0])
