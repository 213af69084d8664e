"""Measure the CUDA kernels, and artifacts, on this machine's GPU; prints JSON.

GEMV: one row of int8 activations against packed weights. As in a decode step the kernels are
launched as one CUDA graph, over as many matrices of a shape as no cache holds; a kernel's time is
the graph's over their number. Its bytes over the time are given as shares of what a copy moves
(bytes read and written) and of what a plain kernel reads, both of the same run.
``--artifact`` measures an artifact for this GPU end to end as ``mxcompile bench`` does, with decode
steps as CUDA graphs and, to compare with, without; ``--x86`` one of the same model for this
machine's CPU, with ``--threads``. ``--torch HF_DIR`` measures a model of the same shapes in fp16,
decoded by steps that torch compiles and that are replayed as one CUDA graph, where torch has CUDA.

Without a GPU it says so and exits with 6.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from mxcompile import gpu

SHAPES: Final = ((4096, 4096), (14336, 4096), (4096, 14336), (262144, 640))
"""Rows and columns: an attention output, an MLP's two halves, and a head."""

FORMATS: Final = ("int8", "int4", "int3", "int2", "int1")

NO_DEVICE: Final = 6
REPEATS: Final = 15
UNCACHED: Final = 1 << 28
"""Bytes of matrices: several times any GPU's cache."""

_READ: Final = """
extern "C" __global__ void read_all(const uint4* x, unsigned long long n, unsigned* y) {
  uint4 a = {0, 0, 0, 0};
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    const uint4 b = __ldcs(x + i), c = __ldcs(x + i + step);
    const uint4 d = __ldcs(x + i + 2 * step), e = __ldcs(x + i + 3 * step);
    a.x ^= b.x ^ c.y ^ d.z ^ e.w;
    a.y ^= b.y ^ c.z ^ d.w ^ e.x;
  }
  if (a.x == 0x12345 && a.y == 0x6789) *y = a.z;
}
"""


class Timer:
    """Times work of TVM's stream that is recorded as a CUDA graph."""

    def __init__(self, device: Any) -> None:
        gpu.load_tvm_runtime()
        self._runtime = ctypes.CDLL("libcudart.so.13")
        self._device, self._stream = device, ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(self._stream))
        device.set_raw_stream(self._stream.value)

    def seconds(self, enqueue: Callable[[], None]) -> float:
        """The median time of a launch of what ``enqueue`` launches."""
        stream, graph, program = self._stream, ctypes.c_void_p(), ctypes.c_void_p()
        enqueue()  # loads the kernels
        self._device.sync(stream.value)
        relaxed = 2
        self._call("cudaStreamBeginCapture", stream, relaxed)
        enqueue()
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiate", ctypes.byref(program), graph, ctypes.c_ulonglong(0))
        start, end = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (start, end):
            self._call("cudaEventCreate", ctypes.byref(event))
        spent, elapsed = [], ctypes.c_float()
        for _ in range(REPEATS):
            self._call("cudaEventRecord", start, stream)
            self._call("cudaGraphLaunch", program, stream)
            self._call("cudaEventRecord", end, stream)
            self._call("cudaEventSynchronize", end)
            self._call("cudaEventElapsedTime", ctypes.byref(elapsed), start, end)
            spent.append(elapsed.value / 1000)
        self._call("cudaGraphExecDestroy", program)
        self._call("cudaGraphDestroy", graph)
        return statistics.median(spent)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._runtime, name)(*arguments):
            raise RuntimeError(f"{name} failed with status {status}")


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
    return built["matmul"], tvm.cuda()


def bandwidths(device: Any) -> dict[str, float]:
    """Bytes a second that a copy within the GPU's memory moves, and that a kernel reads."""
    import numpy as np
    import tvm

    size, rates = 1 << 30, []
    source = tvm.runtime.tensor(np.zeros(size, np.uint8), device)
    target = tvm.runtime.empty(source.shape, "uint8", device)
    for _ in range(REPEATS):
        device.sync()
        start = time.perf_counter()
        for _ in range(8):
            source.copyto(target)
        device.sync()
        rates.append(8 * 2 * size / (time.perf_counter() - start))
    return {"copy_bytes_per_s": statistics.median(rates), "read_bytes_per_s": read_rate(source)}


def read_rate(source: Any) -> float:
    """Bytes a second of a kernel that only reads."""
    from mxcompile.targets import cuda_binary

    driver = ctypes.CDLL("libcuda.so.1")
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    binary = cuda_binary.cubin(_READ, f"sm_{gpu.capability()}")
    driver.cuModuleLoadData(ctypes.byref(library), binary)
    driver.cuModuleGetFunction(ctypes.byref(kernel), library, b"read_all")
    size = int(source.shape[0])
    values = (
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_ulonglong(size // 16),
        ctypes.c_void_p(source.data_ptr()),
    )
    arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(v) for v in values))
    spent = []
    for _ in range(REPEATS):
        driver.cuCtxSynchronize()
        start = time.perf_counter()
        for _ in range(8):
            if driver.cuLaunchKernel(kernel, 2112, 1, 1, 512, 1, 1, 0, None, arguments, None):
                raise RuntimeError("the kernel that reads memory does not start")
        driver.cuCtxSynchronize()
        spent.append((time.perf_counter() - start) / 8)
    return size / statistics.median(spent)


def gemv(
    matmul: Any, timer: Timer, device: Any, rows: int, columns: int, fmt: str, rates: Any
) -> Any:
    """Time one shape in one format."""
    import numpy as np
    import tvm

    from mxcompile.formats import ACTIVATION_FORMATS, MIDDLE, groups
    from mxcompile.formats import FORMATS as KNOWN
    from mxcompile.plan import ROW_TILE, TileFormats
    from mxcompile.targets import packing
    from mxcompile.targets.cpu_matmul import activation_bytes

    rng = np.random.default_rng(0)
    codes = rng.integers(0, KNOWN[fmt].levels, (ROW_TILE, columns), dtype=np.uint8)
    sides = np.full((ROW_TILE, groups(columns)), MIDDLE, np.uint8)
    ones = np.ones(ROW_TILE, np.float16)
    tile = packing.pack(codes, sides, sides, ones, TileFormats.parse(fmt))
    tiles = -(-rows // ROW_TILE)
    data, table = np.tile(tile.data, tiles), np.repeat(tile.table, tiles, axis=0)
    table[:, 1] += np.arange(tiles, dtype=np.int32) * (tile.data.nbytes // packing.VECTOR)
    records = np.zeros((1, activation_bytes(columns, ACTIVATION_FORMATS["int8"])), np.int8)
    matrices = [tvm.runtime.tensor(data, device) for _ in range(max(4, UNCACHED // data.nbytes))]
    records, table = (tvm.runtime.tensor(x, device) for x in (records, table))
    output = tvm.runtime.empty((1, rows), "float32", device)

    def enqueue() -> None:
        for matrix in matrices:
            matmul(records, matrix, table, output)

    seconds = timer.seconds(enqueue) / len(matrices)
    rate = data.nbytes / seconds
    return {
        "rows": rows,
        "columns": columns,
        "format": fmt,
        "microseconds": 1e6 * seconds,
        "bytes_per_s": rate,
        "share_of_copy": rate / rates["copy_bytes_per_s"],
        "share_of_read": rate / rates["read_bytes_per_s"],
    }


def rate(folder: Path, threads: int = 1, *, graphs: bool = True) -> Any:
    """Tokens a second of an artifact."""
    from mxcompile.bench import bench

    rows = bench(folder, prompt=256, generate=64, threads=[threads], repetitions=5, graphs=graphs)
    return {row["test"]: row["tokens_per_s"] for row in rows}


def torch_rate(folder: Path) -> Any:
    """Tokens a second of a model of a configuration's shapes in fp16; its weights are random.

    A step is compiled, and it and the choice of its token are replayed as one CUDA graph: nothing
    of Python, and nothing that crosses the bus, is measured.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    if not torch.cuda.is_available():
        return None
    config, context, prompt, count = AutoConfig.from_pretrained(folder), 512, 256, 64
    if getattr(config, "sliding_window", None):  # the whole context lies within a window
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.set_grad_enabled(False)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
        cache = StaticCache(config=config, max_cache_len=context)
        tokens, at = torch.randint(100, 1000, (1, prompt)), torch.tensor([prompt])

    def step(ids: Any, position: Any) -> Any:
        place = {"cache_position": position, "position_ids": position[None]}
        logits = model(ids, past_key_values=cache, use_cache=True, **place).logits
        return logits[:, -1:].argmax(-1)

    token, compiled = step(tokens, torch.arange(prompt, device="cuda")), torch.compile(step)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            token.copy_(compiled(token, at))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(compiled(token, at))
        at += 1
    rates = []
    for _ in range(REPEATS):
        at.fill_(prompt)
        cache.reset()  # it counts steps too
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - start))
    return {f"tg{count}": statistics.median(rates)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--artifact", type=Path, help="an artifact for this GPU")
    parser.add_argument("--x86", type=Path, help="an artifact of the same model for this CPU")
    parser.add_argument("--threads", type=int, default=1, help="threads of the latter")
    parser.add_argument("--torch", type=Path, help="the folder of the model's config.json")
    parser.add_argument("--no-kernels", action="store_true", help="measure no kernels")
    args = parser.parse_args(arguments)
    if not gpu.features():
        print("no CUDA device that targets are shipped for: nothing is measured", file=sys.stderr)
        return NO_DEVICE
    report: dict[str, Any] = {"compute_capability": gpu.capability() / 10}
    if not args.no_kernels:
        report |= measure_kernels()
    if args.artifact is not None:
        report["cuda"] = rate(args.artifact)
        report["cuda_without_graphs"] = rate(args.artifact, graphs=False)
    if args.x86 is not None:
        report["x86"] = rate(args.x86, args.threads)
    if args.torch is not None:
        report["torch_fp16"] = torch_rate(args.torch)
    print(json.dumps(report, indent=1))
    return 0


def measure_kernels() -> dict[str, Any]:
    """The GEMV over shapes and formats, and what bounds it."""
    matmul, device = kernels()
    rates, timer = bandwidths(device), Timer(device)
    return {
        "device": device.device_name,
        **rates,
        "gemv": [
            gemv(matmul, timer, device, rows, columns, fmt, rates)
            for rows, columns in SHAPES
            for fmt in FORMATS
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
