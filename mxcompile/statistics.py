"""What calibration text says about a float model, as values: second moments and how errors count.

The damage of rounding errors ``dW`` in a weight is taken as ``sum_o f r_o dW_o M dW_o^T`` over its
rows and its uses, in nats of KL divergence a token (for models without logits: relative squared
error at the output). ``M`` is the second moment of what the weight meets, ``r_o`` how much an error
in what row ``o`` computes counts, ``f`` a factor of the use. How they are found is the business of
``mxcompile.calibrate``.

Rows that the text hardly meets look free and are not, so the weights of rows are moved towards the
mean of the rows around them. In a vocabulary that is what tells a word that is common in other
texts from one that is rare in all: tokenizers number tokens by how early they were merged, and so
by how frequent they are. Gradients and probabilities move by a fixed share (``shrunk``); how often
a row is looked up is a count, whose expectation is known (``expected``), the better where the model
says itself which tokens it holds for likely: it read more text than calibration ever will.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mxcompile.errors import UsageError
from mxcompile.files import whole
from mxcompile.graph import UseKind

Array: TypeAlias = np.ndarray[Any, Any]

Factors: TypeAlias = Mapping[str, tuple[float, ...]]
"""By unit, for each of its uses: harm at the output per unit of error."""

SHRINK: Final = 0.02
"""The share of a row's weight that it gets from the mean of the rows around it."""

PRIOR: Final = 3.0
"""How alike the frequencies of neighbouring rows are: the shape of the gamma distribution that they
are taken to be drawn from. A row that was never met has 1 / (1 + n / 3) of the mean of that, n
being how often rows around it were met."""

BLIND_PRIOR: Final = 0.5
"""The same where neighbours alone make the mean, who tell less of a row: 0.3 to 1 tell the tokens
of texts that were not read best. MiniLM does best with 0.3 at 4.2 bits, with 1 at 3.0."""

LIKELY: Final = 0.8
"""What the model's own probabilities have of a say in that mean beside the neighbours. With it the
prior tells the tokens of texts that were not read (Debian's jargon file and fortunes, a Danish
manual) by 0.13 to 0.23 nats a token better than neighbours alone with a prior of 0.3."""

FAR: Final = 0.1
"""What all rows have of a say in that mean, beside the rows around: tokens that few texts hold are
the ones that say most in a text that does."""

AROUND: Final = 64
LEAST_AROUND: Final = 256
"""What part of the rows these are, and the least of them that make a mean."""

KINDS: Final = 4
"""Into how many kinds the rows of a weight with several uses are sorted, by what they meet most."""

ALIKE: Final = 1.1
"""Rows whose damages differ by less than this factor do not need tiles apart."""

_TINY: Final = 1e-30
"""What is divided by at the least."""

_BLOCK: Final = 1 << 14
"""Rows that are squared at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Rarity:
    """How much more an error counts in rows that are read rarely, than ``moment`` says of all.

    Attributes:
        levels: Shares of lookups, rising, float64 [levels].
        factors: How much more it counts in rows that are read as often, float64 [levels]; between
            levels they are interpolated by the logarithm.
    """

    levels: Array
    factors: Array

    def of(self, shares: Array) -> Array:
        """The factors of rows that are expected to have these shares of lookups."""
        known = np.log(np.maximum(shares, _TINY))
        return np.interp(known, np.log(self.levels), self.factors)


@dataclass(frozen=True, slots=True, eq=False)
class UseStatistics:
    """What one use of a unit meets.

    Attributes:
        kind: How the weight is read.
        source: The name of the value that it is multiplied with, or of the embedding's indices.
        moment: ``M``: [columns, columns], or its diagonal [columns]; float32. The mean of ``x x^T``
            over positions, weighed by how much they count; for an embedding the diagonal
            ``E[(dL/de)**2]`` of what is looked up.
        rows: How much an error in each row counts, float32 [rows]: ``E[(dL/dy_o)**2]`` of a layer's
            outputs, ``E[p_o (1 - p_o)]`` of a head's, the share of lookups that read an
            embedding's row.
        count: How many positions, or lookups, these are the means of.
        likely: Of an embedding whose tokens the model predicts as well, the mean probability of
            each, float32 [rows].
        rarity: Of an embedding, how an error's harm goes with how rare a row is, where measured.
        order: Which of these each row of the weight is, int64 [rows], where it was sorted.
    """

    kind: UseKind
    source: str
    moment: Array
    rows: Array
    count: float
    likely: Array | None = None
    rarity: Rarity | None = None
    order: Array | None = None

    @property
    def weights(self) -> Array:
        """How much an error in each row of the weight is taken to count, float32 [rows]."""
        if self.kind == "embedding":
            weights = expected(self.rows, self.count, self.likely)
            if self.rarity is not None:
                weights *= self.rarity.of(weights).astype(np.float32)
        else:
            weights = shrunk(self.rows)
        return weights if self.order is None else weights[self.order]

    def errors(self, delta: Tensor, start: int = 0) -> Tensor:
        """``r_o dW_o M dW_o^T`` of the rows from ``start`` on."""
        moment = torch.from_numpy(self.moment)
        met = delta @ moment if moment.dim() == 2 else delta * moment
        weights = torch.from_numpy(self.weights)
        return weights[start : start + len(delta)] * (met * delta).sum(1)

    @property
    def diagonal(self) -> Array:
        """``M_kk`` of the columns."""
        return self.moment if self.moment.ndim == 1 else np.diagonal(self.moment)


def _weighed(parts: Iterable[tuple[Array, float]]) -> Array:
    """The weighed sum of moments; a diagonal beside a whole one is the diagonal of one."""
    parts = list(parts)
    whole = any(moment.ndim == 2 for moment, _ in parts)
    terms = [
        (np.diag(m) if whole and m.ndim == 1 else m) * np.float32(weight) for m, weight in parts
    ]
    return np.asarray(sum(terms), np.float32)


def shrunk(rows: Array) -> Array:
    """Rows' weights, moved towards their neighbours' mean: what was not met is not free."""
    result: Array = (1 - SHRINK) * rows + (SHRINK * _around(rows)).astype(np.float32)
    return result


def expected(rows: Array, count: float, likely: Array | None = None) -> Array:
    """How often rows will be read, from the shares of ``count`` lookups that read them.

    Empirical Bayes: frequencies are gamma distributed around a mean of their neighbours, of what is
    ``likely`` where that is known, and of all rows; what was counted is Poisson; this is their
    expectation when the counts are known. It is to these what Good's estimate is to species that
    were not seen.
    """
    mean, prior = _around(rows), BLIND_PRIOR
    if likely is not None:
        prior = PRIOR
        mean = (1 - LIKELY) * mean + LIKELY * likely / likely.sum(dtype=np.float64)
    mean = (1 - FAR) * mean + FAR * rows.mean(dtype=np.float64)
    weights = (count * rows + prior) * mean / (count * mean + prior)
    return np.asarray(weights, np.float32)


def _around(rows: Array) -> Array:
    """The mean of the rows around each, float64 [rows]."""
    count = min(max(len(rows) // AROUND, LEAST_AROUND), len(rows))
    sums = np.concatenate([[0.0], np.cumsum(rows, dtype=np.float64)])
    first = np.clip(np.arange(len(rows)) - count // 2, 0, len(rows) - count)
    mean: Array = (sums[first + count] - sums[first]) / count
    return mean


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """All that pricing needs to know of a model's inner life.

    Attributes:
        samples: How many tokens or samples were seen.
        uses: By unit, what each of its uses meets, in the order of the graph.
        factors: By unit, for each of its uses: harm at the output per unit of error.
        rounding: By the name of what linear layers read, the damage of rounding it to int8 at run
            time, in the units of ``damage``; empty where gradients were not taken.
        caches: By the name of the input with a layer's past keys or values, and by the name of a
            cache's format, the damage of keeping them in it; empty likewise.
    """

    samples: int
    uses: Mapping[str, tuple[UseStatistics, ...]]
    factors: Factors
    rounding: Mapping[str, float] = field(default_factory=dict)
    caches: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def damage(self, unit: str, delta: Tensor, start: int = 0) -> Tensor:
        """The damage of errors in the rows of a unit from ``start`` on, [rows]."""
        parts = zip(self.uses[unit], self.factors[unit], strict=True)
        return sum((f * use.errors(delta, start) for use, f in parts), torch.zeros(len(delta)))

    def harm(self, unit: str, weight: Array) -> Array:
        """The damage of errors that are as large as a unit's weights [rows, columns], by row.

        Quantizers leave errors in proportion to the weights, whatever the format.
        """
        damage = np.zeros(len(weight))
        for use, f in zip(self.uses[unit], self.factors[unit], strict=True):
            for start in range(0, len(weight), _BLOCK):
                part = slice(start, start + _BLOCK)
                damage[part] += f * use.weights[part] * (np.square(weight[part]) @ use.diagonal)
        return damage

    def order(self, unit: str, weight: Array) -> Array:
        """The rows of a unit [rows, columns] by falling harm.

        Rows that are ``ALIKE`` keep their order: putting results back then follows a few streams of
        memory, where a finer order would have it jump for each row.
        """
        with np.errstate(divide="ignore"):
            steps = np.floor(np.log(self.harm(unit, weight)) / np.log(ALIKE))
        return np.argsort(-steps, kind="stable")

    def with_rows(self, unit: str, order: Array) -> Self:
        """The same of a unit whose rows were put in another order."""
        uses = tuple(replace(use, order=order) for use in self.uses[unit])
        return replace(self, uses={**self.uses, unit: uses})

    def with_columns(self, unit: str, order: Array) -> Self:
        """The same of a unit whose columns were put in another order."""
        uses = tuple(
            replace(use, moment=use.moment[np.ix_(*[order] * use.moment.ndim)])
            for use in self.uses[unit]
        )
        return replace(self, uses={**self.uses, unit: uses})

    def with_rows_times(self, unit: str, factors: Array) -> Self:
        """The same of a unit whose rows were multiplied: what they compute counts less by that."""
        uses = tuple(replace(use, rows=use.rows / np.square(factors)) for use in self.uses[unit])
        return replace(self, uses={**self.uses, unit: uses})

    def with_columns_times(self, unit: str, factors: Array) -> Self:
        """The same of a unit whose columns were multiplied, and their inputs divided."""
        uses = []
        for use in self.uses[unit]:
            moment = use.moment / factors
            moment /= factors if moment.ndim == 1 else factors[:, None]
            uses.append(replace(use, moment=moment))
        return replace(self, uses={**self.uses, unit: tuple(uses)})

    def moment(self, unit: str) -> Array:
        """What all uses of a unit meet, for the quantizers: [columns, columns] or [columns]."""
        parts = zip(self.uses[unit], self.factors[unit], strict=True)
        return _weighed((use.moment, f * use.rows.mean(dtype=np.float64)) for use, f in parts)

    def kinds(self, unit: str) -> tuple[tuple[Array, ...], Array | None]:
        """What the rows of a unit meet, for the quantizers, by kinds of rows where these differ.

        A tied vocabulary is looked up and multiplied: a frequent word's row counts as the logit
        that it computes, a rare one's as what the model reads when it does come.

        Returns:
            The moment of each kind, as ``moment`` has it of all rows; the kind of each row, int64
            [rows], or None where there is one kind.
        """
        if len(self.uses[unit]) == 1:
            return (self.moment(unit),), None
        parts = list(zip(self.uses[unit], self.factors[unit], strict=True))
        shares = np.array([f * use.weights * use.diagonal.sum() for use, f in parts], np.float64)
        shares /= np.maximum(shares.sum(0), _TINY)
        kinds = np.minimum((shares[0] * KINDS).astype(np.int64), KINDS - 1)
        found, kinds = np.unique(kinds, return_inverse=True)
        moments = [
            _weighed(
                (use.moment, share[kinds == kind].mean() / max(float(use.diagonal.sum()), _TINY))
                for (use, _), share in zip(parts, shares, strict=True)
            )
            for kind in range(len(found))
        ]
        return tuple(moments), kinds


def save(statistics: Statistics, path: Path) -> None:
    """Write statistics as a safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    shared: dict[int, str] = {}
    units = []
    for unit, uses in statistics.uses.items():
        described = []
        for index, use in enumerate(uses):
            where = shared.setdefault(id(use.moment), f"moment.{len(shared)}")
            tensors[where] = torch.from_numpy(use.moment)
            tensors[f"rows.{unit}.{index}"] = torch.from_numpy(use.rows)
            if use.likely is not None:
                tensors[f"likely.{unit}.{index}"] = torch.from_numpy(use.likely)
            if use.rarity is not None:
                both = np.stack([use.rarity.levels, use.rarity.factors])
                tensors[f"rarity.{unit}.{index}"] = torch.from_numpy(both)
            about_use = {"kind": use.kind, "source": use.source, "moment": where}
            described.append({**about_use, "count": use.count})
        units.append({"name": unit, "uses": described, "factors": statistics.factors[unit]})
    about = {
        "samples": statistics.samples,
        "units": units,
        "rounding": dict(statistics.rounding),
        "caches": {name: dict(damage) for name, damage in statistics.caches.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        safetensors.torch.save_file(tensors, draft, {"mxcompile": json.dumps(about)})


def load(path: Path) -> Statistics:
    """Read what ``save`` wrote.

    Raises:
        UsageError: the file is missing, damaged, or not of this kind.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            about = json.loads(file.metadata()["mxcompile"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        uses = {
            unit["name"]: tuple(
                UseStatistics(
                    use["kind"],
                    use["source"],
                    tensors[use["moment"]],
                    tensors[f"rows.{unit['name']}.{index}"],
                    use["count"],
                    tensors.get(f"likely.{unit['name']}.{index}"),
                    None
                    if (r := tensors.get(f"rarity.{unit['name']}.{index}")) is None
                    else Rarity(*r),
                )
                for index, use in enumerate(unit["uses"])
            )
            for unit in about["units"]
        }
        factors = {unit["name"]: tuple(unit["factors"]) for unit in about["units"]}
        return Statistics(about["samples"], uses, factors, about["rounding"], about["caches"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: no calibration statistics ({error})") from error
