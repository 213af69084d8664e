"""Take turns between mxrun and `mxcompile bench` on one artifact, and print how they compare.

python scripts/compare_runner.py OUT.mxc -p 256 -n 64 -t 1,2 --rounds 5
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mxcompile import deploy


def rates(command: Sequence[str]) -> dict[tuple[int, str], float]:
    """Tokens a second by threads and test, as a command that prints a table in JSON says."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return {(row["threads"], row["test"]): row["tokens_per_s"] for row in rows}


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("-p", default="256")
    parser.add_argument("-n", default="64")
    parser.add_argument("-t", default="1")
    parser.add_argument("-r", default="5")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    versions = {name: metadata.version(package) for name, (package, _) in deploy.LIBRARIES.items()}
    words = [args.artifact, "-p", args.p, "-n", args.n, "-t", args.t, "-r", args.r]
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as folder,
        deploy.runtime(platform.machine(), versions, None) as runtime,
    ):
        cache = Path.home() / deploy.CACHE
        for path in (*deploy.build_runner(runtime, None, cache), *runtime.libraries):
            shutil.copy(path, folder)
        for _ in range(args.rounds):
            ours = rates([f"{folder}/mxrun", *words, "--bench"])
            theirs = rates([sys.executable, "-m", "mxcompile.cli", "bench", *words, "--json"])
            for key, rate in ours.items():
                found[key].append((rate, theirs[key]))
    print("| threads | test | mxrun | mxcompile bench | ratio of the medians |")
    print("|---:|---|---:|---:|---:|")
    for (threads, test), pairs in found.items():
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {threads} | {test} | {a:.1f} | {b:.1f} | {a / b:.3f} |")


if __name__ == "__main__":
    main()
