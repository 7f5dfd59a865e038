"""Rebuild clipkd/demo/assets from npm packages: the concept table and the two held-out drawing styles.

    npm pack emojibase-data@17.0.0 @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6
    for f in *.tgz; do mkdir "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}" --strip-components 1; done
    python scripts/make_demo_assets.py --emojibase emojibase-data-17.0.0 \
        --noto iconify-json-noto-1.2.9 --fluent iconify-json-fluent-emoji-flat-1.2.6

Needs the demo extra. Licences of what it writes: clipkd/demo/assets/LICENSES.md.
"""

import argparse
import csv
import io
import json
from pathlib import Path

import resvg_py
from PIL import Image

from clipkd.demo.pairs import ASSETS, SHEET_COLUMNS, TILE, openmoji_svg, twemoji_svg

SKIPPED_GROUPS = {"component", "flags"}
SKIPPED_SUBGROUPS = {"family", "keycap", "alphanum", "time"}


def read_concepts(emojibase: Path) -> list[dict[str, str]]:
    """One row per emoji that stands for one thing: no flags, families, clocks, letter buttons, gender or skin variants."""
    names = json.loads((emojibase / "en" / "messages.json").read_text())
    groups = {group["order"]: group["key"] for group in names["groups"]}
    subgroups = {subgroup["order"]: subgroup["message"] for subgroup in names["subgroups"]}
    subgroup_keys = {subgroup["order"]: subgroup["key"] for subgroup in names["subgroups"]}
    rows = []
    for emoji in json.loads((emojibase / "en" / "data.json").read_text()):
        if "group" not in emoji or groups[emoji["group"]] in SKIPPED_GROUPS:
            continue
        if subgroup_keys[emoji["subgroup"]] in SKIPPED_SUBGROUPS or is_gender_variant(emoji):
            continue
        rows.append(
            {
                "hexcode": emoji["hexcode"],
                "name": emoji["label"].lower(),
                "group": groups[emoji["group"]].replace("-", " "),
                "subgroup": subgroups[emoji["subgroup"]].replace("-", " "),
                "tags": ",".join(tag.lower() for tag in emoji.get("tags", [])),
            }
        )
    return rows


def is_gender_variant(emoji: dict) -> bool:
    return any(code in emoji["hexcode"].split("-") for code in ("2640", "2642")) or (
        emoji["hexcode"].startswith(("1F468-", "1F469-"))
    )


class IconifySet:
    """Drawings of an @iconify-json package by code point."""

    def __init__(self, package: Path) -> None:
        icons = json.loads((package / "icons.json").read_text())
        self.icons, self.size = icons["icons"], (icons["width"], icons["height"])
        self.names = json.loads((package / "chars.json").read_text())

    def svg(self, hexcode: str) -> str | None:
        for code in (hexcode.lower(), hexcode.lower().replace("-fe0f", "")):
            if (name := self.names.get(code)) and name in self.icons:
                icon = self.icons[name]
                width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
                return (
                    f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                )
        return None


def write_sheet(svgs: list[str], path: Path) -> None:
    rows = -(-len(svgs) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * TILE, rows * TILE))
    for index, svg in enumerate(svgs):
        tile = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=TILE, height=TILE)))
        sheet.paste(tile.convert("RGBA"), (index % SHEET_COLUMNS * TILE, index // SHEET_COLUMNS * TILE))
    sheet.save(path, lossless=True, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("emojibase", "noto", "fluent"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"unpacked npm package ({name})")
    arguments = parser.parse_args()

    held_out = {"noto": IconifySet(arguments.noto), "fluent": IconifySet(arguments.fluent)}
    concepts = [
        row
        for row in read_concepts(arguments.emojibase)
        if all(icons.svg(row["hexcode"]) for icons in held_out.values())
        and openmoji_svg(row["hexcode"])
        and twemoji_svg(row["hexcode"])
    ]
    with (ASSETS / "concepts.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(concepts[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(concepts)
    for style, icons in held_out.items():
        write_sheet([svg for row in concepts if (svg := icons.svg(row["hexcode"]))], ASSETS / f"{style}.webp")
    print(f"{len(concepts)} concepts in {ASSETS}")


if __name__ == "__main__":
    main()
