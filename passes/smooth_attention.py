"""Make the columns of cached keys and values alike, by factors that attention does not feel."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.passes import scale_columns
from mxcompile.passes.scale_columns import NORMS, Scaling
from mxcompile.pipeline import Context, Pass

FLOOR: Final = 1e-6
"""The least power that a column is taken to have, of the mean over columns."""


@dataclass(frozen=True, slots=True)
class Maker:
    """What computes queries, keys or values [batch, seq, heads * dim], as far as factors go.

    Attributes:
        scaling: The weights whose rows, and the vectors that, take a factor a column.
        by_dim: Whether these are of one head, so that all heads share their factors.
        turned: How many columns of a head rotary embedding turns; 0 where there is none.
        interleaved: Whether it turns neighbours together, not columns of two halves.
    """

    scaling: Scaling
    by_dim: bool = False
    turned: int = 0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of a layer that caches.

    Attributes:
        names: Of its queries, keys and values.
        kv_heads: Heads of keys and values.
        group: Heads of queries for each of these.
        keys: What makes its queries and its keys; None where one of them takes no factors.
        values: What makes its values, and what reads its output; None likewise.
    """

    names: tuple[str, str, str]
    kv_heads: int
    group: int
    keys: tuple[Maker, Maker] | None
    values: tuple[Maker, Scaling] | None


@dataclass(frozen=True)
class SmoothAttention(Pass):
    """Divide the columns of keys by factors that queries take, those of values by the output's.

    Columns that share a scale in a cache have errors of one size, as large as the largest column
    asks for; so SmoothAttention (QServe, arXiv 2405.04532) scales them by what keys are alone.
    Here the other side counts as well. Of a group whose peak goes with its power, errors do harm
    in proportion to ``sum_j (k_j / s_j)**2 * sum_j (h_j s_j)**2``, where ``h_j`` is what column
    ``j`` of the keys meets, that of a query. It is least for ``s_j = (k_j / h_j)**0.5``, root mean
    squares all. Columns that rotary embedding turns together share a factor.

    Before: ``Attention(Linear(%x, %wq), Linear(%x, %wk), Linear(%x, %wv), ...)`` and
    ``Linear(%y, %wo)``; after: the rows of ``%wk`` divided and those of ``%wq`` multiplied, the
    rows of ``%wv`` divided and the columns of ``%wo`` multiplied. Gains of head norms take factors
    in the place of rows.
    """

    name = "smooth-attention"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Smooth all that can be; needs the powers of what ``observed`` names."""
        if ctx.powers is None:
            return False
        changed = False
        for heads in find(model):
            asked, cached, weighed = (ctx.powers[name] for name in heads.names)
            if not np.isfinite(np.concatenate([asked, cached, weighed])).all():
                continue
            if heads.keys is not None:
                _smooth_keys(model, heads, *heads.keys, asked, cached)
                changed = True
            if heads.values is not None:
                _smooth_values(model, heads, *heads.values, weighed)
                changed = True
        return changed


def observed(model: ir.Model) -> list[str]:
    """The names of the values whose powers the pass asks for."""
    return [name for heads in find(model) for name in heads.names]


def find(model: ir.Model) -> list[Heads]:
    """The attention of every layer that caches."""
    layers = graph.layers(model)
    found = []
    for node in graph.select(model.graph, "Attention"):
        q, k, v = node.inputs[:3]
        past = node.inputs[4] if len(node.inputs) > 4 else None
        if q is None or k is None or v is None or past is None or len(q.shape or ()) != 3:
            continue
        query_heads = int(node.attributes.get_int("q_num_heads", 0) or 0)
        kv_heads = int(node.attributes.get_int("kv_num_heads", 0) or 0)
        if not kv_heads or query_heads % kv_heads:
            continue
        names = (graph.name(q), graph.name(k), graph.name(v))
        queries, keys, values = (_maker(value, layers) for value in (q, k, v))
        read = scale_columns.readers(node.outputs[0], layers)
        found.append(
            Heads(
                names,
                kv_heads,
                query_heads // kv_heads,
                (queries, keys) if queries and keys and _turned_alike(queries, keys) else None,
                (values, Scaling(read=read)) if values and read else None,
            )
        )
    return found


def _maker(value: ir.Value, layers: Mapping[ir.Node, str]) -> Maker | None:
    """What takes the factors of a value's columns; None where others would feel them."""
    biases: tuple[str, ...] = ()
    turned, interleaved = 0, False
    for node in _upwards(value):
        if node in layers:
            scaling = Scaling(made=(layers[node],), constants=biases)
            return Maker(scaling, turned=turned, interleaved=interleaved)
        if node.op_type in NORMS and not biases and (gains := scale_columns.gains(node)):
            by_dim = len(node.outputs[0].shape or ()) == 4 and graph.last_axis_only(node, 4)
            return Maker(Scaling(constants=gains), True, turned, interleaved) if by_dim else None
        if node.op_type == "RotaryEmbedding":
            if (turned := _turned(node)) == 0:
                return None
            interleaved = bool(node.attributes.get_int("interleaved", 0))
        elif node.op_type == "Add" and (bias := _bias(node)) is not None:
            biases = (*biases, bias)
        elif node.op_type != "Reshape" or not _of_heads(node):
            return None
    return None


def _upwards(value: ir.Value | None) -> Iterator[ir.Node]:
    """What computes a value, and so on upwards, as long as nothing else reads what is between."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return
        yield node
        value = node.inputs[0]


def _bias(node: ir.Node) -> str | None:
    """The name of a vector of its own that a node adds to all positions."""
    x, bias = node.inputs
    if x is None or bias is None or not graph.is_constant(bias) or len(bias.uses()) != 1:
        return None
    if x.shape is None or bias.shape is None or (len(x.shape), len(bias.shape)) != (3, 1):
        return None
    return graph.name(bias) if x.shape[-1] == bias.shape[0] else None


def _of_heads(node: ir.Node) -> bool:
    """Whether a Reshape splits [batch, seq, heads * dim] into heads, or the reverse."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return False
    flat, split = sorted((x.shape, y.shape), key=len)
    width, sizes = flat[-1], [size for size in split[-2:] if isinstance(size, int)]
    return (len(flat), len(split), len(sizes)) == (3, 4, 2) and width == sizes[0] * sizes[1]


def _turned(rotary: ir.Node) -> int:
    """How many columns of a head are turned; 0 where a head's size is not known."""
    some = int(rotary.attributes.get_int("rotary_embedding_dim", 0) or 0)
    heads = int(rotary.attributes.get_int("num_heads", 0) or 0)
    (*_, width) = rotary.outputs[0].shape or (0,)
    return some or (width // heads if isinstance(width, int) and heads else 0)


def _turned_alike(queries: Maker, keys: Maker) -> bool:
    return (queries.turned, queries.interleaved) == (keys.turned, keys.interleaved)


def _smooth_keys(
    model: ir.Model,
    heads: Heads,
    queries: Maker,
    keys: Maker,
    asked: np.ndarray,
    cached: np.ndarray,
) -> None:
    factors = _factors(heads, cached, asked, keys, by_dim=queries.by_dim or keys.by_dim)
    _divide(model, keys, factors)
    _divide(model, queries, 1 / np.repeat(factors, heads.group, axis=0))


def _smooth_values(
    model: ir.Model, heads: Heads, values: Maker, output: Scaling, cached: np.ndarray
) -> None:
    weights = (graph.weight(model, unit) for unit in output.read)
    met = np.sum([np.square(w, dtype=np.float64).sum(0) for w in weights], axis=0)
    factors = _factors(heads, cached, met, values, by_dim=values.by_dim)
    _divide(model, values, factors)
    output.apply(model, np.repeat(factors, heads.group, axis=0).reshape(-1))


def _factors(
    heads: Heads, cached: np.ndarray, met: np.ndarray, maker: Maker, *, by_dim: bool
) -> np.ndarray:
    """What columns are divided by, float32 [kv_heads, dim]; of a head their geometric mean is 1.

    ``cached`` are the powers of what is cached [kv_heads * dim], and ``met`` those of what it meets
    [kv_heads * group * dim].
    """
    logarithms = np.zeros((heads.kv_heads, len(cached) // heads.kv_heads))
    for power, share in ((cached, 1 / 4), (met, -1 / 4)):
        by_head = power.reshape(heads.kv_heads, -1, logarithms.shape[1]).mean(1)
        tied = _tied(by_head, maker, by_dim=by_dim)
        least = np.maximum(FLOOR * tied.mean(-1, keepdims=True), np.finfo(np.float64).tiny)
        logarithms += share * np.log(np.maximum(tied, least))
    factors: np.ndarray = np.exp(logarithms - logarithms.mean(-1, keepdims=True)).astype(np.float32)
    return factors


def _tied(power: np.ndarray, maker: Maker, *, by_dim: bool) -> np.ndarray:
    """The powers [heads, dim], the mean of those that share a factor in their places."""
    if by_dim:
        power = np.broadcast_to(power.mean(0), power.shape)
    if not maker.turned:
        return power
    shape = (len(power), -1, 2) if maker.interleaved else (len(power), 2, maker.turned // 2)
    pairs = power[:, : maker.turned].reshape(shape)
    mean = pairs.mean(-1 if maker.interleaved else 1, keepdims=True)
    tied = np.broadcast_to(mean, pairs.shape).reshape(len(power), maker.turned)
    return np.concatenate([tied, power[:, maker.turned :]], axis=-1)


def _divide(model: ir.Model, maker: Maker, factors: np.ndarray) -> None:
    """Divide the columns of what a maker makes by factors [heads, dim]."""
    maker.scaling.apply(model, factors[0] if maker.by_dim else factors.reshape(-1))
