"""CUDA attention, rotary and norms, serially on this CPU and on a GPU, against float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mxcompile.caches import decode
from mxcompile.targets.cpu_attention import Attention, Mask, Rotation
from mxcompile.targets.cpu_norm import Columns, Runs
from mxcompile.targets.cuda_norm import CudaNorm
from tests import test_cpu_attention
from tests.cuda import Reading, readings
from tests.test_cpu_attention import LONGEST, Kept, formats, reference, split
from tests.test_cpu_norm import EPS, exact_layer_norm, exact_rms_norm, exact_softmax

Array = NDArray[Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=readings(), ids=str)
def reading(request: pytest.FixtureRequest) -> Reading:
    return request.param  # type: ignore[no-any-return]


class Built:
    """A kernel that is built once; what it must write is NaN before."""

    def __init__(self, reading: Reading, kernel: Any) -> None:
        self._main, self._tensor = reading.build({"main": kernel})["main"], reading.tensor

    def __call__(self, inputs: list[Any], *shapes: tuple[int, ...]) -> Array:
        """Call it; the first of the tensors that it writes is the result."""
        written = [self._tensor(np.full(shape, np.nan, np.float32)) for shape in shapes]
        self._main(*(self._tensor(x) if isinstance(x, np.ndarray) else x for x in inputs), *written)
        return np.asarray(written[0].numpy())


SHARED = ("windowed", "bytes", "nibbles", "nibbles and floats")
CASES = {name: test_cpu_attention.CASES[name] for name in SHARED} | {
    "grouped": (Attention(4, 2, 16, 0.25, softcap=3.0), ("fp32", "fp32")),
    "odd, from one buffer": (
        Attention(
            6, 2, 20, 0.2, q=Columns(230, 10), k=Columns(230, 130), v=Columns(230, 170), window=33
        ),
        ("fp16", "fp32"),
    ),
    "bytes and nibbles, from one buffer": (
        Attention(3, 1, 96, 0.1, q=Columns(492, 8), k=Columns(492, 298), v=Columns(492, 395)),
        ("int8", "int4"),
    ),
    "many heads": (Attention(9, 1, 256, 0.06, softcap=9.0), ("fp16", "int4")),
}


@pytest.mark.parametrize("case", CASES)
def test_cached_attention_matches_float64(
    reading: Reading, case: str, rng: np.random.Generator
) -> None:
    a, names = CASES[case]
    caches = formats(*names)
    attend, batch = Built(reading, reading.attention.attend(a, caches)), 2
    write = reading.build({"main": reading.attention.append(a, caches)})["main"]
    for seq, past in ((1, 0), (1, 9), (1, 260), (3, 7), (50, 0), (37, 100)):
        shape = (batch, a.kv_heads, LONGEST, a.dim)
        keys, values = (Kept(rng.standard_normal(shape, np.float32), past, n) for n in names)
        places = ((a.q, a.heads), (a.k, a.kv_heads), (a.v, a.kv_heads))
        inputs = [
            rng.standard_normal((batch, seq, place.width if place else heads * a.dim), np.float32)
            for place, heads in places
        ]
        if a.q:
            inputs[1:] = [inputs[0]] * 2
        offsets = [(place.offset if place else 0, heads * a.dim) for place, heads in places]
        q, k, v = (x[..., o : o + n] for x, (o, n) in zip(inputs, offsets, strict=True))
        parts = [reading.tensor(c) for c in (*keys.parts, *values.parts)]
        at = reading.tensor(np.array([past]))
        write(*map(reading.tensor, inputs[1:]), at, *parts)
        for cache, new in zip((keys, values), (k, v), strict=True):
            cache.append(split(new, a.kv_heads), past)
        for found, part in zip(parts, (*keys.parts, *values.parts), strict=True):
            np.testing.assert_array_equal(found.numpy(), part)
        scratch = [(batch, *shape) for shape in reading.attention.scratch(a)]
        out = attend([inputs[0], at, *parts], (batch, seq, a.heads * a.dim), *scratch)
        want, bound = reference(a, q, keys.rows(past + seq), values.rows(past + seq), past)
        np.testing.assert_allclose(out, want, atol=bound, rtol=0, err_msg=f"{seq} {past}")


@pytest.mark.parametrize(
    "mask",
    [None, Mask(), Mask("bool", per_query=True), Mask(per_head=True, per_query=True)],
    ids=str,
)
def test_attend_all_matches_float64(
    reading: Reading, mask: Mask | None, rng: np.random.Generator
) -> None:
    a = Attention(4, 2, 32, 0.2, causal=False, k=Columns(100, 30))
    built = Built(reading, reading.attention.attend_all(a, mask))
    for s, t in ((1, 1), (5, 70), (60, 131)):
        q = rng.standard_normal((2, s, 128), np.float32)
        k = rng.standard_normal((2, t, 100), np.float32)
        v = rng.standard_normal((2, t, 64), np.float32)
        inputs: list[Array] = [q, k, v]
        bias = None
        if mask:
            shape = (2, a.heads if mask.per_head else 1, s if mask.per_query else 1, t)
            keep = rng.random(shape) < 0.7
            keep[..., 0] = True
            bias = np.where(keep, rng.standard_normal(shape), -np.inf).astype(np.float32)
            if mask.dtype == "bool":
                bias = np.where(keep, np.float32(0), np.float32(-np.inf))
            inputs.append(keep if mask.dtype == "bool" else bias)
        want, bound = reference(a, q, split(k[..., 30:94], 2), split(v, 2), 0, bias)
        np.testing.assert_allclose(built(inputs, (2, s, 128)), want, atol=bound, rtol=0)


@pytest.mark.parametrize(("dim", "rotated"), [(64, 0), (20, 10)])
def test_rotary_matches_definition(
    reading: Reading, dim: int, rotated: int, rng: np.random.Generator
) -> None:
    heads, half, s = 3, (rotated or dim) // 2, 7
    width = heads * dim + 12
    x = rng.standard_normal((2, s, width), np.float32)
    angle = rng.standard_normal((2, s, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    rows = x[..., 5 : 5 + heads * dim].reshape(2, s, heads, dim).astype(np.float64)
    low, high, rest = np.split(rows, [half, 2 * half], axis=-1)
    c, n = cos[:, :, None], sin[:, :, None]
    want = np.concatenate([low * c - high * n, high * c + low * n, rest], axis=-1)
    kernel = reading.attention.rotary(heads, dim, rotated, Columns(width, 5))
    got = Built(reading, kernel)([x, cos, sin], (2, s, heads * dim)).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=3 * 2.0**-24 * np.abs(x).max())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("names", "dim", "rotated"),
    [
        (("fp16", "int8"), 64, 0),
        (("int4", "fp32"), 96, 32),
        (("int8", "int4"), 256, 0),
        (("fp32", "fp16"), 20, 10),
    ],
)
def test_rotate_is_what_separate_kernels_do(
    reading: Reading,
    normed: bool,
    names: tuple[str, str],
    dim: int,
    rotated: int,
    rng: np.random.Generator,
) -> None:
    heads, kv_heads, half, made = 4, 2, (rotated or dim) // 2, reading.attention
    width = (heads + 2 * kv_heads) * dim + 3
    q_at, k_at, v_at = (
        Columns(width, start) for start in (1, 1 + heads * dim, 2 + (heads + kv_heads) * dim)
    )
    caches, alone = formats(*names), Attention(heads, kv_heads, dim, 1.0, v=v_at)
    rotation = Rotation(rotated, EPS if normed else None)
    together = Built(reading, made.rotate(replace(alone, q=q_at, k=k_at), caches, rotation))
    sides = [(q_at, heads), (k_at, kv_heads)]
    norms = [Built(reading, reading.norm.rms_norm(Runs(dim, n, 3, at), EPS)) for at, n in sides]
    turns = [
        Built(reading, made.rotary(n, dim, rotated, Columns(n * dim) if normed else at))
        for at, n in sides
    ]
    write = reading.build({"main": made.append(alone, caches)})["main"]
    gains = list(rng.standard_normal((2, dim), np.float32))
    for batch, seq, past in ((2, 1, 0), (1, 1, 200), (2, 33, 7)):
        x = rng.standard_normal((batch, seq, width), np.float32)
        angle = rng.standard_normal((batch, seq, half))
        angles = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
        both = [
            [
                reading.tensor(np.zeros((batch, kv_heads, LONGEST, columns), dtype))
                for dtype, columns in caches.parts(dim)
            ]
            for _ in range(2)
        ]
        at = np.array([past])
        flat = [(batch, seq, n * dim) for _, n in sides]
        y = together([x, x, x, *angles, *gains[: 2 * normed], at, *both[0]], flat[0])
        rows = [
            norm([x, gain], shape) if normed else x
            for norm, gain, shape in zip(norms, gains, flat, strict=True)
        ]
        q, k = (
            turn([row, *angles], shape) for turn, row, shape in zip(turns, rows, flat, strict=True)
        )
        write(*map(reading.tensor, (k, x, at)), *both[1])
        # A GPU may fuse other products with other sums; on this CPU nothing differs.
        bound = 2.0**-20 * float(np.abs(q).max()) if reading.arch else 0.0
        np.testing.assert_allclose(y, q, rtol=0, atol=bound)
        written = [[part.numpy()[:, :, past : past + seq] for part in parts] for parts in both]
        count = len(caches.key.parts(dim))
        for fmt, where in ((caches.key, slice(count)), (caches.value, slice(count, None))):
            one, other = (decode(parts[where], fmt) for parts in written)
            # A step between codes and a bit more for another scale, or a rounding of a float16.
            step = np.abs(written[1][where][-1]).max() * (1 if fmt.scaled else 2.0**-10)
            bound = 1.1 * float(step) if reading.arch else 0.0
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)
            assert other.any()
        for part in both[0]:
            assert not part.numpy()[:, :, :past].any()
            assert not part.numpy()[:, :, past + seq :].any()


NEW_CASES = {
    "gemma": (
        Attention(
            4,
            1,
            256,
            0.06,
            window=40,
            q=Columns(1540, 1),
            k=Columns(1540, 1026),
            v=Columns(1540, 1283),
        ),
        ("int8", "int8"),
        Rotation(0, EPS),
    ),
    "halves": (Attention(4, 2, 64, 0.125), ("fp16", "fp16"), Rotation()),
    "nibbles, of a part": (
        Attention(8, 2, 96, 0.1, window=33),
        ("int4", "int8"),
        Rotation(32, EPS),
    ),
    "odd, capped": (Attention(6, 2, 20, 0.2, softcap=3.0), ("fp32", "fp16"), Rotation(10, EPS)),
    "chunks": (Attention(9, 1, 256, 0.06, softcap=9.0), ("fp16", "int4"), Rotation(0, EPS)),
    "many small heads": (Attention(40, 2, 64, 0.1, window=1), ("fp32", "fp32"), Rotation(16)),
}


@pytest.mark.parametrize("case", NEW_CASES)
def test_attend_new_is_rotate_and_attend(
    reading: Reading, case: str, rng: np.random.Generator
) -> None:
    a, names, rotation = NEW_CASES[case]
    caches, made = formats(*names), reading.attention
    together = Built(reading, made.attend_new(a, caches, rotation))
    rotate = Built(reading, made.rotate(a, caches, rotation))
    attend = Built(reading, made.attend(replace(a, q=None), caches))
    gains = list(rng.standard_normal((2, a.dim), np.float32)) if rotation.eps is not None else []
    half, count = (rotation.rotated or a.dim) // 2, len(caches.key.parts(a.dim))
    # Blocks have 16 keys each to begin with: the new one is the first, the last, and past those.
    for batch, past in ((1, 0), (2, 15), (1, 16), (2, 31), (1, 33), (2, 200), (1, LONGEST - 1)):
        shape = (batch, a.kv_heads, LONGEST, a.dim)
        keys, values = (Kept(rng.standard_normal(shape, np.float32), past, n) for n in names)
        angle = rng.standard_normal((batch, 1, half))
        angles = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
        sides = ((a.q, a.heads), (a.k, a.kv_heads), (a.v, a.kv_heads))
        rows = [
            rng.standard_normal((batch, 1, place.width if place else n * a.dim), np.float32)
            for place, n in sides
        ]
        if a.q:
            rows = rows[:1] * 3
        both = [[reading.tensor(p) for p in (*keys.parts, *values.parts)] for _ in range(2)]
        at, flat = np.array([past]), (batch, 1, a.heads * a.dim)
        scratch = [(batch, *shape) for shape in made.scratch(a)]
        inputs = [*rows, *angles, *gains, at]
        out = together([*inputs, *both[0]], flat, *scratch)
        q = rotate([*inputs, *both[1]], flat)
        want = attend([q, at, *both[1]], flat, *scratch)
        parts = [[part.numpy() for part in found] for found in both]
        for fmt, where in ((caches.key, slice(count)), (caches.value, slice(count, None))):
            one, other = (decode([p[:, :, past] for p in x[where]], fmt) for x in parts)
            # On this CPU nothing differs; on a GPU as much as in the test above.
            step = np.abs(parts[1][where][-1][:, :, past]).max() * (1 if fmt.scaled else 2.0**-10)
            bound = 1.1 * float(step) if reading.arch else 0.0
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)
        for one, other in zip(*parts, strict=True):
            rest = np.arange(LONGEST) != past
            np.testing.assert_array_equal(one[:, :, rest], other[:, :, rest])
        for found, x in zip((out, want), parts, strict=True):
            seen_keys, seen_values = (
                decode([p[:, :, : past + 1] for p in x[where]], fmt)
                for fmt, where in ((caches.key, slice(count)), (caches.value, slice(count, None)))
            )
            exact, bound = reference(a, q, seen_keys, seen_values, past)
            np.testing.assert_allclose(found, exact, rtol=0, atol=bound, err_msg=f"{past}")


NORMS: dict[str, tuple[Callable[[CudaNorm, Runs], Any], Callable[..., Array], int]] = {
    "rms-norm": (lambda norm, runs: norm.rms_norm(runs, EPS), exact_rms_norm, 1),
    "layer-norm": (lambda norm, runs: norm.layer_norm(runs, EPS), exact_layer_norm, 2),
    "softmax": (CudaNorm.softmax, exact_softmax, 0),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("size", "symbolic"), [(7, False), (300, False), (300, True)])
def test_norms_match_float64(
    reading: Reading, name: str, size: int, symbolic: bool, rng: np.random.Generator
) -> None:
    make, exact, weights = NORMS[name]
    x = rng.standard_normal((3, 5, 2 * size + 9), np.float32) + np.float32(0.5)
    others = [rng.standard_normal(size, np.float32) for _ in range(weights)]
    if symbolic:
        x = np.ascontiguousarray(x[..., :size])
        parts, runs = x[:, :, None], Runs(0)
    else:
        parts = x[..., 4 : 4 + 2 * size].reshape(3, 5, 2, size)
        runs = Runs(size, 2, 3, Columns(2 * size + 9, 4))
    want = exact(*(v.astype(np.float64) for v in (parts, *others)))
    got = Built(reading, make(reading.norm, runs))([x, *others], (3, 5, want.size // 15)).reshape(
        want.shape
    )
    # Threads add up size / 128 terms, then 128 of them; some roundings of values of this magnitude.
    bound = (size / 128 + 32) * 2.0**-24 * float(np.abs(want).max() + 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
