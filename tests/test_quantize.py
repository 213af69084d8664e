"""The meaning of weight quantization: exact edges, bounds, and the known errors of good grids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mxcompile.errors import UsageError
from mxcompile.formats import FORMATS, GROUP, Format, groups
from mxcompile.plan import TileFormats
from mxcompile.quantize import (
    Importance,
    Quantized,
    codebook_of,
    dequantize,
    dequantize_tiles,
    quantize,
    quantize_tiles,
)

ALL = tuple(FORMATS.values())
UNIFORM = tuple(fmt for fmt in ALL if not fmt.codebook)
CODEBOOKS = tuple(fmt for fmt in ALL if fmt.codebook)
every_format = pytest.mark.parametrize("fmt", ALL, ids=str)
every_uniform_format = pytest.mark.parametrize("fmt", UNIFORM, ids=str)
every_codebook = pytest.mark.parametrize("fmt", CODEBOOKS, ids=str)


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_normal((rows, columns))).astype(np.float32)


def steps(quantized: Quantized) -> np.ndarray:
    """The distance of neighbouring codes, for each weight."""
    by_group = quantized.scales * quantized.row_scale.astype(np.float32)[:, None]
    return np.repeat(by_group, GROUP, axis=1)[:, : quantized.codes.shape[1]]


def weighted_error(weight: np.ndarray, values: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The error that the search minimises, by row and group."""
    squares = h * (weight.astype(np.float64) - values) ** 2
    padded = np.pad(squares, ((0, 0), (0, -weight.shape[1] % GROUP)))
    total: np.ndarray = padded.reshape(len(weight), -1, GROUP).sum(2)
    return total


weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([1, 31, 32, 33, 70])),
    elements=st.floats(-1e4, 1e4, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32),
)


@every_format
def test_shapes_and_ranges(fmt: Format) -> None:
    quantized = quantize(gaussian(5, 70), fmt)
    assert quantized.codes.shape == (5, 70)
    assert quantized.scales.shape == quantized.zeros.shape == (5, groups(70))
    assert quantized.row_scale.shape == (5,)
    kinds = [a.dtype for a in (quantized.codes, quantized.scales, quantized.zeros)]
    assert kinds == [np.uint8] * 3
    assert quantized.row_scale.dtype == np.float16
    assert quantized.codes.max() <= fmt.top
    assert not fmt.codebook or len(codebook_of(quantized.codes)) <= fmt.levels
    assert quantized.zeros.max() < 16


@every_uniform_format
def test_a_grid_that_is_on_the_grid_is_exact(fmt: Format) -> None:
    """Weights made from codes over the whole range, in steps that fp16 and 8 bits hold."""
    zero = int(fmt.levels / 2 / fmt.zero_step)
    codes = np.arange(GROUP) * (fmt.levels - 1) // (GROUP - 1)
    weight = (255 * 2.0**-12 * (codes - zero * fmt.zero_step)).astype(np.float32)[None]
    quantized = quantize(weight, fmt)
    np.testing.assert_array_equal(quantized.codes[0], codes)
    assert (quantized.scales[0, 0], quantized.zeros[0, 0]) == (255, zero)
    np.testing.assert_array_equal(dequantize(quantized, fmt), weight)


def test_the_definition() -> None:
    quantized = Quantized(
        np.array([[0, 3, 1]], np.uint8),
        np.array([[100]], np.uint8),
        np.array([[6]], np.uint8),
        np.array([0.5], np.float16),
    )
    assert dequantize(quantized, FORMATS["int2"]).tolist() == [[-75.0, 75.0, -25.0]]
    assert dequantize(quantized, FORMATS["int8"]).tolist() == [[-4800.0, -4650.0, -4750.0]]


@every_format
def test_zeros_stay_zeros(fmt: Format) -> None:
    weight = gaussian(3, 96)
    weight[1] = 0
    weight[2, 32:64] = 0
    values = dequantize(quantize(weight, fmt), fmt)
    assert not values[1].any()
    assert not values[2, 32:64].any()
    assert not dequantize(quantize(np.zeros((2, 40), np.float32), fmt), fmt).any()


@every_uniform_format
@pytest.mark.parametrize("number", [1.0, -1.0, 3e-3, -7e4, 1e-6])
def test_constant_groups_are_held(fmt: Format, number: float) -> None:
    """To half a step of 127, or to the rounding of the least row scale."""
    weight = np.full((1, 64), number, np.float32)
    quantized = quantize(weight, fmt)
    slack = max(abs(number) / 254, 2.0**-24)
    np.testing.assert_allclose(dequantize(quantized, fmt), weight, rtol=0, atol=slack)


@every_uniform_format
def test_one_sided_groups_use_the_whole_range(fmt: Format) -> None:
    """Half of it where zero-points are fixed."""
    weight = np.linspace(0, 1, 32, dtype=np.float32)[None]
    step = max(1 / (fmt.levels - 1), 1 / (15 * fmt.zero_step)) * (2 if fmt.centred else 1)
    for sign in (1, -1):
        values = dequantize(quantize(sign * weight, fmt, search=False), fmt)
        assert np.abs(values - sign * weight).max() <= 0.51 * step


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-12, 1e-7, 1e-4, 1.0, 1e4, 1e6])
def test_any_magnitude_that_fp16_scales_can_hold(scale: float) -> None:
    weight = (np.linspace(-1, 1, 64, dtype=np.float32) * np.float32(scale))[None]
    values = dequantize(quantize(weight, FORMATS["int8"]), FORMATS["int8"])
    # Codes are 2/240 of the range apart, or the least fp16 number where that is more.
    np.testing.assert_allclose(values, weight, rtol=0, atol=max(scale / 200, 2.0**-24))


def test_mixed_magnitudes_in_a_row() -> None:
    weight = gaussian(1, 96)
    weight[0, :32] *= 1e4
    weight[0, 64:] *= 1e-4
    fmt = FORMATS["int4"]
    quantized = quantize(weight, fmt)
    errors = np.abs(dequantize(quantized, fmt) - weight)
    assert (errors <= np.maximum(steps(quantized), np.abs(weight))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named(bad: float) -> None:
    weight = gaussian(40, 50)
    weight[33, 47] = bad
    with pytest.raises(UsageError, match=rf"layer\.w is {bad} at row 33, column 47"):
        quantize(weight, FORMATS["int4"], name="layer.w")


def test_numbers_that_do_not_fit_are_named() -> None:
    weight = gaussian(2, 32)
    weight[1, 3] = 3e38
    with pytest.raises(UsageError, match=r"w holds 3e\+38, too large for int2"):
        quantize(weight, FORMATS["int2"], name="w")


@settings(max_examples=80, deadline=None)
@given(weights, st.sampled_from(UNIFORM), st.booleans())
def test_rounding_is_to_the_nearest_code(weight: np.ndarray, fmt: Format, search: bool) -> None:
    """Within half a step inside the clip range, and at its nearer end outside."""
    quantized = quantize(weight, fmt, search=search)
    values = dequantize(quantized, fmt).astype(np.float64)
    step = steps(quantized).astype(np.float64)
    zero = np.repeat(quantized.zeros * fmt.zero_step, GROUP, axis=1)[:, : weight.shape[1]]
    nearest = np.clip(weight.astype(np.float64), -zero * step, (fmt.levels - 1 - zero) * step)
    # Below the least normal float a group counts as empty.
    slack = 1e-5 * (np.abs(weight) + fmt.levels * step) + np.finfo(np.float32).tiny
    assert (np.abs(nearest - values) <= step / 2 + slack).all()
    if not search:  # the whole range is held: nothing is clipped by more than a rounding
        assert (np.abs(weight - nearest) <= slack).all()


@settings(max_examples=80, deadline=None)
@given(weights, st.sampled_from(UNIFORM), st.integers(0, 3))
def test_the_search_never_loses(weight: np.ndarray, fmt: Format, seed: int) -> None:
    h = np.exp(2 * np.random.default_rng(seed).standard_normal(weight.shape[1], np.float32))
    found = weighted_error(weight, dequantize(quantize(weight, fmt, Importance.of(h)), fmt), h)
    plain = weighted_error(weight, dequantize(quantize(weight, fmt, search=False), fmt), h)
    size = np.pad(h * weight.astype(np.float64) ** 2, ((0, 0), (0, -weight.shape[1] % GROUP)))
    assert (found <= plain + 1e-6 * (plain + size.reshape(len(weight), -1, GROUP).sum(2))).all()


@settings(max_examples=80, deadline=None)
@given(weights, st.sampled_from(UNIFORM))
def test_quantizing_again_changes_little(weight: np.ndarray, fmt: Format) -> None:
    """What is on a grid stays there, up to how finely 8 bits can say the scale."""
    first = quantize(weight, fmt)
    values = dequantize(first, fmt)
    again = dequantize(quantize(values, fmt, search=False), fmt)
    # The scale is rounded up to a whole number of row scales, which are rounded up themselves.
    step = steps(first) + first.row_scale[:, None].astype(np.float32)
    assert (np.abs(again - values) <= 0.6 * step * max(1.0, fmt.zero_step)).all()


@every_uniform_format
def test_quantizing_again_reproduces_full_grids(fmt: Format) -> None:
    """Groups that use their whole code range come back bit for bit."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, fmt.levels, (20, 96))
    codes[:, ::32], codes[:, 1::32] = 0, fmt.levels - 1
    zeros = np.full((20, 3), int(fmt.levels / 2 / fmt.zero_step), np.uint8)
    scales = rng.integers(1, 256, (20, 3)).astype(np.uint8)
    scales[:, 0] = 255
    made = Quantized(codes.astype(np.uint8), scales, zeros, np.full(20, 2.0**-10, np.float16))
    values = dequantize(made, fmt)
    again = quantize(values, fmt)
    np.testing.assert_array_equal(dequantize(again, fmt), values)


# The most that quantizing normal numbers in clipped groups of 32 may leave of their variance: what
# whole zero-points are known to reach at 4 bits and above; as measured below, where they are
# fractions, and of codebooks: the extremes of 32 normal numbers leave little to win at 4 bits.
GAUSSIAN = {
    "int1": 0.328,
    "int2": 0.095,
    "int3": 0.024,
    "int4": 0.0061,
    "int5": 0.0015,
    "int6": 0.00037,
    "int8": 2.8e-5,
    "table3": 0.0222,
    "nf4": 0.0066,
    "table4": 0.0062,
}


@every_format
def test_gaussian_error(fmt: Format) -> None:
    weight = gaussian(256, 640)
    error = np.square(dequantize(quantize(weight, fmt), fmt) - weight).mean() / weight.var()
    assert error <= GAUSSIAN[fmt.name]


def test_more_bits_are_better() -> None:
    weight = gaussian(64, 100)
    errors = [np.square(dequantize(quantize(weight, fmt), fmt) - weight).sum() for fmt in UNIFORM]
    assert errors == sorted(errors, reverse=True)


@every_codebook
def test_codes_are_the_nearest_entries(fmt: Format) -> None:
    """To half a unit of 8 bits, in which the search rounds before it looks up."""
    weight = gaussian(48, 100, seed=5)
    quantized = quantize(weight, fmt)
    entries = codebook_of(quantized.codes).astype(np.float64)
    step = steps(quantized).astype(np.float64)
    zero = np.repeat(quantized.zeros * fmt.zero_step, GROUP, axis=1)[:, : weight.shape[1]]
    choices = (entries - zero[..., None]) * step[..., None]
    least = np.abs(choices - weight[..., None]).min(2)
    found = np.abs(dequantize(quantized, fmt) - weight)
    assert (found <= least + (1 + 1e-5) * step).all()


def test_nf4_is_the_published_table() -> None:
    entries = np.array(FORMATS["nf4"].codebook)
    assert (entries[0], entries[7], entries[15]) == (1, 128, 255)
    np.testing.assert_allclose((entries[8] - 128) / 127, 0.0795803, atol=0.5 / 127)
    assert set(codebook_of(quantize(gaussian(64, 64), FORMATS["nf4"]).codes)) <= set(entries)


@pytest.mark.parametrize(("name", "share"), [("table3", 0.25), ("table4", 0.7)])
def test_a_codebook_learns_where_weights_lie(name: str, share: float) -> None:
    """Weights of few values, unevenly spaced: uniform grids miss them, a codebook finds them."""
    rng = np.random.default_rng(6)
    values = np.array([-1.0, -0.97, -0.1, 0.0, 0.02, 0.5, 0.9, 1.0], np.float32)
    weight = values[rng.integers(0, 8, (128, 128))]
    errors = {
        fmt: np.square(dequantize(quantize(weight, FORMATS[fmt]), FORMATS[fmt]) - weight).mean()
        for fmt in (name, name.replace("table", "int"))
    }
    assert errors[name] < share * errors[name.replace("table", "int")]


@pytest.mark.parametrize("name", ["table3", "table4"])
def test_codebooks_beat_uniform_grids_on_heavy_tails(name: str) -> None:
    weight = np.random.default_rng(7).laplace(size=(256, 640)).astype(np.float32)
    table, uniform = (
        np.square(dequantize(quantize(weight, fmt), fmt) - weight).sum()
        for fmt in (FORMATS[name], FORMATS[name.replace("table", "int")])
    )
    assert table < 0.9 * uniform


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight = gaussian(64, 64)
    h = np.where(np.arange(64) % 8 == 0, 100.0, 0.1).astype(np.float32)
    fmt = FORMATS["int3"]
    squares = [
        np.square(dequantize(quantize(weight, fmt, i), fmt) - weight)
        for i in (None, Importance.of(h))
    ]
    assert squares[1][:, ::8].mean() < 0.7 * squares[0][:, ::8].mean()


def test_columns_without_importance_are_harmless() -> None:
    weight = gaussian(4, 64)
    values = dequantize(
        quantize(weight, FORMATS["int4"], Importance.of(np.zeros(64, np.float32))), FORMATS["int4"]
    )
    assert np.abs(values - weight).max() <= np.ptp(weight) / 15


def test_results_do_not_depend_on_the_block_or_the_thread() -> None:
    weight = gaussian(700, 640)
    fmt = FORMATS["int3"]
    whole, again = quantize(weight, fmt), quantize(weight, fmt)
    part = quantize(weight[600:601], fmt)
    for name in ("codes", "scales", "zeros", "row_scale"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(whole, name)[600:601], getattr(part, name))


def test_tiles_have_formats_of_their_own() -> None:
    weight = gaussian(41, 70)
    formats = TileFormats.parse("int3,int8,int3")
    mixed = quantize_tiles(weight, formats)
    values = dequantize_tiles(mixed, formats)
    for fmt, rows in (("int3", np.r_[0:16, 32:41]), ("int8", np.r_[16:32])):
        alone = quantize(weight[rows], FORMATS[fmt])
        np.testing.assert_array_equal(mixed.codes[rows], alone.codes)
        np.testing.assert_array_equal(mixed.scales[rows], alone.scales)
        np.testing.assert_array_equal(values[rows], dequantize(alone, FORMATS[fmt]))


def test_half_precision_weights_are_read() -> None:
    weight = gaussian(4, 64).astype(np.float16)
    fmt = FORMATS["int8"]
    same = quantize(weight.astype(np.float32), fmt)
    np.testing.assert_array_equal(quantize(weight, fmt).codes, same.codes)
