"""Tensors where programs want them. A CPU that shares nothing stands in for a GPU."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mxcompile import devices, gpu, weights
from mxcompile.devices import Device
from mxcompile.errors import DeviceError
from mxcompile.runtime import Program, Session
from tests import toy

COPYING = Device(devices.CPU, shares=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8"])
def test_copies_come_back(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = COPYING.tensor(array.transpose(1, 0, 2))
    array[:] = 7
    expected = np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2)
    np.testing.assert_array_equal(COPYING.array(tensor), expected)


def test_shared_memory_is_not_copied() -> None:
    array = devices.aligned((4, 4), np.float32)
    tensor = Device().tensor(array)
    array[1] = 3
    assert np.shares_memory(Device().array(tensor), array)


@pytest.mark.parametrize("device", [Device(), COPYING], ids=["shared", "copied"])
def test_a_mirror_follows_in_one_copy(device: Device) -> None:
    shapes = [(1, 3), (9,), (2, 2)]
    mirror = devices.Mirror(device, shapes, np.int64)
    first = mirror.tensors[0].data_ptr()
    for count in (1, 2):
        for index, array in enumerate(mirror.arrays):
            array[...] = 10 * count + index
        mirror.refresh()
        for index, (tensor, shape) in enumerate(zip(mirror.tensors, shapes, strict=True)):
            found = device.array(tensor)
            np.testing.assert_array_equal(found, np.full(shape, 10 * count + index, np.int64))
            assert np.shares_memory(found, mirror.arrays[index]) == device.shares
    # One memory, at places that kernels may use vector loads at.
    places = [tensor.data_ptr() - first for tensor in mirror.tensors]
    assert places == [0, weights.ALIGNMENT, 3 * weights.ALIGNMENT]
    assert first % weights.ALIGNMENT == 0


def test_a_decoder_runs_on_copies(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: inputs go there at each step, logits come back, caches grow there."""
    shared = Program.load(compiled / "toy.mxc")
    bound = [COPYING.tensor(shared.device.array(weight)) for weight in shared._weights]
    program = Program(shared.artifact, shared._library, devices.interface().Array(bound), COPYING)
    tokens = np.random.default_rng(0).integers(0, toy.VOCABULARY, 700).tolist()
    session = Session(program)
    for part in (tokens[:3], tokens[3:4], tokens[4:600], tokens[600:]):
        found = session.feed(part)
    np.testing.assert_array_equal(found, toy.logits(tokens)[-1:])
    monkeypatch.setattr(session, "length", 5)
    np.testing.assert_array_equal(session.feed([9]), toy.logits([*tokens[:5], 9])[-1:])


@pytest.mark.parametrize(
    ("capability", "runs"),
    [(0, ""), (75, ""), (80, "80"), (87, "80 86 87"), (89, "80 86 87 89"), (90, "90"), (120, "")],
)
def test_machine_code_runs_on_later_minors(
    capability: int, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda: capability)
    assert gpu.features() == {f"sm_{n}" for n in runs.split()}


def test_a_tvm_without_cuda_graphs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str, *, allow_missing: bool) -> None:
        assert allow_missing and name == devices.GRAPHS

    monkeypatch.setattr(gpu, "load_tvm_runtime", lambda: None)
    monkeypatch.setattr(devices, "interface", lambda: SimpleNamespace(get_global_func=lacks))
    with pytest.raises(DeviceError, match="built without CUDA graphs"):
        Device.cuda()


def test_gpus_compute_shapes_on_the_cpu() -> None:
    assert Device().numbers == (devices.CPU,)
    assert dataclasses.replace(COPYING, number=devices.CUDA).numbers == (devices.CUDA, devices.CPU)
