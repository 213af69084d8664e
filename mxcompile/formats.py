"""Number formats of weights and of activations: one row a format.

Weight formats are asymmetric integers in groups of 32 columns. A group has an 8-bit scale and a
4-bit zero-point under one fp16 scale a row, so that the overhead is 12/32 bits a weight and groups
of 32 stay affordable at a budget of 4.2 bits. For a row ``r``, a column ``k`` of group ``g``::

    w[r, k] = row_scale[r] * scale[r, g] * (code[r, k] - zero[r, g] * 2**(bits - 4))

The zero-point counts in sixteenths of the code range: whole codes at 4 bits, quarters of a code
at 2 bits (where an integer zero-point would be too coarse), 16 codes at 8 bits.

Activations are symmetric integers in the same groups, each with a float32 scale that is found at
run time. A kernel takes a 16-bit code as two digits of 8, ``256 * high + low``, so that one
instruction serves both: twice the multiplications, and no more bytes of weights.
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


@dataclass(frozen=True, slots=True)
class ActivationFormat:
    """A symmetric integer format of ``digits`` signed digits to the base of 256."""

    name: str
    digits: int

    @property
    def top(self) -> int:
        """The largest code: its high digit is 127, so that it has a negative of its own size."""
        return 127 << 8 * (self.digits - 1)

    def __str__(self) -> str:
        return self.name


ACTIVATION_FORMATS: Final[Mapping[str, ActivationFormat]] = MappingProxyType(
    {f.name: f for f in (ActivationFormat("int8", 1), ActivationFormat("int16", 2))}
)


def groups(columns: int) -> int:
    """The number of groups that ``columns`` columns take; the last may be padded."""
    return -(-columns // GROUP)
