"""The one expensive step: run the float model over samples, and keep what was found.

``GRADIENT`` prices errors from one pass forward and backward (``mxcompile.observe``): the rows'
Fisher information is absolute, so that no factor is left to measure. ``FORWARD`` runs forward only
and measures factors by perturbing one layer after the other (``mxcompile.probe``), which sees what
a quadratic expansion does not and no difference between a layer's rows. Both end in the same
``Statistics``.

Where there are no logits, gradients tell which rows and inputs count, and factors are measured all
the same: random projections of outputs are a worse guide between layers than labels are (MiniLM at
3 bits loses a sixth less). So is what errors in the rows of rare tokens do, which are most of what
an embedding says (a tenth less). A decoder has its own probabilities to tell tokens apart by: for
Gemma 3 270M factors of 0.3 to 1.1 were found, and changed its divergence at 3 bits by -2 to 5 %.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import onnx_ir as ir
import safetensors
import safetensors.torch
import torch

from mxcompile import observe, statistics
from mxcompile.errors import UsageError
from mxcompile.files import whole
from mxcompile.float_model import Feed, FloatModel
from mxcompile.graph import Use
from mxcompile.observe import Observer
from mxcompile.probe import ForwardProbe, measure_rarity
from mxcompile.progress import Progress
from mxcompile.statistics import Statistics

Sensitivity: TypeAlias = Literal["gradient", "forward"]
GRADIENT: Final = "gradient"
FORWARD: Final = "forward"

PASSES: Final = 16
"""The least passes of gradients: each pass of a small sample is one random draw."""

KEEP_SECONDS: Final = 30.0
"""How much work an interruption may lose."""

VERSION: Final = 9
"""Changes whenever other statistics come out of the same model and samples."""

_log = logging.getLogger(__name__)


def collect(
    model: ir.Model,
    uses: Mapping[str, Sequence[Use]],
    feeds: Sequence[Feed],
    probes: Sequence[Feed] = (),
    *,
    sensitivity: Sensitivity = GRADIENT,
    progress: Progress | None = None,
    draft: "Draft | None" = None,
) -> Statistics:
    """Run a float model over samples and gather all that pricing needs.

    Args:
        model: A canonical model.
        uses: The plannable weights and where they are read, as ``graph.uses`` finds them.
        feeds: The samples for second moments and gradients.
        probes: The samples, fewer, on which factors are measured: for ``forward``, and for models
            without logits.
        sensitivity: How errors are converted to harm at the output.
        progress: Is told of the stages.
        draft: Where unfinished work is kept, and found again.
    """
    progress = progress or Progress()
    watched = FloatModel(model, uses)
    observer = Observer(watched, gradients=sensitivity == GRADIENT)
    samples = list(feeds)
    if sensitivity == GRADIENT and not watched.scores_labels:
        samples *= -(-PASSES // len(feeds))
    if draft is not None:
        draft.resume(observer)
    with progress.stage("calibrate", len(samples)) as advance:
        advance(observer.seen)
        for _ in observer.see(samples[observer.seen :]):
            if draft is not None:
                draft.keep(observer)
            advance()
    found = observer.statistics()
    if probes and (sensitivity == FORWARD or not watched.scores_labels):
        with torch.no_grad():
            found = replace(found, factors=ForwardProbe().factors(watched, found, probes, progress))
    if not watched.scores_labels:
        found = measure_rarity(watched, found, feeds, progress)
    return found


class Draft:
    """The sums of an unfinished pass, in a file beside the finished statistics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = time.monotonic()

    def resume(self, observer: Observer) -> None:
        """Give an observer what an earlier run had, if there is a file that can be read."""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                observer.seen = int(file.metadata()["seen"])
                observer.sums = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s cannot be resumed (%s); begun again", self.path, error)
            return
        _log.info("resumed after %d samples", observer.seen)

    def keep(self, observer: Observer) -> None:
        """Write the sums, if the last time was long ago."""
        if time.monotonic() - self._kept < KEEP_SECONDS:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as draft:
            safetensors.torch.save_file(observer.sums, draft, {"seen": str(observer.seen)})
        self._kept = time.monotonic()

    def drop(self) -> None:
        """Remove the file: the work is done."""
        self.path.unlink(missing_ok=True)


def cache_key(files: Iterable[Path], feeds: Sequence[Feed], settings: object = ()) -> str:
    """A name for statistics that changes with the model's files, the samples and the settings."""
    about = (VERSION, observe.FULL_COLUMNS, observe.HEAD_STRIDE, PASSES, settings)
    digest = hashlib.sha256(json.dumps(about).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for feed in feeds:
        for key in sorted(feed):
            digest.update(f"{key}{tuple(feed[key].shape)}".encode())
            digest.update(feed[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached(path: Path, make: Callable[[Draft], Statistics]) -> Statistics:
    """The statistics kept at ``path``; made and kept there when there are none that can be read."""
    try:
        return statistics.load(path)
    except UsageError as error:
        if path.exists():
            _log.warning("%s; made again", error)
    draft = Draft(path.with_suffix(".draft"))
    made = make(draft)
    statistics.save(made, path)
    draft.drop()
    return made
