"""Two readings of the CUDA kernels: serially on this CPU, and on the GPU where there is one.

``Graphs`` stands in for CUDA graphs, which a CPU has not: it is as blind for what changes between
two launches as they are, and says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

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


@dataclass
class Graphs:
    """What TVM's library for CUDA does in a virtual machine, without a GPU.

    It too keeps a graph by the machine that recorded it, the number of the function, and the sizes;
    what it is given for a launch it does not look at. A graph would work on the addresses of when
    it was recorded, so that they must be the same.
    """

    recorded: dict[tuple[Any, ...], tuple[list[Any], Any, Any]] = field(default_factory=dict)
    storage: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    launches: int = 0

    def run_or_capture(self, machine: Any, function: Any, given: Any, *key: Any) -> Any:
        """``vm.builtin.cuda_graph.run_or_capture``."""
        number, sizes = key[0], tuple(key[1]) if len(key) > 1 else ()
        place = (machine.value, number, sizes)
        if place not in self.recorded:
            self.recorded[place] = (_frozen(given), given, _invoke(machine, function, given))
            return self.recorded[place][-1]
        addresses, then, results = self.recorded[place]
        assert _frozen(given) == addresses, "a CUDA graph is launched on other memory"
        _invoke(machine, function, then)
        self.launches += 1
        return results

    def get_cached_alloc(self, machine: Any, function: Any, number: int) -> Any:
        """``vm.builtin.cuda_graph.get_cached_alloc``."""
        place = (machine.value, number)
        if place not in self.storage:
            self.storage[place] = _invoke(machine, function, ())
        return self.storage[place]


def _invoke(machine: Any, function: Any, given: Any) -> Any:
    return tvm_ffi.get_global_func("vm.builtin.invoke_closure")(machine, function, *given)


def _frozen(given: Any) -> list[Any]:
    """What a recorded kernel knows of its arguments: addresses, shapes and numbers."""
    if isinstance(given, tvm_ffi.Array | tuple):
        return [part for item in given for part in _frozen(item)]
    if isinstance(given, tvm_ffi.Tensor):
        return [(given.data_ptr(), tuple(given.shape), str(given.dtype))]
    if isinstance(given, tvm_ffi.Shape):
        return [tuple(given)]
    return [given]


@contextmanager
def graphs_on_cpu() -> Iterator[Graphs]:
    """Let programs that decode by CUDA graphs run on a CPU."""
    with suppress(UsageError, DeviceError), cuda_binary.embedding("sm_80"):
        pass  # the library that has the functions fails to load where they are there already
    graphs = Graphs()
    before: dict[str, Callable[..., Any] | None] = {}
    for method in (graphs.run_or_capture, graphs.get_cached_alloc):
        name = f"vm.builtin.cuda_graph.{method.__name__}"
        before[name] = tvm_ffi.get_global_func(name, allow_missing=True)
        tvm_ffi.register_global_func(name, method, override=True)
    try:
        yield graphs
    finally:
        for name, function in before.items():
            tvm_ffi.remove_global_func(name)
            if function is not None:
                tvm_ffi.register_global_func(name, function)


def require_compiler() -> None:
    """Skip a test where nothing compiles CUDA."""
    try:
        with cuda_binary.embedding("sm_80"):
            pass
    except (UsageError, DeviceError) as error:
        pytest.skip(str(error))
