"""How long a decode step takes: weights that stream in, and what every step costs besides.

One row of activations against a packed weight is bound by memory. Where tuning records have timed
a product's kernel on this machine, its bytes take the time that they took there; for other products
the same format's records say it, or else a survey of the untuned kernels; on a machine that is only
described the roofline model (Williams et al., 2009), the bytes over its read bandwidth. Attention
to a short context, norms, activations and the calls of all kernels add the same to every plan: a
number of calls, each at what a small kernel costs.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from mxcompile.formats import FORMATS, ActivationFormat, Format
from mxcompile.plan import ROW_TILE, Unit, tile_bytes
from mxcompile.records import Case, Records, representative
from mxcompile.target import Target

NANO: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Survey:
    """Times of kernels with their default knobs.

    Attributes:
        rates: Seconds a byte of a weight, by a layout's format and the activations' format.
        call_seconds: What a kernel of a step costs besides.
        element_seconds: What moving a number of a wide result takes.
    """

    rates: Mapping[tuple[str, str], float]
    call_seconds: float
    element_seconds: float


@dataclass(frozen=True, slots=True)
class Latency:
    """What a decode step is predicted with.

    Attributes:
        seconds_per_byte: Of weights that nothing else is known of.
        reads: By unit, how often a step reads all of it; 1 where nothing is said, 0 for a table
            of which a step looks up some rows.
        source: Where the figures come from, for people.
        timed: Seconds a byte by unit and format, where records say it.
        fixed_seconds: Of a step, whatever the plan.
        products: Seconds that the products of a step take at the least; reading hides them.
    """

    seconds_per_byte: float
    reads: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    timed: Mapping[tuple[str, str], float] = field(default_factory=dict)
    fixed_seconds: float = 0.0
    products: float = 0.0

    @classmethod
    def described(cls, where: Target, macs: int, reads: Mapping[str, int]) -> Self:
        """Take what a target's description says, for a step of ``macs`` products."""
        speed = where.speed
        return cls(
            1 / speed.bytes_per_second,
            reads,
            f"a roofline at {speed.bytes_per_second * NANO:.4g} GB/s, as target {where.name} says",
            fixed_seconds=speed.step_seconds,
            products=macs / speed.macs_per_second,
        )

    def nanoseconds(
        self, unit: Unit, formats: Sequence[Format], sizes: NDArray[Any]
    ) -> NDArray[np.int64]:
        """What a tile of a unit adds to a step in each format, from fewer to more bytes.

        A wider format that happened to be timed faster than a narrower one counts as fast as that:
        choices are ordered.
        """
        rates = [self.timed.get((unit.name, f.name), self.seconds_per_byte) for f in formats]
        spent = self.reads.get(unit.name, 1) * sizes * np.array(rates) / NANO
        return np.maximum.accumulate(np.rint(spent).astype(np.int64))

    def limit(self, tokens_per_second: float, fixed_bytes: int = 0) -> int:
        """The nanoseconds that tiles may take in all at a rate."""
        left = 1 / tokens_per_second - self.fixed_seconds
        return (
            int((left - fixed_bytes * self.seconds_per_byte) / NANO) if left >= self.products else 0
        )

    def rate(self, nanoseconds: int, fixed_bytes: int = 0) -> float:
        """Tokens a second when tiles take so many nanoseconds in all."""
        streamed = max(nanoseconds, 1) * NANO + fixed_bytes * self.seconds_per_byte
        return 1 / (max(streamed, self.products) + self.fixed_seconds)


def predict(
    products: Sequence[Sequence[Unit]],
    reads: Mapping[str, int],
    records: Records,
    *,
    threads: int,
    bandwidth: float,
    fixed_seconds: float,
    survey: Survey | None = None,
    activations: Mapping[str, ActivationFormat] | None = None,
) -> Latency:
    """The latency of a model's decode steps on a machine.

    Args:
        products: The units of each matrix product: some are multiplied in one call.
        reads: By unit, how often a step reads all of it.
        records: What is known of this machine.
        threads: How many a program runs on.
        bandwidth: Bytes read a second by so many threads.
        fixed_seconds: Of a step, whatever the plan.
        survey: What untuned kernels take; it also says what activations of 16 bits add.
        activations: By unit, the format of what it is multiplied with, if not int8.
    """
    rates = survey.rates if survey else {}
    layouts = {name: representative(fmt) for name, fmt in FORMATS.items()}
    by_format = {
        name: _by_format(records, layout, threads) or rates.get((layout, "int8"))
        for name, layout in layouts.items()
    }
    timed, exact = {}, 0
    for units in products:
        wide = str((activations or {}).get(units[0].name, "int8"))
        for name, usual in by_format.items():
            rows, layout = sum(unit.rows for unit in units), layouts[name]
            case = Case(layout, rows, units[0].columns, 1, threads)
            best = records.best(case)
            found = usual if best is None else best * 1e-6 / _bytes(case)
            exact += best is not None
            if found is not None and (layout, wide) in rates:
                found *= rates[layout, wide] / rates[layout, "int8"]
            if found is not None:
                timed.update({(unit.name, name): found for unit in units})
    known = "a survey" if survey else f"a roofline at {bandwidth * NANO:.1f} GB/s"
    source = (
        f"tuning records of {exact} of {len(products) * len(FORMATS)} products, {known} with "
        f"{threads} threads, and {fixed_seconds * 1e3:.2f} ms of other kernels"
    )
    return Latency(1 / bandwidth, reads, source, timed, fixed_seconds)


def _by_format(records: Records, name: str, threads: int) -> float | None:
    """Seconds a byte of the format's products that were timed; None when none was."""
    cases = [c for c in records.cases() if (c.format, c.batch, c.threads) == (name, 1, threads)]
    rates = [us * 1e-6 / _bytes(c) for c in cases if (us := records.best(c)) is not None]
    return statistics.median(rates) if rates else None


def _bytes(case: Case) -> int:
    return -(-case.rows // ROW_TILE) * tile_bytes(case.columns, FORMATS[case.format])
