"""Every loss term by its name in the configuration: options and comparison in, value and explaining series out.

Each value is this process's share: the mean over processes is the term of the global batch, and so are the gradients.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from clipkd.comparison import Comparison
from clipkd.terms import contrastive, features, soft_targets

Metrics = dict[str, Tensor]

TERMS: dict[str, Callable[[Any, Comparison], tuple[Tensor, Metrics]]] = {
    "info_nce": contrastive.info_nce,
    "sigmoid": contrastive.sigmoid,
    "gkl": soft_targets.gkl,
    "dkl": soft_targets.dkl,
    "kl": soft_targets.kl,
    "soft_ce": soft_targets.soft_ce,
    "affinity": soft_targets.affinity,
    "soft_bce": contrastive.soft_bce,
    "itc": contrastive.itc,
    "closed_set": soft_targets.closed_set,
    "features": features.features,
    "icl": contrastive.icl,
    "gd": features.gd,
    "afd": contrastive.afd,
    "vrd": features.vrd,
    "xrd": features.xrd,
}
"""Name in ObjectiveConfig → term."""

OWN_SCALES: dict[str, tuple[str, ...]] = {
    "icl": ("cross",),
    "xrd": ("cross",),
    "afd": ("fusion",),
    "vrd": ("image", "text"),
}
"""Learned logit scales that terms bring with them."""
