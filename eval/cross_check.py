"""Zero-shot counts of an open_clip model on a folder in CLIP_benchmark's webdataset layout, by open_clip alone.

    python eval/cross_check.py --model local-dir:runs/demo/student --data runs/demo/data/noto [--expect results.jsonl]

Imports nothing of clipkd and reads the tars with tarfile. With --expect it compares the counts with the last line of
that file for the same data set and exits 1 where an integer differs.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import open_clip
import torch
from PIL import Image


def read_samples(folder: Path):
    """(image, label) of every sample, in file order."""
    for shard in range(int((folder / "nshards.txt").read_text())):
        sample: dict[str, bytes] = {}
        with tarfile.open(folder / f"{shard}.tar") as tar:
            for member in tar.getmembers():
                extension = member.name.rsplit(".", 1)[1]
                sample["label" if extension == "cls" else "image"] = tar.extractfile(member).read()  # type: ignore[union-attr]
                if len(sample) == 2:
                    yield Image.open(io.BytesIO(sample["image"])), int(sample["label"])
                    sample = {}


@torch.no_grad()
def count_correct(model_name: str, pretrained: str | None, root: Path, split: str) -> dict[str, int]:
    model, _, preprocess = open_clip.create_model_and_transforms(model_name, pretrained=pretrained)
    model.eval()
    tokenizer = open_clip.get_tokenizer(model_name)
    classnames = [line for line in (root / "classnames.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = (root / "zeroshot_classification_templates.txt").read_text(encoding="utf-8").splitlines()
    templates = [lambda name, line=line: line.replace("{c}", name) for line in lines if line.strip()]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, classnames, templates)
    first_of_name = torch.tensor([classnames.index(name) for name in classnames])  # equal names score equal to the bit
    counts = {"n": 0, "num_correct1": 0, "num_correct5": 0}
    for image, label in read_samples(root / split):
        features = model.encode_image(preprocess(image)[None], normalize=True)  # type: ignore[index, operator]
        order = (features @ classifier)[0, first_of_name].sort(descending=True, stable=True).indices[:5].tolist()
        counts["n"] += 1
        counts["num_correct1"] += order[0] == label
        counts["num_correct5"] += label in order
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="open_clip name, local-dir:FOLDER or hf-hub:REPO")
    parser.add_argument("--pretrained", help="open_clip tag or weight file")
    parser.add_argument("--data", type=Path, required=True, help="folder in the layout")
    parser.add_argument("--split", default="test")
    parser.add_argument("--expect", type=Path, help="results.jsonl of clipkd to compare with")
    arguments = parser.parse_args()

    counts = count_correct(arguments.model, arguments.pretrained, arguments.data, arguments.split)
    print(json.dumps(counts))
    if arguments.expect:
        rows = [json.loads(line) for line in arguments.expect.read_text().splitlines()]
        rows = [
            row for row in rows if row["dataset"] == arguments.data.resolve().name and row["model"] == arguments.model
        ]
        if not rows:
            raise SystemExit(f"{arguments.expect} has no line of {arguments.model} on {arguments.data.resolve().name}")
        expected = {key: rows[-1][key] for key in counts}
        print("equal" if counts == expected else f"differs from {expected}")
        raise SystemExit(counts != expected)


if __name__ == "__main__":
    main()
