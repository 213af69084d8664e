"""Strategies against what their papers say, on a language model by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from mxcompile import evidence as module
from mxcompile import graph, price, strategies
from mxcompile.calibrate import collect
from mxcompile.errors import BudgetError, UsageError
from mxcompile.evidence import Errors, Evidence, Observed, Rounded
from mxcompile.formats import FORMATS, Format
from mxcompile.gptq import Quantizer
from mxcompile.plan import PrecisionPlan, Rule, TileFormats, Unit, tile_bytes
from mxcompile.price import Costs
from mxcompile.probe import Probe
from mxcompile.quantize import dequantize_tiles
from mxcompile.samples import token_feeds
from mxcompile.strategies import STRATEGIES
from tests.test_calibrate import (
    VOCABULARY,
    by_hand,
    divergence,
    tied_language_model,
    weights_of,
)

pytestmark = pytest.mark.filterwarnings("error:.*not writable")
ALL = tuple(FORMATS[f"int{bits}"] for bits in (2, 3, 4, 5, 6, 8))


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return tied_language_model()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCABULARY // 2, (2, 40))


@pytest.fixture(scope="module")
def evidence(model: ir.Model, tokens: np.ndarray) -> Evidence:
    feeds = token_feeds(model, tokens)
    found = collect(model, graph.uses(model), feeds)
    units = graph.units(model)
    costs = price.price(lambda unit: graph.weight(model, unit), units, found, ALL)
    return Evidence(model, found, costs, feeds, feeds[:1])


def limit_of(costs: Costs, share: float) -> int:
    """A part of the way from the narrowest plan's bytes to the widest's."""
    low, high = (PrecisionPlan.uniform(costs.units, f).weight_bytes for f in (ALL[0], ALL[-1]))
    return int(low + share * (high - low))


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_all_keep_the_limit_and_spend_it(evidence: Evidence, share: float) -> None:
    limit = limit_of(evidence.costs, share)
    plans = {name: strategy(evidence, limit) for name, strategy in STRATEGIES.items()}
    sizes = {name: plan.weight_bytes for name, plan in plans.items()}
    assert all(size <= limit for size in sizes.values())
    step = max(tile_bytes(u.columns, ALL[-1]) for u in evidence.costs.units)
    assert {n for n, size in sizes.items() if size < limit - step} <= {"uniform"}
    damages = {name: evidence.costs.total(plan) for name, plan in plans.items()}
    assert min(damages.values()) == damages["ours"]


def test_a_limit_below_the_narrowest_plan_is_refused(evidence: Evidence) -> None:
    for name, strategy in STRATEGIES.items():
        if name != "uniform":
            with pytest.raises(BudgetError, match="the smallest plan takes"):
                strategy(evidence, 100)


@pytest.mark.parametrize("name", STRATEGIES)
def test_rules_override_a_strategy_and_the_limit_holds(evidence: Evidence, name: str) -> None:
    costs = evidence.costs
    rules = (Rule("down", FORMATS["int8"]), Rule("embed*", FORMATS["int4"], floor=True))
    limit = limit_of(costs, 0.6)
    plan = strategies.ruled(name, rules)(evidence, limit)
    assert set(plan.tiles["down"].formats) == {FORMATS["int8"]}
    assert min(fmt.bits for fmt in plan.tiles["embedding"].formats) >= 4
    assert plan.weight_bytes <= limit
    if name != "uniform":  # of equal choices any is as good
        step = max(tile_bytes(u.columns, ALL[-1]) for u in costs.units)
        assert plan.weight_bytes > limit - 4 * step
    with pytest.raises(BudgetError, match="the smallest plan takes"):
        strategies.ruled(name, rules)(evidence, limit_of(costs, 0.0))


def test_names_are_checked() -> None:
    assert list(strategies.find("all")) == list(STRATEGIES)
    assert list(strategies.find("ours,mse")) == ["ours", "mse"]
    with pytest.raises(UsageError, match="no strategy 'best'; strategies: uniform, spread, "):
        strategies.find("ours,best")


def test_uniform_and_spread(evidence: Evidence) -> None:
    limit = limit_of(evidence.costs, 0.3)
    plan = strategies.uniform(evidence, limit)
    (low,) = {f for tiles in plan.tiles.values() for f in tiles.formats}
    mixed = strategies.spread(evidence, limit)
    shares = []
    for unit in mixed.units:
        formats = mixed.tiles[unit.name].formats
        assert set(formats) <= {low, ALL[ALL.index(low) + 1]}
        shares.append((len(formats) - formats.count(low), unit.tiles))
    whole = sum(wide for wide, _ in shares) / sum(count for _, count in shares)
    assert all(abs(wide - whole * count) < 2 for wide, count in shares)


def invented(units: tuple[Unit, ...], **found: Any) -> Evidence:
    """Evidence that is only what a strategy asks for."""
    rng = np.random.default_rng(5)
    damage = {u.name: np.sort(rng.random((u.tiles, len(ALL))), 1)[:, ::-1] for u in units}
    costs = Costs(units, ALL, damage)
    fake = object.__new__(Evidence)
    for name, value in {"costs": costs, **found}.items():
        fake.__dict__[name] = value
    return fake


def test_q4_k_m_promotes_the_layers_that_llama_cpp_does() -> None:
    roles = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    units = tuple(
        Unit(f"model.layers.{i}.{role}.weight", 64, 64) for i in range(16) for role in roles
    )
    head = Unit("lm_head.weight", 640, 64)
    use = object()
    watched = type("Watched", (), {"head": use, "uses": {u.name: [] for u in units}})
    watched.uses[head.name] = [use]  # type: ignore[attr-defined]
    found = invented((*units, head), watched=watched)
    promoted = {i for i in range(16) if i < 2 or i >= 14 or (i - 2) % 3 == 2}
    assert promoted == {0, 1, 4, 7, 10, 13, 14, 15}
    wanted = [f"model.layers.{i}.{r}.weight" for i in promoted for r in (roles[1], roles[3])]
    narrow, wide = (tile_bytes(64, FORMATS[f]) for f in ("int4", "int6"))
    least = PrecisionPlan.uniform(found.costs.units, FORMATS["int4"]).weight_bytes
    plan = strategies.q4_k_m(found, least + len(wanted) * 4 * (wide - narrow))
    wider = {u.name for u in plan.units if FORMATS["int6"] in plan.tiles[u.name].formats}
    assert wider == set(wanted)
    assert {f for t in plan.tiles.values() for f in t.formats} == {FORMATS["int4"], FORMATS["int6"]}
    # The output comes next.
    plan = strategies.q4_k_m(found, least + (len(wanted) * 4 + 10) * (wide - narrow))
    assert plan.tiles[head.name].formats.count(FORMATS["int6"]) == 10


def wide_tiles(plan: PrecisionPlan) -> dict[str, list[int]]:
    return {
        name: [i for i, fmt in enumerate(tiles.formats) if fmt is ALL[-1]]
        for name, tiles in plan.tiles.items()
    }


def room_for(costs: Costs, low: Format, wide: int, columns: int) -> int:
    """The bytes of a uniform plan with so many tiles in 8 bits."""
    step = tile_bytes(columns, ALL[-1]) - tile_bytes(columns, low)
    return PrecisionPlan.uniform(costs.units, low).weight_bytes + wide * step


def test_owq_keeps_the_same_share_of_every_layer() -> None:
    units = (Unit("a", 160, 64), Unit("b", 320, 64))
    rng = np.random.default_rng(6)
    met = {u.name: np.tile(rng.random((u.tiles, 1)), (1, len(ALL))) for u in units}
    none = np.zeros((0, 0))
    met["b"] *= 1000  # the layers' own scales do not count
    found = invented(units, errors={k: Errors(none, m, none) for k, m in met.items()})
    plan = strategies.owq(found, room_for(found.costs, ALL[-2], 6, 64))
    for name, count in (("a", 2), ("b", 4)):
        assert wide_tiles(plan)[name] == sorted(np.argsort(-met[name][:, 0])[:count])


def test_mixllm_ranks_all_features_together() -> None:
    units = (Unit("a", 160, 64), Unit("b", 320, 64))
    found = invented(units)
    plan = strategies.mixllm(found, room_for(found.costs, ALL[-2], 7, 64))
    saved = np.concatenate([d[:, -2] - d[:, -1] for d in found.costs.damage.values()])
    first = set(np.argsort(-saved)[:7].tolist())
    wide = wide_tiles(plan)
    assert {*wide["a"], *(i + 10 for i in wide["b"])} == first


def test_nncf_ranks_layers_by_variance_over_noise() -> None:
    units = tuple(Unit(name, 64, 64) for name in "abc")
    noise, variance = {"a": 1.0, "b": 4.0, "c": 1.0}, {"a": 2.0, "b": 12.0, "c": 1.0}
    none = np.zeros((0, 0))
    errors = {k: Errors(np.full((4, len(ALL)), n), none, none) for k, n in noise.items()}
    observed = {k: Observed(torch.zeros(0), none, v) for k, v in variance.items()}
    found = invented(units, errors=errors, observed=observed)
    plan = strategies.nncf(found, room_for(found.costs, ALL[-2], 6, 64))
    assert {k: len(v) for k, v in wide_tiles(plan).items()} == {"a": 2, "b": 4, "c": 0}


def test_layers_are_spent_on_by_their_harm() -> None:
    """Two layers of one size, one of which is harmed a hundred times as much."""
    units = (Unit("a", 64, 64), Unit("b", 64, 64))
    fall = np.array([0.09, 0.023, 0.0059, 0.0014, 0.00035, 0.00002])
    found = invented(units, harm={"a": fall, "b": 100 * fall})
    plan = strategies.exl3(found, PrecisionPlan.uniform(units, FORMATS["int4"]).weight_bytes)
    bits = {k: np.mean([f.bits for f in tiles.formats]) for k, tiles in plan.tiles.items()}
    assert bits["b"] > bits["a"] + 2
    none = np.zeros((0, 0))
    felt = {k: np.tile(h / 4, (4, 1)) * [[-1]] for k, h in found.harm.items()}
    other = replace_errors(found, {k: Errors(none, none, f) for k, f in felt.items()})
    assert strategies.llm_mq(other, plan.weight_bytes).digest == plan.digest


def replace_errors(found: Evidence, errors: dict[str, Errors]) -> Evidence:
    return invented(found.costs.units, errors=errors)


def test_rows_of_any_plan_are_rows_of_whole_roundings(
    evidence: Evidence, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = next(u for u in evidence.costs.units if u.name == "embedding")
    formats = TileFormats(tuple(ALL[i % len(ALL)] for i in range(unit.tiles)))
    weight = graph.weight(evidence.model, unit.name)
    moments, kinds = evidence.statistics.kinds(unit.name)
    quantizer = Quantizer.of(*moments, kinds=kinds)
    expected = dequantize_tiles(quantizer.tiles(weight, formats), formats)
    weights = {unit.name: weight}.__getitem__
    for folder in (None, tmp_path / "codes"):
        rounded = Rounded(weights, evidence.statistics, folder)
        np.testing.assert_array_equal(rounded.tiles(unit, formats), expected)
    # What lies in a folder is not made again.
    monkeypatch.setattr(module, "Quantizer", None)
    again = Rounded(weights, evidence.statistics, tmp_path / "codes")
    np.testing.assert_array_equal(again.tiles(unit, formats), expected)


def test_gradients_and_inputs_by_hand(
    evidence: Evidence, model: ir.Model, tokens: np.ndarray
) -> None:
    w = {key: value.requires_grad_() for key, value in weights_of(model).items()}
    ids = torch.from_numpy(tokens)
    met = by_hand(w, tokens)
    loss = functional.cross_entropy(met["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    names = ("gate", "down", "embedding")
    for name, slope in zip(names, torch.autograd.grad(loss, [w[n] for n in names]), strict=True):
        torch.testing.assert_close(evidence.observed[name].slope, slope, rtol=1e-4, atol=1e-6)
    for name, key in (("gate", "e"), ("down", "h"), ("embedding", "n")):
        x = met[key].detach().flatten(0, 1)
        found = evidence.observed[name]
        assert found.variance == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-4)
        np.testing.assert_allclose(found.power, x.square().mean(0).numpy(), rtol=1e-4)


@pytest.mark.parametrize("block", [1 << 23, 1 << 10])
def test_errors_by_definition(
    evidence: Evidence, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    fresh = replace(evidence)
    fresh.__dict__["observed"] = evidence.observed
    unit, observed = evidence.costs.units[0], evidence.observed[evidence.costs.units[0].name]
    weight = graph.weight(evidence.model, unit.name)
    for column in (0, 3):
        rough = evidence.rounded.tiles(unit, TileFormats((ALL[column],) * unit.tiles))
        delta = (rough - weight).astype(np.float64)
        by_row = {
            "squared": (delta**2).sum(1),
            "met": delta**2 @ observed.power,
            "felt": (delta * observed.slope.numpy()).sum(1),
        }
        for name, rows in by_row.items():
            padded = np.pad(rows, (0, -len(rows) % 16)).reshape(-1, 16).sum(1)
            found = getattr(fresh.errors[unit.name], name)[:, column]
            np.testing.assert_allclose(found, padded, rtol=1e-4, atol=1e-7)


def test_harm_is_measured_divergence(
    evidence: Evidence, model: ir.Model, tokens: np.ndarray
) -> None:
    """Of gate and up together, which share an input, and of the tied embedding in both its uses."""
    part, stride = tokens[:1], module.PROBE_STRIDE
    exact = by_hand(weights_of(model), part)["logits"][0, stride - 1 :: stride]
    by_name = {unit.name: unit for unit in evidence.costs.units}
    for names in (("gate", "up"), ("embedding",)):
        w = weights_of(model)
        for name in names:
            alike = TileFormats((FORMATS["int3"],) * by_name[name].tiles)
            w[name] = torch.from_numpy(evidence.rounded.tiles(by_name[name], alike))
        rough = by_hand(w, part)["logits"][0, stride - 1 :: stride]
        found = sum(evidence.harm[name][ALL.index(FORMATS["int3"])] for name in names)
        assert found == pytest.approx(divergence(exact, rough), rel=1e-3)


def test_probes_can_replace_weights(evidence: Evidence) -> None:
    with torch.no_grad():
        runs = Probe(evidence.watched, evidence.probes, 1)
        assert runs.harm({}) == pytest.approx(0, abs=1e-7)
