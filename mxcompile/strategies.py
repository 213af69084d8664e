"""Ways to spend a budget: the published ones and ours, over the same formats and quantizers.

A strategy answers one question: how much a tile in a format costs the model. The plan follows
from the answer in the same way for all of them (``mxcompile.solve``), and every one spends the
bytes as far as tiles of 16 rows allow: where a strategy decides for whole layers, the layer at the
margin is split. So what is compared is the judgement, not the bookkeeping. Strategies that were
published for two formats have the widest uniform format that fits and one above it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import numpy as np

from mxcompile.errors import UsageError
from mxcompile.evidence import Evidence
from mxcompile.formats import Format
from mxcompile.plan import PrecisionPlan, Rule, TileFormats, Unit
from mxcompile.price import Costs
from mxcompile.solve import EXACT_TILES, within

Array: TypeAlias = np.ndarray[Any, Any]

Strategy: TypeAlias = Callable[[Evidence, int], PrecisionPlan]
"""Evidence, and the most bytes that packed tiles may take, to a plan that keeps to them.

Raises BudgetError when the narrowest plan is larger.
"""

OURS: Final = "ours"

_HALVINGS: Final = 12
"""How exactly a strategy meets a limit beside rules: to a four-thousandth of the widest plan."""

_GOLDEN: Final = (5**0.5 - 1) / 2


def ours(evidence: Evidence, limit: int) -> PrecisionPlan:
    """Row tiles by predicted divergence, ``sum_o E[(dL/dy_o)**2] dW_o H dW_o^T``, over all formats.

    See ``mxcompile.statistics`` for the formula and ``mxcompile.solve`` for the knapsack.
    """
    return within(evidence.costs, limit)


def ruled(name: str, rules: Sequence[Rule]) -> Strategy:
    """A strategy on a model of which a user has decided a part.

    Ours decides within the rules. The others decide as if there were none, for as many bytes as
    leave the limit kept once the rules have overridden them.

    Raises:
        PlanError: a rule names no unit, or a format that is not priced.
    """
    if not rules:
        return STRATEGIES[name]

    def decide(evidence: Evidence, limit: int) -> PrecisionPlan:
        costs = evidence.costs.bind(rules)
        best = within(costs, limit, exact_tiles=EXACT_TILES if name == OURS else 0)
        if name == OURS:
            return best
        low, high = (
            evidence.costs.size(PrecisionPlan.uniform(costs.units, fmt))
            for fmt in (costs.formats[0], costs.formats[-1])
        )
        found = None
        for _ in range(_HALVINGS):
            middle = (low + high + 1) // 2
            plan = _overruled(STRATEGIES[name](evidence, middle), costs)
            if costs.size(plan) <= limit:
                found, low = plan, middle
            else:
                high = middle
        return best if found is None else found

    return decide


def _overruled(plan: PrecisionPlan, costs: Costs) -> PrecisionPlan:
    """A plan with what rules say in place of what they do not allow."""
    tiles = {}
    for unit in plan.units:
        stands_for = dict(zip(costs.formats, costs.choices(unit), strict=True))
        formats = tuple(stands_for[fmt] for fmt in plan.tiles[unit.name].formats)
        tiles[unit.name] = TileFormats(formats)
    return replace(plan, tiles=tiles)


def uniform(evidence: Evidence, limit: int) -> PrecisionPlan:
    """One format for all: the widest that fits; of equal bytes, the one predicted to do best.

    It leaves what it cannot spend.
    """
    return PrecisionPlan.uniform(evidence.costs.units, _widest(evidence.costs, limit))


def spread(evidence: Evidence, limit: int) -> PrecisionPlan:
    """No judgement at all: the widest uniform format, every so many tiles one format wider.

    The two formats lie evenly in every weight, so that it spends what ``uniform`` leaves. What a
    strategy is worth is what it gains over this.
    """
    low = _widest(evidence.costs, limit)
    scores = {unit.name: -(np.arange(unit.tiles) * _GOLDEN % 1) for unit in evidence.costs.units}
    return _two(evidence.costs, scores, low, _wider(evidence.costs, low), limit)


def q4_k_m(evidence: Evidence, limit: int) -> PrecisionPlan:
    """llama.cpp's Q4_K_M (``llama-quant.cpp``): a rule by a tensor's role and its layer's number.

    ``attn_v`` and ``ffn_down`` in the first and last eighth of layers and in every third between
    have two bits more than the rest, and so has the output. Here the base is what the budget
    allows, not always 4 bits, and what is promoted last (the output, then the rest in the graph's
    order) is promoted as far as bytes last. Roles are told by Hugging Face's names.
    """
    costs = evidence.costs
    layers = 1 + max((_layer(unit) for unit in costs.units), default=0)
    order = {unit.name: float(_rank(unit, layers, evidence)) for unit in costs.units}
    # Of one rank, what comes first in the graph is promoted first.
    scores = {
        unit.name: np.full(unit.tiles, -order[unit.name] - index / (len(costs.units) + 1))
        for index, unit in enumerate(costs.units)
    }
    low = _widest(costs, limit)
    return _two(costs, scores, low, _wider(costs, low, bits=2), limit)


def mse(evidence: Evidence, limit: int) -> PrecisionPlan:
    """The squared error of the weights, tensor by tensor, over all formats.

    As ``--target-bpw`` of llama.cpp (its pull request 15550) without an importance matrix:
    Lagrangian over per-tensor errors. The model's inputs and output are not looked at.
    """
    harm = {name: errors.squared.sum(0) for name, errors in evidence.errors.items()}
    return _by_unit(evidence.costs, harm, limit)


def nncf(evidence: Evidence, limit: int) -> PrecisionPlan:
    """NNCF's MEAN_ACTIVATION_VARIANCE: layers whose inputs vary most, over their 8-bit error.

    A layer's score is the mean variance of its inputs times the inverse of the mean squared error
    of its weights in 8 bits; the highest scores have 8 bits. NNCF keeps embeddings and the head in
    8 bits; at these budgets they must be ranked like all others.
    """
    costs, wide = evidence.costs, _eight_bits(evidence.costs)
    column = costs.formats.index(wide)
    scores = {}
    for unit in costs.units:
        noise = evidence.errors[unit.name].squared[:, column].sum() / unit.parameters
        score = evidence.observed[unit.name].variance / max(noise, np.finfo(np.float64).tiny)
        scores[unit.name] = np.full(unit.tiles, score)
    return _two(costs, scores, _widest(costs, limit), wide, limit)


def owq(evidence: Evidence, limit: int) -> PrecisionPlan:
    """OWQ (arXiv 2306.02272): the weak parts of every layer, by ``H_kk dW_k**2``, in 8 bits.

    OWQ keeps a fixed number of input columns a layer in fp16, those of the largest
    ``H_kk ||dW_k||**2``. Kernels here tell formats apart by rows, so the same sum is taken along
    rows: in every layer the same share of tiles, those of the largest ``sum_k H_kk dW_k**2``.
    """
    costs, low = evidence.costs, _widest(evidence.costs, limit)
    column = costs.formats.index(low)
    scores = {}
    for unit in costs.units:
        order = np.argsort(-evidence.errors[unit.name].met[:, column], kind="stable")
        scores[unit.name] = np.empty(unit.tiles)
        scores[unit.name][order] = -np.arange(unit.tiles) / unit.tiles
    return _two(costs, scores, low, _eight_bits(costs), limit)


def llm_mq(evidence: Evidence, limit: int) -> PrecisionPlan:
    """LLM-MQ (NeurIPS 2023 workshop on efficient language processing): ``|dL/dW . dW|`` a layer.

    The loss' first-order change, with gradients of the text's own next tokens, over all formats.
    Its sparse outliers are left out, and its integer program is solved by the Lagrangian.
    """
    harm = {name: np.abs(errors.felt.sum(0)) for name, errors in evidence.errors.items()}
    return _by_unit(evidence.costs, harm, limit)


def modelopt(evidence: Evidence, limit: int) -> PrecisionPlan:
    """Fisher information a layer: NVIDIA ModelOpt's ``auto_quantize``.

    ModelOpt adds up ``(dL/dy dy)**2`` over a layer's outputs and solves an integer program over
    layers. Here the same expectation is that of our prices, its two factors taken apart, summed
    over each layer; layers that share an input may differ, as kernels allow it.
    """
    harm = {name: damage.sum(0) for name, damage in evidence.costs.damage.items()}
    return _by_unit(evidence.costs, harm, limit)


def exl3(evidence: Evidence, limit: int) -> PrecisionPlan:
    """Measured divergence, one group of layers rounded at a time: as ExLlamaV3's optimizer.

    ExLlamaV3 measures groups between two quantized models and takes the best step of divergence
    over bits again and again, which on convex costs is the Lagrangian. Here a group (the weights
    that share an input) is rounded alone, in the float model, in every format.
    """
    return _by_unit(evidence.costs, evidence.harm, limit)


def mixllm(evidence: Evidence, limit: int) -> PrecisionPlan:
    """MixLLM (arXiv 2412.14590): output features of the whole model ranked, the first in 8 bits.

    A feature's rank is the second-order estimate of the loss that 8 bits save it, whatever its
    length. MixLLM ranks single features between 4 and 8 bits; here tiles of 16 of them, between
    the widest uniform format that fits and 8 bits.
    """
    costs, low, wide = evidence.costs, _widest(evidence.costs, limit), _eight_bits(evidence.costs)
    columns = [costs.formats.index(fmt) for fmt in (low, wide)]
    scores = {name: d[:, columns[0]] - d[:, columns[1]] for name, d in costs.damage.items()}
    return _two(costs, scores, low, wide, limit)


STRATEGIES: Final[Mapping[str, Strategy]] = {
    "uniform": uniform,
    "spread": spread,
    "q4_k_m": q4_k_m,
    "mse": mse,
    "nncf": nncf,
    "owq": owq,
    "llm-mq": llm_mq,
    "modelopt": modelopt,
    "exl3": exl3,
    "mixllm": mixllm,
    OURS: ours,
}


def find(names: str) -> dict[str, Strategy]:
    """The strategies that a list such as ``uniform,ours`` names, or ``all``.

    Raises:
        UsageError: a name is none of them.
    """
    chosen = list(STRATEGIES) if names == "all" else names.split(",")
    for name in chosen:
        if name not in STRATEGIES:
            raise UsageError(f"no strategy '{name}'; strategies: {', '.join(STRATEGIES)}")
    return {name: STRATEGIES[name] for name in chosen}


def describe(name: str) -> str:
    """The first line of a strategy's docstring, without its marks."""
    return (STRATEGIES[name].__doc__ or "").partition("\n")[0].replace("``", "")


def _by_unit(costs: Costs, harm: Mapping[str, Array], limit: int) -> PrecisionPlan:
    """The least summed harm, known of whole units in every format; a unit's tiles share it."""
    even = {u.name: np.tile(harm[u.name] / u.tiles, (u.tiles, 1)) for u in costs.units}
    return within(replace(costs, damage=even), limit, exact_tiles=0)


def _two(
    costs: Costs, scores: Mapping[str, Array], low: Format, high: Format, limit: int
) -> PrecisionPlan:
    """Two formats: the tiles of the highest scores have the wider one, as far as bytes last."""
    _, ranks = np.unique(np.concatenate([scores[u.name] for u in costs.units]), return_inverse=True)
    ends = np.cumsum([unit.tiles for unit in costs.units])[:-1]
    two = replace(costs, formats=(low, high), damage={}, bound={})
    damage = {}
    for unit, rank in zip(costs.units, np.split(ranks, ends), strict=True):
        narrow, wide = two.bytes(unit)
        # Harm that falls by a rank a byte: the solver takes steps by that, whatever their size.
        saved = (rank + 1.0) * (wide - narrow)
        damage[unit.name] = np.stack([saved, np.zeros(unit.tiles)], 1)
    return within(replace(two, damage=damage), limit, exact_tiles=0)


def _widest(costs: Costs, limit: int) -> Format:
    """The format of the largest uniform plan that fits; the narrowest where none does."""

    def merit(fmt: Format) -> tuple[int, float]:
        plan = PrecisionPlan.uniform(costs.units, fmt)
        return costs.size(plan), -costs.total(plan)

    merits = {fmt: merit(fmt) for fmt in costs.formats}
    fits = [fmt for fmt in costs.formats if merits[fmt][0] <= limit]
    return max(fits, key=merits.__getitem__, default=costs.formats[0])


def _wider(costs: Costs, low: Format, bits: int = 1) -> Format:
    """The narrowest format of at least so many bits more, or the widest there is."""
    wider = [fmt for fmt in costs.formats if fmt.bits >= low.bits + bits]
    return min(wider, key=lambda fmt: fmt.bits, default=costs.formats[-1])


def _eight_bits(costs: Costs) -> Format:
    return max(costs.formats, key=lambda fmt: fmt.bits)


_LAYER: Final = re.compile(r"\.(\d+)\.")


def _layer(unit: Unit) -> int:
    match = _LAYER.search(unit.name)
    return int(match[1]) if match else -1


def _rank(unit: Unit, layers: int, evidence: Evidence) -> int:
    """How early Q4_K_M promotes a unit: 0 for what it always does, 2 for what it never does."""
    at, name = _layer(unit), unit.name
    values = re.search(r"v_proj|\.value\.|attn_v", name)
    down = re.search(r"down_proj|ffn_down|fc2|(?<!attention\.)output\.dense", name)
    eighth = layers // 8
    more = at < eighth or at >= 7 * layers // 8 or (at - eighth) % 3 == 2
    if at >= 0 and more and (values or down):
        return 0
    head = evidence.watched.head
    return 1 if head is not None and head in evidence.watched.uses[name] else 2
