"""Budgets as users write them: ``4.2bit``, ``600MB``, ``600MiB``."""

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mxcompile.errors import UsageError

BIT: Final = "bit"
SIZES: Final = MappingProxyType(
    {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
)
"""Bytes in a unit of size."""

_TEXT = re.compile(r"(?P<amount>\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+)\s*(?P<unit>[A-Za-z]+)")
_CASELESS: Final = {unit.lower(): unit for unit in SIZES} | {"bit": BIT, "bits": BIT}


@dataclass(frozen=True, slots=True)
class Budget:
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
        return f"{repr(self.amount).removesuffix('.0')}{self.unit}"


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        UsageError: the text is not a size above zero.
    """
    match = _TEXT.fullmatch(text.strip())
    unit = _CASELESS.get(match["unit"].lower()) if match else None
    if match is None or unit is None or not 0 < (amount := float(match["amount"])) < float("inf"):
        raise UsageError(
            f"budget '{text}' is not supported; a budget is a size such as "
            f"4.2bit (all-in, a weight) or 600MB; units: {', '.join((BIT, *SIZES))}"
        )
    return Budget(amount, unit)
