"""Error feedback: against its definition, and what it must never make worse."""

import numpy as np
import pytest

from mxcompile import gptq
from mxcompile.formats import FORMATS, GROUP, Format
from mxcompile.gptq import Feedback, Quantizer, refine
from mxcompile.plan import ROW_TILE, TileFormats
from mxcompile.quantize import (
    Importance,
    Quantized,
    codebook_of,
    dequantize,
    dequantize_tiles,
    quantize,
)

COLUMNS = 3 * GROUP


def correlated(seed: int, columns: int = COLUMNS) -> np.ndarray:
    """H of inputs that go together: few directions, and some noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 12)) @ rng.standard_normal((12, columns))
    x += 0.3 * rng.standard_normal(x.shape)
    return (x.T @ x / len(x)).astype(np.float32)


def weights(seed: int, rows: int = 40, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def trusted(moment: np.ndarray) -> np.ndarray:
    """H as the feedback takes it."""
    diagonal = np.diag(np.diagonal(moment)).astype(np.float64)
    mixed = gptq.TRUST * moment + (1 - gptq.TRUST) * diagonal
    result: np.ndarray = mixed + gptq.DAMPING * np.trace(diagonal) / len(moment) * np.eye(
        len(moment)
    )
    return result


def rows(quantizer: Quantizer, weight: np.ndarray, fmt: Format) -> Quantized:
    """A weight in one format."""
    return quantizer.tiles(weight, TileFormats((fmt,) * -(-len(weight) // ROW_TILE)))


def harm(delta: np.ndarray, moment: np.ndarray) -> float:
    return float(((delta @ moment) * delta).sum())


def nearest(exact: np.ndarray, grid: Quantized, fmt: Format) -> np.ndarray:
    """What numbers in units of codes are rounded to."""
    codes = np.clip(np.round(exact), 0, fmt.top)
    if not fmt.codebook:
        return codes
    entries = codebook_of(grid.codes).astype(float)
    found: np.ndarray = entries[np.abs(codes[:, None] - entries).argmin(1)]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_against_the_definition(name: str) -> None:
    """Column after column, each later one moved by the inverse of what is left of H."""
    fmt, weight, moment = FORMATS[name], weights(0, rows=5), correlated(1)
    grid = quantize(weight, fmt, Importance.of(moment))
    H, left = trusted(moment), weight.astype(np.float64)
    step = np.repeat(grid.scales * grid.row_scale.astype(np.float64)[:, None], GROUP, axis=1)
    zero = np.repeat(grid.zeros * fmt.zero_step, GROUP, axis=1)
    codes = np.zeros(weight.shape)
    free = list(np.argsort(-np.diagonal(H), kind="stable"))
    while free:
        column = free.pop(0)
        exact = left[:, column] / step[:, column] + zero[:, column]
        codes[:, column] = nearest(exact, grid, fmt)
        error = left[:, column] - (codes[:, column] - zero[:, column]) * step[:, column]
        rest = [column, *free]
        inverse = np.linalg.inv(H[np.ix_(rest, rest)])
        for i, other in enumerate(free, 1):
            left[:, other] -= error * inverse[0, i] / inverse[0, 0]
    found = refine(weight, grid, fmt, Feedback.of(moment)).codes
    # Sums in another precision tip a few roundings, and what follows from them.
    assert (found == codes).mean() > 0.97


@pytest.mark.parametrize("name", FORMATS)
def test_feedback_lowers_the_harm(name: str) -> None:
    fmt, weight, moment = FORMATS[name], weights(2), correlated(3)
    plain = quantize(weight, fmt, Importance.of(moment))
    better = rows(Quantizer.of(moment), weight, fmt)
    H = trusted(moment)
    assert harm(dequantize(better, fmt) - weight, H) < harm(dequantize(plain, fmt) - weight, H)
    for field in ("scales", "zeros", "row_scale"):
        np.testing.assert_array_equal(getattr(better, field), getattr(plain, field))


def test_independent_inputs_leave_nothing_to_hand_on() -> None:
    fmt, weight = FORMATS["int3"], weights(4)
    moment = np.diag(np.arange(1, COLUMNS + 1)).astype(np.float32)
    plain = quantize(weight, fmt, Importance.of(moment))
    np.testing.assert_array_equal(rows(Quantizer.of(moment), weight, fmt).codes, plain.codes)
    assert Quantizer.of(np.diagonal(moment)).feedbacks == (None,)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, weight, moment = FORMATS["int4"], weights(5), correlated(6)
    whole = rows(Quantizer.of(moment), weight, fmt)
    monkeypatch.setattr(gptq, "ROWS", 7)
    np.testing.assert_array_equal(rows(Quantizer.of(moment), weight, fmt).codes, whole.codes)
    single = rows(Quantizer.of(moment), weight[3:4], fmt)
    np.testing.assert_array_equal(single.codes[0], whole.codes[3])


def test_tiles_of_several_formats_and_a_padded_group() -> None:
    columns = COLUMNS - 5
    weight, moment = weights(7, columns=columns), correlated(8, columns)
    formats = TileFormats.parse("int4,int2,int4")
    quantizer = Quantizer.of(moment)
    mixed = dequantize_tiles(quantizer.tiles(weight, formats), formats)
    for tile, fmt in enumerate(formats.formats):
        part = slice(16 * tile, 16 * tile + 16)
        alone = dequantize(rows(quantizer, weight[part], fmt), fmt)
        np.testing.assert_array_equal(mixed[part], alone)


def test_rows_that_meet_different_things_are_rounded_for_them() -> None:
    weight, moments = weights(11), (correlated(12), correlated(13), np.diagonal(correlated(14)))
    kinds = np.arange(len(weight)) % 3
    kinds[32:] = 0  # a codebook that rows of one kind look up alone
    formats = TileFormats.parse("int4,int2,table3")
    mixed = dequantize_tiles(Quantizer.of(*moments, kinds=kinds).tiles(weight, formats), formats)
    for kind, moment in enumerate(moments):
        alone = dequantize_tiles(Quantizer.of(moment).tiles(weight, formats), formats)
        uniform = np.flatnonzero((kinds == kind) & (np.arange(len(weight)) < 32))
        np.testing.assert_array_equal(mixed[uniform], alone[uniform])  # codebooks are of all rows
        other = np.flatnonzero((kinds != kind) & (np.arange(len(weight)) < 32))
        assert (mixed[other] != alone[other]).any()


def test_inputs_that_never_vary_are_no_trouble() -> None:
    moment = correlated(9)
    moment[:, 7] = moment[7] = 0
    for H in (moment, np.zeros_like(moment)):
        codes = rows(Quantizer.of(H), weights(10), FORMATS["int4"]).codes
        assert codes.max() <= 15
