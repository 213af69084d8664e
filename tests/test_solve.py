"""The solver against brute force, its own bound, and its speed."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.budget import Budget
from mxcompile.errors import BudgetError
from mxcompile.formats import FORMATS, Format
from mxcompile.plan import Unit
from mxcompile.price import Costs
from mxcompile.solve import Solution, solve, sweep

ALL = tuple(FORMATS.values())
TYPICAL = np.array([0.09, 0.023, 0.0059, 0.0014, 0.00035, 0.00002])
"""What a tile loses at 2, 3, 4, 5, 6 and 8 bits."""


def costs_of(
    units: tuple[Unit, ...], formats: tuple[Format, ...], seed: int, spread: float
) -> Costs:
    rng = np.random.default_rng(seed)
    typical = TYPICAL[[ALL.index(fmt) for fmt in formats]]
    return Costs(
        units,
        formats,
        {
            u.name: np.exp(spread * rng.standard_normal((u.tiles, 1)))
            * typical
            * np.exp(0.3 * rng.standard_normal((u.tiles, len(formats))))
            for u in units
        },
    )


def layers(count: int) -> tuple[Unit, ...]:
    shapes = ((640, 640), (2048, 640), (640, 2048), (200, 96))
    return tuple(Unit(f"w{i}", *shapes[i % len(shapes)]) for i in range(count))


def total(costs: Costs, solution: Solution) -> tuple[float, int]:
    """The damage and bytes of a solution's plan, added up from its text form."""
    damage, size = 0.0, 0
    for unit in costs.units:
        for tile, fmt in enumerate(solution.plan.tiles[unit.name].formats):
            choice = costs.formats.index(fmt)
            damage += costs.damage[unit.name][tile, choice]
            size += int(costs.bytes(unit)[choice])
    return damage, size


@st.composite
def tiny(draw: st.DrawFn) -> tuple[Costs, int]:
    formats = draw(st.sampled_from([ALL[:3], ALL[1:4], (ALL[0], ALL[2], ALL[5])]))
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.sampled_from([32, 96, 512])), min_size=1, max_size=3
        )
    )
    units = tuple(Unit(f"w{i}", rows, columns) for i, (rows, columns) in enumerate(shapes))
    numbers = st.floats(0, 1, width=32)
    damage = {
        u.name: np.array(
            draw(st.lists(numbers, min_size=u.tiles * 3, max_size=u.tiles * 3)), np.float64
        ).reshape(u.tiles, 3)
        for u in units
    }
    costs = Costs(units, formats, damage)
    low = sum(u.tiles * int(costs.bytes(u)[0]) for u in units)
    high = sum(u.tiles * int(costs.bytes(u)[-1]) for u in units)
    return costs, draw(st.integers(low, high + 1000))


def brute_force(costs: Costs, limit: int) -> float:
    tiles = [(u, t) for u in costs.units for t in range(u.tiles)]
    sizes = [costs.bytes(u) for u, _ in tiles]
    best = np.inf
    for choice in itertools.product(range(len(costs.formats)), repeat=len(tiles)):
        if sum(int(s[c]) for s, c in zip(sizes, choice, strict=True)) <= limit:
            damage = sum(
                costs.damage[u.name][t, c] for (u, t), c in zip(tiles, choice, strict=True)
            )
            best = min(best, damage)
    return best


@settings(max_examples=60, deadline=None)
@given(tiny(), st.booleans())
def test_against_brute_force(problem: tuple[Costs, int], exact: bool) -> None:
    costs, limit = problem
    parameters = sum(u.parameters for u in costs.units)
    found = solve(
        costs, Budget(limit / 1000, "KB"), parameters=parameters, exact_tiles=2000 if exact else 0
    )
    damage, size = total(costs, found)
    assert size == found.bytes <= limit
    assert found.damage == pytest.approx(damage)
    best = brute_force(costs, limit)
    assert best <= damage + 1e-9
    assert damage - best <= found.gap * damage + 1e-6
    if exact:
        assert damage <= best * (1 + 2e-4) + 1e-6


@pytest.mark.parametrize("bits", [2.6, 3.3, 4.2, 5.9])
def test_highs_and_lagrange_agree_within_the_gap(bits: float) -> None:
    units = layers(8)
    costs = costs_of(units, ALL, 0, 1.5)
    parameters = sum(u.parameters for u in units)
    exact = solve(costs, Budget(bits, "bit"), parameters=parameters)
    quick = solve(costs, Budget(bits, "bit"), parameters=parameters, exact_tiles=0)
    assert quick.method == "lagrange"
    assert exact.gap <= 2e-4
    assert exact.damage <= quick.damage
    assert quick.damage - exact.damage <= quick.gap * quick.damage
    assert quick.gap < 0.01


@pytest.mark.parametrize("exact", [0, 2000])
def test_the_budget_is_spent_and_not_exceeded_and_more_of_it_never_hurts(exact: int) -> None:
    units = layers(6)
    costs = costs_of(units, ALL, 1, 2.0)
    parameters = sum(u.parameters for u in units)
    found = [
        (bits, solve(costs, Budget(bits, "bit"), parameters=parameters, exact_tiles=exact))
        for bits in np.linspace(2.5, 8, 12).tolist()
    ]
    for bits, solution in found:
        assert 0.995 * bits < 8 * solution.bytes / parameters <= bits
    for (_, less), (_, more) in itertools.pairwise(found):
        assert more.damage <= less.damage * (1 + more.gap)


def test_what_is_not_planned_counts() -> None:
    units = layers(4)
    costs = costs_of(units, ALL, 2, 1.0)
    parameters = sum(u.parameters for u in units)
    plain = solve(costs, Budget(4, "bit"), parameters=parameters)
    fixed = parameters // 80
    tight = solve(costs, Budget(4, "bit"), parameters=parameters, fixed_bytes=fixed)
    assert tight.bytes <= parameters / 2
    assert tight.bytes - fixed < plain.bytes
    assert total(costs, tight)[1] == tight.bytes - fixed


def test_equal_tiles_share_the_budget() -> None:
    units = (Unit("w", 64 * 16, 64),)
    costs = Costs(units, ALL, {"w": np.tile(TYPICAL, (64, 1))})
    found = solve(costs, Budget(4.7, "bit"), parameters=units[0].parameters, exact_tiles=0)
    assert 4.6 < 8 * found.bytes / units[0].parameters <= 4.7
    assert found.gap < 0.02


def test_wider_formats_that_do_not_help_are_not_bought() -> None:
    units = (Unit("w", 32, 64),)
    costs = Costs(units, ALL, {"w": np.array([[5, 1, 1, 1, 1, 1], [3, 4, 2, 2, 2, 2.0]])})
    found = solve(costs, Budget(1, "GB"), parameters=units[0].parameters)
    assert str(found.plan.tiles["w"]) == "int3,int4"
    assert found.gap == 0


def test_no_damage_at_all() -> None:
    units = (Unit("w", 32, 64),)
    found = solve(Costs(units, ALL, {"w": np.zeros((2, 6))}), Budget(1, "GB"), parameters=1)
    assert (found.damage, found.gap) == (0, 0)


def test_the_smallest_plan_is_named_in_the_budgets_unit() -> None:
    units = (Unit("w", 256, 640),)
    costs = costs_of(units, ALL, 3, 1.0)
    parameters = units[0].parameters
    with pytest.raises(
        BudgetError, match=r"^2bit cannot be met: the smallest plan takes 2\.40 bits a weight$"
    ):
        solve(costs, Budget(2, "bit"), parameters=parameters)
    solve(costs, Budget(2.4, "bit"), parameters=parameters)
    with pytest.raises(BudgetError, match=r"takes 0\.05 MB$"):
        solve(costs, Budget(0.01, "MB"), parameters=parameters)


def test_sweep_goes_from_least_to_most() -> None:
    units = layers(4)
    costs = costs_of(units, ALL, 4, 1.5)
    points = list(sweep(costs, 9))
    sizes, damages = zip(*points, strict=True)
    assert len(points) == 9
    assert list(sizes) == sorted(sizes)
    assert damages[0] == pytest.approx(sum(d[:, 0].sum() for d in costs.damage.values()))
    assert damages[-1] <= min(damages)


@pytest.mark.slow
def test_a_large_model_is_solved_in_a_minute() -> None:
    units = tuple(Unit(f"w{i}", 1 << 19, 4096) for i in range(150))
    costs = costs_of(units, ALL, 5, 1.5)
    start = time.process_time()
    found = solve(costs, Budget(4.2, "bit"), parameters=sum(u.parameters for u in units))
    assert time.process_time() - start < 60
    assert found.gap < 1e-4
