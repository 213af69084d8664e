"""The cheapest-in-damage plan that fits a budget, with a bound on what a better one could win.

One format is chosen for each row tile so that the summed damage is least within a byte limit: a
multiple-choice knapsack. The choices of each tile that can be optimal for some price of a byte
form its lower convex hull, and one price, found by bisection, splits all hulls at once: the
optimum of the linear relaxation, which HIGGS (arXiv 2411.17525) and llama.cpp's allocators round
likewise. What the rounding left of the limit is spent greedily. Small problems go on to HiGHS
(scipy's MILP solver), which closes the gap to almost nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from mxcompile.budget import Budgets, Divergence
from mxcompile.errors import BudgetError
from mxcompile.latency import Latency
from mxcompile.plan import PrecisionPlan, TileFormats
from mxcompile.price import Costs

Array: TypeAlias = np.ndarray[Any, Any]
Method: TypeAlias = Literal["highs", "lagrange"]

EXACT_TILES: Final = 2000
"""Up to how many tiles HiGHS is asked; beyond, the relaxation's own gap is below 0.1 %."""

EXACT_SECONDS: Final = 10.0
EXACT_GAP: Final = 1e-4

CHUNK: Final = 1 << 18
"""Tiles that are looked at together, to bound the memory of temporaries."""

FILL_BATCH: Final = 256

SIZE_STEPS: Final = 2000
"""The smallest plan that keeps a divergence is found to this part of its bytes."""

SURROGATES: Final = 16
SLACK_STEPS: Final = 500
SLACKS: Final = 50
"""Weighted sums of two limits that are tried; and by how much they are tightened, until a plan
that keeps the sum keeps both."""

ANY_SPEED: Final = Latency(0.0)


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan that keeps the budgets.

    Attributes:
        plan: The format of every tile.
        damage: The summed damage of the plan, as priced.
        bytes: The bytes of all packed tiles, and of what is not planned.
        rate: Tokens a second that are predicted; None where no latency was given.
        gap: A bound on ``(damage - least possible damage) / damage``.
        price: The damage that one more byte would save, the Lagrange multiplier of the size.
        method: What found the plan.
    """

    plan: PrecisionPlan
    damage: float
    bytes: int
    rate: float | None
    gap: float
    price: float
    method: Method


def solve(
    costs: Costs,
    budgets: Budgets,
    *,
    parameters: int,
    fixed_bytes: int = 0,
    latency: Latency = ANY_SPEED,
    exact_tiles: int = EXACT_TILES,
) -> Solution:
    """Choose the format of every tile.

    Args:
        costs: Damage and bytes of every tile in every format.
        budgets: What must hold; with a divergence, the smallest plan that keeps it.
        parameters: The number of the model's parameters, which a budget in bits divides by.
        fixed_bytes: The part of the weight file that is not planned, and read in every step.
        latency: What a rate is predicted with.
        exact_tiles: Up to how many tiles HiGHS is asked.

    Raises:
        BudgetError: the text says which budget binds, and the best that can be had.
    """
    problem = _Problem.of(costs, latency)
    least = np.zeros(problem.tiles, np.int8)
    size = problem.size(np.full(problem.tiles, problem.damage.shape[1] - 1, np.int8))
    if budgets.size is not None:
        size = budgets.size.limit(parameters) - fixed_bytes
        if (smallest := problem.size(least)) > size:
            said = budgets.size.express(smallest + fixed_bytes, parameters)
            raise BudgetError(f"{budgets.size} cannot be met: the smallest plan takes {said}")
    spend = None
    if budgets.rate is not None:
        spend = latency.limit(budgets.rate.amount, fixed_bytes)
        if (fewest := problem.spent(least)) > spend:
            best = latency.rate(fewest, fixed_bytes)
            raise BudgetError(
                f"{budgets.rate} cannot be met: the smallest plan is predicted to make {best:.4g} "
                f"tok/s, by {latency.source}"
            )
    if budgets.divergence is None:
        found = _within(problem, size, spend, exact_tiles)
    else:
        found = _smallest(problem, size, spend, budgets.divergence, exact_tiles)
    damage = problem.total(found.choice)
    timed = latency is not ANY_SPEED
    return Solution(
        _plan(costs, found.choice),
        damage,
        problem.size(found.choice) + fixed_bytes,
        latency.rate(problem.spent(found.choice), fixed_bytes) if timed else None,
        _gap(damage, found.bound),
        found.price,
        found.method,
    )


def within(costs: Costs, limit: int, *, exact_tiles: int = EXACT_TILES) -> PrecisionPlan:
    """The plan of least damage whose packed tiles take at most ``limit`` bytes.

    Raises:
        BudgetError: the smallest plan takes more.
    """
    problem = _Problem.of(costs, ANY_SPEED)
    if (smallest := problem.size(np.zeros(problem.tiles, np.int8))) > limit:
        raise BudgetError(f"{limit} bytes cannot be met: the smallest plan takes {smallest}")
    return _plan(costs, _knapsack(problem, limit, exact_tiles).choice)


def _within(problem: "_Problem", size: int, spend: int | None, exact_tiles: int) -> "_Found":
    """The least damage within a size and, where it is given, a step's nanoseconds."""
    found = _knapsack(problem, size, exact_tiles)
    if spend is None or problem.spent(found.choice) <= spend:
        return found
    found = _knapsack(replace(problem, bytes=problem.nanoseconds), spend, exact_tiles)
    # What a step does not read in whole costs it nothing, and may have the best.
    free = problem.nanoseconds[problem.unit, -1] == 0
    narrow = problem.total(found.choice)
    found.choice[free] = problem.damage[free].argmin(1)
    if problem.size(found.choice) <= size:
        bound = found.bound + problem.total(found.choice) - narrow
        return replace(found, bound=bound, price=0.0)
    return _both(problem, size, spend)


def _both(problem: "_Problem", size: int, spend: int) -> "_Found":
    """The least damage where both limits bind: a surrogate knapsack of their weighted sum.

    What keeps both limits keeps the sum, so every surrogate's bound holds; the best is kept.
    """
    narrowest = np.zeros(problem.tiles, np.int8)
    surrogates = []
    for share in range(1, SURROGATES):
        mixed = share * problem.bytes + (SURROGATES - share) * problem.nanoseconds
        limit = share * size + (SURROGATES - share) * spend
        surrogates.append((share, limit, replace(problem, bytes=mixed)))
    bound, best = -math.inf, None
    for slack in range(SLACKS):
        room = 1 - slack / SLACK_STEPS
        for share, limit, surrogate in surrogates:
            if surrogate.size(narrowest) > int(limit * room):
                continue
            found = _knapsack(surrogate, int(limit * room), 0)
            if slack == 0:
                bound = max(bound, found.bound)
            keeps = problem.size(found.choice) <= size and problem.spent(found.choice) <= spend
            if keeps and (best is None or problem.total(found.choice) < problem.total(best.choice)):
                best = replace(found, price=found.price * share)
        if best is not None:
            return replace(best, bound=bound)
    return _Found(narrowest, bound, 0.0, "lagrange")


def _smallest(
    problem: "_Problem", size: int, spend: int | None, budget: Divergence, exact_tiles: int
) -> "_Found":
    """The fewest bytes whose damage is within a budget, by bisection over the size."""
    best = _within(problem, size, spend, exact_tiles)
    if (least := problem.total(best.choice)) > budget.amount:
        raise BudgetError(
            f"{budget} cannot be met: the best plan within the other budgets is predicted to "
            f"diverge by {least:.3g}"
        )
    low, high = problem.size(np.zeros(problem.tiles, np.int8)), problem.size(best.choice)
    while high - low > max(high // SIZE_STEPS, 1):
        middle = (low + high) // 2
        found = _within(problem, middle, spend, 0)
        if problem.total(found.choice) <= budget.amount:
            best, high = found, problem.size(found.choice)
        else:
            low = middle
    return best


def sweep(costs: Costs, count: int) -> Iterator[tuple[int, float]]:
    """Bytes and damage of the best plans at ``count`` limits, evenly spread from least to most."""
    problem = _Problem.of(costs, ANY_SPEED)
    least = problem.size(np.zeros(problem.tiles, np.int8))
    most = problem.size(np.full(problem.tiles, problem.damage.shape[1] - 1, np.int8))
    for limit in np.linspace(least, most, count).astype(np.int64).tolist():
        choice = _lagrange(problem, limit).choice
        yield problem.size(choice), problem.total(choice)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A choice for every tile, a bound on the least damage, the price of a byte, the method."""

    choice: Array
    bound: float
    price: float
    method: Method


def _knapsack(problem: "_Problem", limit: int, exact_tiles: int) -> _Found:
    """The least damage within a limit on the problem's bytes."""
    relaxed = _lagrange(problem, limit)
    if (
        problem.tiles <= exact_tiles
        and _gap(problem.total(relaxed.choice), relaxed.bound) > EXACT_GAP
    ):
        choice, bound = _exact(problem, limit, relaxed)
        return _Found(choice, bound, relaxed.price, "highs")
    return _Found(relaxed.choice, relaxed.bound, relaxed.price, "lagrange")


def _gap(damage: float, bound: float) -> float:
    return max(damage - bound, 0.0) / damage if damage > 0 else 0.0


def _plan(costs: Costs, choice: Array) -> PrecisionPlan:
    ends = np.cumsum([unit.tiles for unit in costs.units])
    parts = np.split(choice, ends[:-1])
    tiles = {
        unit.name: TileFormats(tuple(map(costs.choices(unit).__getitem__, part.tolist())))
        for unit, part in zip(costs.units, parts, strict=True)
    }
    return PrecisionPlan(costs.units, tiles)


@dataclass(frozen=True, eq=False)
class _Problem:
    """All tiles in one array; choices go from fewer to more bytes.

    Attributes:
        damage: float64 [tiles, choices].
        unit: The unit of each tile, int32 [tiles].
        bytes: int64 [units, choices].
        nanoseconds: What a tile adds to a decode step; int64 [units, choices].
    """

    damage: Array
    unit: Array
    bytes: Array
    nanoseconds: Array

    @classmethod
    def of(cls, costs: Costs, latency: Latency) -> "_Problem":
        counts = [unit.tiles for unit in costs.units]
        size = np.stack([costs.bytes(unit) for unit in costs.units])
        spent = [
            latency.nanoseconds(unit, costs.choices(unit), row)
            for unit, row in zip(costs.units, size, strict=True)
        ]
        return cls(
            np.concatenate([costs.damage[unit.name] for unit in costs.units]),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            size,
            np.stack(spent),
        )

    @property
    def tiles(self) -> int:
        return len(self.damage)

    @cached_property
    def steps(self) -> tuple[Array, Array]:
        """The steps up every tile's convex hull; see ``_steps``."""
        return _steps(self)

    def total(self, choice: Array) -> float:
        return float(np.take_along_axis(self.damage, choice[:, None], 1).sum())

    def size(self, choice: Array) -> int:
        return int(self.bytes[self.unit, choice].sum())

    def spent(self, choice: Array) -> int:
        """The nanoseconds that tiles take of a decode step."""
        return int(self.nanoseconds[self.unit, choice].sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Relaxed:
    """A rounded optimum of the linear relaxation, the relaxation's value, and its byte price."""

    choice: Array
    bound: float
    price: float


def _lagrange(problem: _Problem, limit: int) -> _Relaxed:
    """Solve the linear relaxation and round it to a plan that fits."""
    worth, extra = problem.steps
    spare = limit - problem.size(np.zeros(problem.tiles, np.int8))
    price = _price(worth, extra, spare)
    taken = worth > price
    spare -= int(extra[taken].sum())
    # Equal tiles have equal worth: at the price itself only some of the steps fit.
    edge = np.argwhere((worth == price) & (worth > 0))
    fits = np.cumsum(extra[edge[:, 0], edge[:, 1]]) <= spare
    taken[tuple(edge[fits].T)] = True
    last = taken.shape[1] - taken[:, ::-1].argmax(1)
    choice = np.where(taken.any(1), last, 0).astype(np.int8)
    bound = problem.total(choice) - price * (limit - problem.size(choice))
    _fill(problem, choice, limit - problem.size(choice))
    return _Relaxed(choice, bound, price)


def _steps(problem: _Problem) -> tuple[Array, Array]:
    """The steps up every tile's convex hull.

    Returns:
        ``worth``: damage saved a byte by going to choice ``j + 1`` from the hull's choice before
        it, float64 [tiles, choices - 1], falling along a row; 0 where the hull has no such choice.
        ``extra``: the bytes of that step, int32.
    """
    tiles, choices = problem.damage.shape
    worth = np.zeros((tiles, choices - 1))
    extra = np.zeros((tiles, choices - 1), np.int32)
    for start in range(0, tiles, CHUNK):
        part = slice(start, start + CHUNK)
        _hull(problem.damage[part], problem.bytes[problem.unit[part]], worth[part], extra[part])
    return worth, extra


def _hull(damage: Array, size: Array, worth: Array, extra: Array) -> None:
    """Fill in ``worth`` and ``extra`` for some tiles."""
    choices = damage.shape[1]
    rows = np.arange(len(damage))
    at = np.zeros(len(damage), np.int64)
    rate = np.full(len(damage), np.inf)
    for _ in range(choices - 1):
        # The hull goes on at the choice of the steepest descent; of equals, the farthest.
        best = np.zeros(len(damage))
        target = np.zeros(len(damage), np.int64)
        for choice in range(1, choices):
            ahead = np.maximum(size[:, choice] - size[rows, at], 0)
            saved = damage[rows, at] - damage[:, choice]
            steep = np.divide(saved, ahead, out=np.zeros(len(damage)), where=ahead > 0)
            better = (steep >= best) & (steep > 0)
            best, target = np.where(better, steep, best), np.where(better, choice, target)
        on = best > 0
        step = target[on] - 1
        rate[on] = np.minimum(rate[on], best[on])
        worth[rows[on], step] = rate[on]
        extra[rows[on], step] = size[on, target[on]] - size[on, at[on]]
        at[on] = target[on]


def _price(worth: Array, extra: Array, spare: int) -> float:
    """The least price of a byte at which the steps that are worth more fit into ``spare``."""
    useful = worth > 0
    worth, extra = worth[useful], extra[useful]
    if not worth.size or extra.sum(dtype=np.int64) <= spare:
        return 0.0
    # Positive floats order as their bits do, so bisecting bits ends at the exact price.
    low, high = 0, int(worth.max().view(np.int64))
    while high - low > 1:
        middle = (low + high) // 2
        above = worth > np.int64(middle).view(np.float64)
        size = int(extra[above].sum(dtype=np.int64))
        if size <= spare:
            high, spare = middle, spare - size
            worth, extra = worth[~above], extra[~above]
        else:
            low = middle
            worth, extra = worth[above], extra[above]
    return float(np.int64(high).view(np.float64))


def _fill(problem: _Problem, choice: Array, spare: int) -> None:
    """Spend what is left on the best steps that still fit, off the hull too; in place."""
    while spare > 0:
        rates, tiles, targets = _upgrades(problem, choice, spare)
        before = spare
        for index in np.argsort(-rates, kind="stable").tolist():
            tile, target = int(tiles[index]), int(targets[index])
            row = problem.bytes[problem.unit[tile]]
            # A tile may stand here more than once; an earlier step changes what a later one is.
            size = int(row[target] - row[choice[tile]])
            saved = problem.damage[tile, choice[tile]] - problem.damage[tile, target]
            if 0 < size <= spare and saved > 0:
                choice[tile] = target
                spare -= size
        if spare == before:
            return


def _upgrades(problem: _Problem, choice: Array, spare: int) -> tuple[Array, Array, Array]:
    """The best steps of at most ``spare`` bytes: damage saved a byte, tile, and choice."""
    found: list[tuple[Array, Array, Array]] = []
    for start in range(0, problem.tiles, CHUNK):
        part = slice(start, start + CHUNK)
        size, damage = problem.bytes[problem.unit[part]], problem.damage[part]
        now = choice[part, None]
        extra = size - np.take_along_axis(size, now, 1)
        saved = np.take_along_axis(damage, now, 1) - damage
        tiles, targets = np.nonzero((extra > 0) & (extra <= spare) & (saved > 0))
        rates = saved[tiles, targets] / extra[tiles, targets]
        best = np.argsort(-rates, kind="stable")[:FILL_BATCH]
        found.append((rates[best], tiles[best] + start, targets[best]))
    rates, tiles, targets = (np.concatenate(column) for column in zip(*found, strict=True))
    return rates, tiles, targets


def _exact(problem: _Problem, limit: int, start: _Relaxed) -> tuple[Array, float]:
    """Improve on a rounded relaxation with HiGHS; returns the better plan and the better bound."""
    incumbent = problem.total(start.choice)
    size = problem.bytes[problem.unit]
    # A choice that costs more than the gap above its tile's best cannot be in a better plan, and
    # mostly leaves one choice a tile: what HiGHS gets is the core of the problem.
    priced = problem.damage + start.price * size
    excess = priced - priced.min(1, keepdims=True)
    able = excess <= (incumbent - start.bound) * (1 + 1e-6)
    core = able.sum(1) > 1
    choice = np.where(core, start.choice, able.argmax(1)).astype(np.int8)
    room = limit - int(size[~core, choice[~core]].sum())
    tiles, targets = np.nonzero(able[core])
    result = _highs(problem.damage[core][tiles, targets], size[core][tiles, targets], tiles, room)
    if result.x is None:
        return start.choice, start.bound
    picked = result.x > 0.5
    choice[np.flatnonzero(core)[tiles[picked]]] = targets[picked]
    rest = float(problem.damage[~core, choice[~core]].sum())
    bound = max(start.bound, min(incumbent, rest + result.mip_dual_bound))
    better = problem.size(choice) <= limit and problem.total(choice) < incumbent
    return (choice if better else start.choice), bound


def _highs(damage: Array, size: Array, tiles: Array, room: int) -> OptimizeResult:
    """Choose one variable a tile; numbers are scaled to where HiGHS' absolute tolerances hold."""
    count = len(tiles)
    scale, unit = damage.max(), math.gcd(*size.tolist())
    one_each = csr_array((np.ones(count), (tiles, np.arange(count))))
    result = milp(
        damage / scale,
        integrality=np.ones(count, np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(size[None] / unit), 0, room // unit),
        ],
        options={"time_limit": EXACT_SECONDS, "mip_rel_gap": EXACT_GAP},
    )
    if result.x is not None:
        result.mip_dual_bound *= scale
    return result
