"""How fast an artifact reads and writes, as llama-bench measures it.

``ppN`` runs a prompt of N tokens, ``tgN`` generates N tokens one by one: after an empty context, or
``@ dN`` after N tokens of it. The tokens are random; choosing and printing tokens is not measured.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
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
    depths: Sequence[int] = (0,),
    graphs: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure both tests, skipping one of no tokens, at each depth and number of threads.

    ``graphs`` is as in ``Program.load``.

    Returns:
        A row a test: the median of the repetitions and their standard deviation.

    Raises:
        UsageError: the artifact is not a language model, the context is too short, or there are not
            so many CPUs.
    """
    program = Program.load(folder, max(threads), graphs=graphs)
    session = Session(program)
    random = np.random.default_rng(0)
    tokens = random.integers(0, session.vocabulary, max(prompt, generate))
    before = random.integers(0, session.vocabulary, max(depths))
    tests = [
        (name, depth, count, size, run)
        for depth in depths
        for count in threads
        for name, size, run in ((f"pp{prompt}", prompt, _read), (f"tg{generate}", generate, _write))
        if size
    ]
    rows = []
    with (progress or Progress()).stage("bench", len(tests)) as advance:
        for name, depth, count, size, run in tests:
            set_threads(count)
            session.truncate(depth)
            if session.length < depth:
                session.feed(before[session.length : depth])
            spent = _seconds(partial(run, session, depth, tokens[:size]), repetitions)
            rates = [size / seconds for seconds in spent]
            rows.append(
                {
                    "model": program.manifest.name,
                    "bits_per_weight": program.artifact.bits_per_weight,
                    "weight_bytes": program.artifact.weight_bytes,
                    "parameters": program.manifest.parameters,
                    "target": program.manifest.target,
                    "threads": count,
                    "depth": depth,
                    "test": f"{name} @ d{depth}" if depth else name,
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


def _read(session: Session, depth: int, tokens: np.ndarray) -> None:
    session.truncate(depth)
    session.feed(tokens)


def _write(session: Session, depth: int, tokens: np.ndarray) -> None:
    session.truncate(depth)
    for token in tokens:
        session.feed(token)
