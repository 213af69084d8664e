"""Decode with one thread and with more, on quiet cores and beside a process that keeps one busy.

python scripts/busy_core.py OUT.mxc -t 1,2 -n 64 --rounds 10

Each number of threads has a process of its own; they take turns. The busy core is the last of those
that this process may use.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from sides import SERVE, Side, serve, take_turns


def decode(folder: Path, threads: int, count: int) -> None:
    """Be a side that decodes ``count`` tokens."""
    from mxcompile.runtime import Program, Session

    session = Session(Program.load(folder, threads))
    tokens = np.random.default_rng(0).integers(0, session.vocabulary, count)

    def measure() -> dict[str, float]:
        session.truncate(0)
        start = time.perf_counter()
        for token in tokens:
            session.feed(token)
        return {"tokens_per_s": count / (time.perf_counter() - start)}

    serve(measure)


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that never waits, on one core."""
    core = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Measure in turns."""
    if sys.argv[1:2] == [SERVE]:
        decode(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("-t", default="1,2")
    parser.add_argument("-n", default="64")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    threads = args.t.split(",")
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(t, sys.executable, __file__, [args.artifact, t, args.n]))
            for t in threads
        ]
        take_turns(sides, args.rounds)
        with busy_core():
            take_turns(sides, args.rounds)
    medians = []
    for side in sides:
        rates = [found["tokens_per_s"] for found in side.found]
        parts = rates[: args.rounds], rates[args.rounds :]
        medians.append([statistics.median(part) for part in parts])
    print("| threads | tokens/s | over the first | beside a busy core | over the first |")
    print("|---:|---:|---:|---:|---:|")
    for count, (quiet, busy) in zip(threads, medians, strict=True):
        first, second = quiet / medians[0][0], busy / medians[0][1]
        print(f"| {count} | {quiet:.0f} | {first:.2f}x | {busy:.0f} | {second:.2f}x |")


if __name__ == "__main__":
    main()
