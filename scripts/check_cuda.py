"""Compile a model for GPUs that need not be here, and read what the programs hold; prints a table.

python scripts/check_cuda.py MODEL.onnx [--targets cuda-sm80,cuda-sm90] [options of mxcompile]

Each program must hold machine code for its architecture, and nothing that a device would have to
compile. `--without-nvcc` leaves the work to the package index's wheels.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mxcompile import gpu, target
from mxcompile.targets import cuda_binary


def path_without(tool: str) -> str:
    """The PATH less the folders that have a tool."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, tool).exists())


def main() -> int:
    """Compile for each target; the exit code tells whether all programs are as they must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--targets", default="cuda-sm80,cuda-sm87,cuda-sm89,cuda-sm90")
    parser.add_argument("--without-nvcc", action="store_true")
    args, options = parser.parse_known_args()
    path = path_without("nvcc") if args.without_nvcc else os.environ["PATH"]
    if args.without_nvcc and gpu.wheels() is None:
        sys.exit(cuda_binary.HOW)
    fine = True
    print("| target | machine code for | source | code |")
    print("|--------|------------------|--------|-----:|")
    for name in args.targets.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            artifact = Path(scratch) / "model.mxc"
            words = [str(args.model), "--target", name, "-o", str(artifact), "-q", *options]
            command = [sys.executable, "-m", "mxcompile.cli", *words]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path}
            )
            code = (artifact / "model.so").read_bytes()
        found, source = sorted(set(cuda_binary.cubins(code))), cuda_binary.has_source(code)
        fine &= found == [target.find(name).tvm["arch"]] and not source
        size = f"{len(code) / 1e6:.1f} MB"
        print(
            f"| {name} | {', '.join(found)} | {'yes' if source else 'none'} | {size} |", flush=True
        )
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
