"""Contrastive losses on similarity logits: one row per query, one column per candidate."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def info_nce(logits: Float[Tensor, "b c"], positives: Int[Tensor, "b"] | Bool[Tensor, "b c"]) -> Float[Tensor, "b"]:
    """−log softmax(logits)[positive] of each query, nats (CLIP, arXiv 2103.00020).

    positives: each query's column, or a mask of all its positives, which then share the target equally (ALBEF,
    arXiv 2107.07651) and must not be none. CLIP's loss is the mean over queries and directions.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if positives.dtype == torch.bool:
        positives = positives.to(logits.dtype) / positives.sum(dim=-1, keepdim=True)
    return F.cross_entropy(logits, positives, reduction="none")


def sigmoid_loss(logits: Float[Tensor, "b c"], positives: Bool[Tensor, "b c"]) -> Float[Tensor, "b"]:
    """−Σ_j log σ(z_ij · logits_ij), z = 1 for positives and −1 for all others, nats (SigLIP, arXiv 2303.15343).

    The logits carry the bias. SigLIP's loss is the mean over the queries of one direction, which covers every pair.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum(dim=-1)


def soft_label_bce(student_logits: Float[Tensor, "b c"], teacher_logits: Float[Tensor, "b c"]) -> Float[Tensor, "b"]:
    """Σ_j of the binary cross-entropy between σ(teacher) and σ(student), nats: SigLIP's loss with soft labels.

    Both logits carry their model's bias. No gradient reaches the teacher.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    labels = teacher_logits.detach().to(dtype).sigmoid()
    return F.binary_cross_entropy_with_logits(student_logits.to(dtype), labels, reduction="none").sum(dim=-1)


def info_nce_gradients(
    logits_per_image: Float[Tensor, "b c"],
    logits_per_text: Float[Tensor, "b c"],
    *,
    image_keys: Float[Tensor, "c d"],
    text_keys: Float[Tensor, "c d"],
    logit_scale: Float[Tensor, ""],
    positives: Bool[Tensor, "b c"],
    image_normalizers: Float[Tensor, "c"],
    text_normalizers: Float[Tensor, "c"],
) -> list[Float[Tensor, "b d"]]:
    """∂InfoNCE/∂features of b of the c pairs of a batch, in closed form (CLIP-KD's GD, arXiv 2307.12732).

    Order: image as a query, image as a key, text as a query, text as a key. Normalizers: log Σ_j exp(logits_ij) of
    all c queries of each direction, from which a column of probabilities follows without the other rows.
    """
    factor = logit_scale / len(image_keys)
    target = positives.to(logits_per_image.dtype) / positives.sum(dim=-1, keepdim=True)

    def gradient(logits: Tensor, normalizers: Tensor, keys: Tensor) -> Tensor:
        return factor * ((logits - normalizers).exp() - target) @ keys

    return [
        gradient(logits_per_image, logits_per_image.logsumexp(dim=-1, keepdim=True), text_keys),
        gradient(logits_per_image, text_normalizers, text_keys),
        gradient(logits_per_text, logits_per_text.logsumexp(dim=-1, keepdim=True), image_keys),
        gradient(logits_per_text, image_normalizers, image_keys),
    ]
