"""Put the inner features of feed-forward blocks in the order of how much their errors count."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.pipeline import Context, Pass
from mxcompile.plan import ROW_TILE
from mxcompile.statistics import Statistics

POINTWISE: Final = (
    *("Add", "Cast", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity"),
    *("LeakyRelu", "Mish", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh"),
)
"""What may stand between the layers: each feature on its own."""


@dataclass(frozen=True, slots=True)
class Neurons:
    """Features that some layers compute, pointwise operators change, and others read.

    Attributes:
        made: The weights whose rows they are.
        read: The weights whose columns they are.
        constants: Initializers with a number for each, such as biases.
    """

    made: tuple[str, ...]
    read: tuple[str, ...]
    constants: tuple[str, ...]


@dataclass(frozen=True)
class SortNeurons(Pass):
    """Sort the features between layers by the damage that errors in them do.

    No name is tied to a feature that only other layers read, so that any order computes the same.
    Sorted, row tiles are of a kind. Columns that share a scale do better when some of them count
    little: tiles from both ends alternate, so that a group of columns has one of each.

    Before: ``Linear(Gelu(Linear(%x, %up)), %down)``; after: the same, the rows of ``%up`` and the
    columns of ``%down`` in another order.
    """

    name = "sort-neurons"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Sort all that can be; needs statistics."""
        if ctx.statistics is None:
            return False
        found = orders(model, ctx.statistics)
        for neurons, order in found:
            for names, axis in ((neurons.made, 0), ((*neurons.read, *neurons.constants), -1)):
                for name in names:
                    change = partial(np.take, indices=order, axis=axis)
                    graph.change_constant(model, name, change)
        return bool(found)


def follow(model: ir.Model, statistics: Statistics) -> Statistics:
    """The statistics of the model that the pass will leave."""
    for neurons, order in orders(model, statistics):
        for unit in neurons.made:
            statistics = statistics.with_rows(unit, order)
        for unit in neurons.read:
            statistics = statistics.with_columns(unit, order)
    return statistics


def orders(model: ir.Model, statistics: Statistics) -> list[tuple[Neurons, np.ndarray]]:
    """For all neurons of a model that is not sorted yet, which of them each is to be."""
    found = []
    for neurons in find(model):
        harm = [statistics.harm(unit, graph.weight(model, unit)) for unit in neurons.made]
        found.append((neurons, _dealt(np.argsort(-np.sum(harm, axis=0), kind="stable"))))
    return found


def _dealt(order: np.ndarray) -> np.ndarray:
    """Whole row tiles of an order, from its start and its end in turn; then the rest."""
    whole = len(order) // ROW_TILE * ROW_TILE
    tiles = order[:whole].reshape(-1, ROW_TILE)
    half = -(-len(tiles) // 2)
    dealt = np.empty_like(tiles)
    dealt[0::2], dealt[1::2] = tiles[:half], tiles[half:][::-1]
    return np.concatenate([dealt.reshape(-1), order[whole:]])


def find(model: ir.Model) -> list[Neurons]:
    """All neurons of a canonical model."""
    layers = graph.layers(model)
    found, done = [], set[ir.Node]()
    for node in layers:
        if node in done:
            continue
        block = _Block(layers, node.outputs[0])
        done.update(block.makers)
        if block.whole and block.readers:
            made, read = ([layers[n] for n in nodes] for nodes in (block.makers, block.readers))
            found.append(Neurons(tuple(made), tuple(read), tuple(map(graph.name, block.constants))))
    return found


class _Block:
    """All that values of one feature dimension meet, from a value on.

    Attributes:
        makers: The layers that compute such values.
        readers: The layers that multiply them.
        constants: What pointwise operators have for each feature.
        whole: Whether nothing else reads or computes them.
    """

    def __init__(self, layers: Mapping[ir.Node, str], start: ir.Value) -> None:
        self.makers: dict[ir.Node, None] = {}
        self.readers: dict[ir.Node, None] = {}
        self.constants: dict[ir.Value, None] = {}
        self._layers = layers
        self._width = start.shape[-1] if start.shape else None
        self.whole = self._follow(start)

    def _follow(self, start: ir.Value) -> bool:
        seen, left = set[ir.Value](), [start]
        while left:
            value = left.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.is_graph_output() or not value.shape or value.shape[-1] != self._width:
                return False
            near = [self._near(node) for node, _ in value.uses()]
            producer = value.producer()
            if producer is not None and producer in self._layers:
                self.makers[producer] = None
            else:
                near.append(self._near(producer))
            for values in near:
                if values is None:
                    return False
                left += values
        return True

    def _near(self, node: ir.Node | None) -> list[ir.Value] | None:
        """What is of the same features as a value that a node meets; None where nobody knows."""
        if node is None:
            return None
        if node in self._layers:
            self.readers[node] = None
            return []
        if node.domain or node.op_type not in POINTWISE:
            return None
        near = list(node.outputs)
        for value in node.inputs:
            if value is None or not graph.is_constant(value):
                near += [] if value is None else [value]
            elif value.shape and value.shape[-1] == self._width:
                if len(value.uses()) > 1 or value.is_graph_output():
                    return None
                self.constants[value] = None
            elif value.shape and value.shape[-1] != 1:
                return None
        return near
