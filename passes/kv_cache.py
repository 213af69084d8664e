"""Turn past and present tensors into caches that the caller owns and attention updates in place."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from mxcompile import caches, graph
from mxcompile.errors import UnsupportedError
from mxcompile.formats import CACHE_FORMATS, CacheFormat
from mxcompile.passes import quantize_caches
from mxcompile.pipeline import Context, Pass

NO_WINDOW = 2**31 - 1
PROBE_LENGTH = 1 << 15
"""A past longer than any sliding window; how much of it a query sees is the window."""

ATTENTION = """
CachedAttention <num_heads, kv_num_heads, scale, softcap, window>
    (q, k, v, past, {parts}) => (y, {new_parts})
{{
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    zero = Constant <value_ints: ints = [0]> ()
    none = Constant <value_int: int = 0> ()
    step = Constant <value_int: int = 1> ()
    all = Constant <value_ints: ints = [2147483647]> ()
    rest = Constant <value_ints: ints = [-1]> ()
    heads = Shape <start: int = 1, end: int = 2> (keys)
    lead = Shape <start: int = 0, end: int = 2> (k)
    seq = Shape <start: int = 1, end: int = 2> (k)
    total = Add (past, seq)
    split = Concat <axis: int = 0> (lead, heads, rest)
    k_split = Reshape (k, split)
    v_split = Reshape (v, split)
    k_heads = Transpose <perm: ints = [0, 2, 1, 3]> (k_split)
    v_heads = Transpose <perm: ints = [0, 2, 1, 3]> (v_split)
    {keys_row} = mxcompile.EncodeCache:{key} (k_heads)
    {values_row} = mxcompile.EncodeCache:{value} (v_heads)
    {appends}
    k_float = mxcompile.DecodeCache:{key} ({keys_used})
    v_float = mxcompile.DecodeCache:{value} ({values_used})
    past_scalar = Squeeze (past)
    seq_scalar = Squeeze (seq)
    total_scalar = Squeeze (total)
    query_offset = Range (none, seq_scalar, step)
    query_row = Add (query_offset, past_scalar)
    query = Unsqueeze (query_row, one)
    key = Range (none, total_scalar, step)
    window = Constant <value_int: int = @window> ()
    first = Sub (query, window)
    causal = LessOrEqual (key, query)
    recent = Greater (key, first)
    mask = And (causal, recent)
    q_heads_count = Constant <value_int: int = @num_heads> ()
    q_heads_vector = Unsqueeze (q_heads_count, zero)
    q_shape = Concat <axis: int = 0> (lead, q_heads_vector, rest)
    q_split = Reshape (q, q_shape)
    q_heads = Transpose <perm: ints = [0, 2, 1, 3]> (q_split)
    y_heads = Attention <scale: float = @scale, softcap: float = @softcap>
        (q_heads, k_float, v_float, mask)
    y_split = Transpose <perm: ints = [0, 2, 1, 3]> (y_heads)
    merged = Shape (q)
    y = Reshape (y_split, merged)
}}
"""

_APPEND = """
    {part}_old = Slice ({part}, zero, past, two)
    {part}_free = Slice ({part}, total, all, two)
    {part}_new = Concat <axis: int = 2> ({part}_old, {part}_row, {part}_free)
    {part}_used = Slice ({part}_new, zero, total, two)"""


def definition(key: CacheFormat, value: CacheFormat) -> str:
    """The function that appends to caches of such formats, then attends to them."""
    sides = [[*name_parts(kind, fmt)] for kind, fmt in (("keys", key), ("values", value))]
    parts = [part for side in sides for part in side]

    def row(side: list[str], ending: str) -> str:
        return ", ".join(f"{part}_{ending}" for part in side)

    body = ATTENTION.format(
        parts=", ".join(parts),
        new_parts=row(parts, "new"),
        key=key,
        value=value,
        keys_row=row(sides[0], "row"),
        values_row=row(sides[1], "row"),
        appends="".join(_APPEND.format(part=part) for part in parts),
        keys_used=row(sides[0], "used"),
        values_used=row(sides[1], "used"),
    )
    return graph.overloaded(f"{key}_{value}", body)


def name_parts(name: str, fmt: CacheFormat) -> tuple[str, ...]:
    """The names of the tensors that a cache is made of."""
    return (name, f"{name}_scales") if fmt.scaled else (name,)


@dataclass(frozen=True)
class KvCache(Pass):
    """Replace ``past``/``present`` by caches [batch, kv heads, max length, head dim].

    ``CachedAttention`` writes the new keys and values after the ``past`` (int64[1]) positions that
    the caches hold, and attends causally to what is there, within a sliding window if the mask has
    one. What a mask says is found by evaluating it, not by its spelling; a mask that depends on
    anything but positions is refused. Sequences of a batch have one length: the padding mask goes.

    A cache has the format that its new rows are rounded to, which the rounding that the caches do
    themselves makes unnecessary; a quantized one is two tensors, of codes and of scales.

    Before: ``%y, %present = Attention(%q, RoundCache:int8(%k), %v, %mask, %past_k, %past_v)``;
    after: ``%y, %key.next, ... = CachedAttention:int8_fp32(%q, %k, %v, %past, %key, ...)``.
    """

    name = "kv-cache"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite all attention layers that read a past, or none."""
        layers = [n for n in graph.select(model.graph, "Attention") if _has_past(n)]
        if not layers:
            return False
        past = ir.Value(name="past", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1,)))
        windows: dict[ir.Value | None, int] = {}
        for node in layers:
            mask = node.inputs[3]
            if mask not in windows:
                windows[mask] = _window(model, node, mask)
            _rewrite(model, node, past, windows[mask])
        graph.prune(model)
        _replace_inputs(model, past)
        return True


def _has_past(node: ir.Node) -> bool:
    past = [v for v in node.inputs[4:6] if v is not None]
    return len(past) == 2 and all(v.is_graph_input() for v in past)


def _window(model: ir.Model, node: ir.Node, mask: ir.Value | None) -> int:
    """The sliding window of a mask, ``NO_WINDOW`` without one.

    Raises:
        UnsupportedError: the mask is not causal, with or without a window.
    """
    if mask is None:
        raise UnsupportedError(f"{graph.describe(node)} reads a past without a mask")
    inputs = [v for v in model.graph.inputs if any(u.node in _mask_nodes(mask) for u in v.uses())]
    part = ir.convenience.extract(model.graph, inputs, [mask])
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(part, ir_version=10)).SerializeToString(), _quiet()
    )
    last = _evaluate(session, inputs, 1, PROBE_LENGTH)
    window = int(last.sum())
    span = min(window, 64)
    for seq, past in ((7, 5), (5, 0), (span + 9, 3), (3, window if window < PROBE_LENGTH else 11)):
        query, key = past + np.arange(seq)[:, None], np.arange(past + seq)[None]
        expected = (key <= query) & (key > query - window)
        if not np.array_equal(_evaluate(session, inputs, seq, past), expected):
            raise UnsupportedError(
                f"{graph.describe(node)} has a mask that is neither causal nor a sliding window"
            )
    return window if window <= PROBE_LENGTH else NO_WINDOW


def _mask_nodes(mask: ir.Value) -> set[ir.Node]:
    return set(graph.ancestors(mask, lambda v: False))


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def _evaluate(
    session: onnxruntime.InferenceSession, inputs: list[ir.Value], seq: int, past: int
) -> np.ndarray:
    """What [seq, past + seq] positions a mask lets through, for one unpadded sequence."""
    sizes = {"batch": 1, "seq": seq, "past": past, "total": past + seq}
    feeds: dict[str, np.ndarray] = {}
    for value in inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        if value.name == "position_ids":
            feeds["position_ids"] = past + np.arange(seq, dtype=np.int64)[None]
        else:
            feeds[graph.name(value)] = np.ones(shape, value.dtype.numpy())
    mask: np.ndarray = np.asarray(session.run(None, feeds)[0])
    allowed = mask if mask.dtype == np.bool_ else mask > -1e4
    return np.asarray(np.broadcast_to(allowed, (1, 1, seq, past + seq))[0, 0])


def _rewrite(model: ir.Model, node: ir.Node, past: ir.Value, window: int) -> None:
    q, k, v, _, past_key, past_value = node.inputs[:6]
    assert q is not None and q.shape is not None and past_key is not None and past_value is not None
    heads = node.attributes.get_int("q_num_heads")
    kv_heads = node.attributes.get_int("kv_num_heads")
    assert past_key.shape is not None
    size = past_key.shape[3]
    if heads is None or kv_heads is None or not isinstance(size, int):
        raise UnsupportedError(f"{graph.describe(node)}: head counts and size must be known")
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(node.attributes.get_float("scale", size**-0.5)),
        "softcap": float(node.attributes.get_float("softcap", 0.0)),
        "window": window,
    }
    (k, key), (v, value) = (_unrounded(x) for x in (k, v))
    parts: list[ir.Value] = []
    for source, fmt in ((past_key, key), (past_value, value)):
        base = graph.name(source).replace("past_key_values", "cache")
        for name, (dtype, columns) in zip(name_parts(base, fmt), fmt.parts(size), strict=True):
            shape = ir.Shape(("batch", kv_heads, "max_length", columns))
            kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
            parts.append(ir.Value(name=name, type=kind, shape=shape))
    model.graph.inputs.extend(parts)
    for fmt in {key, value}:
        graph.define(model, quantize_caches.encoder(fmt))
        graph.define(model, quantize_caches.decoder(fmt))
    graph.define(model, definition(key, value))
    call = ir.Node(
        graph.DOMAIN,
        "CachedAttention",
        [q, k, v, past, *parts],
        ir.convenience.convert_attributes(attributes),
        overload=f"{key}_{value}",
        num_outputs=1 + len(parts),
        name=node.name,
    )
    model.graph.insert_after(node, call)
    for part, fresh in zip(parts, call.outputs[1:], strict=True):
        fresh.name, fresh.type, fresh.shape = f"{part.name}.next", part.type, part.shape
    result, output = call.outputs[0], node.outputs[0]
    result.type, result.shape, result.name = output.type, output.shape, output.name
    output.name = f"{output.name}.replaced"
    graph.replace_uses(model, output, result)
    # The caches that the program returns are those that it got, not the present's concatenations.
    presents = set(node.outputs[1:])
    kept = [v for v in model.graph.outputs if v not in presents]
    model.graph.outputs[:] = [*kept, *call.outputs[1:]]
    model.graph.remove(node, safe=True)


def _unrounded(value: ir.Value | None) -> tuple[ir.Value | None, CacheFormat]:
    """What is rounded before it is cached, and to which format."""
    node = None if value is None else value.producer()
    if node is not None and node.op_identifier()[:2] == (graph.DOMAIN, quantize_caches.ROUND):
        return node.inputs[0], CACHE_FORMATS[node.overload]
    return value, caches.FLOAT


def _replace_inputs(model: ir.Model, past: ir.Value) -> None:
    """Drop the inputs that only masks and pasts read; put ``past`` before the caches.

    Raises:
        UnsupportedError: something else still needs them.
    """
    for value in list(model.graph.inputs):
        label = graph.name(value)
        if label == "attention_mask" or label.startswith("past_key_values"):
            if (reader := next((use.node for use in value.uses()), None)) is not None:
                raise UnsupportedError(
                    f"{graph.describe(reader)} needs '{label}' outside attention"
                )
            model.graph.inputs.remove(value)
    first = next(i for i, v in enumerate(model.graph.inputs) if graph.name(v).startswith("cache"))
    model.graph.inputs.insert(first, past)
