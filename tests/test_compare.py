"""Comparing strategies on models by hand, from the command line to the page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mxcompile import cli, compare, simulate
from mxcompile.compiler import Job, plan_model, price_model
from mxcompile.errors import BudgetError, UsageError
from mxcompile.formats import FORMATS
from mxcompile.plan import Rule
from mxcompile.progress import Progress
from mxcompile.simulate import SimulatedSource
from mxcompile.strategies import STRATEGIES
from tests import toy
from tests.test_calibrate import LANGUAGE_MODEL, LINEAR, VOCABULARY, WIDTH, build, random

INNER = 64
ENCODER = """
g (int64[batch, seq] input_ids) => (float[batch, seq, 32] y) {
    e = Gather(embedding, input_ids)
    h = mxcompile.Linear(e, up)
    a = Sigmoid(h)
    y = mxcompile.Linear(a, down)
}
"""


def save(text: str, folder: Path, **weights: np.ndarray) -> Path:
    model = build(text + LINEAR, **weights)
    model.metadata_props.clear()
    onnx.save(ir.to_proto(model), folder / "model.onnx")
    toy.write_tokenizer(folder)
    rng = np.random.default_rng(3)
    words = rng.choice(toy.WORDS[2:], 3000)
    (folder / "calibration").write_text(" ".join(words[:1500]))
    rest = words[1500:].reshape(-1, 50)
    (folder / "text").write_text("\n\n".join(" ".join(row) for row in rest))
    return folder / "model.onnx"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return save(
        LANGUAGE_MODEL,
        tmp_path,
        embedding=random(VOCABULARY, WIDTH, seed=0),
        gate=random(INNER, WIDTH, seed=1, scale=0.3),
        up=random(INNER, WIDTH, seed=2, scale=0.3),
        down=random(WIDTH, INNER, seed=3, scale=0.3),
        norm=np.ones(WIDTH, np.float32),
        scale=np.array(0.5, np.float32),
    )


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save(
        ENCODER,
        tmp_path,
        embedding=random(VOCABULARY, WIDTH, seed=0),
        up=random(INNER, WIDTH, seed=2, scale=0.3),
        down=random(WIDTH, INNER, seed=3, scale=0.3),
    )


def job(model: Path, *budgets: str) -> Job:
    return Job(
        model,
        "x86",
        budgets,
        model.with_suffix(".mxc"),
        calibration=model.parent / "calibration",
        cache=model.parent / "cache",
    )


def test_rows_of_a_language_model(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "compare",
        decoder,
        "--budget",
        "7bit",
        "--budget",
        "5bit",
        "--text",
        tmp_path / "text",
    ]
    words += ["--calibration", tmp_path / "calibration", "--tokens", 500, "--context", 100]
    words += ["-o", tmp_path / "out.html", "--json"]
    assert cli.main([str(word) for word in words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * 11
    keys = {"strategy", "budget", "bytes", "bits_per_weight", "damage", "kld_mean", "perplexity"}
    assert all(keys | {"top1_agreement"} <= row.keys() for row in rows)
    for row in rows:
        assert row["bits_per_weight"] <= float(row["budget"].removesuffix("bit"))
        assert 0 < row["kld_mean"] < 1
    by_budget = compare.by_budget(rows)
    assert list(by_budget) == ["7bit", "5bit"]
    for ranked in by_budget.values():
        measured = [row["kld_mean"] for row in ranked]
        assert measured == sorted(measured)
    # More bytes bring any strategy nearer, and the prediction is of the size of what is measured.
    for name in {row["strategy"] for row in rows}:
        wide, narrow = (row for row in rows if row["strategy"] == name)
        assert wide["kld_mean"] < narrow["kld_mean"]
        assert wide["kld_mean"] / 3 < wide["damage"] < 3 * wide["kld_mean"]
    html = (tmp_path / "out.html").read_text()
    assert html.count("<svg") == 2 and "MixLLM" in html


def test_sources_that_take_turns_leave_gradients_on(decoder: Path) -> None:
    watched = price_model(job(decoder, "5bit"), Progress()).evidence(Progress()).watched
    rng = np.random.default_rng(0)
    weights = {"gate": torch.from_numpy(rng.random((INNER, WIDTH), np.float32))}
    sources = [SimulatedSource(watched, w) for w in ({}, weights)]
    ((exact, rough),) = zip(*(s.logits([3, 4, 5]) for s in sources), strict=True)
    assert exact.shape == (3, VOCABULARY) and not np.allclose(exact, rough)
    assert torch.is_grad_enabled()


def test_rows_of_an_encoder(encoder: Path, tmp_path: Path) -> None:
    rows = compare.compare(
        job(encoder, "5bit"),
        "uniform,spread,ours",
        tmp_path / "text",
        tokens=400,
        context=40,
        progress=Progress(),
    )
    assert compare.measure(rows) == "one_minus_cosine"
    uniform, spread, ours = (row["one_minus_cosine"] for row in rows)
    assert 0 < ours < spread < uniform < 0.1


def test_refusals(decoder: Path, tmp_path: Path) -> None:
    def run(*budgets: str, names: str = "ours", text: str = "text") -> None:
        compare.compare(
            job(decoder, *budgets),
            names,
            tmp_path / text,
            tokens=100,
            context=50,
            progress=Progress(),
        )

    with pytest.raises(UsageError, match="no strategy 'best'; strategies: "):
        run("5bit", names="best")
    with pytest.raises(UsageError, match="30tok/s cannot be compared: strategies spend a size"):
        run("5bit", "30tok/s")
    with pytest.raises(BudgetError, match=r"1bit cannot be met: the smallest plan takes \d\.\d+ b"):
        run("5bit", "1bit")
    with pytest.raises(UsageError, match="none cannot be read as text"):
        run("5bit", text="none")


def test_a_plan_by_another_strategy(decoder: Path) -> None:
    asked = replace(job(decoder, "5bit"), strategy="modelopt")
    priced = price_model(asked, Progress())
    plan = plan_model(asked, Progress()).plan
    limit = compare._limit("5bit", priced, ())
    expected = STRATEGIES["modelopt"](priced.evidence(Progress()), limit)
    assert plan.tiles == expected.tiles
    assert plan.tiles != plan_model(job(decoder, "5bit"), Progress()).plan.tiles
    with pytest.raises(UsageError, match="--strategy modelopt takes a size"):
        plan_model(replace(asked, budgets=("kld<=1",)), Progress())
    kept = replace(asked, budgets=("7bit",), rules=(Rule("down", FORMATS["int8"]),))
    assert set(plan_model(kept, Progress()).plan.tiles["down"].formats) == {FORMATS["int8"]}
    with pytest.raises(UsageError, match="no strategy 'best'"):
        plan_model(replace(asked, strategy="best"), Progress())


def test_cosines_are_of_means() -> None:
    x = np.array([[1.0, 0.0], [1.0, 2.0]])
    y = np.array([[2.0, 0.0], [-1.0, 1.0]])
    found = simulate.compare_outputs([x, x], [x, y])
    angle = 1 - (x.mean(0) @ y.mean(0)) / np.linalg.norm(x.mean(0)) / np.linalg.norm(y.mean(0))
    assert found["one_minus_cosine"] == pytest.approx(angle / 2)
    assert found["relative_error"] == pytest.approx(((x - y) ** 2).sum() / (2 * (x**2).sum()))


def test_paragraphs_are_passages() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return list(range(len(text)))

    text = "a heading\n\n" + "x" * 50 + "\nyy\n\n" + "z" * 60 + "\n\n" + "w" * 70
    found = compare._passages(Letters(), text, tokens=100, context=55)  # type: ignore[arg-type]
    assert [len(row) for row in found] == [53, 47]
    with pytest.raises(UsageError, match="too short"):
        compare._passages(Letters(), "short", 100, 55)  # type: ignore[arg-type]
