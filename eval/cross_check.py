"""Count zero-shot results of an open_clip model with open_clip alone, as an independent check of `clipkd eval`.

    python eval/cross_check.py --model local-dir:runs/demo/student --data runs/demo/data/noto [--expect eval_results.jsonl]

Imports nothing of clipkd, reads tars with tarfile, encodes one image and one caption at a time, counts with plain loops.
Folders: CLIP_benchmark's webdataset layout (classification, retrieval, multilabel, as dataset_type.txt says; pairs of a
true and a false caption with --kind pairs), or ImageNet's class folders (--layout imagefolder). With --expect it compares
with the last float32 line of that file for the same model and data set, and exits 1 with the first difference.
"""

import argparse
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # of several in a sample, CLIP_benchmark takes the first of these
CAPTIONS = ("txt", lambda data: data.decode().splitlines())
VECTOR = ("npy", lambda data: np.load(io.BytesIO(data)).tolist())
FOUND: dict[str, Any] = {"classification": ("cls", int), "multilabel": VECTOR, "retrieval": CAPTIONS, "pairs": CAPTIONS}


class Model:
    """open_clip's functions for one input at a time: equal inputs then have features that are equal to the bit."""

    def __init__(self, name: str, pretrained: str | None) -> None:
        made: tuple[Any, ...] = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        self.clip, self.preprocess = made[0].eval(), made[2]
        self.tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def image(self, image: Image.Image) -> Tensor:
        # RGB before anything else, as webdataset's decoder and torchvision's ImageFolder do.
        return self.clip.encode_image(self.preprocess(image.convert("RGB"))[None], normalize=True)[0].double()

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        return self.clip.encode_text(self.tokenizer([text]), normalize=True)[0].double()

    def classifier(self, classnames: list[str], templates: list[str]) -> Tensor:
        """[classes, width]. One class per pass, so that duplicate names get equal vectors."""
        fill = [lambda name, template=template: template.format(c=name) for template in templates]
        return open_clip.build_zero_shot_classifier(self.clip, self.tokenizer, classnames, fill, 1).T.contiguous()


def read_lines(path: Path) -> list[str]:
    """Stripped; a blank line counts, such as the fourth class of vtab/clevr_closest_object_distance."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]


def split_name(name: str) -> tuple[str, str]:
    """dir/key.seg.png → dir/key, seg.png."""
    dot = name.index(".", name.rfind("/") + 1)
    return name[:dot], name[dot + 1 :].lower()


def read_shards(folder: Path) -> Iterator[dict[str, bytes]]:
    """Each sample's files by extension, in file order."""
    for shard in range(int((folder / "nshards.txt").read_text())):
        with tarfile.open(folder / f"{shard}.tar") as tar:
            files = (member for member in tar if member.isfile())
            for _, members in itertools.groupby(files, key=lambda member: split_name(member.name)[0]):
                yield {split_name(member.name)[1]: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def read_samples(folder: Path, kind: str) -> Iterator[tuple[Image.Image, Any]]:
    """(image, label | vector of 0 and 1 | captions)."""
    extension, parse = FOUND[kind]
    for sample in read_shards(folder):
        image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        yield Image.open(io.BytesIO(image)), parse(sample[extension])


def read_class_folders(folder: Path) -> tuple[list[str], Iterator[tuple[Image.Image, int]]]:
    """OpenAI's names of the ImageNet classes whose folders are there, in order of synset id; images and labels."""
    from timm.data.imagenet_info import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    names = [open_clip.IMAGENET_CLASSNAMES[synsets.index(path.name)] for path in classes]
    files = ((path, label) for label, path in enumerate(classes) for path in sorted(path.iterdir()))
    return names, ((Image.open(path), label) for path, label in files)


def ranked(rows: Tensor, feature: Tensor) -> list[int]:
    """Rows by their cosine with a feature, best first; of equal ones the lowest index."""
    scores = (rows * feature).sum(dim=1).tolist()  # not a matrix product, which rounds equal rows differently
    return sorted(range(len(scores)), key=lambda row: -scores[row])


def classify(model: Model, classifier: Tensor, samples: Iterator[tuple[Image.Image, Any]]) -> dict[str, float]:
    counts = {"n": 0, "num_correct1": 0, "num_correct5": 0}
    hits: dict[int, list[bool]] = {}
    for image, label in samples:
        order = ranked(classifier.double(), model.image(image))
        hits.setdefault(label, []).append(order[0] == label)
        counts["n"] += 1
        counts["num_correct1"] += order[0] == label
        counts["num_correct5"] += label in order[:5]
    return {**counts, "mean_per_class_recall": sum(sum(own) / len(own) for own in hits.values()) / len(hits)}


def retrieve(model: Model, samples: Iterator[tuple[Image.Image, list[str]]]) -> dict[str, int]:
    """images_found: captions whose image is among the k nearest. texts_found: images with a caption of theirs there."""
    image_rows, text_rows, image_of = [], [], []
    for number, (image, captions) in enumerate(samples):
        image_rows.append(model.image(image))
        text_rows += [model.text(caption) for caption in captions]
        image_of += [number] * len(captions)
    images, texts = torch.stack(image_rows), torch.stack(text_rows)
    by_text = [ranked(images, text).index(image_of[number]) for number, text in enumerate(texts)]
    by_image = [[image_of[text] for text in ranked(texts, image)].index(number) for number, image in enumerate(images)]
    counts = {"n": len(images), "num_captions": len(texts)}
    for k in (1, 5, 10):
        counts[f"num_images_found@{k}"] = sum(rank < k for rank in by_text)
        counts[f"num_texts_found@{k}"] = sum(rank < k for rank in by_image)
    return counts


def average_precision(scores: list[float], positive: list[int]) -> float:
    """Mean over the positives of the precision at their rank; 0 without any (CLIP_benchmark)."""
    hits, total = 0, 0.0
    for rank, place in enumerate(sorted(range(len(scores)), key=lambda place: -scores[place]), start=1):
        if positive[place]:
            hits += 1
            total += hits / rank
    return total / max(hits, 1)


def score_labels(model: Model, classifier: Tensor, samples: Iterator[tuple[Image.Image, Any]]) -> dict[str, float]:
    scored = [((classifier.double() * model.image(image)).sum(dim=1).tolist(), target) for image, target in samples]
    total = 0.0
    for column in range(len(classifier)):
        total += average_precision([scores[column] for scores, _ in scored], [target[column] for _, target in scored])
    return {"n": len(scored), "mean_average_precision": total / len(classifier)}


def choose(model: Model, samples: Iterator[tuple[Image.Image, list[str]]]) -> dict[str, int]:
    """num_correct: images to which the first caption is strictly more similar than the second."""
    right = []
    for image, (true, false) in samples:
        feature = model.image(image)
        right.append(bool((model.text(true) * feature).sum() > (model.text(false) * feature).sum()))
    return {"n": len(right), "num_correct": sum(right)}


def measure(model: Model, root: Path, split: str, kind: str | None, layout: str, save: Path | None) -> dict[str, Any]:
    """The counts; save: a file for the classifier."""
    if kind is None:
        said = root / "dataset_type.txt"
        kind = said.read_text().strip().lower() if said.is_file() else "classification"
    if kind in ("retrieval", "pairs"):
        return (retrieve if kind == "retrieval" else choose)(model, read_samples(root / split, kind))
    if layout == "imagefolder":
        classnames, samples = read_class_folders(root / split)
        templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    else:
        classnames, samples = read_lines(root / "classnames.txt"), read_samples(root / split, kind)
        templates = read_lines(root / "zeroshot_classification_templates.txt")
    classifier = model.classifier(classnames, templates)
    if save is not None:
        save_file({"classifier": classifier}, save)
    return (score_labels if kind == "multilabel" else classify)(model, classifier, samples)


def first_difference(counts: dict[str, Any], row: dict[str, Any]) -> str | None:
    """None if a line of clipkd has these counts.

    Integers must be equal, and the two means but for the rounding of their sums: they depend on scores by order alone, and
    two scores that change places move them by far more than 1e-9.
    """
    for name, value in counts.items():
        expected = row[name] if name in row else row["metrics"].get(name)
        if expected is None or abs(value - expected) > (1e-9 if isinstance(value, float) else 0):
            return f"differs: {name} is {value}, expected {expected}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="open_clip name, local-dir:FOLDER or hf-hub:REPO")
    parser.add_argument("--pretrained", help="open_clip tag or weight file")
    parser.add_argument("--data", type=Path, required=True, help="folder in the layout")
    parser.add_argument("--split", default="test")
    parser.add_argument("--layout", choices=("webdataset", "imagefolder"), default="webdataset")
    parser.add_argument("--kind", choices=tuple(FOUND), help="default: the kind in dataset_type.txt")
    parser.add_argument("--classifier", type=Path, help="file for the classifier [classes, width], as safetensors")
    parser.add_argument("--expect", type=Path, help="eval_results.jsonl of clipkd eval to compare with")
    parser.add_argument("--key", help="key of the line to compare with; default: the data folder's name")
    args = parser.parse_args()

    counts = measure(Model(args.model, args.pretrained), args.data, args.split, args.kind, args.layout, args.classifier)
    print(json.dumps(counts))
    if args.expect:
        key, name = args.key or args.data.resolve().name, args.model.removeprefix("local-dir:")
        names = (name, f"local-dir:{name}", f"{name}@{args.pretrained}")
        rows = map(json.loads, args.expect.read_text().splitlines())
        rows = [row for row in rows if row["key"] == key and row["model"] in names and row["precision"] == "fp32"]
        if not rows:
            raise SystemExit(f"{args.expect} has no float32 line of {args.model} on {key}")
        difference = first_difference(counts, rows[-1])
        print(difference or "equal")
        raise SystemExit(difference is not None)


if __name__ == "__main__":
    main()
