"""One pass over the samples, forward and backward, that sums up all that pricing needs.

A weight's errors are weighed on both sides by what the text says. The second moment of its input
is weighed position by position with the squared gradients there, so that a position that the loss
does not feel (an attention sink, however large its activations are) does not count: the Hessian of
GuidedQuant (arXiv 2505.07004) with one group. Its rows are weighed by the Fisher information of
what they compute, ``E[(dL/dy_o)**2]`` (K-FAC, arXiv 1503.05671), with labels that are drawn from
the model's own distribution. The head has both in closed form: its logits' Fisher information is
``p (1 - p)``.

The sums are tensors under string keys, so that they can be kept while the work goes on, and a run
that was cut off goes on where it was.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from mxcompile import caches, graph, workers
from mxcompile.caches import Cache
from mxcompile.float_model import (
    LOGITS,
    Feed,
    FloatModel,
    Segment,
    by_position,
    flat,
    met,
    product,
    source,
)
from mxcompile.formats import ACTIVATION_FORMATS, CACHE_FORMATS, GROUP
from mxcompile.graph import Use
from mxcompile.interpret import Interpreter, Values
from mxcompile.statistics import Array, Factors, Statistics, UseStatistics

FULL_COLUMNS: Final = 2048
"""Up to how many columns H is kept whole; wider inputs keep its diagonal."""

PATCHES: Final = 1 << 13
"""The most patches of a sample that a convolution's second moment is taken over."""

LOGIT_ROWS: Final = 32
"""Positions whose logits are computed together: 32 rows of 262,144 are 34 MB, many times over."""

HEAD_STRIDE: Final = 4
"""Of a text's positions every so many is given a label: a large vocabulary is most of the work."""


def powers(model: ir.Model, feeds: Sequence[Feed], names: Sequence[str]) -> dict[str, Array]:
    """The mean squares, over all positions of some samples, of the columns of values by name."""
    interpreter = Interpreter(model)
    sums = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
    counts = dict.fromkeys(names, 0)
    with torch.no_grad():
        for feed in feeds:
            for name, value in interpreter.run(feed, fetch=names).items():
                rows = value.flatten(0, -2)
                sums[name] = sums[name] + rows.double().square().sum(0)
                counts[name] += len(rows)
    return {name: (total / counts[name]).numpy() for name, total in sums.items()}


class Observer:
    """Sums over samples; uses that meet the same numbers share a moment.

    Without ``gradients`` all positions and all rows of layers count alike, and only the forward
    half runs: what ``ForwardProbe`` scales.

    Attributes:
        seen: How many samples were run.
        sums: All that is known so far; with ``seen`` it is all that a later run needs to go on.
    """

    def __init__(self, watched: FloatModel, *, gradients: bool = True) -> None:
        self.watched = watched
        self.gradients = gradients
        self.seen = 0
        self.sums: dict[str, Tensor] = {}

    def see(self, feeds: Sequence[Feed]) -> Iterator[None]:
        """Run samples, one a worker, and yield whenever one more is in the sums.

        They are added in order: results do not vary.
        """

        def look(index: int, feed: Feed) -> dict[str, Tensor]:
            return _Sample(self.watched, index, gradients=self.gradients).run(feed)

        with workers.pool() as pool:
            for sums in pool.map(look, itertools.count(self.seen), feeds):
                for key, value in sums.items():
                    self.sums[key] = self.sums[key].add_(value) if key in self.sums else value
                self.seen += 1
                yield

    def statistics(self) -> Statistics:
        """The means, with the factors that gradients give; without gradients these are 1."""
        moments = {
            key.removeprefix("moment "): (m / self.sums[key.replace("moment", "mass", 1)]).numpy()
            for key, m in self.sums.items()
            if key.startswith("moment ")
        }
        found = {
            unit: tuple(self._use_statistics(unit, use, moments) for use in uses)
            for unit, uses in self.watched.uses.items()
        }
        factors: Factors = {
            unit: tuple(self._factor(use) for use in uses)
            for unit, uses in self.watched.uses.items()
        }
        counts = [int(n) for key, n in self.sums.items() if key.startswith("count ")]
        return Statistics(max(counts, default=0), found, factors, self._rounding(), self._caches())

    def _factor(self, use: Use) -> float:
        """Half of the Fisher information is divergence a token; errors add up over a sample."""
        if not self.gradients:
            return 1.0
        count = self.sums.get(f"count {product(use)}", torch.zeros(()))
        return 0.5 if self.watched.scores_labels else float(count) / max(self.seen, 1)

    def _rounding(self) -> dict[str, float]:
        """What rounding activations to int8 does, in the units of the factors."""
        found: dict[str, float] = {}
        for use in (use for uses in self.watched.uses.values() for use in uses):
            harm = self.sums.get(f"rounding {source(use)}")
            if use.kind == "linear" and harm is not None:
                count = float(self.sums[f"positions {source(use)}"])
                found[source(use)] = self._factor(use) * float(harm) / count
        return found

    def _caches(self) -> dict[str, dict[str, float]]:
        """What keeping keys and values in each format does, in nats a token."""
        found: dict[str, dict[str, float]] = {}
        if not self.watched.scores_labels:
            return found
        for cache in self.watched.caches:
            if (count := self.sums.get(f"cached {cache.name}")) is not None:
                found[cache.name] = {
                    fmt: 0.5 * float(self.sums[f"cache {cache.name} {fmt}"] / count)
                    for fmt in CACHE_FORMATS
                    if f"cache {cache.name} {fmt}" in self.sums
                }
        return found

    def _use_statistics(self, unit: str, use: Use, moments: Mapping[str, Array]) -> UseStatistics:
        """A use that never ran has no moment; one that no gradient reaches counts by its errors."""
        rows, columns = graph.matrix_shape(self.watched.model.graph.initializers[unit])
        count = float(self.sums.get(f"count {product(use)}", torch.ones(())))
        weights = (
            self.sums.get(f"rows {product(use)}", torch.full((rows,), count)) / count
        ).numpy()
        if use.kind == "embedding":
            slopes = self.sums.get(f"slopes {product(use)}", torch.full((columns,), count))
            moment, likely = (slopes / count).numpy(), self._likely(rows)
            return UseStatistics(use.kind, source(use), moment, weights, count, likely)
        moment = moments.get(met(use), np.zeros(columns, np.float32))
        return UseStatistics(use.kind, source(use), moment, weights, count)

    def _likely(self, rows: int) -> Array | None:
        """How likely the model finds each token, if a table of ``rows`` rows is one of tokens."""
        if self.watched.head is None:
            return None
        key = product(self.watched.head)
        p = self.sums.get(f"likely {key}")
        return None if p is None or len(p) != rows else (p / self.sums[f"count {key}"]).numpy()


class _Sample:
    """The sums over one sample's positions.

    With gradients a first run keeps what segments begin with; then each runs again, the last one
    first, so that only one is in memory with all its values (arXiv 1604.06174).
    """

    def __init__(self, watched: FloatModel, index: int, *, gradients: bool) -> None:
        self.watched = watched
        self.index = index
        self.gradients = gradients
        self.sums: dict[str, Tensor] = {}
        self._uses = {product(u): u for found in watched.uses.values() for u in found}
        self._lookups = {k: u for k, u in self._uses.items() if u.kind == "embedding"}

    def run(self, feed: Feed) -> dict[str, Tensor]:
        """Run the model, and give the sums."""
        run, segments = self.watched.interpreter.run, self.watched.segments
        with torch.no_grad():
            # Indices too, which need not be inputs: nothing computes them where a lookup is known.
            indices = map(source, self._lookups.values())
            found = run(feed, fetch=[*self._lookups, *indices, *self.watched.constants])
            starts = [s.start for s in segments if s.start is not None]
            known = run(feed, overrides=found, fetch=starts) if self.gradients else {}
        back: Values = {}
        for segment in reversed(segments) if self.gradients else segments:
            start = {} if segment.start is None else {segment.start: known[segment.start]}
            given = {**feed, **found, **start}
            if self.gradients:
                for key in (*feed, *self._lookups, *start):
                    if given[key].is_floating_point():
                        given[key] = given[key].clone().requires_grad_()
            ends, back = self._see(segment, given, back)
            known |= ends
        with torch.no_grad():
            self._add_lookups({**feed, **found})
            if (head := self.watched.head) is not None:
                self._add_head(head, known[source(head)].flatten(0, -2))
        return self.sums

    def _see(self, segment: Segment, given: Values, back: Values) -> tuple[Values, Values]:
        """Run a segment on what is known before it; ``back`` are the gradients at its ends.

        Returns what its ends are, and the gradients at its start.
        """
        with torch.set_grad_enabled(self.gradients):
            values = self.watched.interpreter.run(
                {}, overrides=given, fetch=segment.ends, keep=True
            )
            ran = {u: values[k] for k, u in self._uses.items() if k in values.keys() - given.keys()}
            if self.gradients and segment is self.watched.segments[-1]:
                back = self._seeds(values)
            slopes, before = self._slopes(segment, given, values, ran, back)
        with torch.no_grad():
            self._add_layers(values, ran, slopes)
            self._add_rounding(values, slopes, back)
        return {k: values[k].detach() for k in segment.ends}, before

    def _slopes(
        self,
        segment: Segment,
        given: Values,
        values: Values,
        ran: Mapping[Use, Tensor],
        back: Values,
    ) -> tuple[dict[Use, Tensor], Values]:
        """The gradients [positions, rows] of every use that feels the loss, and at the start."""
        ends = [k for k in segment.ends if k in back]
        lookups = {use: given[key] for key, use in self._lookups.items()}
        felt = {use: y for use, y in {**lookups, **ran}.items() if y.requires_grad}
        kept = {
            cache: x
            for cache in self.watched.caches
            if cache.rounded not in given
            and (x := values.get(cache.rounded)) is not None
            and x.requires_grad
        }
        start = {k: x for k, x in given.items() if k == segment.start and x.requires_grad}
        ways = [*felt.values(), *kept.values(), *start.values()]
        if not ends or not ways:
            return {}, {}
        found = torch.autograd.grad(
            [values[k] for k in ends], ways, [back[k] for k in ends], allow_unused=True
        )
        at_uses, rest = found[: len(felt)], found[len(felt) :]
        at_caches, at_start = rest[: len(kept)], rest[len(kept) :]
        self._add_caches(kept, at_caches)
        slopes = {
            use: by_position(slope, use)
            for use, slope in zip(felt, at_uses, strict=True)
            if slope is not None
        }
        for key, use in self._lookups.items():
            if (slope := slopes.get(use)) is not None:
                self._add(f"slopes {key}", slope.square().sum(0))
        before = {k: g for k, g in zip(start, at_start, strict=True) if g is not None}
        return slopes, before

    def _seeds(self, values: Values) -> Values:
        """Random gradients at what is fetched, as far as a gradient goes on from there."""
        ends = {k: values[k] for k in self.watched.fetched if values[k].requires_grad}
        generator = torch.Generator().manual_seed(self.index)
        return {k: self._seed(y.detach(), generator) / len(ends) ** 0.5 for k, y in ends.items()}

    def _seed(self, end: Tensor, generator: torch.Generator) -> Tensor:
        """A random gradient at an output, whose expected square is the harm of errors there.

        For logits that of ``-log p`` of labels drawn from the model itself, at some positions, so
        that squared gradients are Fisher information; else a normal one over the output's norm.
        """
        if not self.watched.scores_labels:
            noise: Tensor = torch.randn(end.shape, generator=generator)
            noise /= end.norm().clamp(min=torch.finfo(end.dtype).tiny)
            return noise
        positions = self._labelled(end.shape[:-1].numel())
        seed = torch.zeros_like(end)
        for part in torch.split(positions, LOGIT_ROWS):
            x = end.flatten(0, -2)[part].requires_grad_()
            logits = x if self.watched.head is None else self.watched.logits(x)
            log_p = logits.log_softmax(-1)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            (slope,) = torch.autograd.grad(-log_p.gather(1, labels).sum(), x)
            seed.view(-1, end.shape[-1])[part] = slope
        # Squares, not gradients, add up over the positions that were left out.
        scaled: Tensor = seed * (end.shape[:-1].numel() / len(positions)) ** 0.5
        return scaled

    def _labelled(self, count: int) -> Tensor:
        """Every so many of a sample's positions, others in the next sample."""
        return torch.arange(self.index % min(HEAD_STRIDE, count), count, HEAD_STRIDE)

    def _add_layers(
        self, values: Values, ran: Collection[Use], slopes: Mapping[Use, Tensor]
    ) -> None:
        groups: dict[str, list[Use]] = {}
        for use in ran:
            if self.watched.is_layer(use):
                groups.setdefault(met(use), []).append(use)
        for key, uses in groups.items():
            x = flat(values[source(uses[0])], uses[0])
            weights = torch.zeros(len(x))
            for use in uses:
                if (slope := slopes.get(use)) is not None:
                    self._add(f"rows {product(use)}", slope.square().sum(0))
                    weights += slope.square().sum(1)
                self._add(f"count {product(use)}", torch.tensor(float(len(x))))
            if not weights.any():
                weights = torch.ones(len(x))
            # Neighbouring patches overlap; an even pick of them says as much.
            step = -(-len(x) // PATCHES) if uses[0].kind == "conv" else 1
            self._add_moment(key, x[::step], weights[::step])

    def _add_rounding(self, values: Values, slopes: Mapping[Use, Tensor], back: Values) -> None:
        """Sum up the harm of rounding what linear layers read: ``(dL/dx)**2 step**2 / 12``.

        The gradient is that of the product alone: what else reads ``x`` reads it unrounded.
        """
        felt = {k: slope.flatten(0, -2) for k, slope in back.items() if k == self.watched.hidden}
        for unit, uses in self.watched.uses.items():
            for use in uses:
                if use.kind != "linear" or (slope := slopes.get(use)) is None:
                    continue
                weight = self.watched.interpreter.run({}, fetch=[unit])[unit]
                key, through = source(use), slope @ weight
                felt[key] = felt[key] + through if key in felt else through
        for key, slope in felt.items():
            x = values[key].reshape(slope.shape)
            self._add(f"rounding {key}", (slope.square() * _variance(x)).sum())
            self._add(f"positions {key}", torch.tensor(float(len(x))))

    def _add_caches(self, kept: Mapping[Cache, Tensor], slopes: Sequence[Tensor | None]) -> None:
        """Sum up the harm of each format's errors in what is cached: ``(dL/dx * error)**2``."""
        for (cache, x), slope in zip(kept.items(), slopes, strict=True):
            if slope is None:
                continue
            rows = x.detach().reshape(-1, cache.kv_heads, cache.head_dim).numpy()
            felt = slope.reshape(rows.shape).numpy()
            self._add(f"cached {cache.name}", torch.tensor(float(len(rows))))
            for fmt in CACHE_FORMATS.values():
                if fmt.takes(cache.head_dim):
                    error = felt * (caches.decode(caches.encode(rows, fmt), fmt) - rows)
                    harm = torch.tensor(float(np.square(error, dtype=np.float64).sum()))
                    self._add(f"cache {cache.name} {fmt}", harm)

    def _add_lookups(self, values: Values) -> None:
        for unit, uses in self.watched.uses.items():
            for use in uses:
                if use.kind != "embedding":
                    continue
                rows = graph.matrix_shape(self.watched.model.graph.initializers[unit])[0]
                ids = values[source(use)].flatten() % rows
                self._add(f"rows {product(use)}", torch.bincount(ids, minlength=rows).float())
                self._add(f"count {product(use)}", torch.tensor(float(len(ids))))

    def _add_head(self, head: Use, hidden: Tensor) -> None:
        for part in torch.split(hidden[self._labelled(len(hidden))], LOGIT_ROWS):
            p, fisher = self._fisher(head, part)
            self._add(f"likely {product(head)}", p.sum(0))
            self._add(f"rows {product(head)}", fisher.sum(0))
            self._add(f"count {product(head)}", torch.tensor(float(len(part))))
            weights = fisher.sum(1) if self.gradients else torch.ones(len(part))
            self._add_moment(met(head), part, weights)

    def _fisher(self, head: Use, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [positions, vocabulary], and the Fisher information of what gives them."""
        with torch.enable_grad():
            y = self.watched.logits(hidden, product(head)).detach().requires_grad_()
            known = {product(head): y.unsqueeze(0)}
            logits = self.watched.interpreter.run({}, overrides=known, fetch=[LOGITS])[LOGITS][0]
            # What scales or caps the logits after the head acts on each of them alone.
            (slope,) = (
                torch.autograd.grad(logits.sum(), y) if logits.requires_grad else (torch.ones(1),)
            )
        p = logits.detach().softmax(-1)
        return p, (p - p.square()) * slope.square()

    def _add_moment(self, key: str, x: Tensor, weights: Tensor) -> None:
        weighed = x * weights[:, None]
        whole = x.shape[1] <= FULL_COLUMNS
        self._add(f"moment {key}", weighed.T @ x if whole else (weighed * x).sum(0))
        self._add(f"mass {key}", weights.sum())

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value


def _variance(x: Tensor) -> Tensor:
    """The variance of the errors of rounding rows to int8, by element: ``step**2 / 12``."""
    columns = x.shape[-1]
    padded = functional.pad(x, (0, -columns % GROUP)).reshape(*x.shape[:-1], -1, GROUP)
    steps = padded.abs().amax(-1) / ACTIVATION_FORMATS["int8"].top
    variance: Tensor = (steps.square() / 12).repeat_interleave(GROUP, -1)[..., :columns]
    return variance
