"""The CUDA matmul kernels, read serially on this CPU, against numpy float64 of the formats.

Everything is tested as ``test_cpu_matmul`` tests the CPU kernels, with its tolerances: sums of a
group are exact, and float32 rounding is bounded whatever the order of additions.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import tvm

from mxcompile.formats import ACTIVATION_FORMATS, FORMATS, GROUP, ActivationFormat
from mxcompile.plan import ROW_TILE, TileFormats
from mxcompile.targets.cuda_matmul import CudaMatmul
from tests.test_cpu_matmul import CHECKS, MIX, Library, Weight, activations, build, parts, quantized


@cache
def library() -> Library:
    kernel = CudaMatmul(splits=2, tiles=3, batches=2, rows=2, serial=True)
    made = {"matmul_f32": kernel.matmul_f32(), "gather_rows": kernel.gather_rows()}
    for fmt in ACTIVATION_FORMATS.values():
        made[f"quantize_{fmt}"] = kernel.quantize_activation(fmt)
        made[f"matmul_{fmt}"] = kernel.matmul_quantized(fmt)
    functions = {name: made[name].with_attr("global_symbol", name) for name in made}
    return Library(tvm.tirx.build(tvm.IRModule(functions), target=tvm.target.Target("llvm")))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("m", [1, 2, 8, 21])
@pytest.mark.parametrize("fmt", FORMATS)
def test_uniform(check: Callable[..., None], m: int, fmt: str) -> None:
    columns = 9 * GROUP  # a block of 1 group and one of 8
    weight = Weight.random(2 * ROW_TILE, columns, TileFormats.parse(f"{fmt}*2"))
    check(library(), weight, activations(m, columns))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("m", [1, 3, 8, 21])
@pytest.mark.parametrize("columns", [1, 31, 70, 256, 259, 640, 1100])
def test_mixed_and_odd(check: Callable[..., None], m: int, columns: int) -> None:
    rows = 5 * ROW_TILE + 3
    check(library(), Weight.random(rows, columns, TileFormats.parse(MIX)), activations(m, columns))


@pytest.mark.parametrize("columns", [1, 4, 70, 256, 640])
def test_gather_rows(columns: int) -> None:
    rows = 6 * ROW_TILE
    weight = Weight.random(rows, columns, TileFormats.parse(MIX))
    ids = np.random.default_rng(0).permutation(rows)
    y = library()("gather_rows", ids, *weight.arguments, shape=(rows, columns))
    # Only the product with the row scale is rounded.
    np.testing.assert_array_equal(y, weight.values[ids].astype(np.float32))


def test_gather_stays_inside() -> None:
    weight = Weight.random(2 * ROW_TILE, 40, TileFormats.parse("int4,int3"))
    ids = np.array([-1, -(2**62), 32, 2**62])
    y = library()("gather_rows", ids, *weight.arguments, shape=(4, 40))
    np.testing.assert_array_equal(y, weight.values[[0, 0, 31, 31]].astype(np.float32))


@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS.values(), ids=str)
@pytest.mark.parametrize("columns", [1, 17, 32, 70, 640])
@pytest.mark.parametrize("m", [1, 100])
def test_quantize_equals_the_cpu(columns: int, m: int, fmt: ActivationFormat) -> None:
    x = activations(m, columns)
    x[0, 0] = 1e-40
    expected = quantized(build("generic"), x, fmt)
    np.testing.assert_array_equal(quantized(library(), x, fmt), expected)


def test_quantize_hides_no_nan() -> None:
    x = np.zeros((2, GROUP), np.float32)
    x[0, 3], x[1, 5] = np.nan, -np.inf
    _, scales, _ = parts(quantized(library(), x))
    assert np.isnan(scales[0, 0])
    assert np.isinf(scales[1, 0])
