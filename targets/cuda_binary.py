"""CUDA source to machine code, on a machine that may have neither a GPU nor a driver.

``embedding`` makes TVM put a cubin into every library that it builds, and never source or PTX that
the device would have to compile. TVM does so by itself only where a driver is installed; elsewhere
it embeds the source. Two things are missing then, and are supplied here: a compiler, which is nvcc
or NVRTC from the package index, and the class of TVM's CUDA modules, whose library is linked to the
driver. The latter only has to write its module down, so a driver of the same name that refuses
every call will do.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tvm_ffi

from mxcompile import gpu
from mxcompile.errors import UsageError

HOW: Final = (
    "put nvcc of CUDA 13 on the PATH, or "
    "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt"
)
"""What to install for CUDA targets."""

_CALLBACK: Final = "tvm_callback_cuda_compile"

_DRIVER_CALLS: Final = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
"""What TVM's library takes from the driver."""

_EM_CUDA: Final = 190  # in the header of an ELF file
_NO_DEVICE: Final = 100  # CUDA_ERROR_NO_DEVICE


@contextmanager
def embedding(arch: str) -> Iterator[None]:
    """While this lasts, TVM compiles CUDA source to a cubin for ``arch``, such as "sm_80".

    Raises:
        UsageError: there is no CUDA compiler here; the text says what to install.
        DeviceError: there is no CUDA runtime library.
    """
    if shutil.which("nvcc") is None and _nvrtc_wheels() is None:
        raise UsageError(f"no CUDA compiler for {arch}: {HOW}")
    _load_module_class()
    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(_CALLBACK, lambda code: cubin(code, arch), override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def cubin(source: str, arch: str) -> bytes:
    """Compile CUDA C++ for one architecture.

    Raises:
        RuntimeError: the compiler refuses the source.
    """
    if nvcc := shutil.which("nvcc"):
        return _nvcc(nvcc, source, arch)
    root = _nvrtc_wheels()
    assert root is not None
    return _nvrtc(root, source, arch)


def _nvcc(nvcc: str, source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="mxcompile-cuda-") as folder:
        code, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        code.write_text(source)
        command = [nvcc, "--cubin", "-O3", "-w", f"-arch={arch}", "-o", str(binary), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"nvcc cannot compile the kernels: {'; '.join(errors[:3])}")
        return binary.read_bytes()


def _nvrtc_wheels() -> Path | None:
    root = gpu.wheels()
    return root if root is not None and (root / "lib" / "libnvrtc.so.13").is_file() else None


def _nvrtc(wheels: Path, source: str, arch: str) -> bytes:
    library = ctypes.CDLL(str(wheels / "lib" / "libnvrtc.so.13"))
    program = ctypes.c_void_p()

    def call(name: str, *arguments: Any) -> None:
        if status := getattr(library, name)(*arguments):
            raise RuntimeError(f"{name} failed with status {status}: {log()}")

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{kind}", program, buffer)
        return buffer.raw

    def log() -> str:
        return text("ProgramLog").rstrip(b"\0").decode(errors="replace") if program else ""

    include = wheels / "include"
    options = ["-w", f"--gpu-architecture={arch}", f"-I{include}", f"-I{include / 'cccl'}"]
    flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        call("nvrtcCompileProgram", program, len(options), flags)
        return text("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _load_module_class() -> None:
    """Load TVM's CUDA runtime library: with the driver, or else with one that refuses all calls."""
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        _load_driver_of_no_device()
    gpu.load_tvm_runtime()


def _load_driver_of_no_device() -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UsageError("a C compiler is needed to compile for CUDA without a driver")
    with tempfile.TemporaryDirectory(prefix="mxcompile-cuda-") as folder:
        code, library = Path(folder) / "driver.c", Path(folder) / "libcuda.so.1"
        code.write_text(
            "\n".join(f"int {n}(void) {{ return {_NO_DEVICE}; }}" for n in _DRIVER_CALLS)
        )
        options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(code)]
        subprocess.run([compiler, *options], capture_output=True, check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def cubins(library: bytes) -> list[str]:
    """The architectures, such as "sm_80", of the CUDA ELF files within a file, in order."""
    found, at = [], library.find(b"\x7fELF")
    while at >= 0:
        machine = int.from_bytes(library[at + 18 : at + 20], "little")
        if machine == _EM_CUDA:
            flags = int.from_bytes(library[at + 48 : at + 52], "little")
            found.append(f"sm_{flags >> 8 & 0xFF}")
        at = library.find(b"\x7fELF", at + 4)
    return found


def has_source(library: bytes) -> bool:
    """Whether a file holds CUDA source or PTX, which a device would have to compile."""
    return any(mark in library for mark in (b"__global__", b".visible .entry"))
