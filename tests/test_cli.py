"""The command line: what a user types, sees, and gets as an exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest

from mxcompile import artifact, cli, errors, machine
from mxcompile.artifact import Artifact
from mxcompile.records import Case, Record
from tests import toy

PROGRAM = [sys.executable, "-m", "mxcompile.cli"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; gives exit code, standard output and standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, compiled: Path) -> list[Any]:
    """Stands for the compiler: gives the toy, and what it was asked for."""
    asked: list[Any] = []

    def compile_model(job: Any, progress: Any) -> Artifact:
        asked.append(job)
        with progress.stage("solve"):
            return artifact.load(compiled / "toy.mxc")

    def plan_model(job: Any, progress: Any) -> Any:
        asked.append(job)
        return SimpleNamespace(plan=toy.PLAN, predicted={"damage": 0.0123456, "method": "highs"})

    def sweep_budgets(job: Any, progress: Any) -> list[dict[str, Any]]:
        return [{"bits": 3.0, "damage": 0.123456}, {"bits": 4.0, "damage": 0.01}]

    module = SimpleNamespace(
        Job=SimpleNamespace,
        compile_model=compile_model,
        plan_model=plan_model,
        sweep_budgets=sweep_budgets,
    )
    monkeypatch.setitem(sys.modules, "mxcompile.compiler", module)
    return asked


@pytest.fixture
def model(tmp_path: Path) -> Path:
    toy.write_onnx(tmp_path / "toy.onnx")
    toy.write_tokenizer(tmp_path)
    (tmp_path / "text").write_text(" ".join(toy.WORDS[2:] * 4))
    return tmp_path / "toy.onnx"


def one_line(err: str) -> str:
    assert err.startswith("mxcompile: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_a_first_word_that_is_no_verb_is_a_model(
    run: Run, compiler: list[Any], model: Path
) -> None:
    code, out, err = run(model, "--budget", "3bit", "--budget", "1MB", "-o", "x.mxc", "--force")
    assert (code, err) == (0, "")
    assert "bits per weight" in out and "int4 60.0 %" in out and "time      solve" in out
    (job,) = compiler
    assert (job.model, job.budgets, job.output) == (model, ("3bit", "1MB"), Path("x.mxc"))
    assert (job.force, job.target, job.activations, job.caches) == (True, "x86", "auto", None)
    run("--target", "arm", model)
    assert (compiler[1].target, compiler[1].budgets) == ("arm", ("4.2bit",))
    assert compiler[1].output == Path("toy.mxc")


def test_compile_as_json(run: Run, compiler: list[Any], model: Path) -> None:
    found = json.loads(run("compile", model, "--json")[1])
    assert found["bits_per_weight"] > 0 and found["formats"] == {"int4": 384, "int8": 256}
    assert found["seconds"].keys() == {"solve"}


def test_a_word_that_is_neither_verb_nor_model(run: Run) -> None:
    code, _, err = run("evla", "x")
    assert code == 2
    code, _, err = run("evla")
    assert code == 2 and "neither a model file nor a verb; verbs: compile, export" in one_line(err)


def test_plan_writes_and_sweeps(run: Run, compiler: list[Any], model: Path) -> None:
    plan = model.parent / "plan.json"
    code, out, _ = run("plan", model, "-o", plan)
    assert code == 0 and "1 int8" in out
    assert "predicted damage 0.01235, method highs\n" in out
    assert json.loads(plan.read_text()) == toy.PLAN.to_json()
    told = json.loads(run("plan", model, "--json")[1])
    assert told["predicted"] == {"damage": 0.0123456, "method": "highs"}
    code, out, _ = run("plan", model, "--sweep")
    assert code == 0 and "0.1235" in out
    assert len(json.loads(run("plan", model, "--sweep", "--json")[1])) == 2


def test_the_strategy_of_a_plan(run: Run, compiler: list[Any], model: Path) -> None:
    run("plan", model)
    run("plan", model, "--strategy", "mse")
    run(model, "--strategy", "owq")
    assert [job.strategy for job in compiler] == ["ours", "mse", "owq"]


def test_run_streams_text(run: Run, compiled: Path) -> None:
    code, out, err = run("run", compiled / "toy.mxc", "--prompt", "w3 w4", "-n", 5, "-t", 1)
    assert code == 0 and len(out.split()) == 5
    assert "3 + 5 tokens" in err and "decode" in err
    found = json.loads(run("run", compiled / "toy.mxc", "--prompt", "w3 w4", "-n", 5, "--json")[1])
    assert found["text"].split() == out.split()
    assert (found["prompt_tokens"], len(found["tokens"])) == (3, 5)
    assert found["decode_tokens_per_s"] > 0
    assert run("run", compiled / "toy.mxc", "--prompt", "w3", "-n", 5, "-q")[2] == ""


def test_run_reads_a_prompt_from_stdin(
    run: Run, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=lambda: "w3 w4"))
    found = json.loads(run("run", compiled / "toy.mxc", "--prompt", "-", "-n", 1, "--json")[1])
    assert found["prompt_tokens"] == 3


def test_run_on_arrays(run: Run, compiled: Path, tmp_path: Path) -> None:
    x, y = (np.random.default_rng(n).random((3, 4), np.float32) for n in (1, 2))
    np.savez(tmp_path / "in.npz", x=x, y=y)
    words = ["run", compiled / "graph.mxc", "--output", tmp_path / "out.npz", "--input"]
    code, out, _ = run(*words, tmp_path / "in.npz")
    assert code == 0 and "s[3, 4], t[3, 4]" in out
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["t"], x + y)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]
    np.savez(tmp_path / "bad.npz", x=x[:, :3], y=y)
    code, _, err = run(*words, tmp_path / "bad.npz")
    assert code == 2 and "expected x: float32[rows, 4], y: float32[rows, 4]" in one_line(err)
    np.savez(tmp_path / "pickled.npz", x=np.array([print]), allow_pickle=True)
    for name in ("pickled.npz", "none.npz"):
        code, _, err = run(*words, tmp_path / name)
        assert code == 2 and one_line(err)
    (tmp_path / "bad.npz").write_text("not an archive")
    code, _, err = run(*words, tmp_path / "bad.npz")
    assert code == 2 and "is not an .npz" in one_line(err)
    (tmp_path / "folder").mkdir()
    code, _, err = run(*words[:-2], tmp_path / "folder", "--input", tmp_path / "in.npz")
    assert code == 2 and "folder" in one_line(err)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    code, _, err = run("run", compiled / "graph.mxc", "--input", tmp_path / "in.npz")
    assert code == 2 and "--input and --output go together" in one_line(err)


def test_eval_gives_the_keys_of_the_contract(run: Run, compiled: Path, model: Path) -> None:
    words = ["eval", compiled / "toy.mxc", "--reference", model, "--text", model.parent / "text"]
    code, out, _ = run(*words, "--context", 64, "--json")
    assert code == 0
    keys = {"perplexity", "reference_perplexity", "kld_mean", "kld_p99", "top1_agreement", "tokens"}
    assert keys <= json.loads(out).keys()
    code, out, _ = run(*words, "--context", 64)
    assert code == 0
    assert "99.0%   KLD" in out


def test_eval_answers_questions(run: Run, compiled: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "a", "choices": [" b", " c"], "answer": 0}\n' * 3)
    words = ["eval", compiled / "toy.mxc", "--task", task, "--items", 2]
    code, out, _ = run(*words, "--json")
    assert code == 0
    assert json.loads(out)["items"] == 2
    assert "accuracy_normalized" in run(*words)[1]
    code, _, err = run("eval", compiled / "toy.mxc", "--text", task)
    assert (code, err) == (
        2,
        "mxcompile: error: --text needs --reference, the float model to compare with\n",
    )


def test_bench_gives_a_row_a_test_and_threads(run: Run, compiled: Path) -> None:
    words = ["bench", compiled / "toy.mxc", "-p", 16, "-n", 4, "-r", 2]
    found = json.loads(run(*words, "-t", "1,1", "--json")[1])
    assert [row["test"] for row in found] == ["pp16", "tg4"] * 2
    assert all(row["tokens_per_s"] > 0 and row["threads"] == 1 for row in found)
    code, out, _ = run(*words)
    assert code == 0 and "pp16" in out and "+-" in out
    assert run("bench", compiled / "toy.mxc", "-p", 0, "-n", 0)[0] == 2
    assert run("bench", compiled / "toy.mxc", "-t", "1,x")[0] == 2


def test_inspect_and_list(run: Run, compiled: Path, model: Path) -> None:
    found = json.loads(run("inspect", compiled / "toy.mxc", "--json")[1])
    assert found["formats"] == {"int4": 384, "int8": 256}
    shown = run("inspect", compiled / "toy.mxc")[1]
    assert "2 int4, 1 int8" in shown
    size = 2 * 2 * toy.WIDTH
    assert f"{size} bytes a token, 16.00 bits a number: keys fp16*1; values fp16*1" in shown
    assert found["kv_cache"]["token_bytes"] == size
    assert "2 int4, 1 int8" in run("inspect", compiled / "toy.mxc" / "plan.json")[1]
    assert "attention_mask: INT64[batch, total]" in run("inspect", model)[1]
    for what in ("targets", "formats", "passes", "strategies"):
        code, out, _ = run("list", what)
        assert code == 0 and out.startswith("| name")
        assert {"name", "description"} <= json.loads(run("list", what, "--json")[1])[0].keys()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.ArtifactError, 2),
        (errors.PlanError, 2),
        (errors.BudgetError, 3),
        (errors.VerificationError, 4),
        (errors.UnsupportedError, 5),
        (errors.DeviceError, 6),
        (errors.PassError, 1),
    ],
)
def test_foreseen_errors_have_their_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: int
) -> None:
    fail_with(monkeypatch, error("what\n  where"))
    assert run("list", "formats") == (code, "", "mxcompile: error: what where\n")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "_formats", fail)


def test_unforeseen_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("by 0"))
    code, _, err = run("list", "formats")
    assert code == 1 and "ZeroDivisionError: by 0; run with -v for the traceback" in one_line(err)
    code, _, err = run("list", "formats", "-v")
    assert code == 1 and "Traceback" in err and "run with -v" not in err
    fail_with(monkeypatch, OSError(28, "No space left on device", "/x"))
    code, _, err = run("list", "formats")
    assert code == 2 and one_line(err) == "mxcompile: error: /x: No space left on device\n"
    fail_with(monkeypatch, MemoryError())
    assert run("list", "formats") == (2, "", "mxcompile: error: out of memory\n")
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run("list", "formats") == (130, "", "mxcompile: interrupted\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run"],
        ["run", "x.mxc"],
        ["run", "x.mxc", "--prompt", "a", "--input", "b"],
        ["run", "x.mxc", "--prompt", "a", "-t", "0"],
        ["run", "x.mxc", "--prompt", "a", "-n", "-3"],
        ["run", "x.mxc", "--prompt", "a"],
        ["list", "everything"],
        ["--no-such-flag"],
        ["eval", "x"],
        ["inspect", "nothing"],
        ["compile", "nothing.onnx"],
        ["compile", "."],
        ["model.onnx", "--kv-cache", "int1"],
        ["model.onnx", "--kv-cache", "int8,int4,int4"],
        ["model.onnx", "--kv-cache", "600MB"],
    ],
)
def test_usage_errors_are_one_line(run: Run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "") and one_line(err)


def test_help_is_quick_and_imports_little() -> None:
    script = (
        "import sys; from mxcompile import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'tvm', 'rich', 'onnx'} & sys.modules.keys()"
    )
    start = os.times().children_user
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "exit codes" in done.stdout, done.stderr
    assert os.times().children_user - start < 0.3


def test_a_reader_that_leaves_is_no_error(compiled: Path) -> None:
    words = [*PROGRAM, "inspect", str(compiled / "toy.mxc")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        words = [*PROGRAM, "list", "formats"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left on device" in one_line(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_running_model(compiled: Path, number: int) -> None:
    words = [*PROGRAM, "run", str(compiled / "toy.mxc"), "--prompt", "w3 w4", "-n", "2900"]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a shell inherits that interrupts are ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(4)
        process.send_signal(number)
        process.stdout.read()
        assert process.stderr.read().decode().endswith("mxcompile: interrupted\n")
    assert process.returncode == 130


RECORD = Record("cpu", "kernel", Case("int4", 640, 2048, 1, 2), (), 10.0)


def test_tune_imports_and_exports(run: Run, tmp_path: Path) -> None:
    moved, out, log = tmp_path / "moved.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    moved.write_text(RECORD.to_line())
    words = ("tune", "--import", moved, "--export", out, "--log", log, "--json")
    for new in (1, 0):
        code, text, _ = run(*words)
        found = json.loads(text)
        assert (code, found["imported"], found["exported"]) == (0, new, 1)
    assert out.read_text() == RECORD.to_line()


def test_tune_says_what_it_takes(run: Run, tmp_path: Path) -> None:
    code, _, err = run("tune")
    assert code == 2 and "--import" in one_line(err)
    code, _, err = run("tune", tmp_path / "no.onnx", "--log", tmp_path)
    assert code == 2 and "no.onnx" in one_line(err)
    code, _, err = run("tune", "model.onnx", "--time", "soon")
    assert code == 2 and "such as 30s" in one_line(err)


def test_tune_keeps_what_it_measures(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time, all is known and nothing is measured."""
    text = """<ir_version: 10, opset_import: ["": 23]>
        g (float[N,256] x) => (float[N,64] y) { y = MatMul(x, w) }"""
    model = onnx.parser.parse_model(text)
    weight = onnx.numpy_helper.from_array(np.ones((256, 64), np.float32), "w")
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "product.onnx")

    class Machine:
        hardware = machine.here().hardware

        def microseconds(self, case: Case, knobs: object) -> float:
            return 1.0 * case.rows

    monkeypatch.setattr("mxcompile.tune.check_host", lambda where: None)
    monkeypatch.setattr("mxcompile.tune.SessionMeasurer.local", lambda where: Machine())
    options = ("--target", "x86-avx2", "--trials", 1, "-t", 1, "--log", tmp_path, "--json")
    words = ("tune", tmp_path / "product.onnx", *options)
    first, again = (json.loads(run(*words)[1])["cases"] for _ in range(2))
    assert [row["trials"] for row in first] == [1] * len(first) != []
    assert [row["trials"] for row in again] == [0] * len(first)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(first)
