"""A plot as SVG text: a linear axis across, a logarithmic one up, lines with labelled points."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 200, 40, 50

COLOURS = ("#0b63c5", "#8a8f98", "#c8501e", "#2d8a4e", "#8a3ab9")
DASHES = ("none", "6 3", "2 3", "10 3 2 3")

STYLE = "text { font: 12px system-ui, sans-serif; fill: #1b1f24 } .point { font-size: 9px }"


@dataclass(frozen=True)
class Series:
    """A line: its colour tells the ``name``, its dashes the ``variant``; points are (x, y, label).

    A point above another's left, larger and worse, is drawn and not joined.
    """

    name: str
    variant: str
    points: Sequence[tuple[float, float, str]]

    @property
    def front(self) -> list[tuple[float, float]]:
        """The points that no smaller one is below, from left to right."""
        found: list[tuple[float, float]] = []
        for x, y, _ in sorted(self.points):
            if not found or y < found[-1][1]:
                found.append((x, y))
        return found


@dataclass(frozen=True)
class _Axes:
    """Where numbers lie on the page."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def of(cls, series: Sequence[Series]) -> "_Axes":
        xs = [x for s in series for x, _, _ in s.points]
        ys = [y for s in series for _, y, _ in s.points]
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
        return cls((math.floor(min(xs)), math.ceil(max(xs))), (low, max(high, low + 1)))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / max(self.x[1] - self.x[0], 1)
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )


def plot(series: Sequence[Series], title: str, x_label: str, y_label: str) -> str:
    """The SVG of some lines, all on the same axes; every y is above zero."""
    axes = _Axes.of(series)
    names = list(dict.fromkeys(s.name for s in series))
    variants = list(dict.fromkeys(s.variant for s in series))
    parts = [_text(LEFT, 22, title), *_grid(axes)]
    parts.append(_text(LEFT + 150, HEIGHT - 12, x_label))
    upright = f'<text transform="translate(18 {HEIGHT // 2 + 80}) rotate(-90)">'
    parts.append(f"{upright}{html.escape(y_label)}</text>")
    for s in series:
        colour = COLOURS[names.index(s.name) % len(COLOURS)]
        dash = DASHES[variants.index(s.variant) % len(DASHES)]
        parts += _line(axes, s, colour, dash)
    parts += _legend(names, variants)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" role="img">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(text)}</text>'


def _grid(axes: _Axes) -> Iterator[str]:
    """Lines at whole numbers across, and at 1, 2 and 5 of each power of ten up."""
    for x in range(int(axes.x[0]), int(axes.x[1]) + 1):
        left, bottom = axes.at(x, 10 ** axes.y[0])
        yield f'<path d="M{left:.1f} {bottom}V{TOP}" stroke="#e3e6ea"/>'
        yield _text(left - 3, bottom + 18, str(x))
    for power in range(int(axes.y[0]), int(axes.y[1]) + 1):
        for digit in (1, 2, 5) if power < axes.y[1] else (1,):
            y = digit * 10.0**power
            left, height = axes.at(axes.x[0], y)
            yield f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>'
            yield _text(LEFT - 42, height + 4, f"{y:g}")


def _line(axes: _Axes, series: Series, colour: str, dash: str) -> Iterator[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (axes.at(*point) for point in series.front))
    yield (
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
        f'stroke-dasharray="{dash}"/>'
    )
    for x, y, label in series.points:
        left, top = axes.at(x, y)
        yield f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}"/>'
        yield _text(left + 5, top - 4, label, "point")


def _legend(names: Sequence[str], variants: Sequence[str]) -> Iterator[str]:
    left = WIDTH - RIGHT + 20
    rows = [(name, COLOURS[i % len(COLOURS)], "none") for i, name in enumerate(names)]
    rows += [(v, "#1b1f24", DASHES[i % len(DASHES)]) for i, v in enumerate(variants)]
    for index, (text, colour, dash) in enumerate(rows):
        top = TOP + 12 + 20 * index
        yield (
            f'<path d="M{left} {top}h28" stroke="{colour}" stroke-width="1.6" '
            f'stroke-dasharray="{dash}"/>'
        )
        yield _text(left + 36, top + 4, text)
