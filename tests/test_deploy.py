"""Deploying: what is unpacked runs by itself, here and on an emulated ARM machine."""

import importlib.util
import platform
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from mxcompile import artifact, cli, deploy, weights
from mxcompile.errors import ArtifactError, UsageError
from tests import arm, conftest, toy

VERSIONS = {name: metadata.version(package) for name, (package, _) in deploy.LIBRARIES.items()}
FEEDS = {
    "x": np.arange(12, dtype=np.float32).reshape(3, 4),
    "y": np.ones((3, 4), np.float32),
}


@pytest.fixture
def graph(compiled: Path, mxrun: Path) -> Path:
    """An artifact to deploy; the runner is compiled already."""
    return compiled / "graph.mxc"


def unpack_and_try(
    archive: Path, folder: Path, emulator: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Do what a device does, in an environment of its own."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    np.savez(folder / "in.npz", **FEEDS)  # type: ignore[arg-type]
    words = ["graph/mxrun", "graph/graph.mxc", "--input", "in.npz", "--output", "out.npz"]
    program = shutil.which(emulator[0]) if emulator else None
    command = [*([program, *emulator[1:]] if program else []), *words]
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=False)


def unpack_and_run(archive: Path, folder: Path, emulator: Sequence[str] = ()) -> None:
    """The device's results must be right."""
    done = unpack_and_try(archive, folder, emulator)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as found:
        np.testing.assert_array_equal(found["s"], FEEDS["x"] * toy.SCALE)
        np.testing.assert_array_equal(found["t"], FEEDS["x"] + FEEDS["y"])


def test_what_is_unpacked_runs(graph: Path, tmp_path: Path) -> None:
    made = deploy.deploy(graph, tmp_path / "device.tar.gz", cache=conftest.RUNNERS)
    assert made.machine == platform.machine()
    unpack_and_run(made.archive, tmp_path)
    files = {path.name for path in (tmp_path / "graph").iterdir()}
    assert files == {
        *("mxrun", "libmxrun.so", "mxrun.h", "libtvm_runtime.so", "libtvm_ffi.so"),
        *("licenses", "graph.mxc"),
    }
    assert len(list((tmp_path / "graph" / "licenses").iterdir())) >= 3
    assert made.bytes_beside_model < 10e6
    unpacked = [path for path in (tmp_path / "graph").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in unpacked) == sum(made.files.values())
    assert artifact.load(tmp_path / "graph" / "graph.mxc") is not None


def test_the_same_artifact_gives_the_same_archive(graph: Path, tmp_path: Path) -> None:
    archives = [tmp_path / name for name in ("a.tar.gz", "b.tar.gz")]
    for path in archives:
        deploy.deploy(graph, path, cache=conftest.RUNNERS)
    assert archives[0].read_bytes() == archives[1].read_bytes()


def test_the_library_serves_a_c_program(graph: Path, compiled: Path, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    made = deploy.deploy(graph, tmp_path / "device.tar.gz", cache=conftest.RUNNERS)
    with tarfile.open(made.archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (tmp_path / "main.c").write_text("""
        #include <stdio.h>
        #include "mxrun.h"
        int main(int argc, char** argv) {
            mx_model* model;
            mx_session* session;
            const uint32_t tokens[] = {2, 3, 4};
            const float* logits;
            if (argc != 2 || mx_open(argv[1], &model) != 0 || mx_start(model, 0, &session) != 0 ||
                mx_feed(session, tokens, 3, &logits) != 0) {
                fprintf(stderr, "%s\\n", mx_error());
                return 1;
            }
            printf("%.9g %.9g\\n", logits[0], logits[39]);
            mx_end(session);
            mx_close(model);
            return 0;
        }""")
    folder = tmp_path / "graph"
    command = ["cc", "-Wall", "-Werror", f"-I{folder}", "main.c", f"{folder}/libmxrun.so"]
    command += [f"-Wl,-rpath,{folder}", f"-Wl,-rpath-link,{folder}", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(
        [tmp_path / "main", compiled / "toy.mxc"], capture_output=True, text=True, check=True
    )
    expected = toy.logits([2, 3, 4])[-1]
    assert [float(word) for word in done.stdout.split()] == [expected[0], expected[39]]
    failed = subprocess.run(
        [tmp_path / "main", tmp_path / "none.mxc"], capture_output=True, text=True, check=False
    )
    assert (failed.returncode, "does not exist" in failed.stderr) == (1, True)


def test_the_products_show_only_what_is_theirs(mxrun: Path) -> None:
    """TVM's libraries would take what an executable shows under TVM's names for their own."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    names = {}
    for product in deploy.PRODUCTS:
        command = ["nm", "-D", "--defined-only", "--format=just-symbols"]
        done = subprocess.run(
            [*command, mxrun.parent / product], capture_output=True, text=True, check=True
        )
        names[product] = done.stdout.split()
    assert not [name for name in names["mxrun"] if "3tvm3ffi" in name]
    others = [n for n in names["libmxrun.so"] if not n.startswith(("mx_", "__tvm_ffi_"))]
    assert (others, len(names["libmxrun.so"])) == ([], 13 + 2)


def test_the_runner_is_compiled_once(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(deploy, "_compile", fail)
    deploy.deploy(graph, tmp_path / "device.tar.gz", cache=conftest.RUNNERS)
    with pytest.raises(AssertionError):
        deploy.deploy(graph, tmp_path / "device.tar.gz", cache=tmp_path / "other")


def test_wheels_from_a_folder(graph: Path, tmp_path: Path) -> None:
    site = Path(str(metadata.distribution("apache-tvm").locate_file("")))
    for name, (package, library) in deploy.LIBRARIES.items():
        stem = f"{package.replace('-', '_')}-{VERSIONS[name]}"
        folder = library.partition("/")[0]
        members = [*(site / folder / "include").rglob("*.h"), site / library]
        members += (site / f"{stem}.dist-info" / "licenses").iterdir()
        wheel = tmp_path / f"{stem}-py3-none-manylinux_2_28_{platform.machine()}.whl"
        with zipfile.ZipFile(wheel, "w") as packed:
            for path in members:
                packed.write(path, path.relative_to(site))
    # The same libraries: the runner need not be compiled again.
    made = deploy.deploy(graph, tmp_path / "device.tar.gz", wheels=tmp_path, cache=conftest.RUNNERS)
    unpack_and_run(made.archive, tmp_path)
    wheel.write_bytes(b"PK")
    with pytest.raises(UsageError, match="is not a wheel"):
        deploy.deploy(graph, tmp_path / "d.tar.gz", wheels=tmp_path, cache=conftest.RUNNERS)


def test_what_is_not_here_is_named(graph: Path, tmp_path: Path) -> None:
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    number = next(key for key, name in deploy.MACHINES.items() if name == other)
    folder = Path(shutil.copytree(graph, tmp_path / "graph.mxc"))
    code = bytearray((folder / artifact.CODE).read_bytes())
    code[18:20] = number.to_bytes(2, "little")
    (folder / artifact.CODE).write_bytes(code)
    files = dict(artifact.load(graph).manifest.files)
    files[artifact.CODE] = artifact._record(folder / artifact.CODE)
    shutil.copy(graph / artifact.CODE, folder / artifact.CODE)
    toy.edit_manifest(folder, files=files)
    (folder / artifact.CODE).write_bytes(code)
    archive = tmp_path / "device.tar.gz"
    with pytest.raises(UsageError, match=rf"for {other}.*pip download .*manylinux_2_28_{other}"):
        deploy.deploy(folder, archive)
    with pytest.raises(UsageError, match=rf"has no apache_tvm-.*_{other}\.whl"):
        deploy.deploy(folder, archive, wheels=tmp_path)
    with pytest.raises(UsageError, match=r"no C\+\+ compiler for .*: 'no-such --flag' is not inst"):
        deploy.deploy(graph, archive, compiler="no-such --flag")
    with pytest.raises(UsageError, match="false failed"):
        deploy.deploy(graph, archive, compiler="false")
    (folder / artifact.CODE).write_bytes(b"no code")
    with pytest.raises(ArtifactError):
        deploy.deploy(folder, archive)
    assert not archive.exists()


def test_zig_compiles_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for machine in deploy.MACHINES.values():
        native = machine == platform.machine()
        package = "g++" if native else f"g++-{machine.replace('_', '-')}-linux-gnu"
        message = rf"pip install ziglang, or install {re.escape(package)}, or .* --cxx"
        with pytest.raises(UsageError, match=message):
            deploy.compiler_for(machine, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    words = deploy.compiler_for("aarch64", None)
    assert words[1:] == ["-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.28"]
    with pytest.raises(UsageError, match="'own' is not installed"):
        deploy.compiler_for("aarch64", "own")


def test_a_program_for_a_gpu_is_refused(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(graph, tmp_path / "graph.mxc"))
    toy.edit_manifest(folder, target="cuda-sm87", target_features=["sm_80", "sm_87"])
    archive = tmp_path / "device.tar.gz"
    assert cli.main(["deploy", str(folder), "-o", str(archive)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is for cuda-sm87: mxrun runs programs for CPUs" in line
    assert not archive.exists()


def test_the_verb(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "device.tar.gz"
    assert cli.main(["deploy", str(tmp_path / "none.mxc"), "-o", str(archive)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["deploy", str(graph), "-o", str(archive), "--cxx", "no-such"]) == 2
    assert "no C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize("compiler", [arm.COMPILER, "ziglang"])
def test_an_emulated_arm_machine(
    compiler: str, compiled_for_arm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that runs, and one that TVM finds not to fit its weights.

    Zig links its own C++ library, which can catch nothing that TVM's libraries throw.
    """
    if compiler == "ziglang":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("ziglang is not installed")
        which = shutil.which
        monkeypatch.setattr(
            shutil, "which", lambda name: which(name) if name != arm.COMPILER else None
        )
    assert compiler in " ".join(deploy.compiler_for("aarch64", None))
    right, archive = compiled_for_arm / "graph.mxc", tmp_path / "arm.tar.gz"
    made = deploy.deploy(right, archive, wheels=arm.WHEELS, cache=conftest.RUNNERS)
    assert made.machine == "aarch64"
    unpack_and_run(archive, tmp_path, arm.emulator("neon"))
    wrong = Path(shutil.copytree(right, tmp_path / "wrong" / "graph.mxc"))
    weights.write(tmp_path / "short", {"w": toy.SCALE[:2].copy()})
    record = artifact._record(tmp_path / "short")
    files = {**artifact.load(wrong).manifest.files, artifact.WEIGHTS: record}
    toy.edit_manifest(wrong, files=files)
    shutil.copy(tmp_path / "short", wrong / artifact.WEIGHTS)
    deploy.deploy(wrong, archive, wheels=arm.WHEELS, cache=conftest.RUNNERS)
    done = unpack_and_try(archive, tmp_path, arm.emulator("neon"))
    assert (done.returncode, "does not fit its program" in done.stderr) == (2, True), done.stderr
