"""Results of `clipkd eval` as sections of a page: scores, cost, calibration, comparison with the teacher."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clipkd.evaluation.results import Results, label, read_samples
from clipkd.evaluation.sets import EvaluationSet
from clipkd.evaluation.subjects import open_subject
from clipkd.evaluation.tasks import Task
from clipkd.images import open_image
from clipkd.report.figures import COLOURS, Rows, escape, new_figure, show, to_svg
from clipkd.report.page import section, table

COSTS = {
    "parameters": ("parameters of both towers", 1e6, "million"),
    "macs": ("multiply-accumulates of one image", 1e6, "million"),
    "latency_ms": ("latency of one image", 1.0, "milliseconds, median"),
}
MOST_PICTURES = 12
MOST_CLASSES = 5
PIXELS = 144


@dataclass(frozen=True)
class Found:
    folder: Path
    rows: Rows

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["key"] for row in self.rows))

    def models(self) -> list[str]:
        return list(dict.fromkeys(label(row) for row in self.rows))

    def colour(self, row: dict[str, Any]) -> str:
        return COLOURS[self.models().index(label(row)) % len(COLOURS)]


def read_results(folder: Path) -> Found | None:
    rows = Results(folder).rows()
    return Found(folder, rows) if rows else None


def render_results(found: Found, number: Iterator[int]) -> str:
    """number: counts the figures of the page."""
    body = section("Zero-shot evaluation", score_table(found))
    body += section("Accuracy against cost", pareto_text(found), "".join(pareto_figures(found, number)))
    if calibrated := [row for row in found.rows if row.get("calibration")]:
        figures = "".join(reliability_figure(found, task, calibrated, number) for task in found.tasks())
        text = (
            "<p>Accuracy among images of a confidence (softmax at the model's own scale); the grey line is perfect.</p>"
        )
        body += section("Calibration", text, figures)
    students = [row for row in found.rows if "lost_classes" in (row.get("teacher") or {})]
    if shown := best_of_each_task(students or [row for row in found.rows if "num_correct1" in row]):
        body += section("Answers", "".join(answers(found, row) for row in shown))
    if students:
        body += section("Classes that lost most", lost_table(students))
        body += section(
            "Mistakes of the student that the teacher does not make", "".join(pictures(found, row) for row in students)
        )
    return body


def score_table(found: Found) -> str:
    rows = []
    for row in found.rows:
        low, high = row["ci95"].get("main_metric") or (None, None)
        interval = "–" if low is None or high is None else f"{100 * low:.2f} to {100 * high:.2f}"
        beside = row.get("teacher") or {}
        calibration = row.get("calibration") or {}
        rows.append(
            (
                row["key"],
                label(row),
                row["main_metric_name"],
                percent(row["metrics"]["main_metric"]),
                interval,
                percent(row.get("chance")),
                f"{row['n']:,}",
                percent(beside.get("retained")),
                percent(beside.get("agreement")),
                "–" if beside.get("kl") is None else f"{beside['kl']:.3f}",
                percent(calibration.get("ece")),
                row.get("precision", "–"),
            )
        )
    header = ("task", "model", "metric", "score", "95 % interval", "chance", "n", "share kept", "same answer")
    header += ("KL from teacher", "ECE", "precision")
    note = '<p class="quiet">Share kept, same answer and KL: against the teacher. ECE: expected calibration error.</p>'
    return table(header, rows, "numbers") + note


def percent(value: Any) -> str:
    return show(None if value is None else 100 * value, "%")


def mean_scores(found: Found) -> tuple[list[str], dict[str, float]]:
    """Tasks that every model was evaluated on; model → mean main metric over them."""
    scores = {(label(row), row["key"]): row["metrics"]["main_metric"] for row in found.rows}
    models = found.models()
    common = [task for task in found.tasks() if all(scores.get((model, task)) is not None for model in models)]
    return common, {m: sum(scores[m, task] for task in common) / len(common) for m in models} if common else {}


def pareto_text(found: Found) -> str:
    common, _ = mean_scores(found)
    if not common:
        return "<p>The models share no task.</p>"
    named = escape(common[0]) if len(common) == 1 else f"the mean over {len(common)} tasks"
    devices = sorted({str(row["cost"]["device"]) for row in found.rows if row.get("cost")})
    return (
        f"<p>Score: main metric, {named}. The line joins the Pareto front. "
        f"Latency was measured on {escape('; '.join(devices))}, batch 1.</p>"
    )


def pareto_figures(found: Found, number: Iterator[int]) -> Iterator[str]:
    _, scores = mean_scores(found)
    costs = {label(row): row["cost"] for row in found.rows if row.get("cost")}
    for cost, (title, unit, word) in COSTS.items():
        points = []
        for model, score in scores.items():
            if model in costs:
                value = costs[model][cost]
                total = value["image"] + value["text"] if cost == "parameters" else value["image"]
                points.append((total / unit, 100 * score, model))
        if points:
            yield figure(title, draw_pareto(found, points, f"{word}, log scale", next(number)), legend(found, points))


def legend(found: Found, points: list[tuple[float, float, str]]) -> str:
    models = found.models()
    return "".join(
        f'<li><i style="border-top: 3px solid {COLOURS[models.index(model) % len(COLOURS)]}"></i>{escape(model)} '
        f"<b>{y:.2f}%</b> at {show(x)}</li>"
        for x, y, model in points
    )


def figure(title: str, svg: str, items: str, note: str = "") -> str:
    caption = f"<figcaption><h3>{escape(title)}</h3><ul>{items}</ul></figcaption>"
    return f'<figure>{caption}{svg}<p class="quiet">{escape(note)}</p></figure>'


def draw_pareto(found: Found, points: list[tuple[float, float, str]], unit: str, number: int) -> str:
    from matplotlib import ticker

    drawing, axes = new_figure(3.0)
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    axes.plot(*zip(*front, strict=True), color="#9aa3ad", linewidth=1, zorder=1)
    models = found.models()
    for x, y, model in points:
        axes.plot([x], [y], "o", color=COLOURS[models.index(model) % len(COLOURS)], markersize=6, zorder=2)
    low, high = min(x for x, _, _ in points), max(x for x, _, _ in points)
    axes.set_xscale("log")
    axes.set(xlim=(low / 1.5, high * 1.5), xlabel=unit, ylabel="score, %")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7) if high < 10 * low else (1, 3)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    return to_svg(drawing, number)


def reliability_figure(found: Found, task: str, rows: Rows, number: Iterator[int]) -> str:
    own = [row for row in rows if row["key"] == task]
    if not own:
        return ""
    drawing, axes = new_figure(3.0)
    axes.plot([0, 100], [0, 100], color="#c4c7cb", linewidth=1)
    items = ""
    for row in own:
        bins = zip(row["calibration"]["confidences"], row["calibration"]["accuracies"], strict=True)
        points = [(100 * x, 100 * y) for x, y in bins if x is not None and y is not None]
        axes.plot(*zip(*points, strict=True), "o-", color=found.colour(row), linewidth=1.4, markersize=3.5)
        line = f"border-top: 3px solid {found.colour(row)}"
        items += f'<li><i style="{line}"></i>{escape(label(row))} <b>ECE {percent(row["calibration"]["ece"])}</b></li>'
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence, %", ylabel="accuracy, %")
    return figure(task, to_svg(drawing, next(number)), items)


def lost_table(students: Rows) -> str:
    rows = [
        (row["key"], label(row), lost["name"], percent(lost["recall"]), percent(lost["teacher_recall"]))
        for row in students
        for lost in row["teacher"]["lost_classes"][:MOST_CLASSES]
    ]
    header = ("task", "student", "class", "student's recall", "teacher's recall")
    return table(header, rows, "numbers") if rows else "<p>No class has a lower recall than under the teacher.</p>"


def best_of_each_task(rows: Rows) -> Rows:
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        held = best.get(row["key"])
        if held is None or row["metrics"]["acc1"] > held["metrics"]["acc1"]:
            best[row["key"]] = row
    return list(best.values())


def open_evaluated(found: Found, row: dict[str, Any]) -> tuple[EvaluationSet, dict[str, list[Any]]]:
    """The images and the samples table of a result. Raises: ValueError or OSError if either is gone or has changed."""
    options: dict[str, Any] = row["task_options"]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    data = open_subject(Task(**options), row["data"]).data
    if data.sha256 != row["data_sha256"]:
        raise ValueError(f"{row['data']} has changed since the evaluation")
    return data, read_samples(found.folder / row["samples"])


def in_proportion(correct: Sequence[bool], number: int) -> list[int]:
    """Places of a few images, evenly spread, right and wrong ones in the proportion of all."""
    right, wrong = ([place for place, hit in enumerate(correct) if hit == kind] for kind in (True, False))
    number = min(number, len(correct))
    num_right = round(number * len(right) / max(1, len(correct)))
    shares = ((right, num_right), (wrong, number - num_right))
    return sorted(places[len(places) * i // share] for places, share in shares for i in range(share))


def answers(found: Found, row: dict[str, Any]) -> str:
    """A few images with the five likeliest classes of each."""
    title = f"<h3>{escape(row['key'])}: {escape(label(row))}</h3>"
    try:
        data, table = open_evaluated(found, row)
        shown = "".join(answer(data, table, place) for place in in_proportion(table["correct"], MOST_PICTURES))
    except (ValueError, OSError, KeyError, TypeError) as error:
        return f"{title}<p>No pictures: {escape(error)}.</p>"
    note = f"Right and wrong answers in their true proportion ({percent(row['metrics']['acc1'])} right). Bars: probability."
    return f'{title}<p class="quiet">{note}</p><div class="thumbs">{shown}</div>'


def answer(data: EvaluationSet, table: dict[str, list[Any]], place: int) -> str:
    assert data.classnames is not None
    truth = data.classnames[data.labels[place]]
    text = f"<b>{escape(truth)}</b>"
    for number, probability in zip(table["top5"][place], table["probabilities"][place], strict=True):
        name = data.classnames[number]
        kind = "right" if name == truth else "wrong"
        text += f'<span class="bar {kind}" style="--share: {100 * probability:.1f}%">{escape(name)}</span>'
    return thumbnail(data, place, text)


def pictures(found: Found, student: dict[str, Any]) -> str:
    """Images that only the student gets wrong, ordered by the teacher's margin."""
    title = f"<h3>{escape(student['key'])}: {escape(label(student))}</h3>"
    own = (student["key"], student["teacher"]["model_sha256"])
    teacher = next((row for row in found.rows if (row["key"], row["model_sha256"]) == own), None)
    if teacher is None:
        return f"{title}<p>The teacher's own results are not in {escape(found.folder)}.</p>"
    try:
        data, ours = open_evaluated(found, student)
        theirs = read_samples(found.folder / teacher["samples"])
        lost = [place for place in range(len(data)) if theirs["correct"][place] and not ours["correct"][place]]
        lost.sort(key=lambda place: -theirs["margin"][place])
        shown = "".join(mistake(data, place, ours["top5"][place][0]) for place in lost[:MOST_PICTURES])
    except (ValueError, OSError, KeyError, TypeError) as error:
        return f"{title}<p>No pictures: {escape(error)}.</p>"
    count = f"{len(lost):,} of {len(data):,} images; the teacher's largest margins first."
    return f'{title}<p class="quiet">{count}</p><div class="thumbs">{shown}</div>'


def mistake(data: EvaluationSet, place: int, guess: int) -> str:
    assert data.classnames is not None
    truth, wrong = data.classnames[data.labels[place]], data.classnames[guess]
    return thumbnail(
        data, place, f'<span class="right">{escape(truth)}</span><span class="wrong">{escape(wrong)}</span>'
    )


def thumbnail(data: EvaluationSet, place: int, text: str) -> str:
    found = data.pictures[place]
    image = open_image(found.read()).convert("RGBA")
    image.thumbnail((PIXELS, PIXELS))
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{escape(found.key)}"/>{text}</figure>'
