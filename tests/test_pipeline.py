"""The pipeline, its registry, and the instruments."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import onnx
import onnx_ir as ir
import pytest

from mxcompile import graph, passes, target
from mxcompile.errors import PassError, UnsupportedError
from mxcompile.instruments import Dump, Verify
from mxcompile.pipeline import Context, Pass, Pipeline

CTX = Context(target.find("x86-avx2"))


def model() -> ir.Model:
    text = (
        '<ir_version: 10, opset_import: ["" : 23]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    return ir.from_proto(onnx.parser.parse_model(text))


@dataclass(frozen=True)
class Rename(Pass):
    """Call the only node ``renamed``."""

    name = "rename"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        next(iter(model.graph)).name = "renamed"
        return True


@dataclass(frozen=True)
class Break(Pass):
    """Give two values one name."""

    name = "break"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        next(iter(model.graph)).outputs[0].name = "x"
        return True


@dataclass(frozen=True)
class Fail(Pass):
    """Fail in a way that nobody foresaw."""

    name = "fail"

    def run(self, model: ir.Model, ctx: Context) -> bool:
        raise KeyError("lost")


@pytest.mark.parametrize("name", passes.REGISTRY)
def test_registry_is_honest(name: str) -> None:
    found = resolve_name(passes.REGISTRY[name])
    assert found.name == name
    assert "Before:" in (inspect.getdoc(found) or "")
    assert passes.REGISTRY[name].partition(":")[0].endswith(name.replace("-", "_"))


def test_every_pass_is_registered() -> None:
    files = {p.stem for p in Path(passes.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {name.replace("-", "_") for name in passes.REGISTRY}


@pytest.mark.parametrize("text", [passes.FRONT, passes.QUANTIZE, passes.FUSE])
def test_text_form_round_trips(text: str) -> None:
    assert str(Pipeline.parse(text, passes.REGISTRY)) == text


def test_unknown_pass_lists_the_known() -> None:
    with pytest.raises(PassError, match="no pass fuse; there are: canonicalize,"):
        Pipeline.parse("fuse", passes.REGISTRY)


def test_the_callers_model_is_not_touched() -> None:
    mine = model()
    other = Pipeline((Rename(),)).run(mine, CTX)
    assert next(iter(mine.graph)).name != "renamed"
    assert next(iter(other.graph)).name == "renamed"


def test_a_bug_says_where_it_happened() -> None:
    with pytest.raises(PassError, match=r"fail \(pass 2 of rename,fail\) failed: KeyError"):
        Pipeline((Rename(), Fail())).run(model(), CTX)


def test_verify_finds_a_broken_model() -> None:
    with pytest.raises(PassError, match="break left a broken model: two values are named x"):
        Pipeline((Break(),)).run(model(), CTX, [Verify()])


def test_dump_writes_text_and_onnx(tmp_path: Path) -> None:
    Pipeline((Rename(),)).run(model(), CTX, [Dump(tmp_path)])
    assert (tmp_path / "01-rename.txt").read_text().startswith("graph g(%x: Nxf32)")
    assert next(iter(graph.load(tmp_path / "01-rename.onnx").graph)).name == "renamed"


def test_kv_cache_needs_a_mask() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[b,s,32] x, float[b,1,p,32] pk, float[b,1,p,32] pv) => (float[b,s,32] y) {
        y, k, v = Attention<q_num_heads = 1, kv_num_heads = 1>(x, x, x, , pk, pv)
    }"""
    decoder = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(UnsupportedError, match="reads a past without a mask"):
        Pipeline.parse("kv-cache", passes.REGISTRY).run(decoder, CTX)
