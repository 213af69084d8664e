"""Fuse dequantized weights with the operators that read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mxcompile import graph, qdq
from mxcompile.pipeline import Context, Pass
from mxcompile.plan import ROW_TILE


@dataclass(frozen=True)
class FuseQdq(Pass):
    """Outline each mixed-precision product with its weights and its activation quantizer.

    Linear layers that read the same input (Q, K and V; gate and up) become one ``MixedLinear`` with
    an output each, so that their input is quantized once and their row tiles are one call.
    Embedding lookups become ``MixedGather``, convolutions ``MixedConv``. The functions' bodies are
    the nodes that they replace.

    Before: ``Linear(%x.dq, %wq.dq)``, ``Linear(%x.dq, %wk.dq)``; after: ``MixedLinear(%x, ...)``.
    """

    name = "fuse-qdq"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Outline all groups; a weight with several uses (a tied head) stays a call of its own."""
        groups: dict[tuple[object, ...], list[ir.Node]] = {}
        for node in model.graph:
            if (slot := _weight_slot(node)) is not None:
                alone = node.op_type != "Linear" or not _mergeable(node, slot)
                key = (node,) if alone else (node.inputs[0],)
                groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            _outline(model, nodes)
        model.graph.sort()  # a merged call may stand after readers of its first output
        graph.prune(model)
        return bool(groups)


def _weight_slot(node: ir.Node) -> int | None:
    """Which input of a node is a dequantized weight."""
    slots = {("mxcompile", "Linear"): 1, ("", "Gather"): 0, ("", "Conv"): 1}
    slot = slots.get((node.domain, node.op_type))
    value = node.inputs[slot] if slot is not None else None
    if node.op_type == "Gather" and qdq.chain(node.outputs[0]) is not None:
        return None  # it puts the rows of a weight in order: a part of the chain
    return slot if value is not None and qdq.chain(value) is not None else None


def _mergeable(node: ir.Node, slot: int) -> bool:
    """Whether the weight is read here alone and fills its last row tile."""
    weight = node.inputs[slot]
    assert weight is not None and weight.shape is not None
    rows = weight.shape[0]
    return len(weight.uses()) == 1 and isinstance(rows, int) and rows % ROW_TILE == 0


def _activation_chain(value: ir.Value) -> list[ir.Node]:
    """The nodes that quantize and dequantize an activation, when ``value`` is such a one."""
    node = value.producer()
    cut = node is not None and node.op_type == "Slice"
    node = node.inputs[0].producer() if cut and node and node.inputs[0] is not None else node
    if node is None or node.op_type != "DequantizeLinear" or qdq.chain(value) is not None:
        return []
    quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return []
    source = quantize.inputs[0]
    assert source is not None
    pad = source.producer()
    if cut and pad is not None and pad.op_type == "Pad":
        source = pad.inputs[0]
    return graph.ancestors(value, lambda v: v is source)


def _outline(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    body: dict[ir.Node, None] = {}
    if nodes[0].op_type == "Linear":
        assert nodes[0].inputs[0] is not None
        body.update(dict.fromkeys(_activation_chain(nodes[0].inputs[0])))
    for node in nodes:
        weight = node.inputs[0 if node.op_type == "Gather" else 1]
        assert weight is not None
        body.update(dict.fromkeys(qdq.chain(weight) or []))
        body[node] = None
    produced = {v for node in body for v in node.outputs}
    read = dict.fromkeys(v for node in body for v in node.inputs if v is not None)
    outside = [v for v in read if v not in produced]
    data = [v for v in outside if not graph.is_constant(v)]
    inputs = data + [v for v in outside if graph.is_constant(v)]
    outputs = [node.outputs[0] for node in nodes]
    op_type = "Mixed" + nodes[0].op_type
    call = graph.outline(model, list(body), inputs, outputs, op_type, graph.name(outputs[0]))
    call.name = graph.name(outputs[0])
    for node in reversed(nodes):
        model.graph.remove(node, safe=True)
