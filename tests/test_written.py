"""Text that a model writes itself, held against its distribution by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mxcompile import graph, written
from mxcompile.float_model import FloatModel
from mxcompile.written import LENGTH, SEQUENCES

VOCABULARY, WIDTH, BOS = 100, 8, 3

# What is seen so far, in the mean, and where it ends say what comes next.
DECODER = """<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>
g (int64[batch, seq] input_ids, int64[batch, seq] position_ids, int64[batch, total] attention_mask,
   float[batch, 1, past, 8] past)
  => (float[batch, seq, 100] logits, float[batch, 1, total, 8] present) {
    axes = Constant<value_ints = [1]>()
    total = Constant<value_ints = [2]>()
    e = Gather(table, input_ids)
    k = Unsqueeze(e, axes)
    present = Concat<axis = 2>(past, k)
    m = ReduceMean<keepdims = 0>(present, total)
    p = Gather(positions, position_ids)
    h = Add(m, p)
    logits = mxcompile.Linear(h, table)
}
<domain: "mxcompile", opset_import: ["" : 23]>
Linear (x, w) => (y) {
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}
"""


@pytest.fixture(scope="module")
def model() -> ir.Model:
    parsed = onnx.parser.parse_model(DECODER)
    rng = np.random.default_rng(0)
    for name, rows in (("table", VOCABULARY), ("positions", LENGTH)):
        weight = rng.standard_normal((rows, WIDTH)).astype(np.float32)
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    found = ir.from_proto(onnx.shape_inference.infer_shapes(parsed))
    for value, name in (
        (found.graph.inputs[3], "past_key_values.0.key"),
        (found.graph.outputs[1], "present.0.key"),
    ):
        value.name = name
    return found


@pytest.fixture(scope="module")
def watched(model: ir.Model) -> FloatModel:
    return FloatModel(model, graph.uses(model))


def log_p(model: ir.Model, tokens: np.ndarray) -> np.ndarray:
    """The log probabilities [sequences, length - 1, vocabulary] of what follows each token."""
    table, positions = (
        graph.array(model.graph.initializers[n]).astype(np.float64) for n in ("table", "positions")
    )
    count = tokens.shape[1] - 1
    mean = np.cumsum(table[tokens[:, :-1]], 1) / np.arange(1, count + 1)[:, None]
    logits = (mean + positions[:count]) @ table.T
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def test_tokens_are_drawn_from_the_model(model: ir.Model, watched: FloatModel) -> None:
    tokens = written.write(watched, [BOS]).numpy()
    assert tokens.shape == (SEQUENCES, LENGTH)
    assert (tokens[:, 0] == BOS).all()
    expected = log_p(model, tokens)
    half = SEQUENCES // 2
    found = np.take_along_axis(expected, tokens[:, 1:, None], -1)[..., 0]
    p = np.exp(expected)
    mean = (p * expected).sum(-1)
    spread = ((p * expected**2).sum(-1) - mean**2) ** 0.5
    drawn = np.ones(found.shape, np.bool_)
    drawn[half:, 0] = False
    off = (found - mean)[drawn].sum() / np.sqrt(np.square(spread[drawn]).sum())
    assert abs(off) < 3
    # What the model would hardly say begins the others.
    assert found[half:, 0].mean() < mean[half:, 0].mean() - 4 * spread[half:, 0].mean() / half**0.5


def test_the_same_each_time_and_kept(watched: FloatModel, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tokens.safetensors"
    first = written.cached(path, lambda: written.write(watched, [BOS]))
    assert torch.equal(first, written.write(watched, [BOS]))
    assert torch.equal(first, written.cached(path, lambda: pytest.fail("was kept")))
    path.write_bytes(b"torn")
    assert torch.equal(first, written.cached(path, lambda: first))


def test_without_marks_all_begin_at_random(watched: FloatModel) -> None:
    tokens = written.write(watched, [])
    assert tokens.shape == (SEQUENCES, LENGTH)
    assert len(set(tokens[:, 0].tolist())) > SEQUENCES // 3


def test_who_can_write(model: ir.Model) -> None:
    assert written.can_write(model)
    other = model.clone()
    del other.graph.outputs[1]
    assert not written.can_write(other)
    encoder = model.clone()
    encoder.graph.outputs[0].name = "last_hidden_state"
    assert not written.can_write(encoder)
