"""Deploying: an artifact, the runner and TVM's runtime, packed for a device to unpack and run.

The runner (``targets/runner``, C++17) is compiled here for the device's kind of machine, which the
artifact's code tells, and kept for the next time. TVM's runtime libraries are those of the wheels
for that machine: the installed ones, or others from a folder.
"""

import gzip
import hashlib
import importlib.resources
import platform
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from mxcompile import artifact as artifacts
from mxcompile import linker
from mxcompile.artifact import Artifact
from mxcompile.errors import ArtifactError, UsageError
from mxcompile.files import whole
from mxcompile.progress import Progress

MACHINES: Final = {62: "x86_64", 183: "aarch64"}
"""Kinds of machines by their number in the header of an ELF file."""

CACHE: Final = Path(".cache") / "mxcompile"
"""Where compiled runners are kept, in the user's home."""

LIBRARIES: Final = {
    "tvm": ("apache-tvm", "tvm/lib/libtvm_runtime.so"),
    "tvm_ffi": ("apache-tvm-ffi", "tvm_ffi/lib/libtvm_ffi.so"),
}
"""The distribution and the library of it that a runner needs, by their names in a manifest."""

PRODUCTS: Final = ("mxrun", "libmxrun.so")
FLAGS: Final = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Dtvm=tvm_in_mxrun")
"""What TVM's headers define gets names of its own: its libraries would take what an executable has
by the same name, such as the type of an error, for theirs, which another C++ library lays out."""
RELEASE: Final = ("-O2",)
EXPORTS: Final = "exports.map"
LINK: Final = ("-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-s", "-pthread")
"""Nothing names a symbol of TVM's runtime, which registers itself: it is linked all the same."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """TVM's runtime for one kind of machine, unpacked in ``folder`` as wheels lay it out."""

    machine: str
    versions: Mapping[str, str]
    folder: Path

    @property
    def libraries(self) -> list[Path]:
        """The libraries that a device needs."""
        return [self.folder / library for _, library in LIBRARIES.values()]

    def licenses(self) -> Iterator[tuple[str, Path]]:
        """The licenses that must go with the libraries: a name and a file."""
        for name, version in self.versions.items():
            distribution = LIBRARIES[name][0]
            folder = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
            for path in sorted(folder.glob("licenses/*")):
                yield f"{distribution}-{path.name}", path


@dataclass(frozen=True, slots=True)
class Deployment:
    """What was written: an archive, for which machine, and the bytes of each file in it."""

    archive: Path
    machine: str
    files: Mapping[str, int]

    @property
    def bytes_beside_model(self) -> int:
        """Unpacked bytes but those of the weights and the tokenizer, which are the model's own."""
        own = (artifacts.WEIGHTS, *artifacts.TOKENIZER_FILES)
        return sum(size for name, size in self.files.items() if Path(name).name not in own)


def machine_of(artifact: Artifact) -> str:
    """The kind of machine that the artifact's code is for.

    Raises:
        ArtifactError: it is for none that the runner can be built for.
        UsageError: it is for a GPU, which the runner knows nothing of.
    """
    if artifact.manifest.on_gpu:
        raise UsageError(
            f"{artifact.folder} is for {artifact.manifest.target}: mxrun runs programs for CPUs; "
            "on a machine with the GPU `mxcompile run` does"
        )
    header = (artifact.folder / artifacts.CODE).read_bytes()[:20]
    number = int.from_bytes(header[18:20], "little")
    if header[:4] != b"\x7fELF" or number not in MACHINES:
        known = ", ".join(MACHINES.values())
        raise ArtifactError(f"{artifact.folder / artifacts.CODE} is no code for {known}")
    return MACHINES[number]


def versions_of(artifact: Artifact) -> Mapping[str, str]:
    """The versions of TVM's libraries that the artifact takes."""
    return {name: artifact.manifest.versions.get(name, "none") for name in LIBRARIES}


def deploy(
    folder: Path,
    archive: Path,
    *,
    wheels: Path | None = None,
    compiler: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Write an archive with all that a device needs to run the artifact in ``folder``.

    Args:
        folder: an artifact.
        archive: a .tar.gz; replaced if it exists.
        wheels: a folder with the wheels of apache-tvm and apache-tvm-ffi for the device's kind of
            machine; None for those installed here.
        compiler: the C++ compiler for that machine, with arguments; None for a usual name.
        cache: where compiled runners are kept; None for a folder in the user's home.
        progress: told about the stages.

    Raises:
        ArtifactError: the artifact is damaged.
        UsageError: there is no compiler or runtime for its kind of machine.
    """
    progress = progress or Progress()
    artifact = artifacts.load(folder)
    machine = machine_of(artifact)
    name = folder.absolute().stem
    with runtime(machine, versions_of(artifact), wheels) as found:
        with progress.stage("runner"):
            built = build_runner(found, compiler, cache or Path.home() / CACHE)
        members = {f"{name}/{path.name}": path for path in (*built, *found.libraries)}
        members[f"{name}/mxrun.h"] = sources() / "mxrun.h"
        members |= {f"{name}/licenses/{title}": path for title, path in found.licenses()}
        members |= {
            f"{name}/{folder.absolute().name}/{member}": artifact.folder / member
            for member in (artifacts.MANIFEST, *artifact.manifest.files)
        }
        with progress.stage("archive"), whole(archive) as draft:
            _write_archive(draft, members)
        return Deployment(
            archive, machine, {key: path.stat().st_size for key, path in members.items()}
        )


def _write_archive(path: Path, members: Mapping[str, Path]) -> None:
    """Write a .tar.gz; the same members give the same bytes."""
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name in sorted(members):
            entry = tarfile.TarInfo(name)
            entry.size = members[name].stat().st_size
            entry.mode = 0o755 if Path(name).name in PRODUCTS else 0o644
            with members[name].open("rb") as content:
                tar.addfile(entry, content)


# The runtime


@contextmanager
def runtime(machine: str, versions: Mapping[str, str], wheels: Path | None) -> Iterator[Runtime]:
    """TVM's runtime in ``versions`` for ``machine``; unpacked wheels are gone behind the block.

    Raises:
        UsageError: it is not installed or not in ``wheels``; says how to get it.
    """
    if wheels is None:
        yield Runtime(machine, versions, _installed(machine, versions))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, version in versions.items():
            _unpack(_find_wheel(wheels, LIBRARIES[name][0], version, machine), Path(folder))
        found = Runtime(machine, versions, Path(folder))
        if missing := [path.name for path in found.libraries if not path.is_file()]:
            raise UsageError(f"the wheels in {wheels} lack {', '.join(missing)}")
        yield found


def _installed(machine: str, versions: Mapping[str, str]) -> Path:
    """Where the installed packages are, if they are the ones."""
    here = {name: metadata.version(LIBRARIES[name][0]) for name in versions}
    if machine != platform.machine() or here != versions:
        raise UsageError(_how_to_get(machine, versions))
    return Path(str(metadata.distribution(LIBRARIES["tvm"][0]).locate_file("")))


def _how_to_get(machine: str, versions: Mapping[str, str]) -> str:
    packages = " ".join(f"{LIBRARIES[name][0]}=={version}" for name, version in versions.items())
    return (
        f"TVM's runtime for {machine}, {packages}, is not installed: get it with `pip download "
        f"--no-deps --only-binary=:all: --platform manylinux_2_28_{machine} --python-version 3.11 "
        f"-d wheels {packages}` and give --wheels wheels"
    )


def _find_wheel(folder: Path, distribution: str, version: str, machine: str) -> Path:
    pattern = f"{distribution.replace('-', '_')}-{version}-*_{machine}.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        needed = {name: version for name, (own, _) in LIBRARIES.items() if own == distribution}
        raise UsageError(f"{folder} has no {pattern}: {_how_to_get(machine, needed)}")
    return found[0]


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack what a runner is built and shipped with: two libraries, headers and licenses."""
    libraries = {library for _, library in LIBRARIES.values()}
    headers = f"{linker.HEADERS}/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name in libraries or name.startswith(headers) or "/licenses/" in name:
                    archive.extract(name, folder)
    except zipfile.BadZipFile as error:
        raise UsageError(f"{wheel} is not a wheel: {error}") from error


# The runner


def sources() -> Path:
    """The folder of the runner's sources and its header."""
    return Path(str(importlib.resources.files("mxcompile.targets"))) / "runner"


def compiler_for(machine: str, command: str | None) -> list[str]:
    """The words of a C++ compiler's command for ``machine``.

    Raises:
        UsageError: there is none here; says what to install.
    """
    if command is not None:
        words = shlex.split(command)
        if not words or shutil.which(words[0]) is None:
            raise UsageError(f"no C++ compiler for {machine}: '{command}' is not installed")
        return words
    try:
        return linker.find(f"{machine}-linux-gnu", "c++")
    except UsageError as error:
        raise UsageError(f"{error}, or name one with --cxx") from error


def build_runner(
    found: Runtime, command: str | None, cache: Path, flags: Sequence[str] = RELEASE
) -> list[Path]:
    """Compile the runner for a runtime, or find it in ``cache``: mxrun, and the same as a library.

    Args:
        found: which is linked.
        command: the C++ compiler for its kind of machine; None for a usual name.
        cache: a folder.
        flags: more of them, such as for sanitizers.

    Raises:
        UsageError: there is no compiler, or it fails.
    """
    compiler = compiler_for(found.machine, command)
    files = sorted(sources().iterdir())
    digest = hashlib.sha256()
    version = _run([*compiler, "--version"])
    for text in (*compiler, version, *FLAGS, *LINK, *flags, *found.versions.values()):
        digest.update(text.encode() + b"\0")
    for path in (*files, *found.libraries):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = cache / f"runner-{found.machine}-{digest.hexdigest()[:16]}"
    built = [folder / name for name in PRODUCTS]
    if not all(path.is_file() for path in built):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            _compile([*compiler, *flags], found, files, Path(work))
            for path in built:
                with whole(path) as draft:
                    shutil.copy(Path(work) / path.name, draft)
    return built


def _compile(compiler: Sequence[str], found: Runtime, files: Sequence[Path], work: Path) -> None:
    """Compile into ``work``: each file by itself, two at a time, then link both products."""
    flags = [
        *FLAGS,
        *("-isystem", str(found.folder / linker.HEADERS)),
        f'-DMXRUN_TVM_VERSION="{found.versions["tvm"]}"',
        f'-DMXRUN_TVM_FFI_VERSION="{found.versions["tvm_ffi"]}"',
    ]
    code = [path for path in files if path.suffix == ".cpp"]
    objects = [str(work / f"{path.stem}.o") for path in code]
    with ThreadPoolExecutor(2) as pool:
        commands = [
            [*compiler, *flags, "-c", str(path), "-o", target]
            for path, target in zip(code, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    link = [*LINK, f"-Wl,--version-script={sources() / EXPORTS}", *map(str, found.libraries)]
    library = [target for target in objects if not target.endswith("/main.o")]
    _run([*compiler, *objects, *link, "-o", str(work / "mxrun")])
    _run([*compiler, "-shared", *library, *link, "-o", str(work / "libmxrun.so")])


def _run(command: Sequence[str]) -> str:
    """Run a command for its output.

    Raises:
        UsageError: it fails; with the first line of what it says that tells of an error.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise UsageError(f"{command[0]} failed: {said}")
    return done.stdout
