"""Centered token tables: the same model, and rows that are smaller where they are alike."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mxcompile import graph
from mxcompile.float_model import FloatModel, find_head, token_tables
from mxcompile.interpret import Interpreter
from mxcompile.passes import center_vocabulary
from mxcompile.statistics import Statistics, UseStatistics
from tests.blocks import arrange, parse

ROWS, COLUMNS, GROUPS = 4096, 64, 2
LANGUAGE_MODEL = """
g (int64[batch, seq] input_ids, int64[count] more) => (
    float[batch, seq, 4096] logits, float[count, 64] vectors) {
    e = Gather(table, input_ids)
    vectors = Gather(table, more)
    d = mxcompile.Linear(e, layer)
    l = mxcompile.Linear(d, table)
    capped = Tanh(l)
    logits = Mul(capped, scale)
}"""


@pytest.fixture
def rows() -> np.ndarray:
    """Rows around one of two points each, or around none."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.standard_normal((GROUPS, COLUMNS)), np.zeros((1, COLUMNS))])
    found = points[rng.integers(0, GROUPS + 1, ROWS)] + 0.3 * rng.standard_normal((ROWS, COLUMNS))
    return found.astype(np.float32)


@pytest.fixture
def model(rows: np.ndarray) -> ir.Model:
    rng = np.random.default_rng(1)
    layer = rng.standard_normal((COLUMNS, COLUMNS)).astype(np.float32) / COLUMNS
    return parse(LANGUAGE_MODEL, {"table": rows, "layer": layer, "scale": np.array(3, "f4")})


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(2)
    share = rng.random(ROWS).astype(np.float32)
    ones, whole = np.ones(COLUMNS, np.float32), np.eye(COLUMNS, dtype=np.float32)
    uses = (
        UseStatistics("embedding", "input_ids", ones, share, 9),
        UseStatistics("embedding", "more", ones, share, 9),
        UseStatistics("linear", "d", whole, share, 9),
    )
    layer = UseStatistics("linear", "e", whole, ones, 9)
    return Statistics(
        1, {"table": uses, "layer": (layer,)}, {"table": (1.0, 1.0, 2.0), "layer": (1.0,)}
    )


def answers(model: ir.Model) -> list[torch.Tensor]:
    rng = np.random.default_rng(3)
    feed = {"input_ids": rng.integers(0, ROWS, (2, 5)), "more": rng.integers(0, ROWS, 7)}
    found = Interpreter(model).run({name: torch.from_numpy(ids) for name, ids in feed.items()})
    return [found["logits"], found["vectors"]]


@pytest.mark.parametrize(
    "pipeline", ["center-vocabulary", "center-vocabulary,sort-vocabulary"], ids=["alone", "sorted"]
)
def test_the_model_computes_the_same(
    model: ir.Model, statistics: Statistics, pipeline: str
) -> None:
    found = arrange(pipeline, model, statistics)
    assert [v.name for v in found.graph.outputs] == ["logits", "vectors"]
    # Subtracting and adding round to half a unit in the last place each: 2**-23 of numbers below 8.
    for new, old in zip(answers(found), answers(model), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=COLUMNS * 8 * 2**-23)


def test_rows_keep_what_is_their_own(
    model: ir.Model, statistics: Statistics, rows: np.ndarray
) -> None:
    found = arrange("center-vocabulary", model, statistics)
    left = graph.weight(found, "table")
    # Of a point's rows 0.3**2 a column is left, but for the centroid that is their mean.
    assert np.square(left).mean() == pytest.approx(0.09, rel=0.1)
    assert np.square(left).sum() < np.square(rows).sum() / 5
    assert graph.parameters(found) == graph.parameters(model)


def test_no_row_grows(statistics: Statistics, rows: np.ndarray) -> None:
    centers = center_vocabulary.find(rows, statistics.harm("table", rows))
    assert centers is not None
    assert not centers.centroids[0].any()
    assert len(centers.centroids) == 1 + ROWS // center_vocabulary.ROWS_EACH
    size, left = (np.square(x).sum(1) for x in (rows, centers.subtracted(rows)))
    assert (left <= size * (1 + 1e-5)).all()


def test_harm_draws_the_centroids(rows: np.ndarray) -> None:
    """Where two groups of rows are alike in themselves and one alone matters, it gets them."""
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    table, harm = np.concatenate([rows, noise]), np.repeat([1.0, 0.0], ROWS)
    found = [center_vocabulary.find(table, weights) for weights in (harm, harm[::-1])]
    left = [np.square(centers.subtracted(table)[:ROWS]).sum() for centers in found if centers]
    assert len(left) == 1 or left[0] < left[1]
    assert left[0] < np.square(rows).sum() / 4


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["noise", "zeros"])
def test_rows_that_share_nothing_stay(
    model: ir.Model, statistics: Statistics, scale: float
) -> None:
    rng = np.random.default_rng(5)
    noise = (scale * rng.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    assert center_vocabulary.find(noise, np.ones(ROWS)) is None
    model.graph.initializers["table"].const_value = ir.Tensor(noise, name="table")
    found = arrange("center-vocabulary", model, statistics)
    assert [n.op_type for n in found.graph] == [n.op_type for n in model.graph]


def test_rows_that_never_count_are_centered_all_the_same(rows: np.ndarray) -> None:
    assert center_vocabulary.find(rows, np.zeros(ROWS)) is not None


@pytest.mark.parametrize("where", ["rows", "harm"])
def test_what_is_not_finite_is_left_for_prices_to_refuse(where: str, rows: np.ndarray) -> None:
    harm = np.ones(ROWS)
    if where == "rows":
        rows[7, 3] = np.nan
    else:
        harm[7] = np.inf
    assert center_vocabulary.find(rows, harm) is None


def test_the_head_is_found_behind_centroids(model: ir.Model, statistics: Statistics) -> None:
    found = arrange("center-vocabulary,sort-vocabulary", model, statistics)
    uses = graph.uses(found)
    head = find_head(found, uses)
    assert head is uses["table"][-1]
    assert head.node is graph.last_product(found)
    assert list(token_tables(found)) == ["table"]
    watched = FloatModel(found, uses)
    feed = {
        "input_ids": torch.arange(6).reshape(1, 6),
        "more": torch.zeros(1, dtype=torch.int64),
    }
    values = watched.interpreter.run(feed, fetch=[*watched.fetched, "logits"])
    torch.testing.assert_close(watched.logits(values["d"][0]), values["logits"][0])


@pytest.mark.parametrize(("source", "alone"), [("e", False), ("d", True)])
def test_a_head_is_all_that_logits_come_from(model: ir.Model, source: str, alone: bool) -> None:
    (last,) = graph.select(model.graph, "Mul")
    read = next(v for node in model.graph for v in node.outputs if v.name == source)
    table = graph.constant(model, "other", np.ones((COLUMNS, ROWS), np.float32))
    other = graph.node_after(last, model, "MatMul", [read, table], "product")
    total = graph.node_after(other.producer(), model, "Add", [last.outputs[0], other], "total")
    other.type, other.shape = last.outputs[0].type, last.outputs[0].shape
    graph.come_after(last.outputs[0], total, "before")
    assert total.name == "logits"
    assert (find_head(model, graph.uses(model)) is not None) == alone


def test_without_statistics_nothing_is_centered(model: ir.Model) -> None:
    found = arrange("center-vocabulary", model, None)
    assert np.array_equal(graph.weight(found, "table"), graph.weight(model, "table"))
    assert len(list(found.graph)) == len(list(model.graph))


def test_statistics_stay(model: ir.Model, statistics: Statistics) -> None:
    assert center_vocabulary.follow(model, statistics) is statistics
