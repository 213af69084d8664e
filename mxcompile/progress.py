"""Progress of long work: named stages, timed; drawn with an ETA when somebody is watching.

Library code takes a ``Progress`` and never prints::

    with progress.stage("calibrate", total=len(batches)) as advance:
        for batch in batches:
            ...
            advance()

A stage with no total shows that it is alive and for how long. Stages nest.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """What a stage gives: a function that moves it on."""

    def __call__(self, steps: float = 1) -> None:
        """Tell that ``steps`` more steps are done."""


class Progress:
    """Times the stages and shows nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Time spent in each stage, in the order in which they were first entered."""

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Enter a stage of ``total`` steps; gives the function that advances it."""
        start = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            with self._shown(name, total) as advance:
                yield advance
        finally:
            self.seconds[name] += time.perf_counter() - start

    def note(self, text: str) -> None:
        """Say something about the work under way."""

    @contextmanager
    def _shown(self, name: str, total: float | None) -> Iterator[Advance]:
        del name, total
        yield lambda steps=1: None


class LoggedProgress(Progress):
    """Says when a stage has ended and how long it took: for -v where no terminal is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def note(self, text: str) -> None:
        """Say it on a line of its own."""
        self._say(text)

    @contextmanager
    def _shown(self, name: str, total: float | None) -> Iterator[Advance]:
        start = time.perf_counter()
        with super()._shown(name, total) as advance:
            yield advance
        self._say(f"{name}: {time.perf_counter() - start:.1f} s")


class TerminalProgress(Progress):
    """Draws a bar a stage on the standard error stream."""

    def __init__(self) -> None:
        super().__init__()
        # Drawing is the only use of rich, and importing it takes as long as all of --help.
        from rich import progress as bars
        from rich.console import Console

        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(show_speed=False),
            bars.TimeElapsedColumn(),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._depth = 0

    def note(self, text: str) -> None:
        """Write it above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    @contextmanager
    def _shown(self, name: str, total: float | None) -> Iterator[Advance]:
        if self._depth == 0:
            self._bars.start()
        task = self._bars.add_task("  " * self._depth + name, total=total)
        self._depth += 1
        try:
            yield lambda steps=1: self._bars.advance(task, steps)
            done = total or 1
            self._bars.update(task, total=done, completed=done)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()
                for shown in self._bars.task_ids:
                    self._bars.remove_task(shown)


def create(*, quiet: bool, verbose: bool, say: Callable[[str], None]) -> Progress:
    """The progress that fits: bars on a terminal, lines with ``verbose``, else silence."""
    if quiet:
        return Progress()
    if sys.stderr.isatty():
        return TerminalProgress()
    return LoggedProgress(say) if verbose else Progress()
