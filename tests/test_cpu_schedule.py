"""Scheduled leftovers against numpy, for symbolic and tiny shapes, and the loops that they get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx
from tvm.relax import op

from mxcompile.targets.cpu_norm import Simd
from mxcompile.targets.cpu_schedule import schedule
from tests import arm

Array = NDArray[Any]
B, S = (tirx.Var(name, "int64") for name in "bs")
F, N, P = "float32", "int64", "bool"


@dataclass(frozen=True)
class Case:
    """Inputs (shape, dtype), operators to apply in turn, the same in numpy, and loops to expect."""

    inputs: list[tuple[tuple[Any, ...], str]]
    relax: Callable[..., Any]
    numpy: Callable[..., Any]
    loops: tuple[str, ...] = ("T.parallel", "T.vectorized")


def conv(x: Array, w: Array, bias: Array, *knobs: int) -> Array:
    product = torch.conv2d(torch.tensor(x), torch.tensor(w), None, *knobs)
    return np.asarray(product.numpy() + bias)


def pooled(x: Array) -> Array:
    return np.asarray(x.reshape(*x.shape[:2], x.shape[2] // 2, 2, -1, 2).max((3, 5)))


def gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def layer_norm(x: Array, w: Array, b: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b)


LAST: dict[str, Any] = {"axis": [-1]}
PARALLEL = ("T.parallel",)
CASES = {
    "gelu": Case(
        [((B, S, 64), F), ((64,), F)],
        lambda x, w: op.nn.gelu(op.add(x, w)),
        lambda x, w: (x + w) * 0.5 * (1 + scipy.special.erf((x + w) / np.sqrt(2))),
    ),
    "gelu-tanh-odd": Case([((B, S, 100), F)], op.nn.gelu_tanh, gelu_tanh, PARALLEL),
    "silu-up": Case(
        [((B, S, 128), F)] * 2,
        lambda x, u: op.multiply(op.nn.silu(x), u),
        lambda x, u: x / (1 + np.exp(-x)) * u,
    ),
    "exp-tanh-odd": Case(
        [((B, S, 7), F)], lambda x: op.tanh(op.exp(x)), lambda x: np.tanh(np.exp(x)), PARALLEL
    ),
    "nested": Case(
        [((B, S, 48), F)],
        lambda x: op.exp(op.tanh(op.sigmoid(op.exp(x)))),
        lambda x: np.exp(np.tanh(scipy.special.expit(np.exp(x)))),
    ),
    "powers": Case(
        [((B, S, 32), F)],
        lambda x: op.power(op.power(op.abs(x), relax.const(3.0)), relax.const(0.5)),
        lambda x: np.abs(x) ** 1.5,
    ),
    "chain": Case(
        [((B, S, 48), F)] * 2,
        lambda x, y: op.multiply(op.add(x, y), op.sqrt(op.abs(y))),
        lambda x, y: (x + y) * np.sqrt(np.abs(y)),
    ),
    "soft-cap": Case(
        [((B, S, 40000), F)],
        lambda x: op.multiply(op.tanh(op.multiply(x, relax.const(0.1))), relax.const(10.0)),
        lambda x: 10 * np.tanh(x * 0.1),
    ),
    "softmax": Case([((B, S, 64), F)], op.nn.softmax, lambda x: scipy.special.softmax(x, -1)),
    "softmax-odd": Case(
        [((B, S, 7), F)], op.nn.softmax, lambda x: scipy.special.softmax(x, -1), PARALLEL
    ),
    "softmax-axis-1": Case(
        [((B, S, 16), F)],
        lambda x: op.nn.softmax(x, axis=1),
        lambda x: scipy.special.softmax(x, 1),
    ),
    "layer-norm": Case(
        [((B, S, 64), F), ((64,), F), ((64,), F)],
        lambda x, w, b: op.nn.layer_norm(x, w, b, axes=[-1]),
        layer_norm,
    ),
    "sum-last": Case([((B, S, 64), F)], lambda x: op.sum(x, **LAST), lambda x: x.sum(-1)),
    "max-last": Case([((B, S, 61), F)], lambda x: op.max(x, **LAST), lambda x: x.max(-1), PARALLEL),
    "mean-pool": Case([((B, S, 64), F)], lambda x: op.mean(x, axis=[1]), lambda x: x.mean(1)),
    "argmax": Case(
        [((B, S, 64), F)], lambda x: op.argmax(x, axis=-1), lambda x: x.argmax(-1), PARALLEL
    ),
    "transpose": Case(
        [((B, S, 4, 32), F)],
        lambda x: op.permute_dims(x, [0, 2, 1, 3]),
        lambda x: x.transpose(0, 2, 1, 3),
    ),
    "concat": Case(
        [((B, S, 5), F), ((B, S, 27), F)],
        lambda x, y: op.concat([x, y], axis=2),
        lambda x, y: np.concatenate([x, y], 2),
    ),
    "slice": Case(
        [((B, S, 96), F)],
        lambda x: op.strided_slice(x, [2], [32], [64]),
        lambda x: x[..., 32:64],
    ),
    "split": Case(
        [((B, S, 96), F)], lambda x: op.split(x, 3, axis=2)[1], lambda x: np.split(x, 3, 2)[1]
    ),
    "take": Case(
        [((100, 64), F), ((B, S), N)], lambda x, i: op.take(x, i, axis=0), lambda x, i: x[i]
    ),
    "take-columns": Case(
        [((B, S, 128), F), ((96,), N)],
        lambda x, i: op.take(x, i, axis=2),
        lambda x, i: x[..., i],
        ("T.parallel", "T.unroll"),
    ),
    "cast": Case([((B, S), N)], lambda x: op.astype(x, F), lambda x: x.astype(F), PARALLEL),
    "where": Case(
        [((B, S, 48), P), ((B, S, 48), F)],
        lambda c, x: op.where(c, x, relax.const(0.0)),
        lambda c, x: np.where(c, x, 0),
    ),
    "matmul": Case(
        [((B, S, 40), F), ((40, 96), F), ((96,), F)],
        lambda x, y, b: op.nn.relu(op.add(op.matmul(x, y), b)),
        lambda x, y, b: np.maximum(x @ y + b, 0),
    ),
    "matmul-odd": Case([((B, S, 40), F), ((40, 30), F)], op.matmul, lambda x, y: x @ y, PARALLEL),
    "conv-relu-pool": Case(
        [((B, 3, 32, 32), F), ((16, 3, 3, 3), F), ((1, 16, 1, 1), F)],
        lambda x, w, b: op.nn.max_pool2d(
            op.nn.relu(op.add(op.nn.conv2d(x, w, padding=1), b)), [2, 2], [2, 2]
        ),
        lambda x, w, b: pooled(np.maximum(conv(x, w, b, 1, 1), 0)),
    ),
    "conv-strided": Case(
        [((4, 8, 14, 14), F), ((12, 8, 3, 3), F), ((1, 12, 1, 1), F)],
        lambda x, w, b: op.add(op.nn.conv2d(x, w, padding=1, strides=2), b),
        lambda x, w, b: conv(x, w, b, 2, 1),
        PARALLEL,
    ),
    "pool-all": Case(
        [((B, 32, 7, 7), F)], lambda x: op.mean(x, axis=[2, 3]), lambda x: x.mean((2, 3)), PARALLEL
    ),
}


def fused(case: Case) -> tvm.IRModule:
    """Make the module as the compiler does before scheduling."""
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", relax.TensorType(shape, dtype))
        for i, (shape, dtype) in enumerate(case.inputs)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(case.relax(*inputs)))
        builder.emit_func_output(result)
    steps = relax.transform
    return tvm.transform.Sequential(
        [
            steps.LegalizeOps(),
            steps.AnnotateTIROpPattern(),
            steps.FuseOps(),
            steps.FuseTIR(),
            steps.DeadCodeElimination(),
        ]
    )(builder.get())


def text(mod: tvm.IRModule) -> str:
    """Print the PrimFuncs of a module."""
    return "\n".join(f.script() for f in mod.functions.values() if isinstance(f, tirx.PrimFunc))


@pytest.fixture(params=["znver4", "neon"])
def runs(request: pytest.FixtureRequest, needs: Callable[[str], None]) -> tuple[Simd, Any]:
    """Vectors, and what compiles a module for them and gives its ``main``."""
    if request.param == "neon":
        return Simd(4), arm.machine("neon").program
    needs("avx512f")
    target = tvm.target.Target({"kind": "llvm", "mcpu": "znver4", "num-cores": 2})
    return Simd(), lambda module: relax.VirtualMachine(
        tvm.compile(module, target=target), tvm.cpu()
    )["main"]


@pytest.mark.parametrize("name", CASES)
def test_schedule_keeps_the_meaning(name: str, runs: tuple[Simd, Any]) -> None:
    case = CASES[name]
    simd, load = runs
    scheduled = schedule(fused(case), simd)
    script = text(scheduled)
    for loop in case.loops:
        assert loop in script
    assert not any(f"T.{call}(" in script for call in ("exp", "tanh", "erf", "sigmoid", "pow"))

    main = load(scheduled)
    rng = np.random.default_rng(0)
    for batch, seq in ((1, 1), (2, 5), (3, 200)):
        inputs = []
        for shape, dtype in case.inputs:
            dims = [{"b": batch, "s": seq}.get(getattr(d, "name", ""), d) for d in shape]
            values: dict[str, Callable[[Any], Any]] = {
                F: rng.standard_normal,
                N: lambda d: rng.integers(0, 100, d),
                P: rng.random,
            }
            inputs.append(np.asarray(values[dtype](dims)))
        inputs = [x < 0.5 if d == P else x for x, (_, d) in zip(inputs, case.inputs, strict=True)]
        narrow = [x.astype(d) for x, (_, d) in zip(inputs, case.inputs, strict=True)]
        got = main(*(tvm.runtime.tensor(x) for x in narrow)).numpy()
        want = case.numpy(*(x.astype(np.float64) if x.dtype == F else x for x in narrow))
        # a sum of n float32 terms near 1 is off by some roundings each; no case sums more than 600
        bound = 600 * 2.0**-24 * max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "sigmoid"])
def test_polynomials_are_accurate(name: str, runs: tuple[Simd, Any]) -> None:
    case = Case([((4096, 64), F)], getattr(op, name), np.abs)
    simd, load = runs
    x = np.linspace(-87, 88, 4096 * 64, dtype=np.float32)
    x[::2] /= 30  # where tanh and erf are not constant
    special = np.array([0, np.inf, -np.inf, np.nan], np.float32)
    x[: len(special)] = special
    x = x.reshape(4096, 64)
    got = load(schedule(fused(case), simd))(tvm.runtime.tensor(x)).numpy()
    exact = {
        "exp": np.exp,
        "tanh": np.tanh,
        "erf": scipy.special.erf,
        "sigmoid": scipy.special.expit,
    }
    want = exact[name](x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=6e-7, atol=1e-38)


def test_small_static_work_stays_on_one_thread() -> None:
    case = Case([((2, 64), F)], op.exp, np.exp)
    assert "T.parallel" not in text(schedule(fused(case), Simd()))


def test_symbolic_work_chooses_when_it_runs() -> None:
    script = text(schedule(fused(CASES["layer-norm"]), Simd()))
    assert "if b * s" in script
    assert "else:" in script


def test_marked_functions_are_left_alone() -> None:
    mod = fused(CASES["gelu"])
    marked = tvm.IRModule(
        {
            name: f.with_attr("tirx.is_scheduled", True) if isinstance(f, tirx.PrimFunc) else f
            for name, f in mod.functions_items()
        }
    )
    tvm.ir.assert_structural_equal(schedule(marked, Simd()), marked)
