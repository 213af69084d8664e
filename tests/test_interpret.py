"""Every operator against onnxruntime; overrides, taps and reruns of whole models."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from mxcompile.errors import UnsupportedError
from mxcompile.interpret import Interpreter

HEAD = '<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>\n'
ROUNDING = 64 * float(np.finfo(np.float32).eps)
"""Of the largest number in a result: sums of some tens of terms, in another order."""


def model_of(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEAD + text)
    onnx.checker.check_model(model)
    return model


def example(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        kind = value.type.tensor_type.elem_type
        if kind == onnx.TensorProto.BOOL:
            feeds[value.name] = rng.random(shape) < 0.7
        elif kind == onnx.TensorProto.FLOAT:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
            feeds[value.name] = rng.integers(1, 5, shape).astype(dtype)
    return feeds


def by_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    results: list[np.ndarray] = session.run(None, feeds)
    return results


def interpreted(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    interpreter = Interpreter(ir.from_proto(model))
    values = interpreter.run({k: torch.from_numpy(v) for k, v in feeds.items()})
    return [values[v.name].numpy() for v in model.graph.output]


def one(signature: str, *nodes: str) -> str:
    """A graph of a few nodes; the signature may end in initializers."""
    return f"g {signature} {{ {' '.join(nodes)} }}"


def chain(*operators: str, shape: str = "3,5", positive: bool = False) -> str:
    """Unary operators, each applied to x, joined in one output by Concat."""
    first = "p = Abs(x)" if positive else "p = Identity(x)"
    nodes = [first, *(f"y{i} = {op}(p)" for i, op in enumerate(operators))]
    names = ", ".join(f"y{i}" for i in range(len(operators)))
    return one(f"(float[{shape}] x) => (float[a,b] y)", *nodes, f"y = Concat<axis=0>({names})")


CASES = {
    "unary": chain(
        "Abs", "Neg", "Exp", "Sin", "Cos", "Tanh", "Erf", "Floor", "Ceil", "Round", "Sign",
    ),
    "positive": chain("Sqrt", "Log", "Reciprocal", positive=True),
    "activations": chain(
        "Relu", "Sigmoid", "HardSigmoid", "HardSigmoid<alpha=0.3>", "HardSwish", "LeakyRelu",
        "LeakyRelu<alpha=0.2>", "Elu", "Gelu", 'Gelu<approximate="tanh">', "Softplus", "Softsign",
        "Softmax", "Softmax<axis=0>", "LogSoftmax", "Mish",
    ),
    "prelu": one("(float[2,3] x, float[3] s) => (float[2,3] y)", "y = PRelu(x, s)"),
    "arithmetic": one(
        "(float[4,3] a, float[3] b) => (float[4,3] y)",
        "c = Add(a, b)", "d = Sub(c, a)", "e = Mul(c, d)", "f = Div(e, b)",
        "g1 = Max(f, a, b)", "h = Min(g1, e)", "s = Sum(h, a, b)", "y = Mean(s, a)",
    ),
    "integers": one(
        "(int64[6] a, int64[6] b) => (int64[6] y)",
        "n = Neg(a)", "d = Div(n, b)", "m = Mod(n, b)", "f = Mod<fmod=1>(n, b)", "p = Pow(a, b)",
        "s = Add(d, m)", "t = Add(s, f)", "y = Add(t, p)",
    ),
    "clip": one(
        "(float[9] x) => (float[9] y) <float low = {-0.5}, float high = {0.25}>",
        "a = Clip(x, low, high)", "b = Clip(x, low)", "c = Clip(x,,high)", "d = Add(a, b)",
        "y = Add(c, d)",
    ),
    "logic": one(
        "(float[6] a, float[6] b) => (bool[6] y)",
        "l = Less(a, b)", "g1 = GreaterOrEqual(a, b)", "e = Equal(a, a)", "m = LessOrEqual(a, b)",
        "h = Greater(a, b)", "o = Or(l, g1)", "x = Xor(m, h)", "n = Not(e)", "z = And(o, x)",
        "y = Or(z, n)",
    ),
    "where": one("(bool[4,1] c, float[4,3] a, float[3] b) => (float[4,3] y)", "y = Where(c, a, b)"),
    "isnan": one(
        "(float[4] x) => (bool[4] y) <float z = {0}>",
        "q = Div(x, z)", "n = Mul(q, z)", "a = IsNaN(n)", "b = IsInf<detect_negative=0>(q)",
        "y = And(a, b)",
    ),
    "cast": one(
        "(float[5] x) => (int64[5] y, float16[5] h, bool[5] b)",
        "y = Cast<to=7>(x)", "h = Cast<to=10>(x)", "b = Cast<to=9>(y)",
    ),
    "reduce": one(
        "(float[2,3,4] x) => (float[n] y) <int64[2] axes = {0, -1}, int64[1] flat = {-1}>",
        "a = ReduceSum<keepdims=0>(x, axes)", "b = ReduceMean<keepdims=0>(x, axes)",
        "c = ReduceMax<keepdims=0>(x, axes)", "d = ReduceMin<keepdims=0>(x, axes)",
        "e = ReduceL1<keepdims=0>(x, axes)", "f = ReduceL2<keepdims=0>(x, axes)",
        "h = ReduceProd<keepdims=0>(x, axes)", "i = ReduceSumSquare<keepdims=0>(x, axes)",
        "j = ReduceLogSumExp<keepdims=0>(x, axes)",
        "k4 = ReduceMean(x)", "k = Reshape(k4, flat)",
        "n3 = ReduceSum<noop_with_empty_axes=1>(x)", "n = Reshape(n3, flat)",
        "y = Concat<axis=0>(a, b, c, d, e, f, h, i, j, k, n)",
    ),
    "argmax": one(
        "(float[3,4] x) => (int64[3] y, int64[1,4] z)",
        "y = ArgMax<axis=1, keepdims=0>(x)", "z = ArgMin(x)",
    ),
    "argmax last": one(
        "(int64[9] x) => (int64[1] y)", "y = ArgMax<axis=0, select_last_index=1>(x)"
    ),
    "topk": one(
        "(float[3,6] x) => (float[3,2] v, int64[3,2] i) <int64[1] k = {2}>",
        "v, i = TopK<largest=0>(x, k)",
    ),
    "cumsum": one(
        "(float[3,4] x) => (float[3,4] y) <int64 a = {1}>",
        "p = CumSum<exclusive=1>(x, a)", "q = CumSum<reverse=1>(x, a)", "y = Add(p, q)",
    ),
    "shapes": one(
        "(float[2,3,4] x) => (int64[3] s, int64[1] t, int64 n)",
        "s = Shape(x)", "t = Shape<start=-2, end=-1>(x)", "n = Size(x)",
    ),
    "reshape": one(
        "(float[2,3,4] x) => (float[2,12] y, float[6,4] z, float[24,1] f)"
        " <int64[2] keep = {0, -1}, int64[2] to = {6, 4}>",
        "y = Reshape(x, keep)", "z = Reshape(x, to)", "f = Flatten<axis=3>(x)",
    ),
    "transpose": one(
        "(float[2,3,4] x) => (float[4,3,2] y, float[3,2,4] z)",
        "y = Transpose(x)", "z = Transpose<perm=[1,0,2]>(x)",
    ),
    "squeeze": one(
        "(float[1,3,1] x) => (float[3] y, float[1,3] z, float[1,1,3,1,1] u)"
        " <int64[1] last = {-1}, int64[2] ends = {0, 4}>",
        "y = Squeeze(x)", "z = Squeeze(x, last)", "u = Unsqueeze(x, ends)",
    ),
    "split": one(
        "(float[7,2] x) => (float[3,2] a, float[4,2] b, float[3,2] c, float[3,2] d, float[1,2] e)"
        " <int64[2] sizes = {3, 4}>",
        "a, b = Split(x, sizes)", "c, d, e = Split<num_outputs=3>(x)",
    ),
    "slice": one(
        "(float[5,6] x) => (float[2,3] y, float[5,6] z, float[1,6] e) <int64[2] s = {-3, 5},"
        " int64[2] t = {9223372036854775807, -9223372036854775807}, int64[2] axes = {0, 1},"
        " int64[2] steps = {2, -2}, int64[1] one = {1}, int64[1] zero = {0}, int64[1] big = {99}>",
        "y = Slice(x, s, t, axes, steps)", "z = Slice(x, zero, big)", "e = Slice(x, zero, one)",
    ),
    "gather": one(
        "(float[4,3] x) => (float[4,2,2] y, float[2,3] e)"
        " <int64[2,2] i = {0, -1, 2, 1}, int64[2,3] j = {0, 1, -1, 3, 2, 0}>",
        "y = Gather<axis=1>(x, i)", "e = GatherElements(x, j)",
    ),
    "gathernd": one(
        "(float[2,3,4] x) => (float[2] y, float[2,4] z)"
        " <int64[2,3] i = {0, 1, 2, 1, -1, 3}, int64[2,1] j = {2, 0}>",
        "y = GatherND(x, i)", "z = GatherND<batch_dims=1>(x, j)",
    ),
    "scatter": one(
        "(float[4,3] x, float[2,3] u) => (float[4,3] y, float[4,3] a, float[4,3] e)"
        " <int64[2,1] i = {3, 1}, int64[2,3] j = {0, 1, -1, 3, 2, 0}>",
        "y = ScatterND(x, i, u)", 'a = ScatterND<reduction="add">(x, i, u)',
        "e = ScatterElements(x, j, u)",
    ),
    "expand": one(
        "(float[3,1] x) => (float[2,3,4] y, float[3,1] z, float[6,2] t)"
        " <int64[3] to = {2, 1, 4}, int64[1] less = {1}, int64[2] times = {2, 2}>",
        "y = Expand(x, to)", "z = Expand(x, less)", "t = Tile(x, times)",
    ),
    "range": one(
        "(int64[3] x) => (int64[n] y, float[m] f) <int64 a = {7}, int64 b = {0}, int64 c = {-2},"
        " float p = {0}, float q = {1}, float r = {0.25}>",
        "y = Range(a, b, c)", "f = Range(p, q, r)",
    ),
    "constants": one(
        "(int64[2] shape) => (float[n,m] z, int64[a,b] o, float[2] c, int64 i)",
        "z = ConstantOfShape(shape)", "o = ConstantOfShape<value = int64[1] {3}>(shape)",
        "c = Constant<value = float[2] {1, 2}>()", "i = Constant<value_int = 4>()",
    ),
    "trilu": one(
        "(float[4,4] x) => (float[4,4] u, float[4,4] l) <int64 k = {1}>",
        "u = Trilu(x, k)", "l = Trilu<upper=0>(x)",
    ),
    "onehot": one(
        "(int64[3] i) => (float[3,6] y, float[6,3] z) <int64 n = {6}, float[2] v = {0, 5}>",
        "y = OneHot(i, n, v)", "z = OneHot<axis=0>(i, n, v)",
    ),
    "nonzero": one("(bool[3,4] x) => (int64[2,n] y)", "y = NonZero(x)"),
    "pad": one(
        "(float[3,4] x) => (float[a,b] c, float[d,e] r, float[f,h] g1, float[i,j] w)"
        " <int64[4] p = {1, 2, 0, 1}, int64[2] q = {3, 2}, int64[1] axis = {-1}, float v = {9}>",
        "c = Pad(x, p, v)", 'r = Pad<mode="reflect">(x, q,,axis)', 'g1 = Pad<mode="edge">(x, p)',
        'w = Pad<mode="wrap">(x, p)',
    ),
    "depth": one(
        "(float[1,8,2,3] x) => (float[1,2,4,6] y, float[1,2,4,6] z, float[1,8,2,3] s)",
        "y = DepthToSpace<blocksize=2>(x)", 'z = DepthToSpace<blocksize=2, mode="CRD">(x)',
        "s = SpaceToDepth<blocksize=2>(y)",
    ),
    "matmul": one(
        "(float[2,3,4] a, float[4,5] b) => (float[2,3,5] y, float[2,3,3] e)",
        "y = MatMul(a, b)", 'e = Einsum<equation="bij,bkj->bik">(a, a)',
    ),
    "gemm": one(
        "(float[4,3] a, float[5,4] b, float[5] c) => (float[3,5] y, float[3,5] z)",
        "y = Gemm<alpha=0.5, beta=2.0, transA=1, transB=1>(a, b, c)",
        "z = Gemm<transA=1, transB=1>(a, b)",
    ),
    "norms": one(
        "(float[2,4,6] x, float[6] s, float[6] b) =>"
        " (float[2,4,6] l, float[2,4,6] r, float[2,4,6] p)",
        "l = LayerNormalization<epsilon=0.001>(x, s, b)",
        "r = RMSNormalization<epsilon=0.01>(x, s)",
        "p = LpNormalization<axis=1>(x)",
    ),
    "channel norms": one(
        "(float[2,4,3,3] x, float[4] s, float[4] b, float[4] m) =>"
        " (float[2,4,3,3] y, float[2,4,3,3] i, float[2,4,3,3] g1)",
        "v = Abs(m)", "y = BatchNormalization(x, s, b, m, v)", "i = InstanceNormalization(x, s, b)",
        "g1 = GroupNormalization<num_groups=2>(x, s, b)",
    ),
    "rotary": one(
        "(float[2,4,3,8] x, float[2,3,12] f, float[9,4] c, float[9,4] s, int64[2,3] at,"
        " float[9,2] d, float[9,2] t) => (float[2,4,3,8] y, float[2,4,3,8] i, float[2,3,12] z)",
        "y = RotaryEmbedding(x, c, s, at)", "i = RotaryEmbedding<interleaved=1>(x, c, s, at)",
        "z = RotaryEmbedding<num_heads=2, rotary_embedding_dim=4>(f, d, t, at)",
    ),
    "rotary gathered": one(
        "(float[2,4,3,8] x, float[2,3,4] c, float[2,3,4] s) => (float[2,4,3,8] y)",
        "y = RotaryEmbedding(x, c, s)",
    ),
    "attention": one(
        "(float[2,4,3,8] q, float[2,4,5,8] k, float[2,4,5,6] v) => (float[2,4,3,6] y)",
        "y = Attention(q, k, v)",
    ),
    "attention grouped causal": one(
        "(float[2,4,5,8] q, float[2,2,5,8] k, float[2,2,5,8] v) => (float[2,4,5,8] y)",
        "y = Attention<is_causal=1, scale=0.2>(q, k, v)",
    ),
    "attention past mask": one(
        "(float[2,4,3,8] q, float[2,2,3,8] k, float[2,2,3,8] v, bool[2,1,3,7] m,"
        " float[2,2,4,8] pk, float[2,2,4,8] pv) =>"
        " (float[2,4,3,8] y, float[2,2,7,8] nk, float[2,2,7,8] nv)",
        "y, nk, nv = Attention<softcap=2.0>(q, k, v, m, pk, pv)",
    ),
    "attention flat float mask": one(
        "(float[2,3,32] q, float[2,5,16] k, float[2,5,16] v, float[3,5] m) => (float[2,3,32] y)",
        "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, m)",
    ),
    "dequantize": one(
        "(uint8[4,6] x, float[4] s, uint8[4] z, float t) => (float[4,6] y, float[4,6] w)",
        "y = DequantizeLinear<axis=0>(x, s, z)", "w = DequantizeLinear(x, t)",
    ),
    "dequantize blocks": one(
        "(float[2,3] s, uint8[2,6] codes, uint8[2,3] zeros) => (float[2,6] y)",
        "x = Cast<to=21>(codes)", "z = Cast<to=21>(zeros)",
        "y = DequantizeLinear<axis=1, block_size=2>(x, s, z)",
    ),
    "quantize": one(
        "(float[4,6] x, float[6] r) => (uint8[4,6] u, int8[4,6] i)"
        " <uint8 z = {3}, float t = {0.02}>",
        "s = Abs(r)", "u = QuantizeLinear(x, t, z)", "i = QuantizeLinear<output_dtype=3>(x, s)",
    ),
    "quantize 4 bits": one(
        "(float[4,6] x) => (float[4,6] y) <uint4 z = {7}, float t = {0.2}>",
        "u = QuantizeLinear(x, t, z)", "y = DequantizeLinear(u, t, z)",
    ),
    "conv": one(
        "(float[2,4,7,9] x, float[6,2,3,3] w, float[6] b, float[4,1,3,3] d) =>"
        " (float[a,b1,c,d1] y, float[e,f,h,i] s, float[j,k,l,m] v)",
        "y = Conv<group=2, strides=[2,1], pads=[1,0,2,1], dilations=[1,2]>(x, w, b)",
        's = Conv<group=4, auto_pad="SAME_UPPER", strides=[2,2]>(x, d)',
        'v = Conv<group=4, auto_pad="SAME_LOWER", strides=[3,2]>(x, d)',
    ),
    "conv 1d": one(
        "(float[2,4,7] x, float[6,4,3] w) => (float[2,6,5] y)", "y = Conv(x, w)",
    ),
    "conv transpose": one(
        "(float[1,4,5,5] x, float[4,3,3,3] w, float[6] c, float[3] b) =>"
        " (float[a,d,e,f] y, float[h,i,j,k] z)",
        "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>(x, w, b)",
        "z = ConvTranspose<group=2, pads=[0,1,1,0]>(x, w, c)",
    ),
    "pools": one(
        "(float[1,3,7,8] x) => (float[a,b,c,d] m, float[e,f,h,i] v, float[j,k,l,n] w,"
        " float[o,p,q,r] t)",
        "m = MaxPool<kernel_shape=[3,2], strides=[2,3], pads=[1,0,1,1], ceil_mode=1>(x)",
        "v = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)",
        "w = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,0,0], count_include_pad=1,"
        " ceil_mode=1>(x)",
        "t = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)",
    ),
    "pool same": one(
        "(float[1,3,7,8] x) => (float[a,b,c,d] m, float[1,3,1,1] v, float[1,3,1,1] w)",
        'm = MaxPool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(x)',
        "v = GlobalAveragePool(x)", "w = GlobalMaxPool(x)",
    ),
    **{
        f"resize {mode} {how}": one(
            "(float[1,2,4,5] x) => (float[a,b,c,d] y, float[e,f,h,i] z)"
            " <float[4] up = {1, 1, 2, 1.6}, int64[4] to = {1, 2, 3, 10}>",
            f'y = Resize<mode="{mode}", coordinate_transformation_mode="{how}"{more}>(x,,up)',
            f'z = Resize<mode="{mode}", coordinate_transformation_mode="{how}"{more}>(x,,,to)',
        )
        for mode, how, more in (
            ("nearest", "asymmetric", ', nearest_mode="floor"'),
            ("nearest", "half_pixel", ""),
            ("linear", "half_pixel", ""),
            ("linear", "align_corners", ""),
            ("linear", "pytorch_half_pixel", ""),
        )
    },
    "dropout": one("(float[3] x) => (float[3] y)", "y = Dropout(x)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_onnxruntime(case: str) -> None:
    model = model_of(CASES[case])
    feeds = example(model)
    for ours, theirs in zip(interpreted(model, feeds), by_onnxruntime(model, feeds), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if theirs.dtype.kind == "f":
            scale = max(float(np.abs(theirs).max(initial=0)), 1e-3)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING * scale)
        else:
            np.testing.assert_array_equal(ours, theirs)


TWO_LAYERS = """
g (float[2,32] x) => (float[2,32] y) {
    h = mxcompile.Linear(x, a)
    r = Relu(h)
    y = mxcompile.Linear(r, b)
}
<domain: "mxcompile", opset_import: ["" : 23]>
Linear (x, w) => (y) {
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}
"""


def two_layers() -> tuple[ir.Model, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    model = onnx.parser.parse_model(HEAD + TWO_LAYERS)
    weights = [rng.standard_normal((32, 32)).astype(np.float32) for _ in range(3)]
    for key, weight in zip("ab", weights, strict=False):
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, key))
    x, a, b = (torch.from_numpy(w) for w in (weights[2][:2].copy(), *weights[:2]))
    return ir.from_proto(model), x, a, b


def test_functions_run_as_their_bodies() -> None:
    model, x, a, b = two_layers()
    y = Interpreter(model).run({"x": x})["y"]
    torch.testing.assert_close(y, torch.relu(x @ a.T) @ b.T)


def test_overrides_replace_initializers_and_computed_values() -> None:
    model, x, a, b = two_layers()
    interpreter = Interpreter(model)
    doubled = interpreter.run({"x": x}, overrides={"b": 2 * b})["y"]
    torch.testing.assert_close(doubled, torch.relu(x @ a.T) @ (2 * b).T)
    ones = torch.ones(1, 32)
    torch.testing.assert_close(interpreter.run({"x": x}, overrides={"r": ones})["y"], ones @ b.T)


def test_rerun_computes_only_what_depends_on_the_override() -> None:
    model, x, a, b = two_layers()
    interpreter = Interpreter(model)
    kept = interpreter.run({"x": x}, keep=True)
    assert {"x", "h", "r", "y"} <= kept.keys()
    seen: list[str | None] = []
    again = interpreter.rerun(
        kept, {"b": -b}, tap=lambda node, _: seen.append(node.outputs[0].name)
    )
    assert seen == ["y"]
    torch.testing.assert_close(again["y"], -kept["y"])
    torch.testing.assert_close(
        interpreter.rerun(kept, {"a": -a})["y"], torch.relu(-(x @ a.T)) @ b.T
    )
    torch.testing.assert_close(interpreter.rerun(kept, {})["y"], kept["y"])


def test_fetch_computes_no_more_than_it_needs() -> None:
    model, x, a, _ = two_layers()
    seen: list[str] = []
    values = Interpreter(model).run({"x": x}, fetch=["h"], tap=lambda n, _: seen.append(n.op_type))
    assert seen == ["Linear"]
    assert values.keys() == {"h"}
    torch.testing.assert_close(values["h"], x @ a.T)


def test_taps_see_the_inputs() -> None:
    model, x, a, _ = two_layers()
    taken = []
    Interpreter(model).run({"x": x}, tap=lambda node, inputs: taken.append((node.op_type, inputs)))
    assert [op for op, _ in taken] == ["Linear", "Relu", "Linear"]
    torch.testing.assert_close(taken[0][1][1], a)


def test_gradients_flow() -> None:
    model, x, _, _ = two_layers()
    x.requires_grad_()
    y = Interpreter(model).run({"x": x})["y"]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert bool(gradient.abs().sum() > 0)


def test_external_weights_are_mapped_without_a_warning(tmp_path: Path) -> None:
    model, x, a, b = two_layers()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    loaded = ir.load(tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = Interpreter(loaded).run({"x": x})["y"]
    torch.testing.assert_close(y, torch.relu(x @ a.T) @ b.T)


def test_an_unknown_operator_is_named() -> None:
    text = one("(float[3] x) => (float[3] y)", "[odd] y = mxcompile.Magic(x)")
    model = onnx.parser.parse_model(HEAD + text)
    with pytest.raises(UnsupportedError, match=r"node odd: op mxcompile::Magic is not supported"):
        Interpreter(ir.from_proto(model))


def test_an_unknown_attribute_is_named() -> None:
    text = one("(float[3] x) => (float[3] y)", "y = Relu<gain=2>(x)")
    model = onnx.parser.parse_model(HEAD + text)
    with pytest.raises(UnsupportedError, match="attribute gain is not supported"):
        Interpreter(ir.from_proto(model))


def test_function_attributes_reach_the_body() -> None:
    text = """
    g (float[3] x) => (float[3] y, float[3] z) {
        y = mxcompile.Soft<slope=0.5>(x)
        z = mxcompile.Soft(x)
    }
    <domain: "mxcompile", opset_import: ["" : 23]>
    Soft <slope: float = 0.25> (x) => (y) { y = LeakyRelu<alpha: float = @slope>(x) }
    """
    model = onnx.parser.parse_model(HEAD + text)
    values = Interpreter(ir.from_proto(model)).run({"x": torch.tensor([-4.0, 0.0, 2.0])})
    assert values["y"].tolist() == [-2.0, 0.0, 2.0]
    assert values["z"].tolist() == [-1.0, 0.0, 2.0]


def test_a_query_that_may_look_nowhere_gets_zeros() -> None:
    model = model_of(CASES["attention past mask"])
    feeds = example(model)
    feeds["m"][0, 0, 1] = False
    assert not interpreted(model, feeds)[0][0, :, 1].any()


def test_threads_may_share_an_interpreter(tmp_path: Path) -> None:
    """External data is mapped once, however many threads ask for it at a time."""
    count, size = 40, 1 << 12
    body = "\n".join(f"x{i + 1} = Add(x{i}, w{i})" for i in range(count))
    text = HEAD + f"g (float[{size}] x0) => (float[{size}] x{count})"
    model = onnx.parser.parse_model(text + " {" + body + "}")
    for i in range(count):
        tensor = onnx.numpy_helper.from_array(np.full(size, i, np.float32), f"w{i}")
        model.graph.initializer.append(tensor)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    for _ in range(5):
        interpreter = Interpreter(ir.load(tmp_path / "m.onnx"))
        ready = threading.Barrier(8)

        def run(
            _: int, interpreter: Interpreter = interpreter, ready: threading.Barrier = ready
        ) -> float:
            ready.wait()
            return float(interpreter.run({"x0": torch.zeros(size)})[f"x{count}"][0])

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(run, range(8))) == {sum(range(count))}
