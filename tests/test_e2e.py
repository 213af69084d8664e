"""The bundled model through the whole compiler, against onnxruntime and against uniform plans."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import tvm

from mxcompile import (
    caches,
    cli,
    deploy,
    evaluate,
    gpu,
    graph,
    inspection,
    lower,
    passes,
    runtime,
    target,
    verify,
    weights,
)
from mxcompile.activations import choose_activations
from mxcompile.artifact import Artifact
from mxcompile.cache_choice import CacheChoice
from mxcompile.compiler import Job, compile_model, plan_model, price_model
from mxcompile.errors import (
    ArtifactError,
    BudgetError,
    PlanError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from mxcompile.formats import CACHE_FORMATS, FORMATS
from mxcompile.gptq import Quantizer
from mxcompile.pipeline import Context, Pipeline
from mxcompile.plan import PrecisionPlan, TileFormats
from mxcompile.progress import Progress
from mxcompile.runtime import Program, Session
from mxcompile.samples import Samples
from mxcompile.simulate import SimulatedSource
from mxcompile.statistics import Statistics
from mxcompile.targets import cuda_binary, packing
from mxcompile.targets import kernels as families
from mxcompile.text import TextModel
from tests import arm, conftest, cuda

TINYLM = Path(__file__).parents[1] / "models" / "tinylm"
PROMPT = "In the beginning God created the heaven and the earth."


@pytest.fixture(scope="session")
def tinylm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from mxcompile.exporter import export

    path = tmp_path_factory.mktemp("tinylm") / "tinylm.onnx"
    export(TINYLM, path)
    return path


@pytest.fixture(scope="session")
def mixed_plan(tinylm: Path) -> Path:
    """A plan that has every format in every large weight, whatever that costs in quality."""
    float_model = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(
        graph.load(tinylm), Context(target.find("x86"))
    )
    units = graph.units(float_model)
    rng = np.random.default_rng(0)
    formats = list(FORMATS.values())
    tiles = {
        u.name: TileFormats(tuple(formats[i] for i in rng.integers(1, len(formats), u.tiles)))
        for u in units
    }
    path = tinylm.with_name("plan.json")
    path.write_text(json.dumps(PrecisionPlan(units, tiles).to_json()))
    return path


@pytest.fixture(scope="session")
def compile_tiny(
    tinylm: Path, mixed_plan: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Artifact, Path]]:
    """Compile with float or rounded activations and caches; gives the artifact and its Q/DQ model.

    Each is compiled once. A quick one is quantized without error feedback, which takes long and no
    kernel sees. Unless it is said otherwise, caches are float where activations are.
    """
    done: dict[tuple[str, str, str, bool], tuple[Artifact, Path]] = {}
    plain = Quantizer()

    def build(
        activations: str, where: str = "x86", caches: str = "", *, quick: bool = False
    ) -> tuple[Artifact, Path]:
        caches = caches or ("fp32" if activations == "fp32" else "int8")
        key = (activations, where, caches, quick)
        if key not in done:
            folder = tmp_path_factory.mktemp(activations)
            emitted = folder / "qdq.onnx"
            job = Job(
                tinylm,
                where,
                ("4.2bit",),
                folder / "out.mxc",
                activations=activations,  # type: ignore[arg-type]
                caches=CacheChoice.parse(caches),
                emit_onnx=emitted,
                dump_ir=folder / "ir",
                plan=mixed_plan,
                cache=tinylm.parent,
            )
            with pytest.MonkeyPatch.context() as patch:
                if quick:
                    patch.setattr(Quantizer, "of", lambda *_, **__: plain)
                done[key] = compile_model(job, Progress()), emitted
        return done[key]

    return build


def onnx_logits(path: Path, tokens: list[int]) -> np.ndarray:
    return np.concatenate(list(evaluate.OnnxSource(path).logits(tokens)))


@pytest.mark.parametrize("caches", ["fp32", "fp16", "int8,int4"])
def test_greedy_continuation_equals_the_emitted_onnx(
    tinylm: Path, compile_tiny: Callable[..., tuple[Artifact, Path]], caches: str
) -> None:
    built, emitted = compile_tiny("fp32", caches=caches)
    session = Session(Program.load(built.folder))
    prompt = TextModel.beside(tinylm.parent).encode(PROMPT)
    tokens = list(prompt)
    logits = session.feed(tokens, "last")
    for _ in range(64):
        tokens.append(int(logits.reshape(-1).argmax()))
        logits = session.feed(tokens[-1:], "last")
    # One run over what was generated tells what onnxruntime would have chosen at every step.
    expected = onnx_logits(emitted, tokens[:-1])[len(prompt) - 1 :].argmax(-1)
    assert tokens[len(prompt) :] == expected.tolist()


@pytest.mark.parametrize(
    "words",
    [
        ["-n", "100"],
        ["-n", "300", "--temperature", "0.9", "--top-p", "0.8", "--seed", "5"],
        ["-n", "300", "--temperature", "3", "--seed", "6", "--ignore-eos"],  # bytes at random
    ],
)
def test_mxrun_writes_the_same_text(
    compile_tiny: Callable[[str], tuple[Artifact, Path]],
    mxrun: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(compile_tiny("int8")[0].folder)
    for extra in ([], ["--json"]):
        arguments = [folder, "--prompt", PROMPT, *words, *extra, "-q"]
        done = subprocess.run([mxrun, *arguments], capture_output=True, check=True)
        assert cli.main(["run", *arguments]) == 0
        found, expected = done.stdout.decode(), capsys.readouterr().out
        if not extra:
            assert found == expected
            continue
        ours, theirs = json.loads(found), json.loads(expected)
        assert ours.keys() == theirs.keys()
        assert [ours[key] for key in ("text", "tokens", "prompt_tokens")] == [
            theirs[key] for key in ("text", "tokens", "prompt_tokens")
        ]


def test_int8_activations_follow_their_emitted_onnx(
    compile_tiny: Callable[[str], tuple[Artifact, Path]],
) -> None:
    built, emitted = compile_tiny("int8")
    rng = np.random.default_rng(1)
    session = Session(Program.load(built.folder))
    tokens = rng.integers(0, session.vocabulary, 1000).tolist()
    agreement = []
    for start in range(0, 1000, 250):
        part = tokens[start : start + 250]
        session.truncate(0)
        found = session.feed(part, "all").reshape(len(part), -1).argmax(-1)
        agreement.append(found == onnx_logits(emitted, part).argmax(-1))
    assert np.concatenate(agreement).mean() >= 0.97


CUDA_ON_CPU = replace(
    target.find("x86-avx2"),
    name="cuda-on-cpu",
    requires=frozenset(),
    instructions="generic",
    kernels="cuda-on-cpu",
)
CUDA_READINGS = [
    CUDA_ON_CPU.name,
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if gpu.features() else []),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Graphs]:
    """Makes the target ``cuda-on-cpu``, and what stands in for CUDA graphs there."""
    make, machines = Program._machine, []

    def kept(program: Program) -> Any:
        machines.append(make(program))  # so that none takes the address of one that is gone
        return machines[-1]

    monkeypatch.setattr(target, "find", lambda _: CUDA_ON_CPU)
    monkeypatch.setattr(Program, "_machine", kept)
    with cuda.graphs_on_cpu() as found:
        yield found


@pytest.mark.parametrize("where", CUDA_READINGS)
def test_cuda_kernels_decode_as_their_emitted_onnx(
    where: str,
    compile_tiny: Callable[..., tuple[Artifact, Path]],
    request: pytest.FixtureRequest,
) -> None:
    """The whole model on the kernels of the CUDA targets: on a GPU, and in the reading of CPUs.

    Sums in another order move an int8 rounding now and then, and logits by about 0.1; a token that
    only one of the two chooses must be a near tie.
    """
    if where == CUDA_ON_CPU.name:
        request.getfixturevalue("graphs")
    built, emitted = compile_tiny("int8", where, quick=True)
    assert built.manifest.quality, "the artifact was not verified"
    session = Session(Program.load(built.folder))
    tokens = np.random.default_rng(2).integers(0, session.vocabulary, 40).tolist()
    found = [session.feed(tokens, "last").reshape(-1).copy()]
    for _ in range(24):
        tokens.append(int(found[-1].argmax()))
        found.append(session.feed(tokens[-1:], "last").reshape(-1).copy())
    expected = onnx_logits(emitted, tokens)[39:]
    difference = np.abs(np.stack(found) - expected).max(1)
    assert (difference <= 0.03 * np.abs(expected).max(1)).all()
    chosen = np.take_along_axis(expected, np.stack(found).argmax(1)[:, None], 1)[:, 0]
    assert (chosen >= expected.max(1) - 2 * difference).all()


class Pair:
    """A session that decodes by CUDA graphs, and one that must give the same without them.

    The same but for roundings: one attends to a new key when it has made it, the other in its turn.
    """

    def __init__(self, programs: list[Program]) -> None:
        self.sessions = [Session(program) for program in programs]

    def feed(self, tokens: list[int], logits: Literal["last", "all"] = "last") -> int:
        """The token that both find most likely."""
        found, expected = (session.feed(tokens, logits).copy() for session in self.sessions)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * np.abs(expected).max())
        return int(found[-1].argmax())

    def truncate(self, length: int) -> None:
        for session in self.sessions:
            session.truncate(length)


@pytest.mark.parametrize("where", CUDA_READINGS)
def test_a_cuda_graph_is_launched_on_the_memory_that_it_was_recorded_on(
    where: str,
    compile_tiny: Callable[..., tuple[Artifact, Path]],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Sessions in turns, caches that grow, tokens that are forgotten, a session that goes."""
    seen = request.getfixturevalue("graphs") if where == CUDA_ON_CPU.name else None
    folder = compile_tiny("int8", where, quick=True)[0].folder
    if seen is not None:  # a compile that was not cached has verified decode steps
        seen.recorded.clear()
        seen.launches = 0
    monkeypatch.setattr(runtime, "FIRST_CAPACITY", 8)
    programs = [Program.load(folder, graphs=graphs) for graphs in (True, False)]
    first, second = Pair(programs), Pair(programs)
    a, b = first.feed(list(range(40, 50))), second.feed([7])
    for _ in range(10):
        a, b = first.feed([a]), second.feed([b], "all")
    first.truncate(3)
    assert [s.length for s in first.sessions] == [3, 3]
    a = first.feed([first.feed([5, 6])])
    del second
    third = Pair(programs)
    for token in range(60, 70):
        a, _ = first.feed([a]), third.feed([token])
    if seen is not None:
        capacities = sorted(sizes for *_, sizes in seen.recorded)
        assert capacities == [(8,), (8,), (16,), (16,), (16,), (32,)]
        assert seen.launches == (10 + 1 + 10) + (1 + 10) + 10 - len(capacities)


def test_a_machine_that_two_sessions_share_would_be_found(
    graphs: cuda.Graphs,
    compile_tiny: Callable[..., tuple[Artifact, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail."""
    program = Program.load(compile_tiny("int8", CUDA_ON_CPU.name, quick=True)[0].folder)
    shared = program.decoder()
    monkeypatch.setattr(program, "decoder", lambda: shared)
    sessions = [Session(program) for _ in range(2)]
    sessions[0].feed([5])
    sessions[0].feed([5])
    with pytest.raises(AssertionError, match="launched on other memory"):
        sessions[1].feed([5])


def test_decode_steps_are_verified(
    graphs: cuda.Graphs,
    tinylm: Path,
    compile_tiny: Callable[..., tuple[Artifact, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, _ = compile_tiny("int8", CUDA_ON_CPU.name, quick=True)
    texts = [TextModel.beside(tinylm.parent).encode(PROMPT)]
    samples = Samples((), (), (), texts)
    assert verify.check(built, tinylm, samples, {})
    assert graphs.launches >= len(texts[0]) - 1
    step = runtime._Decode.__call__
    monkeypatch.setattr(runtime._Decode, "__call__", lambda self, ids, past: step(self, ids, 0))
    with pytest.raises(VerificationError, match="decode steps are off"):
        verify.check(built, tinylm, samples, {})


def launches(module: Any, name: str) -> int:
    """The kernels that a function of a lowered module calls."""
    calls = [b.value for block in module[name].body.blocks for b in block.bindings]
    called = [module[c.op] for c in calls if isinstance(getattr(c, "op", None), tvm.ir.GlobalVar)]
    return sum("tirx.is_host_func" not in function.attrs for function in called)


@pytest.mark.parametrize("arch", [f"sm_{number}" for number in gpu.ARCHITECTURES])
def test_a_cuda_graph_is_all_of_a_decode_step_but_its_last_kernel(
    arch: str, tinylm: Path, mixed_plan: Path
) -> None:
    cuda.require_compiler()
    where = cuda.machine(arch)
    model = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(graph.load(tinylm), Context(where))
    plan = replace(
        PrecisionPlan.from_json(json.loads(mixed_plan.read_text())),
        activations=choose_activations(model, Statistics(0, {}, {}), "int8"),
        caches=dict.fromkeys((c.name for c in caches.find(model)), CACHE_FORMATS["int8"]),
    )
    ctx = Context(where, plan)
    fused = Pipeline.parse(f"{passes.QUANTIZE},{passes.FUSE}", passes.REGISTRY).run(model, ctx)
    module = lower.lower(fused, ctx).module
    with tvm.target.Target(dict(where.tvm)), families.of(where).building():
        phases = lower.phases(where).values()
        module = tvm.transform.Sequential([step for phase in phases for step in phase])(module)
    assert launches(module, "decode") == 1
    # A row that is made, rounded and multiplied in one kernel is several where there are many rows.
    assert 30 < launches(module, "decode_cuda_graph_capture") < launches(module, "main")


def test_cuda_artifacts_hold_machine_code(
    compile_tiny: Callable[..., tuple[Artifact, Path]],
) -> None:
    """A machine without the GPU compiles for it, says that it did not verify, and cannot run it."""
    cuda.require_compiler()
    built, _ = compile_tiny("int8", "cuda-sm80", quick=True)
    code = (built.folder / "model.so").read_bytes()
    assert set(cuda_binary.cubins(code)) == {"sm_80"}
    assert not cuda_binary.has_source(code)
    # Memory that TVM's runtime library may free, while a CUDA graph still has its address.
    assert b"TVMBackendAllocWorkspace" not in code
    if "sm_80" in target.features():
        assert built.manifest.quality
        return
    assert not built.manifest.quality
    with pytest.raises(ArtifactError, match="this machine lacks sm_80"):
        Program.load(built.folder)


def test_a_simulated_plan_is_the_emitted_one(
    tinylm: Path, compile_tiny: Callable[[str], tuple[Artifact, Path]], tmp_path: Path
) -> None:
    built, emitted = compile_tiny("fp32")
    job = Job(tinylm, "x86", ("4.2bit",), tmp_path / "out.mxc", cache=tinylm.parent)
    evidence = price_model(job, Progress()).evidence(Progress())
    tokens = list(range(50, 150))
    source = SimulatedSource(evidence.watched, evidence.replaced(built.plan()))
    found = np.concatenate(list(source.logits(tokens)))
    expected = onnx_logits(emitted, tokens)
    # Sums in another order, through six layers; a code of difference would be thousands of these.
    np.testing.assert_allclose(found, expected, atol=256 * 2**-23 * np.abs(expected).max())


def test_one_token_at_a_time_equals_all_at_once(
    compile_tiny: Callable[[str], tuple[Artifact, Path]],
) -> None:
    built, _ = compile_tiny("fp32")
    session = Session(Program.load(built.folder))
    tokens = list(range(100, 121))
    whole = np.array(session.feed(tokens, "all")).reshape(len(tokens), -1)
    session.truncate(0)
    steps = np.stack([np.array(session.feed([t], "last")).reshape(-1) for t in tokens])
    # Float32 sums in another order: a few dozen roundings of numbers of the size of the logits.
    np.testing.assert_allclose(steps, whole, atol=64 * 2**-23 * np.abs(whole).max())


def test_emitted_model_is_standard(compile_tiny: Callable[[str], tuple[Artifact, Path]]) -> None:
    for activations in ("fp32", "int8"):
        _, emitted = compile_tiny(activations)
        onnx.checker.check_model(str(emitted), full_check=True)
        model = onnx.load(emitted, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        kinds = {node.op_type for node in model.graph.node}
        assert ("QuantizeLinear" in kinds) == (activations == "int8")
        assert "DequantizeLinear" in kinds


def test_dumps_show_the_model_after_each_pass(
    compile_tiny: Callable[[str], tuple[Artifact, Path]],
) -> None:
    built, _ = compile_tiny("fp32")
    names = sorted(p.name for p in (built.folder.parent / "ir").glob("*.txt"))
    assert names[0] == "01-canonicalize.txt"
    assert any(name.endswith("fuse-qdq.txt") for name in names)


@pytest.fixture(scope="session")
def planned(tinylm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("planned")
    return compile_model(
        Job(tinylm, "x86", ("4.2bit",), folder / "out.mxc", cache=tinylm.parent, verify="full"),
        Progress(),
    )


def test_budget_is_met_and_spent(planned: Artifact) -> None:
    assert 4.2 * 0.995 <= planned.bits_per_weight <= 4.2
    formats = inspection.describe_artifact(planned)["formats"]
    total = sum(formats.values())
    assert sum(count > 0.02 * total for count in formats.values()) >= 3


@pytest.mark.parametrize("where", ["x86", "raspberry-pi-5"])
def test_a_rate_is_predicted(planned: Artifact, tinylm: Path, where: str) -> None:
    """From a survey of this machine's kernels, or from what the target's file says."""
    asked = Job(tinylm, where, ("4.2bit", "10tok/s"), tinylm, cache=tinylm.parent)
    found = plan_model(asked, Progress())
    assert found.plan.tiles == planned.plan().tiles  # the size is what binds
    assert float(found.predicted["tokens_per_s"]) > 10


def test_mixed_plan_beats_uniform_plans_of_its_size(planned: Artifact, tinylm: Path) -> None:
    model = TextModel.beside(tinylm.parent)
    content = Path(json.__file__).read_text() + Path(shutil.__file__).read_text()
    texts = evaluate.windows(model, content, tokens=1024, context=256)
    reference = evaluate.OnnxSource(tinylm)
    mixed = evaluate.compare(
        reference, evaluate.CompiledSource(Program.load(planned.folder)), texts
    )
    float_model = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(
        graph.load(tinylm), Context(target.find("x86"))
    )
    units = graph.units(float_model)
    fits = [
        plan
        for fmt in FORMATS.values()
        if (plan := PrecisionPlan.uniform(units, fmt)).weight_bytes <= planned.weight_bytes
    ]
    path = planned.folder.parent / "uniform.json"
    path.write_text(json.dumps(fits[-1].to_json()))
    output = planned.folder.parent / "uniform.mxc"
    job = Job(tinylm, "x86", ("8bit",), output, plan=path, cache=tinylm.parent)
    uniform = compile_model(job, Progress())
    other = evaluate.compare(
        reference, evaluate.CompiledSource(Program.load(uniform.folder)), texts
    )
    assert mixed["kld_mean"] < other["kld_mean"]


def test_refusals(tinylm: Path, mixed_plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mxc"
    with pytest.raises(UsageError, match="no target vax; targets: "):
        compile_model(Job(tinylm, "vax", ("4.2bit",), out), Progress())
    with pytest.raises(
        BudgetError, match=r"1bit cannot be met: the smallest plan takes 1\.\d+ bits"
    ):
        compile_model(Job(tinylm, "x86", ("1bit",), out, cache=tinylm.parent), Progress())
    out.mkdir()
    with pytest.raises(UsageError, match="exists"):
        compile_model(Job(tinylm, "x86", ("4.2bit",), out, plan=mixed_plan), Progress())
    other = json.loads(mixed_plan.read_text())
    other["units"] = other["units"][1:]
    (tmp_path / "other.json").write_text(json.dumps(other))
    job = Job(tinylm, "x86", ("4bit",), tmp_path / "b.mxc", plan=tmp_path / "other.json")
    with pytest.raises(PlanError, match="a plan for another model"):
        compile_model(job, Progress())
    assert not list(tmp_path.glob("*b.mxc*"))


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 23, "vendor" : 1]>
    g (float[1,64] x) => (float[1,64] y) { y = vendor.Magic(x) }"""
    path = tmp_path / "magic.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(UnsupportedError, match=r"vendor::Magic"):
        compile_model(Job(path, "x86", ("8bit",), tmp_path / "out.mxc"), Progress())
    assert not (tmp_path / "out.mxc").exists()


def test_a_wrong_program_fails_verification(
    tinylm: Path, planned: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scales doubled while packing: the program runs, and is wrong."""
    pack = packing.pack

    def doubled(codes, scales, zeros, row_scale, formats):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return pack(codes, scales, zeros, row_scale * 2, formats)

    monkeypatch.setattr(packing, "pack", doubled)
    with pytest.raises(VerificationError, match="the compiled program is off"):
        compile_model(
            Job(tinylm, "x86", ("4.2bit",), tmp_path / "out.mxc", cache=tinylm.parent), Progress()
        )
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_nothing_behind(tinylm: Path, tmp_path: Path) -> None:
    run = "import sys; from mxcompile.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [str(tinylm), "-v", "-o", "out.mxc", "--emit-onnx", "q.onnx"]
    with subprocess.Popen(
        [sys.executable, "-c", run, *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell inherits that interrupts are ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("load"):
                break
        time.sleep(1)  # in the middle of the calibration
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "mxcompile: interrupted"
    assert not list(tmp_path.iterdir())


def test_hostile_files(tinylm: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(tinylm.read_bytes()[:5000])
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    for path in (truncated, noise, empty):
        with pytest.raises(UsageError, match=path.name):
            graph.load(path)
    with pytest.raises(UsageError, match="no such file"):
        graph.load(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("location", "message"),
    [("weights.bin", "which is missing"), ("../secret.bin", "outside"), ("/etc/passwd", "outside")],
)
def test_external_data_is_checked(location: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 14))
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[32, 64])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[1,64] x) => (float[1,32] y)'
        " { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"
    )
    model.graph.initializer.append(tensor)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=message):
        graph.load(folder / "m.onnx")


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[32, 64])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(100))
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[1,64] x) => (float[1,32] y)'
        " { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"
    )
    model.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"needs 8192 bytes of w\.bin, which has 100"):
        graph.load(tmp_path / "m.onnx")


def arm_decoder(built: Artifact, packed: Path) -> Callable[[list[int]], np.ndarray]:
    """A decoder on an emulated ARM machine: takes tokens in turn, gives the last one's logits."""
    machine, cache = arm.machine("dotprod"), built.manifest.kv_cache
    assert cache is not None
    program = machine.load(built.folder / "model.so")
    tensors = weights.read(packed)
    machine.pack("weights", [tensors[name] for name in built.manifest.weights])
    specs = [(spec.dtype, int(spec.shape[1]), int(spec.shape[3])) for spec in cache.tensors]
    machine.pack("caches", [np.zeros((1, h, 256, d), t) for t, h, d in specs])
    past = 0

    def feed(tokens: list[int]) -> np.ndarray:
        nonlocal past
        count = len(tokens)
        inputs = [[tokens], [list(range(past, past + count))], [past], [count - 1]]
        names = [machine.put(f"in{i}", np.array(x, np.int64)) for i, x in enumerate(inputs)]
        machine.call("logits", program, "main", *names, "caches", "weights")
        past += count
        return machine.get("logits").reshape(-1)

    return feed


def test_what_arm_is_sent_writes_the_same_text(
    compile_tiny: Callable[..., tuple[Artifact, Path]], mxrun: Path, tmp_path: Path
) -> None:
    """Compile, deploy, unpack, run: all that a device needs is in the archive."""
    arm.require()
    machines = ("x86", "raspberry-pi-5")
    here, there = (compile_tiny("fp32", where, quick=True)[0] for where in machines)
    archive = tmp_path / "device.tar.gz"
    deploy.deploy(there.folder, archive, wheels=arm.WHEELS, cache=conftest.RUNNERS)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / there.folder.stem
    sent = [*arm.emulator("dotprod"), unpacked / "mxrun", unpacked / there.folder.name]
    words = ["--prompt", PROMPT, "-n", "64", "--json"]
    found, expected = (
        json.loads(subprocess.run([*command, *words], capture_output=True, check=True).stdout)
        for command in (sent, [mxrun, here.folder])
    )
    assert len(found["tokens"]) == 64
    assert (found["tokens"], found["text"]) == (expected["tokens"], expected["text"])


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_arm_decodes_as_x86_does(
    activations: str, tinylm: Path, compile_tiny: Callable[..., tuple[Artifact, Path]]
) -> None:
    """The same greedy tokens, 64 of them, but for ties; with the same packed weights.

    Two machines sum in other orders. With float activations that moves logits by some roundings,
    with int8 a rounding now and then takes another way and moves them by about 0.1. A token that
    the other machine does not choose must be as good as its choice but for twice what they differ.
    """
    arm.require()
    machines = ("x86", "raspberry-pi-5")
    here, there = (compile_tiny(activations, where, quick=True)[0] for where in machines)
    assert here.manifest.weights == there.manifest.weights
    assert not there.manifest.quality, "an ARM program was verified on a machine that has no ARM"
    feed = arm_decoder(there, here.folder / "weights.safetensors")
    session = Session(Program.load(here.folder))
    tokens = TextModel.beside(tinylm.parent).encode(PROMPT)
    moved = 256 * 2.0**-24 if activations == "fp32" else 0.03
    for _ in range(64):
        found, expected = feed(tokens), np.array(session.feed(tokens)).reshape(-1)
        difference = float(np.abs(found - expected).max())
        assert difference <= moved * float(np.abs(expected).max())
        best = int(found.argmax())
        assert expected[best] >= expected.max() - 2 * difference
        tokens = [best]
