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
from mxcompile.targets.cpu_matmul import Gate, Norm, Residual, Rows, Source
from mxcompile.targets.cpu_norm import Columns
from tests.cuda import SERIAL, Reading, readings
from tests.test_cpu_matmul import (
    CHECKS,
    MIX,
    UNIT,
    Library,
    Weight,
    activations,
    gated,
    kernels,
    normalized,
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
def reading(request: pytest.FixtureRequest) -> Reading:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def library(reading: Reading) -> Library:
    return compiled(reading)


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


SOURCES: dict[str, Source] = {
    "rows": Rows(70),
    "norm": Norm(1300, 1e-6),
    "sum": Residual(640, 1e-6, None),
    "normed sum": Residual(300, 1e-6, 1e-5),
    "gate": Gate("gelu_tanh", 70, Columns(145, 1), Columns(145, 74)),
}


@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS.values(), ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_a_row_is_made_rounded_and_multiplied(
    reading: Reading, name: str, fmt: ActivationFormat
) -> None:
    source = SOURCES[name]
    columns = source.size if isinstance(source, Gate) else source.columns
    formats = TileFormats.parse("nf4,int3,int3,nf4,int3,int3")
    kernel = reading.matmul.only(("int3", "nf4")).matmul_rounded(source, fmt)
    weight = Weight.random(6 * ROW_TILE, columns, formats)
    count = 1 if isinstance(source, Rows) else 2
    inputs = list(activations(4, columns)[:count, None, None])
    if isinstance(source, Norm):
        inputs[1] = inputs[1].reshape(-1)
    elif isinstance(source, Residual):
        rows = activations(3 if source.inner_eps is None else 4, columns)
        inputs = [*rows[:2, None, None], *rows[2:]]
    elif isinstance(source, Gate):
        inputs = [activations(1, source.up.width)[None] * 3] * 2
    total = np.full((1, 1, columns), np.nan, np.float32)
    outputs = [*([total] if isinstance(source, Residual) else []), np.full((1, 96), np.nan, "f4")]
    tensors = [reading.tensor(x) for x in (*inputs, *weight.arguments, *outputs)]
    reading.build({"rounded": kernel})["rounded"](*tensors)
    y = tensors[-1].numpy()

    x = inputs[0].reshape(1, -1)
    exact, error = x.astype(float), np.zeros((1, columns))
    if isinstance(source, Gate):
        gate, up = x[:, 1 : 1 + columns], x[:, 74 : 74 + columns]
        exact, error = gated(source.function, gate, up)
    elif not isinstance(source, Rows):
        if isinstance(source, Residual):
            term = inputs[1].reshape(1, -1).astype(float)
            if source.inner_eps is not None:
                term = normalized(inputs[1].reshape(1, -1), source.inner_eps) * inputs[3]
            found = tensors[-2].numpy().reshape(1, -1)
            bound = (columns + 8) * UNIT * (np.abs(term) + np.abs(x))
            assert (np.abs(found - (x + term)) <= bound).all()
            x = found
        exact = normalized(x, source.eps) * inputs[2 if isinstance(source, Residual) else 1]
        error = (columns + 8) * UNIT * np.abs(exact)
    # Half a step of each group, as float32 divides and rounds; then sums of groups in float32.
    top = np.zeros((1, groups(columns) * GROUP))
    top[:, :columns] = np.abs(exact) + error
    step = np.repeat(top.reshape(1, -1, GROUP).max(2), GROUP, 1)[:, :columns] / fmt.top
    off = step * (0.5 + 4 * fmt.top * UNIT) + error
    sizes = np.abs(weight.values)
    bound = off @ sizes.T + (groups(columns) + 8) * UNIT * (np.abs(exact) + off) @ sizes.T
    assert (np.abs(y - exact @ weight.values.T) <= bound).all()


def test_long_rows_are_rounded_once() -> None:
    assert SERIAL.matmul.matmul_rounded(Rows(4096), ACTIVATION_FORMATS["int8"]) is None


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
