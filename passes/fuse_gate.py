"""Join an activation function, and the product with what it gates, to one operator."""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from mxcompile import graph
from mxcompile.passes.fuse_residual import rounded_format
from mxcompile.pipeline import Context, Pass

GATE: Final = "Gate"

GELU_TANH, SILU = "gelu_tanh", "silu"
"""Overloads: the activation functions."""

DEFINITIONS: Final = {
    GELU_TANH: """
Gate (gate, up) => (y)
{
    opened = Gelu <approximate: string = "tanh"> (gate)
    y = Mul (opened, up)
}""",
    SILU: """
Gate (gate, up) => (y)
{
    share = Sigmoid (gate)
    opened = Mul (gate, share)
    y = Mul (opened, up)
}""",
}


@dataclass(frozen=True)
class FuseGate(Pass):
    """Let one operator compute ``act(gate) * up`` where products alone read it, and round it.

    These are the hidden units of gated MLPs (GLU variants, arXiv 2002.05202), as wide as anything
    in a layer; rounded as they are computed, they are not stored.

    Before: ``%y = Mul(Gelu(%g), %u)`` or ``%y = Mul(Mul(%g, Sigmoid(%g)), %u)``;
    after: ``%y = Gate:gelu_tanh(%g, %u)`` or ``%y = Gate:silu(%g, %u)``.
    """

    name = "fuse-gate"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fuse every gated [batch, seq, columns] value that is rounded by all that read it."""
        found = False
        for node in graph.select(model.graph, "Mul"):
            y = node.outputs[0]
            if rounded_format(model, y) is None or y.shape is None or len(y.shape) != 3:
                continue
            for opened, up in (node.inputs, node.inputs[::-1]):
                gate = _gate(opened)
                if gate is not None and _same_shape(gate[1], y) and _same_shape(up, y):
                    _fuse(model, node, *gate, up)
                    found = True
                    break
        graph.prune(model)
        return found


def _same_shape(x: ir.Value | None, y: ir.Value) -> bool:
    return x is not None and x.shape == y.shape


def _gate(opened: ir.Value | None) -> tuple[str, ir.Value | None] | None:
    """The function that computes a value, if it is one of ours, and what it is computed of."""
    node = opened.producer() if opened is not None else None
    if opened is None or node is None or node.domain or len(opened.uses()) != 1:
        return None
    if node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") == "tanh":
        return GELU_TANH, node.inputs[0]
    if node.op_type == "Mul":
        for gate, share in (node.inputs, node.inputs[::-1]):
            sigmoid = share.producer() if share is not None else None
            if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is gate:
                return SILU, gate
    return None


def _fuse(
    model: ir.Model, node: ir.Node, overload: str, gate: ir.Value | None, up: ir.Value | None
) -> None:
    graph.define(model, graph.overloaded(overload, DEFINITIONS[overload]))
    call = ir.Node(graph.DOMAIN, GATE, [gate, up], overload=overload, name=node.name)
    model.graph.insert_after(node, call)
    graph.take_place(model, node.outputs[0], call.outputs[0])
