"""What the scripts that compare are made of: interpolation, neighbours, plots, the large solve."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from compare_quality import at_equal_bytes
from contenders import MIXED, UNIFORM, fitting, interpolated, neighbours
from plot import Series, plot

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def test_logarithms_of_errors_are_interpolated() -> None:
    points = [(100, 1.0), (300, 0.01)]
    assert interpolated(points, 200) == pytest.approx(0.1)
    assert interpolated(points, 100) == pytest.approx(1.0)
    assert interpolated(points, 300) == pytest.approx(0.01)


def test_nothing_is_extrapolated() -> None:
    assert interpolated([(100, 1.0), (300, 0.01)], 99) is None
    assert interpolated([(100, 1.0), (300, 0.01)], 301) is None


def test_a_point_that_a_smaller_one_beats_does_not_count() -> None:
    assert interpolated([(100, 1.0), (200, 5.0), (300, 0.01)], 200) == pytest.approx(0.1)


def test_the_best_that_fits_need_not_be_the_largest() -> None:
    points = [(100, 0.5), (200, 0.7), (300, 0.1)]
    assert fitting(points, 250) == 0.5
    assert fitting(points, 99) is None


def test_neighbours_are_next_on_both_sides() -> None:
    sizes = {"a": 1000, "b": 2000, "c": 2001, "d": 3000, "e": 4000}
    assert neighbours(sizes, [2500]) == ["b", "c", "d"]
    assert neighbours(sizes, [0, 9000]) == ["a", "e"]


def test_ratios_are_at_the_bytes_of_the_mixed_plan_and_within_a_text() -> None:
    about = {"scheme": "3bit", "text": "book"}
    rows = [
        {**about, "system": MIXED, "bytes": 200, "kld_mean": 0.02},
        {**about, "system": UNIFORM, "bytes": 100, "kld_mean": 1.0},
        {**about, "system": UNIFORM, "bytes": 300, "kld_mean": 0.01},
        {**about, "system": UNIFORM, "bytes": 200, "kld_mean": 0.001, "text": "other"},
    ]
    (line,) = at_equal_bytes(rows)
    assert (line["text"], line["against"]) == ("book", UNIFORM)
    assert line["ratio to between"] == pytest.approx(0.2)
    assert line["ratio to fits"] == pytest.approx(0.02)


def test_a_plot_is_an_svg_with_larger_errors_higher() -> None:
    series = [
        Series("ours", "a < b", [(3.0, 0.1, "3bit"), (4.0, 0.01, "4bit")]),
        Series("theirs", "a < b", [(3.5, 0.5, "Q3"), (4.5, 0.9, "Q4")]),
    ]
    root = ElementTree.fromstring(plot(series, "title", "bits", "error"))
    tops = [float(circle.attrib["cy"]) for circle in root.iter(f"{SVG}circle")]
    assert len(tops) == 4
    assert tops[3] < tops[2] < tops[0] < tops[1]
    assert "a < b" in [text.text for text in root.iter(f"{SVG}text")]
    # A larger point that is worse is drawn, and no line goes to it.
    assert series[1].front == [(3.5, 0.5)]


def test_eight_billion_parameters_are_solved_in_a_minute_and_2_gb() -> None:
    script = ROOT / "scripts" / "solve_8b.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["parameters"] > 8e9
    assert found["seconds"] < 60
    assert found["peak_memory_bytes"] < 2e9
    assert found["bits_per_weight"] <= 4.2
    assert found["gap"] < 1e-3
