"""Systems that are measured against each other, each in a process of its own, taking turns.

Whatever else the machine does hits all sides of a round, so what counts are ratios within a round.
A side that waits is stopped: its threads may spin for work, and would take the others' cores.

This file is read by the interpreters of all systems; it imports the standard library only.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SERVE = "--serve"
"""The first argument of a script that is to be a side."""


def serve(measure: Callable[[], dict[str, Any]]) -> None:
    """Be a side: measure once to warm up, then once for each line on standard input."""
    measure()
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Side:
    """The process of one side: ``python script --serve arguments...``.

    Attributes:
        system: What is measured.
        found: What each turn gave.

    Raises:
        SystemExit: the process ended before it was ready, or while it measured.
    """

    def __init__(self, system: str, python: str, script: str, arguments: Sequence[str]) -> None:
        self.system = system
        self.found: list[dict[str, Any]] = []
        # What a shell says of OpenMP is not for all: threads of llama.cpp that wait passively make
        # half as many tokens.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        self._process = subprocess.Popen(
            [python, script, SERVE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def take_turn(self) -> None:
        """Measure once."""
        os.kill(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.found.append(self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.system} failed")
        os.kill(self._process.pid, signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found


def take_turns(sides: Sequence[Side], rounds: int) -> None:
    """Let every side measure once a round, in an order that alternates."""
    for turn in range(rounds):
        for side in sides if turn % 2 else sides[::-1]:
            side.take_turn()
