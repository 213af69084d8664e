"""Compare the sentence embeddings of mixed and uniform plans with those of the float encoder.

An embedding is the mean of the last hidden states; an error is one minus its cosine to that of the
float model in onnxruntime. The text should be of another source than the calibration's::

    python scripts/compare_embeddings.py encoder.onnx --text book.txt --bits 4.2,3.0

Beside the rows it prints how a mixed plan compares with uniform ones of the same bytes, as
``compare_quality.py`` does.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from contenders import MIXED, UNIFORM, Workshop, fitting, interpolated
from numpy.typing import NDArray

from mxcompile.activations import AUTO, CHOICES
from mxcompile.artifact import Artifact
from mxcompile.runtime import Program
from mxcompile.text import TextModel


def sentences(text: str, count: int) -> list[str]:
    """Sentences of 40 to 200 characters, spread over a text."""
    found = re.findall(r"[A-Z][^.]{40,200}\.", text.replace("\n", " "))
    return found[:: max(len(found) // count, 1)][:count]


class Reference:
    """The float encoder's embeddings of some sentences."""

    def __init__(self, model: Path, texts: Sequence[str]) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(model), options)
        tokenizer = TextModel.beside(model.parent)
        names = {value.name for value in session.get_inputs()}
        self.feeds: list[dict[str, NDArray[Any]]] = []
        for text in texts:
            ids = np.array([tokenizer.encode(text)], np.int64)
            known = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "token_type_ids": np.zeros_like(ids),
            }
            self.feeds.append({name: known[name] for name in known if name in names})
        self.expected = [session.run(None, feed)[0][0].mean(0) for feed in self.feeds]

    def figures(self, built: Artifact) -> dict[str, float]:
        """How far the embeddings of an artifact are off."""
        program = Program.load(built.folder)
        cosines = []
        for feed, expected in zip(self.feeds, self.expected, strict=True):
            found = next(iter(program.run(feed).values()))[0].mean(0)
            norm = np.linalg.norm(expected) * np.linalg.norm(found)
            cosines.append(float(expected @ found / norm))
        return {"error_mean": 1 - float(np.mean(cosines)), "cosine_min": min(cosines)}


def main() -> None:
    """Print one row a plan, and for each mixed one its ratio to uniform ones of its bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--bits", default="4.2,3.0", help="budgets of the mixed plans")
    parser.add_argument("--activations", choices=CHOICES, default=AUTO)
    parser.add_argument("--folder", type=Path, help="keep what was compiled here")
    parser.add_argument("--cache", type=Path, help="of statistics and prices")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    texts = sentences(args.text.read_text(encoding="utf-8"), args.sentences)
    reference = Reference(args.model, texts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        shop = Workshop(args.model, folder, args.cache, args.activations)
        rows: list[dict[str, Any]] = [
            {"system": c.system, "scheme": c.scheme, **c.size, **reference.figures(c.built)}
            for c in shop.contenders([float(b) for b in args.bits.split(",")])
        ]
    points = [(row["bytes"], row["error_mean"]) for row in rows if row["system"] == UNIFORM]
    for row in rows:
        if row["system"] == MIXED:
            for how, at in (("fits", fitting), ("between", interpolated)):
                best = at(points, row["bytes"])
                row[f"ratio_to_uniform_{how}"] = best and row["error_mean"] / best
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in row.items()), sep="\t")


if __name__ == "__main__":
    main()
