"""Attention over a caller-owned cache, attention without one, and rotary embedding, for CPUs.

Two ways to walk the keys share all conventions. ``_stream`` serves decoding: the query heads of one
position that share a key head meet each key once, straight from the cache. ``_tile`` serves
prefill: a block of query rows meets a block of transposed keys, as a matrix product. Both keep a
running maximum and sum per row (online softmax), so memory does not grow with the context.

Operands come row-major as matmuls leave them, (batch, seq, columns), and may be columns of a wider
buffer. A cache is one tensor (batch, kv head, max, dim), or codes and scales of that form where it
is quantized; each is read as it is, and rows become float32 in registers. Beyond ``past + seq`` a
cache is neither read nor written. Paged caches and ragged batches are left out: an edge device
serves one sequence, and a batch advances in step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import GROUP, LEAST_SCALE, CacheFormat
from mxcompile.targets.cpu_norm import (
    LOWEST,
    SERIAL_FLOATS,
    Columns,
    Simd,
    build,
    exp,
    fold,
    hold,
    int64,
    load,
    param,
    prefetch,
    reader,
    registers,
    rms_factor,
    scaled,
    scratch,
    splat,
    spread,
    store,
    sweep,
    symbol,
    tanh,
    unravel,
)

_LINE = 64  # bytes of a cache line
_SPAN = 128  # keys whose scores _stream holds at a time
_ROWS = 48  # query rows that _tile holds, about
_KEYS = 64  # keys that _tile holds
_HEIGHT = 6  # rows of _tile that share the registers; with 4 or 2 vectors they fill three quarters
_SPLIT = 64  # fewer keys than this are not worth a thread of their own
_SERIAL_MACS = 1 << 17  # less work than this is not worth a thread launch


@dataclass(frozen=True, slots=True)
class Attention:
    """``out = softmax(scale * q k^T + mask) v``, ``heads / kv_heads`` query heads for each kv head.

    A causal query sees the keys up to its own position, and of those the last ``window`` if that
    is not 0. ``softcap`` c, if not 0, replaces a score s by ``c * tanh(s / c)``. ``q``, ``k`` and
    ``v`` say where the operands lie; by default each in a buffer of its own.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    q: Columns | None = None
    k: Columns | None = None
    v: Columns | None = None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Caches:
    """The formats of a layer's cached keys and values; a kernel takes the parts of both, in order.

    A part is a tensor (batch, kv head, max, columns).
    """

    key: CacheFormat
    value: CacheFormat

    def parts(self, dim: int) -> list[tuple[str, int]]:
        """The type and columns of every part, keys first."""
        return [*self.key.parts(dim), *self.value.parts(dim)]

    def declare(self, a: Attention, batch: Expr, longest: Expr) -> tuple[list[Any], list[Any]]:
        """Declare the next parameters of a kernel: the parts of keys and of values."""
        found = []
        for kind, fmt in (("keys", self.key), ("values", self.value)):
            names = (kind, f"{kind}_scales")
            found.append(
                [
                    param(name, (batch, a.kv_heads, longest, columns), dtype)
                    for name, (dtype, columns) in zip(names, fmt.parts(a.dim), strict=False)
                ]
            )
        return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What is done to the heads of queries and keys before they meet.

    The first ``rotated`` columns (0: all) are turned by their position's angles, after an RMS norm
    over the columns of a head if ``eps`` is a number.
    """

    rotated: int = 0
    eps: float | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask (batch, heads or 1, queries or 1, keys): float32 is added, bool true keeps a key."""

    dtype: str = "float32"
    per_head: bool = False
    per_query: bool = False


Read = Callable[[int | Expr, int], Expr]
"""Load float32 from (column, lanes) of some row."""
Write = Callable[[int | Expr, Expr], None]
"""Store a vector to a column and after of some row."""
Blocks = Callable[[Expr, Expr], Callable[[Expr], Read]]
"""Prepare to read (first, count) neighbouring rows, at most ``_SPAN``, by number in the block."""
Ask = Callable[[Expr, Expr | int, int], None]
"""Ask memory for a part (which, of how many) of a row that will be read soon."""


def _nothing(j: Expr, part: Expr | int, parts: int) -> None:
    """Ask for nothing."""


@dataclass(frozen=True, slots=True)
class _Head:
    """One kv head of one sequence: where its rows come from and go to.

    ``query`` and ``put`` take a position and a member of the group; ``bias`` gives
    their mask by key. Query position i stands at key position ``past + i``. Values that are
    ``coded`` are worth decoding once for many rows. ``ask_key`` and ``ask_value`` take positions of
    keys; they do nothing where rows do not come from memory.
    """

    query: Callable[[Expr, Expr | int], Read]
    key: Blocks
    value: Blocks
    put: Callable[[Expr, Expr | int], Write]
    bias: Callable[[Expr, Expr], Callable[[Expr], Expr]] | None
    past: Expr
    keys: Expr
    coded: bool = False
    ask_key: Ask = _nothing
    ask_value: Ask = _nothing


# --- kernels ---


def append(attention: Attention, caches: Caches, simd: Simd) -> tirx.PrimFunc:
    """Make ``(k, v, past, *keys, *values)``: write k and v to the caches at ``past`` and after."""
    a = attention

    def body() -> None:
        batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
        k = param("k", (batch, seq, _columns(a.k, a.kv_heads, a.dim).width))
        v = param("v", (batch, seq, _columns(a.v, a.kv_heads, a.dim).width))
        past = param("past", (1,), "int64")
        keys, values = caches.declare(a, batch, longest)

        def one(index: Expr) -> None:
            b, i, h = unravel(index, [batch, seq, int64(a.kv_heads)])
            place = (b, h, hold(past[0] + i))
            for new, at, fmt, parts in ((k, a.k, caches.key, keys), (v, a.v, caches.value, values)):
                _write_row(a.dim, fmt, _rows(new, b, at, h, a.dim)(i, 0), parts, place, simd)

        with T.sblock("root"):
            count = batch * seq * a.kv_heads
            spread(count, count * (2 * a.dim) < SERIAL_FLOATS, one)

    return build(body)


def rotate(attention: Attention, caches: Caches, rotation: Rotation, simd: Simd) -> tirx.PrimFunc:
    """Make ``(q, k, v, cos, sin, [q_weight, k_weight,] past, *keys, *values, y)``.

    What ``rotary`` makes of q goes to y (batch, seq, heads * dim), and what it makes of k to the
    cache, with v, as ``append`` writes them; both are normalized first if the rotation says so.
    """
    a, half = attention, (rotation.rotated or attention.dim) // 2

    def body() -> None:
        batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
        q = param("q", (batch, seq, _columns(a.q, a.heads, a.dim).width))
        k = param("k", (batch, seq, _columns(a.k, a.kv_heads, a.dim).width))
        v = param("v", (batch, seq, _columns(a.v, a.kv_heads, a.dim).width))
        cos, sin = (param(name, (batch, seq, half)) for name in ("cos", "sin"))
        weights: list[Any] = [None, None]
        if rotation.eps is not None:
            weights = [param(name, (a.dim,)) for name in ("q_weight", "k_weight")]
        past = param("past", (1,), "int64")
        keys, values = caches.declare(a, batch, longest)
        y = param("y", (batch, seq, a.heads * a.dim))

        def turned(b: Expr, i: Expr, read: Read, weight: Any, write: Write) -> None:
            if rotation.eps is not None:
                factor = rms_factor(read, a.dim, rotation.eps, simd)
                read = scaled(read, factor, weight)
            _turn(a.dim, half, read, [reader(angles, b, i) for angles in (cos, sin)], write, simd)

        def one(index: Expr) -> None:
            b, i, h = unravel(index, [batch, seq, int64(a.heads + a.kv_heads)])
            with T.If(h < a.heads):
                with T.Then():
                    read, write = _rows(q, b, a.q, h, a.dim)(i, 0), _writer(y, b, h, a.dim)(i, 0)
                    turned(b, i, read, weights[0], write)
                with T.Else():
                    head = hold(h - a.heads)
                    place, row = (b, head, hold(past[0] + i)), scratch(a.dim)
                    read = _rows(k, b, a.k, head, a.dim)(i, 0)
                    turned(b, i, read, weights[1], lambda c, value: store(row, value, c))
                    _write_row(a.dim, caches.key, reader(row), keys, place, simd)
                    read = _rows(v, b, a.v, head, a.dim)(i, 0)
                    _write_row(a.dim, caches.value, read, values, place, simd)

        with T.sblock("root"):
            count = batch * seq * (a.heads + a.kv_heads)
            spread(count, count * a.dim < SERIAL_FLOATS, one)

    return build(body)


def _write_row(
    dim: int, fmt: CacheFormat, read: Read, parts: list[Any], place: Sequence[Expr], simd: Simd
) -> None:
    """Write a row to a place of a cache."""
    if fmt.scaled:
        _encode(dim, fmt, read, parts, place, simd)
    else:
        _copy(dim, read, parts[0], place, simd)


def _copy(dim: int, read: Read, cache: Any, place: Sequence[Expr], simd: Simd) -> None:
    """Write a row to a place of a float cache."""

    def copy(c: int | Expr, lanes: int, _: int) -> None:
        store(cache, _cast(read(c, lanes), cache.dtype), *place, c)

    sweep(dim, simd, copy)


def _encode(
    dim: int, fmt: CacheFormat, read: Read, parts: list[Any], place: Sequence[Expr], simd: Simd
) -> None:
    """Write a row to a place of a quantized cache, as ``mxcompile.caches.encode`` says."""
    codes, scales = parts
    lanes, half = simd.lanes, GROUP // 2
    low, high = splat(float(fmt.lowest), lanes), splat(float(-fmt.lowest - 1), lanes)

    with T.serial(int64(0), int64(dim // GROUP)) as g:
        group = [hold(read(g * GROUP + c, lanes)) for c in range(0, GROUP, lanes)]
        top, bottom = group[0], group[0]
        for vector in group[1:]:
            top, bottom = hold(T.max(top, vector)), hold(T.min(bottom, vector))
        most, least = fold(top, T.max), fold(bottom, T.min)
        peak = T.Select(most > -least, most, least)
        scale = hold(T.Cast("float16", peak / T.float32(fmt.lowest)))
        scale = hold(T.Select(scale == T.float16(0), T.float16(LEAST_SCALE), scale))
        store(scales, scale, *place, g)
        step = hold(T.Broadcast(T.Cast("float32", scale), lanes))

        def code(vector: Expr) -> Expr:
            rounded = T.max(T.min(T.nearbyint(vector / step), high), low)
            return T.Cast(f"int32x{lanes}", rounded)

        if fmt.bits == 8:
            for c, vector in zip(range(0, GROUP, lanes), group, strict=True):
                store(codes, _cast(code(vector), codes.dtype), *place, g * GROUP + c)
            return
        pairs = zip(group[: half // lanes], group[half // lanes :], strict=True)
        for c, (first, second) in zip(range(0, half, lanes), pairs, strict=True):
            nibbles = T.bitwise_or(
                code(first) & 15, T.shift_left(code(second) & 15, _ints(4, lanes))
            )
            store(codes, _cast(nibbles, codes.dtype), *place, g * half + c)


def attend(attention: Attention, caches: Caches, simd: Simd) -> tirx.PrimFunc:
    """Make ``(q, past, *keys, *values, out)``: attend to caches that hold the own keys too."""
    a = attention

    def body() -> None:
        batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
        q = param("q", (batch, seq, _columns(a.q, a.heads, a.dim).width))
        past = param("past", (1,), "int64")
        keys, values = caches.declare(a, batch, longest)
        out = param("out", (batch, seq, a.heads * a.dim))

        def head(b: Expr, h: Expr) -> _Head:
            return _Head(
                query=_rows(q, b, a.q, h * a.group, a.dim),
                key=_cached(caches.key, keys, b, h),
                value=_cached(caches.value, values, b, h),
                put=_writer(out, b, h * a.group, a.dim),
                bias=None,
                past=hold(past[0]),
                keys=hold(past[0] + seq),
                coded=caches.value.scaled,
                ask_key=_asker(keys[0], b, h),
                ask_value=_asker(values[0], b, h),
            )

        with T.sblock("root"):
            total = past[0] + seq
            with T.If(T.Or(seq == 1, seq * a.group < _HEIGHT)):
                with T.Then():
                    _decode(a, simd, batch, seq, total, head)
                with T.Else():
                    _prefill(a, simd, batch, seq, total, head)

    return build(body)


def attend_all(attention: Attention, mask: Mask | None, simd: Simd) -> tirx.PrimFunc:
    """Make ``(q, k, v, [mask,] out)``: attend to all of k and v, which are not cached."""
    a = attention

    def body() -> None:
        batch, seq, total = symbol("batch"), symbol("seq"), symbol("total")
        q = param("q", (batch, seq, _columns(a.q, a.heads, a.dim).width))
        k = param("k", (batch, total, _columns(a.k, a.kv_heads, a.dim).width))
        v = param("v", (batch, total, _columns(a.v, a.kv_heads, a.dim).width))
        if mask:
            heads, queries = a.heads if mask.per_head else 1, seq if mask.per_query else 1
            weights = param("mask", (batch, heads, queries, total), mask.dtype)
        out = param("out", (batch, seq, a.heads * a.dim))

        def head(b: Expr, h: Expr) -> _Head:
            key, value = (_rows(s, b, at, h, a.dim) for s, at in ((k, a.k), (v, a.v)))

            def bias(i: Expr, g: Expr) -> Callable[[Expr], Expr]:
                at = h * a.group + g if mask and mask.per_head else int64(0)
                row = i if mask and mask.per_query else int64(0)
                if mask and mask.dtype == "bool":
                    hidden = T.float32(LOWEST / 2)
                    return lambda j: T.Select(weights[b, at, row, j], T.float32(0.0), hidden)
                return lambda j: weights[b, at, row, j]

            return _Head(
                query=_rows(q, b, a.q, h * a.group, a.dim),
                key=lambda first, _: lambda j: key(first + j, 0),
                value=lambda first, _: lambda j: value(first + j, 0),
                put=_writer(out, b, h * a.group, a.dim),
                bias=bias if mask else None,
                past=int64(0),
                keys=total,
            )

        with T.sblock("root"):
            _prefill(a, simd, batch, seq, total, head)

    return build(body)


def rotary(heads: int, dim: int, rotated: int, source: Columns | None, simd: Simd) -> tirx.PrimFunc:
    """Make ``(x, cos, sin, y)``: turn the first ``rotated`` columns (0: all) of each head.

    As in ONNX RotaryEmbedding-23 with interleaved=0; cos and sin are (batch, seq, rotated / 2).
    """
    half = (rotated or dim) // 2

    def body() -> None:
        batch, seq = symbol("batch"), symbol("seq")
        x = param("x", (batch, seq, _columns(source, heads, dim).width))
        cos, sin = (param(name, (batch, seq, half)) for name in ("cos", "sin"))
        y = param("y", (batch, seq, heads * dim))

        def one(index: Expr) -> None:
            b, i, h = unravel(index, [batch, seq, int64(heads)])
            angles = [reader(each, b, i) for each in (cos, sin)]
            read, write = _rows(x, b, source, h, dim)(i, 0), _writer(y, b, h, dim)(i, 0)
            _turn(dim, half, read, angles, write, simd)

        with T.sblock("root"):
            count = batch * seq * heads
            spread(count, count * dim < SERIAL_FLOATS, one)

    return build(body)


def _turn(
    dim: int, half: int, read: Read, angles: Sequence[Read], write: Write, simd: Simd
) -> None:
    """Turn the columns c and c + half of a row by the c-th angle, given as cosine and sine."""

    def turn(c: int | Expr, lanes: int, _: int) -> None:
        low, high = (hold(read(c + o, lanes)) for o in (0, half))
        turn_c, turn_s = (hold(angle(c, lanes)) for angle in angles)
        write(c, low * turn_c - high * turn_s)
        write(half + c, high * turn_c + low * turn_s)

    def keep(c: int | Expr, lanes: int, _: int) -> None:
        write(2 * half + c, read(c + 2 * half, lanes))

    sweep(half, simd, turn, unroll=1)
    sweep(dim - 2 * half, simd, keep)


# --- operands ---


def _columns(place: Columns | None, heads: int, dim: int) -> Columns:
    return place or Columns(heads * dim)


def _rows(
    buffer: Any, b: Expr, place: Columns | None, first: Expr, dim: int
) -> Callable[[Expr, Expr | int], Read]:
    """Read (batch, seq, columns) by position, head (counted from ``first``) and column in it."""
    offset = place.offset if place else 0
    return lambda i, g: lambda c, n: load(buffer, b, i, (first + g) * dim + offset + c, lanes=n)


def _writer(buffer: Any, b: Expr, first: Expr, dim: int) -> Callable[[Expr, Expr | int], Write]:
    return lambda i, g: lambda c, value: store(buffer, value, b, i, (first + g) * dim + c)


def _plain(buffer: Any, place: tuple[Expr, ...], first: int | Expr = 0) -> Callable[[Expr], Read]:
    """Read the floats of rows from ``first`` on."""
    return lambda j: lambda c, n: _cast(load(buffer, *place, first + j, c, lanes=n), "float32")


def _cached(fmt: CacheFormat, parts: list[Any], b: Expr, h: Expr) -> Blocks:
    """Read a cache (batch, head, max, dim); a block's scales are made float32 beforehand."""
    codes = parts[0]
    if not fmt.scaled:
        return lambda first, _: _plain(codes, (b, h), first)

    def block(first: Expr, count: Expr) -> Callable[[Expr], Read]:
        scales = scratch(_SPAN, int(parts[1].shape[-1]))
        with T.serial(int64(0), count) as j:
            _widen(parts[1], (b, h, first + j), scales, j)

        def read(j: Expr, c: Expr, n: int) -> Expr:
            step = T.Broadcast(load(scales, j, T.floordiv(c, GROUP), lanes=1), n)
            if fmt.bits == 8:
                return _cast(load(codes, b, h, first + j, c, lanes=n), "float32") * step
            # The nibble goes to the top of 32 bits and back down with its sign.
            half = GROUP // 2
            at = T.floordiv(c, GROUP) * half + T.floormod(c, half)
            up = 28 - T.floordiv(T.floormod(c, GROUP), half) * 4
            word = _cast(load(codes, b, h, first + j, at, lanes=n), "int32")
            word = T.shift_left(word, T.Broadcast(T.Cast("int32", up), n))
            return T.Cast(f"float32x{n}", T.shift_right(word, _ints(28, n))) * step

        return lambda j: lambda c, n: read(j, int64(c), n)

    return block


def _asker(codes: Any, b: Expr, h: Expr) -> Ask:
    """Ask for rows of a cache (batch, head, max, columns); scales are small and found in time."""
    columns = int(codes.shape[-1])
    line = _LINE // np.dtype(codes.dtype).itemsize

    def ask(j: Expr, part: Expr | int, parts: int) -> None:
        width = -(-columns // parts)
        for c in range(0, width, line):
            prefetch(codes, b, h, j, part * width + c)

    return ask


def _widen(narrow: Any, place: tuple[Expr, ...], wide: Any, row: Expr) -> None:
    """Write a row of scales as float32, in vectors as wide as they come."""
    count, at = int(narrow.shape[-1]), 0
    while at < count:
        lanes = min(1 << (count - at).bit_length() - 1, 16)
        store(wide, _cast(load(narrow, *place, at, lanes=lanes), "float32"), row, at)
        at += lanes


def _ints(value: int, lanes: int) -> Expr:
    return T.Broadcast(T.int32(value), lanes)


def _cast(value: Expr, dtype: str) -> Expr:
    lanes = value.ty.dtype.lanes
    return T.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def _chunks(dim: int, lanes: int) -> list[tuple[int, int]]:
    """Cut a head into vectors: (first column, columns); only the last may be short."""
    return [(c, min(lanes, dim - c)) for c in range(0, dim, lanes)]


def _padded_dim(a: Attention, simd: Simd) -> int:
    return -(-a.dim // simd.lanes) * simd.lanes


def _padded(read: Read, chunk: tuple[Any, int], lanes: int) -> Expr:
    """Load a chunk as a whole vector, zeros after a short one."""
    start, width = chunk
    if width == lanes:
        return hold(read(start, lanes))
    parts = [read(start + i, 1) for i in range(width)] + [T.float32(0.0)] * (lanes - width)
    return hold(T.Shuffle(parts, list(range(lanes))))


def _put(write: Write, chunk: tuple[int, int], value: Expr) -> None:
    """Store the columns of a chunk that exist."""
    start, width = chunk
    if width == value.ty.dtype.lanes:
        write(start, value)
        return
    value = hold(value)
    for i in range(width):
        write(start + i, T.Shuffle([value], [i]))


# --- vectors ---


def _sums(vectors: list[Expr]) -> Expr:
    """Sum each of as many vectors as they have lanes; lane i of the result is the i-th sum.

    Each level adds the even and odd parts of two vectors: first single lanes within 128 bits, which
    is one shufps (x86) or uzp (ARM) each, then blocks of 128 bits.
    """
    lanes = len(vectors)
    while len(vectors) > 1:
        even, odd = _deal(lanes, 1 if len(vectors) > lanes // 4 else 4)
        vectors = [
            hold(T.Shuffle([a, b], even) + T.Shuffle([a, b], odd))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _deal(lanes: int, unit: int) -> tuple[list[int], list[int]]:
    """List the even and the odd units of two vectors, for units of 1 within each 128 bits."""
    span = 4 if unit == 1 else lanes
    picks: tuple[list[int], list[int]] = ([], [])
    for odd in (0, 1):
        for base in range(0, lanes, span):
            for vector in (0, lanes):
                for u in range(odd * unit, span, 2 * unit):
                    picks[odd].extend(range(vector + base + u, vector + base + u + unit))
    return picks


def _transpose(rows: list[Expr]) -> list[Expr]:
    """Transpose a square of vectors by swapping off-diagonal blocks of 1, 2, 4... lanes."""
    lanes = len(rows)
    size = 1
    while size < lanes:
        blocks = range(0, lanes, 2 * size)
        picks = [
            [v + b + half + i for b in blocks for v in (0, lanes) for i in range(size)]
            for half in (0, size)
        ]
        for i in range(lanes):
            if not i & size:
                pair = [rows[i], rows[i + size]]
                rows[i], rows[i + size] = (hold(T.Shuffle(pair, pick)) for pick in picks)
        size *= 2
    return rows


# --- rows of queries, with an online softmax ---


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of queries, their scores against a block of keys, and their output so far."""

    attention: Attention
    simd: Simd
    query: Any
    scores: Any
    out: Any
    peak: Any
    total: Any
    decay: Any

    @staticmethod
    def allocate(a: Attention, simd: Simd, rows: int, keys: int) -> "_Rows":
        """Make room for so many rows and keys."""
        width = _padded_dim(a, simd)
        wide = scratch(rows, width), scratch(rows, keys), scratch(rows, width)
        return _Rows(a, simd, *wide, *(scratch(rows) for _ in range(3)))

    def start(self, r: Expr, read: Read) -> None:
        """Fill a row with its query, scaled, and an empty output."""
        lanes = self.simd.lanes
        for chunk in _chunks(self.attention.dim, lanes):
            query = _padded(read, chunk, lanes) * T.float32(self.attention.scale)
            store(self.query, query, r, chunk[0])
            store(self.out, splat(0.0, lanes), r, chunk[0])
        store(self.peak, T.float32(LOWEST), r)
        store(self.total, T.float32(0.0), r)

    def weigh(
        self,
        r: Expr,
        block: tuple[Expr, Expr],
        visible: tuple[Expr, Expr],
        bias: Callable[[Expr], Expr] | None,
    ) -> None:
        """Turn a row's scores against a block of keys (first, count) into weights.

        Keys outside ``visible``, which counts from the block's first, get none.
        """
        lanes = self.simd.lanes
        steps = hold(T.floordiv(block[1] + (lanes - 1), lanes))
        self._bend(r, block, steps, bias)
        low, high = (hold(T.Cast("int32", v)) for v in visible)
        (peaks,) = registers(1, lanes, LOWEST)
        with T.serial(int64(0), steps) as step:
            j = hold(T.Ramp(T.Cast("int32", step) * lanes, 1, lanes))
            seen = T.bitwise_and(j >= low, j < high)
            score = load(self.scores, r, step * lanes, lanes=lanes)
            score = hold(T.Select(seen, score, splat(LOWEST, lanes)))
            store(self.scores, score, r, step * lanes)
            store(peaks, T.max(load(peaks, 0, lanes=lanes), score), 0)
        old = hold(self.peak[r])
        new = hold(T.max(old, fold(load(peaks, 0, lanes=lanes), T.max)))
        (sums,) = registers(1, lanes)
        with T.serial(int64(0), steps) as step:
            weight = hold(exp(load(self.scores, r, step * lanes, lanes=lanes) - new))
            store(self.scores, weight, r, step * lanes)
            store(sums, load(sums, 0, lanes=lanes) + weight, 0)
        decay = hold(exp(old - new))
        store(self.decay, decay, r)
        store(self.peak, new, r)
        total = fold(load(sums, 0, lanes=lanes), lambda x, y: x + y)
        store(self.total, self.total[r] * decay + total, r)

    def _bend(
        self, r: Expr, block: tuple[Expr, Expr], steps: Expr, bias: Callable[[Expr], Expr] | None
    ) -> None:
        """Apply the soft cap and the mask to a row's scores."""
        lanes, cap = self.simd.lanes, self.attention.softcap
        if cap:
            with T.serial(int64(0), steps) as step:
                score = load(self.scores, r, step * lanes, lanes=lanes) * T.float32(1 / cap)
                store(self.scores, tanh(score) * T.float32(cap), r, step * lanes)
        if bias:
            start, count = block
            with T.serial(int64(0), count) as j:
                # masked is not as low as unseen: a row that is masked all over still has weights
                score = T.max(self.scores[r, j] + bias(start + j), T.float32(LOWEST / 2))
                store(self.scores, score, r, j)

    def mix(
        self,
        row: Expr,
        height: int,
        vectors: int,
        count: Expr,
        value: Callable[[Expr], Read],
        ask: Ask = _nothing,
    ) -> None:
        """Add ``count`` weighted values to neighbouring rows, so many vectors at a time.

        ``ask`` is called for as many rows, by their number, to be read afterwards.
        """
        lanes, dim = self.simd.lanes, self.attention.dim
        whole = dim // (lanes * vectors)
        rest = _chunks(dim, lanes)[whole * vectors :]
        parts = whole + bool(rest)
        if whole:
            with T.serial(int64(0), int64(whole)) as tile:
                first = hold(tile * (lanes * vectors))
                chunks = [(first + v * lanes, lanes) for v in range(vectors)]
                self._mix_tile(row, height, chunks, count, value, lambda j: ask(j, tile, parts))
        if rest:
            self._mix_tile(row, height, rest, count, value, lambda j: ask(j, whole, parts))

    def _mix_tile(
        self,
        row: Expr,
        height: int,
        chunks: Sequence[tuple[Any, int]],
        count: Expr,
        value: Callable[[Expr], Read],
        ask: Callable[[Expr], None],
    ) -> None:
        lanes = self.simd.lanes
        sums = [[scratch(lanes) for _ in chunks] for _ in range(height)]
        for r, line in enumerate(sums):
            for total, (c, _) in zip(line, chunks, strict=True):
                old = load(self.out, row + r, c, lanes=lanes)
                store(total, old * self.decay[row + r], 0)
        with T.serial(int64(0), count) as j:
            ask(j)
            read = value(j)
            columns = [_padded(read, chunk, lanes) for chunk in chunks]
            for r, line in enumerate(sums):
                weight = hold(self.scores[row + r, j])
                for total, column in zip(line, columns, strict=True):
                    store(total, load(total, 0, lanes=lanes) + column * weight, 0)
        for r, line in enumerate(sums):
            for total, (c, _) in zip(line, chunks, strict=True):
                store(self.out, load(total, 0, lanes=lanes), row + r, c)

    def finish(self, r: Expr, write: Write) -> None:
        """Divide a row by the sum of its weights and hand it out."""
        factor = hold(T.float32(1.0) / self.total[r])
        for chunk in _chunks(self.attention.dim, self.simd.lanes):
            _put(write, chunk, load(self.out, r, chunk[0], lanes=self.simd.lanes) * factor)


def _visible(a: Attention, source: _Head, i: Expr) -> tuple[Expr, Expr]:
    """Tell the first key that query position ``i`` sees, and the end."""
    if not a.causal:
        return int64(0), source.keys
    end = source.past + i + 1
    return (T.max(end - a.window, int64(0)) if a.window else int64(0)), end


def _even_parts(a: Attention, simd: Simd) -> int:
    """Tell in how many parts to cut the work of a head so that all threads get as much."""
    return simd.threads // math.gcd(a.kv_heads, simd.threads)


# --- decoding: keys come straight from the cache ---


def _decode(
    a: Attention,
    simd: Simd,
    batch: Expr,
    seq: Expr,
    total: Expr,
    head: Callable[[Expr, Expr], _Head],
) -> None:
    """Attend from each position by itself; cut the keys in parts when heads are too few."""
    lanes, even = simd.lanes, _even_parts(a, simd)
    heads = batch * seq * a.kv_heads
    reach = T.min(total, int64(a.window)) if a.window else total
    most = T.max(T.floordiv(reach, _SPLIT), int64(1))
    wanted = T.if_then_else(heads < 4 * simd.threads, T.min(int64(even), most), int64(1))
    items = T.min(heads, 4 * simd.threads) * even
    partial = scratch(items, a.group, _padded_dim(a, simd))
    peaks, totals = (scratch(items, a.group) for _ in range(2))

    def one(item: Expr) -> None:
        parts = hold(wanted)
        b, h, i, part = unravel(item, [batch, int64(a.kv_heads), seq, parts])
        source = head(b, h)
        low, high = (hold(v) for v in _visible(a, source, i))
        share = hold(T.floordiv(high - low + parts - 1, parts))
        first = hold(low + part * share)
        rows = _stream(a, simd, source, i, first, hold(T.min(first + share, high)))
        with T.If(parts == 1):
            with T.Then(), T.serial(int64(0), int64(a.group)) as g:
                rows.finish(g, source.put(i, g))
            with T.Else(), T.serial(int64(0), int64(a.group)) as g:
                store(peaks, rows.peak[g], item, g)
                store(totals, rows.total[g], item, g)
                for c, _ in _chunks(a.dim, lanes):
                    store(partial, load(rows.out, g, c, lanes=lanes), item, g, c)

    spread(heads * wanted, heads * reach * (a.group * a.dim) < _SERIAL_MACS, one)

    with T.If(wanted > 1), T.Then(), T.serial(int64(0), heads) as index:
        parts = hold(wanted)
        b, h, i = unravel(index, [batch, int64(a.kv_heads), seq])
        first, source = hold(index * parts), head(b, h)
        with T.serial(int64(0), int64(a.group)) as g:
            _merge(a, simd, (partial, peaks, totals), g, (first, parts), source.put(i, g))


def _merge(
    a: Attention,
    simd: Simd,
    partial: tuple[Any, Any, Any],
    g: Expr,
    span: tuple[Expr, Expr],
    write: Write,
) -> None:
    """Join the outputs of the parts (first, count) of a row's keys."""
    outs, peaks, totals = partial
    first, parts = span
    peak, total = (registers(1, 1, value)[0] for value in (LOWEST, 0.0))
    with T.serial(int64(0), parts) as p:
        store(peak, T.max(peak[0], peaks[first + p, g]), 0)
    with T.serial(int64(0), parts) as p:
        weight = hold(exp(peaks[first + p, g] - peak[0]))
        store(peaks, weight, first + p, g)
        store(total, total[0] + weight * totals[first + p, g], 0)
    factor = hold(T.float32(1.0) / total[0])
    for chunk in _chunks(a.dim, simd.lanes):
        (value,) = registers(1, simd.lanes)
        with T.serial(int64(0), parts) as p:
            part = load(outs, first + p, g, chunk[0], lanes=simd.lanes)
            store(value, load(value, 0, lanes=simd.lanes) + part * peaks[first + p, g], 0)
        _put(write, chunk, load(value, 0, lanes=simd.lanes) * factor)


def _stream(a: Attention, simd: Simd, source: _Head, i: Expr, first: Expr, last: Expr) -> _Rows:
    """Attend from position ``i`` to the keys from ``first`` to before ``last``.

    Keys and values take turns, a block each; while one is met, the next block of the other is
    asked for. Hardware does not foresee when one stream stops and the other goes on.
    """
    height = a.group + (a.group % 4 == 3)  # four rows cost less than two and one
    rows = _Rows.allocate(a, simd, height, _SPAN)
    with T.serial(int64(0), int64(height)) as g:
        rows.start(g, source.query(i, hold(T.min(g, a.group - 1))))
    with T.serial(int64(0), T.floordiv(last - first + (_SPAN - 1), _SPAN)) as block:
        start = hold(first + block * _SPAN)
        count = hold(T.min(last - start, int64(_SPAN)))
        key, value = source.key(start, count), source.value(start, count)

        def score(g: Expr, some: int) -> None:
            _score(key, rows, (g, some), count, lambda j: source.ask_value(start + j, 0, 1))

        def ask_key(j: Expr, part: Expr | int, parts: int) -> None:
            source.ask_key(start + _SPAN + j, part, parts)

        def mix(g: Expr, some: int) -> None:
            vectors = simd.registers // 2 // some
            rows.mix(g, some, vectors, count, value, ask_key)

        _by_fours(height, score)
        with T.serial(int64(0), int64(height)) as g:
            rows.weigh(g, (start, count), (int64(0), count), None)
        _by_fours(height, mix)
    return rows


def _by_fours(count: int, body: Callable[[Expr, int], None]) -> None:
    """Run ``body(first, rows)`` for groups of 4 rows, and of 2 and 1 for the rest."""
    if count >= 4:
        with T.serial(int64(0), int64(count // 4)) as four:
            body(hold(four * 4), 4)
    for height in (2, 1):
        if count & height:
            body(int64(count // (2 * height) * (2 * height)), height)


def _score(
    read: Callable[[Expr], Read],
    rows: _Rows,
    span: tuple[Expr, int],
    count: Expr,
    ask: Callable[[Expr], None],
) -> None:
    """Score a block of keys against some rows; the vectors run along the columns."""
    lanes, height = rows.simd.lanes, span[1]
    keys = max(rows.simd.registers // 2, lanes) // height
    full = hold(T.floordiv(count, keys))
    with T.serial(int64(0), full) as block:
        base = hold(block * keys)
        for k in range(keys):
            ask(base + k)
        _score_tile([read(hold(base + k)) for k in range(keys)], rows, span, base)
    with T.If(full * keys < count), T.Then():
        base = hold(full * keys)
        last = hold(count - 1)
        lines = [read(hold(T.min(base + k, last))) for k in range(keys)]
        _score_tile(lines, rows, span, base)


def _score_tile(lines: list[Read], rows: _Rows, span: tuple[Expr, int], base: Expr) -> None:
    """Score some keys; keep the scores from ``base``."""
    row, height = span
    lanes, dim, keys = rows.simd.lanes, rows.attention.dim, len(lines)
    sums = registers(height * keys, lanes)

    def step(chunk: tuple[Any, int]) -> None:
        query = [hold(load(rows.query, row + r, chunk[0], lanes=lanes)) for r in range(height)]
        for k, line in enumerate(lines):
            key = _padded(line, chunk, lanes)
            for r in range(height):
                total = sums[r * keys + k]
                store(total, load(total, 0, lanes=lanes) + query[r] * key, 0)

    with T.serial(int64(0), int64(dim // lanes)) as c:
        step((c * lanes, lanes))
    for chunk in _chunks(dim, lanes)[dim // lanes :]:
        step(chunk)
    piece = min(keys, lanes)
    for v in range(0, height * keys, lanes):
        score = _sums([load(s, 0, lanes=lanes) for s in sums[v : v + lanes]])
        for p in range(0, lanes, piece):
            r, k = divmod(v + p, keys)
            part = T.Shuffle([score], list(range(p, p + piece))) if piece < lanes else score
            store(rows.scores, part, row + r, base + k)


# --- prefill: blocks of queries meet blocks of keys ---


def _prefill(
    a: Attention,
    simd: Simd,
    batch: Expr,
    seq: Expr,
    total: Expr,
    head: Callable[[Expr, Expr], _Head],
) -> None:
    """Attend from blocks of positions, each on a thread."""
    most, least = (max(1, rows // a.group) for rows in (_ROWS, 2 * _HEIGHT))
    even = _even_parts(a, simd)
    share = T.max(T.floordiv(seq + (even - 1), even), int64(least))
    positions = T.min(share, int64(most))
    blocks = T.floordiv(seq + positions - 1, positions)

    def one(item: Expr) -> None:
        b, h, order = unravel(item, [batch, int64(a.kv_heads), blocks])
        # early blocks see fewer keys: alternate from both ends so that threads get equal work
        half = T.floordiv(order, 2)
        block = T.if_then_else(T.floormod(order, 2) == 0, half, blocks - 1 - half)
        first = hold(block * positions)
        _tile(a, simd, head(b, h), first, hold(T.min(seq - first, positions)), most)

    work = batch * seq * total * (a.heads * a.dim)
    spread(batch * a.kv_heads * blocks, work < _SERIAL_MACS, one)


def _tile(a: Attention, simd: Simd, source: _Head, first: Expr, count: Expr, most: int) -> None:
    """Attend from ``count`` (of at most ``most``) positions from ``first``."""
    tiles = -(-most * a.group // _HEIGHT)
    rows = _Rows.allocate(a, simd, tiles * _HEIGHT, _KEYS)
    keys = scratch(_padded_dim(a, simd), _KEYS)
    decoded = scratch(_KEYS, a.dim) if source.coded else None
    used = hold(T.floordiv(count * a.group + (_HEIGHT - 1), _HEIGHT))
    vectors = simd.registers * 3 // 4 // _HEIGHT

    def place(r: Expr) -> tuple[Expr, Expr]:
        """Give a row's position and member; those that fill up the last tile repeat the last."""
        i = first + T.min(T.floordiv(r, a.group), count - 1)
        return hold(i), hold(T.floormod(r, a.group))

    with T.serial(int64(0), used * _HEIGHT) as r:
        rows.start(r, source.query(*place(r)))

    low, high = hold(_visible(a, source, first)[0]), hold(_visible(a, source, first + count - 1)[1])
    with T.serial(int64(0), T.floordiv(high - low + (_KEYS - 1), _KEYS)) as block:
        start = hold(low + block * _KEYS)
        length = hold(T.min(high - start, int64(_KEYS)))
        _fetch(a, simd, source, keys, start, length)
        if decoded is not None:
            _decode_values(a, simd, source.value(start, length), decoded, length)
        with T.serial(int64(0), used) as t:
            _product(rows, keys, hold(t * _HEIGHT), vectors)
        with T.serial(int64(0), used * _HEIGHT) as r:
            i, g = place(r)
            begin, end = _visible(a, source, i)
            seen = (T.max(begin - start, int64(0)), T.min(end - start, length))
            rows.weigh(r, (start, length), seen, source.bias and source.bias(i, g))
        value = _plain(decoded, ()) if decoded is not None else source.value(start, length)
        with T.serial(int64(0), used) as t:
            rows.mix(hold(t * _HEIGHT), _HEIGHT, vectors, length, value)

    with T.serial(int64(0), count * a.group) as r:
        rows.finish(r, source.put(*place(r)))


def _fetch(a: Attention, simd: Simd, source: _Head, keys: Any, start: Expr, length: Expr) -> None:
    """Transpose a block of keys; the last of a short block is repeated."""
    lanes, read = simd.lanes, source.key(start, length)
    with T.serial(int64(0), int64(_KEYS // lanes)) as v:
        reads = [read(hold(T.min(v * lanes + k, length - 1))) for k in range(lanes)]

        def square(chunk: tuple[Any, int]) -> None:
            lines = [_padded(read, chunk, lanes) for read in reads]
            for i, column in enumerate(_transpose(lines)):
                store(keys, column, chunk[0] + i, v * lanes)

        with T.serial(int64(0), int64(a.dim // lanes)) as c:
            square((c * lanes, lanes))
        for chunk in _chunks(a.dim, lanes)[a.dim // lanes :]:
            square(chunk)


def _decode_values(
    a: Attention, simd: Simd, value: Callable[[Expr], Read], decoded: Any, length: Expr
) -> None:
    """Write a block of values as floats; heads with coded values are whole vectors wide."""
    with T.serial(int64(0), length) as j:
        read = value(j)
        with T.serial(int64(0), int64(a.dim // simd.lanes)) as c:
            store(decoded, read(c * simd.lanes, simd.lanes), j, c * simd.lanes)


def _product(rows: _Rows, keys: Any, row: Expr, vectors: int) -> None:
    """Score a tile of rows against a block of transposed keys; the vectors run along the keys."""
    lanes = rows.simd.lanes
    with T.serial(int64(0), int64(_KEYS // (lanes * vectors))) as tile:
        places = [hold((tile * vectors + v) * lanes) for v in range(vectors)]
        sums = [registers(vectors, lanes) for _ in range(_HEIGHT)]
        with T.serial(int64(0), int64(rows.attention.dim)) as c:
            key = [hold(load(keys, c, place, lanes=lanes)) for place in places]
            for r, line in enumerate(sums):
                query = hold(rows.query[row + r, c])
                for total, part in zip(line, key, strict=True):
                    store(total, load(total, 0, lanes=lanes) + part * query, 0)
        for r, line in enumerate(sums):
            for total, place in zip(line, places, strict=True):
                store(rows.scores, load(total, 0, lanes=lanes), row + r, place)
