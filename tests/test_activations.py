"""Which activations get 16 bits: those whose rounding harms most for the work it adds."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mxcompile import activations
from mxcompile.activations import choose_activations, rounding_damage
from mxcompile.statistics import Statistics

MODEL = """<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>
g (float[N,S,64] x) => (float[N,S,32] logits)
<float[64,64] a = {0}, float[64,64] b = {0}, float[640,64] c = {0}, float[32,640] head = {0}> {
    p = mxcompile.Linear(x, a)
    q = mxcompile.Linear(p, b)
    r = mxcompile.Linear(q, c)
    logits = mxcompile.Linear(r, head)
}
<domain: "mxcompile", opset_import: ["" : 23]>
Linear (x, w) => (y) { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }
"""


@pytest.fixture
def model() -> ir.Model:
    proto = onnx.parser.parse_model(MODEL)
    for tensor in proto.graph.initializer:
        data = np.zeros(tuple(tensor.dims), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(data, tensor.name))
    return ir.from_proto(proto)


def names(model: ir.Model, rounding: dict[str, float], choice: activations.ActivationChoice) -> str:
    chosen = choose_activations(model, Statistics(1, {}, {}, rounding), choice)
    return " ".join(f"{value}={fmt}" for value, fmt in chosen.items())


def test_one_format_for_all(model: ir.Model) -> None:
    assert names(model, {}, "int8") == "x=int8 p=int8 q=int8 r=int8"
    assert names(model, {}, "int16") == "x=int16 p=int16 q=int16 r=int16"
    assert names(model, {}, "fp32") == ""


def test_without_gradients_auto_is_int8(model: ir.Model) -> None:
    assert names(model, {}, "auto") == "x=int8 p=int8 q=int8 r=int8"


def test_the_share_goes_to_the_most_harm_a_multiplication(model: ir.Model) -> None:
    # 49,152 multiplications, the head not counted: the share pays for one layer of 4,096, not for
    # that of 40,960, however much it harms; the head is free.
    harm = {"x": 1.0, "p": 2.0, "q": 1e6, "r": 1e-9}
    assert names(model, harm, "auto") == "x=int8 p=int16 q=int8 r=int16"


def test_what_rounding_adds_is_predicted(model: ir.Model) -> None:
    """256 times finer steps leave the square of that less; floats leave nothing."""
    known = Statistics(1, {}, {}, {"x": 0.5, "p": 0.25, "other": 9.0})
    choices: list[activations.ActivationChoice] = ["int8", "int16", "fp32"]
    found = [rounding_damage(choose_activations(model, known, c), known) for c in choices]
    assert found == pytest.approx([0.75, 0.75 / 256**2, 0])
