"""The figures of eval, against sums done by hand and in onnxruntime."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mxcompile import evaluate
from mxcompile.errors import UsageError
from mxcompile.evaluate import Comparison, OnnxSource
from mxcompile.text import TextModel
from tests import toy

TEXT = " ".join(np.random.default_rng(3).choice(toy.WORDS[2:], 700))


class FixedSource:
    """Says the same after every token."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        self._row = np.log(np.array(probabilities, np.float32))
        self.vocabulary = len(probabilities)

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        for chunk in evaluate.chunks(tokens, self.vocabulary):
            yield np.tile(self._row, (len(chunk), 1))

    def continuations(
        self, prompt: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        return [np.tile(self._row, (len(choice), 1)) for choice in choices]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes windows of the toy several chunks."""
    monkeypatch.setattr(evaluate, "_LOGITS", 64 * toy.VOCABULARY)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    toy.write_onnx(tmp_path / "toy.onnx")
    toy.write_tokenizer(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


def test_log_softmax_is_exact_where_floats_overflow() -> None:
    found = evaluate.log_softmax(np.array([[1000, 1000, -1000]], np.float32))
    assert found[0, :2] == pytest.approx(-math.log(2), abs=1e-15)
    assert found[0, 2] == pytest.approx(-2000 - math.log(2))


def test_divergence_and_surprise_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    (found,) = evaluate.compare_logits(np.log(p), [np.log(q)], [1])
    assert found.divergence[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert found.surprise[0] == pytest.approx(math.log(2))
    assert found.reference_surprise[0] == pytest.approx(math.log(4))
    assert not found.agreement[0]


def test_equal_models_do_not_diverge() -> None:
    logits = np.random.default_rng(0).normal(0, 9, (50, 100)).astype(np.float32)
    (found,) = evaluate.compare_logits(logits, [logits + 3], [1] * 50)
    assert found.divergence.max() < 1e-9
    assert found.agreement.all()


def test_figures_by_hand() -> None:
    divergence = np.arange(101) / 100
    nothing, agreement = np.zeros(101), np.arange(101) < 75
    found = evaluate.figures(
        Comparison(divergence, nothing + math.log(8), nothing + math.log(4), agreement)
    )
    assert found["perplexity"] == pytest.approx(8)
    assert found["reference_perplexity"] == pytest.approx(4)
    assert found["perplexity_error"] == pytest.approx(0, abs=1e-12)
    assert found["kld_mean"] == pytest.approx(0.5)
    assert found["kld_median"] == 0.5
    assert found["kld_p99"] == pytest.approx(0.99)
    assert found["kld_max"] == 1
    assert found["kld_mean_error"] == pytest.approx(divergence.std(ddof=1) / math.sqrt(101))
    assert found["top1_agreement"] == pytest.approx(75 / 101)
    assert found["perplexity_ratio"] == pytest.approx(2)
    assert found["delta_p_mean"] == pytest.approx(1 / 8 - 1 / 4)
    assert found["delta_p_rms"] == pytest.approx(1 / 8)
    assert found["tokens"] == 101


def test_compare_counts_each_position_with_a_next_token() -> None:
    half, skew = FixedSource([0.5, 0.5]), FixedSource([0.75, 0.25])
    found = evaluate.compare(half, skew, [[0] * 64, [0] * 65, [1] * 200])
    assert found["tokens"] == 63 + 64 + 199
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found["kld_mean"] == pytest.approx(expected, rel=1e-6)
    assert found["kld_max"] == pytest.approx(expected, rel=1e-6)
    assert found["reference_perplexity"] == pytest.approx(2)
    zeros = (63 + 64) / found["tokens"]
    surprise = zeros * math.log(1 / 0.75) + (1 - zeros) * math.log(4)
    assert found["perplexity"] == pytest.approx(math.exp(surprise), rel=1e-6)


def test_several_models_are_compared_as_each_alone() -> None:
    sources = [FixedSource([0.75, 0.25]), FixedSource([0.5, 0.5]), FixedSource([0.1, 0.9])]
    texts = [[0] * 70, [1, 0] * 30]
    together = evaluate.compare_all(sources[1], sources, texts)
    assert together == [evaluate.compare(sources[1], source, texts) for source in sources]


def test_continuations_are_what_the_whole_text_gives(compiled: Path, models: Path) -> None:
    prompt, choices = [1, 5, 9, 3], [[4], [7, 8, 2], [6, 6]]
    for path in (models / "toy.onnx", compiled / "toy.mxc"):
        source = evaluate.open_source(path)
        found = source.continuations(prompt, choices)
        for choice, logits in zip(choices, found, strict=True):
            whole = np.concatenate(list(source.logits([*prompt, *choice])))
            expected = whole[len(prompt) - 1 : -1]
            np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_other_vocabularies_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="3 and 2 tokens"):
        evaluate.compare(FixedSource([0.5, 0.5]), FixedSource([0.2, 0.3, 0.5]), [[0, 1]])


def test_windows_do_not_overlap_and_begin_as_texts_do(models: Path) -> None:
    model = TextModel.beside(models)
    body = model.encode(TEXT, marks=False)
    found = evaluate.windows(model, TEXT, tokens=100, context=33)
    assert [len(window) for window in found] == [33, 33, 33, 5]
    assert all(window[0] == toy.BOS for window in found)
    assert [token for window in found for token in window[1:]] == body[:100]
    assert sum(len(window) - 1 for window in found) == 100
    whole = evaluate.windows(model, TEXT, tokens=10**6, context=512)
    assert sum(len(window) - 1 for window in whole) == 700


@pytest.mark.parametrize(("text", "context"), [("", 32), (TEXT, 2)])
def test_too_little_to_evaluate(models: Path, text: str, context: int) -> None:
    with pytest.raises(UsageError, match="too short"):
        evaluate.windows(TextModel.beside(models), text, tokens=10, context=context)


def test_onnx_in_chunks_is_onnx_in_one(models: Path) -> None:
    tokens = list(range(40)) * 4
    found = np.concatenate(list(OnnxSource(models / "toy.onnx").logits(tokens)))
    np.testing.assert_array_equal(found, toy.logits(tokens))


def test_an_artifact_is_measured_against_onnx(compiled: Path, models: Path) -> None:
    measure = partial(evaluate.evaluate, text=models / "text", tokens=300, context=128)
    same = measure(compiled / "toy.mxc", models / "toy.onnx")
    assert same["kld_max"] < 1e-9
    assert same["perplexity"] == pytest.approx(same["reference_perplexity"])
    assert (same["top1_agreement"], same["tokens"]) == (1.0, 300)
    toy.write_onnx(models / "half.onnx", scale=0.5)
    other = measure(models / "half.onnx", models / "toy.onnx")
    assert other["kld_mean"] > 0.01
    assert other["reference_perplexity"] == same["reference_perplexity"]


def test_what_cannot_be_evaluated(compiled: Path, models: Path) -> None:
    measure = partial(evaluate.evaluate, tokens=10, context=32)
    onnx, text = models / "toy.onnx", models / "text"
    with pytest.raises(UsageError, match="measures language models only"):
        measure(compiled / "graph.mxc", onnx, text)
    with pytest.raises(UsageError, match="cannot be loaded"):
        measure(text, onnx, text)
    with pytest.raises(UsageError, match="does not exist"):
        measure(models / "none.onnx", onnx, text)
    with pytest.raises(UsageError, match="none cannot be read as text"):
        measure(onnx, onnx, models / "none")
    (models / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="binary cannot be read as text"):
        measure(onnx, onnx, models / "binary")
