"""Two readings of the CUDA kernels: serially on this CPU, and on the GPU where there is one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm

from mxcompile import gpu, target
from mxcompile.errors import DeviceError, UsageError
from mxcompile.targets import cuda_binary, cuda_schedule
from mxcompile.targets.cuda_attention import CudaAttention
from mxcompile.targets.cuda_matmul import CudaMatmul
from mxcompile.targets.cuda_norm import CudaNorm


@dataclass(frozen=True)
class Reading:
    """How kernels are made, built and called; ``arch`` is "" for the serial reading."""

    matmul: CudaMatmul
    attention: CudaAttention
    norm: CudaNorm
    arch: str = ""

    def __str__(self) -> str:
        return self.arch or "serial"

    def build(self, functions: dict[str, Any]) -> Any:
        """Build functions by name."""
        mod = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
        if not self.arch:
            return tvm.tirx.build(mod, target=tvm.target.Target("llvm"))
        return build_cuda(mod, self.arch)

    def tensor(self, array: Any) -> Any:
        """An array where the kernels read it."""
        device = tvm.cuda() if self.arch else tvm.cpu()
        return tvm.runtime.tensor(np.ascontiguousarray(array), device)


SERIAL = Reading(
    CudaMatmul(splits=2, tiles=3, batches=2, rows=2, serial=True),
    CudaAttention(splits=3, serial=True),
    CudaNorm(serial=True),
)
"""Small enough for LLVM to compile in seconds; knobs change loops' bounds, not what is in them."""


def readings() -> list[Any]:
    """The serial reading, and the GPU's where there is one."""
    found: list[Any] = [SERIAL]
    if gpu.features():
        arch = str(target.find("cuda").tvm["arch"])
        shipped = Reading(CudaMatmul(), CudaAttention(), CudaNorm(), arch)
        found.append(pytest.param(shipped, marks=pytest.mark.gpu))
    return found


def machine(arch: str) -> target.Target:
    """The target of an architecture."""
    return next(t for t in target.shipped() if t.tvm.get("arch") == arch)


def build_cuda(mod: Any, arch: str) -> Any:
    """Build functions for a GPU that need not be here."""
    where = machine(arch)
    tvm_target = tvm.target.Target(dict(where.tvm))
    with tvm_target, cuda_binary.embedding(arch):
        return tvm.tirx.build(mod, target=tvm_target, pipeline=cuda_schedule.pipeline())


def require_compiler() -> None:
    """Skip a test where nothing compiles CUDA."""
    try:
        with cuda_binary.embedding("sm_80"):
            pass
    except (UsageError, DeviceError) as error:
        pytest.skip(str(error))
