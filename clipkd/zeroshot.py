"""Zero-shot classification (CLIP, arXiv 2103.00020 §3.1): numbers from functions, whatever the model behind them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def build_classifier(
    encode_texts: Callable[[list[str]], Float[Tensor, "n d"]],
    classnames: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    *,
    batch_size: int = 1024,
) -> Float[Tensor, "k d"]:
    """One unit vector per class: the normalised mean of its normalised prompts.

    encode_texts: prompts → unit-norm features. A template is a callable or a text with the placeholder {c}.
    batch_size: prompts per call of encode_texts; classes are not split between calls.
    """
    classes_per_batch = max(1, batch_size // len(templates))
    # A name that stands twice gets one vector, not two that round differently.
    distinct = list(dict.fromkeys(classnames))
    rows = []
    for start in range(0, len(distinct), classes_per_batch):
        names = distinct[start : start + classes_per_batch]
        prompts = [fill_template(template, name) for name in names for template in templates]
        features = encode_texts(prompts).view(len(names), len(templates), -1)
        rows.append(F.normalize(features.mean(dim=1), dim=-1))
    position = {name: index for index, name in enumerate(distinct)}
    return torch.cat(rows)[[position[name] for name in classnames]]


def fill_template(template: str | Callable[[str], str], name: str) -> str:
    return template.replace("{c}", name) if isinstance(template, str) else template(name)


def rank_classes(
    image_features: Float[Tensor, "b d"], classifier: Float[Tensor, "k d"], *, num_ranks: int = 5
) -> Int[Tensor, "b r"]:
    """The most similar classes of each image, best first; of equal ones (duplicate names) the lowest index."""
    # Equal classes must get equal cosines to the bit, and a matrix product does not promise that.
    distinct, copy_of = classifier.unique(dim=0, return_inverse=True)
    cosines = (image_features @ distinct.T)[:, copy_of]
    return cosines.sort(dim=-1, descending=True, stable=True).indices[:, : min(num_ranks, len(classifier))]


@dataclass(frozen=True)
class ZeroShotScore:
    """Counts are exact; shares lie in [0, 1]."""

    num_images: int
    num_correct1: int
    num_correct5: int
    acc1: float
    acc5: float
    mean_per_class_recall: float
    """Mean over the classes that have images."""


def score(ranked: Int[Tensor, "n r"], labels: Int[Tensor, "n"]) -> ZeroShotScore:
    """Raises: ValueError if there is nothing to score."""
    if not len(labels):
        raise ValueError("no images to score")
    hits = ranked == labels[:, None]
    correct1, correct5 = hits[:, :1].any(dim=1), hits[:, :5].any(dim=1)
    recalls = [correct1[labels == label].double().mean() for label in labels.unique()]
    return ZeroShotScore(
        num_images=len(labels),
        num_correct1=int(correct1.sum()),
        num_correct5=int(correct5.sum()),
        acc1=correct1.double().mean().item(),
        acc5=correct5.double().mean().item(),
        mean_per_class_recall=torch.stack(recalls).mean().item(),
    )
