"""Plans as values: text forms, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile.errors import PlanError
from mxcompile.formats import FORMATS
from mxcompile.plan import PrecisionPlan, TileFormats, Unit, tile_bytes

TILES = st.lists(st.sampled_from(list(FORMATS.values())), min_size=1, max_size=40).map(
    lambda formats: TileFormats(tuple(formats))
)


@given(TILES)
def test_tiles_survive_their_text_form(tiles: TileFormats) -> None:
    assert TileFormats.parse(str(tiles)) == tiles


def test_runs_are_counted() -> None:
    int4, int8 = FORMATS["int4"], FORMATS["int8"]
    assert str(TileFormats((int4, int4, int8))) == "int4*2,int8"


@pytest.mark.parametrize("text", ["", "int7", "int4*0", "int4*", "int4,,int8", "int4*-1", "4"])
def test_malformed_tiles_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"is not FORMAT or FORMAT\*COUNT; formats: int1,"):
        TileFormats.parse(text)


@given(TILES)
def test_plan_survives_json(tiles: TileFormats) -> None:
    unit = Unit("w", 16 * len(tiles.formats) - 3, 40)
    plan = PrecisionPlan((unit,), {"w": tiles})
    again = PrecisionPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert sum(plan.parameters_by_format().values()) == unit.parameters


def test_plan_must_fit_its_units() -> None:
    unit = Unit("w", 33, 64)
    with pytest.raises(PlanError, match="w has 3 row tiles, the plan has 2"):
        PrecisionPlan((unit,), {"w": TileFormats.parse("int4*2")})
    with pytest.raises(PlanError, match="disagree on"):
        PrecisionPlan((unit,), {"v": TileFormats.parse("int4*3")})


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"version": 2, "row_tile": 16}, {"version": 1, "row_tile": 16, "units": 3}],
)
def test_what_is_no_plan_is_refused(data: object) -> None:
    with pytest.raises(PlanError):
        PrecisionPlan.from_json(data)


def test_bytes_of_a_tile() -> None:
    # 20 groups of 64 * 4 bytes of codes; 20 * 24 bytes of scales and zeros and 32 of row scales
    # are 512 already.
    assert tile_bytes(640, FORMATS["int4"]) == 20 * 256 + 512
    # One group, padded: 128 of codes, 16 + 8 + 32 padded to 64.
    assert tile_bytes(5, FORMATS["int2"]) == 128 + 64
