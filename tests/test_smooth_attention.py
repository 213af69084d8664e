"""Keys, values and their other sides: who takes factors, which, and that nothing else changes."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mxcompile import caches, graph, observe, passes
from mxcompile.formats import CACHE_FORMATS
from mxcompile.interpret import Interpreter
from mxcompile.passes import smooth_attention
from tests.blocks import arrange, parse

WIDTH, HEADS, KV_HEADS, DIM, SEQ = 64, 4, 2, 32, 24
SIZES = {
    "wq": (HEADS * DIM, WIDTH),
    "wk": (KV_HEADS * DIM, WIDTH),
    "wv": (KV_HEADS * DIM, WIDTH),
    "wo": (WIDTH, HEADS * DIM),
    "bq": (HEADS * DIM,),
    "bk": (KV_HEADS * DIM,),
    "bv": (KV_HEADS * DIM,),
    "gq": (DIM,),
    "gk": (DIM,),
    "gv": (DIM,),
    "cos": (1, SEQ, DIM // 2),
    "sin": (1, SEQ, DIM // 2),
}
PLAIN = "q = mxcompile.Linear(x, wq) k = mxcompile.Linear(x, wk) v = mxcompile.Linear(x, wv)"
BIASED = """
    q0 = mxcompile.Linear(x, wq) q = Add(q0, bq)
    k0 = mxcompile.Linear(x, wk) k = Add(k0, bk)
    v0 = mxcompile.Linear(x, wv) v = Add(v0, bv)"""
TURNED = """
    q0 = mxcompile.Linear(x, wq) k0 = mxcompile.Linear(x, wk) v = mxcompile.Linear(x, wv)
    q = RotaryEmbedding<num_heads = 4>(q0, cos, sin)
    k = RotaryEmbedding<num_heads = 2>(k0, cos, sin)"""
NEIGHBOURS = TURNED.replace("num_heads", "interleaved = 1, num_heads")
PARTLY = (
    TURNED.replace("num_heads", "rotary_embedding_dim = 16, num_heads")
    .replace("cos, sin", "c, s")
    .replace("q0 =", "c, c2 = Split<axis = 2, num_outputs = 2>(cos) "
             "s, s2 = Split<axis = 2, num_outputs = 2>(sin) q0 =", 1)
)  # fmt: skip
NORMED = """
    q0 = mxcompile.Linear(x, wq) q1 = Reshape(q0, split)
    q2 = RMSNormalization(q1, gq) q3 = Reshape(q2, merge)
    k0 = mxcompile.Linear(x, wk) k1 = Reshape(k0, split_kv)
    k2 = RMSNormalization(k1, gk) k3 = Reshape(k2, merge)
    v0 = mxcompile.Linear(x, wv) v1 = Reshape(v0, split_kv)
    v2 = RMSNormalization(v1, gv) v = Reshape(v2, merge)
    q = RotaryEmbedding<num_heads = 4>(q3, cos, sin)
    k = RotaryEmbedding<num_heads = 2>(k3, cos, sin)"""
BODIES = {
    "plain": PLAIN,
    "biases": BIASED,
    "rotary": TURNED,
    "interleaved": NEIGHBOURS,
    "rotary of a part": PARTLY,
    "norms": NORMED,
}
ATTEND = """
    a, new_k, new_v = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>
        (q, k, v, , past_k, past_v)"""
PROJECT = "y = mxcompile.Linear(a, wo)"


def build(body: str, attend: str = ATTEND, project: str = PROJECT, outputs: str = "") -> ir.Model:
    """A decoder's attention; the columns of each weight's output are of many sizes."""
    rng = np.random.default_rng(0)
    text = f"""g (float[1, {SEQ}, {WIDTH}] x, float[1, 2, past, {DIM}] past_k,
        float[1, 2, past, {DIM}] past_v) => (float[1, {SEQ}, {WIDTH}] y{outputs})
        <int64[4] split = {{0, 0, 4, 32}}, int64[4] split_kv = {{0, 0, 2, 32}},
         int64[3] merge = {{0, 0, -1}}> {{ {body} {attend} {project} }}"""
    weights = {}
    for name, shape in SIZES.items():
        if name in text:
            spread = np.exp(rng.standard_normal((shape[0],) + (1,) * (len(shape) - 1)))
            weights[name] = (rng.standard_normal(shape) * spread).astype(np.float32) / 4
    angle = np.arange(SEQ)[:, None] * 0.5 ** np.arange(DIM // 2)
    weights |= {n: f(angle)[None].astype("f4") for n, f in (("cos", np.cos), ("sin", np.sin))}
    return parse(text, {name: w for name, w in weights.items() if name in text})


def feed() -> dict[str, torch.Tensor]:
    empty = torch.zeros(1, KV_HEADS, 0, DIM)
    x = torch.randn(1, SEQ, WIDTH, generator=torch.Generator().manual_seed(0))
    return {"x": x, "past_k": empty, "past_v": empty}


def smooth(model: ir.Model, powers: dict[str, np.ndarray] | None = None) -> ir.Model:
    if powers is None:
        powers = observe.powers(model, [feed()], smooth_attention.observed(model))
    return arrange(passes.SMOOTH, model, None, powers)


def test_powers_are_means_over_the_positions_of_all_samples() -> None:
    model = build(PLAIN)
    feeds = [feed(), {**feed(), "x": 3 * feed()["x"]}]
    (found,) = observe.powers(model, feeds, ["k"]).values()
    rows = np.concatenate([f["x"][0].numpy() @ graph.weight(model, "wk").T for f in feeds])
    np.testing.assert_allclose(found, np.square(rows, dtype=np.float64).mean(0), rtol=1e-4)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_model_computes_the_same(body: str) -> None:
    model = build(body)
    (heads,) = smooth_attention.find(model)
    assert heads.keys is not None and heads.values is not None
    found = smooth(model)
    expected, y = (Interpreter(m).run(feed())["y"] for m in (model, found))
    # Every factor is applied and undone, each rounded once: a few units in the last place.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    before, after = (Interpreter(m).run(feed(), fetch=["k", "v"]) for m in (model, found))
    assert not torch.allclose(before["k"], after["k"], rtol=0.1)
    assert not torch.allclose(before["v"], after["v"], rtol=0.1)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_caches_in_four_bits_do_less_harm(body: str) -> None:
    """Errors of scores, and of what the output projection makes of values."""
    model = build(body)

    def harm(model: ir.Model) -> tuple[float, float]:
        met = Interpreter(model).run(feed(), fetch=["q", "k", "v"])
        q, k, v = (met[n].numpy().reshape(SEQ, -1, DIM) for n in ("q", "k", "v"))
        wo = graph.weight(model, "wo").reshape(WIDTH, HEADS, DIM)
        fmt = CACHE_FORMATS["int4"]
        k_error, v_error = (
            np.repeat(caches.decode(caches.encode(x, fmt), fmt) - x, HEADS // KV_HEADS, axis=1)
            for x in (k, v)
        )
        scores = np.einsum("qhd,khd->hqk", q, k_error)
        outputs = np.einsum("ohd,khd->hko", wo, v_error)
        return float(np.square(scores).sum()), float(np.square(outputs).sum())

    for before, after in zip(harm(model), harm(smooth(model)), strict=True):
        assert after < 0.8 * before


def test_factors_are_roots_of_both_sides() -> None:
    """Those of a column of keys: the fourth root of its power over that of its queries."""
    model = build(PLAIN)
    powers = observe.powers(model, [feed()], ["q", "k", "v"])
    found = smooth(model, powers)
    times = graph.weight(model, "wk")[:, 0] / graph.weight(found, "wk")[:, 0]
    asked = powers["q"].reshape(KV_HEADS, HEADS // KV_HEADS, DIM).mean(1)
    expected = (powers["k"].reshape(KV_HEADS, DIM) / asked) ** 0.25
    expected /= np.exp(np.log(expected).mean(1, keepdims=True))
    np.testing.assert_allclose(times, expected.reshape(-1), rtol=1e-4)
    back = graph.weight(found, "wq")[:, 0] / graph.weight(model, "wq")[:, 0]
    np.testing.assert_allclose(
        back, np.repeat(expected, HEADS // KV_HEADS, axis=0).reshape(-1), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("body", "alike"),
    [
        (TURNED, [(0, 16), (15, 31)]),
        (NEIGHBOURS, [(0, 1), (30, 31)]),
        (PARTLY, [(0, 8), (7, 15)]),
    ],
    ids=["halves", "neighbours", "a part"],
)
def test_columns_that_turn_together_share_a_factor(body: str, alike: list[tuple[int, int]]) -> None:
    model = build(body)
    found = smooth(model)
    times = graph.weight(found, "wk")[:, 0] / graph.weight(model, "wk")[:, 0]
    for head in times.reshape(KV_HEADS, DIM):
        for first, second in alike:
            assert head[first] == pytest.approx(head[second], rel=1e-5)
    if body == PARTLY:
        assert times[16] != pytest.approx(times[24], rel=1e-2)


def test_heads_share_the_factors_of_a_norm() -> None:
    """Also where the norm is of the other side only."""
    model = build(NORMED.replace("k2 = RMSNormalization(k1, gk)", "k2 = Identity(k1)"))
    assert smooth_attention.find(model)[0].keys is None
    text = NORMED.replace("k1 = Reshape(k0, split_kv)", "").replace(
        "k2 = RMSNormalization(k1, gk) k3 = Reshape(k2, merge)", ""
    )
    model = build(text.replace("(k3, cos", "(k0, cos"))
    found = smooth(model)
    times = graph.weight(found, "wk")[:, 0] / graph.weight(model, "wk")[:, 0]
    np.testing.assert_allclose(times[:DIM], times[DIM:], rtol=1e-5)
    y, expected = (Interpreter(m).run(feed())["y"] for m in (found, model))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_columns_that_are_always_zero_stay_finite() -> None:
    model = build(PLAIN)
    powers = observe.powers(model, [feed()], ["q", "k", "v"])
    powers["k"][:3] = 0
    powers["q"][:] = 0
    found = smooth(model, powers)
    assert np.isfinite(graph.weight(found, "wk")).all()
    assert np.isfinite(graph.weight(found, "wq")).all()


def test_what_is_not_finite_is_left_alone() -> None:
    model = build(PLAIN)
    powers = observe.powers(model, [feed()], ["q", "k", "v"])
    powers["v"][0] = np.inf
    assert np.array_equal(graph.weight(smooth(model, powers), "wv"), graph.weight(model, "wv"))


@pytest.mark.parametrize(
    ("body", "more", "keys", "values"),
    [
        (PLAIN, {"outputs": f", float[1, {SEQ}, 64] k"}, False, True),
        (PLAIN, {"outputs": f", float[1, {SEQ}, 128] a"}, True, False),
        (PLAIN.replace("v = mxcompile.Linear(x, wv)", "v = Identity(k)"), {}, False, False),
        (PLAIN, {"project": "r = Relu(a) y = mxcompile.Linear(r, wo)"}, True, False),
        (TURNED.replace("<num_heads = 2", "<interleaved = 1, num_heads = 2"), {}, False, True),
        (BIASED.replace("Add(k0, bk)", "Add(k0, bv)"), {}, False, False),
    ],
    ids=["keys are read", "output is read", "one value", "not linear", "turned otherwise",
         "a shared bias"],
)  # fmt: skip
def test_what_others_read_stays(body: str, more: dict[str, str], keys: bool, values: bool) -> None:
    (heads,) = smooth_attention.find(build(body, **more))
    assert (heads.keys is not None, heads.values is not None) == (keys, values)


def test_attention_that_does_not_cache_stays() -> None:
    attend = "a = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)"
    assert smooth_attention.observed(build(PLAIN, attend)) == []
