"""Pages of tables and charts: one HTML file that needs nothing from elsewhere.

Charts are inline SVG. A mark's tooltip is its ``<title>``, so that no script is needed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.1em; margin: 2em 0 .5em }
p { color: #57606a; margin: 0 0 1em; max-width: 48em }
table { border-collapse: collapse }
td, th { padding: .2em .8em; text-align: right; white-space: nowrap }
td.t, th.t { text-align: left } tr { border-bottom: 1px solid #eaeef2 }
th { font-weight: 600 } svg text { font: 11px system-ui, sans-serif; fill: #1b1f24 }
svg .soft { fill: #57606a } svg .end { text-anchor: end } svg .mid { text-anchor: middle }
.scroll { overflow-x: auto }
"""

ACCENT: Final = "#0b62c4"
PLAIN: Final = "#8c959f"
GRID: Final = "#eaeef2"

_CELL_WIDTH: Final = 46
_CELL_HEIGHT: Final = 20
_LABEL_WIDTH: Final = 190
_LABEL: Final = 28

_PLOT_WIDTH: Final = 560
_PLOT_HEIGHT: Final = 300
_LEFT: Final = 70
_RIGHT: Final = 110
_TOP: Final = 12
_BOTTOM: Final = 40


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole page."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        + "".join(sections)
    )


def section(title: str, body: str, note: str = "") -> str:
    """A part of a page, with a line that says how to read it; nothing where the body is empty."""
    said = f"<p>{escape(note)}</p>" if note else ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{head}{said}<div class=scroll>{body}</div>" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers are shown to four digits and line up on the right, words on the left."""
    body = [list(row) for row in rows]
    words = [any(_is_word(value) for value in column) for column in zip(*body, strict=True)]

    def line(cells: Sequence[Any], tag: str) -> str:
        marked = zip(cells, words, strict=True)
        return "<tr>" + "".join(
            f"<{tag}{' class=t' if word else ''}>{escape(text(value))}" for value, word in marked
        )

    top = line(head, "th") if any(head) and body else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in body)}</table>"


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and not value.lstrip("-")[:1].isdigit()


def values(named: Mapping[str, Any]) -> str:
    """A table of names and values; nothing where there are none."""
    rows = [(name.replace("_", " "), value) for name, value in named.items()]
    return table(("", ""), rows) if rows else ""


def text(value: Any) -> str:
    """A value for the eye."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def heat_map(
    rows: Mapping[str, Mapping[int, float]],
    depth: Callable[[float], float],
    show: Callable[[float], str],
) -> str:
    """A row a name, a column a number, a cell that is the darker the deeper its value.

    Args:
        rows: Values by row name and column; a cell may be missing.
        depth: How dark a value is, from 0 to 1.
        show: A value as text.
    """
    columns = 1 + max((column for row in rows.values() for column in row), default=0)
    parts = [_text(_LABEL_WIDTH + 4 + x * _CELL_WIDTH, 14, str(x)) for x in range(columns)]
    for y, (label, row) in enumerate(rows.items(), start=1):
        parts.append(_text(4, y * _CELL_HEIGHT + 14, label, width=_LABEL))
        for x, value in row.items():
            left, top = _LABEL_WIDTH + x * _CELL_WIDTH, y * _CELL_HEIGHT
            shade = min(max(depth(value), 0.0), 1.0)
            fill, ink = f"hsl(212 80% {96 - 58 * shade:.0f}%)", "#fff" if shade > 0.65 else ""
            parts.append(
                f"<rect x={left} y={top} width={_CELL_WIDTH - 1} height={_CELL_HEIGHT - 1} "
                f'fill="{fill}"/>' + _text(left + 6, top + 14, show(value), ink=ink)
            )
    width, height = _LABEL_WIDTH + columns * _CELL_WIDTH, (len(rows) + 1) * _CELL_HEIGHT
    return _svg(width, height, parts) if rows else ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a chart with its name."""

    name: str
    x: float
    y: float
    strong: bool = False


def curve(
    line: Sequence[tuple[float, float]], marks: Sequence[Mark], labels: tuple[str, str]
) -> str:
    """A line and marks over a linear x axis and a logarithmic y axis; ``labels`` name them."""
    points = [*line, *((mark.x, mark.y) for mark in marks)]
    points = [(x, y) for x, y in points if y > 0]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    x_axis, y_axis = _Linear.of(xs), _Log.of(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        left = _LEFT + x_axis.at(x) * _PLOT_WIDTH
        return left, _TOP + (1 - y_axis.at(y)) * _PLOT_HEIGHT

    parts = []
    for tick in y_axis.ticks:
        y = place(xs[0], tick)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{_PLOT_WIDTH}" stroke="{GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:g}", style="soft end"))
    for tick in x_axis.ticks:
        x = place(tick, ys[0])[0]
        parts.append(_text(x, _TOP + _PLOT_HEIGHT + 16, f"{tick:g}", style="soft mid"))
    path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in line if y > 0)
    parts.append(f'<path d="M{path}" fill="none" stroke="{ACCENT}" stroke-width="2"/>')
    for mark in marks:
        if mark.y > 0:
            x, y = place(mark.x, mark.y)
            parts.append(_dot(x, y, f"{mark.name}: {mark.x:.4g}, {mark.y:.4g}", mark.strong))
            # What stands out is named on the left, so that neighbours do not cover each other.
            side, style = (-9, "end") if mark.strong else (8, "soft")
            parts.append(_text(x + side, y + 4, mark.name, style=style))
    parts.append(_text(_LEFT + _PLOT_WIDTH / 2, _TOP + _PLOT_HEIGHT + 34, labels[0], style="mid"))
    middle = _TOP + _PLOT_HEIGHT / 2
    parts.append(
        f'<text x=14 y={middle:.0f} class=mid transform="rotate(-90 14 {middle:.0f})">'
        f"{escape(labels[1])}</text>"
    )
    return _svg(_LEFT + _PLOT_WIDTH + _RIGHT, _TOP + _PLOT_HEIGHT + _BOTTOM, parts)


def dots(rows: Sequence[tuple[str, float]], strong: str, label: str) -> str:
    """A dot a row on a logarithmic axis, least first; the row named ``strong`` stands out."""
    found = sorted((row for row in rows if row[1] > 0), key=lambda row: row[1])
    if not found:
        return ""
    axis = _Log.of([value for _, value in found])
    height = len(found) * _CELL_HEIGHT
    parts = []
    for tick in axis.ticks:
        x = _LABEL_WIDTH + axis.at(tick) * _PLOT_WIDTH
        parts.append(f'<path d="M{x:.1f} 4v{height}" stroke="{GRID}"/>')
        parts.append(_text(x, height + 18, f"{tick:g}", style="soft mid"))
    for index, (name, value) in enumerate(found):
        x, y = _LABEL_WIDTH + axis.at(value) * _PLOT_WIDTH, (index + 0.5) * _CELL_HEIGHT + 4
        parts.append(_text(4, y + 4, name, width=_LABEL))
        parts.append(_dot(x, y, f"{name}: {value:.4g}", name == strong))
        parts.append(_text(x + 9, y + 4, f"{value:.3g}", style="soft"))
    parts.append(_text(_LABEL_WIDTH + _PLOT_WIDTH / 2, height + 34, label, style="mid"))
    return _svg(_LABEL_WIDTH + _PLOT_WIDTH + _RIGHT, height + 40, parts)


@dataclass(frozen=True, slots=True)
class _Linear:
    """An axis from ``low`` to ``high`` with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, found: Iterable[float]) -> "_Linear":
        numbers = list(found)
        low, high = min(numbers), max(numbers)
        span = (high - low) or 1.0
        step = 10 ** math.floor(math.log10(span))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 8)
        first, last = math.floor(low / step), math.ceil(high / step)
        ticks = tuple(round(i * step, 10) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1] if ticks[-1] > ticks[0] else ticks[0] + 1, ticks)

    def at(self, value: float) -> float:
        """The place of a value, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class _Log:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, fewer over a wide range."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, found: Iterable[float]) -> "_Log":
        numbers = list(found)
        low, high = min(numbers) / 1.15, max(numbers) * 1.15
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 5 else (1,)
        every = (float(f"{step}e{decade}") for decade in decades for step in steps)
        return cls(low, high, tuple(tick for tick in every if low <= tick <= high))

    def at(self, value: float) -> float:
        """The place of a value, from 0 to 1."""
        return math.log(value / self.low) / math.log(self.high / self.low)


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return f"<svg width={width:.0f} height={height:.0f} role=img>{''.join(parts)}</svg>"


def _dot(x: float, y: float, title: str, strong: bool) -> str:
    fill, radius = (ACCENT, 5) if strong else (PLAIN, 4)
    return (
        f'<circle cx={x:.1f} cy={y:.1f} r={radius} fill="{fill}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _text(
    x: float, y: float, said: str, *, style: str = "", ink: str = "", width: int = 100
) -> str:
    """Text that is cut to so many characters, whole in its tooltip."""
    short = said if len(said) <= width else "..." + said[3 - width :]
    extra = (f' class="{style}"' if style else "") + (f' style="fill:{ink}"' if ink else "")
    return f"<text x={x:g} y={y:g}{extra}>{escape(short)}<title>{escape(said)}</title></text>"
