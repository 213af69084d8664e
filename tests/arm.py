"""ARM machines, emulated: kernels and programs that are compiled here run on them.

A driver in C++ reads commands from a pipe; see ``arm_driver.cc``. It and the programs run in qemu,
as a CPU of a kind: one that meets an instruction that it lacks dies, and the test with it.
``make arm`` installs the cross-compiler, qemu and TVM's runtime for ARM.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray

from mxcompile import linker, target

TRIPLE: Final = "aarch64-linux-gnu"
ROOT: Final = Path(__file__).parent.parent
RUNTIME: Final = ROOT / "build" / "aarch64" / "lib"
WHEELS: Final = ROOT / "build" / "aarch64" / "wheels"
COMPILER, EMULATOR = f"{TRIPLE}-g++", "qemu-aarch64-static"

CPUS: Final = {"neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "max"}
"""The CPU, as qemu calls it, that a target's programs run on: the least that can, where known."""

Array = NDArray[Any]


def require() -> None:
    """Skip the test where an ARM machine cannot be emulated."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    missing += [] if (RUNTIME / "libtvm_runtime.so").is_file() else ["TVM's runtime for ARM"]
    if missing:
        pytest.skip(f"no emulated ARM machine without {', '.join(missing)}: see make arm")


def emulator(instructions: str) -> list[str]:
    """What to put before a command that runs on the CPU for a target's instructions."""
    return [EMULATOR, "-cpu", CPUS[instructions], "-L", f"/usr/{TRIPLE}"]


@cache
def machine(instructions: str) -> "Machine":
    """The machine for a target's instructions, started once; it ends when the tests do."""
    require()
    return Machine(instructions)


class Machine:
    """A running driver on an emulated CPU."""

    def __init__(self, instructions: str) -> None:
        self._target = target.find(f"arm-{instructions}")
        self._scratch = tempfile.TemporaryDirectory()
        self._count = 0
        command = [*emulator(instructions), "-E", f"LD_LIBRARY_PATH={RUNTIME}", str(self._driver())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)

    def put(self, name: str, array: Array) -> str:
        """Copy an array to the machine under a name."""
        data = np.ascontiguousarray(array)
        shape = ",".join(map(str, data.shape))
        self._ask(f"tensor {name} {data.dtype} {shape} {data.nbytes}", data.tobytes())
        return name

    def pack(self, name: str, arrays: list[Array]) -> str:
        """Copy arrays to the machine as one argument."""
        self._ask(
            " ".join([f"array {name}", *(self.put(f"{name}.{i}", a) for i, a in enumerate(arrays))])
        )
        return name

    def get(self, name: str) -> Array:
        """Copy a tensor back."""
        assert self._process.stdout is not None
        dtype, shape, size = self._ask(f"get {name}").split(" ")
        data = self._process.stdout.read(int(size))
        return np.frombuffer(data, dtype).reshape([int(d) for d in shape.split(",") if d])

    def call(self, out: str, library: str, function: str, *arguments: str) -> None:
        """Call a function on what has the names ``arguments``; its result is ``out`` then."""
        self._ask(f"call {out} {library} {function} {' '.join(arguments)}")

    def kernels(self, functions: Mapping[str, Any]) -> Callable[..., Any]:
        """Compile PrimFuncs; what is given calls one and returns its last arguments."""
        named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
        library = self._load("kernels", tvm.tirx.build(tvm.IRModule(named), self._tvm_target()))

        def call(function: str, *arrays: Array, outputs: int = 1) -> Any:
            names = [self.put(f"x{i}", array) for i, array in enumerate(arrays)]
            self.call("out", library, function, *names)
            found = [self.get(name) for name in names[-outputs:]]
            return found if outputs > 1 else found[0]

        return call

    def program(self, module: Any) -> Callable[..., Any]:
        """Compile a Relax module; what is given calls its ``main`` as the VM would.

        Tensors that TVM made are updated in place; what is returned has ``numpy()``.
        """
        library = self._load("program", tvm.compile(module, target=self._tvm_target()))

        def call(*arguments: Any) -> Any:
            arrays = [a if isinstance(a, np.ndarray) else a.numpy() for a in arguments]
            names = [self.put(f"x{i}", array) for i, array in enumerate(arrays)]
            self.call("out", library, "main", *names)
            for name, argument in zip(names, arguments, strict=True):
                if not isinstance(argument, np.ndarray):
                    argument.copyfrom(self.get(name))
            return tvm.runtime.tensor(self.get("out"))

        return call

    def load(self, path: Path) -> str:
        """Load a compiled program; gives its name."""
        self._count += 1
        name = f"library{self._count}"
        self._ask(f"program {name} {path}")
        return name

    def _load(self, kind: str, module: Any) -> str:
        self._count += 1
        name = f"library{self._count}"
        path = Path(self._scratch.name) / f"{name}.so"
        module.export_library(str(path), fcompile=_link)
        self._ask(f"{kind} {name} {path}")
        return name

    def _tvm_target(self) -> Any:
        return tvm.target.Target({**self._target.tvm, "num-cores": 2})

    def _driver(self) -> Path:
        path = Path(self._scratch.name) / "driver"
        include = Path(tvm_ffi.__file__).parent / "include"
        source = Path(__file__).parent / "arm_driver.cc"
        options = ["-std=c++17", "-O1", f"-I{include}", f"-L{RUNTIME}", "-o", str(path)]
        libraries = ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
        subprocess.run([COMPILER, *options, str(source), *libraries], check=True)
        return path

    def _ask(self, line: str, data: bytes = b"") -> str:
        """Send a command and give what is answered after ``ok``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n" + data)
        self._process.stdin.flush()
        status, _, rest = self._process.stdout.readline().decode().rstrip("\n").partition(" ")
        if status != "ok":
            raise RuntimeError(f"the driver says of '{line}': {rest or 'nothing, it died'}")
        return rest


def build(builder: Any, path: Path) -> None:
    """Compile what a BlockBuilder holds for any ARM machine."""
    compiling = tvm.target.Target({"kind": "llvm", "mtriple": TRIPLE, "num-cores": 2})
    tvm.compile(builder.get(), target=compiling).export_library(str(path), fcompile=_link)


def _link(output: str, objects: list[str], **_options: Any) -> None:
    linker.link(TRIPLE, output, objects)
