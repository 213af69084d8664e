"""Multiple choice without examples: the choice that a language model finds likeliest is its answer.

A task is a file of JSON lines, ``{"question": "...", "choices": ["...", ...], "answer": 0}``. A
choice is scored by its log-likelihood after the question, and once more by that over its bytes, as
``acc`` and ``acc_norm`` of the Language Model Evaluation Harness (Gao et al., 2021) are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from mxcompile.errors import UsageError
from mxcompile.evaluate import LogitSource, log_softmax
from mxcompile.progress import Progress
from mxcompile.text import TextModel

_KEYS: Final = '{"question": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX}'


@dataclass(frozen=True, slots=True)
class Item:
    """A question, what may follow it, and which of these is right."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read a JSON line.

        Raises:
            ValueError: it is not an item.
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("no object")
        question, choices, answer = data.get("question"), data.get("choices"), data.get("answer")
        if not (isinstance(question, str) and isinstance(choices, list) and type(answer) is int):
            raise ValueError("a key is missing or of another type")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError("a choice is empty or of another type")
        if len(choices) < 2 or not 0 <= answer < len(choices):
            raise ValueError(f"answer {answer} of {len(choices)} choices")
        return cls(question, tuple(choices), answer)


@dataclass(frozen=True, slots=True)
class Score:
    """How many of a model's answers are right; ``normalized`` divides by the choices' lengths."""

    items: int
    correct: int
    normalized: int

    def figures(self) -> dict[str, float]:
        """Accuracies, each with the standard error of a proportion."""
        found: dict[str, float] = {}
        for name, count in (("accuracy", self.correct), ("accuracy_normalized", self.normalized)):
            share = count / self.items
            found[name] = share
            found[f"{name}_error"] = (share * (1 - share) / self.items) ** 0.5
        return {**found, "items": self.items}


def load(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a task file, at most ``limit``.

    Raises:
        UsageError: the file cannot be read, or a line is not an item.
    """
    items: list[Item] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and (limit is None or len(items) < limit):
                    items.append(_parsed(path, number, line))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a task: {error}") from error
    if not items:
        raise UsageError(f"{path} has no items; a task is JSON lines {_KEYS}")
    return items


def _parsed(path: Path, number: int, line: str) -> Item:
    try:
        return Item.parse(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number} is not {_KEYS}: {error}") from error


def score(
    source: LogitSource,
    model: TextModel,
    items: Sequence[Item],
    progress: Progress | None = None,
) -> Score:
    """Let a model answer; the first of equals is its answer."""
    correct = normalized = 0
    with (progress or Progress()).stage("zero-shot", len(items)) as advance:
        for item in items:
            likely = np.array(_likelihoods(source, model, item))
            lengths = np.array([len(choice.encode()) for choice in item.choices])
            correct += int(likely.argmax()) == item.answer
            normalized += int((likely / lengths).argmax()) == item.answer
            advance()
    return Score(len(items), correct, normalized)


def _likelihoods(source: LogitSource, model: TextModel, item: Item) -> list[float]:
    """The log-likelihood of each choice after the question, in nats."""
    prompt = model.encode(item.question)
    whole = [model.encode(item.question + choice) for choice in item.choices]
    shared = context_length(prompt, whole)
    rest = [tokens[shared:] for tokens in whole]
    found = []
    for tokens, logits in zip(rest, source.continuations(whole[0][:shared], rest), strict=True):
        log_p = log_softmax(logits)
        found.append(float(log_p[np.arange(len(tokens)), tokens].sum()))
    return found


def context_length(prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> int:
    """How many tokens of texts that begin with a prompt are its own; each has more.

    A tokenizer may join the end of the prompt with what follows: what all have in common is the
    context, what comes after is scored.
    """
    return min(*(_shared(prompt, text) for text in texts), *(len(text) - 1 for text in texts))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))
