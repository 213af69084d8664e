"""Solve the plan of an 8-billion-parameter model, and say how long it took and in what memory.

The weights have the shapes of Llama 3.1 8B in tiles of 16 rows; their costs are made up. A tile's
sensitivity is log-normal around one of its weight's own, as measured ones are, and a format's error
is the mean squared one of its searched grid on Gaussian weights, give or take a tenth::

    python scripts/solve_8b.py --budget 4.2bit
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mxcompile.budget import Budgets
from mxcompile.formats import FORMATS
from mxcompile.latency import Latency
from mxcompile.plan import Unit
from mxcompile.price import Costs
from mxcompile.solve import solve

LAYERS = 32
LAYER = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
VOCABULARY, WIDTH = 128256, 4096

ERRORS = {1: 0.33, 2: 0.11, 3: 0.026, 4: 0.0061, 5: 0.0015, 6: 0.00037, 8: 0.000023}
"""Mean squared errors by bits, of weights of variance 1."""

SECONDS_PER_BYTE = 1 / 50e9
"""What a rate is predicted with: a machine that reads 50 GB/s."""


def shapes() -> tuple[Unit, ...]:
    """The weights of Llama 3.1 8B: rows are output features."""
    layers = [
        Unit(f"layers.{layer}.{name}", rows, columns)
        for layer in range(LAYERS)
        for name, (rows, columns) in LAYER.items()
    ]
    return (Unit("embed", VOCABULARY, WIDTH), *layers, Unit("lm_head", VOCABULARY, WIDTH))


def made_up(units: tuple[Unit, ...], seed: int = 0) -> Costs:
    """Costs of every tile in every format."""
    random = np.random.default_rng(seed)
    formats = tuple(FORMATS.values())
    errors = np.array([ERRORS[fmt.bits] for fmt in formats])
    damage = {}
    for unit in units:
        scale = unit.columns * 1e-7 * random.lognormal(0, 1)
        tiles = scale * random.lognormal(0, 1.5, (unit.tiles, 1))
        damage[unit.name] = tiles * errors * random.lognormal(0, 0.1, (unit.tiles, len(formats)))
    return Costs(units, formats, damage)


def _peak_memory() -> int:
    """The most that was resident; what ``getrusage`` says counts the parent before exec."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", action="append", help="repeatable, as mxcompile's; 4.2bit")
    args = parser.parse_args()
    units = shapes()
    costs = made_up(units)
    parameters = sum(unit.parameters for unit in units)
    budgets = Budgets.parse(args.budget or ["4.2bit"], parameters)
    latency = Latency(SECONDS_PER_BYTE, {"embed": 0}, "a machine that reads 50 GB/s")
    start = time.perf_counter()
    found = solve(costs, budgets, parameters=parameters, latency=latency)
    seconds = time.perf_counter() - start
    report: dict[str, Any] = {
        "parameters": parameters,
        "tiles": sum(unit.tiles for unit in units),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": _peak_memory(),
        "bits_per_weight": 8 * found.bytes / parameters,
        "damage": found.damage,
        "gap": found.gap,
        "method": found.method,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
