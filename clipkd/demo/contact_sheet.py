"""Draw the demo's samples.png: training pairs, answers for drawings in an unseen style, and a search by text."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipkd.config.data import DataConfig
from clipkd.data import PairSet, open_pairs
from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import EvaluationSet
from clipkd.images import WHITE, open_image, to_rgb
from clipkd.inference.runtime import load_student
from clipkd.report.evaluation import in_proportion

COLUMNS, NUM_ANSWERS, NUM_FOUND = 6, 24, 8
TILE, TEXT_WIDTH, LINE, MARGIN = 72, 200, 16, 16
RIGHT, WRONG, INK, FAINT, BAR = "#147a3d", "#b3261e", "#1c1b1f", "#6b6870", "#dfe8f2"
FONT, BOLD = ImageFont.load_default(12), ImageFont.load_default(15)
QUERIES = ("heart", "a hand", "a vehicle", "an animal", "flower", "a bird")
"""Texts to search for: many drawings fit each. The text tower knows the training captions' words alone."""


class Sheet:
    """A white page that grows downwards."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (COLUMNS * (TILE + TEXT_WIDTH) + MARGIN, MARGIN), "white")
        self.draw = ImageDraw.Draw(self.image)

    def grow(self, height: int) -> int:
        """Add white space; returns where it starts."""
        top, old = self.image.height, self.image
        self.image = Image.new("RGB", (old.width, top + height), "white")
        self.image.paste(old)
        self.draw = ImageDraw.Draw(self.image)
        return top

    def title(self, text: str) -> None:
        top = self.grow(28)
        self.draw.text((MARGIN, top), text, INK, BOLD)

    def text(self, at: tuple[float, float], text: str, colour: str = INK, width: float = TEXT_WIDTH - 24) -> None:
        """One line, cut to a width in pixels."""
        shown = text
        while shown and self.draw.textlength(shown, FONT) > width:
            shown = shown[:-2] + "…" if len(shown) > 2 else ""
        self.draw.text(at, shown, colour, FONT)

    def paste(self, picture: Image.Image, at: tuple[int, int]) -> None:
        self.image.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), at)


def draw_contact_sheet(
    path: Path, *, pairs: Path, held_out: Path, samples: dict[str, list[Any]], student: Path
) -> None:
    """Draw a row of training pairs, four rows of answers and one row per query.

    samples: the evaluation's table for the held-out drawings. student: an exported folder, which answers the queries.
    """
    sheet = Sheet()
    draw_pairs(sheet, pairs)
    data = open_evaluation_set(held_out)
    draw_answers(sheet, data, samples)
    draw_search(sheet, data, student)
    sheet.image.save(path)


def draw_pairs(sheet: Sheet, pairs: Path) -> None:
    source = open_pairs(DataConfig(path=str(pairs), caption_key="captions"))
    assert isinstance(source, PairSet)
    sheet.title(f"training pairs: {COLUMNS} of {len(source):,}")
    top = sheet.grow(TILE + MARGIN)
    for column in range(COLUMNS):
        pair = source.read(column * (len(source) // COLUMNS))
        left = column * (TILE + TEXT_WIDTH) + MARGIN
        sheet.paste(to_rgb(open_image(pair.image), background=WHITE), (left, top))
        for line, caption in enumerate(pair.captions[:4]):
            sheet.text((left + TILE + 8, top + line * LINE), caption)


def draw_answers(sheet: Sheet, data: EvaluationSet, samples: dict[str, list[Any]]) -> None:
    """Drawings with their names and the student's five likeliest answers; a bar's length is the probability."""
    assert data.classnames is not None
    places = in_proportion(samples["correct"], NUM_ANSWERS)
    right, top5 = (np.mean(hits) for hits in (samples["correct"], hits_in_top5(samples)))
    sheet.title(
        f"an unseen style ({data.root}): {len(places)} of {len(data):,} drawings, each named out of {data.num_classes:,} "
        f"things; right answers in their true proportion (first {right:.0%}, among five {top5:.0%})"
    )
    height = 6 * LINE + MARGIN
    top = 0
    for number, place in enumerate(places):
        if number % COLUMNS == 0:
            top = sheet.grow(height)
        left = number % COLUMNS * (TILE + TEXT_WIDTH) + MARGIN
        sheet.paste(to_rgb(open_image(data.pictures[place].read()), background=WHITE), (left, top))
        truth = data.classnames[int(samples["label"][place])]
        left += TILE + 8
        sheet.text((left, top), truth)
        answers = zip(samples["top5"][place], samples["probabilities"][place], strict=True)
        for line, (guess, probability) in enumerate(answers, start=1):
            at = (left, top + line * LINE)
            sheet.draw.rectangle((*at, at[0] + probability * (TEXT_WIDTH - 24), at[1] + LINE - 3), BAR)
            name = data.classnames[int(guess)]
            sheet.text((at[0] + 2, at[1]), name, RIGHT if name == truth else WRONG)


def hits_in_top5(samples: dict[str, list[Any]]) -> list[bool]:
    return [label in five for label, five in zip(samples["label"], samples["top5"], strict=True)]


def draw_search(sheet: Sheet, data: EvaluationSet, student: Path) -> None:
    """The drawings nearest to each query, as `clipkd predict --query` ranks them."""
    model = load_student(str(student), "auto")
    pictures = [to_rgb(open_image(picture.read())) for picture in data.pictures]
    pixels = [model.preprocess(picture) for picture in pictures]
    features = np.concatenate([model.encode_pixels(np.stack(pixels[i : i + 64])) for i in range(0, len(pixels), 64)])
    cosines = features @ model.encode_texts(QUERIES).T
    sheet.title("search: the nearest drawings of that style to a text")
    for query, column in zip(QUERIES, cosines.T, strict=True):
        top = sheet.grow(TILE + LINE + MARGIN)
        sheet.text((MARGIN, top + TILE / 2), query, INK)
        for rank, place in enumerate(np.argsort(-column, kind="stable")[:NUM_FOUND]):
            left = MARGIN + TEXT_WIDTH + rank * (TILE + 100)
            sheet.paste(pictures[place], (left, top))
            sheet.text((left, top + TILE), names(data)[place], FAINT, TILE + 92)


def names(data: EvaluationSet) -> list[str]:
    assert data.classnames is not None
    return [data.classnames[int(label)] for label in data.labels]
