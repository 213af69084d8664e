"""Samples: rows of text that are spread over what is given, and feeds for a model's inputs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mxcompile.default_text import default_texts
from mxcompile.errors import UnsupportedError, UsageError
from mxcompile.samples import SEQUENCES, Samples, text_tokens, token_feeds
from mxcompile.text import TextModel


def model(text: str) -> ir.Model:
    return ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]>\n' + text)


def encode(text: str) -> list[int]:
    return [1, *(ord(c) % 97 for c in text)]


def test_rows_come_in_turn_from_the_texts() -> None:
    texts = ["\n".join(f"{kind}{i:04d}" for i in range(2000)) for kind in "ab"]
    rows = text_tokens(encode, texts, 6, 32)
    assert rows.shape == (6, 32)
    assert rows.dtype == np.int64
    assert [r[1] for r in rows] == [ord("ab"[i % 2]) % 97 for i in range(6)]
    assert (rows[:, 0] == 1).all()
    assert len({tuple(r) for r in rows}) == 6


def test_a_short_text_goes_round() -> None:
    rows = text_tokens(encode, ["one\ntwo\nthree\nfour\nfive\nsix\n"], 3, 20)
    assert rows.shape == (3, 20)
    assert len({tuple(r) for r in rows}) == 3


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="shorter than 256 tokens"):
        text_tokens(encode, ["short"], 4, 256)


def test_the_default_text_is_broad_and_the_same_each_time() -> None:
    texts = default_texts()
    assert texts == default_texts()
    whole = "".join(texts)
    assert len(whole) > 100_000
    for alphabet in ("the", "der", "что", "的", "の", "이", "ال", "है"):
        assert alphabet in whole


def test_feeds_of_language_models() -> None:
    language_model = model(
        """g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
              float[batch, 2, past, 4] past_key_values) => (int64[batch, seq] y) {
            y = Identity(input_ids)
        }"""
    )
    feed = token_feeds(language_model, np.array([[5, 6, 7]]))[0]
    assert feed["input_ids"].tolist() == [[5, 6, 7]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1]]
    assert feed["past_key_values"].shape == (1, 2, 0, 4)


def test_other_inputs_are_named() -> None:
    pixels = model("g (float[1, 3] pixels) => (float[1, 3] y) { y = Relu(pixels) }")
    with pytest.raises(UnsupportedError, match="'pixels' is not one of a language model"):
        token_feeds(pixels, np.array([[1]]))


def test_every_kind_of_text_calibrates_and_is_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["\n".join(f"{kind}{i:05d}" for i in range(9000)) for kind in "abc"]
    monkeypatch.setattr("mxcompile.samples.default_texts", lambda: texts)
    monkeypatch.setattr(TextModel, "beside", lambda _folder: TextModelOfCharacters())
    language_model = model(
        """g (int64[batch, seq] input_ids) => (int64[batch, seq] y) {
            y = Identity(input_ids)
        }"""
    )
    samples = Samples.find(language_model, tmp_path / "model.onnx", None)
    calibrated = [tuple(feed["input_ids"][0].tolist()) for feed in samples.feeds]
    assert len(calibrated) == SEQUENCES
    assert [text[1] for text in samples.texts] == [ord(kind) % 97 for kind in "abc"]
    assert {len(text) for text in samples.texts} == {128}
    assert not {tuple(text) for text in samples.texts} & {row[:128] for row in calibrated}
    assert samples.begin is None  # it has no caches to write with


class TextModelOfCharacters:
    encode = staticmethod(encode)
