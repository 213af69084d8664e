"""Budgets as text, as limits, and as what an error says."""

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile.budget import BIT, SIZES, Budget, Budgets, Divergence, Rate, Size, parse_budget
from mxcompile.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4.2bit", Size(4.2, "bit")),
        ("4.2 bits", Size(4.2, "bit")),
        (" 3BIT ", Size(3, "bit")),
        ("600MB", Size(600, "MB")),
        ("600mib", Size(600, "MiB")),
        (".5GiB", Size(0.5, "GiB")),
        ("1e3 KB", Size(1000, "KB")),
        ("40tok/s", Rate(40)),
        ("1.5 Tok/s", Rate(1.5)),
        ("kld<=0.02", Divergence(0.02)),
        ("KLD <= 1e-3", Divergence(1e-3)),
    ],
)
def test_reads(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4.2",
        "bit",
        "-3bit",
        "0MB",
        "4.2bitty",
        "0tok/s",
        "kld<0.02",
        "kld<=0",
        "1e999MB",
        "nanbit",
    ],
)
def test_refuses_and_names_what_there_is(text: str) -> None:
    with pytest.raises(UsageError, match=r"4\.2bit .* 600MB \(units: bit, KB, .* 30tok/s"):
        parse_budget(text)


@given(
    st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False),
    st.sampled_from([*(partial(Size, unit=unit) for unit in (BIT, *SIZES)), Divergence, Rate]),
)
def test_text_form_reads_back(amount: float, make: Callable[[float], Budget]) -> None:
    assert parse_budget(str(make(amount))) == make(amount)


def test_of_each_kind_the_tightest_binds() -> None:
    texts = ["4bit", "3KB", "30tok/s", "kld<=0.1", "40tok/s", "kld<=0.02"]
    assert Budgets.parse(texts, 1000) == Budgets(Size(4, BIT), Divergence(0.02), Rate(40))
    assert Budgets.parse(texts, 10**6) == Budgets(Size(3, "KB"), Divergence(0.02), Rate(40))
    assert Budgets.parse([], 1) == Budgets()


def test_limits() -> None:
    assert Size(4, "bit").limit(1000) == 500
    assert Size(600, "MB").limit(1) == 600_000_000
    assert Size(1.5, "MiB").limit(1) == 1_572_864


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.sampled_from([BIT, *SIZES]))
def test_what_is_expressed_can_be_asked_for(size: int, parameters: int, unit: str) -> None:
    said = Size(1, unit).express(size, parameters).replace(" bits a weight", "bit")
    if float(said.removesuffix(unit)) > 0:
        budget = parse_budget(said)
        assert isinstance(budget, Size)
        assert budget.limit(parameters) >= size


def test_expresses_in_its_own_unit() -> None:
    assert Size(4.2, "bit").express(301, 1000) == "2.41 bits a weight"
    assert Size(600, "MB").express(31_234_567, 1) == "31.24 MB"
