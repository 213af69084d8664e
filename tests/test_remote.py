"""Devices over TVM's RPC: a tracker and two servers on this machine stand for them."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tvm import rpc
from tvm.rpc.tracker import Tracker as TrackerServer

from mxcompile import cli, machine, records, remote, target, tune
from mxcompile.errors import DeviceError, UsageError
from mxcompile.progress import Progress
from mxcompile.records import Case
from mxcompile.remote import Device, Fleet, Tracker
from mxcompile.target import Target
from mxcompile.targets.cpu_matmul import Knobs
from mxcompile.tune import SessionMeasurer
from tests import arm, conftest

HOST, KEY = "127.0.0.1", "board"
CASES = [Case(fmt, 40, 70, batch, 1) for fmt in ("int3", "int4") for batch in (1, 3)]
TRIALS = tune.Limits(trials=2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A tracker's."""
    server = TrackerServer(HOST, port=21000, port_end=21999, silent=True)
    yield f"{HOST}:{server.port}"
    server.terminate()


@pytest.fixture(scope="module")
def start(address: str) -> Iterator[Callable[[str], rpc.Server]]:
    """Starts a server with a key; it is listed when the call returns."""
    started: list[rpc.Server] = []

    def one(key: str) -> rpc.Server:
        host, port = address.split(":")
        place = (host, int(port))
        options = {"port": 22000, "port_end": 22999, "silent": True}
        started.append(rpc.Server(HOST, tracker_addr=place, key=key, **options))
        while not listed(address, key):
            time.sleep(0.01)
        return started[-1]

    yield one
    for server in started:
        server.terminate()


def listed(address: str, key: str) -> int:
    try:
        return Tracker.parse(address, key).devices()
    except DeviceError:
        return 0


@pytest.fixture(scope="module")
def board(address: str, start: Callable[[str], rpc.Server]) -> Tracker:
    """Two devices, as a tracker has them."""
    for _ in range(2):
        start(KEY)
    tracker = Tracker.parse(address, KEY)
    while tracker.devices() < 2:
        time.sleep(0.01)
    return tracker


@pytest.fixture(scope="module")
def here() -> Target:
    found = [t for t in target.shipped() if t.runs_here and t.kernels == "cpu"]
    if not found:
        pytest.skip("no target's kernels run on this CPU")
    return found[0]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "STREAM_BYTES", 1 << 14)


def test_a_device_says_what_it_is(board: Tracker, here: Target) -> None:
    device = Device.connect(board, here.triple)
    assert device.machine == machine.here()


@contextmanager
def serving(command: list[str], address: str, key: str) -> Iterator[Tracker]:
    """A runner that serves, listed."""
    words = ["--serve", "--tracker", address, "--key", key, "--port", "23000"]
    with subprocess.Popen([*command, *words], stderr=subprocess.DEVNULL) as server:
        try:
            while not listed(address, key):
                assert server.poll() is None
                time.sleep(0.01)
            yield Tracker.parse(address, key)
        finally:
            server.kill()


def test_mxrun_serves_as_python_does(
    address: str, here: Target, compiled: Path, mxrun: Path, tmp_path: Path
) -> None:
    with serving([str(mxrun)], address, "mxrun") as tracker:
        first = Device.connect(tracker, here.triple)
        assert first.machine == machine.here()
        (found,) = Fleet(tracker, here, tmp_path, Progress()).tune(CASES[:1], first, TRIALS)
        assert (found.case, found.trials) == (CASES[0], 2)
        del first  # one session at a time
        rows = bench(compiled / "toy.mxc", tracker)
        assert [row["test"] for row in rows] == ["pp16", "tg4"]


def test_a_device_of_another_kind_is_measured(
    address: str, compiled_for_arm: Path, mxrun_for_arm: Path
) -> None:
    """Kernels and the runner are compiled here, for an ARM machine that is emulated."""
    where = target.find("raspberry-pi-5")
    with serving([*arm.emulator("dotprod"), str(mxrun_for_arm)], address, "arm") as tracker:
        device = Device.connect(tracker, where.triple)
        # The emulator shows this machine's /proc/cpuinfo.
        features = f"Features : {' '.join(where.requires)}\nCPU part : 0xd0b\n"
        device = replace(device, machine=replace(device.machine, cpuinfo=features))
        measurer = device.measurer(where, threading.Lock())
        assert measurer.hardware.startswith("0xd0b x")
        assert measurer.microseconds(CASES[0], Knobs()) > 0
        del device, measurer
        rows = bench(compiled_for_arm / "toy.mxc", tracker, wheels=arm.WHEELS)
        assert all(row["tokens_per_s"] > 0 for row in rows)
        wrong = pytest.raises(UsageError, match="asked to run code for x86_64-linux-gnu, says: ")
        with wrong:
            Device.connect(tracker, "x86_64-linux-gnu")


def bench(folder: Path, tracker: Tracker, **options: Any) -> list[dict[str, Any]]:
    counts: dict[str, Any] = {"prompt": 16, "generate": 4, "threads": (1,), "repetitions": 2}
    return remote.bench(folder, tracker, **counts, cache=conftest.RUNNERS, **options)


def test_two_devices_tune_side_by_side(
    board: Tracker, here: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: dict[int, list[Case]] = {}
    time_one = SessionMeasurer._time

    def watch(self: SessionMeasurer, library: Path, case: Case, copies: int) -> float:
        sessions.setdefault(id(self), []).append(case)
        return time_one(self, library, case, copies)

    monkeypatch.setattr(SessionMeasurer, "_time", watch)
    first = Device.connect(board, here.triple)
    found = list(Fleet(board, here, tmp_path, Progress()).tune(CASES, first, TRIALS))
    assert sorted(map(str, CASES)) == sorted(str(outcome.case) for outcome in found)
    assert len(sessions) == 2
    hardware = machine.here().hardware
    assert {outcome.hardware for outcome in found} == {hardware}
    kept = records.read(tmp_path / records.FILE)
    assert len(kept) == 2 * len(CASES)
    assert {record.hardware for record in kept} == {hardware}


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def mortal(
    request: pytest.FixtureRequest,
    address: str,
    start: Callable[[str], rpc.Server],
    here: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Tracker, Device]:
    """A device that dies in its first trial, the only one that goes by the test's name."""
    server = start(request.node.name)
    tracker = Tracker.parse(address, request.node.name)
    first = Device.connect(tracker, here.triple)
    time_one = SessionMeasurer._time

    def die(self: SessionMeasurer, library: Path, case: Case, copies: int) -> float:
        if self.session is first.session:
            server.terminate()
        return time_one(self, library, case, copies)

    monkeypatch.setattr(SessionMeasurer, "_time", die)
    return tracker, first


def test_a_device_that_dies_costs_its_trial(
    mortal: tuple[Tracker, Device],
    start: Callable[[str], rpc.Server],
    here: Target,
    tmp_path: Path,
) -> None:
    tracker, first = mortal
    start(tracker.key)
    while tracker.devices() < 2:
        time.sleep(0.01)
    notes = Notes()
    found = list(Fleet(tracker, here, tmp_path, notes).tune(CASES, first, TRIALS))
    assert sorted(map(str, CASES)) == sorted(str(outcome.case) for outcome in found)
    (said,) = notes.said
    assert "cannot be reached" in said and "tried again" in said
    assert len(records.read(tmp_path / records.FILE)) == 2 * len(CASES)


def test_when_all_devices_die_what_is_left_is_said(
    mortal: tuple[Tracker, Device], here: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, first = mortal
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 1)
    with pytest.raises(DeviceError, match="no device is left, 2 cases are not tuned"):
        list(Fleet(tracker, here, tmp_path, Progress()).tune(CASES[:2], first, TRIALS))


def test_what_is_silent_is_given_up() -> None:
    silent = threading.Event()
    with pytest.raises(DeviceError, match="a device did not answer in 0 s"):
        remote.answer(0.01, "a device", silent.wait)
    silent.set()


def test_a_device_that_lacks_instructions_is_refused(board: Tracker, here: Target) -> None:
    device = Device.connect(board, here.triple)
    other = next(t for t in target.shipped() if t.family not in (here.family, "cuda"))
    with pytest.raises(UsageError, match=rf"cannot run the kernels of {other.name}: it lacks "):
        device.check(other)


def test_a_benchmark_has_the_keys_of_a_local_one(
    board: Tracker, compiled: Path, mxrun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mxrun.is_file()  # compiled for other tests already
    folder = compiled / "toy.mxc"
    words = ["bench", str(folder), "-p", "16", "-n", "4", "-r", "2", "-t", "1", "--json"]
    assert cli.main(words) == 0
    local = json.loads(capsys.readouterr().out)
    far = bench(folder, board)
    measured = {"tokens_per_s", "stddev"}
    for here, there in zip(local, far, strict=True):
        assert here.keys() == there.keys()
        assert {k: v for k, v in here.items() if k not in measured} == {
            k: v for k, v in there.items() if k not in measured
        }
        assert there["tokens_per_s"] > 0


def test_what_the_device_refuses_is_said(board: Tracker, compiled: Path, mxrun: Path) -> None:
    assert mxrun.is_file()
    with pytest.raises(UsageError, match=r"says: .*is not a language model"):
        bench(compiled / "graph.mxc", board)


@pytest.mark.parametrize("verb", ["bench", "tune"])
def test_no_device_is_exit_code_6(
    verb: str, address: str, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(compiled / "toy.mxc")
    for place, key, said in (
        (address, "nobody", f"the tracker at {address} lists no device with the key 'nobody'"),
        (f"{HOST}:1", KEY, f"the tracker at {HOST}:1 cannot be reached: .*refused"),
    ):
        assert cli.main([verb, model, "--rpc", place, "--key", key]) == 6
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"mxcompile: error: {said}", line)
    for words in (["--rpc", address], ["--key", KEY], ["--rpc", "here", "--key", KEY]):
        assert cli.main([verb, model, *words]) == 2
