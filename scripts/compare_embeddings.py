"""Compare the sentence embeddings of a compiled encoder with those of its float model.

An embedding is the mean of the last hidden states; the cosine to the float one is printed over 100
sentences of Python's help texts::

    python scripts/compare_embeddings.py encoder.mxc encoder.onnx
"""

import argparse
import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import onnxruntime

from mxcompile.runtime import Program
from mxcompile.text import TextModel


def sentences(count: int) -> list[str]:
    """Sentences of 40 to 200 characters, spread over all topics."""
    found = [
        text.replace("\n", " ")
        for topic in topics.values()
        for text in re.findall(r"[A-Z][^.]{40,200}\.", topic)
    ]
    return found[:: len(found) // count][:count]


def main() -> None:
    """Print the least and the mean cosine, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--sentences", type=int, default=100)
    args = parser.parse_args()
    program = Program.load(args.artifact)
    tokenizer = TextModel.beside(args.artifact)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(args.onnx), options)
    cosines = []
    for text in sentences(args.sentences):
        ids = np.array([tokenizer.encode(text)], np.int64)
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        feeds = {value.name: known[value.name] for value in session.get_inputs()}
        expected = session.run(None, feeds)[0][0].mean(0)
        found = next(iter(program.run(feeds).values()))[0].mean(0)
        norm = np.linalg.norm(expected) * np.linalg.norm(found)
        cosines.append(float(expected @ found / norm))
    print(json.dumps({"cosine_min": min(cosines), "cosine_mean": float(np.mean(cosines))}))


if __name__ == "__main__":
    main()
