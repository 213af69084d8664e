"""Compute logits only where they are asked for."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import UnsupportedError
from mxcompile.pipeline import Context, Pass

POSITIONS = "logit_positions"
ROWS = "logit_rows"

PRODUCTS: Final = ("MixedLinear", "Linear")
NORMS: Final = ("RMSNormalization", "LayerNormalization")
ELEMENTWISE: Final = ("Add", "Mul", "Gelu", "Sigmoid")


@dataclass(frozen=True)
class SelectLogits(Pass):
    """Gather the wanted positions where a language model needs no others any more.

    Generation needs the logits of the last token alone, and the head is often the largest matrix.
    What lies between the last attention and the head works on each position by itself, so that it
    is spared the others too. The positions become an int64 input of their own; a model without a
    ``logits`` output or without a cache stays as it is.

    Before: ``%logits = MixedLinear(RMSNormalization(%h, %w), ...)``, ``%h`` of an attention;
    after: ``%logits = MixedLinear(RMSNormalization(%h.wanted, %w), ...)`` with
    ``%h.wanted = Gather<axis=1>(%h, %logit_positions)``.
    """

    name = "select-logits"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Find the head behind the ``logits`` output and gather what it is computed from."""
        outputs = [v for v in model.graph.outputs if v.name == graph.LOGITS]
        if not outputs or not graph.select(model.graph, "CachedAttention", graph.DOMAIN):
            return False
        head = graph.last_product(model)
        if head is None or len(head.outputs) != 1:
            raise UnsupportedError("no linear layer of its own computes the output 'logits'")
        hidden = head.inputs[0]
        assert hidden is not None
        positions = ir.Value(
            name=POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((ROWS,))
        )
        model.graph.inputs.append(positions)
        after = set(graph.ancestors(outputs[0], lambda v: v is hidden))
        before = _by_position(model, after, hidden)
        users = [n for n in model.graph if n in before or (n in after and hidden in n.inputs)]
        for value in dict.fromkeys(v for n in users for v in n.inputs if _alike(v, hidden)):
            assert value is not None
            if value.producer() not in before:
                chosen = graph.node_after(
                    value.producer(), model, "Gather", [value, positions], f"{value.name}.wanted",
                    attributes={"axis": 1},
                )  # fmt: skip
                chosen.type, chosen.shape = value.type, _selected(value)
                for use in tuple(value.uses()):
                    if use.node in users:
                        use.node.replace_input_with(use.idx, chosen)
        for node in before:
            for value in node.outputs:
                value.shape = _selected(value)
        return True


def _by_position(model: ir.Model, after: Set[ir.Node], hidden: ir.Value) -> set[ir.Node]:
    """The nodes that work on each position by itself, read by nothing but these and ``after``."""
    found: set[ir.Node] = set()
    for node in reversed(model.graph):
        users = {user for value in node.outputs for user in value.consumers()}
        if (
            node not in after
            and users
            and users <= after | found
            and not any(value.is_graph_output() for value in node.outputs)
            and all(_alike(value, hidden) for value in node.outputs)
            and _is_by_position(node, hidden)
        ):
            found.add(node)
    return found


def _is_by_position(node: ir.Node, hidden: ir.Value) -> bool:
    if not node.domain and node.op_type in ELEMENTWISE:
        return all(_alike(v, hidden) or _is_for_all(v) for v in node.inputs)
    by_rows = (
        node.op_type in PRODUCTS
        if node.domain == graph.DOMAIN
        else node.op_type in NORMS and graph.last_axis_only(node, 3)
    )
    return by_rows and _alike(node.inputs[0], hidden)


def _alike(value: ir.Value | None, hidden: ir.Value) -> bool:
    """Whether a value is [batch, seq, columns] for the positions of the hidden states."""
    if value is hidden:
        return True
    shapes = [v.shape for v in (value, hidden) if v is not None and v.shape is not None]
    if len(shapes) < 2 or len(shapes[0]) != 3 or shapes[0].has_unknown_dim():
        return False
    return shapes[0][:2] == shapes[1][:2]


def _is_for_all(value: ir.Value | None) -> bool:
    """Whether a value is a number, or a number a column, for all positions alike."""
    return value is not None and value.shape is not None and all(d == 1 for d in value.shape[:-1])


def _selected(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    batch, _, columns = value.shape
    return ir.Shape((batch, ROWS, columns))
