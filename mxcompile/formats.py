"""Weight number formats: one row a format.

All are asymmetric integers in groups of 32 columns. A group has an 8-bit scale and a 4-bit
zero-point under one fp16 scale a row, so that the overhead is 12/32 bits a weight and groups of
32 stay affordable at a budget of 4.2 bits. For a row ``r``, a column ``k`` of group ``g``::

    w[r, k] = row_scale[r] * scale[r, g] * (code[r, k] - zero[r, g] * 2**(bits - 4))

The zero-point counts in sixteenths of the code range: whole codes at 4 bits, quarters of a code
at 2 bits (where an integer zero-point would be too coarse), 16 codes at 8 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

GROUP: Final = 32
"""Columns that share a scale and a zero-point."""

ZERO_BITS: Final = 4
SCALE_BITS: Final = 8


@dataclass(frozen=True, slots=True)
class Format:
    """An integer weight format of ``bits`` bits a code; ``name`` is its text form."""

    name: str
    bits: int

    @property
    def levels(self) -> int:
        """The number of codes; codes run from 0 to ``levels - 1``."""
        return 1 << self.bits

    @property
    def zero_step(self) -> float:
        """How many codes one step of a zero-point is worth."""
        return 2.0 ** (self.bits - ZERO_BITS)

    @property
    def planes(self) -> tuple[int, ...]:
        """The widths of the bit planes that a code is stored in, low bits first."""
        return (8,) if self.bits == 8 else tuple(w for w in (4, 2, 1) if self.bits & w)

    def __str__(self) -> str:
        return self.name


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {f"int{bits}": Format(f"int{bits}", bits) for bits in (2, 3, 4, 5, 6, 8)}
)


def groups(columns: int) -> int:
    """The number of groups that ``columns`` columns take; the last may be padded."""
    return -(-columns // GROUP)
