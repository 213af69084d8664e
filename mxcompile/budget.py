"""Budgets as users write them: ``4.2bit``, ``600MB``, ``kld<=0.02``, ``30tok/s``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self, TypeAlias

from mxcompile.errors import UsageError

BIT: Final = "bit"
SIZES: Final = MappingProxyType(
    {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
)
"""Bytes in a unit of size."""

_NUMBER: Final = r"(?P<amount>\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+)"
_SIZE: Final = re.compile(_NUMBER + r"\s*(?P<unit>[A-Za-z]+)")
_RATE: Final = re.compile(_NUMBER + r"\s*tok/s", re.IGNORECASE)
_DIVERGENCE: Final = re.compile(r"kld\s*<=\s*" + _NUMBER, re.IGNORECASE)
_CASELESS: Final = {unit.lower(): unit for unit in SIZES} | {"bit": BIT, "bits": BIT}


@dataclass(frozen=True, slots=True)
class Size:
    """A size that the weight file must not exceed.

    In ``bit`` the amount is all-in: 8 times the bytes of the file over the model's parameters.
    """

    amount: float
    unit: str

    def limit(self, parameters: int) -> int:
        """The most bytes that the weight file of a model may have."""
        if self.unit == BIT:
            return int(self.amount * parameters / 8)
        return int(self.amount * SIZES[self.unit])

    def express(self, size: int, parameters: int) -> str:
        """A size in bytes, in the budget's unit; rounded up, so that it can be asked for."""
        scale = parameters / 8 if self.unit == BIT else SIZES[self.unit]
        amount = -(-size * 100 // scale) / 100
        return f"{amount:.2f} {'bits a weight' if self.unit == BIT else self.unit}"

    def __str__(self) -> str:
        return f"{_plain(self.amount)}{self.unit}"


@dataclass(frozen=True, slots=True)
class Divergence:
    """The most harm at the output that is predicted, in nats a token; the least file keeps it."""

    amount: float

    def __str__(self) -> str:
        return f"kld<={_plain(self.amount)}"


@dataclass(frozen=True, slots=True)
class Rate:
    """The least tokens a second that one sequence is predicted to be continued with."""

    amount: float

    def __str__(self) -> str:
        return f"{_plain(self.amount)}tok/s"


Budget: TypeAlias = Size | Divergence | Rate


@dataclass(frozen=True, slots=True)
class Budgets:
    """All budgets of a request: every one must hold, of each kind the tightest binds."""

    size: Size | None = None
    divergence: Divergence | None = None
    rate: Rate | None = None

    @classmethod
    def parse(cls, texts: Sequence[str], parameters: int) -> Self:
        """Read budgets for a model of so many parameters.

        Raises:
            UsageError: a text is not a budget.
        """
        budgets = [parse_budget(text) for text in texts]
        return cls(
            min(
                (b for b in budgets if isinstance(b, Size)),
                key=lambda size: size.limit(parameters),
                default=None,
            ),
            min(
                (b for b in budgets if isinstance(b, Divergence)),
                key=lambda divergence: divergence.amount,
                default=None,
            ),
            max(
                (b for b in budgets if isinstance(b, Rate)),
                key=lambda rate: rate.amount,
                default=None,
            ),
        )


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        UsageError: the text is no budget, or none above zero.
    """
    stripped = text.strip()
    if (match := _RATE.fullmatch(stripped)) and _sane(match):
        return Rate(float(match["amount"]))
    if (match := _DIVERGENCE.fullmatch(stripped)) and _sane(match):
        return Divergence(float(match["amount"]))
    match = _SIZE.fullmatch(stripped)
    unit = _CASELESS.get(match["unit"].lower()) if match else None
    if match is None or unit is None or not _sane(match):
        raise UsageError(
            f"budget '{text}' is not supported; a budget is a size such as 4.2bit (all-in, a "
            f"weight) or 600MB (units: {', '.join((BIT, *SIZES))}), kld<=0.02 or 30tok/s"
        )
    return Size(float(match["amount"]), unit)


def _sane(match: re.Match[str]) -> bool:
    return 0 < float(match["amount"]) < float("inf")


def _plain(amount: float) -> str:
    return repr(amount).removesuffix(".0")
