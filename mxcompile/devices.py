"""Memory that compiled programs work on: the CPU's, which numpy shares, or a GPU's own."""

import ctypes
import functools
import importlib
import importlib.util
import itertools
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
        array = np.ascontiguousarray(array)
        tensor = _allocate(self.number, array.shape, array.dtype)
        copy = _runtime("runtime.TVMTensorCopyFromBytes")
        copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return tensor

    def array(self, tensor: Any, into: NDArray[Any] | None = None) -> NDArray[Any]:
        """The numbers of a tensor: its memory if the device shares it, else ``into`` or new memory.

        Copies into what ``landing`` gives are several times as fast as others.
        """
        if self.shares:
            return np.from_dlpack(tensor)
        array = np.empty(tuple(tensor.shape), str(tensor.dtype)) if into is None else into
        copy = _runtime("runtime.TVMTensorCopyToBytes")
        copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return array

    def landing(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for ``array`` to copy into, page-locked, so that a GPU writes it by itself."""
        return np.from_dlpack(self.beside(shape, np.dtype(dtype)))

    def beside(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """A TVM tensor of the CPU's, page-locked where there is a GPU to reach it by itself."""
        return _allocate(CPU if self.number == CPU else CUDA_HOST, shape, dtype)


class Mirror:
    """Small arrays of one type and a device's tensors of them, which follow in one copy.

    Attributes:
        arrays: What the caller changes.
        tensors: What programs take; they stay where they are.
    """

    def __init__(self, device: Device, shapes: Sequence[Sequence[int]], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        sizes = [math.prod(shape) * kind.itemsize for shape in shapes]
        # Each begins where kernels may use vector loads.
        ends = list(itertools.accumulate(-(-n // weights.ALIGNMENT) for n in sizes))
        starts = [end * weights.ALIGNMENT for end in (0, *ends[:-1])]
        whole = (ends[-1] * weights.ALIGNMENT,)
        self._here = device.beside(whole, np.dtype(np.uint8))
        self._there = self._here if device.shares else device.tensor(np.zeros(whole, np.uint8))
        views = [
            [_view(tensor, shape, kind, start) for shape, start in zip(shapes, starts, strict=True)]
            for tensor in (self._here, self._there)
        ]
        self.arrays: tuple[NDArray[Any], ...] = tuple(map(np.from_dlpack, views[0]))
        self.tensors = tuple(views[1])
        for array in self.arrays:
            array[...] = 0

    def refresh(self) -> None:
        """Let the tensors have what the arrays hold.

        The copy takes its turn before what is run on the device afterwards, and may not be done on
        return: the arrays are to stay until something that was computed from them is read.
        """
        if self._there is not self._here:
            _runtime("runtime.TVMTensorCopyFromTo")(self._here, self._there)


@functools.cache
def _runtime(name: str) -> Any:
    """A function of TVM's runtime; to look one up takes as long as a small copy."""
    return interface().get_global_func(name)


def _allocate(number: int, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
    """A TVM tensor on a kind of device."""
    allocate = _runtime("runtime.TVMTensorAllocWithScope")
    where = interface().device(number, 0)
    return allocate(interface().Shape(shape), str(dtype), where, None)


def _view(tensor: Any, shape: Sequence[int], dtype: np.dtype[Any], start: int) -> Any:
    """A TVM tensor on the bytes of another from ``start``, an aligned place, on."""
    view = _runtime("runtime.TVMTensorCreateView")(
        tensor, interface().Shape(shape), str(dtype), start
    )
    # That has the other's address and an offset, which kernels refuse. This moves the address; it
    # would copy for a device that cannot compute with addresses, and the CPU and CUDA can.
    return _runtime("vm.builtin.ensure_zero_offset")(view)
