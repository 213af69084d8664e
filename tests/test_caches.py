"""Cache formats: what their codes mean in numpy and in ONNX."""

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mxcompile import graph
from mxcompile.caches import decode, encode
from mxcompile.formats import CACHE_FORMATS, GROUP, LEAST_SCALE
from mxcompile.passes import kv_cache, quantize_caches

QUANTIZED = ["int4", "int8"]
DIM = 2 * GROUP


def rows_of(seed: int, *lead: int) -> np.ndarray:
    """Rows with groups of all kinds: normal, zero, tiny, two peaks, on ties, with an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*lead, DIM)).astype(np.float32)
    flat = x.reshape(-1, GROUP)
    flat[1::8] = 0
    flat[2::8] *= 1e-9
    flat[3::8, :2] = [5, -5]
    flat[4::8] = np.arange(GROUP) - 16
    flat[5::8, 7] = 3000
    flat[6::8] = -2.5
    return x


@pytest.mark.parametrize("name", QUANTIZED)
@given(
    hnp.arrays(
        np.float32,
        (3, DIM),
        elements=st.floats(-(2.0**16), 2.0**16, width=32, allow_subnormal=False),
    )
)
def test_errors_are_half_a_step(name: str, x: np.ndarray) -> None:
    fmt = CACHE_FORMATS[name]
    parts = encode(x, fmt)
    assert [(p.dtype.name, p.shape[-1]) for p in parts] == list(fmt.parts(DIM))
    assert sum(p.nbytes for p in parts) == 3 * fmt.row_bytes(DIM)
    steps = np.abs(parts[1].astype(np.float32)).repeat(GROUP, axis=-1)
    error = np.abs(decode(parts, fmt) - x)
    peak = np.abs(x).reshape(3, -1, GROUP).max(-1).repeat(GROUP, axis=-1)
    # The side without the additional code is cut off by a step; fp16 rounds the scale by 2**-11 of
    # itself, or by 2**-25 where it is subnormal.
    cut = np.abs(x) > peak * (1 - 1 / -fmt.lowest)
    bound = np.where(cut, 1.0, 0.5) * steps - fmt.lowest * np.maximum(2.0**-11 * steps, 2.0**-25)
    assert (error <= bound * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_what_was_decoded_stays(name: str) -> None:
    fmt = CACHE_FORMATS[name]
    once = decode(encode(rows_of(0, 16), fmt), fmt)
    np.testing.assert_array_equal(decode(encode(once, fmt), fmt), once)


def test_all_codes_of_four_bits_are_used() -> None:
    x = np.linspace(-8, 7, GROUP, dtype=np.float32)[None]
    assert set(decode(encode(x, CACHE_FORMATS["int4"]), CACHE_FORMATS["int4"])[0]) == set(
        np.arange(-8.0, 8)
    )


def test_nothing_is_zero_over_zero() -> None:
    codes, scales = encode(np.zeros((1, GROUP), np.float32), CACHE_FORMATS["int8"])
    assert not codes.any() and scales == np.float16(LEAST_SCALE)


def run(
    functions: list[str], call: str, feeds: dict[str, np.ndarray], count: int
) -> list[np.ndarray]:
    """Evaluate a call of functions of ours in onnxruntime."""
    outputs = ", ".join(f"y{i}" for i in range(count))
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>'
        f"g () => () {{ {outputs} = mxcompile.{call} }}"
    )
    kinds = {n: onnx.helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in feeds.items()}
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(n, kinds[n], x.shape) for n, x in feeds.items()
    )
    proto.graph.output.extend(onnx.ValueInfoProto(name=f"y{i}") for i in range(count))
    model = ir.from_proto(proto)
    for text in functions:
        graph.define(model, text)
    common_passes.InlinePass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [np.asarray(y) for y in session.run(None, feeds)]


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_onnx_functions_are_the_definition(name: str) -> None:
    fmt = CACHE_FORMATS[name]
    x = rows_of(1, 2, 3, 8)
    parts = encode(x, fmt)
    want = decode(parts, fmt)
    found = run([quantize_caches.encoder(fmt)], f"EncodeCache:{fmt} (x)", {"x": x}, len(parts))
    for part, expected in zip(found, parts, strict=True):
        np.testing.assert_array_equal(part, expected)
    names = [f"p{i}" for i in range(len(parts))]
    feeds = dict(zip(names, parts, strict=True))
    (y,) = run([quantize_caches.decoder(fmt)], f"DecodeCache:{fmt} ({', '.join(names)})", feeds, 1)
    np.testing.assert_array_equal(y, want)
    (y,) = run([quantize_caches.rounding(fmt)], f"RoundCache:{fmt} (x)", {"x": x}, 1)
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(("key", "value"), [("int8", "int4"), ("fp32", "fp16"), ("int4", "fp32")])
def test_cached_attention_is_attention_over_what_is_cached(key: str, value: str) -> None:
    formats = CACHE_FORMATS[key], CACHE_FORMATS[value]
    rng = np.random.default_rng(2)
    past, seq, heads, longest, window = 5, 3, 2, 12, 6
    rows = [rng.standard_normal((1, heads, longest, DIM)).astype(np.float32) for _ in range(2)]
    q, k, v = (
        rng.standard_normal((1, seq, n * DIM)).astype(np.float32) for n in (2 * heads, heads, heads)
    )
    parts = [part for x, fmt in zip(rows, formats, strict=True) for part in encode(x, fmt)]
    for x, new in zip(rows, (k, v), strict=True):
        x[:, :, past : past + seq] = new.reshape(1, seq, heads, DIM).transpose(0, 2, 1, 3)
    want = [part for x, fmt in zip(rows, formats, strict=True) for part in encode(x, fmt)]
    names = [f"p{i}" for i in range(len(parts))]
    feeds = {"q": q, "k": k, "v": v, "past": np.array([past])}
    feeds |= dict(zip(names, parts, strict=True))
    attributes = (
        f"num_heads={2 * heads}, kv_num_heads={heads}, scale=0.1, softcap=0.0, window={window}"
    )
    functions = [kv_cache.definition(*formats)]
    functions += [
        f(fmt) for fmt in formats for f in (quantize_caches.encoder, quantize_caches.decoder)
    ]
    y, *found = run(
        functions,
        f"CachedAttention:{key}_{value} <{attributes}> ({', '.join(feeds)})",
        feeds,
        1 + len(parts),
    )
    for part, expected in zip(found, want, strict=True):
        np.testing.assert_array_equal(part, expected)
    keys, values = (
        decode(encode(x[:, :, : past + seq], fmt), fmt).astype(np.float64).repeat(2, axis=1)
        for x, fmt in zip(rows, formats, strict=True)
    )
    queries = q.reshape(1, seq, 2 * heads, DIM).transpose(0, 2, 1, 3)
    scores = 0.1 * queries @ keys.swapaxes(2, 3)
    i, j = past + np.arange(seq)[:, None], np.arange(past + seq)
    scores = np.where((j <= i) & (j > i - window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ values
    np.testing.assert_allclose(
        y, mixed.transpose(0, 2, 1, 3).reshape(1, seq, -1), rtol=0, atol=1e-5
    )
