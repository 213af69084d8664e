"""Passes over the ONNX half, pipelines of them as text, and the instruments that watch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import ClassVar, Self

import onnx_ir as ir

from mxcompile.errors import MxError, PassError
from mxcompile.plan import PrecisionPlan
from mxcompile.statistics import Array, Statistics
from mxcompile.target import Target


@dataclass(frozen=True, slots=True)
class Context:
    """What every pass may read and none may change.

    ``plan`` is None before the solve. ``statistics`` say what weights meet, which the quantizers
    weigh errors with; without them all columns count alike. ``powers`` are the mean squares of the
    columns of values, by name.
    """

    target: Target
    plan: PrecisionPlan | None = None
    statistics: Statistics | None = None
    powers: Mapping[str, Array] | None = None


class Pass(ABC):
    """A named rewrite of a model in place; a subclass is a frozen dataclass without fields."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite ``model``; tell whether anything changed."""


class Instrument:
    """Watches a pipeline; sees the model before the first pass and after each one."""

    def before(self, pass_name: str, model: ir.Model) -> None:
        """Called with the model that a pass is about to rewrite."""

    def after(self, pass_name: str, model: ir.Model, changed: bool) -> None:
        """Called with the model that a pass left behind."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; text form ``canonicalize,fuse-attention``."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str, registry: Mapping[str, str]) -> Self:
        """Read the text form; ``registry`` maps pass names to ``module:Class``.

        Raises:
            PassError: a name is not in the registry.
        """
        names = [n for n in text.split(",") if n]
        if unknown := [n for n in names if n not in registry]:
            raise PassError(f"no pass {unknown[0]}; there are: {', '.join(registry)}")
        return cls(tuple(resolve_name(registry[n])() for n in names))

    def __str__(self) -> str:
        return ",".join(p.name for p in self.passes)

    def run(
        self, model: ir.Model, ctx: Context, instruments: Sequence[Instrument] = ()
    ) -> ir.Model:
        """Run every pass on a copy of ``model``, so that the caller's model is never touched.

        Weights are shared with the copy, not copied.

        Raises:
            PassError: a pass failed in a way that it did not foresee.
        """
        model = model.clone()
        for index, step in enumerate(self.passes):
            for watcher in instruments:
                watcher.before(step.name, model)
            try:
                changed = step.run(model, ctx)
            except MxError:
                raise
            except Exception as error:
                place = f"{step.name} (pass {index + 1} of {self})"
                raise PassError(f"{place} failed: {error!r}") from error
            for watcher in instruments:
                watcher.after(step.name, model, changed)
        return model
