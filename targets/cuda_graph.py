"""A decode step as one CUDA graph.

``capture`` is a pass over a lowered module. TVM's own does the work: kernels that work on memory
that stays in its place become a function, which the runtime library records as a graph when it is
first called, and launches as one from then on. In a function whose sizes are all known but for the
caches' capacity that is every kernel but those that write the result, whose memory is the caller's.

The runtime library keeps a graph in the virtual machine that recorded it, by the capacity and not
by the addresses: ``runtime`` sees to it that these stay.
"""

from typing import Any, Final

import tvm
from tvm import relax

INPUTS_STAY: Final = {"num_input": 0}
"""Attributes of a function all of whose inputs stay where they are from call to call."""


def capture(name: str) -> Any:
    """Make the pass for the function of that name, after memory is planned.

    Other functions stay as they are: TVM's pass would have them share the memory of this one.
    """

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def rewrite(mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        functions = dict(mod.functions_items())
        others = {
            var: function
            for var, function in functions.items()
            if isinstance(function, relax.Function) and var.name_hint != name
        }
        mod = tvm.IRModule({v: f for v, f in functions.items() if v not in others})
        if name in (var.name_hint for var in mod.get_global_vars()):
            mod[name] = _storage_first(mod[name])
            options = {**context.config, "relax.backend.use_cuda_graph": True}
            with tvm.transform.PassContext(context.opt_level, config=options):
                mod = relax.transform.RewriteCUDAGraph()(mod)
        mod.update(others)
        return mod

    return rewrite


def _storage_first(function: relax.Function) -> relax.Function:
    """Allocate before all else.

    TVM's pass calls what it records where the first of its operations was, and that may be before
    the memory that later ones take.
    """
    (block,) = function.body.blocks
    allocate = tvm.ir.Op.get("relax.memory.alloc_storage")

    def later(binding: Any) -> bool:
        return not (isinstance(binding.value, relax.Call) and binding.value.op == allocate)

    body = relax.SeqExpr(
        [relax.BindingBlock(sorted(block.bindings, key=later))], function.body.body
    )
    return relax.Function(
        function.params, body, function.ret_ty, function.is_pure, function.attrs, function.span
    )
