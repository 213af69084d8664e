"""The CUDA matmul kernels, serially on this CPU and on a GPU, against the formats in float64.

Everything is tested as ``test_cpu_matmul`` tests the CPU kernels, with its tolerances: sums of a
group are exact, and float32 rounding is bounded whatever the order of additions.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from mxcompile.formats import ACTIVATION_FORMATS, FORMATS, GROUP, ActivationFormat, groups
from mxcompile.plan import ROW_TILE, TileFormats
from tests.cuda import Reading, readings
from tests.test_cpu_matmul import (
    CHECKS,
    MIX,
    Library,
    Weight,
    activations,
    kernels,
    parts,
    quantized,
    test_a_gate_is_rounded,
    test_a_norm_is_rounded,
    test_a_sum_is_kept_and_its_norm_rounded,
)

__all__ = [
    "test_a_gate_is_rounded",
    "test_a_norm_is_rounded",
    "test_a_sum_is_kept_and_its_norm_rounded",
]
"""Tests that are the same for all families, here with the fixture of this one."""


@cache
def built(reading: Reading, name: str) -> Any:
    """A kernel by its name in ``test_cpu_matmul``; on its own, as it takes seconds."""
    return reading.build({name: kernels(reading.matmul)[name]()})[name]


def compiled(reading: Reading) -> Library:
    def call(name: str, *arrays: Any, outputs: int = 1) -> Any:
        tensors = [reading.tensor(x) for x in arrays]
        built(reading, name)(*tensors)
        found = [tensor.numpy() for tensor in tensors[-outputs:]]
        return found if outputs > 1 else found[0]

    return Library(call)


@pytest.fixture(params=readings(), ids=str)
def library(request: pytest.FixtureRequest) -> Library:
    return compiled(request.param)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("m", [1, 2, 8, 21])
@pytest.mark.parametrize("fmt", FORMATS)
def test_uniform(library: Library, check: Callable[..., None], m: int, fmt: str) -> None:
    columns = 9 * GROUP  # a block of 1 group and one of 8
    weight = Weight.random(2 * ROW_TILE, columns, TileFormats.parse(f"{fmt}*2"))
    check(library, weight, activations(m, columns))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("m", [1, 3, 8, 21])
@pytest.mark.parametrize("columns", [1, 31, 70, 256, 259, 640, 1100])
def test_mixed_and_odd(library: Library, check: Callable[..., None], m: int, columns: int) -> None:
    rows = 5 * ROW_TILE + 3
    check(library, Weight.random(rows, columns, TileFormats.parse(MIX)), activations(m, columns))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize(("tiles", "columns"), [(2, 9000), (2100, 640)])
def test_wide_and_tall(
    library: Library, check: Callable[..., None], tiles: int, columns: int
) -> None:
    """More columns than wait at once, and tiles enough for each warp to have its own."""
    weight = Weight.random(tiles * ROW_TILE, columns, TileFormats.parse(f"int3,int8*{tiles - 1}"))
    check(library, weight, activations(1, columns))


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


@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS.values(), ids=str)
@pytest.mark.parametrize("columns", [1, 17, 32, 70, 1300])
@pytest.mark.parametrize("m", [1, 100])
def test_quantize(library: Library, columns: int, m: int, fmt: ActivationFormat) -> None:
    """Division, rounding half to even and digits, all exact."""
    x = activations(m, columns)
    x[0, 0] = 1e-40  # alone in its group it counts as 0
    padded = np.zeros((m, groups(columns) * GROUP), np.float32)
    padded[:, :columns] = x
    by_group = padded.reshape(m, -1, GROUP)
    step = np.abs(by_group).max(2)
    step = np.where(step < 1e-30, np.float32(0), step / np.float32(fmt.top))
    code = np.rint(by_group / np.where(step > 0, step, 1)[..., None]).astype(np.int32)
    codes, scales, sums = parts(library, quantized(library, x, fmt), fmt.digits)
    np.testing.assert_array_equal(sums, codes.sum(2, dtype=np.int32))
    weights = 256 ** np.arange(fmt.digits)[::-1]
    digits = codes.reshape(m, fmt.digits, -1, GROUP)
    np.testing.assert_array_equal(np.tensordot(digits, weights, (1, 0)), code)
    expected = step[:, None] * weights[:, None].astype(np.float32)
    np.testing.assert_array_equal(scales.reshape(expected.shape), expected)


def test_quantize_hides_no_nan(library: Library) -> None:
    x = np.zeros((2, GROUP), np.float32)
    x[0, 3], x[1, 5] = np.nan, -np.inf
    _, scales, _ = parts(library, quantized(library, x))
    assert np.isnan(scales[0, 0])
    assert np.isinf(scales[1, 0])
