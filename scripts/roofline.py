"""Measure this machine's bounds, read bandwidth and byte products, with 1 and with all threads.

The loops are C, compiled when this runs; see ``mxcompile/roofline.py``.
"""

import argparse
import json
from dataclasses import asdict

from mxcompile.roofline import measure
from mxcompile.runtime import cores


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    args = parser.parse_args()
    found = [measure(threads) for threads in sorted({1, cores()})]
    if args.json:
        return print(json.dumps([asdict(row) for row in found], indent=1))
    print("threads   read GB/s   peak GOP/s")
    for row in found:
        peak = "" if row.peak is None else f"{row.peak / 1e9:10.0f} ({row.instruction})"
        print(f"{row.threads:7}   {row.read_bandwidth / 1e9:9.1f}   {peak}")
    return None


if __name__ == "__main__":
    main()
