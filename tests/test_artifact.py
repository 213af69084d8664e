"""The artifact: whole or not there, and as it was written or refused."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxcompile import artifact, weights
from mxcompile.artifact import FileRecord, Manifest
from mxcompile.errors import ArtifactError, UsageError
from tests import toy


def write(folder: Path) -> artifact.Artifact:
    code = folder.parent / "code"  # in the working folder, which goes away
    code.write_bytes(b"code")
    return artifact.write(
        folder, toy.manifest(), code=code, weights=toy.weights(), plan=toy.PLAN, extra=[code]
    )


def test_loads_what_was_written(tmp_path: Path) -> None:
    with artifact.staged(tmp_path / "out.mxc") as folder:
        built = write(folder)
        built = artifact.finish(built, quality={"kld_mean": 0.25}, report="<p>")
    found = artifact.load(tmp_path / "out.mxc")
    assert found.manifest == built.manifest
    assert found.manifest.quality == {"kld_mean": 0.25}
    assert found.manifest.versions.keys() == {"mxcompile", "tvm", "tvm_ffi"}
    assert found.plan() == toy.PLAN
    assert {path.name for path in found.folder.iterdir()} == {
        *found.manifest.files,
        artifact.MANIFEST,
    }
    assert sorted(os.listdir(tmp_path)) == ["out.mxc"]


def test_bits_per_weight_count_the_whole_file(toy_artifact: Path) -> None:
    found = artifact.load(toy_artifact)
    size = (toy_artifact / artifact.WEIGHTS).stat().st_size
    assert found.weight_bytes == size
    assert found.bits_per_weight == 8 * size / (toy.VOCABULARY * toy.WIDTH + 3)


@pytest.mark.parametrize(
    "name", ["model.so", "weights.safetensors", "plan.json", "report.html", "tokenizer.json"]
)
def test_a_changed_cut_or_missing_file_is_named(toy_artifact: Path, name: str) -> None:
    path = toy_artifact / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name} was changed"):
        artifact.load(toy_artifact)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has {len(content) - 1} bytes"):
        artifact.load(toy_artifact)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        artifact.load(toy_artifact)
    path.symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match=f"{name} is a link"):
        artifact.load(toy_artifact)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"[]", "not a JSON object"),
        (b"{}", "format version None"),
        (b'{"format_version": 1}', "format version 1"),
        (b'{"format_version": 2}', "digest differs"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    toy_artifact: Path, content: bytes, message: str
) -> None:
    (toy_artifact / artifact.MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(toy_artifact)


def test_a_changed_manifest_is_refused(toy_artifact: Path) -> None:
    path = toy_artifact / artifact.MANIFEST
    path.write_text(path.read_text().replace('"parameters": 643', '"parameters": 644'))
    with pytest.raises(ArtifactError, match="digest differs"):
        artifact.load(toy_artifact)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no manifest"):
        artifact.load(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        artifact.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\\b"])
def test_file_names_stay_in_the_folder(toy_artifact: Path, name: str) -> None:
    (toy_artifact.parent / "secret").write_text("x")
    files = {**artifact.load(toy_artifact).manifest.files, name: FileRecord("0" * 64, 1)}
    toy.edit_manifest(toy_artifact, files=files)
    with pytest.raises(ArtifactError, match="outside the artifact"):
        artifact.load(toy_artifact)


def test_files_that_it_cannot_do_without(toy_artifact: Path) -> None:
    toy.edit_manifest(toy_artifact, files={})
    with pytest.raises(ArtifactError, match=r"does not name model\.so, plan\.json, weights"):
        artifact.load(toy_artifact)


def test_manifest_has_a_text_form() -> None:
    manifest = dataclasses.replace(toy.manifest(), files={"a": FileRecord("f", 3)})
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    plain = json.loads(json.dumps(toy.graph_manifest().to_json()))
    assert Manifest.from_json(plain) == toy.graph_manifest()


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": "many"},
        {"parameters": True},
        {"weights": "table"},
        {"weights": [1]},
        {"kv_cache": {"layers": []}},
        {"kv_cache": 5},
        {"generation": {"vocabulary": 3}},
        {"files": {"a": "b"}},
        {"inputs": [{"name": "x", "dtype": "int64", "shape": [None]}]},
        {"surprise": 1},
    ],
)
def test_a_manifest_of_other_types_is_refused(changes: dict[str, Any]) -> None:
    data = {k: v for k, v in toy.manifest().to_json().items() if k != "digest"} | changes
    data = json.loads(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"manifest.json"):
        Manifest.from_json(data | {"digest": artifact._digest(data)})


def test_another_tvm_or_cpu_is_refused(toy_artifact: Path) -> None:
    artifact.check_host(artifact.load(toy_artifact), frozenset())
    toy.edit_manifest(toy_artifact, target_features=("avx2", "sse9"))
    with pytest.raises(ArtifactError, match="lacks sse9"):
        artifact.check_host(artifact.load(toy_artifact), frozenset({"avx2"}))
    toy.edit_manifest(toy_artifact, versions={"tvm": "0.1", "tvm_ffi": "0.1"})
    with pytest.raises(ArtifactError, match=r"made with tvm 0\.1"):
        artifact.check_host(artifact.load(toy_artifact), frozenset())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ValueError()]
)
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(weights, "write", fail)
    with pytest.raises(type(error)), artifact.staged(tmp_path / "out.mxc") as folder:
        write(folder)
    assert os.listdir(tmp_path) == []


def test_a_destination_that_exists(tmp_path: Path) -> None:
    destination = tmp_path / "out.mxc"
    with artifact.staged(destination) as folder:
        write(folder)
    with pytest.raises(UsageError, match="exists; choose another"), artifact.staged(destination):
        raise AssertionError
    with artifact.staged(destination, force=True) as folder:
        artifact.finish(write(folder), quality={}, report="second")
    assert (destination / artifact.REPORT).read_text() == "second"
    with pytest.raises(KeyboardInterrupt), artifact.staged(destination, force=True):
        raise KeyboardInterrupt
    assert (destination / artifact.REPORT).read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["out.mxc"]


def test_a_failing_rename_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out.mxc"
    with artifact.staged(destination) as folder:
        artifact.finish(write(folder), quality={}, report="first")
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "broken")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken"), artifact.staged(destination, force=True) as folder:
        write(folder)
    assert (destination / artifact.REPORT).read_text() == "first"


def test_what_force_does_not_replace(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "file", "link"):
        with pytest.raises(UsageError, match="not an artifact"):
            artifact.check_destination(tmp_path / name, force=True)
    with pytest.raises(UsageError, match="is not a folder"):
        artifact.check_destination(tmp_path / "file" / "out.mxc", force=False)


def test_weights_must_be_those_of_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bias"):
        artifact.write(
            tmp_path,
            toy.manifest(),
            code=tmp_path,
            weights={"table": np.zeros(1)},
            plan=toy.PLAN,
        )
