"""Golden tests of the passes: each ``ir/*.onnxtxt`` holds a model, a pipeline and what comes out.

``# RUN:`` is the pipeline, ``# PLAN: w=int4,int3 x=int8`` the formats of a weight's row tiles (int4
where it says nothing), of other values that are rounded and of caches, ``# ERROR:`` the error
expected, ``# CHECK:`` lines are FileCheck's.
"""

import io
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts

from mxcompile import graph, passes, target
from mxcompile.errors import MxError
from mxcompile.formats import ACTIVATION_FORMATS, CACHE_FORMATS
from mxcompile.instruments import Verify
from mxcompile.pipeline import Context, Pipeline
from mxcompile.plan import PrecisionPlan, TileFormats

FILES = sorted((Path(__file__).parent / "ir").glob("*.onnxtxt"))


def directives(text: str, key: str) -> list[str]:
    return re.findall(rf"^# {key}: (.*)$", text, re.MULTILINE)


def parse(text: str) -> ir.Model:
    """Read a model; float weights, which the text gives one number, get random ones."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            data = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(data, tensor.name))
    return ir.from_proto(proto)


def run(text: str) -> str:
    model = parse(text)
    graph.infer_shapes(model)
    (pipeline,) = directives(text, "RUN")
    before, annotate, after = pipeline.partition("annotate")
    where = target.find("x86-avx512vnni")
    model = apply(before, model, Context(where))
    formats = dict(item.split("=") for line in directives(text, "PLAN") for item in line.split())
    units = graph.units(model)
    tiles = {u.name: TileFormats.parse(formats.pop(u.name, f"int4*{u.tiles}")) for u in units}
    cached = {n: CACHE_FORMATS[formats.pop(n)] for n in list(formats) if n.startswith("past")}
    rounded = {name: ACTIVATION_FORMATS[fmt] for name, fmt in formats.items()}
    plan = PrecisionPlan(units, tiles, rounded, cached)
    return graph.to_text(apply(annotate + after, model, Context(where, plan)))


def apply(pipeline: str, model: ir.Model, ctx: Context) -> ir.Model:
    return Pipeline.parse(pipeline, passes.REGISTRY).run(model, ctx, [Verify()])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    text = path.read_text()
    if expected := directives(text, "ERROR"):
        with pytest.raises(MxError, match=re.escape(expected[0])):
            run(text)
        return
    assert "# CHECK" in text
    options = Options(match_filename=str(path), variables={})
    parser = Parser(options, io.StringIO(text), *pattern_for_opts(options))
    found = run(text)
    assert Matcher(options, FInput("passes", found), parser).run() == 0, found
