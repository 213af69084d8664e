"""Write the plan onto the graph."""

from dataclasses import dataclass

import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import PlanError
from mxcompile.formats import GROUP
from mxcompile.pipeline import Context, Pass

ACTIVATION_SCHEME = f"int8/g{GROUP}/sym/dynamic"


@dataclass(frozen=True)
class Annotate(Pass):
    """Write the plan's formats onto the weights, and the activation format onto their inputs.

    No later pass reads the plan.

    Before: ``%w: 32x64xf32``; after: ``%w: 32x64xf32 @int4,int3/g32/asym``.
    """

    name = "annotate"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Annotate weights and, where activations are quantized, inputs of linear layers."""
        if ctx.plan is None:
            raise PlanError("annotate needs a plan")
        found = graph.uses(model)
        if {u.name for u in ctx.plan.units} != set(found):
            odd = sorted({u.name for u in ctx.plan.units} ^ set(found))
            raise PlanError(f"the plan and the model's weights differ: {', '.join(odd[:5])}")
        changed = False
        for unit in ctx.plan.units:
            value = model.graph.initializers[unit.name]
            if graph.matrix_shape(value) != (unit.rows, unit.columns):
                raise PlanError(f"{unit.name} is {value.shape}, the plan says {unit}")
            changed |= graph.annotate(value, f"{ctx.plan.tiles[unit.name]}/g{GROUP}/asym")
            for use in found[unit.name]:
                source = use.node.inputs[0]
                if ctx.activations == "int8" and use.kind == "linear" and source is not None:
                    changed |= graph.annotate(source, ACTIVATION_SCHEME)
        return changed
