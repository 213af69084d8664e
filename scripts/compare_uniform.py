"""Compare a mixed plan with uniform plans, compiled alike and measured on the same text.

Every plan is quantized with the same quantizers and the same statistics, compiled, and run; the
reference is the float model in onnxruntime. The text should be of another source than the
calibration's (``mxcompile --calibration``, by default texts that come with Python)::

    python scripts/compare_uniform.py model.onnx --budget 4.2bit --text book.txt
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mxcompile import evaluate, progress
from mxcompile.artifact import Artifact
from mxcompile.compiler import Job, compile_model
from mxcompile.formats import FORMATS
from mxcompile.plan import PrecisionPlan
from mxcompile.runtime import Program
from mxcompile.text import TextModel

HEAD = ("scheme", "bytes", "bits_per_weight", "kld_mean", "kld_p99", "perplexity", "top1_agreement")


def compiled(
    model: Path, budget: str, formats: Sequence[str], folder: Path
) -> Iterator[tuple[str, Artifact]]:
    """Compile the plan for the budget, then a uniform plan for each format."""
    watch = progress.create(quiet=False, verbose=True, say=lambda text: print(f"# {text}"))
    job = Job(model, "x86", (budget,), folder / "mixed.mxc", cache=folder)
    mixed = compile_model(job, watch)
    yield f"mixed {budget}", mixed
    for name in formats:
        plan = folder / f"{name}.json"
        uniform = PrecisionPlan.uniform(mixed.plan().units, FORMATS[name])
        plan.write_text(json.dumps(uniform.to_json()))
        output = folder / f"{name}.mxc"
        yield (
            name,
            compile_model(Job(model, "x86", (budget,), output, plan=plan, cache=folder), watch),
        )


def measure(model: Path, built: Artifact, texts: list[list[int]]) -> dict[str, Any]:
    """The size of an artifact and how far it is from the float model."""
    found = evaluate.compare(
        evaluate.OnnxSource(model), evaluate.CompiledSource(Program.load(built.folder)), texts
    )
    size = {"bytes": built.weight_bytes, "bits_per_weight": built.bits_per_weight}
    return {**size, **found}


def main() -> None:
    """Print one row a plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="4.2bit")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--formats", default="int3,int4", help="of the uniform plans")
    parser.add_argument("--folder", type=Path, help="keep what was compiled and measured here")
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    content = args.text.read_text(encoding="utf-8")
    tokenizer = TextModel.beside(args.model.parent)
    texts = evaluate.windows(tokenizer, content, tokens=args.tokens, context=args.context)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"scheme": name, **measure(args.model, built, texts)}
            for name, built in compiled(args.model, args.budget, args.formats.split(","), folder)
        ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(*HEAD, sep="\t")
    for row in rows:
        shown = (row[key] for key in HEAD)
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in shown), sep="\t")


if __name__ == "__main__":
    main()
