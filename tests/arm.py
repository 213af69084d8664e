"""ARM machines, emulated: kernels and programs that are compiled here run on them.

A driver in C++ reads commands from a pipe; see ``arm_driver.cc``. It and the programs run in qemu,
as a CPU of a kind: one that meets an instruction that it lacks dies, and the test with it.
``make arm`` installs the cross-compiler, qemu and TVM's runtime for ARM.
"""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray

from mxcompile import linker

TRIPLE = "aarch64-linux-gnu"
ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "build" / "aarch64" / "lib"
SYSROOT = Path("/usr") / TRIPLE
COMPILER, EMULATOR = f"{TRIPLE}-g++", "qemu-aarch64-static"


def require() -> None:
    """Skip the test where an ARM machine cannot be emulated."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    missing += [] if (RUNTIME / "libtvm_runtime.so").is_file() else ["TVM's runtime for ARM"]
    if missing:
        pytest.skip(f"no emulated ARM machine: {', '.join(missing)} is not here; run make arm")


@cache
def driver(folder: Path) -> Path:
    """Compile the driver; once for all machines."""
    path = folder / "arm_driver"
    include = Path(tvm_ffi.__file__).parent / "include"
    source = Path(__file__).parent / "arm_driver.cc"
    libraries = ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    options = ["-std=c++17", "-O1", f"-I{include}", f"-L{RUNTIME}", "-o", str(path)]
    subprocess.run([COMPILER, *options, str(source), *libraries], check=True)
    return path


def export(module: Any, path: Path) -> Path:
    """Link a compiled module for ARM."""

    def link(output: str, objects: list[str], **_: Any) -> None:
        linker.link(TRIPLE, output, objects)

    module.export_library(str(path), fcompile=link)
    return path


@dataclass
class Machine:
    """A running driver on an emulated CPU."""

    process: subprocess.Popen[bytes]
    folder: Path

    @classmethod
    def start(cls, cpu: str, folder: Path) -> "Machine":
        """Start one with a CPU that qemu knows by name."""
        require()
        library = f"LD_LIBRARY_PATH={RUNTIME}"
        command = [EMULATOR, "-cpu", cpu, "-L", str(SYSROOT), "-E", library, str(driver(folder))]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, stdin=pipe, stdout=pipe), folder)

    def stop(self) -> None:
        """End the driver."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def ask(self, line: str, data: bytes = b"") -> str:
        """Send a command and give what is answered after ``ok``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n" + data)
        self.process.stdin.flush()
        status, _, rest = self.process.stdout.readline().decode().rstrip("\n").partition(" ")
        if status != "ok":
            raise RuntimeError(f"the driver says of '{line}': {rest or 'nothing, it died'}")
        return rest

    def put(self, name: str, array: NDArray[Any]) -> str:
        """Copy an array to the machine under a name."""
        data = np.ascontiguousarray(array)
        shape = ",".join(map(str, data.shape))
        self.ask(f"tensor {name} {data.dtype} {shape} {data.nbytes}", data.tobytes())
        return name

    def get(self, name: str, like: NDArray[Any]) -> NDArray[Any]:
        """Copy a tensor back, which has the type and shape of ``like``."""
        assert self.process.stdout is not None
        data = self.process.stdout.read(int(self.ask(f"get {name}")))
        return np.frombuffer(data, like.dtype).reshape(like.shape)

    def run(self, function: str, *inputs: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
        """Call a kernel that writes its last argument; gives what it wrote over ``out``."""
        arrays = [*inputs, out]
        names = [self.put(f"t{i}", array) for i, array in enumerate(arrays)]
        self.ask(f"call - {function} {' '.join(names)}")
        return self.get(names[-1], out)

    def load(self, functions: dict[str, Any], options: dict[str, Any]) -> None:
        """Compile PrimFuncs and load them, in place of what was loaded."""
        target = tvm.target.Target({"kind": "llvm", "mtriple": TRIPLE, **options})
        named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
        module = tvm.tirx.build(tvm.IRModule(named), target=target)
        path = self.folder / f"{'-'.join([options['mcpu'], *functions])}.so"
        self.ask(f"kernels {export(module, path)}")
