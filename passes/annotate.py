"""Write the plan onto the graph."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mxcompile import caches, graph
from mxcompile.errors import PlanError
from mxcompile.formats import GROUP, CacheFormat
from mxcompile.pipeline import Context, Pass


@dataclass(frozen=True)
class Annotate(Pass):
    """Write the plan's formats onto weights, inputs of linear layers, and past keys and values.

    No later pass reads the plan.

    Before: ``%w: 32x64xf32``; after: ``%w: 32x64xf32 @int4,int3/g32/asym``.
    """

    name = "annotate"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Annotate weights, and those inputs of layers and caches that the plan quantizes."""
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
        return self._caches(model, ctx.plan.caches) or changed

    @staticmethod
    def _caches(model: ir.Model, formats: Mapping[str, CacheFormat]) -> bool:
        known = {cache.name: cache for cache in caches.find(model)}
        inputs = {value.name: value for value in model.graph.inputs}
        changed = False
        for name, fmt in formats.items():
            if name not in known:
                raise PlanError(f"no attention layer has a cache {name}")
            known[name].check(fmt)
            scheme = f"{fmt}/g{GROUP}/dynamic" if fmt.scaled else fmt.name
            changed |= graph.annotate(inputs[name], scheme)
        return changed
