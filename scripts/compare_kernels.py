"""Compare matrix product kernels: ours, onnxruntime's MatMulNBits and OpenVINO's, in one run.

All have int8 activations and groups of 32 weights that share a scale. A measurement is a program of
products with copies of a weight, more than caches hold, so that every product streams its weight
from memory; what a product takes is the time of the program over the copies. Systems take turns,
after a pause for the threads of the last one to fall asleep, and the median counts. The bounds are
measured between them, with the same threads.

onnxruntime has 2, 4 and 8 bits, OpenVINO 4 and 8; OpenVINO is left out where it is not installed.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime
import tvm

from mxcompile import roofline, runtime, target, tune
from mxcompile.formats import FORMATS, GROUP
from mxcompile.knobs import Choice, choose
from mxcompile.records import Case, load, user_folder
from mxcompile.targets.cpu_matmul import Knobs

OURS, ORT, OPENVINO = "mxcompile", "onnxruntime", "openvino"
SHAPES: Final = "4096x4096,11008x4096,262144x640"
PAUSE: Final = 0.02
PROGRAM_SECONDS: Final = 0.1


@dataclass
class System:
    """A side: a program of ``copies`` products, and what it took."""

    name: str
    case: Case
    copies: int
    weight_bytes: int
    run: Callable[[], object]
    us: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        """Measure once."""
        time.sleep(PAUSE)
        start = time.perf_counter()
        self.run()
        self.us.append(1e6 * (time.perf_counter() - start) / self.copies)


def copies_of(size: int, batch: int) -> int:
    """Enough to stream from memory; a few for many rows, whose time is not in the weights."""
    return max(1, -(-tune.STREAM_BYTES // size)) if batch == 1 else 2


def ours(case: Case, choice: Choice) -> System:
    """The kernels of this repository, as programs have them."""
    size = tune.weight_bytes(case)
    copies = copies_of(size, case.batch)
    kernel_knobs = dict(choice.knobs(case.rows, case.columns)).get(case.format, Knobs())
    where = target.find("x86")
    machine = tune.load(tune.program(case, kernel_knobs, where, copies), where)
    inputs = [tvm.runtime.tensor(array) for array in tune.inputs(case, copies)]
    return System(OURS, case, copies, size, lambda: machine["main"](*inputs))


def ort(case: Case) -> System | None:
    """MatMulNBits with int8 activations (accuracy level 4), asymmetric as our formats are."""
    bits = FORMATS[case.format].bits
    if bits not in (2, 4, 8):
        return None
    n, k = case.rows, case.columns
    blocks = k // GROUP
    data = np.random.default_rng(0).integers(0, 256, (n, blocks, GROUP * bits // 8), np.uint8)
    scales = np.full((n, blocks), 0.01, np.float32)
    zeros = np.full((n, -(-blocks * bits // 8)), 0x88 if bits > 2 else 0xAA, np.uint8)
    size = data.nbytes + scales.nbytes + zeros.nbytes
    copies = copies_of(size, case.batch)
    arrays: dict[str, np.ndarray] = {"w": data, "s": scales, "z": zeros}
    nodes, tensors = [], list[onnx.TensorProto]()
    for i in range(copies):
        names = [f"{name}{i}" for name in arrays]
        tensors += map(onnx.numpy_helper.from_array, arrays.values(), names)
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
    return System(ORT, case, copies, size, lambda: session.run(None, feed))


def openvino(case: Case) -> System | None:
    """A decompressed constant and a MatMul, which OpenVINO fuses, with int8 activations."""
    bits = FORMATS[case.format].bits
    if bits not in (4, 8):
        return None
    try:
        import openvino as ov
        from openvino import opset13 as op
    except ModuleNotFoundError:
        return None
    n, k = case.rows, case.columns
    kind = {4: ov.Type.u4, 8: ov.Type.u8}[bits]
    data = np.random.default_rng(0).integers(0, 256, n * k * bits // 8, np.uint8)
    zeros = np.full(n * (k // GROUP) * bits // 8, 0x88, np.uint8)
    scales = np.full((n, k // GROUP, 1), 0.01, np.float16)
    size = data.nbytes + zeros.nbytes + scales.nbytes
    copies = copies_of(size, case.batch)
    x = op.parameter([case.batch, k], np.float32)

    def constant(array: np.ndarray, shape: list[int]) -> Any:
        if bits == 8:
            return op.constant(array.reshape(shape))
        return op.constant(ov.Tensor(array, ov.Shape(shape), kind))

    results = []
    for _ in range(copies):
        weight = op.convert(constant(data.copy(), [n, k // GROUP, GROUP]), "f16")
        zero = op.convert(constant(zeros.copy(), [n, k // GROUP, 1]), "f16")
        scaled = op.multiply(op.subtract(weight, zero), op.constant(scales.copy()))
        flat = op.reshape(scaled, op.constant(np.array([n, k], np.int64)), special_zero=False)
        results.append(op.matmul(x, op.convert(flat, "f32"), False, True))
    settings = {
        "INFERENCE_NUM_THREADS": str(case.threads),
        "NUM_STREAMS": "1",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.compile_model(ov.Model(results, [x]), "CPU", settings).create_infer_request()
    feed = np.random.default_rng(1).standard_normal((case.batch, k), np.float32)
    return System(OPENVINO, case, copies, size, lambda: request.infer([feed]))


def compare(case: Case, rounds: int, choice: Choice) -> Iterator[dict[str, Any]]:
    """A row a system, ours with its speed over the others'."""
    runtime.set_threads(case.threads)
    systems = [s for s in (ours(case, choice), ort(case), openvino(case)) if s is not None]
    for system in systems:
        system.run()
    bounds = []
    for turn in range(rounds):
        bounds.append(roofline.measure(case.threads))
        for system in systems if turn % 2 else systems[::-1]:
            system.take_turn()
    bandwidth = max(bound.read_bandwidth for bound in bounds)
    peak = max(bound.peak or math.nan for bound in bounds)
    best = systems[0]
    for system in systems:
        us = statistics.median(system.us)
        operations = 2 * case.batch * case.rows * case.columns
        ratios = [b / a for a, b in zip(best.us, system.us, strict=True)]
        yield {
            "system": system.name,
            "bits": FORMATS[case.format].bits,
            "shape": f"{case.rows}x{case.columns}",
            "rows": case.batch,
            "threads": case.threads,
            "us": us,
            "best_us": min(system.us),
            "gb_per_s": system.weight_bytes / us / 1e3,
            "fraction_of_read_bandwidth": system.weight_bytes / us * 1e6 / bandwidth,
            "fraction_of_peak": operations / us * 1e6 / peak,
            "read_bandwidth": bandwidth,
            "time_over_ours": statistics.median(ratios),
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


COLOURS: Final = {OURS: "#c0392b", ORT: "#2c6fbb", OPENVINO: "#2e8b57"}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed against bits for one row, as SVG: products a second, and what the bound lets through.

    A line a system, the geometric mean over shapes; the dashed line is the read bandwidth over the
    bytes of a weight at our 0.75 bits of scales and zero-points.
    """
    width, height, left, bottom = 640, 400, 70, 50
    single = [row for row in rows if row["rows"] == 1]
    threads = max((row["threads"] for row in single), default=1)
    single = [row for row in single if row["threads"] == threads]

    def rate(row: dict[str, Any]) -> float:
        n, k = map(int, row["shape"].split("x"))
        return float(n * k / row["us"] / 1e3)  # billions of weights a second

    bits = sorted({row["bits"] for row in single})
    bound = statistics.median(row["read_bandwidth"] for row in single)
    lines = {"read bandwidth": [(b, bound / 1e9 * 8 / (b + 0.75)) for b in bits]}
    for name in COLOURS:
        points = []
        for b in bits:
            rates = [rate(r) for r in single if r["system"] == name and r["bits"] == b]
            if rates:
                points.append((b, statistics.geometric_mean(rates)))
        lines[name] = points
    top = max((y for points in lines.values() for _, y in points), default=1) * 1.05

    def place(b: float, y: float) -> tuple[float, float]:
        across = left + (b - 1.5) / 7 * (width - left - 20)
        return across, height - bottom - y / top * (height - bottom - 20)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">bits of a code</text>',
        f'<text transform="translate(15 {height / 2}) rotate(-90)" text-anchor="middle">'
        f"billions of weights a second, one row, {threads} threads</text>",
    ]
    for b in bits:
        x, y = place(b, 0)
        out.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{b}</text>')
    for step in range(6):
        x, y = place(1.5, top * step / 5)
        out.append(f'<path d="M{x:.0f} {y:.0f}H{width - 20}" stroke="#ddd"/>')
        out.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{top * step / 5:.0f}')
        out.append("</text>")
    for index, (name, points) in enumerate(lines.items()):
        colour = COLOURS.get(name, "#555")
        dash = "" if name in COLOURS else ' stroke-dasharray="6 4"'
        path_text = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        out.append(f'<polyline points="{path_text}" fill="none" stroke="{colour}"{dash}/>')
        if points:
            out.append(
                f'<text x="{width - 150}" y="{40 + 16 * index}" fill="{colour}">{name}</text>'
            )
    path.write_text("\n".join([*out, "</svg>"]))


def main() -> None:
    """Compare at every shape, width, number of rows and threads."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="(default: %(default)s)")
    parser.add_argument("--bits", default="2,3,4,5,6,8", help="(default: %(default)s)")
    parser.add_argument("--rows", default="1,128", help="of activations (default: %(default)s)")
    parser.add_argument("-t", "--threads", default="1,2", help="(default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--log", type=Path, default=user_folder(), help="of tuning records")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    by_bits = {str(fmt.bits): name for name, fmt in FORMATS.items() if name == f"int{fmt.bits}"}
    records = load(args.log)
    rows: list[dict[str, Any]] = []
    for threads in map(int, args.threads.split(",")):
        choice = choose(records, threads)
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            for batch in map(int, args.rows.split(",")):
                for bits in args.bits.split(","):
                    case = Case(by_bits[bits], n, k, batch, threads)
                    rows += compare(case, args.rounds, choice)
    if args.plot:
        plot(rows, args.plot)
    return print(json.dumps(rows, indent=1)) if args.json else show(rows)


if __name__ == "__main__":
    main()
