"""Devices over TVM's RPC: a tracker and two servers on this machine stand for them."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tvm import rpc
from tvm.rpc.tracker import Tracker as TrackerServer

from mxcompile import cli, machine, records, remote, target, tune
from mxcompile.errors import DeviceError, UsageError
from mxcompile.progress import Progress
from mxcompile.records import Case
from mxcompile.remote import Device, Fleet, Tracker
from mxcompile.target import Target
from mxcompile.tune import SessionMeasurer
from tests import conftest

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


def dies_in_its_first_trial(
    first: Device, server: rpc.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_one = SessionMeasurer._time

    def die(self: SessionMeasurer, library: Path, case: Case, copies: int) -> float:
        if self.session is first.session:
            server.terminate()
        return time_one(self, library, case, copies)

    monkeypatch.setattr(SessionMeasurer, "_time", die)


def test_a_device_that_dies_costs_its_trial(
    address: str,
    start: Callable[[str], rpc.Server],
    here: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mortal = start("mortal")
    tracker = Tracker.parse(address, "mortal")
    first = Device.connect(tracker, here.triple)
    start("mortal")
    while tracker.devices() < 2:
        time.sleep(0.01)
    dies_in_its_first_trial(first, mortal, monkeypatch)
    notes = Notes()
    found = list(Fleet(tracker, here, tmp_path, notes).tune(CASES, first, TRIALS))
    assert sorted(map(str, CASES)) == sorted(str(outcome.case) for outcome in found)
    (said,) = notes.said
    assert "cannot be reached" in said and "tried again" in said
    assert len(records.read(tmp_path / records.FILE)) == 2 * len(CASES)


def test_when_all_devices_die_what_is_left_is_said(
    address: str,
    start: Callable[[str], rpc.Server],
    here: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = start("only")
    tracker = Tracker.parse(address, "only")
    first = Device.connect(tracker, here.triple)
    dies_in_its_first_trial(first, only, monkeypatch)
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
    far = remote.bench(
        folder,
        board,
        prompt=16,
        generate=4,
        threads=(1,),
        repetitions=2,
        cache=conftest.RUNNERS,
    )
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
        remote.bench(
            compiled / "graph.mxc",
            board,
            prompt=1,
            generate=1,
            threads=(),
            repetitions=1,
            cache=conftest.RUNNERS,
        )


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
