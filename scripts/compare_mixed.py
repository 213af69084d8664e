"""What a matrix whose row tiles have different formats costs over uniform ones of the same bytes.

One activation row is multiplied with a weight larger than caches, by one kernel that knows all
formats: with every tile in one format, with random formats tile by tile, and with these in order.
All take turns; the ratio is the mixed one's time over what its bytes take in uniform weights.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Final

import numpy as np
import tvm
from tvm import relax

from mxcompile import lower, runtime, target, tune
from mxcompile.formats import ACTIVATION_FORMATS, FORMATS
from mxcompile.plan import ROW_TILE, tile_bytes
from mxcompile.targets import packing
from mxcompile.targets.cpu_matmul import MatmulKernel, activation_bytes

NAMES: Final = ("int2", "int3", "int4", "int5", "int6", "int8")
MIXES: Final = {"all": NAMES, "int5 and int6": ("int5", "int6"), "int2 and int3": ("int2", "int3")}
INT8: Final = ACTIVATION_FORMATS["int8"]


def program(where: target.Target, columns: int) -> object:
    """A function ``main(codes, weight, table)``."""
    kernel = MatmulKernel(where.instructions, formats=NAMES)  # type: ignore[arg-type]
    bb = relax.BlockBuilder()
    product = bb.add_func(lower.rooted(kernel.matmul_quantized(INT8)), "product")
    tiles, size = (tvm.tirx.Var(name, "int64") for name in ("tiles", "size"))
    codes = relax.Var("codes", relax.TensorType((1, activation_bytes(columns, INT8)), "int8"))
    weight = relax.Var("weight", relax.TensorType((size,), "uint8"))
    table = relax.Var("table", relax.TensorType((tiles, 3), "int32"))
    out = relax.TensorType((1, tiles * ROW_TILE), "float32")
    with bb.function("main", [codes, weight, table]):
        with bb.dataflow():
            found = bb.emit_output(relax.call_tir(product, [codes, weight, table], out))
        bb.emit_func_output(found)
    return tune.load(bb.finalize(), where)


def total(formats: Sequence[str], columns: int) -> int:
    """The bytes of tiles."""
    return sum(tile_bytes(columns, FORMATS[name]) for name in formats)


def measure(columns: int, threads: int, rounds: int) -> list[dict[str, object]]:
    """A row a mix: shuffled and sorted, over uniform."""
    where = target.find("x86")
    runtime.set_threads(threads)
    vm, rng = program(where, columns), np.random.default_rng(0)
    data = tvm.runtime.tensor(np.ones(tune.STREAM_BYTES, np.uint8))
    codes = tvm.runtime.tensor(np.ones((1, activation_bytes(columns, INT8)), np.int8))
    weights: dict[tuple[str, str], list[str]] = {
        ("uniform", name): [name] * (tune.STREAM_BYTES // total([name], columns)) for name in NAMES
    }
    for mix, names in MIXES.items():
        count = int(0.97 * tune.STREAM_BYTES / (total(names, columns) / len(names)))
        weights["shuffled", mix] = [str(name) for name in rng.choice(names, count)]
        weights["sorted", mix] = sorted(weights["shuffled", mix])
    tables = {
        key: tvm.runtime.tensor(packing.tile_table([FORMATS[n] for n in names], columns))
        for key, names in weights.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in weights}
    for _ in range(rounds):
        for key, table in tables.items():
            evaluator = vm.time_evaluator("main", tvm.cpu(), number=1, repeat=3)  # type: ignore[attr-defined]
            seconds[key].append(min(evaluator(codes, data, table).results))
    rates = {  # seconds a byte, by round
        name: np.array(seconds["uniform", name]) / total(weights["uniform", name], columns)
        for name in NAMES
    }
    rows = []
    for mix in MIXES:
        row: dict[str, object] = {"columns": columns, "threads": threads, "mix": mix}
        for order in ("shuffled", "sorted"):
            tiles = weights[order, mix]
            uniform = sum(rates[name] * total([name], columns) for name in tiles)
            row[order] = statistics.median(np.array(seconds[order, mix]) / uniform)
        rows.append(row)
    return rows


def main() -> None:
    """Measure for some numbers of columns and threads."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", default="640,4096", help="(default: %(default)s)")
    parser.add_argument("-t", "--threads", default="1,2", help="(default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    rows = [
        row
        for columns in map(int, args.columns.split(","))
        for threads in map(int, args.threads.split(","))
        for row in measure(columns, threads, args.rounds)
    ]
    if args.json:
        return print(json.dumps(rows, indent=1))
    print("columns threads  mix            shuffled  sorted")
    for row in rows:
        print(
            f"{row['columns']:7} {row['threads']:7}  {row['mix']:14}"
            f" {row['shuffled']:8.3f} {row['sorted']:7.3f}"
        )
    return None


if __name__ == "__main__":
    main()
