"""Compiled plans to compare: mixed ones for some budgets, and uniform ones of about their sizes.

All have the same statistics and the same quantizers; what differs is which tile has which format.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mxcompile import artifact as artifacts
from mxcompile import progress
from mxcompile.activations import AUTO, ActivationChoice
from mxcompile.artifact import Artifact
from mxcompile.compiler import Job, compile_model
from mxcompile.formats import FORMATS
from mxcompile.plan import PrecisionPlan

MIXED, UNIFORM = "mxcompile", "uniform"

ALIKE = 0.005
"""Sizes that differ by less are alike: formats of as many bits, but for their codebooks."""


@dataclass(frozen=True)
class Contender:
    """A compiled plan: ``system`` is MIXED or UNIFORM, ``scheme`` its budget or format."""

    system: str
    scheme: str
    built: Artifact

    @property
    def size(self) -> dict[str, float]:
        """Its bytes, and bits a weight all-in."""
        return {"bytes": self.built.weight_bytes, "bits_per_weight": self.built.bits_per_weight}


@dataclass(frozen=True)
class Workshop:
    """Compiles a model; what is in the folder already is taken as it is."""

    model: Path
    folder: Path
    cache: Path | None = None
    activations: ActivationChoice = AUTO

    def contenders(self, bits: Sequence[float]) -> Iterator[Contender]:
        """A mixed plan for each of ``bits``, then the uniform plans next to each size."""
        mixed = [Contender(MIXED, f"{b}bit", self._built(f"{b}bit", f"{b}bit")) for b in bits]
        yield from mixed
        plan = mixed[0].built.plan()
        fixed = mixed[0].built.weight_bytes - plan.weight_bytes
        uniform = {f: PrecisionPlan.uniform(plan.units, fmt) for f, fmt in FORMATS.items()}
        sizes = {name: plan.weight_bytes + fixed for name, plan in uniform.items()}
        for name in neighbours(sizes, [c.built.weight_bytes for c in mixed]):
            path = self.folder / f"{name}.json"
            path.write_text(json.dumps(uniform[name].to_json()))
            yield Contender(UNIFORM, name, self._built(name, f"{bits[0]}bit", path))

    def _built(self, name: str, budget: str, plan: Path | None = None) -> Artifact:
        output = self.folder / f"{self.model.stem}-{name}-{self.activations}.mxc"
        if output.exists():
            return artifacts.load(output)
        watch = progress.create(quiet=False, verbose=True, say=lambda text: print(f"# {text}"))
        cache = self.cache or self.folder / "cache"
        return compile_model(
            Job(
                self.model,
                "x86",
                (budget,),
                output,
                plan=plan,
                cache=cache,
                activations=self.activations,
            ),
            watch,
        )


def neighbours(sizes: dict[str, int], targets: Iterable[int]) -> list[str]:
    """The names of the sizes that are next to a target, on both sides; of all but equals, all."""
    found = set()
    for target in targets:
        below = max((s for s in sizes.values() if s <= target), default=None)
        above = min((s for s in sizes.values() if s > target), default=None)
        near = [s for s in (below, above) if s is not None]
        found |= {n for n, s in sizes.items() if any(abs(s - o) <= o * ALIKE for o in near)}
    return [name for name in sizes if name in found]


def interpolated(points: Iterable[tuple[float, float]], at: float) -> float | None:
    """The error at a size, its logarithm taken as linear between the neighbours among ``points``.

    Args:
        points: Pairs of a size and an error; those that a smaller one beats do not count.
        at: A size; None comes back where it lies outside.
    """
    front: list[tuple[float, float]] = []
    for size, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((size, error))
    for (low, before), (high, after) in itertools.pairwise(front):
        if low <= at <= high:
            share = (at - low) / (high - low)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    return None


def fitting(points: Iterable[tuple[float, float]], at: float) -> float | None:
    """The least error of what is no larger than ``at``; None where nothing is."""
    return min((error for size, error in points if size <= at), default=None)
