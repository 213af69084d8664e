"""Which CUDA programs this machine's GPU runs, as its driver tells; no CUDA library is needed."""

import ctypes
from functools import cache
from typing import Final

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
