"""Running a compiled program: TVM's runtime library, the mapped weights, and the caches.

How a compiled module is called, where ``weights`` is a tuple in the manifest's order:

* a "graph": ``main(*inputs, weights)`` gives its output, or a tuple of them;
* a "decoder": ``main(input_ids, position_ids, past, logit_positions, caches, weights)`` gives
  logits. ``input_ids`` and ``position_ids`` are int64 [batch, seq], ``past`` is int64 [1], the
  tokens already in the caches, and ``logit_positions`` int64 [n], which of the seq get logits:
  float32 [batch, n, vocabulary]. ``caches`` is a tuple of tensors [batch, kv_heads, capacity,
  columns], listed in the manifest, that belong to the caller and are updated in place. One for a
  GPU also has ``decode``, which takes the same for one token of one sequence and launches almost
  all kernels as one CUDA graph: see ``_Decode``.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxcompile import artifact as artifacts
from mxcompile import machine, target, weights
from mxcompile.artifact import Artifact, TensorSpec
from mxcompile.devices import Device, Mirror, aligned, interface
from mxcompile.errors import ArtifactError, UsageError
from mxcompile.machine import Machine

CHUNK: Final = 256
"""Tokens of a prompt that are run at once: enough to reuse each weight, and no more memory."""

FIRST_CAPACITY: Final = 512
"""Tokens that a new session's caches hold before they grow."""

_POOLED: Final = 2  # TVM's number of the allocator that keeps freed memory
_SHARE_CORES: Final = -3  # TVM's affinity mode in which no thread is bound to one core


def cores() -> int:
    """The physical cores that this process may use."""
    return machine.here().cores


def set_threads(count: int) -> None:
    """Run the kernels of this process on ``count`` threads from now on.

    Raises:
        UsageError: the process may not use so many CPUs.
    """
    share_cores(interface().get_global_func, machine.here(), count)


def share_cores(function: Callable[[str], Any], where: Machine, count: int) -> None:
    """Run the kernels of a process on ``count`` threads.

    Args:
        function: Gives a global function of the process by its name.
        where: The process's machine.
        count: How many.

    Raises:
        UsageError: the process may not use so many CPUs.
    """
    if not 1 <= count <= len(where.cpus):
        raise UsageError(f"{count} threads: the process can use 1 to {len(where.cpus)}")
    # The list gives the pool a worker a CPU (by itself it makes half as many) and lets the workers
    # move, so that two programs with a thread each do not both sit on the first core.
    names = function("ffi.Array")(*map(str, where.cpus))
    function("runtime.config_threadpool")(_SHARE_CORES, count, names)


class Program:
    """A loaded artifact, ready to be called."""

    def __init__(
        self, artifact: Artifact, library: Any, bound: Any, device: Device, *, graphs: bool = True
    ) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.device = device
        self._library = library
        self._weights = bound
        machine = self._machine()
        self._main = machine.get_function(artifacts.MAIN)
        self.graphs = graphs and machine.implements_function(artifacts.DECODE)

    @classmethod
    def load(cls, folder: Path, threads: int | None = None, *, graphs: bool = True) -> Self:
        """Load the artifact in ``folder``; its weights are mapped, or copied to a GPU.

        Args:
            folder: an artifact.
            threads: how many; None for one a physical core.
            graphs: whether a GPU's decode steps are CUDA graphs; else each kernel is launched.

        Raises:
            ArtifactError: it is damaged, or was made for another machine.
            DeviceError: it is for a GPU, and the libraries that this takes are not installed.
        """
        artifact = artifacts.load(folder)
        artifacts.check_host(artifact, target.features())
        set_threads(cores() if threads is None else threads)
        found = weights.read(folder / artifacts.WEIGHTS)
        device = Device.cuda() if artifact.manifest.on_gpu else Device()
        try:
            bound = interface().Array([device.tensor(found[n]) for n in artifact.manifest.weights])
        except KeyError as error:
            raise ArtifactError(f"{artifacts.WEIGHTS} has no tensor {error}") from error
        library = interface().load_module(str((folder / artifacts.CODE).absolute()))
        return cls(artifact, library, bound, device, graphs=graphs)

    def _machine(self) -> Any:
        """A virtual machine for the program's functions."""
        machine = self._library.get_function("vm_load_executable")()
        settings = [(number, 0, _POOLED) for number in self.device.numbers]
        machine.get_function("vm_initialization")(*itertools.chain(*settings))
        return machine

    def call(self, *arguments: Any) -> Any:
        """Call the program on TVM tensors; the weights are added."""
        return self._main(*arguments, self._weights)

    def decoder(self) -> Callable[..., Any]:
        """Give ``call`` for one token, in a virtual machine that goes when the caller drops it."""
        decode = self._machine().get_function(artifacts.DECODE)
        return lambda *arguments: decode(*arguments, self._weights)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run on arrays by name; a decoder starts with empty caches and gives all logits.

        Raises:
            UsageError: the names, types or shapes are not what the program takes.
        """
        if self.manifest.kind == artifacts.DECODER:
            check_feeds(feeds, (TensorSpec("input_ids", "int64", (1, "seq")),))
            return {"logits": Session(self).feed(feeds["input_ids"][0], "all")[None]}
        check_feeds(feeds, self.manifest.inputs)
        tensors = (self.device.tensor(feeds[spec.name]) for spec in self.manifest.inputs)
        found = self.call(*tensors)
        results = [found] if len(self.manifest.outputs) == 1 else list(found)
        names = [spec.name for spec in self.manifest.outputs]
        arrays = map(self.device.array, results)
        return dict(zip(names, arrays, strict=True))


def check_feeds(feeds: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec]) -> None:
    """Compare arrays with what a program takes.

    Raises:
        UsageError: they differ; the text lists what is taken.
    """
    expected = "; expected " + ", ".join(map(str, specs))
    if wrong := feeds.keys() ^ {spec.name for spec in specs}:
        raise UsageError(f"inputs missing or unknown: {', '.join(sorted(wrong))}{expected}")
    sizes: dict[int | str, int] = {}
    for spec in specs:
        array = feeds[spec.name]
        fits = len(spec.shape) == array.ndim and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        if array.dtype != spec.dtype or not fits:
            found = TensorSpec(spec.name, str(array.dtype), array.shape)
            raise UsageError(f"input {found} does not fit{expected}")


class Session:
    """A decoder with the caches of one sequence."""

    def __init__(self, program: Program, max_length: int | None = None) -> None:
        manifest = program.manifest
        if manifest.kv_cache is None or manifest.generation is None:
            raise UsageError(f"{program.artifact.folder} is not a language model")
        limit = manifest.generation.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= limit:
            raise UsageError(f"a context of {max_length} tokens: the model takes 1 to {limit}")
        self.max_length = max_length or limit
        self.vocabulary = manifest.generation.vocabulary
        self.length = 0
        self._program = program
        self._tensors = manifest.kv_cache.tensors
        self._capacity = 0
        self._caches: Any = None
        self._inputs = _Inputs(1, program.device)
        self._decode: _Decode | None = None
        shape, device = (1, 1, self.vocabulary), program.device
        self._last = None if device.shares else device.landing(shape, np.float32)

    def feed(
        self, tokens: ArrayLike, logits: Literal["last", "all"] = "last"
    ) -> NDArray[np.float32]:
        """Run ``tokens`` after those already in the caches.

        Returns:
            The logits after the last token, or after each one: [1 or tokens, vocabulary]. They
            may share memory with the program's: use or copy them before the next call.

        Raises:
            UsageError: the context is full, or a token is not of the vocabulary.
        """
        ids = np.asarray(tokens, np.int64).reshape(-1)
        if ids.size == 0:
            raise UsageError("no tokens to run")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise UsageError(f"a token is not between 0 and {self.vocabulary - 1}")
        if (need := self.length + ids.size) > self.max_length:
            raise UsageError(f"{need} tokens do not fit the context of {self.max_length}")
        self._reserve(need)
        found = [self._step(ids[at : at + CHUNK], logits) for at in range(0, ids.size, CHUNK)]
        return found[-1] if logits == "last" or len(found) == 1 else np.concatenate(found)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, max(length, 0))

    def _step(self, ids: NDArray[np.int64], logits: str) -> NDArray[np.float32]:
        if ids.size == 1 and self._program.graphs:
            self._decode = self._decode or _Decode(self._program, self._caches)
            result = self._decode(ids, self.length)
        else:
            if ids.size != self._inputs.size:
                self._inputs = _Inputs(ids.size, self._program.device)
            arguments = self._inputs.fill(ids, self.length, logits)
            result = self._program.call(*arguments, self._caches)
        self.length += ids.size
        into = self._last if logits == "last" else None
        found = self._program.device.array(result, into)
        return cast(NDArray[np.float32], found[0])

    def _reserve(self, need: int) -> None:
        """Make room for ``need`` tokens; the room doubles, so that its cost stays in proportion."""
        if need <= self._capacity:
            return
        capacity = max(2 * self._capacity, FIRST_CAPACITY)
        while capacity < need:
            capacity *= 2
        self._capacity = min(capacity, self.max_length)
        device, tensors = self._program.device, []
        # What was recorded goes with the caches whose addresses it holds.
        kept, self._caches, self._decode = list(self._caches or ()), None, None
        for index, spec in enumerate(self._tensors):
            _, heads, _, columns = spec.shape
            array = aligned((1, int(heads), self._capacity, int(columns)), np.dtype(spec.dtype))
            if kept:
                array[:, :, : self.length] = device.array(kept[index])[:, :, : self.length]
                kept[index] = None  # frees the old one before the next is made
            tensors.append(device.tensor(array))
        self._caches = interface().Array(tensors)


class _Decode:
    """Steps of one token on some caches, which are one CUDA graph after the first.

    A graph holds the addresses that the first step saw: of the inputs, the caches, the weights, and
    of what its virtual machine allocated. TVM keeps it in that machine and finds it by the caches'
    capacity alone. So the inputs are refilled and the caches never change; another session, or
    other caches of this one, take another machine.
    """

    def __init__(self, program: Program, caches: Any) -> None:
        self._function = program.decoder()
        self._inputs = _Inputs(1, program.device)
        self._caches = caches

    def __call__(self, ids: NDArray[np.int64], past: int) -> Any:
        """The logits of ``ids``, one token after ``past`` others."""
        return self._function(*self._inputs.fill(ids, past, "last"), self._caches)


class _Inputs:
    """The small inputs of a step of ``size`` tokens, made once and refilled."""

    def __init__(self, size: int, device: Device) -> None:
        self.size = size
        self._mirror = Mirror(device, [(1, size), (1, size), (1,)], np.int64)
        self._selections = {
            "all": device.tensor(np.arange(size)),
            "last": device.tensor(np.array([size - 1])),
        }

    def fill(self, ids: NDArray[np.int64], past: int, logits: str) -> tuple[Any, ...]:
        """The tensors for ``ids`` after ``past`` others."""
        tokens, positions, before = self._mirror.arrays
        tokens[0], positions[0] = ids, np.arange(past, past + self.size)
        before[0] = past
        self._mirror.refresh()
        return *self._mirror.tensors, self._selections[logits]
