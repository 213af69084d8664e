"""Columns that grow and inputs that shrink: where it can be, and that nothing else changes."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mxcompile import graph
from mxcompile.formats import FORMATS
from mxcompile.interpret import Interpreter
from mxcompile.passes import scale_columns
from mxcompile.passes.scale_columns import POWER, Scaling
from mxcompile.quantize import Importance, dequantize, quantize
from mxcompile.statistics import Statistics, UseStatistics
from tests.blocks import INNER, SIZES, WIDTH, arrange, build

VECTORS = {"gain": (WIDTH,), "shift": (WIDTH,)}
BLOCK = """
    n = RMSNormalization(x, gain)
    g = mxcompile.Linear(n, gate)
    a = Gelu(g)
    u = mxcompile.Linear(n, up)
    h = Mul(a, u)
    d = mxcompile.Linear(h, down)
    y = Add(x, d)
"""


@pytest.fixture
def model() -> ir.Model:
    return build(BLOCK, VECTORS)


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(1)

    def moment(columns: int) -> np.ndarray:
        x = rng.standard_normal((200, columns)) * np.exp(rng.standard_normal(columns))
        return (x.T @ x / 200).astype(np.float32)

    met, inner = moment(WIDTH), np.diagonal(moment(INNER)).copy()
    moments = {"gate": met, "up": met, "down": inner}
    uses = {
        name: (UseStatistics("linear", "n", moments[name], 1 + rng.random(rows).astype("f4"), 200),)
        for name, (rows, _) in SIZES.items()
    }
    return Statistics(200, uses, dict.fromkeys(uses, (0.5,)))


def scale(model: ir.Model, statistics: Statistics | None) -> ir.Model:
    return arrange("scale-columns", model, statistics)


def test_the_model_computes_the_same(model: ir.Model, statistics: Statistics) -> None:
    x = {"x": torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))}
    expected = Interpreter(model).run(x)["y"]
    names = (*SIZES, "gain")
    before = {name: graph.array(model.graph.initializers[name]).copy() for name in names}
    found = scale(model, statistics)
    for name, weight in before.items():
        assert not np.array_equal(graph.array(found.graph.initializers[name]), weight)
    torch.testing.assert_close(Interpreter(found).run(x)["y"], expected, rtol=1e-4, atol=1e-3)


def test_who_takes_which_factors(model: ir.Model, statistics: Statistics) -> None:
    assert scale_columns.find(model) == [
        Scaling(("gate", "up"), constants=("gain",)),
        Scaling(("down",), made=("up",)),
    ]
    gate = graph.weight(model, "gate").copy()
    found = scale(model, statistics)
    factors = (graph.weight(found, "gate") / gate)[0]
    rms = np.sqrt(statistics.uses["gate"][0].diagonal)
    slope = np.polyfit(np.log(rms), np.log(factors), 1)[0]
    assert slope == pytest.approx(POWER, rel=1e-4)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-5)


def test_statistics_follow(model: ir.Model, statistics: Statistics) -> None:
    """Errors that are scaled as the weights are do the same damage as before."""
    found, moved = scale(model, statistics), scale_columns.follow(model, statistics)
    for name in SIZES:
        weight = graph.weight(model, name)
        times = torch.from_numpy(graph.weight(found, name) / weight)
        delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            moved.damage(name, delta * times),
            statistics.damage(name, delta),
            rtol=0.05,  # rows are moved towards their neighbours' mean before or after
            atol=1e-4,
        )


def test_rounding_does_less_damage(model: ir.Model, statistics: Statistics) -> None:
    found, moved = scale(model, statistics), scale_columns.follow(model, statistics)

    def damage(model: ir.Model, statistics: Statistics) -> float:
        weight, fmt = graph.weight(model, "gate"), FORMATS["int4"]
        importance = Importance.of(statistics.moment("gate"))
        delta = dequantize(quantize(weight, fmt, importance), fmt) - weight
        return float(statistics.damage("gate", torch.from_numpy(delta)).sum())

    assert damage(found, moved) < 0.9 * damage(model, statistics)


def test_without_statistics_nothing_is_scaled(model: ir.Model) -> None:
    before = graph.weight(model, "gate").copy()
    assert np.array_equal(graph.weight(scale(model, None), "gate"), before)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("n = RMSNormalization(x, gain) g = mxcompile.Linear(n, gate) y = Add(n, x)", "float y"),
        ("n = RMSNormalization(x, gain) y = mxcompile.Linear(n, gate)", "float y, float n"),
        ("u = mxcompile.Linear(x, up) a = Relu(u) y = mxcompile.Linear(a, down)", "float y"),
        ("u = mxcompile.Linear(x, up) a = Mul(u, u) y = mxcompile.Linear(a, down)", "float y"),
        ("n = LayerNormalization(x, gain, gain) y = mxcompile.Linear(n, gate)", "float y"),
    ],
    ids=["a residual", "an output", "not linear", "twice", "a shared vector"],
)
def test_what_others_read_stays(body: str, outputs: str) -> None:
    assert scale_columns.find(build(body, VECTORS, outputs)) == []


def test_biases_of_a_norm_shrink_with_its_scale() -> None:
    body = "n = LayerNormalization(x, gain, shift) y = mxcompile.Linear(n, gate)"
    found = scale_columns.find(build(body, VECTORS, "float y"))
    assert found == [Scaling(("gate",), constants=("gain", "shift"))]
