"""What inspect tells."""

import json
from pathlib import Path

import pytest

from mxcompile.errors import UsageError
from mxcompile.formats import FORMATS
from mxcompile.inspection import inspect
from mxcompile.plan import tile_bytes
from tests import toy


def test_an_artifact(compiled: Path) -> None:
    found = inspect(compiled / "toy.mxc")
    size = (compiled / "toy.mxc" / "weights.safetensors").stat().st_size
    assert found["kind"] == "decoder"
    assert found["bits_per_weight"] == 8 * size / found["parameters"]
    assert found["formats"] == {"int4": 24 * toy.WIDTH, "int8": 16 * toy.WIDTH}
    (table,) = found["tensors"]
    assert table["tiles"] == {"int4": 2, "int8": 1}
    int4, int8 = (tile_bytes(toy.WIDTH, FORMATS[name]) for name in ("int4", "int8"))
    assert table["bytes"] == 2 * int4 + int8
    assert table["bits"] == 8 * table["bytes"] / table["parameters"]
    # All but the vocabulary's tensor: three numbers, and what the file needs beside.
    assert found["decoder_bits_per_weight"] == 8 * (size - table["bytes"]) / 3
    json.dumps(found)


def test_a_graph_has_no_vocabulary(compiled: Path) -> None:
    assert inspect(compiled / "graph.mxc")["decoder_bits_per_weight"] is None


def test_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(toy.PLAN.to_json()))
    found = inspect(tmp_path / "plan.json")
    assert (found["kind"], found["weight_bytes"]) == ("plan", toy.PLAN.weight_bytes)
    assert found["plan_digest"] == toy.PLAN.digest


def test_a_model(tmp_path: Path) -> None:
    toy.write_onnx(tmp_path / "toy.onnx")
    found = inspect(tmp_path / "toy.onnx")
    assert found["kind"] == "model"
    assert found["inputs"][0] == "input_ids: INT64[batch, seq]"
    assert found["operators"]["Concat"] == 2
    json.dumps(found)


def test_what_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    for name in ("none", "plan.json", "other.json"):
        with pytest.raises(UsageError):
            inspect(tmp_path / name)
