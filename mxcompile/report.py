"""The report of a compilation: one HTML file that needs nothing from elsewhere."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from mxcompile.artifact import Artifact
from mxcompile.inspection import describe_artifact

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.1em; margin: 2em 0 .5em }
p.sub { color: #57606a; margin: 0 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #eaeef2 }
th { font-weight: 600 } svg text { font: 11px system-ui, sans-serif; fill: #1b1f24 }
.scroll { overflow-x: auto }
"""

_CELL_WIDTH: Final = 46
_CELL_HEIGHT: Final = 20
_LABEL_WIDTH: Final = 190

_LAYER = re.compile(r"(?P<before>.*?)\.(?P<layer>\d+)\.(?P<component>.*)")


def render(
    artifact: Artifact,
    *,
    predicted: Mapping[str, float | str],
    seconds: Mapping[str, float],
    quality: Mapping[str, float] | None = None,
) -> str:
    """The report on ``artifact``.

    Args:
        artifact: complete but for the report.
        predicted: what the solver expected, by name.
        seconds: how long each stage took.
        quality: what was measured, where the manifest does not have it yet.
    """
    facts = describe_artifact(artifact)
    return "".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(facts['name'])}"
            f"</title><style>{_STYLE}</style><h1>{escape(facts['name'])}</h1>",
            f"<p class=sub>{facts['bits_per_weight']:.3f} bits per weight for "
            f"{escape(facts['target'])}, budget {escape(facts['budget'])}</p>",
            _section("Summary", _table(("", ""), _summary(facts))),
            _section(
                "Measured on the compiled program",
                _values(quality or facts["quality"]) or "Not verified: made where it cannot run.",
            ),
            _section("Predicted by the solver", _values(predicted)),
            _section("Formats", _formats(facts["formats"])),
            _section("Bits per weight by layer", _heat_map(facts["tensors"])),
            _section("Tensors", _tensors(facts["tensors"])),
            _section("Time", _values({k: f"{v:.1f} s" for k, v in seconds.items()})),
        ]
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2><div class=scroll>{body}</div>" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(_text(cell))}" for cell in cells)

    top = line(head, "th") if any(head) else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(values: Mapping[str, Any]) -> str:
    rows = [(name.replace("_", " "), value) for name, value in values.items()]
    return _table(("", ""), rows) if rows else ""


def _summary(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    decoder = facts["decoder_bits_per_weight"]
    rows = [
        ("parameters", f"{facts['parameters']:,}"),
        ("weight file", f"{facts['weight_bytes']:,} bytes"),
        ("code", f"{facts['code_bytes']:,} bytes"),
        ("bits per weight, all-in", f"{facts['bits_per_weight']:.3f}"),
        ("without the vocabulary", f"{decoder:.3f}" if decoder else ""),
        ("activations", facts["activations"]),
        ("KV cache", facts["kv_cache"] or ""),
        ("plan", facts["plan_digest"][:16]),
        ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]
    return [(name, value) for name, value in rows if value]


def _formats(formats: Mapping[str, int]) -> str:
    total = sum(formats.values())
    rows = [(name, f"{n:,}", f"{100 * n / total:.1f} %") for name, n in formats.items()]
    return _table(("format", "parameters", "share"), rows)


def _tensors(tensors: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (
            t["name"],
            f"{t['rows']} x {t['columns']}",
            f"{t['bits']:.2f}",
            ", ".join(f"{count} {name}" for name, count in t["tiles"].items()),
        )
        for t in tensors
    ]
    return _table(("tensor", "shape", "bits", "row tiles"), rows)


def _heat_map(tensors: Sequence[Mapping[str, Any]]) -> str:
    """A row a component, a column a layer; tensors outside the layers have one cell."""
    cells: dict[str, dict[int, float]] = {}
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor["name"])
        label, layer = (match["component"], int(match["layer"])) if match else (tensor["name"], 0)
        cells.setdefault(label.removesuffix(".weight"), {})[layer] = tensor["bits"]
    columns = 1 + max((layer for row in cells.values() for layer in row), default=0)
    parts = [_svg_text(_LABEL_WIDTH + x * _CELL_WIDTH, 14, str(x)) for x in range(columns)]
    for y, (label, row) in enumerate(cells.items(), start=1):
        parts.append(_svg_text(0, y * _CELL_HEIGHT + 14, label))
        parts += [_cell(x, y, bits) for x, bits in row.items()]
    width, height = _LABEL_WIDTH + columns * _CELL_WIDTH, (len(cells) + 1) * _CELL_HEIGHT
    return f"<svg width={width} height={height} role=img>{''.join(parts)}</svg>" if cells else ""


def _svg_text(x: int, y: int, text: str) -> str:
    short = text if len(text) <= 28 else "..." + text[-25:]
    return f"<text x={x + 4} y={y}>{escape(short)}<title>{escape(text)}</title></text>"


def _cell(x: int, y: int, bits: float) -> str:
    """A cell that is the darker the more bits; 2 is nearly white, 8 a full blue."""
    shade = 96 - 46 * min(max((bits - 2) / 6, 0), 1)
    left, top = _LABEL_WIDTH + x * _CELL_WIDTH, y * _CELL_HEIGHT
    return (
        f"<rect x={left} y={top} width={_CELL_WIDTH - 1} height={_CELL_HEIGHT - 1} "
        f'fill="hsl(212 80% {shade:.0f}%)"/>' + _svg_text(left + 6, top + 14, f"{bits:.2f}")
    )
