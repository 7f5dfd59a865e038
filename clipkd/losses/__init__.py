"""Loss terms: pure functions of tensors. They know no ranks, no modules and no configuration."""

from clipkd.losses.contrastive import info_nce, info_nce_gradients, sigmoid_loss, soft_label_bce
from clipkd.losses.features import feature_mse
from clipkd.losses.fused import query_statistics
from clipkd.losses.gkl import RowStatistics, gkl, row_statistics, row_weights
from clipkd.losses.panels import compile_tile, in_panels, panel_height
from clipkd.losses.soft_targets import (
    SoftTargetStatistics,
    log_mean_softmax,
    mixed_target,
    soft_target_statistics,
)

__all__ = [
    "RowStatistics",
    "SoftTargetStatistics",
    "compile_tile",
    "feature_mse",
    "gkl",
    "in_panels",
    "info_nce",
    "info_nce_gradients",
    "log_mean_softmax",
    "mixed_target",
    "panel_height",
    "query_statistics",
    "row_statistics",
    "row_weights",
    "sigmoid_loss",
    "soft_label_bce",
    "soft_target_statistics",
]
