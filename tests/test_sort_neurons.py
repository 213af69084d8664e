"""Features between layers in the order of their errors: what can be sorted, and that it is."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mxcompile import graph
from mxcompile.interpret import Interpreter
from mxcompile.passes import sort_neurons
from mxcompile.passes.sort_neurons import Neurons
from mxcompile.plan import ROW_TILE
from mxcompile.statistics import Statistics, UseStatistics
from tests.blocks import INNER, SIZES, WIDTH, arrange, build

VECTORS = {"bias": (INNER,), "scale": ()}

GATED = """
    g = mxcompile.Linear(x, gate)
    b = Add(g, bias)
    a = Gelu(b)
    u = mxcompile.Linear(x, up)
    s = Mul(u, scale)
    h = Mul(a, s)
    d = mxcompile.Linear(h, down)
    y = Add(x, d)
"""


@pytest.fixture
def model() -> ir.Model:
    return build(GATED, VECTORS)


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(1)

    def use(source: str, rows: int, columns: int) -> UseStatistics:
        x = rng.standard_normal((100, columns)).astype("f4") * rng.random(columns).astype("f4")
        return UseStatistics("linear", source, x.T @ x, rng.random(rows).astype("f4"), 100)

    sources = {"gate": "x", "up": "x", "down": "h"}
    uses = {name: (use(sources[name], *shape),) for name, shape in SIZES.items()}
    return Statistics(100, uses, dict.fromkeys(uses, (0.5,)))


def sort(model: ir.Model, statistics: Statistics | None) -> ir.Model:
    return arrange("sort-neurons", model, statistics)


def test_the_model_computes_the_same(model: ir.Model, statistics: Statistics) -> None:
    x = {"x": torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))}
    expected = Interpreter(model).run(x)["y"]
    before = {name: graph.weight(model, name).copy() for name in SIZES}
    found = sort(model, statistics)
    assert not any(np.array_equal(graph.weight(found, n), w) for n, w in before.items())
    torch.testing.assert_close(Interpreter(found).run(x)["y"], expected, rtol=1e-4, atol=1e-4)


def test_row_tiles_are_alike_and_take_turns(model: ir.Model, statistics: Statistics) -> None:
    ((neurons, order),) = sort_neurons.orders(model, statistics)
    assert neurons == Neurons(("gate", "up"), ("down",), ("bias",))
    before = {name: graph.weight(model, name).copy() for name in SIZES}
    found = sort(model, statistics)
    np.testing.assert_array_equal(graph.weight(found, "up"), before["up"][order])
    np.testing.assert_array_equal(graph.weight(found, "down"), before["down"][:, order])
    harm = np.sum([statistics.harm(name, before[name]) for name in ("gate", "up")], axis=0)
    ranks = np.empty(INNER, np.int64)
    ranks[np.argsort(-harm)] = np.arange(INNER)
    tiles = ranks[order].reshape(-1, ROW_TILE)
    assert (np.diff(tiles, axis=1) == 1).all()
    assert (tiles[:, 0] // ROW_TILE).tolist() == [0, 5, 1, 4, 2, 3]


def test_rows_that_fill_no_tile_are_last() -> None:
    order = sort_neurons._dealt(np.arange(100, 170))
    assert order[-6:].tolist() == list(range(164, 170))
    assert order[:64:ROW_TILE].tolist() == [100, 148, 116, 132]


def test_statistics_follow(model: ir.Model, statistics: Statistics) -> None:
    ((_, order),) = sort_neurons.orders(model, statistics)
    up, down = (torch.from_numpy(graph.weight(model, n).copy()) for n in ("up", "down"))
    moved = sort_neurons.follow(model, statistics)
    torch.testing.assert_close(moved.damage("up", up[order]), statistics.damage("up", up)[order])
    torch.testing.assert_close(
        moved.damage("down", down[:, order]), statistics.damage("down", down), rtol=1e-4, atol=1e-4
    )


def test_without_statistics_nothing_is_sorted(model: ir.Model) -> None:
    before = graph.weight(model, "up").copy()
    assert np.array_equal(graph.weight(sort(model, None), "up"), before)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("u = mxcompile.Linear(x, up) y = mxcompile.Linear(u, down) ", "float y, float u"),
        ("u = mxcompile.Linear(x, up) s = Softmax(u) y = mxcompile.Linear(s, down)", "float y"),
        ("u = mxcompile.Linear(x, up) y = Relu(u)", "float y"),
        (
            """u = mxcompile.Linear(x, up) b = Add(u, bias) c = Mul(b, bias)
            y = mxcompile.Linear(c, down)""",
            "float y",
        ),
        (
            "d = mxcompile.Linear(x, up) u = mxcompile.Linear(d, down) y = Add(x, u) z = Mul(d, d)",
            "float y, float z",
        ),
    ],
    ids=["read elsewhere", "mixed", "unread", "a shared bias", "an output of it"],
)
def test_features_that_others_know_stay(body: str, outputs: str) -> None:
    assert sort_neurons.find(build(body, VECTORS, outputs)) == []
