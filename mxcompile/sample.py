"""Choosing the next token, and generating a text with it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mxcompile.errors import UsageError
from mxcompile.runtime import Session

_CANDIDATES: Final = 256
"""Tokens looked at first for top-p; a whole vocabulary is only sorted where these do not do."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to choose: greedily at temperature 0, else from the likeliest ``top_p`` of the mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature} is not 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not above 0 and at most 1")


def choose(
    logits: NDArray[np.float32], settings: SamplingSettings, rng: np.random.Generator
) -> int:
    """The next token's number."""
    if settings.temperature == 0:
        return int(logits.argmax())
    scores = (logits.astype(np.float64) - logits.max()) / settings.temperature
    weights = np.exp(scores)
    weights /= weights.sum()
    if settings.top_p == 1:
        return int(rng.choice(weights.size, p=weights))
    nucleus = _nucleus(weights, settings.top_p)
    kept = weights[nucleus]
    return int(rng.choice(nucleus, p=kept / kept.sum()))


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[Any]:
    """The fewest likeliest tokens that reach ``top_p`` together, likeliest first."""
    count = min(_CANDIDATES, weights.size)
    likeliest = np.argpartition(-weights, count - 1)[:count]
    if weights[likeliest].sum() < top_p:
        likeliest = np.arange(weights.size)
    likeliest = likeliest[np.argsort(-weights[likeliest], kind="stable")]
    return likeliest[: int(np.searchsorted(np.cumsum(weights[likeliest]), top_p)) + 1]


def generate(
    session: Session,
    prompt: Sequence[int],
    settings: SamplingSettings,
    *,
    limit: int,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Give up to ``limit`` tokens that follow ``prompt``; ends before a token of ``stop``.

    Raises:
        UsageError: the prompt is empty, or the context is full.
    """
    rng = np.random.default_rng(settings.seed)
    fed: Sequence[int] = prompt
    for _ in range(limit):
        token = choose(session.feed(fed)[-1], settings, rng)
        if token in stop:
            return
        yield token
        fed = (token,)
