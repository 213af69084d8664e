"""Prices against the definition of damage, tile by tile."""

import numpy as np
import pytest

from mxcompile import price as module
from mxcompile.errors import UsageError
from mxcompile.formats import FORMATS
from mxcompile.plan import ROW_TILE, Unit, tile_bytes
from mxcompile.price import FEEDBACK, price
from mxcompile.quantize import Importance, dequantize, quantize
from mxcompile.statistics import Statistics, UseStatistics, expected, shrunk

pytestmark = pytest.mark.filterwarnings("error")
ALL = module.PRICED
UNIFORM = [ALL.index(fmt) for fmt in ALL if not fmt.codebook]
ROWS, COLUMNS = 41, 70


@pytest.fixture
def weight() -> np.ndarray:
    """Not to be written to, as weights in a mapped file are not."""
    found = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    found.flags.writeable = False
    return found


@pytest.fixture
def statistics() -> Statistics:
    """A tied embedding: read by rows, and multiplied with correlated inputs."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((300, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS))).astype(
        np.float32
    )
    uses = (
        UseStatistics(
            "embedding", "ids", rng.random(COLUMNS, np.float32), rng.random(ROWS, np.float32), 300
        ),
        UseStatistics("linear", "h", x.T @ x / len(x), rng.random(ROWS, np.float32), 300),
    )
    return Statistics(300, {"w": uses}, {"w": (3.0, 0.25)})


def by_definition(weight: np.ndarray, statistics: Statistics, tile: int, choice: int) -> float:
    fmt = ALL[choice]
    rows = slice(tile * ROW_TILE, (tile + 1) * ROW_TILE)
    moments, kinds = statistics.kinds("w")
    assert len(moments) > 1 and kinds is not None
    quantized = quantize(weight, fmt, Importance.of(*moments, kinds=kinds))
    delta = (dequantize(quantized, fmt) - weight).astype(np.float64)[rows]
    lookup, product = statistics.uses["w"]
    one = expected(lookup.rows, 300)[rows] * (delta**2 @ lookup.moment)
    other = shrunk(product.rows)[rows] * np.einsum("ok,kl,ol->o", delta, product.moment, delta)
    return FEEDBACK * float((3.0 * one + 0.25 * other).sum())


@pytest.mark.parametrize("block", [1, 40 * COLUMNS, 1 << 23])
def test_prices_are_damages(
    weight: np.ndarray, statistics: Statistics, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    unit = Unit("w", ROWS, COLUMNS)
    costs = price({"w": weight}.__getitem__, [unit], statistics)
    assert costs.damage["w"].shape == (3, len(ALL))
    for tile in range(3):
        for choice in range(len(ALL)):
            expected = by_definition(weight, statistics, tile, choice)
            assert costs.damage["w"][tile, choice] == pytest.approx(expected, rel=1e-4)


def test_wider_formats_cost_more_bytes_and_do_less_damage(
    weight: np.ndarray, statistics: Statistics
) -> None:
    unit = Unit("w", ROWS, COLUMNS)
    costs = price({"w": weight}.__getitem__, [unit], statistics)
    assert (np.diff(costs.damage["w"][:, UNIFORM], axis=1) < 0).all()
    assert costs.bytes(unit).tolist() == [tile_bytes(COLUMNS, fmt) for fmt in ALL]
    assert (np.diff(costs.bytes(unit)) >= 0).all()
    assert (np.diff(costs.bytes(unit)[UNIFORM]) > 0).all()


def test_only_the_formats_asked_for_are_priced(weight: np.ndarray, statistics: Statistics) -> None:
    unit = Unit("w", ROWS, COLUMNS)
    formats = (FORMATS["int4"], FORMATS["int8"])
    costs = price({"w": weight}.__getitem__, [unit], statistics, formats)
    assert costs.formats == formats
    assert costs.damage["w"].shape == (3, 2)
    everything = price({"w": weight}.__getitem__, [unit], statistics)
    asked = [ALL.index(fmt) for fmt in formats]
    np.testing.assert_array_equal(costs.damage["w"], everything.damage["w"][:, asked])


def test_infinite_statistics_are_named(weight: np.ndarray, statistics: Statistics) -> None:
    broken = Statistics(1, statistics.uses, {"w": (np.inf, 1.0)})
    with pytest.raises(UsageError, match=r"w cannot be priced: calibration met infinite numbers"):
        price({"w": weight}.__getitem__, [Unit("w", ROWS, COLUMNS)], broken)
