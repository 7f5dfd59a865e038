"""Zero-shot classifiers from prompts (CLIP, arXiv 2103.00020 §3.1)."""

from collections.abc import Callable, Sequence

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

    encode_texts: prompts → unit-norm features. Templates: callables, or texts with the placeholder {c}.
    batch_size: prompts per call of encode_texts; classes are not split between calls.
    """
    classes_per_batch = max(1, batch_size // len(templates))
    # Equal names get one vector: encoded in two batches, they would round differently.
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


def rank_classes(cosines: Float[Tensor, "b k"], *, num_ranks: int = 5) -> Int[Tensor, "b r"]:
    """The most similar classes of each image, best first; ties (duplicate names) in order of index."""
    return cosines.sort(dim=-1, descending=True, stable=True).indices[:, :num_ranks]
