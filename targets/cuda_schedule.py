"""What TVM does for CUDA with functions that have no kernel of our own, and with those that have.

``schedule`` gives the PrimFuncs that Relax's legalization and fusion leave a dlight schedule.
``pipeline`` lowers both kinds: TVM's pass that puts barriers where it suspects that threads meet
must not touch kernels that are written in phases. It cannot tell that a thread comes back to what
it wrote itself, and would put barriers into loops that not all threads run.
"""

import functools
from typing import Any, Final

import tvm
from tvm import tirx
from tvm.s_tir import dlight
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from mxcompile.targets.cuda_block import PHASED, finish

_NAME: Final = "mxcompile-cuda"


class _Transpose(dlight.gpu.Transpose):  # type: ignore[misc]
    """TVM's rule, less what it fails for: it cannot compare indices that are read from memory."""

    def apply(self, func: tirx.PrimFunc, target: Any, tunable: bool) -> Any:
        """A schedule, or None where another rule is to make it."""
        try:
            return super().apply(func, target, tunable)
        except ValueError:
            return None


def schedule(mod: tvm.IRModule, target: Any) -> tvm.IRModule:
    """Schedule every PrimFunc that is not marked as scheduled."""
    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        _Transpose(),
        dlight.gpu.Fallback(),
    )
    with target:
        return dlight.ApplyDefaultSchedule(*rules)(mod)


@functools.cache
def pipeline() -> str:
    """The name under which ``tvm.compile`` knows the passes that lower PrimFuncs."""
    register_tir_pipeline(_NAME, _factory)
    return _NAME


def _factory() -> tuple[Any, Any, Any]:
    lower, finalize_host, finalize_device = get_tir_pipeline("s_tir")

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def both(mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        functions = mod.functions_items()
        phased = {g: f for g, f in functions if isinstance(f, tirx.PrimFunc) and PHASED in f.attrs}
        others = {g: f for g, f in functions if g not in phased}
        without = tvm.transform.PassContext(
            context.opt_level, disabled_pass=[tvm.s_tir.transform.ThreadSync("shared").info.name]
        )
        with without:
            result = lower(tvm.IRModule(phased))
        result.update(lower(tvm.IRModule(others)))
        return result

    def finalize() -> Any:
        return tvm.transform.Sequential([finalize_device(), finish])

    return both, finalize_host, finalize
