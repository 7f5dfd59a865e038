"""Loss terms: pure functions of tensors. They know no ranks, no modules and no configuration."""

from clipkd.losses.contrastive import info_nce
from clipkd.losses.features import feature_mse
from clipkd.losses.gkl import (
    RowStatistics,
    gkl,
    kl,
    row_statistics,
    row_weights,
    soft_cross_entropy,
    weighted_squared_error,
)

__all__ = [
    "RowStatistics",
    "feature_mse",
    "gkl",
    "info_nce",
    "kl",
    "row_statistics",
    "row_weights",
    "soft_cross_entropy",
    "weighted_squared_error",
]
