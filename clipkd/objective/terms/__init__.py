"""Every loss term by its name in the configuration, in two halves: what each query gives, and what all of them come to.

The first half sees some of the queries at a time and all of their keys; the second has every query of this process, and
gives its share: the mean over processes is the term of the global batch, and so are the gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from clipkd.objective.comparison import Comparison, Rows, Value
from clipkd.objective.terms import contrastive, features, soft_targets

Metrics = dict[str, Tensor]


def mean(_: Any, rows: Rows) -> Value:
    """Over directions and queries; rows beside `value` are series."""
    means = {name: row.mean() for name, row in rows.items()}
    return means.pop("value"), means


class LossTerm(NamedTuple):
    rows: Callable[[Any, Comparison], Rows]
    """Options and comparison → per-query vectors by name."""
    value: Callable[[Any, Rows], Value] = mean
    """Options and the vectors of all queries → the term and its series."""


TERMS = {
    "info_nce": LossTerm(contrastive.info_nce),
    "sigmoid": LossTerm(contrastive.sigmoid),
    "gkl": LossTerm(soft_targets.gkl, soft_targets.weigh_halves),
    "dkl": LossTerm(soft_targets.dkl, soft_targets.weigh_halves),
    "kl": LossTerm(soft_targets.kl),
    "soft_ce": LossTerm(soft_targets.soft_ce),
    "affinity": LossTerm(soft_targets.affinity),
    "soft_bce": LossTerm(contrastive.soft_bce),
    "itc": LossTerm(contrastive.itc),
    "closed_set": LossTerm(soft_targets.closed_set, soft_targets.weigh_halves),
    "features": LossTerm(features.features),
    "icl": LossTerm(contrastive.icl),
    "gd": LossTerm(features.gd),
    "afd": LossTerm(contrastive.afd),
    "vrd": LossTerm(features.vrd),
    "xrd": LossTerm(features.xrd),
}
"""Name in ObjectiveConfig → term."""

OWN_SCALES: dict[str, tuple[str, ...]] = {
    "icl": ("cross",),
    "xrd": ("cross",),
    "afd": ("fusion",),
    "vrd": ("image", "text"),
}
"""Learned logit scales that terms bring with them."""
