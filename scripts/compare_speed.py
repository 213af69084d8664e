"""Compare an artifact's speed with llama.cpp's on a GGUF of the same model, in one run.

Each side lives in a process of its own. The two take turns, a prompt and a generation each, so
that whatever else the machine does hits both; a ratio is the median over the rounds. llama.cpp runs
as fast as it can: built for this machine, weights mapped, flash attention where that is faster.

llama-cpp-python is not a dependency of mxcompile. To have it, built for this machine::

    python3 -m venv build/llama
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON" build/llama/bin/pip install llama-cpp-python
    python scripts/compare_speed.py model.mxc model.gguf --llama-python build/llama/bin/python

This file is read by both interpreters; at the top it imports the standard library only.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

OURS, LLAMA = "mxcompile", "llama.cpp"

Feed = Callable[[Sequence[int]], None]


def serve(system: str, model: str, threads: int, prompt: int, generate: int) -> None:
    """Be one side: load, then measure once for each line on standard input."""
    open_side = {OURS: open_ours, LLAMA: open_llama}[system]
    vocabulary, reset, feed = open_side(model, threads, prompt, generate)
    rng = random.Random(0)
    tokens = [rng.randrange(vocabulary) for _ in range(max(prompt, generate))]
    measure(reset, feed, tokens[:prompt], tokens[:generate])  # warms up
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds = measure(reset, feed, tokens[:prompt], tokens[:generate])
        print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss()}), flush=True)


def measure(
    reset: Callable[[], None], feed: Feed, prompt: Sequence[int], generated: Sequence[int]
) -> tuple[float, float]:
    """Seconds to read ``prompt`` and to write ``generated``, each from an empty context."""
    reset()
    start = time.perf_counter()
    feed(prompt)
    middle = time.perf_counter()
    reset()
    restart = time.perf_counter()
    for token in generated:
        feed([token])
    return middle - start, time.perf_counter() - restart


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def open_ours(
    model: str, threads: int, prompt: int, generate: int
) -> tuple[int, Callable[[], None], Feed]:
    """An artifact, through the runtime."""
    from mxcompile.runtime import Program, Session

    del prompt, generate
    session = Session(Program.load(Path(model), threads))

    def feed(tokens: Sequence[int]) -> None:
        session.feed(tokens)

    return session.vocabulary, lambda: session.truncate(0), feed


def open_llama(
    model: str, threads: int, prompt: int, generate: int
) -> tuple[int, Callable[[], None], Feed]:
    """A GGUF, through llama.cpp's C functions as llama-bench calls them."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)

    def load(flash: bool) -> tuple[Any, Callable[[], None], Feed]:
        llama = llama_cpp.Llama(
            model,
            n_ctx=prompt + generate,
            n_batch=max(prompt, 1),
            n_ubatch=max(prompt, 1),
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            verbose=False,
        )
        llama_cpp.llama_log_set(silence, None)  # loading sets another

        def reset() -> None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)

        def feed(tokens: Sequence[int]) -> None:
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(array, len(tokens))
            if llama_cpp.llama_decode(llama.ctx, batch) != 0:
                raise RuntimeError("llama_decode failed")
            llama_cpp.llama_get_logits_ith(llama.ctx, -1)  # waits for the result

        return llama, reset, feed

    def seconds(flash: bool) -> float:
        llama, reset, feed = load(flash)
        tokens = range(5, 5 + max(prompt, generate))
        found = min(sum(measure(reset, feed, tokens[:prompt], tokens[:generate])) for _ in range(3))
        llama.close()  # so that the peak of memory is that of one
        return found

    llama, reset, feed = load(min((False, True), key=seconds))
    return int(llama.n_vocab()), reset, feed


class Side:
    """The process of one side."""

    def __init__(self, python: str, system: str, model: Path, options: Sequence[int]) -> None:
        command = [python, __file__, "--serve", system, str(model), *map(str, options)]
        self.system, self.model = system, model
        self.seconds: list[tuple[float, float]] = []
        self.peak_rss_bytes = 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def take_turn(self) -> None:
        """Measure once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = self._answer()
        self.seconds.append(found["seconds"])
        self.peak_rss_bytes = found["peak_rss_bytes"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.system} failed on {self.model}")
        found: dict[str, Any] = json.loads(line)
        return found

    @property
    def bytes(self) -> int:
        """The size of the weights on disk."""
        path = self.model / "weights.safetensors" if self.model.is_dir() else self.model
        return path.stat().st_size


def compare(args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Let both sides take turns; gives a row a side, ours with the ratios."""
    options = (threads, args.prompt, args.generate)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(sys.executable, OURS, args.artifact, options)),
            stack.enter_context(Side(args.llama_python, LLAMA, args.gguf, options)),
        ]
        for turn in range(args.rounds):
            for side in sides if turn % 2 else sides[::-1]:
                side.take_turn()
    ours, llama = sides
    rows = [row(side, *options) for side in sides]
    for index, name in enumerate(("prefill", "decode")):
        pairs = zip(ours.seconds, llama.seconds, strict=True)
        rows[0][f"{name}_ratio"] = statistics.median(b[index] / a[index] for a, b in pairs)
    return rows


def row(side: Side, threads: int, prompt: int, generate: int) -> dict[str, Any]:
    """The figures of one side."""
    return {
        "model": side.model.name,
        "system": side.system,
        "threads": threads,
        "bytes": side.bytes,
        "prefill_tokens_per_s": prompt / statistics.median(s[0] for s in side.seconds),
        "decode_tokens_per_s": generate / statistics.median(s[1] for s in side.seconds),
        "peak_rss_bytes": side.peak_rss_bytes,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows for the eye."""
    print(f"{'system':10} threads       MB  prefill   decode  RSS MB  ratio prefill, decode")
    for found in rows:
        ratios = [f"{found[k]:.2f}" for k in ("prefill_ratio", "decode_ratio") if k in found]
        print(
            f"{found['system']:10} {found['threads']:7} {found['bytes'] / 1e6:8.1f}"
            f" {found['prefill_tokens_per_s']:8.1f} {found['decode_tokens_per_s']:8.1f}"
            f" {found['peak_rss_bytes'] / 1e6:7.0f}  {', '.join(ratios)}"
        )


def main() -> None:
    """Compare at each number of threads."""
    if sys.argv[1:2] == ["--serve"]:
        system, model, *options = sys.argv[2:]
        threads, prompt, generate = map(int, options)
        return serve(system, model, threads, prompt, generate)
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable, help="where llama_cpp is")
    parser.add_argument("-t", "--threads", default="1,2", help="such as 1,2 (the default)")
    parser.add_argument("-p", "--prompt", type=int, default=256)
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    rows = [found for t in args.threads.split(",") for found in compare(args, int(t))]
    return print(json.dumps(rows, indent=1)) if args.json else show(rows)


if __name__ == "__main__":
    main()
