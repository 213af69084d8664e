"""``export``: what the graph computes against the torch model, its form, and every refusal."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mxcompile.errors import UnsupportedError, UsageError
from mxcompile.exporter import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
gguf = pytest.importorskip("gguf")

LAYERS = 2
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 6
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama3": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=1, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=97, dim=32, hidden_dim=64, n_layers=LAYERS, n_heads=4, max_position_embeddings=64
    ),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, type_vocab_size=1),
}


@dataclass(frozen=True)
class Case:
    """A torch model, in float32 with HF's own code, and the graph exported from its folder."""

    torch: Any
    folder: Path
    path: Path
    graph: ir.Model
    session: ort.InferenceSession


def save(config: Any, folder: Path, dtype: Any) -> Any:
    """A model whose random weights keep activations of order 1, so that errors would show."""
    torch.manual_seed(0)
    encoder = config.model_type in ENCODERS
    loader = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model = loader.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def exported(config: Any, folder: Path, dtype: Any = torch.float32) -> Case:
    model = save(config, folder / "hf", dtype)
    path = folder / "out" / "model.onnx"
    export(folder / "hf", path)
    return Case(model, folder / "hf", path, ir.load(path), session(path))


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    return ort.InferenceSession(path, options)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    dtype = torch.bfloat16 if request.param == "qwen2" else torch.float32
    return exported(DECODERS[request.param](), tmp_path_factory.mktemp(request.param), dtype)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(ENCODERS[request.param](), tmp_path_factory.mktemp(request.param))


def assert_close(actual: np.ndarray, expected: np.ndarray, keys: int) -> None:
    """Equal up to the order of float32 sums.

    Each of the n terms on the longest path from input to output may be rounded otherwise by half
    an eps of the largest value; the roundings are independent, so that they add up to sqrt(n) of
    that, and eight times as much is never seen. A layer sums over its width four times (q/k/v,
    scores, two projections out), its feed-forward width and the keys; the head over the width.
    """
    terms = LAYERS * (4 * 32 + 128 + keys) + 32
    limit = 4 * np.finfo(np.float32).eps * terms**0.5 * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= limit


@pytest.mark.parametrize(
    ("batch", "seq", "past"),
    [(2, 3, 5), (1, 1, 17), (1, 12, 0), (3, 9, 1), (2, 8, 0), (1, 1, 0)],
    ids=lambda n: str(n),
)
def test_decoder_continues_a_text_like_torch(
    decoder: Case, batch: int, seq: int, past: int
) -> None:
    """One uncached run in torch is the reference, for logits and caches alike.

    In a batch, the first row starts with padding: its caches hold what the padding computed.
    """
    total = past + seq
    ids = torch.randint(3, 97, (batch, total), generator=torch.Generator().manual_seed(total))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        out = decoder.torch(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    caches = {
        f"{layer}.{kind}": tensor.numpy()
        for layer, held in enumerate(cache.layers)
        for kind, tensor in (("key", held.keys), ("value", held.values))
    }
    feeds = {
        "input_ids": ids[:, past:].numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": positions[:, past:].numpy(),
        **{f"past_key_values.{name}": held[:, :, :past] for name, held in caches.items()},
    }
    names = [value.name for value in decoder.session.get_outputs()]
    results = dict(zip(names, decoder.session.run(None, feeds), strict=True))
    real = (
        mask.bool().numpy()
    )  # what padding computes is nobody's business, as long as it is finite
    logits = results.pop("logits")
    assert np.isfinite(logits).all()
    assert_close(logits[real[:, past:]], out.logits[:, past:].numpy()[real[:, past:]], total)
    assert results.keys() == {f"present.{name}" for name in caches}
    for name, held in caches.items():
        present = results[f"present.{name}"]
        assert present.shape == held.shape
        assert_close(present.swapaxes(1, 2)[real], held.swapaxes(1, 2)[real], total)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 7), (3, 20)])
def test_encoder_computes_what_torch_does(encoder: Case, batch: int, seq: int) -> None:
    ids = torch.randint(3, 97, (batch, seq), generator=torch.Generator().manual_seed(seq))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, -2:] = 0
        ids[0, -2:] = encoder.torch.config.pad_token_id
    feeds = {"input_ids": ids, "attention_mask": mask}
    if encoder.torch.config.model_type == "bert":
        feeds["token_type_ids"] = (torch.arange(seq) >= seq // 2).long().repeat(batch, 1)
    with torch.no_grad():
        expected = encoder.torch(**feeds).last_hidden_state.numpy()
    (actual,) = encoder.session.run(None, {name: value.numpy() for name, value in feeds.items()})
    real = mask.bool().numpy()
    assert_close(actual[real], expected[real], seq)


def weights(graph: ir.Model) -> dict[str, np.ndarray]:
    """Copies of the initializers."""
    found = graph.graph.initializers.items()
    return {name: v.const_value.numpy().copy() for name, v in found if v.const_value is not None}


def operators(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


def test_decoder_has_the_form_that_the_compiler_matches(decoder: Case) -> None:
    config, graph = decoder.torch.config, decoder.graph.graph
    counts = operators(decoder.graph)
    rotary = config.model_type != "gpt2"
    assert counts["Attention"] == LAYERS
    assert counts["RotaryEmbedding"] == (2 * LAYERS if rotary else 0)
    assert counts["Cos"] == counts["Sin"] == {"gemma3_text": 2, "gpt2": 0}.get(config.model_type, 1)
    assert not counts.keys() & {"Identity", "Expand", "Concat", "Constant", "Slice", "CastLike"}
    assert graph.opset_imports == {"": 23}
    for layer, node in enumerate(n for n in graph if n.op_type == "Attention"):
        assert [v.name for v in node.inputs[4:] if v] == [
            f"past_key_values.{layer}.{kind}" for kind in ("key", "value")
        ]
        assert [v.name for v in node.outputs[1:]] == [
            f"present.{layer}.{kind}" for kind in ("key", "value")
        ]
        assert node.attributes.keys() == {"scale"}
        assert node.inputs[3] is not None
        assert node.inputs[3].dtype == ir.DataType.BOOL
        assert str(node.inputs[3].shape) == "[batch,1,seq,total]"
    inputs = {v.name: str(v.shape) for v in graph.inputs}
    assert inputs["input_ids"] == inputs["position_ids"] == "[batch,seq]"
    assert inputs["attention_mask"] == "[batch,total]"
    heads, width = (
        getattr(config, "num_key_value_heads", 4),
        getattr(config, "head_dim", None) or 8,
    )
    assert {str(v.shape) for v in graph.inputs[3:]} == {f"[batch,{heads},past,{width}]"}
    assert {str(v.shape) for v in graph.outputs[1:]} == {f"[batch,{heads},total,{width}]"}


def test_masks_are_computed_once(decoder: Case) -> None:
    masks = [n.inputs[3] for n in decoder.graph.graph if n.op_type == "Attention"]
    sliding = decoder.torch.config.model_type == "gemma3_text"
    assert len(set(masks)) == (2 if sliding else 1)
    assert operators(decoder.graph)["Range"] == 2


def test_gemma_computes_its_two_rotations_in_a_fixed_order(decoder: Case) -> None:
    """The model asks for them in the order of a set of strings, which differs between runs."""
    if decoder.torch.config.model_type == "gemma3_text":
        read = [v.name for n in decoder.graph.graph for v in n.inputs if v is not None and v.name]
        assert [name for name in read if name.endswith("inv_freq")] == [
            "model.rotary_emb.full_attention_inv_freq",
            "model.rotary_emb.sliding_attention_inv_freq",
        ]


def test_every_weight_keeps_its_name_layout_and_value(decoder: Case) -> None:
    """A tied head reads the embedding's tensor; Gemma's norms have their 1 added."""
    gemma = decoder.torch.config.model_type == "gemma3_text"
    expected = dict(decoder.torch.named_parameters())
    found = weights(decoder.graph)
    others = found.keys() - expected.keys()
    assert all(re.fullmatch(r"constant_\d+|.*inv_freq|.*embed_scale", name) for name in others)
    for name, parameter in expected.items():
        value = parameter.detach().numpy() + np.float32(gemma and "norm" in name)
        np.testing.assert_array_equal(found[name], value)


def test_no_path_of_this_machine_is_in_the_file(decoder: Case) -> None:
    assert b".py" not in decoder.path.read_bytes()
    assert str(decoder.folder.parent).encode() not in decoder.path.read_bytes()


def test_generation_facts_are_in_the_metadata(decoder: Case) -> None:
    facts = decoder.graph.metadata_props
    assert facts["mxcompile.architecture"] == decoder.torch.config.model_type
    assert json.loads(facts["mxcompile.generation"]) == {
        "bos_token_id": 1,
        "eos_token_id": [2],
        "max_position_embeddings": 64,
    }


def test_encoder_has_the_form_that_the_compiler_matches(encoder: Case) -> None:
    counts = operators(encoder.graph)
    assert counts["Attention"] == LAYERS
    assert counts["Gelu"] == LAYERS
    assert not counts.keys() & {"Identity", "Expand", "Concat", "Constant", "Slice", "CastLike"}
    names = ["input_ids", "attention_mask"]
    bert = encoder.torch.config.model_type == "bert"
    assert [v.name for v in encoder.graph.graph.inputs] == names + ["token_type_ids"] * bert
    assert [(v.name, str(v.shape)) for v in encoder.graph.graph.outputs] == [
        ("last_hidden_state", "[batch,seq,32]")
    ]


def write_gguf(path: Path, model: Any, **extra: float | str) -> None:
    """A Qwen 2 model and a tokenizer of single bytes as a float32 GGUF file."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in extra.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    writer.add_tokenizer_model("gpt2")
    tokens = [*bytes_to_unicode().values(), "ab", "<end>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, LAYERS)
    for name, parameter in model.named_parameters():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_becomes_the_same_graph_with_its_tokenizer(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**{**SMALL, "vocab_size": 258}, num_key_value_heads=2)
    model = save(config, tmp_path / "hf", torch.float32)
    write_gguf(tmp_path / "m.gguf", model)
    path = tmp_path / "out" / "m.onnx"
    export(tmp_path / "m.gguf", path)
    graph = ir.load(path)
    found = weights(graph)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found[name], parameter.numpy(force=True))
    assert json.loads(graph.metadata_props["mxcompile.generation"])["eos_token_id"] == [257]
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(path.with_name("tokenizer.json"))
    )
    assert tokenizer.encode("ab é<end>").tokens == ["ab", "Ġ", "Ã", "©", "<end>"]
    assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"
    write_gguf(tmp_path / "scaled.gguf", model, **{"qwen2.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedError, match="scaled rotary"):
        export(tmp_path / "scaled.gguf", path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 1}), folder, torch.float32)
    return folder


def damaged(llama: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a good folder with other settings; ``None`` removes one."""
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_large_weights_go_to_a_file_beside_the_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Then a small model of the same name takes it away again. All of it happens in silence."""
    source = damaged(llama, tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    path = tmp_path / "out" / "m.onnx"
    stages: list[str] = []
    rotate = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    with monkeypatch.context() as patch:
        patch.setattr("mxcompile.exporter.INLINE_LIMIT", 1000)
        export(source, path, progress=stages.append)
    assert [stage.split()[0] for stage in stages] == ["loading", "tracing", "writing"]
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "m.onnx",
        "m.onnx.data",
        "tokenizer.json",
    ]
    large, size = weights(ir.load(path)), path.stat().st_size
    export(source, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.onnx", "tokenizer.json"]
    assert path.stat().st_size > size
    for name, value in weights(ir.load(path)).items():
        np.testing.assert_array_equal(value, large[name])
    assert capfd.readouterr() == ("", "")
    assert transformers.models.llama.modeling_llama.apply_rotary_pos_emb is rotate


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; choose from bert, .*, qwen3"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type dynamic",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "bidirectional attention",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "cross attention"),
        ({"model_type": "bert", "is_decoder": True}, "causal attention in an encoder"),
    ],
)
def test_what_would_be_exported_wrongly_is_refused(
    llama: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        export(damaged(llama, tmp_path / "hf", **changes), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_unusable_sources_are_refused_in_one_line(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    pickled = damaged(llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    untyped = damaged(llama, tmp_path / "untyped", model_type=None)
    cut = damaged(llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-9])
    outside = damaged(llama, tmp_path / "outside")
    shards = {"weight_map": {"model.norm.weight": "../pickled/pytorch_model.bin"}}
    (outside / "model.safetensors.index.json").write_text(json.dumps(shards))
    broken = damaged(llama, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    refusals = {
        tmp_path / "nowhere": "no such folder or .gguf file",
        tmp_path / "empty": "no config.json",
        tmp_path / "noise.gguf": "cannot be read",
        pickled: "pickled weights",
        untyped: "config.json: cannot be read .KeyError: 'model_type'",
        cut: "cannot be read",
        outside: "not a .safetensors file of this folder",
        broken: "config.json: cannot be read",
        damaged(llama, tmp_path / "wider", hidden_size=40): "cannot be read",
        damaged(
            llama, tmp_path / "deeper", num_hidden_layers=2
        ): "9 weights are missing, such as model.layers.1",
    }
    for source, words in refusals.items():
        with pytest.raises(UsageError, match=words) as caught:
            export(source, tmp_path / "out" / "m.onnx")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is a folder; name a file"):
        export(llama, tmp_path / "empty")


def test_nothing_is_left_when_writing_fails(llama: Path, tmp_path: Path) -> None:
    source = damaged(llama, tmp_path / "hf")
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        export(source, tmp_path / "out" / "m.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_packages_are_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxcompile.exporter.PACKAGES", ("transformers", "no_such_package"))
    with pytest.raises(
        UsageError, match=r"export needs no_such_package: pip install 'mxcompile\[export\]'"
    ):
        export(llama, tmp_path / "m.onnx")
