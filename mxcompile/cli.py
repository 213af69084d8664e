"""The command line: arguments to values, results to text or JSON, errors to exit codes."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from mxcompile import progress
from mxcompile.errors import MxError, UsageError
from mxcompile.files import whole

if TYPE_CHECKING:  # what a verb needs is imported when it runs: --help must be quick
    from mxcompile.compiler import Job
    from mxcompile.remote import Tracker
    from mxcompile.runtime import Program
    from mxcompile.target import Target

_EXAMPLES: Final = """\
examples:
  mxcompile export hf-folder -o model.onnx
  mxcompile model.onnx --target x86 --budget 4.2bit -o model.mxc
  mxcompile run model.mxc --prompt "The sea"
  mxcompile eval model.mxc --reference model.onnx --text book.txt
  mxcompile bench model.mxc -p 256 -n 64 -t 1,2
  mxcompile deploy model.mxc -o device.tar.gz

A first word that is not a verb is a model to compile.
"""

_EXIT_CODES: Final = """\
exit codes:
  0 done   1 bug   2 usage   3 budget infeasible   4 verification failed
  5 model not supported   6 device not reachable
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = bool({"-v", "--verbose"} & set(words))
    # Threads of torch that wait for each other give way. Where they spin, and another process has a
    # CPU, each operator takes until the system's next turn: minutes where this takes seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A job that is told to end cleans up after itself, as it does after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = _parse(words)
        args.run(args)
        sys.stdout.flush()
    except MxError as error:
        _complain(str(error), verbose)
        return error.exit_code
    except KeyboardInterrupt:
        _say("mxcompile: interrupted")
        return 130
    except BrokenPipeError:
        # Who reads has had enough; Python would still complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        _complain("out of memory", verbose)
        return UsageError.exit_code
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _complain(place + (error.strerror or str(error)), verbose)
        return UsageError.exit_code
    except Exception as error:  # the last resort: a bug of ours
        hint = "" if verbose else "; run with -v for the traceback"
        _complain(f"{type(error).__name__}: {error}{hint}", verbose)
        return MxError.exit_code
    return 0


def _complain(text: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    _say("mxcompile: error: " + " ".join(text.split()))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="mxcompile",
        description="Compile ONNX models to small, fast artifacts of mixed precision.",
        epilog=_EXAMPLES + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=metadata.version("mxcompile"))
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for name, (add, run, text) in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
        )
        add(verb)
        output = verb.add_argument_group("output")
        output.add_argument("--json", action="store_true", help="print one JSON document")
        amount = output.add_mutually_exclusive_group()
        amount.add_argument("-q", "--quiet", action="store_true", help="print results only")
        amount.add_argument("-v", "--verbose", action="store_true", help="print what is done")
        verb.set_defaults(run=run)
    if not words:
        raise UsageError("nothing to do; see mxcompile --help")
    if words[0] not in (*_VERBS, "-h", "--help", "--version"):
        words = ["compile", *words]
    return parser.parse_args(words)


def _progress(args: argparse.Namespace) -> progress.Progress:
    return progress.create(quiet=args.quiet, verbose=args.verbose, say=_say)


def _show(args: argparse.Namespace, data: Any, text: str) -> None:
    """Print a result: ``data`` with --json, else ``text``."""
    print(json.dumps(data, indent=1) if args.json else text)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table; columns of numbers line up on the right."""
    body = [[str(cell) for cell in row] for row in rows]
    columns = []
    for title, *cells in zip(head, *body, strict=True):
        width = max(map(len, (title, *cells)))
        if all(cell[:1].isdigit() or not cell for cell in cells):
            columns.append([c.rjust(width) for c in (title, "-" * (width - 1) + ":", *cells)])
        else:
            columns.append([c.ljust(width) for c in (title, "-" * width, *cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns, strict=True))


def _size(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


# compile and plan


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, metavar="MODEL.onnx")
    verb.add_argument(
        "--target",
        default="x86",
        metavar="NAME",
        help="see `mxcompile list targets`; a family means this machine's best (default: x86)",
    )
    verb.add_argument(
        "--budget",
        action="append",
        metavar="BUDGET",
        help="4.2bit (all-in, a weight), 600MB, 30tok/s or kld<=0.02 (the smallest artifact that "
        "keeps it); may be repeated, then all hold (default: 4.2bit)",
    )
    verb.add_argument(
        "--format",
        action="append",
        metavar="PATTERN=FORMAT",
        help="the format of the weights that a pattern names, such as *.down_proj.weight=int6; "
        "may be repeated, the first match counts",
    )
    verb.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN=FORMAT",
        help="the narrowest format of the weights that a pattern names; after every --format",
    )
    verb.add_argument(
        "--sensitivity",
        choices=("gradient", "forward"),
        default="gradient",
        help="how errors are priced: by gradients, or by perturbing layers (default: gradient)",
    )
    verb.add_argument(
        "--activations",
        choices=("auto", "int8", "int16", "fp32"),
        default="auto",
        help="what matmuls take; auto is int8, and int16 for the few layers that need it most "
        "(default: auto)",
    )
    verb.add_argument(
        "--kv-cache",
        metavar="FORMATS",
        help="what keys and values are kept in: fp32, fp16, int8, int4, two of these for keys and "
        "values (int8,int4), or for each layer what it needs under a limit: 6bit (a number, all "
        "in), kld<=0.001 (added), auto, which is that (default: fp16, or what --plan says)",
    )
    verb.add_argument(
        "--shape",
        action="append",
        metavar="NAME=SIZES",
        help="fix the free dimensions of an input, such as x=1,3,48,192; may be repeated",
    )
    verb.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text to measure activations on (default: a text that comes with mxcompile)",
    )
    verb.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep what is measured, for the next budget or to go on after an interruption",
    )
    verb.add_argument(
        "--resume", action="store_true", help="the same as --cache MODEL.cache, beside the model"
    )
    verb.add_argument(
        "--hardware",
        metavar="ID",
        help="use the tuning records of this machine, as `mxcompile tune --rpc` calls it",
    )
    _add_log(verb)


def _add_log(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--log",
        type=Path,
        metavar="DIR",
        help="where tuning records are (default: ~/.local/share/mxcompile)",
    )


def _add_strategy(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--strategy",
        default="ours",
        metavar="NAME",
        help="how the size is spent; see `mxcompile list strategies` (default: ours)",
    )


def _add_compile(verb: argparse.ArgumentParser) -> None:
    _add_model(verb)
    _add_strategy(verb)
    verb.add_argument(
        "-o", "--output", type=Path, metavar="OUT.mxc", help="(default: MODEL.mxc, in this folder)"
    )
    verb.add_argument("--force", action="store_true", help="replace the output if it exists")
    verb.add_argument("--plan", type=Path, metavar="FILE", help="a plan from `mxcompile plan -o`")
    verb.add_argument("--emit-onnx", type=Path, metavar="FILE", help="write the Q/DQ model too")
    verb.add_argument(
        "--verify",
        choices=("quick", "full"),
        default="quick",
        help="full also compiles the widest uniform plan that fits, which must not be better",
    )
    verb.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the model after each pass")


def _job(args: argparse.Namespace) -> "Job":
    if not args.model.is_file():
        kinds = ", ".join(_VERBS)
        raise UsageError(f"{args.model} is neither a model file nor a verb; verbs: {kinds}")
    from mxcompile.cache_choice import CacheChoice
    from mxcompile.compiler import Job
    from mxcompile.plan import Rule

    compiling = args.verb == "compile"
    return Job(
        model=args.model,
        target=args.target,
        budgets=tuple(args.budget or ("4.2bit",)),
        activations=args.activations,
        caches=CacheChoice.parse(args.kv_cache) if args.kv_cache else None,
        calibration=args.calibration,
        cache=args.cache or (args.model.with_suffix(".cache") if args.resume else None),
        sensitivity=args.sensitivity,
        rules=(
            *(Rule.parse(text) for text in args.format or ()),
            *(Rule.parse(text, floor=True) for text in args.keep or ()),
        ),
        verify=args.verify if compiling else "quick",
        strategy=getattr(args, "strategy", "ours"),
        log=args.log,
        hardware=args.hardware,
        shapes=tuple(args.shape or ()),
        output=(compiling and args.output) or Path(args.model.with_suffix(".mxc").name),
        force=compiling and args.force,
        emit_onnx=args.emit_onnx if compiling else None,
        dump_ir=args.dump_ir if compiling else None,
        plan=args.plan if compiling else None,
    )


def _compile(args: argparse.Namespace) -> None:
    job, shown = _job(args), _progress(args)
    from mxcompile.compiler import compile_model
    from mxcompile.inspection import describe_artifact

    built = compile_model(job, shown)
    facts = describe_artifact(built)
    data = {"output": str(built.folder), **facts, "seconds": shown.seconds}
    _show(args, data, _describe_artifact(str(built.folder), facts) + _describe_times(shown.seconds))


def _describe_times(seconds: dict[str, float]) -> str:
    return "\ntime      " + ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())


def _describe_artifact(path: str, facts: dict[str, Any]) -> str:
    lines = [
        f"{path}: {facts['bits_per_weight']:.3f} bits per weight "
        f"({_size(facts['weight_bytes'])} for {facts['parameters'] / 1e6:.1f} M parameters), "
        f"{_size(facts['code_bytes'])} of code for {facts['target']}",
        "formats   " + _describe_formats(facts["formats"]),
    ]
    if facts["decoder_bits_per_weight"]:
        lines.append(f"decoder   {facts['decoder_bits_per_weight']:.3f} bits without vocabulary")
    if facts["kv_cache"]:
        lines.append("KV cache  " + _describe_caches(facts["kv_cache"]))
    measured = _describe_quality(facts["quality"]) or "not verified: made where it cannot run"
    lines.append("quality   " + measured)
    return "\n".join(lines)


def _describe_formats(formats: dict[str, int]) -> str:
    total = sum(formats.values())
    return ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in formats.items())


def _describe_caches(facts: dict[str, Any]) -> str:
    sides = "; ".join(f"{side} {_describe_counts(facts[side])}" for side in ("keys", "values"))
    return f"{facts['token_bytes']:,} bytes a token, {facts['bits']:.2f} bits a number: {sides}"


def _describe_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}*{count}" for name, count in counts.items())


def _describe_quality(quality: dict[str, float]) -> str:
    errors = {f"{name}_error" for name in quality}
    shown = (name for name in quality if name not in errors)
    return ", ".join(f"{name.replace('_', ' ')} {quality[name]:.4g}" for name in shown)


def _add_plan(verb: argparse.ArgumentParser) -> None:
    _add_model(verb)
    _add_strategy(verb)
    verb.add_argument("-o", "--output", type=Path, metavar="PLAN.json", help="write the plan")
    verb.add_argument("--sweep", action="store_true", help="solve for a range of budgets")


def _plan(args: argparse.Namespace) -> None:
    job, shown = _job(args), _progress(args)
    from mxcompile.compiler import plan_model, sweep_budgets
    from mxcompile.inspection import describe_plan

    if args.sweep:
        rows = sweep_budgets(job, shown)
        head = list(rows[0])
        return _show(
            args, rows, _table(head, [[_number(row[key]) for key in head] for row in rows])
        )
    planned = plan_model(job, shown)
    if args.output:
        with whole(args.output) as draft:
            draft.write_text(json.dumps(planned.plan.to_json()))
    facts = {**describe_plan(planned.plan), "predicted": dict(planned.predicted)}
    return _show(args, {"kind": "plan", **facts}, _describe_plan(facts))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _describe_plan(facts: dict[str, Any]) -> str:
    head = f"{facts['bits_per_weight']:.3f} bits per weight ({_size(facts['weight_bytes'])})"
    lines = [head, f"formats   {_describe_formats(facts['formats'])}"]
    if facts["caches"]:
        lines.append("KV cache  " + _describe_counts(Counter(facts["caches"].values())))
    if "predicted" in facts:
        predicted = (f"{k.replace('_', ' ')} {_number(v)}" for k, v in facts["predicted"].items())
        lines.append("predicted " + ", ".join(predicted))
    return "\n".join([*lines, _tensor_table(facts)])


def _tensor_table(facts: dict[str, Any]) -> str:
    rows = [
        (
            t["name"],
            f"{t['rows']} x {t['columns']}",
            f"{t['bits']:.2f}" if "bits" in t else "",
            ", ".join(f"{count} {name}" for name, count in t.get("tiles", {}).items()),
        )
        for t in facts["tensors"]
    ]
    return _table(("tensor", "shape", "bits", "row tiles"), rows)


def _add_compare(verb: argparse.ArgumentParser) -> None:
    _add_model(verb)
    verb.add_argument(
        "--strategies",
        default="all",
        metavar="all|A,B",
        help="see `mxcompile list strategies` (default: all)",
    )
    verb.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="what to measure on, of another source than the calibration's; for models that take "
        "no tokens an .npz of samples",
    )
    verb.add_argument(
        "--tokens", type=_positive, default=4096, help="positions to compare (default: %(default)s)"
    )
    verb.add_argument(
        "--context", type=_positive, default=512, help="tokens in a window (default: %(default)s)"
    )
    verb.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="plot the table")


def _compare(args: argparse.Namespace) -> None:
    job, shown = _job(args), _progress(args)
    from mxcompile import compare

    rows = compare.compare(
        job,
        args.strategies,
        args.text,
        tokens=args.tokens,
        context=args.context,
        progress=shown,
    )
    if args.output:
        with whole(args.output) as draft:
            draft.write_text(compare.render(rows, args.model.stem), encoding="utf-8")
    ranked = [row for part in compare.by_budget(rows).values() for row in part]
    head = list(rows[0])
    _show(args, rows, _table(head, [[_number(row[key]) for key in head] for row in ranked]))


# export


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", type=Path, metavar="HF_DIR|FILE.gguf")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL.onnx")


def _export(args: argparse.Namespace) -> None:
    try:
        from mxcompile.exporter import export
    except ModuleNotFoundError as error:
        raise UsageError(f"export needs {error.name}: pip install 'mxcompile[export]'") from error
    shown = _progress(args)
    with shown.stage("export"):
        export(args.source, args.output, progress=shown.note)
    data = {"output": str(args.output), "seconds": shown.seconds}
    _show(args, data, f"{args.output} written in {shown.seconds['export']:.0f} s")


# tune


def _add_tune(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx|OUT.mxc")
    verb.add_argument("--target", default="x86", metavar="NAME", help="(default: x86)")
    verb.add_argument(
        "--trials", type=_positive, help="at most, a case (default: until none helps)"
    )
    verb.add_argument("--time", type=_seconds, metavar="TIME", help="such as 10min or 30s")
    verb.add_argument("-t", "--threads", type=_positive, help="(default: one a physical core)")
    verb.add_argument(
        "--import", dest="source", type=Path, metavar="FILE", help="take in the records of a file"
    )
    verb.add_argument("--export", type=Path, metavar="FILE", help="write all records to a file")
    _add_log(verb)
    _add_rpc(verb)


def _add_rpc(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--rpc", metavar="HOST:PORT", help="measure on devices that a tracker of TVM's RPC lists"
    )
    verb.add_argument("--key", metavar="KEY", help="the key that the devices go by")


def _tracker(args: argparse.Namespace) -> "Tracker | None":
    if (args.rpc is None) != (args.key is None):
        raise UsageError("--rpc and --key go together")
    if args.rpc is None:
        return None
    from mxcompile.remote import Tracker

    return Tracker.parse(args.rpc, args.key)


def _seconds(text: str) -> float:
    units = {"s": 1, "min": 60, "h": 3600}
    number = text.rstrip("hmins")
    if not number.isdecimal() or int(number) == 0 or (unit := text[len(number) :]) not in units:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time such as 30s, 10min or 1h")
    return int(number) * units[unit]


def _tune(args: argparse.Namespace) -> None:
    from mxcompile import records

    log = args.log or records.user_folder()
    if not (args.model or args.source or args.export):
        raise UsageError("tune takes a model, --import or --export; see mxcompile tune --help")
    data: dict[str, Any] = {"log": str(log / records.FILE)}
    lines = []
    if args.source:
        data["imported"] = records.merge(args.source, log)
        lines.append(f"{data['imported']} new records from {args.source}")
    if args.model:
        rows = _tune_model(args, log)
        data["cases"] = rows
        lines.append(_tuned_table(rows))
        machines = ", ".join(sorted({f"'{row['hardware']}'" for row in rows}))
        trials = sum(row["trials"] for row in rows)
        lines.append(f"{trials} trials on {machines}; records in {data['log']}")
    if args.export:
        data["exported"] = records.export(log, args.export)
        lines.append(f"{data['exported']} records to {args.export}")
    _show(args, data, "\n".join(lines))


def _tune_model(args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from mxcompile.compiler import tune_model
    from mxcompile.tune import Limits

    found = tune_model(
        args.model,
        args.target,
        args.threads,
        Limits(args.trials, args.time),
        log,
        _progress(args),
        _tracker(args),
    )
    return [
        {
            "hardware": outcome.hardware,
            **asdict(outcome.case),
            "default_us": outcome.default_us,
            "best_us": outcome.best_us,
            "knobs": asdict(outcome.knobs),
            "trials": outcome.trials,
        }
        for outcome in found
    ]


def _tuned_table(rows: list[dict[str, Any]]) -> str:
    head = ("format", "rows", "columns", "batch", "threads", "default us", "best us", "trials")
    lines = [
        (
            *(row[name] for name in head[:5]),
            f"{row['default_us']:.1f}",
            f"{row['best_us']:.1f}",
            row["trials"],
        )
        for row in rows
    ]
    return _table(head, lines)


# run


def _add_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("artifact", type=Path, metavar="OUT.mxc")
    given = verb.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    given.add_argument("--input", type=Path, metavar="IN.npz", help="arrays to run the model on")
    verb.add_argument("--output", type=Path, metavar="OUT.npz", help="where results of --input go")
    verb.add_argument(
        "-n", "--tokens", type=_positive, default=128, help="at most (default: %(default)s)"
    )
    verb.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    verb.add_argument(
        "--top-p", type=float, default=1.0, help="choose from this mass (default: 1.0)"
    )
    verb.add_argument("--seed", type=int, help="makes random choices repeatable")
    verb.add_argument("--context", type=_positive, help="tokens to remember (default: all it can)")
    verb.add_argument("--ignore-eos", action="store_true", help="go on after the text has ended")
    _add_threads(verb)


def _add_threads(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-t", "--threads", type=_positive, help="(default: one a physical core)")


def _run(args: argparse.Namespace) -> None:
    from mxcompile.runtime import Program

    if (args.input is None) != (args.output is None):
        raise UsageError("--input and --output go together")
    program = Program.load(args.artifact, args.threads)
    if args.input is None:
        _generate(args, program)
    else:
        _run_arrays(args, program)


def _run_arrays(args: argparse.Namespace, program: "Program") -> None:
    import numpy as np

    try:
        with np.load(args.input, allow_pickle=False) as arrays:
            feeds = dict(arrays)
    except (ValueError, AttributeError, TypeError, EOFError) as error:
        raise UsageError(f"{args.input} is not an .npz of arrays: {error}") from error
    start = time.perf_counter()
    found = program.run(feeds)
    spent = time.perf_counter() - start
    # Given a path, numpy would write to one that ends in .npz.
    with whole(args.output) as draft, draft.open("xb") as file:
        np.savez(file, **cast(Any, found))
    shapes = {name: list(array.shape) for name, array in found.items()}
    text = ", ".join(f"{name}{shape}" for name, shape in shapes.items())
    _show(args, {"outputs": shapes, "seconds": spent}, f"{args.output}: {text} in {spent:.3f} s")


def _generate(args: argparse.Namespace, program: "Program") -> None:
    from mxcompile.runtime import Session
    from mxcompile.sample import SamplingSettings, generate
    from mxcompile.text import TextModel

    session, model = Session(program, args.context), TextModel.beside(args.artifact)
    generation = program.manifest.generation
    ends = () if args.ignore_eos or generation is None else generation.eos_token_id
    prompt = model.encode(sys.stdin.read() if args.prompt == "-" else args.prompt)
    stream = model.stream(prompt)
    settings = SamplingSettings(args.temperature, args.top_p, args.seed)
    tokens: list[int] = []
    times = [time.perf_counter()]
    for token in generate(session, prompt, settings, limit=args.tokens, stop=ends):
        times.append(time.perf_counter())
        tokens.append(token)
        if not args.json:
            print(stream.push(token), end="", flush=True)
    rates = _rates(len(prompt), times)
    text = f"\n{len(prompt)} + {len(tokens)} tokens" + "".join(
        f", {name.replace('_tokens_per_s', '')} {rate:.1f} tokens/s" for name, rate in rates.items()
    )
    data = {"text": model.decode(tokens), "tokens": tokens, "prompt_tokens": len(prompt), **rates}
    if args.json:
        _show(args, data, "")
    else:
        print()
        if not args.quiet:
            _say(text)


def _rates(prompt: int, times: list[float]) -> dict[str, float]:
    """Tokens a second before the first new token, and after it."""
    if len(times) < 3:
        return {}
    return {
        "prefill_tokens_per_s": prompt / (times[1] - times[0]),
        "decode_tokens_per_s": (len(times) - 2) / (times[-1] - times[1]),
    }


# eval and bench


def _add_eval(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, metavar="OUT.mxc|MODEL.onnx")
    verb.add_argument(
        "--reference", type=Path, metavar="MODEL.onnx", help="the float model, for --text"
    )
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE", help="compare distributions on a text")
    what.add_argument(
        "--task",
        type=Path,
        metavar="FILE.jsonl",
        help="answer questions: lines of question, choices and answer",
    )
    verb.add_argument("--items", type=_positive, help="questions of the task (default: all)")
    verb.add_argument(
        "--tokens", type=_positive, default=4096, help="positions to compare (default: %(default)s)"
    )
    verb.add_argument(
        "--context", type=_positive, default=512, help="tokens in a window (default: %(default)s)"
    )
    _add_threads(verb)


def _evaluate(args: argparse.Namespace) -> None:
    if args.task is not None:
        return _answer(args)
    from mxcompile.evaluate import evaluate

    if args.reference is None:
        raise UsageError("--text needs --reference, the float model to compare with")
    found = evaluate(
        args.model,
        args.reference,
        args.text,
        tokens=args.tokens,
        context=args.context,
        threads=args.threads,
        progress=_progress(args),
    )
    return _show(args, found, _quality_block(found))


def _answer(args: argparse.Namespace) -> None:
    from mxcompile import zeroshot
    from mxcompile.evaluate import open_source
    from mxcompile.text import TextModel

    items = zeroshot.load(args.task, args.items)
    source = open_source(args.model, args.threads)
    model = TextModel.beside(args.model if args.model.is_dir() else args.model.parent)
    found = zeroshot.score(source, model, items, _progress(args)).figures()
    rows = [
        (name, f"{found[name]:.4f}", f"{found[f'{name}_error']:.4f}")
        for name in ("accuracy", "accuracy_normalized")
    ]
    _show(args, found, _table((f"{len(items)} items", "value", "+-"), rows))


_QUALITY: Final = {
    "Perplexity statistics": {
        "Mean PPL(Q)": "perplexity",
        "Mean PPL(base)": "reference_perplexity",
        "Mean PPL(Q)/PPL(base)": "perplexity_ratio",
    },
    "KL divergence statistics": {
        "Mean    KLD": "kld_mean",
        "Maximum KLD": "kld_max",
        "99.9%   KLD": "kld_p99_9",
        "99.0%   KLD": "kld_p99",
        "Median  KLD": "kld_median",
    },
    "Token probability statistics": {
        "Mean    dp (%)": "delta_p_mean",
        "RMS     dp (%)": "delta_p_rms",
        "Same top p (%)": "top1_agreement",
    },
}
"""The block of llama-perplexity --kl-divergence: its titles, lines, and our figures."""


def _quality_block(found: dict[str, float]) -> str:
    lines = []
    for title, rows in _QUALITY.items():
        lines.append(f"====== {title} ======")
        for text, key in rows.items():
            scale = 100 if "%)" in text else 1
            error = found.get(f"{key}_error")
            value = f"{text:<22}: {scale * found[key]:10.6f}"
            lines.append(value + ("" if error is None else f" +- {scale * error:10.6f}"))
    return "\n".join([*lines, f"over {found['tokens']} tokens"])


def _add_bench(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("artifact", type=Path, metavar="OUT.mxc")
    verb.add_argument(
        "-p", "--prompt", type=int, default=256, help="tokens of the prompt test (default: 256)"
    )
    verb.add_argument(
        "-n", "--generate", type=int, default=64, help="tokens of the other test (default: 64)"
    )
    verb.add_argument(
        "-d",
        "--depth",
        type=_depths,
        default=(0,),
        help="tokens of context before a test, such as 0,8192 (default: 0)",
    )
    verb.add_argument("-t", "--threads", type=_counts, help="such as 1,2 (default: as for run)")
    verb.add_argument("-r", "--repetitions", type=_positive, default=5, help="(default: 5)")
    _add_rpc(verb)
    _add_foreign(verb)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in text.split(","))


def _depths(text: str) -> tuple[int, ...]:
    return tuple(0 if word == "0" else _positive(word) for word in text.split(","))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _bench(args: argparse.Namespace) -> None:
    from mxcompile.bench import bench
    from mxcompile.runtime import cores

    if min(args.prompt, args.generate) < 0 or args.prompt == args.generate == 0:
        raise UsageError("-p and -n take the tokens of a test; 0 leaves it out")
    if (tracker := _tracker(args)) is None:
        measure = partial(bench, args.artifact, threads=args.threads or (cores(),))
    else:
        from mxcompile import remote

        measure = partial(
            remote.bench,
            args.artifact,
            tracker,
            threads=args.threads or (),
            wheels=args.wheels,
            compiler=args.cxx,
        )
    rows = measure(
        prompt=args.prompt,
        generate=args.generate,
        repetitions=args.repetitions,
        depths=args.depth,
        progress=_progress(args),
    )
    head = ("model", "size", "params", "bits", "target", "threads", "test", "tokens/s")
    lines = [
        (
            row["model"],
            _size(row["weight_bytes"]),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['bits_per_weight']:.2f}",
            row["target"],
            row["threads"],
            row["test"],
            f"{row['tokens_per_s']:.2f} +- {row['stddev']:.2f}",
        )
        for row in rows
    ]
    _show(args, rows, _table(head, lines))


# deploy


def _add_deploy(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("artifact", type=Path, metavar="OUT.mxc")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DEVICE.tar.gz")
    _add_foreign(verb)


def _add_foreign(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--wheels", type=Path, metavar="DIR", help="TVM's wheels for another kind of machine"
    )
    verb.add_argument("--cxx", metavar="COMMAND", help="the C++ compiler for that machine")


def _deploy(args: argparse.Namespace) -> None:
    from mxcompile.deploy import deploy

    shown = _progress(args)
    made = deploy(args.artifact, args.output, wheels=args.wheels, compiler=args.cxx, progress=shown)
    size = made.archive.stat().st_size
    beside = made.bytes_beside_model
    data = {
        "output": str(made.archive),
        "machine": made.machine,
        "bytes": size,
        "bytes_beside_model": beside,
        "files": made.files,
        "seconds": shown.seconds,
    }
    text = (
        f"{made.archive}: {_size(size)} for {made.machine}; unpacked, {_size(beside)} beside the "
        "weights and the tokenizer"
    )
    _show(args, data, text)


# inspect and list


def _add_inspect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("path", type=Path, metavar="OUT.mxc|PLAN.json|MODEL.onnx")


def _inspect(args: argparse.Namespace) -> None:
    from mxcompile.inspection import inspect

    facts = inspect(args.path)
    if facts["kind"] == "plan":
        text = _describe_plan(facts)
    elif facts["kind"] == "model":
        text = f"{args.path}: {facts['parameters'] / 1e6:.2f} M parameters\n" + "\n".join(
            [
                *(f"in   {line}" for line in facts["inputs"]),
                *(f"out  {x}" for x in facts["outputs"]),
            ]
        )
        text += "\n" + _tensor_table(facts)
    else:
        text = f"{_describe_artifact(str(args.path), facts)}\n{_tensor_table(facts)}"
    _show(args, facts, text)


def _add_list(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("what", choices=("targets", "formats", "passes", "strategies"))


def _list(args: argparse.Namespace) -> None:
    lists = {
        "targets": _targets,
        "formats": _formats,
        "passes": _passes,
        "strategies": _strategies,
    }
    rows = lists[args.what]()
    columns = ("name", "description", *(["notes"] if args.what == "targets" else []))
    text = _table(columns, [tuple(row[key] for key in columns) for row in rows])
    _show(args, rows, text)


def _targets() -> list[dict[str, Any]]:
    from mxcompile import target

    return [
        {
            "name": found.name,
            "description": found.description,
            "family": found.family,
            "requires": sorted(found.requires),
            "parent": found.parent,
            "default": found.default,
            "speed": asdict(found.speed),
            "runs_here": found.runs_here,
            "notes": _about(found),
        }
        for found in target.shipped()
    ]


def _about(found: "Target") -> str:
    """What to know of a target before it is chosen."""
    needs = (
        f"a board of {found.parent}"
        if found.parent
        else f"needs {' '.join(sorted(found.requires))}"
    )
    kind = [f"what {found.family} means elsewhere"] if found.default else []
    return "; ".join([needs, *kind, *(["runs here"] if found.runs_here else [])])


def _formats() -> list[dict[str, Any]]:
    from mxcompile.formats import FORMATS

    return [
        {"name": f.name, "bits": f.bits, "description": f.description} for f in FORMATS.values()
    ]


def _passes() -> list[dict[str, Any]]:
    from pkgutil import resolve_name

    from mxcompile.passes import REGISTRY

    return [
        {"name": name, "description": (resolve_name(where).__doc__ or "").partition("\n")[0]}
        for name, where in REGISTRY.items()
    ]


def _strategies() -> list[dict[str, Any]]:
    from mxcompile.strategies import STRATEGIES, describe

    return [{"name": name, "description": describe(name)} for name in STRATEGIES]


_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], None]

_VERBS: Final[dict[str, tuple[_Add, _Run, str]]] = {
    "compile": (_add_compile, _compile, "compile a model (the verb may be left out)"),
    "export": (_add_export, _export, "turn a Hugging Face folder or a GGUF file into ONNX"),
    "plan": (_add_plan, _plan, "choose the precisions, generate no code"),
    "compare": (_add_compare, _compare, "measure strategies of spending a budget side by side"),
    "tune": (_add_tune, _tune, "search the kernels' knobs on this machine, keep what was found"),
    "run": (_add_run, _run, "generate text, or run a model on arrays"),
    "eval": (_add_eval, _evaluate, "measure how far a model is from its reference"),
    "bench": (_add_bench, _bench, "measure tokens a second"),
    "deploy": (_add_deploy, _deploy, "pack an artifact with all that a device needs to run it"),
    "inspect": (_add_inspect, _inspect, "show what an artifact, a plan or a model holds"),
    "list": (_add_list, _list, "list the targets, formats, passes or strategies"),
}
"""How each verb's arguments are added, what runs it, and what it does."""


if __name__ == "__main__":
    sys.exit(main())
