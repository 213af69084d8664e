"""How fast an artifact reads and writes, as llama-bench measures it.

``ppN`` runs a prompt of N tokens, ``tgN`` generates N tokens one by one after an empty context.
The tokens are random; choosing and printing tokens is not measured.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mxcompile.progress import Progress
from mxcompile.runtime import Program, Session, set_threads


def bench(
    folder: Path,
    *,
    prompt: int,
    generate: int,
    threads: Sequence[int],
    repetitions: int,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure both tests, skipping one of no tokens, at each number of threads.

    Returns:
        A row a test: the median of the repetitions and their standard deviation.

    Raises:
        UsageError: the artifact is not a language model, or there are not so many CPUs.
    """
    program = Program.load(folder, max(threads))
    session = Session(program)
    tokens = np.random.default_rng(0).integers(0, session.vocabulary, max(prompt, generate))
    tests: list[tuple[str, int, Callable[[], None]]] = [
        (f"pp{prompt}", prompt, lambda: _read(session, tokens[:prompt])),
        (f"tg{generate}", generate, lambda: _write(session, tokens[:generate])),
    ]
    tests = [test for test in tests if test[1]]
    rows = []
    with (progress or Progress()).stage("bench", len(threads) * len(tests)) as advance:
        for count in threads:
            set_threads(count)
            for name, size, run in tests:
                rates = [size / seconds for seconds in _seconds(run, repetitions)]
                rows.append(
                    {
                        "model": program.manifest.name,
                        "bits_per_weight": program.artifact.bits_per_weight,
                        "weight_bytes": program.artifact.weight_bytes,
                        "parameters": program.manifest.parameters,
                        "target": program.manifest.target,
                        "threads": count,
                        "test": name,
                        "tokens_per_s": statistics.median(rates),
                        "stddev": statistics.stdev(rates) if len(rates) > 1 else 0.0,
                    }
                )
                advance()
    return rows


def _seconds(run: Callable[[], None], repetitions: int) -> list[float]:
    run()  # maps the weights, fills the allocator
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def _read(session: Session, tokens: np.ndarray) -> None:
    session.truncate(0)
    session.feed(tokens)


def _write(session: Session, tokens: np.ndarray) -> None:
    session.truncate(0)
    for token in tokens:
        session.feed(token)
