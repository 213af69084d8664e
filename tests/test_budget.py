"""Budgets as text, as limits, and as what an error says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile.budget import BIT, SIZES, Budget, parse_budget
from mxcompile.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4.2bit", Budget(4.2, "bit")),
        ("4.2 bits", Budget(4.2, "bit")),
        (" 3BIT ", Budget(3, "bit")),
        ("600MB", Budget(600, "MB")),
        ("600mib", Budget(600, "MiB")),
        (".5GiB", Budget(0.5, "GiB")),
        ("1e3 KB", Budget(1000, "KB")),
    ],
)
def test_reads(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    ["", "4.2", "bit", "-3bit", "0MB", "4.2bitty", "40tok/s", "kld<=0.02", "1e999MB", "nanbit"],
)
def test_refuses_and_names_what_there_is(text: str) -> None:
    with pytest.raises(UsageError, match=r"4\.2bit .* 600MB; units: bit, KB, MB"):
        parse_budget(text)


@given(
    st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False),
    st.sampled_from([BIT, *SIZES]),
)
def test_text_form_reads_back(amount: float, unit: str) -> None:
    budget = Budget(amount, unit)
    assert parse_budget(str(budget)) == budget


def test_limits() -> None:
    assert Budget(4, "bit").limit(1000) == 500
    assert Budget(600, "MB").limit(1) == 600_000_000
    assert Budget(1.5, "MiB").limit(1) == 1_572_864


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.sampled_from([BIT, *SIZES]))
def test_what_is_expressed_can_be_asked_for(size: int, parameters: int, unit: str) -> None:
    said = Budget(1, unit).express(size, parameters).replace(" bits a weight", "bit")
    assert float(said.removesuffix(unit)) == 0 or parse_budget(said).limit(parameters) >= size


def test_expresses_in_its_own_unit() -> None:
    assert Budget(4.2, "bit").express(301, 1000) == "2.41 bits a weight"
    assert Budget(600, "MB").express(31_234_567, 1) == "31.24 MB"
