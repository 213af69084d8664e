"""Factors from forward runs alone, for when gradients cannot be had or are not believed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mxcompile import graph, workers
from mxcompile.float_model import LOGITS, Feed, FloatModel, product, source, token_tables
from mxcompile.formats import FORMATS
from mxcompile.graph import Use
from mxcompile.interpret import Values
from mxcompile.progress import Advance, Progress
from mxcompile.quantize import Importance, dequantize, quantize
from mxcompile.statistics import Array, Factors, Rarity, Statistics, UseStatistics

BLOCK: Final = 1 << 23
"""Weights of a head that are perturbed at a time."""

PERTURBATION: Final = FORMATS["int3"]

RARITIES: Final = 5
"""Into how many parts lookups are split, of as many each, by how rare their tokens are."""

RARITY_SAMPLES: Final = 16
"""Samples that are perturbed for that."""


@dataclass(frozen=True, slots=True)
class ForwardProbe:
    """Factors from forward runs with one layer perturbed at a time, after HIGGS.

    Layers that read the same value (queries, keys and values; gate and up) are perturbed together,
    by the errors that 3-bit quantization makes: strong enough to measure, weak enough to add up.

    Attributes:
        stride: Of a text's positions every so many is compared.
    """

    stride: int = 4

    def factors(
        self, watched: FloatModel, found: Statistics, feeds: Sequence[Feed], progress: Progress
    ) -> Factors:
        """Measure each group of layers, each embedding and the head."""
        probe = Probe(watched, feeds, self.stride)
        together = groups(watched)
        single = [
            (unit, use, met)
            for unit, uses in watched.uses.items()
            for use, met in zip(uses, found.uses[unit], strict=True)
            if not watched.is_layer(use)
        ]
        scale: dict[Use, float] = {}
        with progress.stage("probe", len(together) + len(single)) as advance:
            for units in together:
                layers = [use for u in units for use in watched.uses[u] if watched.is_layer(use)]
                scale |= dict.fromkeys(layers, probe.layers(found, units))
                advance()
            for unit, use, met in single:
                measure = probe.head if use is watched.head else probe.embedding
                scale[use] = measure(unit, use, met)
                advance()
        return {unit: tuple(scale[use] for use in uses) for unit, uses in watched.uses.items()}


def measure_rarity(
    watched: FloatModel, found: Statistics, feeds: Sequence[Feed], progress: Progress
) -> Statistics:
    """The statistics with what errors in rare rows of token tables do, measured on some samples.

    A rare word says more than a common one, so that errors in its row do more than ``moment``,
    their mean over all lookups, makes of them: 2.3 times as much for the rarest fifth of what
    MiniLM reads. Gradients of single lookups are too few, and too unlike, to tell; so the lookups
    of a sample are perturbed by parts, the rarer tokens apart.
    """
    tables = token_tables(watched.model)
    if not tables:
        return found
    # Not every so many: texts of several kinds take turns.
    spread = np.linspace(0, len(feeds) - 1, min(len(feeds), RARITY_SAMPLES)).round()
    samples = [feeds[int(index)] for index in spread]
    changed = dict(found.uses)
    with progress.stage("rarity", len(tables) * len(samples)) as advance:
        for unit in tables:
            uses = list(found.uses[unit])
            for at, use in enumerate(watched.uses[unit]):
                if use.kind == "embedding":
                    rarity = _rarity(watched, found, unit, at, samples, advance)
                    uses[at] = replace(uses[at], rarity=rarity)
            changed[unit] = tuple(uses)
    return replace(found, uses=changed)


def _rarity(
    watched: FloatModel,
    found: Statistics,
    unit: str,
    at: int,
    samples: Sequence[Feed],
    advance: Advance,
) -> Rarity:
    """Of one use of a token table."""
    use, met = watched.uses[unit][at], found.uses[unit][at]
    shares = np.log(met.weights.astype(np.float64))
    read = [watched.interpreter.run(feed, fetch=[source(use)])[source(use)] for feed in samples]
    logarithms = shares[torch.cat([ids.flatten() for ids in read]).numpy() % len(shares)]
    edges = np.unique(np.quantile(logarithms, np.arange(1, RARITIES) / RARITIES))
    parts = np.digitize(shares, edges)
    met_parts = np.digitize(logarithms, edges)
    present = np.unique(met_parts)

    @torch.no_grad()
    def look(feed: Feed) -> Array:
        """The harm and the error of each part of a sample's lookups, [parts, 2]."""
        probe = Probe(watched, [feed], stride=1)
        return np.array([probe.lookups(unit, use, met, parts == part) for part in present])

    sums = np.zeros((len(present), 2))
    with workers.pool() as pool:
        for seen in pool.map(look, samples):
            sums += seen
            advance()
    levels = [np.exp(logarithms[met_parts == part].mean()) for part in present]
    harm, error = sums.T * [[1], [found.factors[unit][at]]]
    factors = np.divide(harm, error, out=np.ones_like(harm), where=error > 0)
    return Rarity(np.array(levels), factors)


def groups(watched: FloatModel) -> list[list[str]]:
    """Units with layers among their uses, those that read the same value together."""
    groups: dict[str, list[str]] = {}
    for unit, uses in watched.uses.items():
        sources = [source(use) for use in uses if watched.is_layer(use)]
        if sources:
            groups.setdefault(sources[0], []).append(unit)
    return list(groups.values())


class Probe:
    """The float model's runs on the probe samples, kept, and what perturbing them does."""

    def __init__(self, watched: FloatModel, feeds: Sequence[Feed], stride: int) -> None:
        self.watched = watched
        self.stride = stride
        self.kept = [
            watched.interpreter.run(feed, fetch=watched.fetched, keep=True) for feed in feeds
        ]
        self.reference = [self._outputs(values, {}) for values in self.kept]
        self.likely = [
            v[LOGITS].softmax(-1) if LOGITS in v else torch.empty(0) for v in self.reference
        ]

    def harm(self, overrides: Values) -> float:
        """How far the outputs are from the float model's, when some weights are replaced."""
        return sum(self._harm(i, overrides) for i in range(len(self.kept))) / len(self.kept)

    def layers(self, found: Statistics, units: Sequence[str]) -> float:
        """Harm per unit of error when some layers are perturbed together."""
        overrides: Values = {}
        error = 0.0
        for unit in units:
            weight = graph.weight(self.watched.model, unit)
            diagonal = np.sum([met.diagonal for met in found.uses[unit]], axis=0)
            rough = _perturbed(weight, diagonal)
            delta = torch.from_numpy(rough - weight)
            for use, met in zip(self.watched.uses[unit], found.uses[unit], strict=True):
                if self.watched.is_layer(use):
                    error += float(met.errors(delta).sum(dtype=torch.float64))
            shape = graph.array(self.watched.model.graph.initializers[unit]).shape
            overrides[unit] = torch.from_numpy(rough).reshape(shape)
        return self.harm(overrides) / error if error > 0 else 0.0

    def embedding(self, unit: str, use: Use, met: UseStatistics) -> float:
        """Harm per unit of error of the rows that are read."""
        harm, error = self.lookups(unit, use, met)
        return harm / error if error > 0 else 0.0

    def lookups(
        self, unit: str, use: Use, met: UseStatistics, rows: Array | None = None
    ) -> tuple[float, float]:
        """The harm of errors in what is looked up, and these errors; of some ``rows`` alone."""
        weight = graph.weight(self.watched.model, unit)
        moment = torch.from_numpy(met.moment)
        harm, error = 0.0, 0.0
        for sample, values in enumerate(self.kept):
            ids = values[source(use)] % len(weight)
            read, where = torch.unique(ids, return_inverse=True)
            exact = weight[read.numpy()]
            rough = _perturbed(exact, met.moment)
            if rows is not None:
                rough = np.where(rows[read.numpy(), None], rough, exact)
            delta = torch.from_numpy(rough - exact)[where]
            error += float((delta.square() * moment).sum(-1).mean())
            # The rows of a tied head stay as they are: the lookup is overridden, not the weight.
            harm += self._harm(sample, {product(use): torch.from_numpy(rough)[where]})
        return harm, error

    def head(self, unit: str, use: Use, met: UseStatistics) -> float:
        """Harm per unit of error of the head.

        The expansion of the divergence says a half; what scales or caps the logits after the head,
        and how sureness goes with large inputs, are in the measured value.
        """
        weight = graph.weight(self.watched.model, unit)
        hidden = [self._positions(values[met.source]) for values in self.kept]
        changes = [torch.empty(len(h), len(weight)) for h in hidden]
        error = 0.0
        rows, moment = torch.from_numpy(met.rows), torch.from_numpy(met.moment)
        for start in range(0, len(weight), step := max(BLOCK // weight.shape[1], 1)):
            part = slice(start, start + step)
            delta = torch.from_numpy(_perturbed(weight[part], met.diagonal) - weight[part])
            for change, h in zip(changes, hidden, strict=True):
                change[:, part] = h @ delta.T
            error += float(rows[part] @ ((delta @ moment) * delta).sum(1))
        harm = 0.0
        for sample, (change, h) in enumerate(zip(changes, hidden, strict=True)):
            rough = (self.watched.logits(h, product(use)) + change).unsqueeze(0)
            values = self.watched.interpreter.run(
                {}, overrides={product(use): rough}, fetch=[LOGITS]
            )
            harm += self._divergence(sample, values[LOGITS][0]) / len(hidden)
        return harm / error if error > 0 else 0.0

    def _harm(self, sample: int, overrides: Values) -> float:
        """How far the outputs of one sample are from the float model's."""
        fetched = self.watched.fetched
        values = self.watched.interpreter.rerun(self.kept[sample], overrides, fetch=fetched)
        exact, rough = self.reference[sample], self._outputs(values, overrides)
        if LOGITS in exact:
            return self._divergence(sample, rough[LOGITS])
        errors = [
            float((rough[k] - v).square().sum() / v.square().sum().clamp(min=1e-30))
            for k, v in exact.items()
        ]
        return sum(errors) / len(errors)

    def _divergence(self, sample: int, logits: Tensor) -> float:
        """The mean KL divergence of one sample's logits from the float model's."""
        p, exact = self.likely[sample], self.reference[sample][LOGITS]
        lost = _log_likelihood(p, exact) - _log_likelihood(p, logits)
        return max(float(lost.mean(dtype=torch.float64)), 0.0)

    def _outputs(self, values: Values, overrides: Values) -> Values:
        """The logits at the positions compared, or all outputs of other models."""
        if self.watched.hidden is not None:
            hidden = self._positions(values[self.watched.hidden])
            return {LOGITS: self.watched.logits(hidden, overrides=overrides)}
        if LOGITS in self.watched.outputs:
            return {LOGITS: self._positions(values[LOGITS])}
        return {k: values[k] for k in self.watched.outputs if values[k].is_floating_point()}

    def _positions(self, x: Tensor) -> Tensor:
        """The positions compared, [positions, columns]."""
        return x.flatten(0, -2)[self.stride - 1 :: self.stride]


def _log_likelihood(p: Tensor, logits: Tensor) -> Tensor:
    """``E_p[log q]`` of each position, for ``q`` the softmax of ``logits``."""
    likelihood: Tensor = torch.linalg.vecdot(p, logits) - logits.logsumexp(-1)
    return likelihood


def _perturbed(weight: Array, met: Array) -> Array:
    return dequantize(quantize(weight, PERTURBATION, Importance.of(met)), PERTURBATION)
