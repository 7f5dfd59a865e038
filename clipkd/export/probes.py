"""Test inputs for parity checks: images, captions and the student's own features."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipkd import files
from clipkd.images import WHITE, open_image, to_rgb
from clipkd.models.encoder import Encoder

DRAWINGS = Path(__file__).parents[1] / "demo" / "assets"
TILE, COLUMNS = 32, 32
"""Side of a drawing on the sheet of Noto Emoji (Apache-2.0) in pixels; drawings per row."""

NUM_IMAGES = 64
EXAMPLE, EXAMPLE_LABELS = 16, ("a grinning face", "a red heart", "a drawing of money")
"""Number of the drawing in example.png, and the labels that the card's snippets compare it with."""

ODD_CAPTIONS = (
    *("", "a", "A PHOTO of a Dog!", "it's  two\tcats\n& 3½ dogs", "naïve café, “quoted” – ‘so’…", "AT&amp;T &lt;b&gt;"),
    *("日本語のキャプション", "🐈‍⬛ 🇩🇪", "#hashtag @user 100%", "x" * 90, "one more word and " * 30),
)


@dataclass(frozen=True)
class Probes:
    """RGB images and captions with the student's unit-norm features."""

    images: list[Image.Image]
    captions: list[str]
    features: dict[str, Tensor]
    """image [n, d] and text [m, d]."""


def write_probes(encoder: Encoder, folder: Path, images: list[Image.Image], captions: list[str]) -> None:
    """Write the images as RGB PNGs, the captions and odd ones, and the encoder's features of both."""
    (folder / "images").mkdir(parents=True)
    captions = list(dict.fromkeys([*captions, *ODD_CAPTIONS]))
    images = [image.convert("RGB") for image in images]
    for number, image in enumerate(images):
        image.save(folder / "images" / f"{number:03d}.png")
    files.write_json(folder / "captions.json", captions)
    with torch.inference_mode():
        # One at a time: features in batches differ by rounding.
        image = torch.cat([encoder.encode_image(encoder.preprocess(each)[None]) for each in images])
        text = torch.cat([encoder.encode_text(encoder.spec.tokenize([caption])) for caption in captions])
    files.write_tensors(folder / "features.safetensors", {"image": image, "text": text})


def read_probes(folder: Path) -> Probes:
    images = [to_rgb(open_image(str(path))) for path in sorted((folder / "images").glob("*.png"))]
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return Probes(images, captions, files.read_tensors(folder / "features.safetensors"))


def read_sheet() -> Image.Image:
    """The sheet of drawings on white, RGB."""
    return to_rgb(open_image(str(DRAWINGS / "noto.webp")), background=WHITE)


def cut_drawings(number: int = NUM_IMAGES) -> list[Image.Image]:
    """Crops of the sheet with sides of 30 to 500 pixels, the same in every call."""
    sheet, rng, cuts = read_sheet(), random.Random(0), []
    for _ in range(number):
        width, height = rng.randint(30, 500), rng.randint(30, 500)
        left, upper = rng.randint(0, sheet.width - width), rng.randint(0, sheet.height - height)
        cuts.append(sheet.crop((left, upper, left + width, upper + height)))
    return cuts


def drawing_names() -> list[str]:
    with (DRAWINGS / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file, delimiter="\t")]
    return [f"a drawing of {name}" for name in names[:: len(names) // NUM_IMAGES][:NUM_IMAGES]]


def write_example(path: Path) -> None:
    """Write one drawing, enlarged to an odd size."""
    left, upper = EXAMPLE % COLUMNS * TILE, EXAMPLE // COLUMNS * TILE
    tile = read_sheet().crop((left, upper, left + TILE, upper + TILE))
    tile.resize((131, 99), Image.Resampling.BICUBIC).save(path)
