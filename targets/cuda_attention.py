"""Attention over a caller-owned cache, attention without one, and rotary embedding, for CUDA.

What the kernels take is as in ``cpu_attention``. A block holds some rows, which are query heads of
neighbouring positions that share a key head, and walks the keys in tiles through shared memory:
scores, their online softmax, weighted values. A decode step has few rows, so there several blocks
share the keys of a head, in a block its warps, each in registers, and a second kernel joins what
the blocks found (split-K attention, as in Flash-Decoding). The first of the two also turns the new
queries and key, which every block does for itself: a kernel before it would take longer. Scores and
sums are float32 on the ordinary cores.

``past`` lies in the GPU's memory: grids are sized without it, and blocks that get no keys say so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from mxcompile.formats import GROUP, LEAST_SCALE, SCALE_DTYPE, CacheFormat
from mxcompile.targets.cpu_attention import Attention, Caches, Mask, Rotation
from mxcompile.targets.cpu_norm import LOWEST, Columns, int64, param, symbol
from mxcompile.targets.cuda_block import (
    LANES,
    WARP,
    Block,
    Private,
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

_WARPS: Final = 4
"""Warps of a block that share the keys of a decode step."""

_LEAST: Final = 16
"""Fewer keys than this are not worth a block of a decode step."""

_HELD: Final = 64
"""Numbers of queries, and as many of sums, that a thread of a decode step has in registers."""

_JOINED: Final = 8192
"""Floats by which the warps of a block add up what they found: 32 KiB of shared memory."""


@dataclass(frozen=True, slots=True)
class CudaAttention:
    """Makes the kernels; ``serial`` ones are for a CPU.

    In a decode step ``splits`` blocks share the keys of a head, if that leaves enough to each.
    """

    splits: int = 64
    serial: bool = False

    def append(self, a: Attention, caches: Caches) -> tirx.PrimFunc:
        """Make ``(k, v, past, *keys, *values)``: write k and v to the caches from ``past``."""

        def body() -> None:
            batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
            k = param("k", (batch, seq, _columns(a.k, a.kv_heads, a.dim).width))
            v = param("v", (batch, seq, _columns(a.v, a.kv_heads, a.dim).width))
            past = param("past", (1,), "int64")
            keys, values = caches.declare(a, batch, longest)

            def one(block: Block) -> None:
                row, h = block.index
                b, i = hold(row // seq), hold(row % seq)
                key, value = (_Row.of(block, a.dim) for _ in range(2))
                k_at = hold(h * a.dim + _columns(a.k, a.kv_heads, a.dim).offset)
                v_at = hold(h * a.dim + _columns(a.v, a.kv_heads, a.dim).offset)

                def fetch(t: Expr) -> None:
                    key.fetch(t, lambda c: k[b, i, k_at + c])
                    value.fetch(t, lambda c: v[b, i, v_at + c])

                block.phase(fetch, barrier=False)
                place = (b, h, hold(past[0] + i))
                key.round(caches.key).write(keys, place)
                value.round(caches.value).write(values, place)

            launch([batch * seq, a.kv_heads], _THREADS, self.serial, one)

        return build(body)

    def rotate(self, a: Attention, caches: Caches, rotation: Rotation) -> tirx.PrimFunc:
        """Make ``(q, k, v, cos, sin, [q_weight, k_weight,] past, *keys, *values, y)``."""

        def body() -> None:
            batch, seq, longest = symbol("batch"), symbol("seq"), symbol("longest")
            new = _New.declare(a, rotation, batch, seq)
            past = param("past", (1,), "int64")
            keys, values = caches.declare(a, batch, longest)
            y = param("y", (batch, seq, a.heads * a.dim))

            def one(block: Block) -> None:
                row, head = block.index
                at, h = (hold(row // seq), hold(row % seq)), hold(head - a.heads)
                is_query = head < a.heads

                def read(_row: int, c: Expr) -> Expr:
                    return T.if_then_else(is_query, new.query(at, head, c), new.key(at, h, c))

                def weight(_row: int, c: Expr) -> Expr:
                    return T.if_then_else(is_query, new.weights[0][c], new.weights[1][c])

                def value(c: Expr) -> Expr:
                    return T.if_then_else(is_query, T.float32(0), new.value(at, h, c))

                turned, other = _Row.of(block, a.dim), _Row.of(block, a.dim)
                turn = _Turn([turned], new.half, rotation.eps)

                def fetch(t: Expr) -> None:
                    turn.fetch_weights(t, weight)
                    turn.fetch(t, read, lambda c: new.angle(at, c))
                    other.fetch(t, value)

                block.phase(fetch, barrier=False)
                turn.run()
                with T.If(is_query):
                    with T.Then():

                        def put(c: Expr, number: Expr) -> None:
                            store(y, number, *at, head * a.dim + c)

                        turned.put(put)
                    with T.Else():
                        place = (at[0], h, hold(past[0] + at[1]))
                        turned.round(caches.key).write(keys, place)
                        other.round(caches.value).write(values, place)

            launch([batch * seq, a.heads + a.kv_heads], _THREADS, self.serial, one)

        return build(body)

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

            source = _cached_source(a, caches, q, past, seq, keys, values)
            with T.If(seq == 1):
                with T.Then():
                    strips = _strips(caches, keys, values, a.dim)
                    self._decode(a, source, *strips, out, shares, batch)
                with T.Else():
                    self._prefill(a, source, out, batch, seq)

        return build(body)

    def attend_new(self, a: Attention, caches: Caches, rotation: Rotation) -> tirx.PrimFunc:
        """Make ``(q, k, v, cos, sin, [q_weight, k_weight,] past, *keys, *values, out, shares)``.

        It is ``rotate`` and ``attend`` for one position. No kernel may have written the weights.
        """

        def body() -> None:
            batch, longest = symbol("batch"), symbol("longest")
            new = _New.declare(a, rotation, batch, int64(1))
            past = param("past", (1,), "int64")
            keys, values = caches.declare(a, batch, longest)
            out = param("out", (batch, 1, a.heads * a.dim))
            shares = param("shares", (batch, *self.scratch(a)[0]))
            source = _cached_source(a, caches, new.q, past, int64(1), keys, values)
            strips = _strips(caches, keys, values, a.dim)
            self._decode(a, source, *strips, out, shares, batch, new)

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

    def _decode(
        self,
        a: Attention,
        source: "_Sources",
        key: "_Strips",
        value: "_Strips",
        out: Any,
        shares: Any,
        batch: Expr,
        new: "_New | None" = None,
    ) -> None:
        """One position: blocks share the keys, then the shares are joined.

        If it is ``new``, its key is not in the cache yet. The block whose share it ends makes it,
        and attends to what it has rather than to what it writes: the blocks that share a key head
        do not wait for each other.
        """
        # A head has scores in registers too.
        chunks = -(-a.group * max(key.columns, value.columns, 4) // _HELD)
        heads = -(-a.group // chunks)

        def place(pair: Expr, split: Expr, g: Expr, c: int | Expr) -> tuple[int | Expr, ...]:
            return pair // a.kv_heads, pair % a.kv_heads, split, g, c

        def attend(block: Block) -> None:
            pair, split, chunk = block.index
            part = source(hold(pair // a.kv_heads), hold(pair % a.kv_heads))
            member = hold(chunk * heads)
            scan = _Scan(block, part, key, value, member, heads)
            fresh = _Fresh(block, part, new, member, heads) if new else None
            if fresh:
                fresh.fetch()
            # Positions in 32 bits: a GPU has no others in its instructions.
            low, high = (hold(T.Cast("int32", x)) for x in part.visible(int64(0), int64(0)))
            share = (high - low + (self.splits - 1)) // self.splits
            share = hold(T.max(share, T.int32(_LEAST)))
            first = hold(T.min(low + T.Cast("int32", split) * share, high))
            end = hold(T.min(first + share, high))
            if fresh:
                is_last = T.And(first < high, end == high)
                end = hold(T.min(end, high - 1))
                scan.prefetch(first, end)
                fresh.run(is_last, chunk == 0, (key, value), high - 1)
                scan.start(fresh.query)
                with when(is_last):
                    scan.take(fresh.key, fresh.value)
                block.phase(lambda t: None)  # what is fresh may lie where shares are joined
            else:
                scan.start(lambda g, c: part.query(int64(0), T.min(member + g, a.group - 1), c))
                scan.prefetch(first, end)
            scan.walk(first, end)

            def put(g: Expr, c: int | Expr, number: Expr) -> None:
                with when(g < a.group):
                    store(shares, number, *place(pair, split, g, c))

            scan.finish(put)

        def join(block: Block) -> None:
            pair, g, part = block.index
            # A lane has some shares' highest scores and sums of weights, a thread has a column.
            own = -(-self.splits // WARP)
            tops, sums, found = (block.private(n) for n in (own, own, self.splits))
            peak, total = block.private(1), block.private(1)
            weights = block.shared(self.splits)

            def share(s: Expr, c: int | Expr) -> Expr:
                return load(shares, *place(pair, s, g, c))

            def each(t: Expr, body: Callable[[Expr, int], None]) -> None:
                for e in range(own):
                    s = hold(e * WARP + t % WARP)
                    with when(s < self.splits):
                        body(s, e)

            def fetch(t: Expr) -> None:
                peak.set(t, T.float32(LOWEST))

                def one(s: Expr, e: int) -> None:
                    tops.set(t, share(s, a.dim), e)
                    sums.set(t, share(s, a.dim + 1), e)
                    peak.set(t, T.max(peak.get(t), tops.get(t, e)))

                c = hold(T.min(part * _THREADS + t, a.dim - 1))
                with block.unrolled(self.splits) as s:
                    found.set(t, share(s, c), s)
                each(t, one)

            def weigh(t: Expr) -> None:
                total.set(t, T.float32(0))

                def one(s: Expr, e: int) -> None:
                    weight = hold(T.exp(tops.get(t, e) - peak.get(t)))
                    total.add(t, weight * sums.get(t, e))
                    with when(t < WARP):
                        store(weights, weight, s)

                each(t, one)

            def mix(t: Expr) -> None:
                number = registers(1, "float32")
                store(number, T.float32(0), 0)
                with block.unrolled(self.splits) as s:
                    store(number, number[0] + weights[s] * found.get(t, s), 0)
                b, h, c = pair // a.kv_heads, pair % a.kv_heads, hold(part * _THREADS + t)
                with when(c < a.dim):
                    at = (h * a.group + g) * a.dim + c
                    store(out, number[0] / total.get(t), b, int64(0), at)

            # Every warp finds the same.
            block.phase(fetch, barrier=False)
            block.across(peak, LANES, T.max)
            block.phase(weigh)
            block.across(total, LANES, lambda x, y: x + y)
            block.phase(mix, barrier=False)

        pairs = batch * a.kv_heads
        grid, waits = [pairs, self.splits, chunks], new is not None
        launch(grid, _WARPS * WARP, self.serial, attend, waits=waits)
        launch([pairs, a.group, -(-a.dim // _THREADS)], _THREADS, self.serial, join)


@dataclass(frozen=True, slots=True)
class _Row:
    """A head's row of numbers; the threads of a block hold its columns in turn."""

    block: Block
    dim: int
    numbers: Private

    @classmethod
    def of(cls, block: Block, dim: int) -> "_Row":
        """Make room for one."""
        return cls(block, dim, block.private(-(-dim // block.threads)))

    def each(self, t: Expr, body: Callable[[Expr, int], None]) -> None:
        """Run ``body(column, which of the thread's)`` for the columns of a thread."""
        for e in range(self.numbers.count):
            c = hold(e * self.block.threads + t)
            with when(c < self.dim):
                body(c, e)

    def fetch(self, t: Expr, read: Callable[[Expr], Expr]) -> None:
        """Load what a thread holds, by column."""
        self.each(t, lambda c, e: self.numbers.set(t, read(c), e))

    def put(self, write: Callable[[Expr, Expr], None]) -> None:
        """Hand out ``(column, number)``."""

        def body(t: Expr) -> None:
            self.each(t, lambda c, e: write(c, self.numbers.get(t, e)))

        self.block.phase(body, barrier=False)

    def round(self, fmt: CacheFormat) -> "_Rounded":
        """Encode it, as ``mxcompile.caches.encode`` says; from here on it is what is decoded."""
        block, numbers, count = self.block, self.numbers, self.numbers.count
        if fmt.scaled:
            return self._scaled(fmt)
        codes = block.private(count, fmt.dtype)

        def body(t: Expr) -> None:
            def column(_c: Expr, e: int) -> None:
                codes.set(t, T.Cast(fmt.dtype, numbers.get(t, e)), e)
                numbers.set(t, T.Cast("float32", codes.get(t, e)), e)

            self.each(t, column)

        block.phase(body, barrier=False)
        return _Rounded(self, fmt, codes, None)

    def _scaled(self, fmt: CacheFormat) -> "_Rounded":
        """Make codes and scales; a warp holds a group."""
        block, numbers, count, half = self.block, self.numbers, self.numbers.count, GROUP // 2
        bounds, codes = block.private(2 * count), block.private(count, "int32")
        scales = block.private(count, SCALE_DTYPE)

        def bound(t: Expr) -> None:
            bounds.fill(t, T.float32(0))

            def column(_c: Expr, e: int) -> None:
                bounds.set(t, numbers.get(t, e), e)
                bounds.set(t, -numbers.get(t, e), count + e)

            self.each(t, column)

        def encode(t: Expr) -> None:
            codes.fill(t, T.int32(0))

            def column(c: Expr, e: int) -> None:
                most, least = hold(bounds.get(t, e)), hold(-bounds.get(t, count + e))
                peak = T.Select(most > -least, most, least)
                scale = hold(T.Cast("float16", peak / T.float32(fmt.lowest)))
                scale = hold(T.Select(scale == T.float16(0), T.float16(LEAST_SCALE), scale))
                scales.set(t, scale, e)
                step = hold(T.Cast("float32", scale))
                rounded = T.nearbyint(numbers.get(t, e) / step)
                rounded = T.max(T.min(rounded, T.float32(-fmt.lowest - 1)), T.float32(fmt.lowest))
                code = hold(T.Cast("int32", rounded))
                numbers.set(t, T.Cast("float32", code) * step, e)
                if fmt.bits == 4:
                    up = T.Select(c % GROUP < half, T.int32(0), T.int32(4))
                    code = T.shift_left(T.bitwise_and(code, 15), up)
                codes.set(t, code, e)

            self.each(t, column)

        block.phase(bound, barrier=False)
        block.across(bounds, LANES, T.max)
        block.phase(encode, barrier=False)
        if fmt.bits == 4:
            block.across(codes, (half,), T.bitwise_or)
        return _Rounded(self, fmt, codes, scales)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """A row as a cache has it."""

    row: _Row
    format: CacheFormat
    codes: Private
    scales: Private | None

    def write(self, parts: list[Any], place: tuple[Expr, ...]) -> None:
        """Write it to the cache."""
        half = GROUP // 2

        def body(t: Expr) -> None:
            def column(c: Expr, e: int) -> None:
                code = T.Cast(self.format.dtype, self.codes.get(t, e))
                if self.scales is not None:
                    with when(c % GROUP == 0):
                        store(parts[1], self.scales.get(t, e), *place, c // GROUP)
                if self.format.bits == 4:
                    with when(c % GROUP < half):
                        store(parts[0], code, *place, c // GROUP * half + c % GROUP)
                    return
                store(parts[0], code, *place, c)

            self.row.each(t, column)

        self.row.block.phase(body, barrier=False)


class _Turn:
    """Norms of rows of one position, if they have them, and rotary embedding.

    A thread has the partners of its columns too, and all else that it will need, so that the loads
    are under way together.
    """

    def __init__(self, rows: Sequence[_Row], half: int, eps: float | None) -> None:
        block, count = rows[0].block, rows[0].numbers.count
        self._block, self._rows, self._half, self._eps = block, rows, half, eps
        self._partners = [block.private(count) for _ in rows]
        self._cos, self._sin = (block.private(count) for _ in range(2))
        if eps is not None:
            self._squares = block.private(len(rows))
            self._weights = [block.private(2 * count) for _ in rows]

    def _partner(self, c: Expr) -> Expr:
        """The column that turns with one of the first."""
        return T.Select(c < self._half, c + self._half, c - self._half)

    def fetch_weights(self, t: Expr, weight: Callable[[int, Expr], Expr]) -> None:
        """Load a thread's part of the norms' weights, by row and column, if there are norms."""
        if self._eps is None:
            return
        for r, (row, weights) in enumerate(zip(self._rows, self._weights, strict=True)):

            def column(c: Expr, e: int, r: int = r, weights: Private = weights) -> None:
                weights.set(t, weight(r, c), 2 * e)
                weights.set(t, weight(r, hold(self._partner(c))), 2 * e + 1)

            row.each(t, column)

    def fetch(
        self,
        t: Expr,
        read: Callable[[int, Expr], Expr],
        angle: Callable[[Expr], tuple[Expr, Expr]],
    ) -> None:
        """Load a thread's part, by row and column; ``angle`` gives a cosine and a sine."""

        def turn(c: Expr, e: int) -> None:
            with when(c < 2 * self._half):
                cos, sin = angle(hold(c % self._half))
                self._cos.set(t, cos, e)
                self._sin.set(t, sin, e)

        for r, (row, partners) in enumerate(zip(self._rows, self._partners, strict=True)):

            def column(
                c: Expr, e: int, r: int = r, row: _Row = row, partners: Private = partners
            ) -> None:
                row.numbers.set(t, read(r, c), e)
                partners.set(t, read(r, hold(self._partner(c))), e)

            row.each(t, column)
        self._rows[0].each(t, turn)

    def run(self) -> None:
        """Replace the rows' numbers."""
        if self._eps is not None:
            self._block.phase(self._square, barrier=False)
            total = self._block.reduce(self._squares, lambda x, y: x + y, 0.0)

        def body(t: Expr) -> None:
            for r, row in enumerate(self._rows):
                factor = None
                if self._eps is not None:
                    factor = hold(T.rsqrt(total(r) / T.float32(row.dim) + T.float32(self._eps)))
                self._turn(t, r, factor)

        self._block.phase(body, barrier=False)

    def _square(self, t: Expr) -> None:
        """Add up a thread's squares."""
        self._squares.fill(t, T.float32(0))
        for r, row in enumerate(self._rows):

            def column(_c: Expr, e: int, r: int = r, row: _Row = row) -> None:
                self._squares.add(t, row.numbers.get(t, e) * row.numbers.get(t, e), r)

            row.each(t, column)

    def _turn(self, t: Expr, r: int, factor: Expr | None) -> None:
        """Replace a thread's part of a row."""
        row, half = self._rows[r], self._half

        def column(c: Expr, e: int) -> None:
            number, partner = row.numbers.get(t, e), self._partners[r].get(t, e)
            if factor is not None:
                number = number * factor * self._weights[r].get(t, 2 * e)
                partner = partner * factor * self._weights[r].get(t, 2 * e + 1)
            row.numbers.set(t, number, e)
            with when(c < 2 * half):
                sin = T.Select(c < half, -self._sin.get(t, e), self._sin.get(t, e))
                turned = row.numbers.get(t, e) * self._cos.get(t, e) + partner * sin
                row.numbers.set(t, turned, e)

        row.each(t, column)


@dataclass(frozen=True, slots=True)
class _New:
    """What a kernel takes of new positions: their rows, and how queries and keys turn.

    Rows are read by sequence and position, head, and column.
    """

    attention: Attention
    rotation: Rotation
    q: Any
    k: Any
    v: Any
    cos: Any
    sin: Any
    weights: list[Any]

    @classmethod
    def declare(cls, a: Attention, rotation: Rotation, batch: Expr, seq: Expr) -> "_New":
        """Declare the next parameters of a kernel."""
        places = {"q": (a.q, a.heads), "k": (a.k, a.kv_heads), "v": (a.v, a.kv_heads)}
        q, k, v = (
            param(name, (batch, seq, _columns(place, heads, a.dim).width))
            for name, (place, heads) in places.items()
        )
        half = (rotation.rotated or a.dim) // 2
        cos, sin = (param(name, (batch, seq, half)) for name in ("cos", "sin"))
        names = () if rotation.eps is None else ("q_weight", "k_weight")
        weights = [param(name, (a.dim,)) for name in names]
        return cls(a, rotation, q, k, v, cos, sin, weights)

    @property
    def half(self) -> int:
        """Columns from one that turns to its partner."""
        return (self.rotation.rotated or self.attention.dim) // 2

    def query(self, at: tuple[Expr, Expr], head: Expr, c: Expr) -> Expr:
        """A number of a query head."""
        a = self.attention
        return self.q[(*at, head * a.dim + _columns(a.q, a.heads, a.dim).offset + c)]

    def key(self, at: tuple[Expr, Expr], h: Expr, c: Expr) -> Expr:
        """A number of a key head."""
        a = self.attention
        return self.k[(*at, h * a.dim + _columns(a.k, a.kv_heads, a.dim).offset + c)]

    def value(self, at: tuple[Expr, Expr], h: Expr, c: Expr) -> Expr:
        """A number of a value head."""
        a = self.attention
        return self.v[(*at, h * a.dim + _columns(a.v, a.kv_heads, a.dim).offset + c)]

    def angle(self, at: tuple[Expr, Expr], c: Expr) -> tuple[Expr, Expr]:
        """A cosine and a sine of a position."""
        return self.cos[(*at, c)], self.sin[(*at, c)]


class _Fresh:
    """Queries of some of a group's heads, and key and value, that a block makes of a new position.

    In shared memory they are as attention wants them: queries scaled, key and value as cached.
    """

    def __init__(self, block: Block, source: "_Source", new: _New, first: Expr, heads: int) -> None:
        a = new.attention
        self._block, self._source, self._new, self._first = block, source, new, first
        self._rows = [_Row.of(block, a.dim) for _ in range(heads + 1)]
        self._value_row = _Row.of(block, a.dim)
        self._turn = _Turn(self._rows, new.half, new.rotation.eps)
        self._queries, self._pair = block.shared(heads, a.dim), block.shared(2, a.dim)

    def fetch(self) -> None:
        """Load everything; this waits for earlier kernels."""
        block, new, (*_, key) = self._block, self._new, self._rows
        a, h, at = new.attention, self._source.h, (self._source.b, int64(0))

        def weight(r: int, c: Expr) -> Expr:
            return load(new.weights[1 if self._rows[r] is key else 0], c)

        def read(r: int, c: Expr) -> Expr:
            if self._rows[r] is key:
                return new.key(at, h, c)
            return new.query(at, h * a.group + T.min(self._first + r, a.group - 1), c)

        def fetch(t: Expr) -> None:
            self._turn.fetch(t, read, lambda c: new.angle(at, c))
            self._value_row.fetch(t, lambda c: new.value(at, h, c))

        block.phase(lambda t: self._turn.fetch_weights(t, weight), barrier=False)
        block.wait()
        block.phase(fetch, barrier=False)

    def run(
        self, with_key: Expr, writes: Expr, caches: tuple["_Strips", "_Strips"], position: Expr
    ) -> None:
        """Make the queries, and on a condition the key and the value; on another write them."""
        block, (*queries, key), source = self._block, self._rows, self._source
        scale = T.float32(source.attention.scale)
        self._turn.run()
        block.phase(lambda t: None)  # sums of squares may lie where queries go
        for g, row in enumerate(queries):
            row.put(partial(self._keep, self._queries, g, scale))
        with when(with_key):
            for i, (row, cache) in enumerate(zip((key, self._value_row), caches, strict=True)):
                rounded = row.round(cache.format)
                row.put(partial(self._keep, self._pair, i, None))
                with when(writes):
                    rounded.write(cache.parts, (source.b, source.h, hold(position)))
        block.phase(lambda t: None)

    @staticmethod
    def _keep(shared: Any, row: int, scale: Expr | None, c: Expr, number: Expr) -> None:
        store(shared, number if scale is None else number * scale, row, c)

    def query(self, g: Expr, c: Expr) -> Expr:
        """A scaled number of a query."""
        return load(self._queries, g, c)

    def key(self, c: Expr) -> Expr:
        """A number of the key."""
        return load(self._pair, 0, c)

    def value(self, c: Expr) -> Expr:
        """A number of the value."""
        return load(self._pair, 1, c)


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


@dataclass(frozen=True, slots=True)
class _Strips:
    """How the lanes of a warp share the columns of a cached row: strips of neighbours in turn.

    A lane loads a strip at once. Where two columns share a byte it has both: first the columns of
    the low bits of a strip, then those of the high bits.
    """

    format: CacheFormat
    parts: list[Any]
    dim: int

    @property
    def _stored(self) -> int:
        """Elements of a row."""
        return self.format.parts(self.dim)[0][1]

    @property
    def _width(self) -> int:
        """Elements of a strip."""
        return next(n for n in (4, 2, 1) if n == 1 or self._stored % (WARP * n) == 0)

    @property
    def _strips(self) -> int:
        """Strips of a lane."""
        return -(-self._stored // (WARP * self._width))

    @property
    def _each(self) -> int:
        """Columns of a strip."""
        return self._width * (2 if self.format.bits == 4 else 1)

    @property
    def columns(self) -> int:
        """Columns of a lane."""
        return self._strips * self._each

    def column(self, lane: Expr, index: Expr) -> Expr:
        """Which column one of a lane's is; none of the row if it is not below ``dim``."""
        strip, member = index // self._each, index % self._each
        at = (strip * WARP + lane) * self._width + member % self._width
        if self.format.bits != 4:
            return at
        half = GROUP // 2
        return at // half * GROUP + member // self._width * half + at % half

    @property
    def _held(self) -> tuple[str, int]:
        """The type and number of a strip's elements in registers.

        Words if they are whole: compilers pair halves anew, which takes waiting for them.
        """
        size = self._width * np.dtype(self.format.dtype).itemsize
        return ("int32", size // 4) if size % 4 == 0 else (self.format.dtype, self._width)

    def room(self, block: Block, rows: int) -> list[Private]:
        """Registers for what a lane loads of some rows."""
        count, (dtype, each) = rows * self._strips, self._held
        codes = block.private(count * each, dtype)
        return [codes, block.private(count, SCALE_DTYPE)] if self.format.scaled else [codes]

    def fetch(self, room: list[Private], row: int, t: Expr, place: tuple[Expr, ...]) -> None:
        """Load a lane's part of a row, as it is cached."""
        half, width, (dtype, each) = GROUP // 2, self._width, self._held
        lane = hold(t % WARP)
        for strip in range(self._strips):
            # Not held: only of an expression TVM sees that it is a multiple, and loads a vector.
            at = (strip * WARP + lane) * width
            if self._stored % (WARP * width):
                # A lane without a column reads the last once more.
                at = hold(T.min(at, self._stored - 1))
            number = row * self._strips + strip
            stored = hold(load(self.parts[0], *place, at, lanes=width))
            room[0].set(t, T.reinterpret(_vector(dtype, each), stored), number * each)
            if self.format.scaled:
                group = at // (half if self.format.bits == 4 else GROUP)
                room[1].set(t, load(self.parts[1], *place, group), number)

    def unpack(self, room: list[Private], rows: int, t: Expr, numbers: Private) -> None:
        """Make numbers of what a lane loaded of some rows."""
        width, (_, each) = self._width, self._held
        floats, ints = _vector("float32", width), _vector("int32", width)
        for strip in range(rows * self._strips):
            held, first = hold(room[0].get(t, strip * each, lanes=each)), strip * self._each
            stored = T.reinterpret(_vector(self.format.dtype, width), held)
            if not self.format.scaled:
                numbers.set(t, T.Cast(floats, stored), first)
                continue
            scale = hold(_splat(T.Cast("float32", room[1].get(t, strip)), width))
            if self.format.bits == 8:
                numbers.set(t, T.Cast(floats, stored) * scale, first)
                continue
            # A nibble goes to the top of 32 bits and back down with its sign.
            word, down = hold(T.Cast(ints, stored)), _splat(T.int32(28), width)
            for member, up in ((0, 28), (width, 24)):
                code = T.shift_right(T.shift_left(word, _splat(T.int32(up), width)), down)
                numbers.set(t, T.Cast(floats, code) * scale, first + member)


class _Scan:
    """One position's query heads on their way along the keys, in registers.

    A warp takes every fourth key, some of them at a time; its lanes share the columns. There are
    ``heads`` of them from ``first`` of the group on; those past the end repeat the last.
    """

    def __init__(
        self,
        block: Block,
        source: "_Source",
        key: _Strips,
        value: _Strips,
        first: Expr,
        heads: int,
    ) -> None:
        self._block, self._source, self._first, self._heads = block, source, first, heads
        self._key, self._value = key, value
        self._keys = 4 if heads * max(key.columns, value.columns) <= _HELD // 2 else 2
        self._query, self._near_keys = (block.private(n * key.columns) for n in (heads, self._keys))
        self._out, self._near_values = (
            block.private(n * value.columns) for n in (heads, self._keys)
        )
        self._next_keys = key.room(block, self._keys)
        self._next_values = value.room(block, self._keys)
        self._scores = block.private(self._keys * heads)
        self._peak, self._total = block.private(heads), block.private(heads)

    def prefetch(self, begin: Expr, end: Expr) -> None:
        """Load the first of the keys that ``walk`` will want."""
        with when(begin < end):
            self._block.phase(lambda t: self._fetch(t, begin, end), barrier=False)

    def start(self, query: Callable[[Expr, Expr], Expr]) -> None:
        """Take the scaled queries, by head and column."""
        block, width, dim = self._block, self._key.columns, self._source.attention.dim

        def fill(t: Expr) -> None:
            lane = hold(t % WARP)
            with block.unrolled(self._heads) as g, block.unrolled(width) as i:
                c = hold(self._key.column(lane, i))
                element = query(g, T.min(c, dim - 1))
                self._query.set(t, T.Select(c < dim, element, T.float32(0)), g * width + i)
            self._out.fill(t, T.float32(0))
            self._total.fill(t, T.float32(0))
            self._peak.fill(t, T.float32(LOWEST))

        block.phase(fill, barrier=False)

    def take(self, key: Callable[[Expr], Expr], value: Callable[[Expr], Expr]) -> None:
        """Begin with a key that is not cached, given by column; the first warp does."""
        block, dim = self._block, self._source.attention.dim
        width, columns = self._value.columns, self._key.columns

        def score(t: Expr) -> None:
            lane = hold(t % WARP)
            self._peak.fill(t, T.float32(0))
            with block.unrolled(columns) as i:
                element = hold(key(T.min(self._key.column(lane, i), dim - 1)))
                with block.unrolled(self._heads) as g:
                    self._peak.add(t, self._query.get(t, g * columns + i) * element, g)

        def mix(t: Expr) -> None:
            lane, is_first = hold(t % WARP), t < WARP
            with block.unrolled(self._heads) as g:
                score = self._capped(self._peak.get(t, g))
                self._peak.set(t, T.Select(is_first, score, T.float32(LOWEST)), g)
                self._total.set(t, T.Cast("float32", is_first), g)
            with block.unrolled(width) as i:
                element = hold(value(T.min(self._value.column(lane, i), dim - 1)))
                with when(is_first), block.unrolled(self._heads) as g:
                    self._out.set(t, element, g * width + i)

        block.phase(score, barrier=False)
        block.across(self._peak, LANES, lambda x, y: x + y)
        block.phase(mix, barrier=False)

    def walk(self, begin: Expr, end: Expr) -> None:
        """Attend to the keys from ``begin`` to before ``end``."""
        block, step = self._block, self._keys * _WARPS
        with T.serial(0, (end - begin + (step - 1)) // step) as index:
            start = hold(begin + index * step)
            block.phase(self._unpack, barrier=False)
            # The next are on their way meanwhile. A compiler that sees the loads where they are
            # needed saves registers and puts half of them off until the scores are there.
            with when(start + step < end):
                block.phase(lambda t: self._fetch(t, start + step, end), barrier=False)
            block.phase(self._score, barrier=False)
            block.across(self._scores, LANES, lambda x, y: x + y)
            block.phase(lambda t: self._mix(t, start, end), barrier=False)

    def _capped(self, score: Expr) -> Expr:
        cap = self._source.attention.softcap
        return T.tanh(score * T.float32(1 / cap)) * T.float32(cap) if cap else score

    def _fetch(self, t: Expr, start: Expr, end: Expr) -> None:
        """Load a lane's part of keys and values."""
        for e in range(self._keys):
            # Past the end the last key is read once more.
            j = hold(T.min(self._at(t, start, e), end - 1))
            place = (self._source.b, self._source.h, j)
            self._key.fetch(self._next_keys, e, t, place)
            self._value.fetch(self._next_values, e, t, place)

    def _unpack(self, t: Expr) -> None:
        """Make numbers of what was loaded."""
        self._key.unpack(self._next_keys, self._keys, t, self._near_keys)
        self._value.unpack(self._next_values, self._keys, t, self._near_values)

    def _score(self, t: Expr) -> None:
        """Add up a lane's part of the scores."""
        block, width = self._block, self._key.columns
        with block.unrolled(self._keys) as e, block.unrolled(self._heads) as g:
            score = registers(1, "float32")
            store(score, T.float32(0), 0)
            with block.unrolled(width) as i:
                element = self._near_keys.get(t, e * width + i)
                store(score, score[0] + self._query.get(t, g * width + i) * element, 0)
            self._scores.set(t, score[0], e * self._heads + g)

    def _at(self, t: Expr, start: Expr, e: int | Expr) -> Expr:
        """The e-th key of a thread's warp."""
        return start + e * _WARPS + t // WARP

    def _mix(self, t: Expr, start: Expr, end: Expr) -> None:
        """Turn scores into weights and add the weighted values to what the heads have."""
        block, width = self._block, self._value.columns
        with block.unrolled(self._heads) as g:
            top = registers(1, "float32")
            store(top, self._peak.get(t, g), 0)
            with block.unrolled(self._keys) as e:
                score = self._capped(self._scores.get(t, e * self._heads + g))
                score = T.Select(self._at(t, start, e) < end, score, T.float32(LOWEST))
                self._scores.set(t, score, e * self._heads + g)
                store(top, T.max(top[0], self._scores.get(t, e * self._heads + g)), 0)
            decay = hold(T.exp(self._peak.get(t, g) - top[0]))
            self._peak.set(t, top[0], g)
            self._total.set(t, self._total.get(t, g) * decay, g)
            with block.unrolled(self._keys) as e:
                weight = hold(T.exp(self._scores.get(t, e * self._heads + g) - top[0]))
                self._scores.set(t, weight, e * self._heads + g)
                self._total.add(t, weight, g)
            with block.unrolled(width) as i:
                total = registers(1, "float32")
                store(total, self._out.get(t, g * width + i) * decay, 0)
                with block.unrolled(self._keys) as e:
                    weight = self._scores.get(t, e * self._heads + g)
                    store(total, total[0] + weight * self._near_values.get(t, e * width + i), 0)
                self._out.set(t, total[0], g * width + i)

    def finish(self, put: Callable[[Expr, int | Expr, Expr], None]) -> None:
        """Hand out ``(member of the group, column, number)``.

        These are a sum of weighted values by column, then the highest score and the sum of weights.
        """
        block, heads, dim = self._block, self._heads, self._source.attention.dim
        width = self._value.columns
        peaks, totals = block.shared(_WARPS, heads), block.shared(_WARPS, heads)
        most = max(1, min(heads, _JOINED // (_WARPS * dim)))
        sums = block.shared(_WARPS, most, dim)

        def keep(t: Expr) -> None:
            with when(t % WARP == 0), block.unrolled(heads) as g:
                store(peaks, self._peak.get(t, g), t // WARP, g)
                store(totals, self._total.get(t, g), t // WARP, g)

        def shrink(t: Expr) -> None:
            """Make the sums those of weights that count from the highest score of all."""
            with block.unrolled(heads) as g:
                factor = hold(T.exp(self._peak.get(t, g) - highest(g)))
                with block.unrolled(width) as i:
                    self._out.set(t, self._out.get(t, g * width + i) * factor, g * width + i)
            with when(t < heads):
                top, total = highest(t), registers(1, "float32")
                store(total, T.float32(0), 0)
                with T.serial(0, _WARPS) as w:
                    store(total, total[0] + totals[w, t] * T.exp(peaks[w, t] - top), 0)
                put(self._first + t, dim, top)
                put(self._first + t, dim + 1, total[0])

        def highest(g: Expr) -> Expr:
            top = registers(1, "float32")
            store(top, T.float32(LOWEST), 0)
            with T.serial(0, _WARPS) as w:
                store(top, T.max(top[0], peaks[w, g]), 0)
            return top[0]

        def spill(t: Expr, first: int, count: int) -> None:
            lane = hold(t % WARP)
            with block.unrolled(count) as g, block.unrolled(width) as i:
                c = hold(self._value.column(lane, i))
                with when(c < dim):
                    store(sums, self._out.get(t, (first + g) * width + i), t // WARP, g, c)

        def add(t: Expr, first: int, count: int) -> None:
            def one(item: Expr) -> None:
                g, c = hold(item // dim), hold(item % dim)
                total = registers(1, "float32")
                store(total, T.float32(0), 0)
                with T.unroll(0, _WARPS) as w:
                    store(total, total[0] + sums[w, g, c], 0)
                put(self._first + first + g, c, total[0])

            strided(t, block.threads, int64(count * dim), one)

        block.phase(keep)
        block.phase(shrink)
        for first in range(0, heads, most):
            count = min(most, heads - first)
            block.phase(partial(spill, first=first, count=count))
            block.phase(partial(add, first=first, count=count))


def _columns(place: Columns | None, heads: int, dim: int) -> Columns:
    return place or Columns(heads * dim)


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


def _cached_source(
    a: Attention,
    caches: Caches,
    q: Any,
    past: Any,
    seq: Expr,
    keys: list[Any],
    values: list[Any],
) -> _Sources:
    """The sources of queries at the end of what is cached."""

    def source(b: Expr, h: Expr) -> _Source:
        key, value = _cached(caches.key, keys, b, h), _cached(caches.value, values, b, h)
        return _Source(a, q, b, h, key, value, past[0], past[0] + seq, None)

    return source


def _strips(
    caches: Caches, keys: list[Any], values: list[Any], dim: int
) -> tuple[_Strips, _Strips]:
    """How lanes share the rows of both caches."""
    return _Strips(caches.key, keys, dim), _Strips(caches.value, values, dim)


def _vector(dtype: str, lanes: int) -> str:
    """A type's vector; of one it is the type."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def _splat(value: Expr, lanes: int) -> Expr:
    """The same in all lanes."""
    return T.Broadcast(value, lanes) if lanes > 1 else value
