"""Replace annotated weights by codes and the nodes that dequantize them."""

from dataclasses import dataclass

import onnx_ir as ir

from mxcompile import graph, qdq
from mxcompile.gptq import Quantizer
from mxcompile.pipeline import Context, Pass
from mxcompile.plan import TileFormats


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize every annotated weight, row tile by row tile, in the format its scheme gives.

    Before: ``Linear(%x, %w)``; after: ``Linear(%x, %w.dq)`` with ``%w.dq`` as in ``mxcompile.qdq``.
    """

    name = "quantize-weights"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Quantize weights one at a time, so that one float copy at most is in memory."""
        weights = [
            (value, scheme)
            for value in model.graph.initializers.values()
            if (scheme := graph.scheme_of(value)) is not None
        ]
        for value, scheme in weights:
            unit = graph.name(value)
            formats = TileFormats.parse(scheme.partition("/")[0])
            moments, kinds = ((), None) if ctx.statistics is None else ctx.statistics.kinds(unit)
            quantizer = Quantizer.of(*moments, kinds=kinds)
            quantized = quantizer.tiles(graph.weight(model, unit), formats, name=unit)
            result = qdq.insert(model, value, qdq.QuantizedWeight(unit, formats, quantized))
            value.replace_all_uses_with(result)
            del model.graph.initializers[unit]
        return bool(weights)
