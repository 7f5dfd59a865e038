"""Losses on the features themselves."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def feature_mse(
    student_features: Float[Tensor, "b d"],
    teacher_features: Float[Tensor, "b d"],
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "*rows"]:
    """Mean squared error over batch and width, between unit features of one modality: 2·(1 − cosine)/d on average.

    CLIP-KD's FD (arXiv 2307.12732), which weights it by 2000. The student's features come projected to the teacher's
    width and normalised again. reduction none gives one value per row, the mean over its width.

    Raises: ValueError if the widths differ.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"student features {tuple(student_features.shape)} and teacher features {tuple(teacher_features.shape)} "
            "differ in shape; project the student's to the teacher's width first"
        )
    rows = F.mse_loss(student_features, teacher_features, reduction="none").mean(dim=-1)
    return rows if reduction == "none" else rows.mean()
