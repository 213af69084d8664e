"""The weight file: safetensors, written as a stream and mapped, not read.

The format asks for a header and then the tensors' bytes without holes. The header is padded with
spaces (which readers skip) and tensors whose size is a multiple of ``ALIGNMENT`` come first, so
these begin at aligned places of the file and a kernel can use them where they are mapped.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mxcompile.errors import ArtifactError

ALIGNMENT: Final = 64
"""Bytes: a cache line, and the widest vector."""

_DTYPES: Final = {
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
}
_NAMES: Final = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write ``tensors`` one after another; no more than one is copied at a time."""
    order = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT != 0)
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = _NAMES[tensors[name].dtype], tensors[name].shape
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def read(path: Path) -> dict[str, NDArray[Any]]:
    """Map the tensors of a file that ``write`` wrote, copy on write.

    Raises:
        ArtifactError: the file is not what its header says.
    """
    try:
        data = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        return dict(_slices(header, data[start:]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path.name} is not a weight file: {error}") from error


def _slices(header: Any, data: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= data.size or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} lies outside")
        yield name, data[begin:end].view(dtype).reshape(shape)
