"""Charts as SVG."""

import re

import pytest

from mxcompile import page
from mxcompile.page import Mark


def circles(svg: str) -> dict[str, tuple[float, float]]:
    """Where the dots are, by their tooltips' names."""
    found = re.findall(r"<circle cx=([\d.]+) cy=([\d.]+) [^>]*><title>([^:]*):", svg)
    return {name: (float(x), float(y)) for x, y, name in found}


def test_a_curve_is_linear_in_x_and_logarithmic_in_y() -> None:
    marks = [Mark("a", 2, 0.001), Mark("b", 4, 0.01), Mark("c", 6, 0.1, strong=True)]
    svg = page.curve([(2, 0.1), (6, 0.001)], marks, ("bits", "damage"))
    at = circles(svg)
    assert at["a"][0] - at["b"][0] == pytest.approx(at["b"][0] - at["c"][0], abs=0.2)
    assert at["a"][1] - at["b"][1] == pytest.approx(at["b"][1] - at["c"][1], abs=0.2)
    assert at["a"][1] > at["c"][1], "less is further down"
    (line,) = re.findall(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    assert [float(n) for n in line] == [
        *(at["a"][0], at["c"][1]),
        *(at["c"][0], at["a"][1]),
    ]
    for tick in ("0.001", "0.01", "0.1"):
        assert f">{tick}<title>" in svg


def test_what_is_not_positive_has_no_place() -> None:
    assert page.curve([(1, 0.0)], [Mark("a", 1, 0.0)], ("x", "y")) == ""
    assert page.dots([("a", 0.0)], "a", "x") == ""
    assert circles(page.dots([("a", 0.0), ("b", 1.0)], "a", "x")).keys() == {"b"}


def test_dots_are_ranked() -> None:
    svg = page.dots([("worst", 0.4), ("best", 0.1), ("middle", 0.2)], "best", "divergence")
    at = circles(svg)
    assert sorted(at, key=lambda name: at[name][1]) == ["best", "middle", "worst"]
    step = at["middle"][0] - at["best"][0]
    assert at["worst"][0] - at["middle"][0] == pytest.approx(step, abs=0.2)
    assert svg.count(page.ACCENT) == 1


def test_a_heat_map_darkens_and_keeps_to_its_scale() -> None:
    svg = page.heat_map({"a": {0: -1.0, 1: 0.5, 3: 9.0}}, lambda v: v, "{:.1f}".format)
    shades = [float(s) for s in re.findall(r"hsl\(212 80% (\d+)%\)", svg)]
    assert shades == [96, 67, 38]
    assert ">3<title>" in svg and ">9.0<title>" in svg


def test_tables_align_by_column() -> None:
    html = page.table(("name", "n"), [("<a>", 1.23456), ("b", 2)])
    assert "<td class=t>&lt;a&gt;<td>1.235" in html and "<th class=t>name<th>n" in html
    assert page.section("Empty", page.values({})) == ""
