"""Attention over a caller-owned cache, attention without one, and rotary embedding, for CUDA.

What the kernels take is as in ``cpu_attention``. A block holds some rows, which are query heads of
neighbouring positions that share a key head, and walks the keys in tiles through shared memory:
scores, their online softmax, weighted values. A decode step has few rows, so there several blocks
share the keys of a head, and a second kernel joins what they found (split-K attention, as in
Flash-Decoding). Scores and sums are float32 on the ordinary cores.

``past`` lies in the GPU's memory: grids are sized without it, and blocks that get no keys say so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import GROUP, LEAST_SCALE, CacheFormat
from mxcompile.targets.cpu_attention import Attention, Caches, Mask, Rotation
from mxcompile.targets.cpu_norm import LOWEST, Columns, int64, param, symbol
from mxcompile.targets.cuda_block import (
    Block,
    build,
    hold,
    launch,
    load,
    registers,
    store,
    strided,
    when,
)

_THREADS: Final = 128

_HELPERS: Final = 8
"""Threads that share a row's softmax."""

_TILE: Final = 4096
"""Floats of a tile of keys, and of rows: 16 KiB of shared memory each."""


@dataclass(frozen=True, slots=True)
class CudaAttention:
    """Makes the kernels; ``serial`` ones are for a CPU.

    In a decode step ``splits`` blocks share the keys of a head, if that leaves each a whole tile.
    """

    splits: int = 16
    serial: bool = False

    def append(self, a: Attention, caches: Caches) -> tirx.PrimFunc:
        """Make ``(k, v, past, *keys, *values)``: write k and v to the caches from ``past``."""

        def body() -> None:
            batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
            k = param("k", (batch, seq, _columns(a.k, a.kv_heads, a.dim).width))
            v = param("v", (batch, seq, _columns(a.v, a.kv_heads, a.dim).width))
            past = param("past", (1,), "int64")
            keys, values = caches.declare(a, batch, longest)
            sides = ((k, a.k, caches.key, keys), (v, a.v, caches.value, values))
            counts = [a.dim // GROUP if fmt.scaled else a.dim for _, _, fmt, _ in sides]

            def one(b: Expr, i: Expr, h: Expr, c: Expr) -> None:
                place = (b, h, past[0] + i)
                for (new, at, fmt, parts), count in zip(sides, counts, strict=True):
                    first = h * a.dim + _columns(at, a.kv_heads, a.dim).offset
                    with when(c < count):
                        if fmt.scaled:
                            start = hold(first + c * GROUP)
                            group = [hold(new[b, i, start + e]) for e in range(GROUP)]
                            _encode(fmt, group, parts, place, c)
                        else:
                            store(parts[0], T.Cast(fmt.dtype, new[b, i, first + c]), *place, c)

            self._each((batch, seq, int64(a.kv_heads), int64(max(counts))), one)

        return build(body)

    def rotate(self, a: Attention, caches: Caches, rotation: Rotation) -> None:
        """Say that norms, rotary embedding and ``append`` are kernels of their own."""

    def rotary(self, heads: int, dim: int, rotated: int, source: Columns | None) -> tirx.PrimFunc:
        """Make ``(x, cos, sin, y)``: turn the first ``rotated`` columns (0: all) of each head."""
        half = (rotated or dim) // 2
        place = _columns(source, heads, dim)

        def body() -> None:
            batch, seq = symbol("batch"), symbol("seq")
            x = param("x", (batch, seq, place.width))
            cos, sin = (param(name, (batch, seq, half)) for name in ("cos", "sin"))
            y = param("y", (batch, seq, heads * dim))

            def one(b: Expr, i: Expr, h: Expr, c: Expr) -> None:
                def read(column: Expr) -> Expr:
                    return x[b, i, h * dim + place.offset + column]

                with T.If(c < half):
                    with T.Then():
                        low, high = hold(read(c)), hold(read(c + half))
                        turn_c, turn_s = hold(cos[b, i, c]), hold(sin[b, i, c])
                        store(y, low * turn_c - high * turn_s, b, i, h * dim + c)
                        store(y, high * turn_c + low * turn_s, b, i, h * dim + half + c)
                    with T.Else():
                        store(y, read(c + half), b, i, h * dim + half + c)

            self._each((batch, seq, int64(heads), int64(dim - half)), one)

        return build(body)

    def scratch(self, a: Attention) -> tuple[tuple[int, ...], ...]:
        """A decode step's shares: a sum of weighted values, its highest score, sum of weights.

        The caller gives the memory. What TVM would allocate in a call it may free when another
        kernel wants more, and a CUDA graph holds on to its address.
        """
        return ((a.kv_heads, self.splits, a.group, a.dim + 2),)

    def attend(self, a: Attention, caches: Caches) -> tirx.PrimFunc:
        """Make ``(q, past, *keys, *values, out, shares)``: attend to caches with the own keys."""

        def body() -> None:
            batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
            q = param("q", (batch, seq, _columns(a.q, a.heads, a.dim).width))
            past = param("past", (1,), "int64")
            keys, values = caches.declare(a, batch, longest)
            out = param("out", (batch, seq, a.heads * a.dim))
            shares = param("shares", (batch, *self.scratch(a)[0]))

            def source(b: Expr, h: Expr) -> _Source:
                key, value = _cached(caches.key, keys, b, h), _cached(caches.value, values, b, h)
                return _Source(a, q, b, h, key, value, past[0], past[0] + seq, None)

            with T.If(seq == 1):
                with T.Then():
                    self._decode(a, source, out, shares, batch)
                with T.Else():
                    self._prefill(a, source, out, batch, seq)

        return build(body)

    def attend_all(self, a: Attention, mask: Mask | None) -> tirx.PrimFunc:
        """Make ``(q, k, v, [mask,] out)``: attend to all of k and v, which are not cached."""

        def body() -> None:
            batch, seq, total = symbol("batch"), symbol("seq"), symbol("total")
            q = param("q", (batch, seq, _columns(a.q, a.heads, a.dim).width))
            k = param("k", (batch, total, _columns(a.k, a.kv_heads, a.dim).width))
            v = param("v", (batch, total, _columns(a.v, a.kv_heads, a.dim).width))
            if mask:
                heads, queries = a.heads if mask.per_head else 1, seq if mask.per_query else 1
                weights = param("mask", (batch, heads, queries, total), mask.dtype)
            out = param("out", (batch, seq, a.heads * a.dim))

            def source(b: Expr, h: Expr) -> _Source:
                def read(new: Any, place: Columns | None) -> Callable[[Expr, Expr], Expr]:
                    offset = _columns(place, a.kv_heads, a.dim).offset
                    return lambda j, c: new[b, j, h * a.dim + offset + c]

                def bias(i: Expr, g: Expr, j: Expr) -> Expr:
                    assert mask is not None
                    at = h * a.group + g if mask.per_head else int64(0)
                    weight = weights[b, at, i if mask.per_query else int64(0), j]
                    if mask.dtype == "bool":
                        return T.Select(weight, T.float32(0.0), T.float32(LOWEST / 2))
                    return weight

                pair = read(k, a.k), read(v, a.v)
                return _Source(a, q, b, h, *pair, int64(0), total, bias if mask else None)

            self._prefill(a, source, out, batch, seq)

        return build(body)

    def _each(self, dims: tuple[Expr, ...], body: Callable[..., None]) -> None:
        """Run ``body`` for every index, on a thread each."""
        count = dims[0]
        for dim in dims[1:]:
            count = count * dim

        def one(block: Block) -> None:
            def thread(t: Expr) -> None:
                flat = hold(block.index[0] * _THREADS + t)
                with when(flat < count):
                    index = [flat]
                    for dim in reversed(dims[1:]):
                        index[:1] = [hold(index[0] // dim), hold(index[0] % dim)]
                    body(*index)

            block.phase(thread)

        launch([(count + _THREADS - 1) // _THREADS], _THREADS, self.serial, one)

    def _prefill(self, a: Attention, source: "_Sources", out: Any, batch: Expr, seq: Expr) -> None:
        rows = max(4, min(32, _TILE // a.dim))

        def body(block: Block) -> None:
            pair, tile = block.index
            part = source(hold(pair // a.kv_heads), hold(pair % a.kv_heads))
            walk = _Walk(block, part, rows, hold(tile * rows), seq)
            walk.run(*part.visible(walk.position(0), walk.position(rows - 1)))

            def put(_r: Expr, row: Expr, c: Expr, value: Expr, total: Expr) -> None:
                with when(row < seq * a.group):
                    i, g = row // a.group, row % a.group
                    store(out, value / total, part.b, i, (part.h * a.group + g) * a.dim + c)

            walk.finish(put)

        launch(
            [batch * a.kv_heads, (seq * a.group + rows - 1) // rows], _THREADS, self.serial, body
        )

    def _decode(self, a: Attention, source: "_Sources", out: Any, shares: Any, batch: Expr) -> None:
        """One position: blocks share the keys, then the shares are joined."""

        def place(pair: Expr, split: Expr, g: Expr, c: int | Expr) -> tuple[int | Expr, ...]:
            return pair // a.kv_heads, pair % a.kv_heads, split, g, c

        def attend(block: Block) -> None:
            pair, split = block.index
            part = source(hold(pair // a.kv_heads), hold(pair % a.kv_heads))
            walk = _Walk(block, part, a.group, int64(0), int64(1))
            low, high = part.visible(int64(0), int64(0))
            share = (high - low + (self.splits - 1)) // self.splits
            share = hold(T.max(share, int64(walk.keys)))
            first = hold(T.min(low + split * share, high))
            walk.run(first, hold(T.min(first + share, high)))

            def put(r: Expr, _row: Expr, c: Expr, value: Expr, total: Expr) -> None:
                store(shares, value, *place(pair, split, r, c))
                with when(c == 0):
                    store(shares, walk.peak[r], *place(pair, split, r, a.dim))
                    store(shares, total, *place(pair, split, r, a.dim + 1))

            walk.finish(put)

        def join(block: Block) -> None:
            pair, g = block.index

            def share(s: Expr, c: int | Expr) -> Expr:
                return load(shares, *place(pair, s, g, c))

            def body(t: Expr) -> None:
                top, total = registers(1, "float32"), registers(1, "float32")
                store(top, T.float32(LOWEST), 0)
                store(total, T.float32(0), 0)
                with T.serial(0, self.splits) as s:
                    store(top, T.max(top[0], share(s, a.dim)), 0)
                with T.serial(0, self.splits) as s:
                    weight = T.exp(share(s, a.dim) - top[0])
                    store(total, total[0] + weight * share(s, a.dim + 1), 0)

                def column(c: Expr) -> None:
                    value = registers(1, "float32")
                    store(value, T.float32(0), 0)
                    with T.serial(0, self.splits) as s:
                        weight = T.exp(share(s, a.dim) - top[0])
                        store(value, value[0] + weight * share(s, c), 0)
                    b, h = pair // a.kv_heads, pair % a.kv_heads
                    store(out, value[0] / total[0], b, int64(0), (h * a.group + g) * a.dim + c)

                strided(t, _THREADS, int64(a.dim), column)

            block.phase(body)

        pairs = batch * a.kv_heads
        launch([pairs, self.splits], _THREADS, self.serial, attend)
        launch([pairs, a.group], _THREADS, self.serial, join)


@dataclass(frozen=True, slots=True)
class _Source:
    """A kv head of a sequence: ``key`` and ``value`` by key and column, ``bias`` of a score.

    Query position i stands at key position ``past + i``; there are ``total`` keys.
    """

    attention: Attention
    q: Any
    b: Expr
    h: Expr
    key: Callable[[Expr, Expr], Expr]
    value: Callable[[Expr, Expr], Expr]
    past: Expr
    total: Expr
    bias: Callable[[Expr, Expr, Expr], Expr] | None

    def query(self, i: Expr, g: Expr, c: Expr) -> Expr:
        """A scaled element of a member of the group at a position."""
        a = self.attention
        column = (self.h * a.group + g) * a.dim + _columns(a.q, a.heads, a.dim).offset + c
        return self.q[self.b, i, column] * T.float32(a.scale)

    def visible(self, first: Expr, last: Expr) -> tuple[Expr, Expr]:
        """The first key that the positions from ``first`` to ``last`` see, and the end."""
        a = self.attention
        if not a.causal:
            return int64(0), hold(self.total)
        low = T.max(self.past + first + 1 - a.window, int64(0)) if a.window else int64(0)
        return hold(low), hold(self.past + last + 1)


_Sources = Callable[[Expr, Expr], _Source]
"""The source for a sequence and a kv head."""


class _Walk:
    """Some rows of queries on their way along the keys, in shared memory.

    Row r is query head ``(first + r) % group`` of position ``(first + r) // group``; rows past the
    end repeat the last position.
    """

    def __init__(self, block: Block, source: _Source, rows: int, first: Expr, seq: Expr) -> None:
        a = source.attention
        self._block, self._source, self._rows, self._first, self._seq = (
            block,
            source,
            rows,
            first,
            seq,
        )
        self.keys = max(_HELPERS, min(64, _TILE // a.dim // _HELPERS * _HELPERS))
        self._query = block.shared(rows, a.dim)
        self._tile = block.shared(self.keys, a.dim + 1)  # threads of a warp take a key each
        self._scores = block.shared(rows, self.keys)
        self._parts = block.shared(rows, _HELPERS)
        self.peak, self._next, self._total, self._decay = (block.shared(rows) for _ in range(4))
        self._out = block.private(-(-rows * a.dim // _THREADS))

    def position(self, r: int | Expr) -> Expr:
        """The position of a row."""
        return T.min((self._first + r) // self._source.attention.group, self._seq - 1)

    def _member(self, r: Expr) -> Expr:
        return (self._first + r) % self._source.attention.group

    def run(self, begin: Expr, end: Expr) -> None:
        """Walk the keys from ``begin`` to before ``end``."""
        dim = self._source.attention.dim
        block = self._block

        def fill(t: Expr) -> None:
            def query(item: Expr) -> None:
                r, c = hold(item // dim), hold(item % dim)
                value = self._source.query(self.position(r), self._member(r), c)
                store(self._query, value, r, c)

            strided(t, _THREADS, int64(self._rows * dim), query)
            with T.serial(0, (self._rows - t + _THREADS - 1) // _THREADS) as i:
                store(self.peak, T.float32(LOWEST), i * _THREADS + t)
                store(self._total, T.float32(0), i * _THREADS + t)
            self._out.fill(t, T.float32(0))

        block.phase(fill)
        with T.serial(int64(0), (end - begin + (self.keys - 1)) // self.keys) as step:
            start = hold(begin + step * self.keys)
            count = hold(T.min(end - start, int64(self.keys)))
            for phase in (
                self._fetch(self._source.key, start, count),
                self._score(start, count),
                self._both(self._find_peaks, self._fetch(self._source.value, start, count)),
                self._weigh,
                self._mix,
            ):
                block.phase(phase)

    def finish(self, put: Callable[[Expr, Expr, Expr, Expr, Expr], None]) -> None:
        """Hand out ``(row here, row, column, sum of weighted values, sum of weights)``."""
        dim = self._source.attention.dim

        def body(t: Expr) -> None:
            for e in range(self._out.count):
                item = e * _THREADS + t
                with when(item < self._rows * dim):
                    r, c = hold(int64(item // dim)), hold(int64(item % dim))
                    put(r, self._first + r, c, self._out.get(t, e), self._total[r])

        self._block.phase(body)

    @staticmethod
    def _both(*phases: Callable[[Expr], None]) -> Callable[[Expr], None]:
        def body(t: Expr) -> None:
            for phase in phases:
                phase(t)

        return body

    def _fetch(
        self, read: Callable[[Expr, Expr], Expr], start: Expr, count: Expr
    ) -> Callable[[Expr], None]:
        """Bring keys or values into shared memory; zeros after the last."""
        dim = self._source.attention.dim

        def body(t: Expr) -> None:
            def one(item: Expr) -> None:
                j, c = hold(item // dim), hold(item % dim)
                value = T.if_then_else(j < count, read(start + j, c), T.float32(0))
                store(self._tile, value, j, c)

            strided(t, _THREADS, int64(self.keys * dim), one)

        return body

    def _score(self, start: Expr, count: Expr) -> Callable[[Expr], None]:
        """Score every row against every key of the tile; what a row does not see gets LOWEST."""
        a = self._source.attention

        def body(t: Expr) -> None:
            def one(item: Expr) -> None:
                r, j = hold(item // self.keys), hold(item % self.keys)
                score = registers(1, "float32")
                store(score, T.float32(0), 0)
                with T.serial(0, a.dim) as c:
                    store(score, score[0] + self._query[r, c] * self._tile[j, c], 0)
                i = hold(self.position(r))
                low, high = self._source.visible(i, i)
                seen = T.And(T.And(start + j >= low, start + j < high), j < count)
                store(self._scores, T.float32(LOWEST), r, j)
                with when(seen):
                    value = score[0]
                    if a.softcap:
                        value = T.tanh(value * T.float32(1 / a.softcap)) * T.float32(a.softcap)
                    if self._source.bias is not None:
                        # Masked is not as low as unseen: a row masked all over still has weights.
                        bias = self._source.bias(i, self._member(r), start + j)
                        value = T.max(value + bias, T.float32(LOWEST / 2))
                    store(self._scores, value, r, j)

            strided(t, _THREADS, int64(self._rows * self.keys), one)

        return body

    def _by_helper(self, t: Expr, body: Callable[[Expr, Expr], None]) -> None:
        """Run ``body(row, helper)``; a helper has every eighth key of a row."""

        def one(item: Expr) -> None:
            body(hold(item // _HELPERS), hold(item % _HELPERS))

        strided(t, _THREADS, int64(self._rows * _HELPERS), one)

    def _find_peaks(self, t: Expr) -> None:
        def one(r: Expr, helper: Expr) -> None:
            peak = registers(1, "float32")
            store(peak, T.float32(LOWEST), 0)
            with T.serial(0, self.keys // _HELPERS) as i:
                store(peak, T.max(peak[0], self._scores[r, i * _HELPERS + helper]), 0)
            store(self._parts, peak[0], r, helper)

        self._by_helper(t, one)

    def _weigh(self, t: Expr) -> None:
        """Turn scores into weights, and say how much those of earlier tiles shrink."""

        def one(r: Expr, helper: Expr) -> None:
            peak = registers(1, "float32")
            store(peak, self.peak[r], 0)
            for i in range(_HELPERS):
                store(peak, T.max(peak[0], self._parts[r, i]), 0)
            with T.serial(0, self.keys // _HELPERS) as i:
                weight = T.exp(load(self._scores, r, i * _HELPERS + helper) - peak[0])
                store(self._scores, weight, r, i * _HELPERS + helper)
            with when(helper == 0):
                store(self._decay, T.exp(self.peak[r] - peak[0]), r)
                store(self._next, peak[0], r)

        self._by_helper(t, one)

    def _mix(self, t: Expr) -> None:
        """Add the weighted values to what the rows have, and the weights to their sums."""
        dim = self._source.attention.dim
        for e in range(self._out.count):
            item = e * _THREADS + t
            with when(item < self._rows * dim):
                r, c = hold(item // dim), hold(item % dim)
                total = registers(1, "float32")
                store(total, self._out.get(t, e) * self._decay[r], 0)
                with T.serial(0, self.keys) as j:
                    store(total, total[0] + self._scores[r, j] * self._tile[j, c], 0)
                self._out.set(t, total[0], e)
        with T.serial(0, (self._rows - t + _THREADS - 1) // _THREADS) as i:
            r = hold(i * _THREADS + t)
            total = registers(1, "float32")
            store(total, self._total[r] * self._decay[r], 0)
            with T.serial(0, self.keys) as j:
                store(total, total[0] + self._scores[r, j], 0)
            store(self._total, total[0], r)
            store(self.peak, self._next[r], r)


def _columns(place: Columns | None, heads: int, dim: int) -> Columns:
    return place or Columns(heads * dim)


def _encode(
    fmt: CacheFormat, group: list[Expr], parts: list[Any], place: tuple[Expr, ...], at: Expr
) -> None:
    """Write the numbers of a group to a quantized cache, as ``mxcompile.caches.encode`` says."""
    codes, scales = parts
    most, least = group[0], group[0]
    for number in group[1:]:
        most, least = hold(T.max(most, number)), hold(T.min(least, number))
    peak = T.Select(most > -least, most, least)
    scale = hold(T.Cast("float16", peak / T.float32(fmt.lowest)))
    scale = hold(T.Select(scale == T.float16(0), T.float16(LEAST_SCALE), scale))
    store(scales, scale, *place, at)
    step = hold(T.Cast("float32", scale))

    def code(number: Expr) -> Expr:
        rounded = T.min(T.nearbyint(number / step), T.float32(-fmt.lowest - 1))
        return T.Cast("int32", T.max(rounded, T.float32(fmt.lowest)))

    if fmt.bits == 8:
        for e, number in enumerate(group):
            store(codes, T.Cast(fmt.dtype, code(number)), *place, at * GROUP + e)
        return
    half = GROUP // 2
    for e in range(half):
        low, high = T.bitwise_and(code(group[e]), 15), T.shift_left(code(group[e + half]), 4)
        store(codes, T.Cast(fmt.dtype, T.bitwise_or(low, high)), *place, at * half + e)


def _cached(fmt: CacheFormat, parts: list[Any], b: Expr, h: Expr) -> Callable[[Expr, Expr], Expr]:
    """Read a cache by position and column."""
    if not fmt.scaled:
        return lambda j, c: T.Cast("float32", parts[0][b, h, j, c])
    codes, scales = parts

    def read(j: Expr, c: Expr) -> Expr:
        step = T.Cast("float32", scales[b, h, j, c // GROUP])
        if fmt.bits == 8:
            return T.Cast("float32", codes[b, h, j, c]) * step
        # The nibble goes to the top of 32 bits and back down with its sign.
        half = GROUP // 2
        word = T.Cast("int32", codes[b, h, j, c // GROUP * half + c % half])
        up = 28 - T.Cast("int32", c % GROUP // half) * 4
        return T.Cast("float32", T.shift_right(T.shift_left(word, up), 28)) * step

    return read
