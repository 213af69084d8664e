"""What calibration text says about a float model: input statistics, and how much harm counts.

The damage of rounding errors ``dW`` in a weight is taken as ``sum_o f_o dW_o M dW_o^T`` over its
rows and its uses. ``M`` is the second moment of what the weight meets: ``H = E[x x^T]`` for a
matrix or a convolution, squared gradients for an embedding. ``f_o`` converts it to nats of KL
divergence at the output (for models without logits: to the relative squared error there):

- Every use has a factor that is measured by perturbing the weight and comparing outputs. That
  damages add up over layers, and that such a factor serves every format, is the linearity theorem
  of HIGGS (arXiv 2411.17525).
- A layer's rows are weighed by the Fisher information of their outputs ``E[(dL/dy_o)**2]``, from
  one backward pass over labels that the model draws itself (K-FAC, arXiv 1503.05671), the head's
  by ``E[p_o (1 - p_o)]``, which is the same in closed form, an embedding's by how often they are
  read.

Rows that the text hardly meets look free and are not (notes/row-tiles.md), so the weights of rows
are shrunk towards their mean.
"""

# ruff: noqa: RUF001 -- the text below is in many alphabets

import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
import safetensors.torch
import torch
from torch import Tensor

from mxcompile import graph
from mxcompile.errors import UnsupportedError, UsageError
from mxcompile.formats import FORMATS
from mxcompile.graph import Use, UseKind
from mxcompile.interpret import Interpreter, Values, padded, windows
from mxcompile.progress import Progress
from mxcompile.quantize import dequantize, quantize

Array: TypeAlias = np.ndarray[Any, Any]
Feed: TypeAlias = Mapping[str, Tensor]
"""One sample: a value for each input of the graph."""

Factors: TypeAlias = Mapping[str, tuple[float, ...]]
"""By unit, for each of its uses: harm at the output per unit of error."""

SEQUENCES: Final = 16
LENGTH: Final = 256
GRADIENT_SEQUENCES: Final = 8
PROBE_SEQUENCES: Final = 2
PROBE_LENGTH: Final = 128
"""Texts in tokens: for second moments, the first of them for gradients, and shorter ones for the
many runs that measure factors."""

FULL_COLUMNS: Final = 2048
"""Up to how many columns H is kept whole; wider inputs keep its diagonal."""

SHRINK: Final = 0.2
"""The share of a vocabulary row's weight that it gets from the mean of all rows."""

BLOCK: Final = 1 << 23
"""Weights of a head that are perturbed at a time."""

PATCHES: Final = 1 << 13
"""The most patches of a sample that a convolution's second moment is taken over."""

LOGIT_ROWS: Final = 128
"""Positions whose logits are computed together: 128 rows of 262,144 are 134 MB."""

SPAN: Final = 12
"""Characters that are read for each token wanted; source code has many a token of spaces."""

VERSION: Final = 1
"""Changes whenever other statistics come out of the same model and samples."""

LOGITS: Final = "logits"
POINTWISE: Final = ("Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh")
"""What may stand between the head and the logits."""

PERTURBATION: Final = FORMATS["int3"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class UseStatistics:
    """What one use of a unit meets.

    Attributes:
        kind: How the weight is read.
        source: The name of the value that it is multiplied with, or of the embedding's indices.
        moment: ``M``: [columns, columns], or its diagonal [columns]; float32. ``E[x x^T]``, for an
            embedding the diagonal ``E[(dL/de)**2]`` of what is looked up.
        rows: How much an error in each row counts, float32 [rows]: ``E[(dL/dy_o)**2]`` of a layer's
            outputs, ``E[p_o (1 - p_o)]`` of a head's, how often a token reads an embedding's row.
    """

    kind: UseKind
    source: str
    moment: Array
    rows: Array

    def errors(self, delta: Tensor, start: int = 0) -> Tensor:
        """``f_o dW_o M dW_o^T`` without the measured factor, of the rows from ``start`` on."""
        moment = torch.from_numpy(self.moment)
        met = delta @ moment if moment.dim() == 2 else delta * moment
        weights = torch.from_numpy(shrunk(self.rows))
        return weights[start : start + len(delta)] * (met * delta).sum(1)

    @property
    def diagonal(self) -> Array:
        """``M_kk`` of the columns."""
        return self.moment if self.moment.ndim == 1 else np.diagonal(self.moment)


def shrunk(rows: Array) -> Array:
    """Rows' weights, moved towards their mean: what was not met is not free."""
    result: Array = (1 - SHRINK) * rows + np.float32(SHRINK * rows.mean(dtype=np.float64))
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """All that pricing needs to know of a model's inner life.

    Attributes:
        samples: How many tokens or samples were seen.
        uses: By unit, what each of its uses meets, in the order of the graph.
        factors: By unit, for each of its uses: harm at the output per unit of error.
    """

    samples: int
    uses: Mapping[str, tuple[UseStatistics, ...]]
    factors: Factors

    def damage(self, unit: str, delta: Tensor, start: int = 0) -> Tensor:
        """The damage of errors in the rows of a unit from ``start`` on, [rows]."""
        parts = zip(self.uses[unit], self.factors[unit], strict=True)
        return sum((f * use.errors(delta, start) for use, f in parts), torch.zeros(len(delta)))

    def importance(self, unit: str) -> Array:
        """How much an error in each column of a unit counts, for the quantizers; float32."""
        parts = zip(self.uses[unit], self.factors[unit], strict=True)
        total = sum(use.diagonal * (f * float(use.rows.mean())) for use, f in parts)
        return np.asarray(total, np.float32)


# Collecting


def collect(
    model: ir.Model,
    uses: Mapping[str, Sequence[Use]],
    feeds: Sequence[Feed],
    probe_feeds: Sequence[Feed],
    *,
    sensitivity: "Sensitivity | None" = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run a float model over samples and gather all that pricing needs.

    Args:
        model: A canonical model.
        uses: The plannable weights and where they are read, as ``graph.uses`` finds them.
        feeds: The samples for second moments and vocabulary rows.
        probe_feeds: The samples, fewer, on which factors are measured.
        sensitivity: How factors are found; None is ``ForwardProbe()``.
        progress: Is told of the stages.
    """
    progress = progress or Progress()
    with torch.no_grad():
        watched = FloatModel(model, uses)
        found = _observe(watched, feeds, progress)
        factors = (sensitivity or ForwardProbe()).factors(watched, found, probe_feeds, progress)
    return replace(found, factors=factors)


class FloatModel:
    """The model under calibration: its interpreter, its weights, and its head if it has one."""

    def __init__(self, model: ir.Model, uses: Mapping[str, Sequence[Use]]) -> None:
        self.interpreter = Interpreter(model)
        self.uses = uses
        self.model = model
        self.outputs = [graph.name(v) for v in model.graph.outputs if not _is_cache(v)]
        self.head = _find_head(model, uses)

    @property
    def hidden(self) -> str | None:
        """The name of the value that the head multiplies."""
        return None if self.head is None else _source(self.head)

    @property
    def fetched(self) -> list[str]:
        """What a run must compute: logits are left to ``logits``, for some positions at a time."""
        return [self.hidden] if self.hidden is not None else self.outputs

    def logits(self, hidden: Tensor, fetch: str = LOGITS) -> Tensor:
        """The logits [positions, vocabulary] of hidden states [positions, columns].

        ``fetch`` may name another value that is computed from the hidden states alone.
        """
        assert self.hidden is not None
        known = {self.hidden: hidden.unsqueeze(0)}
        return self.interpreter.run({}, overrides=known, fetch=[fetch])[fetch][0]


def _is_cache(value: ir.Value) -> bool:
    return graph.name(value).startswith(("present", "past"))


def _source(use: Use) -> str:
    """The name of the value that a use multiplies its weight with, or of the indices it reads."""
    value = use.node.inputs[1 if use.kind == "embedding" else 0]
    assert value is not None
    return graph.name(value)


def _product(use: Use) -> str:
    """The name of what a use computes."""
    return graph.name(use.node.outputs[0])


def _find_head(model: ir.Model, uses: Mapping[str, Sequence[Use]]) -> Use | None:
    """The linear layer behind the logits, with nothing after it but position-wise operators."""
    linear = {u.node: u for found in uses.values() for u in found if u.kind == "linear"}
    value = next((v for v in model.graph.outputs if v.name == LOGITS), None)
    while value is not None and (node := value.producer()) is not None:
        if node in linear:
            return linear[node] if len(value.shape or ()) == 3 else None
        inputs = [v for v in node.inputs if v is not None and v.producer() is not None]
        if node.op_type not in POINTWISE or len(inputs) != 1:
            return None
        value = inputs[0]
    return None


def _observe(watched: FloatModel, feeds: Sequence[Feed], progress: Progress) -> Statistics:
    """Gather second moments, and how often and how surely vocabulary rows are met."""
    observer = Observer(watched)
    with progress.stage("calibrate", len(feeds)) as advance:
        for feed in feeds:
            observer.see(feed)
            advance()
    generator = torch.Generator().manual_seed(0)
    with progress.stage("gradients", len(feeds[:GRADIENT_SEQUENCES])) as advance:
        for feed in feeds[:GRADIENT_SEQUENCES]:
            observer.see_gradients(feed, generator)
            advance()
    return observer.statistics()


class Observer:
    """Sums over samples; uses that meet the same numbers share a key, and so one moment."""

    def __init__(self, watched: FloatModel) -> None:
        self.watched = watched
        self.by_node = {u.node: u for found in watched.uses.values() for u in found}
        self.moments: dict[str, Tensor] = {}
        self.rows: dict[Use, Tensor] = {}
        self.slopes: dict[Use, tuple[Tensor, int]] = {}
        self.counts: dict[str, int] = {}
        self.seen: set[str] = set()

    def see(self, feed: Feed) -> None:
        """Run one sample."""
        self.seen.clear()
        values = self.watched.interpreter.run(feed, fetch=self.watched.fetched, tap=self._tap)
        if (head := self.watched.head) is not None:
            hidden = values[_source(head)]
            self._meet(head, hidden)
            for part in torch.split(hidden.flatten(0, -2), LOGIT_ROWS):
                p = self.watched.logits(part).softmax(-1)
                self._count_rows(head, (p - p.square()).sum(0))

    def see_gradients(self, feed: Feed, generator: torch.Generator) -> None:
        """Add up the squared gradients at the outputs of layers and embeddings."""
        by_output = {_product(use): use for use in self.by_node.values()}
        looked_up = [k for k, u in by_output.items() if u.kind == "embedding"]
        run = self.watched.interpreter.run
        leaves = {k: v.clone() for k, v in run(feed, fetch=looked_up).items()}
        leaves |= {k: v.clone() for k, v in feed.items() if v.is_floating_point()}
        with torch.enable_grad():
            for leaf in leaves.values():
                leaf.requires_grad_()
            values = run(feed, overrides=leaves, fetch=self.watched.fetched, keep=True)
            met = {
                use: values[key]
                for key, use in by_output.items()
                if key in values and values[key].requires_grad
            }
            ends = [values[k] for k in self.watched.fetched if values[k].requires_grad]
            if not ends:
                return
            seeds = [self._seed(end, generator) for end in ends]
            found = torch.autograd.grad(ends, list(met.values()), seeds, allow_unused=True)
        for use, slope in zip(met, found, strict=True):
            if slope is not None:
                by_row = slope.movedim(1 if use.kind == "conv" else -1, 0).flatten(1)
                total, count = self.slopes.get(use, (torch.zeros(len(by_row)), 0))
                self.slopes[use] = total + by_row.square().sum(1), count + by_row.shape[1]

    def _seed(self, end: Tensor, generator: torch.Generator) -> Tensor:
        """A random gradient at an output, whose expected square is the harm of errors there.

        For logits that of ``-log p`` of labels drawn from the model itself, so that squared
        gradients are Fisher information; else a normal one.
        """
        head = self.watched.head
        if head is None and LOGITS not in self.watched.outputs:
            return torch.randn(end.shape, generator=generator)
        seeds = []
        for part in torch.split(end.detach().flatten(0, -2), LOGIT_ROWS):
            part.requires_grad_()
            log_p = (part if head is None else self.watched.logits(part)).log_softmax(-1)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            (seed,) = torch.autograd.grad(-log_p.gather(1, labels).sum(), part)
            seeds.append(seed)
        return torch.cat(seeds).reshape(end.shape)

    def _tap(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> None:
        if (use := self.by_node.get(node)) is None:
            return
        if use.kind == "embedding":
            table, ids = inputs
            assert table is not None and ids is not None
            self._count_rows(use, torch.bincount(ids.flatten() % len(table), minlength=len(table)))
            self._meet(use, ids.reshape(-1, 1))
        elif (x := inputs[0]) is not None:
            self._meet(use, x)

    def _meet(self, use: Use, x: Tensor) -> None:
        key = _key(use)
        if key in self.seen:
            return
        self.seen.add(key)
        flat = _flat(use, x)
        self.counts[key] = self.counts.get(key, 0) + len(flat)
        if use.kind != "embedding":
            moment = flat.T @ flat if flat.shape[1] <= FULL_COLUMNS else flat.square().sum(0)
            self.moments[key] = self.moments[key] + moment if key in self.moments else moment

    def _count_rows(self, use: Use, rows: Tensor) -> None:
        self.rows[use] = self.rows[use] + rows if use in self.rows else rows

    def statistics(self) -> Statistics:
        """The means, without factors."""
        moments = {key: (m / self.counts[key]).numpy() for key, m in self.moments.items()}
        found = {
            unit: tuple(self._use_statistics(unit, use, moments) for use in uses)
            for unit, uses in self.watched.uses.items()
        }
        return Statistics(max(self.counts.values(), default=0), found, {})

    def _use_statistics(self, unit: str, use: Use, moments: Mapping[str, Array]) -> UseStatistics:
        """A use that never ran, or that no gradient reaches, counts by its errors alone."""
        key, (count, columns) = _key(use), graph.weight(self.watched.model, unit).shape
        total, seen = self.slopes.get(use, (torch.ones(()), 1))
        slopes = (total / seen).numpy()
        moment = moments.get(key, np.zeros(columns, np.float32))
        rows = (self.rows[use] / self.counts[key]).numpy() if use in self.rows else slopes
        if use.kind == "embedding":
            moment = np.broadcast_to(slopes, columns).copy()
            rows = rows if use in self.rows else np.zeros(count, np.float32)
        return UseStatistics(use.kind, _source(use), moment, np.broadcast_to(rows, count).copy())


def _key(use: Use) -> str:
    """Names what a use meets: a value, or the patches that a convolution cuts it into."""
    if use.kind != "conv":
        return _source(use)
    weight = use.node.inputs[1]
    assert weight is not None and weight.shape is not None
    cut = [f"{a.name}={a.value}" for a in use.node.attributes.values()]
    return f"{_source(use)} {weight.shape[2:]} {sorted(cut)}"


def _flat(use: Use, x: Tensor) -> Tensor:
    """What a use multiplies its rows with, one sample a row."""
    if use.kind != "conv":
        return x.reshape(-1, x.shape[-1])
    flat = patches(x, use.node)
    # Neighbouring patches overlap; an even pick of them says as much.
    return flat[:: -(-len(flat) // PATCHES)]


def patches(x: Tensor, node: ir.Node) -> Tensor:
    """What a convolution multiplies its rows with: [patches, in * taps]."""
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    kernel = weight.shape.numpy()[2:]
    attributes = node.attributes
    strides = attributes.get_ints("strides", [1] * len(kernel))
    dilations = attributes.get_ints("dilations", [1] * len(kernel))
    auto_pad, pads = attributes.get_string("auto_pad", "NOTSET"), attributes.get_ints("pads")
    x = padded(x, windows(x, kernel, auto_pad, pads, strides, dilations))
    for axis, (width, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + axis, (width - 1) * dilation + 1, stride)[..., ::dilation]
    rank = len(kernel)
    # [batch, in, positions..., taps...] to [batch, positions..., in, taps...]
    x = x.permute(0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    return x.flatten(1 + rank).flatten(0, rank)


# Sensitivity


class Sensitivity(Protocol):
    """A way to find the factors that turn errors into harm at the output."""

    def factors(
        self, watched: FloatModel, found: Statistics, feeds: Sequence[Feed], progress: Progress
    ) -> Factors:
        """The factor of every use of every unit."""


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
        probe = _Probe(watched, feeds, self.stride)
        groups = _groups(watched)
        single = [
            (unit, use, met)
            for unit, uses in watched.uses.items()
            for use, met in zip(uses, found.uses[unit], strict=True)
            if not _is_layer(watched, use)
        ]
        scale: dict[Use, float] = {}
        with progress.stage("probe", len(groups) + len(single)) as advance:
            for units in groups:
                layers = [use for u in units for use in watched.uses[u] if _is_layer(watched, use)]
                scale |= dict.fromkeys(layers, probe.layers(found, units))
                advance()
            for unit, use, met in single:
                measure = probe.head if use is watched.head else probe.embedding
                scale[use] = measure(unit, use, met)
                advance()
        return {unit: tuple(scale[use] for use in uses) for unit, uses in watched.uses.items()}


def _is_layer(watched: FloatModel, use: Use) -> bool:
    return use.kind != "embedding" and use is not watched.head


def _groups(watched: FloatModel) -> list[list[str]]:
    """Units with layers among their uses, those that read the same value together."""
    groups: dict[str, list[str]] = {}
    for unit, uses in watched.uses.items():
        sources = [_source(use) for use in uses if _is_layer(watched, use)]
        if sources:
            groups.setdefault(sources[0], []).append(unit)
    return list(groups.values())


class _Probe:
    """The float model's runs on the probe samples, kept, and what perturbing them does."""

    def __init__(self, watched: FloatModel, feeds: Sequence[Feed], stride: int) -> None:
        self.watched = watched
        self.stride = stride
        self.kept = [
            watched.interpreter.run(feed, fetch=watched.fetched, keep=True) for feed in feeds
        ]
        self.reference = [self._outputs(values) for values in self.kept]
        self.likely = [
            v[LOGITS].softmax(-1) if LOGITS in v else torch.empty(0) for v in self.reference
        ]

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
                if _is_layer(self.watched, use):
                    error += float(met.errors(delta).sum(dtype=torch.float64))
            shape = graph.array(self.watched.model.graph.initializers[unit]).shape
            overrides[unit] = torch.from_numpy(rough).reshape(shape)
        harm = sum(self._harm(i, overrides) for i in range(len(self.kept))) / len(self.kept)
        return harm / error if error > 0 else 0.0

    def embedding(self, unit: str, use: Use, met: UseStatistics) -> float:
        """Harm per unit of error of the rows that are read."""
        weight = graph.weight(self.watched.model, unit)
        moment = torch.from_numpy(met.moment)
        harm, error = 0.0, 0.0
        for sample, values in enumerate(self.kept):
            ids = values[_source(use)] % len(weight)
            read, where = torch.unique(ids, return_inverse=True)
            exact = weight[read.numpy()]
            delta = torch.from_numpy(_perturbed(exact, met.moment) - exact)[where]
            error += float((delta.square() * moment).sum(-1).mean())
            # The rows of a tied head stay as they are: the lookup is overridden, not the weight.
            harm += self._harm(sample, {_product(use): torch.from_numpy(exact)[where] + delta})
        return harm / error if error > 0 else 0.0

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
            rough = (self.watched.logits(h, _product(use)) + change).unsqueeze(0)
            values = self.watched.interpreter.run(
                {}, overrides={_product(use): rough}, fetch=[LOGITS]
            )
            harm += self._divergence(sample, values[LOGITS][0]) / len(hidden)
        return harm / error if error > 0 else 0.0

    def _harm(self, sample: int, overrides: Values) -> float:
        """How far the outputs of one sample are from the float model's."""
        fetched = self.watched.fetched
        values = self.watched.interpreter.rerun(self.kept[sample], overrides, fetch=fetched)
        exact, rough = self.reference[sample], self._outputs(values)
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

    def _outputs(self, values: Values) -> Values:
        """The logits at the positions compared, or all outputs of other models."""
        if self.watched.hidden is not None:
            return {LOGITS: self.watched.logits(self._positions(values[self.watched.hidden]))}
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


def _perturbed(weight: Array, importance: Array | None) -> Array:
    return dequantize(quantize(weight, PERTURBATION, importance), PERTURBATION)


# Samples


def token_feeds(model: ir.Model, tokens: Array) -> list[Feed]:
    """Samples for a model over tokens: one a row of ``tokens`` [count, length].

    Raises:
        UnsupportedError: the model has an input that is not known from language models.
    """
    return [
        {graph.name(v): _token_input(v, torch.from_numpy(row[None])) for v in model.graph.inputs}
        for row in tokens.astype(np.int64)
    ]


def _token_input(value: ir.Value, ids: Tensor) -> Tensor:
    key = graph.name(value)
    dtype = torch.int32 if value.dtype == ir.DataType.INT32 else torch.int64
    if key == "input_ids":
        return ids.to(dtype)
    if key == "attention_mask":
        return torch.ones(ids.shape, dtype=dtype)
    if key == "position_ids":
        return torch.arange(ids.shape[1], dtype=dtype).unsqueeze(0)
    if key == "token_type_ids":
        return torch.zeros(ids.shape, dtype=dtype)
    if key.startswith("past") and value.shape is not None:
        sizes = [d if isinstance(d, int) else 0 for d in value.shape[1:]]
        return torch.zeros(1, *sizes)
    raise UnsupportedError(f"input '{key}' is not one of a language model; give samples for it")


def text_tokens(
    encode: Callable[[str], list[int]], texts: Sequence[str], count: int, length: int
) -> Array:
    """``count`` rows of ``length`` tokens, int64, taken in turn from texts and evenly within each.

    Args:
        encode: Text to tokens with the marks, such as BOS, that start a text.
        texts: Texts of different kinds.
        count: How many rows; fewer come back where the texts are too short.
        length: The tokens of a row.

    Raises:
        UsageError: no text has ``length`` tokens.
    """
    rows = []
    for index in range(count):
        text = texts[index % len(texts)]
        turn, turns = index // len(texts), -(-(count - index % len(texts)) // len(texts))
        span = length * SPAN
        # Begin at a line, so that the row does not open with half a word; go on at the beginning.
        start = text.rfind("\n", 0, int(len(text) * (turn + 0.5) / turns)) + 1
        tokens = encode((text[start:] + "\n" + text[:start])[:span])
        if len(tokens) >= length:
            rows.append(tokens[:length])
    if not rows:
        raise UsageError(f"the calibration text is shorter than {length} tokens")
    return np.array(rows, np.int64)


def default_texts() -> list[str]:
    """Texts of several kinds and languages that are the same on any machine with this Python."""
    topics = import_module("pydoc_data.topics").topics
    modules = [import_module(name) for name in _MODULES]
    described = [inspect.getdoc(member) for m in modules for member in (m, *vars(m).values())]
    languages = "\n".join(_LANGUAGES)
    return [
        "\n\n".join(topics[key] for key in sorted(topics)),
        "\n\n".join(inspect.getsource(module) for module in modules),
        languages,
        "\n\n".join(dict.fromkeys(text for text in described if text and len(text) > 200)),
    ]


_MODULES: Final = (
    "argparse",
    "calendar",
    "difflib",
    "heapq",
    "json",
    "random",
    "statistics",
    "textwrap",
)

# Everyday prose, because the standard library is all English documentation and code.
_LANGUAGES: Final = (
    "The train was late again, so Anna bought a coffee and watched the rain run down the "
    "windows. Her brother had promised to call before noon. When the phone finally rang, it "
    "was not him but a doctor from the hospital in York, who asked whether she could come at "
    "once.",
    "Am nächsten Morgen ging der Großvater früh in den Garten, um die Äpfel zu pflücken, bevor "
    "es zu regnen begann. Die Kinder schliefen noch, und im Haus roch es nach frischem Brot. "
    "Er hatte versprochen, mit ihnen an den See zu fahren, wenn das Wetter besser würde.",
    "Le gouvernement a annoncé mardi que les prix de l'énergie n'augmenteront pas avant l'été. "
    "Selon le ministre, cette décision devrait aider les familles les plus modestes, mais les "
    "syndicats estiment qu'elle ne suffira pas et appellent à une nouvelle journée de grève.",
    "Para preparar la sopa, corte las cebollas y los tomates en trozos pequeños y fríalos con "
    "un poco de aceite. Después añada el caldo, una pizca de sal y dos hojas de laurel, y "
    "déjelo cocer durante media hora. Se sirve caliente, con pan y un vaso de vino.",
    "La città era ancora silenziosa quando Marco aprì la finestra. Dall'altra parte della "
    "piazza una donna vendeva fiori, come ogni domenica, e il profumo arrivava fino al terzo "
    "piano.",
    "O time venceu por dois a um depois de sofrer um gol logo no primeiro minuto. O treinador "
    "disse que os jogadores mereciam a vitória, mas que ainda precisam melhorar na defesa.",
    "De winkel is op zaterdag tot zes uur open. Wie een fiets wil huren, moet een geldig "
    "paspoort meenemen en vijftig euro borg betalen. Vergeet niet om uw helm terug te brengen.",
    "Dzień dobry, chciałbym zapytać, o której godzinie odjeżdża ostatni autobus do Krakowa i "
    "czy muszę kupić bilet wcześniej. Dziękuję bardzo za pomoc.",
    "Когда Иван вернулся домой, в комнате горел свет, а на столе лежало письмо от его сестры. "
    "Она писала, что зима в этом году холодная, но что у детей всё хорошо и они ждут его в "
    "марте.",
    "科学家在南方的山区发现了一种新的植物。研究人员说,这种植物只在夏天开花,数量很少,因此需要保"
    "护。当地的学校也会组织学生去参观,让他们了解自然的重要性。",
    "昨日は友達と一緒に京都へ行きました。朝は少し寒かったですが、午後は天気がよくなって、古いお"
    "寺や庭をゆっくり見ることができました。来年の春にもう一度行きたいと思います。",
    "오늘 회의는 오후 세 시에 시작합니다. 모든 직원은 보고서를 준비해 주시기 바라며, 질문이 "
    "있으면 담당자에게 전화해 주십시오.",
    "ذهب الطبيب إلى القرية الصغيرة لكي يزور المرضى، وكان الناس ينتظرونه أمام المدرسة منذ "
    "الصباح الباكر.",
    "मेरी माँ हर सुबह पाँच बजे उठती है और परिवार के लिए चाय बनाती है। उसके बाद वह बाज़ार जाती है।",
    "Yarın hava güneşli olacak, bu yüzden çocuklarla birlikte denize gitmeyi düşünüyoruz. "
    "Akşam yemeğini sahildeki küçük lokantada yiyeceğiz.",
    "Chiều nay trời mưa to nên chúng tôi ở nhà, nấu cơm và kể cho nhau nghe những câu chuyện "
    "ngày xưa.",
)


# Keeping


def cache_key(files: Iterable[Path], feeds: Sequence[Feed], settings: object = ()) -> str:
    """A name for statistics that changes with the model's files, the samples and the settings."""
    digest = hashlib.sha256(repr((VERSION, SHRINK, FULL_COLUMNS, settings)).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for feed in feeds:
        for key in sorted(feed):
            digest.update(f"{key}{tuple(feed[key].shape)}".encode())
            digest.update(feed[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


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
            described.append({"kind": use.kind, "source": use.source, "moment": where})
        units.append({"name": unit, "uses": described, "factors": statistics.factors[unit]})
    about = {"samples": statistics.samples, "units": units}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".statistics-") as scratch:
        part = Path(scratch) / path.name
        safetensors.torch.save_file(tensors, part, {"mxcompile": json.dumps(about)})
        os.replace(part, path)


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
                )
                for index, use in enumerate(unit["uses"])
            )
            for unit in about["units"]
        }
        factors = {unit["name"]: tuple(unit["factors"]) for unit in about["units"]}
        return Statistics(about["samples"], uses, factors)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: no calibration statistics ({error})") from error


def cached(path: Path, make: Callable[[], Statistics]) -> Statistics:
    """The statistics kept at ``path``; made and kept there when there are none that can be read."""
    try:
        return load(path)
    except UsageError as error:
        if path.exists():
            _log.warning("%s; made again", error)
    statistics = make()
    save(statistics, path)
    return statistics
