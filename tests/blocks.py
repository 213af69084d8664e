"""Feed-forward blocks of linear layers, in ONNX's text form."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from mxcompile import graph

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
    text = f"g (float[1, seq, 64] x) => ({outputs}) {{ {body} }}"
    head = '<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>\n'
    model = onnx.parser.parse_model(head + text + LINEAR)
    rng = np.random.default_rng(0)
    for name, shape in {**SIZES, **vectors}.items():
        if name in body:
            weight = np.asarray(rng.standard_normal(shape), np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    found = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    graph.infer_shapes(found)
    return found
