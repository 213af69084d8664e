"""A file that is there whole or not at all."""

from pathlib import Path

import pytest

from mxcompile.files import whole


def test_a_draft_takes_the_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_file_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write() -> None:
        with whole(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
