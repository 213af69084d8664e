"""Promises about the code itself."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(
    path for part in ("mxcompile", "passes", "targets") for path in (ROOT / part).glob("*.py")
)

WAITING = 'os.environ.setdefault("OMP_WAIT_POLICY", "passive")'
"""What the command line tells torch's threads: no input, and the only word of the environment."""


def names(tree: ast.AST) -> Iterator[str]:
    """Every name and attribute that is read, as far as it is dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_the_library_has_no_hidden_inputs_and_does_not_print(path: Path) -> None:
    text = path.read_text()
    if path.name == "cli.py":
        text = text.replace(WAITING, "", 1)
    found = set(names(ast.parse(text)))
    assert not found & {"os.environ", "os.getenv", "os.putenv", "environ", "getenv"}
    if path.name != "cli.py":
        assert not found & {"print", "sys.stdout"}


def test_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    modules = [path.stem for path in (ROOT / "mxcompile").glob("*.py") if path.stem != "__init__"]
    assert [name for name in modules if not re.search(rf"\b{name}\b", readme)] == []


def test_readme_names_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("mxcompile", "passes", "targets", "models", "scripts", "tests"):
        assert f"`{name}/`" in readme


def test_no_module_is_a_grab_bag() -> None:
    assert not {path.stem for path in LIBRARY} & {"utils", "util", "common", "helpers", "base"}


def test_packages_are_links() -> None:
    for name in ("passes", "targets"):
        assert (ROOT / "mxcompile" / name).readlink() == Path("..") / name


def test_every_module_says_what_it_is() -> None:
    assert [
        path.name for path in LIBRARY if not ast.get_docstring(ast.parse(path.read_text()))
    ] == []
