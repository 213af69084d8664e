"""The artifact: a folder with the compiled program, its weights, and a manifest that seals them.

It is built under a temporary name beside its destination and renamed when it is complete, so that
a failure, a full disk or Ctrl-C leaves nothing behind::

    with artifact.staged(Path("out.mxc")) as folder:
        built = artifact.write(folder, manifest, code=..., weights=..., plan=...)
        built = artifact.finish(built, quality=measure(built), report=...)
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self, get_args, get_origin, get_type_hints

from numpy.typing import NDArray

from mxcompile import weights as weight_file
from mxcompile.errors import ArtifactError, PlanError, UsageError
from mxcompile.formats import CACHE_FORMATS
from mxcompile.plan import PrecisionPlan

FORMAT_VERSION: Final = 2
MANIFEST: Final = "manifest.json"
CODE: Final = "model.so"
WEIGHTS: Final = "weights.safetensors"
PLAN: Final = "plan.json"
REPORT: Final = "report.html"
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What may lie beside a language model; the first is needed to run it on text."""

DECODER: Final = "decoder"
GRAPH: Final = "graph"

MAIN: Final = "main"
DECODE: Final = "decode"
"""The program's functions; see runtime.py. The second is there in decoders for a GPU."""

_DISTRIBUTIONS: Final = {"mxcompile": "mxcompile", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output; a dimension is a number or the name of a free one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One attention layer's keys and values: their shape, and the names of their formats."""

    kv_heads: int
    head_dim: int
    key: str
    value: str

    @property
    def token_bytes(self) -> int:
        """The bytes that a token of context takes."""
        formats = (CACHE_FORMATS[name] for name in (self.key, self.value))
        return sum(self.kv_heads * fmt.row_bytes(self.head_dim) for fmt in formats)


@dataclass(frozen=True, slots=True)
class KvCache:
    """The caches a decoder takes: what each layer has, and the tensors in the program's order.

    A tensor is [batch, kv heads, max_length, columns]; a quantized cache is two of them.
    """

    layers: tuple[CacheLayer, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def token_bytes(self) -> int:
        """The bytes that a token of context takes in all layers."""
        return sum(layer.token_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Generation:
    """What generating text needs to know about a language model."""

    vocabulary: int
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of the artifact must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the artifact is and holds; ``write`` fills in ``versions`` and ``files``.

    ``kind`` is "decoder" or "graph" and fixes how the program is called (see runtime.py);
    ``weights`` names the tensors in the order in which the program takes them.
    """

    kind: str
    name: str
    target: str
    target_features: tuple[str, ...]
    budget: str
    activations: str
    pipeline: str
    plan_digest: str
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...]
    kv_cache: KvCache | None = None
    generation: Generation | None = None
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def on_gpu(self) -> bool:
        """Whether the program is for a GPU; its features name the architectures of GPUs too."""
        return any(feature.startswith("sm_") for feature in self.target_features)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON data, with a digest of itself."""
        data = dataclasses.asdict(self)
        return data | {"digest": _digest(data)}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            ArtifactError: a value is missing, of another type, or was changed.
        """
        if not isinstance(data, dict):
            raise ArtifactError(f"{MANIFEST} is not a JSON object")
        if (version := data.get("format_version")) != FORMAT_VERSION:
            raise ArtifactError(
                f"{MANIFEST} is of format version {version}, this program reads {FORMAT_VERSION}: "
                "compile the model again"
            )
        fields = {key: value for key, value in data.items() if key != "digest"}
        if data.get("digest") != _digest(fields):
            raise ArtifactError(f"{MANIFEST} was changed after it was written: its digest differs")
        manifest: Self = _decode(cls, fields, MANIFEST)
        return manifest


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _decode(hint: Any, data: Any, where: str) -> Any:
    """Make a value of type ``hint`` from JSON ``data``, or say what is wrong ``where``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(data, dict):
        hints = get_type_hints(hint)
        if data.keys() != hints.keys():
            raise ArtifactError(f"{where}: wrong keys {sorted(data.keys() ^ hints.keys())}")
        values = {key: _decode(hints[key], value, f"{where}: {key}") for key, value in data.items()}
        return hint(**values)  # type: ignore[operator] # is_dataclass() admits instances too
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, where) for item in data)
    if origin is Mapping and isinstance(data, dict):
        return {key: _decode(arguments[1], value, where) for key, value in data.items()}
    if origin is types.UnionType:
        if type(data) in arguments:
            return data
        for option in filter(dataclasses.is_dataclass, arguments):
            return _decode(option, data, where)
    if type(data) is hint or (hint is float and type(data) is int):
        return data
    raise ArtifactError(f"{where}: {str(data)[:40]} is not {getattr(hint, '__name__', hint)}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact in ``folder``."""

    folder: Path
    manifest: Manifest

    @property
    def weight_bytes(self) -> int:
        """The size of the weight file."""
        return self.manifest.files[WEIGHTS].bytes

    @property
    def bits_per_weight(self) -> float:
        """All-in: every byte of the weight file over every parameter of the model."""
        return 8 * self.weight_bytes / self.manifest.parameters

    def plan(self) -> PrecisionPlan:
        """The plan that the program was compiled with.

        Raises:
            ArtifactError: it is not a plan of this version.
        """
        try:
            return PrecisionPlan.from_json(json.loads((self.folder / PLAN).read_text()))
        except (PlanError, ValueError) as error:
            raise ArtifactError(f"{self.folder / PLAN}: {error}") from error


def check_destination(path: Path, *, force: bool) -> None:
    """Refuse a destination that cannot be written, before hours are spent on what goes there.

    Raises:
        UsageError: it exists and ``force`` is not given, or is not an artifact, or has no parent.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent} is not a folder: {path} cannot be written")
    if not os.path.lexists(path):
        return
    if not force:
        raise UsageError(f"{path} exists; choose another -o or give --force to replace it")
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise UsageError(f"{path} exists and is not an artifact: --force will not replace it")


@contextmanager
def staged(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes ``destination`` when the block ends without an error.

    Raises:
        UsageError: the destination cannot be written.
    """
    check_destination(destination, force=force)
    destination = destination.absolute()
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        staging = work / "new"
        staging.mkdir()
        yield staging
        for path in (*staging.iterdir(), staging):
            _sync(path)
        check_destination(destination, force=force)
        _replace(destination, staging, work / "old")
        _sync(destination.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(destination: Path, staging: Path, old: Path) -> None:
    """Rename ``staging`` to ``destination``; what was there goes, or stays if that fails."""
    replaced = destination.exists()
    if replaced:
        destination.rename(old)
    try:
        staging.rename(destination)
    except BaseException:
        if replaced:
            old.rename(destination)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(
    folder: Path,
    manifest: Manifest,
    *,
    code: Path,
    weights: Mapping[str, NDArray[Any]],
    plan: PrecisionPlan,
    extra: Iterable[Path] = (),
) -> Artifact:
    """Write an artifact that can be loaded into the empty ``folder``.

    Args:
        folder: from ``staged``.
        manifest: all of it but ``versions``, ``files`` and ``quality``.
        code: the shared library.
        weights: the packed tensors, by name; streamed.
        plan: the plan that was compiled.
        extra: files that are copied in, such as the tokenizer's.
    """
    if missing := set(manifest.weights) ^ weights.keys():
        raise ValueError(f"the program takes and the caller gives other weights: {sorted(missing)}")
    weight_file.write(folder / WEIGHTS, weights)
    shutil.copyfile(code, folder / CODE)
    (folder / PLAN).write_text(json.dumps(plan.to_json()) + "\n")
    for path in extra:
        shutil.copyfile(path, folder / path.name)
    versions = {name: metadata.version(package) for name, package in _DISTRIBUTIONS.items()}
    files = {path.name: _record(path) for path in sorted(folder.iterdir())}
    return _seal(folder, dataclasses.replace(manifest, versions=versions, files=files))


def finish(artifact: Artifact, *, quality: Mapping[str, float], report: str) -> Artifact:
    """Add what was measured on the artifact, and the report about it."""
    path = artifact.folder / REPORT
    path.write_text(report)
    files = {**artifact.manifest.files, REPORT: _record(path)}
    return _seal(
        artifact.folder, dataclasses.replace(artifact.manifest, quality=quality, files=files)
    )


def _seal(folder: Path, manifest: Manifest) -> Artifact:
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    return Artifact(folder, manifest)


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def load(folder: Path) -> Artifact:
    """Open an artifact and check every file of it.

    Raises:
        ArtifactError: it is not an artifact, of another version, or not as it was written.
    """
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise ArtifactError(f"{folder} is not an artifact: it {what}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / MANIFEST} cannot be read: {error}") from error
    manifest = Manifest.from_json(data)
    if missing := {CODE, WEIGHTS, PLAN} - manifest.files.keys():
        raise ArtifactError(f"{folder / MANIFEST} does not name {', '.join(sorted(missing))}")
    for name, record in manifest.files.items():
        _check_file(folder, name, record)
    return Artifact(folder, manifest)


def _check_file(folder: Path, name: str, record: FileRecord) -> None:
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise ArtifactError(f"{folder / MANIFEST} names a file outside the artifact: {name!r}")
    path = folder / name
    if path.is_symlink():
        raise ArtifactError(f"{path} is a link, not a file of the artifact")
    try:
        found = _record(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if found.bytes != record.bytes:
        raise ArtifactError(f"{path} has {found.bytes} bytes, not {record.bytes}: copy it again")
    if found.sha256 != record.sha256:
        raise ArtifactError(f"{path} was changed: its sha256 is not the one in {MANIFEST}")


def check_host(artifact: Artifact, features: frozenset[str]) -> None:
    """Refuse to run what this machine's software or CPU, with ``features``, cannot run.

    Raises:
        ArtifactError: it was made by or for another TVM, or for other CPU features.
    """
    manifest = artifact.manifest
    for name in ("tvm", "tvm_ffi"):
        installed = metadata.version(_DISTRIBUTIONS[name])
        if (made := manifest.versions.get(name)) != installed:
            raise ArtifactError(
                f"{artifact.folder} was made with {name} {made}, here is {installed}: "
                "compile the model again"
            )
    if lacking := set(manifest.target_features) - features:
        raise ArtifactError(
            f"{artifact.folder} was compiled for {manifest.target}; this machine lacks "
            f"{', '.join(sorted(lacking))}: compile the model for another target"
        )
