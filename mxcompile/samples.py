"""Samples of a model's inputs: what calibration runs on, and other ones to verify with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mxcompile import graph, written
from mxcompile.default_text import default_texts
from mxcompile.errors import UnsupportedError, UsageError
from mxcompile.float_model import Feed
from mxcompile.text import TextModel

Array: TypeAlias = np.ndarray[Any, Any]

ROWS: Final = 45
SEQUENCES: Final = 40
"""Rows that are taken from all texts, and those of them that calibrate: of five texts all but the
last row of each."""

LENGTH: Final = 256
PROBE_SEQUENCES: Final = 2
PROBE_LENGTH: Final = 128
"""Texts in tokens: for statistics, and shorter ones for the many runs that measure factors."""

SPAN: Final = 12
"""Characters that are read for each token wanted; source code has many a token of spaces."""

VERIFY_LENGTH: Final = 128
"""Tokens of each text that verification reads, of every kind that calibrates one: what is predicted
is the damage on their mixture. Enough to tell a broken kernel from rounding. What the model writes
is left out: in languages that it hardly knows a text has ten times the damage of others."""

FREE_SIZE: Final = 64
"""What a free dimension other than the batch is taken to be where nothing tells."""

NOISE_SAMPLES: Final = 4


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs for calibration, for its probes, and for verification.

    ``texts`` are token windows for language models; ``verify`` are whole feeds for all others.
    ``begin`` is what begins a text that the model itself is to write, as more to calibrate on; None
    where it is not to.
    """

    feeds: Sequence[Feed]
    probes: Sequence[Feed]
    verify: Sequence[Feed]
    texts: Sequence[Sequence[int]] = ()
    begin: Sequence[int] | None = None

    @classmethod
    def find(cls, model: ir.Model, path: Path, given: Path | None) -> Self:
        """Samples from ``given``, or what can be had without it.

        A model over tokens reads text with the tokenizer beside it: the file, or a broad text that
        any machine has. Another model reads the arrays of an .npz file, one for each input with
        samples along the first axis, or noise.

        Raises:
            UsageError: the file or the tokenizer cannot be read or does not fit the model.
        """
        if any(v.name == "input_ids" for v in model.graph.inputs):
            return cls._of_text(model, path, given)
        feeds = _arrays(model, given) if given is not None else _noise(model)
        return cls(feeds, feeds[:1], feeds[-1:])

    @classmethod
    def _of_text(cls, model: ir.Model, path: Path, given: Path | None) -> Self:
        tokenizer = TextModel.beside(path.parent)
        texts = default_texts() if given is None else [_read(given)]
        length, probe = LENGTH, PROBE_LENGTH
        limit = _longest(model)
        rows = text_tokens(tokenizer.encode, texts, ROWS, min(length, limit))
        held = _held(tokenizer.encode, texts, rows, min(VERIFY_LENGTH, limit))
        rows = rows[:SEQUENCES]
        probes = rows[:PROBE_SEQUENCES, : min(probe, limit)]
        return cls(
            token_feeds(model, rows),
            token_feeds(model, probes),
            token_feeds(model, held),
            [row.tolist() for row in held],
            tokenizer.encode("") if written.can_write(model) else None,
        )


def _held(
    encode: Callable[[str], list[int]], texts: Sequence[str], rows: Array, length: int
) -> Array:
    """A row of ``length`` tokens of each text to verify with.

    It is the row that does not calibrate, or else how the text begins, where none that does begins.
    """
    held = {i % len(texts): rows[i, :length] for i in range(SEQUENCES, len(rows))}
    for index in set(range(len(texts))) - held.keys():
        tokens = encode(texts[index][: length * SPAN])[:length]
        if len(tokens) == length:
            held[index] = np.array(tokens)
    return np.array([held[index] for index in sorted(held)]) if held else rows[-1:, :length]


def _longest(model: ir.Model) -> int:
    """The most tokens that a fixed sequence length or a position table leaves room for."""
    (ids,) = (v for v in model.graph.inputs if v.name == "input_ids")
    fixed = ids.shape[1] if ids.shape is not None and len(ids.shape) == 2 else None
    return fixed if isinstance(fixed, int) else LENGTH


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}") from error


def _arrays(model: ir.Model, path: Path) -> list[Feed]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray[Any, Any]] = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as .npz: {error}") from error
    names = [graph.name(v) for v in model.graph.inputs]
    if missing := [n for n in names if n not in arrays]:
        raise UsageError(f"{path} lacks the inputs {', '.join(missing)}")
    count = min(len(arrays[n]) for n in names)
    return [
        {n: torch.from_numpy(np.ascontiguousarray(arrays[n][i : i + 1])) for n in names}
        for i in range(count)
    ]


def _noise(model: ir.Model) -> list[Feed]:
    """Standard normal numbers; free dimensions are 1 for the first and ``FREE_SIZE`` for others."""
    generator = torch.Generator().manual_seed(0)

    def sample(value: ir.Value) -> torch.Tensor:
        if value.shape is None or value.dtype is None:
            raise UnsupportedError(f"input '{value.name}' has no known shape; give samples for it")
        shape = [
            d if isinstance(d, int) else (1 if axis == 0 else FREE_SIZE)
            for axis, d in enumerate(value.shape)
        ]
        if value.dtype == ir.DataType.FLOAT:
            return torch.randn(shape, generator=generator)
        return torch.ones(shape, dtype=torch.from_numpy(np.ones(0, value.dtype.numpy())).dtype)

    return [{graph.name(v): sample(v) for v in model.graph.inputs} for _ in range(NOISE_SAMPLES)]


def token_feeds(model: ir.Model, tokens: Array) -> list[Feed]:
    """Samples for a model over tokens: one a row of ``tokens`` [count, length].

    Raises:
        UnsupportedError: the model has an input that is not known from language models.
    """
    return [
        {graph.name(v): _token_input(v, torch.from_numpy(row[None])) for v in model.graph.inputs}
        for row in tokens.astype(np.int64)
    ]


def _token_input(value: ir.Value, ids: Tensor) -> Tensor:
    key = graph.name(value)
    dtype = torch.int32 if value.dtype == ir.DataType.INT32 else torch.int64
    if key == "input_ids":
        return ids.to(dtype)
    if key == "attention_mask":
        return torch.ones(ids.shape, dtype=dtype)
    if key == "position_ids":
        return torch.arange(ids.shape[1], dtype=dtype).unsqueeze(0)
    if key == "token_type_ids":
        return torch.zeros(ids.shape, dtype=dtype)
    if key.startswith("past") and value.shape is not None:
        sizes = [d if isinstance(d, int) else 0 for d in value.shape[1:]]
        return torch.zeros(1, *sizes)
    raise UnsupportedError(f"input '{key}' is not one of a language model; give samples for it")


def text_tokens(
    encode: Callable[[str], list[int]], texts: Sequence[str], count: int, length: int
) -> Array:
    """``count`` rows of ``length`` tokens, int64, taken in turn from texts and evenly within each.

    Args:
        encode: Text to tokens with the marks, such as BOS, that start a text.
        texts: Texts of different kinds.
        count: How many rows; fewer come back where the texts are too short.
        length: The tokens of a row.

    Raises:
        UsageError: no text has ``length`` tokens.
    """
    rows = []
    for index in range(count):
        text = texts[index % len(texts)]
        turn, turns = index // len(texts), -(-(count - index % len(texts)) // len(texts))
        span = length * SPAN
        # Begin at a line, so that the row does not open with half a word; go on at the beginning.
        start = text.rfind("\n", 0, int(len(text) * (turn + 0.5) / turns)) + 1
        tokens = encode((text[start:] + "\n" + text[:start])[:span])
        if len(tokens) >= length:
            rows.append(tokens[:length])
    if not rows:
        raise UsageError(f"the calibration text is shorter than {length} tokens")
    return np.array(rows, np.int64)
