"""Compute logits only where they are asked for."""

from dataclasses import dataclass

import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import UnsupportedError
from mxcompile.pipeline import Context, Pass

POSITIONS = "logit_positions"


@dataclass(frozen=True)
class SelectLogits(Pass):
    """Gather the hidden states of the wanted positions before the head of a language model.

    All products of these on the way to the logits read what is gathered. Generation needs the
    logits of the last token alone, and the head is often the largest matrix. The positions become
    an int64 input of their own; a model without a ``logits`` output or without a cache stays as it
    is.

    Before: ``%logits = MixedLinear(%h, ...)``;
    after: ``%logits = MixedLinear(Gather<axis=1>(%h, %logit_positions), ...)``.
    """

    name = "select-logits"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Find the head behind the ``logits`` output and gather its input."""
        outputs = [v for v in model.graph.outputs if v.name == graph.LOGITS]
        if not outputs or not graph.select(model.graph, "CachedAttention", graph.DOMAIN):
            return False
        head = graph.last_product(model)
        if head is None or len(head.outputs) != 1:
            raise UnsupportedError("no linear layer of its own computes the output 'logits'")
        hidden = head.inputs[0]
        assert hidden is not None and hidden.shape is not None
        positions = ir.Value(
            name=POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(("logit_rows",))
        )
        model.graph.inputs.append(positions)
        chosen = graph.node_after(
            hidden.producer(), model, "Gather", [hidden, positions], f"{hidden.name}.wanted",
            attributes={"axis": 1},
        )  # fmt: skip
        chosen.type = hidden.type
        chosen.shape = ir.Shape((hidden.shape[0], "logit_rows", hidden.shape[2]))
        for node in graph.ancestors(outputs[0], lambda v: v is hidden):
            if node.inputs[0] is hidden:
                node.replace_input_with(0, chosen)
        return True
