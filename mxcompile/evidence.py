"""What the published strategies look at, measured on one model: errors, gradients, inputs, harm.

Our own prices need none of this. All of it is found when it is first asked for, from the same
samples that calibrate, and every weight is rounded by the quantizer that ships.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir
import safetensors.numpy
import torch
from torch import Tensor
from torch.nn import functional

from mxcompile import graph, probe
from mxcompile.errors import UsageError
from mxcompile.files import whole
from mxcompile.float_model import LOGITS, Feed, FloatModel, by_position, flat, product, source
from mxcompile.formats import Format
from mxcompile.gptq import Quantizer
from mxcompile.graph import Use
from mxcompile.interpret import Values, tensor
from mxcompile.plan import ROW_TILE, PrecisionPlan, TileFormats, Unit
from mxcompile.price import Costs
from mxcompile.probe import Probe
from mxcompile.progress import Progress
from mxcompile.quantize import Quantized, dequantize, rows_by_format
from mxcompile.statistics import Statistics

Array: TypeAlias = np.ndarray[Any, Any]

BLOCK: Final = 1 << 23
"""Weights whose errors are looked at together."""

GRADIENT_SAMPLES: Final = 8
"""Samples whose gradients and inputs are averaged: 2,048 tokens of text."""

PROBE_STRIDE: Final = 4
"""Of a probe's positions every so many is compared."""


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Every weight in every format, by the quantizer that ships; found when it is first read.

    Rows are rounded on their own, so that any plan's weights are rows of these.

    Attributes:
        weights: A unit's float32 weights [rows, columns] by name.
        statistics: What calibration found.
        folder: Where codes are kept, a byte a weight and format; None keeps them in memory.
    """

    weights: Callable[[str], Array]
    statistics: Statistics
    folder: Path | None = None
    _kept: dict[tuple[str, Format], Quantized] = field(default_factory=dict)

    def prepare(self, unit: Unit, formats: Iterable[Format]) -> None:
        """Round a unit to some formats: the feedback between its columns is found once."""
        missing = [fmt for fmt in formats if not self._has(unit, fmt)]
        if not missing:
            return
        moments, kinds = self.statistics.kinds(unit.name)
        quantizer = Quantizer.of(*moments, kinds=kinds)
        for fmt in missing:
            alike = TileFormats((fmt,) * unit.tiles)
            self._keep(unit, fmt, quantizer.tiles(self.weights(unit.name), alike, name=unit.name))

    def _has(self, unit: Unit, fmt: Format) -> bool:
        if self.folder is None:
            return (unit.name, fmt) in self._kept
        return self._path(self.folder, unit, fmt).is_file()

    def _keep(self, unit: Unit, fmt: Format, quantized: Quantized) -> None:
        if self.folder is None:
            self._kept[unit.name, fmt] = quantized
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {part.name: getattr(quantized, part.name) for part in fields(quantized)}
        with whole(self._path(self.folder, unit, fmt)) as draft:
            safetensors.numpy.save_file(arrays, draft)

    def _find(self, unit: Unit, fmt: Format) -> Quantized:
        if self.folder is None:
            return self._kept[unit.name, fmt]
        path = self._path(self.folder, unit, fmt)
        try:
            return Quantized(**safetensors.numpy.load_file(path))
        except (OSError, safetensors.SafetensorError, TypeError) as error:
            raise UsageError(f"{path} cannot be read, remove it: {error}") from error

    @staticmethod
    def _path(folder: Path, unit: Unit, fmt: Format) -> Path:
        """A unit's codes in a format; names of units may hold what names of files may not."""
        digest = hashlib.sha256(unit.name.encode()).hexdigest()[:32]
        return folder / f"{digest}.{fmt}.safetensors"

    def blocks(self, unit: Unit, fmt: Format) -> Iterator[tuple[slice, Array]]:
        """A unit in one format, some rows at a time: which, and float32 [rows, columns]."""
        self.prepare(unit, [fmt])
        quantized, step = self._find(unit, fmt), max(BLOCK // unit.columns, 1)
        for start in range(0, unit.rows, step):
            part = slice(start, min(start + step, unit.rows))
            yield part, dequantize(quantized.take(np.arange(part.start, part.stop)), fmt)

    def tiles(self, unit: Unit, formats: TileFormats) -> Array:
        """A unit with a format a row tile, float32 [rows, columns]."""
        self.prepare(unit, dict.fromkeys(formats.formats))
        result = np.empty((unit.rows, unit.columns), np.float32)
        for fmt, rows in rows_by_format(formats, unit.rows):
            result[rows] = dequantize(self._find(unit, fmt).take(rows), fmt)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Errors:
    """Sums over the row tiles of a unit, float64 [tiles, formats].

    Attributes:
        squared: ``sum dW**2``.
        met: ``sum_k E[x_k**2] dW_k**2``: the squared error of what the rows compute, as far as
            inputs do not go together.
        felt: ``sum dL/dW dW``: what the loss changes by, to first order; signed.
    """

    squared: Array
    met: Array
    felt: Array


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What one backward pass says of a unit.

    Attributes:
        slope: The mean ``dL/dW`` [rows, columns], L being the loss on the text's own tokens.
        power: ``E[x_k**2]`` of what its columns meet, [columns].
        variance: The variance of an input over positions, the mean over columns.
    """

    slope: Tensor
    power: Array
    variance: float


@dataclass(frozen=True, eq=False)
class Evidence:
    """A model under study, and what strategies may ask of it.

    Attributes:
        model: A canonical model.
        statistics: What calibration found.
        costs: Our prices: damage and bytes of every tile in every format.
        feeds: The samples that calibrated.
        probes: Fewer and shorter ones, for what takes many runs.
        progress: Is told of the work.
        folder: Where codes are kept for the next time, if anywhere.
    """

    model: ir.Model
    statistics: Statistics
    costs: Costs
    feeds: Sequence[Feed]
    probes: Sequence[Feed]
    progress: Progress = field(default_factory=Progress)
    folder: Path | None = None

    @cached_property
    def watched(self) -> FloatModel:
        """The float model."""
        return FloatModel(self.model, graph.uses(self.model))

    @cached_property
    def rounded(self) -> Rounded:
        """All weights in all formats."""
        return Rounded(self._weight, self.statistics, self.folder)

    def replaced(self, plan: PrecisionPlan) -> Values:
        """The weights that a plan leaves of the float model's, to override them with."""
        with self.progress.stage("quantize", len(plan.units)) as advance:
            found = {}
            for unit in plan.units:
                found[unit.name] = self._replaced(unit, plan.tiles[unit.name])
                advance()
        return found

    def _replaced(self, unit: Unit, formats: TileFormats) -> Tensor:
        shape = graph.array(self.model.graph.initializers[unit.name]).shape
        return torch.from_numpy(self.rounded.tiles(unit, formats)).reshape(shape)

    @cached_property
    def errors(self) -> Mapping[str, Errors]:
        """The rounding errors of every unit."""
        with self.progress.stage("errors", len(self.costs.units)) as advance:
            found = {}
            for unit in self.costs.units:
                found[unit.name] = self._errors(unit)
                advance()
        return found

    def _errors(self, unit: Unit) -> Errors:
        formats = self.costs.formats
        self.rounded.prepare(unit, formats)
        weight, observed = self._weight(unit.name), self.observed[unit.name]
        shape = (unit.tiles * ROW_TILE, len(formats))
        squared, met, felt = (np.zeros(shape) for _ in range(3))
        for index, fmt in enumerate(formats):
            for rows, values in self.rounded.blocks(unit, fmt):
                delta = values - weight[rows]
                felt[rows, index] = np.einsum("ok,ok->o", delta, observed.slope[rows].numpy())
                np.square(delta, out=delta)
                squared[rows, index] = delta.sum(1)
                met[rows, index] = delta @ observed.power

        def by_tile(by_row: Array) -> Array:
            return np.asarray(by_row.reshape(unit.tiles, ROW_TILE, -1).sum(1))

        return Errors(by_tile(squared), by_tile(met), by_tile(felt))

    @cached_property
    def observed(self) -> Mapping[str, Observed]:
        """Gradients of the weights and moments of their inputs, over some of the samples."""
        feeds = self.feeds[:GRADIENT_SAMPLES]
        sums = {unit.name: _Sums.of(unit) for unit in self.costs.units}
        with self.progress.stage("gradients", len(feeds)) as advance:
            for index, feed in enumerate(feeds):
                self._observe(feed, torch.Generator().manual_seed(index), sums)
                advance()
        return {name: each.means(len(feeds)) for name, each in sums.items()}

    def _observe(self, feed: Feed, random: torch.Generator, sums: Mapping[str, "_Sums"]) -> None:
        """Add one sample's gradients and inputs."""
        leaves = {name: self._leaf(name) for name in sums}
        values = self.watched.interpreter.run(feed, overrides=leaves, keep=True)
        loss = _loss(values, self.watched.outputs, feed, random)
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, slope in zip(leaves, slopes, strict=True):
            if slope is not None:
                sums[name].slope.add_(slope.reshape(sums[name].slope.shape))
            for use in _multiplied(self.watched.uses[name]):
                sums[name].see(_met(use, values))

    @cached_property
    def harm(self) -> Mapping[str, Array]:
        """By unit, measured harm [formats] when it alone, with what shares its input, is rounded.

        In nats of divergence a token, or as relative squared error for models without logits. What
        is measured of several units at once is divided among them by their weights.
        """
        by_name = {unit.name: unit for unit in self.costs.units}
        together = [[u for u in g if u in by_name] for g in probe.groups(self.watched)]
        alone = by_name.keys() - {name for group in together for name in group}
        together += [[name] for name in by_name if name in alone]
        found: dict[str, Array] = {}
        with torch.no_grad():
            runs = Probe(self.watched, self.probes, PROBE_STRIDE)
            with self.progress.stage("probe", len(together)) as advance:
                for names in together:
                    harm = self._harm(runs, [by_name[name] for name in names])
                    size = sum(by_name[name].parameters for name in names)
                    for name in names:
                        found[name] = harm * by_name[name].parameters / size
                    advance()
        return found

    def _harm(self, runs: Probe, units: Sequence[Unit]) -> Array:
        harm = []
        for unit in units:
            self.rounded.prepare(unit, self.costs.formats)
        for fmt in self.costs.formats:
            overrides = {
                unit.name: self._replaced(unit, TileFormats((fmt,) * unit.tiles)) for unit in units
            }
            harm.append(runs.harm(overrides))
        return np.array(harm)

    def _weight(self, unit: str) -> Array:
        return np.asarray(graph.weight(self.model, unit))

    def _leaf(self, unit: str) -> Tensor:
        """A weight that gradients reach."""
        data = self.model.graph.initializers[unit].const_value
        assert data is not None
        return tensor(data).detach().requires_grad_()


@dataclass(slots=True, eq=False)
class _Sums:
    """What is added up of a unit over samples."""

    slope: Tensor
    total: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def of(cls, unit: Unit) -> "_Sums":
        return cls(torch.zeros(unit.rows, unit.columns), torch.zeros(()), torch.zeros(()))

    def see(self, x: Tensor) -> None:
        self.total = self.total + x.sum(0)
        self.squares = self.squares + x.square().sum(0)
        self.count += len(x)

    def means(self, samples: int) -> Observed:
        count = max(self.count, 1)
        power, mean = self.squares / count, self.total / count
        columns = self.slope.shape[1]
        # A table that is only looked up meets ones.
        whole = power if len(power) == columns else torch.ones(columns)
        variance = float((power - mean.square()).mean())
        return Observed(self.slope / samples, whole.numpy().astype(np.float64), variance)


def _multiplied(uses: Sequence[Use]) -> list[Use]:
    """The uses that multiply; of a table that is only looked up, the lookups."""
    return [use for use in uses if use.kind != "embedding"] or list(uses)


def _met(use: Use, values: Values) -> Tensor:
    """What a use multiplies, [positions, columns]; of a lookup what it gives."""
    if use.kind == "embedding":
        return by_position(values[product(use)], use).detach()
    return flat(values[source(use)], use).detach()


def _loss(values: Values, outputs: Sequence[str], feed: Feed, random: torch.Generator) -> Tensor:
    """The cross entropy of a text's own next tokens; for other models a random projection.

    The projection is of the outputs over their norm, so that a gradient says what an error changes.
    """
    logits, ids = values.get(LOGITS), feed.get("input_ids")
    if logits is not None and ids is not None and logits.dim() == ids.dim() + 1:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().long())
    ends = [values[name] for name in outputs if values[name].requires_grad]
    projected = [
        (end * torch.randn(end.shape, generator=random)).sum() / end.detach().norm() for end in ends
    ]
    return torch.stack(projected).sum()
