"""What every row tile costs in every format: bytes, and damage to the model's output."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy
import torch

from mxcompile.errors import PlanError, UsageError
from mxcompile.files import whole
from mxcompile.formats import FORMATS, Format
from mxcompile.plan import ROW_TILE, PrecisionPlan, Rule, Unit, tile_bytes
from mxcompile.progress import Progress
from mxcompile.quantize import Importance, dequantize, learn, quantize
from mxcompile.statistics import Statistics

Array: TypeAlias = np.ndarray[Any, Any]

VERSION: Final = 7
"""Changes whenever the same weights and statistics give other codes or damages."""

FEEDBACK: Final = 0.85
"""What error feedback (``mxcompile.gptq``) leaves of the damage on text of other sources than the
calibration's: there errors are a tenth to a fifth smaller with it."""

PRICED: Final = tuple(fmt for fmt in FORMATS.values() if fmt.name != "nf4")
"""What is priced unless a rule names more: a learned codebook takes the same bytes as nf4."""

BLOCK: Final = 1 << 23
"""Weights that are priced at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """The price list that a plan is solved from.

    Attributes:
        units: What is planned.
        formats: The choices, from narrow to wide.
        damage: By unit: float64 [tiles, formats].
        bound: By unit, where the user decided: what each of ``formats`` stands for.
    """

    units: tuple[Unit, ...]
    formats: tuple[Format, ...]
    damage: Mapping[str, Array]
    bound: Mapping[str, tuple[Format, ...]] = field(default_factory=dict)

    def choices(self, unit: Unit) -> tuple[Format, ...]:
        """What a tile of a unit gets for each of ``formats``."""
        return self.bound.get(unit.name, self.formats)

    def bytes(self, unit: Unit) -> Array:
        """The bytes of one tile of a unit in each format, int64 [formats]."""
        return np.array([tile_bytes(unit.columns, fmt) for fmt in self.choices(unit)], np.int64)

    def paid(self, unit: Unit, plan: PrecisionPlan) -> Array:
        """The damage of a unit's tiles in a plan, [tiles]."""
        columns = {fmt: index for index, fmt in enumerate(self.choices(unit))}
        chosen = [columns[fmt] for fmt in plan.tiles[unit.name].formats]
        found: Array = self.damage[unit.name][np.arange(unit.tiles), chosen]
        return found

    def total(self, plan: PrecisionPlan) -> float:
        """The summed damage of a plan."""
        return sum(float(self.paid(unit, plan).sum()) for unit in self.units)

    def size(self, plan: PrecisionPlan) -> int:
        """The bytes of a plan's tiles."""
        return sum(
            count * tile_bytes(unit.columns, fmt)
            for unit in self.units
            for fmt, count in Counter(plan.tiles[unit.name].formats).items()
        )

    def bind(self, rules: Sequence[Rule]) -> Self:
        """Leave the units that rules name what these allow; a format outside stands for another.

        Raises:
            PlanError: a rule names no unit, or a format that is not priced.
        """
        unused = dict.fromkeys(rules)
        bound, damage = dict(self.bound), dict(self.damage)
        for unit in self.units:
            rule = next((rule for rule in rules if rule.names(unit.name)), None)
            if rule is None:
                continue
            unused.pop(rule, None)
            if rule.format not in self.formats:
                raise PlanError(f"{rule}: the plan can have {', '.join(map(str, self.formats))}")
            least = self.formats.index(rule.format)
            stands_for = np.arange(len(self.formats)).clip(min=least)
            if not rule.floor:
                stands_for[:] = least
            bound[unit.name] = tuple(self.formats[i] for i in stands_for)
            damage[unit.name] = self.damage[unit.name][:, stands_for]
        if unused:
            names = ", ".join(unit.name for unit in self.units[:8])
            raise PlanError(f"{next(iter(unused))} names no unit first; units: {names}, ...")
        return replace(self, bound=bound, damage=damage)


def price(
    weights: Callable[[str], Array],
    units: Sequence[Unit],
    statistics: Statistics,
    formats: Sequence[Format] = PRICED,
    progress: Progress | None = None,
) -> Costs:
    """Quantize every unit in every format and add up the damage of its row tiles.

    Prices come from the grid that ships, searched for the least damage: rounding to nearest on the
    whole range overstates it below 4 bits several times, and the solver would believe it. The
    feedback of ``mxcompile.gptq`` is not run but counted, as what it is worth on other text: it
    lowers all formats alike, and what it was fitted to by twice as much.

    Args:
        weights: A unit's float32 weights [rows, columns] by name.
        units: What is to be planned.
        statistics: What calibration found.
        formats: What a tile may have, from narrow to wide.
        progress: Is told of the work.

    Raises:
        UsageError: weights or statistics are not finite.
    """
    damage: dict[str, Array] = {}
    total = sum(unit.parameters for unit in units)
    with (progress or Progress()).stage("price", total) as advance:
        for unit in units:
            weight = weights(unit.name)
            with np.errstate(invalid="ignore"):
                moments, kinds = statistics.kinds(unit.name)
            if not all(np.isfinite(moment).all() for moment in moments):
                raise UsageError(f"{unit.name} cannot be priced: calibration met infinite numbers")
            importance = Importance.of(*moments, kinds=kinds)
            codebooks = {f: learn(weight, f, importance, name=unit.name) for f in formats}
            damage[unit.name] = np.zeros((unit.tiles, len(formats)))
            left = FEEDBACK if moments[0].ndim == 2 else 1.0
            step = max(BLOCK // (unit.columns * ROW_TILE), 1) * ROW_TILE
            for start in range(0, unit.rows, step):
                block = weight[start : start + step]
                tiles = slice(start // ROW_TILE, (start + step) // ROW_TILE)
                known = importance.part(slice(start, start + step))
                errors = _block(unit.name, block, start, known, statistics, codebooks)
                damage[unit.name][tiles] = left * errors
                advance(block.size)
    return Costs(tuple(units), tuple(formats), damage)


def _block(
    unit: str,
    block: Array,
    start: int,
    importance: Importance,
    statistics: Statistics,
    codebooks: Mapping[Format, Array | None],
) -> Array:
    """The damage of some tiles of a unit, float64 [tiles, formats]."""
    by_row = np.zeros((-(-len(block) // ROW_TILE) * ROW_TILE, len(codebooks)))
    with torch.inference_mode():
        for index, (fmt, codebook) in enumerate(codebooks.items()):
            quantized = quantize(block, fmt, importance, codebook=codebook, name=unit)
            delta = torch.from_numpy(dequantize(quantized, fmt) - block)
            by_row[: len(block), index] = statistics.damage(unit, delta, start).numpy()
    tiles: Array = by_row.reshape(-1, ROW_TILE, len(codebooks)).sum(1)
    return tiles


def save(costs: Costs, path: Path) -> None:
    """Write prices as a safetensors file, whole or not at all."""
    about = [{"name": u.name, "rows": u.rows, "columns": u.columns} for u in costs.units]
    tensors = {u.name: np.ascontiguousarray(costs.damage[u.name]) for u in costs.units}
    text = {"units": json.dumps(about), "formats": json.dumps([f.name for f in costs.formats])}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        safetensors.numpy.save_file(tensors, draft, text)


def load(path: Path) -> Costs:
    """Read what ``save`` wrote.

    Raises:
        UsageError: the file is missing, damaged, or not of this kind.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            units = tuple(Unit(**about) for about in json.loads(file.metadata()["units"]))
            names = json.loads(file.metadata()["formats"])
            damage = {unit.name: file.get_tensor(unit.name) for unit in units}
        return Costs(units, tuple(FORMATS[name] for name in names), damage)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: no prices ({error})") from error
