"""Bring the spellings of one computation to one form."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer

from mxcompile import graph
from mxcompile.pipeline import Context, Pass

LINEAR = """
<opset_import: ["" : 23], domain: "mxcompile">
Linear (x, w) => (y) {
    wt = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, wt)
}
"""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold constants, and write products with a constant matrix as ``Linear(x, w)``.

    ``w`` has one row an output feature, whichever way the model stored it.

    Before: ``%y = MatMul(%x, Transpose(%w))`` or ``Gemm(%x, %w, %b)``;
    after: ``%y = mxcompile.Linear(%x, %w)``, the bias in an ``Add`` of its own. A ``MatMul`` of
    columns with rows, which adds nothing up (as of positions with frequencies), is a ``Mul``.
    """

    name = "canonicalize"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite every MatMul and Gemm by a constant matrix, or of one term."""
        common_passes.InlinePass()(model)
        graph.define(model, LINEAR)
        common_passes.LiftConstantsToInitializersPass()(model)
        # Before folding, which would fold a weight's Transpose into a weight of another name; and
        # after it, for weights that are constants only then.
        graph.infer_shapes(model)
        _rewrite_products(model)
        onnxscript.optimizer.optimize_ir(model, inline=False)
        graph.infer_shapes(model)
        _rewrite_products(model)
        return True


def _rewrite_products(model: ir.Model) -> None:
    transposed: dict[ir.Value, ir.Value] = {}
    for node in graph.select(model.graph, "MatMul"):
        _rewrite_matmul(model, node, transposed)
    for node in graph.select(model.graph, "Gemm"):
        _rewrite_gemm(model, node, transposed)
    graph.prune(model)
    for old, new in transposed.items():
        if not old.uses():
            name = graph.name(old)
            model.graph.initializers.pop(name, None)
            new.name = name


def _matrix(
    model: ir.Model, value: ir.Value | None, rows_first: bool, done: dict[ir.Value, ir.Value]
) -> ir.Value | None:
    """The constant behind ``value`` with one row an output feature, or None."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and len(value.shape or ()) == 2:
        return _matrix(model, producer.inputs[0], not rows_first, done)
    if not graph.is_constant(value) or len(value.shape or ()) != 2:
        return None
    if rows_first:
        return value
    if value not in done:
        data = np.ascontiguousarray(graph.array(value).T)
        done[value] = graph.constant(model, f"{graph.name(value)}.T", data)
    return done[value]


def _rewrite_matmul(model: ir.Model, node: ir.Node, done: dict[ir.Value, ir.Value]) -> None:
    if _is_outer(*node.inputs):
        old = node.outputs[0]
        product = graph.node_after(node, model, "Mul", node.inputs, f"{graph.name(old)}.outer")
        graph.take_place(model, old, product)
    elif (weight := _matrix(model, node.inputs[1], False, done)) is not None:
        _replace_by_linear(model, node, weight)


def _is_outer(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether a product of matrices has one term; leading dimensions are broadcast as by Mul."""
    shapes = [v.shape for v in (left, right) if v is not None and v.shape is not None]
    if len(shapes) < 2 or min(map(len, shapes)) < 2:
        return False
    return shapes[0][-1] == shapes[1][-2] == 1


def _rewrite_gemm(model: ir.Model, node: ir.Node, done: dict[ir.Value, ir.Value]) -> None:
    plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    if not plain or node.attributes.get_int("transA", 0) == 1:
        return
    by_rows = node.attributes.get_int("transB", 0) == 1
    if (weight := _matrix(model, node.inputs[1], by_rows, done)) is not None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        _replace_by_linear(model, node, weight, bias)


def _replace_by_linear(
    model: ir.Model, node: ir.Node, weight: ir.Value, bias: ir.Value | None = None
) -> None:
    old = node.outputs[0]
    product = graph.name(old) if bias is None else f"{old.name}.product"
    old_name = graph.name(old)
    old.name = f"{old_name}.old"
    linear = graph.node_after(
        node, model, "Linear", [node.inputs[0], weight], product, domain=graph.DOMAIN
    )
    linear.type, linear.shape = old.type, old.shape
    result = linear
    if bias is not None:
        result = graph.node_after(linear.producer(), model, "Add", [linear, bias], old_name)
        result.type, result.shape = old.type, old.shape
    graph.replace_uses(model, old, result)
    model.graph.remove(node, safe=True)
