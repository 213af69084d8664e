"""The precision plan: the formats of every row tile of every weight, of activations and caches.

A plan is a value with a JSON text form. It knows names, shapes and formats, no numbers of the
model: scales and codes are found later, from the weights themselves.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final, Self

from mxcompile.errors import PlanError
from mxcompile.formats import (
    ACTIVATION_FORMATS,
    CACHE_FORMATS,
    FORMATS,
    ActivationFormat,
    CacheFormat,
    Format,
    groups,
)

ROW_TILE: Final = 16
"""Rows (output channels) of a tile: the 32-bit lanes of a 512-bit vector."""

VERSION: Final = 3
"""Of the plan's JSON form; 2, which is read too, says nothing of caches."""

_RUN = re.compile(r"(?P<format>\w+)(\*(?P<count>[1-9]\d*))?")


@dataclass(frozen=True, slots=True)
class Unit:
    """A weight that is planned as one: an initializer seen as a matrix of output rows.

    A matmul weight has one row an output feature, an embedding one a token, a convolution one an
    output channel with its ``in/group * kh * kw`` taps as columns.
    """

    name: str
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """The number of row tiles; the last may be padded."""
        return -(-self.rows // ROW_TILE)

    @property
    def parameters(self) -> int:
        """The number of weights, padding not counted."""
        return self.rows * self.columns


CODEBOOK_BYTES: Final = 64
"""What a codebook takes in a packed weight: a vector of copies."""


def tile_bytes(columns: int, fmt: Format) -> int:
    """The bytes that one row tile takes when packed: codes, scales, zero-points and row scales.

    The part after the codes is padded to 64 bytes so that codes stay aligned to vectors.
    """
    count = groups(columns)
    codes = count * 64 * fmt.bits
    scales = count * ROW_TILE + count * ROW_TILE // 2 + 2 * ROW_TILE
    return codes + -(-scales // 64) * 64


@dataclass(frozen=True, slots=True)
class TileFormats:
    """The formats of a unit's row tiles, in row order; text form ``int4*12,int3*28,int8``."""

    formats: tuple[Format, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            PlanError: a run is malformed or names no format.
        """
        formats: list[Format] = []
        for run in text.split(","):
            match = _RUN.fullmatch(run)
            if match is None or match["format"] not in FORMATS:
                raise PlanError(
                    f"'{run}' is not FORMAT or FORMAT*COUNT; formats: {', '.join(FORMATS)}"
                )
            formats += [FORMATS[match["format"]]] * int(match["count"] or 1)
        return cls(tuple(formats))

    def __str__(self) -> str:
        runs = ((name, len(list(run))) for name, run in itertools.groupby(map(str, self.formats)))
        return ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a user decides for the units whose names match a pattern; text form ``*.down=int8``.

    Attributes:
        pattern: As a shell has it, for a unit's whole name; of several rules the first counts.
        format: What the units have.
        floor: Whether it is the least that they have, and the solver may give more.
    """

    pattern: str
    format: Format
    floor: bool = False

    @classmethod
    def parse(cls, text: str, *, floor: bool = False) -> Self:
        """Read the text form.

        Raises:
            PlanError: the text is not PATTERN=FORMAT.
        """
        pattern, _, name = text.rpartition("=")
        if not pattern or name not in FORMATS:
            raise PlanError(f"'{text}' is not PATTERN=FORMAT; formats: {', '.join(FORMATS)}")
        return cls(pattern, FORMATS[name], floor)

    def names(self, unit: str) -> bool:
        """Whether the rule is for a unit."""
        return fnmatchcase(unit, self.pattern)

    def __str__(self) -> str:
        return f"{self.pattern}={self.format}"


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """A format for every row tile of every unit, for what linear layers read, and for caches.

    Attributes:
        units: What is planned.
        tiles: By unit, its row tiles' formats.
        activations: By the name of a value that linear layers read, the format that it is rounded
            to; what is not named stays float.
        caches: By the name of the input that holds past keys or values of a layer, the format
            that they are cached in; what is not named stays float.

    Raises:
        PlanError: a unit has another number of tiles than its rows need.
    """

    units: tuple[Unit, ...]
    tiles: Mapping[str, TileFormats]
    activations: Mapping[str, ActivationFormat] = field(default_factory=dict)
    caches: Mapping[str, CacheFormat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", MappingProxyType(dict(self.tiles)))
        object.__setattr__(self, "activations", MappingProxyType(dict(self.activations)))
        object.__setattr__(self, "caches", MappingProxyType(dict(self.caches)))
        if (named := {u.name for u in self.units}) != self.tiles.keys():
            raise PlanError(f"formats and units disagree on {sorted(named ^ self.tiles.keys())}")
        for unit in self.units:
            if (found := len(self.tiles[unit.name].formats)) != unit.tiles:
                raise PlanError(f"{unit.name} has {unit.tiles} row tiles, the plan has {found}")

    @classmethod
    def uniform(cls, units: tuple[Unit, ...], fmt: Format) -> Self:
        """The plan that gives every tile one format."""
        return cls(units, {u.name: TileFormats((fmt,) * u.tiles) for u in units})

    @classmethod
    def widest_uniform(cls, units: tuple[Unit, ...], limit: int) -> Self | None:
        """The largest uniform plan of at most ``limit`` bytes, if there is one."""
        plans = (cls.uniform(units, fmt) for fmt in FORMATS.values())
        fits = [plan for plan in plans if plan.weight_bytes <= limit]
        return max(fits, key=lambda plan: plan.weight_bytes, default=None)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all packed tiles and of their codebooks."""
        return sum(
            count * tile_bytes(unit.columns, fmt) + (CODEBOOK_BYTES if fmt.codebook else 0)
            for unit in self.units
            for fmt, count in Counter(self.tiles[unit.name].formats).items()
        )

    def parameters_by_format(self) -> dict[str, int]:
        """How many weights each format holds, widest format last."""
        total: Counter[Format] = Counter()
        for unit in self.units:
            for index, fmt in enumerate(self.tiles[unit.name].formats):
                total[fmt] += min(ROW_TILE, unit.rows - index * ROW_TILE) * unit.columns
        return {f.name: total[f] for f in sorted(total, key=lambda f: f.bits)}

    @property
    def activation_summary(self) -> str:
        """How many values linear layers read in each format, such as ``int8*91,int16*10``."""
        counts = Counter(self.activations.values())
        parts = [f"{fmt}*{counts[fmt]}" for fmt in ACTIVATION_FORMATS.values() if counts[fmt]]
        return ",".join(parts) or "fp32"

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data; ``from_json`` reads it back."""
        return {
            "version": VERSION,
            "row_tile": ROW_TILE,
            "units": [
                {
                    "name": u.name,
                    "rows": u.rows,
                    "columns": u.columns,
                    "tiles": str(self.tiles[u.name]),
                }
                for u in self.units
            ],
            "activations": {name: fmt.name for name, fmt in self.activations.items()},
            "caches": {name: fmt.name for name, fmt in self.caches.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: the data is not a plan of this version, or of the one before.
        """
        try:
            if data["version"] not in (2, VERSION) or data["row_tile"] != ROW_TILE:
                raise PlanError("the plan was written by another version")
            activations = {k: ACTIVATION_FORMATS[f] for k, f in data["activations"].items()}
            units = tuple(Unit(u["name"], int(u["rows"]), int(u["columns"])) for u in data["units"])
            tiles = {u["name"]: TileFormats.parse(u["tiles"]) for u in data["units"]}
            caches = data["caches"] if data["version"] == VERSION else {}
            kept = {name: CACHE_FORMATS[fmt] for name, fmt in caches.items()}
            return cls(units, tiles, activations, kept)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a precision plan: {error!r}") from error

    @property
    def digest(self) -> str:
        """The sha256 of the plan's canonical text."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
