"""Multiple choice: tasks that can be read, and answers against likelihoods done by hand."""

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mxcompile import zeroshot
from mxcompile.errors import UsageError
from mxcompile.text import TextModel
from mxcompile.zeroshot import Item, Score
from tests import toy


class Bigrams:
    """A source whose next token depends on the last one only."""

    vocabulary = toy.VOCABULARY

    def __init__(self) -> None:
        table = np.random.default_rng(0).normal(0, 2, (self.vocabulary, self.vocabulary))
        self.table = table.astype(np.float32)

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        yield self.table[list(tokens)]

    def continuations(
        self, prompt: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        return [self.table[[prompt[-1], *choice[:-1]]] for choice in choices]

    def likelihood(self, tokens: Sequence[int], begin: int) -> float:
        total = 0.0
        for before, token in zip(tokens[begin - 1 :], tokens[begin:], strict=False):
            row = self.table[before].astype(float)
            total += row[token] - math.log(np.exp(row).sum())
        return total


@pytest.fixture
def model(tmp_path: Path) -> TextModel:
    toy.write_tokenizer(tmp_path)
    return TextModel.beside(tmp_path)


def items(count: int) -> list[Item]:
    rng = np.random.default_rng(1)
    words = toy.WORDS[2:]
    return [
        Item(
            " ".join(rng.choice(words, 5)),
            tuple(" " + " ".join(rng.choice(words, n)) for n in (1, 2, 3)),
            int(rng.integers(3)),
        )
        for _ in range(count)
    ]


def test_the_likeliest_choice_is_the_answer(model: TextModel) -> None:
    source, asked = Bigrams(), items(40)
    correct = normalized = 0
    for item in asked:
        begin = len(model.encode(item.question))
        likely = [
            source.likelihood(model.encode(item.question + choice), begin)
            for choice in item.choices
        ]
        by_length = [p / len(c.encode()) for p, c in zip(likely, item.choices, strict=True)]
        correct += int(np.argmax(likely)) == item.answer
        normalized += int(np.argmax(by_length)) == item.answer
    found = zeroshot.score(source, model, asked)
    assert found == Score(40, correct, normalized)
    assert 0 < correct < 40


def test_figures_have_the_error_of_a_proportion() -> None:
    found = Score(100, 80, 50).figures()
    assert found["accuracy"] == 0.8
    assert found["accuracy_error"] == pytest.approx(0.04)
    assert found["accuracy_normalized_error"] == pytest.approx(0.05)


def test_tasks_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    line = '{"question": "Q", "choices": [" a", " b"], "answer": 1}'
    path.write_text(f"{line}\n\n{line}\n{line}\n")
    assert zeroshot.load(path) == [Item("Q", (" a", " b"), 1)] * 3
    assert len(zeroshot.load(path, 2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no items"),
        ("nonsense", "line 1 is not"),
        ("[1]", "no object"),
        ('{"question": "Q", "choices": ["a"], "answer": 0}', "answer 0 of 1"),
        ('{"question": "Q", "choices": ["a", "b"], "answer": 2}', "answer 2 of 2"),
        ('{"question": "Q", "choices": ["a", ""], "answer": 0}', "a choice is empty"),
        ('{"choices": ["a", "b"], "answer": 0}', "another type"),
    ],
)
def test_tasks_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        zeroshot.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        zeroshot.load(tmp_path / "none")


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The adapter, with what it takes of lm_eval in its place."""
    registered: dict[str, Any] = {}

    def register_model(name: str) -> Any:
        return lambda kind: registered.setdefault(name, kind)

    package, api = ModuleType("lm_eval"), ModuleType("lm_eval.api")
    models, registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
    vars(models)["LM"] = object
    vars(registry)["register_model"] = register_model
    for module in (package, api, models, registry):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "mxcompile.lm_eval_adapter", raising=False)
    module = importlib.import_module("mxcompile.lm_eval_adapter")
    assert registered == {"mxcompile": module.MxcompileLM}
    return module


def test_lm_eval_sees_an_artifact(adapter: ModuleType, compiled: Path) -> None:
    lm = adapter.MxcompileLM(artifact=str(compiled / "toy.mxc"), threads="1")
    context, rest = " ".join(toy.WORDS[3:6]), " " + " ".join(toy.WORDS[6:8])
    request = SimpleNamespace(args=(context, rest))
    ((likely, greedy),) = lm.loglikelihood([request])
    model = TextModel.beside(compiled / "toy.mxc")
    whole, begin = model.encode(context + rest), len(model.encode(context))
    expected = toy.logits(whole)[begin - 1 : -1].astype(float)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    assert likely == pytest.approx(
        sum(expected[i, t] for i, t in enumerate(whole[begin:])), abs=1e-3
    )
    assert greedy == (expected.argmax(-1).tolist() == whole[begin:])
    (rolling,) = lm.loglikelihood_rolling([SimpleNamespace(args=(context + rest,))])
    assert rolling < likely
    options = {"until": ["never"], "max_gen_toks": 3}
    (text,) = lm.generate_until([SimpleNamespace(args=(context, options))])
    tokens = model.encode(context)
    for _ in range(3):
        tokens.append(int(toy.logits(tokens)[-1].argmax()))
    assert text == model.decode(tokens[begin:])
