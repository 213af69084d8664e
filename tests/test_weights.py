"""The weight file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mxcompile import weights
from mxcompile.errors import ArtifactError

TENSORS: dict[str, NDArray[Any]] = {
    "norm": np.arange(5, dtype=np.float32),
    "packed": np.arange(256, dtype=np.uint8),
    "half": np.arange(64, dtype=np.float16).reshape(2, 32),
    "none": np.zeros((0, 4), np.float32),
    "turned": np.arange(32, dtype=np.int64).reshape(4, 8).T,
    "scalar": np.array(3, np.int32),
}


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    weights.write(tmp_path / "w", TENSORS)
    found = weights.read(tmp_path / "w")
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(found[name], expected, strict=True)


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    weights.write(tmp_path / "w", TENSORS)
    for name, found in load_file(tmp_path / "w").items():
        np.testing.assert_array_equal(found, TENSORS[name], strict=True)


def test_whole_lines_are_aligned_in_the_file_and_in_memory(tmp_path: Path) -> None:
    weights.write(tmp_path / "w", TENSORS)
    for name, found in weights.read(tmp_path / "w").items():
        if found.nbytes % weights.ALIGNMENT == 0 and found.nbytes:
            assert found.ctypes.data % weights.ALIGNMENT == 0, name
    content = (tmp_path / "w").read_bytes()
    assert content.index(TENSORS["packed"].tobytes()) % weights.ALIGNMENT == 0


def test_writing_to_what_is_mapped_leaves_the_file_alone(tmp_path: Path) -> None:
    weights.write(tmp_path / "w", TENSORS)
    weights.read(tmp_path / "w")["packed"][:] = 0
    np.testing.assert_array_equal(weights.read(tmp_path / "w")["packed"], TENSORS["packed"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 64,
        (9).to_bytes(8, "little") + b"not json!",
        (2).to_bytes(8, "little") + b"[]",
        (61).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[4000],"data_offsets":[0,16000]}}',
        (53).to_bytes(8, "little") + b'{"x":{"dtype":"X9","shape":[0],"data_offsets":[0,0]}}',
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ArtifactError, match="w is not a weight file"):
        weights.read(tmp_path / "w")
