"""Draw series of a run's log as panels: inline SVG with title and legend in HTML."""

import html
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

COLOURS = ("#1f5a9e", "#d07a1e", "#3d8f63", "#9b4f96", "#b5433d", "#5f6b7a", "#8a6d1f", "#2596a8")
NOT_TERMS = {"step", "epoch", "world_size", "seconds", "skipped", "loss"}  # and the series of other panels:
NOT_TERMS |= {"lr", "grad_norm", "logit_bias", "images_per_second", "data_wait"}
PARTS = ("kl", "soft_ce", "teacher_entropy", "target_entropy", "wmse", "info_nce")
IN_NATS = re.compile(r"(.+_)?(kl|soft_ce|teacher_entropy|target_entropy|info_nce)|itc|icl|affinity")
MOST_POINTS = 1500

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    name: str
    steps: np.ndarray
    values: np.ndarray
    """NaN where the log holds null."""
    colour: str = COLOURS[0]
    dashed: bool = False

    def finite(self) -> list[float]:
        return self.values[np.isfinite(self.values)].tolist()


@dataclass(frozen=True)
class Panel:
    title: str
    curves: list[Curve]
    unit: str
    scale: Literal["auto", "log", "from zero"] = "auto"
    """auto is logarithmic where positive values span a decade."""
    noisy: bool = False
    """Draw a running mean over the values and emphasise the first curve."""
    note: str = ""


def read_curves(rows: Rows) -> dict[str, Curve]:
    """All numeric series, in order of appearance; null and infinities become NaN."""
    curves = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if all(value is None or type(value) in (int, float) for _, value in points):
            values = np.array([math.nan if value is None else float(value) for _, value in points])
            values[~np.isfinite(values)] = math.nan
            curves[name] = Curve(name, np.array([step for step, _ in points]), values)
    return curves


def pick(curves: dict[str, Curve], *names: str) -> list[Curve]:
    """The existing curves of these names, each in another colour."""
    found = [curves[name] for name in names if name in curves]
    return [replace(curve, colour=COLOURS[i % len(COLOURS)]) for i, curve in enumerate(found)]


def group_terms(names: Iterable[str], active: Iterable[str]) -> dict[str, list[str]]:
    """Loss term → its series: the longest active term that the name starts with, or the name without its part."""
    groups: dict[str, list[str]] = {}
    for name in names:
        owners = [term for term in active if name == term or name.startswith(f"{term}_")]
        before = re.split(rf"_(?=(?:{'|'.join(PARTS)})$)", name)[0]
        groups.setdefault(max(owners, key=len, default=before), []).append(name)
    return groups


def loss_panels(curves: dict[str, Curve], options: dict[str, Any]) -> list[Panel]:
    """Panels of the total and of every term; unknown numeric series are shown like terms."""
    active = [name[10:-7] for name, value in options.items() if re.fullmatch(r"objective\.\w+\.weight", name) and value]
    terms = [name for name in curves if name not in NOT_TERMS and not name.endswith("logit_scale")]
    panels = [Panel("loss", pick(curves, "loss"), "weighted sum", noisy=True)]
    for term, names in group_terms(terms, active).items():
        panels += term_panels(term, names, curves)
    return panels


def term_panels(term: str, names: list[str], curves: dict[str, Curve]) -> list[Panel]:
    """The divergence with its cross-entropy and entropies, then the other parts; one panel if they are few."""
    kl, ce, *entropies = (f"{term}_{part}" for part in PARTS[:4])
    kl, ce = (name if name in names else term for name in (kl, ce))
    first = [name for name in dict.fromkeys((kl, ce, *entropies)) if name in names]
    rest = [name for name in names if name not in first]
    parts = {f"{term}: divergence": first, f"{term}: value, other parts": rest}
    if len(names) <= 4:
        parts = {term: first + rest}
    panels = []
    for title, members in parts.items():
        unit = "nats" if all(IN_NATS.fullmatch(name) for name in members) else "value"
        sums = [f"{ce} = {kl} + {name}, which the student cannot change." for name in entropies if name in members]
        note = "" if kl == ce else "".join(sums)
        panels.append(Panel(title, pick(curves, *members), unit, noisy=True, note=note))
    return panels


def evaluation_panels(results: dict[tuple[str, str], Rows]) -> list[Panel]:
    """Top-1 and top-5 over steps; none for a single evaluation, which the table shows."""
    names, panels = list(dict.fromkeys(name for name, _ in results)), []
    every = [row for rows in results.values() for row in rows if "main_metric_name" in row]
    others = {str(row["main_metric_name"]) for row in every if "acc1" not in row["metrics"]}
    first = " or ".join(["top-1 accuracy", *sorted(others)])
    for title, metric in ((first, "acc1"), ("top-5 accuracy", "acc5")):
        lines = []
        for (name, weights), rows in results.items():
            curve = read_curves([{"step": row["step"], metric: percentage(row, metric)} for row in rows])[metric]
            colour = COLOURS[names.index(name) % len(COLOURS)]
            lines.append(replace(curve, name=f"{name} ({weights})", colour=colour, dashed=weights != "student"))
        panels.append(Panel(title, lines, "%"))
    return panels if any(len(rows) > 1 for rows in results.values()) else []


def percentage(row: dict[str, Any], metric: str) -> float | None:
    """A metric in percent; for acc1 the main metric, if the task has no accuracy."""
    metrics = row.get("metrics")
    value = metrics.get(metric) if isinstance(metrics, dict) else None
    if metric == "acc1" and isinstance(metrics, dict) and "acc1" not in metrics:
        value = metrics.get("main_metric")
    return 100 * value if isinstance(value, int | float) and math.isfinite(value) else None


def smoothing_window(num_values: int) -> int:
    return 1 if num_values < 30 else min(max(num_values // 20, 4), 100) | 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of the finite values in the window, which is shorter at the ends; NaN stays NaN."""
    finite, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), ones, "same")
    return np.where(finite, sums / np.maximum(np.convolve(finite, ones, "same"), 1), math.nan)


def thin(values: np.ndarray) -> np.ndarray:
    """Positions to draw: all, or the minimum and maximum of every interval, so that no spike is lost."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    kept = set()
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        kept |= {part[np.nan_to_num(values[part], nan=math.inf).argmin()]}
        kept |= {part[np.nan_to_num(values[part], nan=-math.inf).argmax()]}
    return np.array(sorted(kept))


def draw(panel: Panel) -> Any:
    """A figure without text from the log files, which stands in the page's HTML."""
    from matplotlib import ticker

    figure, axes = new_figure(2.6)
    for position, curve in enumerate(panel.curves):
        values, dash = curve.values, "--" if curve.dashed else "-"
        style: dict[str, Any] = {"color": curve.colour, "zorder": 3 - position / 100}
        width = 2.0 if panel.noisy and position == 0 else 1.4
        window = smoothing_window(len(values)) if panel.noisy else 1
        for shown, alpha, w in ((values, 0.3, 0.9), (running_mean(values, window), 1, width))[window == 1 :]:
            kept = thin(shown)
            label = curve.name if alpha == 1 else None  # for the legend of to_pixels
            axes.plot(curve.steps[kept], shown[kept], dash, alpha=alpha, linewidth=w, label=label, **style)
        gap = ~np.isfinite(np.concatenate(([math.nan], values, [math.nan])))
        dots = ~gap[1:-1] & ((gap[:-2] & gap[2:]) | (len(values) <= 25))  # a point between gaps has no line
        axes.plot(curve.steps[dots], values[dots], "o", markersize=3.5, **style)
    every = [value for curve in panel.curves for value in curve.finite()]
    low, high = min(every), max(every)
    logarithmic = low > 0 and (panel.scale == "log" or (panel.scale == "auto" and high >= 10 * low))
    if logarithmic:
        margin = max(1.15, (5 * low / high) ** 0.5)  # room for two of the ticks below
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        bottom = min(low, 0) if panel.scale == "from zero" else low
        margin = max(0.06 * (high - bottom), 0.005 * max(abs(bottom), abs(high)), 1e-12)
        axes.set_ylim(0 if panel.scale == "from zero" and low >= 0 else bottom - margin, high + margin)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set(xlim=(0, 1.02 * max(1, *(curve.steps[-1] for curve in panel.curves))), xlabel="step")
    axes.set_ylabel(panel.unit + (", log scale" if logarithmic else ""))
    return figure


def to_pixels(panel: Panel) -> np.ndarray:
    """[height, width, 3] uint8, with title and legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(panel)
    figure.axes[0].set_title(panel.title, parse_math=False)
    figure.axes[0].legend(fontsize=7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure(height: float) -> tuple[Any, Any]:
    """A figure of this height in inches and its axes, with the page's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height))
    axes = figure.add_axes((0.15, 0.2, 0.82, 0.75))
    axes.grid(color="#e6e6e0", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def to_svg(figure: Any, number: int) -> str:
    """Inline SVG with ids unique to this number."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", "<svg " + file.getvalue().split("<svg ", 1)[1], flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="\S+" height="\S+"', r'\1role="img"', svg, count=1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{number}-", svg)


def render_figure(panel: Panel, number: int) -> str:
    legend, notes = "", panel.note
    for curve in panel.curves:
        finite, line = curve.finite(), f"border-top: 3px {'dashed' if curve.dashed else 'solid'} {curve.colour}"
        last = show(finite[-1] if finite else None, panel.unit)
        legend += f'<li><i style="{line}"></i>{escape(curve.name)} <b>{last}</b></li>'
        if lost := len(curve.values) - len(finite):
            notes += f" {lost} of {len(curve.values)} values of {curve.name} are not finite (gaps)."
    drawing = to_svg(draw(panel), number) if any(curve.finite() for curve in panel.curves) else ""
    caption = f"<figcaption><h3>{escape(panel.title)}</h3><ul>{legend}</ul></figcaption>"
    return f'<figure>{caption}{drawing}<p class="quiet">{escape(notes)}</p></figure>'


def escape(value: Any) -> str:
    """Text for HTML, without markup and characters that UTF-8 or XML cannot hold."""
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


def show(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:.2f}%" if unit.startswith("%") else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
