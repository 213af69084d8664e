"""Set up what tests need to run programs on an emulated ARM machine.

TVM's runtime for ARM comes from the package index, into build/aarch64: the wheels, which
`mxcompile deploy --wheels` takes too, and their libraries. The cross-compiler and qemu come from
Debian's packages, where this may install them. What cannot be had is said; tests then skip.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "build" / "aarch64"
PACKAGES = ("apache-tvm", "apache-tvm-ffi")
LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")
TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
}


def fetch_runtime() -> bool:
    """Download the wheels for ARM of what is installed here, and unpack two libraries."""
    if all((FOLDER / "lib" / name).is_file() for name in LIBRARIES):
        return True
    wheels = FOLDER / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels)]
    command += ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_aarch64"]
    command += [f"{package}=={metadata.version(package)}" for package in PACKAGES]
    if subprocess.run(command, check=False).returncode:
        return False
    (FOLDER / "lib").mkdir(exist_ok=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name in LIBRARIES:
                    (FOLDER / "lib" / Path(name).name).write_bytes(archive.read(name))
    return True


def install_tools() -> bool:
    """Install the tools that are missing, as root on Debian."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update", "-qq"], ["install", "-qq", "-y", *missing]):
            with suppress(subprocess.TimeoutExpired):  # where no mirror answers
                subprocess.run(
                    ["apt-get", *command], check=False, stdout=subprocess.DEVNULL, timeout=300
                )
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        print(f"install {' '.join(missing)} to emulate an ARM machine")
    return not missing


def main() -> None:
    """Set up what can be, and say whether ARM programs can be tested."""
    ready = [fetch_runtime(), install_tools()]
    print(f"tests on an emulated ARM machine {'can run' if all(ready) else 'will be skipped'}")


if __name__ == "__main__":
    main()
