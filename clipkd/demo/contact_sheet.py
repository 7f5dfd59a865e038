"""Draw the demo's samples.png: training pairs, and guesses for drawings in unseen styles."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipkd.config.data import DataConfig
from clipkd.data import PairSet, open_pairs
from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import Images
from clipkd.images import open_image, to_rgb

COLUMNS = 6
TILE, TEXT_WIDTH, LINE, MARGIN = 72, 200, 16, 16
RIGHT, WRONG, INK, FAINT = "#147a3d", "#b3261e", "#1c1b1f", "#6b6870"
FONT, BOLD = ImageFont.load_default(12), ImageFont.load_default(15)


def draw_contact_sheet(path: Path, pairs: Path, held_out: Path, guesses: Mapping[str, Sequence[int]]) -> None:
    """Draw two rows of training pairs, then four rows of held-out drawings with each model's guess.

    guesses: model name → predicted class of every held-out image, in the set's order.
    """
    source = open_pairs(DataConfig(path=str(pairs), caption_key="captions"))
    assert isinstance(source, PairSet)
    found = open_evaluation_set(held_out)
    images = Images(found.pictures, lambda image: image)
    assert found.classnames is not None
    cell = (TILE + TEXT_WIDTH, max(TILE, LINE * (2 + len(guesses))) + MARGIN)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, 6 * cell[1] + 3 * 32), "white")
    draw = ImageDraw.Draw(sheet)

    draw.text((MARGIN, 8), "training pairs (one of their captions)", INK, BOLD)
    for number in range(2 * COLUMNS):
        pair = source.read(number * (len(source) // (2 * COLUMNS)))
        at = (number % COLUMNS * cell[0] + MARGIN, 32 + number // COLUMNS * cell[1])
        paste(sheet, to_rgb(open_image(pair.image)), at)
        caption = pair.captions[number % len(pair.captions)]
        for line, text in enumerate(wrap(draw, caption)):
            draw.text((at[0] + TILE + 8, at[1] + line * LINE), text, INK, FONT)

    top = 40 + 2 * cell[1]
    draw.text((MARGIN, top), f"unseen style: {held_out.name} (truth, then each model's guess)", INK, BOLD)
    for number in range(4 * COLUMNS):
        position = number * (len(images) // (4 * COLUMNS))
        picture, _ = images[position]
        at = (number % COLUMNS * cell[0] + MARGIN, top + 24 + number // COLUMNS * cell[1])
        paste(sheet, picture, at)
        truth = found.classnames[found.labels[position]]
        draw.text((at[0] + TILE + 8, at[1]), shorten(draw, truth), INK, FONT)
        for line, (model, classes) in enumerate(guesses.items(), start=1):
            name = found.classnames[classes[position]]
            draw.text((at[0] + TILE + 8, at[1] + line * LINE), f"{model}:", FAINT, FONT)
            offset = draw.textlength(f"{model}: ", FONT)
            colour = RIGHT if name == truth else WRONG
            guess = shorten(draw, name, TEXT_WIDTH - 24 - offset)
            draw.text((at[0] + TILE + 8 + offset, at[1] + line * LINE), guess, colour, FONT)
    sheet.save(path)


def paste(sheet: Image.Image, picture: Image.Image, at: tuple[int, int]) -> None:
    sheet.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), at)


def shorten(draw: ImageDraw.ImageDraw, text: str, width: float = TEXT_WIDTH - 24) -> str:
    if draw.textlength(text, FONT) <= width:
        return text
    while text and draw.textlength(text + "…", FONT) > width:
        text = text[:-1]
    return text + "…"


def wrap(draw: ImageDraw.ImageDraw, text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if draw.textlength(f"{lines[-1]} {word}".strip(), FONT) > TEXT_WIDTH - 24 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:4]
