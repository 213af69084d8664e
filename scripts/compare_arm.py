"""Compile a model for this machine and for ARM, deploy, and compare greedy tokens; ARM is emulated.

python scripts/compare_arm.py MODEL.onnx -n 8 [--target raspberry-pi-5] [options of mxcompile]

`make arm` sets up the emulated machine. What is run on it is what a device gets: the archive of
`mxcompile deploy`, unpacked. With `--work DIR` what was compiled stays there and is not again.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setup_arm import FOLDER

EMULATOR = ("qemu-aarch64-static", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")


def mxcompile(*words: object) -> None:
    """Run a verb; what it says is seen."""
    subprocess.run([sys.executable, "-m", "mxcompile.cli", *map(str, words)], check=True)


def compile_and_unpack(model: Path, target: str, options: Sequence[str], folder: Path) -> Path:
    """Compile and deploy for a target; gives the unpacked folder."""
    folder.mkdir(parents=True, exist_ok=True)
    artifact, archive = folder / "model.mxc", folder / "device.tar.gz"
    if not artifact.exists():
        mxcompile(model, "--target", target, "-o", artifact, *options)
    machine = [] if target == "x86" else ["--wheels", FOLDER / "wheels"]
    mxcompile("deploy", artifact, "-o", archive, *machine)
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "device", filter="data")
    return folder / "device" / "model"


def generate(prefix: Sequence[str], unpacked: Path, prompt: str, count: int) -> dict[str, Any]:
    """What the runner in an unpacked archive says, greedily."""
    words = ["--prompt", prompt, "-n", str(count), "--ignore-eos", "--json"]
    command = [*prefix, str(unpacked / "mxrun"), str(unpacked / "model.mxc"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """Compare; the exit code tells whether all tokens are equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", default="raspberry-pi-5")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--prompt", default="The first thing to know about the sea is")
    parser.add_argument("--work", type=Path)
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: (args.work or Path(scratch)) / name for name in ("x86", args.target)}
        unpacked = {
            name: compile_and_unpack(args.model, name, options, folder)
            for name, folder in places.items()
        }
        here, there = (
            generate(() if name == "x86" else EMULATOR, folder, args.prompt, args.n)
            for name, folder in unpacked.items()
        )
    for name, found in (("x86", here), (args.target, there)):
        print(f"{name}: {found['tokens']} {found['text']!r}")
    same = sum(a == b for a, b in zip(here["tokens"], there["tokens"], strict=True))
    print(f"{same} of {args.n} greedy tokens equal")
    return int(same != args.n)


if __name__ == "__main__":
    sys.exit(main())
