"""Losses on the features themselves."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def feature_mse(student_features: Float[Tensor, "b d"], teacher_features: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
    """Mean squared error over the width of each row; of unit features, 2·(1 − cosine)/d.

    CLIP-KD's FD (arXiv 2307.12732), which weights it by 2000. The student's features come projected to the teacher's
    width and normalised again.

    Raises: ValueError if the shapes differ.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"student features {tuple(student_features.shape)} and teacher features {tuple(teacher_features.shape)} "
            "differ in shape; project the student's to the teacher's width first"
        )
    return F.mse_loss(student_features, teacher_features, reduction="none").mean(dim=-1)
