"""Devices that a tracker of TVM's RPC lists: what they are, tuned side by side, and benchmarked.

On each device runs ``python -m tvm.exec.rpc_server`` or ``mxrun --serve``. Whoever reaches such a
server can run anything there: TVM's RPC is for a network that is trusted. A device that is switched
off gives no error, so that everything that waits for one has a time limit.
"""

import collections
import ctypes
import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import numpy as np
import tvm
from tvm import rpc
from tvm.tirx.script.builder import ir as T

from mxcompile import artifact as artifacts
from mxcompile import deploy, linker, records, runtime
from mxcompile.errors import DeviceError, UsageError
from mxcompile.machine import Machine, Read
from mxcompile.progress import Progress
from mxcompile.records import Case, Record, Records
from mxcompile.target import Target
from mxcompile.targets.cpu_norm import build, param, scratch
from mxcompile.tune import Limits, Outcome, SessionMeasurer, tune_case

Result = TypeVar("Result")

CONNECT_SECONDS: Final = 60
"""How long a device may take to answer, or to be free."""

TRIAL_SECONDS: Final = 300
"""How long a trial may take, its weights' way to the device included."""

BENCH_SECONDS: Final = 3600

STOP_SECONDS: Final = 10
"""How long a search that ends early waits for the trials under way."""

ATTEMPTS: Final = 3
"""A case that lost so many devices is given up: it may be what they die of."""

PART: Final = 8 << 20
"""Bytes of a file that are sent at once."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """Where devices are asked for: a tracker's address, and the key that they go by."""

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, address: str, key: str) -> Self:
        """Read HOST:PORT.

        Raises:
            UsageError: it is something else.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"'{address}' is not HOST:PORT, a tracker's address")
        return cls(host, int(port), key)

    def __str__(self) -> str:
        return f"the tracker at {self.host}:{self.port}"

    def devices(self) -> int:
        """How many devices are listed, busy ones too.

        Raises:
            DeviceError: none, or nothing answers.
        """
        found = answer(CONNECT_SECONDS, str(self), lambda: self._session().summary())
        keys: list[str] = [info["key"] for info in found["server_info"]]
        count = keys.count(f"server:{self.key}")
        if not count:
            raise DeviceError(f"{self} lists no device with the key '{self.key}'")
        return count

    def request(self) -> Any:
        """A session with a device, when one is free.

        Raises:
            DeviceError: none is in time.
        """
        what = f"{self}, asked for a device with the key '{self.key}',"
        return answer(CONNECT_SECONDS, what, lambda: self._session().request(self.key, max_retry=1))

    def _session(self) -> Any:
        # TVM's own way to connect repeats what was refused for a minute.
        with rpc.client.socket.create_connection((self.host, self.port), CONNECT_SECONDS):
            pass
        return rpc.connect_tracker(self.host, self.port)


class RefusalError(UsageError):
    """A device answered that it cannot do what it was asked for."""


def answer(seconds: float, what: str, call: Callable[[], Result]) -> Result:
    """What a call gives that waits for ``what``; it is left alone after some seconds.

    Raises:
        DeviceError: nothing answers, or not in time.
        RefusalError: the answer is an error.
    """
    found: queue.SimpleQueue[Result | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            found.put(call())
        except Exception as error:
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = found.get(timeout=seconds)
    except queue.Empty:
        raise DeviceError(f"{what} did not answer in {seconds:.0f} s") from None
    if isinstance(result, RuntimeError | OSError):
        reason = (str(result).strip().splitlines() or ["it gave no reason"])[-1]
        if isinstance(result, tvm.error.RPCError):
            raise RefusalError(f"{what} says: {reason}") from result
        raise DeviceError(f"{what} cannot be reached: {reason}") from result
    if isinstance(result, Exception):
        raise result
    return result


# A device


@dataclass(frozen=True, slots=True)
class Device:
    """A device in a session, and what it is."""

    session: Any
    machine: Machine

    @classmethod
    def connect(cls, tracker: Tracker, triple: str) -> Self:
        """Ask for a device that runs code for ``triple``.

        Raises:
            DeviceError: there is none in time.
            UsageError: nothing here links for it.
        """
        session = tracker.request()
        with tempfile.TemporaryDirectory(prefix="mxcompile-") as folder:
            library = Path(folder) / "probe.so"
            _build_probe(triple, library)
            what = f"a device with the key '{tracker.key}', asked to run code for {triple},"
            found = answer(
                CONNECT_SECONDS, what, lambda: Machine.described(_reader(session, library))
            )
        return cls(session, found)

    def check(self, where: Target) -> None:
        """Raise UsageError when the device lacks what a target's kernels need."""
        if lacking := where.requires - self.machine.features:
            raise UsageError(
                f"{self.machine.hardware} cannot run the kernels of {where.name}: it lacks "
                f"{', '.join(sorted(lacking))}"
            )

    def measurer(self, where: Target, building: threading.Lock) -> SessionMeasurer:
        """What measures kernels for a target on the device.

        Raises:
            UsageError: the device lacks what they need.
        """
        self.check(where)
        threads = partial(runtime.share_cores, self.session.get_function, self.machine)
        what = f"the device {self.machine.hardware}"
        return SessionMeasurer(
            self.machine.hardware,
            where,
            self.session,
            threads,
            building,
            lambda call: answer(TRIAL_SECONDS, what, call),
        )


_PATH: Final = 256
_CHUNK: Final = 1 << 14
"""Bytes of a path, and of what is read of a file at once."""


def _read_part() -> None:
    """Read a part of a file: servers give none whose size is not known, such as those in /proc."""
    path, data = param("path", (_PATH,), "uint8"), param("data", (_CHUNK,), "uint8")
    start, size = param("start", (1,), "int64"), param("size", (1,), "int64")
    file = scratch(1, dtype="int32")
    T.buffer_store(file, T.call_extern("int32", "open", path.data, T.int32(0)), [0])
    count = T.int64(_CHUNK)
    found = T.call_extern("int64", "pread", file[0], data.data, count, start[0])
    T.buffer_store(size, found, [0])
    T.evaluate(T.call_extern("int32", "close", file[0]))


def _build_probe(triple: str, library: Path) -> None:
    def link(output: str, objects: Sequence[str], **_options: Any) -> None:
        linker.link(triple, output, objects)

    module = tvm.IRModule({"probe": build(_read_part).with_attr("global_symbol", "probe")})
    built = tvm.tirx.build(module, tvm.target.Target({"kind": "llvm", "mtriple": triple}))
    tvm.runtime.Executable(built).export_library(str(library), fcompile=link)


def _reader(session: Any, library: Path) -> Read:
    """What reads files of a device."""
    session.upload(str(library))
    probe = session.load_module(library.name)["probe"]
    place, data, start, size = (
        tvm.runtime.empty((count,), dtype, session.cpu())
        for count, dtype in ((_PATH, "uint8"), (_CHUNK, "uint8"), (1, "int64"), (1, "int64"))
    )

    def read(path: str) -> str:
        place.copyfrom(np.frombuffer(path.encode().ljust(_PATH, b"\0"), np.uint8))
        text = bytearray()
        while True:
            start.copyfrom(np.array([len(text)]))
            probe(place, data, start, size)
            count = int(size.numpy()[0])
            if count <= 0:  # the end, or no such file
                return text.decode(errors="replace")
            text += data.numpy()[:count].tobytes()

    return read


def _leave(*objects: object) -> None:
    """Never free what may lie on a device that is silent: TVM would wait for its answer."""
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


# Tuning


@dataclass
class _Worker:
    """What one of the devices is given to do."""

    inbox: queue.SimpleQueue[Case | None] = field(default_factory=queue.SimpleQueue)


@dataclass(frozen=True, slots=True)
class _Event:
    """What became of a worker: it is ready; of its case; or it, or all, came to an end."""

    worker: _Worker
    case: Case | None = None
    result: Outcome | Exception | None = None
    gone: bool = False


class Fleet:
    """All devices that a tracker lists under a key, searching cases side by side.

    A case is searched on one device, so that like is compared with like. A device that is lost
    costs the trial: its case goes to another, and it is asked for again meanwhile.
    """

    def __init__(self, tracker: Tracker, where: Target, log: Path, progress: Progress) -> None:
        self._tracker, self._where, self._log, self._progress = tracker, where, log, progress
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._building, self._writing = threading.Lock(), threading.Lock()
        self._stopping = threading.Event()
        self._known: dict[str, Records] = {}

    def tune(self, cases: Sequence[Case], first: Device, limits: Limits) -> Iterator[Outcome]:
        """Search every case, the most important first; records go into the log.

        Args:
            cases: What to search.
            first: A device that is connected already.
            limits: When to stop.

        Raises:
            DeviceError: no device is left.
        """
        devices: list[Device | None] = [first, *[None] * (self._tracker.devices() - 1)]
        workers = [_Worker() for _ in devices]
        end, threads = limits.end(), []
        for worker, device in zip(workers, devices, strict=True):
            work = partial(self._work, worker, device, limits.trials, end)
            threads.append(threading.Thread(target=work, daemon=True))
            threads[-1].start()
        try:
            yield from self._dispatch(cases, len(workers))
        finally:  # TVM aborts the process if it ends while a kernel is compiled
            self._stopping.set()
            for worker in workers:
                worker.inbox.put(None)
            last = time.monotonic() + STOP_SECONDS
            for thread in threads:
                thread.join(max(0.0, last - time.monotonic()))

    def _dispatch(self, cases: Sequence[Case], alive: int) -> Iterator[Outcome]:
        """Hand cases to whoever is ready; gives what they come to."""
        waiting, idle, busy = collections.deque(cases), list[_Worker](), 0
        lost: dict[Case, int] = collections.Counter()
        while waiting or busy:
            while waiting and idle:
                idle.pop().inbox.put(waiting.popleft())
                busy += 1
            event = self._next()
            busy -= event.case is not None
            if event.gone:
                alive -= 1
                self._progress.note(f"a device is given up: {event.result}")
                if not alive:
                    raise DeviceError(
                        f"no device is left, {len(waiting)} cases are not tuned: {event.result}"
                    )
            elif event.case is None:
                idle.append(event.worker)
            elif isinstance(event.result, DeviceError | RefusalError):
                lost[event.case] += 1
                again = lost[event.case] < ATTEMPTS
                tail = "it is tried again" if again else "it is given up"
                self._progress.note(f"{event.case}: {event.result}; {tail}")
                if again:
                    waiting.appendleft(event.case)
            elif isinstance(event.result, Exception):
                raise event.result
            elif event.result is not None:
                yield event.result

    def _next(self) -> _Event:
        """What happens next; not one long wait, as Ctrl-C may reach another thread than this."""
        while True:
            with suppress(queue.Empty):
                return self._events.get(timeout=1)

    def _work(self, worker: _Worker, device: Device | None, trials: int | None, end: float) -> None:
        """Be one device, until there is nothing to do or it is gone for good."""
        measurer = None
        while not self._stopping.is_set():
            try:
                if measurer is None:
                    device = device or Device.connect(self._tracker, self._where.triple)
                    measurer = device.measurer(self._where, self._building)
            except Exception as error:
                self._events.put(_Event(worker, result=error, gone=True))
                break
            self._events.put(_Event(worker))
            case = worker.inbox.get()
            if case is None or self._stopping.is_set():
                break
            known = self._records(measurer.hardware)
            result: Outcome | Exception | None
            try:
                result = tune_case(case, measurer, known, trials, end, self._keep)
            except Exception as error:
                result = error
                if isinstance(error, DeviceError) and not self._stopping.is_set():
                    _leave(device, measurer)
                device = measurer = None
            self._events.put(_Event(worker, case, result))

    def _records(self, hardware: str) -> Records:
        with self._writing:
            if hardware not in self._known:
                self._known[hardware] = records.load(self._log, hardware)
            return self._known[hardware]

    def _keep(self, record: Record) -> None:
        with self._writing:
            records.append(self._log, [record])
        if self._stopping.is_set():
            raise DeviceError("the search ends")


# Benchmarks


def bench(
    folder: Path,
    tracker: Tracker,
    *,
    prompt: int,
    generate: int,
    threads: Sequence[int],
    repetitions: int,
    depths: Sequence[int] = (0,),
    wheels: Path | None = None,
    compiler: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure an artifact on a device, by the runner: what ``mxcompile.bench.bench`` gives.

    Args:
        folder: an artifact.
        tracker: where the device is asked for.
        prompt: tokens of the prompt test; 0 leaves it out.
        generate: tokens of the other test.
        threads: each test runs with each number; none means one a physical core.
        repetitions: of each test.
        depths: each test runs behind each number of tokens.
        wheels: as for ``deploy``.
        compiler: likewise.
        cache: likewise.
        progress: told about the stages.

    Raises:
        DeviceError: there is no device, or it is lost.
        UsageError: there is no compiler or runtime for its kind of machine, or the device refuses
            the artifact.
    """
    progress = progress or Progress()
    artifact = artifacts.load(folder)
    kind = deploy.machine_of(artifact)
    tracker.devices()
    with (
        deploy.runtime(kind, deploy.versions_of(artifact), wheels) as found,
        progress.stage("runner"),
    ):
        built = deploy.build_runner(found, compiler, cache or Path.home() / deploy.CACHE)
    library = next(path for path in built if path.suffix == ".so")
    session = tracker.request()
    what = f"a device with the key '{tracker.key}'"

    def load() -> tuple[Any, str]:
        session.upload(str(library))
        module = session.load_module(library.name)
        return module, session.get_function("tvm.rpc.server.workpath")(".")

    module, place = answer(CONNECT_SECONDS, what, load)
    append, measure = module["append"], module["bench"]
    names = (artifacts.MANIFEST, *artifact.manifest.files)
    total = sum((folder / name).stat().st_size for name in names)
    try:
        with progress.stage("upload", total) as advance:
            for name in names:
                with (folder / name).open("rb") as file:
                    for part in iter(partial(file.read, PART), b""):
                        send = partial(append, f"{place}/{name}", part)
                        answer(CONNECT_SECONDS, what, send)
                        advance(len(part))
        with progress.stage("bench"):
            counts, behind = (",".join(map(str, numbers)) for numbers in (threads, depths))
            run = partial(measure, place, prompt, generate, counts, behind, repetitions)
            rows: list[dict[str, Any]] = json.loads(answer(BENCH_SECONDS, what, run))
    except DeviceError:
        _leave(session, module, append, measure)
        raise
    return rows
