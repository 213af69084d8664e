"""How long a decode step takes: until records of tuned kernels say more, what it must read.

One row of activations against a packed weight is bound by memory: every kernel here streams its
weights once and computes in the shadow of that. So the time of a step is taken as the bytes that
it reads over the read bandwidth, the roofline model (Williams et al., 2009); attention, norms and
the rest of a step come on top, so that a rate found this way is an upper bound.
"""

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np

from mxcompile.target import Target

BUFFER: Final = 1 << 28
"""Bytes that are read to measure bandwidth: far more than caches hold."""

REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Latency:
    """The roofline of a decode step.

    Attributes:
        seconds_per_byte: Of weights that are streamed in.
        reads: By unit, how often a step reads all of it; 1 where nothing is said, 0 for a table
            of which a step looks up some rows.
        source: Where the bandwidth comes from, for people.
        products: Seconds that the products of a step take at the least; reading hides them.
        rest: Seconds that a step takes besides.
    """

    seconds_per_byte: float
    reads: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    products: float = 0.0
    rest: float = 0.0

    @classmethod
    def described(cls, where: Target, macs: int, reads: Mapping[str, int]) -> Self:
        """Take what a target's description says, for a step of ``macs`` products."""
        speed = where.speed
        return cls(
            1 / speed.bytes_per_second,
            reads,
            f"a roofline at {1e-9 * speed.bytes_per_second:.4g} GB/s, as target {where.name} says",
            macs / speed.macs_per_second,
            speed.step_seconds,
        )

    @classmethod
    def measured(cls, threads: int, reads: Mapping[str, int]) -> Self:
        """Measure this machine: the median of several reads of a large buffer."""
        data = np.ones(BUFFER // 8, np.uint64)
        parts = np.array_split(data, threads)
        seconds = []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(REPEATS):
                start = time.perf_counter()
                # A sum of 64-bit words is the fastest reduction of numpy: one addition for 8 bytes.
                list(pool.map(np.sum, parts))
                seconds.append(time.perf_counter() - start)
        per_byte = statistics.median(seconds) / BUFFER
        source = (
            f"a roofline at {1e-9 / per_byte:.1f} GB/s, read on this machine by {threads} threads"
        )
        return cls(per_byte, reads, source)

    def limit(self, tokens_per_second: float) -> int:
        """The most bytes that a step may read at a rate."""
        left = 1 / tokens_per_second - self.rest
        return int(left / self.seconds_per_byte) if left >= self.products else 0

    def rate(self, size: int) -> float:
        """Tokens a second when a step reads so many bytes."""
        return 1 / (max(max(size, 1) * self.seconds_per_byte, self.products) + self.rest)
