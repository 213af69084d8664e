"""What this machine has of CUDA: which programs its GPU runs, and where the libraries lie."""

import ctypes
import importlib.util
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from mxcompile.errors import DeviceError

_MAJOR: Final = 75
_MINOR: Final = 76
"""The driver's numbers of the two parts of a device's compute capability."""

ARCHITECTURES: Final = (80, 86, 87, 89, 90)
"""The compute capabilities that targets are shipped for, ten times over."""


@cache
def capability() -> int:
    """Ten times the compute capability of the first GPU, such as 89; 0 where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        start, get = driver.cuInit, driver.cuDeviceGetAttribute
    except (OSError, AttributeError):  # none, or what stands for it when one compiles
        return 0
    parts = [ctypes.c_int(), ctypes.c_int()]
    if start(0):
        return 0
    for part, number in zip(parts, (_MAJOR, _MINOR), strict=True):
        if get(ctypes.byref(part), number, 0):
            return 0
    return 10 * parts[0].value + parts[1].value


def features() -> frozenset[str]:
    """The architectures whose machine code the GPU runs, such as "sm_80": its own, older minors."""
    here = capability()
    return frozenset(f"sm_{n}" for n in ARCHITECTURES if n // 10 == here // 10 and n <= here)


def wheels() -> Path | None:
    """Where the package index's CUDA 13 lies, if it is installed."""
    package = importlib.util.find_spec("nvidia")
    places = package.submodule_search_locations if package is not None else None
    found = (Path(place) / "cu13" for place in places or ())
    return next((root for root in found if root.is_dir()), None)


def load_tvm_runtime() -> None:
    """Load the part of TVM's runtime that is for CUDA; a driver must be there or stood in for.

    Raises:
        DeviceError: a library that it takes is not installed.
    """
    _load_cudart()
    package = importlib.util.find_spec("tvm")
    if package is None or not package.submodule_search_locations:
        raise DeviceError("apache-tvm is not installed")
    library = Path(package.submodule_search_locations[0]) / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(f"no CUDA device can be reached: {error}") from error


def _load_cudart() -> None:
    name = "libcudart.so.13"
    places = [Path(name)]  # wherever the loader looks
    if (root := wheels()) is not None:
        places.append(root / "lib" / name)
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parents[1] / "lib64" / name)
    for place in places:
        with suppress(OSError):
            ctypes.CDLL(str(place), ctypes.RTLD_GLOBAL)
            return
    raise DeviceError(f"there is no {name}: install CUDA 13, or pip install nvidia-cuda-runtime")
