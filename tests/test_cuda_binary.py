"""CUDA programs compiled on a machine that needs no GPU: what is in them, and what is not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tvm

from mxcompile import gpu, linker
from mxcompile.errors import UsageError
from mxcompile.formats import ACTIVATION_FORMATS, CACHE_FORMATS
from mxcompile.targets import cuda_binary
from mxcompile.targets.cpu_attention import Attention, Caches
from mxcompile.targets.cpu_matmul import Norm
from mxcompile.targets.cpu_norm import Runs
from mxcompile.targets.cuda_attention import CudaAttention
from mxcompile.targets.cuda_matmul import CudaMatmul
from mxcompile.targets.cuda_norm import CudaNorm
from tests.cuda import build_cuda, machine, require_compiler

SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
NORM = CudaNorm().rms_norm(Runs(64), 1e-6)


@pytest.mark.parametrize("arch", [f"sm_{number}" for number in gpu.ARCHITECTURES])
def test_libraries_hold_machine_code_and_no_source(arch: str, tmp_path: Path) -> None:
    require_compiler()
    try:
        linker.find(machine(arch).triple)
    except UsageError as error:  # a Jetson's host is ARM
        pytest.skip(str(error))
    built = build_cuda(tvm.IRModule({"norm": NORM.with_attr("global_symbol", "norm")}), arch)
    path = tmp_path / "norm.so"

    def link(output: str, objects: list[str], **_options: Any) -> None:
        linker.link(machine(arch).triple, output, objects)

    tvm.runtime.Executable(built).export_library(str(path), fcompile=link)
    library = path.read_bytes()
    assert cuda_binary.cubins(library) == [arch]
    assert not cuda_binary.has_source(library)


def test_source_and_ptx_are_told() -> None:
    require_compiler()
    assert cuda_binary.has_source(SOURCE.encode())
    assert cuda_binary.has_source(b".version 9.0\n.visible .entry twice(")
    assert not cuda_binary.has_source(cuda_binary.cubin(SOURCE, "sm_80"))


def test_nvrtc_of_the_package_index_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu.wheels() is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cuda_binary.cubins(cuda_binary.cubin(SOURCE, "sm_87")) == ["sm_87"]


def test_what_is_not_cuda_is_refused_with_the_reason() -> None:
    require_compiler()
    with pytest.raises(RuntimeError, match="undefined"):
        cuda_binary.cubin(SOURCE.replace("threadIdx", "nothing"), "sm_80")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu, "wheels", lambda: None)
    with (
        pytest.raises(UsageError, match="pip install nvidia-cuda-nvrtc"),
        cuda_binary.embedding("sm_80"),
    ):
        pass


def test_tvm_keeps_its_barriers_out_of_kernels() -> None:
    """A barrier that TVM adds could stand in a loop that not all threads run."""
    require_compiler()
    caches = Caches(CACHE_FORMATS["int4"], CACHE_FORMATS["fp16"])
    attend = CudaAttention().attend(Attention(4, 2, 64, 0.125, window=9), caches)
    for kernel in (attend, NORM, CudaMatmul().gather_rows()):
        built = build_cuda(tvm.IRModule({"k": kernel.with_attr("global_symbol", "k")}), "sm_80")
        source = built.imports[0].inspect_source()
        assert source.count("__syncthreads") == str(kernel).count("tvm_storage_sync")


@pytest.mark.parametrize(("arch", "overlaps"), [("sm_89", False), ("sm_90", True)])
def test_kernels_overlap_where_the_gpu_can(arch: str, overlaps: bool, tmp_path: Path) -> None:
    """A kernel that starts early waits, and nothing lets the compiler read before it does."""
    require_compiler()
    rounded = (
        CudaMatmul().only(("int4",)).matmul_rounded(Norm(64, 1e-6), ACTIVATION_FORMATS["int8"])
    )
    assert rounded is not None
    built = build_cuda(tvm.IRModule({"k": rounded.with_attr("global_symbol", "k")}), arch)
    source = built.imports[0].inspect_source()
    body = source[source.rindex("__global__") :]
    assert body.index("mxcompile_release()") < body.index("mxcompile_wait()")
    assert "__launch_bounds__(256, 3)" in body
    assert ("__restrict__" not in body) == overlaps
    path = tmp_path / "k.so"
    built.export_library(str(path))
    assert (b"use_programtic_dependent_launch" in path.read_bytes()) == overlaps
