"""Line plots as SVG text, for a page that follows the reader's light or dark mode.

Knows the evaluation's figures and SVG; no plotting library, no HTML page. Colours are CSS variables
(`--plm`, `--pema`, `--ink`, `--muted`, `--line`, `--card`) that the page defines. All names stand in the legend,
so that no label covers data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from pema_ray.evaluation.results import Evaluation, LambdaSweep, SystemScore, TrainingHistory, TrainingPoint

Point = tuple[float, float]

PLM, PEMA, MUTED = "var(--plm)", "var(--pema)", "var(--muted)"
_DASHES = ("", "7 4", "2 4", "9 3 2 3")
_WIDTH, _PLOT_HEIGHT = 480.0, 220.0
_LEFT, _RIGHT, _BOTTOM = 50.0, 14.0, 44.0
_LEGEND_ROW, _CHARACTER = 20.0, 6.7
_MOST_POINTS, _MOST_DOTS, _MOST_TIPS = 300, 20, 100


@dataclass(frozen=True, slots=True)
class Series:
    """A measured curve; `points` are joined by straight lines in the order given."""

    name: str
    points: Sequence[Point]
    colour: str = PEMA
    dash: str = ""
    width: float = 2.0


@dataclass(frozen=True, slots=True)
class Spot:
    """A marked point."""

    name: str
    point: Point
    colour: str
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A dashed line across the plot: y = value, or x = value."""

    name: str
    value: float
    axis: Literal["x", "y"] = "y"
    colour: str = MUTED
    dash: str = "4 4"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], with steps of 1, 2, 2.5 or 5 times a power of ten; `about` so many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    spots: Sequence[Spot] = (),
    levels: Sequence[Level] = (),
    x_range: Point | None = None,
    y_range: Point | None = None,
    percent: bool = False,
) -> str:
    """An SVG element with axes, ticks, legend and a tooltip on every point; skips values that are not finite."""
    series = [_finite(curve) for curve in series]
    series = [curve for curve in series if curve.points]
    spots = [spot for spot in spots if _is_finite(spot.point)]
    levels = [level for level in levels if math.isfinite(level.value)]
    points = [point for curve in series for point in curve.points] + [spot.point for spot in spots]
    if not points:
        return (
            f'<svg class="plot" viewBox="0 0 480 60" role="img" aria-label="{escape(title)}">'
            '<text x="240" y="34" text-anchor="middle">nothing was measured</text></svg>'
        )
    legend, top = _legend(series, spots, levels)
    top += 26
    x_low, x_high = x_range or _span([x for x, _ in points] + [v.value for v in levels if v.axis == "x"], 0.02)
    y_low, y_high = y_range or _span([y for _, y in points] + [v.value for v in levels if v.axis == "y"], 0.08)
    bottom, right = top + _PLOT_HEIGHT, _WIDTH - _RIGHT

    def place(point: Point) -> Point:
        across, up = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return _LEFT + across * (right - _LEFT), bottom - up * _PLOT_HEIGHT

    parts = [legend, f'<text x="0" y="{top - 12:.0f}">{escape(y_label)}</text>']
    y_ticks, x_ticks = ticks(y_low, y_high, 6), ticks(x_low, x_high, 6)
    for value in y_ticks:
        y = place((x_low, value))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{value * 100:.4g} %" if percent else _label(value, y_ticks)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in x_ticks:
        x = place((value, y_low))[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{_label(value, x_ticks)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    parts.append(f'<text x="{right}" y="{bottom + 38:.1f}" text-anchor="end">{escape(x_label)}</text>')
    for level in levels:
        parts.append(_level(level, place, (x_low, y_low), (x_high, y_high)))
    for curve in series:
        parts.append(_curve(curve, place, percent))
    for spot in spots:
        x, y = place(spot.point)
        ring = (
            f'fill="var(--card)" stroke="{spot.colour}" stroke-width="2.5"' if spot.hollow else f'fill="{spot.colour}"'
        )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" {ring}><title>{escape(spot.name)}</title></circle>')
    size = f"0 0 {_WIDTH:.0f} {bottom + _BOTTOM:.0f}"
    return f'<svg class="plot" viewBox="{size}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def training_plot(history: TrainingHistory) -> str:
    """Training and validation loss over steps, the best step marked."""

    def losses(points: Sequence[TrainingPoint]) -> list[Point]:
        return [(float(point.step), point.loss) for point in points]

    series = (
        Series("training", losses(history.train), colour=MUTED, width=1.2),
        Series("validation", losses(history.validation)),
    )
    best = Level(f"best, step {history.best_step:,}", float(history.best_step), "x", PEMA)
    return line_plot("Loss over training steps", "optimisation step", "loss", series, levels=[best])


def sweep_plot(sweep: LambdaSweep) -> str:
    """NLL of the mixture against λ; the PLM's end (λ = 0), PEMA's (λ = 1), and the lowest point between them."""
    curve = sorted(zip(sweep.lambdas, sweep.nll, strict=True))
    spots = [
        Spot(f"PLM {sweep.plm:.3f}", (0.0, sweep.plm), PLM),
        Spot(f"PEMA {sweep.pema:.3f}", (1.0, sweep.pema), PEMA),
    ]
    inner = [point for point in curve if 0 < point[0] < 1 and _is_finite(point)]
    best = min(inner, key=lambda point: point[1], default=None)
    if best and best[1] < min(sweep.plm, sweep.pema):
        spots.append(Spot(f"best {best[1]:.3f} at λ = {best[0]:g}", best, "var(--ink)", hollow=True))
    series = (Series("mixture", curve, colour="var(--ink)", width=1.6),)
    label = "nats per target token"
    return line_plot("NLL against λ", "λ", label, series, spots=spots, x_range=(-0.04, 1.04))


def bleu_plot(systems: Sequence[SystemScore]) -> str:
    """sBLEU against λ_max; systems without λ are levels."""
    colours = {"copy": (MUTED, "4 4"), "few_shot": (PLM, "8 3")}
    levels = [Level(f"{s.name} {s.bleu:.1f}", s.bleu, "y", *colours[s.kind]) for s in systems if s.kind in colours]
    series, spots = _over_lambda([(system, system.bleu) for system in systems], "{:.1f}")
    return line_plot("sBLEU against λ_max", "λ_max", "sBLEU", series, spots=spots, levels=levels, x_range=(-0.04, 1.04))


def archaic_plot(evaluation: Evaluation) -> str:
    """Share of archaic outputs against λ_max; the shares of sources and references are levels."""
    shares = (
        ("source", evaluation.source_archaic_share, "4 4"),
        ("reference", evaluation.reference_archaic_share, "1 4"),
    )
    levels = [Level(f"{name} {share:.1%}", share, dash=dash) for name, share, dash in shares if share is not None]
    measurements = [(s, s.archaic_share) for s in evaluation.systems if s.archaic_share is not None]
    series, spots = _over_lambda(measurements, "{:.1%}")
    highest = max([share for _, share in measurements] + [level.value for level in levels], default=1.0)
    return line_plot(
        "Archaic share against λ_max", "λ_max", "outputs that match the archaic pattern", series, spots=spots,
        levels=levels, x_range=(-0.04, 1.04), y_range=(-0.02 * highest, 1.08 * highest) if highest else (0.0, 1.0),
        percent=True,
    )  # fmt: skip


def schedule_plot(curves: dict[str, tuple[float, ...]]) -> str:
    """λ over the positions of an answer, for each schedule."""
    series = [
        Series(name, list(enumerate(values)), dash=_DASHES[index % len(_DASHES)])
        for index, (name, values) in enumerate(curves.items())
    ]
    return line_plot("λ over positions", "position in the answer", "λ", series, y_range=(0.0, 1.05))


def _over_lambda(measured: Sequence[tuple[SystemScore, float]], form: str) -> tuple[list[Series], list[Spot]]:
    """One curve per schedule; at λ = 0 every schedule is the PLM alone, so every curve starts there."""
    alone = [(system.name, value) for system, value in measured if system.kind == "plm"][:1]
    schedules: dict[str, list[Point]] = {}
    for system, value in measured:
        if system.kind == "pema" and system.lambda_max is not None:
            schedules.setdefault(system.schedule or "PEMA", []).append((system.lambda_max, value))
    series = [
        Series(
            f"PEMA, {name}",
            sorted({*((0.0, value) for _, value in alone), *points}),
            dash=_DASHES[index % len(_DASHES)],
        )
        for index, (name, points) in enumerate(schedules.items())
    ]
    return series, [Spot(f"{name} {form.format(value)}", (0.0, value), PLM) for name, value in alone]


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _finite(series: Series) -> Series:
    points = [point for point in series.points if _is_finite(point)]
    stride = math.ceil(len(points) / _MOST_POINTS)
    thinned = points[::stride] if stride > 1 else points
    if thinned and thinned[-1] != points[-1]:
        thinned.append(points[-1])
    return Series(series.name, thinned, series.colour, series.dash, series.width)


def _span(values: Sequence[float], margin: float) -> Point:
    low, high = min(values), max(values)
    pad = (high - low) * margin or abs(low) * 0.1 or 1.0
    return low - pad, high + pad


def _label(value: float, ticks: Sequence[float]) -> str:
    """`value` with the fewest decimals that show all `ticks` exactly."""
    decimals = next((n for n in range(6) if all(abs(round(tick, n) - tick) < 1e-9 for tick in ticks)), 6)
    return f"{value:,.{decimals}f}"


def _level(level: Level, place, low: Point, high: Point) -> str:
    ends = ((low[0], level.value), (high[0], level.value)) if level.axis == "y" else None
    (x1, y1), (x2, y2) = map(place, ends or ((level.value, low[1]), (level.value, high[1])))
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{level.colour}" stroke-width="1.5" '
        f'stroke-dasharray="{level.dash}"><title>{escape(level.name)}</title></line>'
    )


def _curve(series: Series, place, percent: bool) -> str:
    placed = [place(point) for point in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{series.colour}" stroke-width="{series.width}" '
        f'stroke-linejoin="round" stroke-dasharray="{series.dash or "none"}"/>'
    ]
    if len(placed) <= _MOST_TIPS:
        dot = "dot" if len(placed) <= _MOST_DOTS else "dot quiet"
        for (x, y), (x_value, y_value) in zip(placed, series.points, strict=True):
            figure = f"{y_value:.1%}" if percent else f"{y_value:.4g}"
            tip = f"<title>{escape(series.name)}: {figure} at {x_value:g}</title>"
            parts.append(f'<circle class="{dot}" cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{series.colour}">{tip}</circle>')
    return "".join(parts)


def _legend(series: Sequence[Series], spots: Sequence[Spot], levels: Sequence[Level]) -> tuple[str, float]:
    """The legend's SVG and its height; a full row continues in the next."""
    entries: list[tuple[str, str]] = []
    for item in (*series, *levels):
        stroke = f'stroke="{item.colour}" stroke-width="2" stroke-dasharray="{item.dash or "none"}"'
        entries.append((item.name, f'<line x1="0" x2="22" y1="-4" y2="-4" {stroke}/>'))
    for spot in spots:
        ring = f'fill="none" stroke="{spot.colour}" stroke-width="2"' if spot.hollow else f'fill="{spot.colour}"'
        entries.append((spot.name, f'<circle cx="17" cy="-4" r="4.5" {ring}/>'))
    parts, x, y = [], 0.0, 14.0
    for name, swatch in entries:
        width = 30 + _CHARACTER * len(name) + 14
        if x and x + width > _WIDTH:
            x, y = 0.0, y + _LEGEND_ROW
        parts.append(
            f'<g transform="translate({x:.0f} {y:.0f})">{swatch}<text class="key" x="28">{escape(name)}</text></g>'
        )
        x += width
    return "".join(parts), y + 14
