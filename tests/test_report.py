"""The report."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxcompile import artifact, report
from mxcompile.artifact import Artifact
from mxcompile.formats import FORMATS
from mxcompile.plan import PrecisionPlan, Unit, tile_bytes
from mxcompile.price import Costs
from mxcompile.statistics import SHRINK, Statistics, UseStatistics
from tests import toy

PLAN = PrecisionPlan.uniform(
    (
        Unit("model.embed_tokens.weight", 40, 32),
        Unit("model.layers.0.mlp.up_proj.weight", 32, 32),
        Unit("model.layers.11.mlp.up_proj.weight", 32, 32),
        Unit("model.layers.11.<b>odd</b>.weight", 32, 32),
    ),
    FORMATS["int4"],
)


ALL = tuple(FORMATS[f"int{bits}"] for bits in (2, 3, 4, 5, 6, 8))
FALL = np.array([0.09, 0.023, 0.0059, 0.0014, 0.00035, 0.00002])
EXPENSIVE = "model.layers.11.mlp.up_proj.weight"


def costs() -> Costs:
    """Every tile alike but the second of one layer, which is harmed a hundred times as much."""
    damage = {u.name: np.tile(FALL, (u.tiles, 1)) for u in PLAN.units}
    damage[EXPENSIVE][1] *= 100
    return Costs(PLAN.units, ALL, damage)


def statistics() -> Statistics:
    def use(unit: Unit) -> UseStatistics:
        rows = np.ones(unit.rows, np.float32)
        if unit.name == EXPENSIVE:
            rows[16:] = 3
        return UseStatistics("linear", "x", np.ones(unit.columns, np.float32), rows, 1)

    uses = {u.name: (use(u),) for u in PLAN.units}
    return Statistics(1, uses, {u.name: (0.5,) for u in PLAN.units})


def rendered(folder: Path, **found: Any) -> str:
    (folder / "code").write_bytes(b"")
    with artifact.staged(folder / "out.mxc") as staging:
        built = artifact.write(
            staging,
            dataclasses.replace(toy.manifest(), name="<script>alert(1)</script>"),
            code=folder / "code",
            weights=toy.weights(),
            plan=PLAN,
        )
        manifest = dataclasses.replace(built.manifest, quality={"kld_mean": 0.01234567})
        return report.render(
            Artifact(staging, manifest),
            predicted={"damage": 0.5, "damage_per_byte": 1.25e-5},
            seconds={"solve": 1.25},
            **found,
        )


@pytest.fixture
def html(tmp_path: Path) -> str:
    return rendered(tmp_path, costs=costs(), statistics=statistics())


def part(html: str, title: str) -> str:
    """A section of the report."""
    (found,) = (s for s in html.split("<h2>") if s.startswith(title))
    return found


def test_shows_what_was_measured_and_predicted(html: str) -> None:
    for shown in ("kld mean", "0.01235", "0.5", "solve", "1.2 s", "int4", "100.0 %"):
        assert shown in html
    assert "divergence from the float model" in part(html, "Predicted by the solver")


def test_the_heat_map_has_a_row_a_component_and_a_column_a_layer(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert svg.count("<rect") == 4
    assert svg.count("mlp.up_proj<title>") == 1
    assert ">11<title>" in svg


def test_sensitivity_is_damage_a_weight(html: str) -> None:
    svg = part(html, "Sensitivity by layer: damage per million weights, were all int4")
    fill = dict(re.findall(r'hsl\(212 80% (\d+)%\)"/><text [^>]*>([^<]+)<', svg))
    assert fill == {"96": "12", "93": "14", "38": "582"}
    table = part(html, "Sensitivity by component")
    components = re.findall(r"<tr><td class=t>([^<]*)<td>([\d,]+)", table)
    assert components[0] == ("mlp.up_proj", "2,048")
    assert len(components) == 3


def test_the_curve_has_this_artifact_on_it(html: str) -> None:
    svg = part(html, "Damage against size")
    names = re.findall(r"<title>([^:<]*): ", svg)
    uniform = [f"uniform {fmt}" for fmt in ALL]
    assert names == [*uniform, "this artifact, predicted", "this artifact, measured"]


def test_the_most_expensive_tile_comes_first_and_says_why(html: str) -> None:
    table = part(html, "The ten most expensive tiles")
    assert "One more byte would save 1.25e-05, the shadow price" in table
    rows = re.findall(r"<tr><td class=t>(.*?)(?=<tr>|</table>)", table)
    assert len(rows) == 9, "all tiles there are"
    cells = re.split("<td[^>]*>", rows[0])
    saved = 100 * (FALL[0] - FALL[2])
    extra = tile_bytes(32, FORMATS["int4"]) - tile_bytes(32, FORMATS["int2"])
    assert cells[:3] == [EXPENSIVE, "16-31", "int4"]
    assert [float(cell) for cell in cells[4:6]] == pytest.approx([saved, saved / extra], rel=1e-3)
    # Of 9 tiles of 32 columns, one of which is half empty, that one is harmed 100 times.
    model = (108 * 0.09) / (136 * 32)
    tensor = (101 * 0.09) / (32 * 32)
    assert float(cells[6]) == pytest.approx(tensor / model, rel=1e-3)
    assert float(cells[7]) == pytest.approx(100 * 2 / 101, rel=1e-3)
    # Rows are shrunk towards their mean of 2.
    assert float(cells[8]) == pytest.approx((3 - SHRINK) / 2, rel=1e-3)


def test_a_plan_that_was_given_is_not_explained(tmp_path: Path) -> None:
    html = rendered(tmp_path)
    assert "Sensitivity" not in html and "Damage against size" not in html


def test_is_escaped_and_needs_nothing_from_elsewhere(html: str) -> None:
    tags: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}

    Reader().feed(html)
    assert not tags & {"script", "link", "img", "iframe", "b"}
    assert "http" not in html
