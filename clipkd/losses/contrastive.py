"""Contrastive task losses on similarity logits."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def info_nce(logits: Float[Tensor, "b c"], positives: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """Mean over queries of −log softmax(logits)[positive], nats; `positives` is each query's column (CLIP, arXiv 2103.00020).

    CLIP's loss is the mean of this over both directions.
    """
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), positives)
