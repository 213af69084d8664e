"""A quantized model without its program: the float graph in torch, some weights replaced.

What plans do to a model can be told apart before any of them is compiled. Activations and caches
stay float32 here, so that nothing but the weights differs; ``mxcompile eval`` measures programs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mxcompile.errors import UsageError
from mxcompile.evaluate import chunks
from mxcompile.float_model import LOGITS, Feed, FloatModel
from mxcompile.samples import token_feeds


class SimulatedSource:
    """A language model whose weights are overridden, as a ``Scorer``.

    Raises:
        UsageError: the model gives no logits for tokens.
    """

    def __init__(self, watched: FloatModel, weights: Mapping[str, Tensor]) -> None:
        self._watched, self._weights = watched, weights
        (found,) = (v for v in watched.model.graph.outputs if v.name == LOGITS)
        if found.shape is None or not isinstance(found.shape[-1], int):
            raise UsageError("the model's logits have no known width: it cannot be compared")
        self.vocabulary = found.shape[-1]

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run a window once, and its head chunk by chunk."""
        hidden = self._hidden(tokens)
        begin = 0
        for chunk in chunks(tokens, self.vocabulary):
            yield self._head(hidden[begin : begin + len(chunk)])
            begin += len(chunk)

    # Sources take turns, so that none may be within a context of torch's when it yields.
    @torch.no_grad()
    def _hidden(self, tokens: Sequence[int]) -> Tensor:
        """What the head reads, or the logits where there is none: [positions, width]."""
        (feed,), fetch = token_feeds(self._watched.model, np.array([tokens])), self._watched.fetched
        (value,) = self._watched.interpreter.run(
            feed, overrides=self._weights, fetch=fetch
        ).values()
        return value[0]

    @torch.no_grad()
    def _head(self, hidden: Tensor) -> NDArray[np.float32]:
        if self._watched.head is None:
            return hidden.numpy()
        return self._watched.logits(hidden, overrides=self._weights).numpy()


def scores_tokens(watched: FloatModel) -> bool:
    """Whether the model has logits for every token, as ``SimulatedSource`` needs them."""
    ranks = [len(v.shape or ()) for v in watched.model.graph.outputs if v.name == LOGITS]
    reads_tokens = any(v.name == "input_ids" for v in watched.model.graph.inputs)
    return watched.scores_labels and reads_tokens and ranks == [3]


def outputs(
    watched: FloatModel, weights: Mapping[str, Tensor], feeds: Sequence[Feed]
) -> list[NDArray[np.float64]]:
    """What a model without logits answers: its first output for each feed, [positions, width]."""
    name = watched.outputs[0]
    found = []
    with torch.no_grad():
        for feed in feeds:
            value = watched.interpreter.run(feed, overrides=weights, fetch=[name])[name]
            found.append(value.reshape(-1, value.shape[-1]).double().numpy())
    return found


def compare_outputs(
    reference: Sequence[NDArray[Any]], tested: Sequence[NDArray[Any]]
) -> dict[str, float]:
    """How far answers are from a reference's.

    Returns:
        ``one_minus_cosine``: of embeddings, each the mean of a feed's positions, as sentence
        encoders take it; and its standard error; ``relative_error``: squared, over all numbers.
    """
    pairs = list(zip(reference, tested, strict=True))
    distances = np.array([1 - _cosine(x.mean(0), y.mean(0)) for x, y in pairs])
    error = sum(float(np.square(x - y).sum()) for x, y in pairs)
    power = sum(float(np.square(x).sum()) for x, _ in pairs)
    spread = distances.std(ddof=1) / len(distances) ** 0.5 if len(distances) > 1 else 0.0
    return {
        "one_minus_cosine": float(distances.mean()),
        "one_minus_cosine_error": float(spread),
        "relative_error": error / power if power else error,
    }


def _cosine(x: NDArray[Any], y: NDArray[Any]) -> float:
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 1.0
