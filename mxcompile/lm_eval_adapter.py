"""Artifacts as models of the Language Model Evaluation Harness, for those who have ``lm_eval``.

Importing this module registers the model type ``mxcompile``::

    import lm_eval, mxcompile.lm_eval_adapter
    lm_eval.simple_evaluate("mxcompile", "artifact=gemma.mxc", tasks=["arc_easy"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from mxcompile.evaluate import log_softmax, open_source
from mxcompile.text import TextModel
from mxcompile.zeroshot import context_length


@register_model("mxcompile")
class MxcompileLM(LM):  # type: ignore[misc] # lm_eval need not be there
    """Scores and continues texts with a compiled artifact, or with a float ONNX model."""

    def __init__(self, artifact: str, threads: int | None = None, **_: Any) -> None:
        super().__init__()
        path = Path(artifact)
        self._model = TextModel.beside(path if path.is_dir() else path.parent)
        self._source = open_source(path, None if threads is None else int(threads))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether it is greedy's."""
        return [self._score(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each whole text, after the marks that texts begin with."""
        return [self._score("", *request.args)[0] for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy continuations of (context, options), up to the first of ``options["until"]``."""
        return [self._generate(*request.args) for request in requests]

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        prompt, whole = self._model.encode(context), self._model.encode(context + continuation)
        # Where no marks begin a text, its first token has nothing to be predicted from.
        begin = max(context_length(prompt, [whole]), 1)
        rest = whole[begin:]
        (logits,) = self._source.continuations(whole[:begin], [rest])
        log_p = log_softmax(logits)
        greedy = bool((log_p.argmax(-1) == rest).all())
        return float(log_p[np.arange(len(rest)), rest].sum()), greedy

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        prompt = self._model.encode(context)
        found: list[int] = []
        text = ""
        until = [options["until"]] if isinstance(options["until"], str) else options["until"]
        for _ in range(int(options.get("max_gen_toks", 256))):
            (logits,) = self._source.continuations([*prompt, *found], [[0]])
            found.append(int(logits[0].argmax()))
            text = self._model.decode(found)
            ends = [text.index(stop) for stop in until if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text
