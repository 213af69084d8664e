"""What this machine can do at the most: bytes read a second, and operations on bytes a second.

The two bounds of the roofline model (Williams et al., 2009), measured by loops in C that do nothing
else. A compiler is at hand wherever mxcompile compiles, as TVM links with it. The source has every
variant, and the CPU's features choose.
"""

import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mxcompile import target
from mxcompile.errors import UsageError

BUFFER: Final = 1 << 27
"""Bytes that are read to measure bandwidth: far more than caches hold."""

STEPS: Final = 1 << 19
"""Rounds of dot products that measure the peak: some milliseconds."""

REPEATS: Final = 25

SOURCE: Final = r"""
#include <stddef.h>
#include <stdint.h>
typedef int32_t v16 __attribute__((vector_size(64)));
typedef int32_t v8 __attribute__((vector_size(32)));

/* Two streams, asked for ahead: one is slower, and so is leaving it to the hardware. */
#define READ(name, features, vector)                                          \
  features int name(const char *data, size_t size) {                          \
    size_t half = size / 2;                                                   \
    vector even = {0}, odd = {0};                                             \
    for (size_t at = 0; at < half; at += 128)                                 \
      for (size_t stream = 0; stream < 2; stream++) {                         \
        const char *here = data + stream * half + at;                         \
        __builtin_prefetch(here + 2048);                                      \
        __builtin_prefetch(here + 2112);                                      \
        for (size_t i = 0; i < 128; i += 2 * sizeof(vector)) {                \
          even += *(const vector *)(here + i);                                \
          odd += *(const vector *)(here + i + sizeof(vector));                \
        }                                                                     \
      }                                                                       \
    return (even + odd)[0];                                                   \
  }

/* Twelve chains are more than the pipeline has stages; asm keeps all of them. */
#define PEAK(name, features, vector, ...)                          \
  features int name(size_t steps) {                                \
    vector a[12] = {{0}}, t = {0}, x = {0}, y = {0};               \
    for (size_t n = 0; n < steps; n++) {                           \
      _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) {      \
        __VA_ARGS__                                                \
      }                                                            \
    }                                                              \
    return (a[0] + t)[0];                                          \
  }

READ(read_any, , v8)
#ifdef __x86_64__
#define CPU(features) __attribute__((target(features)))
READ(read_avx512, CPU("avx512f"), v16)
READ(read_avx2, CPU("avx2"), v8)
PEAK(peak_avx512vnni, CPU("avx512f,avx512vnni"), v16,
     __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(a[i]) : "v"(x), "v"(y));)
PEAK(peak_avxvnni, CPU("avx2"), v8,
     __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(a[i]) : "x"(x), "x"(y));)
PEAK(peak_avx2, CPU("avx2"), v8,
     __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(t) : "x"(x), "x"(y));
     __asm__ volatile("vpmaddwd %1, %0, %0" : "+x"(t) : "x"(x));
     __asm__ volatile("vpaddd %1, %0, %0" : "+x"(a[i]) : "x"(t));)
#endif
"""

_CHAINS: Final = 12

_READS: Final = (("read_avx512", {"avx512f"}), ("read_avx2", {"avx2"}), ("read_any", set[str]()))
_PEAKS: Final = (
    ("peak_avx512vnni", {"avx512_vnni"}, 64),
    ("peak_avxvnni", {"avx_vnni"}, 32),
    ("peak_avx2", {"avx2"}, 32),
)
"""Loops, best first: what the CPU must have, and the products of bytes that a step adds up."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """The bounds of this machine with some threads.

    Attributes:
        threads: How many ran at once.
        read_bandwidth: Bytes a second, from memory.
        peak: Operations on bytes a second, a product and its addition being two; None where there
            is no loop for the CPU.
        instruction: What the peak was measured with.
    """

    threads: int
    read_bandwidth: float
    peak: float | None
    instruction: str


def measure(threads: int) -> Roofline:
    """Measure both bounds: the best of some repetitions, as anything else on the machine slows it.

    Raises:
        UsageError: there is no C compiler.
    """
    features = target.host_features()
    read = next(name for name, needs in _READS if needs <= features)
    peak = next((found for found in _PEAKS if found[1] <= features), None)
    data = np.ones(BUFFER + 4096, np.uint8)  # prefetches may run over the end
    share = BUFFER // threads // 256 * 256
    start = data.ctypes.data + -data.ctypes.data % 64
    library = _library()
    function = getattr(library, read)
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    reads = [functools.partial(function, start + i * share, share) for i in range(threads)]
    bandwidth = share * threads / _best_seconds(reads)
    if peak is None:
        return Roofline(threads, bandwidth, None, "")
    name, _, products = peak
    steps = getattr(library, name)
    steps.argtypes = [ctypes.c_size_t]
    seconds = _best_seconds([functools.partial(steps, STEPS)] * threads)
    operations = 2 * products * _CHAINS * STEPS * threads
    return Roofline(threads, bandwidth, operations / seconds, name.removeprefix("peak_"))


def _best_seconds(jobs: Sequence[Callable[[], Any]]) -> float:
    """The least time in which all jobs were done at once; C releases the interpreter's lock."""
    seconds = []
    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            for running in [pool.submit(job) for job in jobs]:
                running.result()
            seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="mxcompile-") as folder:
        source, built = Path(folder) / "roofline.c", Path(folder) / "roofline.so"
        source.write_text(SOURCE)
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(built), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UsageError("the roofline is measured in C: there is no compiler cc") from error
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())
            raise UsageError(f"the roofline's loops do not compile: {reason}") from error
        return ctypes.CDLL(str(built))
