"""Write the plan onto the graph."""

from dataclasses import dataclass

import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import PlanError
from mxcompile.formats import GROUP
from mxcompile.pipeline import Context, Pass


@dataclass(frozen=True)
class Annotate(Pass):
    """Write the plan's formats onto the weights and onto the inputs of linear layers.

    No later pass reads the plan.

    Before: ``%w: 32x64xf32``; after: ``%w: 32x64xf32 @int4,int3/g32/asym``.
    """

    name = "annotate"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Annotate weights and those inputs of linear layers that the plan quantizes."""
        if ctx.plan is None:
            raise PlanError("annotate needs a plan")
        found = graph.uses(model)
        if {u.name for u in ctx.plan.units} != set(found):
            odd = sorted({u.name for u in ctx.plan.units} ^ set(found))
            raise PlanError(f"the plan and the model's weights differ: {', '.join(odd[:5])}")
        activations, changed = ctx.plan.activations, False
        named = set(activations)
        for unit in ctx.plan.units:
            value = model.graph.initializers[unit.name]
            if graph.matrix_shape(value) != (unit.rows, unit.columns):
                raise PlanError(f"{unit.name} is {value.shape}, the plan says {unit}")
            changed |= graph.annotate(value, f"{ctx.plan.tiles[unit.name]}/g{GROUP}/asym")
            for use in found[unit.name]:
                source = use.node.inputs[0]
                if use.kind != "linear" or source is None:
                    continue
                if (fmt := activations.get(graph.name(source))) is not None:
                    changed |= graph.annotate(source, f"{fmt}/g{GROUP}/sym/dynamic")
                    named.discard(graph.name(source))
        if named:
            raise PlanError(f"no linear layer reads {', '.join(sorted(named)[:5])}")
        return changed
