"""Inline SVG charts whose colours come from the page's style sheet, so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420
HEAT_WIDTH = 310
MARGIN_LEFT, MARGIN_RIGHT = 46, 12
NUM_HEAT_CLASSES = 11


@dataclass(frozen=True)
class Line:
    """A curve: CSS colour class, label, and points of (x, mean, lowest, highest)."""

    colour: str
    label: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Bar:
    """A score bar with its interval; `value` and `half_width` in the unit of the axis."""

    colour: str
    label: str
    value: float
    half_width: float | None
    text: str


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low to high, about `count` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten within low to high, only the powers when there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= 6:
            break
    return ticks


def short_number(value: float) -> str:
    """1200000 as 1.2M, 0.0003 as 3e-4: at most a few characters for an axis."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def line_chart(
    lines: Sequence[Line], *, title: str, may_be_logarithmic: bool = True, x_label: str = "step", height: int = 230
) -> str:
    """Curves over steps with a faint band from the lowest to the highest value behind each mean.

    The vertical axis is logarithmic, where it may be, when the values are positive and span more than a factor of 20.
    """
    lines = [line for line in lines if line.points]
    xs = [point[0] for line in lines for point in line.points]
    means = [point[1] for line in lines for point in line.points]
    lows = [point[2] for line in lines for point in line.points]
    highs = [point[3] for line in lines for point in line.points]
    is_log = may_be_logarithmic and min(lows) > 0 and max(means) / min(means) > 20
    bottom, top = height - 34, 10
    left, right = MARGIN_LEFT, WIDTH - MARGIN_RIGHT
    if is_log:
        low, high = min(lows), max(highs)
        ticks = log_ticks(low, high)
    else:
        ticks = nice_ticks(min(lows), max(highs))
        low, high = ticks[0], ticks[-1]
    x_ticks = [tick for tick in nice_ticks(0, max(xs)) if tick <= max(xs) * 1.001]
    x_high = max(*xs, 1)

    def x_of(value: float) -> float:
        return left + (right - left) * value / x_high

    def y_of(value: float) -> float:
        if is_log:
            share = (math.log(value) - math.log(low)) / ((math.log(high) - math.log(low)) or 1)
        else:
            share = (value - low) / ((high - low) or 1)
        return bottom - (bottom - top) * share

    parts = [_open(height, f"{title} over {x_label}, {len(lines)} curves")]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>')
        parts.append(_tick(left - 6, y_of(tick) + 4, short_number(tick), "end"))
    for tick in x_ticks:
        parts.append(_tick(x_of(tick), bottom + 16, short_number(tick), "middle"))
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_tick(right, height - 4, escape(x_label), "end"))
    if is_log:
        parts.append(_tick(left, height - 4, "logarithmic", "start"))
    for line in lines:
        forward = " ".join(f"{x_of(x):.1f},{y_of(high_):.1f}" for x, _, _, high_ in line.points)
        back = " ".join(f"{x_of(x):.1f},{y_of(low_):.1f}" for x, _, low_, _ in reversed(line.points))
        parts.append(f'<polygon class="band {line.colour}" points="{forward} {back}"/>')
    for line in lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(mean):.1f}" for x, mean, _, _ in line.points)
        last_x, last = line.points[-1][:2]
        parts.append(f'<polyline class="line {line.colour}" points="{path}"/>')
        parts.append(
            f'<circle class="dot {line.colour}" cx="{x_of(last_x):.1f}" cy="{y_of(last):.1f}" r="3.5">'
            f"<title>{escape(line.label)}: {last:.4g} at {x_label} {last_x:.0f}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


def bar_chart(bars: Sequence[Bar], *, title: str, percent: bool, floor: float | None = None) -> str:
    """Horizontal bars from zero with 95 % intervals; the label stands above its bar, the number behind it.

    `floor` is what guessing gives: a dashed line.
    """
    row, top = 44, 4
    height = top + row * len(bars) + 22
    left, right = 2, WIDTH - 96
    ends = [bar.value + (bar.half_width or 0) for bar in bars]
    axis_high = 100.0 if percent else nice_ticks(0, max(ends))[-1]
    ticks = [0, 25, 50, 75, 100] if percent else nice_ticks(0, max(ends))
    bottom = top + row * len(bars) + 2

    def x_of(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0), axis_high) / axis_high

    parts = [_open(height, f"{title}: " + "; ".join(f"{bar.label} {bar.text}" for bar in bars))]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        anchor = "start" if tick == 0 else "middle"
        parts.append(_tick(x_of(tick), bottom + 15, short_number(tick), anchor))
    for i, bar in enumerate(bars):
        y = top + row * i
        end = x_of(bar.value)
        middle = y + 29
        reach = end if bar.half_width is None else x_of(bar.value + bar.half_width)
        parts.append(f'<text class="name" x="{left}" y="{y + 15}">{escape(bar.label)}</text>')
        parts.append(_rounded_bar(left, y + 22, max(end - left, 1.0), 14, bar.colour))
        if bar.half_width is not None:
            low = x_of(bar.value - bar.half_width)
            parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{reach:.1f}" y1="{middle}" y2="{middle}"/>')
            for x in (low, reach):
                parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 4}" y2="{middle + 4}"/>')
        parts.append(f'<text class="value" x="{max(end, reach) + 7:.1f}" y="{middle + 5}">{escape(bar.text)}</text>')
    if floor is not None:
        x = x_of(floor)
        parts.append(
            f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"><title>guessing</title></line>'
        )
    return "".join([*parts, "</svg>"])


def heat_map(columns: Sequence[tuple[int, int, list[float]]], *, title: str) -> str:
    """Expert loads of one layer: a row per expert, a column per stretch of steps, coloured against an even share."""
    num_experts = len(columns[0][2])
    row = 22 if num_experts <= 8 else 14 if num_experts <= 16 else 8
    # Three to a line on a wide screen: drawn narrower, so that the text keeps its size.
    top, left, right = 4, 26, HEAT_WIDTH - 4
    bottom = top + row * num_experts
    height = bottom + 34
    first, last = columns[0][0], columns[-1][1]
    width = (right - left) / len(columns)
    parts = [
        _open(
            height,
            f"{title}: share of tokens of each of {num_experts} experts, steps {first} to {last}",
            width=HEAT_WIDTH,
        )
    ]
    for expert in range(num_experts):
        y = top + row * expert
        if num_experts <= 16 or expert % 8 == 0:
            parts.append(_tick(left - 6, y + row / 2 + 4, str(expert + 1), "end"))
        # Neighbours of one colour become one rectangle: the page stays small with many experts.
        start = 0
        for i in range(1, len(columns) + 1):
            colour = heat_class(columns[start][2][expert], num_experts)
            if i < len(columns) and heat_class(columns[i][2][expert], num_experts) == colour:
                continue
            shares = [columns[k][2][expert] for k in range(start, i)]
            share = 100 * sum(shares) / len(shares)
            said = f"expert {expert + 1}, steps {columns[start][0]} to {columns[i - 1][1]}: {share:.1f} %"
            x, run_width = left + width * start, width * (i - start) + 0.3
            parts.append(
                f'<rect class="heat{colour}" x="{x:.2f}" y="{y}" width="{run_width:.2f}" '
                f'height="{row - 1}"><title>{said}</title></rect>'
            )
            start = i
    for tick in (first, (first + last) // 2, last):
        share = 0.5 if last == first else (tick - first) / (last - first)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(_tick(left + (right - left) * share, bottom + 15, short_number(tick), anchor))
    parts.append(_tick(right, height - 4, "step", "end"))
    parts.append(_tick(left, height - 4, "expert, from the top", "start"))
    return "".join([*parts, "</svg>"])


def heat_class(share: float, num_experts: int) -> int:
    """0 (a quarter of the even share or less) over 5 (even) to 10 (four times the even share or more), logarithmic."""
    if share <= 0:
        return 0
    octaves = math.log2(share * num_experts)
    return round((min(max(octaves, -2.0), 2.0) + 2.0) / 4.0 * (NUM_HEAT_CLASSES - 1))


def heat_legend() -> str:
    """The colour scale of the heat maps."""
    height, left, cell = 34, 4, 26
    parts = [_open(height, "colour scale: a quarter of the even share, even, four times the even share", width=294)]
    for i in range(NUM_HEAT_CLASSES):
        parts.append(f'<rect class="heat{i}" x="{left + cell * i}" y="2" width="{cell - 1}" height="12"/>')
    for text, position, anchor in (("¼ of even", 0.0, "start"), ("even", 0.5, "middle"), ("4 × even", 1.0, "end")):
        x = left + position * (cell * NUM_HEAT_CLASSES - 1)
        parts.append(_tick(x, 29, text, anchor))
    return "".join([*parts, "</svg>"])


def _open(height: int, description: str, width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _rounded_bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    radius = min(4.0, width)
    return (
        f'<path class="bar {colour}" d="M{x:.1f},{y} h{width - radius:.1f} a{radius},{radius} 0 0 1 {radius},{radius} '
        f'v{height - 2 * radius:.1f} a{radius},{radius} 0 0 1 -{radius},{radius} h-{width - radius:.1f} z"/>'
    )
