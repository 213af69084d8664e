"""What decode steps are predicted to take."""

import numpy as np
import pytest

from mxcompile import target, tune
from mxcompile.formats import ACTIVATION_FORMATS, FORMATS
from mxcompile.latency import Survey, predict
from mxcompile.plan import Unit
from mxcompile.records import Case, Record, Records
from mxcompile.survey import survey

UNITS = [Unit("narrow", 64, 256), Unit("wide", 64, 256)]
NAMES = sorted({fmt.name for fmt in FORMATS.values()})
RATES = {(n, a): 1e-9 if a == "int8" else 3e-9 for n in NAMES for a in ("int8", "int16")}
SURVEY = Survey(RATES, call_seconds=0, element_seconds=0)


def seconds(records: Records, unit: Unit, fmt: str = "int4") -> float:
    """Of 10,000 bytes of a unit, where ``wide`` meets activations of 16 bits."""
    latency = predict(
        [[unit] for unit in UNITS],
        {unit.name: 1 for unit in UNITS},
        records,
        threads=1,
        bandwidth=5e9,
        fixed_seconds=0,
        survey=SURVEY,
        activations={"wide": ACTIVATION_FORMATS["int16"]},
    )
    return float(latency.nanoseconds(unit, [FORMATS[fmt]], np.array([10_000]))[0]) * 1e-9


def test_a_survey_says_what_no_record_does() -> None:
    nothing = Records([], "cpu", "kernel")
    assert seconds(nothing, UNITS[0]) == pytest.approx(1e-5)
    assert seconds(nothing, UNITS[1]) == pytest.approx(3e-5)


def test_records_come_first_and_wide_activations_still_cost_more() -> None:
    case = Case("int4", 64, 256, 1, 1)
    size = tune.weight_bytes(case)
    records = Records([Record("cpu", "kernel", case, (), size * 2e-3)], "cpu", "kernel")
    assert seconds(records, UNITS[0]) == pytest.approx(2e-5)
    assert seconds(records, UNITS[1]) == pytest.approx(6e-5)


def test_a_survey_times_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "STREAM_BYTES", 2 << 20)
    found = survey(target.find("x86"), 1, 160)
    layouts = {FORMATS[name].layout for name, _ in found.rates}
    assert layouts == {fmt.layout for fmt in FORMATS.values()}
    assert {fmt for _, fmt in found.rates} == set(ACTIVATION_FORMATS)
    assert all(1e-12 < rate < 1e-7 for rate in found.rates.values())
    assert 0 <= found.call_seconds < 1e-4
