"""Quantize annotated activations, a scale a token and group."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import UnsupportedError
from mxcompile.formats import ACTIVATION_FORMATS, GROUP, ActivationFormat
from mxcompile.pipeline import Context, Pass

CARRIERS: Final = {
    ACTIVATION_FORMATS["int8"]: ir.DataType.INT8,
    ACTIVATION_FORMATS["int16"]: ir.DataType.INT16,
}
"""The ONNX types of codes."""

TINY = float(np.finfo(np.float32).tiny)
"""Keeps the scale of an all-zero group from being zero."""


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Insert QuantizeLinear and DequantizeLinear with scales that are found at run time.

    Symmetric integers in groups of 32 along the last axis, scale = max |x| / top, where the largest
    code ``top`` is 127 or 127 * 256. A last axis that is no multiple of 32 is padded before and cut
    after.

    Before: ``Linear(%x, %w)``; after: ``Linear(%x.dq, %w)`` with
    ``%x.dq = DequantizeLinear(QuantizeLinear(%x, %x.scale), %x.scale)``.
    """

    name = "quantize-activations"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Let the linear layers that read an annotated value read its quantized form."""
        annotated = [
            (v, scheme, readers)
            for v in graph.values(model)
            if (scheme := graph.scheme_of(v)) is not None
            and (readers := [u.node for u in v.uses() if _reads(u.node, v)])
        ]
        for value, scheme, readers in annotated:
            quantized = _quantize(model, value, ACTIVATION_FORMATS[scheme.partition("/")[0]])
            for node in readers:
                node.replace_input_with(0, quantized)
        return bool(annotated)


def _reads(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node multiplies a value, not with it."""
    return node.op_type == "Linear" and node.inputs[0] is value


def activation_format(nodes: Iterable[ir.Node]) -> ActivationFormat | None:
    """The format that nodes of this pass round to; None when there are none."""
    quantizers = (n for n in nodes if n.op_type == "QuantizeLinear")
    types = (n.attributes.get_int("output_dtype") for n in quantizers)
    return next((f for t in types for f, carrier in CARRIERS.items() if carrier == t), None)


def _quantize(model: ir.Model, value: ir.Value, fmt: ActivationFormat) -> ir.Value:
    if value.shape is None or not isinstance(value.shape[-1], int):
        raise UnsupportedError(f"{value.name} has no known last dimension: {value.shape}")
    width, rank, base = value.shape[-1], len(value.shape), graph.name(value)
    last: ir.Node | None = value.producer()

    def add(op: str, inputs: list[ir.Value], suffix: str, **attributes: Any) -> ir.Value:
        nonlocal last
        result = graph.node_after(
            last, model, op, inputs, f"{base}.{suffix}", attributes=attributes
        )
        last = result.producer()
        return result

    def ints(suffix: str, numbers: list[int]) -> ir.Value:
        return graph.constant(model, f"{base}.{suffix}", np.array(numbers, np.int64))

    def scalar(suffix: str, number: float) -> ir.Value:
        return graph.constant(model, f"{base}.{suffix}", np.array(number, np.float32))

    padding = -width % GROUP
    source = value
    if padding:
        source = add("Pad", [value, ints("pads", [0] * (2 * rank - 1) + [padding])], "padded")
    by_group = ints("by_group", [0] * (rank - 1) + [-1, GROUP])
    magnitude = add("Abs", [add("Reshape", [source, by_group], "groups")], "magnitude")
    peak = add("ReduceMax", [magnitude, ints("last", [-1])], "peak", keepdims=0)
    floored = add("Max", [peak, scalar("tiny", TINY)], "floored")
    scale = add("Div", [floored, scalar("steps", float(fmt.top))], "scale")
    code = add(
        "QuantizeLinear", [source, scale], "q",
        axis=-1, block_size=GROUP, output_dtype=CARRIERS[fmt].value,
    )  # fmt: skip
    result = add("DequantizeLinear", [code, scale], "dq", axis=-1, block_size=GROUP)
    if padding:
        bounds = [ints("from", [0]), ints("to", [width]), ints("axis", [-1])]
        result = add("Slice", [result, *bounds], "dq.cut")
    result.type, result.shape = value.type, value.shape
    return result
