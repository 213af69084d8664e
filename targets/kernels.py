"""The kernels of every family of machines, behind one face.

A family has a row in ``FAMILIES``; a target's TOML file names it (``[kernels] family``). Templates
make TVM functions of frozen knobs; what a function takes is the same in all families and is said
where the CPU's is defined.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol, get_args

import tvm
from tvm.tirx import PrimFunc

from mxcompile.errors import UsageError
from mxcompile.formats import ActivationFormat
from mxcompile.target import Target
from mxcompile.targets import (
    cpu_attention,
    cpu_norm,
    cpu_schedule,
    cuda_binary,
    cuda_schedule,
)
from mxcompile.targets.cpu_attention import Attention, Caches, Mask, Rotation
from mxcompile.targets.cpu_matmul import (
    Gate,
    Instructions,
    MatmulKernel,
    Norm,
    Residual,
    Source,
)
from mxcompile.targets.cpu_norm import Columns, Runs, Simd
from mxcompile.targets.cuda_attention import CudaAttention
from mxcompile.targets.cuda_matmul import CudaMatmul
from mxcompile.targets.cuda_norm import CudaNorm


class MatmulTemplates(Protocol):
    """Matrix products with packed weights; see ``cpu_matmul``."""

    def only(self, formats: tuple[str, ...]) -> "MatmulTemplates":
        """Take the formats that tiles have, so that no code is made for others."""

    def quantize_activation(self, fmt: ActivationFormat) -> PrimFunc:
        """Make ``(X, Q)``."""

    def normalize_activation(self, norm: Norm, fmt: ActivationFormat) -> PrimFunc:
        """Make ``(X, weight, Q)``."""

    def residual_activation(self, residual: Residual, fmt: ActivationFormat) -> PrimFunc:
        """Make ``(R, Y, weight, [inner,] H, Q)``."""

    def gate_activation(self, gate: Gate, fmt: ActivationFormat) -> PrimFunc:
        """Make ``(G, U, Q)``."""

    def matmul_rounded(self, source: Source, fmt: ActivationFormat) -> PrimFunc | None:
        """Make ``(*source, W, table, [H,] Y)`` for one row; None where rounding is a kernel."""

    def matmul_quantized(self, fmt: ActivationFormat) -> PrimFunc:
        """Make ``(Q, W, table, Y)``."""

    def matmul_f32(self) -> PrimFunc:
        """Make ``(X, W, table, Y)``."""

    def gather_rows(self) -> PrimFunc:
        """Make ``(ids, W, table, Y)``."""


class NormTemplates(Protocol):
    """Kernels over the columns of rows; see ``cpu_norm``."""

    def rms_norm(self, runs: Runs, eps: float) -> PrimFunc:
        """Make ``(x, weight, y)``."""

    def layer_norm(self, runs: Runs, eps: float) -> PrimFunc:
        """Make ``(x, weight, bias, y)``."""

    def softmax(self, runs: Runs) -> PrimFunc:
        """Make ``(x, y)``."""


class AttentionTemplates(Protocol):
    """Attention and rotary embedding; see ``cpu_attention``."""

    def append(self, a: Attention, caches: Caches) -> PrimFunc:
        """Make ``(k, v, past, *keys, *values)``."""

    def rotate(self, a: Attention, caches: Caches, rotation: Rotation) -> PrimFunc:
        """Make ``(q, k, v, cos, sin, [q_weight, k_weight,] past, *keys, *values, y)``."""

    def scratch(self, a: Attention) -> tuple[tuple[int, ...], ...]:
        """Shapes, for a sequence of the batch, of the float32 tensors that attention works in."""

    def attend(self, a: Attention, caches: Caches) -> PrimFunc:
        """Make ``(q, past, *keys, *values, out, *scratch)``."""

    def attend_new(self, a: Attention, caches: Caches, rotation: Rotation) -> PrimFunc | None:
        """Make, for one position, ``rotate`` and ``attend`` in one.

        It takes ``(q, k, v, cos, sin, [q_weight, k_weight,] past, *keys, *values, out, *scratch)``,
        and weights that no kernel writes. None where each is a kernel.
        """

    def attend_all(self, a: Attention, mask: Mask | None) -> PrimFunc:
        """Make ``(q, k, v, [mask,] out)``."""

    def rotary(self, heads: int, dim: int, rotated: int, source: Columns | None) -> PrimFunc:
        """Make ``(x, cos, sin, y)``."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What lowering to a family takes.

    ``schedule`` is for functions that no template made, ``pipeline`` is the name of TVM's passes
    from functions to machine code, and ``building`` is to be entered around them. With ``graphs`` a
    decode step's kernels launch as one CUDA graph.
    """

    matmul: MatmulTemplates
    norm: NormTemplates
    attention: AttentionTemplates
    schedule: Callable[[tvm.IRModule], tvm.IRModule]
    pipeline: str = "default"
    building: Callable[[], AbstractContextManager[Any]] = nullcontext
    graphs: bool = False


def of(target: Target) -> Kernels:
    """The kernels for a target.

    Raises:
        UsageError: there is no such family, or it has none for the target's instructions.
    """
    if target.kernels not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UsageError(f"target {target.name}: no kernels {target.kernels}; {known}")
    return FAMILIES[target.kernels](target)


@dataclass(frozen=True, slots=True)
class _CpuNorm:
    simd: Simd

    def rms_norm(self, runs: Runs, eps: float) -> PrimFunc:
        return cpu_norm.rms_norm(runs, eps, self.simd)

    def layer_norm(self, runs: Runs, eps: float) -> PrimFunc:
        return cpu_norm.layer_norm(runs, eps, self.simd)

    def softmax(self, runs: Runs) -> PrimFunc:
        return cpu_norm.softmax(runs, self.simd)


@dataclass(frozen=True, slots=True)
class _CpuAttention:
    simd: Simd

    def append(self, a: Attention, caches: Caches) -> PrimFunc:
        return cpu_attention.append(a, caches, self.simd)

    def rotate(self, a: Attention, caches: Caches, rotation: Rotation) -> PrimFunc:
        return cpu_attention.rotate(a, caches, rotation, self.simd)

    def scratch(self, a: Attention) -> tuple[tuple[int, ...], ...]:
        return ()

    def attend(self, a: Attention, caches: Caches) -> PrimFunc:
        return cpu_attention.attend(a, caches, self.simd)

    def attend_new(self, a: Attention, caches: Caches, rotation: Rotation) -> None:
        return None

    def attend_all(self, a: Attention, mask: Mask | None) -> PrimFunc:
        return cpu_attention.attend_all(a, mask, self.simd)

    def rotary(self, heads: int, dim: int, rotated: int, source: Columns | None) -> PrimFunc:
        return cpu_attention.rotary(heads, dim, rotated, source, self.simd)


def _cpu(target: Target) -> Kernels:
    if target.instructions not in (known := get_args(Instructions)):
        raise UsageError(
            f"target {target.name}: no instructions {target.instructions}; {', '.join(known)}"
        )
    simd = Simd(lanes=target.vector_bits // 32)
    return Kernels(
        MatmulKernel(target.instructions),  # type: ignore[arg-type]
        _CpuNorm(simd),
        _CpuAttention(simd),
        lambda mod: cpu_schedule.schedule(mod, simd),
    )


def _cuda(target: Target) -> Kernels:
    tvm_target = tvm.target.Target(dict(target.tvm))
    return Kernels(
        CudaMatmul(),
        CudaNorm(),
        CudaAttention(),
        lambda mod: cuda_schedule.schedule(mod, tvm_target),
        cuda_schedule.pipeline(),
        lambda: cuda_binary.embedding(str(target.tvm["arch"])),
        graphs=True,
    )


def _cuda_on_cpu(target: Target) -> Kernels:
    """The kernels of ``_cuda`` in a reading that shows on any CPU what they compute, not fast.

    What a CUDA graph would launch calls functions that only TVM's library for CUDA has.
    """
    return Kernels(
        CudaMatmul(splits=2, tiles=2, batches=1, rows=1, serial=True),
        CudaNorm(serial=True),
        CudaAttention(splits=2, serial=True),
        _cpu(target).schedule,
        graphs=True,
    )


FAMILIES: Final[Mapping[str, Callable[[Target], Kernels]]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "cuda-on-cpu": _cuda_on_cpu,
}
"""How to make the kernels of a family for one of its targets."""
