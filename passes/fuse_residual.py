"""Join residual additions with the norms around them."""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from mxcompile import graph
from mxcompile.formats import ActivationFormat
from mxcompile.passes.quantize_activations import activation_format
from mxcompile.pipeline import Context, Pass

RESIDUAL_NORM = "ResidualNorm"

PLAIN, NORMED = "plain", "normed"
"""Overloads: what is added is taken as it is, or normalized first."""

DEFINITIONS: Final = {
    PLAIN: """
ResidualNorm <epsilon> (rest, added, weight) => (total, normalized)
{
    total = Add (rest, added)
    normalized = RMSNormalization <axis: int = -1, epsilon: float = @epsilon> (total, weight)
}""",
    NORMED: """
ResidualNorm <epsilon, inner_epsilon> (rest, added, weight, inner_weight) => (total, normalized)
{
    term = RMSNormalization <axis: int = -1, epsilon: float = @inner_epsilon> (added, inner_weight)
    total = Add (rest, term)
    normalized = RMSNormalization <axis: int = -1, epsilon: float = @epsilon> (total, weight)
}""",
}


@dataclass(frozen=True)
class FuseResidual(Pass):
    """Let one operator add to the residual stream and normalize the sum for what reads it.

    A row of the stream is then read and written once, where an addition and two norms would each
    do so. The norm's result must be rounded by all that reads it, so that none of it is stored; a
    norm of what is added, as Gemma has it, joins in.

    Before: ``%h = Add(%r, RMSNormalization(%y, %v)); %n = RMSNormalization(%h, %w)``;
    after: ``%h, %n = ResidualNorm:normed(%r, %y, %w, %v)``, or ``:plain(%r, %y, %w)``.
    """

    name = "fuse-residual"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fuse every sum of two [batch, seq, columns] values whose norm products alone read."""
        found = False
        for norm in graph.select(model.graph, "RMSNormalization"):
            total = norm.inputs[0]
            add = total.producer() if total is not None else None
            if (
                add is not None
                and add.op_type == "Add"
                and rounded_format(model, norm.outputs[0]) is not None
                and _normalizes_rows(norm)
                and all(_alike(x, total) for x in add.inputs)
            ):
                _fuse(model, add, norm)
                found = True
        graph.prune(model)
        return found


def rounded_format(model: ir.Model, value: ir.Value) -> ActivationFormat | None:
    """The format that all readers of a value, being products, round it to; None if they do not."""
    formats = {
        activation_format(model.functions[reader.op_identifier()])
        if (reader.domain, reader.op_type) == (graph.DOMAIN, "MixedLinear")
        else None
        for reader in value.consumers()
    }
    return formats.pop() if len(formats) == 1 and not value.is_graph_output() else None


def _normalizes_rows(norm: ir.Node) -> bool:
    x = norm.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    return rank == 3 and graph.last_axis_only(norm, rank)


def _alike(x: ir.Value | None, total: ir.Value | None) -> bool:
    return x is not None and total is not None and x.shape is not None and x.shape == total.shape


def _fuse(model: ir.Model, add: ir.Node, norm: ir.Node) -> None:
    rest, added = add.inputs
    if _is_inner(rest) and not _is_inner(added):
        rest, added = added, rest
    inputs, attributes = [rest, added, norm.inputs[1]], {"epsilon": epsilon(norm)}
    overload = NORMED if _is_inner(added) else PLAIN
    if overload == NORMED:
        assert added is not None
        inner = added.producer()
        assert inner is not None
        inputs[1:] = [inner.inputs[0], norm.inputs[1], inner.inputs[1]]
        attributes["inner_epsilon"] = epsilon(inner)
    graph.define(model, graph.overloaded(overload, DEFINITIONS[overload]))
    node = ir.Node(
        graph.DOMAIN,
        RESIDUAL_NORM,
        inputs,
        ir.convenience.convert_attributes(attributes),
        overload=overload,
        num_outputs=2,
        name=norm.name,
    )
    model.graph.insert_after(add, node)
    for old, new in zip((add.outputs[0], norm.outputs[0]), node.outputs, strict=True):
        graph.take_place(model, old, new)


def _is_inner(value: ir.Value | None) -> bool:
    """Whether a value is a norm of rows that nothing but the addition reads."""
    norm = graph.read_once(value, "RMSNormalization")
    return norm is not None and _normalizes_rows(norm)


def epsilon(norm: ir.Node) -> float:
    """What a norm adds to the mean of squares."""
    return float(norm.attributes.get_float("epsilon", 1e-5) or 1e-5)
