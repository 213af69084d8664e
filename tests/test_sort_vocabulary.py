"""Sorted token tables: the same model, and tiles of rows that are alike."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mxcompile import graph
from mxcompile.interpret import Interpreter
from mxcompile.passes import sort_vocabulary
from mxcompile.statistics import ALIKE, Statistics, UseStatistics, expected, shrunk
from tests.blocks import arrange, parse

ROWS, COLUMNS = 2048, 32
LANGUAGE_MODEL = """
g (int64[batch, seq] input_ids) => (float[batch, seq, 2048] logits) {
    e = Gather(table, input_ids)
    d = mxcompile.Linear(e, layer)
    l = mxcompile.Linear(d, table)
    logits = Mul(l, scale)
}"""


@pytest.fixture
def model() -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {"table": (ROWS, COLUMNS), "layer": (COLUMNS, COLUMNS), "scale": ()}
    weights = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    return parse(LANGUAGE_MODEL, weights)


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(1)
    uses = (
        UseStatistics(
            "embedding", "input_ids", np.ones(COLUMNS, np.float32), rng.random(ROWS).astype("f4"), 9
        ),
        UseStatistics("linear", "d", np.eye(COLUMNS, dtype="f4"), rng.random(ROWS).astype("f4"), 9),
    )
    layer = UseStatistics("linear", "e", np.eye(COLUMNS, dtype="f4"), np.ones(COLUMNS, "f4"), 9)
    return Statistics(1, {"table": uses, "layer": (layer,)}, {"table": (1.0, 2.0), "layer": (1.0,)})


def sort(model: ir.Model, statistics: Statistics | None) -> ir.Model:
    return arrange("sort-vocabulary", model, statistics)


def test_the_model_computes_the_same(model: ir.Model, statistics: Statistics) -> None:
    ids = {"input_ids": torch.from_numpy(np.random.default_rng(2).integers(0, ROWS, (2, 5)))}
    logits = Interpreter(model).run(ids)["logits"]
    found = sort(model, statistics)
    assert not np.array_equal(graph.weight(found, "table"), graph.weight(model, "table"))
    torch.testing.assert_close(Interpreter(found).run(ids)["logits"], logits)
    assert found.graph.outputs[0].name == "logits"


def test_rows_fall_by_the_damage_of_their_errors(model: ir.Model, statistics: Statistics) -> None:
    order = sort_vocabulary.orders(model, statistics)
    found = sort(model, statistics)
    assert list(order) == ["table"]
    table = graph.weight(model, "table")
    np.testing.assert_array_equal(graph.weight(found, "table"), table[order["table"]])
    lookup, head = statistics.uses["table"]
    damage = (expected(lookup.rows, lookup.count) + 2 * shrunk(head.rows)) * np.square(table).sum(1)
    sorted_damage = damage[order["table"]]
    assert (sorted_damage[1:] <= sorted_damage[:-1] * ALIKE * (1 + 1e-6)).all()
    # Neighbours are alike, or the later one does less; alike ones stay in the order of tokens.
    runs = np.split(order["table"], np.flatnonzero(np.diff(order["table"]) < 0) + 1)
    assert len(runs) <= 2 + np.log(damage.max() / damage.min()) / np.log(ALIKE)


def test_statistics_follow_the_rows(model: ir.Model, statistics: Statistics) -> None:
    order = sort_vocabulary.orders(model, statistics)["table"]
    delta = torch.from_numpy(graph.weight(model, "table").copy())
    moved = sort_vocabulary.follow(model, statistics)
    damage = statistics.damage("table", delta)[order]
    torch.testing.assert_close(moved.damage("table", delta[order]), damage)
    part = moved.damage("table", delta[order][100:200], 100)
    torch.testing.assert_close(part, damage[100:200])


def test_a_table_that_something_else_reads_stays(model: ir.Model, statistics: Statistics) -> None:
    (last,) = graph.select(model.graph, "Mul")
    other = graph.node_after(last, model, "Softmax", [last.outputs[0]], "other")
    other.type, other.shape = last.outputs[0].type, last.outputs[0].shape
    model.graph.outputs[0] = other  # no logits: the second use is a layer like any other
    assert sort_vocabulary.orders(model, statistics) == {}


def test_without_statistics_nothing_is_sorted(model: ir.Model) -> None:
    assert np.array_equal(graph.weight(sort(model, None), "table"), graph.weight(model, "table"))


def test_equal_rows_keep_their_places(model: ir.Model, statistics: Statistics) -> None:
    none = replace(statistics, factors={**statistics.factors, "table": (0.0, 0.0)})
    order = sort_vocabulary.orders(model, none)["table"]
    np.testing.assert_array_equal(order, np.arange(ROWS))
