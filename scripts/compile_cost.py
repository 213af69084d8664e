"""What compiling costs, stage by stage, and how it grows with the model.

Random Llama-like decoders of about the numbers of parameters that are asked for, with the bundled
model's tokenizer, are compiled one after another, each in a process of its own; the weights decide
no time. The last column is the exponent of growth in parameters, from the first model to the last:
1 is linear.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINYLM: Final = Path(__file__).parents[1] / "models" / "tinylm"
VOCABULARY: Final = 32768


def write_model(parameters: float, folder: Path) -> int:
    """Write a random model of about so many parameters; gives how many it has."""
    layers = 12
    hidden = next(
        width
        for width in range(64, 8192, 64)
        if VOCABULARY * width + layers * width * width * (4 + 9) >= parameters
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINYLM / name, folder / name)
    return sum(p.numel() for p in model.parameters())


def compile_model(model: Path, budget: str, folder: Path) -> dict[str, Any]:
    """Seconds by stage, and the most memory that the process had."""
    code = (
        "import resource, sys; from mxcompile.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    arguments = [model, "--budget", budget, "-o", folder / "out.mxc", "--json", "-q"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = int(done.stderr.split()[-1]) * 1024
    return {"seconds": json.loads(done.stdout)["seconds"], "peak_rss_bytes": peak}


def growth(rows: Sequence[dict[str, Any]], values: Sequence[float]) -> float:
    """The exponent of growth from the first row to the last."""
    first, last = (rows[i]["parameters"] for i in (0, -1))
    if first == last:
        return math.nan
    return math.log(max(values[-1], 1e-9) / max(values[0], 1e-9)) / math.log(last / first)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line a stage."""
    print(f"{'M parameters':14}" + "".join(f"{row['parameters'] / 1e6:9.0f}" for row in rows))
    lines = {
        f"{stage}, s": [row["seconds"].get(stage, 0.0) for row in rows]
        for stage in rows[0]["seconds"]
    }
    lines["all, s"] = [sum(row["seconds"].values()) for row in rows]
    lines["peak RSS, GB"] = [row["peak_rss_bytes"] / 1e9 for row in rows]
    for name, values in lines.items():
        numbers = "".join(f"{value:9.1f}" for value in values)
        print(f"{name:14}{numbers}   {growth(rows, values):5.2f}")


def main() -> None:
    """Compile at each size."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", default="30e6,100e6,300e6", help="(default: %(default)s)")
    parser.add_argument("--budget", default="4.2bit")
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    rows = []
    for parameters in map(float, args.parameters.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            count = write_model(parameters, folder / "hf")
            command = [sys.executable, "-m", "mxcompile.cli", "export", str(folder / "hf")]
            command += ["-o", str(folder / "model.onnx"), "-q"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found = compile_model(folder / "model.onnx", args.budget, folder)
            rows.append({"parameters": count, **found})
    return print(json.dumps(rows, indent=1)) if args.json else show(rows)


if __name__ == "__main__":
    main()
