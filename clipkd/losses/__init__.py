"""Loss terms: pure functions of tensors. They know no ranks, no modules and no configuration."""

from clipkd.losses.contrastive import info_nce, info_nce_gradients, sigmoid_loss, soft_label_bce
from clipkd.losses.features import feature_mse
from clipkd.losses.gkl import RowStatistics, dkl, gkl, row_statistics, row_weights, weighted_squared_error
from clipkd.losses.similarity import Queue, SimilarityStatistics, similarity_statistics
from clipkd.losses.soft_targets import (
    SoftTargetStatistics,
    kl,
    log_mean_softmax,
    mixed_target,
    soft_cross_entropy,
    soft_target_statistics,
)
from clipkd.losses.streaming import TILE_SIZE, compile_tile, in_panels, panel_height

__all__ = [
    "TILE_SIZE",
    "Queue",
    "RowStatistics",
    "SimilarityStatistics",
    "SoftTargetStatistics",
    "compile_tile",
    "dkl",
    "feature_mse",
    "gkl",
    "in_panels",
    "info_nce",
    "info_nce_gradients",
    "kl",
    "log_mean_softmax",
    "mixed_target",
    "panel_height",
    "row_statistics",
    "row_weights",
    "sigmoid_loss",
    "similarity_statistics",
    "soft_cross_entropy",
    "soft_label_bce",
    "soft_target_statistics",
    "weighted_squared_error",
]
