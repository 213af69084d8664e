"""Text that a language model writes itself, to calibrate on: as broad as what it knows.

Whatever text a machine has is narrow, and tokens that it never comes near look free: whole
languages. What the model would say holds them in proportion, and needs no data (LLM-QAT,
arXiv 2305.17888, draws its samples so). Half of the sequences begin as the model begins a text;
the others with a random token, which leads into languages and subjects that come up seldom.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import onnx_ir as ir
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mxcompile import graph, workers
from mxcompile.files import whole
from mxcompile.float_model import LOGITS, FloatModel
from mxcompile.interpret import Values
from mxcompile.progress import Progress

SEQUENCES: Final = 16
LENGTH: Final = 256
"""Less than half as many as there are of text: a model writes at the cost of a step a token. In
shorter ones it hardly knows what it talks of."""

PAST, PRESENT = "past_key_values.", "present."

_log = logging.getLogger(__name__)


def can_write(model: ir.Model) -> bool:
    """Whether a model continues tokens from caches, as exported decoders do."""
    inputs = {graph.name(v) for v in model.graph.inputs}
    outputs = {graph.name(v): v for v in model.graph.outputs}
    caches = {name for name in inputs if name.startswith(PAST)}
    logits = outputs.get(LOGITS)
    return (
        logits is not None
        and logits.shape is not None
        and len(logits.shape) == 3
        and isinstance(logits.shape[2], int)
        and bool(caches)
        and inputs - caches <= {"input_ids", "position_ids", "attention_mask"}
        and outputs.keys() >= set(map(_present, caches))
    )


def write(watched: FloatModel, marks: Sequence[int], progress: Progress | None = None) -> Tensor:
    """Let a model write, at temperature 1: the same tokens each time, int64 [SEQUENCES, LENGTH].

    Args:
        watched: The model; ``can_write`` says whether it can.
        marks: What begins a text, such as BOS; where there is none all begin with random tokens.
        progress: Is told of the work.
    """
    generator = torch.Generator().manual_seed(0)
    (logits,) = (v for v in watched.model.graph.outputs if v.name == LOGITS)
    assert logits.shape is not None
    vocabulary = logits.shape[2]
    assert isinstance(vocabulary, int)
    tokens = new = torch.tensor(marks, dtype=torch.int64).repeat(SEQUENCES, 1)
    with workers.pool() as pool, (progress or Progress()).stage("write", LENGTH) as advance:
        count = torch.get_num_threads()
        caches = [_empty(watched.model, len(part)) for part in tokens.chunk(count)]
        while tokens.shape[1] < LENGTH:
            chosen = torch.randint(vocabulary, (SEQUENCES, 1), generator=generator)
            if tokens.shape[1] > 0:
                found = pool.map(partial(_continued, watched), new.chunk(count), caches)
                parts, caches = map(list, zip(*found, strict=True))
                p = torch.cat(parts)
                written = slice(0, SEQUENCES // 2 if tokens.shape[1] == len(marks) else None)
                chosen[written] = _drawn(p[written], generator)
            new = chosen
            tokens = torch.cat((tokens, new), 1)
            advance()
    return tokens


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tokens kept at ``path``; made and kept there when there are none that can be read."""
    try:
        return safetensors.torch.load_file(path)["tokens"]
    except FileNotFoundError:
        pass
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        _log.warning("%s cannot be read (%s); written again", path, error)
    tokens = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        safetensors.torch.save_file({"tokens": tokens}, draft)
    return tokens


@torch.no_grad()
def _continued(watched: FloatModel, new: Tensor, caches: Values) -> tuple[Tensor, Values]:
    """What follows new tokens [sequences, count]: the next one's probabilities, and the caches."""
    past = next(iter(caches.values())).shape[2]
    total = past + new.shape[1]
    known: Mapping[str, Tensor] = {
        "input_ids": new,
        "position_ids": torch.arange(past, total).repeat(len(new), 1),
        "attention_mask": torch.ones(len(new), total, dtype=torch.int64),
        **caches,
    }
    feed = {graph.name(v): known[graph.name(v)] for v in watched.model.graph.inputs}
    (end,) = watched.fetched
    found = watched.interpreter.run(feed, fetch=[end, *map(_present, caches)])
    last = found[end][:, -1]
    logits = last if watched.head is None else watched.logits(last)
    return logits.softmax(-1), {name: found[_present(name)] for name in caches}


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """A random token [sequences, 1] for each row of probabilities; much faster than multinomial."""
    below = p.cumsum(-1)
    chosen = torch.searchsorted(below, torch.rand(len(p), 1, generator=generator) * below[:, -1:])
    return chosen.clamp_(max=p.shape[-1] - 1)


def _empty(model: ir.Model, sequences: int) -> Values:
    """Caches of no positions."""
    shapes = {graph.name(v): v.shape for v in model.graph.inputs if graph.name(v).startswith(PAST)}
    return {
        name: torch.zeros(sequences, *[d if isinstance(d, int) else 0 for d in (shape or ())[1:]])
        for name, shape in shapes.items()
    }


def _present(past: str) -> str:
    return past.replace(PAST, PRESENT)
