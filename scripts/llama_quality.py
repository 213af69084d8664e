"""llama.cpp's own quantizations of a GGUF's weights, and what they say of a text.

The GGUF is dequantized to float32 first, so that llama.cpp starts from the same weights as the ONNX
model that was exported from it. Its quantizer gets an importance matrix: the mean squares
``E[x^2]`` of what each weight multiplies, over mxcompile's calibration text, by GGUF's tensor
names. A table that is both embedding and head gets that of the head. Needs llama-cpp-python.
"""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from mxcompile import evaluate, graph, passes, statistics, target
from mxcompile.errors import UsageError
from mxcompile.files import whole
from mxcompile.float_model import FloatModel
from mxcompile.observe import Observer
from mxcompile.pipeline import Context, Pipeline
from mxcompile.runtime import cores
from mxcompile.samples import Samples

FLOAT: Final = "F32"
PURE: Final = "-pure"
"""Ends the names of schemes that give every tensor one type, also the token table."""

_SILENCE: Final = llama_cpp.llama_log_callback(lambda level, text, data: None)


def quantized(
    source: Path, model: Path, schemes: Sequence[str], folder: Path
) -> Iterator[tuple[str, Path]]:
    """Each scheme's file in ``folder``; what is there already is taken as it is.

    Args:
        source: The GGUF.
        model: The ONNX model that was exported from it.
        schemes: Names of llama.cpp's file types, such as Q4_K_M or Q4_0-pure.
        folder: Where files are written.

    Raises:
        UsageError: llama.cpp has no such scheme, or fails.
    """
    llama_cpp.llama_log_set(_SILENCE, None)
    floats = folder / f"{source.stem}-{FLOAT}.gguf"
    if not floats.exists():
        with whole(floats) as draft:
            dequantize(source, draft)
    for scheme in schemes:
        output = folder / f"{source.stem}-{scheme}.gguf"
        if not output.exists():
            with whole(output) as draft:
                quantize(floats, draft, scheme, importance(model, floats, folder))
        yield scheme, output


def dequantize(source: Path, output: Path) -> None:
    """Write a GGUF with the same metadata, and all tensors in float32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(output, architecture)
    ours = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE}
    for field in reader.fields.values():
        if field.name in ours or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(floats, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(model: Path, source: Path, folder: Path) -> dict[str, NDArray[np.float32]]:
    """``E[x^2]`` of what each weight multiplies, by its name in the GGUF; kept in ``folder``."""
    path = folder / f"{model.stem}-importance.safetensors"
    if not path.exists():
        loaded = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(
            graph.load(model), Context(target.find("x86"))
        )
        observer = Observer(FloatModel(loaded, graph.uses(loaded)), gradients=False)
        for _ in observer.see(Samples.find(loaded, model, None).feeds):
            pass
        statistics.save(observer.statistics(), path)
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = reader.fields[gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture)].contents()
    names = gguf.get_tensor_name_map(by_name[architecture], blocks)
    found = {}
    for unit, uses in statistics.load(path).uses.items():
        name = names.get_name(unit, try_suffixes=(".weight",))
        read = [use.diagonal for use in uses if use.kind == "linear"]
        if name is not None and read:
            found[name] = np.ascontiguousarray(np.mean(read, axis=0), np.float32)
    return found


def quantize(
    source: Path, output: Path, scheme: str, importance: dict[str, NDArray[np.float32]]
) -> None:
    """Let llama.cpp quantize a GGUF.

    Raises:
        UsageError: it has no such scheme, or fails.
    """
    name = scheme.removesuffix(PURE)
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if file_type is None:
        raise UsageError(f"llama.cpp has no scheme '{scheme}'; some are Q4_0, Q4_K_M, IQ4_XS, Q2_K")
    entry = llama_cpp.llama_model_imatrix_data
    parts = [
        entry(name.encode(), data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size)
        for name, data in importance.items()
    ]
    parts.append(entry(None, None, 0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.pure = scheme.endswith(PURE)
    params.nthread = cores()
    params.imatrix = (entry * len(parts))(*parts)
    if llama_cpp.llama_model_quantize(bytes(source), bytes(output), ctypes.byref(params)) != 0:
        raise UsageError(f"llama.cpp cannot quantize {source} to {scheme}")


def size(path: Path) -> dict[str, float]:
    """The bytes of a GGUF's tensors, and how many bits that is for each weight."""
    tensors = gguf.GGUFReader(path).tensors
    total = sum(int(tensor.n_bytes) for tensor in tensors)
    return {"bytes": total, "bits_per_weight": 8 * total / sum(int(t.n_elements) for t in tensors)}


def _free(model: Any, context: Any, batch: Any) -> None:
    """Free what llama.cpp holds for a source."""
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


class LlamaSource:
    """A GGUF in llama.cpp as a source of logits."""

    def __init__(self, path: Path, context: int) -> None:
        llama_cpp.llama_log_set(_SILENCE, None)
        self._model = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise UsageError(f"llama.cpp cannot load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        step = max(map(len, evaluate.chunks(range(context), self.vocabulary)))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = step
        params.n_threads = params.n_threads_batch = cores()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(step, 0, 1)
        weakref.finalize(self, _free, self._model, self._context, self._batch)

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run the model from an empty context."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        at = 0
        for chunk in evaluate.chunks(tokens, self.vocabulary):
            self._fill(chunk, at)
            at += len(chunk)
            if llama_cpp.llama_decode(self._context, self._batch) != 0:
                raise RuntimeError("llama_decode failed")
            found = llama_cpp.llama_get_logits(self._context)
            yield np.ctypeslib.as_array(found, (len(chunk), self.vocabulary))

    def continuations(
        self, prompt: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """The logits before each token of every choice; the prompt is read anew for each."""
        found = []
        for choice in choices:
            every = np.concatenate([part.copy() for part in self.logits([*prompt, *choice[:-1]])])
            found.append(every[len(prompt) - 1 :])
        return found

    def _fill(self, chunk: Sequence[int], at: int) -> None:
        batch: Any = self._batch
        batch.n_tokens = len(chunk)
        for index, token in enumerate(chunk):
            batch.token[index] = token
            batch.pos[index] = at + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = True
