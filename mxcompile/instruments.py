"""Instruments that watch a pipeline: dump the model, check it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import PassError
from mxcompile.pipeline import Instrument


@dataclass
class Dump(Instrument):
    """Write ``NN-pass.txt`` for the eye and ``NN-pass.onnx`` to look at in a viewer.

    The ONNX files share one external data file a dump, so that large weights cost disk, not memory.
    """

    folder: Path
    count: int = 0

    def after(self, pass_name: str, model: ir.Model, changed: bool) -> None:
        """Write the model; passes that changed nothing leave no file."""
        self.count += 1
        if not changed:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.count:02d}-{pass_name}"
        (self.folder / f"{stem}.txt").write_text(graph.to_text(model))
        ir.save(model.clone(), self.folder / f"{stem}.onnx", external_data=f"{stem}.data")


def _duplicate_names(model: ir.Model) -> str | None:
    seen: set[str] = set()
    for value in graph.values(model):
        if not value.name:
            continue
        if value.name in seen:
            return f"two values are named {value.name}"
        seen.add(value.name)
    return None


def _undefined_functions(model: ir.Model) -> str | None:
    for node in model.graph:
        if node.domain == graph.DOMAIN and node.op_identifier() not in model.functions:
            return f"{graph.describe(node)} calls a function that is not defined"
    return None


def _unpaired_quantize(model: ir.Model) -> str | None:
    for node in graph.select(model.graph, "QuantizeLinear"):
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if set(readers) - {"DequantizeLinear"} or not readers:
            return f"{graph.describe(node)} is read by {readers}, not by DequantizeLinear alone"
    return None


INVARIANTS: Final[tuple[Callable[[ir.Model], str | None], ...]] = (
    _duplicate_names,
    _undefined_functions,
    _unpaired_quantize,
)
"""What holds after every pass; each says what is wrong, or None."""


class Verify(Instrument):
    """Check the invariants after each pass."""

    def after(self, pass_name: str, model: ir.Model, changed: bool) -> None:
        """Raise PassError at the first invariant that a pass broke."""
        for invariant in INVARIANTS:
            if (problem := invariant(model)) is not None:
                raise PassError(f"{pass_name} left a broken model: {problem}")
