"""Memory that compiled programs work on: the CPU's, which numpy shares, or a GPU's own."""

import ctypes
import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mxcompile import gpu, weights
from mxcompile.errors import ArtifactError, DeviceError

CPU: Final = 1
CUDA: Final = 2
CUDA_HOST: Final = 3
"""DLPack's numbers of kinds of devices; the last is memory of the CPU that a GPU can reach."""

GRAPHS: Final = "vm.builtin.cuda_graph.run_or_capture"
"""What a GPU's program calls to decode, in TVM's library for CUDA; without it none is loaded."""


@functools.cache
def interface() -> Any:
    """TVM's foreign function interface with TVM's runtime library, and nothing more.

    ``import tvm`` would load the compiler too, and tvm_ffi imports torch wherever it is
    installed: 2 seconds and 400 MB that running a model has no use for.
    """
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        ffi = importlib.import_module("tvm_ffi")
    else:
        sys.modules["torch"] = None  # type: ignore[assignment] # makes the import fail
        try:
            ffi = importlib.import_module("tvm_ffi")
        finally:
            del sys.modules["torch"]
    package = importlib.util.find_spec("tvm")
    if package is None or package.submodule_search_locations is None:
        raise ArtifactError("apache-tvm is not installed")
    library = Path(package.submodule_search_locations[0]) / "lib" / "libtvm_runtime.so"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return ffi


def aligned(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that begin where kernels may use vector loads."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + weights.ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % weights.ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def to_tensor(array: NDArray[Any]) -> Any:
    """A TVM tensor on the memory of ``array``, or on a copy if that is not aligned."""
    if array.ctypes.data % weights.ALIGNMENT or not array.flags.c_contiguous:
        copy = aligned(array.shape, array.dtype)
        copy[...] = array
        array = copy
    return interface().from_dlpack(
        array, require_alignment=weights.ALIGNMENT, require_contiguous=True
    )


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device; tensors of one that does not share the CPU's memory are copies."""

    number: int = CPU
    shares: bool = True

    @classmethod
    def cuda(cls) -> Self:
        """The first GPU.

        Raises:
            DeviceError: the libraries that it takes are not installed, or know no CUDA graphs.
        """
        ffi = interface()
        gpu.load_tvm_runtime()
        if ffi.get_global_func(GRAPHS, allow_missing=True) is None:
            raise DeviceError(
                f"the installed TVM was built without CUDA graphs: it has no {GRAPHS}"
            )
        return cls(CUDA, shares=False)

    @property
    def numbers(self) -> tuple[int, ...]:
        """This and what it cannot do without: a GPU's program computes shapes on the CPU."""
        return (self.number,) if self.number == CPU else (self.number, CPU)

    def tensor(self, array: NDArray[Any]) -> Any:
        """A TVM tensor of an array: on its memory if the device shares it."""
        if self.shares:
            return to_tensor(array)
        tensor = _allocate(self.number, array.shape, array.dtype)
        self.refresh(tensor, array)
        return tensor

    def refresh(self, tensor: Any, array: NDArray[Any]) -> None:
        """Let a tensor that was made of an array follow the array's changes."""
        if not self.shares:
            array = np.ascontiguousarray(array)
            copy = interface().get_global_func("runtime.TVMTensorCopyFromBytes")
            copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)

    def array(self, tensor: Any, into: NDArray[Any] | None = None) -> NDArray[Any]:
        """The numbers of a tensor: its memory if the device shares it, else ``into`` or new memory.

        Copies into what ``landing`` gives are several times as fast as others.
        """
        if self.shares:
            return np.from_dlpack(tensor)
        array = np.empty(tuple(tensor.shape), str(tensor.dtype)) if into is None else into
        copy = interface().get_global_func("runtime.TVMTensorCopyToBytes")
        copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return array

    def landing(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for ``array`` to copy into, page-locked, so that a GPU writes it by itself."""
        if self.number == CPU:
            return np.empty(shape, dtype)
        return np.from_dlpack(_allocate(CUDA_HOST, shape, np.dtype(dtype)))


def _allocate(number: int, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
    """A TVM tensor on a kind of device."""
    allocate = interface().get_global_func("runtime.TVMTensorAllocWithScope")
    where = interface().device(number, 0)
    return allocate(interface().Shape(shape), str(dtype), where, None)
