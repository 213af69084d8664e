"""Which format each cache of keys or values has.

Every cache, the keys or the values of a layer, has a format of its own. What rounding it does to
the output was measured with the weights' statistics, so a choice is arithmetic: all begin in the
narrowest format, and the widening that saves most damage a byte is taken again and again, until
what is left is little enough (``Divergence``), or as long as it fits (``Size``).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import onnx_ir as ir

from mxcompile.budget import BIT, Divergence, Size, parse_budget
from mxcompile.caches import Cache, find
from mxcompile.errors import BudgetError, UsageError
from mxcompile.formats import CACHE_FORMATS, CacheFormat
from mxcompile.statistics import Statistics

AUTO: Final = "auto"
AUTO_DIVERGENCE: Final = 0.001
"""What ``auto`` may add to the divergence, in nats a token: a fortieth of what a plan of 4 bits
costs, less than one most likely token in a thousand."""


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """What a user asks of caches: formats for all keys and values, or a limit to choose under.

    The text form is ``int8``, ``int8,int4`` (keys, values), ``kld<=0.001``, ``6bit`` (all-in, a
    cached number) or ``auto``, which is ``kld<=0.001``.
    """

    formats: tuple[CacheFormat, CacheFormat] | None
    limit: Size | Divergence | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            UsageError: the text is none of these.
        """
        if text == AUTO:
            return cls(None, Divergence(AUTO_DIVERGENCE))
        names = text.split(",")
        if len(names) <= 2 and set(names) <= set(CACHE_FORMATS):
            return cls((CACHE_FORMATS[names[0]], CACHE_FORMATS[names[-1]]))
        try:
            limit = parse_budget(text)
        except UsageError:
            limit = None
        if isinstance(limit, Divergence) or (isinstance(limit, Size) and limit.unit == BIT):
            return cls(None, limit)
        raise UsageError(
            f"'{text}' is no choice of caches: {', '.join(CACHE_FORMATS)}, two of them for keys "
            "and values such as int8,int4, a limit such as 6bit or kld<=0.001, or auto"
        )

    def __str__(self) -> str:
        if self.formats is None:
            return str(self.limit)
        return ",".join(dict.fromkeys(map(str, self.formats)))


DEFAULT: Final = CacheChoice.parse("fp16")


def choose_caches(
    model: ir.Model, statistics: Statistics, choice: CacheChoice
) -> dict[str, CacheFormat]:
    """The formats of a model's caches, by their names.

    Args:
        model: A canonical model.
        statistics: What calibration found; a choice under a limit takes its gradients.
        choice: What was asked.

    Raises:
        PlanError: a head is no multiple of 32 columns, as the format asks.
        UsageError: no gradients were taken.
        BudgetError: no choice is that small.
    """
    caches = find(model)
    if choice.formats is not None:
        chosen = {c.name: choice.formats[0 if c.is_key else 1] for c in caches}
        for cache in caches:
            cache.check(chosen[cache.name])
        return chosen
    if missing := [c.name for c in caches if c.name not in statistics.caches]:
        raise UsageError(f"no gradients say what {missing[0]} needs: name its format")
    return _spend(caches, statistics.caches, choice.limit)


def damage(chosen: Mapping[str, CacheFormat], statistics: Statistics) -> float:
    """What a choice is predicted to add to the divergence, in nats a token."""
    return sum(statistics.caches.get(name, {}).get(fmt.name, 0.0) for name, fmt in chosen.items())


def _spend(
    caches: Sequence[Cache],
    harm: Mapping[str, Mapping[str, float]],
    limit: Size | Divergence | None,
) -> dict[str, CacheFormat]:
    """Widen caches from the narrowest formats, best first, until the limit says stop."""
    ladders = {c.name: _ladder(c, harm[c.name]) for c in caches}
    chosen = {name: ladder[0] for name, ladder in ladders.items()}
    by_name = {c.name: c for c in caches}
    steps = sorted(
        (
            (by_name[name].bytes(wide) - by_name[name].bytes(narrow), saved, name, wide)
            for name, ladder in ladders.items()
            for narrow, wide in itertools.pairwise(ladder)
            if (saved := harm[name][narrow.name] - harm[name][wide.name]) > 0
        ),
        key=lambda step: step[1] / step[0],
        reverse=True,
    )
    total = sum(harm[name][fmt.name] for name, fmt in chosen.items())
    size = sum(by_name[name].bytes(fmt) for name, fmt in chosen.items())
    if isinstance(limit, Size):
        numbers = sum(c.kv_heads * c.head_dim for c in caches)
        if size > (most := limit.limit(numbers)):
            raise BudgetError(
                f"caches of {limit} a number: the smallest take {8 * size / numbers:.3f}bit"
            )
    full: set[str] = set()
    for added, saved, name, wide in steps:
        if isinstance(limit, Divergence) and total <= limit.amount:
            break
        if isinstance(limit, Size) and size + added > most:
            full.add(name)
        if name not in full:
            total, size, chosen[name] = total - saved, size + added, wide
    return chosen


def _ladder(cache: Cache, harm: Mapping[str, float]) -> list[CacheFormat]:
    """The formats of a cache that are worth their bytes, from narrow to wide.

    Those on the lower convex hull, so that each widening saves less a byte than the one before.
    """
    hull: list[CacheFormat] = []

    def slope(a: CacheFormat, b: CacheFormat) -> float:
        return (harm[a.name] - harm[b.name]) / (cache.bytes(b) - cache.bytes(a))

    for fmt in CACHE_FORMATS.values():
        if not fmt.takes(cache.head_dim):
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], fmt):
            hull.pop()
        hull.append(fmt)
    return hull
