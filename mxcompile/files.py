"""Results that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside ``path``, to be written; it takes the place of ``path`` at the end.

    Whatever fails or interrupts the writing leaves ``path`` as it was, and no draft.
    """
    draft = path.absolute().with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
