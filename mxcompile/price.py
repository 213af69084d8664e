"""What every row tile costs in every format: bytes, and damage to the model's output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from mxcompile.errors import UsageError
from mxcompile.formats import FORMATS, Format
from mxcompile.gptq import Quantizer
from mxcompile.plan import ROW_TILE, Unit, tile_bytes
from mxcompile.progress import Progress
from mxcompile.quantize import dequantize
from mxcompile.statistics import Statistics

Array: TypeAlias = np.ndarray[Any, Any]

BLOCK: Final = 1 << 23
"""Weights that are priced at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """The price list that a plan is solved from; formats go from narrow to wide."""

    units: tuple[Unit, ...]
    formats: tuple[Format, ...]
    damage: Mapping[str, Array]
    """By unit: float64 [tiles, formats]."""

    def bytes(self, unit: Unit) -> Array:
        """The bytes of one tile of a unit in each format, int64 [formats]."""
        return np.array([tile_bytes(unit.columns, fmt) for fmt in self.formats], np.int64)


def price(
    weights: Callable[[str], Array],
    units: Sequence[Unit],
    statistics: Statistics,
    formats: Sequence[Format] = tuple(FORMATS.values()),
    progress: Progress | None = None,
) -> Costs:
    """Quantize every unit in every format and add up the damage of its row tiles.

    Prices come from the quantizer that ships: rounding to nearest overstates the damage below
    4 bits several times (notes/quantization.md), and the solver would believe it.

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
                met = statistics.moment(unit.name)
            if not np.isfinite(met).all():
                raise UsageError(f"{unit.name} cannot be priced: calibration met infinite numbers")
            quantizer = Quantizer.of(met)
            damage[unit.name] = np.zeros((unit.tiles, len(formats)))
            step = max(BLOCK // (unit.columns * ROW_TILE), 1) * ROW_TILE
            for start in range(0, unit.rows, step):
                block = weight[start : start + step]
                tiles = slice(start // ROW_TILE, (start + step) // ROW_TILE)

                def harm(delta: torch.Tensor, unit: Unit = unit, start: int = start) -> Array:
                    return statistics.damage(unit.name, delta, start).numpy()

                damage[unit.name][tiles] = _block(unit.name, block, quantizer, harm, formats)
                advance(block.size)
    return Costs(tuple(units), tuple(formats), damage)


def _block(
    unit: str,
    block: Array,
    quantizer: Quantizer,
    harm: Callable[[torch.Tensor], Array],
    formats: Sequence[Format],
) -> Array:
    """The damage of some tiles of a unit, float64 [tiles, formats]."""
    by_row = np.zeros((-(-len(block) // ROW_TILE) * ROW_TILE, len(formats)))
    with torch.inference_mode():
        for index, fmt in enumerate(formats):
            quantized = quantizer.rows(block, fmt, name=unit)
            delta = torch.from_numpy(dequantize(quantized, fmt) - block)
            by_row[: len(block), index] = harm(delta)
    tiles: Array = by_row.reshape(-1, ROW_TILE, len(formats)).sum(1)
    return tiles
