"""Statistics of small models against their definitions, and factors against measured harm."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from mxcompile import calibrate, graph
from mxcompile.calibrate import Statistics
from mxcompile.errors import UnsupportedError, UsageError
from mxcompile.formats import FORMATS
from mxcompile.interpret import Interpreter
from mxcompile.progress import Progress
from mxcompile.quantize import dequantize, quantize

pytestmark = pytest.mark.filterwarnings("error:.*not writable")
HEAD = '<ir_version: 10, opset_import: ["" : 23, "mxcompile" : 1]>\n'
LINEAR = """
<domain: "mxcompile", opset_import: ["" : 23]>
Linear (x, w) => (y) {
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}
"""
VOCABULARY, WIDTH, INNER = 200, 32, 64

LANGUAGE_MODEL = """
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
   float[batch, 2, past, 4] past_key_values) => (float[batch, seq, 200] logits) {
    e = Gather(embedding, input_ids)
    g1 = mxcompile.Linear(e, gate)
    u = mxcompile.Linear(e, up)
    a = Sigmoid(g1)
    h = Mul(a, u)
    d = mxcompile.Linear(h, down)
    s = Add(e, d)
    n = RMSNormalization(s, norm)
    l = mxcompile.Linear(n, embedding)
    logits = Mul(l, scale)
}
"""

CONVOLUTIONS = """
g (float[1, 4, 9, 9] x) => (float[1, 16, 3, 3] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, first)
    r = Relu(c)
    y = Conv<strides = [3, 3]>(r, second)
}
"""


def build(text: str, **weights: np.ndarray) -> ir.Model:
    model = onnx.parser.parse_model(HEAD + text)
    for key, weight in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, key))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def random(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def language_model() -> ir.Model:
    return build(
        LANGUAGE_MODEL + LINEAR,
        embedding=random(VOCABULARY, WIDTH, seed=0),
        gate=random(INNER, WIDTH, seed=1, scale=0.3),
        up=random(INNER, WIDTH, seed=2, scale=0.3),
        down=random(WIDTH, INNER, seed=3, scale=0.3),
        norm=np.ones(WIDTH, np.float32),
        scale=np.array(0.5, np.float32),
    )


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCABULARY // 2, (6, 40))


@pytest.fixture(scope="module")
def statistics(language_model: ir.Model, tokens: np.ndarray) -> Statistics:
    feeds = calibrate.token_feeds(language_model, tokens)
    return calibrate.collect(language_model, graph.uses(language_model), feeds, feeds[:4])


def weights_of(model: ir.Model) -> dict[str, torch.Tensor]:
    return {
        key: torch.from_numpy(graph.array(value).copy())
        for key, value in model.graph.initializers.items()
    }


def by_hand(w: dict[str, torch.Tensor], tokens: np.ndarray) -> dict[str, torch.Tensor]:
    e = w["embedding"][torch.from_numpy(tokens)]
    h = torch.sigmoid(e @ w["gate"].T) * (e @ w["up"].T)
    n = functional.rms_norm(e + h @ w["down"].T, (WIDTH,), w["norm"])
    return {"e": e, "h": h, "n": n, "logits": 0.5 * (n @ w["embedding"].T)}


def divergence(exact: torch.Tensor, rough: torch.Tensor) -> float:
    p, q = exact.log_softmax(-1), rough.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_second_moments(
    language_model: ir.Model, tokens: np.ndarray, statistics: Statistics
) -> None:
    met = by_hand(weights_of(language_model), tokens)
    assert statistics.samples == tokens.size
    for unit, use, source in (("gate", 0, "e"), ("down", 0, "h"), ("embedding", 1, "n")):
        x = met[source].flatten(0, 1)
        moment = torch.from_numpy(statistics.uses[unit][use].moment)
        torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_layers_that_share_an_input_share_its_moment(statistics: Statistics) -> None:
    gate, up = statistics.uses["gate"][0], statistics.uses["up"][0]
    assert gate.moment is up.moment
    assert statistics.factors["gate"] == statistics.factors["up"]


def test_vocabulary_rows(
    language_model: ir.Model, tokens: np.ndarray, statistics: Statistics
) -> None:
    lookup, head = statistics.uses["embedding"]
    assert (lookup.kind, head.kind) == ("embedding", "linear")
    often = np.bincount(tokens.reshape(-1), minlength=VOCABULARY) / tokens.size
    np.testing.assert_allclose(lookup.rows, often, rtol=1e-6)
    p = by_hand(weights_of(language_model), tokens)["logits"].softmax(-1).flatten(0, 1)
    np.testing.assert_allclose(head.rows, (p * (1 - p)).mean(0).numpy(), rtol=1e-4)


def test_rows_that_were_not_met_are_not_free(statistics: Statistics) -> None:
    for use in statistics.uses["embedding"]:
        weights = calibrate.shrunk(use.rows)
        assert weights.shape == (VOCABULARY,)
        assert weights.min() >= 0.19 * weights.mean() > 0
    rows = np.array([0, 0, 0, 4], np.float32)
    assert calibrate.shrunk(rows) == pytest.approx([0.2, 0.2, 0.2, 3.4])


def test_fisher_information_of_rows(language_model: ir.Model, tokens: np.ndarray) -> None:
    """Squared gradients at a layer's output, against those at all labels, weighed by p."""
    model = language_model
    observer = calibrate.Observer(calibrate.FloatModel(model, graph.uses(model)))
    ids = torch.from_numpy(tokens[:1, :3]).expand(4000, 3)
    observer.see_gradients({"input_ids": ids}, torch.Generator().manual_seed(1))
    found = observer.statistics().uses["down"][0].rows

    w = weights_of(model)
    met = by_hand(w, tokens[:1, :3])
    y = (met["h"] @ w["down"].T)[0].requires_grad_()
    n = functional.rms_norm(met["e"][0] + y, (WIDTH,), w["norm"])
    log_p = (0.5 * (n @ w["embedding"].T)).log_softmax(-1)
    expected = torch.zeros(WIDTH)
    for label in range(VOCABULARY):
        (slope,) = torch.autograd.grad(log_p[:, label].sum(), y, retain_graph=True)
        expected += (log_p[:, label].detach().exp()[:, None] * slope.square()).mean(0)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0.15)


def test_a_probe_finds_the_harm_it_measured(
    language_model: ir.Model, tokens: np.ndarray, statistics: Statistics
) -> None:
    """Damage as priced, of the perturbation itself, is the divergence of that perturbation."""
    weights = weights_of(language_model)
    rough = dict(weights)
    damage = 0.0
    for unit in ("gate", "up"):
        importance = statistics.uses[unit][0].diagonal
        fmt = calibrate.PERTURBATION
        values = dequantize(quantize(weights[unit].numpy(), fmt, importance), fmt)
        rough[unit] = torch.from_numpy(values)
        damage += float(statistics.damage(unit, rough[unit] - weights[unit]).sum())
    compared = np.s_[:4], np.s_[3::4]
    exact = by_hand(weights, tokens[:4])["logits"][:, 3::4]
    measured = divergence(exact, by_hand(rough, tokens[compared[0]])["logits"][:, 3::4])
    assert damage == pytest.approx(measured, rel=1e-3)


def test_the_sum_of_damages_predicts_the_divergence(
    language_model: ir.Model, tokens: np.ndarray, statistics: Statistics
) -> None:
    """All weights at once, in another format than the probe's."""
    weights = weights_of(language_model)
    exact = by_hand(weights, tokens)["logits"]
    fmt = FORMATS["int4"]
    rough, damage = dict(weights), 0.0
    for unit in statistics.uses:
        values = dequantize(quantize(weights[unit].numpy(), fmt, statistics.importance(unit)), fmt)
        rough[unit] = torch.from_numpy(values)
        damage += float(statistics.damage(unit, rough[unit] - weights[unit]).sum())
    measured = divergence(exact, by_hand(rough, tokens)["logits"])
    assert 0.6 * measured < damage < 1.7 * measured


def test_the_heads_factor_follows_from_the_expansion(
    language_model: ir.Model, tokens: np.ndarray, statistics: Statistics
) -> None:
    """Half of E[p (1 - p)] dW H dW^T, times the square of what scales the logits after the head."""
    weights = weights_of(language_model)
    met = by_hand(weights, tokens)
    delta = torch.from_numpy(random(VOCABULARY, WIDTH, seed=5, scale=0.02))
    rough = 0.5 * (met["n"] @ (weights["embedding"] + delta).T)
    use, factor = statistics.uses["embedding"][1], statistics.factors["embedding"][1]
    damage = factor * float(use.errors(delta).sum())
    assert factor == pytest.approx(0.5 * 0.5**2, rel=0.1)
    assert damage == pytest.approx(divergence(met["logits"], rough), rel=0.2)


def test_importance_adds_up_the_uses(statistics: Statistics) -> None:
    (lookup, head), factors = statistics.uses["embedding"], statistics.factors["embedding"]
    expected = factors[0] * lookup.rows.mean() * lookup.diagonal
    expected = expected + factors[1] * head.rows.mean() * head.diagonal
    np.testing.assert_allclose(statistics.importance("embedding"), expected, rtol=1e-5)


def test_wide_inputs_keep_the_diagonal() -> None:
    wide = calibrate.FULL_COLUMNS + 32
    text = f"g (float[1, 3, {wide}] x) => (float[1, 3, 16] y) {{ y = mxcompile.Linear(x, w) }}"
    model = build(text + LINEAR, w=random(16, wide, seed=0))
    x = torch.from_numpy(random(1, 3, wide, seed=1))
    found = calibrate.collect(model, graph.uses(model), [{"x": x}], [{"x": x}])
    use = found.uses["w"][0]
    torch.testing.assert_close(torch.from_numpy(use.moment), x[0].square().mean(0))
    delta = torch.from_numpy(random(16, wide, seed=2))
    errors = (delta.square() * x[0].square().mean(0)).sum(1)
    torch.testing.assert_close(
        use.errors(delta), torch.from_numpy(calibrate.shrunk(use.rows)) * errors
    )


def test_convolutions_and_relative_errors() -> None:
    first, second = random(16, 4, 3, 3, seed=0), random(16, 16, 3, 3, seed=1)
    model = build(CONVOLUTIONS, first=first, second=second)
    feeds = [{"x": torch.from_numpy(random(1, 4, 9, 9, seed=i))} for i in range(2, 5)]
    found = calibrate.collect(model, graph.uses(model), feeds, feeds[:1])
    taps = torch.cat([functional.unfold(f["x"], 3, padding=1)[0].T for f in feeds])
    moment = torch.from_numpy(found.uses["first"][0].moment)
    torch.testing.assert_close(moment, taps.T @ taps / len(taps), rtol=1e-4, atol=1e-5)

    fmt = calibrate.PERTURBATION
    flat = second.reshape(16, -1)
    rough = dequantize(quantize(flat, fmt, found.uses["second"][0].diagonal), fmt)
    inner = torch.relu(functional.conv2d(feeds[0]["x"], torch.from_numpy(first), padding=1))
    exact, other = (
        functional.conv2d(inner, torch.from_numpy(w).reshape(second.shape), stride=3)
        for w in (flat, rough)
    )
    measured = float((exact - other).square().sum() / exact.square().sum())
    damage = float(found.damage("second", torch.from_numpy(rough - flat)).sum())
    assert damage == pytest.approx(measured, rel=1e-3)


def test_convolutions_of_one_input_may_cut_it_differently() -> None:
    text = """
    g (float[1, 32, 5, 5] x) => (float[1, 16, 5, 5] y, float[1, 16, 5, 5] z) {
        y = Conv<pads = [1, 1, 1, 1]>(x, wide)
        z = Conv(x, narrow)
    }
    """
    model = build(text, wide=random(16, 32, 3, 3, seed=0), narrow=random(16, 32, 1, 1, seed=1))
    feeds = [{"x": torch.from_numpy(random(1, 32, 5, 5, seed=2))}]
    found = calibrate.collect(model, graph.uses(model), feeds, feeds)
    assert found.uses["wide"][0].moment.shape == (288, 288)
    assert found.uses["narrow"][0].moment.shape == (32, 32)


@pytest.mark.parametrize(
    ("attributes", "shape", "taps"),
    [
        ("pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]", "1,3,7,9", "3,2"),
        ('auto_pad = "SAME_UPPER", strides = [2, 2]', "2,3,7,8", "3,3"),
        ("strides = [2]", "1,3,11", "4"),
    ],
)
def test_patches_are_what_a_convolution_multiplies(attributes: str, shape: str, taps: str) -> None:
    sizes = [int(n) for n in shape.split(",")]
    kernel = [int(n) for n in taps.split(",")]
    spatial = ",".join("abc"[: len(kernel)])
    text = f"g (float[{shape}] x) => (float[n,5,{spatial}] y) {{ y = Conv<{attributes}>(x, w) }}"
    weight = random(5, 3, *kernel, seed=0)
    model = build(text, w=weight)
    x = torch.from_numpy(random(*sizes, seed=1))
    y = Interpreter(model).run({"x": x})["y"]
    flat = calibrate.patches(x, next(iter(model.graph)))
    product = flat @ torch.from_numpy(weight).reshape(5, -1).T
    torch.testing.assert_close(product, y.movedim(1, -1).reshape(-1, 5), rtol=1e-4, atol=1e-4)


def test_progress_is_told() -> None:
    class Seen(Progress):
        def __init__(self) -> None:
            super().__init__()
            self.totals: list[tuple[str, float | None]] = []

        def _shown(self, name: str, total: float | None) -> Any:
            self.totals.append((name, total))
            return super()._shown(name, total)

    model = build(
        CONVOLUTIONS, first=random(16, 4, 3, 3, seed=0), second=random(16, 16, 3, 3, seed=1)
    )
    feeds = [{"x": torch.from_numpy(random(1, 4, 9, 9, seed=2))}]
    seen = Seen()
    calibrate.collect(model, graph.uses(model), feeds, feeds, progress=seen)
    assert seen.totals == [("calibrate", 1), ("gradients", 1), ("probe", 2)]


# Samples


def encode(text: str) -> list[int]:
    return [1, *(ord(c) % 97 for c in text)]


def test_rows_come_in_turn_from_the_texts() -> None:
    texts = ["\n".join(f"{kind}{i:04d}" for i in range(2000)) for kind in "ab"]
    rows = calibrate.text_tokens(encode, texts, 6, 32)
    assert rows.shape == (6, 32)
    assert rows.dtype == np.int64
    assert [r[1] for r in rows] == [ord("ab"[i % 2]) % 97 for i in range(6)]
    assert (rows[:, 0] == 1).all()
    assert len({tuple(r) for r in rows}) == 6


def test_a_short_text_goes_round() -> None:
    rows = calibrate.text_tokens(encode, ["one\ntwo\nthree\nfour\nfive\nsix\n"], 3, 20)
    assert rows.shape == (3, 20)
    assert len({tuple(r) for r in rows}) == 3


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="shorter than 256 tokens"):
        calibrate.text_tokens(encode, ["short"], 4, 256)


def test_the_default_text_is_broad_and_the_same_each_time() -> None:
    texts = calibrate.default_texts()
    assert texts == calibrate.default_texts()
    whole = "".join(texts)
    assert len(whole) > 100_000
    for alphabet in ("the", "der", "что", "的", "の", "이", "ال", "है"):
        assert alphabet in whole


def test_feeds_of_language_models(language_model: ir.Model) -> None:
    feed = calibrate.token_feeds(language_model, np.array([[5, 6, 7]]))[0]
    assert feed["input_ids"].tolist() == [[5, 6, 7]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1]]
    assert feed["past_key_values"].shape == (1, 2, 0, 4)


def test_other_inputs_are_named() -> None:
    model = build("g (float[1, 3] pixels) => (float[1, 3] y) { y = Relu(pixels) }")
    with pytest.raises(UnsupportedError, match="'pixels' is not one of a language model"):
        calibrate.token_feeds(model, np.array([[1]]))


# Keeping


def same(a: Statistics, b: Statistics) -> bool:
    def flat(s: Statistics) -> list[Any]:
        found: list[Any] = [s.samples]
        for unit, uses in s.uses.items():
            for use, factor in zip(uses, s.factors[unit], strict=True):
                values = use.moment.tolist(), use.rows.tolist(), factor
                found.append((unit, use.kind, use.source, *values))
        return found

    return flat(a) == flat(b)


def test_statistics_survive_a_file(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "key.safetensors"
    calibrate.save(statistics, path)
    again = calibrate.load(path)
    assert same(again, statistics)
    assert again.uses["gate"][0].moment is again.uses["up"][0].moment
    assert [p.name for p in path.parent.iterdir()] == ["key.safetensors"]


def test_a_cache_makes_once_and_mends_itself(statistics: Statistics, tmp_path: Path) -> None:
    made = []

    def make() -> Statistics:
        made.append(1)
        return statistics

    path = tmp_path / "s.safetensors"
    for _ in range(2):
        assert same(calibrate.cached(path, make), statistics)
    assert len(made) == 1
    path.write_bytes(path.read_bytes()[:100])
    assert same(calibrate.cached(path, make), statistics)
    assert len(made) == 2


def test_keys_tell_models_samples_and_settings_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    feeds = [{"x": torch.zeros(3)}]
    keys = [
        calibrate.cache_key([one], feeds),
        calibrate.cache_key([two], feeds),
        calibrate.cache_key([one], [{"x": torch.ones(3)}]),
        calibrate.cache_key([one], [{"y": torch.zeros(3)}]),
        calibrate.cache_key([one], feeds, settings=1),
    ]
    assert len(set(keys)) == len(keys)
    assert calibrate.cache_key([one], feeds) == keys[0]
