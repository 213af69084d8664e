"""A decoder by hand, small enough to know its logits: the test double of a compiled model.

Its keys are the embeddings of its tokens; a position's logits are the sum of the keys up to it,
times the embeddings. So they depend on every token in the cache, and numpy can tell them.
"""
# TVMScript writes buffers where Python expects types.
# mypy: disable-error-code="valid-type,untyped-decorator"

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tvm import relax
from tvm.script import tirx as T

from mxcompile import artifact
from mxcompile.artifact import CacheLayer, Generation, KvCache, Manifest, TensorSpec
from mxcompile.formats import FORMATS
from mxcompile.plan import PrecisionPlan, TileFormats, Unit

VOCABULARY = 40
WIDTH = 16
CONTEXT = 3000
SCALE = np.array([1, 2, 3, 4], np.float32)
BOS, EOS = 0, 1
WORDS = ("<s>", "</s>", *(f"w{n}" for n in range(2, VOCABULARY)))
PLAN = PrecisionPlan(
    (Unit("table", VOCABULARY, WIDTH),),
    {"table": TileFormats((FORMATS["int8"], FORMATS["int4"], FORMATS["int4"]))},
)


@T.prim_func(s_tir=True)
def append(
    ids: T.handle, past: T.Buffer((T.int64(1),), "int64"), table: T.handle, keys: T.handle
) -> None:
    seq, capacity = T.int64(), T.int64()
    Ids = T.match_buffer(ids, (T.int64(1), seq), "int64")
    Table = T.match_buffer(table, (T.int64(40), T.int64(16)), "float32")
    Keys = T.match_buffer(keys, (T.int64(1), T.int64(1), capacity, T.int64(16)), "float16")
    for s, d in T.grid(seq, T.int64(16)):
        with T.sblock("append"):
            vs, vd = T.axis.remap("SS", [s, d])
            T.reads(Ids[0, vs], Table[0:40, vd], past[0])
            T.writes(Keys[0, 0, 0:capacity, vd])
            Keys[0, 0, past[0] + vs, vd] = T.Cast("float16", Table[Ids[0, vs], vd])


@T.prim_func(s_tir=True)
def score(
    at: T.handle,
    past: T.Buffer((T.int64(1),), "int64"),
    keys: T.handle,
    table: T.handle,
    bias: T.Buffer((T.int64(3),), "float32"),
    out: T.handle,
) -> None:
    count, capacity = T.int64(), T.int64()
    At = T.match_buffer(at, (count,), "int64")
    Keys = T.match_buffer(keys, (T.int64(1), T.int64(1), capacity, T.int64(16)), "float16")
    Table = T.match_buffer(table, (T.int64(40), T.int64(16)), "float32")
    Out = T.match_buffer(out, (T.int64(1), count, T.int64(40)), "float32")
    Sums = T.sblock_alloc_buffer((count, T.int64(16)), "float32")
    for j, d, c in T.grid(count, T.int64(16), capacity):
        with T.sblock("sum"):
            vj, vd, vc = T.axis.remap("SSR", [j, d, c])
            with T.init():
                Sums[vj, vd] = T.float32(0)
            Sums[vj, vd] = Sums[vj, vd] + T.if_then_else(
                vc <= past[0] + At[vj], T.Cast("float32", Keys[0, 0, vc, vd]), T.float32(0)
            )
    for j, t, d in T.grid(count, T.int64(40), T.int64(16)):
        with T.sblock("score"):
            vj, vt, vd = T.axis.remap("SSR", [j, t, d])
            with T.init():
                Out[0, vj, vt] = bias[2]
            Out[0, vj, vt] = Out[0, vj, vt] + Sums[vj, vd] * Table[vt, vd]


def weights() -> dict[str, NDArray[Any]]:
    """The toy's weights; small whole numbers, so that every sum is exact."""
    rng = np.random.default_rng(7)
    table = rng.integers(-2, 3, (VOCABULARY, WIDTH)).astype(np.float32)
    return {"bias": np.array([0, 0, 0.5], np.float32), "table": table}


def logits(tokens: list[int]) -> NDArray[Any]:
    """What the toy must answer, for each position."""
    table = weights()["table"]
    return np.asarray(np.cumsum(table[tokens], 0) @ table.T + 0.5)


def build(builder: Any, path: Path) -> None:
    """Compile what a BlockBuilder holds for this machine."""
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    tvm.compile(builder.get(), target=target).export_library(str(path))


Build = Callable[[Any, Path], None]


def compile_decoder(path: Path, build: Build = build) -> None:
    """Write the toy's shared library."""
    seq, count, capacity = (tvm.tirx.Var(n, "int64") for n in ("seq", "count", "capacity"))

    def var(name: str, shape: tuple[Any, ...]) -> Any:
        return relax.Var(name, relax.TensorType(shape, "int64"))

    def floats(*shape: Any) -> Any:
        return relax.TensorType(shape, "float32")

    cache = relax.TensorType((1, 1, capacity, WIDTH), "float16")
    ids, positions = var("input_ids", (1, seq)), var("position_ids", (1, seq))
    past, at = var("past", (1,)), var("logit_positions", (count,))
    caches = relax.Var("caches", relax.TupleType([cache, cache]))
    bound = relax.Var("weights", relax.TupleType([floats(3), floats(VOCABULARY, WIDTH)]))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, positions, past, at, caches, bound]):
        add = builder.add_func(append.without_attr("global_symbol"), "append")
        read = builder.add_func(score.without_attr("global_symbol"), "score")
        with builder.dataflow():
            bias, table = (builder.emit(relax.TupleGetItem(bound, i)) for i in (0, 1))
            keys = builder.emit(relax.TupleGetItem(caches, 0))
            inputs = [ids, past, table, keys]
            kept = builder.emit(relax.op.call_tir_inplace(add, inputs, [3], [cache]))
            found = floats(1, count, VOCABULARY)
            out = relax.call_tir(read, [at, past, kept, table, bias], out_ty=found)
            out = builder.emit_output(out)
        builder.emit_func_output(out)
    build(builder, path)


def compile_graph(path: Path, build: Build = build) -> None:
    """Write a program of two inputs and two outputs: ``x * w`` and ``x + y``."""
    rows = tvm.tirx.Var("rows", "int64")
    matrix = relax.TensorType((rows, 4), "float32")
    x, y = relax.Var("x", matrix), relax.Var("y", matrix)
    bound = relax.Var("weights", relax.TupleType([relax.TensorType((4,), "float32")]))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, y, bound]):
        with builder.dataflow():
            product = builder.emit(relax.op.multiply(x, relax.TupleGetItem(bound, 0)))
            both = relax.Tuple([product, builder.emit(relax.op.add(x, y))])
            out = builder.emit_output(both)
        builder.emit_func_output(out)
    build(builder, path)


def manifest(**changes: Any) -> Manifest:
    """The toy's manifest."""
    ids = TensorSpec("input_ids", "int64", ("batch", "seq"))
    values = {
        "kind": artifact.DECODER,
        "name": "toy",
        "target": "any",
        "target_features": (),
        "budget": "4.2bit",
        "activations": "fp32",
        "pipeline": "annotate,fuse-qdq",
        "plan_digest": PLAN.digest,
        "parameters": VOCABULARY * WIDTH + 3,
        "inputs": (ids,),
        "outputs": (TensorSpec("logits", "float32", ("batch", "seq", VOCABULARY)),),
        "weights": ("bias", "table"),
        "kv_cache": KvCache(
            (CacheLayer(1, WIDTH, "fp16", "fp16"),),
            tuple(
                TensorSpec(f"cache.0.{kind}", "float16", ("batch", 1, "max_length", WIDTH))
                for kind in ("key", "value")
            ),
        ),
        "generation": Generation(VOCABULARY, CONTEXT, BOS, (EOS,)),
    }
    return Manifest(**{**values, **changes})


def graph_manifest() -> Manifest:
    """The manifest of ``compile_graph``'s program."""
    x, y, s, t = (TensorSpec(name, "float32", ("rows", 4)) for name in "xyst")
    return manifest(
        kind=artifact.GRAPH,
        name="scale",
        inputs=(x, y),
        outputs=(s, t),
        weights=("w",),
        kv_cache=None,
        generation=None,
    )


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change an artifact's manifest as somebody would who knows about its digest."""
    changed = dataclasses.replace(artifact.load(folder).manifest, **changes)
    (folder / artifact.MANIFEST).write_text(json.dumps(changed.to_json()))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words that begins a text with BOS."""
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([WORDS[BOS], WORDS[EOS]])
    words.post_processor = processors.TemplateProcessing(
        single=f"{WORDS[BOS]} $A", special_tokens=[(WORDS[BOS], BOS)]
    )
    words.save(str(folder / "tokenizer.json"))


def write_onnx(path: Path, scale: float = 1.0) -> None:
    """Write the toy as an ONNX decoder; ``scale`` other than 1 makes it another model."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        toy (int64[batch,seq] input_ids, int64[batch,total] attention_mask,
             float[batch,1,past,{WIDTH}] past_key_values_0_key,
             float[batch,1,past,{WIDTH}] past_key_values_0_value)
            => (float[batch,seq,{VOCABULARY}] logits, float[batch,1,total,{WIDTH}] present_0_key,
                float[batch,1,total,{WIDTH}] present_0_value) {{
            embedded = Gather(table, input_ids)
            one = Constant<value_ints: ints = [1]>()
            new = Unsqueeze(embedded, one)
            present_0_key = Concat<axis = 2>(past_key_values_0_key, new)
            present_0_value = Concat<axis = 2>(past_key_values_0_value, new)
            axis = Constant<value_int: int = 2>()
            sums = CumSum(present_0_key, axis)
            all = Squeeze(sums, one)
            shape = Shape<start = 1, end = 2>(input_ids)
            begin = Neg(shape)
            end = Constant<value_ints: ints = [1000000]>()
            last = Slice(all, begin, end, one)
            turned = Transpose<perm = [1, 0]>(table)
            product = MatMul(last, turned)
            shifted = Add(product, bias)
            logits = Mul(shifted, scale)
        }}""")
    nodes = (x for node in model.graph.node for x in (node.input, node.output))
    for names in nodes:
        names[:] = [_dotted(name) for name in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = _dotted(value.name)
    constants: dict[str, NDArray[Any]] = {
        "table": weights()["table"],
        "bias": np.array([0.5], np.float32),
        "scale": np.array([scale], np.float32),
    }
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _dotted(name: str) -> str:
    """The name as exporters write it, which the text form cannot."""
    return name.replace("_0_", ".0.")
