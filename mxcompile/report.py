"""The report of a compilation: what was decided, why, what it should cost, and what it does."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from mxcompile import page
from mxcompile.artifact import Artifact
from mxcompile.formats import Format
from mxcompile.inspection import describe_artifact
from mxcompile.page import Mark
from mxcompile.plan import ROW_TILE, PrecisionPlan, Unit, tile_bytes
from mxcompile.price import Costs
from mxcompile.solve import sweep
from mxcompile.statistics import Statistics

Array: TypeAlias = np.ndarray[Any, Any]

SWEEP_POINTS: Final = 32
EXPENSIVE: Final = 10

_LAYER = re.compile(r"(?P<before>.*?)\.(?P<layer>\d+)\.(?P<component>.*)")

_PREDICTED: Final = {
    "damage": "divergence from the float model, nats a token (relative squared error, if no text)",
    "activation_damage": "what the formats of activations add to it",
    "cache_damage": "what the formats of the KV cache add to it",
    "gap": "the most of it that a better plan could save",
    "method": "found by",
    "bits_per_weight": "bits per weight, all-in",
    "damage_per_byte": "shadow price: what one more byte would save",
    "tokens_per_s": "decode rate, tokens a second",
}
"""What the solver's numbers mean."""


def render(
    artifact: Artifact,
    *,
    predicted: Mapping[str, float | str],
    seconds: Mapping[str, float],
    quality: Mapping[str, float] | None = None,
    costs: Costs | None = None,
    statistics: Statistics | None = None,
) -> str:
    """The report on ``artifact``.

    Args:
        artifact: complete but for the report.
        predicted: what the solver expected, by name.
        seconds: how long each stage took.
        quality: what was measured, where the manifest does not have it yet.
        costs: the prices that the plan was solved from; without them it is not explained.
        statistics: what the prices were found from.
    """
    facts = describe_artifact(artifact)
    measured = quality or facts["quality"]
    decided = ""
    if costs is not None and statistics is not None:
        why = _Decision(artifact, artifact.plan(), costs, statistics)
        decided = _explain(why, predicted, measured)
    sections = [
        page.section("Summary", page.table(("", ""), _summary(facts))),
        page.section(
            "Measured on the compiled program",
            page.values(measured) or "Not verified: made where it cannot run.",
        ),
        page.section(
            "Predicted by the solver",
            page.values({_PREDICTED.get(name, name): value for name, value in predicted.items()}),
        ),
        page.section("Formats", _formats(facts["formats"])),
        page.section("Bits per weight by layer", _bits(facts["tensors"])),
        decided,
        page.section("Tensors", _tensors(facts["tensors"])),
        page.section("KV cache by layer", _caches(facts["kv_cache"])) if facts["kv_cache"] else "",
        page.section("Time", page.values({k: f"{v:.1f} s" for k, v in seconds.items()})),
    ]
    subtitle = (
        f"{facts['bits_per_weight']:.3f} bits per weight for {facts['target']}, "
        f"budget {facts['budget']}"
    )
    return page.page(facts["name"], subtitle, sections)


def _summary(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    decoder, kept = facts["decoder_bits_per_weight"], facts["kv_cache"]
    rows = [
        ("parameters", f"{facts['parameters']:,}"),
        ("weight file", f"{facts['weight_bytes']:,} bytes"),
        ("code", f"{facts['code_bytes']:,} bytes"),
        ("bits per weight, all-in", f"{facts['bits_per_weight']:.3f}"),
        ("without the vocabulary", f"{decoder:.3f}" if decoder else ""),
        ("activations", facts["activations"]),
        ("KV cache", f"{kept['token_bytes']:,} bytes a token" if kept else ""),
        ("bits per cached number, all-in", f"{kept['bits']:.2f}" if kept else ""),
        ("plan", facts["plan_digest"][:16]),
        ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]
    return [(name, value) for name, value in rows if value]


def _caches(facts: Mapping[str, Any]) -> str:
    rows = [
        (
            str(index),
            f"{layer['kv_heads']} x {layer['head_dim']}",
            layer["key"],
            layer["value"],
            f"{layer['token_bytes']:,}",
        )
        for index, layer in enumerate(facts["layers"])
    ]
    return page.table(("layer", "heads", "keys", "values", "bytes a token"), rows)


def _formats(formats: Mapping[str, int]) -> str:
    total = sum(formats.values())
    rows = [(name, f"{n:,}", f"{100 * n / total:.1f} %") for name, n in formats.items()]
    return page.table(("format", "parameters", "share"), rows)


def _tensors(tensors: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (
            t["name"],
            f"{t['rows']} x {t['columns']}",
            f"{t['bits']:.2f}",
            ", ".join(f"{count} {name}" for name, count in t["tiles"].items()),
        )
        for t in tensors
    ]
    return page.table(("tensor", "shape", "bits", "row tiles"), rows)


def _bits(tensors: Sequence[Mapping[str, Any]]) -> str:
    """A row a component, a column a layer, the darker the more bits: 2 nearly white, 8 full."""
    cells = _by_layer((t["name"], t["bits"]) for t in tensors)
    return page.heat_map(cells, lambda bits: (bits - 2) / 6, "{:.2f}".format)


def _by_layer(tensors: Iterable[tuple[str, float]]) -> dict[str, dict[int, float]]:
    """Values by component and layer; tensors outside the layers are components of one cell."""
    cells: dict[str, dict[int, float]] = {}
    for name, value in tensors:
        component, layer = _place(name)
        cells.setdefault(component, {})[layer] = value
    return cells


def _place(tensor: str) -> tuple[str, int]:
    match = _LAYER.fullmatch(tensor)
    component, layer = (match["component"], int(match["layer"])) if match else (tensor, 0)
    return component.removesuffix(".weight"), layer


@dataclass(frozen=True, slots=True, eq=False)
class _Decision:
    """An artifact's plan beside the prices that it was solved from."""

    artifact: Artifact
    plan: PrecisionPlan
    costs: Costs
    statistics: Statistics

    @property
    def fixed_bytes(self) -> int:
        return self.artifact.weight_bytes - self.plan.weight_bytes

    def bits(self, size: int) -> float:
        """All-in bits a weight of packed tiles of so many bytes."""
        return 8 * (size + self.fixed_bytes) / self.artifact.manifest.parameters

    def uniform(self) -> Format:
        """The format of the widest uniform plan that is no larger, or the narrowest format."""
        sizes = {
            fmt: PrecisionPlan.uniform(self.plan.units, fmt).weight_bytes
            for fmt in self.costs.formats
        }
        fits = [fmt for fmt in sizes if sizes[fmt] <= self.plan.weight_bytes]
        return max(fits, key=sizes.__getitem__, default=self.costs.formats[0])

    def damage(self, unit: Unit, fmt: Format) -> Array:
        """What a unit's tiles lose in one format, [tiles]."""
        found: Array = self.costs.damage[unit.name][:, self.costs.formats.index(fmt)]
        return found

    def row_weights(self, unit: Unit) -> Array:
        """How much errors in a tile's rows count next to the unit's mean, [tiles]."""
        parts = zip(
            self.statistics.uses[unit.name], self.statistics.factors[unit.name], strict=True
        )
        rows = sum((f * use.weights * use.diagonal.sum() for use, f in parts), np.zeros(1))
        padded = np.pad(rows, (0, unit.tiles * ROW_TILE - unit.rows))
        by_tile: Array = padded.reshape(-1, ROW_TILE).sum(1) / ROW_TILE
        return by_tile / max(float(rows.mean()), np.finfo(np.float64).tiny)


def _explain(
    why: _Decision, predicted: Mapping[str, float | str], measured: Mapping[str, float]
) -> str:
    """The parts of the report that need prices."""
    fmt = why.uniform()
    price = predicted.get("damage_per_byte")
    shadow = (
        f" One more byte would save {price:.3g}, the shadow price: tiles are widened as long as "
        "that saves more a byte."
        if isinstance(price, float)
        else ""
    )
    return "".join(
        [
            page.section(
                f"Sensitivity by layer: damage per million weights, were all {fmt}",
                _sensitivity(why, fmt),
                "The darker, the more errors there harm the output (logarithmic shades).",
            ),
            page.section("Sensitivity by component", _components(why, fmt)),
            page.section(
                "Damage against size",
                _pareto(why, predicted, measured),
                "The line is the best plan for every size, as predicted.",
            ),
            page.section(
                "The ten most expensive tiles",
                _expensive(why),
                f"Those of {ROW_TILE} rows whose bytes save the most damage.{shadow} Why: what "
                "errors in the tensor cost next to the model's mean, in the tile next to the "
                "tensor's mean, and how much the tile's outputs count next to the tensor's.",
            ),
        ]
    )


def _sensitivity(why: _Decision, fmt: Format) -> str:
    found = [
        (unit.name, 1e6 * float(why.damage(unit, fmt).sum()) / unit.parameters)
        for unit in why.plan.units
    ]
    positive = [value for _, value in found if value > 0]
    low, high = (np.log(f(positive)) if positive else 0.0 for f in (min, max))

    def depth(value: float) -> float:
        return float((np.log(value) - low) / ((high - low) or 1)) if value > 0 else 0.0

    return page.heat_map(_by_layer(found), depth, lambda v: f"{v:.0f}" if v >= 10 else f"{v:.1g}")


def _components(why: _Decision, fmt: Format) -> str:
    """A row a component: all its layers together, the most sensitive first."""
    groups: dict[str, list[Unit]] = {}
    for unit in why.plan.units:
        groups.setdefault(_place(unit.name)[0], []).append(unit)
    rows = []
    for name, units in groups.items():
        count = sum(unit.parameters for unit in units)
        size = sum(
            tile_bytes(unit.columns, f) for unit in units for f in why.plan.tiles[unit.name].formats
        )
        uniform = sum(float(why.damage(unit, fmt).sum()) for unit in units)
        paid = sum(float(why.costs.paid(unit, why.plan).sum()) for unit in units)
        rows.append((name, f"{count:,}", 8 * size / count, 1e6 * uniform / count, uniform, paid))
    rows.sort(key=lambda row: -row[3])
    head = ("component", "weights", "bits", f"{fmt}, a million weights", f"all in {fmt}", "planned")
    return page.table(head, rows)


def _pareto(
    why: _Decision, predicted: Mapping[str, float | str], measured: Mapping[str, float]
) -> str:
    line = [(why.bits(size), damage) for size, damage in sweep(why.costs, SWEEP_POINTS)]
    marks = []
    for fmt in why.costs.formats:
        plan = PrecisionPlan.uniform(why.plan.units, fmt)
        total = sum(float(why.damage(unit, fmt).sum()) for unit in plan.units)
        marks.append(Mark(f"uniform {fmt}", why.bits(plan.weight_bytes), total))
    bits = why.artifact.bits_per_weight
    if isinstance(damage := predicted.get("damage"), float):
        marks.append(Mark("this artifact, predicted", bits, damage, strong=True))
    shown = (measured[key] for key in ("kld_mean", "relative_error") if key in measured)
    marks += [Mark("this artifact, measured", bits, value, strong=True) for value in shown]
    return page.curve(line, marks, ("bits per weight, all-in", "predicted damage"))


def _expensive(why: _Decision) -> str:
    """The tiles that save the most over the narrowest format, and what makes them so."""
    tiles = sorted(_savings(why), key=lambda tile: -tile[0])[:EXPENSIVE]
    mean = sum(float(d[:, 0].sum()) for d in why.costs.damage.values()) / sum(
        unit.parameters for unit in why.plan.units
    )
    narrow = why.costs.formats[0]
    rows = []
    for saved, unit, tile in tiles:
        fmt = why.plan.tiles[unit.name].formats[tile]
        size = tile_bytes(unit.columns, fmt)
        extra = size - tile_bytes(unit.columns, narrow)
        tensor = float(why.damage(unit, narrow).sum()) / unit.parameters
        own = float(why.damage(unit, narrow)[tile]) * unit.tiles / (tensor * unit.parameters)
        last = min((tile + 1) * ROW_TILE, unit.rows) - 1
        rows.append(
            (
                unit.name,
                f"{tile * ROW_TILE}-{last}",
                str(fmt),
                f"{size:,}",
                saved,
                saved / extra if extra else 0.0,
                tensor / mean,
                own,
                float(why.row_weights(unit)[tile]),
            )
        )
    saves = f"saves over {narrow}"
    head = ("tensor", "rows", "format", "bytes", saves, "a byte", "tensor", "tile", "outputs")
    return page.table(head, rows)


def _savings(why: _Decision) -> Iterator[tuple[float, Unit, int]]:
    """The best tiles of every unit: what each saves over the narrowest format."""
    for unit in why.plan.units:
        saved = why.damage(unit, why.costs.formats[0]) - why.costs.paid(unit, why.plan)
        for tile in np.argsort(-saved, kind="stable")[:EXPENSIVE].tolist():
            yield float(saved[tile]), unit, tile
