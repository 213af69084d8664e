"""Compare matrix product kernels: ours, onnxruntime's MatMulNBits and OpenVINO's, in one run.

All have int8 activations and groups of 32 weights that share a scale. A measurement is a program of
products with copies of a weight, more than caches hold, so that every product streams its weight
from memory; what a product takes is the time of the program over the copies. Systems take turns,
each in a process of its own, and the median counts. The bounds are measured between them, with the
same threads.

onnxruntime has 2, 4 and 8 bits, OpenVINO 4 and 8; OpenVINO is left out where it is not installed.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime
from plot import Series, plot
from sides import SERVE, Side, serve, take_turns

from mxcompile import roofline, runtime, target
from mxcompile.formats import FORMATS, GROUP
from mxcompile.records import Case, load, user_folder

OURS, ORT, OPENVINO, BOUNDS = "mxcompile", "onnxruntime", "openvino", "bounds"
RUNS: Final = 6
"""Runs of a program in a turn."""

STREAM_BYTES: Final = 96 << 20
"""Weights that a program reads, by copies: three times a large cache."""

SHAPES: Final = "4096x4096,11008x4096,262144x640"


@dataclass(frozen=True)
class System:
    """A program of ``copies`` products."""

    copies: int
    weight_bytes: int
    run: Callable[[], object]

    def measure(self) -> dict[str, Any]:
        """Microseconds of a product: the best run of some, as for the bounds."""
        seconds = math.inf
        for _ in range(RUNS):
            start = time.perf_counter()
            self.run()
            seconds = min(seconds, time.perf_counter() - start)
        return {"us": 1e6 * seconds / self.copies, "weight_bytes": self.weight_bytes}


@dataclass(frozen=True)
class Bounds:
    """The machine itself."""

    threads: int

    def measure(self) -> dict[str, Any]:
        """The roofline."""
        return asdict(roofline.measure(self.threads))


def copies_of(size: int, batch: int) -> int:
    """Enough to stream from memory; a few for many rows, whose time is not in the weights."""
    return max(1, -(-STREAM_BYTES // size)) if batch == 1 else 2


def ours(case: Case, log: Path) -> System:
    """The kernels of this repository, as programs have them."""
    import tvm  # crashes a process that has OpenVINO's threads

    from mxcompile import tune
    from mxcompile.knobs import choose
    from mxcompile.targets.cpu_matmul import Knobs

    choice = choose(load(log), case.threads)
    runtime.set_threads(case.threads)
    size = tune.weight_bytes(case)
    copies = copies_of(size, case.batch)
    kernel_knobs = dict(choice.knobs(case.rows, case.columns)).get(case.format, Knobs())
    where = target.find("x86")
    machine = tune.load(tune.program(case, kernel_knobs, where, copies), where)
    inputs = [tvm.runtime.tensor(array) for array in tune.inputs(case, copies)]
    return System(copies, size, lambda: machine["main"](*inputs))


def ort(case: Case) -> System:
    """MatMulNBits with int8 activations (accuracy level 4), asymmetric as our formats are."""
    bits = FORMATS[case.format].bits
    n, k = case.rows, case.columns
    blocks = k // GROUP
    rng = np.random.default_rng(0)

    def arrays() -> dict[str, np.ndarray]:
        # Different ones each time: of equal weights onnxruntime keeps, and streams, only one.
        return {
            "w": rng.integers(0, 256, (n, blocks, GROUP * bits // 8), np.uint8),
            "s": rng.random((n, blocks), np.float32),
            "z": rng.integers(0, 256, (n, -(-blocks * bits // 8)), np.uint8),
        }

    size = sum(array.nbytes for array in arrays().values())
    copies = copies_of(size, case.batch)
    nodes, tensors = [], list[onnx.TensorProto]()
    for i in range(copies):
        names, values = [f"{name}{i}" for name in "wsz"], arrays().values()
        tensors += map(onnx.numpy_helper.from_array, values, names)
        node = oh.make_node("MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft")
        facts = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        node.attribute.extend(oh.make_attribute(name, value) for name, value in facts.items())
        nodes.append(node)
    value = oh.make_tensor_value_info
    outputs = [value(f"y{i}", onnx.TensorProto.FLOAT, [case.batch, n]) for i in range(copies)]
    inputs = [value("x", onnx.TensorProto.FLOAT, [case.batch, k])]
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid("com.microsoft", 1)]
    graph = oh.make_graph(nodes, "products", inputs, outputs, tensors)
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = {"x": np.random.default_rng(1).standard_normal((case.batch, k), np.float32)}
    return System(copies, size, lambda: session.run(None, feed))


def openvino(case: Case) -> System:
    """A decompressed constant and a MatMul, which OpenVINO fuses, with int8 activations."""
    import openvino as ov
    from openvino import opset13 as op

    bits = FORMATS[case.format].bits
    n, k = case.rows, case.columns
    kind = {4: ov.Type.u4, 8: ov.Type.u8}[bits]
    rng = np.random.default_rng(0)
    groups = n * k // GROUP
    size = n * k * bits // 8 + groups * bits // 8 + groups * 2
    copies = copies_of(size, case.batch)
    x = op.parameter([case.batch, k], np.float32)

    def constant(shape: list[int]) -> Any:
        array = rng.integers(0, 256, math.prod(shape) * bits // 8, np.uint8)
        if bits == 8:
            return op.constant(array.reshape(shape))
        kept.append(array)  # a tensor of another type does not hold its memory
        return op.constant(ov.Tensor(array, ov.Shape(shape), kind))

    kept, results = list[np.ndarray](), []
    for _ in range(copies):
        weight = op.convert(constant([n, k // GROUP, GROUP]), "f16")
        zero = op.convert(constant([n, k // GROUP, 1]), "f16")
        scales = op.constant(rng.random((n, k // GROUP, 1), np.float32).astype(np.float16))
        scaled = op.multiply(op.subtract(weight, zero), scales)
        flat = op.reshape(scaled, op.constant(np.array([n, k], np.int64)), special_zero=False)
        results.append(op.matmul(x, op.convert(flat, "f32"), False, True))
    settings = {
        "INFERENCE_NUM_THREADS": str(case.threads),
        "NUM_STREAMS": "1",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.compile_model(ov.Model(results, [x]), "CPU", settings).create_infer_request()
    kept.clear()  # compiling has repacked them
    feed = np.random.default_rng(1).standard_normal((case.batch, k), np.float32)
    return System(copies, size, lambda: request.infer([feed]))


def measure_as(system: str, case: Case, log: Path) -> Callable[[], dict[str, Any]]:
    """What a side's process does in its turn."""
    if system == BOUNDS:
        return Bounds(case.threads).measure
    if system == OURS:
        return ours(case, log).measure
    return {ORT: ort, OPENVINO: openvino}[system](case).measure


def systems(bits: int) -> Iterator[str]:
    """Those that have products with so many bits a weight here."""
    yield OURS
    if bits in (2, 4, 8):
        yield ORT
    if bits in (4, 8) and importlib.util.find_spec("openvino"):
        yield OPENVINO


def compare(case: Case, rounds: int, log: Path) -> Iterator[dict[str, Any]]:
    """A row a system, with its time over ours."""
    bits = FORMATS[case.format].bits
    with ExitStack() as stack:
        bounds, *sides = (
            stack.enter_context(
                Side(system, sys.executable, __file__, [system, json.dumps(asdict(case)), str(log)])
            )
            for system in (BOUNDS, *systems(bits))
        )
        take_turns([bounds, *sides], rounds)
    operations = 2 * case.batch * case.rows * case.columns
    ours_us = [found["us"] for found in sides[0].found]
    for side in sides:
        size = side.found[0]["weight_bytes"]
        # Ratios are of what ran in the same round: the machine is not the same in all.
        turns = list(zip((found["us"] for found in side.found), bounds.found, strict=True))
        us = statistics.median(us for us, _ in turns)
        yield {
            "system": side.system,
            "bits": bits,
            "shape": f"{case.rows}x{case.columns}",
            "rows": case.batch,
            "threads": case.threads,
            "us": us,
            "gb_per_s": size / us / 1e3,
            "fraction_of_read_bandwidth": statistics.median(
                size / us * 1e6 / bound["read_bandwidth"] for us, bound in turns
            ),
            "fraction_of_peak": statistics.median(
                operations / us * 1e6 / (bound["peak"] or math.nan) for us, bound in turns
            ),
            "read_bandwidth": statistics.median(found["read_bandwidth"] for found in bounds.found),
            "time_over_ours": statistics.median(
                us / ours for (us, _), ours in zip(turns, ours_us, strict=True)
            ),
        }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows for the eye."""
    print("shape        rows threads bits system            us   GB/s  of read  of peak  time/ours")
    for row in rows:
        print(
            f"{row['shape']:12} {row['rows']:4} {row['threads']:7} {row['bits']:4} "
            f"{row['system']:11} {row['us']:8.0f} {row['gb_per_s']:6.1f} "
            f"{row['fraction_of_read_bandwidth']:7.0%} {row['fraction_of_peak']:8.0%} "
            f"{row['time_over_ours']:10.2f}"
        )


def curves(rows: Sequence[dict[str, Any]]) -> str:
    """Speed against bits for one activation row, and what the read bandwidth lets through.

    A line a system and number of threads, the geometric mean over shapes; the bound counts our 0.75
    bits of scales and zero-points.
    """
    points: dict[tuple[str, int], dict[int, list[float]]] = {}
    for row in rows:
        if row["rows"] == 1:
            n, k = map(int, row["shape"].split("x"))
            key = row["system"], row["threads"]
            points.setdefault(key, {}).setdefault(row["bits"], []).append(n * k / row["us"] / 1e3)
            bound = row["read_bandwidth"] / 1e9 * 8 / (row["bits"] + 0.75)
            key = "read bandwidth", row["threads"]
            points.setdefault(key, {}).setdefault(row["bits"], []).append(bound)
    series = [
        Series(
            system,
            f"{threads} threads",
            [(bits, statistics.geometric_mean(found), "") for bits, found in by_bits.items()],
        )
        for (system, threads), by_bits in points.items()
    ]
    return plot(series, "Products with one row", "bits of a code", "billions of weights a second")


def main() -> None:
    """Compare at every shape, width, number of rows and threads."""
    if sys.argv[1:2] == [SERVE]:
        system, arguments, log = sys.argv[2:]
        return serve(measure_as(system, Case(**json.loads(arguments)), Path(log)))
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="(default: %(default)s)")
    parser.add_argument("--bits", default="1,2,3,4,5,6,8", help="(default: %(default)s)")
    parser.add_argument("--rows", default="1,128", help="of activations (default: %(default)s)")
    parser.add_argument("-t", "--threads", default="1,2", help="(default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--log", type=Path, default=user_folder(), help="of tuning records")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    by_bits = {str(fmt.bits): name for name, fmt in FORMATS.items() if name == f"int{fmt.bits}"}
    rows: list[dict[str, Any]] = []
    for threads in map(int, args.threads.split(",")):
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            for batch in map(int, args.rows.split(",")):
                for bits in args.bits.split(","):
                    case = Case(by_bits[bits], n, k, batch, threads)
                    rows += compare(case, args.rounds, args.log)
    if args.plot:
        args.plot.write_text(curves(rows))
    return print(json.dumps(rows, indent=1)) if args.json else show(rows)


if __name__ == "__main__":
    main()
