"""Hugging Face folders and GGUF files to one ONNX graph (opset 23) for prefill and decode.

The model's own code is traced, with its quirks replaced by the operators that say the same: one
``Attention`` a layer over caller-owned caches, ``RotaryEmbedding``, ``RMSNormalization`` and
``Gelu``. Weights keep their names and layouts. Left out: models that bring code of their own,
pickled or quantized weights, vision parts, rotary embeddings that change with the text's length.
"""

import ast
import functools
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import collapse_slice_rule, unsqueeze_unsqueeze_rule
from torch.nn import functional as F

from mxcompile.artifact import TOKENIZER_FILES
from mxcompile.errors import UnsupportedError, UsageError

OPSET: Final = 23
DECODERS: Final = ("gemma3_text", "gpt2", "llama", "qwen2", "qwen3")
ENCODERS: Final = ("bert", "distilbert", "roberta")
PACKAGES: Final = ("accelerate", "gguf", "transformers")

GGUF_NAMES: Final = {"gemma3": "gemma3_text"}
"""GGUF architectures that go by another name than their Hugging Face model type."""

ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""

INLINE_LIMIT: Final = 64 << 20
"""Weights of more bytes than this go to a file of their own beside the model."""

VOCABULARIES: Final = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

ATTENTION: Final = "mxcompile"
"""The name that our attention function is registered under."""

PREFIX: Final = "model_"
"""Where the traced module holds the model."""

SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules around a node, and the node."""


def export(
    source: Path, output: Path, *, progress: Callable[[str], None] = lambda stage: None
) -> None:
    """Write the model in ``source``, a Hugging Face folder or a GGUF file, as ONNX to ``output``.

    Large weights go to ``<output>.data``, and the tokenizer's files, if any, to the same folder.

    Raises:
        UsageError: the source is missing, incomplete or malformed, or the output is a folder.
        UnsupportedError: the architecture, or something that its configuration asks for.
    """
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name a file, such as {output / 'model.onnx'}")
    if lacking := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"export needs {', '.join(lacking)}: pip install 'mxcompile[export]'")
    with _quiet():
        progress(f"loading {source}")
        model = _load_model(source, _load_config(source))
        progress("tracing")
        graph = _clean(_trace(model), model)
        progress(f"writing {output}")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
            _save(graph, Path(scratch) / output.name)
            _save_tokenizer(source, Path(scratch))
            _publish(Path(scratch), output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings, logs and bars off the screen; their failures are exceptions."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging as bars

    threshold, shown = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.ERROR)
    bars.disable_progress_bar()
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_patched(legacy, "tqdm", lambda items, **_: items))
            # Parsing a large vocabulary takes half a minute and is asked for three times.
            stack.enter_context(_patched(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)))
            yield
    finally:
        logging.disable(threshold)
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _patched(module: Any, name: str, function: Any) -> Iterator[None]:
    """Replace a function of a module, where it has one of that name, for a while."""
    before = getattr(module, name, None)
    if before is not None:
        setattr(module, name, function)
    try:
        yield
    finally:
        if before is not None:
            setattr(module, name, before)


# Loading


def _load_config(source: Path) -> Any:
    """Read and check the configuration; nothing is executed or downloaded."""
    from transformers import AutoConfig

    if source.is_dir():
        _check_folder(source)
    elif source.is_file():
        _check_gguf(source)
    else:
        raise UsageError(f"{source}: no such folder or .gguf file")
    with _readable(source):
        config = AutoConfig.from_pretrained(**_location(source))
    _check_config(source, config)
    return config


def _check_folder(source: Path) -> None:
    path = source / "config.json"
    if not path.is_file():
        raise UsageError(f"{source}: no config.json; not a Hugging Face model folder")
    with _readable(path):
        model_type = json.loads(path.read_bytes())["model_type"]
    _check_type(source, model_type)
    if not any(source.glob("*.safetensors")):
        raise UsageError(f"{source}: no *.safetensors; pickled weights (*.bin) are not loaded")
    for path in source.glob("*.index.json"):
        with _readable(path):
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
        if bad := [s for s in shards if Path(s).name != s or Path(s).suffix != ".safetensors"]:
            raise UsageError(f"{path}: not a .safetensors file of this folder: {bad[0]}")


def _check_gguf(source: Path) -> None:
    from transformers.integrations.gguf import read_gguf_metadata

    with _readable(source):
        metadata, tensors = read_gguf_metadata(str(source))
        architecture = metadata["general.architecture"]
    _check_type(source, GGUF_NAMES.get(architecture, architecture))
    scaling = {metadata.get(f"{architecture}.rope.scaling.{k}") for k in ("type", "factor")}
    if "rope_freqs.weight" in tensors or scaling - {None, "none", 1.0}:  # transformers ignores them
        raise UnsupportedError(
            f"{source}: scaled rotary embeddings in a GGUF file are not supported; "
            "export the Hugging Face folder that it was made from"
        )


def _check_type(source: Path, model_type: str) -> None:
    if model_type not in (known := sorted((*DECODERS, *ENCODERS))):
        raise UnsupportedError(
            f"{source}: model type '{model_type}' is not supported; choose from {', '.join(known)}"
        )


def _check_config(source: Path, config: Any) -> None:
    """Refuse what would be traced into something else than the model."""
    _check_type(source, config.model_type)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [
        p["rope_type"] for p in (rope, *rope.values()) if isinstance(p, dict) and "rope_type" in p
    ]
    refused = {
        f"rope type {', '.join(kinds)}": {*kinds} - {*ROPE_TYPES},
        "bidirectional attention": getattr(config, "use_bidirectional_attention", False),
        "cross attention": getattr(config, "add_cross_attention", False),
        "causal attention in an encoder": getattr(config, "is_decoder", False),
        "quantized weights": source.is_dir() and hasattr(config, "quantization_config"),
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"{source}: {config.model_type} with {what} is not supported")


def _load_model(source: Path, config: Any) -> Any:
    """The model in float32 on the CPU; every weight that it uses comes from the source."""
    from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, GgufConfig

    AttentionInterface.register(ATTENTION, _attention)
    loader = AutoModelForCausalLM if config.model_type in DECODERS else AutoModel
    packed = {"quantization_config": GgufConfig(dequantize=True)} if source.is_file() else {}
    with _readable(source):
        model, info = loader.from_pretrained(
            **_location(source),
            **packed,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation=ATTENTION,
            output_loading_info=True,
        )
    if missing := sorted(k for k in info["missing_keys"] if not k.startswith("pooler.")):
        raise UsageError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def _location(source: Path) -> dict[str, Any]:
    """What every ``from_pretrained`` is told about a source."""
    place = {"gguf_file": source.name} if source.is_file() else {}
    folder = source.parent if source.is_file() else source
    return {
        "pretrained_model_name_or_path": str(folder.resolve()),
        "local_files_only": True,
        "trust_remote_code": False,
        **place,
    }


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise over a file's contents into one line about it."""
    try:
        yield
    except Exception as error:  # hostile bytes reach a dozen parsers: any error means "no"
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"{path}: cannot be read ({type(error).__name__}: {line})") from error


# Tracing


def _trace(model: Any) -> ir.Model:
    """Record the model as a graph."""
    decoder = model.config.model_type in DECODERS
    inputs = _inputs(model.config)
    caches = [name for name in inputs if name.startswith("past_key_values.")]
    presents = [name.replace("past_key_values", "present") for name in caches]
    _replace_quirks(model)
    with _patched(sys.modules[type(model).__module__], "apply_rotary_pos_emb", _rotate):
        program = torch.onnx.export(
            _Traced(model, _decode if decoder else _encode).eval(),
            tuple(sample for sample, _ in inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # its constant folding renames and transposes weights
            verbose=False,
            dynamic_shapes=(tuple(axes for _, axes in inputs.values()),),
            input_names=list(inputs),
            output_names=["logits", *presents] if decoder else ["last_hidden_state"],
        )
    assert program is not None
    return program.model


def _inputs(config: Any) -> dict[str, tuple[torch.Tensor, dict[int, str]]]:
    """The graph's inputs: a sample and the names of the open axes, by name.

    The sample's sizes differ from each other and from 1, so that the tracer merges no two axes.
    """
    batch, seq, past = 2, 3, 5

    def ids(length: int, axis: str) -> tuple[torch.Tensor, dict[int, str]]:
        return torch.ones((batch, length), dtype=torch.int64), {0: "batch", 1: axis}

    if config.model_type in ENCODERS:
        kinds = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []
        return {name: ids(seq, "seq") for name in ("input_ids", "attention_mask", *kinds)}
    inputs = {
        "input_ids": ids(seq, "seq"),
        "attention_mask": ids(past + seq, "total"),
        "position_ids": ids(seq, "seq"),
    }
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = batch, getattr(config, "num_key_value_heads", heads), past, width
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{layer}.{kind}"] = torch.zeros(shape), {0: "batch", 2: "past"}
    return inputs


class _Traced(torch.nn.Module):
    """A model that is called with the graph's inputs."""

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model_ = model
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self.model_, *inputs)


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    *past: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    layers = _Layers(attention_mask, input_ids.shape[1], causal=True, past=iter(past))
    out = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, layers=layers)
    return (out.logits, *layers.present)


def _encode(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *kinds: torch.Tensor
) -> torch.Tensor:
    seq = attention_mask.shape[1]
    more = {}
    if model.config.model_type != "roberta":  # whose positions depend on where the padding is
        more["position_ids"] = torch.arange(seq).unsqueeze(0)
    if hasattr(model.config, "type_vocab_size"):
        more["token_type_ids"] = kinds[0] if kinds else torch.zeros((1, 1), dtype=torch.int64)
    layers = _Layers(attention_mask, seq)
    hidden: torch.Tensor = model(input_ids=input_ids, layers=layers, **more).last_hidden_state
    return hidden


@dataclass
class _Layers:
    """What the attention layers of one trace share; they run in order and each takes its past."""

    attention_mask: torch.Tensor
    queries: int
    causal: bool = False
    past: Iterator[torch.Tensor] = field(default_factory=lambda: iter(()))
    present: list[torch.Tensor] = field(default_factory=list)
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None = None) -> torch.Tensor:
        """True where a query may look, [batch, 1, queries, keys]; one tensor a window."""
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> torch.Tensor:
        total = self.attention_mask.shape[1]
        keys = torch.arange(total)
        queries = torch.arange(total - self.queries, total).unsqueeze(1)
        if window is not None:
            return self.mask() & (keys > queries - window)
        # Always true in an encoder, to give each query a row: onnxruntime does not broadcast them.
        visible = keys <= queries if self.causal else queries >= 0
        return visible & self.attention_mask.bool().unsqueeze(1).unsqueeze(1)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layers: _Layers,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that the models are told to call, always without a mask."""
    past = next(layers.past, None), next(layers.past, None)
    out, *present, _scores = torch.onnx.ops.attention(
        query, key, value, layers.mask(sliding_window), *past, scale=scaling
    )
    layers.present += present
    return out.transpose(1, 2), None


def _replace_quirks(model: Any) -> None:
    """Give modules that spell out an operator a forward that names it."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            if kind.startswith("Gemma"):
                module.weight += 1.0  # Gemma stores w and multiplies by 1 + w
            module.forward = partial(_rms_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = partial(_angles, module, {})
        elif kind == "Conv1D":
            module.forward = partial(_conv1d, module)
        elif kind == "NewGELUActivation":
            module.forward = partial(F.gelu, approximate="tanh")


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return F.rms_norm(x, module.weight.shape, module.weight, epsilon)


def _conv1d(module: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = x @ module.weight + module.bias
    return y


def _angles(
    module: Any,
    seen: dict[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [batch, seq, half of a head]: the operator does not want them twice.

    All kinds of layers are served at the first call, because the models ask in a random order.
    """
    if position_ids not in seen:
        positions = position_ids.unsqueeze(-1).float()
        found = seen[position_ids] = {}
        for kind in sorted(module.rope_type) if layer_type else [""]:
            prefix = f"{kind}_" if kind else ""
            scale = getattr(module, f"{prefix}attention_scaling")
            angles = positions * getattr(module, f"{prefix}inv_freq")
            cos, sin = angles.cos(), angles.sin()
            found[kind] = (cos, sin) if scale == 1 else (cos * scale, sin * scale)
    return seen[position_ids][layer_type]


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for ``apply_rotary_pos_emb``."""
    rotary = torch.onnx.ops.rotary_embedding
    return rotary(q, cos, sin), rotary(k, cos, sin)


# Cleaning


def _clean(graph: ir.Model, model: Any) -> ir.Model:
    """Leave only what computes, and give it the names that the model's author gave."""
    for value in graph.graph.outputs[1:]:
        assert value.shape is not None
        batch, heads, _, width = value.shape
        value.shape = ir.Shape([batch, heads, "total", width])
    _name_weights(graph, model)
    _constant_reshapes(graph)
    optimizer.fold_constants_ir(
        graph, should_fold=lambda node: False if node.op_type == "Transpose" else None
    )
    rewriter.rewrite(graph, [collapse_slice_rule, unsqueeze_unsqueeze_rule])
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    _share_constants(graph)
    ir.passes.Sequential(
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedOpsetsPass(),
    )(graph)
    _name_nodes(graph)
    ir.passes.Sequential(
        common_passes.NameFixPass(),
        common_passes.ClearMetadataAndDocStringPass(),
        common_passes.ShapeInferencePass(),
    )(graph)
    graph.metadata_props.update(_facts(model))
    return graph


def _name_weights(graph: ir.Model, model: Any) -> None:
    """Name initializers after the model's parameters; a tied one takes its first name."""
    first = {p.data_ptr(): name for name, p in model.named_parameters()}
    for value in list(graph.graph.initializers.values()):
        tensor: Any = value.const_value
        assert value.name is not None
        value.name = first.get(tensor.raw.data_ptr(), value.name.removeprefix(f"{PREFIX}."))


def _constant_reshapes(graph: ir.Model) -> None:
    """Let target shapes computed from ``Shape`` be constants that copy (0) or infer (-1)."""
    for node in [n for n in graph.graph if n.op_type == "Reshape"]:
        data = node.inputs[0]
        assert data is not None
        before, after = data.shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        if before == after:
            node.outputs[0].replace_all_uses_with(data)
            continue
        copied = [*before, *([None] * len(after))]
        dims = [
            d if isinstance(d, int) else 0 if d == c else -1
            for d, c in zip(after, copied, strict=False)
        ]
        if dims.count(-1) <= 1:
            shape = ir.node("Constant", [], {"value": ir.tensor(dims, dtype=ir.DataType.INT64)})
            graph.graph.insert_before(node, shape)
            node.replace_input_with(1, shape.outputs[0])
            node.attributes.pop("allowzero", None)


def _share_constants(graph: ir.Model) -> None:
    """Keep one initializer for each distinct shape, axis or index."""
    seen: dict[tuple[tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.INT64:
            kept = seen.setdefault((tuple(tensor.shape.numpy()), tensor.tobytes()), value)
            if kept is value:
                value.name = f"constant_{len(seen)}"
            else:
                value.replace_all_uses_with(kept)


def _name_nodes(graph: ir.Model) -> None:
    """Name nodes and what they compute after the module that they come from."""
    kept = set(graph.graph.outputs)
    for node in graph.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        scope = next((s for s in reversed(scopes[:-1]) if s.startswith(f"{PREFIX}.")), PREFIX)
        node.name = f"{scope}.{node.op_type}".removeprefix(f"{PREFIX}.")
        for value in node.outputs:
            if value not in kept:
                value.name = node.name


def _facts(model: Any) -> dict[str, str]:
    """What a runner must know and the graph does not say."""
    decoder = model.config.model_type in DECODERS
    generation = model.generation_config if decoder else None
    end = getattr(generation, "eos_token_id", None)
    facts = {
        "bos_token_id": getattr(generation, "bos_token_id", None),
        "eos_token_id": end if isinstance(end, list) else [] if end is None else [end],
        "max_position_embeddings": model.config.max_position_embeddings,
    }
    return {
        "mxcompile.architecture": model.config.model_type,
        "mxcompile.generation": json.dumps(facts),
    }


# Saving


def _save(graph: ir.Model, path: Path) -> None:
    tensors = [v.const_value for v in graph.graph.initializers.values()]
    if sum(t.nbytes for t in tensors if t is not None) > INLINE_LIMIT:
        ir.save(graph, path, external_data=f"{path.name}.data", alignment=4096)
    else:
        ir.save(graph, path)


def _save_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, or convert what the source has in their place."""
    from transformers import AutoTokenizer

    kept = source
    with tempfile.TemporaryDirectory() as scratch:
        if not (source / "tokenizer.json").is_file():
            if source.is_dir() and not any((source / name).is_file() for name in VOCABULARIES):
                return
            kept = Path(scratch)
            with _readable(source):
                AutoTokenizer.from_pretrained(**_location(source)).save_pretrained(kept)
        for name in TOKENIZER_FILES:
            if (kept / name).is_file():
                shutil.copyfile(kept / name, folder / name)


def _publish(scratch: Path, output: Path) -> None:
    """Move finished files to their places, the model last; no older model's weights stay."""
    data = f"{output.name}.data"
    external = (scratch / data).is_file()
    for path in sorted(scratch.iterdir(), key=lambda p: p.name == output.name):
        os.replace(path, output.parent / path.name)
    if not external:
        (output.parent / data).unlink(missing_ok=True)
