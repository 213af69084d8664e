"""How far a compiled or quantized language model is from its reference.

Both read the same windows of a text. At every position the two next-token distributions are
compared, and the text's own next token scores each of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mxcompile import artifact as artifacts
from mxcompile.errors import UsageError
from mxcompile.progress import Progress
from mxcompile.runtime import Program, Session, cores
from mxcompile.text import TextModel

_LOGITS: Final = 1 << 25
"""Logits that are held at once: 128 MB. More positions at once cost fewer passes over weights."""

_BLOCK: Final = 8
"""Positions compared at once: their float64 terms stay in the cache."""


class Scorer(Protocol):
    """A language model that scores a text."""

    vocabulary: int

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The logits after each token, from an empty context, in ``chunks``."""


class LogitSource(Scorer, Protocol):
    """A language model that also scores continuations of a text."""

    def continuations(
        self, prompt: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """For every choice, the logits [tokens, vocabulary] before each of its tokens."""


def chunks(tokens: Sequence[int], vocabulary: int) -> Iterator[Sequence[int]]:
    """Cut a window for a model: all sources cut alike, so that they can be compared as they go."""
    size = max(_LOGITS // vocabulary, 1)
    for at in range(0, len(tokens), size):
        yield tokens[at : at + size]


class CompiledSource:
    """An artifact as a source."""

    def __init__(self, program: Program) -> None:
        self._session = Session(program)
        self.vocabulary = self._session.vocabulary

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run the compiled program."""
        self._session.truncate(0)
        for chunk in chunks(tokens, self.vocabulary):
            yield self._session.feed(chunk, "all")

    def continuations(
        self, prompt: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """Run the prompt once, and every choice from there."""
        self._session.truncate(0)
        first = np.array(self._session.feed(prompt, "last")).reshape(1, -1)
        found = []
        for choice in choices:
            rest = [first]
            if len(choice) > 1:
                self._session.truncate(len(prompt))
                rest.append(np.array(self._session.feed(choice[:-1], "all")))
            found.append(np.concatenate([part.reshape(-1, self.vocabulary) for part in rest]))
        return found


class SteppedSource(CompiledSource):
    """The same, a token at a time, as it generates."""

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run the compiled program once for each token."""
        self._session.truncate(0)
        for chunk in chunks(tokens, self.vocabulary):
            yield np.concatenate([self._session.feed(token).copy() for token in chunk])


class OnnxSource:
    """An ONNX decoder in onnxruntime, its graph optimisations off: they change Q/DQ results.

    Raises:
        UsageError: the model cannot be loaded, or is not a decoder with past keys and values.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or 0
        options.enable_cpu_mem_arena = False  # it keeps a gigabyte that is not used again
        options.log_severity_level = 4  # errors come as exceptions
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the classes differ by cause and are not exported
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise UsageError(f"{path} cannot be loaded: {reason}") from error
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._outputs = [value.name for value in self._session.get_outputs()]
        if "input_ids" not in self._inputs or "logits" not in self._outputs or not self._past:
            raise UsageError(f"{path} is not a language model with past keys and values")
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run the graph."""
        past = {name: self._empty(name) for name in self._past}
        end = 0
        for chunk in chunks(tokens, self.vocabulary):
            found, past = self._step(chunk, end, past)
            end += len(chunk)
            yield found

    def continuations(
        self, prompt: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """Run the prompt once, and every choice from its keys and values."""
        before, past = self._step(prompt, 0, {name: self._empty(name) for name in self._past})
        found = []
        for choice in choices:
            rest = [before[-1:]]
            if len(choice) > 1:
                rest.append(self._step(choice[:-1], len(prompt), past)[0])
            found.append(np.concatenate(rest))
        return found

    def _step(
        self, tokens: Sequence[int], begin: int, past: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """The logits after some tokens more, and all keys and values."""
        end = begin + len(tokens)
        feeds = {
            "input_ids": np.asarray(tokens, np.int64)[None],
            "position_ids": np.arange(begin, end, dtype=np.int64)[None],
            "attention_mask": np.ones((1, end), np.int64),
        }
        known = {name: value for name, value in feeds.items() if name in self._inputs}
        presents = [name.replace("past_key_values.", "present.") for name in self._past]
        found = self._session.run(["logits", *presents], {**known, **past})
        return found[0][0], dict(zip(self._past, found[1:], strict=True))

    def _empty(self, name: str) -> NDArray[Any]:
        """A cache of no tokens: every free dimension but the batch is the past."""
        shape = [size if isinstance(size, int) else 0 for size in self._inputs[name].shape]
        return np.zeros((1, *shape[1:]), np.float32)


def open_source(path: Path, threads: int | None = None) -> LogitSource:
    """The source for an artifact or an ONNX file.

    Raises:
        UsageError: it is neither, or not a language model.
    """
    if path.is_dir():
        return CompiledSource(Program.load(path, threads))
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return OnnxSource(path, threads)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two models say at some positions; one element a position, in nats."""

    divergence: NDArray[np.float64]
    surprise: NDArray[np.float64]
    reference_surprise: NDArray[np.float64]
    agreement: NDArray[np.bool_]


def log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Log probabilities along the last axis, in double precision."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def compare_logits(
    reference: NDArray[np.float32],
    tested: Sequence[NDArray[np.float32]],
    following: Sequence[int],
) -> list[Comparison]:
    """Compare the logits [positions, vocabulary] of models with a reference's.

    Args:
        reference: Logits before the tokens ``following``.
        tested: The same of each model.
        following: The text's own next tokens; positions without one, at the end, are left out.
    """

    def block(at: int) -> list[Comparison]:
        part = slice(at, min(at + _BLOCK, len(following)))
        p, tokens = log_softmax(reference[part]), np.asarray(following[part])[:, None]
        likely, best = np.exp(p), p.argmax(-1)
        surprise = -np.take_along_axis(p, tokens, -1)[:, 0]
        found = []
        for logits in tested:
            q = log_softmax(logits[part])
            said, same = -np.take_along_axis(q, tokens, -1)[:, 0], q.argmax(-1) == best
            lost = np.subtract(p, q, out=q)
            lost *= likely
            found.append(Comparison(np.maximum(lost.sum(-1), 0), said, surprise, same))
        return found

    with ThreadPoolExecutor(cores()) as pool:
        blocks = list(pool.map(block, range(0, len(following), _BLOCK)))
    return [_join(parts) for parts in zip(*blocks, strict=True)]


def _join(parts: Sequence[Comparison]) -> Comparison:
    return Comparison(
        np.concatenate([part.divergence for part in parts]),
        np.concatenate([part.surprise for part in parts]),
        np.concatenate([part.reference_surprise for part in parts]),
        np.concatenate([part.agreement for part in parts]),
    )


def figures(found: Comparison) -> dict[str, float]:
    """The figures of a comparison; each ``_error`` is a standard error."""

    def error(values: NDArray[Any]) -> float:
        return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0

    perplexity = float(np.exp(found.surprise.mean()))
    reference = float(np.exp(found.reference_surprise.mean()))
    ratio = found.surprise - found.reference_surprise
    change = np.exp(-found.surprise) - np.exp(-found.reference_surprise)
    rms = float(np.sqrt(np.square(change).mean()))
    return {
        "perplexity": perplexity,
        "perplexity_error": perplexity * error(found.surprise),
        "reference_perplexity": reference,
        "reference_perplexity_error": reference * error(found.reference_surprise),
        "perplexity_ratio": float(np.exp(ratio.mean())),
        "perplexity_ratio_error": float(np.exp(ratio.mean())) * error(ratio),
        "kld_mean": float(found.divergence.mean()),
        "kld_mean_error": error(found.divergence),
        "kld_median": float(np.median(found.divergence)),
        "kld_p99": float(np.quantile(found.divergence, 0.99)),
        "kld_p99_9": float(np.quantile(found.divergence, 0.999)),
        "kld_max": float(found.divergence.max()),
        "delta_p_mean": float(change.mean()),
        "delta_p_mean_error": error(change),
        "delta_p_rms": rms,
        # That of the mean of squares, through the root.
        "delta_p_rms_error": error(np.square(change)) / (2 * rms) if rms > 0 else 0.0,
        "top1_agreement": float(found.agreement.mean()),
        "top1_agreement_error": error(found.agreement.astype(np.float64)),
        "tokens": int(found.divergence.size),
    }


def windows(model: TextModel, text: str, *, tokens: int, context: int) -> list[list[int]]:
    """Cut ``text`` in windows of up to ``context`` tokens that do not overlap.

    Each begins with the marks, such as BOS, that the tokenizer puts before a text. Together they
    hold ``tokens`` positions with a next token, or what the text has.

    Raises:
        UsageError: the text is too short to predict anything.
    """
    marks = model.encode("")
    if context < len(marks) + 2:
        raise UsageError(f"a context of {context} tokens is too short")
    # No tokenizer makes tokens much longer than this, and a whole book takes it long.
    body = model.encode(text[: tokens * 16 + 16], marks=False)
    # The first token of a window is only predicted if a mark comes before it.
    lost = 0 if marks else 1
    found: list[list[int]] = []
    step = context - len(marks)
    for at in range(0, len(body), step):
        size = min(step, tokens + lost, len(body) - at)
        if size <= lost:
            break
        found.append(marks + body[at : at + size])
        tokens -= size - lost
    if not found:
        raise UsageError("the text is too short to evaluate")
    return found


def compare(
    reference: Scorer,
    tested: Scorer,
    texts: Iterable[Sequence[int]],
    progress: Progress | None = None,
) -> dict[str, float]:
    """Compare two models over windows of tokens; see ``figures`` for what it gives.

    Raises:
        UsageError: they have other vocabularies.
    """
    return compare_all(reference, [tested], texts, progress)[0]


def compare_all(
    reference: Scorer,
    tested: Sequence[Scorer],
    texts: Iterable[Sequence[int]],
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Compare models with one reference, which runs once for all of them.

    Raises:
        UsageError: they have other vocabularies.
    """
    for source in tested:
        if reference.vocabulary != source.vocabulary:
            raise UsageError(
                f"the models have {source.vocabulary} and {reference.vocabulary} tokens: "
                "they cannot be compared"
            )
    texts = list(texts)
    parts: list[list[Comparison]] = [[] for _ in tested]
    with (progress or Progress()).stage("evaluate", sum(map(len, texts))) as advance:
        for window in texts:
            end = 0
            together = zip(*(s.logits(window) for s in (reference, *tested)), strict=True)
            for expected, *found in together:
                begin, end = end, end + len(expected)
                if following := window[begin + 1 : end + 1]:
                    compared = compare_logits(expected, found, following)
                    for before, more in zip(parts, compared, strict=True):
                        before.append(more)
                advance(len(expected))
    return [figures(_join(part)) for part in parts]


def evaluate(
    tested: Path,
    reference: Path,
    text: Path,
    *,
    tokens: int,
    context: int,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Compare the model at ``tested`` with the ONNX model at ``reference`` on a file of text.

    Raises:
        UsageError: a path is not what it has to be, or the models do not belong together.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text} cannot be read as text: {error}") from error
    if tested.is_dir() and artifacts.load(tested).manifest.kind != artifacts.DECODER:
        raise UsageError(f"{tested} is not a language model: eval measures language models only")
    model = TextModel.beside(reference.parent)
    texts = windows(model, content, tokens=tokens, context=context)
    return compare(open_source(reference, threads), open_source(tested, threads), texts, progress)
