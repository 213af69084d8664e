"""CPU attention, append and rotary against numpy in float64, called as the compiler calls them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relax

from mxcompile.caches import decode, encode
from mxcompile.formats import CACHE_FORMATS
from mxcompile.targets.cpu_attention import (
    Attention,
    Caches,
    Mask,
    Rotation,
    append,
    attend,
    attend_all,
    rotary,
    rotate,
)
from mxcompile.targets.cpu_norm import Columns, Runs, Simd, rms_norm
from tests import arm

Array = NDArray[Any]

TARGETS = {"znver4": Simd(16, 2), "haswell": Simd(8, 2), "neon": Simd(4, 2)}
LONGEST = 450


@pytest.fixture(params=TARGETS)
def mcpu(request: pytest.FixtureRequest, needs: Callable[[str], None]) -> str:
    """An LLVM CPU that this machine can run code for, or ARM's instructions."""
    if request.param in arm.CPUS:
        arm.require()
    else:
        needs({"znver4": "avx512f", "haswell": "avx2"}[request.param])
    return str(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def compiled(function: Callable[[relax.BlockBuilder], None], mcpu: str) -> Any:
    """Build the ``main`` that ``function`` emits."""
    builder = relax.BlockBuilder()
    function(builder)
    if mcpu in arm.CPUS:
        return arm.machine(mcpu).program(builder.get())
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "num-cores": 2})
    executable = tvm.compile(builder.get(), target=target)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return lambda *args: main(
        *(tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args)
    )


def tensor(name: str, shape: tuple[Any, ...], dtype: str = "float32") -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))


def one_call(kernel: Any, inputs: list[relax.Var], out: tuple[Any, ...], mcpu: str) -> Any:
    """Build a ``main`` that calls one kernel."""

    def emit(builder: relax.BlockBuilder) -> None:
        with builder.function("main", inputs):
            with builder.dataflow():
                variable = builder.add_func(kernel, "kernel")
                call = relax.call_tir(variable, inputs, out_ty=relax.TensorType(out, "float32"))
                result = builder.emit_output(builder.emit(call))
            builder.emit_func_output(result)

    return compiled(emit, mcpu)


def decoder(a: Attention, caches: Caches, mcpu: str) -> Any:
    """Build ``main(q, k, v, past, *keys, *values) -> out``, which updates the caches in place."""
    simd = TARGETS[mcpu]
    batch, seq = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq"))
    wide = a.kv_heads * a.dim
    q = tensor("q", (batch, seq, a.q.width if a.q else a.heads * a.dim))
    k = tensor("k", (batch, seq, a.k.width if a.k else wide))
    v = tensor("v", (batch, seq, a.v.width if a.v else wide))
    past = tensor("past", (1,), "int64")
    parts = [
        tensor(f"part{i}", (batch, a.kv_heads, LONGEST, columns), dtype)
        for i, (dtype, columns) in enumerate(caches.parts(a.dim))
    ]

    def emit(builder: relax.BlockBuilder) -> None:
        with builder.function("main", [q, k, v, past, *parts]):
            with builder.dataflow():
                write = builder.add_func(append(a, caches, simd), "append")
                read = builder.add_func(attend(a, caches, simd), "attend")
                places = list(range(3, 3 + len(parts)))
                kept = builder.emit(
                    relax.op.call_tir_inplace(
                        write, [k, v, past, *parts], places, [part.ty for part in parts]
                    )
                )
                call = relax.call_tir(
                    read,
                    [q, past, *(kept[i] for i in range(len(parts)))],
                    out_ty=relax.TensorType((batch, seq, a.heads * a.dim), "float32"),
                )
                result = builder.emit_output(builder.emit(call))
            builder.emit_func_output(result)

    return compiled(emit, mcpu)


def split(x: Array, heads: int) -> Array:
    """(batch, seq, heads * dim) to (batch, head, seq, dim)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def reference(
    a: Attention, q: Array, keys: Array, values: Array, past: int, bias: Array | None = None
) -> tuple[Array, float]:
    """Attend in float64; also bound the error of doing so in float32.

    A score's error is at most (dim + 4) roundings of sum |q k|; a weight's is twice that plus those
    of exp; the sum over the keys adds one rounding each.
    """
    q = split(q, a.heads).astype(np.float64) * a.scale
    keys, values = (np.repeat(x.astype(np.float64), a.group, axis=1) for x in (keys, values))
    scores = q @ keys.swapaxes(2, 3)
    magnitude = (np.abs(q) @ np.abs(keys).swapaxes(2, 3)).max()
    if a.softcap:
        scores = a.softcap * np.tanh(scores / a.softcap)
    if bias is not None:
        scores = scores + bias
    if a.causal:
        i, j = past + np.arange(q.shape[2])[:, None], np.arange(keys.shape[2])
        seen = (j <= i) & (j > i - a.window if a.window else True)
        scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = (weights @ values).transpose(0, 2, 1, 3)
    roundings = 2 * (a.dim + 4) * magnitude + 8 + keys.shape[2]
    return out.reshape(*out.shape[:2], -1), 2.0**-24 * roundings * np.abs(values).max()


def formats(key: str, value: str) -> Caches:
    return Caches(CACHE_FORMATS[key], CACHE_FORMATS[value])


class Kept:
    """A cache as it should be: what was appended, encoded; beyond that what nobody may read."""

    def __init__(self, rows: Array, past: int, fmt: str) -> None:
        self.format = CACHE_FORMATS[fmt]
        self.parts = list(encode(rows, self.format))
        for part in self.parts:
            part[:, :, past:] = np.nan if part.dtype.kind == "f" else 77

    def append(self, new: Array, past: int) -> None:
        """Write rows [batch, head, seq, dim] from ``past`` on."""
        for part, written in zip(self.parts, encode(new, self.format), strict=True):
            part[:, :, past : past + new.shape[2]] = written

    def rows(self, count: int) -> Array:
        """The first rows, as attention sees them."""
        return decode([part[:, :, :count] for part in self.parts], self.format)


CASES = {
    "mha": (Attention(2, 2, 64, 0.125), ("fp16", "fp16")),
    "windowed": (Attention(4, 1, 256, 0.0625, window=20), ("fp16", "fp16")),
    "grouped": (Attention(4, 2, 16, 0.25), ("fp32", "fp32")),
    "uneven": (Attention(3, 1, 20, 0.3, softcap=5.0), ("fp32", "fp32")),
    "fused": (
        Attention(4, 2, 80, 0.1, q=Columns(656, 8), k=Columns(656, 328), v=Columns(656, 488)),
        ("fp16", "fp32"),
    ),
    "bytes": (Attention(4, 1, 256, 0.0625, window=20), ("int8", "int8")),
    "nibbles": (Attention(4, 2, 64, 0.125), ("int4", "int4")),
    "bytes and nibbles": (
        Attention(3, 1, 96, 0.1, q=Columns(492, 8), k=Columns(492, 298), v=Columns(492, 395)),
        ("int8", "int4"),
    ),
    "nibbles and floats": (Attention(6, 2, 160, 0.1, softcap=9.0), ("int4", "fp16")),
}


@pytest.mark.parametrize("case", CASES)
def test_attend_matches_float64(case: str, mcpu: str, rng: np.random.Generator) -> None:
    a, names = CASES[case]
    run = decoder(a, formats(*names), mcpu)
    for seq in (1, 2, 7, 33, 130):
        for past, batch in ((0, 2), (5, 1), (64, 1), (300, 2)):
            shape = (batch, a.kv_heads, LONGEST, a.dim)
            keys, values = (Kept(rng.standard_normal(shape, np.float32), past, n) for n in names)
            inputs = [
                rng.standard_normal(
                    (batch, seq, place.width if place else heads * a.dim), np.float32
                )
                for place, heads in ((a.q, a.heads), (a.k, a.kv_heads), (a.v, a.kv_heads))
            ]
            if a.q:
                inputs[1:] = [inputs[0]] * 2
            q, k, v = (
                x[..., place.offset : place.offset + heads * a.dim] if place else x
                for x, place, heads in zip(
                    inputs, (a.q, a.k, a.v), (a.heads, a.kv_heads, a.kv_heads), strict=True
                )
            )
            caches = [tvm.runtime.tensor(c) for c in (*keys.parts, *values.parts)]
            out = run(*inputs, np.array([past]), *caches)

            for cache, new in zip((keys, values), (k, v), strict=True):
                cache.append(split(new, a.kv_heads), past)
            for found, part in zip(caches, (*keys.parts, *values.parts), strict=True):
                np.testing.assert_array_equal(found.numpy(), part)
            want, bound = reference(a, q, keys.rows(past + seq), values.rows(past + seq), past)
            np.testing.assert_allclose(
                out.numpy(), want, atol=bound, rtol=0, err_msg=f"{seq} {past}"
            )


@pytest.mark.parametrize(
    ("mask", "mcpu"),
    [
        (None, "znver4"),
        (Mask(), "haswell"),
        (Mask("bool"), "znver4"),
        (Mask(per_head=True, per_query=True), "znver4"),
        (Mask("bool", per_query=True), "haswell"),
        (Mask("bool", per_head=True), "neon"),
    ],
    ids=str,
    indirect=["mcpu"],
)
def test_attend_all_matches_float64(mask: Mask | None, mcpu: str, rng: np.random.Generator) -> None:
    a = Attention(4, 2, 32, 0.2, causal=False, k=Columns(100, 30))
    batch, seq, total = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq", "total"))
    inputs = [
        tensor("q", (batch, seq, 128)),
        tensor("k", (batch, total, 100)),
        tensor("v", (batch, total, 64)),
    ]
    if mask:
        shape = (batch, a.heads if mask.per_head else 1, seq if mask.per_query else 1, total)
        inputs.append(tensor("mask", shape, mask.dtype))
    kernel = attend_all(a, mask, TARGETS[mcpu])
    run = one_call(kernel, inputs, (batch, seq, 128), mcpu)
    for s, t in ((1, 1), (5, 70), (60, 128), (100, 131)):
        q = rng.standard_normal((2, s, 128), np.float32)
        k = rng.standard_normal((2, t, 100), np.float32)
        v = rng.standard_normal((2, t, 64), np.float32)
        args: list[Array] = [q, k, v]
        bias = None
        if mask:
            shape = (2, a.heads if mask.per_head else 1, s if mask.per_query else 1, t)
            keep = rng.random(shape) < 0.7
            keep[..., 0] = True
            bias = np.where(keep, rng.standard_normal(shape), -np.inf).astype(np.float32)
            if mask.dtype == "bool":
                bias = np.where(keep, np.float32(0), np.float32(-np.inf))
            args.append(keep if mask.dtype == "bool" else bias)
        want, bound = reference(a, q, split(k[..., 30:94], 2), split(v, 2), 0, bias)
        np.testing.assert_allclose(run(*args).numpy(), want, atol=bound, rtol=0)


@pytest.mark.parametrize("seq", [1, 40])
def test_attend_matches_onnxruntime(
    seq: int, needs: Callable[[str], None], rng: np.random.Generator
) -> None:
    needs("avx2")
    a = Attention(4, 2, 64, 0.125)
    batch, past = 2, 30
    floats = onnx.TensorProto.FLOAT
    names = {
        "q": (batch, seq, 256),
        "k": (batch, seq, 128),
        "v": (batch, seq, 128),
        "keys": (batch, 2, past, 64),
        "values": (batch, 2, past, 64),
    }
    node = onnx.helper.make_node(
        "Attention",
        ["q", "k", "v", "", "keys", "values"],
        ["y", "new_keys", "new_values"],
        is_causal=1,
        q_num_heads=4,
        kv_num_heads=2,
        scale=0.125,
    )
    infos = {n: onnx.helper.make_tensor_value_info(n, floats, s) for n, s in names.items()}
    outputs = [onnx.helper.make_tensor_value_info(n, floats, None) for n in node.output]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", list(infos.values()), outputs),
        opset_imports=[onnx.helper.make_opsetid("", 23)],
        ir_version=10,
    )
    args = {n: rng.standard_normal(s, np.float32) for n, s in names.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    want, keys, values = session.run(None, args)

    caches = [np.full((batch, 2, LONGEST, 64), np.nan, np.float32) for _ in range(2)]
    for cache, name in zip(caches, ("keys", "values"), strict=True):
        cache[:, :, :past] = args[name]
    run = decoder(a, formats("fp32", "fp32"), "haswell")
    out = run(args["q"], args["k"], args["v"], np.array([past]), *caches)
    _, bound = reference(a, args["q"], keys, values, past)
    np.testing.assert_allclose(out.numpy(), want, atol=2 * bound, rtol=0)


@pytest.mark.parametrize(("dim", "rotated"), [(64, 0), (80, 32), (20, 10)])
def test_rotary_matches_definition(
    dim: int, rotated: int, mcpu: str, rng: np.random.Generator
) -> None:
    heads, half = 3, (rotated or dim) // 2
    batch, seq = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq"))
    width = heads * dim + 12
    inputs = [
        tensor("x", (batch, seq, width)),
        tensor("cos", (batch, seq, half)),
        tensor("sin", (batch, seq, half)),
    ]
    kernel = rotary(heads, dim, rotated, Columns(width, 5), TARGETS[mcpu])
    run = one_call(kernel, inputs, (batch, seq, heads * dim), mcpu)
    for s in (1, 200):
        x = rng.standard_normal((2, s, width), np.float32)
        angle = rng.standard_normal((2, s, half))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        rows = x[..., 5 : 5 + heads * dim].reshape(2, s, heads, dim).astype(np.float64)
        low, high, rest = np.split(rows, [half, 2 * half], axis=-1)
        c, n = cos[:, :, None], sin[:, :, None]
        want = np.concatenate([low * c - high * n, high * c + low * n, rest], axis=-1)
        got = run(x, cos, sin).numpy().reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=0, atol=3 * 2.0**-24 * np.abs(x).max())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("names", "dim", "rotated"), [(("fp16", "int8"), 64, 0), (("int4", "fp32"), 96, 32)]
)
def test_rotate_is_what_separate_kernels_do(
    normed: bool,
    names: tuple[str, str],
    dim: int,
    rotated: int,
    mcpu: str,
    rng: np.random.Generator,
) -> None:
    heads, kv_heads, half = 4, 2, (rotated or dim) // 2
    width = (heads + 2 * kv_heads) * dim
    starts = (0, heads * dim, (heads + kv_heads) * dim)
    q_at, k_at, v_at = (Columns(width, start) for start in starts)
    simd, caches = TARGETS[mcpu], formats(*names)
    rotation = Rotation(rotated, 1e-6 if normed else None)
    placed = Attention(heads, kv_heads, dim, 1.0, q=q_at, k=k_at, v=v_at)
    batch, seq = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq"))
    x, past = tensor("x", (batch, seq, width)), tensor("past", (1,), "int64")
    angles = [tensor(name, (batch, seq, half)) for name in ("cos", "sin")]
    weights = [tensor(name, (dim,)) for name in ("q_weight", "k_weight")]
    parts = [
        tensor(f"part{i}", (batch, kv_heads, LONGEST, columns), dtype)
        for i, (dtype, columns) in enumerate(caches.parts(dim))
    ]
    types = [part.ty for part in parts]
    flat = relax.TensorType((batch, seq, heads * dim), "float32")

    def together(builder: relax.BlockBuilder) -> relax.Expr:
        kernel = builder.add_func(rotate(placed, caches, rotation, simd), "rotate")
        args = [x, x, x, *angles, *(weights if normed else []), past, *parts]
        places = [*range(len(args) - len(parts), len(args)), -1]
        call = relax.op.call_tir_inplace(kernel, args, places, [*types, flat])
        return builder.emit(relax.TupleGetItem(builder.emit(call), len(parts)))

    def apart(builder: relax.BlockBuilder) -> relax.Expr:
        turned = []
        for at, count, weight in ((q_at, heads, weights[0]), (k_at, kv_heads, weights[1])):
            value, place = x, at
            out = relax.TensorType((batch, seq, count * dim), "float32")
            if normed:
                norm = rms_norm(Runs(dim, count, 3, at), 1e-6, simd)
                norm = builder.add_func(norm, f"norm{count}")
                value = builder.emit(relax.call_tir(norm, [x, weight], out))
                place = Columns(count * dim)
            turn = builder.add_func(rotary(count, dim, rotated, place, simd), f"rotary{count}")
            turned.append(builder.emit(relax.call_tir(turn, [value, *angles], out)))
        alone = Attention(heads, kv_heads, dim, 1.0, v=v_at)
        write = builder.add_func(append(alone, caches, simd), "append")
        args = [turned[1], x, past, *parts]
        places = list(range(3, 3 + len(parts)))
        kept = builder.emit(relax.op.call_tir_inplace(write, args, places, types))
        # The caches are outputs, so that nothing is thrown away.
        builder.emit(relax.Tuple([kept[i] for i in range(len(parts))]))
        return turned[0]

    def program(body: Callable[[relax.BlockBuilder], relax.Expr]) -> Any:
        def emit(builder: relax.BlockBuilder) -> None:
            with builder.function("main", [x, *angles, *weights, past, *parts]):
                with builder.dataflow():
                    result = builder.emit_output(body(builder))
                builder.emit_func_output(result)

        return compiled(emit, mcpu)

    programs = [program(body) for body in (together, apart)]
    gains = rng.standard_normal((2, dim), np.float32)
    for s, before in ((1, 0), (1, 200), (33, 7)):
        row = rng.standard_normal((2, s, width), np.float32)
        angle = rng.standard_normal((2, s, half))
        turns = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
        found = []
        for run in programs:
            kept = [
                tvm.runtime.tensor(np.zeros((2, kv_heads, LONGEST, columns), dtype))
                for dtype, columns in caches.parts(dim)
            ]
            y = run(row, *turns, *gains, np.array([before]), *kept)
            found.append([y.numpy(), *(part.numpy() for part in kept)])
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
        assert all(part[:, :, before : before + s].any() for part in found[0][1:])
