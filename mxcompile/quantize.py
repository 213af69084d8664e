"""What weight quantization means: from floats to codes, scales and zero-points, and back.

The grid is that of ``mxcompile.formats``. A group's scale and zero-point are searched for the
least ``sum_k h_k (w_k - w_hat_k)**2`` with ``h_k = E[x_k**2]`` of the layer's input, as the
importance matrix of llama.cpp and the clip search of AWQ (arXiv 2306.00978) weigh errors. Every
candidate is one that can be stored (an 8-bit multiple of the fp16 row scale, a 4-bit zero-point),
so what is searched is what ships. Kernels and ONNX models are tested against this module.

The entries of a learned codebook are found in turn with the groups' grids, each as the weighted
mean of the weights that round to it: the k-means of SqueezeLLM (arXiv 2306.07629) on weights in
units of their group's scale, on a sample of the groups.

Left out: error feedback between columns, which needs the whole H; see ``mxcompile.gptq``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Self, TypeAlias

import numpy as np
import torch

from mxcompile import workers
from mxcompile.errors import UsageError
from mxcompile.formats import FORMATS, GROUP, SCALE_BITS, Format, groups
from mxcompile.plan import ROW_TILE, TileFormats

Array: TypeAlias = np.ndarray[Any, Any]

MAX_SCALE: Final = (1 << SCALE_BITS) - 1
MAX_ROW_SCALE: Final = float(np.finfo(np.float16).max)

BLOCK: Final = 1 << 17
"""Weights that are searched at a time: few enough for the caches, enough to keep threads busy."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Quantized rows: ``w = row_scale * scale * (code - zero * zero_step)``, scales by group."""

    codes: Array
    """uint8 [rows, columns]; of non-uniform formats the entries that stored codes look up."""
    scales: Array
    """uint8 [rows, groups]."""
    zeros: Array
    """uint8 [rows, groups], 0 to 15."""
    row_scale: Array
    """float16 [rows]."""

    def take(self, rows: Array) -> "Quantized":
        """Some of the rows, by index."""
        return Quantized(
            self.codes[rows], self.scales[rows], self.zeros[rows], self.row_scale[rows]
        )


@dataclass(frozen=True, slots=True)
class _Search:
    """Which grids are tried for a group.

    ``shrink`` times ``shifts`` are all tried: factors of the scale that holds the whole range, and
    shifts of its zero-point. Then both neighbours of the best zero-point, and for each of
    ``steps`` both neighbours of the best scale at that relative distance.
    """

    shrink: tuple[float, ...]
    shifts: tuple[int, ...]
    steps: tuple[float, ...]


def _span(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(first, last, count).tolist())


# Within 1 % of the best of all scales and zero-points on Gaussian weights at 1 to 4 bits, 4 % at
# 5 and 6. Few levels leave much to win by clipping and by zero-points between codes; many do not.
_SEARCHES: Final = {
    "int1": _Search(_span(0.3, 0.55, 4), (0,), (0.06, 0.03)),
    "int2": _Search(_span(0.45, 0.9, 5), (-1, 0, 1), (0.05, 0.025)),
    "int3": _Search(_span(0.55, 0.95, 6), (-1, 0, 1), (0.03,)),
    "table3": _Search(_span(0.6, 0.95, 4), (-1, 0, 1), (0.03,)),
    "int4": _Search(_span(0.6, 0.97, 6), (0,), (0.02, 0.01)),
    "nf4": _Search(_span(0.75, 1.0, 4), (0,), (0.03,)),
    "table4": _Search(_span(0.75, 1.0, 4), (0,), (0.03,)),
    "int5": _Search(_span(0.7, 0.98, 6), (0,), (0.015, 0.007)),
    "int6": _Search(_span(0.85, 0.98, 3), (0,), (0.01,)),
    "int8": _Search((), (), (0.01,)),
}
_NO_SEARCH: Final = _Search((), (), ())

LEARN_GROUPS: Final = 4096
"""Groups that a codebook is learned from, spread over the weight."""

LEARN_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """How much errors in the columns of a weight count, which may differ between kinds of rows.

    Attributes:
        columns: ``E[x_k**2]`` of what each kind meets, float32 [kinds, columns].
        kinds: The kind of each row, int64 [rows]; None where all are alike.
    """

    columns: Array
    kinds: Array | None = None

    @classmethod
    def of(cls, *moments: Array, kinds: Array | None = None) -> Self:
        """For what each kind meets: ``E[x x^T]`` [columns, columns], or its diagonal [columns]."""
        diagonals = [m if m.ndim == 1 else np.diagonal(m) for m in moments]
        return cls(np.array(diagonals, np.float32), kinds)

    def kinds_of(self, rows: Array) -> Array:
        """The kinds of some rows, by index."""
        alike: Array = np.zeros(len(rows), np.int64)
        return alike if self.kinds is None else self.kinds[rows]

    def rows(self, index: Array) -> Array:
        """Of some rows, [rows, columns]."""
        found: Array = self.columns[self.kinds_of(index)]
        return found

    def part(self, rows: slice) -> Self:
        """The same for a part of the rows alone."""
        return replace(self, kinds=None if self.kinds is None else self.kinds[rows])


def quantize(
    weight: Array,
    fmt: Format,
    importance: Importance | None = None,
    *,
    search: bool = True,
    codebook: Array | None = None,
    name: str = "the weight",
) -> Quantized:
    """Quantize the rows of a weight [rows, columns] to one format.

    Args:
        weight: Float numbers; they are read as float32.
        fmt: The format of all rows.
        importance: Of the columns; None weighs them alike.
        search: Whether to look for a better grid than the one that holds the whole range.
        codebook: For a learned format, what ``learn`` gave; None learns it from these rows.
        name: What an error calls the weight.

    Raises:
        UsageError: a weight is NaN, infinite or too large for the format.
    """
    result = _empty(*weight.shape)
    if codebook is None:
        codebook = learn(weight, fmt, importance, name=name)
    how = _SEARCHES[fmt.name] if search else _NO_SEARCH
    source = _Source(weight, importance, fmt, codebook, how, name)
    _quantize_rows(source, np.arange(len(weight)), result)
    return result


def quantize_tiles(
    weight: Array,
    formats: TileFormats,
    importance: Importance | None = None,
    *,
    name: str = "the weight",
) -> Quantized:
    """Quantize a weight whose row tiles have formats of their own; see ``quantize``.

    A codebook is learned from all rows, not from those that look it up: what a row becomes in a
    format does not depend on the formats of others, and prices hold for every plan.
    """
    result = _empty(*weight.shape)
    for fmt, rows in rows_by_format(formats, len(weight)):
        codebook = learn(weight, fmt, importance, name=name)
        how = _SEARCHES[fmt.name]
        _quantize_rows(_Source(weight, importance, fmt, codebook, how, name), rows, result)
    return result


def learn(
    weight: Array, fmt: Format, importance: Importance | None = None, *, name: str = "the weight"
) -> Array | None:
    """The codebook of a weight in a format, uint8 [levels], rising; None for uniform formats.

    Args:
        weight: Float numbers [rows, columns].
        fmt: The format; where its codebook is fixed, that is the answer.
        importance: Of the columns; None weighs them alike.
        name: What an error calls the weight.

    Raises:
        UsageError: a weight is NaN, infinite or too large for the format.
    """
    if not fmt.codebook:
        return None
    codebook: Array = np.array(fmt.codebook, np.uint8)
    if fmt.learned:
        step = -(-len(weight) * groups(weight.shape[1]) // LEARN_GROUPS)
        sample = np.arange(0, len(weight), step)
        for _ in range(LEARN_ROUNDS):
            source = _Source(weight, importance, fmt, codebook, _SEARCHES[fmt.name], name)
            codebook = source.grid(sample).learned()
    return codebook


def dequantize(quantized: Quantized, fmt: Format) -> Array:
    """The float32 weights [rows, columns] that codes of one format stand for."""
    columns = quantized.codes.shape[1]
    zeros = quantized.zeros * np.float32(fmt.zero_step)
    scales = quantized.scales * quantized.row_scale.astype(np.float32)[:, None]
    result = quantized.codes - _columnwise(zeros, columns)
    result *= _columnwise(scales, columns)
    return result


def dequantize_tiles(quantized: Quantized, formats: TileFormats) -> Array:
    """The float32 weights that codes with a format a row tile stand for."""
    result = np.empty(quantized.codes.shape, np.float32)
    for fmt, rows in rows_by_format(formats, len(result)):
        result[rows] = dequantize(quantized.take(rows), fmt)
    return result


def _columnwise(by_group: Array, columns: int) -> Array:
    return np.repeat(by_group, GROUP, axis=1)[:, :columns]


def _empty(rows: int, columns: int) -> Quantized:
    return Quantized(
        np.empty((rows, columns), np.uint8),
        np.empty((rows, groups(columns)), np.uint8),
        np.empty((rows, groups(columns)), np.uint8),
        np.empty(rows, np.float16),
    )


def rows_by_format(formats: TileFormats, rows: int) -> Iterator[tuple[Format, Array]]:
    """The formats of a weight's tiles, and for each the indices of its rows."""
    known = tuple(FORMATS.values())
    by_row = np.repeat([known.index(fmt) for fmt in formats.formats], ROW_TILE)[:rows]
    for number, fmt in enumerate(known):
        if (index := np.flatnonzero(by_row == number)).size:
            yield fmt, index


def nearest(codebook: Array) -> torch.Tensor:
    """What every whole number from 0 to 255 is rounded to, float32 [256]."""
    entries = torch.from_numpy(codebook.astype(np.float32))
    middles = (entries[1:] + entries[:-1]) / 2
    return entries[torch.bucketize(torch.arange(256, dtype=torch.float32), middles)]


def codebook_of(codes: Array) -> Array:
    """The codebook that entries are from, as far as it is used: uint8, rising."""
    found = np.zeros(256, np.bool_)
    for part in np.array_split(codes.reshape(-1), -(-codes.size // BLOCK)):
        found[part] = True
    used: Array = np.flatnonzero(found).astype(np.uint8)
    return used


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A weight, and how its rows are to be quantized."""

    weight: Array
    importance: Importance | None
    fmt: Format
    codebook: Array | None
    search: _Search
    name: str

    def grid(self, rows: Array) -> "_Grid":
        """The searched grid of some rows."""
        block = self.weight[rows].astype(np.float32)
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise UsageError(
                f"{self.name} is {block[row, column]} at row {rows[row]}, column {column}"
            )
        importance = np.ones_like(block) if self.importance is None else self.importance.rows(rows)
        h = _transposed(importance)
        grid = _Grid(_transposed(block), h, self.fmt, len(block), self.name, self.codebook)
        grid.search(self.search)
        return grid


def _quantize_rows(source: _Source, rows: Array, out: Quantized) -> None:
    """Quantize some rows, in blocks that are spread over torch's threads."""
    columns = source.weight.shape[1]
    step = max(BLOCK // (groups(columns) * GROUP), 1)

    def work(start: int) -> None:
        index = rows[start : start + step]
        grid = source.grid(index)
        codes = grid.codes().T.reshape(len(index), -1)[:, :columns]
        out.codes[index] = codes.numpy()
        out.scales[index], out.zeros[index], out.row_scale[index] = grid.encoded()

    with workers.pool() as pool:
        for _ in pool.map(work, range(0, len(rows), step)):
            pass


def _transposed(block: Array) -> torch.Tensor:
    """Float32 [GROUP, rows * groups] of a block of rows, so that a group is a column."""
    block = np.atleast_2d(block).astype(np.float32)
    padded = np.pad(block, ((0, 0), (0, -block.shape[1] % GROUP)))
    return torch.from_numpy(np.ascontiguousarray(padded.reshape(-1, GROUP).T))


class _Grid:
    """The best grid found so far for each group of a block of rows."""

    def __init__(
        self,
        w: torch.Tensor,
        h: torch.Tensor,
        fmt: Format,
        rows: int,
        name: str,
        codebook: Array | None,
    ) -> None:
        self.w, self.h, self.fmt, self.codebook = w, h, fmt, codebook
        self._nearest = None if codebook is None else nearest(codebook)
        low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
        self.zero_point, self.zero, self.full = _holding(low, high, fmt)
        self.empty = self.full == 0
        largest = self.full.reshape(rows, -1).amax(1) / MAX_SCALE
        if float(largest.max()) > MAX_ROW_SCALE:
            raise UsageError(f"{name} holds {float(w.abs().max()):.3g}, too large for {fmt}")
        self.row_scale = _round_up(largest)
        # Where a row or group is all zeros any scale will do, as long as nothing divides by 0.
        safe = torch.where(self.row_scale > 0, self.row_scale, 1).float()
        self.unit = safe[:, None].expand(-1, w.shape[1] // rows).reshape(-1)
        self.scale = (self.full / self.unit).ceil().clamp(1, MAX_SCALE)
        self._buffers = (torch.empty_like(w), torch.empty_like(w))
        self.error = self._error(self.scale, self.zero)

    def search(self, search: _Search) -> None:
        """Try the grids of a search; a later one must be better, so the result is determined."""
        nearest = self.zero_point.round()
        for factor in search.shrink:
            scale = (self.full * factor / self.unit).round().clamp(1, MAX_SCALE)
            for shift in search.shifts:
                self._try(scale, (nearest + shift).clamp(*self.fmt.zeros))
        for step in search.steps:
            for shift in (-1, 1):
                self._try(self.scale, (self.zero + shift).clamp(*self.fmt.zeros))
            for sign in (-1, 1):
                change = (self.scale * step).round().clamp(min=1)
                self._try((self.scale + sign * change).clamp(1, MAX_SCALE), self.zero)

    def codes(self) -> torch.Tensor:
        """The codes, uint8 [GROUP, groups]."""
        return self._round(self.scale, self.zero)[1].to(torch.uint8)

    def learned(self) -> Array:
        """A better codebook: each entry where the weights that round to it lie in the mean."""
        assert self.codebook is not None
        exact, code = self._round(self.scale, self.zero)
        weight = self.h * (self.scale * self.unit).square()
        index = code.to(torch.int64).flatten()
        total, mass = (
            torch.zeros(256, dtype=torch.float64).index_add_(0, index, part.double().flatten())
            for part in (exact.clamp(0, self.fmt.top) * weight, weight)
        )
        means = torch.where(mass > 0, total / mass, torch.arange(256.0, dtype=torch.float64))
        entries: Array = means[self.codebook.astype(np.int64)].round().to(torch.uint8).numpy()
        return np.sort(entries)

    def encoded(self) -> tuple[Array, Array, Array]:
        """Scales and zero-points [rows, groups], and row scales, as they are stored."""
        scale = torch.where(self.empty, 0, self.scale).to(torch.uint8)
        shape = (len(self.row_scale), -1)
        zero = self.zero.to(torch.uint8).reshape(shape)
        return scale.reshape(shape).numpy(), zero.numpy(), self.row_scale.numpy()

    def _try(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        error = self._error(scale, zero)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def _error(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        exact, code = self._round(scale, zero)
        difference = exact.sub_(code)
        squares = code.copy_(difference).mul_(difference).mul_(self.h)
        return squares.sum(0).mul_((scale * self.unit).square_())

    def _round(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in units of codes, and their codes."""
        exact, code = self._buffers
        torch.addcmul(zero * self.fmt.zero_step, self.w, 1 / (scale * self.unit), out=exact)
        torch.round(exact, out=code)
        code.clamp_(0, self.fmt.top)
        if self._nearest is not None:
            index = code.to(torch.int32).flatten()
            torch.index_select(self._nearest, 0, index, out=code.view(-1))
        return exact, code


def _holding(
    low: torch.Tensor, high: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each range's ideal zero-point, and the storable one that holds it at the least scale."""
    top, step = fmt.top, fmt.zero_step
    ideal = (top / step * -low / (high - low)).nan_to_num(0).clamp(*fmt.zeros)
    best = torch.full_like(ideal, torch.inf)
    zero = torch.zeros_like(ideal)
    # Three neighbours, because a range that is all but one-sided may round to a zero-point
    # that leaves its other side no code.
    for shift in (0, 1, -1):
        candidate = (ideal.floor() + shift).clamp(*fmt.zeros)
        below, above = candidate * step, top - candidate * step
        # Nothing below (above) zero needs no room there, however little there is.
        scale = torch.maximum(
            torch.where(low < 0, -low / below, 0), torch.where(high > 0, high / above, 0)
        )
        scale = torch.where((above < 0) | ((above == 0) & (high > 0)), torch.inf, scale)
        better = scale < best
        best, zero = torch.where(better, scale, best), torch.where(better, candidate, zero)
    return ideal, zero, best


def _round_up(values: torch.Tensor) -> torch.Tensor:
    """The least float16 numbers that are not below ``values``."""
    near = values.to(torch.float16)
    return torch.where(
        near.float() < values, torch.nextafter(near, near.new_tensor(torch.inf)), near
    )
