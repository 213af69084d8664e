"""Compare mixed plans with uniform plans and with llama.cpp's quantizations of the same weights.

All are compared with the float model in onnxruntime, on the same tokens. Mixed and uniform plans
are compiled with the same statistics and quantizers and run as they ship. With ``--gguf``,
llama.cpp quantizes the GGUF's weights too, dequantized to float first, with an importance matrix
``E[x^2]`` from the same calibration text, and runs what it made. Sizes are those of the weights
alone: the weight file here, all tensors there. The text should be of other sources than the
calibration's (``scripts/write_texts.py`` writes some)::

    pip install llama-cpp-python
    python scripts/compare_quality.py model.onnx --gguf model.gguf --text book.txt --plot out.svg

Beside the rows it prints, for each size that was asked for, how the best of the others compare at
the same bytes: the best that fits, and between two of them the logarithm of the divergence taken as
linear in bytes. ``--folder`` keeps what was compiled and measured: a run that was cut off goes on.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from contenders import MIXED, UNIFORM, Workshop, fitting, interpolated
from plot import Series, plot

from mxcompile import evaluate, memory, progress
from mxcompile.activations import AUTO, CHOICES
from mxcompile.files import whole
from mxcompile.runtime import Program
from mxcompile.text import TextModel

LLAMA = "llama.cpp"

Row: TypeAlias = dict[str, Any]

FIGURES = (
    "kld_mean",
    "kld_mean_error",
    "kld_p99",
    "perplexity",
    "reference_perplexity",
    "top1_agreement",
    "tokens",
)
HEAD = (
    "text",
    "system",
    "scheme",
    "bytes",
    "bits_per_weight",
    "kld_mean",
    "perplexity",
    "top1_agreement",
)

SCHEMES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,IQ4_XS,Q3_K_M,Q2_K,Q5_0-pure,Q4_0-pure,IQ4_NL-pure"

TOGETHER = 4
"""Models that are measured at once: the reference runs once for all of them, and what is cut off in
between is measured again."""


@dataclass(frozen=True)
class Candidate:
    """Something to measure."""

    system: str
    scheme: str
    size: Mapping[str, float]
    open: Callable[[], evaluate.LogitSource]


def candidates(args: argparse.Namespace, folder: Path) -> list[Candidate]:
    """All that is to be compared, made now."""
    bits = [float(b) for b in args.bits.split(",")]
    shop = Workshop(args.model, folder, args.cache, args.activations)

    def run(path: Path) -> evaluate.LogitSource:
        return evaluate.CompiledSource(Program.load(path))

    found = [
        Candidate(c.system, c.scheme, c.size, partial(run, c.built.folder))
        for c in shop.contenders(bits)
    ]
    if args.gguf is not None:
        import llama_quality

        made = llama_quality.quantized(args.gguf, args.model, args.schemes.split(","), folder)
        for scheme, path in made:
            size = llama_quality.size(path)
            opened = partial(llama_quality.LlamaSource, path, args.context)
            found.append(Candidate(LLAMA, scheme, size, opened))
    return found


class Measured:
    """Rows in a file, so that nothing is measured twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, rows: Mapping[str, Row]) -> None:
        """Keep more rows."""
        self.rows |= rows
        with whole(self.path) as draft:
            draft.write_text(json.dumps(self.rows, indent=1))


def measure(
    args: argparse.Namespace, found: Sequence[Candidate], text: Path, kept: Measured
) -> list[Row]:
    """The rows of one text."""
    tokenizer = TextModel.beside(args.model.parent)
    content = text.read_text(encoding="utf-8")
    texts = evaluate.windows(tokenizer, content, tokens=args.tokens, context=args.context)

    def key(c: Candidate) -> str:
        about = (args.activations, text.stem, args.tokens, args.context, c.system, c.scheme)
        return " ".join(map(str, about))

    watch = progress.create(quiet=False, verbose=False, say=print)
    missing = [c for c in found if key(c) not in kept.rows]
    for start in range(0, len(missing), TOGETHER):
        batch = missing[start : start + TOGETHER]
        reference = evaluate.OnnxSource(args.model)
        figures = evaluate.compare_all(reference, [c.open() for c in batch], texts, watch)
        kept.add({key(c): {n: f[n] for n in FIGURES} for c, f in zip(batch, figures, strict=True)})
        del reference
        memory.release()
    about = {"model": args.model.stem, "text": text.stem}
    return [
        {**about, "system": c.system, "scheme": c.scheme, **c.size, **kept.rows[key(c)]}
        for c in found
    ]


def at_equal_bytes(rows: Sequence[Row]) -> list[Row]:
    """For each mixed plan, text and other system: the others' divergence at its bytes, and ratios.

    ``fits`` is the best that is no larger, ``between`` is interpolated between the two next to it.
    """
    found = []
    for row in rows:
        if row["system"] != MIXED:
            continue
        for system in (UNIFORM, LLAMA):
            points = [
                (other["bytes"], other["kld_mean"])
                for other in rows
                if (other["system"], other["text"]) == (system, row["text"])
            ]
            if not points:
                continue
            line = {"text": row["text"], "scheme": row["scheme"], MIXED: row["kld_mean"]}
            line["against"] = system
            for how, at in (("fits", fitting), ("between", interpolated)):
                best = at(points, row["bytes"])
                line[how] = best
                line[f"ratio to {how}"] = best and row["kld_mean"] / best
            found.append(line)
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """All rows on one axis: a colour a system, a dash a text."""
    series = [
        Series(system, text, points)
        for system in (MIXED, UNIFORM, LLAMA)
        for text in dict.fromkeys(row["text"] for row in rows)
        if (
            points := [
                (row["bits_per_weight"], row["kld_mean"], row["scheme"])
                for row in rows
                if (row["system"], row["text"]) == (system, text)
            ]
        )
    ]
    title = f"{rows[0]['model']}: divergence from the float model against size"
    svg = plot(series, title, "bits a weight, all in", "mean KL divergence, nats")
    path.write_text(svg, encoding="utf-8")


def table(rows: Iterable[Row], head: Sequence[str]) -> None:
    """Print rows, separated by tabs."""
    print(*head, sep="\t")
    for row in rows:
        shown = (row[key] for key in head)
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in shown), sep="\t")


def main() -> None:
    """Print one row a system, scheme and text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model's weights, for llama.cpp")
    parser.add_argument("--schemes", default=SCHEMES, help="of llama.cpp; -pure: no exceptions")
    parser.add_argument("--bits", default="5.0,4.2,3.5,3.0", help="budgets of the mixed plans")
    parser.add_argument("--text", type=Path, required=True, action="append", help="repeatable")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--activations", choices=CHOICES, default=AUTO)
    parser.add_argument("--folder", type=Path, help="keep what was compiled and measured here")
    parser.add_argument("--cache", type=Path, help="of statistics and prices")
    parser.add_argument("--plot", type=Path, help="write an SVG")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = candidates(args, folder)
        kept = Measured(folder / "measured.json")
        rows = [row for text in args.text for row in measure(args, found, text, kept)]
    if args.plot is not None:
        draw(rows, args.plot)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    table(rows, HEAD)
    equal = at_equal_bytes(rows)
    print()
    table(equal, list(equal[0]))


if __name__ == "__main__":
    main()
