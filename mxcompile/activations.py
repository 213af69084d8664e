"""Which inputs of linear layers are rounded to 8 bits, and which need 16.

A few layers feel the rounding of what they read far more than the rest. Sixteen bits cost them
twice the multiplications and no more bytes: in a decode step, which waits for memory, next to
nothing; in the prefill of a prompt the time of that layer again. So the damage that is saved is
weighed against the multiplications that are added, and the best are taken while these stay below a
share of all.
"""

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import onnx_ir as ir

from mxcompile import graph
from mxcompile.formats import ACTIVATION_FORMATS, ActivationFormat
from mxcompile.statistics import Statistics

ActivationChoice: TypeAlias = Literal["auto", "int8", "int16", "fp32"]
AUTO: Final = "auto"
FLOAT: Final = "fp32"
CHOICES: Final[tuple[ActivationChoice, ...]] = (AUTO, "int8", "int16", FLOAT)

SHARE: Final = 0.1
"""By how much ``auto`` may raise the multiplications of a prefill."""


def choose_activations(
    model: ir.Model, statistics: Statistics, choice: ActivationChoice = AUTO
) -> dict[str, ActivationFormat]:
    """The formats of what linear layers read, by the names of the values.

    Args:
        model: A canonical model.
        statistics: What calibration found; without gradients ``auto`` means int8.
        choice: One format for all, or ``auto``.
    """
    work = _multiplications(model)
    if choice == FLOAT:
        return {}
    if choice != AUTO:
        return dict.fromkeys(work, ACTIVATION_FORMATS[choice])
    chosen = dict.fromkeys(work, ACTIVATION_FORMATS["int8"])
    damage = {source: statistics.rounding.get(source, 0.0) for source in work}
    left = SHARE * sum(work.values())
    for source in sorted(work, key=lambda s: damage[s] / max(work[s], 1), reverse=True):
        if damage[source] > 0 and work[source] <= left:
            chosen[source] = ACTIVATION_FORMATS["int16"]
            left -= work[source]
    return chosen


def rounding_damage(chosen: Mapping[str, ActivationFormat], statistics: Statistics) -> float:
    """What rounding activations is predicted to add to the divergence, in nats a token."""
    int8 = ACTIVATION_FORMATS["int8"].top
    return sum(
        statistics.rounding.get(source, 0.0) * (int8 / fmt.top) ** 2
        for source, fmt in chosen.items()
    )


def _multiplications(model: ir.Model) -> Mapping[str, int]:
    """By value that linear layers read, the multiplications with it for a token of a prompt.

    Logits are computed for one position of a prompt, so their layer counts as nothing.
    """
    work: dict[str, int] = {}
    head = graph.last_product(model)
    for unit, uses in graph.uses(model).items():
        rows, columns = graph.matrix_shape(model.graph.initializers[unit])
        for use in uses:
            if use.kind == "linear" and (source := use.node.inputs[0]) is not None:
                work.setdefault(graph.name(source), 0)
                work[graph.name(source)] += 0 if use.node is head else rows * columns
    return work
