"""Small models in ONNX's text form, such as feed-forward blocks, and passes that arrange them."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from mxcompile import graph, passes, target
from mxcompile.instruments import Verify
from mxcompile.pipeline import Context, Pipeline
from mxcompile.statistics import Statistics

HEAD = '<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>'
LINEAR = """
<domain: "mxcompile", opset_import: ["" : 23]>
Linear (x, w) => (y) {
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}
"""

WIDTH, INNER = 64, 96
SIZES = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}


def build(
    body: str, vectors: Mapping[str, tuple[int, ...]], outputs: str = "float[1, seq, 64] y"
) -> ir.Model:
    """A model of x [1, seq, 64]; the weights and vectors that the body names are random."""
    rng = np.random.default_rng(0)
    weights = {
        name: np.asarray(rng.standard_normal(shape), np.float32)
        for name, shape in {**SIZES, **vectors}.items()
        if name in body
    }
    return parse(f"g (float[1, seq, 64] x) => ({outputs}) {{ {body} }}", weights)


def parse(text: str, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """A graph with these initializers, its shapes inferred; it may call ``mxcompile.Linear``."""
    proto = onnx.parser.parse_model(f"{HEAD} {text} {LINEAR}")
    for name, weight in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    found = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    graph.infer_shapes(found)
    return found


def arrange(
    pipeline: str,
    model: ir.Model,
    statistics: Statistics | None,
    powers: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """What passes that may know statistics, or the powers of values, make of a model."""
    ctx = Context(target.find("x86-avx512vnni"), statistics=statistics, powers=powers)
    return Pipeline.parse(pipeline, passes.REGISTRY).run(model, ctx, [Verify()])
