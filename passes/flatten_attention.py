"""Write attention and rotary embeddings over [batch, seq, heads * head_dim]."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.pipeline import Context, Pass

SWAP = (0, 2, 1, 3)
"""Between [batch, seq, heads, dim] and [batch, heads, seq, dim]: its own inverse."""


@dataclass(frozen=True)
class FlattenAttention(Pass):
    """Use the 3-D forms of Attention and RotaryEmbedding, as matrix products write and read them.

    The transposes that exporters put around the 4-D forms go away.

    Before: ``Attention(Transpose(%q4), ...)`` then ``Reshape(Transpose(%y))``;
    after: ``Attention<q_num_heads, kv_num_heads>(%q3, ...)``.
    """

    name = "flatten-attention"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite every 4-D Attention whose head counts and sizes are known."""
        nodes = [n for n in graph.select(model.graph, "Attention") if _is_heads_first(n)]
        flat: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            _rewrite(model, node, flat)
        graph.prune(model)
        return bool(nodes)


def _is_heads_first(node: ir.Node) -> bool:
    return all(
        v is not None
        and v.shape is not None
        and len(v.shape) == 4
        and isinstance(v.shape[1], int)
        and isinstance(v.shape[3], int)
        for v in node.inputs[:3]
    )


def _dims(value: ir.Value) -> tuple[int, int]:
    """Heads and head size of a [batch, heads, seq, dim] value."""
    assert value.shape is not None
    heads, size = value.shape[1], value.shape[3]
    assert isinstance(heads, int) and isinstance(size, int)
    return heads, size


def _is_swap(node: ir.Node | None) -> bool:
    return (
        node is not None
        and node.op_type == "Transpose"
        and tuple(node.attributes.get_ints("perm", ())) == SWAP
    )


def _typed(value: ir.Value, like: ir.Value, shape: tuple[object, ...]) -> ir.Value:
    value.type, value.shape = like.type, ir.Shape(shape)  # type: ignore[arg-type]
    return value


def _flatten(model: ir.Model, value: ir.Value, done: dict[ir.Value, ir.Value]) -> ir.Value:
    """The 3-D form [batch, seq, heads * dim] of a 4-D value; made once each."""
    if value in done:
        return done[value]
    heads, size = _dims(value)
    assert value.shape is not None
    shape = (value.shape[0], value.shape[2], heads * size)
    producer = value.producer()
    if producer is not None and producer.op_type == "RotaryEmbedding":
        x, *rest = producer.inputs
        assert x is not None
        attributes = {a.name: a.value for a in producer.attributes.values()} | {"num_heads": heads}
        inner = _flatten(model, x, done)
        result = graph.node_after(
            producer, model, "RotaryEmbedding", [inner, *rest], f"{value.name}.flat",
            attributes=attributes,
        )  # fmt: skip
    else:
        result = _merged(model, _swapped(model, value), heads * size, f"{value.name}.flat")
    done[value] = result if result.shape is not None else _typed(result, value, shape)
    return done[value]


def _swapped(model: ir.Model, value: ir.Value) -> ir.Value:
    """A [batch, seq, heads, dim] view of a [batch, heads, seq, dim] value.

    A norm over the last axis does not mind where the heads are, so the swap moves before it.
    """
    producer = value.producer()
    if producer is not None and producer.inputs and producer.inputs[0] is not None:
        x = producer.inputs[0]
        if _is_swap(producer):
            return x
        if _is_head_norm(producer):
            inputs = [_swapped(model, x), *producer.inputs[1:]]
            attributes = {a.name: a.value for a in producer.attributes.values()}
            result = graph.node_after(
                producer, model, producer.op_type, inputs, f"{value.name}.swapped",
                attributes=attributes,
            )  # fmt: skip
            return _typed(result, value, _swapped_shape(value))
    result = graph.node_after(
        producer, model, "Transpose", [value], f"{value.name}.swapped", attributes={"perm": SWAP}
    )
    return _typed(result, value, _swapped_shape(value))


def _is_head_norm(node: ir.Node) -> bool:
    norm = node.op_type in ("RMSNormalization", "LayerNormalization")
    return norm and node.attributes.get_int("axis", -1) in (-1, 3)


def _swapped_shape(value: ir.Value) -> tuple[object, ...]:
    assert value.shape is not None
    return tuple(value.shape[axis] for axis in SWAP)


def _merged(model: ir.Model, value: ir.Value, width: int, output: str) -> ir.Value:
    """A [batch, seq, heads, dim] value as [batch, seq, width]; what it was split from, if so."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        whole = producer.inputs[0].shape
        if whole is not None and len(whole) == 3 and whole[2] == width:
            return producer.inputs[0]
    return _reshape(model, value, output, (width,))


def _reshape(model: ir.Model, value: ir.Value, output: str, last: tuple[int, ...]) -> ir.Value:
    """Reshape keeping batch and seq; ``last`` replaces the dimensions after them."""
    label = "heads." + "x".join(map(str, last))
    shape = model.graph.initializers.get(label)
    if shape is None:
        shape = graph.constant(model, label, np.array((0, 0, *last), np.int64))
    return graph.node_after(value.producer(), model, "Reshape", [value, shape], output)


def _rewrite(model: ir.Model, node: ir.Node, done: dict[ir.Value, ir.Value]) -> None:
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    (heads, _), (kv_heads, _), (_, size) = _dims(q), _dims(k), _dims(v)
    flat = [_flatten(model, x, done) for x in (q, k, v)]
    attributes = {a.name: a for a in node.attributes.values()}
    attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads)
    attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", kv_heads)
    new = ir.Node(
        "", "Attention", [*flat, *node.inputs[3:]], list(attributes.values()),
        num_outputs=len(node.outputs), name=node.name,
    )  # fmt: skip
    model.graph.insert_after(node, new)
    for old, fresh in zip(node.outputs, new.outputs, strict=True):
        fresh.type, fresh.shape, fresh.name, old.name = (
            old.type,
            old.shape,
            old.name,
            f"{old.name}.4d",
        )
    for old, fresh in zip(node.outputs[1:], new.outputs[1:], strict=True):
        graph.replace_uses(model, old, fresh)
    output, result = node.outputs[0], new.outputs[0]
    assert q.shape is not None
    _typed(result, output, (q.shape[0], q.shape[2], heads * size))
    for swap in [u.node for u in output.uses() if _is_swap(u.node)]:
        _typed(swap.outputs[0], output, (q.shape[0], q.shape[2], heads, size))
        for reader in [u.node for u in swap.outputs[0].uses() if u.node.op_type == "Reshape"]:
            shape = reader.outputs[0].shape
            if shape is not None and len(shape) == 3 and shape[2] == heads * size:
                graph.replace_uses(model, reader.outputs[0], result)
    if any(True for _ in _live_uses(output)):
        split = _reshape(model, result, f"{result.name}.heads", (heads, size))
        back = graph.node_after(
            split.producer(), model, "Transpose", [split], f"{result.name}.heads_first",
            attributes={"perm": SWAP},
        )  # fmt: skip
        graph.replace_uses(model, output, _typed(back, output, tuple(output.shape or ())))


def _live_uses(output: ir.Value) -> list[ir.Node]:
    """Readers of a value other than transposes that nothing reads any more."""
    return [
        u.node
        for u in output.uses()
        if not (
            _is_swap(u.node)
            and not u.node.outputs[0].uses()
            and not u.node.outputs[0].is_graph_output()
        )
    ]
