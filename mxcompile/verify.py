"""Is the compiled program what the plan promised? Measured on the program, not a simulation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from mxcompile import evaluate
from mxcompile.artifact import DECODER, Artifact
from mxcompile.budget import Size
from mxcompile.errors import VerificationError
from mxcompile.float_model import Feed
from mxcompile.runtime import Program
from mxcompile.samples import Samples

FACTOR: Final = 4.0
SLACK: Final = 0.05
"""The divergence (or relative squared error) may be FACTOR times what was predicted, plus SLACK.

Predictions hold within a small factor where damages add up, which they do up to about 0.2 nats; a
wrong kernel or layout costs several nats. SLACK covers what a second-order prediction leaves out.
"""

STEPS: Final = 48
"""Tokens that are run one by one too, where that is a function of the program by itself."""


def check_size(built: Artifact, budget: Size | None) -> None:
    """Raise VerificationError when the weight file is larger than the budget allows."""
    if budget is None:
        return
    limit = budget.limit(built.manifest.parameters)
    if built.weight_bytes > limit:
        raise VerificationError(
            f"the weight file has {built.weight_bytes} bytes, the budget allows {limit}"
        )


def check_better(quality: Mapping[str, float], uniform: Mapping[str, float]) -> None:
    """Raise VerificationError when a uniform plan of no more bytes is closer to the float model."""
    for measure in ("kld_mean", "relative_error"):
        if measure in uniform and quality[measure] > uniform[measure]:
            raise VerificationError(
                f"the mixed plan loses to a uniform one that is no larger: {measure} "
                f"{quality[measure]:.3g} against {uniform[measure]:.3g}"
            )


def check(
    built: Artifact, model: Path, samples: Samples, predicted: Mapping[str, float | str]
) -> dict[str, float]:
    """Compare the program with the float model in onnxruntime; gives what was measured.

    Language models are compared by the KL divergence of their next-token distributions, others by
    the squared error of their outputs relative to the outputs' variance.

    Raises:
        VerificationError: the program is further off than the plan explains.
    """
    program = Program.load(built.folder)
    if built.manifest.kind == DECODER:
        reference = evaluate.OnnxSource(model)
        tested = evaluate.CompiledSource(program)
        quality = evaluate.compare(reference, tested, samples.texts)
        if program.graphs:
            _check_steps(program, samples.texts[0][:STEPS])
        measure, what = quality["kld_mean"], "a KL divergence"
    else:
        quality = _compare_outputs(program, model, samples.verify)
        measure, what = quality["relative_error"], "a relative squared error"
    parts = [predicted.get(name) for name in ("damage", "activation_damage", "cache_damage")]
    expected = sum(part for part in parts if isinstance(part, float))
    if isinstance(parts[0], float) and not measure <= FACTOR * expected + SLACK:
        raise VerificationError(
            f"the compiled program is off: it has {what} of {measure:.3g} from the float model, "
            f"the plan predicts {expected:.3g}"
        )
    if not np.isfinite(measure):
        raise VerificationError(f"the compiled program is off: it has {what} of {measure}")
    return quality


def _check_steps(program: Program, tokens: Sequence[int]) -> None:
    """Texts are verified at once, with ``main``; a GPU's ``decode`` has to say the same of one."""
    sources = evaluate.CompiledSource(program), evaluate.SteppedSource(program)
    apart = evaluate.compare(*sources, [tokens])["kld_mean"]
    if not apart <= SLACK:
        raise VerificationError(
            f"the compiled program's decode steps are off: they have a KL divergence of "
            f"{apart:.3g} from the same tokens run at once"
        )


def _compare_outputs(program: Program, model: Path, feeds: Sequence[Feed]) -> dict[str, float]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model), options)
    error = power = 0.0
    cosines: list[np.ndarray[Any, Any]] = []
    for feed in feeds:
        arrays = {name: value.numpy() for name, value in feed.items()}
        found = program.run(arrays)
        names = [o.name for o in session.get_outputs()]
        for name, expected in zip(names, session.run(names, arrays), strict=True):
            if not np.issubdtype(expected.dtype, np.floating):
                continue
            x = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
            y = np.asarray(found[name], np.float64).reshape(x.shape)
            error += float(np.square(x - y).sum())
            power += float(np.square(x).sum())
            norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
            cosines.append((x * y).sum(1)[norm > 0] / norm[norm > 0])
    relative = error / power if power else error
    every = np.concatenate(cosines) if cosines else np.ones(1)
    return {"relative_error": relative, "cosine_mean": float(every.mean())}
