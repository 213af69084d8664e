"""Count what the loops of the CUDA GEMV cost, on a machine without a GPU; prints a table.

For every weight format: the instructions that a thread issues for each byte of weights, from the
disassembly of the kernel for that format alone, and the share of a GPU's issue slots that this
takes when weights arrive as fast as its memory gives them. Below 100 % memory is the bound, as far
as enough loads are under way. Takes ``pip install nvidia-cuda-nvdisasm`` beside a CUDA compiler.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import tvm

from mxcompile import gpu, target
from mxcompile.formats import ACTIVATION_FORMATS, FORMATS, GROUP, SCALE_BITS, ZERO_BITS, Format
from mxcompile.targets import cuda_binary, cuda_schedule
from mxcompile.targets.cuda_matmul import CudaMatmul
from mxcompile.targets.cuda_weight import ROWS

GPUS: Final = {
    "A100": ("sm80", 108, 1.41, 1555),
    "RTX 3060": ("sm86", 28, 1.78, 360),
    "Jetson AGX Orin": ("sm87", 14, 0.93, 204),
    "L4": ("sm89", 58, 2.04, 300),
    "H100": ("sm90", 132, 1.755, 3350),
}
"""Target, multiprocessors, GHz, GB/s, from data sheets; a multiprocessor issues 4 x 32 lanes."""

LAYOUTS: Final = tuple({fmt.layout: fmt for fmt in FORMATS.values()}.values())
"""The formats that kernels tell apart."""

LEAST: Final = 150
"""Instructions of the loop over groups, and of what it is in; others are shorter."""


def disassemble(arch: str, fmt: Format) -> str:
    """The machine code of the kernels for quantized activations and weights of one format."""
    where = target.find(f"cuda-{arch}")
    function = CudaMatmul().only((fmt.name,)).matmul_quantized(ACTIVATION_FORMATS["int8"])
    module = tvm.IRModule({"matmul": function.with_attr("global_symbol", "matmul")})
    tvm_target = tvm.target.Target(dict(where.tvm))
    with tvm_target, cuda_binary.embedding(str(where.tvm["arch"])):
        built = tvm.tirx.build(module, target=tvm_target, pipeline=cuda_schedule.pipeline())
    binary = cuda_binary.cubin(built.imports[0].inspect_source(), str(where.tvm["arch"]))
    wheels = gpu.wheels()
    tool = shutil.which("nvdisasm") or str(wheels / "bin" / "nvdisasm" if wheels else "nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matmul.cubin"
        path.write_bytes(binary)
        done = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def loop(code: str, kernel: str) -> int:
    """The instructions of a kernel's loop over groups.

    Raises:
        ValueError: it cannot be told from others.
    """
    (body,) = re.findall(rf"\n{kernel}:\n(.*?)(?=\n\t\.section|\Z)", code, re.DOTALL)
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    spans = []
    for end, text in enumerate(instructions):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if jump and labels.get(jump[1], end + 1) <= end:
            spans.append((labels[jump[1]], end + 1))
    long = [(start, end) for start, end in spans if end - start >= LEAST]
    inner = [s for s in long if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in long)]
    ((start, end),) = inner
    return end - start


def main() -> None:
    """Print a row for every format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args()
    print("| format | " + " | ".join(GPUS) + " |")
    print("|--------|" + "----:|" * len(GPUS))
    for fmt in LAYOUTS:
        size = ROWS * (GROUP * fmt.bits + SCALE_BITS + ZERO_BITS) / 8
        cells = []
        for arch, processors, ghz, bandwidth in GPUS.values():
            per_byte = loop(disassemble(arch, fmt), "matmul_kernel") / size
            share = per_byte * bandwidth / (processors * 128 * ghz)
            cells.append(f"{per_byte:.1f}, {100 * share:.0f} %")
        print(f"| {fmt} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
