"""The tokenizer that lies beside a language model."""

from pathlib import Path
from typing import Self

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mxcompile.errors import UsageError


class TextModel:
    """Text to tokens and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Some files ask for a fixed length, which is for batches of an encoder.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def beside(cls, folder: Path) -> Self:
        """Read the tokenizer in ``folder``.

        Raises:
            UsageError: there is none, or it is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"{folder} has no tokenizer.json: it cannot be run on text")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, marks: bool = True) -> list[int]:
        """The tokens of ``text``, with the ``marks``, such as BOS, that the tokenizer adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=marks).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens`` without marks."""
        return str(self._tokenizer.decode(tokens))

    def stream(self, prompt: list[int]) -> "TextStream":
        """Turn the tokens that follow ``prompt`` into text, one by one."""
        return TextStream(self._tokenizer, DecodeStream(prompt, skip_special_tokens=True))


class TextStream:
    """Holds tokens back until they make whole characters."""

    def __init__(self, tokenizer: Tokenizer, stream: DecodeStream) -> None:
        self._tokenizer = tokenizer
        self._stream = stream

    def push(self, token: int) -> str:
        """The text that is complete with ``token``; often empty inside a character."""
        return self._stream.step(self._tokenizer, token) or ""
