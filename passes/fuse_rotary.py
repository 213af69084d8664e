"""Join rotary embedding, and the norm of heads before it, with the attention that reads a cache."""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from mxcompile import graph
from mxcompile.passes.fuse_residual import epsilon
from mxcompile.pipeline import Context, Pass

ROTARY_ATTENTION: Final = "RotaryAttention"

NORMED: Final = "normed"
"""What the overload ends in where queries and keys are normalized first."""

_DEFINITION: Final = """
RotaryAttention <num_heads, kv_num_heads, scale, softcap, window, rotary_embedding_dim{epsilon}>
    (q, k, v, cos, sin, {weights}past, {parts}) => (y, {new_parts})
{{{norms}
    q_turned = RotaryEmbedding
        <num_heads: int = @num_heads, rotary_embedding_dim: int = @rotary_embedding_dim>
        ({q}, cos, sin)
    k_turned = RotaryEmbedding
        <num_heads: int = @kv_num_heads, rotary_embedding_dim: int = @rotary_embedding_dim>
        ({k}, cos, sin)
    y, {new_parts} = mxcompile.CachedAttention:{caches}
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale,
         softcap: float = @softcap, window: int = @window>
        (q_turned, k_turned, v, past, {parts})
}}"""

_NORMS: Final = """
    zero = Constant <value_ints: ints = [0]> ()
    lead = Constant <value_ints: ints = [0, 0]> ()
    rest = Constant <value_ints: ints = [-1]> ()
    merged = Constant <value_ints: ints = [0, 0, -1]> ()"""

_NORM: Final = """
    {x}_count = Constant <value_int: int = @{heads}> ()
    {x}_vector = Unsqueeze ({x}_count, zero)
    {x}_shape = Concat <axis: int = 0> (lead, {x}_vector, rest)
    {x}_split = Reshape ({x}, {x}_shape)
    {x}_scaled = RMSNormalization <axis: int = -1, epsilon: float = @epsilon>
        ({x}_split, {x}_weight)
    {x}_normed = Reshape ({x}_scaled, merged)"""


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Let one operator normalize the heads of queries and keys, turn them, cache and attend.

    Norms join in where queries and keys both have one, with the same epsilon. What is written to
    the cache is then all that is stored of the keys.

    Before: ``%a, ... = CachedAttention(RotaryEmbedding(%q, %c, %s), RotaryEmbedding(%k, %c, %s),
    ...)``; after: ``%a, ... = RotaryAttention(%q, %k, %v, %c, %s, ...)``, and with norms of heads
    ``RotaryAttention(%q, %k, %v, %c, %s, %q_weight, %k_weight, ...)``.
    """

    name = "fuse-rotary"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Fuse every cached attention whose queries and keys are turned alike for it alone."""
        found = False
        for node in graph.select(model.graph, "CachedAttention", graph.DOMAIN):
            q, k = (graph.read_once(x, "RotaryEmbedding") for x in node.inputs[:2])
            if q is not None and k is not None and _alike(node, q, k):
                _fuse(model, node, q, k)
                found = True
        graph.prune(model)
        return found


def _alike(attention: ir.Node, q: ir.Node, k: ir.Node) -> bool:
    """Whether queries and keys are turned by the same angles, in the form that is lowered."""
    return (
        q.inputs[1:] == k.inputs[1:]
        and len(q.inputs) == 3
        and all(int(n.attributes.get_int("interleaved", 0) or 0) == 0 for n in (q, k))
        and _turned(q) == _turned(k)
        and q.attributes.get_int("num_heads", 0) == attention.attributes["num_heads"].as_int()
        and k.attributes.get_int("num_heads", 0) == attention.attributes["kv_num_heads"].as_int()
    )


def _turned(rotary: ir.Node) -> int:
    return int(rotary.attributes.get_int("rotary_embedding_dim", 0) or 0)


def _head_norm(rotary: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """The [batch, seq, columns] value before a norm of the heads that are turned, and the norm."""
    merge = graph.read_once(rotary.inputs[0], "Reshape")
    norm = graph.read_once(merge.inputs[0], "RMSNormalization") if merge is not None else None
    split = graph.read_once(norm.inputs[0], "Reshape") if norm is not None else None
    if norm is None or split is None:
        return None
    whole, parts = split.inputs[0], split.outputs[0]
    if whole is None or whole.shape is None or parts.shape is None:
        return None
    heads = rotary.attributes.get_int("num_heads", 0)
    by_head = len(whole.shape) == 3 and len(parts.shape) == 4 and parts.shape[2] == heads
    return (whole, norm) if by_head and graph.last_axis_only(norm, 4) else None


def _definition(caches: str, parts: int, *, normed: bool) -> str:
    """The function for caches of such formats, of so many tensors."""
    names = [f"part{index}" for index in range(parts)]
    norms = [_NORM.format(x=x, heads=h) for x, h in (("q", "num_heads"), ("k", "kv_num_heads"))]
    body = _DEFINITION.format(
        epsilon=", epsilon" if normed else "",
        weights="q_weight, k_weight, " if normed else "",
        parts=", ".join(names),
        new_parts=", ".join(f"{name}_new" for name in names),
        norms="".join([_NORMS, *norms]) if normed else "",
        q="q_normed" if normed else "q",
        k="k_normed" if normed else "k",
        caches=caches,
    )
    return graph.overloaded(f"{caches}_{NORMED}" if normed else caches, body)


def _fuse(model: ir.Model, node: ir.Node, turn_q: ir.Node, turn_k: ir.Node) -> None:
    v, past, *parts = node.inputs[2:]
    norms = [_head_norm(turn) for turn in (turn_q, turn_k)]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes["rotary_embedding_dim"] = _turned(turn_q)
    values, weights = [turn_q.inputs[0], turn_k.inputs[0]], list[ir.Value | None]()
    if norms[0] is not None and norms[1] is not None:
        (q, q_norm), (k, k_norm) = norms[0], norms[1]
        if epsilon(q_norm) == epsilon(k_norm):
            values, weights = [q, k], [q_norm.inputs[1], k_norm.inputs[1]]
            attributes["epsilon"] = epsilon(q_norm)
    graph.define(model, _definition(node.overload, len(parts), normed=bool(weights)))
    call = ir.Node(
        graph.DOMAIN,
        ROTARY_ATTENTION,
        [*values, v, *turn_q.inputs[1:], *weights, past, *parts],
        ir.convenience.convert_attributes(attributes),
        overload=f"{node.overload}_{NORMED}" if weights else node.overload,
        num_outputs=len(node.outputs),
        name=node.name,
    )
    model.graph.insert_after(node, call)
    for old, new in zip(node.outputs, call.outputs, strict=True):
        graph.take_place(model, old, new)
