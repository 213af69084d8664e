"""Prints the perplexity of the tiny language model on text that it was not trained on.

Each source's held-out part is rebuilt from its package; a source whose package cannot be had is
skipped and named. Docstrings of the standard library stand for text from outside every source.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import (
    PACKAGES_DIR,
    SOURCES,
    SourceUnavailableError,
    encode,
    load_split,
    standard_library_docstrings,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

OUTSIDE = "docstrings"
"""The name of the text that comes from no training source; it is not part of the total."""


@dataclass(frozen=True)
class Score:
    """How well the model predicts a text.

    Attributes:
        name: The text's source.
        tokens: How many tokens were predicted.
        loss: The mean negative log-likelihood of a token, in nats.
    """

    name: str
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def total(scores: Sequence[Score]) -> Score:
    """Returns the score of all texts together: each token counts once."""
    tokens = sum(score.tokens for score in scores)
    return Score("total", tokens, sum(score.loss * score.tokens for score in scores) / tokens)


def held_out_texts(packages_dir: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the held-out texts by source, and the names of the sources that cannot be had."""
    texts: dict[str, list[str]] = {}
    skipped: list[str] = []
    for source in SOURCES:
        try:
            texts[source.name] = load_split(source, packages_dir).held_out
        except SourceUnavailableError:
            skipped.append(source.name)
    return texts, skipped


@torch.inference_mode()
def score_text(name: str, model: LlamaForCausalLM, row: torch.Tensor, context: int) -> Score:
    """Scores a row of tokens in windows that do not overlap.

    Args:
        name: The score's name.
        model: The language model.
        row: Token ids.
        context: The length of a window; its first token is given, not predicted.

    Returns:
        The score over all predicted tokens.
    """
    loss, tokens = 0.0, 0
    for start in range(0, len(row) - 1, context):
        window = row[start : start + context]
        logits = model(input_ids=window[None]).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        tokens += len(window) - 1
    return Score(name, tokens, loss / tokens)


def report(scores: Sequence[Score], outside: Score, skipped: Sequence[str]) -> str:
    """Returns a table, one line for each source, and a line on what is missing."""
    lines = [f"{'held-out text':14} {'tokens':>8} {'perplexity':>10}"]
    lines += [
        f"{score.name:14} {score.tokens:8,} {score.perplexity:10.2f}"
        for score in (*scores, total(scores), outside)
    ]
    if skipped:
        lines.append(f"skipped, their Debian packages cannot be had: {', '.join(skipped)}")
    return "\n".join(lines)


def report_json(scores: Sequence[Score], outside: Score, skipped: Sequence[str]) -> str:
    """Returns the same as JSON: a list of scores and the skipped sources."""
    rows = [
        {**asdict(score), "perplexity": score.perplexity}
        for score in (*scores, total(scores), outside)
    ]
    return json.dumps({"scores": rows, "skipped": list(skipped)}, indent=2)


def main() -> None:
    """Scores a model folder and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tinylm")
    parser.add_argument("--packages", type=Path, default=PACKAGES_DIR, help="unpacked sources")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window")
    parser.add_argument("--limit", type=int, default=20_000, help="most tokens of each source")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts, skipped = held_out_texts(args.packages)
    texts[OUTSIDE] = standard_library_docstrings()
    scores = [
        score_text(name, model, torch.tensor(encode(tokenizer, text)[: args.limit]), args.context)
        for name, text in texts.items()
    ]
    write = report_json if args.json else report
    print(write(scores[:-1], scores[-1], skipped))


if __name__ == "__main__":
    main()
