"""How a mixed-precision weight is written in standard ONNX, and how it is read back.

A weight ``w`` of rows in several formats becomes, for each format ``f`` (opset 21 types: 2- and
3-bit codes ride in UINT4, 5- and 6-bit ones and the entries of tables in UINT8, true formats in the
metadata)::

    w.f.scale = DequantizeLinear<axis=0>(w.f.scale.q, w.f.row_scale)          # two-level scales
    w.f.dq    = DequantizeLinear<axis=1, block_size=32>(w.f.q, w.f.scale, w.f.zero)

and then ``w.dq = Gather(Concat(w.f.dq ...), w.order)``, where ``order`` puts the rows back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import PassError
from mxcompile.formats import FORMATS, GROUP, ZERO_BITS, Format
from mxcompile.plan import ROW_TILE, TileFormats
from mxcompile.quantize import Quantized, rows_by_format

FORMAT_KEY: Final = "mxcompile.format"
UNIT_KEY: Final = "mxcompile.unit"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A unit's codes and scales in row order, with the format of each of its row tiles."""

    unit: str
    formats: TileFormats
    values: Quantized


def insert(model: ir.Model, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    """Insert the nodes that dequantize a weight; the result has the weight's shape."""
    unit, values = quantized.unit, quantized.values
    rows, columns = values.codes.shape
    anchor: ir.Node | None = None
    parts: list[ir.Value] = []
    where: list[np.ndarray] = []
    for fmt, index in rows_by_format(quantized.formats, rows):
        part = _dequantize(model, anchor, unit, fmt, values.take(index))
        parts.append(part)
        where.append(index)
        anchor = part.producer()
    result = parts[0]
    if len(parts) > 1:
        joined = graph.node_after(
            anchor, model, "Concat", parts, f"{unit}.by_format", attributes={"axis": 0}
        )
        order = graph.constant(model, f"{unit}.order", np.argsort(np.concatenate(where)))
        result = graph.node_after(
            joined.producer(),
            model,
            "Gather",
            [joined, order],
            f"{unit}.dq",
            attributes={"axis": 0},
        )
    for value in (*parts, result):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    result.shape = ir.Shape((rows, columns))
    assert weight.shape is not None
    if len(weight.shape) != 2:
        shape = graph.constant(model, f"{unit}.shape", np.array(weight.shape.numpy(), np.int64))
        result = graph.node_after(
            result.producer(), model, "Reshape", [result, shape], f"{unit}.dq.taps"
        )
        result.type, result.shape = weight.type, weight.shape
    return result


def _dequantize(
    model: ir.Model, anchor: ir.Node | None, unit: str, fmt: Format, values: Quantized
) -> ir.Value:
    """The rows of one format: their initializers and the two nodes that dequantize them.

    Zero-points count in sixteenths of the code range. Below 4 bits the codes are shifted up to
    4 bits to meet them; above, the zero-points are shifted up to the codes. Of a non-uniform format
    the entries stand here that its codes look up.
    """
    base = f"{unit}.{fmt}"
    up, step = _shifts(fmt)
    carrier = ml_dtypes.uint4 if fmt.value_bits <= ZERO_BITS else np.uint8
    codes = (values.codes << up).view(carrier)
    zeros = (values.zeros << step).view(carrier)
    row_scale = np.ldexp(values.row_scale.astype(np.float32), -up)
    scale_q = graph.constant(model, f"{base}.scale.q", values.scales)
    scale_row = graph.constant(model, f"{base}.row_scale", row_scale)
    q = graph.constant(model, f"{base}.q", codes)
    q.metadata_props.update({FORMAT_KEY: fmt.name, UNIT_KEY: unit})
    zero = graph.constant(model, f"{base}.zero", zeros)
    scale = graph.node_after(
        anchor,
        model,
        "DequantizeLinear",
        [scale_q, scale_row],
        f"{base}.scale",
        attributes={"axis": 0},
    )
    scale.type, scale.shape = ir.TensorType(ir.DataType.FLOAT), scale_q.shape
    dq = graph.node_after(
        scale.producer(),
        model,
        "DequantizeLinear",
        [q, scale, zero],
        f"{base}.dq",
        attributes={"axis": 1, "block_size": GROUP},
    )
    dq.shape = q.shape
    return dq


def _shifts(fmt: Format) -> tuple[int, int]:
    """By how much codes and zero-points are shifted up to meet."""
    return max(ZERO_BITS - fmt.value_bits, 0), max(fmt.value_bits - ZERO_BITS, 0)


Actual: TypeAlias = Mapping[ir.Value, ir.Value]
"""The initializers behind the inputs of a function's body; empty in the main graph."""

IN_GRAPH: Final[Actual] = MappingProxyType({})


def chain(value: ir.Value, actual: Actual = IN_GRAPH) -> list[ir.Node] | None:
    """The nodes that dequantize a weight, in order, when ``value`` is such a weight."""
    nodes = graph.ancestors(value, lambda v: v.producer() is None)
    known = {"DequantizeLinear", "Concat", "Gather", "Reshape"}
    if not nodes or {n.op_type for n in nodes} - known:
        return None
    leaves = [actual.get(v, v) for n in nodes for v in n.inputs if v and v.producer() is None]
    constant = all(v.const_value is not None for v in leaves)
    return nodes if constant and any(UNIT_KEY in v.metadata_props for v in leaves) else None


def _codes(nodes: list[ir.Node], actual: Actual) -> list[ir.Value]:
    """The code initializers of a chain, one a format."""
    values = (n.inputs[0] for n in nodes if n.op_type == "DequantizeLinear" and len(n.inputs) == 3)
    return [actual.get(v, v) for v in values if v is not None]


def unit_of(nodes: list[ir.Node], actual: Actual = IN_GRAPH) -> str:
    """The unit that a chain dequantizes."""
    return _codes(nodes, actual)[0].metadata_props[UNIT_KEY]


def rows_of(nodes: list[ir.Node], actual: Actual = IN_GRAPH) -> int:
    """How many rows a chain dequantizes."""
    return sum(graph.matrix_shape(v)[0] for v in _codes(nodes, actual))


def read(nodes: list[ir.Node], actual: Actual = IN_GRAPH) -> QuantizedWeight:
    """Read back what ``insert`` wrote, given the nodes of ``chain``.

    Raises:
        PassError: the nodes are not what ``insert`` writes.
    """
    parts: list[tuple[Format, Quantized]] = []
    order: np.ndarray | None = None

    def data(value: ir.Value | None) -> np.ndarray:
        assert value is not None
        return graph.array(actual.get(value, value))

    for node in nodes:
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 3:
            q, scale, zero = node.inputs
            scale_node = scale.producer() if scale is not None else None
            if scale_node is None or q is None:
                raise PassError(f"{graph.describe(node)} is not what quantize-weights writes")
            fmt = FORMATS[actual.get(q, q).metadata_props[FORMAT_KEY]]
            up, step = _shifts(fmt)
            row_scale = np.ldexp(data(scale_node.inputs[1]), up).astype(np.float16)
            codes, zeros = data(q).view(np.uint8) >> up, data(zero).view(np.uint8) >> step
            parts.append((fmt, Quantized(codes, data(scale_node.inputs[0]), zeros, row_scale)))
        elif node.op_type == "Gather":
            order = data(node.inputs[1])
    counts = [len(q.codes) for _, q in parts]
    order = np.arange(sum(counts)) if order is None else order
    by_tile = np.repeat(np.arange(len(parts)), counts)[order][::ROW_TILE]
    fields = ("codes", "scales", "zeros", "row_scale")
    values = [np.concatenate([getattr(q, field) for _, q in parts])[order] for field in fields]
    formats = TileFormats(tuple(parts[i][0] for i in by_tile))
    return QuantizedWeight(unit_of(nodes, actual), formats, Quantized(*values))
