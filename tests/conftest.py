"""What several test modules need: compiled toys, and skipping what this machine cannot run."""

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import settings

from mxcompile import artifact, deploy, target
from tests import arm, toy

# The same examples every time: a run that fails can be repeated. To search for more, run
# pytest with --hypothesis-profile=default.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with artifacts of the toy decoder and of a plain graph: copy before changing."""
    return _compile(tmp_path_factory.mktemp("compiled"), toy.build)


@pytest.fixture(scope="session")
def compiled_for_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the emulated ARM machine."""
    arm.require()
    return _compile(tmp_path_factory.mktemp("arm"), arm.build)


def _compile(folder: Path, build: toy.Build) -> Path:
    toy.compile_decoder(folder / "toy.so", build)
    toy.compile_graph(folder / "graph.so", build)
    toy.write_tokenizer(folder)
    with artifact.staged(folder / "toy.mxc") as staging:
        built = artifact.write(
            staging,
            toy.manifest(),
            code=folder / "toy.so",
            weights=toy.weights(),
            plan=toy.PLAN,
            extra=[folder / "tokenizer.json"],
        )
        artifact.finish(built, quality={"kld_mean": 0.0}, report="<!doctype html>")
    with artifact.staged(folder / "graph.mxc") as staging:
        artifact.write(
            staging,
            toy.graph_manifest(),
            code=folder / "graph.so",
            weights={"w": toy.SCALE},
            plan=toy.PLAN,
        )
    return folder


@pytest.fixture
def toy_artifact(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the toy's artifact that a test may damage."""
    return Path(shutil.copytree(compiled / "toy.mxc", tmp_path / "toy.mxc"))


RUNNERS = Path(__file__).parent.parent / "build" / "runners"
"""Where compiled runners stay, so that only what changed is compiled again."""


@pytest.fixture(scope="session")
def mxrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner for this machine, with TVM's libraries beside it."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return _runner(platform.machine(), None, tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="session")
def mxrun_for_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the emulated ARM machine."""
    arm.require()
    return _runner("aarch64", arm.WHEELS, tmp_path_factory.mktemp("runner"))


def _runner(kind: str, wheels: Path | None, folder: Path) -> Path:
    versions = {name: metadata.version(package) for name, (package, _) in deploy.LIBRARIES.items()}
    with deploy.runtime(kind, versions, wheels) as found:
        for path in (*deploy.build_runner(found, None, RUNNERS), *found.libraries):
            shutil.copy(path, folder)
    return folder / "mxrun"


@pytest.fixture
def needs() -> Callable[[str], None]:
    """Skips the test where the CPU lacks a feature, as Linux names it."""

    def check(feature: str) -> None:
        if feature not in target.host_features():
            pytest.skip(f"this CPU lacks {feature}")

    return check
