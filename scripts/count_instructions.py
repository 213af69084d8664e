"""Count what the inner loops of the ARM matmul kernels are made of, and say what bounds them.

For boards that nobody has at hand: kernels are compiled, the loop over a row tile's groups is found
in the assembly, and llvm-mca (17 or later, of Debian's or another LLVM) says how many cycles a
round of it takes and which unit of the CPU is busy longest. A round multiplies a group of 16 x 32
weights with some activation rows. The bound by memory is that of all cores together, with the
bandwidth that the target's description has.

    python scripts/count_instructions.py [raspberry-pi-5 ...]
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import tvm

from mxcompile import target
from mxcompile.formats import ACTIVATION_FORMATS, FORMATS, Format
from mxcompile.plan import ROW_TILE
from mxcompile.target import Target
from mxcompile.targets import cpu_matmul
from mxcompile.targets.packing import QUADS, SIDE, VECTOR

TOOLS = ("llvm-mca", *(f"llvm-mca-{version}" for version in range(30, 16, -1)))
LEAST_VERSION = 17
ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Core:
    """A CPU core: its name, LLVM's model of it, its clock in GHz, and how many the board has."""

    name: str
    model: str
    clock: float
    count: int


CORES = {
    "raspberry-pi-4": Core("Cortex-A72", "cortex-a72", 1.8, 4),
    # LLVM has no model of the A76; the Neoverse N1 is the same core with other caches.
    "raspberry-pi-5": Core("Cortex-A76", "neoverse-n1", 2.4, 4),
    "graviton3": Core("Neoverse V1", "neoverse-v1", 2.6, 8),
}

PRODUCTS = {
    "sdot": r"sdot\tv\d+\.4s",
    "usdot": r"usdot\tv\d+\.4s",
    "usmmla": r"usmmla\t",
    "smull": r"sm[ul]l?l?a?l2?\tv\d+\.8h",
}
"""How the instructions look that multiply codes by activations."""

PER_ROW = {"sdot": 4 * QUADS, "usdot": 4 * QUADS, "usmmla": 2 * QUADS, "smull": 8 * QUADS}
"""How many of them a group takes for one activation row."""


@dataclass(frozen=True, slots=True)
class Loop:
    """The instructions of an inner loop that multiplies a group by ``rows`` activation rows."""

    rows: int
    body: tuple[str, ...]
    products: int


def loops(assembly: str) -> Iterator[Loop]:
    """The innermost loops that multiply; a label ends a line of its own, a branch goes back."""
    lines = [line.split("//")[0].rstrip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    for end, line in enumerate(lines):
        branch = re.fullmatch(r"\t(b\.\w+|cbn?z)\t(?:\w+, )?(\.L\w+)", line)
        start = labels.get(branch[2], end) if branch else end
        body = tuple(text.strip() for text in lines[start:end] if re.match(r"\t[a-z]", text))
        if not body or any(re.match(r"(b|b\.\w+|cbn?z|tbn?z)\t", text) for text in body):
            continue
        for name, pattern in PRODUCTS.items():
            count = sum(bool(re.match(pattern, text)) for text in body)
            if count and count % PER_ROW[name] == 0:
                yield Loop(count // PER_ROW[name], (*body, line.strip()), count)


def compiled(where: Target, fmt: Format) -> str:
    """The assembly of the kernel for int8 activations, with code for one weight format only."""
    kernel = cpu_matmul.MatmulKernel(
        where.instructions,  # type: ignore[arg-type]
        formats=(fmt.name,),
    )
    function = kernel.matmul_quantized(ACTIVATION_FORMATS["int8"])
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    built = tvm.tirx.build(module, target=tvm.target.Target(dict(where.tvm)))
    return str(built.inspect_source("asm"))


def simulate(tool: str, core: Core, loop: Loop) -> tuple[float, str]:
    """Cycles of a round, and what it waits for."""
    command = [tool, "-mtriple=aarch64", f"-mcpu={core.model}", f"-iterations={ROUNDS}"]
    text = "\n".join(loop.body)
    report = subprocess.run(command, input=text, text=True, capture_output=True, check=True).stdout

    def number(title: str) -> float:
        found = re.search(rf"{title}: +([\d.]+)", report)
        assert found is not None, f"{tool} says nothing of {title}"
        return float(found[1])

    cycles = number("Total Cycles") / ROUNDS
    units = re.findall(r"^\[[\d.]+\] +- (\w+)", report, re.MULTILINE)
    numbers = report.partition("Resource pressure per iteration:\n")[2].splitlines()[1].split()
    pressure = [0.0 if n == "-" else float(n) for n in numbers]
    busy = max(zip(pressure, units, strict=True))
    dispatch = number("Total uOps") / ROUNDS / number("Dispatch Width")
    waits = {f"{_kind(busy[1])} units": busy[0], "dispatch": dispatch}
    longest = max(waits, key=lambda name: waits[name])
    return cycles, longest if waits[longest] > 0.8 * cycles else "latency"


def _kind(unit: str) -> str:
    """What a unit of LLVM's models does; the A72's W and X are its two vector pipes."""
    letter = unit.partition("Unit")[2][:1]
    return {"V": "vector", "W": "vector", "X": "vector", "L": "load"}.get(letter, "integer")


def find_tool() -> str:
    """An llvm-mca that knows these cores."""
    for tool in filter(shutil.which, TOOLS):
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        version = re.search(r"version (\d+)", said.stdout)
        if version and int(version[1]) >= LEAST_VERSION:
            return tool
    sys.exit(f"no llvm-mca {LEAST_VERSION} or later here: install llvm-22, say")


def rows_of(name: str, tool: str) -> Iterator[tuple[object, ...]]:
    """A line of the table for each format and number of activation rows."""
    where, core = target.find(name), CORES[name]
    memory = where.speed.bytes_per_second / 1e9
    for fmt in {fmt.layout: fmt for fmt in FORMATS.values()}.values():
        size = fmt.bits * VECTOR + SIDE
        found: dict[int, tuple[float, str, Loop]] = {}
        for loop in loops(compiled(where, fmt)):
            cycles, bound = simulate(tool, core, loop)
            if loop.rows not in found or cycles > found[loop.rows][0]:  # the slowest of its copies
                found[loop.rows] = cycles, bound, loop
        for rows, (cycles, bound, loop) in sorted(found.items()):
            speed = size / cycles * core.clock
            macs = rows * ROW_TILE * 4 * QUADS / cycles
            if speed * core.count > memory:
                bound = f"memory; {bound} with {max(1, int(memory / speed))} of {core.count} cores"
            yield (
                fmt,
                rows,
                len(loop.body),
                loop.products,
                f"{len(loop.body) / size:.2f}",
                f"{cycles:.0f}",
                f"{macs:.1f}",
                f"{speed:.1f}",
                bound,
            )


def main() -> None:
    """Print a table a board."""
    tool = find_tool()
    for name in sys.argv[1:] or CORES:
        core, where = CORES[name], target.find(name)
        print(
            f"\n{name}: {core.count} {core.name} at {core.clock} GHz, {where.instructions}, "
            f"memory {where.speed.bytes_per_second / 1e9:.0f} GB/s\n"
        )
        head = "format | rows | instructions | products | per weight byte | cycles | "
        head += "MACs a cycle | GB/s of weights a core | bound by"
        print(f"| {head} |")
        print("|" + "---|" * 9)
        for row in rows_of(name, tool):
            print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
