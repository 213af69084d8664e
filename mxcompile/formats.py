"""Number formats of weights, activations and caches: one row a format.

Weight formats are asymmetric, in groups of 32 columns. A group has an 8-bit scale and a
4-bit zero-point under one fp16 scale a row, so that the overhead is 12/32 bits a weight and groups
of 32 stay affordable at a budget of 4.2 bits. For a row ``r``, a column ``k`` of group ``g``::

    w[r, k] = row_scale[r] * scale[r, g] * (code[r, k] - zero[r, g] * 2**(bits - 4))

The zero-point counts in sixteenths of the code range: whole codes at 4 bits, quarters of a code
at 2 bits (where an integer zero-point would be too coarse), eighths at 1 bit, which makes the two
values any pair around zero; 16 codes at 8 bits. There it is always the middle of the range: with
256 codes another gains next to nothing, and codes less a zero-point of 128 are signed bytes, which
is what instructions multiply.

A non-uniform format stores 3 or 4 bits that look up an 8-bit code in a codebook of 8 or 16 entries,
which a byte shuffle does in a register; from there on it is an 8-bit format. The codebook is fixed,
or learned for each weight (SqueezeLLM, arXiv 2306.07629).

Activations are symmetric integers in the same groups, each with a float32 scale that is found at
run time. A kernel takes a 16-bit code as two digits of 8, ``256 * high + low``, so that one
instruction serves both: twice the multiplications, and no more bytes of weights.

Caches of keys and values are float, or codes in groups of 32 columns of a head with an fp16 scale
each, found when a position is written::

    peak = the number of a group that is furthest from zero
    scale = fp16(peak / -2**(bits - 1)), or the least fp16 if that is 0
    code = round(x / scale), ties to even, within -2**(bits - 1) .. 2**(bits - 1) - 1

The sign of a scale puts the peak on the end of the range that has one more code: of 4 bits all 16
codes are used (so does llama.cpp's q4_0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

GROUP: Final = 32
"""Columns that share a scale and a zero-point."""

ZERO_BITS: Final = 4
MIDDLE: Final = 1 << ZERO_BITS - 1
"""The zero-point in the middle of a range."""

SCALE_BITS: Final = 8


@dataclass(frozen=True, slots=True)
class Format:
    """A weight format; ``name`` is its text form.

    Attributes:
        name: Its text form.
        bits: What a stored code takes.
        codebook: For non-uniform formats the 8-bit codes that stored codes stand for, rising; where
            ``learned``, those that learning starts from.
        learned: Whether every weight has a codebook of its own.
        centred: Whether every zero-point is ``MIDDLE``.
    """

    name: str
    bits: int
    codebook: tuple[int, ...] = ()
    learned: bool = False
    centred: bool = False

    @property
    def levels(self) -> int:
        """The number of stored codes."""
        return 1 << self.bits

    @property
    def value_bits(self) -> int:
        """The width of what is multiplied: of codes, or of the entries that they look up."""
        return 8 if self.codebook else self.bits

    @property
    def top(self) -> int:
        """The largest number that is multiplied."""
        return (1 << self.value_bits) - 1

    @property
    def zero_step(self) -> float:
        """How many codes one step of a zero-point is worth."""
        return 2.0 ** (self.value_bits - ZERO_BITS)

    @property
    def zeros(self) -> tuple[int, int]:
        """The least and the largest zero-point."""
        return (MIDDLE, MIDDLE) if self.centred else (0, (1 << ZERO_BITS) - 1)

    @property
    def planes(self) -> tuple[int, ...]:
        """The widths of the bit planes that a code is stored in, low bits first."""
        return (8,) if self.bits == 8 else tuple(w for w in (4, 2, 1) if self.bits & w)

    @property
    def layout(self) -> int:
        """How kernels tell formats apart: the bits, and 16 for codes that are looked up."""
        return self.bits + (16 if self.codebook else 0)

    @property
    def description(self) -> str:
        """What it is, in a line."""
        codebook = f" that look up {self.levels} entries" if self.codebook else ""
        learned = ", learned for each weight" if self.learned else ""
        return f"{self.bits} bits a code{codebook}{learned}, groups of {GROUP}"

    def __str__(self) -> str:
        return self.name


_NF4: Final = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
"""NormalFloat of QLoRA (arXiv 2305.14314): quantiles of a normal distribution, with a zero."""

_NORMAL3: Final = (2, 52, 86, 114, 141, 170, 203, 253)
_NORMAL4: Final = (4, 35, 57, 75, 89, 101, 112, 122, 133, 144, 155, 168, 182, 198, 220, 251)
"""Where learned codebooks start: what is learned from normal weights in groups of 32."""

FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Format("int1", 1),
            Format("int2", 2),
            Format("int3", 3),
            Format("table3", 3, _NORMAL3, learned=True),
            Format("int4", 4),
            Format("nf4", 4, tuple(round(128 + 127 * v) for v in _NF4)),
            Format("table4", 4, _NORMAL4, learned=True),
            Format("int5", 5),
            Format("int6", 6),
            Format("int8", 8, centred=True),
        )
    }
)
"""From narrow to wide."""


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


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """A format of cached keys or values.

    Attributes:
        name: Its text form.
        bits: What a number takes, scales not counted.
        dtype: The type of the tensor of numbers; two codes of 4 bits share a byte.
        scaled: Whether numbers are codes, with a tensor of scales beside them.
    """

    name: str
    bits: int
    dtype: str
    scaled: bool = False

    @property
    def lowest(self) -> int:
        """The lowest code, which a group's peak gets."""
        return -(1 << self.bits - 1)

    def parts(self, dim: int) -> tuple[tuple[str, int], ...]:
        """The tensors that a cache is made of: type, and columns for a head of ``dim``."""
        numbers = (self.dtype, dim // 2 if self.bits == 4 else dim)
        return (numbers, (SCALE_DTYPE, dim // GROUP)) if self.scaled else (numbers,)

    def row_bytes(self, dim: int) -> int:
        """The bytes of one position of one head."""
        return dim * self.bits // 8 + (2 * dim // GROUP if self.scaled else 0)

    def takes(self, dim: int) -> bool:
        """Whether a head of ``dim`` columns can be kept in it."""
        return not self.scaled or dim % GROUP == 0

    def __str__(self) -> str:
        return self.name


SCALE_DTYPE: Final = "float16"
"""Of the scales of caches."""

LEAST_SCALE: Final = 2.0**-24
"""The least fp16 above 0."""

CACHE_FORMATS: Final[Mapping[str, CacheFormat]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            CacheFormat("int4", 4, "uint8", scaled=True),
            CacheFormat("int8", 8, "int8", scaled=True),
            CacheFormat("fp16", 16, "float16"),
            CacheFormat("fp32", 32, "float32"),
        )
    }
)
"""From narrow to wide."""


def groups(columns: int) -> int:
    """The number of groups that ``columns`` columns take; the last may be padded."""
    return -(-columns // GROUP)
