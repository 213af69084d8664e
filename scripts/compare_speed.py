"""Compare an artifact's speed with other runtimes' on the same model, in one run.

Each side lives in a process of its own and they take turns, a prompt and a generation each; what
counts is the median of the ratios within a round. Every peer runs as fast as it can: llama.cpp
built for this machine, weights mapped, flash attention where that is faster; onnxruntime and
OpenVINO with int4 weights and int8 activations, as ``peer_models.py`` writes them. Peers are no
dependencies of mxcompile. For llama.cpp, built for this machine::

    python3 -m venv build/llama
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON" build/llama/bin/pip install llama-cpp-python

This file is read by all interpreters; at the top it imports the standard library only.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from sides import SERVE, Side, peak_rss, serve, take_turns

OURS, OTHER, LLAMA = "mxcompile", "other", "llama.cpp"
ORT, OPENVINO = "onnxruntime", "openvino"

Feed = Callable[[Sequence[int]], None]
Opened = tuple[int, Callable[[], None], Feed]
"""A model: its vocabulary, what empties its context, and what feeds it tokens."""


def measurement(side: Opened, prompt: int, generate: int) -> Callable[[], dict[str, Any]]:
    """What a side does in its turn: read a prompt and write tokens, each from an empty context."""
    vocabulary, reset, feed = side
    rng = random.Random(0)
    tokens = [rng.randrange(vocabulary) for _ in range(max(prompt, generate))]

    def measure() -> dict[str, Any]:
        reset()
        start = time.perf_counter()
        feed(tokens[:prompt])
        middle = time.perf_counter()
        reset()
        restart = time.perf_counter()
        for token in tokens[:generate]:
            feed([token])
        end = time.perf_counter()
        return {
            "prefill": middle - start,
            "decode": end - restart,
            "peak_rss_bytes": peak_rss(),
        }

    return measure


def open_ours(model: str, threads: int, prompt: int, generate: int) -> Opened:
    """An artifact, through the runtime."""
    from mxcompile.runtime import Program, Session

    del prompt, generate
    session = Session(Program.load(Path(model), threads))

    def feed(tokens: Sequence[int]) -> None:
        session.feed(tokens)

    return session.vocabulary, lambda: session.truncate(0), feed


def open_llama(model: str, threads: int, prompt: int, generate: int) -> Opened:
    """A GGUF, through llama.cpp's C functions as llama-bench calls them."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)

    def load(flash: bool) -> tuple[Any, Opened]:
        llama = llama_cpp.Llama(
            model,
            n_ctx=prompt + generate,
            n_batch=max(prompt, 1),
            n_ubatch=max(prompt, 1),
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            verbose=False,
        )
        llama_cpp.llama_log_set(silence, None)  # loading sets another

        def reset() -> None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)

        def feed(tokens: Sequence[int]) -> None:
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(array, len(tokens))
            if llama_cpp.llama_decode(llama.ctx, batch) != 0:
                raise RuntimeError("llama_decode failed")
            llama_cpp.llama_get_logits_ith(llama.ctx, -1)  # waits for the result

        return llama, (int(llama.n_vocab()), reset, feed)

    def seconds(flash: bool) -> float:
        llama, opened = load(flash)
        measure = measurement(opened, prompt, generate)
        turns = [measure() for _ in range(3)]
        llama.close()  # so that the peak of memory is that of one
        return min(float(turn["prefill"] + turn["decode"]) for turn in turns)

    return load(min((False, True), key=seconds))[1]


def open_onnxruntime(model: str, threads: int, prompt: int, generate: int) -> Opened:
    """An ONNX model that ``peer_models.py`` wrote; caches stay in the runtime's memory."""
    import numpy as np
    import onnxruntime as ort

    del prompt, generate
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    pasts = [name for name in shapes if name.startswith("past")]
    presents = [name.replace("past_key_values", "present") for name in pasts]
    caches: list[Any] = []

    def reset() -> None:
        sizes = [tuple(d if isinstance(d, int) else 0 for d in shapes[n][1:]) for n in pasts]
        empty = (np.zeros((1, *size), np.float32) for size in sizes)
        caches[:] = [ort.OrtValue.ortvalue_from_numpy(array) for array in empty]

    def feed(tokens: Sequence[int]) -> None:
        past = caches[0].shape()[2]
        binding = session.io_binding()
        total = past + len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(past, total)[None])
        for name, cache in zip(pasts, caches, strict=True):
            binding.bind_ortvalue_input(name, cache)
        for name in ("logits", *presents):
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        caches[:] = binding.get_outputs()[1:]

    vocabulary = next(v.shape[-1] for v in session.get_outputs() if v.name == "logits")
    return vocabulary, reset, feed


def open_openvino(model: str, threads: int, prompt: int, generate: int) -> Opened:
    """A stateful model that ``peer_models.py`` wrote, in OpenVINO's best settings for latency."""
    import numpy as np
    import openvino as ov

    del prompt, generate
    settings = {
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    done = 0

    def reset() -> None:
        nonlocal done
        request.reset_state()
        done = 0

    def feed(tokens: Sequence[int]) -> None:
        nonlocal done
        total = done + len(tokens)
        request.infer(
            {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(done, total)[None],
            },
            share_outputs=True,
        )
        done = total

    return request.model_outputs[0].partial_shape[2].get_length(), reset, feed


OPEN: Final[dict[str, Callable[[str, int, int, int], Opened]]] = {
    OURS: open_ours,
    OTHER: open_ours,
    LLAMA: open_llama,
    ORT: open_onnxruntime,
    OPENVINO: open_openvino,
}


def weight_bytes(model: Path) -> int:
    """The size of the weights on disk."""
    if model.is_dir():
        return (model / "weights.safetensors").stat().st_size
    beside = (model.with_suffix(".bin"), model.with_name(f"{model.name}.data"), model)
    return next(path.stat().st_size for path in beside if path.exists())


def compare(
    models: dict[str, Path], pythons: dict[str, str], options: tuple[int, int, int], rounds: int
) -> list[dict[str, Any]]:
    """Let all sides take turns; gives a row a side, ours first, the others with their ratios."""
    threads, prompt, generate = options
    numbers = [*map(str, options)]
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(system, pythons[system], __file__, [system, str(p), *numbers]))
            for system, p in models.items()
        ]
        take_turns(sides, rounds)
    counts = {"prefill": prompt, "decode": generate}
    rows = []
    for side in sides:
        row = {
            "model": models[side.system].name,
            "system": side.system,
            "threads": threads,
            "bytes": weight_bytes(models[side.system]),
            "peak_rss_bytes": side.found[-1]["peak_rss_bytes"],
        }
        for test, count in counts.items():
            pairs = zip(side.found, sides[0].found, strict=True)
            row[f"{test}_tokens_per_s"] = count / statistics.median(f[test] for f in side.found)
            row[f"{test}_time_over_ours"] = statistics.median(a[test] / b[test] for a, b in pairs)
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows for the eye."""
    print("system      threads       MB  prefill   decode  RSS MB  time/ours: prefill, decode")
    for found in rows:
        ratios = [f"{found[f'{test}_time_over_ours']:.2f}" for test in ("prefill", "decode")]
        print(
            f"{found['system']:11} {found['threads']:7} {found['bytes'] / 1e6:8.1f}"
            f" {found['prefill_tokens_per_s']:8.1f} {found['decode_tokens_per_s']:8.1f}"
            f" {found['peak_rss_bytes'] / 1e6:7.0f}  {', '.join(ratios)}"
        )


def main() -> None:
    """Compare at each number of threads."""
    if sys.argv[1:2] == [SERVE]:
        system, model, *numbers = sys.argv[2:]
        threads, prompt, generate = map(int, numbers)
        side = OPEN[system](model, threads, prompt, generate)
        return serve(measurement(side, prompt, generate))
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--gguf", type=Path, help="for llama.cpp")
    parser.add_argument("--onnxruntime", type=Path, metavar="FILE.onnx")
    parser.add_argument("--openvino", type=Path, metavar="FILE.xml")
    parser.add_argument("--other", type=Path, metavar="FOLDER.mxc", help="another of ours")
    parser.add_argument("--llama-python", default=sys.executable, help="where llama_cpp is")
    parser.add_argument("--openvino-python", default=sys.executable, help="where openvino is")
    parser.add_argument("-t", "--threads", default="1,2", help="such as 1,2 (the default)")
    parser.add_argument("-p", "--prompt", type=int, default=256)
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    given = (args.artifact, args.other, args.gguf, args.onnxruntime, args.openvino)
    models = {name: path for name, path in zip(OPEN, given, strict=True) if path is not None}
    pythons = dict.fromkeys(OPEN, sys.executable)
    pythons |= {LLAMA: args.llama_python, OPENVINO: args.openvino_python}
    rows = []
    for threads in map(int, args.threads.split(",")):
        rows += compare(models, pythons, (threads, args.prompt, args.generate), args.rounds)
    return print(json.dumps(rows, indent=1)) if args.json else show(rows)


if __name__ == "__main__":
    main()
