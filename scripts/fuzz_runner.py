"""Damage an artifact in thousands of ways and hold mxrun to its promise: an error, never a crash.

mxrun is built with AddressSanitizer and UndefinedBehaviorSanitizer. Where a file is damaged, its
sha256 and the manifest's digest are usually computed anew, so that the damage gets past them and
reaches what reads the file. Arrays for ``--input`` are damaged too.

    python scripts/fuzz_runner.py OUT.mxc --count 10000 --seed 0
"""

import argparse
import copy
import json
import os
import platform
import random
import select
import shutil
import string
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from mxcompile import artifact as artifacts
from mxcompile import deploy

SANITIZE: Final = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPTIONS: Final = "detect_leaks=0:allocator_may_return_null=1"
"""For AddressSanitizer: TVM's libraries keep what they allocate until the end."""

TIMEOUT: Final = 60.0
ALLOWED: Final = {0, 2, 5}
"""Exit codes that may come of a damaged file; 1 would be a bug, a signal a worse one."""

ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 1e308, 0.5, "", "x", "é" * 500, "\0"),
    *(
        [],
        {},
        ["a", "b"],
        {"type": "Sequence"},
        "Sequence",
        "ByteLevel",
        "BPE",
        "float64",
        "decoder",
    ),
    *("(" * 40, "(a|b)*", "[^\\p{L}]++", "(?=a)|b{2,5}?", "x" * 20000, "<0x41>", "▁"),
)
"""What a value is replaced by."""


def somewhere(rng: random.Random, data: Any) -> tuple[Any, Any] | None:
    """A container in ``data`` and one of its keys; what lies near the top is likelier."""
    found = None
    while isinstance(data, dict | list) and data:
        key = rng.choice(list(data)) if isinstance(data, dict) else rng.randrange(len(data))
        found, data = (data, key), data[key]
        if rng.random() < 0.2:
            break
    return found


def damage_values(rng: random.Random, data: Any) -> Any:
    """A copy of JSON data with a few values replaced, swapped, removed or changed."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if (place := somewhere(rng, data)) is None:
            return rng.choice(ODD)
        container, key = place
        match rng.randrange(6):
            case 0 | 1:
                container[key] = copy.deepcopy(rng.choice(ODD))
            case 2 if (other := somewhere(rng, data)) is not None:
                container[key] = copy.deepcopy(other[0][other[1]])
            case 3:
                del container[key]
            case _ if isinstance(container[key], bool):
                container[key] = not container[key]
            case _ if isinstance(container[key], int):
                container[key] += rng.choice((-1, 1, 8, 1000, 2**40))
            case _ if isinstance(container[key], str):
                raw = damage_bytes(rng, container[key].encode())
                container[key] = raw.decode(errors="replace")
    return data


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of ``data`` with a few bytes changed, cut, repeated or put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(found) + 1), rng.randrange(1, 40)
        match rng.randrange(5):
            case 0:
                for i in range(at, min(at + rng.choice((1, 1, size)), len(found))):
                    found[i] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + size]
            case 2:
                found[at:at] = found[at : at + size]
            case 3:
                found[at:at] = rng.choice((b"[" * 200, b'{"a":' * 99, b"\\u0000", b"9" * 30, b'"'))
            case 4:
                del found[at:]
    return bytes(found)


def damage_json(rng: random.Random, raw: bytes) -> bytes:
    """JSON text, damaged as data or as bytes."""
    if rng.random() < 0.3:
        return damage_bytes(rng, raw)
    return json.dumps(damage_values(rng, json.loads(raw))).encode()


def damage_weights(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with another header, or with a header of another length."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header, body = damage_json(rng, raw[8:end]), raw[end:]
    length = len(header)
    if rng.random() < 0.2:
        length = rng.choice((0, 1, length - 1, length + 1, len(raw), 2**32, 2**63, 2**64 - 1))
    if rng.random() < 0.2:
        body = body[: rng.randrange(len(body) + 1)]
    return length.to_bytes(8, "little") + header + body


def seal(folder: Path) -> None:
    """Compute each file's record and the manifest's digest anew."""
    path = folder / artifacts.MANIFEST
    data = json.loads(path.read_bytes())
    for name in data["files"]:
        if (folder / name).is_file():
            record = artifacts._record(folder / name)
            data["files"][name] = {"sha256": record.sha256, "bytes": record.bytes}
    sign(path, data)


def sign(path: Path, data: Any) -> None:
    """Write manifest data with its digest."""
    if isinstance(data, dict):
        data.pop("digest", None)
        data["digest"] = artifacts._digest(data)
    path.write_text(json.dumps(data))


def damage(rng: random.Random, original: Path, folder: Path) -> str:
    """Make a damaged copy of an artifact; gives what was done to it."""
    shutil.copytree(original, folder, copy_function=os.link)  # what is damaged is replaced
    manifest = folder / artifacts.MANIFEST
    kind = rng.choice(("manifest", "weights", "tokenizer", "tokenizer", "unsigned"))
    if kind == "tokenizer" and not (folder / "tokenizer.json").exists():
        kind = "weights"
    if kind == "manifest":
        data = damage_values(rng, json.loads(manifest.read_bytes()))
        manifest.unlink()
        sign(manifest, data)
    elif kind == "unsigned":
        names = [path.name for path in folder.iterdir()]
        replace(folder / rng.choice(sorted(names)), lambda raw: damage_bytes(rng, raw))
    else:
        name, change = {
            "weights": (artifacts.WEIGHTS, damage_weights),
            "tokenizer": ("tokenizer.json", damage_json),
        }[kind]
        replace(folder / name, lambda raw: change(rng, raw))
        replace(manifest, lambda raw: raw)
        seal(folder)
    return kind


def replace(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite a file without changing others that share its content."""
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(change(raw))


def build(cache: Path) -> tuple[Path, Path]:
    """Build the driver and mxrun with sanitizers; gives both programs."""
    versions = {name: metadata.version(package) for name, (package, _) in deploy.LIBRARIES.items()}
    with deploy.runtime(platform.machine(), versions, None) as found:
        mxrun, library = deploy.build_runner(found, None, cache, SANITIZE)
        for path in found.libraries:
            shutil.copy(path, mxrun.parent)
    driver = mxrun.parent / "fuzz_runner"
    words = ["cc", *SANITIZE, "-Wall", "-Wextra", "-Werror", f"-I{deploy.sources()}"]
    words += [str(Path(__file__).with_suffix(".c")), str(library), "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*words, f"-Wl,-rpath-link,{mxrun.parent}", "-o", str(driver)], check=True)
    return driver, mxrun


class Driver:
    """The driver's process, started again where it dies."""

    def __init__(self, program: Path, log: Path) -> None:
        self._program, self._log = program, log
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("wb"),
            env={"ASAN_OPTIONS": OPTIONS},
        )

    def ask(self, folder: Path) -> tuple[int, str]:
        """What comes of an artifact: an exit code, or -1 for a crash, and an error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n".encode())
        self._process.stdin.flush()
        ready = select.select([self._process.stdout], [], [], TIMEOUT)[0]
        answer = self._process.stdout.readline() if ready else b""
        if not answer:
            self._process.kill()
            self._process.wait()
            said = self._log.read_text(errors="replace")
            self._start()
            return -1, said if ready else f"no answer in {TIMEOUT} s"
        code, _, text = answer.decode(errors="replace").partition(" ")
        return int(code), text.strip()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def fuzz_arrays(rng: random.Random, mxrun: Path, model: Path, work: Path) -> tuple[int, str]:
    """Run the model on a damaged .npz."""
    path = work / "in.npz"
    arrays: dict[str, Any] = {"x": np.ones((3, 4), np.float32), "y": np.zeros((3, 4), np.float16)}
    arrays |= {"input_ids": np.arange(5)[None], "z": np.asfortranarray(np.arange(6).reshape(2, 3))}
    rng.choice((np.savez, np.savez_compressed))(path, **arrays)
    path.write_bytes(damage_bytes(rng, path.read_bytes()))
    done = subprocess.run(
        [mxrun, model, "--input", path, "--output", work / "out.npz"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        env={"ASAN_OPTIONS": OPTIONS},
        check=False,
    )
    lines = done.stderr.splitlines()
    crashed = done.returncode not in ALLOWED or len(lines) != 1
    return (-1 if crashed else done.returncode), done.stderr


def main() -> int:
    """Fuzz; gives 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--count", type=int, default=10000, help="damaged artifacts")
    parser.add_argument("--arrays", type=int, help="damaged .npz files (default: count / 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path.home() / deploy.CACHE)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    program, mxrun = build(args.cache)
    found: Counter[str] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # A copy, so that hard links to it cross no file system.
        original = Path(shutil.copytree(args.artifact, work / "original"))
        driver = Driver(program, work / "log")
        code, text = driver.ask(original)
        if code not in ALLOWED:
            sys.exit(f"the artifact itself gives {code}: {text}")
        for number in range(args.count):
            folder = work / "".join(rng.choices(string.ascii_lowercase, k=12))
            kind = damage(rng, original, folder)
            code, text = driver.ask(folder)
            found[f"{kind} {code}"] += 1
            if code not in ALLOWED:
                bad += 1
                kept = Path(f"fuzz-{args.seed}-{number}.mxc")
                shutil.copytree(folder, kept)
                print(f"{kept}: {kind}: {code} {text}", flush=True)
            shutil.rmtree(folder)
        driver.close()
        for number in range(args.count // 20 if args.arrays is None else args.arrays):
            code, text = fuzz_arrays(rng, mxrun, original, work)
            found[f"arrays {code}"] += 1
            if code not in ALLOWED:
                bad += 1
                shutil.copy(work / "in.npz", f"fuzz-{args.seed}-{number}.npz")
                print(f"fuzz-{args.seed}-{number}.npz: {text}", flush=True)
    for what, count in sorted(found.items()):
        print(f"{what}: {count}")
    print(f"{sum(found.values())} damaged, {bad} findings")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
