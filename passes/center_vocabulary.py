"""Take what the rows of token tables have in common out of them, before they are quantized."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir
from scipy.cluster import vq

from mxcompile import graph
from mxcompile.float_model import token_tables
from mxcompile.graph import Use
from mxcompile.pipeline import Context, Pass
from mxcompile.statistics import Statistics

Array: TypeAlias = np.ndarray[Any, Any]

ROWS_EACH: Final = 1024
"""The rows of a table that are worth a centroid."""

MOST: Final = 63
"""Centroids of a table besides 0, of which whole vectors hold the products with what the head
reads. Four times as many would leave 3 to 5 % less damage of Gemma 3 270M's vocabulary."""

SAMPLE: Final = 32_768
"""Rows that centroids are found from, and as many that say what these save."""

ROUNDS: Final = 15
"""Of Lloyd's algorithm."""

LEAST_GAIN: Final = 0.05
"""Bits a weight that must be saved, less what centroids and their numbers take."""

BLOCK: Final = 1 << 14
"""Rows that are compared with all centroids at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Centers:
    """What is taken out of the rows of a table.

    Attributes:
        centroids: float32 [count, columns]; the first is 0, for rows that are like none.
        nearest: The centroid of each row, uint8 [rows].
    """

    centroids: Array
    nearest: Array

    def subtracted(self, weight: Array) -> Array:
        """What is left of rows [rows, columns]."""
        left: Array = weight - self.centroids[self.nearest]
        return left


@dataclass(frozen=True)
class CenterVocabulary(Pass):
    """Subtract from each row of a token table the nearest of a few centroids, and add it back.

    Embeddings share directions (Mu and Viswanath, arXiv 1702.01417): in Gemma 3 270M a third of
    the energy of rows is that of 64 centroids, in a small model two thirds. Rounding errors are in
    proportion to what is left, so that the same formats leave as much less damage. It is the first
    stage of a residual vector quantizer (Juang and Gray, 1982) with rows as vectors, at a byte a
    row; the second is the plan's.

    Before: ``Gather(%table, %ids)`` and ``Linear(%h, %table)``; after, ``%table`` without them:
    ``Add(Gather(%table, %ids), Transpose(Gather<axis=1>(%centroids, Gather(%nearest, %ids))))`` and
    ``Add(Linear(%h, %table), Gather<axis=-1>(MatMul(%h, %centroids), %nearest))``.
    """

    name = "center-vocabulary"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Center every table where that pays; needs statistics."""
        if ctx.statistics is None:
            return False
        found = False
        for unit, uses in token_tables(model).items():
            weight = graph.weight(model, unit)
            if (centers := find(weight, ctx.statistics.harm(unit, weight))) is not None:
                _center(model, unit, uses, centers)
                found = True
        return found


def follow(_model: ir.Model, statistics: Statistics) -> Statistics:
    """The statistics of the model that the pass will leave: what rows meet stays as it is."""
    return statistics


def find(weight: Array, harm: Array) -> Centers | None:
    """The centroids of the rows of a table; None where they cost more than they save.

    Rows are drawn by the square root of their harm: a row's bits grow with the logarithm of both
    its harm and its size, and rare rows stay at the least that there is.

    Args:
        weight: float32 [rows, columns].
        harm: How much errors in each row count, float64 [rows].
    """
    rows, columns = weight.shape
    rng = np.random.default_rng(0)
    share = np.sqrt(np.maximum(harm, 0)) + np.finfo(np.float64).tiny
    if not (np.isfinite(share).all() and np.isfinite(weight).all()):
        return None  # it cannot be priced either, which is where the user is told
    drawn = weight[rng.choice(rows, min(SAMPLE, rows), p=share / share.sum())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a centroid that no row is near
        learned, _ = vq.kmeans2(
            drawn, min(rows // ROWS_EACH, MOST), ROUNDS, minit="points", rng=rng
        )
    centroids = np.concatenate([np.zeros((1, columns), np.float32), learned.astype(np.float32)])
    nearest = np.concatenate(
        [vq.vq(weight[i : i + BLOCK], centroids)[0] for i in range(0, rows, BLOCK)]
    )
    centers = Centers(centroids, nearest.astype(np.uint8))
    cost = 8 / columns + 32 * len(centroids) / rows
    return centers if _saved(weight, centers) - cost >= LEAST_GAIN else None


def _saved(weight: Array, centers: Centers) -> float:
    """The bits a weight that errors of the same size take less: half the logarithm of energy."""
    some = slice(None, None, -(-len(weight) // SAMPLE))
    left = weight[some] - centers.centroids[centers.nearest[some]]
    before, after = (np.square(rows).sum(1) for rows in (weight[some], left))
    kept = after > 0
    return float(np.log2(before[kept] / after[kept]).mean() / 2) if kept.any() else 0.0


def _center(model: ir.Model, unit: str, uses: Sequence[Use], centers: Centers) -> None:
    graph.change_constant(model, unit, centers.subtracted)
    columns = np.ascontiguousarray(centers.centroids.T)
    centroids = graph.constant(model, f"{unit}.centroids", columns)
    nearest = graph.constant(model, f"{unit}.nearest", centers.nearest)
    graph.mark_added(centroids)
    for use in uses:
        after = _After(model, use.node, use.node.outputs[0])
        if use.kind == "embedding":
            _add_to_lookup(after, centroids, nearest)
        else:
            _add_to_product(after, centroids, nearest)


def _add_to_lookup(after: "_After", centroids: ir.Value, nearest: ir.Value) -> None:
    """Add to what an embedding reads the centroids of its rows."""
    ids, shape = after.read(1), after.result.shape
    assert ids.shape is not None and shape is not None
    integer, rank = ir.DataType.INT64, len(ids.shape)
    code = after.add("Gather", [nearest, ids], "code", nearest.dtype, ids.shape)
    index = after.add("Cast", [code], "centroid", integer, ids.shape, to=integer.value)
    columns = ir.Shape([shape[-1], *ids.shape])
    found = after.add("Gather", [centroids, index], "columns", centroids.dtype, columns, axis=1)
    order = [*range(1, rank + 1), 0]
    after.total(after.add("Transpose", [found], "center", centroids.dtype, shape, perm=order))


def _add_to_product(after: "_After", centroids: ir.Value, nearest: ir.Value) -> None:
    """Add to what a head computes the products with the centroids of its rows."""
    shape, dtype, integer = after.result.shape, after.result.dtype, ir.DataType.INT32
    assert shape is not None and centroids.shape is not None
    few = ir.Shape([*shape[:-1], centroids.shape[1]])
    products = after.add("MatMul", [after.read(0), centroids], "products", dtype, few)
    index = after.add("Cast", [nearest], "nearest", integer, nearest.shape, to=integer.value)
    after.total(after.add("Gather", [products, index], "center", dtype, shape, axis=-1))


@dataclass(slots=True)
class _After:
    """Puts nodes after one that reads a table, each after the one before.

    Attributes:
        model: The graph.
        node: The last of them.
        result: What the table's reader computes.
    """

    model: ir.Model
    node: ir.Node
    result: ir.Value

    def read(self, slot: int) -> ir.Value:
        """What the reader was given beside the table."""
        reader = self.result.producer()
        value = reader.inputs[slot] if reader is not None else None
        assert value is not None
        return value

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        suffix: str,
        dtype: ir.DataType | None,
        shape: ir.Shape | None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """A node more, and what it computes."""
        name = f"{graph.name(self.result)}.{suffix}"
        found = graph.node_after(
            self.node, self.model, op_type, inputs, name, attributes=attributes
        )
        node = found.producer()
        assert node is not None and dtype is not None
        self.node, found.type, found.shape = node, ir.TensorType(dtype), shape
        return found

    def total(self, center: ir.Value) -> None:
        """Let the sum of the result and its centroids take the result's place."""
        dtype, shape = self.result.dtype, self.result.shape
        total = self.add("Add", [self.result, center], "total", dtype, shape)
        graph.come_after(self.result, total, "left")
