"""What a decode step's kernels take on this machine as they are, without tuning.

A roofline knows neither how near a kernel comes to it nor what stands between two products. So all
layouts are timed on a weight larger than caches, and a chain of what a layer is made of (norm,
rounded activations, product, residual) on as many weights: what it takes more than its bytes is the
price of its calls, with caches as cold as in a model. Results as wide as a vocabulary are worth a
price of their own: to put them in another order.
"""

from typing import Any, Final

import numpy as np
import tvm
from tvm import relax

from mxcompile import lower, runtime, tune
from mxcompile.formats import ACTIVATION_FORMATS, FORMATS, ActivationFormat
from mxcompile.latency import Survey
from mxcompile.plan import ROW_TILE, tile_bytes
from mxcompile.records import representative
from mxcompile.target import Target
from mxcompile.targets import cpu_norm, packing
from mxcompile.targets.cpu_matmul import MatmulKernel, activation_bytes

CHAIN: Final = "int4"
"""The format of the chain's weights."""

LINK: Final = 4
"""Kernels for each weight of the chain."""

REPEATS: Final = 12

WIDE: Final = 1 << 14
"""Numbers in a row of results that make an operator on it more than a call."""

_VOCABULARY: Final = 1 << 18

INT8: Final = ACTIVATION_FORMATS["int8"]


def survey(target: Target, threads: int, width: int) -> Survey:
    """Time the kernels on so many threads of this machine; takes some ten seconds.

    Args:
        target: What kernels are compiled for.
        threads: How many they run on.
        width: Columns of all weights, and rows of those in the chain: as most of a model has them.

    Raises:
        UsageError: this machine cannot run the target's kernels.
    """
    tune.check_host(target)
    runtime.set_threads(threads)
    layouts = sorted(set(map(representative, FORMATS.values())))
    link_bytes = -(-width // ROW_TILE) * tile_bytes(width, FORMATS[CHAIN])
    links = tune.STREAM_BYTES // link_bytes
    vm = tune.load(_module(target, layouts, width, link_bytes, links), target)
    data = tvm.runtime.tensor(np.ones(tune.STREAM_BYTES, np.uint8))
    rates = {}
    for name in layouts:
        size = tile_bytes(width, FORMATS[name])
        tiles = tune.STREAM_BYTES // size
        table = tvm.runtime.tensor(packing.tile_table([FORMATS[name]] * tiles, width))
        for fmt in ACTIVATION_FORMATS.values():
            codes = tvm.runtime.tensor(np.ones((1, activation_bytes(width, fmt)), np.int8))
            taken = _seconds(vm, f"read_{fmt}", codes, data, table)
            rates[name, str(fmt)] = taken / (tiles * size)
    weights = [tvm.runtime.tensor(np.ones(link_bytes, np.uint8)) for _ in range(links)]
    row = tvm.runtime.tensor(np.ones((1, 1, width), np.float32))
    gain = tvm.runtime.tensor(np.ones(width, np.float32))
    table = tvm.runtime.tensor(packing.tile_table([FORMATS[CHAIN]] * -(-width // ROW_TILE), width))
    taken = _seconds(vm, "chain", row, gain, table, *weights)
    streamed = rates[CHAIN, str(INT8)] * links * link_bytes
    order = np.random.default_rng(0).permutation(_VOCABULARY).astype(np.int32)
    results = tvm.runtime.tensor(np.ones((1, _VOCABULARY), np.float32))
    moved = _seconds(vm, "move", results, tvm.runtime.tensor(order))
    return Survey(rates, max(taken - streamed, 0.0) / (LINK * links), moved / _VOCABULARY)


def _seconds(vm: Any, function: str, *arguments: Any) -> float:
    """The least of some runs: whatever else the machine does only adds to it."""
    evaluator = vm.time_evaluator(function, tvm.cpu(), number=1, repeat=REPEATS)
    return float(min(evaluator(*arguments).results))


def _module(target: Target, layouts: list[str], width: int, link_bytes: int, links: int) -> Any:
    """Relax functions for ``survey``.

    They are ``read_FORMAT(codes, weight, table)`` for each format of activations, ``chain(x, gain,
    table, *weights)`` and ``move(results, order)``.

    Sizes are unknown when they are compiled, as in a model's program.
    """
    kernel = MatmulKernel(target.instructions, formats=tuple(layouts))  # type: ignore[arg-type]
    bb = relax.BlockBuilder()

    def size(name: str) -> Any:
        return tvm.tirx.Var(name, "int64")

    def kernels(fmt: ActivationFormat) -> tuple[Any, Any]:
        quantize, product = kernel.quantize_activation(fmt), kernel.matmul_quantized(fmt)
        return (
            bb.add_func(lower.rooted(quantize), f"quantize_{fmt}"),
            bb.add_func(lower.rooted(product), f"product_{fmt}"),
        )

    by_format = {fmt: kernels(fmt) for fmt in ACTIVATION_FORMATS.values()}
    for fmt, (_, product) in by_format.items():
        tiles = size("tiles")
        codes = relax.Var("codes", relax.TensorType((1, activation_bytes(width, fmt)), "int8"))
        weight = relax.Var("weight", relax.TensorType((size("bytes"),), "uint8"))
        table = relax.Var("table", relax.TensorType((tiles, 3), "int32"))
        out = relax.TensorType((1, tiles * ROW_TILE), "float32")
        with bb.function(f"read_{fmt}", [codes, weight, table]):
            with bb.dataflow():
                found = bb.emit_output(relax.call_tir(product, [codes, weight, table], out))
            bb.emit_func_output(found)
    norm = cpu_norm.rms_norm(cpu_norm.Runs(width), 1e-6, cpu_norm.Simd())
    norm = bb.add_func(lower.rooted(norm), "norm")
    quantize, product = by_format[INT8]
    seq = size("seq")
    row, flat = (relax.TensorType((*lead, width), "float32") for lead in ((1, seq), (seq,)))
    rounded = relax.TensorType((seq, activation_bytes(width, INT8)), "int8")
    x = relax.Var("x", row)
    gain = relax.Var("gain", relax.TensorType((width,), "float32"))
    table = relax.Var("table", relax.TensorType((-(-width // ROW_TILE), 3), "int32"))
    link = relax.TensorType((link_bytes,), "uint8")
    weights = [relax.Var(f"weight{i}", link) for i in range(links)]
    with bb.function("chain", [x, gain, table, *weights]):
        with bb.dataflow():
            value: Any = x
            for weight in weights:
                y = bb.emit(relax.call_tir(norm, [value, gain], row))
                y = bb.emit(relax.op.reshape(y, (seq, width)))
                y = bb.emit(relax.call_tir(quantize, [y], rounded))
                y = bb.emit(relax.call_tir(product, [y, weight, table], flat))
                y = bb.emit(relax.op.reshape(y, (1, seq, width)))
                value = bb.emit(relax.op.add(value, y))
            value = bb.emit_output(value)
        bb.emit_func_output(value)
    results = relax.Var("results", relax.TensorType((size("rows"), _VOCABULARY), "float32"))
    order = relax.Var("order", relax.TensorType((_VOCABULARY,), "int32"))
    with bb.function("move", [results, order]):
        with bb.dataflow():
            found = bb.emit_output(relax.op.take(results, order, axis=1, mode="clip"))
        bb.emit_func_output(found)
    return bb.finalize()
