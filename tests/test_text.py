"""Tokens to text."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mxcompile.errors import UsageError
from mxcompile.text import TextModel


@pytest.fixture
def letters(tmp_path: Path) -> TextModel:
    """A tokenizer of single bytes: most characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    return TextModel.beside(tmp_path)


def test_a_stream_gives_whole_characters_only(letters: TextModel) -> None:
    text = "Grüße, 世界 🙂!"
    tokens = letters.encode(text)
    assert len(tokens) == len(text.encode())
    stream = letters.stream([])
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == text == letters.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_goes_on_where_the_prompt_ended(letters: TextModel) -> None:
    tokens = letters.encode("a 世界")
    stream = letters.stream(tokens[:3])  # in the middle of a character
    assert "".join(map(stream.push, tokens[3:])).endswith("界")


def test_an_unfinished_character_is_not_printed(letters: TextModel) -> None:
    tokens = letters.encode("é🙂")[:-1]
    stream = letters.stream([])
    assert "".join(map(stream.push, tokens)) == "é"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        TextModel.beside(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="not a tokenizer"):
        TextModel.beside(tmp_path)
