"""The CPU matmul kernels against numpy float64 of the formats' definition.

Tolerances are rounding-error bounds: n float32 operations are off by at most n * 2**-24 of the sum
of the magnitudes of the terms, to first order.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, get_args

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from mxcompile import runtime, target
from mxcompile.formats import (
    ACTIVATION_FORMATS,
    FORMATS,
    GROUP,
    MIDDLE,
    ActivationFormat,
    groups,
)
from mxcompile.plan import ROW_TILE, TileFormats
from mxcompile.quantize import rows_by_format
from mxcompile.targets import packing
from mxcompile.targets.cpu_matmul import (
    RECORD,
    Gate,
    Instructions,
    Knobs,
    MatmulKernel,
    Norm,
    Residual,
    activation_bytes,
)
from mxcompile.targets.cpu_norm import Columns
from mxcompile.targets.kernels import MatmulTemplates
from tests import arm

UNIT = 2.0**-24
EPSILON = 1e-6
NORMED, GATED = (1, 70, 1300), (70,)
"""Columns of norms and of gates."""
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
REQUIRES = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "avx2": "avx2", "generic": None}
CPUS = {"avx512vnni": "cascadelake", "avxvnni": "alderlake", "avx2": "haswell", "generic": None}
INT8, INT16 = ACTIVATION_FORMATS.values()


@dataclass(frozen=True)
class Library:
    """The compiled kernels: ``call`` takes a name and arrays, and gives the last ``outputs`` back.

    ``plus_128`` says that activation codes of several rows are stored so.
    """

    call: Callable[..., Any]
    plus_128: bool = False

    def __call__(self, name: str, *inputs: Any, shape: tuple[int, ...], dtype: str = "f4") -> Any:
        # What a kernel must write is NaN or 85 before.
        return self.call(name, *inputs, np.full(shape, np.nan if dtype == "f4" else 85, dtype))


def kernels(kernel: MatmulTemplates) -> dict[str, Callable[[], Any]]:
    """What makes the functions that are tested, by name."""
    make: dict[str, Callable[[], Any]] = {
        "matmul_f32": kernel.matmul_f32,
        "gather_rows": kernel.gather_rows,
    }
    for fmt in ACTIVATION_FORMATS.values():
        make[f"quantize_{fmt}"] = partial(kernel.quantize_activation, fmt)
        for columns in NORMED:
            norm = Norm(columns, EPSILON)
            plain, normed = (Residual(columns, EPSILON, eps) for eps in (None, 2 * EPSILON))
            make[f"normalize_{columns}_{fmt}"] = partial(kernel.normalize_activation, norm, fmt)
            make[f"residual_{columns}_{fmt}"] = partial(kernel.residual_activation, plain, fmt)
            make[f"residual_normed_{columns}_{fmt}"] = partial(
                kernel.residual_activation, normed, fmt
            )
        make[f"matmul_{fmt}"] = partial(kernel.matmul_quantized, fmt)
        for function, size in itertools.product(("gelu_tanh", "silu"), GATED):
            places = (Columns(2 * size + 5, 1), Columns(2 * size + 5, 4 + size))
            gate = Gate(function, size, *places)  # type: ignore[arg-type]
            make[f"{function}_{size}_{fmt}"] = partial(kernel.gate_activation, gate, fmt)
    return make


@cache
def build(instructions: Instructions) -> Library:
    """All kernels for some instructions; cached because it takes seconds."""
    made = {name: make() for name, make in kernels(MatmulKernel(instructions)).items()}
    functions = {name: made[name].with_attr("global_symbol", name) for name in made}
    if instructions in arm.CPUS:
        return Library(arm.machine(instructions).kernels(functions))
    options = {"kind": "llvm"} | ({"mcpu": cpu} if (cpu := CPUS[instructions]) else {})
    module = tvm.tirx.build(tvm.IRModule(functions), target=tvm.target.Target(options))

    def call(name: str, *arrays: Any, outputs: int = 1) -> Any:
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in arrays]
        module[name](*tensors)
        found = [tensor.numpy() for tensor in tensors[-outputs:]]
        return found if outputs > 1 else found[0]

    return Library(call, plus_128=instructions == "avx512vnni")


def test_knobs_change_no_result() -> None:
    """Sums inside a group are exact in any order, and groups are added in the same."""
    knobs = (("int3", Knobs(row_block=3, prefetch=0)),)
    made = {
        "usual": MatmulKernel(formats=("int3",)).matmul_quantized(INT8),
        "other": MatmulKernel("generic", ("int3",), knobs, jobs=3, chunk=8).matmul_quantized(INT8),
    }
    functions = {name: made[name].with_attr("global_symbol", name) for name in made}
    module = tvm.tirx.build(tvm.IRModule(functions), target=tvm.target.Target("llvm"))
    weight = Weight.random(5 * ROW_TILE + 3, 640, TileFormats.parse("int3*6"))
    rng = np.random.default_rng(0)
    for m in (1, 13):
        codes = rng.integers(-127, 128, (m, 20, RECORD), np.int8)
        codes[..., GROUP : GROUP + 4] = np.full(1, 0.5, "<f4").view(np.int8)
        codes[..., GROUP + 4 :] = (
            codes[..., :GROUP].sum(2, dtype="<i4")[..., None].view(np.int8).reshape(m, 20, 4)
        )
        found = []
        for name in made:
            y = tvm.runtime.tensor(np.full((m, len(weight.values)), np.nan, np.float32))
            arrays = (codes.reshape(m, -1), *weight.arguments)
            module[name](*map(tvm.runtime.tensor, arrays), y)
            found.append(y.numpy())
        np.testing.assert_array_equal(*found)


@pytest.fixture(params=get_args(Instructions))
def library(request: pytest.FixtureRequest) -> Library:
    needed = REQUIRES.get(request.param)
    if needed and needed not in target.host_features():
        pytest.skip(f"this CPU lacks {needed}")
    return build(request.param)


def random_codes(
    rng: np.random.Generator, rows: int, columns: int, formats: TileFormats
) -> NDArray[np.uint8]:
    """Random codes of every format; those of a codebook are entries of a random one."""
    codes = np.empty((rows, columns), np.uint8)
    for fmt, index in rows_by_format(formats, rows):
        values = np.arange(fmt.levels, dtype=np.uint8)
        if fmt.codebook:
            values = np.sort(rng.choice(256, fmt.levels, replace=False)).astype(np.uint8)
        codes[index] = values[rng.integers(0, fmt.levels, (len(index), columns))]
    return codes


def random_zeros(rng: np.random.Generator, shape: tuple[int, int], formats: TileFormats) -> Any:
    """Zero-points [rows, groups]; centred formats have theirs in the middle."""
    zeros = rng.integers(0, 16, shape, dtype=np.uint8)
    for fmt, index in rows_by_format(formats, shape[0]):
        if fmt.centred:
            zeros[index] = MIDDLE
    return zeros


@dataclass(frozen=True)
class Weight:
    packed: packing.Packed
    values: F64

    @classmethod
    def random(cls, rows: int, columns: int, formats: TileFormats, seed: int = 0) -> "Weight":
        rng = np.random.default_rng(seed)
        codes = random_codes(rng, rows, columns, formats)
        steps = np.repeat([fmt.zero_step for fmt in formats.formats], ROW_TILE)[:rows, None]
        shape = (rows, groups(columns))
        scales = rng.integers(0, 256, shape, dtype=np.uint8)
        zeros = random_zeros(rng, shape, formats)
        row_scale = rng.uniform(-1e-3, 1e-3, rows).astype(np.float16)
        row_scale[0] = 2.0**-24  # the smallest subnormal
        scale, zero = (np.repeat(a, GROUP, 1)[:, :columns].astype(float) for a in (scales, zeros))
        values = row_scale.astype(float)[:, None] * scale * (codes - zero * steps)
        return cls(packing.pack(codes, scales, zeros, row_scale, formats), values)

    @property
    def arguments(self) -> tuple[Any, Any]:
        return self.packed.data, self.packed.table


def activations(m: int, columns: int) -> F32:
    return np.random.default_rng(m).standard_normal((m, columns)).astype(np.float32)


def quantized(library: Library, x: F32, fmt: ActivationFormat = INT8) -> NDArray[np.int8]:
    shape = (len(x), activation_bytes(x.shape[1], fmt))
    return np.asarray(library(f"quantize_{fmt}", x, shape=shape, dtype="i1"))


def parts(
    library: Library, q: NDArray[np.int8], digits: int = 1
) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """The codes [m * digits, groups, 32], scales and sums of a quantized activation."""
    records = q.reshape(len(q) * digits, -1, RECORD)
    scales, sums = (np.ascontiguousarray(records[..., i : i + 4]) for i in (GROUP, GROUP + 4))
    codes, total = records[..., :GROUP], sums.view("<i4")[..., 0]
    if library.plus_128 and len(q) > 1:
        assert (total >> 16 == 128).all()
        codes, total = codes ^ np.int8(-128), (total << 16) >> 16
    return codes, scales.view("<f4")[..., 0], total


def check_quantized(library: Library, weight: Weight, x: F32, fmt: ActivationFormat) -> None:
    q = quantized(library, x, fmt)
    codes, scales, _ = parts(library, q, fmt.digits)
    columns = x.shape[1]
    seen = (codes * scales.astype(float)[..., None]).reshape(len(codes), -1)[:, :columns]
    rows = len(weight.values)
    y = library(f"matmul_{fmt}", q, *weight.arguments, shape=(len(x), rows))
    # A group is exact; its sum is rounded when multiplied by two scales and when added up.
    by_group = np.add.reduceat(seen[:, None] * weight.values, range(0, columns, GROUP), axis=2)
    by_row = by_group.reshape(len(x), fmt.digits, rows, -1)
    bound = (fmt.digits * groups(columns) + 3) * UNIT * np.abs(by_row).sum((1, 3))
    assert (np.abs(y - by_row.sum((1, 3))) <= bound).all()


def check_int8(library: Library, weight: Weight, x: F32) -> None:
    check_quantized(library, weight, x, INT8)


def check_int16(library: Library, weight: Weight, x: F32) -> None:
    check_quantized(library, weight, x, INT16)


def check_f32(library: Library, weight: Weight, x: F32) -> None:
    y = library("matmul_f32", x, *weight.arguments, shape=(len(x), len(weight.values)))
    terms = x[:, None] * weight.values
    # Products and sums inside a group, adding up to 4 chains, two scales, and sums of groups.
    operations = GROUP + 1 + 3 + 2 + groups(x.shape[1])
    assert (np.abs(y - terms.sum(2)) <= operations * UNIT * np.abs(terms).sum(2)).all()


CHECKS = {"int8": check_int8, "int16": check_int16, "f32": check_f32}
MIX = "table4,int2,table3,int3,nf4,int4"


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
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("formats", ["int2*400,int8*300", "int8*300,int2*400", "int4*700"])
def test_threads_share_bytes(
    library: Library, check: Callable[..., None], formats: str, threads: int
) -> None:
    runtime.set_threads(min(threads, runtime.cores()))
    weight = Weight.random(700 * ROW_TILE, 64, TileFormats.parse(formats))
    check(library, weight, activations(1, 64))


def test_the_worst_sums_do_not_overflow(library: Library) -> None:
    """All codes and activations at their ends, with either sign."""
    low_digits = np.full((1, GROUP), -128, np.float32)  # as digits of 16 bits, all but the first
    low_digits[0, 0] = INT16.top
    inputs = [np.full((1, GROUP), sign, np.float32) for sign in (-1, 1)]
    for fmt in FORMATS.values():
        ones = np.ones((ROW_TILE, 1), np.uint8)
        row_scale = np.ones(ROW_TILE, np.float16)
        for code, zero in itertools.product((0, fmt.top), (MIDDLE,) if fmt.centred else (0, 15)):
            codes = np.full((ROW_TILE, GROUP), code, np.uint8)
            packed = packing.pack(
                codes, ones, ones * np.uint8(zero), row_scale, TileFormats((fmt,))
            )
            values = np.full((ROW_TILE, GROUP), code - zero * fmt.zero_step)
            for x in (*inputs, low_digits):
                for activation in ACTIVATION_FORMATS.values():
                    check_quantized(library, Weight(packed, values), x, activation)


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


@pytest.mark.parametrize("columns", [1, 70, 640])
@pytest.mark.parametrize("m", [1, 100])
def test_digits_make_up_the_code(library: Library, m: int, columns: int) -> None:
    x = activations(m, columns)
    padded = np.zeros((m, groups(columns) * GROUP), np.float32)
    padded[:, :columns] = x
    by_group = padded.reshape(m, -1, GROUP)
    codes, scales, sums = parts(library, quantized(library, x, INT16), INT16.digits)
    np.testing.assert_array_equal(sums, codes.sum(2, dtype=np.int32))
    high, low = codes.reshape(m, 2, -1, GROUP).astype(np.int64).swapaxes(0, 1)
    step = np.abs(by_group).max(2) / np.float32(INT16.top)
    expected = scales.reshape(m, 2, -1).swapaxes(0, 1)
    np.testing.assert_array_equal(expected, [step * 256, step])
    # A quotient of up to 2**15 is rounded, and again when the rounding constant is added.
    exact = by_group / step.astype(float)[..., None]
    assert np.abs(256 * high + low - exact).max() <= 0.5 + 2 * INT16.top * UNIT
    assert np.abs(256 * high + low).max() == INT16.top


@pytest.mark.parametrize("columns", [1, 16, 17, 32, 70, 640])
@pytest.mark.parametrize("m", [1, 3, 100])
def test_quantize(library: Library, m: int, columns: int) -> None:
    x = activations(m, columns)
    padded = np.zeros((m, groups(columns) * GROUP), np.float32)
    padded[:, :columns] = x
    by_group = padded.reshape(m, -1, GROUP)
    codes, scales, sums = parts(library, quantized(library, x))
    np.testing.assert_array_equal(sums, codes.sum(2, dtype=np.int32))
    np.testing.assert_array_equal(scales, np.abs(by_group).max(2) / np.float32(127))
    # The inverse, its product and the rounding's sum are each rounded.
    exact = by_group / scales.astype(float)[..., None]
    assert np.abs(codes - exact).max() <= 0.5 + 4 * 127 * UNIT
    assert np.abs(codes).max() == 127


@pytest.mark.parametrize("columns", NORMED)
@pytest.mark.parametrize("lead", [(1, 1), (1, 5), (3, 40)])
@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS.values(), ids=str)
def test_a_norm_is_rounded(
    library: Library, fmt: ActivationFormat, lead: tuple[int, int], columns: int
) -> None:
    m = lead[0] * lead[1]
    x, weight = activations(m, columns), activations(1, columns)[0]
    shape = (m, activation_bytes(columns, fmt))
    args = x.reshape(*lead, columns), weight
    q = np.asarray(library(f"normalize_{columns}_{fmt}", *args, shape=shape, dtype="i1"))
    check_rounded_norm(library, q, fmt, x, weight)


def check_rounded_norm(
    library: Library, q: NDArray[np.int8], fmt: ActivationFormat, x: F32, weight: F32
) -> None:
    """Whether ``q`` is the rounded norm of ``x`` [m, columns]."""
    exact = normalized(x, EPSILON) * weight
    # What float32 does to a sum of squares.
    check_rounded(library, q, fmt, exact, (x.shape[1] + 8) * UNIT * np.abs(exact))


def check_rounded(
    library: Library, q: NDArray[np.int8], fmt: ActivationFormat, exact: F64, error: F64
) -> None:
    """Whether ``q`` is ``exact`` [m, columns], which is rounded up to ``error`` beside it."""
    m, columns = exact.shape
    codes, scales, sums = parts(library, q, fmt.digits)
    np.testing.assert_array_equal(sums, codes.sum(2, dtype=np.int32))
    by_digit = (codes * scales.astype(float)[..., None]).reshape(m, fmt.digits, -1)
    seen, padding = np.split(by_digit.sum(1), [columns], axis=1)
    assert not padding.any()
    # Half a step, and what float32 does to the quotient that is rounded.
    padded = np.zeros((m, groups(columns) * GROUP))
    padded[:, :columns] = np.abs(exact) + error
    top = np.repeat(padded.reshape(m, -1, GROUP).max(2), GROUP, 1)[:, :columns]
    bound = top / fmt.top * (0.5 + 4 * fmt.top * UNIT) + error
    assert (np.abs(seen - exact) <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("columns", GATED)
@pytest.mark.parametrize("lead", [(1, 1), (3, 40)])
@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS.values(), ids=str)
@pytest.mark.parametrize("function", ["gelu_tanh", "silu"])
def test_a_gate_is_rounded(
    library: Library, function: str, fmt: ActivationFormat, lead: tuple[int, int], columns: int
) -> None:
    m = lead[0] * lead[1]
    wide = activations(m, 2 * columns + 5) * 3
    gate, up = wide[:, 1 : 1 + columns], wide[:, 4 + columns : 4 + 2 * columns]
    product, error = gated(function, gate, up)
    shape, args = (m, activation_bytes(columns, fmt)), [wide.reshape(*lead, -1)] * 2
    q = np.asarray(library(f"{function}_{columns}_{fmt}", *args, shape=shape, dtype="i1"))
    check_rounded(library, q, fmt, product, error)


def gated(function: str, gate: F32, up: F32) -> tuple[F64, F64]:
    """``act(gate) * up``, and what float32 may be off."""
    x = gate.astype(float)
    if function == "silu":
        opened = x / (1 + np.exp(-x))
        error = 6 * UNIT * np.abs(opened)
    else:
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        opened = 0.5 * x * (1 + np.tanh(inner))
        # tanh is within 4e-7, and what it is of is rounded four times where its slope is at most 1.
        slope = np.abs(inner) / np.cosh(np.minimum(np.abs(inner), 300)) ** 2
        error = 0.5 * np.abs(x) * (4e-7 + 2 * UNIT + 6 * UNIT * slope) + 3 * UNIT * np.abs(opened)
    return opened * up, error * np.abs(up) + UNIT * np.abs(opened * up)


def normalized(x: F32, eps: float) -> F64:
    exact: F64 = x.astype(float)
    found: F64 = exact / np.sqrt(np.square(exact).mean(1, keepdims=True) + eps)
    return found


@pytest.mark.parametrize("columns", NORMED)
@pytest.mark.parametrize("lead", [(1, 1), (3, 40)])
@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS.values(), ids=str)
@pytest.mark.parametrize("inner", [False, True])
def test_a_sum_is_kept_and_its_norm_rounded(
    library: Library, inner: bool, fmt: ActivationFormat, lead: tuple[int, int], columns: int
) -> None:
    m = lead[0] * lead[1]
    rest, added = activations(m, columns), activations(m + 1, columns)[1:]
    weight, scale = activations(2, columns)
    total = np.full((*lead, columns), np.nan, np.float32)
    weights = (weight, scale) if inner else (weight,)
    wide = (x.reshape(*lead, columns) for x in (rest, added))
    name = f"residual{'_normed' if inner else ''}_{columns}_{fmt}"
    out = np.full((m, activation_bytes(columns, fmt)), 85, np.int8)
    h, q = library.call(name, *wide, *weights, total, out, outputs=2)
    term = normalized(added, 2 * EPSILON) * scale if inner else added.astype(float)
    # The sum rounds once; a norm before that, as it does elsewhere.
    bound = (columns + 8) * UNIT * (np.abs(term) + np.abs(rest))
    assert (np.abs(h.reshape(m, columns) - (rest + term)) <= bound).all()
    check_rounded_norm(library, q, fmt, h.reshape(m, columns), weight)


def test_quantize_rounds_half_to_even(library: Library) -> None:
    x = np.zeros((1, GROUP), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49]
    codes, scales, _ = parts(library, quantized(library, x))
    assert scales.item() == 1
    assert codes[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 0]


def test_quantize_hides_no_nan_and_takes_zeros(library: Library) -> None:
    x = np.zeros((4, GROUP), np.float32)
    x[1, 3] = np.nan
    x[2, 5] = -np.inf
    x[3, :2] = [1e-40, -1e-38]
    codes, scales, _ = parts(library, quantized(library, x))
    assert not codes[[0, 3]].any()
    assert scales[[0, 3]].tolist() == [[0], [0]]
    assert np.isnan(scales[1, 0])
    assert np.isinf(scales[2, 0])
