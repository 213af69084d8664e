"""Measure the CUDA kernels, and artifacts, on this machine's GPU; prints JSON.

GEMV: one row of int8 activations against packed weights, with the weights' bytes over the time as a
share of the copy bandwidth that the same run measures. Caches are flushed before each repetition.
``--artifact`` measures an artifact for this GPU end to end as ``mxcompile bench`` does, with decode
steps as CUDA graphs and, to compare with, without; ``--x86`` one of the same model for this
machine's CPU. ``--torch HF_DIR`` measures the model in fp16 with transformers' compiled decoding,
where torch has CUDA.

Without a GPU it says so and exits with 6.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from mxcompile import gpu

SHAPES: Final = ((4096, 4096), (14336, 4096), (4096, 14336), (16384, 16384))
"""Rows and columns: an attention output, an MLP's two halves, and one that no cache holds."""

NO_DEVICE: Final = 6
REPEATS: Final = 30
FLUSH: Final = 1 << 29
"""Bytes written between repetitions: more than any GPU's cache."""


def kernels() -> tuple[Any, Any]:
    """The matrix product for this GPU, and the device."""
    import tvm

    from mxcompile import target
    from mxcompile.formats import ACTIVATION_FORMATS
    from mxcompile.targets import cuda_binary, cuda_schedule
    from mxcompile.targets.cuda_matmul import CudaMatmul

    where = target.find("cuda")
    function = CudaMatmul().matmul_quantized(ACTIVATION_FORMATS["int8"])
    module = tvm.IRModule({"matmul": function.with_attr("global_symbol", "matmul")})
    tvm_target = tvm.target.Target(dict(where.tvm))
    with tvm_target, cuda_binary.embedding(str(where.tvm["arch"])):
        built = tvm.tirx.build(module, target=tvm_target, pipeline=cuda_schedule.pipeline())
    return built, tvm.cuda()


def copy_bandwidth(device: Any) -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes."""
    import numpy as np
    import tvm

    source = tvm.runtime.tensor(np.zeros(1 << 29, np.uint8), device)
    target = tvm.runtime.empty(source.shape, "uint8", device)
    rates = []
    for _ in range(REPEATS):
        device.sync()
        start = time.perf_counter()
        for _ in range(8):
            source.copyto(target)
        device.sync()
        rates.append(8 * 2 * (1 << 29) / (time.perf_counter() - start))
    return statistics.median(rates)


def gemv(built: Any, device: Any, rows: int, columns: int, fmt: str, bandwidth: float) -> Any:
    """Time one matrix in one format."""
    import numpy as np
    import tvm

    from mxcompile.formats import ACTIVATION_FORMATS, FORMATS, groups
    from mxcompile.plan import ROW_TILE, TileFormats
    from mxcompile.targets import packing
    from mxcompile.targets.cpu_matmul import activation_bytes

    rng = np.random.default_rng(0)
    codes = rng.integers(0, FORMATS[fmt].levels, (rows, columns), dtype=np.uint8)
    sides = rng.integers(0, 16, (rows, groups(columns)), dtype=np.uint8)
    formats = TileFormats.parse(f"{fmt}*{-(-rows // ROW_TILE)}")
    packed = packing.pack(codes, sides, sides, np.ones(rows, np.float16), formats)
    records = np.zeros((1, activation_bytes(columns, ACTIVATION_FORMATS["int8"])), np.int8)
    arguments = [tvm.runtime.tensor(x, device) for x in (records, packed.data, packed.table)]
    output = tvm.runtime.empty((1, rows), "float32", device)
    timer = built.time_evaluator(
        "matmul", device, number=1, repeat=REPEATS, cache_flush_bytes=FLUSH
    )
    seconds = statistics.median(timer(*arguments, output).results)
    rate = packed.data.nbytes / seconds
    return {
        "rows": rows,
        "columns": columns,
        "format": fmt,
        "microseconds": 1e6 * seconds,
        "bytes_per_s": rate,
        "share_of_copy": rate / bandwidth,
    }


def decode_rate(folder: Path, *, graphs: bool = True) -> Any:
    """Tokens a second of an artifact."""
    from mxcompile.bench import bench

    rows = bench(folder, prompt=256, generate=64, threads=[1], repetitions=5, graphs=graphs)
    return {row["test"]: row["tokens_per_s"] for row in rows}


def torch_rate(folder: Path) -> Any:
    """Tokens a second of the model in fp16, decoded by compiled steps over a static cache."""
    import torch
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).cuda()
    tokens = torch.randint(100, 1000, (1, 8), device="cuda")
    seconds = []
    for _ in range(4):  # the first ones compile
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            tokens,
            min_new_tokens=64,
            max_new_tokens=64,
            do_sample=False,
            cache_implementation="static",
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"tg64": 64 / min(seconds)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--artifact", type=Path, help="an artifact for this GPU")
    parser.add_argument("--x86", type=Path, help="an artifact of the same model for this CPU")
    parser.add_argument("--torch", type=Path, help="the model's Hugging Face folder")
    args = parser.parse_args(arguments)
    if not gpu.features():
        print("no CUDA device that targets are shipped for: nothing is measured", file=sys.stderr)
        return NO_DEVICE
    built, device = kernels()
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {
        "device": device.device_name,
        "compute_capability": gpu.capability() / 10,
        "copy_bytes_per_s": bandwidth,
        "gemv": [
            gemv(built, device, rows, columns, fmt, bandwidth)
            for rows, columns in SHAPES
            for fmt in ("int8", "int4", "int3", "int2", "int1")
        ],
    }
    for name, folder, measure in (
        ("cuda", args.artifact, decode_rate),
        ("cuda_without_graphs", args.artifact, partial(decode_rate, graphs=False)),
        ("x86", args.x86, decode_rate),
        ("torch_fp16", args.torch, torch_rate),
    ):
        if folder is not None:
            report[name] = measure(folder)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
