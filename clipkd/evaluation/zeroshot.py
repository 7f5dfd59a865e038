"""Zero-shot classifiers from prompts (CLIP, arXiv 2103.00020 §3.1)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def build_classifier(
    encode_texts: Callable[[list[str]], Float[Tensor, "n d"]], classnames: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "k d"]:
    """One unit vector per class: the normalised mean of its normalised prompts.

    encode_texts: prompts → unit-norm features, called with about 1024 prompts. templates: with the placeholder {c}.
    """
    # Equal names get one vector: encoded in two batches, they would round differently.
    distinct = list(dict.fromkeys(classnames))
    size = max(1, 1024 // len(templates))
    rows = []
    for names in (distinct[start : start + size] for start in range(0, len(distinct), size)):
        features = encode_texts([template.replace("{c}", name) for name in names for template in templates])
        rows.append(F.normalize(features.view(len(names), len(templates), -1).mean(dim=1), dim=-1))
    position = {name: index for index, name in enumerate(distinct)}
    return torch.cat(rows)[[position[name] for name in classnames]]
