"""What an export is tried on: real images of odd sizes, odd captions, and what the student says of them."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from clipkd import files
from clipkd.models.encoder import Encoder

DRAWINGS = Path(__file__).parents[1] / "demo" / "assets"
TILE, COLUMNS = 32, 32
"""Side of a drawing on the sheet of Noto Emoji (Apache-2.0), pixels; drawings in a row."""

NUM_IMAGES = 64
EXAMPLE, EXAMPLE_LABELS = 16, ("a grinning face", "a red heart", "a drawing of money")
"""Which drawing becomes example.png, and what the snippets of the card ask of it."""

ODD_CAPTIONS = (
    *("", "a", "A PHOTO of a Dog!", "it's  two\tcats\n& 3½ dogs", "naïve café, “quoted” – ‘so’…", "AT&amp;T &lt;b&gt;"),
    *("日本語のキャプション", "🐈‍⬛ 🇩🇪", "#hashtag @user 100%", "x" * 90, "one more word and " * 30),
)


@dataclass(frozen=True)
class Probes:
    """A folder: images/*.png (RGB), captions.json, features.safetensors."""

    folder: Path

    @property
    def images(self) -> list[Path]:
        return sorted((self.folder / "images").glob("*.png"))

    @property
    def captions(self) -> list[str]:
        return json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))

    def features(self) -> dict[str, Tensor]:
        """image [n, d] and text [m, d], of the student itself."""
        return load_file(self.folder / "features.safetensors")


def write_probes(encoder: Encoder, folder: Path, images: list[Image.Image], captions: list[str]) -> Probes:
    """The images as RGB, the captions with odd ones added, and the encoder's features of both."""
    (folder / "images").mkdir(parents=True)
    captions = list(dict.fromkeys([*captions, *ODD_CAPTIONS]))
    for number, image in enumerate(images):
        image.convert("RGB").save(folder / "images" / f"{number:03d}.png")
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    probes = Probes(folder)
    with torch.inference_mode():
        pixels = [encoder.preprocess(Image.open(path)) for path in probes.images]
        # One at a time, as no batch has to be equal to another.
        image = torch.cat([encoder.encode_image(each[None]) for each in pixels])
        text = torch.cat([encoder.encode_text(encoder.spec.tokenize([caption])) for caption in captions])
    files.write_tensors(folder / "features.safetensors", {"image": image, "text": text})
    return probes


def cut_drawings(number: int = NUM_IMAGES) -> list[Image.Image]:
    """Cut-outs of the sheet, 30 to 500 pixels a side, upright and broad: the same ones every time."""
    sheet = Image.open(DRAWINGS / "noto.webp").convert("RGBA")
    sheet = Image.alpha_composite(Image.new("RGBA", sheet.size, "white"), sheet).convert("RGB")
    rng = random.Random(0)
    cuts = []
    for _ in range(number):
        width, height = rng.randint(30, 500), rng.randint(30, 500)
        left, upper = rng.randint(0, sheet.width - width), rng.randint(0, sheet.height - height)
        cuts.append(sheet.crop((left, upper, left + width, upper + height)))
    return cuts


def drawing_names(number: int = NUM_IMAGES) -> list[str]:
    with (DRAWINGS / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file, delimiter="\t")]
    return [f"a drawing of {name}" for name in names[:: len(names) // number][:number]]


def write_example(path: Path) -> None:
    """One drawing, enlarged to an odd size."""
    left, upper = EXAMPLE % COLUMNS * TILE, EXAMPLE // COLUMNS * TILE
    tile = Image.open(DRAWINGS / "noto.webp").convert("RGBA").crop((left, upper, left + TILE, upper + TILE))
    drawing = Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB")
    drawing.resize((131, 99), Image.Resampling.BICUBIC).save(path)
    path.chmod(0o644)
