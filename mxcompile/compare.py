"""Which strategy spends a budget best on a model: plans side by side, measured on the same text.

Every plan is quantized by the quantizer that ships, from the same statistics, and run in torch
(``mxcompile.simulate``), so that the plans differ by nothing but their allocation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mxcompile import evaluate, graph, page, simulate, strategies
from mxcompile.budget import Budgets
from mxcompile.compiler import Job, Priced, price_model
from mxcompile.errors import UsageError
from mxcompile.evidence import Evidence
from mxcompile.float_model import Feed, FloatModel
from mxcompile.interpret import Values
from mxcompile.plan import PrecisionPlan, Rule
from mxcompile.progress import Progress
from mxcompile.samples import Samples, token_feeds
from mxcompile.simulate import SimulatedSource
from mxcompile.solve import solve
from mxcompile.text import TextModel

FLOATS: Final = 1 << 30
"""Float weights that are held at once: plans are measured together as far as this goes."""

PASSAGE: Final = 40
"""The least characters of a paragraph that an encoder embeds: not a heading."""

OF_TEXT: Final = ("kld_mean", "kld_mean_error", "kld_p99", "perplexity", "top1_agreement")
OF_OUTPUTS: Final = ("one_minus_cosine", "one_minus_cosine_error", "relative_error")
"""What is measured of language models, and of others; the first is what rows are ranked by."""


def compare(
    job: Job, names: str, text: Path, *, tokens: int, context: int, progress: Progress
) -> list[dict[str, Any]]:
    """One row a budget and strategy: what its plan costs, and how far it is from the float model.

    Args:
        job: The model, rules, and the budgets, each a size and compared on its own.
        names: The strategies, as ``strategies.find`` takes them.
        text: What to measure on: a text, or the arrays of an .npz for models that take no tokens.
        tokens: The positions that are compared.
        context: The most tokens in a window.
        progress: Is told of the work.

    Raises:
        UsageError: a strategy or budget is not known, or the text does not fit the model.
        BudgetError: a budget is too small for any plan.
    """
    chosen = strategies.find(names)
    for budget in job.budgets:
        if Budgets.parse([budget], 1).size is None:
            raise UsageError(f"{budget} cannot be compared: strategies spend a size, as 4.2bit is")
    priced = price_model(job, progress)
    evidence = priced.evidence(progress)
    measured = _Measured.of(evidence.watched, job.model, text, tokens, context)
    plans: dict[tuple[str, str], PrecisionPlan] = {}
    for budget in job.budgets:
        limit = _limit(budget, priced, job.rules)
        for name in chosen:
            plans[budget, name] = strategies.ruled(name, job.rules)(evidence, limit)
    unlike = {plan.digest: plan for plan in plans.values()}
    found = dict(zip(unlike, measured.all(evidence, list(unlike.values())), strict=True))
    return [
        {
            "strategy": name,
            "budget": budget,
            **_size(plan, priced),
            "damage": priced.costs.total(plan),
            **found[plan.digest],
        }
        for (budget, name), plan in plans.items()
    ]


def _limit(budget: str, priced: Priced, rules: Sequence[Rule]) -> int:
    """The bytes that a budget leaves for packed tiles."""
    count = graph.parameters(priced.model)
    budgets = Budgets.parse([budget], count)
    # The solver refuses what no strategy could meet, in the budget's own unit.
    solve(priced.costs.bind(rules), budgets, parameters=count, fixed_bytes=priced.fixed_bytes)
    assert budgets.size is not None
    return budgets.size.limit(count) - priced.fixed_bytes


def _size(plan: PrecisionPlan, priced: Priced) -> dict[str, float]:
    size = priced.costs.size(plan) + priced.fixed_bytes
    return {"bytes": size, "bits_per_weight": 8 * size / graph.parameters(priced.model)}


@dataclass(frozen=True, slots=True)
class _Measured:
    """What plans are measured on: windows of tokens for a language model, feeds for others."""

    watched: FloatModel
    windows: Sequence[Sequence[int]] = ()
    feeds: Sequence[Feed] = ()

    @classmethod
    def of(
        cls, watched: FloatModel, model: Path, text: Path, tokens: int, context: int
    ) -> "_Measured":
        """What a file holds for a model."""
        if all(v.name != "input_ids" for v in watched.model.graph.inputs):
            return cls(watched, feeds=Samples.find(watched.model, model, text).feeds)
        tokenizer = TextModel.beside(model.parent)
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{text} cannot be read as text: {error}") from error
        if simulate.scores_tokens(watched):
            windows = evaluate.windows(tokenizer, content, tokens=tokens, context=context)
            return cls(watched, windows)
        rows = [np.array([row]) for row in _passages(tokenizer, content, tokens, context)]
        return cls(watched, feeds=[token_feeds(watched.model, row)[0] for row in rows])

    def all(self, evidence: Evidence, plans: Sequence[PrecisionPlan]) -> Iterator[dict[str, float]]:
        """The figures of every plan."""
        count = max(FLOATS // sum(unit.parameters for unit in evidence.costs.units), 1)
        for start in range(0, len(plans), count):
            weights = [evidence.replaced(plan) for plan in plans[start : start + count]]
            yield from self._figures(weights, evidence.progress)

    def _figures(self, weights: Sequence[Values], progress: Progress) -> list[dict[str, float]]:
        if self.windows:
            exact, *rough = (SimulatedSource(self.watched, w) for w in ({}, *weights))
            found = evaluate.compare_all(exact, rough, self.windows, progress)
            return [{key: row[key] for key in OF_TEXT} for row in found]
        with progress.stage("evaluate", len(weights)) as advance:
            rows = []
            expected = simulate.outputs(self.watched, {}, self.feeds)
            for each in weights:
                answers = simulate.outputs(self.watched, each, self.feeds)
                rows.append(simulate.compare_outputs(expected, answers))
                advance()
        return rows


def _passages(model: TextModel, text: str, tokens: int, context: int) -> list[list[int]]:
    """The paragraphs of a text, with their marks, up to so many tokens in all."""
    found: list[list[int]] = []
    for paragraph in text.split("\n\n"):
        plain = " ".join(paragraph.split())
        if len(plain) < PASSAGE or tokens <= 0:
            continue
        found.append(model.encode(plain)[: min(context, tokens)])
        tokens -= len(found[-1])
    if not found:
        raise UsageError("the text is too short to evaluate")
    return found


def measure(rows: Sequence[Mapping[str, Any]]) -> str:
    """What rows are ranked by: the least is the best."""
    return OF_TEXT[0] if OF_TEXT[0] in rows[0] else OF_OUTPUTS[0]


def by_budget(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each budget, the best first."""
    key = measure(rows)
    budgets = dict.fromkeys(row["budget"] for row in rows)
    return {
        budget: sorted((r for r in rows if r["budget"] == budget), key=lambda row: row[key])
        for budget in budgets
    }


def render(rows: Sequence[dict[str, Any]], title: str) -> str:
    """The comparison as a page: a chart and a table a budget."""
    key = measure(rows)
    sections = []
    for budget, ranked in by_budget(rows).items():
        values = [(row["strategy"], row[key]) for row in ranked]
        chart = page.dots(values, strategies.OURS, _label(key))
        head = [name for name in ranked[0] if name != "budget"]
        table = page.table(
            [name.replace("_", " ") for name in head],
            [[row[name] for name in head] for row in ranked],
        )
        sections += [page.section(f"Budget {budget}", chart), page.section("", table)]
    about = [
        (name, strategies.describe(name)) for name in dict.fromkeys(r["strategy"] for r in rows)
    ]
    sections.append(page.section("Strategies", page.table(("", ""), about)))
    return page.page(
        f"{title}: strategies compared",
        "All plans have the same quantizers, statistics and text; less is better.",
        sections,
    )


def _label(key: str) -> str:
    named = {"kld_mean": "mean KL divergence from the float model, nats a token"}
    return named.get(key, "1 - cosine to the float model's embedding")
