"""Put the rows of token tables in the order of how much their errors count."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.float_model import token_tables
from mxcompile.graph import Use
from mxcompile.pipeline import Context, Pass
from mxcompile.statistics import Statistics


@dataclass(frozen=True)
class SortVocabulary(Pass):
    """Sort the rows of embeddings and heads by the damage that errors in them do.

    Tokens differ a thousandfold in how often they matter, and those that are alike in that are
    neighbours by chance only: a tile of 16 rows gets the format of its most frequent one. Sorted,
    tiles are of a kind. The table of each token's row costs four bytes a token, and is read before
    a lookup and after the head.

    Before: ``Gather(%table, %ids)`` and ``Linear(%h, %table)``; after:
    ``Gather(%table, Cast(Gather(%table.rows, %ids)))`` and
    ``Gather<axis=-1>(Linear(%h, %table), %table.rows)``.
    """

    name = "sort-vocabulary"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Sort every table that nothing but lookups and the head read; needs statistics."""
        if ctx.statistics is None:
            return False
        found = graph.uses(model)
        tables = orders(model, ctx.statistics)
        for unit, order in tables.items():
            _sort(model, unit, found[unit], order)
        return bool(tables)


def follow(model: ir.Model, statistics: Statistics) -> Statistics:
    """The statistics of the model that the pass will leave."""
    for unit, order in orders(model, statistics).items():
        statistics = statistics.with_rows(unit, order)
    return statistics


def orders(model: ir.Model, statistics: Statistics) -> dict[str, np.ndarray]:
    """For every table that can be sorted, which of its rows each is to be."""
    return {unit: statistics.order(unit, graph.weight(model, unit)) for unit in token_tables(model)}


def _sort(model: ir.Model, unit: str, uses: Sequence[Use], order: np.ndarray) -> None:
    graph.change_constant(model, unit, partial(np.take, indices=order, axis=0))
    rows = graph.constant(model, f"{unit}.rows", np.argsort(order).astype(np.int32))
    for use in uses:
        if use.kind == "embedding":
            _look_up(model, use.node, rows)
        else:
            _put_back(model, use.node, rows)


def _look_up(model: ir.Model, node: ir.Node, rows: ir.Value) -> None:
    """Let an embedding read the rows of its tokens."""
    ids = node.inputs[1]
    assert ids is not None
    name, wide = graph.name(node.outputs[0]), ir.DataType.INT64
    narrow = graph.node_after(ids.producer(), model, "Gather", [rows, ids], f"{name}.row")
    narrow.type, narrow.shape = rows.type, ids.shape
    cast = {"to": wide.value}
    chosen = graph.node_after(
        narrow.producer(), model, "Cast", [narrow], f"{name}.index", attributes=cast
    )
    chosen.type, chosen.shape = ir.TensorType(wide), ids.shape
    node.replace_input_with(1, chosen)


def _put_back(model: ir.Model, node: ir.Node, rows: ir.Value) -> None:
    """Put what the head computes into the order of tokens."""
    result = node.outputs[0]
    name = f"{graph.name(result)}.tokens"
    moved = graph.node_after(node, model, "Gather", [result, rows], name, attributes={"axis": -1})
    graph.come_after(result, moved, "sorted")
