"""Caches of keys and values: where a model has them, and what their formats mean.

``encode`` and ``decode`` are the semantics that kernels and ONNX functions are tested against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir

from mxcompile import graph
from mxcompile.errors import PlanError
from mxcompile.formats import CACHE_FORMATS, GROUP, LEAST_SCALE, CacheFormat

Array: TypeAlias = np.ndarray[Any, Any]

FLOAT: Final = CACHE_FORMATS["fp32"]
"""What is cached as it is."""


def encode(x: Array, fmt: CacheFormat) -> tuple[Array, ...]:
    """What a cache of a format holds for float32 rows [..., dim]: a tensor for each of its parts.

    Two codes of 4 bits share a byte: columns c and c + 16 of each 32, the first in the low bits.
    """
    if not fmt.scaled:
        return (x.astype(fmt.dtype),)
    by_group = x.reshape(*x.shape[:-1], -1, GROUP)
    high, low = by_group.max(-1), by_group.min(-1)
    peak = np.where(high > -low, high, low)
    scales = (peak / np.float32(fmt.lowest)).astype(np.float16)
    scales = np.where(scales == 0, np.float16(LEAST_SCALE), scales)
    codes = np.rint(by_group / scales.astype(np.float32)[..., None])
    codes = codes.clip(fmt.lowest, -fmt.lowest - 1).astype(np.int8)
    if fmt.bits == 4:
        nibbles = codes.astype(np.uint8) & 15
        codes = nibbles[..., : GROUP // 2] | nibbles[..., GROUP // 2 :] << 4
    return codes.reshape(*x.shape[:-1], -1), scales


def decode(parts: Sequence[Array], fmt: CacheFormat) -> Array:
    """The float32 rows [..., dim] that a cache's tensors stand for."""
    if not fmt.scaled:
        return parts[0].astype(np.float32)
    codes, scales = parts
    if fmt.bits == 4:
        by_group = codes.reshape(*scales.shape, GROUP // 2)
        nibbles = np.concatenate([by_group & 15, by_group >> 4], axis=-1).astype(np.int8)
        codes = (nibbles ^ 8) - 8
    by_group = codes.reshape(*scales.shape, GROUP).astype(np.float32)
    result: Array = by_group * scales.astype(np.float32)[..., None]
    return result.reshape(*scales.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache of a model.

    Attributes:
        name: Of the graph input that holds it, as ``past_key_values.0.key``.
        rounded: The name of what is appended to it.
        kv_heads: Its heads.
        head_dim: Columns of a head.
        is_key: Whether it holds keys, not values.
    """

    name: str
    rounded: str
    kv_heads: int
    head_dim: int
    is_key: bool

    def bytes(self, fmt: CacheFormat) -> int:
        """The bytes of one position."""
        return self.kv_heads * fmt.row_bytes(self.head_dim)

    def check(self, fmt: CacheFormat) -> None:
        """Raise PlanError when its heads do not fit a format."""
        if not fmt.takes(self.head_dim):
            raise PlanError(
                f"{self.name} has heads of {self.head_dim} columns: {fmt} takes multiples of "
                f"{GROUP}"
            )


def find(model: ir.Model) -> list[Cache]:
    """The caches of a canonical model, in the order of its layers: keys, then values of each."""
    found = []
    for node in graph.select(model.graph, "Attention"):
        for slot in (1, 2):
            new, past = node.inputs[slot], node.inputs[slot + 3] if len(node.inputs) > 5 else None
            if new is None or past is None or not past.is_graph_input() or past.shape is None:
                continue
            heads, dim = past.shape[1], past.shape[3]
            if isinstance(heads, int) and isinstance(dim, int):
                found.append(Cache(graph.name(past), graph.name(new), heads, dim, slot == 1))
    return found
