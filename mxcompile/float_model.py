"""The float model under calibration: its interpreter, where its weights are read, and its head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from mxcompile import caches, graph
from mxcompile.graph import Use
from mxcompile.interpret import Interpreter, padded, windows

Feed: TypeAlias = Mapping[str, Tensor]
"""One sample: a value for each input of the graph."""

LOGITS: Final = graph.LOGITS
POINTWISE: Final = ("Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh")
"""What may stand between the head and the logits, besides what chooses or multiplies columns."""
TABLE_ROWS: Final = 1024
"""The least rows of a token table that is worth being arranged."""
SHAPES: Final = ("Shape", "Size")
"""What reads nothing of a value but how large it is."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the graph, behind which one value stands for all before it.

    Attributes:
        start: That value of the segment before; None for the first segment.
        ends: What is read of this one: the start of the next, or what is fetched.
    """

    start: str | None
    ends: Sequence[str]


class FloatModel:
    """A canonical model that runs in torch.

    Attributes:
        interpreter: Runs the graph.
        model: The graph.
        uses: The plannable weights and where they are read.
        outputs: The names of the outputs that are compared: all but the caches.
        head: The linear layer behind the logits, where nothing but position-wise operators follow.
        caches: Where keys and values are cached.
        segments: The graph in pieces that run one after the other, such as halves of a layer.
        constants: What the pieces read besides that no weight and no floating input has a part in,
            such as masks.
    """

    def __init__(self, model: ir.Model, uses: Mapping[str, Sequence[Use]]) -> None:
        self.interpreter = Interpreter(model)
        self.uses = uses
        self.model = model
        self.outputs = [graph.name(v) for v in model.graph.outputs if not _is_cache(v)]
        self.head = find_head(model, uses)
        self.caches = caches.find(model)
        self.segments, self.constants = self._cut()

    @property
    def hidden(self) -> str | None:
        """The name of the value that the head multiplies."""
        return None if self.head is None else source(self.head)

    @property
    def fetched(self) -> list[str]:
        """What a run must compute: logits are left to ``logits``, for some positions at a time."""
        return [self.hidden] if self.hidden is not None else self.outputs

    @property
    def scores_labels(self) -> bool:
        """Whether the model gives logits: errors then count in nats of divergence."""
        return self.fetched == [LOGITS] or self.head is not None

    def logits(
        self, hidden: Tensor, fetch: str = LOGITS, overrides: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The logits [positions, vocabulary] of hidden states [positions, columns].

        ``fetch`` may name another value that is computed from the hidden states alone;
        ``overrides`` replace weights.
        """
        assert self.hidden is not None
        known = {**(overrides or {}), self.hidden: hidden.unsqueeze(0)}
        return self.interpreter.run({}, overrides=known, fetch=[fetch])[fetch][0]

    def _cut(self) -> tuple[list[Segment], list[str]]:
        """Cut wherever one value alone goes on, but not twice between two layers."""
        uses = [use for found in self.uses.values() for use in found]
        layers = {use.node for use in uses if use.kind != "embedding"}
        known = {product(use) for use in uses if use.kind == "embedding"}
        nodes = self.interpreter.needed(self.fetched, known)
        inputs = self.model.graph.inputs
        moving = known | {graph.name(v) for v in inputs if v.dtype and v.dtype.is_floating_point()}
        for node in nodes:
            if node.op_type not in SHAPES and not moving.isdisjoint(_read(node)):
                moving.update(graph.name(v) for v in node.outputs)
        steps = [node for node in nodes if not moving.isdisjoint(map(graph.name, node.outputs))]
        last = {key: at for at, node in enumerate(steps) for key in _read(node)}
        made = {graph.name(v) for node in nodes for v in node.outputs}
        constants = [key for key in last if key in made and key not in moving]
        last |= dict.fromkeys(self.fetched, len(steps))
        cuts: list[str] = []
        alive = known & last.keys()
        layered = False
        for at, node in enumerate(steps[:-1]):
            alive.update(graph.name(v) for v in node.outputs)
            alive = {key for key in alive if last.get(key, at) > at}
            layered |= node in layers
            if layered and len(alive) == 1:
                cuts.extend(alive)
                layered = False
        ends = [[cut] for cut in cuts] + [self.fetched]
        return [Segment(*s) for s in zip([None, *cuts], ends, strict=True)], constants

    def is_layer(self, use: Use) -> bool:
        """Whether a use is neither an embedding nor the head."""
        return use.kind != "embedding" and use is not self.head


def source(use: Use) -> str:
    """The name of the value that a use multiplies its weight with, or of the indices it reads."""
    value = use.node.inputs[1 if use.kind == "embedding" else 0]
    assert value is not None
    return graph.name(value)


def product(use: Use) -> str:
    """The name of what a use computes."""
    return graph.name(use.node.outputs[0])


def met(use: Use) -> str:
    """Names what a use meets: a value, or the patches that a convolution cuts it into."""
    if use.kind != "conv":
        return source(use)
    weight = use.node.inputs[1]
    assert weight is not None and weight.shape is not None
    cut = [f"{a.name}={a.value}" for a in use.node.attributes.values()]
    return f"{source(use)} {weight.shape[2:]} {sorted(cut)}"


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


def _read(node: ir.Node) -> list[str]:
    """The names of what a node reads."""
    return [graph.name(v) for v in node.inputs if v is not None and v.name]


def _is_cache(value: ir.Value) -> bool:
    return graph.name(value).startswith(("present", "past"))


def find_head(model: ir.Model, uses: Mapping[str, Sequence[Use]]) -> Use | None:
    """The linear layer behind the logits, where what it reads is all that these come from.

    Nothing may mix positions on the way; sums with other products of the same are well.
    """
    linear = {u.node: u for found in uses.values() for u in found if u.kind == "linear"}
    logits = next((v for v in model.graph.outputs if v.name == LOGITS), None)
    if logits is None:
        return None
    layers = [node for node in graph.ancestors(logits, lambda v: False) if node in linear]
    if not layers or len(layers[-1].outputs[0].shape or ()) != 3:
        return None
    hidden = layers[-1].inputs[0]
    after = graph.ancestors(logits, lambda v: v is hidden)
    made = {v for node in after for v in node.outputs}
    read = {v for node in after for v in node.inputs if v is not None and not graph.is_constant(v)}
    alone = read - made <= {hidden} and all(map(_keeps_positions, after))
    return linear[layers[-1]] if alone else None


def _keeps_positions(node: ir.Node) -> bool:
    """Whether an operator behind the head computes each position from the same one."""
    if node.domain == graph.DOMAIN:
        return node.op_type == "Linear"
    if node.op_type == "MatMul":
        return graph.is_constant(node.inputs[1])
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) == -1
    return node.op_type in POINTWISE


def token_tables(model: ir.Model) -> dict[str, list[Use]]:
    """The large tables with a row a token that nothing but lookups and the head read."""
    found = graph.uses(model)
    head = find_head(model, found)
    return {
        unit: uses
        for unit, uses in found.items()
        if graph.matrix_shape(model.graph.initializers[unit])[0] >= TABLE_ROWS
        and all(use.kind == "embedding" or use is head for use in uses)
    }


def by_position(y: Tensor, use: Use) -> Tensor:
    """What a use computes, or its gradient, as [positions, rows]."""
    return y.movedim(1 if use.kind == "conv" else -1, -1).flatten(0, -2)


def flat(x: Tensor, use: Use) -> Tensor:
    """What a use multiplies its rows with: [positions, columns]."""
    with torch.no_grad():
        return patches(x, use.node) if use.kind == "conv" else x.reshape(-1, x.shape[-1])
