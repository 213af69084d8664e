"""Row kernels against numpy in float64, for static, symbolic, odd and sliced rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import tvm
from numpy.typing import NDArray

from mxcompile.targets.cpu_norm import Columns, Runs, Simd, layer_norm, rms_norm, softmax
from tests import arm

Array = NDArray[Any]
TARGETS = {"znver4": Simd(16, 2), "haswell": Simd(8, 2), "neon": Simd(4, 2)}
EPS = 1e-5


@pytest.fixture(params=TARGETS)
def mcpu(request: pytest.FixtureRequest, needs: Callable[[str], None]) -> str:
    """An LLVM CPU that this machine can run code for, or ARM's instructions."""
    if request.param in arm.CPUS:
        arm.require()
    else:
        needs({"znver4": "avx512f", "haswell": "avx2"}[request.param])
    return str(request.param)


def exact_rms_norm(x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight)


def exact_layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    scale = np.sqrt(x.var(-1, keepdims=True) + EPS)
    return np.asarray((x - x.mean(-1, keepdims=True)) / scale * weight + bias)


def exact_softmax(x: Array) -> Array:
    return np.asarray(scipy.special.softmax(x, -1))


KERNELS: dict[str, tuple[Callable[[Runs, Simd], Any], Callable[..., Array], int]] = {
    "rms-norm": (lambda runs, simd: rms_norm(runs, EPS, simd), exact_rms_norm, 1),
    "layer-norm": (lambda runs, simd: layer_norm(runs, EPS, simd), exact_layer_norm, 2),
    "softmax": (softmax, exact_softmax, 0),
}


def run(kernel: Any, mcpu: str, inputs: list[Array], shape: tuple[int, ...]) -> Array:
    if mcpu in arm.CPUS:
        written = np.full(shape, np.nan, np.float32)
        found: Array = arm.machine(mcpu).kernels({"main": kernel})("main", *inputs, written)
        return found
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "num-cores": 2})
    mod = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    built = tvm.tirx.build(mod, target=target)["main"]
    out = tvm.runtime.empty(shape, "float32")
    built(*(tvm.runtime.tensor(x) for x in inputs), out)
    return np.asarray(out.numpy())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("size", [7, 100, 640])
def test_rows_match_float64(name: str, size: int, symbolic: bool, mcpu: str) -> None:
    make, exact, weights = KERNELS[name]
    rng = np.random.default_rng(0)
    shape = (3, 25, size)  # enough rows of 640 to take both the serial and the parallel path
    x = rng.standard_normal(shape, np.float32) + np.float32(0.5)
    others = [rng.standard_normal(size, np.float32) for _ in range(weights)]
    kernel = make(Runs(0 if symbolic else size), TARGETS[mcpu])
    for rows in (1, 25):
        part = np.ascontiguousarray(x[:, :rows])
        got = run(kernel, mcpu, [part, *others], part.shape)
        want = exact(*(v.astype(np.float64) for v in (part, *others)))
        # each lane adds up size / 16 terms; then some roundings of values of this magnitude
        bound = (size / 16 + 16) * 2.0**-24 * float(np.abs(want).max() + 1)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def test_runs_are_slices_of_a_wider_buffer(mcpu: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 300), np.float32)
    weight = rng.standard_normal(64, np.float32)
    kernel = rms_norm(Runs(64, 4, 3, Columns(300, 20)), EPS, TARGETS[mcpu])
    got = run(kernel, mcpu, [x, weight], (2, 3, 256))
    heads = x[..., 20:276].reshape(2, 3, 4, 64).astype(np.float64)
    want = exact_rms_norm(heads, weight).reshape(2, 3, 256)
    np.testing.assert_allclose(got, want, rtol=0, atol=20 * 2.0**-24 * np.abs(want).max())


def test_rank_follows_the_tensor(mcpu: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 32), np.float32)
    got = run(softmax(Runs(32, rank=4), TARGETS[mcpu]), mcpu, [x], x.shape)
    np.testing.assert_allclose(got, exact_softmax(x), rtol=0, atol=2.0**-22)
