"""Compare an artifact's tokens with those of its emitted Q/DQ model in onnxruntime.

The greedy continuation of a prompt must be the same where activations and caches are float, and is
where only caches are rounded, but for ties; over a text, the share of positions with the same most
likely token is printed. In onnxruntime one run over what was generated tells what it would have
chosen at every step::

    mxcompile model.onnx --activations fp32 --emit-onnx q.onnx -o model.mxc
    python scripts/compare_greedy.py model.mxc q.onnx --prompt "The sea" --text book.txt
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mxcompile import evaluate
from mxcompile.runtime import Program, Session
from mxcompile.text import TextModel


def main() -> None:
    """Print how many tokens agree, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    args = parser.parse_args()
    program = Program.load(args.artifact)
    tokenizer = TextModel.beside(args.artifact)
    reference = evaluate.OnnxSource(args.onnx)
    prompt = tokenizer.encode(args.prompt)
    tokens, session = list(prompt), Session(program)
    logits = session.feed(tokens, "last")
    for _ in range(args.generate):
        tokens.append(int(np.argmax(logits)))
        logits = session.feed(tokens[-1:], "last")
    chosen = np.concatenate([rows.argmax(-1) for rows in reference.logits(tokens[:-1])])
    same = np.array(tokens[len(prompt) :]) == chosen[len(prompt) - 1 :]
    found: dict[str, float | str] = {
        "text": tokenizer.decode(tokens),
        "generated": args.generate,
        "equal": int(same.sum()),
    }
    if args.text is not None:
        content = args.text.read_text(encoding="utf-8")
        texts = evaluate.windows(tokenizer, content, tokens=args.tokens, context=256)
        measured = evaluate.compare(reference, evaluate.CompiledSource(program), texts)
        found |= {key: measured[key] for key in ("tokens", "top1_agreement", "kld_mean")}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
