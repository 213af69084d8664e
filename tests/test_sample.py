"""Choosing tokens."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mxcompile.errors import UsageError
from mxcompile.runtime import Program, Session
from mxcompile.sample import SamplingSettings, choose, generate
from tests import toy

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draw(
    settings: SamplingSettings, logits: np.ndarray = LOGITS, times: int = 4000
) -> Counter[int]:
    rng = np.random.default_rng(settings.seed)
    return Counter(choose(logits, settings, rng) for _ in range(times))


def test_temperature_0_is_greedy() -> None:
    assert draw(SamplingSettings(), times=10) == {1: 10}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    found = draw(SamplingSettings(temperature=1, seed=1))
    for token, share in enumerate(np.exp(LOGITS)):
        deviation = np.sqrt(share * (1 - share) / 4000)
        assert abs(found[token] / 4000 - share) < 4 * deviation


def test_temperature_sharpens() -> None:
    found = draw(SamplingSettings(temperature=0.25, seed=1))
    sharp = np.exp(4 * LOGITS) / np.exp(4 * LOGITS).sum()
    assert abs(found[1] / 4000 - sharp[1]) < 0.04


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.5, {1, 3}),
        (0.69, {1, 3}),
        (0.8, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert draw(SamplingSettings(1, top_p, 2)).keys() == kept


def test_top_p_of_a_flat_vocabulary_looks_at_all_of_it() -> None:
    flat = np.zeros(2000, np.float32)
    assert len(draw(SamplingSettings(1, 0.5, 3), flat)) > 900


def test_a_seed_makes_it_repeatable(compiled: Path) -> None:
    program = Program.load(compiled / "toy.mxc")
    settings = SamplingSettings(temperature=5, top_p=0.9, seed=4)
    runs = [list(generate(Session(program), [3], settings, limit=20)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 20


@pytest.mark.parametrize(
    "settings", [(-1.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (1.0, 1.5)]
)
def test_settings_out_of_range(settings: tuple[float, float]) -> None:
    with pytest.raises(UsageError):
        SamplingSettings(*settings)


def test_generates_what_the_logits_say(compiled: Path) -> None:
    tokens = [5, 9, 3]
    found = list(
        generate(Session(Program.load(compiled / "toy.mxc")), tokens, SamplingSettings(), limit=9)
    )
    for token in found:
        assert token == toy.logits(tokens)[-1].argmax()
        tokens.append(token)
    assert len(found) == 9


def test_ends_before_a_stop_token(compiled: Path) -> None:
    session = Session(Program.load(compiled / "toy.mxc"))
    first = list(generate(session, [5, 9], SamplingSettings(), limit=1))
    session.truncate(0)
    assert list(generate(session, [5, 9], SamplingSettings(), limit=5, stop=first)) == []


def test_a_full_context_is_an_error(compiled: Path) -> None:
    session = Session(Program.load(compiled / "toy.mxc"), 4)
    tokens = generate(session, [5, 9], SamplingSettings(), limit=9)
    assert len([next(tokens) for _ in range(3)]) == 3
    with pytest.raises(UsageError, match="5 tokens do not fit the context of 4"):
        next(tokens)
