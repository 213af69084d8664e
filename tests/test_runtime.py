"""Running compiled programs."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mxcompile import artifact, devices, runtime, weights
from mxcompile.artifact import TensorSpec
from mxcompile.errors import ArtifactError, UsageError
from mxcompile.runtime import Program, Session
from tests import toy

TOKENS = np.random.default_rng(0).integers(2, toy.VOCABULARY, 1500).tolist()


@pytest.fixture(scope="module")
def program(compiled: Path) -> Program:
    return Program.load(compiled / "toy.mxc", threads=1)


@pytest.mark.parametrize("cuts", [(), (1, 2, 3), (256,), (255, 257, 512), (700, 701, 1400)])
def test_every_way_to_feed_gives_the_same(program: Program, cuts: Sequence[int]) -> None:
    session = Session(program)
    ends = [*cuts, len(TOKENS)]
    found = [session.feed(TOKENS[a:b], "all") for a, b in zip([0, *cuts], ends, strict=True)]
    np.testing.assert_array_equal(np.concatenate(found), toy.logits(TOKENS))
    assert session.length == len(TOKENS)


def test_last_gives_the_logits_that_matter(program: Program) -> None:
    session = Session(program)
    found = session.feed(TOKENS[:600])
    np.testing.assert_array_equal(found, toy.logits(TOKENS[:600])[-1:])
    assert found.shape == (1, toy.VOCABULARY) and found.dtype == np.float32


def test_truncate_forgets(program: Program) -> None:
    session = Session(program)
    session.feed(TOKENS)
    session.truncate(700)
    session.truncate(900)  # cannot bring back what is forgotten
    assert session.length == 700
    np.testing.assert_array_equal(session.feed([5]), toy.logits([*TOKENS[:700], 5])[-1:])
    session.truncate(-3)
    np.testing.assert_array_equal(session.feed([5]), toy.logits([5]))


def test_caches_grow_as_needed_and_not_beyond_the_context(program: Program) -> None:
    session = Session(program)
    sizes = []
    for token in TOKENS:
        session.feed([token])
        sizes.append(session._capacity)
    assert sorted(set(sizes)) == [512, 1024, 2048]
    session.feed(TOKENS)
    assert session._capacity == toy.CONTEXT
    shapes = [tuple(cache.shape) for cache in session._caches]
    assert shapes == [(1, 1, toy.CONTEXT, toy.WIDTH)] * 2
    with pytest.raises(UsageError, match="3001 tokens do not fit the context of 3000"):
        session.feed([5])
    assert session.length == 3000


def test_memory_does_not_grow_with_tokens(program: Program) -> None:
    def used() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    session = Session(program)
    session.feed(TOKENS[:1000])  # the caches are as large as they get here
    session.feed(TOKENS[:1])
    before = used()
    for token in (*TOKENS, *TOKENS)[:1000]:
        session.feed([token])
    assert used() - before < 1024  # kB


def test_context_can_be_limited(program: Program) -> None:
    session = Session(program, 8)
    session.feed(TOKENS[:8])
    with pytest.raises(UsageError, match="9 tokens do not fit the context of 8"):
        session.feed(TOKENS[:1])
    with pytest.raises(UsageError, match="takes 1 to 3000"):
        Session(program, 3001)


@pytest.mark.parametrize("tokens", [[], [-1], [toy.VOCABULARY], [3, 1 << 40]])
def test_tokens_that_are_none_are_refused(program: Program, tokens: list[int]) -> None:
    session = Session(program)
    with pytest.raises(UsageError, match="token"):
        session.feed(tokens)
    assert session.length == 0


def test_weights_are_mapped_not_copied(compiled: Path) -> None:
    program = Program.load(compiled / "toy.mxc")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        range(*(int(end, 16) for end in line[0].split("-")))
        for line in maps
        if line[-1] == str(compiled / "toy.mxc" / artifact.WEIGHTS)
    ]
    places = dict(zip(program.manifest.weights, program._weights, strict=True))
    assert any(places["table"].data_ptr() in part for part in mapped)
    assert places["bias"].data_ptr() % weights.ALIGNMENT == 0  # this one is too small: a copy


def test_tensors_share_aligned_memory() -> None:
    array = devices.aligned((3, 5), np.float16)
    assert array.flags.c_contiguous and array.flags.writeable and not array.any()
    assert devices.to_tensor(array).data_ptr() == array.ctypes.data
    crooked = np.zeros(100, np.uint8)[1:65]
    assert devices.to_tensor(crooked).data_ptr() % weights.ALIGNMENT == 0
    turned = np.arange(64, dtype=np.int64).reshape(8, 8).T
    np.testing.assert_array_equal(np.from_dlpack(devices.to_tensor(turned)), turned)


def test_threads_are_those_asked_for() -> None:
    count = devices.interface().get_global_func("runtime.NumThreads")
    for wanted in (1, runtime.cores(), 1):
        runtime.set_threads(wanted)
        assert count() == wanted
    with pytest.raises(UsageError, match="100000 threads"):
        runtime.set_threads(100000)


def test_a_graph_runs_on_arrays(compiled: Path) -> None:
    program = Program.load(compiled / "graph.mxc")
    x, y = (np.random.default_rng(n).random((3, 4), np.float32) for n in (1, 2))
    found = program.run({"x": x, "y": y})
    np.testing.assert_array_equal(found["s"], x * toy.SCALE)
    np.testing.assert_array_equal(found["t"], x + y)
    with pytest.raises(UsageError, match="not a language model"):
        Session(program)


def test_a_decoder_runs_on_arrays(program: Program) -> None:
    found = program.run({"input_ids": np.array([TOKENS[:300]])})
    np.testing.assert_array_equal(found["logits"], toy.logits(TOKENS[:300])[None])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.zeros((2, 4), np.float32)}, "missing or unknown: y"),
        (
            {
                "x": np.zeros((2, 4), np.float32),
                "y": np.zeros((2, 4), np.float32),
                "z": np.zeros(1),
            },
            "missing or unknown: z",
        ),
        ({"x": np.zeros((2, 4)), "y": np.zeros((2, 4))}, r"x: float64\[2, 4\] does not fit"),
        (
            {"x": np.zeros((2, 5), np.float32), "y": np.zeros((2, 4), np.float32)},
            r"x: float32\[2, 5\] does not fit",
        ),
        (
            {"x": np.zeros((2, 4), np.float32), "y": np.zeros((3, 4), np.float32)},
            r"y: float32\[3, 4\] does not fit",
        ),
        ({"x": np.zeros(4, np.float32), "y": np.zeros(4, np.float32)}, "does not fit"),
    ],
)
def test_wrong_inputs_list_what_is_expected(feeds: dict[str, np.ndarray], message: str) -> None:
    specs = (TensorSpec("x", "float32", ("rows", 4)), TensorSpec("y", "float32", ("rows", 4)))
    expected = r".*; expected x: float32\[rows, 4\], y: float32\[rows, 4\]"
    with pytest.raises(UsageError, match=message + expected):
        runtime.check_feeds(feeds, specs)


def test_a_weight_that_is_missing(toy_artifact: Path) -> None:
    toy.edit_manifest(toy_artifact, weights=("bias", "other"))
    with pytest.raises(ArtifactError, match="no tensor 'other'"):
        Program.load(toy_artifact)


def test_running_imports_no_compiler(compiled: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from mxcompile import runtime, sample
program = runtime.Program.load(Path({str(compiled / "toy.mxc")!r}))
tokens = list(sample.generate(runtime.Session(program), [3], sample.SamplingSettings(), limit=4))
assert len(tokens) == 4
heavy = {{"torch", "onnx", "onnx_ir", "onnxruntime", "scipy", "tvm", "rich", "networkx"}}
print(*(heavy & sys.modules.keys()))
import torch, tvm  # and yet both can be imported afterwards
assert torch.ones(2).sum() == 2 and tvm.cpu() is not None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
