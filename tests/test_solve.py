"""The solver against brute force, its own bound, and its speed."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.budget import Budgets, Divergence, Rate, Size
from mxcompile.errors import BudgetError, PlanError
from mxcompile.formats import FORMATS, Format
from mxcompile.latency import Latency
from mxcompile.plan import Rule, Unit
from mxcompile.price import Costs
from mxcompile.solve import Solution, solve, sweep

ALL = tuple(fmt for fmt in FORMATS.values() if not fmt.codebook)
TYPICAL = np.array([0.33, 0.09, 0.023, 0.0059, 0.0014, 0.00035, 0.00002])
"""What a tile loses at 1, 2, 3, 4, 5, 6 and 8 bits."""


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
    formats = draw(st.sampled_from([ALL[:3], ALL[1:4], (ALL[0], ALL[3], ALL[6])]))
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
        costs,
        Budgets(Size(limit / 1000, "KB")),
        parameters=parameters,
        exact_tiles=2000 if exact else 0,
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
    exact = solve(costs, Budgets(Size(bits, "bit")), parameters=parameters)
    quick = solve(costs, Budgets(Size(bits, "bit")), parameters=parameters, exact_tiles=0)
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
        (bits, solve(costs, Budgets(Size(bits, "bit")), parameters=parameters, exact_tiles=exact))
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
    plain = solve(costs, Budgets(Size(4, "bit")), parameters=parameters)
    fixed = parameters // 80
    tight = solve(costs, Budgets(Size(4, "bit")), parameters=parameters, fixed_bytes=fixed)
    assert tight.bytes <= parameters / 2
    assert tight.bytes - fixed < plain.bytes
    assert total(costs, tight)[1] == tight.bytes - fixed


def test_equal_tiles_share_the_budget() -> None:
    units = (Unit("w", 64 * 16, 64),)
    costs = Costs(units, ALL, {"w": np.tile(TYPICAL, (64, 1))})
    found = solve(costs, Budgets(Size(4.7, "bit")), parameters=units[0].parameters, exact_tiles=0)
    assert 4.6 < 8 * found.bytes / units[0].parameters <= 4.7
    assert found.gap < 0.02


def test_wider_formats_that_do_not_help_are_not_bought() -> None:
    units = (Unit("w", 32, 64),)
    costs = Costs(units, ALL, {"w": np.array([[6, 5, 1, 1, 1, 1, 1], [6, 3, 4, 2, 2, 2, 2.0]])})
    found = solve(costs, Budgets(Size(1, "GB")), parameters=units[0].parameters)
    assert str(found.plan.tiles["w"]) == "int3,int4"
    assert found.gap == 0


def test_no_damage_at_all() -> None:
    units = (Unit("w", 32, 64),)
    found = solve(Costs(units, ALL, {"w": np.zeros((2, 7))}), Budgets(Size(1, "GB")), parameters=1)
    assert (found.damage, found.gap) == (0, 0)


def test_the_smallest_plan_is_named_in_the_budgets_unit() -> None:
    units = (Unit("w", 256, 640),)
    costs = costs_of(units, ALL, 3, 1.0)
    parameters = units[0].parameters
    with pytest.raises(
        BudgetError, match=r"^1bit cannot be met: the smallest plan takes 1\.40 bits a weight$"
    ):
        solve(costs, Budgets(Size(1, "bit")), parameters=parameters)
    solve(costs, Budgets(Size(1.4, "bit")), parameters=parameters)
    with pytest.raises(BudgetError, match=r"takes 0\.03 MB$"):
        solve(costs, Budgets(Size(0.01, "MB")), parameters=parameters)


def both_brute_force(costs: Costs, latency: Latency, size: int, reads: int) -> float:
    tiles = [(u, t) for u in costs.units for t in range(u.tiles)]
    sizes = [costs.bytes(u) for u, _ in tiles]
    weights = [latency.reads.get(u.name, 1) for u, _ in tiles]
    best = np.inf
    for choice in itertools.product(range(len(costs.formats)), repeat=len(tiles)):
        taken = [int(s[c]) for s, c in zip(sizes, choice, strict=True)]
        read = sum(n * w for n, w in zip(taken, weights, strict=True))
        if sum(taken) <= size and read <= reads:
            parts = zip(tiles, choice, strict=True)
            best = min(best, sum(costs.damage[u.name][t, c] for (u, t), c in parts))
    return best


@settings(max_examples=60, deadline=None)
@given(tiny(), st.floats(0, 1), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_size_and_rate_together(problem: tuple[Costs, int], share: float, reads: list[int]) -> None:
    costs, limit = problem
    if len(costs.units) * 3 > 9 and sum(u.tiles for u in costs.units) > 6:
        return
    latency = Latency(1e-9, {u.name: n for u, n in zip(costs.units, reads, strict=False)})
    ends = [
        sum(latency.reads[u.name] * u.tiles * int(costs.bytes(u)[i]) for u in costs.units)
        for i in (0, -1)
    ]
    read_limit = int(ends[0] + share * (ends[1] - ends[0])) + 1
    budgets = Budgets(Size(limit / 1000, "KB"), rate=Rate(1 / (read_limit * 1e-9)))
    assert budgets.size is not None and budgets.rate is not None
    limit, read_limit = budgets.size.limit(1), latency.limit(budgets.rate.amount)
    try:
        found = solve(costs, budgets, parameters=1, latency=latency)
    except BudgetError:  # a limit at the very edge may be lost to a rounding of its text
        return
    assert found.bytes <= limit
    assert found.rate is not None
    assert found.rate >= budgets.rate.amount * (1 - 1e-9)
    best = both_brute_force(costs, latency, limit, read_limit)
    damage, _ = total(costs, found)
    assert best <= damage + 1e-9
    assert damage - best <= found.gap * damage + 1e-6


def test_a_rate_buys_speed_where_it_is_read() -> None:
    """A table that is only looked up keeps its bits, however fast the rest must be."""
    units = (Unit("table", 640, 640), Unit("layer", 640, 640))
    costs = costs_of(units, ALL, 7, 1.0)
    latency = Latency(1e-6, {"table": 0}, "a test")
    layer = 640 * 640 * 3 / 8
    budgets = Budgets(rate=Rate(1e6 / layer))
    found = solve(costs, budgets, parameters=1, latency=latency)
    assert found.rate is not None
    assert found.rate >= 1e6 / layer
    assert {str(f) for f in found.plan.tiles["table"].formats} == {"int8"}
    with pytest.raises(BudgetError, match=r"^1000tok/s cannot be met: .* predicted to make .* a t"):
        solve(costs, Budgets(rate=Rate(1000)), parameters=1, latency=latency)


@pytest.mark.parametrize("worst", [0.3, 1.0, 5.0])
def test_the_smallest_plan_that_keeps_a_divergence(worst: float) -> None:
    units = layers(6)
    costs = costs_of(units, ALL, 8, 1.5)
    parameters = sum(u.parameters for u in units)
    found = solve(costs, Budgets(divergence=Divergence(worst)), parameters=parameters)
    assert found.damage <= worst
    smaller = Budgets(Size(8 * found.bytes * 0.998 / parameters, "bit"))
    assert solve(costs, smaller, parameters=parameters).damage > worst * (1 - 1e-3)


def test_a_divergence_and_a_size_that_do_not_go_together() -> None:
    units = layers(4)
    costs = costs_of(units, ALL, 9, 1.5)
    budgets = Budgets(Size(3, "bit"), Divergence(1e-4))
    with pytest.raises(BudgetError, match=r"^kld<=0\.0001 cannot be met: .* diverge by \d"):
        solve(costs, budgets, parameters=sum(u.parameters for u in units))


def test_rules_bind_units() -> None:
    units = layers(4)
    costs = costs_of(units, ALL, 10, 1.5)
    rules = [Rule.parse("w0=int5"), Rule.parse("w[01]=int4", floor=True)]
    parameters = sum(u.parameters for u in units)
    found = solve(costs.bind(rules), Budgets(Size(4, "bit")), parameters=parameters)
    assert {str(f) for f in found.plan.tiles["w0"].formats} == {"int5"}
    assert min(f.bits for f in found.plan.tiles["w1"].formats) == 4
    assert min(f.bits for f in found.plan.tiles["w2"].formats) < 4
    assert found.bytes <= 4 * parameters / 8
    assert total(costs, found)[0] == pytest.approx(found.damage)
    with pytest.raises(PlanError, match=r"^x\*=int4 names no unit first; units: w0, w1"):
        costs.bind([Rule.parse("x*=int4")])
    with pytest.raises(PlanError, match=r"^w0=int3 names no unit first"):
        costs.bind([Rule.parse("w0=int4"), Rule.parse("w0=int3")])
    wide = costs.bind([Rule.parse("*=int8")])
    with pytest.raises(BudgetError, match="cannot be met"):
        solve(wide, Budgets(Size(4, "bit")), parameters=parameters)


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
    found = solve(costs, Budgets(Size(4, "bit")), parameters=sum(u.parameters for u in units))
    assert time.process_time() - start < 60
    assert found.gap < 1e-4
