"""Statistics of small models against their definitions, and factors against measured harm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from mxcompile import caches, calibrate, graph, observe, statistics
from mxcompile.calibrate import Draft
from mxcompile.float_model import Feed, FloatModel, Segment, patches
from mxcompile.formats import CACHE_FORMATS, FORMATS, CacheFormat
from mxcompile.interpret import Interpreter
from mxcompile.observe import Observer
from mxcompile.probe import PERTURBATION
from mxcompile.progress import Progress
from mxcompile.quantize import Importance, dequantize, quantize
from mxcompile.samples import token_feeds
from mxcompile.statistics import (
    AROUND,
    BLIND_PRIOR,
    LEAST_AROUND,
    PRIOR,
    SHRINK,
    Rarity,
    Statistics,
    expected,
    shrunk,
)

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


def tied_language_model() -> ir.Model:
    """A gated layer between an embedding and the head that shares its table."""
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
def language_model() -> ir.Model:
    return tied_language_model()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCABULARY // 2, (6, 40))


@pytest.fixture(scope="module")
def feeds(language_model: ir.Model, tokens: np.ndarray) -> list[Feed]:
    return list(token_feeds(language_model, tokens))


@pytest.fixture(scope="module")
def found(language_model: ir.Model, feeds: list[Feed]) -> Statistics:
    return calibrate.collect(language_model, graph.uses(language_model), feeds)


@pytest.fixture(scope="module")
def probed(language_model: ir.Model, feeds: list[Feed]) -> Statistics:
    return calibrate.collect(
        language_model, graph.uses(language_model), feeds, feeds[:4], sensitivity="forward"
    )


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


def labelled(x: torch.Tensor) -> torch.Tensor:
    """The positions of each sample whose logits are looked at, flat."""
    stride = observe.HEAD_STRIDE
    return torch.cat([row[i % stride :: stride] for i, row in enumerate(x)])


def rounded(x: torch.Tensor) -> torch.Tensor:
    by_group = x.reshape(*x.shape[:-1], -1, 32)
    step = by_group.abs().amax(-1, keepdim=True) / 127
    result: torch.Tensor = ((by_group / step).round() * step).flatten(-2)
    return result


def test_rounding_of_activations_is_priced_as_it_harms(
    language_model: ir.Model, tokens: np.ndarray, found: Statistics
) -> None:
    w = weights_of(language_model)
    exact = by_hand(w, tokens)
    log_p = exact["logits"].log_softmax(-1)

    def divergence(logits: torch.Tensor) -> float:
        return float((log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean())

    e, n = exact["e"], exact["n"]
    measured = {"n": divergence(0.5 * (rounded(n) @ w["embedding"].T))}
    for name in ("e", "h"):
        # The residual stream is not rounded, only what the layers read.
        x = rounded(e) if name == "e" else e
        h = torch.sigmoid(x @ w["gate"].T) * (x @ w["up"].T)
        h = rounded(h) if name == "h" else h
        n = functional.rms_norm(e + h @ w["down"].T, (WIDTH,), w["norm"])
        measured[name] = divergence(0.5 * (n @ w["embedding"].T))
    assert found.rounding.keys() == measured.keys()
    for name, harm in measured.items():
        # 60 labels of one draw each, and the errors of 240 positions: each within a third or so.
        assert 0.6 * harm <= found.rounding[name] <= 1.7 * harm, name


def test_forward_prices_no_rounding(probed: Statistics) -> None:
    assert (probed.rounding, probed.caches) == ({}, {})


ATTENTION = """
g (int64[batch, seq] input_ids, float[batch, 2, past, 32] past_key_values_0_key,
   float[batch, 2, past, 32] past_key_values_0_value) => (float[batch, seq, 200] logits) {
    e = Gather(embedding, input_ids)
    k = mxcompile.Linear(e, key)
    v = mxcompile.Linear(e, value)
    q = mxcompile.Linear(e, query)
    a, present_0_key, present_0_value = Attention
        <q_num_heads = 4, kv_num_heads = 2, is_causal = 1, scale = 0.5>
        (q, k, v, , past_key_values_0_key, past_key_values_0_value)
    o = mxcompile.Linear(a, output)
    s = Add(e, o)
    n = RMSNormalization(s, norm)
    logits = mxcompile.Linear(n, embedding)
}
"""


def test_formats_of_caches_are_priced_as_they_harm(tokens: np.ndarray) -> None:
    w = {
        "embedding": random(VOCABULARY, WIDTH, seed=0),
        "key": random(64, WIDTH, seed=1, scale=0.3),
        "value": random(64, WIDTH, seed=2, scale=0.3),
        "query": random(128, WIDTH, seed=3, scale=0.3),
        "output": random(WIDTH, 128, seed=4, scale=0.2),
    }
    model = build(ATTENTION + LINEAR, **w, norm=np.ones(WIDTH, np.float32))
    feeds = list(token_feeds(model, tokens))
    found = calibrate.collect(model, graph.uses(model), feeds).caches
    names = ["past_key_values_0_key", "past_key_values_0_value"]
    assert [c.name for c in caches.find(model)] == names == list(found)
    t = {key: torch.from_numpy(value) for key, value in w.items()}
    e = t["embedding"][torch.from_numpy(tokens)]
    q, k, v = (
        (e @ t[name].T).reshape(*e.shape[:2], -1, 32).transpose(1, 2)
        for name in ("query", "key", "value")
    )

    def logits(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.5, enable_gqa=True
        )
        n = functional.rms_norm(e + a.transpose(1, 2).flatten(2) @ t["output"].T, (WIDTH,))
        return n @ t["embedding"].T

    def kept(x: torch.Tensor, fmt: CacheFormat) -> torch.Tensor:
        return torch.from_numpy(caches.decode(caches.encode(x.numpy(), fmt), fmt))

    for fmt in (CACHE_FORMATS["int4"], CACHE_FORMATS["int8"]):
        exact = logits(k, v)
        for name, rough in zip(
            names, (logits(kept(k, fmt), v), logits(k, kept(v, fmt))), strict=True
        ):
            # 60 labels of one draw each: within a third or so.
            harm = divergence(exact, rough)
            assert 0.6 * harm <= found[name][fmt.name] <= 1.7 * harm, (name, fmt)
    for by_format in found.values():
        assert by_format["int4"] > 50 * by_format["int8"] > 50 * by_format["fp16"] > 0


def test_second_moments(language_model: ir.Model, tokens: np.ndarray, probed: Statistics) -> None:
    met = by_hand(weights_of(language_model), tokens)
    assert probed.samples == tokens.size
    for unit, use, x in (
        ("gate", 0, met["e"].flatten(0, 1)),
        ("down", 0, met["h"].flatten(0, 1)),
        ("embedding", 1, labelled(met["n"])),
    ):
        moment = torch.from_numpy(probed.uses[unit][use].moment)
        torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_lookups_by_computed_indices_count(tokens: np.ndarray) -> None:
    """As position tables are read: the indices are no input and nothing else needs them."""
    model = build(
        """
        g (int64[batch, seq] input_ids) => (float[batch, seq, 32] y) {
            ids = Add(input_ids, one)
            e = Gather(table, ids)
            y = Sigmoid(e)
        }
        """,
        table=random(VOCABULARY, WIDTH, seed=0),
        one=np.array(1, np.int64),
    )
    feeds = [{"input_ids": torch.from_numpy(row[None])} for row in tokens]
    (use,) = (found := calibrate.collect(model, graph.uses(model), feeds)).uses["table"]
    counts = np.bincount(tokens.flatten() + 1, minlength=VOCABULARY) / tokens.size
    np.testing.assert_allclose(use.rows, counts, rtol=1e-5)
    assert found.factors["table"] == (tokens.shape[1],)


def test_positions_count_by_their_gradients(language_model: ir.Model, tokens: np.ndarray) -> None:
    """One sample: the moment of ``down`` is weighed with the squared slopes of what it computes."""
    w, ids = weights_of(language_model), tokens[:1]
    feed = token_feeds(language_model, ids)[0]
    observer = Observer(FloatModel(language_model, graph.uses(language_model)))
    list(observer.see([feed]))
    use = observer.statistics().uses["down"][0]

    met = by_hand(w, ids)
    y = (met["h"] @ w["down"].T)[0].requires_grad_()
    n = functional.rms_norm(met["e"][0] + y, (WIDTH,), w["norm"])
    log_p = (0.5 * (n @ w["embedding"].T)).log_softmax(-1)[:: observe.HEAD_STRIDE]
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(-log_p.gather(1, labels).sum(), y)
    slope *= observe.HEAD_STRIDE**0.5
    weights = slope.square().sum(1)
    expected = (met["h"][0].T * weights) @ met["h"][0] / weights.sum()
    torch.testing.assert_close(torch.from_numpy(use.moment), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        torch.from_numpy(use.rows), slope.square().mean(0), rtol=1e-3, atol=1e-9
    )


DEEP = """
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
   float[batch, 2, past, 4] past_key_values) => (float[batch, seq, 200] logits) {
    two = Constant<value_ints = [2]>()
    end = Constant<value_ints = [3]>()
    one = Constant<value = float {1}>()
    e = Gather(embedding, input_ids)
    size = Shape(past_key_values)
    past = Slice(size, two, end)
    p = Cast<to = 1>(past)
    m = Add(p, one)
    a1 = mxcompile.Linear(e, first)
    b1 = Mul(a1, m)
    c1 = Sigmoid(b1)
    d1 = mxcompile.Linear(c1, second)
    s1 = Add(e, d1)
    n1 = RMSNormalization(s1, norm)
    a2 = mxcompile.Linear(n1, third)
    b2 = Mul(a2, m)
    c2 = Sigmoid(b2)
    d2 = mxcompile.Linear(c2, fourth)
    s2 = Add(n1, d2)
    n2 = RMSNormalization(s2, norm)
    logits = mxcompile.Linear(n2, embedding)
}
"""
"""A layer that normalizes before its sum is read on, one that does so behind it, and a value from
shapes that both read."""


def deep_language_model() -> ir.Model:
    square = {
        name: random(WIDTH, WIDTH, seed=seed, scale=0.3)
        for seed, name in enumerate(("first", "second", "third", "fourth"))
    }
    return build(
        DEEP + LINEAR,
        embedding=random(VOCABULARY, WIDTH, seed=5),
        norm=np.ones(WIDTH, np.float32),
        **square,
    )


@pytest.mark.parametrize(
    ("model", "starts", "constants"),
    [
        (tied_language_model(), ["s"], []),
        (deep_language_model(), ["s1", "s2"], ["m"]),
        (
            build(
                CONVOLUTIONS.replace("1, 4,", "1, 32,"),
                first=random(32, 32, 3, 3, seed=0),
                second=random(16, 32, 3, 3, seed=1),
            ),
            ["c"],
            [],
        ),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_segments_see_what_the_whole_graph_does(
    model: ir.Model, starts: list[str], constants: list[str], gradients: bool
) -> None:
    watched, whole = (FloatModel(model, graph.uses(model)) for _ in range(2))
    assert [s.start for s in watched.segments] == [None, *starts]
    assert watched.constants == constants
    whole.segments = [Segment(None, whole.fetched)]
    if model.graph.inputs[0].name == "x":
        feed: Feed = {"x": torch.from_numpy(random(1, 32, 9, 9, seed=2))}
    else:
        feed = token_feeds(model, np.arange(40)[None])[0]
    observers = [Observer(each, gradients=gradients) for each in (watched, whole)]
    for observer in observers:
        list(observer.see([feed]))
    found, expected = (observer.sums for observer in observers)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-9, msg=key)


def test_layers_that_share_an_input_share_its_moment(found: Statistics) -> None:
    gate, up = found.uses["gate"][0], found.uses["up"][0]
    assert gate.moment is up.moment
    assert found.factors["gate"] == found.factors["up"] == (0.5,)


def test_vocabulary_rows(
    language_model: ir.Model, tokens: np.ndarray, probed: Statistics, found: Statistics
) -> None:
    lookup, head = probed.uses["embedding"]
    assert (lookup.kind, head.kind) == ("embedding", "linear")
    often = np.bincount(tokens.reshape(-1), minlength=VOCABULARY) / tokens.size
    np.testing.assert_allclose(lookup.rows, often, rtol=1e-6)
    p = labelled(by_hand(weights_of(language_model), tokens)["logits"].softmax(-1))
    # What the head computes is halved before it is a logit.
    expected = 0.25 * (p * (1 - p)).mean(0)
    for each in (probed, found):
        np.testing.assert_allclose(each.uses["embedding"][1].rows, expected, rtol=1e-4)
        likely = each.uses["embedding"][0].likely
        assert likely is not None
        np.testing.assert_allclose(likely, p.mean(0), rtol=1e-4)


def test_rows_that_were_not_met_are_not_free(found: Statistics) -> None:
    for use in found.uses["embedding"]:
        weights = use.weights
        assert weights.shape == (VOCABULARY,)
        assert weights.min() >= 0.9 * SHRINK * weights.mean() > 0
    rows = np.array([0, 0, 0, 4], np.float32)
    assert shrunk(rows) == pytest.approx([SHRINK, SHRINK, SHRINK, 4 - 3 * SHRINK])


def test_lookups_that_were_counted_tell_how_often_rows_will_be_read() -> None:
    """Frequencies from the prior, counted once; the estimate beats the counts and is unbiased."""
    rng = np.random.default_rng(0)
    rows, count = 1 << 14, 1 << 13
    frequency = rng.gamma(BLIND_PRIOR, 1 / BLIND_PRIOR, rows) / rows
    counted = rng.poisson(count * frequency)
    found = expected((counted / count).astype(np.float32), count)
    for times in range(4):
        met = counted == times
        assert found[met].mean() == pytest.approx(frequency[met].mean(), rel=0.1)
    often = np.full(512, 2.0, np.float32)
    np.testing.assert_allclose(expected(often, 1000), often, rtol=1e-6)


def test_what_the_model_holds_for_likely_tells_rows_apart_that_were_not_met() -> None:
    rng = np.random.default_rng(0)
    rows, count = 1 << 12, 1 << 10
    likely = rng.gamma(0.1, 1, rows).astype(np.float32)
    likely /= likely.sum()
    frequency = rng.gamma(PRIOR, 1 / PRIOR, rows) * likely
    counted = (rng.poisson(count * frequency) / count).astype(np.float32)
    blind, seeing = expected(counted, count), expected(counted, count, likely)
    entropies = [-(frequency * np.log(found / found.sum())).sum() for found in (blind, seeing)]
    assert entropies[1] < entropies[0] - 0.3
    unmet = counted == 0
    assert np.corrcoef(frequency[unmet], seeing[unmet])[0, 1] > 0.5
    assert seeing.sum() == pytest.approx(1, rel=0.2)


TABLE = 2048
COMMON = 32
"""Tokens of a table that are read often; the others are rare."""

NAMING = """
g (int64[1, seq] input_ids) => (float[1, seq, 32] y) {
    e = Gather(table, input_ids)
    p = Gather(power, input_ids)
    t = Unsqueeze(p, last)
    y = Mul(e, t)
}
"""


def naming_model(rare: float) -> tuple[ir.Model, list[Feed]]:
    """A model that multiplies the rows of rare tokens, and texts of which every fourth is one."""
    power = np.where(np.arange(TABLE) < COMMON, 1, rare).astype(np.float32)
    table = random(TABLE, WIDTH, seed=0)
    model = build(NAMING, table=table, power=power, last=np.array([-1]))
    rng = np.random.default_rng(1)
    ids = np.where(
        rng.random((40, 64)) < 0.25,
        rng.integers(COMMON, TABLE, (40, 64)),
        rng.integers(0, COMMON, (40, 64)),
    )
    return model, list(token_feeds(model, ids))


@pytest.mark.parametrize("rare", [1.0, 3.0])
def test_rare_rows_count_as_much_more_as_measured(rare: float) -> None:
    """An error in a row does harm in proportion to the square of what multiplies it."""
    model, feeds = naming_model(rare)
    found = calibrate.collect(model, graph.uses(model), feeds, feeds[:2])
    (use,) = found.uses["table"]
    assert use.rarity is not None
    low, high = use.rarity.factors[0], use.rarity.factors[-1]
    # Rows of 32 columns, some hundred lookups of each kind: their errors vary by a tenth or so.
    assert low / high == pytest.approx(rare**2, rel=0.15)
    plain = replace(use, rarity=None)
    gain = use.weights / plain.weights
    assert np.median(gain[:COMMON]) == pytest.approx(high, rel=0.05)
    assert np.median(gain[COMMON:]) == pytest.approx(low, rel=0.05)


def test_rarity_holds_beyond_what_was_measured() -> None:
    rarity = Rarity(np.array([1e-4, 1e-2]), np.array([3.0, 1.0]))
    found = rarity.of(np.array([0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.5]))
    assert found == pytest.approx([3, 3, 3, 2, 1, 1])


def test_tokens_that_are_all_alike_have_one_factor() -> None:
    model, _ = naming_model(1.0)
    feeds = list(token_feeds(model, np.zeros((4, 16), np.int64)))
    found = calibrate.collect(model, graph.uses(model), feeds, feeds[:1])
    rarity = found.uses["table"][0].rarity
    assert rarity is not None and len(rarity.levels) == 1
    assert np.isfinite(rarity.factors).all()


def test_small_tables_and_those_of_language_models_have_no_rarity() -> None:
    model, feeds = naming_model(1.0)
    model.graph.outputs[0].name = "logits"
    found = calibrate.collect(model, graph.uses(model), feeds, feeds[:1])
    assert found.uses["table"][0].rarity is None
    small = build(NAMING, table=random(200, WIDTH, seed=0), power=np.ones(200, "f4"),
                  last=np.array([-1]))  # fmt: skip
    feeds = list(token_feeds(small, np.arange(64).reshape(1, 64)))
    found = calibrate.collect(small, graph.uses(small), feeds, feeds[:1])
    assert found.uses["table"][0].rarity is None


def test_an_unmet_row_counts_as_those_around_it_do() -> None:
    half = AROUND * LEAST_AROUND
    frequent, rare = np.tile([1.0, 0.0], half // 2), np.tile([0.01, 0.0], half // 2)
    weights = shrunk(np.concatenate([frequent, rare]).astype(np.float32))
    assert weights[half // 2 + 1] == pytest.approx(SHRINK * 0.5)
    assert weights[-half // 2 + 1] == pytest.approx(SHRINK * 0.005)
    assert weights.mean() == pytest.approx(0.505 / 2, rel=1e-3)  # edges are whole windows too


def test_fisher_information_of_rows(language_model: ir.Model, tokens: np.ndarray) -> None:
    """Squared gradients at a layer's output, against those at all labels, weighed by p."""
    model = language_model
    ids = torch.from_numpy(tokens[:1, :3]).expand(8000, 3)
    observer = Observer(FloatModel(model, graph.uses(model)))
    list(observer.see([{"input_ids": ids}]))
    rows = observer.statistics().uses["down"][0].rows

    w = weights_of(model)
    met = by_hand(w, tokens[:1, :3])
    y = (met["h"] @ w["down"].T)[0].requires_grad_()
    n = functional.rms_norm(met["e"][0] + y, (WIDTH,), w["norm"])
    log_p = (0.5 * (n @ w["embedding"].T)).log_softmax(-1)
    expected = torch.zeros(WIDTH)
    for label in range(VOCABULARY):
        (slope,) = torch.autograd.grad(log_p[:, label].sum(), y, retain_graph=True)
        expected += (log_p[:, label].detach().exp()[:, None] * slope.square()).mean(0)
    np.testing.assert_allclose(rows, expected.numpy(), rtol=0.15)


def test_a_probe_finds_the_harm_it_measured(
    language_model: ir.Model, tokens: np.ndarray, probed: Statistics
) -> None:
    """Damage as priced, of the perturbation itself, is the divergence of that perturbation."""
    weights = weights_of(language_model)
    rough = dict(weights)
    damage = 0.0
    for unit in ("gate", "up"):
        importance = Importance.of(probed.uses[unit][0].diagonal)
        fmt = PERTURBATION
        values = dequantize(quantize(weights[unit].numpy(), fmt, importance), fmt)
        rough[unit] = torch.from_numpy(values)
        damage += float(probed.damage(unit, rough[unit] - weights[unit]).sum())
    compared = np.s_[:4], np.s_[3::4]
    exact = by_hand(weights, tokens[:4])["logits"][:, 3::4]
    measured = divergence(exact, by_hand(rough, tokens[compared[0]])["logits"][:, 3::4])
    assert damage == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("sensitivity", ["found", "probed"])
def test_the_sum_of_damages_predicts_the_divergence(
    language_model: ir.Model,
    tokens: np.ndarray,
    sensitivity: str,
    request: pytest.FixtureRequest,
) -> None:
    """All weights at once, in another format than the probe's."""
    statistics = request.getfixturevalue(sensitivity)
    weights = weights_of(language_model)
    exact = by_hand(weights, tokens)["logits"]
    fmt = FORMATS["int4"]
    rough, damage = dict(weights), 0.0
    for unit in statistics.uses:
        importance = Importance.of(statistics.uses[unit][-1].diagonal)
        values = dequantize(quantize(weights[unit].numpy(), fmt, importance), fmt)
        rough[unit] = torch.from_numpy(values)
        damage += float(statistics.damage(unit, rough[unit] - weights[unit]).sum())
    measured = divergence(exact, by_hand(rough, tokens)["logits"])
    assert 0.6 * measured < damage < 1.7 * measured


def test_the_heads_factor_follows_from_the_expansion(
    language_model: ir.Model, tokens: np.ndarray, probed: Statistics
) -> None:
    """Half of E[p (1 - p)] dW H dW^T, times the square of what scales the logits after the head."""
    weights = weights_of(language_model)
    met = by_hand(weights, tokens)
    delta = torch.from_numpy(random(VOCABULARY, WIDTH, seed=5, scale=0.02))
    rough = 0.5 * (met["n"] @ (weights["embedding"] + delta).T)
    use, factor = probed.uses["embedding"][1], probed.factors["embedding"][1]
    damage = factor * float(use.errors(delta).sum())
    assert factor == pytest.approx(0.5, rel=0.1)
    assert damage == pytest.approx(divergence(met["logits"], rough), rel=0.2)


def test_the_moments_of_all_uses_add_up(found: Statistics) -> None:
    (lookup, head), factors = found.uses["embedding"], found.factors["embedding"]
    expected = np.diag(factors[0] * lookup.rows.mean() * lookup.moment)
    expected = expected + factors[1] * head.rows.mean() * head.moment
    np.testing.assert_allclose(found.moment("embedding"), expected, rtol=1e-5)


def test_rows_are_rounded_for_what_they_meet_most(found: Statistics) -> None:
    """A row that is looked up more than it is multiplied is rounded for that."""
    (lookup, head), factors = found.uses["embedding"], found.factors["embedding"]
    moments, kinds = found.kinds("embedding")
    assert kinds is not None and set(kinds) == set(range(len(moments)))
    masses = [
        f * use.weights * use.diagonal.sum() for use, f in zip((lookup, head), factors, strict=True)
    ]
    share = masses[0] / sum(masses)
    assert share[kinds == len(moments) - 1].min() > share[kinds == 0].max()
    for kind, moment in enumerate(moments):
        mean = share[kinds == kind].mean()
        expected = mean * np.diag(lookup.moment / lookup.moment.sum())
        expected = expected + (1 - mean) * head.moment / np.trace(head.moment)
        np.testing.assert_allclose(moment, expected, rtol=1e-4, atol=1e-7)
    (alone,), nothing = found.kinds("gate")
    np.testing.assert_array_equal(alone, found.moment("gate"))
    assert nothing is None


def test_wide_inputs_keep_the_diagonal() -> None:
    wide = observe.FULL_COLUMNS + 32
    text = f"g (float[1, 3, {wide}] x) => (float[1, 3, 16] y) {{ y = mxcompile.Linear(x, w) }}"
    model = build(text + LINEAR, w=random(16, wide, seed=0))
    x = torch.from_numpy(random(1, 3, wide, seed=1))
    feeds = [{"x": x}]
    found = calibrate.collect(model, graph.uses(model), feeds, feeds, sensitivity="forward")
    use = found.uses["w"][0]
    torch.testing.assert_close(torch.from_numpy(use.moment), x[0].square().mean(0))
    delta = torch.from_numpy(random(16, wide, seed=2))
    errors = (delta.square() * x[0].square().mean(0)).sum(1)
    torch.testing.assert_close(use.errors(delta), torch.from_numpy(shrunk(use.rows)) * errors)
    assert found.moment("w").shape == (wide,)


def test_convolutions_and_relative_errors() -> None:
    first, second = random(16, 4, 3, 3, seed=0), random(16, 16, 3, 3, seed=1)
    model = build(CONVOLUTIONS, first=first, second=second)
    feeds = [{"x": torch.from_numpy(random(1, 4, 9, 9, seed=i))} for i in range(2, 5)]
    found = calibrate.collect(model, graph.uses(model), feeds, feeds[:1], sensitivity="forward")
    taps = torch.cat([functional.unfold(f["x"], 3, padding=1)[0].T for f in feeds])
    moment = torch.from_numpy(found.uses["first"][0].moment)
    torch.testing.assert_close(moment, taps.T @ taps / len(taps), rtol=1e-4, atol=1e-5)

    fmt = PERTURBATION
    flat = second.reshape(16, -1)
    rough = dequantize(quantize(flat, fmt, Importance.of(found.uses["second"][0].diagonal)), fmt)
    inner = torch.relu(functional.conv2d(feeds[0]["x"], torch.from_numpy(first), padding=1))
    exact, other = (
        functional.conv2d(inner, torch.from_numpy(w).reshape(second.shape), stride=3)
        for w in (flat, rough)
    )
    measured = float((exact - other).square().sum() / exact.square().sum())
    damage = float(found.damage("second", torch.from_numpy(rough - flat)).sum())
    assert damage == pytest.approx(measured, rel=1e-3)


def test_without_logits_gradients_tell_rows_and_probes_tell_layers() -> None:
    first, second = random(16, 4, 3, 3, seed=0), random(16, 16, 3, 3, seed=1)
    model = build(CONVOLUTIONS, first=first, second=second)
    feeds = [{"x": torch.from_numpy(random(1, 4, 9, 9, seed=i))} for i in range(2, 5)]
    alone = calibrate.collect(model, graph.uses(model), feeds)
    found = calibrate.collect(model, graph.uses(model), feeds, feeds[:1])
    flat = first.reshape(16, -1)
    (use,), (same,) = found.uses["first"], alone.uses["first"]
    np.testing.assert_array_equal(use.rows, same.rows)
    assert np.ptp(use.rows) > 0 and found.factors != alone.factors
    rough = dequantize(quantize(flat, PERTURBATION, Importance.of(use.diagonal)), PERTURBATION)

    def run(weight: np.ndarray) -> torch.Tensor:
        kernel = torch.from_numpy(weight).reshape(first.shape)
        inner = torch.relu(functional.conv2d(feeds[0]["x"], kernel, padding=1))
        return functional.conv2d(inner, torch.from_numpy(second), stride=3)

    exact = run(flat)
    measured = float((run(rough) - exact).square().sum() / exact.square().sum())
    damage = float(found.damage("first", torch.from_numpy(rough - flat)).sum())
    assert damage == pytest.approx(measured, rel=1e-3)


def test_gradients_price_relative_errors() -> None:
    """Of a model without logits: damages predict the squared error over the output's power."""
    first, second = random(16, 4, 3, 3, seed=0), random(16, 16, 3, 3, seed=1)
    model = build(CONVOLUTIONS, first=first, second=second)
    feeds = [{"x": torch.from_numpy(random(1, 4, 9, 9, seed=i))} for i in range(2, 6)]
    found = calibrate.collect(model, graph.uses(model), feeds)

    def run(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
        x = torch.cat([feed["x"] for feed in feeds])
        inner = torch.relu(functional.conv2d(x, torch.from_numpy(a), padding=1))
        return functional.conv2d(inner, torch.from_numpy(b), stride=3)

    exact = run(first, second)
    for unit, delta in (
        ("first", random(16, 36, seed=7, scale=0.05)),
        ("second", random(16, 144, seed=8, scale=0.05)),
    ):
        a = first + delta.reshape(first.shape) if unit == "first" else first
        b = second + delta.reshape(second.shape) if unit == "second" else second
        errors = (run(a, b) - exact).square().sum((1, 2, 3)) / exact.square().sum((1, 2, 3))
        damage = float(found.damage(unit, torch.from_numpy(delta)).sum())
        # A mean over 16 random gradients of 9 outputs and more: within a third of it.
        assert damage == pytest.approx(float(errors.mean()), rel=0.35)


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
    flat = patches(x, next(iter(model.graph)))
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
    uses = graph.uses(model)
    calibrate.collect(model, uses, feeds, progress=seen)
    calibrate.collect(model, uses, feeds, feeds, sensitivity="forward", progress=seen)
    assert seen.totals == [("calibrate", calibrate.PASSES), ("calibrate", 1), ("probe", 2)]


def same(a: Statistics, b: Statistics) -> bool:
    def flat(s: Statistics) -> list[Any]:
        found: list[Any] = [s.samples, dict(s.caches)]
        for unit, uses in s.uses.items():
            for use, factor in zip(uses, s.factors[unit], strict=True):
                likely = None if use.likely is None else use.likely.tolist()
                rarity = use.rarity and (use.rarity.levels.tolist(), use.rarity.factors.tolist())
                values = use.moment.tolist(), use.rows.tolist(), use.count, likely, rarity
                found.append((unit, use.kind, use.source, *values, factor))
        return found

    return flat(a) == flat(b)


def test_statistics_survive_a_file(found: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "key.safetensors"
    rarity = Rarity(np.array([1e-5, 0.1]), np.array([2.0, 0.5]))
    uses = [replace(use, rarity=rarity) for use in found.uses["embedding"]]
    found = replace(
        found,
        uses={**found.uses, "embedding": tuple(uses)},
        caches={"past_key_values.0.key": {"int4": 0.25, "int8": 0.001}},
    )
    statistics.save(found, path)
    again = statistics.load(path)
    assert same(again, found)
    assert again.uses["gate"][0].moment is again.uses["up"][0].moment
    assert [p.name for p in path.parent.iterdir()] == ["key.safetensors"]


def test_a_cache_makes_once_and_mends_itself(found: Statistics, tmp_path: Path) -> None:
    made = []

    def make(draft: Draft) -> Statistics:
        made.append(draft)
        return found

    path = tmp_path / "s.safetensors"
    for _ in range(2):
        assert same(calibrate.cached(path, make), found)
    assert len(made) == 1
    path.write_bytes(path.read_bytes()[:100])
    assert same(calibrate.cached(path, make), found)
    assert len(made) == 2


def test_an_interrupted_pass_goes_on_where_it_was(
    language_model: ir.Model,
    feeds: list[Feed],
    found: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "KEEP_SECONDS", 0)
    path, uses = tmp_path / "s.draft", graph.uses(language_model)
    begun = Observer(FloatModel(language_model, uses))
    for _ in begun.see(feeds[:4]):
        Draft(path).keep(begun)
    assert [p.name for p in tmp_path.iterdir()] == ["s.draft"]

    run: list[int] = []
    see = Observer.see

    def counted(self: Observer, feeds: list[Feed]) -> Any:
        run.append(len(feeds))
        return see(self, feeds)

    monkeypatch.setattr(Observer, "see", counted)
    resumed = calibrate.collect(language_model, uses, feeds, draft=Draft(path))
    assert run == [len(feeds) - 4]
    assert same(resumed, found)
    path.write_bytes(b"damaged")
    assert same(calibrate.collect(language_model, uses, feeds, draft=Draft(path)), found)
    assert run == [len(feeds) - 4, len(feeds)]


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
