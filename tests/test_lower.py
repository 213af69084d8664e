"""Small graphs through the lowering, against onnxruntime."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tvm
from tvm import relax

from mxcompile import graph, lower, passes, target
from mxcompile.errors import UnsupportedError
from mxcompile.formats import FORMATS
from mxcompile.pipeline import Context, Pipeline
from mxcompile.plan import PrecisionPlan, TileFormats
from tests.test_ir import parse

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
WHERE = target.find("x86")


def expected(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    return list(onnxruntime.InferenceSession(data, options).run(None, feeds))


def compiled(
    model: ir.Model, feeds: dict[str, np.ndarray], folder: Path, formats: str = ""
) -> list[np.ndarray]:
    """Compile with float activations and run; without formats nothing is quantized."""
    ctx = Context(WHERE)
    model = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(model, ctx)
    if formats:
        units = graph.units(model)
        tiles = {u.name: TileFormats.parse(f"{formats}*{u.tiles}") for u in units}
        ctx = Context(WHERE, PrecisionPlan(units, tiles))
        steps = f"{passes.QUANTIZE},fuse-qdq"
        model = Pipeline.parse(steps, passes.REGISTRY).run(model, ctx)
    lowered = lower.lower(model, ctx)
    lower.build(lowered, WHERE, folder / "g.so")
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "g.so")), tvm.cpu())
    tensors = [tvm.runtime.tensor(feeds[s.name], tvm.cpu()) for s in lowered.inputs]
    weights = [tvm.runtime.tensor(np.ascontiguousarray(w)) for w in lowered.weights.values()]
    found = machine["main"](*tensors, tuple(weights))
    return [t.numpy() for t in ([found] if hasattr(found, "numpy") else found)]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


GATHERS = f"""g (float[B,3,80] x, float[3,2] few) => (float[B,3,70] y)
    <int32[70] places = {{{", ".join(str(7 * i % 80) for i in range(70))}}},
     uint8[70] kinds = {{{", ".join(str(i % 2) for i in range(70))}}}> {{
        moved = Gather<axis = -1>(x, places) index = Cast<to = 6>(kinds)
        other = Gather<axis = -1>(few, index) y = Add(moved, other) }}"""
CASES = {
    "elementwise": (
        "g (float[N,M] x, float[M] b) => (float[N,M] y)"
        "{ a = Add(x, b) t = Tanh(a) s = Sigmoid(a) m = Mul(t, s) e = Exp(m) y = Sub(e, b) }",
        {"x": normal(5, 37), "b": normal(37)},
    ),
    "shapes": (
        """g (float[B,S,24] x) => (float[B,S,24] y) <int64[4] to = {0,0,4,6}, int64[1] all = {-1}> {
            h = Reshape(x, to) t = Transpose<perm = [0,2,1,3]>(h)
            back = Transpose<perm = [0,2,1,3]>(t)
            shape = Shape(x) f = Reshape(back, all) y = Reshape(f, shape) }""",
        {"x": normal(2, 3, 24)},
    ),
    "slices": (
        """g (float[B,8] x) => (float[B,8] y)
        <int64[1] one = {1}, int64[1] end = {-3}, int64[1] axis = {1}, int64[2] parts = {3,5}> {
            a = Slice(x, one, end, axis) l, r = Split<axis = 1>(x, parts)
            f = Slice(r, one, end, axis) y = Concat<axis = 1>(a, f, l) }""",
        {"x": normal(3, 8)},
    ),
    "norms": (
        "g (float[B,S,40] x, float[40] w, float[40] b) => (float[B,S,40] y, float[B,S,40] z)"
        "{ y = RMSNormalization(x, w) z = LayerNormalization(x, w, b) }",
        {"x": normal(2, 5, 40), "w": normal(40), "b": normal(40)},
    ),
    "softmax": (
        "g (float[B,N] x) => (float[B,N] y) { y = Softmax<axis = -1>(x) }",
        {"x": normal(4, 50)},
    ),
    "range": (
        """g (float[B,S] x) => (float[S] y) <int64 zero = {0}, int64 one = {1}> {
            n1 = Shape<start = 1, end = 2>(x) n = Squeeze(n1) r = Range(zero, n, one)
            y = Cast<to = 1>(r) }""",
        {"x": normal(2, 6)},
    ),
    "attention": (
        """g (float[B,S,64] q, float[B,S,32] k, float[B,S,32] v, bool[B,1,S,S] m)
        => (float[B,S,64] y)
        { y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v, m) }""",
        {
            "q": normal(2, 7, 64),
            "k": normal(2, 7, 32),
            "v": normal(2, 7, 32),
            "m": np.tril(np.ones((2, 1, 7, 7), bool)),
        },
    ),
    "gathers": (GATHERS, {"x": normal(2, 3, 80), "few": normal(3, 2)}),
    "pooling": (
        """g (float[1,3,9,9] x) => (float[1,3,1,1] y) {
            p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(x) h = HardSigmoid(p)
            y = GlobalAveragePool(h) }""",
        {"x": normal(1, 3, 9, 9)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str, tmp_path: Path) -> None:
    text, feeds = CASES[case]
    model = parse(HEADER + text)
    graph.infer_shapes(model)
    for found, wanted in zip(compiled(model, feeds, tmp_path), expected(model, feeds), strict=True):
        # A few hundred float32 roundings at most lie between the two.
        tolerance = 256 * 2**-24 * max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=0)


def fused_kernels(text: str) -> list[tvm.tirx.PrimFunc]:
    """What is left of a model of TVM's operators to be scheduled."""
    model = parse(HEADER + text)
    graph.infer_shapes(model)
    phases = lower.phases(WHERE)
    module = lower.lower(model, Context(WHERE)).module
    module = tvm.transform.Sequential([*phases["legalize"], *phases["fuse"]])(module)
    return [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]


def test_gathers_fuse_with_what_reads_them(capfd: pytest.CaptureFixture[str]) -> None:
    (kernel,) = fused_kernels(GATHERS)
    assert "T.min" not in kernel.script()  # constant places that lie within need no bounds
    assert capfd.readouterr() == ("", "")  # of which topi warns


def test_rotary_angles_are_two_kernels() -> None:
    """What the cosines and the sines of two tables read is computed in each."""
    text = """g (int64[B,S] p) => (float[B,S,4] c, float[B,S,4] s, float[B,S,4] d, float[B,S,4] r)
        <int64[1] last = {-1}, float[4] f = {0}, float[4] g = {0}> {
            u = Unsqueeze(p, last) t = Cast<to = 1>(u)
            a = Mul(t, f) c = Cos(a) s = Sin(a) b = Mul(t, g) d = Cos(b) r = Sin(b) }"""
    assert len(fused_kernels(text)) == 2  # a table has other numbers, not another kernel


def test_a_gather_from_one_place_is_none() -> None:
    text = "g (float[N,1,8] x, int64[1] i) => (float[N,1,8] y) {{ {} y = Tanh(z) }}"
    direct, through = (
        fused_kernels(text.format(z)) for z in ("z = Identity(x)", "z = Gather<axis = 1>(x, i)")
    )
    assert [k.script() for k in direct] == [k.script() for k in through]


CONVS = {
    "pads": ("kernel_shape = [3,3], pads = [1,0,1,2]", (16, 8, 3, 3)),
    "strides": ("kernel_shape = [3,5], strides = [2,3], dilations = [2,1]", (16, 8, 3, 5)),
    "same": ('kernel_shape = [3,3], strides = [2,2], auto_pad = "SAME_UPPER"', (16, 8, 3, 3)),
    "pointwise": ("kernel_shape = [1,1]", (20, 40, 1, 1)),
}


@pytest.mark.parametrize("case", CONVS)
def test_mixed_convolution(case: str, tmp_path: Path) -> None:
    """In 8 bits, against the dequantized weights: what is left is float32 rounding."""
    options, shape = CONVS[case]
    sizes = ",".join(map(str, shape))
    text = f"""{HEADER} g (float[2,{shape[1]},11,14] x) => (float[2,{shape[0]},oh,ow] y)
    <float[{sizes}] w = {{0}}, float[{shape[0]}] b = {{0}}> {{ y = Conv<{options}>(x, w, b) }}"""
    model = parse(text)
    graph.infer_shapes(model)
    feeds = {"x": normal(2, shape[1], 11, 14)}
    (found,) = compiled(model, feeds, tmp_path, "int8")
    units = graph.units(model)
    ctx = Context(WHERE, PrecisionPlan.uniform(units, FORMATS["int8"]))
    quantized = Pipeline.parse("annotate,quantize-weights", passes.REGISTRY).run(model, ctx)
    (wanted,) = expected(quantized, feeds)
    terms = shape[1] * shape[2] * shape[3]
    tolerance = terms * 2**-24 * 3 * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_is_what_its_qdq_nodes_say(fmt: str, tmp_path: Path) -> None:
    """Lowered and packed, against standard ONNX nodes in onnxruntime."""
    text = f"""{HEADER} g (float[N,72] x) => (float[N,40] y) <float[72,40] w = {{0}}>
    {{ y = MatMul(x, w) }}"""
    model = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(parse(text), Context(WHERE))
    feeds = {"x": normal(3, 72)}
    (found,) = compiled(model, feeds, tmp_path, fmt)
    ctx = Context(WHERE, PrecisionPlan.uniform(graph.units(model), FORMATS[fmt]))
    quantized = Pipeline.parse("annotate,quantize-weights", passes.REGISTRY).run(model, ctx)
    (wanted,) = expected(quantized, feeds)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=72 * 2**-24 * 3 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[N] x, int64[1] s) => (float[K] y) { y = CenterCropPad(x, s) }", "CenterCrop"),
        (
            "g (float[N] x, int64[R] s) => (float[A] y) { y = Reshape(x, s) }",
            "its shape depends on data",
        ),
        ("g (string[N] x) => (string[N] y) { y = Identity(x) }", "STRING"),
    ],
)
def test_refusals_name_the_node(text: str, message: str) -> None:
    model = parse(HEADER + text)
    with pytest.raises(UnsupportedError, match=message):
        lower.lower(model, Context(WHERE))


def test_no_float_copy_of_a_planned_weight() -> None:
    text = f"""{HEADER} g (float[N,64] x) => (float[N,48] y) <float[64,48] w = {{0}}>
    {{ y = MatMul(x, w) }}"""
    model = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(parse(text), Context(WHERE))
    units = graph.units(model)
    plan = PrecisionPlan(units, {"w": TileFormats.parse("int4,int2,int8")})
    ctx = Context(WHERE, plan)
    fused = Pipeline.parse(f"{passes.QUANTIZE},{passes.FUSE}", passes.REGISTRY).run(model, ctx)
    lowered = lower.lower(fused, ctx)
    assert {name: str(w.dtype) for name, w in lowered.weights.items()} == {
        "w.packed": "uint8",
        "w.tiles": "int32",
    }
    assert lowered.weights["w.packed"].nbytes == plan.weight_bytes


def test_phases_end_with_a_machine_program() -> None:
    assert list(lower.phases(WHERE)) == ["legalize", "fuse", "schedule", "lower"]
