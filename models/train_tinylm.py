"""Trains the tiny language model from nothing on a plain CPU.

The learning rate follows the wall clock, so a run always ends on time with a fully annealed model,
however fast or busy the machine is.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from corpus import BOS, EOS, PACKAGES_DIR, SOURCES, encode, load_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024
"""The longest sequence, in tokens, that the model is trained on."""
BATCH_TOKENS = 2048
WORKERS = 2

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up and a cosine decay to zero, both functions of the elapsed time.

    Attributes:
        seconds: The length of the run.
        peak: The highest learning rate.
        warmup: The share of the run spent warming up.
    """

    seconds: float
    peak: float = 3e-3
    warmup: float = 0.02

    def rate(self, elapsed: float) -> float:
        """Returns the learning rate after `elapsed` seconds."""
        progress = min(elapsed / self.seconds, 1.0)
        if progress < self.warmup:
            return self.peak * max(progress / self.warmup, 0.01)
        decay = (progress - self.warmup) / (1.0 - self.warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * decay))


def balanced_sample(texts: Sequence[str], characters: int = 4_000_000) -> Sequence[str]:
    """Returns evenly spaced texts of a source, so that no dictionary drowns the prose."""
    return texts[:: max(1, round(sum(map(len, texts)) / characters))]


def train_tokenizer(texts: Sequence[str], vocabulary: int = 4096) -> Tokenizer:
    """Learns a byte-level BPE tokenizer that starts every text with `<|bos|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return tokenizer


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Returns an untrained model of 4.6 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
        )
    )


def sample_batch(rows: Sequence[torch.Tensor], weights: torch.Tensor, length: int) -> torch.Tensor:
    """Returns random windows of `length` tokens, their rows drawn by weight."""
    picks = torch.multinomial(weights, BATCH_TOKENS // length, replacement=True).tolist()
    windows = []
    for row in (rows[pick] for pick in picks):
        start = int(torch.randint(len(row) - length, ()))
        windows.append(row[start : start + length])
    return torch.stack(windows)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices, and AdamW for the embedding and the norms.

    After equally many short steps, Muon's loss is far below that of AdamW alone; scaled to AdamW's
    update size, it shares its learning rate.
    """
    matrices: list[torch.Tensor] = [p for p in model.model.layers.parameters() if p.ndim == 2]
    muon = {id(matrix) for matrix in matrices}
    others: list[torch.Tensor] = [p for p in model.parameters() if id(p) not in muon]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes model (in half precision) and tokenizer; an older folder is replaced whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / folder.name
        half = copy.deepcopy(model).half()
        half.generation_config = GenerationConfig(
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(EOS),
        )
        half.save_pretrained(unfinished)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=EOS,
            model_max_length=CONTEXT,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(unfinished)
        if folder.exists():
            folder.rename(Path(scratch) / "older")
        unfinished.rename(folder)


def gradients(model: LlamaForCausalLM, windows: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Returns the loss on some windows and its gradient for each parameter."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=windows, labels=windows).loss
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def train(
    model: LlamaForCausalLM,
    rows: Sequence[torch.Tensor],
    schedule: Schedule,
    on_tenth: Callable[[], None],
) -> None:
    """Trains the model in place until the schedule's time is up.

    The parts of a batch go to single-threaded workers: on a machine that others use too, threads
    that meet once a step are several times faster than threads that meet in every operation.

    Args:
        model: The model to train.
        rows: The token ids of each source, in the order of `SOURCES`.
        schedule: The learning rate by elapsed time.
        on_tenth: Called after each tenth of the run, to save the model.
    """
    weights = torch.tensor([source.weight for source in SOURCES])
    parameters, optimizers = list(model.parameters()), build_optimizers(model)
    start, step, tenths = time.monotonic(), 0, 0
    torch.set_num_threads(1)
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while (elapsed := time.monotonic() - start) < schedule.seconds:
            # Every eighth batch has long windows: enough to learn all positions, and cheap.
            batch = sample_batch(rows, weights, CONTEXT if step % 8 == 7 else CONTEXT // 4)
            parts = list(pool.map(partial(gradients, model), batch.chunk(WORKERS)))
            for parameter, *grads in zip(parameters, *(grads for _, grads in parts), strict=True):
                parameter.grad = torch.stack(grads).mean(dim=0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(elapsed)
                optimizer.step()
            step += 1
            if step % 20 == 0:
                loss = sum(loss for loss, _ in parts) / len(parts)
                _LOG.info("%5.0f s  step %5d  loss %.3f", elapsed, step, loss)
            if elapsed > (tenths + 1) * schedule.seconds / 10:
                tenths += 1
                on_tenth()


def main() -> None:
    """Trains a tokenizer and a model on the training part of every source and saves both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40.0, help="length of the training run")
    parser.add_argument("--output", type=Path, default=Path("models/tinylm"))
    parser.add_argument("--packages", type=Path, default=PACKAGES_DIR, help="unpacked sources")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(tempfile.gettempdir()) / "tinylm-checkpoint",
        help="folder that holds the unfinished model after each tenth of the run",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(0)
    texts = [load_split(source, args.packages).train for source in SOURCES]
    tokenizer = train_tokenizer([text for source in texts for text in balanced_sample(source)])
    rows = [torch.tensor(encode(tokenizer, source)) for source in texts]
    for source, row in zip(SOURCES, rows, strict=True):
        print(f"{source.name:10} {len(row):>10,} training tokens")
    model = build_model(tokenizer)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

    schedule = Schedule(args.minutes * 60)
    train(model, rows, schedule, partial(save, model, tokenizer, args.checkpoints))
    save(model, tokenizer, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
